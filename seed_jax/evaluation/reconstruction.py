"""How much of a picture its codes keep: drawn from them and compared, as in Table 2 of the paper.

Shapes: B pictures of a batch, P of the source, Q codes a picture, H and W pixels, E features.
"""

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_jax import drawing, inference
from seed_jax.cli import UserError
from seed_jax.data import transforms
from seed_jax.data.sources import Source
from seed_jax.data.text import choose_caption
from seed_jax.diffusion import StableDiffusion
from seed_jax.drawing import Shown
from seed_jax.evaluation import fid, intervals, perceptual, tables
from seed_jax.evaluation.encoders import Encoder, open_encoder
from seed_jax.evaluation.suite import Evaluation, Measured
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.pieces import KEEPS_NOTHING, Arrays, Pieces, below, join

# What a picture is drawn from: its codes; the text states of its caption, which is as good as an
# embedding can be where the codes learned from those; another picture's codes, which is as bad.
ROWS = {
    "codes": "drawn from the picture's codes",
    "caption": "drawn from its caption: what to hope for",
    "shuffled": "drawn from another picture's codes: what to expect of chance",
}
# Drawings from others' codes are the same ones in another order.
FID_ROWS, ORIGINALS = ("codes", "caption"), "originals"
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
      originals: uint8 [B, H, W, 3], brought to the drawings' size.
      captions: what they were drawn from for 'caption'.
      drawings: one of `ROWS` -> uint8 [B, H, W, 3].
      similarity: one of `ROWS` -> float32 [B], cosine to the original.
    """

    index_B: np.ndarray
    originals: np.ndarray
    captions: list[str]
    drawings: dict[str, np.ndarray]
    similarity: dict[str, np.ndarray]


class Redrawing:
    """Draws every picture of a source from each of `ROWS`, from the same noise, and compares.

    Attributes:
      starts: of the batches, in the order of the pictures that can be read.
    """

    def __init__(
        self,
        model: SeedTokenizer,
        runner: inference.Runner,
        diffusion: StableDiffusion,
        encoder: Encoder,
        source: Source,
        *,
        batch_size: int,
        kept: Pieces = KEEPS_NOTHING,
        **settings: Any,
    ):
        """Encodes all of the pictures.

        Args:
          runner: holds `model`.
          kept: has the codes, or keeps them.
          settings: of `StableDiffusion.draw`.

        Raises:
          UserError: fewer than two pictures.
        """
        self._batch_size = runner.batch_size(min(batch_size, len(source)))  # few are padded to few
        encode = runner.compile(lambda model, images: {"codes": model.encode(images)})
        found = inference.over_pictures(
            encode,
            source,
            batch_size=self._batch_size,
            image_size=model.config.encoder.vit.image_size,
            kept=kept,
        )
        self._index_P, self._codes_PQ = found["index"], found["codes"]
        if len(self._index_P) < 2:
            raise UserError(f"{source.path}: one picture; another is needed to draw from its codes")
        self._others_PQ = self._codes_PQ[another(len(self._index_P))]
        self._embed = runner.compile(SeedTokenizer.embed)
        self._source, self._diffusion, self._encoder = source, diffusion, encoder
        self._settings = settings
        self.starts = range(0, len(self._index_P), self._batch_size)

    def __call__(self, start: int) -> Drawn:
        """The batch that begins with this picture.

        Raises:
          UserError: a picture without caption, or a diffusion model without text encoder.
        """
        count = min(self._batch_size, len(self._index_P) - start)
        # The last batch is padded, so that one shape is compiled.
        rows = np.minimum(start + np.arange(self._batch_size), start + count - 1)
        records = [self._source[int(index)] for index in self._index_P[rows]]
        captions = [choose_caption(record, None, 0) for record in records]
        originals = [transforms.decode(record["image"]) for record in records]
        embeddings = {
            "codes": self._embed(self._codes_PQ[rows]),
            "caption": self._diffusion.text_states(captions),
            "shuffled": self._embed(self._others_PQ[rows]),
        }
        drawings, similarity = {}, {}
        original_BE = self._encoder.pictures(originals)
        for row in ROWS:
            drawn = np.asarray(self._diffusion.draw(embeddings[row], first=start, **self._settings))
            drawn_BE = self._encoder.pictures(map(Image.fromarray, drawn))
            drawings[row] = drawn[:count]
            similarity[row] = np.sum(original_BE * drawn_BE, axis=-1)[:count]
        side = drawn.shape[1]
        seen = np.stack([transforms.resize(original, side) for original in originals[:count]])
        index_B = self._index_P[start : start + count]
        return Drawn(index_B, seen, captions[:count], drawings, similarity)


def redraw(
    args: argparse.Namespace,
    model: SeedTokenizer,
    name: str | Path,
    source: Source,
    diffusion: StableDiffusion,
) -> tuple[Encoder, list[Drawn]]:
    """The tokenizer's own encoder, and the pictures, drawn again and compared by it.

    Args:
      args: the options of `drawing.add_arguments` and the batch size.
      name: what to call the tokenizer.
      diffusion: what draws from its codes.

    Raises:
      UserError: see `open_encoder` and `Redrawing`.
    """
    runner = inference.Runner(model)
    encoder = open_encoder("", model, runner, name)
    batch_size, settings = args.batch_size, drawing.settings(args)
    redrawing = Redrawing(
        model, runner, diffusion, encoder, source, batch_size=batch_size, **settings
    )
    with tqdm(redrawing.starts, unit="batch", desc="drawings", dynamic_ncols=True) as bar:
        return encoder, [redrawing(start) for start in bar]


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
      features: 'originals' and those of `FID_ROWS` -> what the Inception sees, float32 [P, F];
        empty without one.
      distances: one of `ROWS` -> LPIPS to the originals, float32 [P]; empty without it.
      shown: the first ones, for a sheet.
    """

    encoder: Encoder
    index_P: np.ndarray
    similarity: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    distances: dict[str, np.ndarray]
    shown: list[Shown]


