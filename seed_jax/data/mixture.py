"""Several sets trained on at once, and the order in which training sees records.

The order is a function of (seed, position) alone. A record's index is its place among those of all
sets, one set after the other.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import grain
from ml_collections import ConfigDict

from seed_jax.cli import UserError
from seed_jax.data.sources import Record, Records, Source, open_source

# Grain rounds weights to whole hundredths of the smallest: done here, it is known what they became.
HUNDREDTHS = 100

S = TypeVar("S", bound=Records)


class Mixture(Generic[S]):
    """Several sets as one."""

    def __init__(self, sets: Sequence[S], weights: Sequence[float] = ()):
        """`weights` tell how many rows of training come from each set; none: as many as it has.

        Raises:
          UserError: they aren't a number above 0 for each set.
        """
        self.path = ",".join(one.path for one in sets)
        self.sets = tuple(sets)
        self._ends = list(accumulate(map(len, sets)))
        if weights and len(weights) != len(sets):
            raise UserError(
                f"config.data.weights has {len(weights)} numbers for {len(sets)} sets of training "
                f"data ({self.path}); give a number for each, or () to mix by size"
            )
        if not all(isinstance(w, int | float) and 0 < w < math.inf for w in weights):
            raise UserError(
                f"config.data.weights is {tuple(weights)}; each of them must be a number above 0"
            )
        self.weights = tuple(round(HUNDREDTHS * w / min(weights)) for w in weights)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of a record's set, and its place there."""
        number = bisect_right(self._ends, index)
        return number, index - self.span(number).start

    def span(self, number: int) -> range:
        """The indices of a set."""
        return range(self._ends[number] - len(self.sets[number]), self._ends[number])

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        number, place = self.locate(index)
        return f"{self.sets[number].name(place)} of {self.sets[number].path}"


class PictureMixture(Mixture[Source]):
    """A source of several; each record says in "set" which one it is from."""

    def __getitem__(self, index: int) -> Record:
        number, place = self.locate(index)
        return {**self.sets[number][place], "set": number}


class MixedSet(NamedTuple):
    """One of the sets that training goes through."""

    path: str
    span: range  # its records' indices
    share: float  # of the rows of training


def open_training_set(data: ConfigDict) -> Source:
    """The set that `path` names, or a mixture of those it names, split by commas.

    Args:
      data: path, split (applies to each set) and weights, as in the configs.

    Raises:
      UserError: as `open_source` and `Mixture`.
    """
    sets = [open_source(path, data.split) for path in split_paths(data.path)]
    mixture = PictureMixture(sets, data.weights)
    return mixture if len(sets) > 1 else sets[0]


def split_paths(paths: str) -> list[str]:
    """Paths that commas split; what exists as it stands is one path, commas or not."""
    # os.path rather than pathlib, which raises where a name is too long to exist.
    return [paths] if os.path.exists(paths) else paths.split(",")


def sets_of(source: Records) -> list[MixedSet]:
    """What a source is mixed of: itself alone, if it is no mixture."""
    if not isinstance(source, Mixture):
        return [MixedSet(source.path, range(len(source)), 1.0)]
    rows = source.weights or [len(one) for one in source.sets]
    return [
        MixedSet(one.path, source.span(number), rows[number] / sum(rows))
        for number, one in enumerate(source.sets)
    ]


def training_order(source: Records, seed: int) -> grain.MapDataset:
    """Indices of records by position, without end: every epoch another permutation.

    With weights, sets take turns evenly, each with epochs of its own; without, all records are one
    set. Nothing is listed, and so it takes no time or memory for any number of records.
    """
    weights = source.weights if isinstance(source, Mixture) else ()
    # Sets of one size would otherwise go through one permutation side by side.
    spans = [one.span for one in sets_of(source)] if weights else [range(len(source))]
    orders = [
        grain.MapDataset.range(span.start, span.stop).seed(seed + number).shuffle().repeat()
        for number, span in enumerate(spans)
    ]
    return grain.MapDataset.mix(orders, weights) if weights else orders[0]


def rows_of_a_pass(source: Source) -> int:
    """In how many rows from the start training sees every record."""
    if not isinstance(source, Mixture) or not source.weights:
        return len(source)
    # Grain's turns are up to a row behind the weights.
    total = sum(source.weights)
    return max(
        -(-(len(one) + 1) * total // weight)
        for one, weight in zip(source.sets, source.weights, strict=True)
    )
