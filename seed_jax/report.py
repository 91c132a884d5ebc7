"""The quickstart's last step: evaluates its models on held-out pictures and draws the results.

    python -m seed_jax.report --run OUT

reads OUT/causal_qformer, OUT/codebook and OUT/language_model (workdirs of the three stages),
OUT/tokenizer and OUT/seed_opt, and writes OUT/summary.json, OUT/curves.png, OUT/pictures.png,
OUT/drawings.png and OUT/some_folder.
"""

import argparse
import io
import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, GridSpecFromSubplotSpec
from PIL import Image

from seed_jax import cli, drawing, inference
from seed_jax.cli import UserError
from seed_jax.data.sources import CAPTIONS_FILE, Record, Source, open_source
from seed_jax.data.transforms import decode
from seed_jax.drawing import Shown
from seed_jax.evaluation import reconstruction, retrieval, seed_opt, usage
from seed_jax.evaluation.reconstruction import Drawn
from seed_jax.evaluation.suite import evenly
from seed_jax.inference import Embeddings
from seed_jax.seed_opt import SeedOPT

SPLITS = {
    "style": "Held-out drawings of things seen in training",
    "concept": "Things never seen in training",
}
# Workdir of a stage -> its row of panels: title -> the metrics drawn in it.
PANELS = {
    "causal_qformer": {
        "Stage 1: contrastive loss": ["loss"],
        "Share of a batch that finds its partner": ["i2t_accuracy", "t2i_accuracy"],
        "Learning rate": ["learning_rate"],
    },
    "codebook": {
        "Stage 2: loss and its parts": [
            "loss",
            "loss_vq",
            "loss_reconstruction",
            "loss_retrieval",
            "loss_generation",
        ],
        "Share of the codes in use": ["codebook_usage"],
        "Codebook perplexity": ["codebook_perplexity"],
    },
    "language_model": {
        "Stage 3: loss of captions' words": ["loss_words"],
        "Loss of drawings' codes": ["loss_codes"],
        "Learning rate": ["learning_rate"],
    },
}
CARDS_PER_SPLIT = 6
SHOWN_CAPTIONS = 3
SHOWN_DRAWINGS = 20
CAPTION_WIDTH = 54
CODE_COLUMNS = 8
CARD_INCHES, HEAD_INCHES = 1.9, 0.7
SHEET_GAPS = {"left": 0.01, "right": 0.99, "bottom": 0.01, "hspace": 0.15, "wspace": 0.03}
RIGHT, DIM = "#1a7f37", "#57606a"


class Card(NamedTuple):
    """A picture on the sheet.

    Attributes:
      codes_Q: its visual codes.
      found: the captions nearest to it, best first, by what they were searched with.
    """

    picture: np.ndarray
    caption: str
    codes_Q: np.ndarray
    found: dict[str, list[str]]


class Written(NamedTuple):
    """What the language model made of held-out pictures and captions.

    Attributes:
      captions: of each picture, from its codes.
      drawn_PQ: codes int32, of a drawing of each picture's caption.
      results: figures of both.
    """

    captions: list[str]
    drawn_PQ: np.ndarray
    results: dict[str, Any]


def draw_curves(run: Path, output: Path) -> None:
    """Draws what the stages wrote to their metrics.jsonl.

    Raises:
      UserError: a stage's metrics.jsonl is missing.
    """
    columns = max(map(len, PANELS.values()))
    figure = Figure(figsize=(5 * columns, 3.4 * len(PANELS)), layout="constrained")
    axes = figure.subplots(len(PANELS), columns)
    for row, (stage, panels) in zip(axes, PANELS.items(), strict=True):
        metrics = read_metrics(run / stage / "metrics.jsonl")
        for axis, (title, names) in zip(row, panels.items(), strict=True):
            for name in names:
                axis.plot(metrics["step"], metrics[name], label=name, linewidth=1.5)
            axis.set_title(title, fontsize=11, loc="left")
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if len(names) > 1:
                axis.legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=110)


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.jsonl."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run this stage first, as launch/quickstart.sh does")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in rows[0]}


def make_cards(source: Source, embedded: Embeddings, count: int) -> list[Card]:
    """Cards of `count` pictures spread evenly over a source."""
    assert embedded.codes is not None
    cards = []
    for row in np.linspace(0, len(embedded.index_P) - 1, count).astype(int):
        found = {}
        for name, image_PE in (
            ("embeddings", embedded.image_PE),
            ("codes", embedded.codes.image_PE),
        ):
            order_C = np.argsort(-(embedded.text_CE @ image_PE[row]), kind="stable")
            found[name] = [embedded.captions[i] for i in order_C[:SHOWN_CAPTIONS]]
        own = int(np.argmax(embedded.picture_of_caption_C == row))
        picture = np.asarray(decode(source[int(embedded.index_P[row])]["image"]))
        cards.append(Card(picture, embedded.captions[own], embedded.codes.codes_PQ[row], found))
    return cards


