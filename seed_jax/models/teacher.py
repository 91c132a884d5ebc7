"""The frozen text encoder of Stable Diffusion: the teacher of the generation embeddings.

Stable Diffusion 1.x conditions on the last hidden states (after the final norm) of CLIP's text
model, 77 of them a prompt. Runs transformers' Flax class, the last release line that has one.
"""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from transformers import CLIPTextConfig, FlaxCLIPTextModel

from seed_jax.cli import UserError, first_line
from seed_jax.models.layers import Array, Compute, hold_linen, nest_linen

PACKAGED = Path(__file__).parents[1] / "assets" / "tiny_stable_diffusion"


class TextTeacher(nnx.Module):
    """CLIP's text model as an NNX module, its Linen parameters held by path."""

    def __init__(self, config: CLIPTextConfig, *, compute: Compute, rngs: nnx.Rngs):
        model = FlaxCLIPTextModel(config, dtype=compute.dtype, _do_init=False)
        params = model.init_weights(rngs.params(), (1, config.max_position_embeddings))
        self.params = hold_linen(params)
        self.linen = model.module
        self.config = config

    def __call__(self, ids_BT: Array) -> Array:
        """Prompt ids int32 [B, 77] to text states [B, 77, width].

        There is no padding mask: Stable Diffusion attends to padding too.
        """
        params = nest_linen(self.params)
        positions_BT = jax.lax.broadcasted_iota("int32", ids_BT.shape, 1)
        mask_BT = jax.numpy.ones_like(ids_BT)
        outputs: Any = self.linen.apply({"params": params}, ids_BT, mask_BT, positions_BT)
        return outputs.last_hidden_state


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
    """The teacher's sizes; see `locate` for `path`.

    Raises:
      UserError: there is no text encoder, or its config.json can't be read.
    """
    folder, subfolder = locate(path, "text_encoder")
    try:
        return CLIPTextConfig.from_pretrained(folder, subfolder=subfolder)
    except OSError as error:
        reason = first_line(error)
        raise UserError(f"{folder}/{subfolder}: no config of a text encoder: {reason}") from error
