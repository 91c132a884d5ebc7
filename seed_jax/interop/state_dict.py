"""Reads and writes the original's state dicts through a table of their keys (`interop.keys`).

A row of a table says which parameter of ours a tensor of the original is. `load` reads a state
dict, `to_torch` writes one; each gives back bit by bit what the other was given.
"""

import dataclasses
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from seed_jax.cli import UserError
from seed_jax.lazy import LazyTensor
from seed_jax.model_dir import flat_params, unflatten_params
from seed_jax.models.vit import interpolate_positions

M = TypeVar("M", bound=nnx.Module)
Shape = tuple[int, ...]
# What errors call a state dict that comes from no named file.
SOURCE = "the state dict"


class ArrayLike(Protocol):
    """Arrays of numpy, jax and torch, and tensors that are still on disk."""

    @property
    def shape(self) -> Any: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of the original lies beside ours: dims in another order, then another shape.

    Attributes:
      shape: the original's shape, from ours.
      order: the original's dims in the order that ours come in; None where they agree.
    """

    shape: Callable[[Shape], Shape]
    order: tuple[int, ...] | None = None

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return (tensor if self.order is None else tensor.transpose(self.order)).reshape(shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        shape = self.shape(array.shape)
        if self.order is None:
            return array.reshape(shape)
        moved = array.reshape([shape[dim] for dim in self.order])
        return moved.transpose(np.argsort(self.order))


SAME = Layout(lambda s: s)
LINEAR = Layout(lambda s: s[::-1], (1, 0))
# [D, 3, N, H] <-> rows of queries, then keys, then values, each head by head.
QKV = Layout(lambda s: (math.prod(s[1:]), s[0]), (1, 0))
HEADS = Layout(lambda s: (math.prod(s),))
LEADING_ONE = Layout(lambda s: (1, *s))
# [P * P * 3, D] <-> a convolution [D, 3, P, P].
PATCHES = Layout(lambda s: (s[1], 3, *[math.isqrt(s[0] // 3)] * 2), (2, 3, 1, 0))


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of the original, or one in each of several layers.

    Attributes:
      torch: its key, in which `{i}` stands for the number of the layer.
      ours: our parameter; several where the original has fused them along its first dim, None
        among them for a part that we have no use for, written as zeros.
      layers: the numbers that `{i}` takes, in the order of our leading dim.
      grid: position embeddings, which can be brought to another grid.
    """

    torch: str
    ours: tuple[str | None, ...]
    layout: Layout = SAME
    layers: range | None = None
    grid: bool = False

    def paths(self) -> list[str]:
        """Our parameters."""
        return [path for path in self.ours if path is not None]

    def torch_keys(self) -> list[str]:
        if self.layers is None:
            return [self.torch]
        return [self.torch.format(i=i) for i in self.layers]

    def shape(self, params: Mapping[str, Any]) -> Shape:
        """The original's shape, from those of our parameters."""
        ours = tuple(params[self.paths()[0]].shape)
        shape = self.layout.shape(ours if self.layers is None else ours[1:])
        return shape if len(self.ours) == 1 else (len(self.ours) * shape[0], *shape[1:])


@dataclasses.dataclass(frozen=True)
class Table:
    """What a model's state dict holds.

    Attributes:
      name: for messages.
      constants: buffers that carry no weights: written, and not missed when absent.
      ignored: patterns of keys that our model has no use for.
    """

    name: str
    rows: tuple[Row, ...]
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def key_shapes(table: Table, params: nnx.State) -> dict[str, Shape]:
    """Every key of the original and its shape; `params` may be abstract."""
    flat = flat_params(params)
    shapes = {key: row.shape(flat) for row in table.rows for key in row.torch_keys()}
    return shapes | {key: value.shape for key, value in table.constants.items()}


def load(
    weights: Mapping[str, ArrayLike],
    table: Table,
    module: M,
    *,
    source: str = SOURCE,
    resize_positions: bool = False,
) -> M:
    """A module with the original's weights, cast to its parameters' types; see `load_state`.

    Args:
      module: of the sizes that `table` was made for; an abstract one (`nnx.eval_shape`) will do.
    """
    graphdef, params = nnx.split(module)
    loaded = load_state(weights, table, params, source=source, resize_positions=resize_positions)
    return nnx.merge(graphdef, loaded)


def load_state(
    weights: Mapping[str, ArrayLike],
    table: Table,
    params: nnx.State,
    *,
    source: str = SOURCE,
    resize_positions: bool = False,
) -> nnx.State:
    """The original's weights as the state of a module or of a part of it.

    Reads one tensor at a time, straight into our stacked arrays: at its peak, memory holds our
    parameters and one tensor.

    Args:
      weights: such as `torch_io.read_weights` returns.
      params: says shapes and types; arrays or abstract ones.
      source: what to call `weights` in an error.
      resize_positions: bring the ViT's position embeddings to this module's grid if they have
        another.

    Raises:
      UserError: with every key that is missing, unexpected, or of another shape.
    """
    flat = flat_params(params)
    check(weights, table, params, source=source, resize_positions=resize_positions)
    loaded: dict[str, jax.Array] = {}
    # Only where it takes long, on a terminal.
    for row in tqdm(table.rows, desc=source, delay=1, leave=False, disable=None):
        arrays = {path: _aligned(flat[path].shape, flat[path].dtype) for path in row.paths()}
        for layer, key in enumerate(row.torch_keys()):
            tensor = np.asarray(weights[key])
            if row.grid and tensor.shape != row.shape(flat):
                tensor = _resize(tensor, row.shape(flat))
            parts = np.split(tensor, len(row.ours)) if len(row.ours) > 1 else [tensor]
            for path, part in zip(row.ours, parts, strict=True):
                if path is not None:
                    target = arrays[path] if row.layers is None else arrays[path][layer]
                    target[...] = row.layout.to_ours(part, target.shape)
        loaded |= {path: jax.device_put(array) for path, array in arrays.items()}
    return unflatten_params(params, loaded)


