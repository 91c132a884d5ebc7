"""The visual codebook: nearest codes, straight-through gradient, and means to keep it healthy.

Shapes: B batch, Q queries, C codes, K code dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax.models import layers
from seed_jax.models.layers import Array


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """Sizes of the codebook; the defaults are SEED's.

    Attributes:
      rotation_trick: pass the gradient through the rotation and scaling that takes z to its code
        (arXiv 2410.06424) instead of straight through.
    """

    size: int = 8192
    dim: int = 32
    rotation_trick: bool = False


class Codebook(nnx.Module):
    """C code vectors of dim K; always float32, since a rounding error would change a code."""

    def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
        bound = 1.0 / config.size
        self.vectors = nnx.Param(
            jax.random.uniform(
                rngs.params(), (config.size, config.dim), minval=-bound, maxval=bound
            ),
            axes=("codes", None),
            exact=True,
        )
        self.config = config

    def nearest(self, z_BQK: Array) -> Array:
        """Index of the nearest code by squared L2 distance, int32 [B, Q]; the first wins a tie."""
        z_BQK = z_BQK.astype(jnp.float32)
        codes_CK = self.vectors[...]
        products_BQC = jnp.einsum(
            "BQK,CK->BQC", z_BQK, codes_CK, precision=jax.lax.Precision.HIGHEST
        )
        squares_C = jnp.sum(codes_CK**2, axis=-1)
        distances_BQC = (
            jnp.sum(z_BQK**2, axis=-1, keepdims=True) + squares_C[None, None] - 2 * products_BQC
        )
        return jnp.argmin(distances_BQC, axis=-1).astype(jnp.int32)

    def lookup(self, codes_BQ: Array) -> Array:
        """The code vectors, float32 [B, Q, K]."""
        return layers.lookup(self.vectors, codes_BQ)

    def quantize(self, z_BQK: Array) -> tuple[Array, Array, Array]:
        """Replaces each vector by its code; the gradient passes through to `z_BQK`.

        Returns:
          Values as the code vectors with the gradient of the chosen estimator, the code vectors
          (whose gradient reaches the codebook), and the codes int32 [B, Q].
        """
        z_BQK = z_BQK.astype(jnp.float32)
        codes_BQ = self.nearest(jax.lax.stop_gradient(z_BQK))
        e_BQK = self.lookup(codes_BQ)
        fixed = jax.lax.stop_gradient(e_BQK)
        if self.config.rotation_trick:
            return rotate_to(z_BQK, fixed), e_BQK, codes_BQ
        return z_BQK + jax.lax.stop_gradient(fixed - z_BQK), e_BQK, codes_BQ


def rotate_to(z: Array, target: Array, epsilon: float = 1e-8) -> Array:
    """`target` in value, with the gradient of the rotation and scaling that carries `z` there.

    Source: the rotation trick, arXiv 2410.06424, section 4.2 (two Householder reflections).

    Args:
      z, target: float32 [..., K].
    """
    z_norm = jnp.linalg.norm(z, axis=-1, keepdims=True)
    target_norm = jnp.linalg.norm(target, axis=-1, keepdims=True)
    u = jax.lax.stop_gradient(z / (z_norm + epsilon))
    v = jax.lax.stop_gradient(target / (target_norm + epsilon))
    w = u + v
    w = w / (jnp.linalg.norm(w, axis=-1, keepdims=True) + epsilon)
    dot = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)
    rotated = z - 2 * w * dot(w, z) + 2 * v * dot(u, z)
    rotated = rotated * jax.lax.stop_gradient(target_norm / (z_norm + epsilon))
    # Rounding, and vectors of length zero, must not leak into the value.
    return rotated + jax.lax.stop_gradient(target - rotated)


def usage_counts(codes_BQ: Array, size: int) -> Array:
    """How often each code occurs, float32 [C]."""
    return jnp.zeros(size).at[codes_BQ.reshape(-1)].add(1.0)


def codebook_health(counts: Any) -> dict[str, Any]:
    """Share of codes in use, and perplexity (the effective number of codes), from counts [..., C].

    Args:
      counts: of JAX or NumPy, in whose arrays [...] the answer comes.
    """
    xp = counts.__array_namespace__()
    probs = counts / xp.maximum(xp.sum(counts, axis=-1, keepdims=True), 1.0)
    logs = xp.log(xp.where(probs > 0, probs, 1.0))
    perplexity = xp.exp(-xp.sum(probs * logs, axis=-1))
    return {"usage": xp.mean(counts > 0, axis=-1), "perplexity": perplexity}


def reset_dead_codes(
    vectors_CK: Array, ema_counts_C: Array, z_NK: Array, *, threshold: float, key: Array
) -> tuple[Array, Array]:
    """Moves codes that fell out of use onto encoder outputs drawn from the batch.

    Under a sharded step `z_NK` is the global batch, so all devices draw the same replacements.
    Running means begin at 0, so that at first a code that a batch or two lacked is dead: one that
    starts at chance comes to the data within steps, not after hundreds.

    Args:
      ema_counts_C: running mean of each code's count in a batch.
      z_NK: encoder outputs of this batch.
      threshold: a code is dead below this share of the mean count.

    Returns:
      The new vectors, and the counts with those of revived codes set to the mean.
    """
    mean = ema_counts_C.mean()
    dead_C = ema_counts_C < threshold * mean
    rows_C = jax.random.randint(key, dead_C.shape, 0, z_NK.shape[0])
    vectors_CK = jnp.where(dead_C[:, None], z_NK[rows_C], vectors_CK)
    return vectors_CK, jnp.where(dead_C, mean, ema_counts_C)
