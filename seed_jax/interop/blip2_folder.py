"""BLIP-2 in transformers' folders: what lies in them under which name.

transformers has BLIP-2's weights under names of its own; `causal_encoder` rewrites BLIP-2's.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from seed_jax.cli import UserError
from seed_jax.interop import bert_folder, keys, transformers_folder
from seed_jax.interop.state_dict import ArrayLike, Row, Table
from seed_jax.models.qformer import QFormerConfig
from seed_jax.models.tokenizer import EncoderConfig
from seed_jax.models.vit import ViTConfig

LANGUAGE_MODEL = "language_model."
TEMPERATURE = "temp"  # a model for retrieval has none here
# Replaced one after the other in BLIP-2's own names.
RENAMED = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual_encoder.blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.": ".self_attn.",
    "ln_vision.": "vision_model.post_layernorm.",
    "Qformer.bert.embeddings.LayerNorm.": "qformer.layernorm.",
    "Qformer.bert.embeddings.": "embeddings.",
    "Qformer.bert.": "qformer.",
    "attention.self.": "attention.attention.",
    "vision_proj.": "vision_projection.",
    "text_proj.": "text_projection.",
}
# What SEED's parts take for granted.
VISION_FIXED = {"hidden_act": "gelu", "qkv_bias": True}


def read_config(
    folder: Path, weights: Mapping[str, ArrayLike]
) -> tuple[EncoderConfig, dict[str, Any]]:
    """The encoder's sizes, and transformers' config of the language model.

    Args:
      weights: of the folder; they tell whether the Q-Former has a text tower and heads.

    Raises:
      UserError: no config.json of a BLIP-2 there, or of one whose parts are not SEED's.
    """
    file = folder / transformers_folder.CONFIG
    values = transformers_folder.read_config(folder, "blip-2")
    try:
        config = Blip2Config.from_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the config of a BLIP-2 ({error!r})") from None
    vision, qformer = config.vision_config, config.qformer_config
    for part, fixed in ((vision, VISION_FIXED), (qformer, bert_folder.FIXED)):
        for name, wanted in fixed.items():
            if getattr(part, name) != wanted:
                raise UserError(
                    f"{file}: {name} is {getattr(part, name)!r}; SEED's encoder has {wanted!r}"
                )
    reads_text = "embeddings.word_embeddings.weight" in weights
    compares = "vision_projection.weight" in weights
    encoder = EncoderConfig(
        vit=ViTConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            mlp_dim=vision.intermediate_size,
            epsilon=vision.layer_norm_eps,
        ),
        qformer=QFormerConfig(
            queries=config.num_query_tokens,
            width=qformer.hidden_size,
            depth=qformer.num_hidden_layers,
            heads=qformer.num_attention_heads,
            mlp_dim=qformer.intermediate_size,
            encoder_width=qformer.encoder_hidden_size,
            cross_attention_every=qformer.cross_attention_frequency,
            vocab_size=qformer.vocab_size if reads_text else 0,
            max_positions=qformer.max_position_embeddings,
            dropout=qformer.hidden_dropout_prob,
            epsilon=qformer.layer_norm_eps,
        ),
        contrastive_dim=config.image_text_hidden_size if compares else 0,
    )
    return encoder, config.text_config.to_dict()


def causal_encoder(config: EncoderConfig) -> Table:
    """Vision tower, Q-Former and heads under transformers' names.

    Ignored are the language model, which has a table of its own, and what leads into it.
    """
    original = keys.causal_qformer(config)
    rows = []
    for row in original.rows:
        if row.torch.endswith("attn.q_bias"):
            (query,) = row.ours
            value = f"{query}".removesuffix("q_bias") + "v_bias"
            # One tensor here, with zeros for the keys, which have no bias.
            torch = row.torch.replace("q_bias", "qkv.bias")
            rows.append(dataclasses.replace(row, torch=_renamed(torch), ours=(query, None, value)))
        elif not row.torch.endswith("attn.v_bias"):
            rows.append(_rename(row))
    ignored = (f"{LANGUAGE_MODEL}*", "language_projection.*", "itm_head.*", "*.position_ids")
    return Table("blip2 of transformers", tuple(rows), ignored=ignored)


def _rename(row: Row) -> Row:
    return dataclasses.replace(row, torch=_renamed(row.torch))


def _renamed(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key
