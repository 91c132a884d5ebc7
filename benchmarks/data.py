"""Pictures from shards to the device, beside PyTorch's: `python -m benchmarks.data`.

Makes JPEGs of COCO's usual size in tars, prepares shards from them, and reads both in turns: the
shards by the training pipeline, the tars by webdataset and torch's DataLoader. All decode by PIL,
crop, resize and mirror by one function, and end as uint8 [B, S, S, 3] on JAX's device; one decodes
by the same function too, and one as webdataset does by itself.

Without worker processes all of it runs on one core: two threads on two cores that share a cache, or
are halves of one, would be charged for each other. A ratio is the median of those of the rounds.
"""

import argparse
import io
import itertools
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import jax
import numpy as np
import torch
import webdataset
from ml_collections import ConfigDict
from PIL import Image

from seed_jax import prepare, sharding
from seed_jax.data import pipeline, transforms
from seed_jax.data.batches import READ_AHEAD
from seed_jax.data.sources import open_source

SIDES = (640, 480)
KINDS = 200  # different pictures
WARM_UP = 8  # batches: more than are read ahead, so that as many are on their way before and after
CROP, FLIP = (0.5, 1.0), True


def jpegs(count: int) -> list[bytes]:
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        # Coarse colours under noise: about the 100 kB of a photograph of this size.
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(SIDES, Image.Resampling.BICUBIC), np.int16)
        noisy = pixels + rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def write_tars(folder: Path, tars: int, pictures: int) -> list[str]:
    folder.mkdir()
    # Not each its own: the set has to be large, since Grain's permutations of a few hundred records
    # take their time, but those of thousands or millions don't.
    kinds = jpegs(min(KINDS, pictures))
    files = [folder / f"{number:05}.tar" for number in range(tars)]
    for file in files:
        with tarfile.open(file, "w") as tar:
            for number in range(pictures):
                key = f"{file.stem}{number:04}"
                picture = kinds[number % len(kinds)]
                for suffix, content in (("jpg", picture), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [str(file) for file in files]


def ours(shards: Path, args: argparse.Namespace) -> Iterator[jax.Array]:
    data = ConfigDict(
        {
            "cache": False,
            "workers": args.workers,
            "max_tags": 0,
            "drop_caption": 0.0,
            "crop_scale": CROP,
            "flip": FLIP,
            "max_unreadable": 0.0,
        }
    )
    batches = pipeline.train_pipeline(
        open_source(shards),
        batch_size=args.batch_size,
        image_size=args.size,
        texts={},
        data=data,
        seed=0,
        put=partial(sharding.put_batch, mesh=sharding.make_mesh({"data": -1})),
    )
    try:
        for batch in batches:
            yield batch["image"]
    finally:
        batches.close()


class View:
    """A sample of webdataset's as a random view."""

    def __init__(self, size: int):
        self._size = size
        self._rng = Random(0)

    def __call__(self, sample: dict) -> np.ndarray:
        image = sample["jpg"]
        if isinstance(image, bytes):
            image = transforms.decode(image)
        return transforms.random_view(image, self._size, self._rng, scale=CROP, flip=FLIP)


def theirs(
    tars: list[str], args: argparse.Namespace, *, own_decoder: bool = False
) -> Iterator[jax.Array]:
    """With `own_decoder`, webdataset decodes, as its documentation has it."""
    pictures = webdataset.WebDataset(tars, shardshuffle=False, resampled=True)
    pictures = pictures.shuffle(args.batch_size)
    if own_decoder:
        pictures = pictures.decode("pilrgb")
    pictures = pictures.map(View(args.size)).batched(args.batch_size, collation_fn=np.stack)
    loader = torch.utils.data.DataLoader(
        pictures,
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=READ_AHEAD if args.workers else None,
    )
    for batch in loader:
        yield jax.device_put(np.asarray(batch))


def measure(start: Callable[[], Iterator[jax.Array]], args: argparse.Namespace) -> tuple:
    """Pictures a second of the clock, and of this process's processors."""
    batches = start()
    shape = (args.batch_size, args.size, args.size, 3)
    assert all(batch.shape == shape for batch in itertools.islice(batches, WARM_UP))
    clock, processor = time.perf_counter(), time.process_time()
    count = 0
    for batch in itertools.islice(batches, args.batches):
        count += len(jax.block_until_ready(batch))
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    batches.close()
    return count / clock, count / processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=1000, help="in a tar (1000)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="in a round (40)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that read (0: threads)")
    args = parser.parse_args()
    if not args.workers:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts threads
    with tempfile.TemporaryDirectory() as folder:
        tars = write_tars(Path(folder) / "tars", args.tars, args.pictures)
        shards = Path(folder) / "shards"
        prepare.main(["--input", str(Path(folder) / "tars"), "--output", str(shards)])
        loaders = {
            "seed_jax, shards": lambda: ours(shards, args),
            "torch, webdataset": lambda: theirs(tars, args),
            "torch, webdataset with its decoder": lambda: theirs(tars, args, own_decoder=True),
        }
        speeds = {name: [] for name in loaders}
        for number in range(args.rounds):
            # Each is first in every other round.
            for name in list(loaders)[:: 1 if number % 2 else -1]:
                speeds[name].append(measure(loaders[name], args))
    middle = {
        name: [median(one) for one in zip(*each, strict=True)] for name, each in speeds.items()
    }
    for name, (clock, processor) in middle.items():
        # Worker processes' time is not this one's.
        of_core = "" if args.workers else f", {processor:.0f} a second of a core"
        print(f"{name}: {clock:.0f} pictures/s{of_core}")
    number = 0 if args.workers else 1
    what = "pictures/s" if args.workers else "pictures a second of a core"
    ours_, *others = speeds
    for name in others:
        pairs = zip(speeds[ours_], speeds[name], strict=True)
        ratios = [own[number] / other[number] for own, other in pairs]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{what}, ours to {name}: {median(ratios):.2f} ({each})")


if __name__ == "__main__":
    main()
