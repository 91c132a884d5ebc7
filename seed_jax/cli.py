"""What every command line shares: a user's mistake costs one line, not a traceback."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import logging


class UserError(Exception):
    """A mistake the user can mend; the message is one line naming the file and what to do."""


def run(main: Callable[[], object]) -> None:
    """Runs `main`; exits 2 with one line on a `UserError`, 130 on Ctrl-C."""
    # Libraries' notes would bury ours, and what they call errors they raise too.
    logging.set_verbosity(logging.FATAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        # It has read the environment. To import it here would slow down all that do without it.
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
    sys.unraisablehook = _tell_unraisable
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _tell_unraisable(what: "sys.UnraisableHookArgs") -> None:
    # Orbax gives up a checkpoint at its first failure; the writes still under way then find no loop
    # to report to.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raises a UserError if there is something at `output` that may not be replaced."""
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; name another --output, or replace it by --overwrite")
