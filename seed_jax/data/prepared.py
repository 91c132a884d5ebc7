"""What a folder of shards says of itself: report.json of `seed_jax.prepare`."""

import json
from pathlib import Path
from typing import Any

from seed_jax.cli import UserError
from seed_jax.files import wrong_sizes

REPORT = "report.json"
FORMAT = "seed_jax.prepare 1"
SHARDS = "*.array_record"


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a folder; None if there is none of this format."""
    file = folder / REPORT
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); copy the folder again, whole") from None
    return report if isinstance(report, dict) and report.get("format") == FORMAT else None


def shards(folder: Path) -> list[Path] | None:
    """The shards in their order; None if `prepare` did not write the folder.

    Raises:
      UserError: it has not finished, or a shard is missing, cut short, or not in the report.
    """
    report = read_report(folder)
    if report is None:
        return None
    if not report["complete"]:
        raise UserError(
            f"{folder}: seed_jax.prepare has not finished there; run its command again, which goes "
            "on where it stopped"
        )
    listed = report["shards"]
    for wrong in wrong_sizes(folder, {name: entry["bytes"] for name, entry in listed.items()}):
        raise UserError(
            f"{wrong} ({folder / REPORT} lists {len(listed)} shards); copy it again, or make it "
            "again by seed_jax.prepare"
        )
    if strange := sorted(file.name for file in folder.glob(SHARDS) if file.name not in listed):
        raise UserError(
            f"{folder / strange[0]} is not in {folder / REPORT}; move it to a folder of its own, "
            "or the report away"
        )
    return [folder / name for name in listed]
