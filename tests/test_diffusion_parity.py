"""Stable Diffusion part by part, and its samplers step by step, beside diffusers' PyTorch pipeline.

pytest tests/test_diffusion_parity.py --golden DIR
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from seed_jax import diffusion, samplers, sharding
from seed_jax.diffusion import StableDiffusion
from seed_jax.interop import diffusers_folder
from seed_jax.models.layers import Compute
from tests.golden_case import read

SCHEDULES = ["ddim", "pndm", "dpm", "dpm_leading"]


class SDCase:
    """The case's data and models, loaded as users load them."""

    def __init__(self, folder):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.io = read(folder / "io.safetensors")
        self.path = str(folder / "pipeline")
        self.resolved = json.loads((folder / "scheduler_configs_resolved.json").read_text())
        self.scheduler = diffusers_folder.read_scheduler(self.path)
        unet = diffusers_folder.read_unet(self.path, compute=Compute())
        vae = diffusers_folder.read_autoencoder(self.path)
        self.graphdef, self.params = nnx.split((unet, vae))
        self.steps = self.manifest["config"]["steps"]
        self.sample = jax.jit(self._sample)

    def models(self, params):
        return nnx.merge(self.graphdef, params)

    def input(self, name):
        """Channels last, where it is a picture or latents."""
        value = self.io[f"in/{name}"]
        return jnp.asarray(value.transpose(0, 2, 3, 1) if value.ndim == 4 else value)

    def states(self):
        return jnp.stack([self.input("uncond"), self.input("cond")], 1)

    def schedule(self, name):
        """From the pipeline's own config; `dpm_leading` differs from `dpm` in its spacing."""
        config = self.scheduler
        if "_" in name:
            config = config | {"timestep_spacing": self.resolved[name]["timestep_spacing"]}
        return samplers.SAMPLERS[name.split("_")[0]](config, self.steps)

    def _sample(self, params, schedule, latents, states):
        unet, vae = self.models(params)
        scale = self.manifest["config"]["scale"]
        latents, (steps, noise) = diffusion.sample(unet, schedule, latents, states, scale)
        pictures = vae.decode(latents / vae.config.scaling_factor)
        return {
            "latents": steps,
            "guided_eps": noise,
            "vae_out": pictures,
            "image": diffusion.decode(vae, latents, 1),
        }

    def compare(self, computed, *, relative, deviations):
        """Checks every tensor that is stored under one of the names in `computed`."""
        problems, worst = [], (0.0, "")
        for name, value in computed.items():
            facts = self.manifest["outputs"][name]
            stored = self.io[f"out/{name}"]
            limit = relative * facts["max_abs"] + deviations * facts["fp64_dev"]
            value = np.asarray(value)
            value = np.moveaxis(value, -1, -3) if stored.ndim > 3 else value
            assert value.shape == stored.shape, name
            error = np.abs(value - stored).max()
            worst = max(worst, (float(error / limit), name))
            if not error <= limit:
                problems.append(f"{name} is off by {error:.2e}; {limit:.2e} is allowed")
        print(f"worst {worst[0]:.3f} of the tolerance, {worst[1]}")
        assert not problems, "\n".join(["the first is where to look:", *problems])


@pytest.fixture(scope="module")
def case(golden):
    return SDCase(golden / "sd_decode")


def padded_schedule(schedule, rows):
    """Rows that change nothing at its end, so that one compiled loop serves every sampler."""

    def pad(column, value=0):
        widths = [(0, rows - len(column)), *[(0, 0)] * (column.ndim - 1)]
        return np.pad(column, widths, constant_values=value)

    return dataclasses.replace(jax.tree.map(pad, schedule), keep_S=pad(schedule.keep_S, 1))


def test_unet(case):
    def observe(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and len(context.module.path) == 1:
            # Blocks on the way down return their skip connections too.
            part = context.module.path[0].replace("_blocks", "").replace("_block", "")
            hidden = output[0] if isinstance(output, tuple) else output
            parts[part.replace("time_embedding", "time_emb")] = hidden
        return output

    @jax.jit
    def run(params, *inputs):
        unet, _ = case.models(params)
        with linen.intercept_methods(observe):
            return unet(*inputs), dict(parts)

    parts = {}
    inputs = (case.input(f"unet_{name}") for name in ("sample", "timestep", "context"))
    noise, observed = run(case.params, *inputs)
    names = [n for n in case.manifest["outputs"] if n.startswith("unet_act/")]
    assert len(names) >= 4 + 2 * len(case.manifest["config"]["block_out"]) - 1
    computed = {name: observed[name.removeprefix("unet_act/")] for name in names}
    case.compare(computed | {"unet_out": noise}, relative=1e-5, deviations=10)


def test_autoencoder(case):
    @jax.jit
    def run(params, latents, pictures):
        _, vae = case.models(params)
        return vae.decode(latents), *vae.encode(pictures)

    outputs = run(case.params, case.input("vae_latents"), case.input("vae_image"))
    names = ("vae_decoded", "vae_encode_mean", "vae_encode_logvar")
    case.compare(dict(zip(names, outputs, strict=True)), relative=1e-5, deviations=10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling(case, name):
    schedule = case.schedule(name)
    np.testing.assert_array_equal(schedule.timesteps_S, case.io[f"out/{name}/timesteps"])
    count = len(schedule.timesteps_S)
    padded = padded_schedule(schedule, case.steps + 1)
    outputs = case.sample(case.params, padded, case.input("latents"), case.states())
    computed = {
        f"{name}/{key}": value[:count] if key in ("latents", "guided_eps") else value
        for key, value in outputs.items()
    }
    stored = {k: v for k, v in computed.items() if k in case.manifest["outputs"]}
    assert len(stored) >= 2
    case.compare(stored, relative=1e-4, deviations=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_of_the_resolved_config(case, name):
    config = case.resolved[name]
    resolved = samplers.SAMPLERS[name.split("_")[0]](config, case.steps)
    jax.tree.map(np.testing.assert_array_equal, resolved, case.schedule(name))
    expected = case.io["out/alphas_cumprod"]
    np.testing.assert_allclose(samplers.alphas_cumprod(config), expected, rtol=0, atol=1e-6)


def test_draw(case):
    """The same through the front door: to bytes, on a batch padded to fill two devices."""
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    pipeline = StableDiffusion.from_pretrained(case.path, mesh=mesh)
    pictures = pipeline.draw(
        case.io["in/cond"],
        steps=case.steps,
        guidance_scale=case.manifest["config"]["scale"],
        scheduler="pndm",
        negative=case.io["in/uncond"],
        latents_BHWC=case.input("latents"),
    )
    expected = case.io["out/pndm/image"].transpose(0, 2, 3, 1) * 255
    assert pictures.dtype == jnp.uint8
    # Half a step is rounding; the rest is the tolerance of sampling.
    assert np.abs(np.asarray(pictures, np.float32) - expected).max() <= 0.5 + 255e-4
