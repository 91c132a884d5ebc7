"""What published weights become: a function for each `--source` of `seed_jax.convert`.

Each reads names and shapes, then one tensor after the other into a model of ours.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from seed_jax import base_opt
from seed_jax.cli import UserError
from seed_jax.data.text import load_tokenizer
from seed_jax.interop import (
    bert_folder,
    blip2_folder,
    keys,
    opt_weights,
    state_dict,
    torch_io,
    transformers_folder,
)
from seed_jax.interop.state_dict import ArrayLike, Table
from seed_jax.interop.torch_io import StoredTensor
from seed_jax.models.layers import Compute
from seed_jax.models.opt import OPT, OPTConfig
from seed_jax.models.qformer import QFormer
from seed_jax.models.tokenizer import (
    START_TEMPERATURE,
    CausalEncoder,
    SeedTokenizer,
)
from seed_jax.models.vit import ViT, ViTConfig
from seed_jax.tasks import causal_qformer, codebook

# Of EVA's own file: SEED sees through all blocks but the last, and classifies nothing.
VIT_IGNORED = ("blocks.39.*", "norm.*", "fc_norm.*", "head.*")
OPT_FOLDER = "opt"  # of a BLIP-2's language model, in the model directory of its encoder
Options = argparse.Namespace


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model to be written to a model directory.

    Attributes:
      used, ignored: the tensors of the published weights, by name.
      words: the tokenizer that goes with it.
      folders: further models, by the folders in its directory.
    """

    kind: str
    config: Any
    module: nnx.Module
    used: Mapping[str, StoredTensor]
    ignored: Mapping[str, StoredTensor]
    words: PreTrainedTokenizerBase | None = None
    folders: Mapping[str, "Converted"] = dataclasses.field(default_factory=dict)


def tokenizer(options: Options) -> Converted:
    """SEED's and SEED-2's, whose kind must be the one that was asked for.

    Raises:
      UserError: a file is missing, damaged or would run code; or with every key that is missing,
        unexpected or of another shape; so in the functions below.
    """
    files = _read_files(options)
    config = keys.tokenizer_config(
        files.weights,
        vit_heads=options.vit_heads,
        qformer_heads=options.qformer_heads,
        decoder_heads=options.decoder_heads,
        source=files.source,
    )
    encoder = dataclasses.replace(config.encoder, vit=_resized(config.encoder.vit, options))
    config = dataclasses.replace(config, encoder=encoder)
    table = keys.tokenizer_table(files.weights, config)
    found = "seed2" if table.name == keys.SEED2 else "seed1"
    if found != options.source:
        raise UserError(f"{files.source} holds a {found} tokenizer; say --source {found}")
    return files.load(codebook.KIND, config, table, partial(SeedTokenizer, config), options)


def blip2(options: Options) -> Converted:
    """BLIP-2's own file of its first stage."""
    files = _read_files(options)
    config = keys.encoder_config(
        files.weights,
        vit_heads=options.vit_heads,
        qformer_heads=options.qformer_heads,
        source=files.source,
    )
    config = dataclasses.replace(config, vit=_resized(config.vit, options))
    build = partial(CausalEncoder, config)
    return files.load(causal_qformer.KIND, config, keys.causal_qformer(config), build, options)


def eva_vit(options: Options) -> Converted:
    """The ViT alone, as BLIP-2 has it in a file of its own."""
    read = torch_io.read_weights(options.weights)
    kept, ignored = _split(read, VIT_IGNORED)
    files = Files(kept, ignored, _named(options.weights))
    config = _resized(keys.vit_config(kept, heads=options.vit_heads, source=files.source), options)
    build = partial(ViT, config)
    return files.load(causal_qformer.VIT_KIND, config, keys.eva_vit(config), build, options)


def blip2_hf(options: Options) -> Converted:
    """BLIP-2 in transformers' folder: the encoder, and in a folder its OPT if there is one."""
    folder = _one_folder(options)
    read: dict[str, Any] = dict(transformers_folder.read_tensors(folder))
    config, text = blip2_folder.read_config(folder, read)
    config = dataclasses.replace(config, vit=_resized(config.vit, options))
    table = blip2_folder.causal_encoder(config)
    if config.contrastive_dim:
        # transformers leaves out the temperature; training begins with this one.
        read[blip2_folder.TEMPERATURE] = np.float32(START_TEMPERATURE)
    build = partial(CausalEncoder, config)
    folders = {}
    rest, inner = _split(read, (f"{blip2_folder.LANGUAGE_MODEL}*",))
    # A model for retrieval has a config of one, and none.
    if inner and text["model_type"] == "opt":
        read = rest
        inner = {k.removeprefix(blip2_folder.LANGUAGE_MODEL): v for k, v in inner.items()}
        sizes = opt_weights.config_of(text, folder / transformers_folder.CONFIG)
        folders[OPT_FOLDER] = _opt(folder, sizes, inner)
    files = Files(read, {}, str(folder))
    encoder = files.load(causal_qformer.KIND, config, table, build, options)
    return dataclasses.replace(encoder, folders=folders)


def bert(options: Options) -> Converted:
    """A BERT, for the text tower of a Q-Former and for all of its queries' path that BERT has."""
    folder = _one_folder(options)
    config = bert_folder.read_config(folder)
    files = Files(bert_folder.read_tensors(folder), {}, str(folder))
    build = partial(QFormer, config)
    found = files.load(causal_qformer.BERT_KIND, config, keys.bert(config), build, options)
    return found if found.words else dataclasses.replace(found, words=_words_of(folder))


