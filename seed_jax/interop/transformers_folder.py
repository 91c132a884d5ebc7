"""Folders as transformers saves models: `config.json` and weights, which may be in pieces."""

import json
from pathlib import Path
from typing import Any

from seed_jax.cli import UserError
from seed_jax.interop.torch_io import INDEX_SUFFIX, StoredTensor, read_weights

CONFIG = "config.json"
TORCH_FILE = "model.safetensors"
# In the order in which they are looked for; an index names the files of a model in pieces.
FILES = (
    f"{TORCH_FILE}{INDEX_SUFFIX}",
    TORCH_FILE,
    f"pytorch_model.bin{INDEX_SUFFIX}",
    "pytorch_model.bin",
)
# Either tells that there is a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def read_config(folder: Path, model_type: str) -> dict[str, Any]:
    """What a folder's config.json says.

    Raises:
      UserError: there is none, it is no JSON, or it is of another type of model.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"{file} is missing; name a folder with a model of type {model_type} as transformers "
            "saves it"
        )
    try:
        values = json.loads(file.read_text())
        found = values["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the config of a model of type {model_type} ({error!r})"
        ) from None
    if found != model_type:
        raise UserError(f"{file} describes a model of type {found}, not {model_type}")
    return values


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder; none is read yet.

    Raises:
      UserError: no weights there, or a file is missing or damaged.
    """
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights; it should have {TORCH_FILE}")
    return read_weights(found)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
