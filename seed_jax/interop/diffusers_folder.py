"""Reads a Stable Diffusion 1.x directory in diffusers' layout, and says why another is refused."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from seed_jax.cli import UserError, first_line
from seed_jax.interop import diffusers_weights
from seed_jax.interop.torch_io import INDEX_SUFFIX, indexed_files
from seed_jax.models import teacher
from seed_jax.models.layers import Compute
from seed_jax.models.stable_diffusion import Autoencoder, AutoencoderConfig, UNet, UNetConfig

C = TypeVar("C", UNetConfig, AutoencoderConfig)

# What Stable Diffusion 1.x leaves at diffusers' defaults, and our models take for granted.
FIXED: dict[type, dict[str, Any]] = {
    UNetConfig: {
        "act_fn": "silu",
        "addition_embed_type": None,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_type": "positional",
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    },
    AutoencoderConfig: {
        "act_fn": "silu",
        "latents_mean": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
}


def read_unet(path: str, *, compute: Compute) -> UNet:
    """The U-Net of a directory.

    Args:
      path: a local directory or hub name; '' for the embedded one.

    Raises:
      UserError: there is none, it is not of Stable Diffusion 1.x, or its weights do not fit; so
        in the functions below.
    """
    facts, source = _facts(path, "unet")
    if facts.get("addition_embed_type") or facts.get("cross_attention_dim") == 2048:
        raise UserError(
            f"{source} is a U-Net of SDXL, which draws from the states of two text encoders and a "
            "pooled one; generation embeddings stand for those of Stable Diffusion 1.x: name a 1.x "
            "directory"
        )
    heads = facts.get("attention_head_dim")
    if facts.get("use_linear_projection") or isinstance(heads, list):
        raise UserError(
            f"{source} is a U-Net of Stable Diffusion 2.x, which draws from OpenCLIP's text "
            "states; generation embeddings stand for those of Stable Diffusion 1.x: name a 1.x "
            "directory"
        )
    config = _config(UNetConfig, facts, source)
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{source}: the U-Net takes {config.in_channels} channels and gives "
            f"{config.out_channels}, as for inpainting; name a model that draws from text alone"
        )
    return diffusers_weights.load(UNet, config, _weights(path, "unet"), compute=compute)


def read_autoencoder(path: str) -> Autoencoder:
    """The autoencoder of a directory, in float32: in half precision it overflows."""
    facts, source = _facts(path, "vae")
    for key, block in {
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
    }.items():
        if set(facts.get(key, [block])) != {block}:
            raise UserError(f"{source}: {key} is {facts[key]}; only {block} is built")
    config = _config(AutoencoderConfig, facts, source)
    return diffusers_weights.load(Autoencoder, config, _weights(path, "vae"), compute=Compute())


def read_scheduler(path: str) -> dict[str, Any]:
    """What `scheduler_config.json` says, for `seed_jax.samplers`."""
    folder, _ = teacher.locate(path, "scheduler")
    return _json(folder, "scheduler/scheduler_config.json")


def has_text_encoder(path: str) -> bool:
    """Whether a directory holds a text encoder with its tokenizer; those on the hub do."""
    folder = Path(path or teacher.PACKAGED)
    parts = ("text_encoder", "tokenizer")
    return not folder.is_dir() or all((folder / part).is_dir() for part in parts)


def _facts(path: str, part: str) -> tuple[dict[str, Any], str]:
    """The config of a part, and what to call it."""
    folder, part = teacher.locate(path, part)
    return _json(folder, f"{part}/config.json"), f"{folder}/{part}"


def _json(folder: str, name: str) -> dict[str, Any]:
    file = _fetch(folder, name)
    if file is None:
        raise UserError(f"{folder} has no {name}; name a directory in diffusers layout")
    try:
        facts = json.loads(file.read_text())
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{file} is no JSON object; download the directory again")
    return facts


def _config(config_class: type[C], facts: Mapping[str, Any], source: str) -> C:
    for key, wanted in FIXED[config_class].items():
        if facts.get(key, wanted) != wanted:
            raise UserError(
                f"{source}: {key} is {facts[key]!r}; Stable Diffusion 1.x has {wanted!r}, and "
                "nothing else is built"
            )
    sizes: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(config_class)
        if (value := facts.get(field.name)) is not None
    }
    return config_class(**sizes)


def _weights(path: str, part: str) -> Path:
    return find_weights(*teacher.locate(path, part), diffusers_weights.FILES)


def find_weights(folder: str, part: str, names: Sequence[str]) -> Path:
    """The first of the files of weights called `names` that is there.

    Args:
      folder: a local directory or hub name.
      part: subfolder; '' for none.

    Raises:
      UserError: there is none of them, or the hub can't be reached.
    """
    inside = f"{part}/" if part else ""
    for name in names:
        if file := _fetch(folder, inside + name):
            if name.endswith(INDEX_SUFFIX):
                for piece in indexed_files(file):
                    _fetch(folder, inside + piece)
            return file
    raise UserError(
        f"{folder}{'/' * bool(part)}{part} has none of {', '.join(names)}; a .bin file is a "
        "pickle, which could run code: save it as safetensors"
    )


def _fetch(folder: str, name: str) -> Path | None:
    """A file of a local directory or hub repository; None where that lacks it."""
    if Path(folder).is_dir():
        file = Path(folder) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(folder, name))
    except EntryNotFoundError:
        return None
    except Exception as error:  # of the hub, the network or the disk
        reason = first_line(error)
        raise UserError(
            f"{folder} can't be fetched from the Hugging Face hub ({reason}); check the name and "
            "the network, or name a local directory"
        ) from error
