"""What the codes are like: how many are in use, what the first of them tell, who shares them."""

import jax.numpy as jnp
import numpy as np

from seed_jax.models import quantizer


def health(codes_PQ: np.ndarray, size: int) -> dict[str, float]:
    """Usage and perplexity of `size` codes over all pictures together."""
    counts_C = quantizer.usage_counts(jnp.asarray(codes_PQ), size)
    return {name: float(value) for name, value in quantizer.codebook_health(counts_C).items()}
