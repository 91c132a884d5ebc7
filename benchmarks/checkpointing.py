"""What saving a checkpoint every 50 steps costs the tiny stage-1 run.

    python -m benchmarks.checkpointing [--steps 20] [--saves 5]

Counts the processor seconds of all threads, which other programs on the machine don't change as
they do the wall time: those of a step, and those of a save with the writing behind it. Wall times
are shown beside, of saves that nothing is computed during: while a run trains, it waits for less.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from configs import tiny_causal_qformer
from seed_jax import sharding, state
from seed_jax.checkpoint import Checkpoints
from seed_jax.data import pipeline, sources
from seed_jax.tasks.causal_qformer import CausalQFormer

EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()

    config = tiny_causal_qformer.get_config()
    mesh = sharding.make_mesh(config.mesh.to_dict())
    task = CausalQFormer(config)
    data = pipeline.train_pipeline(
        sources.open_source(config.data.path, config.data.split),
        batch_size=config.batch_size,
        image_size=config.image_size,
        texts=task.text_fields(),
        data=config.data,
        seed=config.seed,
        put=partial(sharding.put_batch, mesh=mesh),
    )
    graphdef, init, shardings, tx = state.lazily(task, config, mesh)
    current = init()
    step = state.make_train_step(task, graphdef, tx, config, shardings)

    def run(count: int) -> None:
        nonlocal current
        for _ in range(count):
            current, _ = step(current, next(data))
        jax.block_until_ready(current)

    run(2)  # compiles
    began = now()
    run(args.steps)
    a_step = (now() - began) / args.steps

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=2)
        began = now()
        for number in range(args.saves):
            checkpoints.save(number, current, data.get_state())
        checkpoints.close()
        a_save = (now() - began) / args.saves
    data.close()

    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(current)) / 1e6
    print(f"a step: {a_step[0]:.2f} processor seconds, {a_step[1]:.2f} of wall time")
    print(
        f"a save of {megabytes:.0f} MB: {a_save[0]:.2f} processor seconds, {a_save[1]:.2f} of wall"
    )
    share = a_save / (EVERY * a_step)
    print(f"saving every {EVERY} steps: {share[0]:.2%} more work, at most {share[1]:.2%} more time")


def now() -> np.ndarray:
    """Processor seconds so far, and the time of day in seconds."""
    return np.array([time.process_time(), time.perf_counter()])


if __name__ == "__main__":
    main()