def opt(options: Options) -> Converted:
    """An OPT as transformers saves it."""
    folder = _one_folder(options)
    return _opt(folder, opt_weights.read_config(folder), opt_weights.read_tensors(folder))


def peft(options: Options) -> Converted:
    """Adapters as PEFT saves them, and the OPT beneath."""
    if options.base is None:
        raise UserError("--source peft needs the folder of the OPT under the adapters as --base")
    folder = _one_folder(options)
    lora = opt_weights.read_peft_config(folder)
    adapters = torch_io.read_weights(folder / opt_weights.PEFT_FILE)
    base = _opt(
        options.base, opt_weights.read_config(options.base), opt_weights.read_tensors(options.base)
    )
    assert isinstance(base.module, OPT)
    module = opt_weights.with_adapters(base.module, adapters, lora)
    used = {**base.used, **adapters}
    return dataclasses.replace(base, config=module.config, module=module, used=used)


# By source: what reads it, and the options that mean something to it beside --weights.
SOURCES: dict[str, tuple[Callable[[Options], Converted], tuple[str, ...]]] = {
    "seed1": (tokenizer, ("vit", "image_size", "text_tokenizer")),
    "seed2": (tokenizer, ("vit", "image_size", "text_tokenizer")),
    "blip2": (blip2, ("vit", "image_size", "text_tokenizer")),
    "blip2-hf": (blip2_hf, ("image_size", "text_tokenizer")),
    "eva-vit-g": (eva_vit, ("image_size",)),
    "bert": (bert, ("text_tokenizer",)),
    "opt": (opt, ()),
    "peft": (peft, ("base",)),
}


@dataclasses.dataclass(frozen=True)
class Files:
    """What was read.

    Attributes:
      weights: what the model is loaded from.
      ignored: what has been left out of it.
      source: how errors call it.
    """

    weights: Mapping[str, Any]
    ignored: Mapping[str, StoredTensor]
    source: str

    def load(
        self,
        kind: str,
        config: Any,
        table: Table,
        build: Callable[..., nnx.Module],
        options: Options,
    ) -> Converted:
        """The model that `build` makes, with these weights."""
        words = load_tokenizer(options.text_tokenizer) if options.text_tokenizer else None
        module = state_dict.load(
            self.weights,
            table,
            nnx.eval_shape(lambda: build(compute=Compute(), rngs=nnx.Rngs(0))),
            source=self.source,
            resize_positions=options.image_size is not None,
        )
        used, ignored = _used(self.weights, table)
        return Converted(kind, config, module, used, {**self.ignored, **ignored}, words)


def _opt(folder: Path, config: OPTConfig, tensors: Mapping[str, StoredTensor]) -> Converted:
    """An OPT, kept in the type that its file has."""
    types = [tensor.dtype for tensor in tensors.values()]
    stored = reduce(jnp.promote_types, types) if types else None
    module = opt_weights.load(folder, tensors=tensors, config=config, stored=stored)
    used, ignored = _used(tensors, opt_weights.opt(config))
    return Converted(base_opt.KIND, config, module, used, ignored, _words_of(folder))


def _read_files(options: Options) -> Files:
    """--weights, and --vit under the names that it has in a larger model."""
    weights = torch_io.read_weights(options.weights)
    ignored: dict[str, StoredTensor] = {}
    if options.vit:
        vit, ignored = _split(torch_io.read_weights(options.vit), VIT_IGNORED)
        weights |= {f"{keys.VIT}{key}": tensor for key, tensor in vit.items()}
    return Files(weights, ignored, _named([*options.weights, *filter(None, [options.vit])]))


def _named(paths: Iterable[Path]) -> str:
    return " + ".join(map(str, paths))


def _split(
    weights: Mapping[str, StoredTensor], patterns: tuple[str, ...]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The weights whose names match none of the patterns, and the others."""
    matching = {k: v for k, v in weights.items() if state_dict.matches(k, patterns)}
    return {k: v for k, v in weights.items() if k not in matching}, matching


def _used(
    weights: Mapping[str, ArrayLike], table: Table
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """What the table has a place for, and the rest; of files alone."""
    expected = {key for row in table.rows for key in row.torch_keys()} | table.constants.keys()
    stored = {k: v for k, v in weights.items() if isinstance(v, StoredTensor)}
    used = {k: v for k, v in stored.items() if k in expected}
    return used, {k: v for k, v in stored.items() if k not in used}


def _one_folder(options: Options) -> Path:
    if len(options.weights) != 1 or not options.weights[0].is_dir():
        raise UserError(f"--source {options.source} takes one folder as --weights")
    return options.weights[0]


def _words_of(folder: Path) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(folder) if transformers_folder.has_tokenizer(folder) else None


def _resized(config: ViTConfig, options: Options) -> ViTConfig:
    """The config of a ViT that takes pictures of another size, if one is asked for."""
    if options.image_size is None:
        return config
    if options.image_size % config.patch_size:
        raise UserError(
            f"--image-size {options.image_size} is no multiple of the ViT's patches of "
            f"{config.patch_size} pixels"
        )
    return dataclasses.replace(config, image_size=options.image_size)
