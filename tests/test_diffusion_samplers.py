"""Samplers beside diffusers' PyTorch schedulers, with settings that the golden case leaves out."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seed_jax import samplers
from seed_jax.cli import UserError
from seed_jax.samplers import SAMPLERS

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "clip_sample": False,
}
SETTINGS = [
    {},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"set_alpha_to_one": True, "steps_offset": 0},
    {"beta_schedule": "linear", "num_train_timesteps": 600},
    {"trained_betas": [0.01 + 0.0001 * i for i in range(100)], "num_train_timesteps": 100},
]


def noise_in(x, timestep):
    """Stands in for a U-Net: no linear function of the latents or the time."""
    return (0.5 * x + 0.3) * (1 + timestep / 1000)


@jax.jit
def sample(schedule, latents):
    _, (steps, _) = samplers.sample(schedule, latents, noise_in)
    return steps


def reference(name, config, steps, latents):
    import torch
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

    kinds = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "dpm": DPMSolverMultistepScheduler}
    scheduler = kinds[name].from_config(config)
    with warnings.catch_warnings():
        # NumPy deprecates how PyTorch 2's tensors become arrays here.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler.set_timesteps(steps)
    x, rows = torch.from_numpy(latents), []
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise_in(x, timestep), timestep, x).prev_sample
        rows.append(x.numpy())
    return scheduler.timesteps.numpy(), np.stack(rows)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_pytorchs(name, steps):
    latents = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    for setting in SETTINGS:
        config = CONFIG | setting
        timesteps, expected = reference(name, config, steps, latents)
        schedule = SAMPLERS[name](config, steps)
        np.testing.assert_array_equal(schedule.timesteps_S, timesteps, err_msg=str(setting))
        ours = sample(schedule, jnp.asarray(latents))
        limit = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=limit, err_msg=str(setting))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"timestep_spacing": "odd"}, "timestep_spacing is 'odd'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
    ],
)
def test_what_is_not_built_is_named(change, message):
    for make in SAMPLERS.values():
        with pytest.raises(UserError, match=message):
            make(CONFIG | change, 5)


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_numbers_of_steps(steps):
    for make in SAMPLERS.values():
        with pytest.raises(UserError, match=f"{steps} steps: give a number from 1 to 999"):
            make(CONFIG, steps)
