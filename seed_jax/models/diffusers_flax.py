"""diffusers' Flax classes, without the note that each of their layers logs whenever it is set up.

The last release that has them is pinned; other messages of diffusers still show.
"""

import logging


def _other_than_deprecation(record: logging.LogRecord) -> bool:
    return "Flax classes are deprecated" not in record.getMessage()


for _module in (
    "attention_flax",
    "embeddings_flax",
    "resnet_flax",
    "unets.unet_2d_blocks_flax",
    "unets.unet_2d_condition_flax",
    "vae_flax",
):
    logging.getLogger(f"diffusers.models.{_module}").addFilter(_other_than_deprecation)

# They log on import already.
# ruff: noqa: E402
from diffusers.models.attention_flax import (
    FlaxAttention,
    FlaxGEGLU,
    FlaxTransformer2DModel,
)
from diffusers.models.embeddings_flax import FlaxTimesteps
from diffusers.models.resnet_flax import FlaxUpsample2D
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
from diffusers.models.vae_flax import FlaxAttentionBlock, FlaxAutoencoderKL
from diffusers.models.vae_flax import FlaxUpsample2D as FlaxUpsampleVAE

__all__ = [
    "FlaxAttention",
    "FlaxAttentionBlock",
    "FlaxAutoencoderKL",
    "FlaxGEGLU",
    "FlaxTimesteps",
    "FlaxTransformer2DModel",
    "FlaxUNet2DConditionModel",
    "FlaxUpsample2D",
    "FlaxUpsampleVAE",
]