def to_torch(params: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """The original's state dict of our parameters (or of their gradients), contiguous arrays."""
    return {key: np.asarray(tensor) for key, tensor in lazy_torch(params, table).items()}


def lazy_torch(params: nnx.State | Mapping[str, Any], table: Table) -> dict[str, LazyTensor]:
    """As `to_torch`, but each tensor is made when it is asked for, to be written and let go.

    Those of a row follow one another, so that parameters can be read one at a time.

    Args:
      params: a state, or what `model_dir.lazy_params` finds.
    """
    flat: Mapping[str, Any] = flat_params(params) if isinstance(params, nnx.State) else params

    def make(row: Row, layer: int) -> np.ndarray:
        parts = {}
        for path in row.paths():
            # On a CPU, numpy looks at JAX's memory and copies nothing.
            array = np.asarray(flat[path])
            parts[path] = row.layout.to_torch(array if row.layers is None else array[layer])
        if len(row.ours) == 1:
            return np.asarray(parts[row.paths()[0]], order="C")
        zeros = np.zeros_like(parts[row.paths()[0]])
        return np.concatenate([zeros if path is None else parts[path] for path in row.ours])

    tensors = {
        key: LazyTensor(row.shape(flat), flat[row.paths()[0]].dtype, partial(make, row, layer))
        for row in table.rows
        for layer, key in enumerate(row.torch_keys())
    }
    return tensors | {
        key: LazyTensor(value.shape, value.dtype, value.copy)
        for key, value in table.constants.items()
    }


def check(
    weights: Mapping[str, ArrayLike],
    table: Table,
    params: nnx.State,
    *,
    source: str,
    resize_positions: bool = False,
) -> None:
    """Raises the error that `load` documents; reads no tensor."""
    flat = flat_params(params)
    uncovered = flat.keys() - {path for row in table.rows for path in row.ours}
    if uncovered:
        raise ValueError(f"the table {table.name} lacks {sorted(uncovered)}")
    expected = {key: (row, row.shape(flat)) for row in table.rows for key in row.torch_keys()}
    missing = [key for key in expected if key not in weights]
    unexpected = [
        key
        for key in weights
        if key not in expected and key not in table.constants and not matches(key, table.ignored)
    ]
    misshapen: dict[tuple[Shape, Shape], list[str]] = defaultdict(list)
    for key, (row, shape) in expected.items():
        if key not in weights:
            continue
        found = tuple(weights[key].shape)
        resized = row.grid and resize_positions and _same_but_grid(found, shape)
        if found != shape and not resized:
            misshapen[found, shape].append(key)
    problems = []
    if missing:
        problems.append(f"missing: {brief(missing)}")
    if unexpected:
        problems.append(f"unexpected: {brief(unexpected)}")
    if misshapen:
        wrong = (
            f"{brief(keys)} {_times(found)}, not {_times(shape)}"
            for (found, shape), keys in misshapen.items()
        )
        problems.append(f"of another shape: {'; '.join(wrong)}")
    if problems:
        raise UserError(f"{source} does not fit {table.name}: {' | '.join(problems)}")


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key is one of those that patterns such as 'head.*' stand for."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _aligned(shape: Shape, dtype: Any) -> np.ndarray:
    """An empty array that JAX on a CPU takes over as it is, instead of copying it."""
    alignment = 64
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _resize(tensor: np.ndarray, shape: Shape) -> np.ndarray:
    return np.asarray(interpolate_positions(jnp.asarray(tensor[0], jnp.float32), shape[1]))[None]


def _same_but_grid(found: Shape, shape: Shape) -> bool:
    if len(found) != 3 or (found[0], found[2]) != (shape[0], shape[2]) or found[1] < 2:
        return False
    return math.isqrt(found[1] - 1) ** 2 == found[1] - 1


def brief(keys: Iterable[str]) -> str:
    """Keys in a line, those that differ in the first number alone as one: `blocks.{0..38}.norm`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for key in keys:
        number = re.search(r"(?<=\.)\d+(?=\.)", key)
        if number is None:
            groups[key] = []
        else:
            groups[key[: number.start()] + "{}" + key[number.end() :]].append(int(number[0]))
    return ", ".join(key.replace("{}", _numbers(numbers)) for key, numbers in groups.items())


def _numbers(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    consecutive = numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else False
    inside = f"{numbers[0]}..{numbers[-1]}" if consecutive else ",".join(map(str, numbers))
    return "{" + inside + "}"


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"
