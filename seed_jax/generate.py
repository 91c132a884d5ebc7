"""Captions, answers and drawings: `python -m seed_jax.generate --model DIR --image FILE`."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from seed_jax import cli, drawing, inference, seed_opt
from seed_jax.cli import UserError
from seed_jax.data.sequences import CAPTION_PROMPT, QUESTION_PROMPT
from seed_jax.data.sources import PICTURE_SUFFIXES
from seed_jax.models.generation import Decoding
from seed_jax.models.layers import Compute
from seed_jax.seed_opt import SeedOPT
from seed_jax.tasks import PRECISIONS


def generate(args: argparse.Namespace) -> None:
    """Prints text as it is written, or codes; with --json, one object.

    Raises:
      UserError: no model, no picture, or an empty or too long text.
    """
    if args.draw is not None and not args.draw.strip():
        raise UserError("--draw is empty; say what to draw")
    if args.question is not None and not args.question.strip():
        raise UserError("--question is empty; ask something about the picture")
    if args.image is not None and not args.image.is_file():
        raise UserError(f"{args.image}: no such file; name a picture")
    model = SeedOPT.from_pretrained(args.model, compute=Compute(PRECISIONS[args.precision]))
    result = draw(model, args) if args.draw is not None else describe(model, args)
    if args.json:
        print(json.dumps(result))


def describe(model: SeedOPT, args: argparse.Namespace) -> dict[str, Any]:
    """Writes about the picture."""
    default = seed_opt.CAPTION if args.question is None else seed_opt.ANSWER
    prompt = CAPTION_PROMPT
    if args.question is not None:
        prompt = QUESTION_PROMPT.format(args.question.strip())
    codes = model.encode([args.image])[0]
    pieces = []
    decoding = decoding_of(args, default)
    for piece in model.stream([codes, prompt], decoding=decoding, seed=args.seed):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    if not args.json:
        print()
    answer = {"image": str(args.image), "codes": codes.tolist(), "text": "".join(pieces).strip()}
    return answer if args.question is None else {**answer, "question": args.question}


def draw(model: SeedOPT, args: argparse.Namespace) -> dict[str, Any]:
    """Writes a picture's codes, and draws them where there is a file to draw into."""
    diffusion = None
    if args.output is not None:
        diffusion = drawing.open_diffusion(args, model.tokenizer, args.model)
    decoding = decoding_of(args, seed_opt.DRAWING)
    codes_BQ = model.draw([args.draw], decoding=decoding, seed=args.seed)
    result = {"text": args.draw, "codes": codes_BQ[0].tolist()}
    if diffusion is not None:
        embeddings = model.tokenizer.embed(jnp.asarray(codes_BQ))
        pictures = diffusion.draw(embeddings, seed=args.seed, **drawing.settings(args))
        Image.fromarray(np.asarray(pictures[0])).save(args.output)
        result["output"] = str(args.output)
    if not args.json:
        print(result.get("output") or " ".join(map(str, result["codes"])))
    return result


def decoding_of(args: argparse.Namespace, default: Decoding) -> Decoding:
    """The decoding that the options ask for; those that are left out keep what is usual."""
    options = {
        "max_new": args.max_new,
        "beams": args.beams,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "length_penalty": args.length_penalty,
    }
    chosen = {name: value for name, value in options.items() if value is not None}
    if chosen.get("temperature") and "beams" not in chosen:
        chosen["beams"] = 1
    if chosen.get("beams", 1) > 1 and "temperature" not in chosen:
        chosen["temperature"] = 0.0
    return dataclasses.replace(default, **chosen)


def picture_file(text: str) -> Path:
    """The type of an argument that names a picture to write."""
    path = inference.output_file(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{path} is no picture's name; give it a .png at its end")
    return path


def probability(text: str) -> float:
    """The type of an argument that is a probability above 0."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.generate",
        description="Captions a picture, answers a question about it, or draws from text.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model directory of stage 3, as train writes"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="FILE", help="picture to write about")
    what.add_argument(
        "--draw", metavar="TEXT", help="what to draw; prints the codes, or draws them with --output"
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="about the picture; else it is captioned"
    )
    parser.add_argument(
        "--output",
        type=picture_file,
        metavar="FILE.png",
        help="with --draw: also draw the codes, by diffusion",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, at the end")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random")
    writing = parser.add_argument_group("how to write")
    writing.add_argument(
        "--max-new", type=inference.positive, metavar="N", help="most tokens of a text"
    )
    writing.add_argument(
        "--beams", type=inference.positive, metavar="N", help="beam search (texts: 5; 1 is greedy)"
    )
    writing.add_argument("--length-penalty", type=float, metavar="X", help="of the beam search (1)")
    writing.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="sample; 0: the likeliest (drawings: 0.5)",
    )
    writing.add_argument(
        "--top-k", type=inference.positive, metavar="N", help="sample among N tokens"
    )
    writing.add_argument(
        "--top-p", type=probability, metavar="X", help="sample among this probability"
    )
    writing.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: words repeat less (1)"
    )
    drawing.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.question is not None and args.image is None:
        parser.error("--question asks about a picture; give --image too")
    if args.output is not None and args.draw is None:
        parser.error("--output is for a drawing; give --draw too")
    generate(args)


if __name__ == "__main__":
    cli.run(main)
