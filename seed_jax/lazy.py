"""Tensors that are made or read when they are asked for, so that few are in memory at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made, or read, each time it is asked for: `np.asarray` does so.

    Attributes:
      shape, dtype: known before.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """See numpy's array protocol."""
        return np.array(self.read(), dtype=dtype, copy=copy)

    def astype(self, dtype: Any) -> "LazyTensor":
        return LazyTensor(self.shape, np.dtype(dtype), lambda: self.read().astype(dtype))