def draw_sheet(cards: dict[str, list[Card]], codebook_size: int, output: Path) -> None:
    """Draws a column of cards under each title."""
    rows = max(map(len, cards.values()))
    height = CARD_INCHES * rows + HEAD_INCHES
    figure = Figure(figsize=(9 * len(cards), height))
    grid = GridSpec(rows, len(cards), figure=figure, top=1 - HEAD_INCHES / height, **SHEET_GAPS)
    for column, (title, column_cards) in enumerate(cards.items()):
        for row, card in enumerate(column_cards):
            cell = GridSpecFromSubplotSpec(
                1, 3, grid[row, column], width_ratios=[1, 1.6, 2.6], wspace=0.05
            )
            picture, codes, text = (figure.add_subplot(cell[i]) for i in range(3))
            _draw_card(card, picture, codes, text)
        left = grid[0, column].get_position(figure).x0
        figure.text(left, 1 - 0.25 / height, title, fontsize=14, fontweight="bold", va="center")
        legend = f"picture, codes (of {codebook_size}), caption, and the captions found for it"
        figure.text(left, 1 - 0.5 / height, legend, fontsize=10, color=DIM, va="center")
    figure.savefig(output, dpi=100, facecolor="white")


def _draw_card(card: Card, picture: Axes, codes: Axes, text: Axes) -> None:
    for axis in (picture, codes, text):
        axis.set_axis_off()
    picture.imshow(card.picture, interpolation="lanczos")

    codes_RC = card.codes_Q.reshape(-1, CODE_COLUMNS)
    # Golden-ratio steps: neighbouring codes have nothing in common, so they get distant colours.
    hue_RC = codes_RC * 0.618034 % 1.0
    codes.imshow(matplotlib.colormaps["hsv"](hue_RC), alpha=0.35, aspect="auto")
    for (i, j), code in np.ndenumerate(codes_RC):
        codes.text(j, i, str(code), ha="center", va="center", fontsize=8)

    lines: list[tuple[str, dict[str, Any]]] = [(_short(card.caption), {"fontweight": "bold"})]
    for name, captions in card.found.items():
        lines.append((f"nearest captions, by {name}:", {"color": DIM}))
        for caption in captions:
            right = caption == card.caption
            mark, colour = ("✓", RIGHT) if right else ("·", "black")
            lines.append((f"{mark} {_short(caption)}", {"color": colour}))
    for i, (line, style) in enumerate(lines):
        y = 1 - i / len(lines)
        text.text(0, y, line, fontsize=9.5, va="top", transform=text.transAxes, **style)


def _short(caption: str) -> str:
    return textwrap.shorten(caption, CAPTION_WIDTH, placeholder=" …")


