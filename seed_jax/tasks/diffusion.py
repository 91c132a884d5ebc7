"""A U-Net of Stable Diffusion's kind: learns to draw pictures from the text states of captions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from seed_jax import model_dir, samplers
from seed_jax.cli import UserError
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.interop import clip_weights, diffusers_folder, diffusers_weights
from seed_jax.models import teacher
from seed_jax.models.stable_diffusion import Autoencoder, UNet, UNetConfig, draw_gaussian
from seed_jax.models.teacher import TextTeacher
from seed_jax.tasks import Batch, compute_of
from seed_jax.tasks.autoencoder import to_signed
from seed_jax.tasks.memory import Memory, recall

# What diffusers loads a pipeline by; no safety checker, which these pictures don't need.
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.39.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class DrawingModel(nnx.Module):
    """The U-Net that trains, and the frozen parts of Stable Diffusion around it.

    Args:
      memory: of what the frozen parts made of the records; None runs those parts at each step.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_teacher: TextTeacher,
        memory: Memory | None,
    ):
        self.unet = unet
        self.autoencoder = autoencoder
        self.teacher = text_teacher
        self.memory = memory


class Diffusion:
    """Predicts the noise in latents (arXiv 2006.11239, equation 14), given a caption's states.

    A share of the captions is replaced by the empty one, for classifier-free guidance
    (arXiv 2207.12598).
    """

    contrastive = False

    def __init__(self, config: ConfigDict):
        self.config = config
        self.autoencoder = diffusers_folder.read_autoencoder(config.autoencoder)
        self.text_config = teacher.load_config(config.teacher)
        folder, subfolder = teacher.locate(config.teacher, "tokenizer")
        self.tokenizer = load_tokenizer(folder, subfolder=subfolder)
        width = self.text_config.hidden_size
        sizes = {"cross_attention_dim": width, **config.model.to_dict()}
        self.sizes = model_dir.from_dict(UNetConfig, sizes, "config.model")
        if self.sizes.cross_attention_dim != width:
            raise UserError(
                f"config.model.cross_attention_dim is {self.sizes.cross_attention_dim}, but the "
                f"teacher's states are {width} wide"
            )
        self.scheduler = config.scheduler.to_dict()
        self.signal_T = samplers.alphas_cumprod(self.scheduler)

    def build(self, *, rngs: nnx.Rngs) -> DrawingModel:
        compute = compute_of(self.config)
        return DrawingModel(
            UNet(self.sizes, compute=compute, rngs=rngs),
            Autoencoder(self.autoencoder.config, compute=compute, rngs=rngs),
            TextTeacher(self.text_config, compute=compute, rngs=rngs),
            self._empty_memory() if self.config.remember else None,
        )

    def _empty_memory(self) -> Memory:
        sizes, text = self.autoencoder.config, self.text_config
        side = self.config.image_size // sizes.downsampling
        latents = jax.ShapeDtypeStruct((side, side, sizes.latent_channels), jnp.float32)
        states = (text.max_position_embeddings, text.hidden_size)
        return Memory(
            self.config.data,
            {
                "mean": latents,
                "logvar": latents,
                "states": jax.ShapeDtypeStruct(states, jnp.float16),
            },
        )

    def trains(self, path: tuple) -> bool:
        return path[0] == "unet"

    def text_fields(self) -> dict[str, TextField]:
        return {"prompt": self._prompts()}

    def _prompts(self) -> TextField:
        return TextField(self.tokenizer, self.text_config.max_position_embeddings)

    def prepare(self, model: DrawingModel, batches: Iterator[Batch]) -> None:
        """Takes the weights it begins with and, on request, memory of what frozen parts make."""
        if init := self.config.init:
            first = diffusers_folder.read_unet(init, compute=compute_of(self.config))
            if first.config != self.sizes:
                raise UserError(
                    f"the U-Net in {init} has other sizes than config.model: {first.config}, "
                    f"not {self.sizes}"
                )
            model_dir.replace_params(model.unet, nnx.state(first, nnx.Param))
        clip_weights.load_text_encoder(model.teacher, self.config.teacher)
        model_dir.replace_params(model.autoencoder, nnx.state(self.autoencoder, nnx.Param))
        if model.memory is not None:
            frozen = nnx.Dict(autoencoder=model.autoencoder, teacher=model.teacher)
            model.memory.fill(frozen, self._run_frozen, batches, self.config.batch_size)

    @staticmethod
    def _run_frozen(frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        mean_BHWC, logvar_BHWC = frozen.autoencoder.encode(to_signed(batch["image"]))
        states_BSD = frozen.teacher(batch["prompt"])
        return {"mean": mean_BHWC, "logvar": logvar_BHWC, "states": states_BSD}

    def outputs(
        self, model: DrawingModel, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Mean squared error, weighted by the time and not."""
        latent_key, time_key, noise_key, drop_key = jax.random.split(key, 4)
        known = recall(model.memory, model, self._run_frozen, batch)
        latents_BHWC = draw_gaussian(known["mean"], known["logvar"], latent_key)
        latents_BHWC *= self.autoencoder.config.scaling_factor

        empty_ids_1S, _ = self._prompts().batch([""])
        dropped_B = jax.random.bernoulli(drop_key, self.config.drop_prompt, latents_BHWC.shape[:1])
        empty_1SD = model.teacher(jnp.asarray(empty_ids_1S))
        states_BSD = jnp.where(dropped_B[:, None, None], empty_1SD, known["states"])

        signal_T = jnp.asarray(self.signal_T, jnp.float32)
        times_B = jax.random.randint(time_key, latents_BHWC.shape[:1], 0, len(signal_T))
        signal_B = signal_T[times_B]
        noise_BHWC = jax.random.normal(noise_key, latents_BHWC.shape)
        share_B111 = signal_B[:, None, None, None]
        noisy_BHWC = jnp.sqrt(share_B111) * latents_BHWC + jnp.sqrt(1 - share_B111) * noise_BHWC
        predicted_BHWC = model.unet(noisy_BHWC, times_B, states_BSD)
        error_B = jnp.mean((predicted_BHWC - noise_BHWC) ** 2, axis=(1, 2, 3))
        ratio_B = signal_B / (1 - signal_B)
        weight_B = jnp.minimum(ratio_B, self.config.loss.min_snr) / ratio_B
        return jnp.mean(weight_B * error_B), error_B.mean()

    def loss(
        self, model: DrawingModel, batch: Batch, outputs: jax.Array, seen: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return outputs, {"squared_error": seen}

    def after_update(self, model: DrawingModel, seen: jax.Array, key: jax.Array) -> None:
        """Nothing but the optimizer changes the model."""

    def save(self, model: DrawingModel, path: Path) -> None:
        """Writes a whole Stable Diffusion directory in diffusers' layout, in float16."""
        diffusers_weights.save(model.unet, path / "unet")
        diffusers_weights.save(model.autoencoder, path / "vae")
        clip_weights.save(model.teacher, path / "text_encoder")
        self.tokenizer.save_pretrained(path / "tokenizer")
        scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.39.0"}
        _write_json(path / "scheduler" / "scheduler_config.json", scheduler | self.scheduler)
        _write_json(path / "model_index.json", MODEL_INDEX)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")
