"""The names and shapes of the original, read and written; what is said of those that do not fit."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from seed_jax.cli import UserError
from seed_jax.interop import keys
from seed_jax.interop.state_dict import Table, key_shapes, load, to_torch
from seed_jax.interop.torch_io import read_weights
from seed_jax.models.layers import Compute
from seed_jax.models.qformer import QFormerConfig
from seed_jax.models.quantizer import CodebookConfig
from seed_jax.models.tokenizer import (
    CausalEncoder,
    EncoderConfig,
    GenerationConfig,
    SeedTokenizer,
    TokenizerConfig,
)
from seed_jax.models.vit import ViT, ViTConfig

GOLDEN = Path(__file__).parent / "golden"
TEXT_STATES = TokenizerConfig()
IMAGE_EMBEDDING = TokenizerConfig(generation=GenerationConfig(queries=1, output_dim=1024))


def with_generation(config: TokenizerConfig, **sizes) -> TokenizerConfig:
    generation = dataclasses.replace(config.generation, **sizes)
    return dataclasses.replace(config, generation=generation)


# The original's classes: ours, the table, and sizes that are the published ones.
FULL_SIZE = {
    "eva_vit_g": (ViT, keys.eva_vit, ViTConfig()),
    "stage1_qformer_casual": (
        CausalEncoder,
        keys.causal_qformer,
        EncoderConfig(qformer=QFormerConfig(vocab_size=30523), contrastive_dim=256),
    ),
    "seed1_tokenizer": (
        SeedTokenizer,
        keys.seed1_tokenizer,
        dataclasses.replace(TEXT_STATES, reconstruction=False),
    ),
    "stage2_codebook_distill_text": (SeedTokenizer, keys.seed1_training, TEXT_STATES),
    "stage2_codebook_all_image": (SeedTokenizer, keys.seed2_tokenizer, IMAGE_EMBEDDING),
    "seed2_quantizer": (
        SeedTokenizer,
        keys.seed2_tokenizer,
        with_generation(IMAGE_EMBEDDING, kind="image_down", queries=77),
    ),
    "seed2_quantizer_use_qformer_image": (
        SeedTokenizer,
        keys.seed2_tokenizer,
        with_generation(IMAGE_EMBEDDING, depth=12),
    ),
}
TOKENIZERS = [name for name, (kind, *_) in FULL_SIZE.items() if kind is SeedTokenizer]


def shrunk(config):
    """The same kind of model in odd sizes: layers that are no multiple of a group, few heads."""
    if isinstance(config, ViTConfig):
        return ViTConfig(image_size=28, patch_size=14, width=12, depth=2, heads=3, mlp_dim=20)
    if isinstance(config, EncoderConfig):
        qformer = QFormerConfig(
            queries=5,
            width=8,
            depth=3,
            heads=2,
            mlp_dim=12,
            encoder_width=12,
            max_positions=9,
            vocab_size=config.qformer.vocab_size and 11,
        )
        return EncoderConfig(shrunk(config.vit), qformer, config.contrastive_dim and 6)
    return dataclasses.replace(
        config,
        encoder=shrunk(config.encoder),
        codebook=CodebookConfig(size=7, dim=4),
        decoder_heads=2,
        decoder_depth=3,
        generation=dataclasses.replace(config.generation, queries=4, depth=3, output_dim=10),
    )


def abstract(module_class, config):
    return nnx.eval_shape(lambda: module_class(config, compute=Compute(), rngs=nnx.Rngs(0)))


def small(name: str) -> tuple[nnx.Module, Table, nnx.Module]:
    """A random small model of a class, its table, and the same model without values."""
    module_class, table, config = FULL_SIZE[name]
    config = shrunk(config)
    empty = abstract(module_class, config)
    graphdef, state = nnx.split(empty)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), state)
    return nnx.merge(graphdef, values), table(config), empty


@pytest.fixture(scope="module")
def published() -> dict:
    return json.loads(gzip.decompress((GOLDEN / "KEYS_full.json.gz").read_bytes()))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys_shapes_and_counts(published, name):
    module_class, make_table, config = FULL_SIZE[name]
    params = nnx.state(abstract(module_class, config))
    shapes = {key: tuple(shape) for key, shape in published["models"][name].items()}
    # The captioning head has a weight and a bias of its own beside the tied ones.
    head = {key: shape for key, shape in shapes.items() if key.startswith("Qformer.cls.")}
    tied = {"Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"}
    head_count = sum(math.prod(shape) for key, shape in head.items() if key not in tied)

    assert key_shapes(make_table(config), params) == {
        key: shape for key, shape in shapes.items() if key not in head
    }
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count + head_count == published["counts"][name]["params"]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_sizes_are_read_off_a_state_dict(published, name):
    module_class, make_table, config = FULL_SIZE[name]
    weights = {
        key: jax.ShapeDtypeStruct(shape, np.float32)
        for key, shape in published["models"][name].items()
    }
    read = {
        ViT: keys.vit_config,
        CausalEncoder: keys.encoder_config,
        SeedTokenizer: keys.tokenizer_config,
    }[module_class]

    assert read(weights) == config
    if module_class is SeedTokenizer:
        assert keys.tokenizer_table(weights, config).name == make_table(config).name


def test_a_size_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"x\.pth lacks pos_embed, which tells a size"):
        keys.vit_config({}, source="x.pth")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_ours_to_torch_and_back_is_bitwise(name):
    model, table, empty = small(name)

    tensors = to_torch(nnx.state(model), table)
    again = load(tensors, table, empty)

    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(again))
    back = to_torch(nnx.state(again), table)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("case", ["stage2_training", "eva_vit"])
def test_torch_to_ours_and_back_is_bitwise(case):
    if case == "eva_vit":
        folder, prefix = GOLDEN / case, "visual_encoder."
    else:
        folder, prefix = GOLDEN / "seed2_tokenizer" / case, ""
    data = gzip.decompress((folder / "weights.safetensors.gz").read_bytes())
    weights = safetensors.numpy.load(data)
    if case == "eva_vit":
        weights = {key: value for key, value in weights.items() if key.startswith(prefix)}
        config = keys.vit_config(weights, prefix=prefix, heads=4)
        table, empty = keys.eva_vit(config, prefix=prefix), abstract(ViT, config)
    else:
        text = ("_text", "blocks_text.", "Reverse_Qformer_text.", "distill_text_proj.")
        weights = {key: value for key, value in weights.items() if not any(t in key for t in text)}
        config = keys.tokenizer_config(weights, vit_heads=4, qformer_heads=4, decoder_heads=4)
        table, empty = keys.seed2_tokenizer(config), abstract(SeedTokenizer, config)

    back = to_torch(nnx.state(load(weights, table, empty)), table)

    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape), key
        assert back[key].tobytes() == tensor.tobytes(), key


def test_everything_that_does_not_fit_is_reported_at_once():
    model, table, empty = small("seed1_tokenizer")
    tensors = to_torch(nnx.state(model), table)
    for i in range(3):
        del tensors[f"blocks_text.{i}.norm1.weight"]
    del tensors["query_tokens"], tensors["Qformer.bert.embeddings.position_ids"]
    tensors["optimizer.step"] = np.zeros(())
    tensors["blocks_text.7.norm1.weight"] = np.zeros(8)
    for i in (0, 2):
        tensors[f"Qformer.bert.encoder.layer.{i}.crossattention.self.key.weight"] = np.zeros((8, 9))
    tensors["distill_text_proj.bias"] = np.zeros(())

    with pytest.raises(UserError) as error:
        load(tensors, table, empty, source="a.pth")

    # position_ids is a constant: it may be absent.
    assert str(error.value) == (
        "a.pth does not fit seed1_tokenizer: missing: query_tokens, blocks_text.{0..2}.norm1.weight"
        " | unexpected: optimizer.step, blocks_text.7.norm1.weight | of another shape: "
        "Qformer.bert.encoder.layer.{0,2}.crossattention.self.key.weight 8×9, not 8×12; "
        "distill_text_proj.bias scalar, not 10"
    )


def test_the_captioning_head_is_ignored_by_name():
    model, table, empty = small("stage1_qformer_casual")
    tensors = to_torch(nnx.state(model), table)
    tensors["Qformer.cls.predictions.bias"] = np.zeros(11)

    load(tensors, table, empty)

    tensors["cls.predictions.bias"] = np.zeros(11)
    with pytest.raises(UserError, match=r"unexpected: cls\.predictions\.bias$"):
        load(tensors, table, empty)


def test_a_table_that_leaves_out_a_parameter_is_refused():
    model, table, empty = small("eva_vit_g")
    short = dataclasses.replace(table, rows=table.rows[1:])
    with pytest.raises(ValueError, match="class_token"):
        load(to_torch(nnx.state(model), table), short, empty)


def test_positions_are_resized_only_when_asked_for():
    model, table, _ = small("eva_vit_g")
    tensors = to_torch(nnx.state(model), table)
    larger = abstract(ViT, dataclasses.replace(shrunk(ViTConfig()), image_size=42))

    with pytest.raises(UserError, match="pos_embed 1×5×12, not 1×10×12"):
        load(tensors, table, larger)
    resized = load(tensors, table, larger, resize_positions=True)

    assert resized.positions.shape == (10, 12)
    np.testing.assert_array_equal(resized.positions[0], model.positions[0])

    tensors["pos_embed"] = np.zeros((1, 6, 12), np.float32)
    with pytest.raises(UserError, match="pos_embed 1×6×12, not 1×10×12"):  # no square grid
        load(tensors, table, larger, resize_positions=True)


class Counted:
    """A tensor on disk that counts how often it is read."""

    def __init__(self, value: np.ndarray):
        self.value, self.shape, self.reads = value, value.shape, 0

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return self.value


def test_each_tensor_is_read_once_and_none_before_all_fit():
    model, table, empty = small("seed2_quantizer")
    tensors = {k: Counted(v) for k, v in to_torch(nnx.state(model), table).items()}

    with pytest.raises(UserError):
        load(tensors | {"stranger": Counted(np.zeros(1))}, table, empty)
    assert not any(tensor.reads for tensor in tensors.values())

    load(tensors, table, empty)
    assert {tensors[key].reads for row in table.rows for key in row.torch_keys()} == {1}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_safetensors_of_half_precision_load_into_float32(tmp_path, dtype):
    model, table, empty = small("eva_vit_g")
    tensors = {k: v.astype(dtype) for k, v in to_torch(nnx.state(model), table).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "vit.safetensors")

    weights = read_weights(tmp_path / "vit.safetensors")

    assert {np.asarray(tensor).dtype for tensor in weights.values()} == {np.dtype(dtype)}
    back = to_torch(nnx.state(load(weights, table, empty)), table)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor.astype(np.float32), key)
