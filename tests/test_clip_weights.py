"""CLIP's weights in transformers' folders: both layouts read alike, PyTorch runs what we write."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, serialization, traverse_util

from seed_jax import model_dir
from seed_jax.cli import UserError
from seed_jax.interop import clip_weights
from seed_jax.models import teacher
from seed_jax.models.layers import Compute
from seed_jax.models.teacher import TextTeacher

WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The packaged directory, to change."""
    return shutil.copytree(teacher.PACKAGED, tmp_path / "there")


def load(folder: Path) -> TextTeacher:
    config = teacher.load_config(str(folder))
    encoder = nnx.eval_shape(lambda: TextTeacher(config, compute=Compute(), rngs=nnx.Rngs(0)))
    clip_weights.load_text_encoder(encoder, str(folder))
    return encoder


def params(encoder: TextTeacher) -> dict[str, jax.Array]:
    return model_dir.flat_params(nnx.state(encoder))


def test_pytorch_runs_the_text_encoder_that_we_write(folder, tmp_path):
    import torch
    from transformers import CLIPTextModel

    encoder = load(folder)
    clip_weights.save(encoder, tmp_path / "written")
    written, packaged = (
        safetensors.numpy.load_file(file)
        for file in (tmp_path / "written" / "model.safetensors", folder / WEIGHTS)
    )
    assert written.keys() == packaged.keys()
    for key, value in packaged.items():
        assert written[key].dtype == np.float16
        np.testing.assert_array_equal(written[key], value)

    theirs, report = CLIPTextModel.from_pretrained(
        tmp_path / "written", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    ids = np.random.default_rng(0).integers(0, 1498, (2, 77)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).last_hidden_state.numpy()
    graphdef, state = nnx.split(encoder)
    ours = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_flax_layouts_are_read(folder):
    expected = params(load(folder))
    flat = {path.partition("/")[2]: np.asarray(value) for path, value in expected.items()}
    dotted = {path.replace("/", "."): value for path, value in flat.items()}
    safetensors.numpy.save_file(dotted, folder / WEIGHTS, metadata={"format": "flax"})
    jax.tree.map(np.testing.assert_array_equal, params(load(folder)), expected)

    (folder / WEIGHTS).unlink()
    tree = traverse_util.unflatten_dict(flat, sep="/")
    file = folder / "text_encoder" / "flax_model.msgpack"
    file.write_bytes(serialization.msgpack_serialize(tree))
    jax.tree.map(np.testing.assert_array_equal, params(load(folder)), expected)


def test_weights_keep_the_type_and_place_that_they_replace(folder):
    graphdef, state = nnx.split(load(folder))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    zeros = jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, jnp.bfloat16), device), state)
    encoder = nnx.merge(graphdef, zeros)
    clip_weights.load_text_encoder(encoder, str(folder))
    for name, value in params(encoder).items():
        assert (value.dtype, value.sharding) == (jnp.bfloat16, device)
        assert jnp.abs(value).max() > 0, name


@pytest.mark.parametrize("part", ["model.safetensors", "config.json"])
def test_what_is_not_there_is_named(folder, part):
    (folder / "text_encoder" / part).unlink()
    with pytest.raises(UserError, match=f"{folder}/text_encoder") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_all_keys_that_do_not_fit_are_named(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]  # of older files
    tensors["text_model.final_layer_norm.bias"] = np.zeros(3, np.float16)
    for i in range(2):
        del tensors[f"text_model.encoder.layers.{i}.mlp.fc1.bias"]
    tensors["vision_model.weight"] = np.zeros(3, np.float16)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder / WEIGHTS} does not fit a CLIP of these sizes: "
        "missing: text_model.encoder.layers.{0..1}.mlp.fc1.bias | "
        "unexpected: vision_model.weight | "
        "of another shape: text_model.final_layer_norm.bias 3, not 128"
    )


def test_the_sizes_in_the_config_must_be_those_of_the_weights(folder):
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"missing: text_model\.encoder\.layers\.2\."):
        load(folder)
