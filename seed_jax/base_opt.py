"""The OPT under SEED-OPT: a folder of transformers, or what `seed_jax.convert` made of one."""

from pathlib import Path

import jax

from seed_jax import model_dir
from seed_jax.cli import UserError
from seed_jax.interop import opt_weights
from seed_jax.models.layers import Compute
from seed_jax.models.opt import OPT, OPTConfig

KIND = "opt"


def read_config(path: str | Path) -> OPTConfig:
    """The sizes.

    Raises:
      UserError: there is no OPT, or one with adapters.
    """
    if not _is_model_dir(path):
        return opt_weights.read_config(path)
    config = model_dir.load_config(path, KIND, OPTConfig)
    if config.lora.rank:
        raise UserError(f"{path} holds adapters; name the OPT that they belong to")
    return config


def tokenizer_folder(path: str | Path) -> Path:
    return Path(path) / "text_tokenizer" if _is_model_dir(path) else Path(path)


def load(path: str | Path, *, compute: Compute, device: jax.Device | None = None) -> OPT:
    """The model, stored in the compute type, on a device; None is the first.

    Raises:
      UserError: see `read_config`; or weights are missing, damaged or of another shape.
    """
    if not _is_model_dir(path):
        with jax.default_device(device):
            return opt_weights.load(path, compute=compute)
    return model_dir.load(path, KIND, OPTConfig, OPT, compute, stored=compute.dtype, device=device)


def _is_model_dir(path: str | Path) -> bool:
    return (Path(path) / "params").is_dir()
