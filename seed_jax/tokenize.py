"""Pictures to codes: `python -m seed_jax.tokenize --model DIR --images PATH --output codes.jsonl`.

A line a picture: {"image": "cats/1.png", "codes": [32 integers], "model": "5f0c…"}. Each line names
the model's content hash, rather than a header doing so: lines that are all alike can be loaded by
anything that reads JSON lines, joined and split, and codes of two models never mix unseen.

With `--format array_record` or `parquet`, --output is a folder of shards instead, which many
processes may fill together; see `shard_pass.py` for how, and `data/codes.py` for what is in them.
With `--features` it is one of what stage 2 trains from; see `feature_pass.py`.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from seed_jax import cli, inference, model_dir, shard_pass
from seed_jax.cli import UserError
from seed_jax.data import codes, pipeline
from seed_jax.data.codes import Codes
from seed_jax.data.sources import PICTURE_SUFFIXES, Part, Record, Source, open_source, read_text
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.tasks import PRECISIONS

JSONL = "jsonl"
LIST_SUFFIX = ".txt"


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
    for number, line in enumerate(read_text(path).splitlines(), 1):
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


class Encoder:
    """A model on this process's devices, that turns pictures into codes."""

    def __init__(self, model: SeedTokenizer, batch_size: int):
        self._image_size = model.config.encoder.vit.image_size
        self.queries = model.config.encoder.qformer.queries
        runner = inference.Runner(model)
        self._batch_size = runner.batch_size(batch_size)
        self._encode = runner.compile(SeedTokenizer.encode)

    def codes(self, pictures: Source, tell: Callable[[int, list[str]], None]) -> Iterator[Codes]:
        """Batches of codes; after each, `tell` gets how many pictures were read, and which not."""
        batches = pipeline.eval_batches(
            pictures,
            batch_size=self._batch_size,
            image_size=self._image_size,
            max_unreadable=None,  # as a share of all pictures, which `tell` knows
        )
        read = 0
        for batch in batches:
            valid = batch["valid"]
            codes_BQ = self._encode(batch["image"])
            # Some sources read the records again for it: while the devices are busy.
            names = [pictures.name(int(index)) for index in batch["index"][valid]]
            yield Codes(names, np.asarray(codes_BQ)[valid])
            read += int((batch["index"] >= 0).sum())
            tell(read, batches.unreadable)


def tokenize(args: argparse.Namespace) -> None:
    """Writes the codes of all pictures that the output doesn't hold yet.

    Raises:
      UserError: bad paths, another model's output, or too many pictures that can't be read; what
        was written until then stays.
    """
    share = shard_pass.share(args)
    if args.format == JSONL:
        if args.output.is_dir():
            raise UserError(
                f"--output {args.output} is a folder; name a file, or give --format array_record "
                "or parquet"
            )
        if share[1] > 1:
            raise UserError(
                f"{args.output} can be written by one process alone, not by {share[1]}; give "
                "--format array_record or parquet"
            )
    elif args.output.suffix == codes.LINES:
        raise UserError(f"--format {args.format} writes a folder; --output {args.output} is none")
    model_hash = model_dir.describe(args.model)["content_hash"][: codes.HASH_DIGITS]
    source = open_pictures(args.images, args.split)
    if args.format == JSONL:
        write_lines(args, source, model_hash)
        return
    work = shard_pass.Pass(
        args.output,
        codes.FORMAT,
        content="codes",
        suffix=f".{args.format}",
        source=source,
        settings={"model": model_hash, "split": args.split},
        records_per_shard=args.records_per_shard,
        max_unreadable=args.max_unreadable,
    )

    def start() -> shard_pass.Write:
        encoder = Encoder(SeedTokenizer.from_pretrained(args.model), args.batch_size)
        write_codes = codes.WRITERS[args.format]

        def write(shard: shard_pass.Shard) -> shard_pass.Written:
            unreadable: list[str] = []

            def tell(read: int, not_read: list[str]) -> None:
                unreadable[:] = not_read
                shard.tell(read, not_read)

            made = encoder.codes(Part(source, shard.numbers), tell)
            records = write_codes(shard.path, made, model=model_hash, queries=encoder.queries)
            return shard_pass.Written(records, unreadable)

        return write

    shard_pass.run(work, share, start)


