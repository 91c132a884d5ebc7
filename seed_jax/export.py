"""A model directory to PyTorch.

    python -m seed_jax.export --model DIR --format FORMAT --output OUTPUT

seed   OUTPUT/seed_tokenizer.safetensors, a tokenizer's state dict under the original's keys, and on
       request OUTPUT/seed_tokenizer.pt, the same by `torch.save`
hf     an `OPTForCausalLM` whose vocabulary has the codes, with its tokenizer, for transformers
peft   the adapters alone, for PEFT, and in OUTPUT/base the `OPTForCausalLM` that they belong to

Each with a README.md that says what it is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.numpy
from flax import nnx

from seed_jax import cli, model_dir, seed_opt
from seed_jax.interop import keys, seed_opt_folders, state_dict, torch_io
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.tasks.codebook import KIND

STEM = "seed_tokenizer"
FORMATS = ("seed", "hf", "peft")
CARD = """# {title}

{text}

- exported from the seed_jax model with content hash `{hash}`
- sizes:

```json
{sizes}
```

The licences of the pictures, captions and weights that it was trained from apply.
"""
SEED_TEXT = """The state dict of the original's class ({table}). Weights don't tell the numbers of
heads; they are among the sizes."""
HF_TEXT = """OPT that reads and writes pictures beside text. {codes} visual codes are the tokens
`<img_00000>` and so on; a picture is {picture_codes} of them between `[IMG]` and `[/IMG]`.
`transformers.AutoModelForCausalLM.from_pretrained` loads it.

    picture to text:  [IMG]…[/IMG]<s>A photo of          ->  caption
    text to picture:  <s>Generate an image caption</s>   ->  [IMG]…[/IMG]

`<s>` stands for the tokenizer's `bos_token`. The codes are those of the SEED tokenizer with content
hash `{tokenizer_hash}`."""
PEFT_TEXT = """LoRA adapters that let OPT read and write pictures. Its `base` has their vocabulary:

    base = transformers.AutoModelForCausalLM.from_pretrained("THIS/base")
    model = peft.PeftModel.from_pretrained(base, "THIS")"""


def export_seed(model: Path, folder: Path, *, torch_file: bool) -> str:
    """Writes a tokenizer's state dict in the original's layout; returns what to tell of it.

    Raises:
      UserError: no such model, or torch is wanted and not installed.
    """
    description = model_dir.describe_kind(model, KIND)
    tokenizer = SeedTokenizer.from_pretrained(model)
    config = tokenizer.config
    make_table = keys.seed2_tokenizer if config.generation.one_vector else keys.seed1_tokenizer
    table = make_table(config)
    tensors = state_dict.to_torch(nnx.state(tokenizer, nnx.Param), table)
    safetensors.numpy.save_file(tensors, folder / f"{STEM}.safetensors")
    if torch_file:
        torch_io.write_torch(tensors, folder / f"{STEM}.pt")
    _write_card(folder, "A SEED image tokenizer", SEED_TEXT.format(table=table.name), description)
    return f"{len(tensors)} tensors under the keys of {table.name}"


def export_hf(model: Path, folder: Path) -> str:
    """Writes a language model for transformers; returns what to tell of it.

    Raises:
      UserError: no such model.
    """
    description = model_dir.describe_kind(model, seed_opt.KIND)
    seed_opt_folders.save_merged(model, folder)
    text = HF_TEXT.format(**description["config"], tokenizer_hash=description["tokenizer_hash"])
    _write_card(folder, "A SEED-OPT language model", text, description)
    return "an OPTForCausalLM with its tokenizer"


def export_peft(model: Path, folder: Path) -> str:
    """Writes a language model's adapters for PEFT; returns what to tell of it.

    Raises:
      UserError: no such model, or it has no adapters.
    """
    description = model_dir.describe_kind(model, seed_opt.KIND)
    seed_opt_folders.save_adapters(model, folder)
    _write_card(folder, "Adapters of a SEED-OPT language model", PEFT_TEXT, description)
    return f"adapters, and in {seed_opt_folders.BASE} the OPTForCausalLM that they belong to"


def _write_card(folder: Path, title: str, text: str, description: dict[str, Any]) -> None:
    sizes = json.dumps(description["config"], indent=2)
    card = CARD.format(title=title, text=text, hash=description["content_hash"], sizes=sizes)
    (folder / "README.md").write_text(card)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.export",
        description="Writes a trained model for PyTorch.",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="model directory: of stage 2 for seed, of stage 3 for hf and peft",
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose layout")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    parser.add_argument(
        "--pt",
        action="store_true",
        help=f"with seed, write {STEM}.pt too, which takes torch to do",
    )
    args = parser.parse_args(argv)
    cli.refuse_existing(args.output, overwrite=args.overwrite)
    with model_dir.replaced_when_whole(args.output) as folder:
        if args.format == "seed":
            told = export_seed(args.model, folder, torch_file=args.pt)
        else:
            told = {"hf": export_hf, "peft": export_peft}[args.format](args.model, folder)
    print(f"written to {args.output}: {told}")


if __name__ == "__main__":
    cli.run(main)
