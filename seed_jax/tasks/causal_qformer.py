"""Stage 1: the causal Q-Former learns to match pictures and captions (section 3.1)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from seed_jax import losses, model_dir
from seed_jax.cli import UserError
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.models.tokenizer import CausalEncoder, EncoderConfig
from seed_jax.tasks import Batch, compute_of

KIND = "causal_encoder"


class CausalQFormer:
    """Contrastive training of queries, Q-Former, `ln_vision` and heads; the ViT by option."""

    contrastive = True

    def __init__(self, config: ConfigDict):
        self.config = config
        self.sizes = model_dir.from_dict(EncoderConfig, config.model.to_dict(), "config.model")
        if not config.init and not config.train_vit:
            raise UserError(
                "config.init must name a model directory with a trained ViT, since "
                "config.train_vit is off"
            )
        self.tokenizer = load_tokenizer(config.tokenizer or None)
        if len(self.tokenizer) > self.sizes.qformer.vocab_size:
            raise UserError(
                f"config.model.qformer.vocab_size is {self.sizes.qformer.vocab_size}, but the "
                f"tokenizer {config.tokenizer or 'packaged here'} has {len(self.tokenizer)} tokens"
            )

    def build(self, *, rngs: nnx.Rngs) -> CausalEncoder:
        return CausalEncoder(self.sizes, compute=compute_of(self.config), rngs=rngs)

    def trains(self, path: tuple) -> bool:
        return self.config.train_vit or path[0] != "vit"

    def text_fields(self) -> dict[str, TextField]:
        return {"text": TextField(self.tokenizer, self.sizes.text_length)}

    def prepare(self, model: CausalEncoder, batches: Any) -> None:
        """Starts from a model directory, or from chance with queries that look at different things.

        Attention is all but uniform at first, so that every query sees the same; if the queries
        stay alike, so do the codes of a picture, and 32 of them say little more than one.
        """
        if self.config.init:
            model_dir.load_into(model, self.config.init, KIND)
        else:
            model.qformer.cross.query.kernel[...] *= self.config.first_scale.queries
            assert model.qformer.words is not None
            model.qformer.words[...] *= self.config.first_scale.words

    def outputs(
        self, model: CausalEncoder, batch: Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Batch]:
        """Features of both sides, and those of a frozen ViT where the batch doesn't hold them."""
        image_key, text_key = jax.random.split(key)
        seen = {}
        if "vit" in batch:
            vit_BTD = batch["vit"]
        else:
            vit_BTD = model.vit(batch["image"])
            seen = {} if self.config.train_vit else {"vit": vit_BTD}
        causal_BQD = model.qformer(model.ln_vision(vit_BTD), key=image_key)
        image_BE = model.image_features(causal_BQD)
        text_BE = model.text_features(batch["text"], batch["text_mask"], key=text_key)
        return (image_BE, text_BE), seen

    def loss(
        self, model: CausalEncoder, batch: Batch, outputs: tuple[jax.Array, jax.Array], seen: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        assert model.temperature is not None
        temperature = model.temperature[...]
        loss, accuracy = losses.contrastive(
            *outputs, temperature, label_smoothing=self.config.loss.label_smoothing
        )
        return loss, {**accuracy, "temperature": temperature}

    def after_update(self, model: CausalEncoder, seen: Batch, key: jax.Array) -> None:
        assert model.temperature is not None
        model.temperature[...] = jnp.maximum(
            model.temperature[...], self.config.loss.min_temperature
        )

    def save(self, model: CausalEncoder, path: Path) -> None:
        model_dir.save(
            path,
            kind=KIND,
            config=self.sizes,
            module=model,
            add_files=lambda folder: self.tokenizer.save_pretrained(folder / "text_tokenizer"),
        )
