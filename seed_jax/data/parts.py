"""What readers of `seed_jax.prepare`'s inputs share: a part, and what it gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from seed_jax.data.sources import Record

MISSING, NO_CAPTION, TWICE = "no picture", "no caption", "duplicate id"


class Dropped(NamedTuple):
    """A picture that is left out, and why."""

    id: str
    why: str
    detail: str = ""


class Damaged(Exception):
    """The rest of a part can't be read; the message says why."""


class Part(Protocol):
    """What one shard is made of; can be pickled."""

    @property
    def name(self) -> str:
        """What to call it in front of the user."""

    @property
    def fingerprint(self) -> str:
        """Another one for another content, as far as can be told without reading pictures."""

    @property
    def size(self) -> int:
        """Pictures in it; 0 if only reading can tell."""

    def read(self) -> Iterator[Record | Dropped]:
        """Every record with its picture undecoded.

        Raises:
          Damaged: after all that can be read.
        """


def texts(value: object) -> list[str]:
    """The texts in a text or a list of them, none in anything else."""
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def strip(captions: list[str]) -> list[str]:
    return [caption.strip() for caption in captions if caption.strip()]


def stamp(file: Path) -> str:
    """Another one when the file has changed."""
    stat = file.stat()
    return f"{stat.st_size} bytes, {stat.st_mtime_ns}"