def redrawn(evaluation: Evaluation) -> Redrawn:
    """Draws what an interrupted run has not drawn yet; see `Redrawing`."""
    args, source = evaluation.args, evaluation.few
    kept = evaluation.pieces("reconstruction")
    # What is wrong with their files shows before the work.
    inception, lpips = evaluation.inception, evaluation.lpips
    redrawing = Redrawing(
        evaluation.tokenizer,
        evaluation.runner,
        evaluation.diffusion,
        evaluation.encoder,
        source,
        batch_size=args.batch_size,
        kept=kept,
        **drawing.settings(args),
    )

    def piece(start: int) -> Arrays:
        batch = redrawing(start)
        arrays = {"index": batch.index_B}
        arrays |= {f"similarity/{row}": values for row, values in batch.similarity.items()}
        if inception:
            arrays[f"features/{ORIGINALS}"] = inception(batch.originals)
            arrays |= {f"features/{row}": inception(batch.drawings[row]) for row in FID_ROWS}
        if lpips:
            arrays |= {
                f"distances/{row}": lpips(batch.originals, batch.drawings[row]) for row in ROWS
            }
        some = slice(max(0, ON_SHEET - start))
        return arrays | {
            "captions": np.array(batch.captions[some], str),
            "originals": batch.originals[some],
            **{f"drawings/{row}": batch.drawings[row][some] for row in FID_ROWS},
        }

    with tqdm(redrawing.starts, unit="batch", desc="drawings", dynamic_ncols=True) as bar:
        found = join([kept(f"drawings-{start:07}", partial(piece, start)) for start in bar])
    shown = _shown(found["captions"].tolist(), found["originals"], below(found, "drawings"))
    return Redrawn(
        evaluation.encoder,
        found["index"],
        below(found, "similarity"),
        below(found, "features"),
        below(found, "distances"),
        shown,
    )


def shown_of(batch: Drawn) -> list[Shown]:
    """Pictures beside what was drawn from their codes and captions."""
    return _shown(batch.captions, batch.originals, batch.drawings)


def _shown(
    captions: Sequence[str], originals: np.ndarray, drawings: dict[str, np.ndarray]
) -> list[Shown]:
    return [
        Shown(
            textwrap.shorten(caption, TITLE_WIDTH, placeholder=" …"),
            {
                "": original,
                "from its codes": drawings["codes"][place],
                "from its caption": drawings["caption"][place],
            },
        )
        for place, (caption, original) in enumerate(zip(captions, originals, strict=True))
    ]


def evaluate(evaluation: Evaluation) -> Measured:
    """How alike pictures and their drawings are, as in Table 2; see `figures`."""
    found = evaluation.once(redrawn)
    measured = figures(found.encoder, found.similarity)
    more = [fid.figures(found.features, ORIGINALS), perceptual.figures(found.distances)]
    left_out = {name: why for one in more for name, why in one.pop("left_out", {}).items()}
    measured |= more[0] | more[1] | {"left_out": left_out}
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
    return "\n\n".join(
        [
            tables.markdown(head, rows),
            *fid.tables_of(found, ROWS),
            *perceptual.tables_of(found, ROWS),
            told,
            *tables.left_out(found),
        ]
    )


def headline(found: dict[str, Any]) -> list[tables.Line]:
    span = found["intervals"]["codes"]
    paper = tables.theirs(PAPER, found, "codes", digits=3) if found["clip"] else ""
    value = tables.figure(found["codes"], span, digits=3)
    line = tables.Line("similarity of drawings from codes", value, paper)
    return [line, *fid.headline(found, "codes", "drawings from codes")]
