"""Batches by their number, read ahead by Grain in threads or worker processes.

A training batch is a function of (seed, its number) alone. So the iterator's state is that number,
a run resumes bitwise, and the batches are the same for any number of hosts, worker processes or
threads. This holds for unreadable records too: another one of the same set, drawn from the row's
own generator, takes the row, and no later row moves.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset
from ml_collections import ConfigDict

from seed_jax.cli import UserError
from seed_jax.data import mixture
from seed_jax.data.limit import Limit
from seed_jax.data.sources import Records

Batch = dict[str, np.ndarray]
Put = Callable[[Batch], dict[str, Any]]
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# Batches read ahead by a thread or worker: one waits while the next is made.
READ_AHEAD = 2
MAX_THREADS = 4


class UnreadablePicture(Exception):
    """A picture that can't be decoded, or whose record can't be read; the message says which."""


class Numbered(Protocol):
    """Batches by number, each with the name and reason of what could not be read on the way."""

    limit: Limit

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Batch, dict[int, str]]: ...


class PipelineIterator(Iterator[dict[str, Any]]):
    """Batches, and the pictures that could not be read on the way to them.

    `get_state` and `set_state` go back and forth between batches with what is cached kept; the
    state is JSON-able and good for any number of hosts and workers. `close` (or garbage collection)
    stops threads and workers.
    """

    def __init__(self, batches: Numbered, *, workers: int, put: Put | None = None):
        """`put` makes of a batch what is given, in a thread and up to two batches ahead."""
        self._batches = batches
        self._workers = workers
        self._put = put
        self._number = 0
        self._unreadable: dict[int, str] = {}
        self._iterator: grain.DatasetIterator | None = None

    @property
    def unreadable(self) -> list[str]:
        """Name and reason of each picture met so far that could not be read."""
        return list(self._unreadable.values())

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
          UserError: more pictures than allowed could not be read.
        """
        if self._iterator is None:
            self._iterator = self._start()
        batch, unreadable = next(self._iterator)
        self._number += 1
        self._unreadable.update(unreadable)
        self._batches.limit.check(self._unreadable, batches_read=self._number)
        return batch

    def _start(self) -> grain.DatasetIterator:
        threads = 1 if self._workers else min(MAX_THREADS, usable_processors())
        dataset = grain.MapDataset.source(self._batches).slice(slice(self._number, None))
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD * threads)
        )
        if self._workers:
            # Grain asks absl for flags of its own, which a program without absl.app never parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=READ_AHEAD),
                worker_init_fn=live_and_die_with_parent,
            )
        if (put := self._put) is not None:
            # Not by grain's device_put, which would need the whole batch on every host.
            dataset = dataset.map(lambda read: (put(read[0]), read[1]))
            dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
        return iter(dataset)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator is, after the last batch that it gave."""
        return {"batch": self._number, "unreadable": list(map(list, self._unreadable.items()))}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.close()
        self._number = state["batch"]
        self._unreadable = dict(state["unreadable"])

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class Row(NamedTuple, Generic[R]):
    """What a row of a training batch is made of.

    Attributes:
      number: the record's place in its source.
      rng: whatever is drawn for the row comes from this.
    """

    number: int
    record: R
    rng: Random


class Readable(Protocol[R_co]):
    """What rows of training are made of, by number."""

    @property
    def source(self) -> Records: ...

    def __len__(self) -> int: ...

    def draw(self, index: int, rng: Random) -> R_co:
        """A record, or what the row's generator picks of it; may raise an UnreadablePicture."""


def shuffled(
    records: Readable[R],
    join: Callable[[Iterator[Row[R]], int, int], Batch],
    *,
    batch_size: int,
    data: ConfigDict,
    seed: int,
    rows: Sequence[int] | None = None,
    put: Put | None = None,
) -> PipelineIterator:
    """Batches without end: every epoch all records in another order.

    Args:
      join: makes a batch of its rows, how many these are, and its number; can be pickled.
      batch_size, rows, data, seed, put: as for `train_pipeline`; of data, workers and
        max_unreadable.

    Raises:
      UserError: as `train_pipeline`.
    """
    if len(records) < batch_size:
        path = records.source.path
        raise UserError(
            f"{path} has {len(records)} pictures, fewer than the {batch_size} of a batch; "
            "take a smaller config.batch_size or more pictures"
        )
    batches = _TrainBatches(
        records,
        join,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        seed=seed,
        max_unreadable=data.max_unreadable,
    )
    return PipelineIterator(batches, workers=data.workers, put=put)


def state_of_host(states: Sequence[Mapping[str, Any]], index: int, count: int) -> dict[str, Any]:
    """What host `index` of `count` goes on from, given the states of the hosts there were.

    All are at one batch. Unreadable pictures are dealt out, since each host judges by its share of
    the set whether there are too many.
    """
    unreadable = [picture for state in states[index::count] for picture in state["unreadable"]]
    return {"batch": states[0]["batch"], "unreadable": unreadable}


def usable_processors() -> int:
    """Processors that this process may use, which a cluster's scheduler may have made few."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def live_and_die_with_parent(worker: int = 0, workers: int = 0) -> None:
    """Set-up of a worker process: Ctrl-C is the parent's to act on, and a killed parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _TrainBatches(Generic[R]):
    """This host's rows of any training batch, by its number: a source for Grain."""

    def __init__(
        self,
        records: Readable[R],
        join: Callable[[Iterator[Row[R]], int, int], Batch],
        *,
        batch_size: int,
        rows: Sequence[int],
        seed: int,
        max_unreadable: float,
    ):
        self._records = records
        self._join = join
        self._order = mixture.training_order(records.source, seed)
        self._spans = [one.span for one in mixture.sets_of(records.source)]
        self._batch_size = batch_size
        self._rows = rows
        self._seed = seed
        self.limit = Limit(
            records.source, max_unreadable, rows=len(rows), hosts=batch_size // len(rows)
        )

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, number: int) -> tuple[Batch, dict[int, str]]:
        unreadable: dict[int, str] = {}
        # One after the other, since decoded pictures are larger than what becomes of them.
        rows = (self._read(number * self._batch_size + row, unreadable) for row in self._rows)
        return self._join(rows, len(self._rows), number), unreadable

    def _read(self, position: int, unreadable: dict[int, str]) -> Row[R]:
        rng = Random((self._seed << 64) | position)
        index = int(self._order[position])
        while True:
            try:
                return Row(index, self._records.draw(index, rng), rng)
            except UnreadablePicture as error:
                unreadable[index] = str(error)
            # Too many already: without this, one row would go through a whole set of them.
            self.limit.check(unreadable, batches_read=0)
            span = next(span for span in self._spans if index in span)
            index = rng.randrange(span.start, span.stop)
