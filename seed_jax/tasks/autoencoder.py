"""An autoencoder of Stable Diffusion's kind: the latents in which the tiny one draws."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from seed_jax import model_dir
from seed_jax.data.text import TextField
from seed_jax.interop import diffusers_weights
from seed_jax.models.layers import Compute
from seed_jax.models.stable_diffusion import Autoencoder, AutoencoderConfig, draw_gaussian
from seed_jax.tasks import Batch, compute_of

# Of the running deviation of the latents.
DECAY = 0.99


class RunningVariance(nnx.Variable):
    """The variance of the latents, as a running mean, float32."""


class ScaledAutoencoder(nnx.Module):
    """The autoencoder beside the variance of its latents, which decides how they are scaled."""

    def __init__(self, config: AutoencoderConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.autoencoder = Autoencoder(config, compute=compute, rngs=rngs)
        self.variance = RunningVariance(jnp.ones(()))


class AutoencoderKL:
    """Mean absolute error of the picture and a weak pull of the latents to a unit Gaussian.

    Source: arXiv 2112.10752, section 3.1, without its perceptual and adversarial terms.
    """

    contrastive = False

    def __init__(self, config: ConfigDict):
        self.config = config
        self.sizes = model_dir.from_dict(AutoencoderConfig, config.model.to_dict(), "config.model")

    def build(self, *, rngs: nnx.Rngs) -> ScaledAutoencoder:
        return ScaledAutoencoder(self.sizes, compute=compute_of(self.config), rngs=rngs)

    def trains(self, path: tuple) -> bool:
        return True

    def text_fields(self) -> dict[str, TextField]:
        return {}

    def prepare(self, model: ScaledAutoencoder, batches: Any) -> None:
        """Starts from chance."""

    def outputs(
        self, model: ScaledAutoencoder, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
        """The parts of the loss; the mean squared error and the latents."""
        pictures_BHWC = to_signed(batch["image"])
        mean_BHWC, logvar_BHWC = model.autoencoder.encode(pictures_BHWC)
        latents_BHWC = draw_gaussian(mean_BHWC, logvar_BHWC, key)
        error_BHWC = model.autoencoder.decode(latents_BHWC) - pictures_BHWC
        divergence = (mean_BHWC**2 + jnp.exp(logvar_BHWC) - 1 - logvar_BHWC).mean() / 2
        parts = {"absolute_error": jnp.abs(error_BHWC).mean(), "divergence": divergence}
        return parts, (jnp.mean(error_BHWC**2), latents_BHWC)

    def loss(
        self,
        model: ScaledAutoencoder,
        batch: Batch,
        outputs: dict[str, jax.Array],
        seen: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        squared, _ = seen
        loss = outputs["absolute_error"] + self.config.loss.divergence * outputs["divergence"]
        return loss, {**outputs, "psnr": 10 * jnp.log10(4 / squared)}

    def after_update(
        self, model: ScaledAutoencoder, seen: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> None:
        _, latents_BHWC = seen
        model.variance[...] = DECAY * model.variance[...] + (1 - DECAY) * jnp.var(latents_BHWC)

    def save(self, model: ScaledAutoencoder, path: Path) -> None:
        """Writes vae/ as in a Stable Diffusion directory."""
        autoencoder = model.autoencoder
        scale = float(jax.lax.rsqrt(model.variance[...]))
        autoencoder.config = dataclasses.replace(autoencoder.config, scaling_factor=scale)
        diffusers_weights.save(autoencoder, path / "vae")


def to_signed(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1
