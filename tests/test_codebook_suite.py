"""What the codebook suite says of hand-made codes; its curve is in `test_writing_suites`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seed_jax.evaluation import codebook
from seed_jax.evaluation.usage import usage
from tests.tiny import CODES, QUERIES, random_module


def test_usage_and_entropy_of_codes_one_can_count():
    # The first position always has code 0, the second all four codes alike.
    codes_PQ = np.array([[0, 0], [0, 1], [0, 2], [0, 3]])
    found = usage(codes_PQ, 8, np.ones((1, 4)))
    assert found["usage"] == pytest.approx([4 / 8])
    shares = np.array([5, 1, 1, 1]) / 8
    entropy = -np.sum(shares * np.log2(shares))
    assert found["entropy"] == pytest.approx([entropy])
    assert found["perplexity"] == pytest.approx([2**entropy])
    np.testing.assert_allclose(found["entropy_by_position"], [[0.0], [2.0]], atol=1e-12)
    # Weights are how often a picture is drawn.
    twice = usage(codes_PQ, 8, np.array([[2, 2, 0, 0]]))
    repeated = usage(codes_PQ[[0, 0, 1, 1]], 8, np.ones((1, 4)))
    assert jax.tree.all(jax.tree.map(np.allclose, twice, repeated))


def test_hidden_codes_tell_nothing_of_the_picture():
    model = random_module(0)
    codes_PQ = np.random.default_rng(0).integers(0, CODES, (6, QUERIES))
    dequantized = codebook.hide(model, codes_PQ)
    kept_PQ = np.broadcast_to(np.arange(QUERIES) < 3, codes_PQ.shape)
    found = np.asarray(jax.jit(dequantized)(model, jnp.asarray(codes_PQ), kept_PQ))
    whole = np.asarray(model.dequantize(model.codebook.lookup(jnp.asarray(codes_PQ))))
    np.testing.assert_allclose(found[:, :3], whole[:, :3], rtol=1e-5, atol=1e-5)
    means = np.broadcast_to(whole.mean(axis=0)[3:], found[:, 3:].shape)
    np.testing.assert_allclose(found[:, 3:], means, rtol=1e-4, atol=1e-4)


def test_neighbours_share_most_codes_in_their_places():
    codes_PQ = np.array([[1, 2, 3], [1, 2, 4], [3, 2, 1], [1, 5, 4]])
    rows_PN, shared_PN = codebook.neighbours(codes_PQ, 2)
    np.testing.assert_array_equal(rows_PN, [[1, 2], [0, 3], [0, 1], [1, 0]])
    np.testing.assert_array_equal(shared_PN, [[2, 1], [2, 2], [1, 1], [2, 1]])
