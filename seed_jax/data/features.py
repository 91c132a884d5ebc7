"""What frozen networks made of pictures and captions beforehand: its records, and batches of them.

A picture has 2 N records, of msgpack: one of each view, then one of each different caption's text
states, and empty ones as far as captions are fewer than views. A row of training thus reads its
view and that view's caption, and a caption that views share is stored once.

N views of a picture, M different captions among them, Q queries, D Q-Former width, T text states of
width W; b rows of a batch on this host.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgpack
import numpy as np
from ml_collections import ConfigDict

from seed_jax.cli import UserError, first_line
from seed_jax.data import prepared
from seed_jax.data.batches import (
    Batch,
    PipelineIterator,
    Put,
    Row,
    UnreadablePicture,
    shuffled,
)
from seed_jax.data.mixture import Mixture, split_paths
from seed_jax.data.pipeline import Drawing
from seed_jax.data.sources import ArrayRecordSource

FORMAT = "seed_jax.tokenize --features 2"
SUFFIX = ".array_record"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What features were made by; entries of these names in the report of their folder.

    Attributes:
      model, teacher: content hashes of stage 1 and of the text encoder.
      precision: that they ran in.
      seed: of views and captions, drawn as `drawing` says, from the records of `split`.
      causal, states: shapes, [Q, D] and [T, W].
    """

    model: str
    teacher: str
    precision: str
    image_size: int
    views: int
    seed: int
    drawing: Drawing
    split: str
    causal: tuple[int, int]
    states: tuple[int, int]


class Features(NamedTuple):
    """All that is made of a picture.

    Attributes:
      id: the picture's.
      causal: float16 [N, Q, D].
      states: of each different caption, float16 [M, T, W].
      caption: which of `states` each view has, N of them.
    """

    id: str
    causal: np.ndarray
    states: np.ndarray
    caption: Sequence[int]

    def rows(self) -> Iterator[bytes]:
        """The records on disk."""
        for causal, caption in zip(self.causal, self.caption, strict=True):
            view = {"id": self.id, "causal": causal.tobytes(), "caption": caption}
            yield msgpack.packb(view)
        for states in self.states:
            yield msgpack.packb({"states": states.tobytes()})
        yield from [msgpack.packb({})] * (len(self.causal) - len(self.states))


class View(NamedTuple):
    """What a row of training has: causal float16 [Q, D], states float16 [T, W]."""

    causal: np.ndarray
    states: np.ndarray


def read_settings(folder: str | Path) -> Settings:
    """What the report in a folder of features says.

    Raises:
      UserError: there is none, it is of something else, or it can't be read.
    """
    report = prepared.read_report(Path(folder), FORMAT)
    if report is None:
        raise UserError(
            f"{folder}: no {prepared.REPORT} of features there; name a folder that "
            "`seed_jax.tokenize --features` wrote"
        )
    known = {field.name: report[field.name] for field in dataclasses.fields(Settings)}
    drawing = known["drawing"]
    known["drawing"] = Drawing(**{**drawing, "crop_scale": tuple(drawing["crop_scale"])})
    return Settings(**{**known, "causal": tuple(known["causal"]), "states": tuple(known["states"])})


class FeatureSource:
    """The pictures of a folder of features, by number; can be pickled."""

    def __init__(self, folder: str | Path):
        """Raises a UserError if the folder is no finished, whole one of features."""
        self.path = str(folder)
        self.settings = read_settings(folder)
        files = prepared.shards(Path(folder), FORMAT) or []
        self._records = ArrayRecordSource(files, path=self.path)

    def __len__(self) -> int:
        return len(self._records) // (2 * self.settings.views)

    def view(self, index: int, view: int) -> View:
        """One of a picture's. The arrays are views of what was read, not copies."""
        views = self.settings.views
        first = index * 2 * views
        seen: Any = self._records[first + view]
        said: Any = self._records[first + views + seen["caption"]]
        causal = np.frombuffer(seen["causal"], np.float16)
        states = np.frombuffer(said["states"], np.float16)
        return View(causal.reshape(self.settings.causal), states.reshape(self.settings.states))

    def name(self, index: int) -> str:
        return self._records.name(index * 2 * self.settings.views)


def folders(data: ConfigDict) -> list[str]:
    """Those that `data.features` names, split by commas; none where training is from pictures."""
    return split_paths(data.features) if data.get("features") else []


def open_training_set(data: ConfigDict) -> Mixture[FeatureSource]:
    """The features in `folders(data)`, mixed by `data.weights`.

    Raises:
      UserError: as `FeatureSource` and `Mixture`.
    """
    return Mixture([FeatureSource(folder) for folder in folders(data)], data.weights)


def train_pipeline(
    source: Mixture[FeatureSource],
    *,
    batch_size: int,
    data: ConfigDict,
    seed: int,
    rows: Sequence[int] | None = None,
    put: Put | None = None,
) -> PipelineIterator:
    """As `pipeline.train_pipeline`, in the same order, of features instead of pictures and texts.

    A batch is {'index': int32 [b], 'causal': float16 [b, Q, D], 'states': float16 [b, T, W]}. Which
    view a row takes comes from the row's own generator.
    """
    return shuffled(
        _Views(source),
        _Join(source.sets[0].settings),
        batch_size=batch_size,
        data=data,
        seed=seed,
        rows=rows,
        put=put,
    )


def train_shapes(
    settings: Settings, batch_size: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of a batch of `train_pipeline`, by name."""
    return {
        "index": ((batch_size,), np.dtype(np.int32)),
        "causal": ((batch_size, *settings.causal), np.dtype(np.float16)),
        "states": ((batch_size, *settings.states), np.dtype(np.float16)),
    }


class _Views:
    """Of each picture, one view."""

    def __init__(self, source: Mixture[FeatureSource]):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, index: int, rng: Random) -> View:
        number, place = self.source.locate(index)
        features = self.source.sets[number]
        view = rng.randrange(features.settings.views)
        # Damage shows in many ways.
        try:
            return features.view(place, view)
        except Exception as error:
            raise UnreadablePicture(f"{self.source.name(index)} ({first_line(error)})") from None


class _Join:
    def __init__(self, settings: Settings):
        self._settings = settings

    def __call__(self, rows: Iterator[Row[View]], count: int, number: int) -> Batch:
        shapes = train_shapes(self._settings, count)
        batch = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        for place, (index, view, _) in enumerate(rows):
            batch["index"][place] = index
            batch["causal"][place] = view.causal
            batch["states"][place] = view.states
        return batch