def write_folder(source: Source, folder: Path, max_tags: int) -> None:
    """Writes a source as people keep pictures: files, and captions.jsonl beside them."""
    lines = []
    for index in range(len(source)):
        record = source[index]
        name = record["id"] + picture_suffix(record)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(record["image"])
        lines.append({"image": name, "captions": inference.captions_of(record, max_tags)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / CAPTIONS_FILE).write_text(text)


def picture_suffix(record: Record) -> str:
    """The file suffix that fits a record's picture, such as '.webp'."""
    with Image.open(io.BytesIO(record["image"])) as picture:
        return f".{str(picture.format).lower()}"


def report(args: argparse.Namespace) -> None:
    """Evaluates, draws, and tells the user what there is to see."""
    run, model = args.run, args.run / "tokenizer"
    draw_curves(run, run / "curves.png")
    sources = {split: open_source(args.data, split) for split in SPLITS}
    embedded, results, cards, codes, size = {}, {}, {}, [], 0
    for split, title in SPLITS.items():
        embedded[split] = inference.embed(model, sources[split], max_tags=args.max_tags)
        if (found := embedded[split].codes) is None:
            raise UserError(f"{model} holds a model of stage 1; copy stage 2's there")
        codes.append(found.codes_PQ)
        size = found.codebook_size
        results[split] = retrieval.results(embedded[split])
        cards[title] = make_cards(sources[split], embedded[split], CARDS_PER_SPLIT)
    draw_sheet(cards, size, run / "pictures.png")
    write_folder(sources["style"], run / "some_folder", args.max_tags)

    language_model = SeedOPT.from_pretrained(run / "seed_opt")
    written = write(language_model, sources["style"], embedded["style"], args.batch_size)
    diffusion = drawing.open_diffusion(args, language_model.tokenizer, model)
    encoder, redrawn = reconstruction.redraw(
        args, language_model.tokenizer, model, sources["style"], diffusion
    )

    def draw(codes_NQ: np.ndarray) -> np.ndarray:
        # As many at a time as before, so that nothing is compiled anew.
        padded = np.resize(codes_NQ, (max(len(codes_NQ), args.batch_size), codes_NQ.shape[1]))
        embeddings = language_model.tokenizer.embed(jnp.asarray(padded))
        return np.asarray(diffusion.draw(embeddings, **drawing.settings(args)))[: len(codes_NQ)]

    shown = shown_drawings(redrawn, written, draw)
    drawing.draw_sheet(shown, run / "drawings.png")
    summary = {
        "retrieval": results,
        "codebook": usage.health(np.concatenate(codes), size),
        "reconstruction": reconstruction.results(encoder, redrawn),
        "seed_opt": written.results,
        "seconds": round(time.time() - args.started, 1),
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(story(run, summary))


def write(model: SeedOPT, source: Source, embedded: Embeddings, batch_size: int) -> Written:
    """Lets the language model caption pictures from their codes, and draw their captions."""
    assert embedded.codes is not None
    true = [source[int(index)]["captions"] for index in embedded.index_P]
    captions = seed_opt.caption_all(model, embedded.codes.codes_PQ, batch_size=batch_size)
    drawn_PQ = seed_opt.draw_all(model, [own[0] for own in true], batch_size=batch_size)
    results = {
        "captions": seed_opt.caption_results(captions, true),
        "drawings": seed_opt.drawing_results(model, drawn_PQ, embedded),
    }
    return Written(captions, drawn_PQ, results)


def shown_drawings(
    redrawn: list[Drawn], written: Written, draw: Callable[[np.ndarray], np.ndarray]
) -> list[Shown]:
    """Some of the pictures beside their drawings, spread evenly over all.

    Args:
      draw: codes [N, Q] to pictures uint8 [N, H, W, 3].
    """
    groups = [shown for batch in redrawn for shown in reconstruction.shown_of(batch)]
    rows = evenly(len(groups), SHOWN_DRAWINGS)
    return [
        Shown(
            f"{_short(groups[row].title)}\nread as: {_short(written.captions[row])}",
            {**groups[row].panels, "by SEED-OPT": picture},
        )
        for row, picture in zip(rows, draw(written.drawn_PQ[rows]), strict=True)
    ]


def story(run: Path, summary: dict[str, Any]) -> str:
    """What happened and what to open, for the terminal."""
    lines = []
    for split, title in SPLITS.items():
        table = retrieval.table(summary["retrieval"][split])
        lines += [f"\n{title} (split {split!r})", textwrap.indent(table, "  ")]
    table = reconstruction.table(summary["reconstruction"])
    lines += ["\nDrawn again (split 'style')", textwrap.indent(table, "  ")]
    table = seed_opt.table(summary["seed_opt"])
    lines += ["\nRead and drawn by SEED-OPT (split 'style')", textwrap.indent(table, "  ")]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    health = summary["codebook"]
    lines.append(
        f"""
Trained and evaluated a tokenizer, and a language model that reads and writes its codes, in
{minutes} min {seconds} s. The held-out pictures use {100 * health["usage"]:.1f} % of the codes
(perplexity {health["perplexity"]:.1f}).

Open
  {run}/pictures.png   held-out pictures, their codes, and the captions found for them
  {run}/drawings.png   held-out pictures, what SEED-OPT reads in their codes, and drawings: from
                       their codes, from their captions, and of SEED-OPT
  {run}/curves.png     how the three stages learned
  {run}/summary.json   the figures above
  {run}/codes.jsonl    the codes of all held-out pictures
  {run}/results        all suites of seed_jax.evaluate, on a few pictures: table.md first

Try
  .venv/bin/python -m seed_jax.tokenize --model {run}/tokenizer --images {run}/some_folder \\
      --output codes.jsonl
  .venv/bin/python -m seed_jax.evaluate --model {run}/tokenizer --suite retrieval \\
      --data {run}/some_folder
  .venv/bin/python -m seed_jax.reconstruct --model {run}/tokenizer --images {run}/some_folder \\
      --output {run}/drawn
  .venv/bin/python -m seed_jax.generate --model {run}/seed_opt --image PICTURE
  .venv/bin/python -m seed_jax.generate --model {run}/seed_opt --draw "a red apple" \\
      --output apple.png"""
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m seed_jax.report", description=__doc__)
    parser.add_argument(
        "--run", required=True, type=Path, metavar="OUT", help="the quickstart's folder"
    )
    parser.add_argument("--data", default="embedded", metavar="PATH", help="as for evaluate")
    parser.add_argument(
        "--max-tags", type=int, default=0, metavar="N", help="as for evaluate (default: 0)"
    )
    parser.add_argument(
        "--started",
        type=float,
        default=time.time(),
        metavar="SECONDS",
        help="when the run began, in seconds since 1970 (default: now)",
    )
    parser.add_argument(
        "--batch-size",
        type=inference.positive,
        default=50,
        metavar="N",
        help="pictures drawn at a time (50)",
    )
    # A fast sampler: hundreds of pictures are drawn.
    drawing.add_arguments(parser, steps=8, scheduler="dpm")
    report(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
