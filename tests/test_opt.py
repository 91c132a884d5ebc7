"""OPT and its visual vocabulary: sizes, names, what is trained, and reading of files."""

import dataclasses
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from seed_jax import losses
from seed_jax.cli import UserError
from seed_jax.interop import opt_weights
from seed_jax.interop.state_dict import key_shapes, to_torch
from seed_jax.models import layers
from seed_jax.models.layers import Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPT, OPTConfig, causal_mask
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from tests.golden_case import read

GOLDEN = Path(__file__).parent / "golden"
SMALL = OPTConfig(vocab_size=21, width=16, depth=2, heads=2, mlp_dim=24, max_positions=24)
VISUAL = VisualOPTConfig(opt=SMALL, codes=12, code_dim=4, picture_codes=5)


def abstract(module_class, config):
    return nnx.eval_shape(lambda: module_class(config, compute=Compute(), rngs=nnx.Rngs(0)))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def size(tree, itemsize: int | None = None) -> int:
    return sum(leaf.size * (itemsize or leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def test_full_size_parameters_and_bytes():
    """SEED-OPT 2.7B: the base in two bytes a weight, what trains in four, Adam's moments too."""
    opt = OPTConfig(lora=LoRAConfig())
    state = nnx.state(abstract(VisualOPT, VisualOPTConfig(opt=opt)))
    adapters, rest = nnx.split_state(state, nnx.LoRAParam, ...)
    base = {"opt": rest["opt"]}
    visual = {name: rest[name] for name in ("project", "rows", "outputs")}

    assert count(base) == 2_651_596_800  # transformers' OPT-2.7B, to the parameter
    # Rank 16 on six maps of each of 32 layers.
    assert count(adapters) == 32 * 16 * (4 * (2560 + 2560) + 2 * (2560 + 10_240)) == 23_592_960
    assert count(visual) == 33 * 2560 + 2 * 2560 + 8194 * 2560
    assert count(rest["vectors"]) == 8192 * 32
    moments = jax.eval_shape(optax.adamw(1e-4).init, (adapters, visual))
    gib = 2.0**30
    assert size(base, 2) / gib == pytest.approx(4.939, abs=0.001)
    assert size((adapters, visual)) / gib == pytest.approx(0.166, abs=0.001)
    assert size(moments) / gib == pytest.approx(0.333, abs=0.001)


def test_full_size_keys_are_transformers():
    published = json.loads(gzip.decompress((GOLDEN / "KEYS_full.json.gz").read_bytes()))
    shapes = {k: tuple(v) for k, v in published["models"]["hf_opt_2.7b"].items()}
    shapes.pop("lm_head.weight", None)  # tied
    config = OPTConfig()
    assert key_shapes(opt_weights.opt(config), nnx.state(abstract(OPT, config))) == shapes


def test_words_alone_are_plain_opts():
    plain = OPT(SMALL, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7)))
    expected = plain(ids, jnp.ones_like(ids))
    for code_input in ("codebook", "learned"):
        model = VisualOPT(dataclasses.replace(VISUAL, code_input=code_input), rngs=nnx.Rngs(1))
        model.opt = plain
        logits = model(ids, jnp.ones_like(ids))
        assert logits.shape == (2, 7, SMALL.vocab_size + VISUAL.codes + 2)
        np.testing.assert_array_equal(logits[..., : SMALL.vocab_size], expected)


def test_a_code_is_its_vector_through_a_linear_layer():
    model = VisualOPT(VISUAL, rngs=nnx.Rngs(0))
    ids = jnp.array([[3, SMALL.vocab_size + 5, VISUAL.begin, VISUAL.end]])
    word, code, begin, end = np.asarray(model.embed(ids))[0]
    np.testing.assert_array_equal(word, model.opt.words[3])
    np.testing.assert_allclose(
        code, model.vectors[5] @ model.project.kernel[...] + model.project.bias[...], atol=1e-6
    )
    np.testing.assert_array_equal(np.stack([begin, end]), model.rows[...])


