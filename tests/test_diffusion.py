"""Drawing with a tiny random Stable Diffusion: what a picture depends on, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util

from seed_jax import model_dir, sharding
from seed_jax.cli import UserError
from seed_jax.diffusion import StableDiffusion
from seed_jax.interop import diffusers_weights
from seed_jax.models.layers import Compute
from tests.test_diffusion_weights import random_model
from tests.tiny import text_tokenizer
from tests.tiny_diffusion import STATES, WIDTH, save_stable_diffusion

QUICK = {"steps": 2, "scheduler": "ddim"}

# What one test compiles serves the others.
pytestmark = pytest.mark.xdist_group("diffusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("pipeline"))


def two_devices():
    return sharding.make_mesh({"data": 2}, jax.devices()[:2])


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusion.from_pretrained(str(folder), mesh=two_devices())


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(0).normal(size=(4, STATES, WIDTH)).astype(np.float32)


def test_a_picture_depends_on_its_seed_and_number_alone(pipeline, embeddings):
    pictures = np.asarray(pipeline.draw(embeddings, seed=3, slice_size=1, **QUICK))
    assert pictures.dtype == np.uint8
    assert pictures.shape == (4, *pipeline.size, 3)
    assert pictures.std() > 1

    alone = pipeline.draw(embeddings[2:3], seed=3, first=2, **QUICK)
    # Sums in another order may round to the next byte.
    np.testing.assert_allclose(alone[0].astype(int), pictures[2].astype(int), atol=1)
    other = pipeline.draw(embeddings, seed=4, slice_size=1, **QUICK)
    assert np.mean(np.asarray(other) != pictures) > 0.5


def test_unconditional_embeddings(pipeline, embeddings):
    empty = pipeline.text_states([""])[0]
    drawn = {
        name: np.asarray(pipeline.draw(embeddings[:2], negative=negative, **QUICK))
        for name, negative in {
            "default": None,
            "empty": empty,
            "each": jnp.stack([empty, empty]),
            "zeros": "zeros",
            "zero": np.zeros((STATES, WIDTH)),
        }.items()
    }
    np.testing.assert_array_equal(drawn["default"], drawn["empty"])
    np.testing.assert_array_equal(drawn["default"], drawn["each"])
    np.testing.assert_array_equal(drawn["zeros"], drawn["zero"])
    assert np.any(drawn["default"] != drawn["zeros"])
    # One program for them all, for other strengths of guidance and other seeds.
    before = pipeline._draw._cache_size()
    stronger = pipeline.draw(embeddings[:2], guidance_scale=9.0, seed=0, **QUICK)
    assert pipeline._draw._cache_size() == before
    assert np.any(np.asarray(stronger) != drawn["default"])


def test_without_guidance_nothing_is_mixed_in(pipeline, embeddings):
    plain = pipeline.draw(embeddings[:2], guidance_scale=1.0, **QUICK)
    # To mix in a prediction with itself changes nothing, whatever the strength.
    itself = pipeline.draw(embeddings[:2], guidance_scale=7.5, negative=embeddings[:2], **QUICK)
    np.testing.assert_allclose(plain.astype(int), itself.astype(int), atol=1)


def test_other_sizes(pipeline, embeddings):
    pictures = pipeline.draw(embeddings[:2], size=(10, 6), **QUICK)
    assert pictures.shape == (2, 10, 6, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(folder, pipeline, embeddings, dtype):
    half = StableDiffusion.from_pretrained(str(folder), compute=Compute(dtype), mesh=two_devices())
    # Without guidance, which multiplies the rounding of a difference by its strength.
    plain = {"guidance_scale": 1.0, **QUICK}
    drawn, exact = (np.asarray(p.draw(embeddings[:2], **plain), int) for p in (half, pipeline))
    assert np.abs(drawn - exact).mean() < 255 * float(jnp.finfo(dtype).eps)


def test_text_states_are_those_of_pytorch(folder, pipeline):
    import torch
    from transformers import CLIPTextModel

    prompts = ["a red cat", "", "one blue house, a dog and more and more and more"]
    ids = np.asarray(
        text_tokenizer()(
            prompts, padding="max_length", truncation=True, max_length=STATES
        ).input_ids
    )
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        expected = encoder(torch.from_numpy(ids)).last_hidden_state.numpy()
    ours = pipeline.text_states(prompts)
    assert ours.shape == (3, STATES, WIDTH)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_directory_of_flax_weights(folder, pipeline, tmp_path, embeddings):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for part in ("unet", "vae"):
        (tmp_path / part / diffusers_weights.TORCH_FILE).unlink()
        flat = model_dir.flat_params(nnx.state(random_model(part)))
        tree = traverse_util.unflatten_dict(jax.tree.map(np.asarray, flat), sep="/")["params"]
        file = tmp_path / part / "diffusion_flax_model.msgpack"
        file.write_bytes(serialization.msgpack_serialize(tree))
    flax = StableDiffusion.from_pretrained(str(tmp_path), mesh=two_devices())
    jax.tree.map(np.testing.assert_array_equal, flax._state, pipeline._state)


def change(file, **facts):
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"use_linear_projection": True}, "is a U-Net of Stable Diffusion 2.x, which draws from"),
        ({"attention_head_dim": [5, 10, 20, 20]}, "is a U-Net of Stable Diffusion 2.x"),
        ({"addition_embed_type": "text_time"}, "is a U-Net of SDXL, which draws from"),
        ({"in_channels": 9}, "takes 9 channels and gives 4, as for inpainting"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256; Stable Diffusion 1.x has None"),
        ({"layers_per_block": 2}, "does not fit a U-Net of these sizes: missing:"),
    ],
)
def test_other_unets_are_refused_with_the_reason(folder, tmp_path, facts, reason):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "unet" / "config.json", **facts)
    with pytest.raises(UserError, match=f"^{tmp_path}/unet.*{reason}") as error:
        StableDiffusion.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_parts_that_are_missing_are_named(folder, tmp_path, embeddings):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            StableDiffusion.from_pretrained(str(tmp_path), mesh=two_devices())
        assert "\n" not in str(error.value)

    weights = tmp_path / "unet" / diffusers_weights.TORCH_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused("is damaged or cut short")
    weights.rename(weights.with_suffix(".bin"))
    refused(r"a \.bin file is a pickle, which could run code")
    weights.write_bytes(whole)
    change(tmp_path / "vae" / "config.json", latent_channels=8)
    refused("does not fit an autoencoder of these sizes")
    (tmp_path / "vae" / "config.json").unlink()
    refused(r"has no vae/config\.json")
    shutil.rmtree(tmp_path / "unet")
    refused("has no unet/; name a directory in diffusers layout")
    with pytest.raises(UserError, match="no such directory"):
        StableDiffusion.from_pretrained(str(tmp_path / "nowhere"))


def test_a_directory_without_text_encoder_draws_from_embeddings(
    folder, pipeline, tmp_path, embeddings
):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "text_encoder")
    mute = StableDiffusion.from_pretrained(str(tmp_path), mesh=two_devices())
    with pytest.raises(UserError, match=r"has no text_encoder/ and tokenizer/"):
        mute.draw(embeddings, **QUICK)
    drawn, expected = (p.draw(embeddings[:2], negative="zeros", **QUICK) for p in (mute, pipeline))
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"scheduler": "euler"}, "no sampler 'euler'; there are ddim, pndm, dpm"),
        ({"steps": 0}, "0 steps: give a number from 1 to 999"),
        ({"size": (9, 8)}, "multiples of 2"),
        ({"negative": "none"}, "negative is 'none'"),
        ({"negative": np.zeros((3, WIDTH))}, r"unconditional embeddings \[3, 12\] beside"),
    ],
)
def test_wrong_arguments_are_named(pipeline, embeddings, arguments, reason):
    with pytest.raises(UserError, match=reason):
        pipeline.draw(embeddings, **(QUICK | arguments))


def test_embeddings_of_another_width_are_refused(pipeline):
    with pytest.raises(UserError, match=r"shape \[1, 7, 8\]: .* draws from \[pictures, 77, 12\]"):
        pipeline.draw(np.zeros((1, STATES, 8)), **QUICK)
