"""How much of a picture its codes keep: drawn from them and compared, as in Table 2 of the paper.

Shapes: B pictures of a batch, P of the source, Q codes a picture, H and W pixels, E features.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig

from seed_jax import drawing, inference
from seed_jax.cli import UserError
from seed_jax.data import pipeline, transforms
from seed_jax.data.sources import Source
from seed_jax.data.text import choose_caption
from seed_jax.diffusion import StableDiffusion
from seed_jax.interop import clip_weights
from seed_jax.models.image_encoder import ClipImageEncoder
from seed_jax.models.layers import Array, Compute
from seed_jax.models.tokenizer import SeedTokenizer

# What a picture is drawn from: its codes; the text states of its caption, which is as good as an
# embedding can be where the codes learned from those; another picture's codes, which is as bad.
ROWS = ("codes", "caption", "shuffled")
SEED = 0


class ImageEncoder(NamedTuple):
    """What similarity is measured by.

    Attributes:
      name: for whoever reads the figures.
      size: height and width of the pictures it takes.
      features: uint8 [B, size, size, 3] to float32 [B, E], L2-normalised.
    """

    name: str
    size: int
    features: Callable[[np.ndarray], Any]


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
    path: str | Path,
    source: Source,
    *,
    image_encoder: str = "",
    diffusion: StableDiffusion | None = None,
) -> tuple[str, Iterator[Drawn]]:
    """The name of what pictures are compared by, and the pictures, drawn as one asks for them.

    Args:
      args: the options of `drawing.add_arguments` and the batch size.
      path: model directory of stage 2.
      image_encoder: a CLIP in transformers' layout, Flax or PyTorch: a directory or hub name; ''
        for the tokenizer's own stage-1 encoder.
      diffusion: what draws, if it is open already.

    Raises:
      UserError: a model can't be found or does not fit its config, or the two do not fit one
        another; the tokenizer has no contrastive heads to compare by; see `draw` too.
    """
    model = SeedTokenizer.from_pretrained(path)
    diffusion = diffusion or drawing.open_diffusion(args, model, path)
    runner = inference.Runner(model)
    encoder = _open_encoder(image_encoder, model, runner, path)
    settings = drawing.settings(args)
    batches = draw(
        model, runner, diffusion, encoder, source, batch_size=args.batch_size, **settings
    )
    return encoder.name, batches


def _open_encoder(
    path: str, model: SeedTokenizer, runner: inference.Runner, name: str | Path
) -> ImageEncoder:
    if path:
        return clip_encoder(path)
    config = model.config.encoder
    if not config.contrastive_dim:
        raise UserError(
            f"{name} has no contrastive heads to compare pictures by; name a CLIP as "
            "--image-encoder"
        )

    @runner.compile
    def features(model: SeedTokenizer, images: Array) -> Array:
        return model.image_features(model.causal_embeddings(images))

    return ImageEncoder(f"stage-1 encoder of {name}", config.vit.image_size, features)


def clip_encoder(path: str) -> ImageEncoder:
    """The image side of a CLIP; see `redraw`."""
    try:
        config = CLIPConfig.from_pretrained(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: no CLIP in transformers' layout there: {reason}") from error
    encoder = nnx.eval_shape(lambda: ClipImageEncoder(config, compute=Compute(), rngs=nnx.Rngs(0)))
    clip_weights.load(encoder, path)
    features = inference.Runner(encoder).compile(ClipImageEncoder.__call__)
    return ImageEncoder(path, encoder.size, features)


def draw(
    model: SeedTokenizer,
    runner: inference.Runner,
    diffusion: StableDiffusion,
    encoder: ImageEncoder,
    source: Source,
    *,
    batch_size: int,
    **settings: Any,
) -> Iterator[Drawn]:
    """Draws every picture of a source from each of `ROWS`, from the same noise, and compares.

    Args:
      runner: holds `model`.
      settings: of `StableDiffusion.draw`.

    Raises:
      UserError: fewer than two pictures, a picture without caption, or a diffusion model without
        text encoder.
    """
    batch_size = runner.batch_size(batch_size)
    side = model.config.encoder.vit.image_size
    index_P, codes_PQ = _encode(runner, source, batch_size, side)
    if len(index_P) < 2:
        raise UserError(f"{source.path}: one picture; another is needed to draw from its codes")
    others_PQ = codes_PQ[another(len(index_P))]
    embed = runner.compile(SeedTokenizer.embed)

    def features(pictures: Iterable[Image.Image]) -> np.ndarray:
        resized = [transforms.resize(picture, encoder.size) for picture in pictures]
        return np.asarray(encoder.features(np.stack(resized)))

    with tqdm(total=len(index_P), unit="picture", desc="drawings", dynamic_ncols=True) as bar:
        for start in range(0, len(index_P), batch_size):
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
            original_BE = features(originals)
            for row in ROWS:
                drawn = np.asarray(diffusion.draw(embeddings[row], first=start, **settings))
                drawn_BE = features(map(Image.fromarray, drawn))
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


def results(encoder: str, batches: Iterable[Drawn]) -> dict[str, Any]:
    """Mean similarity for each of `ROWS`, what it was measured by, and the number of pictures."""
    similarities = [batch.similarity for batch in batches]
    means = {row: float(np.concatenate([s[row] for s in similarities]).mean()) for row in ROWS}
    pictures = sum(len(s[ROWS[0]]) for s in similarities)
    return means | {"encoder": encoder, "pictures": pictures}


def table(results: dict[str, Any]) -> str:
    """The figures, a row each."""
    told = {
        "codes": "drawn from the picture's codes",
        "caption": "drawn from its caption: what to hope for",
        "shuffled": "drawn from another picture's codes: what to expect of chance",
    }
    lines = [f"{'similarity':<12}(mean cosine to the original, of the {results['encoder']})"]
    lines += [f"{row:<12}{results[row]:8.3f}   {told[row]}" for row in ROWS]
    return "\n".join([*lines, f"{results['pictures']} pictures"])
