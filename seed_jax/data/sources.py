"""Where pictures with captions lie: a folder of pictures, or ArrayRecord files.

A source is random access (`len(source)`, `source[i]`) and can be pickled, as Grain's worker
processes need. A record's picture stays an encoded file until the pipeline decodes it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import grain
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from seed_jax.cli import UserError
from seed_jax.data import prepared

EMBEDDED = Path(__file__).parents[1] / "assets" / "emoji.array_record"
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
CAPTIONS_FILE = "captions.jsonl"
READ_AT_ONCE = 256


class Record(TypedDict):
    """A picture and what was said of it; on disk a msgpack map, one a row of ArrayRecord files."""

    id: str
    image: bytes  # of a PNG, JPEG or WebP file
    captions: list[str]
    tags: NotRequired[list[str]]  # words that a person attached to the picture
    split: NotRequired[str]
    domain: NotRequired[str]  # NoCaps: how far its things are from those of COCO
    set: NotRequired[int]  # which of the sets of a mixture it is from; not on disk


class Records(Protocol):
    """How many records there are, and what to call them."""

    path: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a record in front of the user, even one that can't be read."""


class Source(Records, Protocol):
    """Records by number; whatever reading one raises, its picture counts as unreadable."""

    def __getitem__(self, index: int) -> Record: ...


class Part:
    """Some of a source's records, in the order of their indices."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.path = source.path
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


def open_source(path: str | Path, split: str | None = None, *, captions: bool = True) -> Source:
    """Opens 'embedded', a folder of pictures, one .array_record file, or a folder of them.

    Captions of a folder's pictures are in its captions.jsonl, an object a line with "image" or
    "file_name" (a path below the folder), "caption" or "captions", optionally "tags" and "split",
    where lines on one picture add up; without that file, in NAME.txt beside each picture, one
    caption a line.

    Args:
      split: keeps the records whose "split" is this one; None or "" keeps all.
      captions: False accepts a folder's pictures without captions.

    Raises:
      UserError: nothing there, a captions file that can't be understood, a listed picture that
        is missing, a picture without caption, or a folder that `seed_jax.prepare` has not finished
        or that lacks one of its shards.
    """
    folder = Path(path)
    if str(path) == "embedded":
        return ArrayRecordSource([EMBEDDED], split)
    if not str(path) or not folder.exists():
        raise UserError(
            f"{str(path)!r}: no such file or folder; give a folder of pictures, .array_record "
            "files, or 'embedded'"
        )
    if folder.is_file():
        if folder.suffix != ".array_record":
            raise UserError(f"{path}: neither a folder nor an .array_record file")
        return ArrayRecordSource([folder], split)
    shards = prepared.shards(folder) or sorted(folder.glob("*.array_record"))
    if shards:
        return ArrayRecordSource(shards, split, path=str(path))
    return FolderSource(folder, split, captions=captions)


class ArrayRecordSource:
    """Records of one or more ArrayRecord files, one after the other."""

    def __init__(self, files: list[Path], split: str | None = None, *, path: str | None = None):
        """`path` is what messages call the files together.

        Raises:
          UserError: a file can't be read, or there are no records, or none in the split.
        """
        self.path = path or str(files[0])
        self._files = files
        try:
            self._rows = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        except RuntimeError:
            # The reader doesn't say which file it means.
            for file in files:
                count_rows(file)
            raise
        if not len(self._rows):
            raise UserError(f"{self.path}: no records in it")
        self._kept = self._find_split(split) if split else None

    def _find_split(self, split: str) -> np.ndarray:
        kept, splits = [], set()
        for start in range(0, len(self._rows), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(self._rows)))
            for number, row in zip(numbers, self._rows.__getitems__(numbers), strict=True):
                there = msgpack.unpackb(row).get("split")
                splits.add(there)
                if there == split:
                    kept.append(number)
        if not kept:
            raise UserError(_no_split(self.path, split, splits))
        return np.array(kept)

    def _row(self, index: int) -> int:
        return index if self._kept is None else int(self._kept[index])

    def __len__(self) -> int:
        return len(self._rows) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Record:
        return msgpack.unpackb(self._rows[self._row(index)])

    def name(self, index: int) -> str:
        try:
            return str(self[index]["id"])
        except Exception:
            row = self._row(index)
            for file in self._files:
                if row < (rows := count_rows(file)):
                    return f"{file}, record {row}"
                row -= rows
            raise


def count_rows(file: Path) -> int:
    """Records in a file; raises a UserError if it is no whole ArrayRecord file."""
    try:
        return len(grain.sources.ArrayRecordDataSource(str(file)))
    except RuntimeError as error:
        raise UserError(f"{file}: cut short, or not an ArrayRecord file ({error})") from None


def write_array_record(path: str | Path, records: Iterable[Record]) -> int:
    """Writes records to one ArrayRecord file that can be read in any order; returns how many."""
    return write_rows(path, (msgpack.packb(record) for record in records))


def write_rows(path: str | Path, rows: Iterable[bytes]) -> int:
    """Writes bytes to one ArrayRecord file that can be read in any order; returns how many rows.

    Raises:
      OSError: the file could not be written whole.
    """
    # Grain asks for groups of one; pictures are compressed already.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    count = 0
    for row in rows:
        writer.write(row)
        count += 1
    writer.close()
    # The writer doesn't tell of every failure.
    if (there := count_rows(Path(path))) != count:
        raise OSError(f"{path} holds {there} of {count} records")
    return count


@dataclass(slots=True)
class _Notes:
    """What a folder says of one picture."""

    captions: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    split: str | None = None


class FolderSource:
    """The pictures in a folder and its subfolders, in the order of their paths."""

    def __init__(self, folder: Path, split: str | None = None, *, captions: bool = True):
        """Lists the pictures and reads their captions; see `open_source`."""
        self.path = str(folder)
        self._folder = folder
        names = sorted(_pictures(folder))
        if not names:
            raise UserError(
                f"{folder}: no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}) and no "
                ".array_record files in it"
            )
        if (folder / CAPTIONS_FILE).exists():
            notes = _read_captions_file(folder, set(names))
        else:
            notes = {name: _read_text_beside(folder / name) for name in names}
        if split:
            splits = {entry.split for entry in notes.values()}
            names = [name for name in names if name in notes and notes[name].split == split]
            if not names:
                raise UserError(_no_split(self.path, split, splits))
        if captions:
            self._check_captions(names, notes)
        self._names = names
        self._notes = [notes.get(name, _Notes()) for name in names]

    def _check_captions(self, names: list[str], notes: dict[str, _Notes]) -> None:
        bare = [name for name in names if name not in notes or not notes[name].captions]
        if not bare:
            return
        where = (
            f"{CAPTIONS_FILE} has no line for it"
            if (self._folder / CAPTIONS_FILE).exists()
            else f"there is no {CAPTIONS_FILE} and no {Path(bare[0]).with_suffix('.txt').name} "
            "with text beside it"
        )
        others = f" (nor have {len(bare) - 1} others)" if len(bare) > 1 else ""
        raise UserError(f"{self._folder / bare[0]} has no caption{others}: {where}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        record, file = self.without_picture(index)
        record["image"] = file.read_bytes()
        return record

    def without_picture(self, index: int) -> tuple[Record, Path]:
        """A record that only its picture's bytes are missing from, and the file that has them."""
        notes = self._notes[index]
        record: Record = {
            "id": self._names[index],
            "image": b"",
            "captions": notes.captions,
            "tags": notes.tags,
        }
        if notes.split is not None:
            record["split"] = notes.split
        return record, self._folder / self._names[index]

    def name(self, index: int) -> str:
        return self._names[index]


