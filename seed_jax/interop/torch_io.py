"""Reads files of PyTorch weights, one tensor at a time, and writes them.

The only module of the package that imports torch.
"""

import ctypes
import dataclasses
import json
import math
import mmap
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from tqdm import tqdm

from seed_jax.cli import UserError
from seed_jax.files import sha256
from seed_jax.lazy import LazyTensor

# What published checkpoints wrap their state dict in.
WRAPPERS = ("model", "state_dict")
# How the name of a file ends that says which files hold the tensors of a large model.
INDEX_SUFFIX = ".index.json"
# As PyTorch's hub names its files.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")

# Safetensors' names of types.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A tensor in a file.

    Attributes:
      file: where it is.
    """

    file: Path


def read_weights(paths: str | Path | Iterable[str | Path]) -> dict[str, StoredTensor]:
    """The tensors of one or more files by name; nothing is read before it is asked for.

    Args:
      paths: `.safetensors` files, or `.pth`, `.pt` and `.bin` files of `torch.save`, whose state
        dict may lie under 'model' or 'state_dict'; an `.index.json` stands for the files that it
        names. Where two files hold the same name, the later one wins, as when the original loads
        one after the other.

    Returns:
      float16 and bfloat16 tensors keep their types.

    Raises:
      UserError: a file is missing, damaged, of an unknown kind, or would run code; or torch, which
        only files of `torch.save` need, is not installed.
    """
    weights: dict[str, StoredTensor] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        indexed = path.is_file() and path.name.endswith(INDEX_SUFFIX)
        files = [path.with_name(name) for name in indexed_files(path)] if indexed else [path]
        for file in files:
            if indexed and not file.is_file():
                raise UserError(f"{file} is missing, which {path} names; download the rest")
            weights |= _read_file(file)
    return weights


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an `.index.json` of transformers or diffusers lists.

    Raises:
      UserError: it is not an index of weights.
    """
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of weights") from None


def check_named_hash(path: Path) -> None:
    """Holds a file to the SHA-256 whose beginning is in its name, as in 'vgg16-397923af.pth'.

    Raises:
      UserError: it is another file, or damaged.
    """
    named = HASH_IN_NAME.search(path.name)
    if named is None or not path.is_file():
        return
    found = sha256(path)
    if not found.startswith(named[1]):
        raise UserError(
            f"{path} is not what its name says: its SHA-256 begins with {found[: len(named[1])]}, "
            f"not {named[1]}; download it again"
        )


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise UserError(f"{path} is not a file; name the weights to read")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_torch(path)
    raise UserError(f"{path} is neither .safetensors nor .pth, .pt or .bin")


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        # Read, not mapped: mapped pages would count as ours and stay.
        file = safetensors.safe_open(path, framework="np", backend="pread")
        found = {}
        for key in file.keys():  # noqa: SIM118  # not a dict: it has no other way to iterate
            facts = file.get_slice(key)
            shape, name = tuple(facts.get_shape()), facts.get_dtype()
            if name not in DTYPES:
                raise UserError(f"{path}: {key} is of type {name}, which is not read")
            found[key] = StoredTensor(shape, DTYPES[name], partial(file.get_tensor, key), path)
        return found
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> dict[str, StoredTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch file, which takes torch to read: pip install torch, or give the "
            "weights as .safetensors"
        ) from None
    try:
        with warnings.catch_warnings():
            # It warns of pickles that torch did not write, which it then refuses.
            warnings.simplefilter("ignore")
            mapped = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it holds more than tensors, and reading it could run code "
            f"({_refusal(error)}); save its state dict alone"
        ) from error
    except Exception as error:  # whatever the unpickler makes of bytes that are none of its own
        raise _damaged(path, error) from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    strangers = [key for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise UserError(f"{path} holds entries that are no tensors: {', '.join(strangers)}")

    def numpy(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def read(tensor: Any) -> np.ndarray:
        array = numpy(tensor)
        if mapped:
            array = array.copy()
            _let_go(tensor.untyped_storage())
        return array

    return {
        # The type of an empty tensor, since to make one of all is to read it.
        key: StoredTensor(tuple(v.shape), numpy(v.new_empty(0)).dtype, partial(read, v), path)
        for key, v in loaded.items()
    }


def _let_go(storage: Any) -> None:
    """Gives back the memory that a mapped storage took when it was read; the file still has it."""
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    length = storage.data_ptr() + storage.nbytes() - start
    if length >= page and sys.platform == "linux":
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length // page * page), mmap.MADV_DONTNEED
        )


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is damaged or cut short; download it again ({reason})")


def _refusal(error: Exception) -> str:
    """The line of torch's long message that says what the file asked for."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "GLOBAL" in line or line.startswith("Unsupported")]
    return told[0].split(". ")[0].rstrip(".") if told else "not a plain state dict"


def write_safetensors(
    tensors: Mapping[str, LazyTensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a `.safetensors` file one tensor at a time.

    The library's own writer wants all tensors in memory, and copies them once more.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide types first, which aligns all, as readers expect; else as given.
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        tensor = tensors[key]
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for key in tqdm(order, desc=path.name, delay=1, leave=False, disable=None):
            array = np.ascontiguousarray(tensors[key])
            file.write(array.reshape(-1).view(np.uint8).data)


def write_torch(tensors: Mapping[str, LazyTensor], path: Path) -> None:
    """Writes a state dict by `torch.save`, which takes memory for all of it.

    Raises:
      UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} takes torch to write: pip install torch, or take the .safetensors file"
        ) from None
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, path)
