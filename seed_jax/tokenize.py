"""Pictures to codes: `python -m seed_jax.tokenize --model DIR --images PATH --output codes.jsonl`.

A line a picture: {"image": "cats/1.png", "codes": [32 integers], "model": "5f0c…"}. Each line names
the model's content hash, rather than a header doing so: lines that are all alike can be loaded by
anything that reads JSON lines, joined and split, and codes of two models never mix unseen.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from seed_jax import cli, inference, model_dir
from seed_jax.cli import UserError
from seed_jax.data import pipeline
from seed_jax.data.sources import PICTURE_SUFFIXES, Record, Source, open_source
from seed_jax.models.tokenizer import SeedTokenizer

LIST_SUFFIX = ".txt"
HASH_DIGITS = 16
NAMED_IN_ERROR = 3


def add_images_argument(parser: argparse.ArgumentParser, *, or_else: str = "") -> None:
    """The option that names what `open_pictures` opens; `or_else` says what more it may name."""
    parser.add_argument(
        "--images",
        required=True,
        type=Path,
        metavar="PATH",
        help="a folder of pictures, one picture, a .txt file with a path a line (relative to that "
        "file), a .array_record file or a folder of them, or 'embedded' for the packaged "
        f"pictures{or_else}",
    )


class PictureFiles:
    """A source of picture files wherever they lie, without captions."""

    def __init__(self, path: Path, names: list[str], folder: Path):
        """`names` are paths, relative ones below `folder`; `path` is what to call them together."""
        self.path = str(path)
        self._names = names
        self._folder = folder

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        image = (self._folder / self._names[index]).read_bytes()
        return {"id": self._names[index], "image": image, "captions": []}

    def name(self, index: int) -> str:
        return self._names[index]


class Part:
    """Some of a source's records."""

    def __init__(self, source: Source, indices: list[int]):
        self.path = source.path
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


def open_pictures(path: Path, split: str | None) -> Source:
    """All that `open_source` opens, and a single picture, or a .txt file with a path a line.

    Raises:
      UserError: see `open_source`; or the list is empty or names a file that is not there.
    """
    if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES:
        return PictureFiles(path, [path.name], path.parent)
    if not (path.is_file() and path.suffix == LIST_SUFFIX):
        return open_source(path, split, captions=False)
    names = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if name := line.strip():
            if not (path.parent / name).is_file():
                raise UserError(f"{path}:{number}: no such file below {path.parent}: {name}")
            names.append(name)
    if not names:
        raise UserError(f"{path} lists no pictures; write one path a line")
    return PictureFiles(path, names, path.parent)


def written_already(output: Path, model: str) -> set[str]:
    """The pictures whose codes a file holds; takes off a last line that was cut short.

    Raises:
      UserError: a line is no line of codes, or was written with another model.
    """
    done: set[str] = set()
    if not output.exists():
        return done
    whole = 0
    with output.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                image, written_with = entry["image"], entry["model"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{output}:{number} is not a line of codes; name another --output"
                ) from None
            if written_with != model:
                raise UserError(
                    f"{output}:{number} was written with another model ({written_with}, this is "
                    f"{model}); name another --output"
                )
            done.add(image)
            whole += len(line)
        file.truncate(whole)
    return done


def tokenize(args: argparse.Namespace) -> None:
    """Appends a line for each picture that the output doesn't hold yet.

    Raises:
      UserError: bad paths, another model's output, or too many pictures that can't be read; what
        was written until then stays.
    """
    model_hash = model_dir.describe(args.model)["content_hash"][:HASH_DIGITS]
    source = open_pictures(args.images, args.split)
    done = written_already(args.output, model_hash)
    missing = [i for i in range(len(source)) if source.name(i) not in done] if done else None
    if missing == []:
        print(f"{args.output} holds the codes of all {len(source)} pictures already")
        return
    part = source if missing is None else Part(source, missing)

    model = SeedTokenizer.from_pretrained(args.model)
    runner = inference.Runner(model)
    encode = runner.compile(SeedTokenizer.encode)
    batches = pipeline.eval_batches(
        part,
        batch_size=runner.batch_size(args.batch_size),
        image_size=model.config.encoder.vit.image_size,
        max_unreadable=1.0,  # checked below, as a share of all pictures and after writing the rest
    )
    with (
        args.output.open("a") as file,
        tqdm(
            total=len(source), initial=len(source) - len(part), unit="picture", dynamic_ncols=True
        ) as bar,
    ):
        for batch in _to_the_end(batches):
            valid = batch["valid"]
            codes_BQ = np.asarray(encode(batch["image"]))
            for index, codes in zip(batch["index"][valid], codes_BQ[valid], strict=True):
                line = {"image": part.name(int(index)), "codes": codes.tolist()}
                file.write(json.dumps(line | {"model": model_hash}) + "\n")
            file.flush()
            bar.update(int(valid.sum()))
            check_unreadable(batches.unreadable, source, args.max_unreadable)
    check_unreadable(batches.unreadable, source, args.max_unreadable)
    inference.report_unreadable(batches.unreadable)
    written = len(part) - len(batches.unreadable)
    print(f"wrote the codes of {written} pictures to {args.output}")


def _to_the_end(batches: pipeline.PipelineIterator) -> Iterator[pipeline.Batch]:
    # The pipeline raises where nothing at all can be read, but what an earlier run left over may
    # well be its few unreadable pictures.
    with contextlib.suppress(UserError):
        yield from batches


def check_unreadable(names: list[str], source: Source, share: float) -> None:
    """Raises a UserError if more than a share of a source's pictures can't be read."""
    if len(names) > share * len(source):
        shown = ", ".join(names[:NAMED_IN_ERROR]) + (", …" if names[NAMED_IN_ERROR:] else "")
        raise UserError(
            f"{source.path}: {len(names)} of {len(source)} pictures can't be read: {shown}; mend "
            f"or remove them, or allow more than --max-unreadable={share:g}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.tokenize",
        description="Turns pictures into visual codes, a JSON object a line. The same command "
        "again goes on where it stopped.",
    )
    inference.add_arguments(parser)
    add_images_argument(parser)
    parser.add_argument(
        "--output",
        required=True,
        type=inference.output_file,
        metavar="FILE",
        help="where the lines go, such as codes.jsonl",
    )
    parser.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop when more than this share of the pictures can't be read (0.01)",
    )
    tokenize(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
