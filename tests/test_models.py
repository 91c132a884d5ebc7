"""Properties of the models that hold whatever the weights; `test_parity.py` has the numbers."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax.data.transforms import normalize
from seed_jax.models import layers
from seed_jax.models.layers import Compute
from seed_jax.models.qformer import QFormer, QFormerConfig
from seed_jax.models.tokenizer import (
    EncoderConfig,
    GenerationConfig,
    SeedTokenizer,
    TokenizerConfig,
)
from seed_jax.models.vit import ViTConfig

QFORMER = QFormerConfig(
    queries=8,
    width=32,
    depth=3,
    heads=4,
    mlp_dim=48,
    encoder_width=24,
    vocab_size=40,
    max_positions=12,
)
SIZES = TokenizerConfig(
    encoder=EncoderConfig(
        vit=ViTConfig(image_size=16, patch_size=8, width=24, depth=2, heads=2, mlp_dim=48),
        qformer=QFORMER,
        contrastive_dim=16,
    ),
    decoder_heads=4,
    decoder_depth=2,
    generation=GenerationConfig(queries=5, depth=2, output_dim=20),
)


@functools.cache
def build(sizes: TokenizerConfig = SIZES, compute: Compute = Compute()) -> SeedTokenizer:
    # Op by op, building takes many times longer.
    return nnx.jit(lambda: SeedTokenizer(sizes, compute=compute, rngs=nnx.Rngs(0)))()


def build_qformer(config: QFormerConfig = QFORMER) -> QFormer:
    return nnx.jit(lambda: QFormer(config, compute=Compute(), rngs=nnx.Rngs(0)))()


@functools.partial(nnx.jit, static_argnums=1)
def call(tokenizer: SeedTokenizer, method: str, *arguments: jax.Array):
    return getattr(tokenizer, method)(*arguments)


def run_queries(qformer: QFormer, encoder_BED: jax.Array) -> np.ndarray:
    return np.asarray(nnx.jit(lambda q, e: q(e))(qformer, encoder_BED))


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_reaches_later_ones_and_only_a_causal_mask_hides_it_from_earlier(causal):
    config = dataclasses.replace(QFORMER, causal=causal)
    qformer = build_qformer(config)
    encoder_BED = jax.random.normal(jax.random.key(1), (1, 5, 24))
    before = run_queries(qformer, encoder_BED)
    changed = 3
    qformer.query_tokens[...] = qformer.query_tokens[...].at[changed].set(2.0)
    moved = np.abs(run_queries(qformer, encoder_BED) - before).max(axis=(0, 2)) > 1e-4
    assert moved[changed:].all()
    assert moved[:changed].all() != causal
    assert moved[:changed].any() != causal


def test_text_features_do_not_depend_on_padding():
    ids = jnp.array([[5, 7, 9]])
    short = call(build(), "text_features", ids, jnp.ones((1, 3), bool))
    padded = jnp.pad(ids, ((0, 0), (0, 4)), constant_values=11)
    long = call(build(), "text_features", padded, jnp.arange(7)[None] < 3)
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_pixels_and_normalised_images_give_the_same_embeddings():
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    np.testing.assert_allclose(
        call(build(), "causal_embeddings", pixels),
        call(build(), "causal_embeddings", normalize(pixels)),
        atol=1e-5,
    )


def test_how_a_model_runs_does_not_change_what_it_computes():
    def embed_and_grad(compute: Compute) -> tuple[jax.Array, nnx.State]:
        images = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
        graphdef, state = nnx.split(build(compute=compute))

        @jax.jit
        def run(state):
            tokenizer = nnx.merge(graphdef, state)
            causal = tokenizer.causal_embeddings(images)
            return jnp.sum(tokenizer.reconstruct_causal(tokenizer.encode(images)) * causal)

        return jax.value_and_grad(run)(state)

    plain = embed_and_grad(Compute())
    for compute in (Compute(remat="full"), Compute(remat="dots"), Compute(unroll=True)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4),
            plain,
            embed_and_grad(compute),
        )


def test_dropout_needs_a_key_and_follows_it():
    qformer = build_qformer()
    encoder_BED = jax.random.normal(jax.random.key(1), (1, 5, 24))
    run = nnx.jit(lambda q, key: q(encoder_BED, key=key))
    one, again = run(qformer, jax.random.key(1)), run(qformer, jax.random.key(1))
    other = run(qformer, jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - run_queries(qformer, encoder_BED)).max() > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_keeps_quantisation_in_float32(dtype):
    tokenizer = build(compute=Compute(dtype))
    causal_BQD = call(tokenizer, "causal_embeddings", jnp.ones((1, 16, 16, 3)))
    assert causal_BQD.dtype == dtype
    assert jnp.isfinite(causal_BQD).all()
    z_BQK = call(tokenizer, "code_vectors", causal_BQD)
    values, _, codes = tokenizer.codebook.quantize(z_BQK)
    assert z_BQK.dtype == values.dtype == jnp.float32
    assert codes.dtype == jnp.int32
    assert call(tokenizer, "image_features", causal_BQD).dtype == jnp.float32


@pytest.mark.parametrize(
    ("length", "masked", "capability", "expected"),
    [
        (32, True, "8.0", "cudnn"),
        (33, False, "8.0", "cudnn"),
        (33, True, "8.0", "xla"),
        (32, True, "7.0", "xla"),
    ],
)
def test_attention_is_fused_where_cudnn_can(length, masked, capability, expected, monkeypatch):
    gpu = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(layers.jax, "devices", lambda: [gpu])
    chosen = []

    def attend(q, k, v, *, mask, implementation):
        chosen.append(implementation)
        return q

    monkeypatch.setattr(layers.jax.nn, "dot_product_attention", attend)
    x = jnp.zeros((1, length, 2, 64), jnp.bfloat16)
    mask = jnp.ones((1, 1, length, length), bool) if masked else None
    layers.attention(x, x, x, mask)
    assert chosen == [expected]


def test_embed_shapes_of_the_heads():
    codes = jnp.zeros((3, 8), jnp.int32)
    for generation, shape in [
        (GenerationConfig(queries=5, depth=2, output_dim=20), (3, 5, 20)),
        (GenerationConfig(queries=1, depth=3, output_dim=20), (3, 20)),
        (GenerationConfig(kind="image_down", output_dim=20), (3, 20)),
    ]:
        sizes = dataclasses.replace(SIZES, generation=generation)
        embed = lambda sizes=sizes: SeedTokenizer(sizes, rngs=nnx.Rngs(0)).embed(codes)
        assert jax.eval_shape(embed).shape == shape


def test_a_tokenizer_without_the_reconstruction_branch_says_so():
    tokenizer = nnx.eval_shape(
        lambda: SeedTokenizer(dataclasses.replace(SIZES, reconstruction=False), rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match="no reconstruction branch"):
        tokenizer.decode_causal(jnp.zeros((1, 8, 32)))
