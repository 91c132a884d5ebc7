"""Pixels: encoded files to uint8 arrays on the host, and their normalisation on the device."""

import io
import math
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from seed_jax.cli import first_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

BICUBIC = Image.Resampling.BICUBIC
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10


def decode(data: bytes) -> Image.Image:
    """An encoded picture as RGB pixels, transparency dropped as the original does.

    Raises:
      Exception: of many kinds, from PIL: not a picture, or a broken one.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode == "P":
        # The same colours as straight to RGB, without PIL's warning about palettes.
        image = image.convert("RGBA")
    if image.mode != "RGB":  # or it would copy the picture
        image = image.convert("RGB")
    image.load()
    return image


def why_unreadable(error: Exception) -> str:
    """In a few words, what `decode` met."""
    if isinstance(error, UnidentifiedImageError):
        # PIL's own message holds a memory address.
        return "not a picture"
    return first_line(error)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """The original's view of a picture: both sides to `size`, bicubic; uint8 [S, S, 3]."""
    return np.asarray(image.resize((size, size), BICUBIC))


def random_view(
    image: Image.Image, size: int, rng: Random, *, scale: tuple[float, ...], flip: bool
) -> np.ndarray:
    """Random resized crop, bicubic, mirrored half of the time if `flip`; uint8 [S, S, 3].

    Args:
      scale: the crop's share of the picture's area, drawn between these; empty takes the whole.
    """
    box = random_box(image.width, image.height, rng, scale) if scale else None
    image = image.resize((size, size), BICUBIC, box=box)
    if flip and rng.random() < 0.5:
        # Cheaper in PIL than copying an array backwards.
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def random_box(
    width: int, height: int, rng: Random, scale: tuple[float, ...]
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom): area uniform in `scale`, ratio log-uniform in 3/4..4/3.

    If none fits in ten tries, the middle of the picture, as much as the ratio allows.
    """
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * CROP_RATIO[1])))
    h = max(1, min(height, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalize(images_u8: jax.Array) -> jax.Array:
    """uint8 pixels [..., 3] to float32 with CLIP's mean and deviation; runs in the jitted step."""
    channels = (1,) * (images_u8.ndim - 1) + (3,)
    mean = jnp.array(CLIP_MEAN, jnp.float32).reshape(channels)
    std = jnp.array(CLIP_STD, jnp.float32).reshape(channels)
    return (images_u8.astype(jnp.float32) / 255 - mean) / std
