"""Markdown tables of figures, as they go to the terminal and to table.md."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    """What stands for a suite beside others: a figure's name, its value, and the paper's."""

    name: str
    value: str
    paper: str = ""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = f"{cells[0]:<{widths[0]}}"
        others = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def figure(
    value: float | None,
    interval: Sequence[float | None] | None = None,
    *,
    percent: bool = False,
    digits: int = 1,
) -> str:
    """A figure and its interval, such as '71.9 [70.6, 73.1]'; None, there being none, is '–'."""
    if value is None:
        return "–"
    scale = 100 if percent else 1
    text = f"{scale * value:.{digits}f}"
    if interval is None:
        return text
    low, high = interval
    if low is None or high is None:
        return text
    return f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def left_out(found: Mapping[str, Any]) -> list[str]:
    """A paragraph that says which metrics are not there, and why; none if all are."""
    reasons = found.get("left_out", {}).items()
    return ["\n".join(f"{name} is left out: {why}." for name, why in reasons)] if reasons else []


def at(tree: Any, *names: Any) -> Any:
    """What lies in nested dicts (or sequences) under these names (or places)."""
    for name in names:
        tree = tree[name]
    return tree


def published(paper: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The paper's figures to stand beside what was found.

    Returns:
      Those on the same data; on all of the paper's data where ours are others; none where figures
      do not say what data they are of.
    """
    if "benchmark" not in found:
        return {}
    benchmark = found["benchmark"]
    return {benchmark: paper[benchmark]} if benchmark in paper else paper


def theirs(
    paper: dict[str, Any], found: dict[str, Any], *names: Any, scale: float = 1, digits: int = 1
) -> str:
    """The paper's figure under `names`, with the data set that it is of."""
    parts = [
        f"{scale * at(figures, *names):.{digits}f} ({data})"
        for data, figures in published(paper, found).items()
    ]
    return ", ".join(parts)
