"""Batches for training and evaluation, read ahead by Grain in threads or worker processes.

B rows in a batch of the whole run, b of them on this host, S pixels a side, T tokens.

A training batch is a function of (seed, its number) alone. So the iterator's state is that number,
a run resumes bitwise, and the batches are the same for any number of hosts, worker processes or
threads. This holds for unreadable pictures too: another one of the same set, drawn from the row's
own generator, takes the row, and no later row moves.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset
from ml_collections import ConfigDict
from PIL import Image

from seed_jax.cli import UserError
from seed_jax.data import mixture, transforms
from seed_jax.data.limit import Limit
from seed_jax.data.sources import Record, Source
from seed_jax.data.text import CaptionField, DrawnCaption, TextField, choose_caption

Batch = dict[str, np.ndarray]
Put = Callable[[Batch], dict[str, Any]]

# Batches read ahead by a thread or worker: one waits while the next is made.
READ_AHEAD = 2
MAX_THREADS = 4
BLANK = Image.new("RGB", (1, 1))


class UnreadablePicture(Exception):
    """A picture that can't be decoded, or whose record can't be read; the message says which."""


class PipelineIterator(Iterator[dict[str, Any]]):
    """Batches, and the pictures that could not be read on the way to them.

    `get_state` and `set_state` go back and forth between batches with what is cached kept; the
    state is JSON-able and good for any number of hosts and workers. `close` (or garbage collection)
    stops threads and workers.
    """

    def __init__(
        self, batches: "_TrainBatches | _EvalBatches", *, workers: int, put: Put | None = None
    ):
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
        threads = 1 if self._workers else min(MAX_THREADS, os.cpu_count() or 1)
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


def train_pipeline(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    texts: Mapping[str, CaptionField],
    data: ConfigDict,
    seed: int,
    rows: Sequence[int] | None = None,
    put: Put | None = None,
) -> PipelineIterator:
    """Batches without end: every epoch all pictures in another order, cropped and mirrored anew.

    A `Mixture` with weights has epochs of each set, side by side.

    A batch is {'image': uint8 [b, S, S, 3], 'index': int32 [b], the record's place in the source,
    and what each text makes of the captions, such as '<name>': int32 [b, T], '<name>_mask': bool
    [b, T]}.

    Args:
      batch_size: rows of all hosts together.
      rows: those of them that this host gets, b of them; None: all.
      image_size: S; 0 reads no pictures, and leaves 'image' out.
      put: takes a batch to the devices, say, in a thread and while those before it are used; what
        it makes of a batch is given instead. A batch counts in the state once it is given.
      data: cache, workers, max_tags, drop_caption, crop_scale, flip and max_unreadable, as in the
        configs.

    Raises:
      UserError: the source is smaller than a batch. While iterating: more than `max_unreadable` of
        the pictures can't be read, or one has no caption where a text is wanted.
    """
    if len(source) < batch_size:
        raise UserError(
            f"{source.path} has {len(source)} pictures, fewer than the {batch_size} of a batch; "
            "take a smaller config.batch_size or more pictures"
        )
    batches = _TrainBatches(
        _Pictures(source, cache=data.cache, decode=image_size > 0),
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        image_size=image_size,
        texts=texts,
        data=data,
        seed=seed,
    )
    return PipelineIterator(batches, workers=data.workers, put=put)


def train_shapes(
    *, batch_size: int, image_size: int, texts: Mapping[str, CaptionField]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of a batch of `train_pipeline`, by name, without any data."""
    record: Record = {"id": "", "image": b"", "captions": [""]}
    drawn = [DrawnCaption("", record, Random(0))] * batch_size
    batch: Batch = {"index": np.zeros(batch_size, np.int32)}
    for name, text in texts.items():
        batch |= text.training_rows(name, drawn, 0)
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
    if image_size:
        shapes["image"] = ((batch_size, image_size, image_size, 3), np.dtype(np.uint8))
    return shapes


def state_of_host(states: Sequence[Mapping[str, Any]], index: int, count: int) -> dict[str, Any]:
    """What host `index` of `count` goes on from, given the states of the hosts there were.

    All are at one batch. Unreadable pictures are dealt out, since each host judges by its share of
    the set whether there are too many.
    """
    unreadable = [picture for state in states[index::count] for picture in state["unreadable"]]
    return {"batch": states[0]["batch"], "unreadable": unreadable}


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    texts: Mapping[str, TextField] | None = None,
    max_tags: int = 0,
    workers: int = 0,
    max_unreadable: float | None = 0.01,
) -> PipelineIterator:
    """Every picture once, in the source's order, resized as the original does.

    A batch is {'image': uint8 [B, S, S, 3], 'index': int32 [B], 'valid': bool [B]} and the texts as
    in `train_pipeline`, of each first caption. Rows that are not valid pad the last batch, with
    index -1, or stand for a picture that can't be read, anywhere.

    Args:
      max_unreadable: the share of unreadable pictures that is accepted, if some can be read; None
        goes on whatever happens and leaves it to the caller to look at `unreadable`.

    Raises:
      UserError: while iterating, as `train_pipeline`.
    """
    batches = _EvalBatches(
        _Pictures(source, cache=False, decode=True),
        batch_size=batch_size,
        image_size=image_size,
        texts=texts or {},
        max_tags=max_tags,
        max_unreadable=max_unreadable,
    )
    return PipelineIterator(batches, workers=workers)


