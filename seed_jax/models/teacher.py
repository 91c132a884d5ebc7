"""The frozen text encoder of Stable Diffusion: the teacher of the generation embeddings.

Stable Diffusion 1.x conditions on the last hidden states (after the final norm) of CLIP's text
model, 77 of them a prompt. Runs transformers' Flax class, the last release line that has one.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from transformers import CLIPTextConfig, FlaxCLIPTextModel

from seed_jax.cli import UserError
from seed_jax.models.layers import Array, Compute

PACKAGED = Path(__file__).parents[1] / "assets" / "tiny_stable_diffusion"


class TextTeacher(nnx.Module):
    """CLIP's text model as an NNX module, its Linen parameters held by path."""

    def __init__(self, config: CLIPTextConfig, *, compute: Compute, rngs: nnx.Rngs):
        model = FlaxCLIPTextModel(config, dtype=compute.dtype, _do_init=False)
        params = model.init_weights(rngs.params(), (1, config.max_position_embeddings))
        flat = traverse_util.flatten_dict(params, sep="/")
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in flat.items()})
        self.linen = model.module
        self.config = config

    def __call__(self, ids_BT: Array) -> Array:
        """Prompt ids int32 [B, 77] to text states [B, 77, width].

        There is no padding mask: Stable Diffusion attends to padding too.
        """
        params = self._nested_params()
        positions_BT = jax.lax.broadcasted_iota("int32", ids_BT.shape, 1)
        mask_BT = jax.numpy.ones_like(ids_BT)
        outputs: Any = self.linen.apply({"params": params}, ids_BT, mask_BT, positions_BT)
        return outputs.last_hidden_state

    def _nested_params(self) -> dict:
        flat = {name: value[...] for name, value in self.params.items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    def save(self, folder: Path) -> None:
        """Writes the text encoder in transformers' layout: config.json, float16 safetensors."""
        params = jax.tree.map(lambda a: np.asarray(a, np.float16), self._nested_params())
        model = FlaxCLIPTextModel(self.config, _do_init=False)
        model.save_pretrained(folder, params=params, safe_serialization=True)

    def load(self, path: str) -> None:
        """Takes the weights of a text encoder; see `locate` for `path`."""
        folder, subfolder = locate(path, "text_encoder")
        try:
            # Initialised too, without which it can't convert weights in PyTorch's layout.
            params = FlaxCLIPTextModel.from_pretrained(folder, subfolder=subfolder).params
        except OSError as error:
            raise UserError(f"{path}: no text encoder: {str(error).splitlines()[0]}") from error
        for name, value in traverse_util.flatten_dict(params, sep="/").items():
            old = self.params[name].get_value()  # an abstract one will do
            new = jax.device_put(value.astype(old.dtype), old.sharding)
            self.params[name].set_value(new)


def locate(path: str, part: str) -> tuple[str, str]:
    """Where a part ('text_encoder' or 'tokenizer') of a Stable Diffusion directory is.

    Args:
      path: a local directory or hub name in diffusers layout; '' for the packaged tiny one.

    Returns:
      The directory or hub name, and the subfolder.

    Raises:
      UserError: a local directory without that part.
    """
    if path and not Path(path).is_dir() and not _is_hub_name(path):
        raise UserError(f"no such directory: {path}; a Stable Diffusion directory has {part}/")
    folder = path or str(PACKAGED)
    if Path(folder).is_dir() and not (Path(folder) / part).is_dir():
        raise UserError(f"{folder} has no {part}/; name a directory in diffusers layout")
    return folder, part


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def load_config(path: str) -> CLIPTextConfig:
    """The teacher's sizes; see `locate` for `path`."""
    folder, subfolder = locate(path, "text_encoder")
    return CLIPTextConfig.from_pretrained(folder, subfolder=subfolder)
