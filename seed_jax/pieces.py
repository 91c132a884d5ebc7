"""Work in pieces, each kept when it is done, so that an interrupted run goes on where it was."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from seed_jax.files import replace_text

SETTINGS = "settings.txt"

Arrays = dict[str, np.ndarray]


class Pieces:
    """Arrays by name, in a folder, each piece in a file that is there whole or not at all."""

    def __init__(self, folder: Path | None = None, fingerprint: str = "", *, anew: bool = False):
        """Pieces that were made with other settings go.

        Args:
          folder: None keeps nothing.
          fingerprint: of all settings that pieces depend on.
          anew: those of the same settings go, too.
        """
        self._folder = folder
        if folder is None:
            return
        note = folder / SETTINGS
        if not anew and note.is_file() and note.read_text() == fingerprint:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.npz"):
            file.unlink()
        replace_text(note, fingerprint)

    def __call__(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What is kept under a name, or what `make` returns, which is kept then."""
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.npz"
        try:
            with np.load(file) as kept:
                return dict(kept)
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            print(f"{file} is damaged, and is made anew")
        arrays = make()
        partial = file.with_suffix(".partial")
        with partial.open("wb") as opened:
            np.savez(opened, allow_pickle=False, **arrays)
        partial.replace(file)
        return arrays


KEEPS_NOTHING = Pieces()


def join(pieces: Sequence[Arrays]) -> Arrays:
    """Pieces with the same names, one after the other."""
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def below(arrays: Arrays, group: str) -> Arrays:
    """The arrays named 'group/…', by what follows."""
    prefix = f"{group}/"
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
