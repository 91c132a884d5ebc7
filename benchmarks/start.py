"""How long training takes from its start to its first batch: `python -m benchmarks.start`.

Writes shards of records with tiny pictures, and opens them as training does, as one set and as two
mixed with weights. Nothing is decoded: what is measured is finding, ordering and reading records.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from seed_jax.data import mixture, pipeline
from seed_jax.data.sources import write_array_record


def timed(what: str, act: Callable[[], Any]) -> Any:
    clock, processor = time.perf_counter(), time.process_time()
    done = act()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(f"  {what}: {clock:.2f} s, {processor:.2f} of processors", flush=True)
    return done


def write(folder: Path, records: int, shards: int) -> None:
    folder.mkdir()
    each = records // shards
    for shard in range(shards):
        write_array_record(
            folder / f"shard-{shard:05}.array_record",
            (
                {"id": f"{shard}-{number}", "image": b"picture", "captions": ["a caption"]}
                for number in range(each)
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4096)
    args = parser.parse_args()
    data = ConfigDict(
        {
            "split": "",
            "cache": False,
            "workers": 0,
            "max_tags": 0,
            "drop_caption": 0.0,
            "crop_scale": (),
            "flip": False,
            "max_unreadable": 0.0,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder) / "whole", Path(folder) / "half"
        write(whole, args.records, args.shards)
        write(half, args.records // 2, args.shards // 2)
        for path, weights in ((f"{whole}", ()), (f"{whole},{half}", (3.0, 1.0))):
            data.path, data.weights = path, weights
            source = timed("opening", lambda: mixture.open_training_set(data))
            print(f"  {len(source)} records, weights {weights or None}")
            batches = pipeline.train_pipeline(
                source, batch_size=args.batch_size, image_size=0, texts={}, data=data, seed=0
            )
            first = timed(f"first {args.batch_size} rows", batches.__next__)["index"]
            shards = len(set((first * args.shards // args.records).tolist()))
            print(f"  which are from {shards} shards")
            batches.close()
    print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of memory")


if __name__ == "__main__":
    main()
