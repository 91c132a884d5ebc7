"""DDIM, PNDM and DPM-Solver++ as tables of coefficients, and the one step that they all are.

With the noise eps that a U-Net predicts in latents x, every step of the three is

    prediction = from_latents * x + from_noise * eps
    next x     = keep * x + keep_previous * previous x + sum of weights * last predictions

so that a sampler is a `Schedule` of numbers, made in float64 from diffusers'
`scheduler_config.json`, and sampling one scan over its rows. The numbers are those of diffusers'
PyTorch schedulers; its Flax ones differ (their DPM-Solver knows one spacing of timesteps alone).

Shapes in names: S steps, K predictions kept.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seed_jax.cli import UserError
from seed_jax.models.layers import Array

# PNDM looks four predictions back, skipping one of its first two.
KEPT = 5
# What diffusers' schedulers assume where `scheduler_config.json` is silent.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    # Schedulers say 0, but the pipeline sets it to 1 whatever they say.
    "steps_offset": 1,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A sampler with a number of steps; the module's docstring has the formulas.

    Attributes:
      timesteps_S: int32, what the U-Net is told.
      from_latents_S, from_noise_S, keep_S, keep_previous_S: float32.
      weights_SK: float32, of the last predictions, the newest first.
    """

    timesteps_S: Any
    from_latents_S: Any
    from_noise_S: Any
    keep_S: Any
    keep_previous_S: Any
    weights_SK: Any


def sample(
    schedule: Schedule, latents: Array, predict_noise: Callable[[Array, Array], Array]
) -> tuple[Array, tuple[Array, Array]]:
    """Takes noise to latents of pictures.

    Args:
      latents: float32 [B, H, W, C], unit normal.
      predict_noise: (latents, timestep int32) -> noise, float32 [B, H, W, C].

    Returns:
      The latents, and what each step made: latents and predicted noise, [S, B, H, W, C] each.
    """

    def step(state: tuple, row: Schedule) -> tuple[tuple, tuple[Array, Array]]:
        x, previous_x, predictions_K = state
        noise = predict_noise(x, row.timesteps_S)
        prediction = row.from_latents_S * x + row.from_noise_S * noise
        predictions_K = jnp.concatenate([prediction[None], predictions_K[:-1]])
        weights_K = row.weights_SK.reshape(-1, *[1] * x.ndim)
        # A sum of products: a matmul would round to fewer bits on an accelerator.
        next_x = row.keep_S * x + row.keep_previous_S * previous_x
        next_x += jnp.sum(weights_K * predictions_K, 0)
        return (next_x, x, predictions_K), (next_x, noise)

    start = (latents, latents, jnp.zeros((KEPT, *latents.shape)))
    (latents, _, _), steps = jax.lax.scan(step, start, schedule)
    return latents, steps


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """The share of signal variance left at each timestep, float64 [T].

    Raises:
      UserError: the config asks for what is not built; so in the functions below.
    """
    c = DEFAULTS | dict(config)
    for key, wanted in {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}.items():
        if c[key] != wanted:
            raise UserError(f"the scheduler's {key} is {c[key]!r}; only {wanted!r} is built")
    count = c["num_train_timesteps"]
    if c["trained_betas"] is not None:
        betas = np.asarray(c["trained_betas"], np.float64)
    elif c["beta_schedule"] == "scaled_linear":
        betas = np.linspace(c["beta_start"] ** 0.5, c["beta_end"] ** 0.5, count) ** 2
    elif c["beta_schedule"] == "linear":
        betas = np.linspace(c["beta_start"], c["beta_end"], count)
    else:
        raise UserError(
            f"the scheduler's beta_schedule is {c['beta_schedule']!r}; 'scaled_linear', 'linear' "
            "and trained_betas are built"
        )
    return np.cumprod(1 - betas)


def ddim(config: Mapping[str, Any], steps: int) -> Schedule:
    """Denoising diffusion implicit models, eta 0, without clipping."""
    signal = alphas_cumprod(config)
    timesteps = _timesteps(config, steps, len(signal))
    before = timesteps - len(signal) // steps
    keep, weight = _transfer(signal, timesteps, before, _final(config, signal, to_one=True))
    return _schedule(timesteps, keep, [weight])


