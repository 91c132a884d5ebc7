"""Fréchet Inception Distance (arXiv 1706.08500): how far drawings as a whole are from pictures.

As torch-fidelity computes it, from uint8 pictures. The original pictures are first brought to the
drawings' size, bicubic and smoothed, so that both come to the network alike.

There are no intervals: pictures that resampling repeats raise the distance by more than chance
moves it.

Shapes: B pictures of a batch, P pictures, S side, F features.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seed_jax import inference
from seed_jax.cli import UserError
from seed_jax.evaluation import tables
from seed_jax.interop import inception_weights
from seed_jax.models.inception import FEATURES, Inception

# What figures of published papers are of, and the least at which covariances have full rank.
CUSTOMARY, FULL_RANK = 10_000, FEATURES + 1
LEFT_OUT = "it takes --inception pt_inception-2015-12-05-6726825d.pth"


def open_inception(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function of pictures uint8 [B, S, S, 3], as many each time, to features float32 [B, F].

    Raises:
      UserError: see `inception_weights.load`.
    """
    runner = inference.Runner(inception_weights.load(file))
    return runner.compile_padded(Inception.__call__)


def distance(a_PF: np.ndarray, b_PF: np.ndarray) -> float:
    """The distance between Gaussians of the means and covariances of two sets of features.

    |mean difference|² + tr(A) + tr(B) - 2 tr((A B)^½), A and B with P - 1 in the denominator. With
    A = XᵀX and B = YᵀY the last trace is the sum of the singular values of X Yᵀ, which needs no
    root of a matrix that rounding may have made indefinite.

    Raises:
      UserError: fewer than two pictures, which have no covariance.
    """
    if (least := min(len(a_PF), len(b_PF))) < 2:
        raise UserError(f"FID of {least} pictures: it takes two or more, and means little below")
    mean_a_F, root_a_KF = _moments(a_PF)
    mean_b_F, root_b_KF = _moments(b_PF)
    cross = np.linalg.svd(root_a_KF @ root_b_KF.T, compute_uv=False).sum()
    return float(
        np.sum((mean_a_F - mean_b_F) ** 2) + np.sum(root_a_KF**2) + np.sum(root_b_KF**2) - 2 * cross
    )


def _moments(features_PF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and X [K, F] with XᵀX the covariance, K the smaller of P and F."""
    mean_F = features_PF.mean(axis=0, dtype=np.float64)
    root_KF = np.linalg.qr(features_PF - mean_F[None], mode="r")
    return mean_F, root_KF / np.sqrt(len(features_PF) - 1)


def figures(features: Mapping[str, np.ndarray], originals: str) -> dict[str, Any]:
    """FID of each set of features to that named `originals`, or, without any, why it is not there.

    Raises:
      UserError: see `distance`.
    """
    if not features:
        return {"left_out": {"FID": LEFT_OUT}}
    true_PF = features[originals]
    of = {name: distance(true_PF, own) for name, own in features.items() if name != originals}
    return {"fid": of, "fid_pictures": len(true_PF)}


def tables_of(found: Mapping[str, Any], rows: Mapping[str, str]) -> list[str]:
    """A table with a row for each set of drawings, and how to take it; nothing without FID.

    Args:
      rows: names to what stands in the table for them.
    """
    if "fid" not in found:
        return []
    lines = [[rows[name], tables.figure(value)] for name, value in found["fid"].items()]
    return [tables.markdown(["FID to the originals", ""], lines), caution(found["fid_pictures"])]


def caution(count: int) -> str:
    """Of how many pictures FID is, and what that means."""
    told = f"FID of {count} pictures."
    if count < FULL_RANK:
        return (
            f"{told} Of fewer than {FULL_RANK} it is far too high, and says little; compare it "
            "with that of as many pictures alone."
        )
    if count < CUSTOMARY:
        return f"{told} Of fewer than {CUSTOMARY} it is too high; compare it with as many alone."
    return told


def headline(found: Mapping[str, Any], name: str, told: str) -> list[tables.Line]:
    """A line of one set of drawings, if there is its FID."""
    if "fid" not in found:
        return []
    return [tables.Line(f"FID of {told}", tables.figure(found["fid"][name]))]
