"""Files and folders, there whole or not at all; whether they still are, or found no room."""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_of(file: Path) -> Path:
    """Where this process, and no other, writes what will take a file's place."""
    return file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}.partial")


def replace_text(file: Path, text: str) -> None:
    """Writes a file anew such that a reader, or a kill, finds the old text or the new one."""
    partial = partial_of(file)
    partial.write_text(text)
    partial.replace(file)


def claim_text(file: Path, text: str) -> None:
    """Writes a file if there is none; of several processes at once, the first one's text stays."""
    partial = partial_of(file)
    partial.write_text(text)
    try:
        os.link(partial, file)
    except FileExistsError:
        pass
    except OSError:  # no links on this file system
        if not file.exists():
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the place of `path` if the block ends well."""
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def wrong_sizes(folder: Path, listed: dict[str, int]) -> Iterator[str]:
    """Says of each listed file that is missing or of another size what is wrong with it."""
    for name, size in listed.items():
        file = folder / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != size:
            yield f"{file} has {file.stat().st_size} bytes where {size} were written"


def lack_of_room(error: BaseException | None) -> str | None:
    """Says in the system's words that the disk is full, if that is what lies behind an error."""
    while error is not None:
        for number in NO_ROOM:
            # What writes checkpoints raises errors of its own that quote the system's.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
