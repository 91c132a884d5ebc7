"""How much of a picture its codes keep: drawn from them and compared, as in Table 2 of the paper.

Shapes: B pictures of a batch, P of the source, Q codes a picture, H and W pixels, E features.
"""

import argparse
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_jax import drawing, inference
from seed_jax.cli import UserError
from seed_jax.data import pipeline, transforms
from seed_jax.data.sources import Source
from seed_jax.data.text import choose_caption
from seed_jax.diffusion import StableDiffusion
from seed_jax.drawing import Shown
from seed_jax.evaluation import intervals, tables
from seed_jax.evaluation.encoders import Encoder, open_encoder
from seed_jax.evaluation.suite import Evaluation, Measured
from seed_jax.models.tokenizer import SeedTokenizer

# What a picture is drawn from: its codes; the text states of its caption, which is as good as an
# embedding can be where the codes learned from those; another picture's codes, which is as bad.
ROWS = {
    "codes": "drawn from the picture's codes",
    "caption": "drawn from its caption: what to hope for",
    "shuffled": "drawn from another picture's codes: what to expect of chance",
}
# Table 2: similarity by CLIP ViT-L/14.
PAPER = {
    "COCO 5K": {"codes": 0.6823, "caption": 0.6843},
    "Flickr30K 1K": {"codes": 0.6522, "caption": 0.6540},
}
SEED = 0
ON_SHEET = 20
TITLE_WIDTH = 54


class Drawn(NamedTuple):
    """A batch of pictures, drawn again.

    Attributes:
      index_B: their places in the source.
      originals: uint8 [B, S, S, 3], as the tokenizer sees them.
      captions: what they were drawn from for 'caption'.
      drawings: one of `ROWS` -> uint8 [B, H, W, 3].
      similarity: one of `ROWS` -> float32 [B], cosine to the original.
    """

    index_B: np.ndarray
    originals: np.ndarray
    captions: list[str]
    drawings: dict[str, np.ndarray]
    similarity: dict[str, np.ndarray]


def redraw(
    args: argparse.Namespace,
    model: SeedTokenizer,
    name: str | Path,
    source: Source,
    diffusion: StableDiffusion,
) -> tuple[Encoder, Iterator[Drawn]]:
    """The tokenizer's own encoder, and the pictures, drawn as one asks for them, compared by it.

    Args:
      args: the options of `drawing.add_arguments` and the batch size.
      name: what to call the tokenizer.
      diffusion: what draws from its codes.

    Raises:
      UserError: see `open_encoder` and `draw`.
    """
    runner = inference.Runner(model)
    encoder = open_encoder("", model, runner, name)
    settings = drawing.settings(args)
    batches = draw(
        model,
        runner,
        diffusion,
        encoder,
        source,
        batch_size=args.batch_size,
        **settings,
    )
    return encoder, batches


