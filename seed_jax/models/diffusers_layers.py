"""diffusers' Flax layers, made to compute what its PyTorch layers compute.

Stable Diffusion was trained with the PyTorch ones. What the Flax ones do otherwise:

    layer                                Flax                  PyTorch, and here
    GroupNorm in the U-Net               32 groups             `norm_num_groups` of the config
    GroupNorm before its transformers    epsilon 1e-5          1e-6
    variance in GroupNorm and LayerNorm  E[x²] - E[x]²         E[(x - E[x])²]
    GEGLU                                GELU by tanh          exact GELU
    frequencies of the time embedding    exp(-i (c / n))       exp(-(c i) / n)
    upsampling in the U-Net              always doubles        to the size of the skip connection

Linen lets a caller step in wherever a module's method is called. Inside `corrected(...)` the
layers in `SWAPS` run the functions here, on their own parameters.

Shapes in names: B batch, H height, W width, P pixels, T query tokens, S key tokens, N heads,
D channels, G groups.
"""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.linen.module import InterceptorContext

from seed_jax.models.diffusers_flax import (
    FlaxAttention,
    FlaxAttentionBlock,
    FlaxGEGLU,
    FlaxTimesteps,
    FlaxTransformer2DModel,
    FlaxUpsample2D,
    FlaxUpsampleVAE,
)
from seed_jax.models.layers import Array, gelu
from seed_jax.models.picture_attention import picture_attention

# Of the U-Net's transformers, fixed in PyTorch's.
TRANSFORMER_NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the layers of a U-Net must know and diffusers does not tell them; None for a VAE.

    Attributes:
      groups, epsilon: of GroupNorm.
      sizes: (height, width) of the latents at each level of resolution, the largest first.
    """

    groups: int
    epsilon: float
    sizes: tuple[tuple[int, int], ...]


def corrected(settings: Settings | None = None) -> AbstractContextManager[None]:
    """Within it, diffusers' Flax models run PyTorch's arithmetic."""

    def intercept(
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        context: InterceptorContext,
    ) -> Any:
        swap = SWAPS.get(type(context.module))
        if swap is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        return swap(context.module, settings, *args, **kwargs)

    return linen.intercept_methods(intercept)


def _group_norm(module: linen.GroupNorm, settings: Settings | None, x_BHWD: Array) -> Array:
    """Statistics in float32, result in the type of `x_BHWD`."""
    if settings is None:
        groups, epsilon = module.num_groups or 1, module.epsilon
    else:
        groups, epsilon = settings.groups, settings.epsilon
        if isinstance(module.parent, FlaxTransformer2DModel):
            epsilon = TRANSFORMER_NORM_EPSILON
    batch, *_, width = x_BHWD.shape
    scale, bias = _scale_and_bias(module, x_BHWD)
    x_BPGD = x_BHWD.astype(jnp.float32).reshape(batch, -1, groups, width // groups)
    mean = jnp.mean(x_BPGD, (1, 3), keepdims=True)
    variance = jnp.mean(jnp.square(x_BPGD - mean), (1, 3), keepdims=True)
    normed = ((x_BPGD - mean) * jax.lax.rsqrt(variance + epsilon)).reshape(x_BHWD.shape)
    return (normed * scale + bias).astype(x_BHWD.dtype)


def _layer_norm(module: linen.LayerNorm, settings: Settings | None, x_BTD: Array) -> Array:
    """Statistics in float32, result in the type of `x_BTD`."""
    scale, bias = _scale_and_bias(module, x_BTD)
    x = x_BTD.astype(jnp.float32)
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + module.epsilon)
    return (normed * scale + bias).astype(x_BTD.dtype)


def _scale_and_bias(module: linen.Module, x: Array) -> tuple[Array, Array]:
    """A norm's parameters in float32, broadcastable to `x`; made when the model is initialised."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale_D = module.param("scale", linen.initializers.ones, x.shape[-1:])
    bias_D = module.param("bias", linen.initializers.zeros, x.shape[-1:])
    return scale_D.astype(jnp.float32).reshape(shape), bias_D.astype(jnp.float32).reshape(shape)


def _attention(
    module: FlaxAttention,
    settings: Settings | None,
    x_BTD: Array,
    context_BSD: Array | None = None,
    deterministic: bool = True,
) -> Array:
    context_BSD = x_BTD if context_BSD is None else context_BSD

    def heads(y_BTD: Array) -> Array:
        return y_BTD.reshape(*y_BTD.shape[:2], module.heads, module.dim_head)

    mixed_BTNH = picture_attention(
        heads(module.query(x_BTD)),
        heads(module.key(context_BSD)),
        heads(module.value(context_BSD)),
    )
    return module.proj_attn(mixed_BTNH.reshape(x_BTD.shape))


def _vae_attention(module: FlaxAttentionBlock, settings: Settings | None, x_BHWD: Array) -> Array:
    """Attention of one head over all pixels."""
    batch, *_, width = x_BHWD.shape
    x_BTD = module.group_norm(x_BHWD).reshape(batch, -1, width)
    q_BTD, k_BTD, v_BTD = module.query(x_BTD), module.key(x_BTD), module.value(x_BTD)
    mixed_BTNH = picture_attention(*(y_BTD[:, :, None] for y_BTD in (q_BTD, k_BTD, v_BTD)))
    return module.proj_attn(mixed_BTNH[:, :, 0]).reshape(x_BHWD.shape) + x_BHWD


def _geglu(
    module: FlaxGEGLU, settings: Settings | None, x_BTD: Array, deterministic: bool = True
) -> Array:
    values, gates = jnp.split(module.proj(x_BTD), 2, axis=-1)
    return values * gelu(gates)


def _timesteps(module: FlaxTimesteps, settings: Settings | None, timesteps_B: Array) -> Array:
    """Sines and cosines, float32 [B, D]."""
    # Timesteps go up to a thousand, so that rounding of frequencies shows: in PyTorch's order.
    half = module.dim // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents / np.float32(half - module.freq_shift))
    angles_BD = timesteps_B.astype(jnp.float32)[:, None] * frequencies[None]
    parts = [jnp.sin(angles_BD), jnp.cos(angles_BD)]
    return jnp.concatenate(parts[::-1] if module.flip_sin_to_cos else parts, axis=-1)


def _upsample(
    module: FlaxUpsample2D | FlaxUpsampleVAE, settings: Settings | None, x_BHWD: Array
) -> Array:
    """Doubles a picture by repeating pixels, then convolves."""
    y_BHWD = jnp.repeat(jnp.repeat(x_BHWD, 2, axis=1), 2, axis=2)
    if settings is not None:
        # Halving an odd size rounds up, so that doubling overshoots by one. Cutting that off is
        # what PyTorch's nearest-neighbour resizing to the skip connection's size comes to.
        after = int(module.path[-2].removeprefix("up_blocks_"))
        height, width = settings.sizes[-2 - after]
        y_BHWD = y_BHWD[:, :height, :width]
    return module.conv(y_BHWD)


SWAPS: dict[type[linen.Module], Callable[..., Array]] = {
    linen.GroupNorm: _group_norm,
    linen.LayerNorm: _layer_norm,
    FlaxAttention: _attention,
    FlaxAttentionBlock: _vae_attention,
    FlaxGEGLU: _geglu,
    FlaxTimesteps: _timesteps,
    FlaxUpsample2D: _upsample,
    FlaxUpsampleVAE: _upsample,
}