def write_lines(args: argparse.Namespace, source: Source, model_hash: str) -> None:
    """Appends a line for each picture that the file doesn't hold yet."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = written_already(args.output, model_hash)
    missing = [i for i in range(len(source)) if source.name(i) not in done] if done else None
    if missing == []:
        print(f"{args.output} holds the codes of all {len(source)} pictures already")
        return
    part = source if missing is None else Part(source, missing)
    before = len(source) - len(part)
    encoder = Encoder(SeedTokenizer.from_pretrained(args.model), args.batch_size)
    written, unreadable = 0, list[str]()
    with (
        args.output.open("a") as file,
        tqdm(total=len(source), initial=before, unit="picture", dynamic_ncols=True) as bar,
    ):

        def tell(read: int, not_read: list[str]) -> None:
            file.flush()
            bar.update(before + read - bar.n)
            unreadable[:] = not_read
            inference.check_unreadable(not_read, source.path, len(source), args.max_unreadable)

        for made in encoder.codes(part, tell):
            for name, codes_Q in zip(made.names, made.codes_PQ.tolist(), strict=True):
                line = {"image": name, "codes": codes_Q, "model": model_hash}
                file.write(json.dumps(line) + "\n")
            written += len(made.names)
    inference.report_unreadable(unreadable)
    print(f"wrote the codes of {written} pictures to {args.output}")


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that go with --features; their defaults are the paper's recipe."""
    group = parser.add_argument_group(
        "features", "what stage 2 trains from without running stage 1 and the text encoder"
    )
    group.add_argument(
        "--features",
        action="store_true",
        help="write these instead of codes; --model is then one of stage 1, the pictures need "
        "captions, and --output is a folder",
    )
    group.add_argument(
        "--teacher",
        metavar="DIR",
        help="the Stable Diffusion directory or hub name whose text encoder stage 2 has as "
        "config.teacher; '' is the packaged one",
    )
    group.add_argument(
        "--views",
        type=inference.positive,
        default=4,
        metavar="N",
        help="crops of each picture, each with a caption drawn for it (%(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the views (%(default)s)")
    group.add_argument(
        "--crop-scale",
        type=float,
        nargs="*",
        default=(0.5, 1.0),
        metavar="SHARE",
        help="the least and the largest share of a picture that a crop covers (0.5 1.0); without "
        "numbers, whole pictures",
    )
    group.add_argument("--no-flip", action="store_true", help="don't mirror half of the views")
    group.add_argument(
        "--max-tags", type=int, default=0, metavar="N", help="tags drawn onto a caption (0)"
    )
    group.add_argument(
        "--drop-caption",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the captions with tags that are tags alone (0)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="that the networks run in (%(default)s); what is written is float16",
    )
    group.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read pictures (0)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.tokenize",
        description="Turns pictures into visual codes, or into what stage 2 trains from. The same "
        "command again goes on where it stopped.",
    )
    inference.add_arguments(parser)
    add_images_argument(parser)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PATH",
        help="where the codes go: a file such as codes.jsonl, or a folder for --format "
        "array_record and parquet",
    )
    parser.add_argument(
        "--format",
        choices=(JSONL, *codes.WRITERS),
        default=JSONL,
        help="a JSON object a line; or shards, which many processes can write (%(default)s)",
    )
    parser.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop when more than this share of the pictures can't be read (0.01)",
    )
    shard_pass.add_arguments(parser)
    add_feature_arguments(parser)
    args = parser.parse_args(argv)
    if args.features:
        # It needs transformers, which takes seconds to import.
        from seed_jax import feature_pass

        feature_pass.run(args)
    else:
        tokenize(args)


if __name__ == "__main__":
    cli.run(main)