def _pictures(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        # Hidden ones are the system's: thumbnails, resource forks, and the like.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES:
                yield (Path(where) / name).relative_to(folder).as_posix()


def read_text(file: Path) -> str:
    """A file's content; raises a UserError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _read_text_beside(picture: Path) -> _Notes:
    file = picture.with_suffix(".txt")
    if not file.exists():
        return _Notes()
    return _Notes([line.strip() for line in read_text(file).splitlines() if line.strip()])


def _read_captions_file(folder: Path, names: set[str]) -> dict[str, _Notes]:
    file = folder / CAPTIONS_FILE
    notes: dict[str, _Notes] = {}
    # Only \n ends a JSON line; str.splitlines would cut at other characters inside captions too.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        wrong = partial(_wrong_line, f"{file}:{number}")
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise wrong(f"not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(entry, dict):
            raise wrong('not an object such as {"image": "cat.jpg", "caption": "a cat"}')
        name = entry.get("image", entry.get("file_name"))
        captions: Any = entry.get("captions", entry.get("caption", []))
        captions = [captions] if isinstance(captions, str) else captions
        tags, split = entry.get("tags", []), entry.get("split")
        if not isinstance(name, str):
            raise wrong('no "image" or "file_name"')
        if not _is_texts(captions) or not _is_texts(tags):
            raise wrong('"caption" must be a text, "captions" and "tags" lists of texts')
        name = Path(name).as_posix()
        if name not in names:
            if not (folder / name).is_file():
                raise wrong(f"{name} is not in {folder}")
            raise wrong(f"{name} is not a picture ({' '.join(sorted(PICTURE_SUFFIXES))})")
        known = notes.setdefault(name, _Notes())
        known.captions += [caption.strip() for caption in captions if caption.strip()]
        known.tags += [tag for tag in tags if tag not in known.tags]
        known.split = split if split is not None else known.split
    return notes


def check_name(name: str, *, or_else: str = "") -> None:
    """Raises a UserError if a name is not UTF-8, as a file's need not be and a record's has to.

    Args:
      or_else: what to do other than to rename the picture.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r}: the name is not UTF-8; rename the picture{or_else}") from None


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _wrong_line(where: str, what: str) -> UserError:
    return UserError(f"{where}: {what}")


def _no_split(path: str, split: str, splits: set[str | None]) -> str:
    there = ", ".join(sorted(name for name in splits if name is not None)) or "none"
    return f"{path}: no pictures in split {split!r}; its splits: {there}"
