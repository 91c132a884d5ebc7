"""A model directory to PyTorch.

    python -m seed_jax.export --model DIR --format FORMAT --output OUTPUT

seed       OUTPUT/seed_tokenizer.safetensors, a tokenizer's state dict under the original's keys,
           and on request OUTPUT/seed_tokenizer.pt, the same by `torch.save`
diffusers  a tokenizer's way from codes to generation embeddings, the Stable Diffusion that draws
           from them, and a PyTorch script that does so without seed_jax
hf         an `OPTForCausalLM` whose vocabulary has the codes, with its tokenizer, for transformers
peft       a language model's adapters, for PEFT, and in OUTPUT/base the `OPTForCausalLM` that they
           belong to

Each with a README.md that says what it is.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from flax import nnx

from seed_jax import cli, files, model_dir, seed_opt
from seed_jax.cli import UserError
from seed_jax.diffusion import check_width, refuse_one_vector
from seed_jax.drawing import usual_guidance_scale
from seed_jax.interop import diffusers_folder, keys, seed_opt_folders, state_dict, torch_io
from seed_jax.lazy import LazyTensor
from seed_jax.models import teacher
from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import SeedTokenizer, TokenizerConfig
from seed_jax.tasks import codebook

STEM = "seed_tokenizer"
DRAWING_SCRIPT = Path(__file__).parent / "assets" / "draw_from_codes.py"
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

DIFFUSERS_TEXT = """Pictures from SEED's visual codes, in PyTorch. `generation.safetensors` makes of
{codes} codes the {queries} embeddings that `stable_diffusion`, in diffusers' layout, draws from.

    python draw_from_codes.py codes.jsonl pictures/

`seed_jax.tokenize` writes codes.jsonl. The tensors have the names of the original's state dict."""


def export_seed(args: argparse.Namespace, folder: Path) -> str:
    """Writes a tokenizer's state dict in the original's layout; returns what to tell of it.

    Raises:
      UserError: no such model, or torch is wanted and not installed.
    """
    description = model_dir.describe_kind(args.model, codebook.KIND)
    config = model_dir.from_dict(TokenizerConfig, description["config"])
    make_table = keys.seed2_tokenizer if config.generation.one_vector else keys.seed1_tokenizer
    table = make_table(config)
    tensors = state_dict.lazy_torch(_lazy_params(args.model, config), table)
    file = folder / f"{STEM}.safetensors"
    torch_io.write_safetensors(tensors, file)
    if args.pt:
        torch_io.write_torch(torch_io.read_weights(file), folder / f"{STEM}.pt")
    _write_card(folder, "A SEED image tokenizer", SEED_TEXT.format(table=table.name), description)
    return f"{len(tensors)} tensors under the keys of {table.name}"


def export_hf(args: argparse.Namespace, folder: Path) -> str:
    """Writes a language model for transformers; returns what to tell of it.

    Raises:
      UserError: no such model.
    """
    description = model_dir.describe_kind(args.model, seed_opt.KIND)
    seed_opt_folders.save_merged(args.model, folder)
    text = HF_TEXT.format(**description["config"], tokenizer_hash=description["tokenizer_hash"])
    _write_card(folder, "A SEED-OPT language model", text, description)
    return "an OPTForCausalLM with its tokenizer"


def export_peft(args: argparse.Namespace, folder: Path) -> str:
    """Writes a language model's adapters for PEFT; returns what to tell of it.

    Raises:
      UserError: no such model, or it has no adapters.
    """
    description = model_dir.describe_kind(args.model, seed_opt.KIND)
    seed_opt_folders.save_adapters(args.model, folder)
    _write_card(folder, "Adapters of a SEED-OPT language model", PEFT_TEXT, description)
    return f"adapters, and in {seed_opt_folders.BASE} the OPTForCausalLM that they belong to"


def export_diffusers(args: argparse.Namespace, folder: Path) -> str:
    """Writes what draws from a tokenizer's codes, for diffusers; returns what to tell of it.

    Raises:
      UserError: no such model or directory, or the two don't fit one another.
    """
    model, diffusion = args.model, args.diffusion
    description = model_dir.describe_kind(model, codebook.KIND)
    config = model_dir.from_dict(TokenizerConfig, description["config"])
    refuse_one_vector(config.generation, model)
    if diffusion and not Path(diffusion).is_dir():
        raise UserError(f"--diffusion {diffusion}: no such directory; download the model first")
    unet = diffusers_folder.read_unet(diffusion, compute=Compute())
    drawer = diffusion or "the packaged Stable Diffusion"
    check_width(config.generation, model, unet.config.cross_attention_dim, drawer)
    named = state_dict.lazy_torch(_lazy_params(model, config), keys.seed1_tokenizer(config))
    tensors = {key: named[key] for key in named if key.startswith(keys.GENERATION)}
    torch_io.write_safetensors(tensors, folder / "generation.safetensors")
    sizes = {
        "decoder_depth": config.decoder_depth,
        "decoder_heads": config.decoder_heads,
        "reverse_depth": config.generation.depth,
        "reverse_heads": config.reverse_qformer.heads,
        "cross_attention_every": config.reverse_qformer.cross_attention_every,
        "guidance_scale": usual_guidance_scale(diffusion),
    }
    (folder / "generation.json").write_text(json.dumps(sizes, indent=2) + "\n")
    shutil.copytree(diffusion or teacher.PACKAGED, folder / "stable_diffusion")
    shutil.copy(DRAWING_SCRIPT, folder)
    text = DIFFUSERS_TEXT.format(
        codes=config.encoder.qformer.queries, queries=config.generation.queries
    )
    _write_card(folder, "From SEED's codes to pictures", text, description)
    return f"{len(tensors)} tensors, a Stable Diffusion, and {DRAWING_SCRIPT.name}"


def _lazy_params(path: Path, config: TokenizerConfig) -> dict[str, LazyTensor]:
    empty = nnx.eval_shape(lambda: SeedTokenizer(config, compute=Compute(), rngs=nnx.Rngs(0)))
    return model_dir.lazy_params(path, nnx.state(empty, nnx.Param))


def _write_card(folder: Path, title: str, text: str, description: dict[str, Any]) -> None:
    sizes = json.dumps(description["config"], indent=2)
    card = CARD.format(title=title, text=text, hash=description["content_hash"], sizes=sizes)
    (folder / "README.md").write_text(card)


EXPORTERS = {
    "seed": export_seed,
    "hf": export_hf,
    "peft": export_peft,
    "diffusers": export_diffusers,
}


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
        help="model directory: of stage 2 for seed and diffusers, of stage 3 for hf and peft",
    )
    parser.add_argument("--format", required=True, choices=EXPORTERS, help="whose layout")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    parser.add_argument(
        "--pt",
        action="store_true",
        help=f"with seed, write {STEM}.pt too, which takes torch to do",
    )
    parser.add_argument(
        "--diffusion",
        default="",
        metavar="DIR",
        help="with diffusers, the Stable Diffusion 1.x to draw by (default: the packaged one)",
    )
    args = parser.parse_args(argv)
    cli.refuse_existing(args.output, overwrite=args.overwrite)
    with files.replaced_when_whole(args.output) as folder:
        told = EXPORTERS[args.format](args, folder)
    print(f"written to {args.output}: {told}")


if __name__ == "__main__":
    cli.run(main)
