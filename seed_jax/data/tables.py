"""Parquet files with a column of pictures, as on the Hugging Face hub and from img2dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from seed_jax.cli import UserError, first_line
from seed_jax.data.parts import (
    MISSING,
    TWICE,
    Damaged,
    Dropped,
    Part,
    stamp,
    strip,
    texts,
)
from seed_jax.data.sources import Record

SUFFIX = ".parquet"
# What the columns are called, where the user doesn't say.
COLUMNS = {
    "image": ("image", "jpg", "png", "webp", "img", "picture"),
    "caption": ("captions", "caption", "text", "sentences_raw", "sentences", "TEXT", "txt"),
    "id": ("id", "image_id", "img_id", "key", "__key__", "filename"),
}
ROWS_AT_ONCE = 64
READING = (pa.ArrowException, OSError)


@dataclass(frozen=True)
class TablePart:
    """Some row groups of a file.

    Attributes:
      called: the file's path below the input.
      groups: their numbers; none of a file whose list of them can't be read.
      columns: the names of the columns by what they hold: image, caption, id.
      first, size: the number of the first row, and of rows.
    """

    file: Path
    called: str
    groups: tuple[int, ...]
    columns: dict[str, str]
    first: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.called}, rows {self.first} to {self.first + self.size - 1}"

    @property
    def fingerprint(self) -> str:
        return f"{self.name}, {self.columns}: {stamp(self.file)}"

    def read(self) -> Iterator[Record | Dropped]:
        try:
            with pq.ParquetFile(self.file) as table:
                yield from self._read(table)
        except READING as error:
            raise Damaged(first_line(error)) from None

    def _read(self, table: pq.ParquetFile) -> Iterator[Record | Dropped]:
        ids = self.columns.get("id")
        seen: set[str] = set()
        if ids and self.groups and self.groups[0]:
            before = table.read_row_groups(list(range(self.groups[0])), columns=[ids])
            seen = set(map(str, before.column(ids).to_pylist()))
        wanted = [
            *self.columns.values(),
            *(["split"] if "split" in table.schema_arrow.names else []),
        ]
        number = self.first
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=self.groups, columns=wanted):
            for row in batch.to_pylist():
                key = str(row[ids]) if ids else f"{number:09}"
                found = self._sample(f"{self.called.removesuffix(SUFFIX)}/{key}", row)
                yield (
                    Dropped(found["id"], TWICE)
                    if isinstance(found, dict) and key in seen
                    else found
                )
                seen.add(key)
                number += 1

    def _sample(self, name: str, row: dict[str, Any]) -> Record | Dropped:
        image = row[self.columns["image"]]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            return Dropped(name, MISSING, "no bytes in the column of pictures")
        captions = strip(texts(row[self.columns["caption"]]))
        record: Record = {"id": name, "image": data, "captions": captions}
        if isinstance(split := row.get("split"), str):
            record["split"] = split
        return record


def open_tables(file: Path, name: str, columns: dict[str, str], size: int) -> list[Part]:
    """The parts of a file: row groups that have `size` rows together, or one that has more.

    Raises:
      UserError: no column of pictures or captions, or none of the name that was asked for.
    """
    try:
        with pq.ParquetFile(file) as table:
            found = _columns(file, table.schema_arrow, columns)
            rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    except READING:
        # What is wrong is told when it is read, in its turn.
        return [TablePart(file, name, (), {}, 0, 0)]
    parts: list[Part] = []
    groups: list[int] = []
    first = held = 0
    for number, count in enumerate(rows):
        if groups and held + count > size:
            parts.append(TablePart(file, name, tuple(groups), found, first, held))
            groups, first, held = [], first + held, 0
        groups.append(number)
        held += count
    if groups:
        parts.append(TablePart(file, name, tuple(groups), found, first, held))
    return parts


def _columns(file: Path, schema: pa.Schema, wanted: dict[str, str]) -> dict[str, str]:
    found = {}
    for what, usual in COLUMNS.items():
        if what in wanted and wanted[what] not in schema.names:
            raise UserError(
                f"{file} has no column {wanted[what]!r}; its columns: {', '.join(schema.names)}"
            )
        name = wanted.get(what) or next((name for name in usual if name in schema.names), None)
        if name is not None:
            found[what] = name
        elif what != "id":
            raise UserError(
                f"{file}: none of its columns ({', '.join(schema.names)}) is called like one of "
                f"{what}s; name it by --{what}-column"
            )
    image = schema.field(found["image"]).type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)) and not (
        pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    ):
        raise UserError(
            f"{file}: column {found['image']!r} holds {image}, not pictures' bytes; name another "
            "by --image-column"
        )
    return found
