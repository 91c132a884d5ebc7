"""Stage 2 from pictures and from features, at full size: `python -m benchmarks.features`.

The training step of configs/codebook.py with weights at random, reading included: JPEGs of COCO's
usual size from one ArrayRecord file, features of one view from another. In turns, in one process.
Prints one JSON object a line: how fast features are read without training on them, which files in
memory are no limit to; what a step takes; and last, how many times as fast features are.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.encode import matmul_gflops
from configs import codebook
from seed_jax import sharding, state
from seed_jax.data import features
from seed_jax.data.features import Features
from seed_jax.data.mixture import Mixture
from seed_jax.data.prepared import REPORT
from seed_jax.data.sources import write_array_record, write_rows
from seed_jax.planning import stand_ins
from seed_jax.tasks import PRECISIONS
from seed_jax.tasks.codebook import Codebook
from seed_jax.train import open_data

SIDES = (640, 480)
READING_SECONDS = 10
PAIRS = 5_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="from features, for one from pictures")
    args = parser.parse_args()
    print(json.dumps({"matmul_gflops": round(matmul_gflops()), "device": str(jax.devices()[0])}))
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(Path(folder), args)
        print(json.dumps(reading(config)))
        runs = {"pictures": Run(config, ""), "features": Run(config, config.data.features)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, count in (("pictures", 1), ("features", args.steps)):
                taken[name] += [runs[name].step() for _ in range(count)]
        for run in runs.values():
            run.close()
    medians = {}
    for name, steps in taken.items():
        seconds, processor = (median(each) for each in zip(*steps, strict=True))
        medians[name] = seconds, processor
        print(
            json.dumps(
                {
                    "from": name,
                    "batch": args.batch,
                    "precision": args.precision,
                    "seconds": round(seconds, 2),
                    "processor_seconds": round(processor, 2),
                    "samples_per_second": round(args.batch / seconds, 3),
                }
            )
        )
    faster = [a / b for a, b in zip(medians["pictures"], medians["features"], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        json.dumps(
            {
                "times_as_fast": round(faster[0], 1),
                "by_processor_seconds": round(faster[1], 1),
                "peak_gb": round(peak, 2),
            }
        )
    )


def recipe(folder: Path, args: argparse.Namespace) -> ConfigDict:
    """The paper's, with stand-ins for earlier stages, and files to read in `folder`."""
    config = codebook.get_config().unlock()
    config.update(batch_size=args.batch, precision=args.precision)
    config.data.update(path=str(folder / "pictures.array_record"), features="to be made", workers=0)
    stand_ins.stand_in(config, stand_ins.CONFIGS / "codebook.py", folder)
    rng = np.random.default_rng(0)
    count = 2 * args.batch

    def pictures() -> Iterator[Any]:
        for number in range(count):
            pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize(SIDES, Image.Resampling.BICUBIC).save(file, "JPEG")
            yield {"id": str(number), "image": file.getvalue(), "captions": ["a picture"]}

    write_array_record(config.data.path, pictures())
    settings = features.read_settings(config.data.features)
    shard = Path(config.data.features) / "features.array_record"

    def made() -> Iterator[bytes]:
        for number in range(count):
            causal, states = (
                rng.standard_normal((1, *shape), np.float32).astype(np.float16)
                for shape in (settings.causal, settings.states)
            )
            yield from Features(str(number), causal, states, [0]).rows()

    write_rows(shard, made())
    report = json.loads((shard.parent / REPORT).read_text())
    report |= {"complete": True, "shards": {shard.name: {"bytes": shard.stat().st_size}}}
    (shard.parent / REPORT).write_text(json.dumps(report))
    return config


class Repeated(features.FeatureSource):
    """As many as the paper's pairs, since Grain's shuffle of few takes longer."""

    def __len__(self) -> int:
        return PAIRS

    def view(self, index: int, view: int) -> features.View:
        return super().view(index % super().__len__(), view)


def reading(config: ConfigDict) -> dict[str, float]:
    """Rows of features a second of one process, and of a second of its processors."""
    source = Mixture([Repeated(config.data.features)])
    data = features.train_pipeline(source, batch_size=256, data=config.data, seed=config.seed)
    next(data)
    began, rows = (time.perf_counter(), time.process_time()), 0
    while time.perf_counter() - began[0] < READING_SECONDS:
        rows += len(next(data)["index"])
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    data.close()
    return {
        "rows_read_per_second": round(rows / wall),
        "per_processor_second": round(rows / processor),
    }


class Run:
    """A training run, stopped before each step."""

    def __init__(self, config: ConfigDict, folder: str):
        config = config.copy_and_resolve_references()
        config.data.features = folder
        self._mesh = sharding.make_mesh({"data": -1})
        task = Codebook(config)
        _, self._data = open_data(config, task, self._mesh)
        graphdef, init, shardings, tx = state.lazily(task, config, self._mesh)
        shapes = jax.eval_shape(init)
        rng = np.random.default_rng(0)

        # To run the initialisers takes longer, and twice the memory.
        def noise(shape: Any, where: Any) -> jax.Array:
            values = rng.standard_normal(shape.shape, np.float32)
            values *= 0.02  # in place: the largest of these takes 1.3 GB
            return jax.device_put(values.astype(shape.dtype, copy=False), where, may_alias=True)

        def zeros(shape: Any, where: Any) -> jax.Array:
            return jax.device_put(np.zeros(shape.shape, shape.dtype), where)

        self._state = state.TrainState(
            zeros(shapes.step, shardings.step),
            jax.tree.map(noise, shapes.params, shardings.params),
            jax.tree.map(noise, shapes.rest, shardings.rest),
            jax.tree.map(zeros, shapes.opt_state, shardings.opt_state),
            jax.device_put(state.LossScale.start(config.precision), shardings.loss_scale),
        )
        self._step = state.make_train_step(task, graphdef, tx, config, shardings)
        self.step()  # compiles

    def step(self) -> tuple[float, float]:
        """Seconds, and processor seconds of all threads, of reading a batch and a step on it."""
        began = time.perf_counter(), time.process_time()
        self._state, metrics = self._step(self._state, next(self._data))
        float(metrics["loss"])
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def close(self) -> None:
        self._data.close()


if __name__ == "__main__":
    main()
