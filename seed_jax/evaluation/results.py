"""A folder of results: results.json, which a later run adds to, and table.md, made from it."""

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import seed_jax
from seed_jax.cli import UserError
from seed_jax.evaluation import tables
from seed_jax.evaluation.suite import Suite
from seed_jax.files import replace_text

FILE, TABLE = "results.json", "table.md"
FORMAT = 1
LEGEND = "In brackets: 95 % intervals, by drawing the pictures anew (bootstrap)."
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "transformers", "diffusers", "pycocoevalcap")

# A suite's name -> its 'figures', 'benchmark', 'settings', 'versions' and 'seconds'.
Results = dict[str, dict[str, Any]]


def read(folder: Path) -> Results:
    """What earlier runs found.

    Raises:
      UserError: there is a results.json of another kind.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        if content["format"] == FORMAT:
            return content["suites"]
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} is no results of seed_jax.evaluate; name another --output")


def write(folder: Path, results: Results, suites: Mapping[str, Suite]) -> None:
    """Writes both files, each whole or not at all."""
    content = {"format": FORMAT, "suites": results}
    replace_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    replace_text(folder / TABLE, report(results, suites) + "\n")


def report(results: Results, suites: Mapping[str, Suite]) -> str:
    """All tables: first a line or two of each suite, then each suite's own."""
    there = [name for name in suites if name in results]
    lines = [
        (name, *line) for name in there for line in suites[name].headline(_figures(results[name]))
    ]
    parts = ["# Results", tables.markdown(["suite", "figure", "found", "paper"], lines), LEGEND]
    for name in there:
        options = results[name]["settings"]["options"]
        data = options["data"] + (f", split {options['split']}" if options["split"] else "")
        parts += [f"## {name}: {data}", table(suites[name], results[name])]
    return "\n\n".join(parts)


def table(suite: Suite, result: dict[str, Any]) -> str:
    """A suite's own table."""
    return suite.table(_figures(result))


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return result["figures"] | {"benchmark": result["benchmark"]}


def plain(value: Any) -> Any:
    """Figures as JSON has them: it knows no NaN."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def versions() -> dict[str, str]:
    """What ran: this package, Python, libraries, and what JAX computed on."""
    found = {"seed_jax": metadata.version(seed_jax.__name__), "python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = metadata.version(name)
    return found | {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}