def pndm(config: Mapping[str, Any], steps: int) -> Schedule:
    """Pseudo numerical methods, without Runge-Kutta steps, as Stable Diffusion is published with.

    One call more than `steps`: the second timestep comes twice, the first step being taken again.
    """
    signal = alphas_cumprod(config)
    timesteps = _timesteps(config, steps, len(signal))
    stride = len(signal) // steps
    timesteps = np.concatenate([timesteps[:2], timesteps[1:2], timesteps[2:]])
    start, end = timesteps.copy(), timesteps - stride
    start[1:2] += stride
    end[1:2] += stride
    keep, weight = _transfer(signal, start, end, _final(config, signal, to_one=False))
    # The prediction of the second call, averaged with the first, counts nowhere after.
    multistep = np.array(
        [
            [1, 0, 0, 0, 0],
            [1 / 2, 1 / 2, 0, 0, 0],
            [3 / 2, 0, -1 / 2, 0, 0],
            [23 / 12, -16 / 12, 0, 5 / 12, 0],
            [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
            [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
        ]
    )
    rows = multistep[np.minimum(np.arange(len(timesteps)), 5)]
    keep_previous = np.zeros(len(timesteps))
    keep_previous[1:2], keep[1:2] = keep[1:2], 0
    return _schedule(timesteps, keep, (weight[:, None] * rows).T, keep_previous=keep_previous)


def dpm(config: Mapping[str, Any], steps: int) -> Schedule:
    """DPM-Solver++ of second order (multistep, midpoint), which predicts pictures; ends at noise 0.

    Its last step is of first order, as its first must be.
    """
    signal = alphas_cumprod(config)
    timesteps = _solver_timesteps(config, steps, len(signal))
    # Noise over signal, by which h = log(ratio / next ratio) is a step in half the log SNR.
    all_ratios = np.sqrt((1 - signal) / signal)
    ratios = np.append(all_ratios[timesteps], 0.0)
    alphas = 1 / np.sqrt(1 + ratios**2)
    sigmas = ratios * alphas
    gain = alphas[1:] * (1 - ratios[1:] / ratios[:-1])
    slope = np.zeros(steps)
    if steps > 2:
        h = np.log(ratios[:-2] / ratios[1:-1])
        slope[1:-1] = 0.5 * h[1:] / h[:-1]
    return _schedule(
        timesteps,
        sigmas[1:] / sigmas[:-1],
        [gain * (1 + slope), -gain * slope],
        from_latents=1 / alphas[:-1],
        from_noise=-ratios[:-1],
    )


SAMPLERS = {"ddim": ddim, "pndm": pndm, "dpm": dpm}


def _schedule(
    timesteps: np.ndarray,
    keep: np.ndarray,
    weights: Any,
    *,
    keep_previous: np.ndarray | float = 0.0,
    from_latents: np.ndarray | float = 0.0,
    from_noise: np.ndarray | float = 1.0,
) -> Schedule:
    weights_SK = np.zeros((len(timesteps), KEPT), np.float32)
    weights_SK[:, : len(weights)] = np.stack(list(weights), 1)

    def column(values: np.ndarray | float) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, np.float32), timesteps.shape)

    return Schedule(
        timesteps_S=timesteps.astype(np.int32),
        from_latents_S=column(from_latents),
        from_noise_S=column(from_noise),
        keep_S=column(keep),
        keep_previous_S=column(keep_previous),
        weights_SK=weights_SK,
    )


def _transfer(
    signal: np.ndarray, start: np.ndarray, end: np.ndarray, final: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of latents and noise that take latents from one timestep to an earlier one."""
    a, b = signal[start], np.where(end >= 0, signal[np.maximum(end, 0)], final)
    keep = np.sqrt(b / a)
    return keep, np.sqrt(1 - b) - keep * np.sqrt(1 - a)


def _final(config: Mapping[str, Any], signal: np.ndarray, *, to_one: bool) -> float:
    """The share of signal that the last step goes to."""
    return 1.0 if config.get("set_alpha_to_one", to_one) else signal[0]


def _timesteps(config: Mapping[str, Any], steps: int, count: int) -> np.ndarray:
    """Timesteps of DDIM and PNDM, int64 [S], falling."""
    offset = _offset(config, steps, count)
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (count // steps) + offset
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    return _trailing(spacing, steps, count)


def _solver_timesteps(config: Mapping[str, Any], steps: int, count: int) -> np.ndarray:
    """Timesteps of DPM-Solver, int64 [S], falling: those of one step more, without the last."""
    offset = _offset(config, steps, count)
    spacing = config.get("timestep_spacing", "linspace")
    if spacing == "leading":
        return np.arange(1, steps + 1)[::-1] * (count // (steps + 1)) + offset
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64)
    return _trailing(spacing, steps, count)


def _offset(config: Mapping[str, Any], steps: int, count: int) -> int:
    if not 0 < steps < count:
        raise UserError(f"{steps} steps: give a number from 1 to {count - 1}")
    return config.get("steps_offset", DEFAULTS["steps_offset"])


def _trailing(spacing: str, steps: int, count: int) -> np.ndarray:
    if spacing != "trailing":
        raise UserError(
            f"the scheduler's timestep_spacing is {spacing!r}; it can be 'leading', 'linspace' or "
            "'trailing'"
        )
    return np.arange(count, 0, -count / steps).round().astype(np.int64) - 1
