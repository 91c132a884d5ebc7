"""How many unreadable pictures are too many."""

import math
from collections.abc import Mapping
from typing import NoReturn

from seed_jax.cli import UserError, few
from seed_jax.data.mixture import MixedSet, sets_of
from seed_jax.data.sources import Records


class Limit:
    """Decides when too many pictures of a set are unreadable."""

    def __init__(self, source: Records, share: float | None, *, rows: int, hosts: int):
        """`rows` is how many a batch has on this host; a share of None allows everything."""
        self._sets = sets_of(source)
        self._share, self._rows, self._hosts = share, rows, hosts

    def check(self, unreadable: Mapping[int, str], *, batches_read: int) -> None:
        """Raises a UserError if there are more than the share of the pictures read of some set.

        A host meets its part of the pictures in an epoch: what it has read counts as at least that
        part, so that a bad picture among the first doesn't stop the run.
        """
        if self._share is None:
            return
        for one in self._sets:
            names = [name for index, name in unreadable.items() if index in one.span]
            if len(names) > self._allowed(one, self._share, batches_read):
                self._stop(one, names)

    def _allowed(self, one: MixedSet, share: float, batches_read: int) -> float:
        total = len(one.span)
        read = min(total, max(total / self._hosts, batches_read * self._rows * one.share))
        allowed = share * read
        if self._hosts > 1:
            # A part is a sample: three standard deviations are chance.
            allowed += 3 * math.sqrt(allowed)
        return min(allowed, total - 1)

    def _stop(self, one: MixedSet, names: list[str]) -> NoReturn:
        raise UserError(
            f"{one.path}: {len(names)} of {len(one.span)} pictures can't be read "
            f"(max_unreadable is {self._share:g}): {few(names)}; mend or remove them"
        )
