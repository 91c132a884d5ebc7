"""The codes of pictures on disk, as `seed_jax.tokenize` writes them, and one way to read them all.

codes.jsonl          a line a picture: {"image": "cats/1.png", "codes": [32 integers], "model": …}
DIR/*.array_record   rows of msgpack maps, as those lines but for "model", which report.json names
DIR/*.parquet        columns "image", string, and "codes", lists of 32 int32; "model" is in each
                     file's metadata

Shapes in names: P pictures, Q codes a picture.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seed_jax.cli import UserError, first_line
from seed_jax.data import prepared
from seed_jax.data.sources import check_name, write_rows

FORMAT = "seed_jax.tokenize 1"  # of folders
LINES = ".jsonl"
HASH_DIGITS = 16  # of a model's content hash
AT_ONCE = 4096


class Codes(NamedTuple):
    """Some pictures' codes.

    Attributes:
      names: what the pictures are called.
      codes_PQ: unsigned integers.
    """

    names: list[str]
    codes_PQ: np.ndarray


def are_at(path: Path) -> bool:
    """Whether a path is a file or a folder of codes, rather than of pictures."""
    return path.suffix == LINES or prepared.format_of(path) == FORMAT


def read(
    path: Path, model_hash: str, *, queries: int, size: int, unsigned: bool = False
) -> Iterator[Codes]:
    """The codes in a file or a folder, some thousands of pictures at a time.

    Args:
      model_hash: content hash of the tokenizer whose codes they should be.
      queries: Q.
      size: of the tokenizer's codebook.
      unsigned: whether lines of a file may lack "model".

    Raises:
      UserError: there are none, something else is in the file or folder, codes of another model,
        another number of them, or ones that the codebook does not have; or a shard is missing or
        damaged.
    """
    if path.is_dir():
        parts = _read_folder(path, model_hash)
    elif path.is_file():
        parts = _read_lines(path, model_hash, unsigned=unsigned)
    else:
        raise UserError(f"{path}: no such file or folder; python -m seed_jax.tokenize writes one")
    dtype = np.min_scalar_type(size - 1)
    found = False
    for where, names, rows in parts:
        found = True
        _check(where, rows, queries, size)
        yield Codes(names, np.asarray(rows).astype(dtype))
    if not found:
        raise UserError(f"{path} holds no codes; seed_jax.tokenize writes them")


class _Where(NamedTuple):
    """What to call a row in front of the user."""

    file: Path
    before_number: str
    first: int

    def name(self, row: int) -> str:
        return f"{self.file}{self.before_number}{self.first + row}"


_Rows = Sequence[Sequence[int]] | np.ndarray
_Part = tuple[_Where, list[str], _Rows]


def _check(where: _Where, rows: _Rows, queries: int, size: int) -> None:
    for number, row in enumerate(rows):
        if len(row) != queries:
            raise UserError(
                f"{where.name(number)} has {len(row)} codes; this model makes {queries} a picture"
            )
    codes_PQ = np.asarray(rows)
    if codes_PQ.dtype.kind not in "iu":
        raise UserError(f"{where.name(0)} or a later row has codes that are not integers")
    if (wrong_PQ := (codes_PQ < 0) | (codes_PQ >= size)).any():
        row = int(wrong_PQ.any(axis=1).argmax())
        raise UserError(
            f"{where.name(row)}: there is no code {codes_PQ[row][wrong_PQ[row]][0]}; they go from "
            f"0 to {size - 1}"
        )


def _read_lines(path: Path, model_hash: str, *, unsigned: bool) -> Iterator[_Part]:
    names: list[str] = []
    rows: list[list[int]] = []
    first = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                name, codes = str(entry["image"]), entry["codes"]
                model = str(entry.get("model", model_hash) if unsigned else entry["model"])
                names.append(name)
                rows.append([int(code) for code in codes])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{path}:{number} is no line of codes, "
                    '{"image": name, "codes": [integers], "model": hash}'
                ) from None
            if not (model and model_hash.startswith(model)):
                raise _of_another(f"{path}:{number}", model, model_hash)
            if len(rows) == AT_ONCE:
                yield _Where(path, ":", first), names, rows
                names, rows, first = [], [], number + 1
    if rows:
        yield _Where(path, ":", first), names, rows


def _of_another(where: object, found: str, wanted: str) -> UserError:
    return UserError(
        f"{where} has codes of another tokenizer ({found}, not {wanted[: len(found)]}), which mean "
        "other things; tokenize the pictures again"
    )


def _read_folder(path: Path, model_hash: str) -> Iterator[_Part]:
    files = prepared.shards(path, FORMAT)
    report = prepared.read_report(path, FORMAT)
    if files is None or report is None:
        raise UserError(f"{path} holds no codes; python -m seed_jax.tokenize writes them")
    if not model_hash.startswith(report["model"]):
        raise _of_another(path, report["model"], model_hash)
    read_file = _READERS[report["files"]]
    for file in files:
        count = 0
        try:
            for names, rows in read_file(file):
                yield _Where(file, ", record ", count), names, rows
                count += len(names)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{file} is damaged ({first_line(error)}); delete it, and the command that wrote "
                "it makes it again"
            ) from None


def _read_array_record(file: Path) -> Iterator[tuple[list[str], _Rows]]:
    source = grain.sources.ArrayRecordDataSource(str(file))
    for start in range(0, len(source), AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, len(source)))
        rows = [msgpack.unpackb(row) for row in source.__getitems__(numbers)]
        yield [row["image"] for row in rows], [row["codes"] for row in rows]


def _read_parquet(file: Path) -> Iterator[tuple[list[str], _Rows]]:
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(AT_ONCE, columns=["image", "codes"]):
            codes = batch.column("codes")
            yield (
                batch.column("image").to_pylist(),
                codes.flatten().to_numpy().reshape(len(codes), -1),
            )


_READERS = {"array_record": _read_array_record, "parquet": _read_parquet}


def write_array_record(path: Path, parts: Iterable[Codes], *, model: str, queries: int) -> int:
    """Writes a shard; returns how many pictures are in it.

    Args:
      model: hash of the tokenizer.
      queries: Q.
    """
    rows = (
        msgpack.packb({"image": name, "codes": codes})
        for part in _with_text_names(parts)
        for name, codes in zip(part.names, part.codes_PQ.tolist(), strict=True)
    )
    return write_rows(path, rows)


def write_parquet(path: Path, parts: Iterable[Codes], *, model: str, queries: int) -> int:
    """As `write_array_record`; what goes into the shard is held in memory."""
    names: list[str] = []
    codes = [np.empty((0, queries), np.int32)]
    for part in _with_text_names(parts):
        names += part.names
        codes.append(part.codes_PQ.astype(np.int32))
    # int32, which everything can read: on disk they are packed into as few bits as they need.
    flat = pa.array(np.concatenate(codes).reshape(-1))
    columns = {
        "image": pa.array(names, pa.string()),
        "codes": pa.FixedSizeListArray.from_arrays(flat, queries),
    }
    table = pa.table(columns).replace_schema_metadata({"format": FORMAT, "model": model})
    pq.write_table(table, path, compression="zstd")
    return len(names)


def _with_text_names(parts: Iterable[Codes]) -> Iterator[Codes]:
    for part in parts:
        for name in part.names:
            check_name(name, or_else=", or write codes.jsonl")
        yield part


WRITERS = {"array_record": write_array_record, "parquet": write_parquet}


class CodesTable:
    """The codes that `seed_jax.tokenize` wrote, by picture; small enough to be sent to workers."""

    def __init__(self, path: str | Path, model_hash: str, *, queries: int, size: int):
        """Reads them all; the arguments are those of `read`.

        Raises:
          UserError: see `read`.
        """
        self._path = str(path)
        keys, codes = [], []
        for part in read(Path(path), model_hash, queries=queries, size=size):
            keys.append(np.array([_key(name) for name in part.names], np.uint64))
            codes.append(part.codes_PQ)
        keys_P = np.concatenate(keys)
        self._order_P = np.argsort(keys_P)
        self._keys_P = keys_P[self._order_P]
        self._codes_PQ = np.concatenate(codes)

    def __getitem__(self, name: str) -> list[int]:
        """The codes of a picture.

        Raises:
          UserError: it has none.
        """
        key = _key(name)
        place = int(np.searchsorted(self._keys_P, np.uint64(key)))
        if place == len(self._keys_P) or int(self._keys_P[place]) != key:
            raise UserError(f"{self._path} lacks the codes of {name}; tokenize the pictures again")
        return self._codes_PQ[self._order_P[place]].tolist()


def _key(name: str) -> int:
    # Names of millions of pictures would fill the memory of every worker process.
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big"
    )
