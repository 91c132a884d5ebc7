"""How many unreadable pictures are too many."""

import math
from collections.abc import Mapping

from seed_jax.cli import UserError
from seed_jax.data.sources import Records

NAMED_IN_ERROR = 3


class Limit:
    """Decides when too many pictures are unreadable."""

    def __init__(self, source: Records, share: float | None, *, rows: int, hosts: int):
        """`rows` is how many a batch has on this host; a share of None allows everything."""
        self._path, self._total = source.path, len(source)
        self._share, self._rows, self._hosts = share, rows, hosts

    def check(self, unreadable: Mapping[int, str], *, batches_read: int) -> None:
        """Raises a UserError if there are more than the share of the pictures read.

        A host meets its part of the pictures in an epoch: what it has read counts as at least that
        part, so that a bad picture among the first doesn't stop the run.
        """
        if self._share is None:
            return
        read = min(self._total, max(self._total / self._hosts, batches_read * self._rows))
        allowed = self._share * read
        if self._hosts > 1:
            # A part is a sample: three standard deviations are chance.
            allowed += 3 * math.sqrt(allowed)
        if len(unreadable) <= allowed and len(unreadable) < self._total:
            return
        names = list(unreadable.values())
        others = f" and {len(names) - NAMED_IN_ERROR} more" if names[NAMED_IN_ERROR:] else ""
        raise UserError(
            f"{self._path}: {len(names)} of {self._total} pictures can't be read "
            f"(max_unreadable is {self._share:g}): {', '.join(names[:NAMED_IN_ERROR])}{others}; "
            "mend or remove them"
        )
