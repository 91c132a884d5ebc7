"""Attention over the thousands of pixels of a picture.

Shapes in names: B batch, T query tokens, S key tokens, N heads, H head dim, C chunks, Q queries a
chunk.
"""

import jax
import jax.numpy as jnp

from seed_jax.models.layers import Array, attention, platform

# Queries at a time on a CPU: their scores with all keys should fit in its caches.
CHUNK = 512


def picture_attention(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array) -> Array:
    """Attention without a mask: [B, T, N, H] in the type of `q_BTNH`, softmax in float32.

    XLA has no fused attention on a CPU: whole, the scores of 4096 pixels take a gigabyte and go
    through memory several times. There, a head and some queries at a time are several times
    faster, which is done where there are many keys and the queries divide evenly.
    """
    batch, count, heads, head_dim = q_BTNH.shape
    keys = k_BSNH.shape[1]
    if platform() != "cpu" or count % CHUNK or keys < CHUNK:
        return attention(q_BTNH, k_BSNH, v_BSNH)

    def split(y_BSNH: Array, rows: int) -> Array:
        """Heads in front: [B N, chunks, rows, H]."""
        moved = y_BSNH.astype(jnp.float32).transpose(0, 2, 1, 3)
        return moved.reshape(batch * heads, -1, rows, head_dim)

    def head(parts: tuple[Array, Array, Array]) -> Array:
        q_CQH, k_SH, v_SH = parts

        def chunk(q_QH: Array) -> Array:
            scores_QS = q_QH @ k_SH.T
            weights_QS = jnp.exp(scores_QS - jnp.max(scores_QS, -1, keepdims=True))
            # Divided afterwards, when there are fewer numbers to divide.
            return weights_QS @ v_SH / jnp.sum(weights_QS, -1, keepdims=True)

        return jax.lax.map(chunk, q_CQH)

    scaled = split(q_BTNH, CHUNK) * head_dim**-0.5
    mixed = jax.lax.map(head, (scaled, split(k_BSNH, keys)[:, 0], split(v_BSNH, keys)[:, 0]))
    mixed_BNTH = mixed.reshape(batch, heads, count, head_dim)
    return mixed_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)
