"""Any pictures with captions to shards: `python -m seed_jax.prepare --input PATH --output DIR`.

DIR/shard-00000.array_record   records that `config.data.path=DIR` trains on
DIR/report.json                every shard, how many pictures were dropped and why, a content hash
DIR/dropped.jsonl              every dropped picture, a line each

The same command again goes on where it stopped: a shard that is there is whole, and stays. One
whose part of the input has changed since is made anew.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack
from tqdm import tqdm

from seed_jax import cli
from seed_jax.cli import UserError
from seed_jax.data import transforms
from seed_jax.data.batches import live_and_die_with_parent
from seed_jax.data.inputs import open_parts
from seed_jax.data.parts import NO_CAPTION, Damaged, Dropped, Part
from seed_jax.data.prepared import FORMAT, REPORT, read_report
from seed_jax.data.sources import Record, check_name, write_array_record
from seed_jax.files import lack_of_room, replace_text
from seed_jax.workdir import LOCK, locked, shard_not_written

UNREADABLE, TOO_SMALL, OTHER_SPLIT = "unreadable", "too small", "other split"
NOT_UTF8 = "name not UTF-8"
DAMAGED = ("stop", "keep", "skip")
DROPPED = "dropped.jsonl"
# An entry for each finished shard, from which the report is made.
JOURNAL = ".prepared"


@dataclass(frozen=True)
class Options:
    """What decides which pictures are kept.

    Attributes:
      min_size: of a picture's shorter side, in pixels.
      split: keeps the pictures of this split; None keeps all.
    """

    min_size: int
    split: str | None


def _stem(number: int) -> str:
    return f"shard-{number:05}"


def write_shard(
    part: Part, number: int, folder: Path, options: Options, damaged: str
) -> dict[str, Any]:
    """Writes a part's shard, unless nothing of it is kept, and notes in the journal that it did.

    Returns:
      the entry of the journal, or of a damaged part that the user has to decide on, one with
      'damage' alone.

    Raises:
      UserError: the disk is full, or can't be written to.
    """
    name = f"{_stem(number)}.array_record"
    partial = folder / f".{_stem(number)}.partial"
    digest = hashlib.sha256()
    dropped: list[Dropped] = []
    damage: list[str] = []

    def kept() -> Iterator[Record]:
        try:
            for found in part.read():
                found = _checked(found, options)
                if isinstance(found, Dropped):
                    dropped.append(found)
                else:
                    digest.update(msgpack.packb(found))
                    yield found
        except Damaged as error:
            damage.append(str(error))

    try:
        with warnings.catch_warnings():
            # PIL's, on odd metadata and the like of pictures that it reads all the same.
            warnings.simplefilter("ignore")
            count = write_array_record(partial, kept())
        if damage and damaged == "stop":
            partial.unlink()
            return {"from": part.name, "damage": damage[0], "pictures": count}
        if damage and damaged == "skip":
            count, dropped = 0, []
        if count:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        entry = {
            "from": part.name,
            "fingerprint": part.fingerprint,
            "pictures": count,
            "bytes": partial.stat().st_size if count else 0,
            "sha256": digest.hexdigest() if count else None,
            "damage": damage[0] if damage else None,
            "skipped": bool(damage) and damaged == "skip",
            "dropped": dropped,
        }
        (folder / name).unlink(missing_ok=True)
        replace_text(folder / JOURNAL / f"{_stem(number)}.json", json.dumps(entry))
        if count:
            partial.replace(folder / name)
        else:
            partial.unlink()
        return entry
    except (OSError, RuntimeError, UserError) as error:
        partial.unlink(missing_ok=True)
        raise shard_not_written(folder / name, lack_of_room(error) or str(error)) from None


def _checked(found: Record | Dropped, options: Options) -> Record | Dropped:
    if isinstance(found, Dropped):
        return found
    if options.split and found.get("split") != options.split:
        return Dropped(found["id"], OTHER_SPLIT, str(found.get("split")))
    if not found["captions"]:
        return Dropped(found["id"], NO_CAPTION)
    try:
        check_name(found["id"])
    except UserError:
        return Dropped(found["id"], NOT_UTF8)
    try:
        width, height = transforms.decode(found["image"]).size
    except Exception as error:
        return Dropped(found["id"], UNREADABLE, transforms.why_unreadable(error))
    if min(width, height) < options.min_size:
        return Dropped(found["id"], TOO_SMALL, f"{width} x {height}")
    return found


def prepare(args: argparse.Namespace) -> None:
    """Makes the shards that are not there yet, and the report.

    Raises:
      UserError: bad paths, an output that was made from something else, a damaged part (after all
        others were written), nothing kept; what was written until then stays.
    """
    folder: Path = args.output
    options = Options(args.min_size, args.split)
    made_from = {"input": str(args.input.absolute()), "options": asdict(options)}
    columns = {"image": args.image_column, "caption": args.caption_column, "id": args.id_column}
    columns = {what: name for what, name in columns.items() if name}
    _refuse_other(folder, made_from)
    parts = open_parts(args.input, args.images, columns, args.shard_size)
    try:
        (folder / JOURNAL).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; name another folder") from None
    with locked(folder, "--output"):
        entries = _finished(folder, parts, args.damaged)
        missing = [number for number in range(len(parts)) if number not in entries]
        if missing or _left_over(folder, parts):
            _write_report(folder, made_from, {}, complete=False)
            for file in _left_over(folder, parts):
                file.unlink()
        for number, entry in _written(args, parts, missing, options):
            entries[number] = entry
        _conclude(folder, made_from, dict(sorted(entries.items())), len(missing))


def _refuse_other(folder: Path, made_from: dict[str, Any]) -> None:
    report = read_report(folder)
    if report is None:
        there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        if folder.is_file() or there - {LOCK, JOURNAL}:
            raise UserError(f"{folder} holds something else already; name another --output")
        return
    for what, value in made_from.items():
        if report[what] != value:
            raise UserError(
                f"{folder} was made from another {what} ({report[what]}, now {value}); name "
                "another --output, or delete that one"
            )


def _finished(folder: Path, parts: list[Part], damaged: str) -> dict[int, dict[str, Any]]:
    """The journal's entries of parts that are as they were, and whose shards are there."""
    entries = {}
    for number, part in enumerate(parts):
        try:
            entry = json.loads((folder / JOURNAL / f"{_stem(number)}.json").read_bytes())
        except FileNotFoundError:
            continue
        if entry["fingerprint"] != part.fingerprint:
            continue
        if entry["damage"] and entry["skipped"] != (damaged == "skip"):
            continue
        file = folder / f"{_stem(number)}.array_record"
        if not entry["pictures"] or (file.is_file() and file.stat().st_size == entry["bytes"]):
            entry["dropped"] = [Dropped(*one) for one in entry["dropped"]]
            entries[number] = entry
    return entries