def draw(
    model: SeedTokenizer,
    runner: inference.Runner,
    diffusion: StableDiffusion,
    encoder: Encoder,
    source: Source,
    *,
    batch_size: int,
    done: int = 0,
    **settings: Any,
) -> Iterator[Drawn]:
    """Draws every picture of a source from each of `ROWS`, from the same noise, and compares.

    Args:
      runner: holds `model`.
      done: so many first pictures are passed over, as far as whole batches go, but not the last.
      settings: of `StableDiffusion.draw`.

    Raises:
      UserError: fewer than two pictures, a picture without caption, or a diffusion model without
        text encoder.
    """
    batch_size = runner.batch_size(min(batch_size, len(source)))  # pads few pictures to few
    side = model.config.encoder.vit.image_size
    index_P, codes_PQ = _encode(runner, source, batch_size, side)
    if len(index_P) < 2:
        raise UserError(f"{source.path}: one picture; another is needed to draw from its codes")
    others_PQ = codes_PQ[another(len(index_P))]
    embed = runner.compile(SeedTokenizer.embed)

    last = (len(index_P) - 1) // batch_size * batch_size
    begin = min(done // batch_size * batch_size, last)
    with tqdm(total=len(index_P), initial=begin, unit="picture", desc="drawings") as bar:
        for start in range(begin, len(index_P), batch_size):
            count = min(batch_size, len(index_P) - start)
            # The last batch is padded, so that one shape is compiled.
            rows = np.minimum(start + np.arange(batch_size), start + count - 1)
            records = [source[int(index)] for index in index_P[rows]]
            captions = [choose_caption(record, None, 0) for record in records]
            originals = [transforms.decode(record["image"]) for record in records]
            embeddings = {
                "codes": embed(codes_PQ[rows]),
                "caption": diffusion.text_states(captions),
                "shuffled": embed(others_PQ[rows]),
            }
            drawings, similarity = {}, {}
            original_BE = encoder.pictures(originals)
            for row in ROWS:
                drawn = np.asarray(diffusion.draw(embeddings[row], first=start, **settings))
                drawn_BE = encoder.pictures(map(Image.fromarray, drawn))
                drawings[row] = drawn[:count]
                similarity[row] = np.sum(original_BE * drawn_BE, axis=-1)[:count]
            seen = np.stack([transforms.resize(original, side) for original in originals[:count]])
            yield Drawn(
                index_P[start : start + count], seen, captions[:count], drawings, similarity
            )
            bar.update(count)


def _encode(
    runner: inference.Runner, source: Source, batch_size: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the pictures that can be read, int [P], and their codes, int [P, Q]."""
    encode = runner.compile(SeedTokenizer.encode)
    batches = pipeline.eval_batches(source, batch_size=batch_size, image_size=side)
    index, codes = [], []
    for batch in batches:
        index.append(batch["index"][batch["valid"]])
        codes.append(np.asarray(encode(batch["image"]))[batch["valid"]])
    inference.report_unreadable(batches.unreadable)
    return np.concatenate(index), np.concatenate(codes)


def another(count: int) -> np.ndarray:
    """For each of `count` things, at least two, the place of another one; each is taken once."""
    order = np.random.default_rng(SEED).permutation(count)
    places = np.empty(count, int)
    places[order] = np.roll(order, 1)
    return places


def results(encoder: Encoder, batches: Iterable[Drawn]) -> dict[str, Any]:
    """See `figures`, of pictures that were just drawn."""
    similarities = [batch.similarity for batch in batches]
    return figures(encoder, {row: np.concatenate([s[row] for s in similarities]) for row in ROWS})


def figures(encoder: Encoder, similarity: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean similarity for each of `ROWS`, intervals, the encoder, and the number of pictures.

    Args:
      similarity: one of `ROWS` -> float [P].
    """
    means, spans = intervals.of_means(similarity)
    told = {
        "encoder": encoder.name,
        "clip": encoder.clip,
        "pictures": len(similarity["codes"]),
    }
    return means | told | {"intervals": spans}


class Redrawn(NamedTuple):
    """All pictures of an evaluation, drawn again.

    Attributes:
      index_P: their places in the source.
      similarity: one of `ROWS` -> float [P].
      shown: the first ones, for a sheet.
    """

    encoder: Encoder
    index_P: list[int]
    similarity: dict[str, np.ndarray]
    shown: list[Shown]


def redrawn(evaluation: Evaluation) -> Redrawn:
    """Draws what an interrupted run has not drawn yet; see `draw`."""
    args, source = evaluation.args, evaluation.few
    journal = evaluation.journal("reconstruction")
    batches = draw(
        evaluation.tokenizer,
        evaluation.runner,
        evaluation.diffusion,
        evaluation.encoder,
        source,
        batch_size=args.batch_size,
        done=len(journal.rows),
        **drawing.settings(args),
    )
    shown: list[Shown] = []
    for batch in batches:
        journal.add(
            {"id": str(index)} | {row: float(batch.similarity[row][place]) for row in ROWS}
            for place, index in enumerate(batch.index_B)
        )
        shown += shown_of(batch)
        del shown[ON_SHEET:]
    similarity = {row: np.array([r[row] for r in journal.rows.values()]) for row in ROWS}
    return Redrawn(evaluation.encoder, [int(key) for key in journal.rows], similarity, shown)


def shown_of(batch: Drawn) -> list[Shown]:
    """Pictures beside what was drawn from their codes and captions."""
    return [
        Shown(
            textwrap.shorten(caption, TITLE_WIDTH, placeholder=" …"),
            {
                "": original,
                "from its codes": batch.drawings["codes"][place],
                "from its caption": batch.drawings["caption"][place],
            },
        )
        for place, (caption, original) in enumerate(
            zip(batch.captions, batch.originals, strict=True)
        )
    ]


def evaluate(evaluation: Evaluation) -> Measured:
    """How alike pictures and their drawings are, as in Table 2; see `figures`."""
    found = evaluation.once(redrawn)
    measured = figures(found.encoder, found.similarity)
    return Measured(measured, evaluation.benchmark, {"reconstruction": found.shown})


def table(found: dict[str, Any]) -> str:
    """The figures, a row each, beside Table 2 if a CLIP compared."""
    published = tables.published(PAPER, found) if found["clip"] else {}
    head = ["mean cosine to the original", "", *(f"paper on {data}" for data in published)]
    rows = []
    for row, told in ROWS.items():
        value = tables.figure(found[row], found["intervals"][row], digits=3)
        theirs = [figures.get(row) for figures in published.values()]
        rows.append([told, value, *(f"{x:.3f}" if x is not None else "" for x in theirs)])
    told = f"{found['pictures']} pictures, compared by the {found['encoder']}."
    return f"{tables.markdown(head, rows)}\n\n{told}"


def headline(found: dict[str, Any]) -> list[tables.Line]:
    span = found["intervals"]["codes"]
    paper = tables.theirs(PAPER, found, "codes", digits=3) if found["clip"] else ""
    value = tables.figure(found["codes"], span, digits=3)
    return [tables.Line("similarity of drawings from codes", value, paper)]