def test_packed_sequences_do_not_see_each_other():
    model = OPT(SMALL, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 21, 5), rng.integers(0, 21, 8)
    packed = jnp.asarray([[*first, *second, 1, 1]])
    segments = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 2])
    together = model(packed, segments)[0]
    for row, start in ((first, 0), (second, 5)):
        alone = model(jnp.asarray(row)[None], jnp.ones((1, len(row)), int))[0]
        np.testing.assert_allclose(together[start : start + len(row)], alone, atol=1e-5)


def test_causal_mask_counts_positions():
    positions = causal_mask(jnp.array([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]])).sum(-1) - 1
    assert positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 0, 1, -1]]


def test_what_is_recomputed_changes_neither_loss_nor_gradients():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7)))
    config = dataclasses.replace(SMALL, dropout=0.1, lora=LoRAConfig(rank=2))
    found, products = {}, {}
    for remat in layers.REMAT:
        graphdef, state = nnx.split(OPT(config, compute=Compute(remat=remat), rngs=nnx.Rngs(0)))

        def loss(state, graphdef=graphdef):
            logits = nnx.merge(graphdef, state)(ids, jnp.ones_like(ids), key=jax.random.key(1))
            return losses.each_token(logits, ids).mean()

        traced = jax.jit(jax.value_and_grad(loss)).trace(state)
        found[remat] = traced.lower().compile()(state)
        products[remat] = str(traced.jaxpr).count("dot_general[")
    # Nothing is computed twice, attention scores are, all is.
    assert products["none"] < products["dots"] < products["full"]
    for other in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found["none"], found[other]
        )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    config = dataclasses.replace(SMALL, lora=LoRAConfig(rank=2))
    model = OPT(config, compute=Compute(dtype, remat="full"), rngs=nnx.Rngs(0))
    exact = OPT(config, rngs=nnx.Rngs(0))
    ids = jnp.arange(12).reshape(2, 6)
    logits = model(ids, jnp.ones_like(ids))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact(ids, jnp.ones_like(ids)), atol=0.02)


@pytest.fixture
def folder(tmp_path) -> Path:
    model = OPT(SMALL, rngs=nnx.Rngs(0))
    opt_weights.save(model, tmp_path / "opt", dtype=np.float32)
    return tmp_path / "opt"


def test_names_of_the_larger_sizes_and_an_untied_copy_of_the_head(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    renamed = {key.removeprefix("model."): value for key, value in tensors.items()}
    renamed["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    safetensors.numpy.save_file(renamed, file)
    model = opt_weights.load(folder, compute=Compute(jnp.bfloat16))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    ours = to_torch(nnx.state(model), opt_weights.opt(SMALL))
    for key, value in tensors.items():
        np.testing.assert_array_equal(ours[key], value.astype(jnp.bfloat16))


def test_mistakes_cost_one_line(folder):
    def load(message):
        with pytest.raises(UserError, match=message) as error:
            opt_weights.load(folder)
        assert "\n" not in str(error.value)

    tensors = read(folder / "model.safetensors")
    key = "model.decoder.layers.1.fc1.bias"
    broken = {k: v for k, v in tensors.items() if k != key}
    broken["model.decoder.embed_tokens.weight"] = np.zeros((3, 3), np.float32)
    safetensors.numpy.save_file(broken, folder / "model.safetensors")
    load(r"missing: model\.decoder\.layers\.1\.fc1\.bias \| of another shape: .*embed_tokens")

    (folder / "model.safetensors").unlink()
    load("opt has no weights; it should have model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    load(r"gone\.safetensors is missing, which .*index\.json names; download the rest")
    index.write_text("{}")
    load("is not an index of weights")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    load("describes a model of type gpt2, not opt")
    (folder / "config.json").write_text('{"model_type": "opt"}')
    load("is not the config of an OPT")
    (folder / "config.json").unlink()
    load(r"config\.json is missing")
