"""A small text encoder in Stable Diffusion's layout: CLIP, trained on a set of its own.

Makes the packaged teacher that stage 2 learns from where no Stable Diffusion model is at hand.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from transformers import CLIPTextConfig

from seed_jax import losses, model_dir
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.interop import clip_weights
from seed_jax.models import layers, teacher
from seed_jax.models.layers import Array, Compute
from seed_jax.models.teacher import TextTeacher
from seed_jax.models.tokenizer import l2_normalize
from seed_jax.models.vit import ViT, ViTConfig
from seed_jax.tasks import Batch, compute_of

# What `FlaxCLIPTextModel` draws its weights with.
DRAWN_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """Sizes: the ViT of the image side, and of the text side what `CLIPTextConfig` calls them."""

    vit: ViTConfig
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    contrastive_dim: int


class Clip(nnx.Module):
    """A ViT's class token and a text model's end token in one space (arXiv 2103.00020)."""

    def __init__(
        self, config: PairConfig, text: CLIPTextConfig, *, compute: Compute, rngs: nnx.Rngs
    ):
        width = config.vit.width
        self.vit = ViT(config.vit, compute=compute, rngs=rngs)
        self.norm = layers.layer_norm(width, epsilon=1e-5, compute=compute, rngs=rngs)
        self.text = TextTeacher(text, compute=compute, rngs=rngs)
        self.image_proj, self.text_proj = (
            layers.dense(
                w, config.contrastive_dim, axes=("embed", None), compute=compute, rngs=rngs
            )
            for w in (width, config.hidden_size)
        )
        self.temperature = nnx.Param(jnp.float32(0.07), axes=())

    def image_features(self, images: Array) -> Array:
        """uint8 pixels [B, S, S, 3] to float32 [B, E]."""
        return l2_normalize(self.image_proj(self.norm(self.vit(images)[:, 0])))

    def text_features(self, ids_BT: Array, mask_BT: Array) -> Array:
        """Prompts to float32 [B, E], read off at the end token, which has seen all before it."""
        last_B = mask_BT.sum(axis=1) - 1
        states_BTD = self.text(ids_BT)
        end_BD = jnp.take_along_axis(states_BTD, last_B[:, None, None], axis=1)[:, 0]
        return l2_normalize(self.text_proj(end_BD))


class TextEncoder:
    """Contrastive training of both sides; the text side is what is kept."""

    contrastive = True

    def __init__(self, config: ConfigDict):
        self.config = config
        self.sizes = model_dir.from_dict(PairConfig, config.model.to_dict(), "config.model")
        self.tokenizer = load_tokenizer(config.tokenizer or teacher.PACKAGED / "tokenizer")
        self.text_config = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.sizes.hidden_size,
            intermediate_size=self.sizes.intermediate_size,
            num_hidden_layers=self.sizes.num_hidden_layers,
            num_attention_heads=self.sizes.num_attention_heads,
            max_position_embeddings=self.tokenizer.model_max_length,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def build(self, *, rngs: nnx.Rngs) -> Clip:
        return Clip(self.sizes, self.text_config, compute=compute_of(self.config), rngs=rngs)

    def trains(self, path: tuple) -> bool:
        return True

    def text_fields(self) -> dict[str, TextField]:
        return {"prompt": TextField(self.tokenizer, self.tokenizer.model_max_length)}

    def prepare(self, model: Clip, batches: Any) -> None:
        """Starts from chance, with weights as large as their width asks for.

        transformers draws them all with one small deviation, from which a narrow model hardly
        learns.
        """
        for name, param in model.text.params.items():
            if name.endswith(("kernel", "embedding")):
                width = param.shape[-1 if name.endswith("embedding") else 0]
                param[...] *= width**-0.5 / DRAWN_DEVIATION

    def outputs(
        self, model: Clip, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Batch]:
        image_BE = model.image_features(batch["image"])
        text_BE = model.text_features(batch["prompt"], batch["prompt_mask"])
        return (image_BE, text_BE), {}

    def loss(
        self, model: Clip, batch: Batch, outputs: tuple[jax.Array, jax.Array], seen: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        temperature = model.temperature[...]
        loss, accuracy = losses.contrastive(
            *outputs, temperature, label_smoothing=self.config.loss.label_smoothing
        )
        return loss, {**accuracy, "temperature": temperature}

    def after_update(self, model: Clip, seen: Batch, key: jax.Array) -> None:
        floor = self.config.loss.min_temperature
        model.temperature[...] = jnp.maximum(model.temperature[...], floor)

    def save(self, model: Clip, path: Path) -> None:
        """Writes text_encoder/ (float16) and tokenizer/, as in a Stable Diffusion directory."""
        clip_weights.save(model.text, path / "text_encoder")
        self.tokenizer.save_pretrained(path / "tokenizer")
