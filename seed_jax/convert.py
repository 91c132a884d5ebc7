"""Published PyTorch weights to a model directory.

    python -m seed_jax.convert --source seed2 --weights seed_quantizer.pt --output DIR
    python -m seed_jax.convert --source seed1 --weights causal_qformer.pth seed_tokenizer.pth \
        --vit eva_vit_g.pth --output DIR
    python -m seed_jax.convert --source blip2 --weights blip2_pretrained.pth \
        --vit eva_vit_g.pth --output DIR
    python -m seed_jax.convert --source opt --weights OPT_DIR --output DIR
    python -m seed_jax.convert --source peft --weights ADAPTER_DIR --base OPT_DIR --output DIR

Reads one tensor at a time, and runs no code that a file may hold.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from flax import nnx
from transformers import PreTrainedTokenizerBase

from seed_jax import cli, inference, model_dir
from seed_jax.cli import UserError
from seed_jax.data.text import load_tokenizer
from seed_jax.interop import keys, opt_weights, state_dict, torch_io
from seed_jax.interop.state_dict import Table
from seed_jax.interop.torch_io import StoredTensor
from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import (
    CausalEncoder,
    EncoderConfig,
    SeedTokenizer,
    TokenizerConfig,
)
from seed_jax.tasks import causal_qformer, codebook

SOURCES = ("seed1", "seed2", "blip2", "opt", "peft")
OPT_KIND = "opt"
# Either tells that a folder of transformers has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# Of EVA's own file: SEED sees through all blocks but the last, and classifies nothing.
VIT_IGNORED = ("blocks.39.*", "norm.*", "fc_norm.*", "head.*")


def convert(args: argparse.Namespace) -> None:
    """Writes a model directory.

    Raises:
      UserError: a file is missing, damaged or would run code; with every key that is missing,
        unexpected or of another shape; or the output exists.
    """
    cli.refuse_existing(args.output, overwrite=args.overwrite)
    used, ignored = (
        _convert_opt(args) if args.source in ("opt", "peft") else _convert_tokenizer(args)
    )
    print(f"{used} tensors used, {len(ignored)} ignored, none missing")
    for key in ignored:
        print(f"  ignored: {key}")
    print(f"the model directory is {args.output}")


def _convert_tokenizer(args: argparse.Namespace) -> tuple[int, list[str]]:
    """A SEED tokenizer, or BLIP-2; how many tensors were used, and which were not."""
    words = load_tokenizer(args.text_tokenizer) if args.text_tokenizer else None
    weights = torch_io.read_weights(args.weights)
    ignored: list[str] = []
    if args.vit:
        vit, ignored = _vit(args.vit)
        weights |= vit
    source = " + ".join(str(path) for path in [*args.weights, *([args.vit] if args.vit else [])])
    heads = {"vit_heads": args.vit_heads, "qformer_heads": args.qformer_heads, "source": source}
    config: EncoderConfig | TokenizerConfig
    build: Callable[..., nnx.Module]
    if args.source == "blip2":
        config = _resized(keys.encoder_config(weights, **heads), args.image_size)
        table = keys.causal_qformer(config)
        kind, build = causal_qformer.KIND, partial(CausalEncoder, config)
    else:
        config = keys.tokenizer_config(weights, decoder_heads=args.decoder_heads, **heads)
        encoder = _resized(config.encoder, args.image_size)
        config = dataclasses.replace(config, encoder=encoder)
        table = keys.tokenizer_table(weights, config)
        found = "seed2" if table.name == keys.SEED2 else "seed1"
        if found != args.source:
            raise UserError(f"{source} holds a {found} tokenizer; say --source {found}")
        kind, build = codebook.KIND, partial(SeedTokenizer, config)
    ignored += _ignored(weights, table)
    model_dir.save(
        args.output,
        kind=kind,
        config=config,
        module=state_dict.load(
            weights,
            table,
            nnx.eval_shape(lambda: build(compute=Compute(), rngs=nnx.Rngs(0))),
            source=source,
            resize_positions=args.image_size is not None,
        ),
        add_files=lambda folder: _save_words(words, folder),
    )
    return _used(table), ignored


def _resized(config: EncoderConfig, image_size: int | None) -> EncoderConfig:
    """The config with a ViT that takes pictures of another size, if one is asked for."""
    if image_size is None:
        return config
    if image_size % config.vit.patch_size:
        raise UserError(
            f"--image-size {image_size} is no multiple of the ViT's patches of "
            f"{config.vit.patch_size} pixels"
        )
    return dataclasses.replace(config, vit=dataclasses.replace(config.vit, image_size=image_size))


def _convert_opt(args: argparse.Namespace) -> tuple[int, list[str]]:
    """An OPT as transformers saves it, and adapters as PEFT does."""
    if len(args.weights) != 1:
        raise UserError(f"--source {args.source} takes one folder as --weights")
    (folder,) = args.weights
    if args.source == "peft" and args.base is None:
        raise UserError("--source peft needs the folder of the OPT under the adapters as --base")
    base = args.base if args.source == "peft" else folder
    table = opt_weights.opt(opt_weights.read_config(base))
    has_words = any((base / name).is_file() for name in TOKENIZER_FILES)
    words = load_tokenizer(base) if has_words else None
    tensors = opt_weights.read_tensors(base)
    model = opt_weights.load(base, tensors=tensors)
    used, ignored = _used(table), _ignored(tensors, table)
    if args.source == "peft":
        lora = opt_weights.read_peft_config(folder)
        adapters = torch_io.read_weights(folder / opt_weights.PEFT_FILE)
        model = opt_weights.with_adapters(model, adapters, lora)
        used += len(adapters)
    model_dir.save(
        args.output,
        kind=OPT_KIND,
        config=model.config,
        module=model,
        add_files=lambda folder: _save_words(words, folder),
    )
    return used, ignored


def _ignored(weights: Iterable[str], table: Table) -> list[str]:
    return [key for key in weights if state_dict.matches(key, table.ignored)]


def _used(table: Table) -> int:
    return sum(len(row.torch_keys()) for row in table.rows)


def _vit(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """EVA's tensors under the tokenizer's names, and the names of those that SEED does not use."""
    read = torch_io.read_weights(path)
    ignored = [key for key in read if state_dict.matches(key, VIT_IGNORED)]
    return {f"{keys.VIT}{key}": read[key] for key in read if key not in ignored}, ignored


def _save_words(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "text_tokenizer")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.convert",
        description="Turns published PyTorch weights into a model directory.",
    )
    parser.add_argument("--source", required=True, choices=SOURCES, help="what the weights are of")
    parser.add_argument(
        "--weights",
        required=True,
        type=Path,
        nargs="+",
        metavar="PATH",
        help="of a tokenizer: .safetensors, .pt, .pth, .bin, or an .index.json that names such; "
        "where two hold the same name, the later one wins. Of opt and peft: a folder",
    )
    parser.add_argument(
        "--vit",
        type=Path,
        metavar="FILE",
        help="the ViT, if the others lack it (BLIP-2's eva_vit_g.pth)",
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="with peft: the OPT that the adapters belong to"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the model directory"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    parser.add_argument(
        "--text-tokenizer",
        default="",
        metavar="DIR",
        help="of the text tower, a directory or hub name, for evaluating retrieval "
        "(bert-base-uncased in the original)",
    )
    parser.add_argument(
        "--image-size",
        type=inference.positive,
        metavar="N",
        help="bring the ViT's position embeddings to pictures of N pixels a side",
    )
    heads = parser.add_argument_group("numbers of heads, which weights don't tell")
    for part, count in (("vit", 16), ("qformer", 12), ("decoder", 12)):
        heads.add_argument(
            f"--{part}-heads",
            type=inference.positive,
            default=count,
            metavar="N",
            help=f"({count})",
        )
    args = parser.parse_args(argv)
    convert(args)


if __name__ == "__main__":
    cli.run(main)
