"""A pass over a source that many processes share, a shard at a time, without a word between them.

    FOLDER/codes-00003-of-00012.array_record   what became of the source's records 30,000 to 39,999
    FOLDER/report.json                         settings, and once all is there, every shard
    FOLDER/.shards/                            an entry a shard, written when it was whole

Of N processes, number i makes shards i, i + N, i + 2N, ...; none waits for another. A shard is
written under another name and renamed when it is whole, so whoever runs the same command again
keeps what is whole and makes the rest; two that make the same shard only waste time. The one that
finds every shard whole writes the report as complete: the last to finish, or any later run.

A command that makes such a pass describes it and says how a shard is written:

    def start() -> Write:                # called once, and only if there is a shard to make
        model = load(...)
        def write(shard: Shard) -> Written:
            part = Part(source, shard.numbers)
            ...                          # write to shard.path; now and then shard.tell(...)
            return Written(records, unreadable)
        return write

    work = Pass(args.output, "seed_jax.tokenize 1", content="codes", ...)
    run(work, share(args), start)

with `add_arguments` for the options, and readers that open `data.prepared.shards(FOLDER, FORMAT)`.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from seed_jax import hosts, inference
from seed_jax.cli import UserError
from seed_jax.data.prepared import REPORT, read_report
from seed_jax.data.sources import Source
from seed_jax.files import claim_text, lack_of_room, partial_of, replace_text
from seed_jax.workdir import shard_not_written

ENTRIES = ".shards"
# Enough names to tell one source from another; to read all would be to read all pictures.
NAMES_LOOKED_AT = 100


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a pass makes, and of what.

    Attributes:
      folder: for shards and report.
      format: of the report: the command and a version, such as 'seed_jax.tokenize 1'.
      content: what is in the shards, and what their names begin with, such as 'codes'.
      suffix: of the shards' names, such as '.array_record'.
      settings: whatever else decides what a shard holds, such as a model's hash; JSON values. They
        go into the report, and a folder that was made with others is refused.
      records_per_shard: of the source; the last shard may have fewer.
      max_unreadable: the share of the pictures that may be unreadable.
    """

    folder: Path
    format: str
    content: str
    suffix: str
    source: Source
    settings: dict[str, Any]
    records_per_shard: int
    max_unreadable: float

    @property
    def shards(self) -> int:
        return -(-len(self.source) // self.records_per_shard)

    def numbers(self, shard: int) -> range:
        """The source's records that a shard is made of."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, len(self.source)))

    def name(self, shard: int) -> str:
        return f"{self.content}-{shard:05}-of-{self.shards:05}{self.suffix}"

    def described(self) -> dict[str, Any]:
        """What all runs on a folder must have alike."""
        names = hashlib.sha256()
        for number in range(0, len(self.source), -(-len(self.source) // NAMES_LOOKED_AT)):
            names.update(self.source.name(number).encode(errors="surrogateescape") + b"\n")
        described = {
            "content": self.content,
            "files": self.suffix.removeprefix("."),
            **self.settings,
            "pictures": len(self.source),
            "pictures_hash": names.hexdigest()[:16],
            "records_per_shard": self.records_per_shard,
        }
        return json.loads(json.dumps(described))


class Written(NamedTuple):
    """What a shard holds.

    Attributes:
      records: of the source that are in the file.
      unreadable: name and reason of each picture that is not among them.
    """

    records: int
    unreadable: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write.

    Attributes:
      path: where to; the pass gives the file its name once it is whole.
      numbers: the source's records to make it of.
      tell: call it now and then with how many of these were read and which were unreadable; it
        moves the progress bar, and raises a UserError when there are too many unreadable.
    """

    path: Path
    numbers: range
    tell: Callable[[int, Sequence[str]], None]


Write = Callable[[Shard], Written]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that makes a pass by shards."""
    parser.add_argument(
        "--records-per-shard",
        type=inference.positive,
        default=10_000,
        metavar="N",
        help="pictures that a shard is made of (%(default)s)",
    )
    parser.add_argument(
        "--num-processes",
        "--num_processes",
        type=int,
        metavar="N",
        help="how many processes share the pass; under SLURM and on GKE's TPU slices the "
        "environment says so",
    )
    parser.add_argument(
        "--process-id", "--process_id", type=int, metavar="I", help="which of them this is, from 0"
    )


def share(args: argparse.Namespace) -> tuple[int, int]:
    """This process's number and how many there are, by its options or its environment."""
    return hosts.share(args.process_id, args.num_processes, os.environ)


def run(work: Pass, share: tuple[int, int], start: Callable[[], Write]) -> None:
    """Makes the shards that are missing of this process's share, and the report if all are there.

    Args:
      share: this process's number, and how many there are.
      start: returns what writes a shard; called only if there is one to write.

    Raises:
      UserError: the folder holds something else, or was made with other settings; too many pictures
        can't be read; the disk is full. What was whole until then stays.
    """
    _claim(work)
    index, processes = share
    own = range(index, work.shards, processes)
    there = {number: entry for number in own if (entry := _entry(work, number)) is not None}
    missing = [number for number in own if number not in there]
    made = 0
    if missing:
        write = start()
        total = sum(len(work.numbers(number)) for number in own)
        done = sum(len(work.numbers(number)) for number in there)
        with tqdm(total=total, initial=done, unit="picture", dynamic_ncols=True) as bar:
            for number in missing:
                entry = _entry(work, number)  # another process may have made it meanwhile
                if entry is None:
                    entry = _make(work, number, write, bar, there, total)
                    made += 1
                there[number] = entry
                done += len(work.numbers(number))
                bar.update(done - bar.n)
    _conclude(work, made=made)


def _claim(work: Pass) -> None:
    """Notes the settings in the folder, or checks that they are the ones noted there."""
    folder = work.folder
    # In this order: another process may begin to write here at any time.
    there = folder.iterdir() if folder.is_dir() else ()
    strange = [file.name for file in there if not file.name.startswith(".")]
    described = work.described()
    report = read_report(folder, work.format)
    if report is None and strange:
        raise UserError(f"{folder} holds something else already; name another --output")
    try:
        (folder / ENTRIES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; name another folder") from None
    if report is None:
        begun = {"format": work.format, "complete": False, **described, "shards": {}}
        claim_text(folder / REPORT, json.dumps(begun, indent=2) + "\n")
        report = read_report(folder, work.format) or {}
    for what, now in described.items():
        if report.get(what) != now:
            raise UserError(
                f"{folder} was made with {what} {report.get(what)}, now it would be {now}; name "
                "another --output, or delete that folder"
            )


def _entry(work: Pass, number: int) -> dict[str, Any] | None:
    """What is known of a shard that is whole."""
    name = work.name(number)
    try:
        entry = json.loads((work.folder / ENTRIES / f"{name}.json").read_bytes())
    except FileNotFoundError:
        # Hidden files get lost when a folder is copied.
        entry = (read_report(work.folder, work.format) or {"shards": {}})["shards"].get(name)
    if entry is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        if (work.folder / name).stat().st_size == entry["bytes"]:
            return entry
    return None


def _make(
    work: Pass,
    number: int,
    write: Write,
    bar: tqdm,
    there: dict[int, dict[str, Any]],
    total: int,
) -> dict[str, Any]:
    """Writes a shard, then its entry, which it returns."""
    file = work.folder / work.name(number)
    partial = partial_of(file)
    before = bar.n
    known = [name for entry in there.values() for name in entry["unreadable"]]

    def tell(read: int, unreadable: Sequence[str]) -> None:
        bar.update(before + read - bar.n)
        inference.check_unreadable(
            [*known, *unreadable], work.source.path, total, work.max_unreadable
        )

    try:
        written = write(Shard(partial, work.numbers(number), tell))
        tell(len(work.numbers(number)), written.unreadable)
        with partial.open("rb") as there_now:
            os.fsync(there_now.fileno())
        entry = {
            "records": written.records,
            "bytes": partial.stat().st_size,
            "unreadable": list(written.unreadable),
        }
        partial.replace(file)
        replace_text(work.folder / ENTRIES / f"{file.name}.json", json.dumps(entry))
        return entry
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError) and (others := _entry(work, number)):
            return others  # the process that found all shards whole cleaned up
        if why := lack_of_room(error) or (str(error) if isinstance(error, OSError) else ""):
            raise shard_not_written(file, why) from None
        raise


def _conclude(work: Pass, *, made: int) -> None:
    """Writes the report if every shard is whole."""
    entries = {work.name(n): _entry(work, n) for n in range(work.shards)}
    whole = {name: entry for name, entry in entries.items() if entry is not None}
    if len(whole) < work.shards:
        print(
            f"{work.folder}: {made} shards made now; {work.shards - len(whole)} of {work.shards} "
            "are still to come from other processes, the last of which writes the report"
        )
        return
    unreadable = [name for entry in whole.values() for name in entry["unreadable"]]
    inference.check_unreadable(unreadable, work.source.path, len(work.source), work.max_unreadable)
    inference.report_unreadable(unreadable)
    report = {
        "format": work.format,
        "complete": True,
        **work.described(),
        "source": str(Path(work.source.path).absolute()),
        "records": sum(entry["records"] for entry in whole.values()),
        "unreadable": len(unreadable),
        "shards": whole,
    }
    replace_text(work.folder / REPORT, json.dumps(report, indent=2) + "\n")
    for left in work.folder.glob(f".{work.content}-*.partial"):
        left.unlink(missing_ok=True)  # of processes that were killed
    how = f"{made} made now" if made else "all there already"
    print(f"{work.folder}: {report['records']} records in {work.shards} shards ({how})")
