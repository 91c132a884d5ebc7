"""Pictures or codes to pictures: `python -m seed_jax.reconstruct --model DIR --images PATH ...`.

A picture becomes codes, the codes generation embeddings, and Stable Diffusion draws from those. In
OUTPUT lies a PNG for each, under its own name, and sheet.png with the originals beside.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_jax import cli, drawing, inference, model_dir
from seed_jax.data import codes, pipeline
from seed_jax.data.sources import PICTURE_SUFFIXES, Source
from seed_jax.drawing import Shown
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.tokenize import add_images_argument, open_pictures

ON_SHEET = 24


class Batch(NamedTuple):
    """A batch of pictures as codes.

    Attributes:
      names: what the pictures are called.
      codes_BQ: integers.
      originals: the pictures; None where only codes are at hand.
    """

    names: list[str]
    codes_BQ: np.ndarray
    originals: list[np.ndarray | None]


class ReadCodes:
    """Codes that lie on disk, in batches."""

    def __init__(self, path: Path, model: SeedTokenizer, model_hash: str, *, batch: int):
        """Reads them all, so that a mistake among them shows before the work.

        Raises:
          UserError: see `codes.read`.
        """
        queries, size = model.config.encoder.qformer.queries, model.config.codebook.size
        parts = [*codes.read(path, model_hash, queries=queries, size=size, unsigned=True)]
        self._names = [name for part in parts for name in part.names]
        self._codes_PQ = np.concatenate([part.codes_PQ for part in parts])
        self._batch = batch

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self._batch):
            names = self._names[start : start + self._batch]
            codes_BQ = self._codes_PQ[start : start + self._batch]
            yield Batch(names, codes_BQ, [None] * len(names))


class PictureCodes:
    """The pictures of a path as batches of codes, made as they are asked for."""

    def __init__(self, source: Source, runner: inference.Runner, *, batch: int, image_size: int):
        self._source = source
        self._encode = runner.compile(SeedTokenizer.encode)
        self._batches = pipeline.eval_batches(source, batch_size=batch, image_size=image_size)

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            codes_BQ = np.asarray(self._encode(batch["image"]))[batch["valid"]]
            indices = batch["index"][batch["valid"]].tolist()
            names = [self._source.name(i) for i in indices]
            yield Batch(names, codes_BQ, list(batch["image"][batch["valid"]]))
        inference.report_unreadable(self._batches.unreadable)


def reconstruct(args: argparse.Namespace) -> None:
    """Draws every picture from its codes, a batch at a time.

    Raises:
      UserError: bad paths or codes, or models that do not fit one another.
    """
    model_hash = model_dir.describe(args.model)["content_hash"]
    model = SeedTokenizer.from_pretrained(args.model)
    diffusion = drawing.open_diffusion(args, model, args.model)
    runner = inference.Runner(model)
    batch = runner.batch_size(args.batch_size)
    batches: ReadCodes | PictureCodes
    if codes.are_at(args.images):
        batches = ReadCodes(args.images, model, model_hash, batch=batch)
    else:
        source = open_pictures(args.images, args.split)
        side = model.config.encoder.vit.image_size
        batch = runner.batch_size(min(args.batch_size, len(source)))  # pads few pictures to few
        batches = PictureCodes(source, runner, batch=batch, image_size=side)
    embed = runner.compile(SeedTokenizer.embed)

    shown: list[Shown] = []
    drawn = 0
    with tqdm(total=len(batches), unit="picture", dynamic_ncols=True) as bar:
        for part in batches:
            count = len(part.names)
            # Padded, so that one shape is compiled.
            rows = ((0, batch - count), (0, 0))
            codes_BQ = np.pad(part.codes_BQ.astype(np.int32), rows, mode="edge")
            pictures = np.asarray(
                diffusion.draw(
                    embed(codes_BQ), seed=args.seed, first=drawn, **drawing.settings(args)
                )
            )[:count]
            for name, picture in zip(part.names, pictures, strict=True):
                file = output_name(args.output, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
            shown += [
                Shown(name, {"": original, "from its codes": picture})
                for name, original, picture in zip(
                    part.names, part.originals, pictures, strict=True
                )
            ]
            del shown[ON_SHEET:]
            drawn += count
            bar.update(count)
    drawing.draw_sheet(shown, args.output / "sheet.png")
    print(f"drew {drawn} pictures into {args.output}; {args.output / 'sheet.png'} shows the first")


def output_name(folder: Path, name: str) -> Path:
    """Where the drawing of a picture goes: below `folder`, whatever the name says."""
    path = Path(name)
    parts = [part for part in path.parts if part not in (path.anchor, "..")]
    stem = path.stem if path.suffix.lower() in PICTURE_SUFFIXES else path.name
    return folder.joinpath(*parts[:-1], f"{stem}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.reconstruct",
        description="Turns pictures into codes and draws them again with Stable Diffusion.",
    )
    inference.add_arguments(parser)
    add_images_argument(parser, or_else="; or the codes that seed_jax.tokenize wrote")
    parser.add_argument(
        "--output", required=True, type=output_folder, metavar="DIR", help="where drawings go"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    drawing.add_arguments(parser)
    reconstruct(parser.parse_args(argv))


def output_folder(text: str) -> Path:
    """The type of an argument that names a folder to write into."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file; name a folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    cli.run(main)
