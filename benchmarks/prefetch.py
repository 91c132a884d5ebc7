"""What taking batches to the device ahead of time does to the tiny stage-1 run.

    python -m benchmarks.prefetch [--steps 20] [--rounds 5]

Runs the same steps in turns, with each batch put on the device by the loop that needs it, and by
the pipeline's thread while the step before runs. Metrics are read one step late, as in training.
"""

import argparse
import time
from functools import partial
from statistics import median

import jax

from configs import tiny_causal_qformer
from seed_jax import sharding, state
from seed_jax.data import mixture, pipeline
from seed_jax.tasks.causal_qformer import CausalQFormer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="in a round (20)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="processes that read (0: threads)")
    args = parser.parse_args()

    config = tiny_causal_qformer.get_config().unlock()
    config.data.update(cache=False, workers=args.workers)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    task = CausalQFormer(config)
    put = partial(sharding.put_batch, mesh=mesh)

    def start(ahead: bool) -> pipeline.PipelineIterator:
        return pipeline.train_pipeline(
            mixture.open_training_set(config.data),
            batch_size=config.batch_size,
            image_size=config.image_size,
            texts=task.text_fields(),
            data=config.data,
            seed=config.seed,
            put=put if ahead else None,
        )

    graphdef, init, shardings, tx = state.lazily(task, config, mesh)
    current = init()
    step = state.make_train_step(task, graphdef, tx, config, shardings)

    def run(ahead: bool) -> tuple[float, float]:
        """Seconds of the clock and of this process's processors, a step."""
        nonlocal current
        data, pending = start(ahead), None
        for number in range(args.steps + 2):
            if number == 2:  # the first compiles, and starts what reads
                clock, processor = time.perf_counter(), time.process_time()
            current, metrics = step(current, next(data) if ahead else put(next(data)))
            if pending:
                float(pending["loss"])
            pending = metrics
        jax.block_until_ready(current)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        data.close()
        return clock / args.steps, processor / args.steps

    run(True)
    rounds = [(run(False), run(True)) for _ in range(args.rounds)]
    for name, each in zip(("by the loop", "ahead"), zip(*rounds, strict=True), strict=True):
        clock, processor = (median(one) for one in zip(*each, strict=True))
        print(f"{name}: {clock:.3f} s a step, {processor:.3f} s of processors")
    for number, what in enumerate(("time", "processors' time")):
        ratio = median(ahead[number] / loop[number] for loop, ahead in rounds)
        print(f"{what} of a step, ahead to by the loop: {ratio:.3f}")


if __name__ == "__main__":
    main()
