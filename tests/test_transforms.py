import io
import warnings
from random import Random

import numpy as np
import pytest
from PIL import Image

from seed_jax.data import transforms


def photo(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(3,), (4, 4, 3), (2, 4, 4, 3)])
def test_normalize_keeps_the_shape(shape):
    values = transforms.normalize(np.full(shape, 255, np.uint8))
    assert values.shape == shape
    assert values.dtype == np.float32
    expected = (1 - np.array(transforms.CLIP_MEAN)) / np.array(transforms.CLIP_STD)
    np.testing.assert_allclose(values, np.broadcast_to(expected, shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "PNG"),
        ("RGBA", "PNG"),
        ("P", "GIF"),
        ("CMYK", "JPEG"),
        ("1", "BMP"),
        ("RGB", "WEBP"),
        ("RGB", "JPEG"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(mode, format):
    data = encoded(photo(0, 9, 7, mode), format)
    image = transforms.decode(data)
    assert (image.mode, image.size) == ("RGB", (9, 7))
    np.testing.assert_array_equal(image, Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_transparent_palette_gives_the_same_colours_as_pil_but_no_warning():
    palette = photo(0, 9, 7).quantize(16)
    data = encoded(palette, transparency=bytes(range(0, 256, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(transforms.decode(data), expected)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_picture_cut_short_raises(format, share):
    data = encoded(photo(0, 64, 64), format)
    with pytest.raises(Exception, match=r"(?i)image|data|file"):
        transforms.decode(data[: int(share * len(data))])


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (64, 64)])
def test_crops_lie_inside_and_cover_what_they_should(size):
    width, height = size
    shares, ratios = [], []
    for seed in range(300):
        left, top, right, bottom = transforms.random_box(width, height, Random(seed), (0.3, 0.6))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    # Sides are rounded to whole pixels.
    assert 0.28 < min(shares) < 0.33
    assert 0.57 < max(shares) < 0.62
    assert 0.72 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.37


@pytest.mark.parametrize(
    ("size", "box"), [((300, 3), (148, 0, 152, 3)), ((3, 300), (0, 148, 3, 152)), ((1, 1), None)]
)
def test_a_picture_too_slim_for_the_crop_gives_its_middle(size, box):
    assert transforms.random_box(*size, Random(0), (0.9, 1.0)) == (box or (0, 0, 1, 1))


def test_a_view_is_the_resized_crop_mirrored_half_of_the_time():
    image = photo(1, 40, 30)
    mirrored = 0
    for seed in range(200):
        plain, maybe = (
            transforms.random_view(image, 16, Random(seed), scale=(0.5, 1.0), flip=flip)
            for flip in (False, True)
        )
        box = transforms.random_box(40, 30, Random(seed), (0.5, 1.0))
        np.testing.assert_array_equal(plain, image.resize((16, 16), transforms.BICUBIC, box=box))
        is_mirror = np.array_equal(maybe, plain[:, ::-1])
        assert is_mirror or np.array_equal(maybe, plain)
        mirrored += is_mirror
    assert 70 < mirrored < 130