def live_and_die_with_parent(worker: int = 0, workers: int = 0) -> None:
    """Set-up of a worker process: Ctrl-C is the parent's to act on, and a killed parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _Pictures:
    """Decoded pictures with the rest of their records, kept in memory if `cache`."""

    def __init__(self, source: Source, *, cache: bool, decode: bool):
        """Without `decode`, a blank stands for each picture."""
        self.source = source
        self._decode = decode
        # What an unreadable picture leaves here is its message.
        self._cache: dict[int, tuple[Image.Image, Record] | str] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, Record]:
        """Raises UnreadablePicture."""
        if self._cache is not None and index in self._cache:
            found = self._cache[index]
        else:
            found = self._read(index)
            if self._cache is not None:
                self._cache[index] = found
        if isinstance(found, str):
            raise UnreadablePicture(found)
        return found

    def _read(self, index: int) -> tuple[Image.Image, Record] | str:
        # What broken files make decoders raise has no common base.
        try:
            record = self.source[index]
            image = transforms.decode(record["image"]) if self._decode else BLANK
            return image, {**record, "image": b""}
        except Exception as error:
            return f"{self.source.name(index)} ({transforms.why_unreadable(error)})"


class _TrainBatches:
    """This host's rows of any training batch, by its number: a source for Grain."""

    def __init__(
        self,
        pictures: _Pictures,
        *,
        batch_size: int,
        rows: Sequence[int],
        image_size: int,
        texts: Mapping[str, CaptionField],
        data: ConfigDict,
        seed: int,
    ):
        self._pictures = pictures
        self._order = mixture.training_order(pictures.source, seed)
        self._spans = [one.span for one in mixture.sets_of(pictures.source)]
        self._batch_size = batch_size
        self._rows = rows
        self._image_size = image_size
        self._texts = dict(texts)
        self._max_tags = data.max_tags
        self._drop_caption = data.drop_caption
        self._scale = tuple(data.crop_scale)
        self._flip = data.flip
        self._seed = seed
        self.limit = Limit(
            pictures.source, data.max_unreadable, rows=len(rows), hosts=batch_size // len(rows)
        )

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, number: int) -> tuple[Batch, dict[int, str]]:
        size = self._image_size
        images = np.empty((len(self._rows), size, size, 3), np.uint8)
        indices, drawn = [], []
        unreadable: dict[int, str] = {}
        for row, place in enumerate(self._rows):
            position = number * self._batch_size + place
            rng = Random((self._seed << 64) | position)
            index, image, record = self._read(position, rng, unreadable)
            if size:
                images[row] = transforms.random_view(
                    image, size, rng, scale=self._scale, flip=self._flip
                )
            indices.append(index)
            if self._texts:
                caption = choose_caption(
                    record, rng, self._max_tags, drop_caption=self._drop_caption
                )
                drawn.append(DrawnCaption(caption, record, rng))
        batch: Batch = {"index": np.array(indices, np.int32)} | ({"image": images} if size else {})
        for name, text in self._texts.items():
            batch |= text.training_rows(name, drawn, number)
        return batch, unreadable

    def _read(
        self, position: int, rng: Random, unreadable: dict[int, str]
    ) -> tuple[int, Image.Image, Record]:
        index = int(self._order[position])
        while True:
            try:
                return index, *self._pictures[index]
            except UnreadablePicture as error:
                unreadable[index] = str(error)
            # Too many already: without this, one row would go through a whole set of them.
            self.limit.check(unreadable, batches_read=0)
            span = next(span for span in self._spans if index in span)
            index = rng.randrange(span.start, span.stop)


class _EvalBatches:
    """Any batch of one pass in order, by its number: a source for Grain."""

    def __init__(
        self,
        pictures: _Pictures,
        *,
        batch_size: int,
        image_size: int,
        texts: Mapping[str, TextField],
        max_tags: int,
        max_unreadable: float | None,
    ):
        self._pictures = pictures
        self._batch_size = batch_size
        self._image_size = image_size
        self._texts = dict(texts)
        self._max_tags = max_tags
        self.limit = Limit(pictures.source, max_unreadable, rows=batch_size, hosts=1)

    def __len__(self) -> int:
        return -(-len(self._pictures) // self._batch_size)

    def __getitem__(self, number: int) -> tuple[Batch, dict[int, str]]:
        size = self._image_size
        batch: Batch = {
            "image": np.zeros((self._batch_size, size, size, 3), np.uint8),
            "index": np.full(self._batch_size, -1, np.int32),
            "valid": np.zeros(self._batch_size, bool),
        }
        captions = [""] * self._batch_size
        unreadable: dict[int, str] = {}
        start = number * self._batch_size
        for row, index in enumerate(
            range(start, min(start + self._batch_size, len(self._pictures)))
        ):
            batch["index"][row] = index
            try:
                image, record = self._pictures[index]
            except UnreadablePicture as error:
                unreadable[index] = str(error)
                continue
            batch["image"][row] = transforms.resize(image, size)
            batch["valid"][row] = True
            if self._texts:
                captions[row] = choose_caption(record, None, self._max_tags)
        for name, text in self._texts.items():
            batch |= text.named_batch(name, captions)
        return batch, unreadable
