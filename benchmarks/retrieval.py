"""Ranks a set of COCO's size from random embeddings: `python benchmarks/retrieval.py`."""

import argparse
import resource
import time

import numpy as np

from seed_jax.evaluation import retrieval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="of each picture (5)")
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (args.pictures * (1 + args.captions), args.width)
    features = rng.standard_normal(shape, np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    image_PE, text_CE = features[: args.pictures], features[args.pictures :]
    owner_C = np.repeat(np.arange(args.pictures), args.captions)
    started = time.monotonic()
    figures, intervals = retrieval.retrieval(image_PE, text_CE, owner_C)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    low, high = intervals["mean"]
    print(f"R@mean {100 * figures['mean']:.2f} % [{100 * low:.2f}, {100 * high:.2f}]")
    print(f"{seconds:.1f} s with intervals; the process held {peak:.2f} GiB at most")


if __name__ == "__main__":
    main()
