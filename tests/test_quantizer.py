"""The codebook: its gradients, and the means that keep it in use."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax import losses
from seed_jax.models import quantizer
from seed_jax.models.quantizer import Codebook, CodebookConfig


def make(rotation_trick: bool = False) -> tuple[Codebook, jax.Array]:
    codebook = Codebook(CodebookConfig(16, 4, rotation_trick), rngs=nnx.Rngs(0))
    codebook.vectors[...] = jax.random.normal(jax.random.key(1), (16, 4))
    return codebook, jax.random.normal(jax.random.key(2), (2, 3, 4))


def test_nearest_agrees_with_brute_force():
    codebook, z = make()
    distances = np.linalg.norm(
        np.asarray(z)[:, :, None] - np.asarray(codebook.vectors[...]), axis=-1
    )
    np.testing.assert_array_equal(codebook.nearest(z), distances.argmin(-1))


def test_straight_through_passes_the_gradient_unchanged():
    codebook, z = make()
    weights = jax.random.normal(jax.random.key(3), z.shape)
    grad = jax.grad(lambda z: jnp.sum(codebook.quantize(z)[0] * weights))(z)
    np.testing.assert_allclose(grad, weights, rtol=1e-6)


def test_rotation_trick_keeps_the_value_and_rotates_the_gradient():
    codebook, z = make(rotation_trick=True)
    values, e, _ = codebook.quantize(z)
    np.testing.assert_allclose(values, e, atol=1e-6)
    weights = jax.random.normal(jax.random.key(3), z.shape)
    grad = jax.grad(lambda z: jnp.sum(codebook.quantize(z)[0] * weights))(z)
    # A rotation keeps angles: the gradient lies to z as the incoming one lies to the code.
    scale = np.linalg.norm(e, axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(np.sum(grad * z, -1), np.sum(weights * e, -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(grad, axis=-1), scale * np.linalg.norm(weights, axis=-1), rtol=1e-4
    )


def test_legacy_beta_swaps_the_weights_of_the_gradients():
    z, e = jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2))
    grads = {
        legacy: jax.grad(
            lambda z, e, legacy=legacy: losses.vector_quantization(z, e, legacy=legacy), (0, 1)
        )(z, e)
        for legacy in (True, False)
    }
    np.testing.assert_allclose(grads[True][0], 4 * grads[False][0])
    np.testing.assert_allclose(4 * grads[True][1], grads[False][1])


def test_health_counts_used_codes_and_their_effective_number():
    counts = quantizer.usage_counts(jnp.array([[0, 1], [1, 0]]), 8)
    health = quantizer.codebook_health(counts)
    assert health["usage"] == 2 / 8
    np.testing.assert_allclose(health["perplexity"], 2.0, rtol=1e-6)


def test_dead_codes_move_onto_encoder_outputs_and_live_ones_stay():
    vectors = jnp.zeros((4, 2))
    z = 1 + jax.random.uniform(jax.random.key(0), (10, 2))
    counts = jnp.array([10.0, 0.0, 6.0, 0.01])
    moved, counts = quantizer.reset_dead_codes(
        vectors, counts, z, threshold=0.1, key=jax.random.key(1)
    )
    np.testing.assert_array_equal(moved[jnp.array([0, 2])], 0)
    for row in np.asarray(moved[jnp.array([1, 3])]):
        assert (np.asarray(z) == row).all(axis=1).any()
    np.testing.assert_allclose(counts, [10.0, 4.0025, 6.0, 4.0025])
