"""U-Nets and autoencoders in diffusers' folders: what we write, PyTorch's diffusers runs alike."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, serialization, traverse_util

from seed_jax import model_dir
from seed_jax.cli import UserError
from seed_jax.interop import diffusers_folder, diffusers_weights, state_dict
from seed_jax.models.layers import Compute
from seed_jax.models.stable_diffusion import Autoencoder, AutoencoderConfig, UNet, UNetConfig
from tests.random_weights import random_weights

UNET = UNetConfig(
    sample_size=6,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=12,
    norm_num_groups=4,
)
VAE = AutoencoderConfig(
    sample_size=12, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
)
MODELS = {"unet": (UNet, UNET), "vae": (Autoencoder, VAE)}


def random_model(part, **sizes):
    build, config = MODELS[part]
    config = dataclasses.replace(config, **sizes)
    return random_weights(lambda: build(config, compute=Compute(), rngs=nnx.Rngs(0)))


def load(part, file, compute=Compute()):  # a frozen dataclass
    build, config = MODELS[part]
    return diffusers_weights.load(build, config, file, compute=compute)


def assert_same(module, other):
    ours, theirs = (model_dir.flat_params(nnx.state(m)) for m in (module, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def run(method, *arrays):
    graphdef, state = nnx.split(method.__self__)
    name = method.__name__
    return jax.jit(lambda state, *a: getattr(nnx.merge(graphdef, state), name)(*a))(state, *arrays)


def assert_close(ours_BHWC, theirs_BCHW):
    theirs = theirs_BCHW.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours_BHWC, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_pytorch_runs_the_unet_that_we_write(tmp_path):
    import torch
    from diffusers import UNet2DConditionModel

    ours = random_model("unet")
    diffusers_weights.save(ours, tmp_path, dtype=np.float32)
    theirs, report = UNet2DConditionModel.from_pretrained(
        tmp_path, output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(report.values()), report

    # 7 x 5: odd sizes take another way through the upsampling.
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 7, 5, 4)).astype(np.float32)
    states = rng.normal(size=(2, 3, 12)).astype(np.float32)
    timesteps = np.array([981, 7], np.int32)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(latents.transpose(0, 3, 1, 2)),
            torch.from_numpy(timesteps),
            torch.from_numpy(states),
        ).sample
    assert_close(run(ours.__call__, latents, timesteps, states), expected)
    assert_same(load("unet", tmp_path / diffusers_weights.TORCH_FILE), ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_no_more_than_pytorchs(tmp_path, dtype):
    import torch
    from diffusers import UNet2DConditionModel

    ours = random_model("unet")
    diffusers_weights.save(ours, tmp_path, dtype=np.float32)
    half = load("unet", tmp_path / diffusers_weights.TORCH_FILE, Compute(getattr(jnp, dtype)))
    type_ = getattr(torch, dtype)
    theirs = UNet2DConditionModel.from_pretrained(
        tmp_path, torch_dtype=type_, low_cpu_mem_usage=False
    )
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 6, 6, 4)).astype(np.float32)
    states = rng.normal(size=(2, 7, 12)).astype(np.float32)
    timesteps = np.array([981, 7], np.int32)
    with torch.no_grad():
        output = theirs(
            torch.from_numpy(latents.transpose(0, 3, 1, 2)).to(type_),
            torch.from_numpy(timesteps),
            torch.from_numpy(states).to(type_),
        ).sample
    exact = run(ours.__call__, latents, timesteps, states)
    error = jnp.abs(run(half.__call__, latents, timesteps, states) - exact).mean()
    reference = np.abs(output.float().numpy().transpose(0, 2, 3, 1) - exact).mean()
    # Roundings differ in place and luck; a sum kept in too few bits would show as many times more.
    assert 0 < error < 2 * reference


def test_pytorch_runs_the_autoencoder_that_we_write(tmp_path):
    import torch
    from diffusers import AutoencoderKL

    ours = random_model("vae")
    diffusers_weights.save(ours, tmp_path, dtype=np.float32)
    theirs, report = AutoencoderKL.from_pretrained(
        tmp_path, output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(report.values()), report

    rng = np.random.default_rng(1)
    pictures = rng.normal(size=(2, 12, 8, 3)).astype(np.float32)
    # As wide as it has channels: diffusers would take these for channels first.
    latents = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
    with torch.no_grad():
        encoded = theirs.encode(torch.from_numpy(pictures.transpose(0, 3, 1, 2))).latent_dist
        decoded = theirs.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2))).sample
    mean, logvar = run(ours.encode, pictures)
    assert_close(mean, encoded.mean)
    assert_close(logvar, encoded.logvar)
    assert_close(run(ours.decode, latents), decoded)
    assert_same(load("vae", tmp_path / diffusers_weights.TORCH_FILE), ours)


def test_old_names_of_the_autoencoder_are_read(tmp_path, golden):
    names = json.loads((golden / "sd_decode" / "vae_legacy_attention_names.json").read_text())[
        "map"
    ]
    ours = random_model("vae")
    tensors = diffusers_weights.to_torch(ours)
    old = {key: tensors.pop(name) for key, name in names.items()}
    assert len(old) == 16
    safetensors.numpy.save_file(tensors | old, tmp_path / "old.safetensors")
    assert_same(load("vae", tmp_path / "old.safetensors"), ours)


@pytest.mark.parametrize("part", MODELS)
def test_flax_weights_are_read(tmp_path, part):
    ours, file = random_model(part), tmp_path / "diffusion_flax_model.msgpack"
    flat = model_dir.flat_params(nnx.state(ours))
    tree = traverse_util.unflatten_dict(flat, sep="/")["params"]
    file.write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, tree)))
    assert_same(load(part, file), ours)

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"msgpack is damaged or cut short"):
        load(part, file)


def test_a_model_in_pieces_is_read(tmp_path):
    ours, unet = random_model("unet"), tmp_path / "unet"
    diffusers_weights.save(ours, unet)
    (unet / diffusers_weights.TORCH_FILE).unlink()
    tensors = diffusers_weights.to_torch(ours)
    places = {key: f"piece-{number % 2}.safetensors" for number, key in enumerate(tensors)}
    for file in set(places.values()):
        piece = {key: tensors[key] for key in tensors if places[key] == file}
        safetensors.numpy.save_file(piece, unet / file)
    index = unet / f"{diffusers_weights.TORCH_FILE}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(diffusers_folder.read_unet(str(tmp_path), compute=Compute()), ours)

    (unet / "piece-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"piece-1\.safetensors is missing, which"):
        diffusers_folder.read_unet(str(tmp_path), compute=Compute())
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is not an index of weights"):
        diffusers_folder.read_unet(str(tmp_path), compute=Compute())


def test_weights_come_in_the_compute_type(tmp_path):
    diffusers_weights.save(random_model("unet"), tmp_path)
    file = tmp_path / diffusers_weights.TORCH_FILE
    assert {a.dtype for a in safetensors.numpy.load_file(file).values()} == {np.dtype(np.float16)}
    half = load("unet", file, Compute(jnp.bfloat16))
    assert {a.dtype for a in model_dir.flat_params(nnx.state(half)).values()} == {
        np.dtype(jnp.bfloat16)
    }


def test_all_weights_that_do_not_fit_are_named(tmp_path):
    tensors = diffusers_weights.to_torch(random_model("unet"))
    tensors["extra.weight"] = tensors.pop("conv_in.bias")
    tensors["conv_out.bias"] = np.zeros(3, np.float32)
    file = tmp_path / "unet.safetensors"
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match=r"does not fit a U-Net of these sizes: missing: ") as error:
        load("unet", file)
    for part in ("conv_in.bias", "unexpected: extra.weight", "conv_out.bias 3, not 4"):
        assert part in str(error.value)


def test_the_published_sizes_have_pytorchs_names():
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        levels = AutoencoderConfig().block_out_channels
        theirs = {
            UNet: UNet2DConditionModel(cross_attention_dim=768),
            Autoencoder: AutoencoderKL(
                block_out_channels=levels,
                layers_per_block=2,
                down_block_types=["DownEncoderBlock2D"] * len(levels),
                up_block_types=["UpDecoderBlock2D"] * len(levels),
            ),
        }
    for build, config in {UNet: UNetConfig(), Autoencoder: AutoencoderConfig()}.items():
        ours = nnx.eval_shape(lambda b=build, c=config: b(c, compute=Compute(), rngs=nnx.Rngs(0)))
        table = diffusers_weights.table(ours)
        assert state_dict.key_shapes(table, nnx.state(ours)) == {
            key: tuple(value.shape) for key, value in theirs[build].state_dict().items()
        }
