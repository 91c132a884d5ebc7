"""Captions by the language model, as Table 3 of the paper measures them."""

import textwrap
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from seed_jax import seed_opt
from seed_jax.data import transforms
from seed_jax.data.sequences import CAPTION_PROMPT
from seed_jax.data.sources import Source
from seed_jax.drawing import Shown
from seed_jax.evaluation import caption_metrics, intervals, tables, writing
from seed_jax.evaluation.suite import Evaluation, Measured, evenly

WHOLE = "all"
# In per cent.
PAPER = {
    "COCO 5K": {
        WHOLE: {"BLEU-4": 34.6, "METEOR": 28.4, "ROUGE-L": 56.4, "CIDEr": 119.0, "SPICE": 22.0}
    },
    "NoCaps": {
        "in-domain": {"SPICE": 12.5},
        "near-domain": {"SPICE": 12.3},
        "out-domain": {"SPICE": 12.2},
        WHOLE: {"SPICE": 12.3},
    },
}
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
ON_SHEET = 24


def evaluate(evaluation: Evaluation) -> Measured:
    """Writes a caption of every picture, five beams wide, and scores it against those it has."""
    source, model = evaluation.few, evaluation.seed_opt
    tasks = [
        writing.Task(str(index), partial(lambda index: writing.read(source[index]["image"]), index))
        for index in range(len(source))
    ]
    written = writing.write(
        tasks,
        evaluation.journal("captioning"),
        lambda pictures, _: model.caption(pictures),
        batch_size=evaluation.args.batch_size,
        what="caption",
    )
    records = {key: source[int(key)] for key in written}
    references = {key: record["captions"] for key, record in records.items()}
    domains = {key: record.get("domain") for key, record in records.items()}
    figures = score(references, written, domains)
    figures |= {"prompt": CAPTION_PROMPT, "beams": seed_opt.CAPTION.beams}
    shown = {"captioning": sheet(source, written)}
    return Measured(figures, evaluation.benchmark, shown)


def score(
    references: Mapping[str, list[str]],
    written: Mapping[str, str],
    domains: Mapping[str, str | None],
) -> dict[str, Any]:
    """Metrics of all pictures ('all') and of each domain, intervals, and what was left out."""
    scored = caption_metrics.score(references, {key: [text] for key, text in written.items()})
    names = sorted({domain for domain in domains.values() if domain})
    masks = {name: np.array([domains[key] == name for key in written], float) for name in names}

    def measure(weights_RP: np.ndarray) -> dict[str, Any]:
        found = {
            name: caption_metrics.measure(scored, weights_RP * mask_P[None])
            for name, mask_P in masks.items()
        }
        return found | {WHOLE: caption_metrics.measure(scored, weights_RP)}

    figures, spans = intervals.with_intervals(measure, len(written))
    return figures | {
        "pictures": len(written),
        "tokenizer": scored.tokenizer,
        "left_out": scored.left_out,
        "intervals": spans,
    }


def sheet(source: Source, written: Mapping[str, str]) -> list[Shown]:
    """Some pictures under what was written, spread evenly over all."""
    keys = list(written)
    some = evenly(len(keys), ON_SHEET)
    return [
        Shown(
            textwrap.shorten(written[keys[place]], 40),
            {"": np.asarray(transforms.decode(source[int(keys[place])]["image"]))},
        )
        for place in some
    ]


def groups(found: Mapping[str, Any]) -> list[str]:
    """The domains that figures are of, and all."""
    return [*(name for name, value in found.items() if name.endswith("-domain")), WHOLE]


def table(found: dict[str, Any]) -> str:
    """A row a metric, a column a domain, in per cent."""
    published = tables.published(PAPER, found)
    columns = groups(found)
    theirs = [(data, name) for data, figures in published.items() for name in figures]
    head = ["per cent", *columns, *(f"paper on {data}, {name}" for data, name in theirs)]
    rows = []
    for metric in METRICS:
        if metric not in found[WHOLE]:
            continue
        row = [metric]
        for name in columns:
            span = found["intervals"][name][metric]
            row.append(tables.figure(found[name][metric], span, percent=True))
        for data, name in theirs:
            value = published[data][name].get(metric)
            row.append("" if value is None else f"{value:.1f}")
        rows.append(row)
    told = (
        f"{found['pictures']} pictures, prompt “{found['prompt']}”, {found['beams']} beams, "
        f"{found['tokenizer']} tokenizer."
    )
    return "\n\n".join([tables.markdown(head, rows), told, *tables.left_out(found)])


def headline(found: dict[str, Any]) -> list[tables.Line]:
    lines = []
    for metric in ("BLEU-4", "CIDEr", "SPICE"):
        if metric in found[WHOLE]:
            span = found["intervals"][WHOLE][metric]
            theirs = {
                data: figures[WHOLE]
                for data, figures in tables.published(PAPER, found).items()
                if metric in figures[WHOLE]
            }
            paper = ", ".join(f"{figures[metric]:.1f} ({data})" for data, figures in theirs.items())
            value = tables.figure(found[WHOLE][metric], span, percent=True)
            lines.append(tables.Line(f"{metric}, %", value, paper))
    return lines
