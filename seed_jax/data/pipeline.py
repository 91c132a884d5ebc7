"""Batches of pictures and captions, for training and evaluation.

B rows in a batch of the whole run, b of them on this host, S pixels a side, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from seed_jax.data import transforms
from seed_jax.data.batches import (
    Batch,
    PipelineIterator,
    Put,
    Row,
    UnreadablePicture,
    shuffled,
)
from seed_jax.data.limit import Limit
from seed_jax.data.sources import Record, Source
from seed_jax.data.text import CaptionField, DrawnCaption, TextField, choose_caption

BLANK = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class Drawing:
    """How a picture's view and caption are drawn: the fields of these names in a config's data."""

    crop_scale: tuple[float, ...]
    flip: bool
    max_tags: int
    drop_caption: float

    @classmethod
    def of(cls, data: ConfigDict) -> "Drawing":
        return cls(tuple(data.crop_scale), data.flip, data.max_tags, data.drop_caption)

    def view(self, image: Image.Image, size: int, rng: Random) -> np.ndarray:
        """See `transforms.random_view`."""
        return transforms.random_view(image, size, rng, scale=self.crop_scale, flip=self.flip)

    def caption(self, record: Record, rng: Random) -> str:
        """See `choose_caption`."""
        return choose_caption(record, rng, self.max_tags, drop_caption=self.drop_caption)


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
    return shuffled(
        _Pictures(source, cache=data.cache, decode=image_size > 0),
        _JoinViews(image_size, texts, Drawing.of(data)),
        batch_size=batch_size,
        data=data,
        seed=seed,
        rows=rows,
        put=put,
    )


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
        _Plain(image_size, max_tags, captions=bool(texts)),
        batch_size=batch_size,
        views=1,
        image_size=image_size,
        texts=texts or {},
        max_unreadable=max_unreadable,
    )
    return PipelineIterator(batches, workers=workers)


def view_batches(
    source: Source,
    *,
    batch_size: int,
    views: int,
    image_size: int,
    texts: Mapping[str, TextField],
    drawing: Drawing,
    seed: int,
    first: int = 0,
    workers: int = 0,
) -> PipelineIterator:
    """As `eval_batches`, but so many views of each picture, drawn as in training, side by side.

    View v of a picture, and its caption, are a function of (seed, first + the picture's place, v)
    alone. 'image' and the texts have B · views rows; 'index' and 'valid' B, one a picture.

    Args:
      first: the place of the source's first record in the set that it is a part of.

    Raises:
      UserError: while iterating: a picture has no caption. Any number may be unreadable.
    """
    batches = _EvalBatches(
        _Pictures(source, cache=False, decode=True),
        _Drawn(image_size, drawing, seed, first),
        batch_size=batch_size,
        views=views,
        image_size=image_size,
        texts=texts,
        max_unreadable=None,
    )
    return PipelineIterator(batches, workers=workers)


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

    def draw(self, index: int, rng: Random) -> tuple[Image.Image, Record]:
        return self[index]  # whole, since it may be kept

    def _read(self, index: int) -> tuple[Image.Image, Record] | str:
        # What broken files make decoders raise has no common base.
        try:
            record = self.source[index]
            image = transforms.decode(record["image"]) if self._decode else BLANK
            return image, {**record, "image": b""}
        except Exception as error:
            return f"{self.source.name(index)} ({transforms.why_unreadable(error)})"


class _JoinViews:
    """Rows of pictures to a batch: a view of each, and a caption where texts are wanted."""

    def __init__(self, image_size: int, texts: Mapping[str, CaptionField], drawing: Drawing):
        self._size = image_size
        self._texts = dict(texts)
        self._drawing = drawing

    def __call__(
        self, rows: Iterator[Row[tuple[Image.Image, Record]]], count: int, number: int
    ) -> Batch:
        size = self._size
        images = np.empty((count, size, size, 3), np.uint8)
        indices, drawn = [], []
        for row, (index, (image, record), rng) in enumerate(rows):
            if size:
                images[row] = self._drawing.view(image, size, rng)
            indices.append(index)
            if self._texts:
                drawn.append(DrawnCaption(self._drawing.caption(record, rng), record, rng))
        batch: Batch = {"index": np.array(indices, np.int32)} | ({"image": images} if size else {})
        for name, text in self._texts.items():
            batch |= text.training_rows(name, drawn, number)
        return batch


@dataclass(frozen=True)
class _Plain:
    """The one view of a picture in evaluation, and its first caption where texts are wanted."""

    size: int
    max_tags: int
    captions: bool

    def __call__(
        self, index: int, view: int, image: Image.Image, record: Record
    ) -> tuple[np.ndarray, str]:
        caption = choose_caption(record, None, self.max_tags) if self.captions else ""
        return transforms.resize(image, self.size), caption


@dataclass(frozen=True)
class _Drawn:
    """A view and a caption as training draws them, from a generator of the view's own."""

    size: int
    drawing: Drawing
    seed: int
    first: int

    def __call__(
        self, index: int, view: int, image: Image.Image, record: Record
    ) -> tuple[np.ndarray, str]:
        rng = Random(f"{self.seed}/{self.first + index}/{view}")
        # In the order in which training draws.
        pixels = self.drawing.view(image, self.size, rng)
        return pixels, self.drawing.caption(record, rng)


class _EvalBatches:
    """Any batch of one pass in order, by its number: a source for Grain."""

    def __init__(
        self,
        pictures: _Pictures,
        draw: Callable[[int, int, Image.Image, Record], tuple[np.ndarray, str]],
        *,
        batch_size: int,
        views: int,
        image_size: int,
        texts: Mapping[str, TextField],
        max_unreadable: float | None,
    ):
        self._pictures = pictures
        self._draw = draw
        self._batch_size = batch_size
        self._views = views
        self._image_size = image_size
        self._texts = dict(texts)
        self.limit = Limit(pictures.source, max_unreadable, rows=batch_size, hosts=1)

    def __len__(self) -> int:
        return -(-len(self._pictures) // self._batch_size)

    def __getitem__(self, number: int) -> tuple[Batch, dict[int, str]]:
        size, views = self._image_size, self._views
        batch: Batch = {
            "image": np.zeros((self._batch_size * views, size, size, 3), np.uint8),
            "index": np.full(self._batch_size, -1, np.int32),
            "valid": np.zeros(self._batch_size, bool),
        }
        captions = [""] * len(batch["image"])
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
            batch["valid"][row] = True
            for view in range(views):
                place = row * views + view
                batch["image"][place], captions[place] = self._draw(index, view, image, record)
        for name, text in self._texts.items():
            batch |= text.named_batch(name, captions)
        return batch, unreadable
