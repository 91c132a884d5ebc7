"""What saving a checkpoint every 50 steps costs the tiny stage-1 run.

    python -m benchmarks.checkpointing [--steps 20] [--saves 5]

Counts the processor seconds of all threads, which other programs on the machine don't change as
they do the wall time: those of a step, and those of a save with the writing behind it.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import jax

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
    graphdef, current, shardings, tx = state.create(task, config, mesh)
    step = state.make_train_step(task, graphdef, tx, config, shardings)

    def run(count: int) -> float:
        nonlocal current
        began = time.process_time()
        for _ in range(count):
            current, _ = step(current, next(data))
        jax.block_until_ready(current)
        return time.process_time() - began

    run(2)  # compiles
    step_seconds = run(args.steps) / args.steps

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=2)
        began = time.process_time()
        for number in range(args.saves):
            checkpoints.save(number, current, data.get_state())
        checkpoints.close()
        save_seconds = (time.process_time() - began) / args.saves
    data.close()

    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(current)) / 1e6
    print(f"a step: {step_seconds:.2f} processor seconds")
    print(f"a save of {megabytes:.0f} MB: {save_seconds:.2f} processor seconds")
    print(f"saving every {EVERY} steps: {save_seconds / (EVERY * step_seconds):.2%} more work")


if __name__ == "__main__":
    main()
