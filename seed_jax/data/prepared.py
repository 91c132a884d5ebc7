"""What a folder of shards says of itself: the report.json of the command that wrote it.

A report names its "format" (the command and a version), whether the folder is "complete", and the
"bytes" of each of its "shards" by name.
"""

import json
from pathlib import Path
from typing import Any

from seed_jax.cli import UserError
from seed_jax.files import wrong_sizes

REPORT = "report.json"
FORMAT = "seed_jax.prepare 1"  # of pictures with captions
COMMANDS = "seed_jax."


def format_of(folder: Path) -> str | None:
    """The format of a folder's report; None if there is none, or one of another program."""
    report = _read(folder)
    return None if report is None else report["format"]


def read_report(folder: Path, wanted: str = FORMAT) -> dict[str, Any] | None:
    """The report in a folder; None if there is none, or one of another program.

    Raises:
      UserError: it can't be read, or is of another of our formats.
    """
    report = _read(folder)
    if report is not None and report["format"] != wanted:
        raise UserError(
            f"{folder} was written by {report['format']}, where a folder of {wanted} is wanted"
        )
    return report


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / REPORT
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); copy the folder again, whole") from None
    ours = isinstance(report, dict) and str(report.get("format")).startswith(COMMANDS)
    return report if ours else None


def shards(folder: Path, wanted: str = FORMAT) -> list[Path] | None:
    """The shards in their order; None if none of our commands wrote the folder.

    Args:
      wanted: the format that it should be of.

    Raises:
      UserError: it is of another format, the command has not finished, or a shard is missing, cut
        short, or not in the report.
    """
    report = read_report(folder, wanted)
    if report is None:
        return None
    command = wanted.split()[0]
    if not report["complete"]:
        raise UserError(
            f"{folder}: {command} has not finished there; run its command again, which goes on "
            "where it stopped"
        )
    listed = report["shards"]
    for wrong in wrong_sizes(folder, {name: entry["bytes"] for name, entry in listed.items()}):
        raise UserError(
            f"{wrong} ({folder / REPORT} lists {len(listed)} shards); copy it again, or make it "
            f"again by {command}"
        )
    suffixes = {Path(name).suffix for name in listed}
    there = (file.name for file in folder.iterdir() if file.suffix in suffixes)
    if strange := sorted(set(there) - listed.keys()):
        raise UserError(
            f"{folder / strange[0]} is not in {folder / REPORT}; move it to a folder of its own, "
            "or the report away"
        )
    return [folder / name for name in listed]
