"""LPIPS of drawings and their originals, at the drawings' size.

Shapes: B pictures of a batch, P pictures, S side.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seed_jax import inference
from seed_jax.cli import UserError
from seed_jax.evaluation import intervals, tables
from seed_jax.interop import lpips_weights
from seed_jax.models.lpips import LPIPS

LEAST_SIDE = 32
LEFT_OUT = "it takes --lpips vgg16-397923af.pth vgg.pth, or AlexNet's"


def open_lpips(trunk: Path, heads: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of pictures uint8 [B, S, S, 3], as many each time, to distances float32 [B].

    Raises:
      UserError: see `lpips_weights.load`; from the function: the pictures are too small.
    """
    runner = inference.Runner(lpips_weights.load(trunk, heads))
    apply = runner.compile_padded(LPIPS.__call__)

    def distances(a_BSSC: np.ndarray, b_BSSC: np.ndarray) -> np.ndarray:
        if (side := a_BSSC.shape[1]) < LEAST_SIDE:
            raise UserError(
                f"LPIPS of pictures of {side} pixels: its networks take {LEAST_SIDE} or more; "
                "leave out --lpips"
            )
        return apply(a_BSSC, b_BSSC)

    return distances


def figures(distances: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means and intervals of [P] each, or, without any, why they are not there."""
    if not distances:
        return {"left_out": {"LPIPS": LEFT_OUT}}
    means, spans = intervals.of_means(distances)
    return {"lpips": means, "lpips_intervals": spans}


def tables_of(found: Mapping[str, Any], rows: Mapping[str, str]) -> list[str]:
    """A row for each of `rows`; nothing without LPIPS."""
    if "lpips" not in found:
        return []
    lines = [
        [told, tables.figure(found["lpips"][row], found["lpips_intervals"][row], digits=3)]
        for row, told in rows.items()
    ]
    return [tables.markdown(["LPIPS to the original, less is closer", ""], lines)]
