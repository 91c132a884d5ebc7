"""Runs a trained model over a data set: weights on every local device, batches split among them.

Shapes: B batch, P pictures, C captions, T tokens, E contrastive width, Q codes a picture.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from seed_jax import model_dir, sharding
from seed_jax.cli import UserError, few
from seed_jax.data import pipeline
from seed_jax.data.sources import Record, Source
from seed_jax.data.text import TextField, choose_caption, load_tokenizer
from seed_jax.models.layers import Array, Compute
from seed_jax.models.tokenizer import CausalEncoder, EncoderConfig, SeedTokenizer
from seed_jax.pieces import KEEPS_NOTHING, Arrays, Pieces, join
from seed_jax.tasks import causal_qformer

# Batches to a piece.
BLOCK = 16


class Runner:
    """Holds a model's weights on every local device, and compiles functions of it."""

    def __init__(self, model: nnx.Module):
        self._mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
        self._graphdef, state = nnx.split(model)
        self._state = jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))

    def batch_size(self, wanted: int) -> int:
        """The smallest batch of at least `wanted` rows that splits evenly among the devices."""
        return -(-wanted // self._mesh.size) * self._mesh.size

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(model, *arrays)` as a compiled function of its arrays, each [B, ...]."""
        graphdef, split = self._graphdef, sharding.batch_sharding(self._mesh)

        @jax.jit
        def compiled(state: nnx.State, *arrays: Array) -> Any:
            return function(nnx.merge(graphdef, state), *arrays)

        return lambda *arrays: compiled(self._state, *jax.device_put(arrays, split))

    def compile_padded(self, function: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """As `compile`, of as many rows as there are, whether or not they split evenly.

        `function` returns one array, [B, ...]. Each number of rows is compiled anew.
        """
        compiled = self.compile(function)

        def padded(*arrays: np.ndarray) -> np.ndarray:
            count = len(arrays[0])
            rows = np.minimum(np.arange(self.batch_size(count)), count - 1)
            return np.asarray(compiled(*(array[rows] for array in arrays)))[:count]

        return padded


@dataclasses.dataclass(frozen=True)
class CodeEmbeddings:
    """What the codes of P pictures keep.

    Attributes:
      codes_PQ: int32 visual codes.
      image_PE: float32 features of the causal embeddings that the decoder reconstructs from them.
    """

    codes_PQ: np.ndarray
    image_PE: np.ndarray
    codebook_size: int


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Pictures and captions in the contrastive space; features float32, L2-normalised.

    Attributes:
      index_P: each picture's place in the source; pictures that can't be read are left out.
      picture_of_caption_C: the row of `image_PE` that a caption belongs to.
      codes: None for a stage-1 model.
    """

    index_P: np.ndarray
    image_PE: np.ndarray
    captions: list[str]
    text_CE: np.ndarray
    picture_of_caption_C: np.ndarray
    codes: CodeEmbeddings | None


def embed(
    path: str | Path,
    source: Source,
    *,
    batch_size: int = 64,
    max_tags: int = 0,
    tokenizer: SeedTokenizer | None = None,
    kept: Pieces = KEEPS_NOTHING,
) -> Embeddings:
    """Embeds the pictures of a source and all of their captions.

    Args:
      path: model directory of either stage.
      max_tags: append up to so many of a picture's tags to each of its captions.
      tokenizer: of that directory, if it is loaded already.
      kept: has what an interrupted run embedded, and gets the rest.

    Raises:
      UserError: the model directory is not whole, or its model has no contrastive heads.
    """
    model, config = _load(path, tokenizer)
    runner = Runner(model)
    batch_size = runner.batch_size(batch_size)
    images = _embed_images(runner, config, source, batch_size, kept)
    index_P = images.pop("index")

    captions: list[str] = []
    picture_of_caption: list[int] = []
    for row, index in enumerate(index_P):
        own = captions_of(source[int(index)], max_tags)
        if not own:
            raise UserError(f"{source.path}: {source.name(int(index))} has no caption")
        captions += own
        picture_of_caption += [row] * len(own)
    field = TextField(load_tokenizer(str(Path(path) / "text_tokenizer")), config.text_length)
    text_CE = _embed_texts(runner, field, captions, batch_size, kept)

    codes = None
    if isinstance(model, SeedTokenizer):
        codes = CodeEmbeddings(images["codes"], images["code_features"], model.config.codebook.size)
    return Embeddings(
        index_P, images["features"], captions, text_CE, np.array(picture_of_caption), codes
    )


def captions_of(record: Record, max_tags: int) -> list[str]:
    """All captions of a picture, each with up to `max_tags` of its tags behind it."""
    return [
        choose_caption({**record, "captions": [caption]}, None, max_tags)
        for caption in record["captions"]
    ]


def _load(
    path: str | Path, tokenizer: SeedTokenizer | None
) -> tuple[CausalEncoder | SeedTokenizer, EncoderConfig]:
    model: CausalEncoder | SeedTokenizer
    if model_dir.describe(path)["kind"] == causal_qformer.KIND:
        model = model_dir.load(path, causal_qformer.KIND, EncoderConfig, CausalEncoder, Compute())
        config = model.config
    else:
        model = tokenizer or SeedTokenizer.from_pretrained(path)
        config = model.config.encoder
        if model.reconstruction is None:
            raise UserError(
                f"{path} can't embed codes: it has no branch that reconstructs embeddings"
            )
    if not config.contrastive_dim:
        raise UserError(f"{path} can't embed captions: it has no contrastive heads")
    return model, config


def _embed_images(
    runner: Runner, config: EncoderConfig, source: Source, batch_size: int, kept: Pieces
) -> Arrays:
    @runner.compile
    def apply(model: CausalEncoder | SeedTokenizer, images: Array) -> dict[str, Array]:
        causal_BQD = model.causal_embeddings(images)
        outputs = {"features": model.image_features(causal_BQD)}
        if isinstance(model, SeedTokenizer):
            codes_BQ = model.codebook.nearest(model.code_vectors(causal_BQD))
            outputs["codes"] = codes_BQ
            outputs["code_features"] = model.image_features(model.reconstruct_causal(codes_BQ))
        return outputs

    size = config.vit.image_size
    return over_pictures(apply, source, batch_size=batch_size, image_size=size, kept=kept)


def over_pictures(
    apply: Callable[[np.ndarray], Any],
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    kept: Pieces = KEEPS_NOTHING,
) -> Arrays:
    """What a compiled function makes of all pictures of a source that can be read.

    Args:
      apply: uint8 [B, S, S, 3] to arrays by name, each [B, ...].
      kept: has what an interrupted run made, and gets the rest.

    Returns:
      Those arrays, [P, ...], and 'index', places in the source, int [P].

    Raises:
      UserError: see `eval_batches`.
    """
    batches = pipeline.eval_batches(source, batch_size=batch_size, image_size=image_size)
    with tqdm(total=len(source), unit="picture", desc="pictures", dynamic_ncols=True) as bar:

        def block() -> Arrays:
            rows = []
            for batch in itertools.islice(batches, BLOCK):
                valid = batch["valid"]
                outputs = jax.device_get(apply(batch["image"])) | {"index": batch["index"]}
                rows.append({name: value[valid] for name, value in outputs.items()})
                bar.update(int(valid.sum()))
            return join(rows) | {"state": np.array(json.dumps(batches.get_state()))}

        blocks = []
        for first in range(0, -(-len(source) // batch_size), BLOCK):
            found = kept(f"pictures-{first:06}", block)
            state = json.loads(str(found.pop("state")))
            if state["batch"] != batches.get_state()["batch"]:  # an earlier run made it
                batches.set_state(state)
                bar.update(len(found["index"]))
            blocks.append(found)
    report_unreadable(batches.unreadable)
    return join(blocks)


def _embed_texts(
    runner: Runner, field: TextField, captions: list[str], batch_size: int, kept: Pieces
) -> np.ndarray:
    apply = runner.compile(lambda model, ids, mask: model.text_features(ids, mask))

    def block(first: int) -> Arrays:
        features = []
        for start in range(first, min(first + BLOCK * batch_size, len(captions)), batch_size):
            batch = captions[start : start + batch_size]
            # The last batch is padded, so that one shape is compiled.
            padding = [""] * (batch_size - len(batch))
            features.append(np.asarray(apply(*field.batch(batch + padding)))[: len(batch)])
            bar.update(len(batch))
        return {"features": np.concatenate(features)}

    with tqdm(total=len(captions), unit="caption", desc="captions", dynamic_ncols=True) as bar:
        blocks = []
        for first in range(0, len(captions), BLOCK * batch_size):
            blocks.append(kept(f"captions-{first:07}", partial(block, first)))
            bar.update(min(first + BLOCK * batch_size, len(captions)) - bar.n)
    return join(blocks)["features"]


def report_unreadable(names: list[str]) -> None:
    """Lists the pictures that were skipped."""
    if names:
        print(f"{len(names)} pictures could not be read and were skipped:")
        print("\n".join(f"  {name}" for name in names))


def check_unreadable(names: Sequence[str], path: str, total: int, share: float) -> None:
    """Raises a UserError if more than a share of the `total` pictures of `path` can't be read."""
    if len(names) > share * total:
        raise UserError(
            f"{path}: {len(names)} of {total} pictures can't be read: {few(names)}; mend or remove "
            f"them, or allow more than --max-unreadable={share:g}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs a model over pictures."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model directory, as train writes it"
    )
    parser.add_argument("--split", metavar="NAME", help="only records of this split")
    parser.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="pictures at a time (64)"
    )


def output_file(text: str) -> Path:
    """The type of an argument that names a file to write: a mistake in it shows before the work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
