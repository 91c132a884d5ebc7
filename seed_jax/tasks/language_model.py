"""An OPT from scratch on captions alone: the base of SEED-OPT where none is to be downloaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from seed_jax import losses, model_dir
from seed_jax.data.sequences import PackedTexts, Words
from seed_jax.data.text import CaptionField, load_tokenizer
from seed_jax.interop import opt_weights
from seed_jax.models.opt import OPT, OPTConfig
from seed_jax.tasks import Batch, compute_of

PACKAGED = Path(__file__).parents[1] / "assets" / "tiny_opt"


class LanguageModel:
    """Next-token prediction on captions, several in a row that don't see each other."""

    contrastive = False

    def __init__(self, config: ConfigDict):
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer or PACKAGED)
        sizes = {"vocab_size": len(self.tokenizer), **config.model.to_dict()}
        self.sizes = model_dir.from_dict(OPTConfig, sizes, "config.model")

    def build(self, *, rngs: nnx.Rngs) -> OPT:
        return OPT(self.sizes, compute=compute_of(self.config), rngs=rngs)

    def trains(self, path: tuple) -> bool:
        return True

    def text_fields(self) -> Mapping[str, CaptionField]:
        sequences = self.config.sequences
        field = PackedTexts(
            Words(self.tokenizer),
            row_length=sequences.row_length,
            per_row=sequences.per_row,
            prompts=sequences.prompts,
            hinted=sequences.hinted,
        )
        return {"text": field}

    def prepare(self, model: OPT, batches: Any) -> None:
        """Starts from chance."""

    def outputs(self, model: OPT, batch: Batch, key: jax.Array) -> tuple[jax.Array, None]:
        """The loss of each token but a row's first."""
        ids_RT = batch["text_ids"]
        logits_RTV = model(ids_RT, batch["text_segments"], key=key)
        return losses.each_token(logits_RTV, ids_RT), None

    def loss(
        self, model: OPT, batch: Batch, outputs: jax.Array, seen: None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = losses.mean_where(outputs, batch["text_target"][:, 1:])
        return loss, {"left_out": batch["text_left_out"].mean()}

    def after_update(self, model: OPT, seen: None, key: jax.Array) -> None:
        """Nothing."""

    def save(self, model: OPT, path: Path) -> None:
        """Writes model and tokenizer as transformers does, in float16."""
        tokenizer = self.tokenizer
        opt_weights.save(
            model,
            path,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizer.save_pretrained(path)
