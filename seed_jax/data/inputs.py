"""What `seed_jax.prepare` reads, cut into parts, each of which becomes a shard.

| input | a part |
|---|---|
| a folder of pictures, or an annotation file and its pictures | so many pictures |
| tars as img2dataset and webdataset write them | a tar |
| parquet files with pictures in a column, as on the Hugging Face hub | row groups of a file |
"""

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from seed_jax.cli import UserError, first_line
from seed_jax.data import annotations, tables
from seed_jax.data.parts import (
    MISSING,
    NO_CAPTION,
    TWICE,
    Damaged,
    Dropped,
    Part,
    stamp,
    strip,
    texts,
)
from seed_jax.data.sources import PICTURE_SUFFIXES, FolderSource, Record

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
BLOCK = 512  # of a tar

# What reading a tar that was cut short or overwritten raises.
READING = (tarfile.TarError, EOFError, zlib.error, OSError)


def open_parts(path: Path, images: Path | None, columns: dict[str, str], size: int) -> list[Part]:
    """The parts of an input, in an order that depends on names alone.

    Args:
      images: the folder with the pictures of an annotation file.
      columns: of parquet files: the names of the 'image', 'caption' and 'id' columns, where given.
      size: pictures in a part, where an input has no parts of its own.

    Raises:
      UserError: nothing there that can be read; see `open_source`, `read_annotations`, `locate`.
    """
    if not path.exists():
        raise UserError(
            f"--input {path}: no such file or folder; give a folder of pictures, tars or parquet "
            "files, one of them, or an annotation file"
        )
    if path.is_file():
        if annotations.is_annotation_file(path):
            return _annotated_parts(path, images, size)
        found = [path]
    else:
        found = sorted(file for file in path.rglob("*") if file.is_file())
    if tars := [file for file in found if file.name.lower().endswith(TAR_SUFFIXES)]:
        return [TarPart(file, _below(file, path)) for file in tars]
    parquet = [file for file in found if file.suffix == tables.SUFFIX]
    # img2dataset writes tables without pictures beside pictures in folders.
    if parquet and (path.is_file() or not _has_pictures(found)):
        return [
            part
            for file in parquet
            for part in tables.open_tables(file, _below(file, path), columns, size)
        ]
    if path.is_file():
        raise UserError(
            f"--input {path}: neither a tar ({' '.join(TAR_SUFFIXES)}) nor a {tables.SUFFIX} file "
            f"nor annotations ({' '.join(annotations.SUFFIXES)})"
        )
    source = FolderSource(path, captions=False)
    return _file_parts([source.without_picture(i) for i in range(len(source))], size)


def _below(file: Path, path: Path) -> str:
    return file.name if file == path else file.relative_to(path).as_posix()


def _has_pictures(files: list[Path]) -> bool:
    return any(file.suffix.lower() in PICTURE_SUFFIXES for file in files)


def _annotated_parts(path: Path, images: Path | None, size: int) -> list[Part]:
    _, _, said = annotations.read_annotations(path)
    files = annotations.locate(path, images, [one.names for one in said], allow_missing=True)
    records = map(annotations.without_picture, said)
    return _file_parts(list(zip(records, files, strict=True)), size)


def _file_parts(pictures: list[tuple[Record, Path | None]], size: int) -> list[Part]:
    return [FilesPart(pictures[start : start + size]) for start in range(0, len(pictures), size)]


@dataclass(frozen=True)
class FilesPart:
    """Pictures that lie in files of their own; None for one that is not there."""

    pictures: list[tuple[Record, Path | None]]

    @property
    def name(self) -> str:
        return f"{self.pictures[0][0]['id']} … {self.pictures[-1][0]['id']}"

    @property
    def fingerprint(self) -> str:
        named = [(record, str(file)) for record, file in self.pictures]
        # Names of files may be any bytes.
        packed = msgpack.packb(named, unicode_errors="surrogateescape")
        return hashlib.sha256(packed).hexdigest()

    @property
    def size(self) -> int:
        return len(self.pictures)

    def read(self) -> Iterator[Record | Dropped]:
        for record, file in self.pictures:
            try:
                if file is None:
                    raise FileNotFoundError(2, "no such file")
                yield {**record, "image": file.read_bytes()}
            except OSError as error:
                yield Dropped(record["id"], MISSING, error.strerror or "")


@dataclass(frozen=True)
class TarPart:
    """A tar whose files of one name up to the first dot belong together: 17.jpg, 17.txt, 17.json.

    Captions are the lines of the .txt, or else "caption" or "captions" of the .json.
    """

    file: Path
    name: str

    @property
    def fingerprint(self) -> str:
        return f"{self.name}: {stamp(self.file)}"

    @property
    def size(self) -> int:
        return 0

    def read(self) -> Iterator[Record | Dropped]:
        prefix = re.sub(r"(\.tar)?(\.gz)?$|\.tgz$", "", self.name)
        try:
            with tarfile.open(self.file) as tar:
                groups, damage = _groups(tar)
                for key, members in groups.items():
                    name = f"{prefix}/{key}"
                    for _ in range(members.pop("twice", 0)):
                        yield Dropped(name, TWICE)
                    yield _sample(name, {k: _read(tar, m) for k, m in members.items()})
        except READING as error:
            raise Damaged(first_line(error)) from None
        if damage:
            raise Damaged(damage)


def _groups(tar: tarfile.TarFile) -> tuple[dict[str, dict[str, Any]], str]:
    """The files that belong together, by kind, with how many more there are of the same; damage.

    All headers are read before any picture: a tar made by hand may have all captions at its end.
    """
    groups: dict[str, dict[str, Any]] = {}
    damage = ""
    try:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            suffix = f".{suffix.lower()}"
            kind = "picture" if suffix in PICTURE_SUFFIXES else suffix
            if kind not in ("picture", ".txt", ".json"):
                continue
            group = groups.setdefault(folder.removeprefix("./") + slash + stem, {})
            if kind not in group:
                group[kind] = member
            elif kind == "picture":
                group["twice"] = group.get("twice", 0) + 1
        damage = _bad_end(tar)
    except READING as error:
        damage = first_line(error)
    return groups, damage


def _bad_end(tar: tarfile.TarFile) -> str:
    """What is wrong where the list of files ends; tarfile takes any garbage for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(BLOCK)
    if len(block) < BLOCK:
        return f"it ends at byte {tar.offset + len(block)} without an end mark"
    return f"no file header at byte {tar.offset}" if any(block) else ""


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _sample(name: str, files: dict[str, bytes]) -> Record | Dropped:
    if "picture" not in files:
        return Dropped(name, MISSING, f"only {' '.join(sorted(files))}")
    try:
        captions = files.get(".txt", b"").decode("utf-8-sig").splitlines()
        if ".txt" not in files and ".json" in files:
            entry = json.loads(files[".json"])
            captions = texts(entry.get("captions", entry.get("caption")))
    except (ValueError, AttributeError) as error:
        return Dropped(name, NO_CAPTION, first_line(error))
    return {"id": name, "image": files["picture"], "captions": strip(captions)}
