"""Bytes of a picture's codes, beside those of a JPEG that keeps as much of it.

A JPEG of a picture at full size, however poor, has many times the bytes of the codes; so it is also
made smaller. Of all sizes and qualities the one with the fewest bytes counts whose pictures are as
similar to the originals as the drawings from the codes are, on average.

Shapes: P pictures, G settings of JPEG, R resamples, E features.
"""

import io
import math
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_jax import model_dir
from seed_jax.data import transforms
from seed_jax.drawing import Shown
from seed_jax.evaluation import intervals, reconstruction, tables
from seed_jax.evaluation.encoders import Encoder
from seed_jax.evaluation.suite import Evaluation, Measured, evenly
from seed_jax.models.tokenizer import TokenizerConfig
from seed_jax.pieces import Arrays, Pieces
from seed_jax.tasks import codebook

SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 224)
QUALITIES = (5, 30, 75)
MOST_PICTURES = 200
ON_SHEET = 12


def evaluate(evaluation: Evaluation) -> Measured:
    """Compares the codes with JPEG, on up to 200 of the pictures that `reconstruction` draws."""
    drawn = evaluation.once(reconstruction.redrawn)
    config = model_dir.load_config(evaluation.tokenizer_path, codebook.KIND, TokenizerConfig)
    count = len(drawn.index_P)
    some = evenly(count, min(count, MOST_PICTURES))
    pictures = [transforms.decode(evaluation.few[drawn.index_P[place]]["image"]) for place in some]
    settings = [(side, quality) for side in SIDES for quality in QUALITIES]
    bytes_PG, similarity_PG = compress(
        drawn.encoder, pictures, settings, evaluation.pieces("compression")
    )
    queries, size = config.encoder.qformer.queries, config.codebook.size
    figures = compare(bytes_PG, similarity_PG, drawn.similarity["codes"][some])
    figures |= {
        "code_bits": queries * math.log2(size),
        "code_bytes": queries * math.log2(size) / 8,
        "encoder": drawn.encoder.name,
        "pictures": len(some),
    }
    best = figures.pop("best")
    chosen = None if best is None else settings[best]
    figures["jpeg"] = chosen and {"side": chosen[0], "quality": chosen[1]}
    shown = sheet(pictures[:ON_SHEET], chosen) if chosen else []
    return Measured(figures, evaluation.benchmark, {"compression": shown} if shown else {})


def jpeg(picture: Image.Image, side: int, quality: int) -> bytes:
    """A whole JPEG file of a picture, made square."""
    file = io.BytesIO()
    small = Image.fromarray(transforms.resize(picture, side))
    small.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def compress(
    encoder: Encoder,
    pictures: list[Image.Image],
    settings: list[tuple[int, int]],
    kept: Pieces,
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, and similarity to the original, of each picture in each setting, both [P, G].

    Args:
      kept: has what an interrupted run compared, and gets the rest.
    """
    original_PE = kept("originals", lambda: {"features": encoder.pictures(pictures)})["features"]

    def piece(side: int, quality: int) -> Arrays:
        files = [jpeg(picture, side, quality) for picture in pictures]
        small_PE = encoder.pictures(map(transforms.decode, files))
        sizes = np.array([len(file) for file in files], float)
        return {"bytes": sizes, "similarity": np.sum(original_PE * small_PE, axis=-1)}

    with tqdm(settings, unit="setting", desc="JPEG", dynamic_ncols=True) as bar:
        pieces = [kept(f"{side}-{quality}", partial(piece, side, quality)) for side, quality in bar]
    bytes_PG, similarity_PG = (
        np.stack([piece[name] for piece in pieces], axis=1) for name in ("bytes", "similarity")
    )
    return bytes_PG, similarity_PG.astype(float)


def compare(bytes_PG: np.ndarray, similarity_PG: np.ndarray, codes_P: np.ndarray) -> dict[str, Any]:
    """What JPEG takes to keep as much as the codes do.

    Args:
      codes_P: similarity of the drawings from the codes.

    Returns:
      'jpeg_bytes' (NaN if no setting keeps as much), 'similarity' of the codes, their intervals,
      and 'best', the setting, or None.
    """

    def measure(weights_RP: np.ndarray) -> dict[str, Any]:
        similar_R = intervals.mean(weights_RP, codes_P)
        bytes_RG = _means(weights_RP, bytes_PG)
        enough_RG = _means(weights_RP, similarity_PG) >= similar_R[:, None]
        least_R = np.where(enough_RG, bytes_RG, np.inf).min(axis=1)
        return {
            "jpeg_bytes": np.where(np.isinf(least_R), np.nan, least_R),
            "similarity": similar_R,
        }

    figures, spans = intervals.with_intervals(measure, len(codes_P))
    enough_G = similarity_PG.mean(axis=0) >= codes_P.mean()
    best = None
    if enough_G.any():
        best = int(np.argmin(np.where(enough_G, bytes_PG.mean(axis=0), np.inf)))
    return figures | {"intervals": spans, "best": best}


def _means(weights_RP: np.ndarray, values_PG: np.ndarray) -> np.ndarray:
    return (weights_RP @ values_PG) / weights_RP.sum(axis=1, keepdims=True)


def sheet(pictures: list[Image.Image], setting: tuple[int, int]) -> list[Shown]:
    """Pictures beside the JPEG."""
    shown = []
    for picture in pictures:
        file = jpeg(picture, *setting)
        small = np.asarray(transforms.decode(file))
        shown.append(Shown("", {"": np.asarray(picture), f"JPEG, {len(file)} bytes": small}))
    return shown


def table(found: dict[str, Any]) -> str:
    """Bytes of both."""
    codes = [f"codes ({found['code_bits']:.0f} bits)", f"{found['code_bytes']:.0f}"]
    span = found["intervals"]["jpeg_bytes"]
    if setting := found["jpeg"]:
        name = f"JPEG of {setting['side']} x {setting['side']} pixels, quality {setting['quality']}"
        theirs = [name, tables.figure(found["jpeg_bytes"], span, digits=0)]
    else:
        theirs = ["JPEG, in any setting tried", "less similar"]
    alike = tables.figure(found["similarity"], found["intervals"]["similarity"], digits=3)
    return (
        tables.markdown(["bytes a picture", ""], [codes, theirs])
        + f"\n\nBoth at a similarity of {alike} or more, by the {found['encoder']}; "
        f"{found['pictures']} pictures, JPEG files whole."
    )


def headline(found: dict[str, Any]) -> list[tables.Line]:
    jpeg_bytes = (
        tables.figure(found["jpeg_bytes"], found["intervals"]["jpeg_bytes"], digits=0)
        if found["jpeg"]
        else "none as similar"
    )
    return [
        tables.Line("bytes of a picture's codes", f"{found['code_bytes']:.0f}"),
        tables.Line("bytes of a JPEG as similar", jpeg_bytes),
    ]