def _left_over(folder: Path, parts: list[Part]) -> list[Path]:
    """Files of parts that the input has no more, and of writers that were killed."""
    stems = {_stem(number) for number in range(len(parts))}
    ours = [*folder.glob("*.array_record"), *(folder / JOURNAL).glob("shard-*.json")]
    return [file for file in ours if file.stem not in stems] + list(folder.glob(".shard-*.partial"))


def _written(
    args: argparse.Namespace, parts: list[Part], missing: list[int], options: Options
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and entry of each missing shard, as they are written."""
    tasks = {n: (parts[n], n, args.output, options, args.damaged) for n in missing}
    kept = dropped = 0
    with (
        tqdm(total=len(parts), initial=len(parts) - len(missing), unit="shard") as bar,
        _finishing(tasks, min(args.processes, len(missing))) as finished,
    ):
        for number, entry in finished:
            kept += entry["pictures"]
            dropped += len(entry.get("dropped", []))
            bar.set_postfix(kept=kept, dropped=dropped)
            bar.update()
            yield number, entry


@contextmanager
def _finishing(
    tasks: dict[int, tuple], processes: int
) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
    """Runs `write_shard` for each task, in so many processes."""
    if processes <= 1:
        yield ((number, write_shard(*task)) for number, task in tasks.items())
        return
    # A fork of a process with JAX's threads may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(processes, context, live_and_die_with_parent) as pool:
        futures = {pool.submit(write_shard, *task): number for number, task in tasks.items()}
        try:
            yield ((futures[future], future.result()) for future in as_completed(futures))
        except BrokenProcessPool:
            raise UserError(
                "a process was killed, perhaps since memory ran out; run the same command again "
                "with fewer --processes"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _conclude(
    folder: Path, made_from: dict[str, Any], entries: dict[int, dict[str, Any]], new: int
) -> None:
    """Writes the report; raises a UserError if there is no complete set of shards."""
    undecided = [entry for entry in entries.values() if "fingerprint" not in entry]
    if undecided:
        first = undecided[0]
        others = f" (and {len(undecided) - 1} more)" if len(undecided) > 1 else ""
        raise UserError(
            f"{first['from']} is damaged after {first['pictures']} good pictures{others}: "
            f"{first['damage']}; the other {len(entries) - len(undecided)} shards are written. Get "
            "it again and run the same command, or keep its good part by --damaged keep, or leave "
            "it out by --damaged skip"
        )
    lines = (
        json.dumps(one._asdict() | {"from": entry["from"]}) + "\n"
        for entry in entries.values()
        for one in entry["dropped"]
    )
    replace_text(folder / DROPPED, "".join(lines))
    pictures = sum(entry["pictures"] for entry in entries.values())
    report = _write_report(folder, made_from, entries, complete=pictures > 0)
    reasons = ", ".join(f"{count} {why}" for why, count in report["dropped"].items())
    told = f"{sum(report['dropped'].values())} dropped ({reasons})" if reasons else "none dropped"
    if not pictures:
        raise UserError(f"{made_from['input']}: no picture could be kept: {told}; see {DROPPED}")
    for name, damage in report["damaged"].items():
        print(f"warning: {name} is damaged ({damage})")
    made = f"{new} made now" if new else "all there already"
    print(f"{folder}: {pictures} pictures in {len(report['shards'])} shards ({made}), {told}")


def _write_report(
    folder: Path, made_from: dict[str, Any], entries: dict[int, dict[str, Any]], *, complete: bool
) -> dict[str, Any]:
    shards = {
        f"{_stem(number)}.array_record": {
            "from": entry["from"],
            "pictures": entry["pictures"],
            "bytes": entry["bytes"],
            "sha256": entry["sha256"],
        }
        for number, entry in entries.items()
        if entry["pictures"]
    }
    hashes = "\n".join(shard["sha256"] for shard in shards.values())
    report = {
        "format": FORMAT,
        "complete": complete,
        **made_from,
        "pictures": sum(shard["pictures"] for shard in shards.values()),
        "dropped": Counter(one.why for entry in entries.values() for one in entry["dropped"]),
        "damaged": {
            entry["from"]: f"{'left out' if entry['skipped'] else 'good part kept'}: {damage}"
            for entry in entries.values()
            if (damage := entry["damage"])
        },
        "content_hash": hashlib.sha256(hashes.encode()).hexdigest(),
        "shards": shards,
    }
    replace_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.prepare",
        description="Turns pictures with captions into shards to train on. The same command "
        "again goes on where it stopped.",
    )
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="PATH",
        help="a folder of pictures with captions.jsonl or .txt files, tars, parquet files, or an "
        "annotation file of COCO, Flickr30K, CC3M and the like",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for the shards")
    parser.add_argument("--images", type=Path, metavar="DIR", help="an annotation file's pictures")
    parser.add_argument("--split", metavar="NAME", help="only pictures of this split")
    parser.add_argument(
        "--min-size", type=int, default=32, metavar="N", help="of the shorter side (%(default)s)"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=10_000,
        metavar="N",
        help="pictures in a shard, where the input isn't tars (%(default)s)",
    )
    parser.add_argument(
        "--damaged",
        choices=DAMAGED,
        default="stop",
        help="what to do about a damaged tar or parquet file: stop once all others are written, "
        "keep its good part, or skip it (%(default)s)",
    )
    for what in ("image", "caption", "id"):
        parser.add_argument(f"--{what}-column", metavar="NAME", help="of parquet files")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="at once (%(default)s)",
    )
    args = parser.parse_args(arguments)
    for name in ("shard_size", "processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command line; `arguments` as in `sys.argv[1:]`."""
    prepare(_parse(arguments))


if __name__ == "__main__":
    cli.run(main)
