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
# Parts of one, which `seed_jax.convert` makes: a ViT, and a BERT for the text tower and the
# queries' path.
VIT_KIND, BERT_KIND = "vit", "bert"
KINDS = (KIND, VIT_KIND, BERT_KIND)


class CausalQFormer:
    """Contrastive training of queries, Q-Former, `ln_vision` and heads; the ViT by option."""

    contrastive = True

    def __init__(self, config: ConfigDict):
        self.config = config
        self.sizes = model_dir.from_dict(EncoderConfig, config.model.to_dict(), "config.model")
        # What each holds, by the directory that it is in.
        self.starts = {path: self._kind(path) for path in config.init.split(",") if path}
        if not config.train_vit and not {KIND, VIT_KIND} & set(self.starts.values()):
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

    def _kind(self, path: str) -> str:
        """What a directory holds, if it is of use here and of the sizes of config.model."""
        described = model_dir.describe(path)
        kind, there = described["kind"], described["config"]
        if kind not in KINDS:
            raise UserError(f"{path} holds a {kind} model; config.init takes {', '.join(KINDS)}")
        # Numbers of heads, which weights don't tell: (where, there, wanted).
        vit, qformer = self.sizes.vit.heads, self.sizes.qformer.heads
        heads = {
            KIND: [("vit", there.get("vit"), vit), ("qformer", there.get("qformer"), qformer)],
            VIT_KIND: [("vit", there, vit)],
            BERT_KIND: [("qformer", there, qformer)],
        }
        for part, sizes, wanted in heads[kind]:
            if sizes["heads"] != wanted:
                raise UserError(
                    f"{path} has {sizes['heads']} heads in its {part}, but "
                    f"config.model.{part}.heads is {wanted}"
                )
        return kind

    def build(self, *, rngs: nnx.Rngs) -> CausalEncoder:
        return CausalEncoder(self.sizes, compute=compute_of(self.config), rngs=rngs)

    def trains(self, path: tuple) -> bool:
        return self.config.train_vit or path[0] != "vit"

    def text_fields(self) -> dict[str, TextField]:
        return {"text": TextField(self.tokenizer, self.sizes.text_length)}

    def prepare(self, model: CausalEncoder, batches: Any) -> None:
        """Starts from model directories, and from chance where they hold nothing.

        By chance, attention is all but uniform at first, so that every query sees the same; if the
        queries stay alike, so do the codes of a picture, and 32 of them say little more than one.
        """
        qformer = model.qformer
        assert qformer.words is not None
        assert qformer.cross is not None
        left = set(model_dir.flat_params(nnx.state(model, nnx.Param)))
        for path, kind in self.starts.items():
            if kind == KIND:
                left -= model_dir.load_part(model, path, kind)
            elif kind == VIT_KIND:
                left -= {f"vit/{name}" for name in model_dir.load_part(model.vit, path, kind)}
            else:
                loaded = model_dir.load_part(qformer, path, kind, tables=("words",))
                left -= {f"qformer/{name}" for name in loaded}
        if self.starts and left:
            print(f"from chance, since config.init does not hold it: {', '.join(sorted(left))}")
        if "qformer/cross/query/kernel" in left:
            qformer.cross.query.kernel[...] *= self.config.first_scale.queries
        if "qformer/words" in left:
            qformer.words[...] *= self.config.first_scale.words

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
