"""Stage 3: OPT learns to read and write codes (section 3.3).

Shapes in names: R rows of tokens, T tokens, P pictures, Q codes of a picture.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from seed_jax import base_opt, losses, model_dir, sharding
from seed_jax.cli import UserError
from seed_jax.data.codes import CodesTable
from seed_jax.data.mixture import split_paths
from seed_jax.data.sequences import PackedPairs, Words
from seed_jax.data.text import CaptionField, load_tokenizer
from seed_jax.models import int8
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.tokenizer import SeedTokenizer, TokenizerConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from seed_jax.seed_opt import KIND
from seed_jax.tasks import Batch, codebook, compute_of
from seed_jax.tasks.language_model import PACKAGED

ADAPTERS = ("lora_a", "lora_b")
VISUAL = ("project", "rows", "outputs")


class TokenizedOPT(nnx.Module):
    """The language model beside the tokenizer whose codes it learns; none if they are known."""

    def __init__(self, tokenizer: SeedTokenizer | None, model: VisualOPT):
        self.tokenizer = tokenizer
        self.model = model


class SeedOPTTraining:
    """Next-token prediction of captions and codes; adapters and the visual vocabulary train."""

    contrastive = False

    def __init__(self, config: ConfigDict):
        self.config = config
        if not config.init:
            raise UserError(
                "config.init must name the model directory that stage 2 wrote (WORKDIR/model)"
            )
        described = model_dir.describe_kind(config.init, codebook.KIND)
        self.tokenizer_hash = described["content_hash"]
        self.tokenizer_sizes = model_dir.load_config(config.init, codebook.KIND, TokenizerConfig)
        if not config.codes and config.image_size != self.tokenizer_sizes.encoder.vit.image_size:
            raise UserError(
                f"config.image_size is {config.image_size}, but the tokenizer in config.init takes "
                f"pictures of {self.tokenizer_sizes.encoder.vit.image_size} pixels"
            )
        self.base = config.opt or str(PACKAGED)
        lora = model_dir.from_dict(LoRAConfig, config.model.lora.to_dict(), "config.model.lora")
        opt = base_opt.read_config(self.base)
        self.text_tokenizer = load_tokenizer(base_opt.tokenizer_folder(self.base))
        self.sizes = VisualOPTConfig(
            opt=dataclasses.replace(
                opt, dropout=config.model.dropout, lora=lora, int8=config.model.int8
            ),
            codes=self.tokenizer_sizes.codebook.size,
            code_dim=self.tokenizer_sizes.codebook.dim,
            picture_codes=self.tokenizer_sizes.encoder.qformer.queries,
            code_input=config.model.code_input,
        )

    def build(self, *, rngs: nnx.Rngs) -> TokenizedOPT:
        compute = compute_of(self.config)
        # First, so that it begins alike with the tokenizer and without.
        model = VisualOPT(self.sizes, compute=compute, rngs=rngs)
        tokenizer = None
        if not self.config.codes:
            tokenizer = SeedTokenizer(self.tokenizer_sizes, compute=compute, rngs=rngs)
        return TokenizedOPT(tokenizer, model)

    def trains(self, path: tuple) -> bool:
        if path[0] != "model":
            return False
        words = self.config.train_words and path[1:] == ("opt", "words")
        return path[-1] in ADAPTERS or path[1] in VISUAL or words

    def text_fields(self) -> Mapping[str, CaptionField]:
        sequences, codes = self.config.sequences, self._read_codes()
        field = PackedPairs(
            Words(self.text_tokenizer),
            self.sizes,
            row_length=sequences.row_length,
            per_row=sequences.per_row,
            caption_length=sequences.caption_length,
            prompts=sequences.prompts,
            picture_to_text_batches=sequences.picture_to_text_steps,
            drawing_share=sequences.drawing_share,
            codes=codes,
        )
        return {"pair": field}

    def _read_codes(self) -> list[CodesTable]:
        files = split_paths(self.config.codes) if self.config.codes else []
        sets = split_paths(self.config.data.path)
        if files and len(files) != len(sets):
            raise UserError(
                f"config.codes names {len(files)} files, but config.data.path {len(sets)} sets "
                f"({','.join(sets)}); give the codes of each, split by commas"
            )
        return [
            CodesTable(
                file,
                self.tokenizer_hash,
                queries=self.sizes.picture_codes,
                size=self.sizes.codes,
            )
            for file in files
        ]

    def prepare(self, model: TokenizedOPT, batches: Any) -> None:
        if model.tokenizer is not None:
            model_dir.load_into(model.tokenizer, self.config.init, codebook.KIND)
        visual = model.model
        # What is whole stays on the host: beside the state, a device may have no room for it.
        host = sharding.host_device()
        if visual.vectors is not None:
            vectors = jax.ShapeDtypeStruct(
                visual.vectors.shape, jnp.float32, sharding=SingleDeviceSharding(host)
            )
            read = model_dir.restore_params(
                self.config.init, {"codebook/vectors": vectors}, all_of_it=False
            )
            put(visual.vectors, read["codebook/vectors"])
        base = nnx.state(
            base_opt.load(self.base, compute=visual.opt.compute, device=host), nnx.Param
        )
        own = dict(nnx.to_flat_state(nnx.state(visual.opt, nnx.Param)))
        for path, value in nnx.to_flat_state(base):
            if path in own:
                put(own[path], value[...])
                continue
            for name, part in int8.quantize(value[...]).items():
                put(own[*path[:-1], name], part)
        nnx.update(visual.opt, nnx.from_flat_state(own))

    def outputs(
        self, model: TokenizedOPT, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of each token but a row's first, and whether it is a word."""
        ids_RT = batch["pair_ids"]
        if model.tokenizer is not None:
            codes_PQ = jax.lax.stop_gradient(model.tokenizer.encode(batch["image"]))
            ids_RT = fill_in(ids_RT, codes_PQ + self.sizes.opt.vocab_size)
        logits_RTV = model.model(ids_RT, batch["pair_segments"], key=key)
        return losses.each_token(logits_RTV, ids_RT), ids_RT[:, 1:] < self.sizes.opt.vocab_size

    def loss(
        self, model: TokenizedOPT, batch: Batch, outputs: jax.Array, seen: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses_RT, is_word_RT, target_RT = outputs, seen, batch["pair_target"][:, 1:]
        metrics = {
            "loss_words": losses.mean_where(losses_RT, target_RT & is_word_RT),
            "loss_codes": losses.mean_where(losses_RT, target_RT & ~is_word_RT),
            "left_out": batch["pair_left_out"].mean(),
        }
        return losses.mean_where(losses_RT, target_RT), metrics

    def after_update(self, model: TokenizedOPT, seen: jax.Array, key: jax.Array) -> None:
        """Nothing."""

    def save(self, model: TokenizedOPT, path: Path) -> None:
        """Writes language model, text tokenizer and SEED tokenizer as one directory."""
        if model_dir.describe(self.config.init)["content_hash"] != self.tokenizer_hash:
            raise UserError(f"{self.config.init} holds another tokenizer than when training began")

        def add_files(folder: Path) -> None:
            self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
            shutil.copytree(self.config.init, folder / "tokenizer")

        model_dir.save(
            path,
            kind=KIND,
            config=self.sizes,
            module=model.model,
            add_files=add_files,
            tokenizer_hash=self.tokenizer_hash,
        )


def fill_in(ids_RT: jax.Array, codes_PQ: jax.Array) -> jax.Array:
    """Puts the codes of a row's pictures where `PackedPairs` left room for them."""
    codes_RX = codes_PQ.reshape(len(ids_RT), -1)
    filled_RT = jnp.take_along_axis(codes_RX, jnp.maximum(-1 - ids_RT, 0), axis=1)
    return jnp.where(ids_RT < 0, filled_RT, ids_RT)


def put(variable: nnx.Variable, value: jax.Array | np.ndarray) -> None:
    """Replaces a parameter's value, keeping its type and sharding."""
    old = variable.get_value()
    # A copy: the step takes over the memory of its state, and may not be given any of it twice.
    copied = np.array(value, old.dtype)
    variable.set_value(jax.device_put(copied, old.sharding))
