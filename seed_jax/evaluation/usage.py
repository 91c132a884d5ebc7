"""How many codes are in use, and how evenly.

Shapes: P pictures, Q codes a picture, C codes, R resamples.
"""

from typing import Any

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
    of_all, of_each = (
        quantizer.codebook_health(counts) for counts in (counts_RQC.sum(axis=1), counts_RQC)
    )
    return {
        **of_all,
        "entropy": np.log2(of_all["perplexity"]),
        "entropy_by_position": list(np.log2(of_each["perplexity"]).T),
    }


def health(codes_PQ: np.ndarray, size: int) -> dict[str, float]:
    """Usage and perplexity of `size` codes over all pictures together."""
    counts_C = np.bincount(codes_PQ.reshape(-1), minlength=size)
    return {name: float(value) for name, value in quantizer.codebook_health(counts_C).items()}
