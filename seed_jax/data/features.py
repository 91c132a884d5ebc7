"""What frozen networks made of pictures and captions beforehand: its records, and batches of them.

N views of a picture, M different captions among them, Q queries, D Q-Former width, T text states of
width W; b rows of a batch on this host.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
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
from seed_jax.data.pipeline import Drawing
from seed_jax.data.sources import ArrayRecordSource

FORMAT = "seed_jax.tokenize --features 1"
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
    """A picture's; on disk a msgpack map of the same names, arrays as bytes.

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

    def pack(self) -> bytes:
        arrays = {"causal": self.causal.tobytes(), "states": self.states.tobytes()}
        return msgpack.packb({"id": self.id, **arrays, "caption": list(self.caption)})


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
    """The features in a folder, by number; can be pickled."""

    def __init__(self, folder: str | Path):
        """Raises a UserError if the folder is no finished, whole one of features."""
        self.path = str(folder)
        self.settings = read_settings(folder)
        files = prepared.shards(Path(folder), FORMAT) or []
        self._records = ArrayRecordSource(files, path=self.path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Features:
        """The arrays are views of what was read, not copies."""
        record: Any = self._records[index]
        causal = np.frombuffer(record["causal"], np.float16)
        states = np.frombuffer(record["states"], np.float16)
        return Features(
            record["id"],
            causal.reshape(self.settings.views, *self.settings.causal),
            states.reshape(-1, *self.settings.states),
            record["caption"],
        )

    def name(self, index: int) -> str:
        return self._records.name(index)


def train_pipeline(
    source: FeatureSource,
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
        _Readable(source),
        _Join(source.settings),
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


class _Readable:
    def __init__(self, source: FeatureSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Features:
        # Damage shows in many ways.
        try:
            return self.source[index]
        except Exception as error:
            raise UnreadablePicture(f"{self.source.name(index)} ({first_line(error)})") from None


class _Join:
    def __init__(self, settings: Settings):
        self._settings = settings

    def __call__(self, rows: Iterator[Row[Features]], count: int, number: int) -> Batch:
        shapes = train_shapes(self._settings, count)
        batch = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        for place, (index, features, rng) in enumerate(rows):
            view = rng.randrange(len(features.causal))
            batch["index"][place] = index
            batch["causal"][place] = features.causal[view]
            batch["states"][place] = features.states[features.caption[view]]
        return batch
