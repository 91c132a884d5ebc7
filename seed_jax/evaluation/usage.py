"""How many codes are in use, and how evenly.

Shapes: P pictures, Q codes a picture, C codes, R resamples.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from seed_jax.models import quantizer


def usage(codes_PQ: np.ndarray, size: int, weights_RP: np.ndarray) -> dict[str, Any]:
    """Share of codes in use, perplexity, and entropy in bits, of all positions and of each."""
    positions = codes_PQ.shape[1]
    places_PQ = codes_PQ + size * np.arange(positions)[None]
    counts_RQC = np.stack(
        [
            np.bincount(
                places_PQ.reshape(-1),
                weights=np.repeat(weights_P, positions),
                minlength=positions * size,
            ).reshape(positions, size)
            for weights_P in weights_RP
        ]
    )
    entropy_R = _entropy(counts_RQC.sum(axis=1))
    return {
        "usage": np.mean(counts_RQC.any(axis=1), axis=-1),
        "perplexity": 2**entropy_R,
        "entropy": entropy_R,
        "entropy_by_position": list(_entropy(counts_RQC).T),
    }


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Of counts [..., C], in bits."""
    shares = counts / counts.sum(axis=-1, keepdims=True)
    return -np.sum(shares * np.log2(np.where(shares > 0, shares, 1.0)), axis=-1)


def health(codes_PQ: np.ndarray, size: int) -> dict[str, float]:
    """Usage and perplexity of `size` codes over all pictures together."""
    counts_C = quantizer.usage_counts(jnp.asarray(codes_PQ), size)
    return {name: float(value) for name, value in quantizer.codebook_health(counts_C).items()}
