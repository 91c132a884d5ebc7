"""CLIP in transformers' folders: read in PyTorch's or Flax's layout, written in PyTorch's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from seed_jax import model_dir
from seed_jax.interop import diffusers_weights, state_dict
from seed_jax.interop.diffusers_folder import find_weights
from seed_jax.interop.state_dict import ArrayLike, Row, Table
from seed_jax.interop.torch_io import INDEX_SUFFIX, read_weights, write_safetensors
from seed_jax.models import teacher
from seed_jax.models.layers import Compute
from seed_jax.models.teacher import TextTeacher

TORCH_FILE = "model.safetensors"
# In the order in which they are looked for; an index names the files of a model in pieces.
FILES = (
    TORCH_FILE,
    f"{TORCH_FILE}{INDEX_SUFFIX}",
    "model.fp16.safetensors",
    "flax_model.msgpack",
)
# Buffers that older files hold.
IGNORED = ("*.position_ids",)


def save(encoder: TextTeacher, folder: Path) -> None:
    """Writes `text_encoder/` as transformers' PyTorch does: config.json, float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"architectures": ["CLIPTextModel"], "dtype": "float16"}
    config = encoder.config.to_diff_dict() | facts
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    table = Table("a text encoder", diffusers_weights.rows(encoder))
    named = state_dict.lazy_torch(nnx.state(encoder, nnx.Param), table)
    tensors = {key: tensor.astype(np.float16) for key, tensor in named.items()}
    write_safetensors(tensors, folder / TORCH_FILE, metadata={"format": "pt"})


def load_text_encoder(encoder: TextTeacher, path: str) -> None:
    """Replaces the weights by those of a Stable Diffusion directory; see `teacher.locate`.

    Raises:
      UserError: as `load`, or there is no text encoder.
    """
    load(encoder, *teacher.locate(path, "text_encoder"))


def open_text_encoder(path: str, compute: Compute) -> TextTeacher:
    """The text encoder of a Stable Diffusion directory; see `teacher.locate`.

    Raises:
      UserError: there is none, or its files don't fit one another.
    """
    config = teacher.load_config(path)
    encoder = nnx.eval_shape(lambda: TextTeacher(config, compute=compute, rngs=nnx.Rngs(0)))
    load_text_encoder(encoder, path)
    return encoder


def text_encoder_hash(path: str) -> str:
    """The content hash of `open_text_encoder`, in whatever layout its file is."""
    params = nnx.state(open_text_encoder(path, Compute()), nnx.Param)
    return model_dir.content_hash(model_dir.flat_params(params))


def load(module: nnx.Module, folder: str, part: str = "") -> None:
    """Replaces a module's parameters by a folder's, keeping shardings and types.

    Args:
      module: holds the parameters of one of transformers' Flax CLIP models; may be abstract.
      folder: a local directory or hub name; `part` is the subfolder.

    Raises:
      UserError: there are no weights, or with every key that is missing, unexpected or of another
        shape.
    """
    file = find_weights(folder, part, FILES)
    params = nnx.state(module, nnx.Param)
    weights: dict[str, Any]
    if file.suffix == ".msgpack":
        # Under the names that Flax gives them in safetensors.
        weights = {_flax_key(path): v for path, v in diffusers_weights.read_flax(file).items()}
    else:
        weights = dict(read_weights(file))
    loaded = state_dict.load_state(weights, _table(module, weights), params, source=str(file))
    model_dir.replace_params(module, loaded)


def _table(module: nnx.Module, weights: dict[str, ArrayLike]) -> Table:
    """The names of the layout that `weights` are in."""
    rows = diffusers_weights.rows(module)
    if any(key.endswith((".kernel", ".embedding")) for key in weights):
        paths = model_dir.flat_params(nnx.state(module, nnx.Param))
        rows = tuple(Row(_flax_key(path), (path,)) for path in paths)
    return Table("a CLIP of these sizes", rows, ignored=IGNORED)


def _flax_key(path: str) -> str:
    """'params/text_model/encoder/…' -> 'text_model.encoder.…'."""
    return path.partition("/")[2].replace("/", ".")
