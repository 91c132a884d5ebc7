"""What every command line shares: a user's mistake costs one line, not a traceback."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from seed_jax.files import lack_of_room

# How many of a list an error names.
FEW = 3


class UserError(Exception):
    """A mistake the user can mend; the message is one line naming the file and what to do."""


def run(main: Callable[[], object]) -> None:
    """Runs `main`; exits 2 with one line on a `UserError` or a file's, 130 on Ctrl-C."""
    # Libraries' notes would bury ours, and what they call errors they raise too.
    logging.set_verbosity(logging.FATAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        # It has read the environment. To import it here would slow down all that do without it.
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
    sys.unraisablehook = _tell_unraisable
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold what no encoding has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (told := _of_files(error)):
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def _of_files(error: Exception) -> str:
    """What to tell of an error if it is not ours but the file system's; '' if it isn't."""
    file = getattr(error, "filename", None)
    where = f"{file}: " if file else ""
    if why := lack_of_room(error):
        return f"{where}{why}; make room, and run the same command again"
    return f"{where}{error.strerror}" if file and isinstance(error, OSError) else ""


def _tell_unraisable(what: "sys.UnraisableHookArgs") -> None:
    # Orbax gives up a checkpoint at its first failure; the writes still under way then find no loop
    # to report to.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def few(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raises a UserError if there is something at `output` that may not be replaced.

    With `overwrite`, that is what neither convert nor export wrote: a model directory or a folder
    with the card of one can be made again, others perhaps not.
    """
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists; name another --output, or replace it by --overwrite")
    if not output.is_dir():
        raise UserError(f"{output} is a file; name a folder")
    marks = (("config.json", '"content_hash"'), ("README.md", "seed_jax model with content hash"))
    files = [(output / name, mark) for name, mark in marks if (output / name).is_file()]
    ours = any(mark in file.read_text(errors="replace") for file, mark in files)
    if any(output.iterdir()) and not ours:
        raise UserError(f"{output} holds something else; name another --output, or empty it")
