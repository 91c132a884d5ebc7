"""Measures a model: `python -m seed_jax.evaluate --model DIR --suite retrieval --data PATH`.

In --output DIR lie results.json, table.md with the paper's figures beside, a sheet of pictures a
suite, and what the suites wrote on the way. The same command goes on where it was interrupted.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from seed_jax import cli, drawing, inference
from seed_jax.cli import UserError
from seed_jax.evaluation import (
    captioning,
    codebook,
    compression,
    reconstruction,
    results,
    retrieval,
    text_to_picture,
    vqa,
)
from seed_jax.evaluation.suite import Evaluation, Suite
from seed_jax.reconstruct import output_folder

SUITES = {
    "retrieval": Suite(retrieval.evaluate, retrieval.table, retrieval.headline, needs="encoder"),
    "reconstruction": Suite(
        reconstruction.evaluate, reconstruction.table, reconstruction.headline, needs="codes"
    ),
    "codebook": Suite(codebook.evaluate, codebook.table, codebook.headline, needs="codes"),
    "compression": Suite(
        compression.evaluate, compression.table, compression.headline, needs="codes"
    ),
    "captioning": Suite(captioning.evaluate, captioning.table, captioning.headline, needs="words"),
    "vqa": Suite(vqa.evaluate, vqa.table, vqa.headline, needs="words"),
    "drawing": Suite(
        text_to_picture.evaluate, text_to_picture.table, text_to_picture.headline, needs="words"
    ),
}
ALL, SINGLE = "all", ".json"
# All of it on the packaged pictures is a demonstration: a minute, not an hour.
DEMONSTRATION = {"split": "style", "limit": 16, "steps": 8, "scheduler": "dpm"}


def evaluate(args: argparse.Namespace) -> None:
    """Measures and tells what was found.

    Raises:
      UserError: the model or the data don't suit the suite, or other results lie there already.
    """
    single_file = args.output is not None and args.output.suffix == SINGLE
    if single_file and args.suite == ALL:
        raise UserError(f"--output {args.output}: all suites take a folder; leave out .json")
    folder = None if single_file else args.output
    evaluation = Evaluation(args, folder)
    names = [args.suite] if args.suite != ALL else chosen(evaluation)
    found = results.read(folder) if folder else {}
    refuse_others(found, names, evaluation)
    for name in names:
        if name in found and not args.overwrite:
            print(f"{name}: measured already, in {folder}; --overwrite measures it again")
            continue
        found[name] = measure(name, evaluation, folder)
        if folder:
            results.write(folder, found, SUITES)
        print(f"\n{name}\n\n{results.table(SUITES[name], found[name])}\n", flush=True)
    if folder:
        print(f"{folder / results.TABLE} and {folder / results.FILE} have it all")
    elif single_file:
        figures = found[args.suite]["figures"]
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


def chosen(evaluation: Evaluation) -> list[str]:
    """The suites that suit the model and the data."""
    fit = {name: evaluation.misfit(suite) for name, suite in SUITES.items()}
    if not fit["vqa"] and not vqa.has_questions(evaluation):
        fit["vqa"] = f"{evaluation.args.data} has no questions"
    for name, reason in fit.items():
        if reason:
            print(f"{name} is left out: {reason}")
    return [name for name, reason in fit.items() if not reason]


def refuse_others(found: results.Results, names: list[str], evaluation: Evaluation) -> None:
    """Raises a UserError if results of other settings would be lost."""
    settings = evaluation.settings()
    for name in names:
        if name in found and not evaluation.args.overwrite:
            there = found[name]["settings"]
            if there == settings:
                continue
            changed = sorted(
                key
                for part in settings
                for key in settings[part]
                if settings[part][key] != there.get(part, {}).get(key)
            )
            raise UserError(
                f"{evaluation.args.output} holds results of {name} with another "
                f"{', '.join(changed)}; name another --output, or replace them by --overwrite"
            )


def measure(name: str, evaluation: Evaluation, folder: Path | None) -> dict[str, Any]:
    """One suite's figures with all that they depend on; draws its sheet."""
    suite = SUITES[name]
    if reason := evaluation.misfit(suite):
        raise UserError(reason)
    started = time.monotonic()
    measured = suite.measure(evaluation)
    if folder:
        for sheet, shown in measured.sheets.items():
            drawing.draw_sheet(list(shown), folder / f"{sheet}.png")
    return {
        "figures": results.plain(measured.figures),
        "benchmark": measured.benchmark,
        "settings": evaluation.settings(),
        "versions": results.versions(),
        "seconds": round(time.monotonic() - started, 1),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inference.add_arguments(parser)
    parser.add_argument(
        "--suite", required=True, choices=[*SUITES, ALL], help="what to measure; all: what fits"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="a folder of pictures with captions.jsonl or a .txt beside each picture, a "
        ".array_record file or a folder of them, 'embedded' for the packaged pictures, or an "
        "official annotation file (docs/evaluation.md)",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="where the pictures of an annotation file lie"
    )
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="vqa: the answers to a file of questions"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out pictures that are not in --images, even more than 1 %% of them",
    )
    parser.add_argument(
        "--limit",
        type=inference.positive,
        default=0,
        metavar="N",
        help="draw or write about so many pictures, spread evenly over the data (default: all, or "
        f"{DEMONSTRATION['limit']} of 'embedded' with --suite all)",
    )
    parser.add_argument(
        "--captions",
        type=inference.positive,
        default=0,
        metavar="N",
        help="keep the first N captions of each picture in an annotation file (default: all)",
    )
    parser.add_argument(
        "--max-tags",
        type=int,
        default=0,
        metavar="N",
        help="retrieval: append up to N of a picture's tags to each of its captions (default: "
        "captions alone)",
    )
    parser.add_argument(
        "--image-encoder",
        default="",
        metavar="DIR",
        help="compare pictures by this CLIP, a directory in transformers layout or a hub name "
        "(default: the model's own stage-1 encoder)",
    )
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="measure FID by this network: pt_inception-2015-12-05-6726825d.pth (default: no FID)",
    )
    parser.add_argument(
        "--lpips",
        type=Path,
        nargs=2,
        metavar="FILE",
        help="reconstruction: measure LPIPS by torchvision's vgg16-397923af.pth and the authors' "
        "vgg.pth, or by alexnet-owt-7be5be79.pth and alex.pth (default: no LPIPS)",
    )
    parser.add_argument(
        "--output",
        type=output,
        metavar="DIR",
        help="results.json, table.md and pictures go here, and an interrupted run goes on from "
        "here; FILE.json: the figures of one suite alone",
    )
    parser.add_argument("--overwrite", action="store_true", help="measure again what is in DIR")
    drawing.add_arguments(parser)


def output(text: str) -> Path:
    """The type of the argument that says where results go: its mistakes show before the work."""
    return inference.output_file(text) if text.endswith(SINGLE) else output_folder(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.evaluate", description="Measures a trained model on a data set."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.suite == ALL and args.data == "embedded":
        parser.set_defaults(**DEMONSTRATION)
        args = parser.parse_args(argv)
    evaluate(args)


if __name__ == "__main__":
    cli.run(main)
