"""Stable Diffusion 1.x's U-Net and autoencoder: diffusers' Flax models as NNX modules.

Both take and give channels last. Their configs are the part of diffusers' that varies among 1.x
models; `diffusers_layers` says where diffusers' own arithmetic is replaced.

Shapes in names: B batch, H height, W width, C channels, S text states, D their width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax.models import diffusers_layers
from seed_jax.models.diffusers_flax import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from seed_jax.models.layers import Array, Compute, hold_linen, nest_linen

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net, under diffusers' names; those of Stable Diffusion 1.4.

    Attributes:
      attention_head_dim: the number of heads: diffusers keeps a misnomer.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder, under diffusers' names; those of Stable Diffusion 1.4.

    Attributes:
      scaling_factor: what latents are multiplied by, to have about unit variance.
    """

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels a latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class UNet(nnx.Module):
    """Predicts the noise in latents, given the time and text states."""

    def __init__(self, config: UNetConfig, *, compute: Compute, rngs: nnx.Rngs):
        # It knows neither the number of groups nor epsilon: the corrections do.
        sizes = {k: v for k, v in dataclasses.asdict(config).items() if not k.startswith("norm_")}
        self.linen = FlaxUNet2DConditionModel(**sizes, dtype=compute.dtype)
        self.config = config
        side = 2 ** (len(config.block_out_channels) - 1)
        inputs = (
            jnp.zeros((1, config.in_channels, side, side)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 1, config.cross_attention_dim)),
        )
        with self._corrected((side, side)):
            self.params = hold_linen(self.linen.init(rngs.params(), *inputs)["params"])

    def __call__(self, latents_BHWC: Array, timesteps_B: Array, states_BSD: Array) -> Array:
        """Latents [B, H, W, C] at int timesteps [B] to the noise in them, float32 [B, H, W, C]."""
        with self._corrected(latents_BHWC.shape[1:3]):
            noise_BCHW: Any = self.linen.apply(
                {"params": nest_linen(self.params)},
                latents_BHWC.transpose(0, 3, 1, 2),  # and back, in there: diffusers' convention
                timesteps_B,
                states_BSD,
            )
        return noise_BCHW.sample.transpose(0, 2, 3, 1).astype(jnp.float32)

    def _corrected(self, size: tuple[int, ...]) -> Any:
        height, width = size
        strides = [2**level for level in range(len(self.config.block_out_channels))]
        sizes = tuple((-(-height // stride), -(-width // stride)) for stride in strides)
        return diffusers_layers.corrected(
            diffusers_layers.Settings(self.config.norm_num_groups, self.config.norm_eps, sizes)
        )


class Autoencoder(nnx.Module):
    """Pictures to latents and back; pictures are in [-1, 1], latents as the encoder makes them."""

    def __init__(self, config: AutoencoderConfig, *, compute: Compute, rngs: nnx.Rngs):
        sizes = dataclasses.asdict(config)
        levels = len(config.block_out_channels)
        self.linen = FlaxAutoencoderKL(
            **sizes,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            dtype=compute.dtype,
        )
        self.config = config
        side = config.downsampling
        with diffusers_layers.corrected():
            pictures = jnp.zeros((1, config.in_channels, side, side))
            self.params = hold_linen(self.linen.init(rngs.params(), pictures)["params"])

    def encode(self, pictures_BHWC: Array) -> tuple[Array, Array]:
        """Mean and log-variance of the latents' Gaussian, float32 [B, h, w, C] each."""
        with diffusers_layers.corrected():
            outputs: Any = self.linen.apply(
                {"params": nest_linen(self.params)},
                pictures_BHWC.transpose(0, 3, 1, 2),
                method=self.linen.encode,
            )
        latents = outputs.latent_dist
        return latents.mean.astype(jnp.float32), latents.logvar.astype(jnp.float32)

    def decode(self, latents_BHWC: Array) -> Array:
        """Latents to pictures, float32 [B, H, W, 3], roughly in [-1, 1]."""
        # Channels last, which diffusers takes too: given channels first, it mistakes latents whose
        # width is that of the channels.
        with diffusers_layers.corrected():
            pictures_BCHW: Any = self.linen.apply(
                {"params": nest_linen(self.params)}, latents_BHWC, method=self.linen.decode
            )
        return pictures_BCHW.sample.transpose(0, 2, 3, 1).astype(jnp.float32)


def draw_gaussian(mean: Array, logvar: Array, key: Array) -> Array:
    """A draw from independent Gaussians, in the shape of their means and log-variances."""
    return mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
