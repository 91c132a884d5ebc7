"""Attention in chunks is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seed_jax.models.layers import attention
from seed_jax.models.picture_attention import CHUNK, picture_attention


@pytest.mark.parametrize("queries", [2 * CHUNK, CHUNK + 1])
@pytest.mark.parametrize("keys", [CHUNK + 3, 5])
def test_the_same_values_and_gradients(queries, keys):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, queries, 2, 4)), jnp.float32)
    # Scores of several hundreds: their exponentials overflow unless the largest is taken off.
    k, v = (jnp.asarray(rng.normal(0, s, (2, keys, 2, 4)), jnp.float32) for s in (200, 1))

    def run(function):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2)))

    ours, expected = (run(f)(q, k, v) for f in (picture_attention, attention))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_chunks_keep_the_type():
    x = jnp.ones((1, CHUNK, 1, 8), jnp.bfloat16)
    assert picture_attention(x, x, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(picture_attention(x, x, x), x)
