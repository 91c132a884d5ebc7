"""What pictures and texts are compared by: a CLIP, or the tokenizer's own stage-1 encoder.

Shapes: B batch, T tokens, E features.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from PIL import Image
from transformers import CLIPConfig

from seed_jax import inference
from seed_jax.cli import UserError, first_line
from seed_jax.data import transforms
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.interop import clip_weights
from seed_jax.models.image_encoder import ClipEncoder
from seed_jax.models.layers import Array, Compute
from seed_jax.models.tokenizer import SeedTokenizer


class Encoder(NamedTuple):
    """Pictures and texts in one space; all features float32, L2-normalised.

    Attributes:
      name: for whoever reads the figures.
      clip: whether it is one, as the paper's is.
      size: height and width of the pictures it takes.
      features: uint8 [B, size, size, 3] to [B, E]. To be called with as many each time, lest it
        compile again.
      texts: texts to [B, E], under the same terms.
    """

    name: str
    clip: bool
    size: int
    features: Callable[[np.ndarray], np.ndarray]
    texts: Callable[[Sequence[str]], np.ndarray]

    def pictures(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """Features of pictures of any size and number, [B, E]."""
        return self.features(
            np.stack([transforms.resize(picture, self.size) for picture in pictures])
        )


def open_encoder(
    path: str, model: SeedTokenizer, runner: inference.Runner, name: str | Path
) -> Encoder:
    """A CLIP, or a tokenizer's encoder.

    Args:
      path: a CLIP in transformers' layout, Flax or PyTorch: a directory or hub name; '' for the
        encoder of `model`, which `runner` holds and `name` names.

    Raises:
      UserError: there is no CLIP, it does not fit its config, or the tokenizer has no contrastive
        heads to compare by.
    """
    return clip_encoder(path) if path else _own_encoder(model, runner, name)


def clip_encoder(path: str) -> Encoder:
    """Both sides of a CLIP; see `open_encoder`."""
    try:
        config = CLIPConfig.from_pretrained(path)
    except OSError as error:
        reason = first_line(error)
        raise UserError(f"{path}: no CLIP in transformers' layout there: {reason}") from error
    clip = nnx.eval_shape(lambda: ClipEncoder(config, compute=Compute(), rngs=nnx.Rngs(0)))
    clip_weights.load(clip, path)
    runner = inference.Runner(clip)
    length = config.text_config.max_position_embeddings

    def field() -> TextField:
        # Only now: to compare pictures, no tokenizer is needed.
        return TextField(load_tokenizer(path), length)

    texts = _texts(runner.compile_padded(ClipEncoder.text_features), field)
    features = runner.compile_padded(ClipEncoder.__call__)
    return Encoder(path, True, clip.size, features, texts)


def _own_encoder(model: SeedTokenizer, runner: inference.Runner, name: str | Path) -> Encoder:
    config = model.config.encoder
    if not config.contrastive_dim:
        raise UserError(
            f"{name} has no contrastive heads to compare pictures by; name a CLIP as "
            "--image-encoder"
        )

    @runner.compile_padded
    def features(model: SeedTokenizer, images: Array) -> Array:
        return model.image_features(model.causal_embeddings(images))

    def field() -> TextField:
        return TextField(load_tokenizer(Path(name) / "text_tokenizer"), config.text_length)

    texts = _texts(runner.compile_padded(SeedTokenizer.text_features), field)
    size, told = config.vit.image_size, f"stage-1 encoder of {name}"
    return Encoder(told, False, size, features, texts)


def _texts(
    apply: Callable[..., np.ndarray], field: Callable[[], TextField]
) -> Callable[[Sequence[str]], np.ndarray]:
    made: list[TextField] = []

    def features(texts: Sequence[str]) -> np.ndarray:
        if not made:
            made.append(field())
        return apply(*made[0].batch(list(texts)))

    return features
