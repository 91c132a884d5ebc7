"""A model directory to PyTorch: `python -m seed_jax.export --model DIR --format seed --output DIR`.

OUTPUT/seed_tokenizer.safetensors   the state dict under the original's keys
OUTPUT/seed_tokenizer.pt            the same by `torch.save`, where torch is installed and asked for
OUTPUT/README.md                    what it is, for whoever finds it
"""

import argparse
import json
from pathlib import Path

import safetensors.numpy
from flax import nnx

from seed_jax import cli, model_dir
from seed_jax.interop import keys, state_dict, torch_io
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.tasks.codebook import KIND

STEM = "seed_tokenizer"
FORMATS = ("seed",)
CARD = """# A SEED image tokenizer

The state dict of the original's class ({table}), exported from a seed_jax model.

- content hash of that model: `{hash}`
- sizes, among them the numbers of heads, which weights don't tell:

```json
{sizes}
```

The licence of the pictures and of the weights that it was trained from applies.
"""


def export_seed(model: Path, output: Path, *, torch_file: bool) -> None:
    """Writes a tokenizer's state dict in the original's layout; the folder appears when whole.

    Raises:
      UserError: no such model, or torch is wanted and not installed.
    """
    description = model_dir.describe_kind(model, KIND)
    tokenizer = SeedTokenizer.from_pretrained(model)
    config = tokenizer.config
    make_table = keys.seed2_tokenizer if config.generation.one_vector else keys.seed1_tokenizer
    table = make_table(config)
    tensors = state_dict.to_torch(nnx.state(tokenizer, nnx.Param), table)
    sizes = json.dumps(description["config"], indent=2)
    card = CARD.format(table=table.name, hash=description["content_hash"], sizes=sizes)
    with model_dir.replaced_when_whole(output) as folder:
        safetensors.numpy.save_file(tensors, folder / f"{STEM}.safetensors")
        if torch_file:
            torch_io.write_torch(tensors, folder / f"{STEM}.pt")
        (folder / "README.md").write_text(card)
    print(f"{len(tensors)} tensors under the keys of {table.name} are in {output}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.export",
        description="Writes a trained tokenizer for the original PyTorch code.",
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="model directory of stage 2"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose layout")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    parser.add_argument(
        "--pt", action="store_true", help=f"write {STEM}.pt too, which takes torch to do"
    )
    args = parser.parse_args(argv)
    cli.refuse_existing(args.output, overwrite=args.overwrite)
    export_seed(args.model, args.output, torch_file=args.pt)


if __name__ == "__main__":
    cli.run(main)
