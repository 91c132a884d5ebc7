"""Published PyTorch weights to a model directory.

    python -m seed_jax.convert --source seed2 --weights seed_quantizer.pt --output DIR
    python -m seed_jax.convert --source seed1 --weights causal_qformer.pth seed_tokenizer.pth \
        --vit eva_vit_g.pth --output DIR
    python -m seed_jax.convert --source blip2 --weights blip2_pretrained.pth \
        --vit eva_vit_g.pth --output DIR
    python -m seed_jax.convert --source blip2-hf --weights BLIP2_DIR --output DIR
    python -m seed_jax.convert --source eva-vit-g --weights eva_vit_g.pth --output DIR
    python -m seed_jax.convert --source bert --weights BERT_DIR --output DIR
    python -m seed_jax.convert --source opt --weights OPT_DIR --output DIR
    python -m seed_jax.convert --source peft --weights ADAPTER_DIR --base OPT_DIR --output DIR

Reads one tensor at a time, and runs no code that a file may hold. docs/weights.md has a command for
each of the published files.
"""

import argparse
from collections import Counter
from pathlib import Path

from seed_jax import cli, inference, model_dir
from seed_jax.cli import UserError
from seed_jax.interop import state_dict
from seed_jax.published import SOURCES, Converted


def convert(args: argparse.Namespace) -> None:
    """Writes a model directory.

    Raises:
      UserError: a file is missing, damaged or would run code; with every key that is missing,
        unexpected or of another shape; or the output exists.
    """
    cli.refuse_existing(args.output, overwrite=args.overwrite)
    read, options = SOURCES[args.source]
    for option in ("vit", "base", "image_size", "text_tokenizer"):
        if option not in options and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is not for --source {args.source}")
    converted = read(args)
    save(converted, args.output)
    print(table(converted))
    for name in converted.folders:
        print(f"a model directory of its own is {args.output / name}")
    print(f"the model directory is {args.output}")


def save(converted: Converted, path: Path) -> None:
    """Writes a model, its tokenizer, and the models that come with it."""

    def add_files(folder: Path) -> None:
        if converted.words is not None:
            converted.words.save_pretrained(folder / "text_tokenizer")
        for name, inner in converted.folders.items():
            save(inner, folder / name)

    model_dir.save(
        path,
        kind=converted.kind,
        config=converted.config,
        module=converted.module,
        add_files=add_files,
    )


def table(converted: Converted) -> str:
    """How many tensors of each file went where, and the names of those that are not used."""
    models = [converted, *converted.folders.values()]
    used = Counter(tensor.file for model in models for tensor in model.used.values())
    unused = Counter(tensor.file for model in models for tensor in model.ignored.values())
    files = sorted(used.keys() | unused.keys())
    width = max(len(file.name) for file in files)
    lines = [f"{'file':{width}}  tensors used  ignored"]
    lines += [f"{f.name:{width}}  {used[f]:12}  {unused[f]:7}" for f in files]
    ignored = [key for model in models for key in model.ignored]
    total = f"{used.total()} tensors used, {unused.total()} ignored, none missing"
    lines.append(total + (f"; ignored: {state_dict.brief(ignored)}" if ignored else ""))
    return "\n".join(lines)


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
        help="of seed1, seed2, blip2 and eva-vit-g: .safetensors, .pt, .pth, .bin, or an "
        ".index.json that names such; where two hold the same name, the later one wins. Of the "
        "others: a folder, as transformers or PEFT saves it",
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
    heads = parser.add_argument_group(
        "numbers of heads, which files without config.json don't tell"
    )
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
