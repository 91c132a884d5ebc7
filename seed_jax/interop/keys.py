"""What the original calls its weights: one table a model.

Tables are made from a config, so that they fit any size. Prefixes end in their separator: `.` on
the original's side, `/` on ours.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from seed_jax.cli import UserError
from seed_jax.interop.state_dict import (
    HEADS,
    LEADING_ONE,
    LINEAR,
    PATCHES,
    QKV,
    SAME,
    SOURCE,
    ArrayLike,
    Layout,
    Row,
    Shape,
    Table,
)
from seed_jax.models.qformer import QFormerConfig
from seed_jax.models.quantizer import CodebookConfig
from seed_jax.models.tokenizer import (
    IMAGE_DOWN_WIDTHS,
    EncoderConfig,
    GenerationConfig,
    TokenizerConfig,
)
from seed_jax.models.vit import ViTConfig

Rows = list[Row]
VIT = "visual_encoder."  # prefix of the ViT in a larger model's state dict
# Beginnings of the names of what makes generation embeddings of codes, in SEED's tokenizer.
GENERATION = (
    "quantize.",
    "decode_task_layer.",
    "pos_embed_text",
    "blocks_text.",
    "reverse_tokens",
    "Reverse_Qformer.",
    "distill_text_proj.",
)
SEED1, SEED2 = "seed1_tokenizer", "seed2_quantizer"


def eva_vit(config: ViTConfig, *, prefix: str = "") -> Table:
    """EVA's ViT alone, as in BLIP-2's `eva_vit_g.pth`; SEED's files prefix it `visual_encoder.`."""
    return Table("eva_vit", tuple(_vit(config, prefix, "")))


def causal_qformer(config: EncoderConfig) -> Table:
    """Stage 1's training class and BLIP-2's, ViT included.

    What captions and what matches pictures with text in them (BLIP-2's alone) has no use here.
    """
    rows, constants = _encoder(config, "")
    ignored = ("Qformer.cls.*", "itm_head.*")
    return Table("stage1_qformer_casual", tuple(rows), constants, ignored=ignored)


def seed1_tokenizer(config: TokenizerConfig) -> Table:
    """SEED's tokenizer: `causal_qformer.pth` and `seed_tokenizer.pth` together."""
    return _tokenizer(SEED1, config, target="text", suffix="")


def seed1_training(config: TokenizerConfig) -> Table:
    """SEED's stage 2: as `seed1_tokenizer`, but the reverse Q-Former's names end in `_text`."""
    return _tokenizer("stage2_codebook_distill_text", config, target="text", suffix="_text")


def seed2_tokenizer(config: TokenizerConfig) -> Table:
    """SEED-2's tokenizer in its three shapes, which the config tells apart.

    They are the published `seed_quantizer.pt` (`image_down`), stage 2's training class (a reverse
    Q-Former of four layers) and the inference class with `use_qformer_image` (of twelve).
    """
    return _tokenizer(SEED2, config, target="image", suffix="")


def tokenizer_table(weights: Mapping[str, ArrayLike], config: TokenizerConfig) -> Table:
    """The table of the class that a tokenizer's state dict belongs to."""
    if "reverse_tokens_text" in weights:
        return seed1_training(config)
    return (seed1_tokenizer if "distill_text_proj.weight" in weights else seed2_tokenizer)(config)


def vit_config(
    weights: Mapping[str, ArrayLike], *, prefix: str = "", heads: int = 16, source: str = SOURCE
) -> ViTConfig:
    """Sizes read off a state dict; the number of heads leaves no trace in it.

    Raises:
      UserError: a key is missing that tells a size; so in the functions below.
    """
    shape = _shapes(weights, source)
    _, tokens, width = shape(f"{prefix}pos_embed")
    patch_size = shape(f"{prefix}patch_embed.proj.weight")[-1]
    return ViTConfig(
        image_size=math.isqrt(tokens - 1) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=len(_layers(weights, f"{prefix}blocks.{{i}}.norm1.weight")),
        heads=heads,
        mlp_dim=shape(f"{prefix}blocks.0.mlp.fc1.weight")[0],
    )


def encoder_config(
    weights: Mapping[str, ArrayLike],
    *,
    vit_heads: int = 16,
    qformer_heads: int = 12,
    source: str = SOURCE,
) -> EncoderConfig:
    """Sizes of a causal encoder, alone (stage 1) or in a tokenizer; see `vit_config`."""
    shape = _shapes(weights, source)
    bert, words = "Qformer.bert.", "Qformer.bert.embeddings.word_embeddings.weight"
    _, queries, width = shape("query_tokens")
    depth = len(_layers(weights, f"{bert}encoder.layer.{{i}}.attention.self.key.weight"))
    crossing = _layers(weights, f"{bert}encoder.layer.{{i}}.crossattention.self.key.weight")
    qformer = QFormerConfig(
        queries=queries,
        width=width,
        depth=depth,
        heads=qformer_heads,
        mlp_dim=shape(f"{bert}encoder.layer.0.intermediate_query.dense.weight")[0],
        encoder_width=shape(f"{bert}encoder.layer.0.crossattention.self.key.weight")[1],
        cross_attention_every=crossing[1] if len(crossing) > 1 else depth,
        vocab_size=shape(words)[0] if words in weights else 0,
        max_positions=shape(f"{bert}embeddings.position_ids")[1],
    )
    return EncoderConfig(
        vit=vit_config(weights, prefix=VIT, heads=vit_heads, source=source),
        qformer=qformer,
        contrastive_dim=shape("vision_proj.weight")[0] if "vision_proj.weight" in weights else 0,
    )


def tokenizer_config(
    weights: Mapping[str, ArrayLike],
    *,
    vit_heads: int = 16,
    qformer_heads: int = 12,
    decoder_heads: int = 12,
    source: str = SOURCE,
) -> TokenizerConfig:
    """Sizes of a tokenizer; see `vit_config`."""
    shape = _shapes(weights, source)
    size, dim = shape("quantize.embedding.weight")
    target = "text" if "distill_text_proj.weight" in weights else "image"
    suffix = "_text" if "reverse_tokens_text" in weights else ""
    output_dim = shape(f"distill_{target}_proj.weight")[0]
    if "image_down.0.weight" in weights:
        generation = GenerationConfig(kind="image_down", output_dim=output_dim)
    else:
        layer = f"Reverse_Qformer{suffix}.bert.encoder.layer.{{i}}.attention.self.key.weight"
        generation = GenerationConfig(
            queries=shape(f"reverse_tokens{suffix}")[1],
            depth=len(_layers(weights, layer)),
            output_dim=output_dim,
        )
    return TokenizerConfig(
        encoder=encoder_config(
            weights, vit_heads=vit_heads, qformer_heads=qformer_heads, source=source
        ),
        codebook=CodebookConfig(size=size, dim=dim),
        decoder_heads=decoder_heads,
        decoder_depth=len(_layers(weights, f"blocks_{target}.{{i}}.norm1.weight")),
        reconstruction="pos_embed" in weights,
        generation=generation,
    )


def _shapes(weights: Mapping[str, ArrayLike], source: str) -> Callable[[str], Shape]:
    def shape(key: str) -> Shape:
        if key not in weights:
            raise UserError(f"{source} lacks {key}, which tells a size of the model")
        return tuple(weights[key].shape)

    return shape


def _layers(keys: Iterable[str], pattern: str) -> list[int]:
    """The numbers that stand in the keys where the pattern has `{i}`, in order."""
    regex = re.compile(re.escape(pattern).replace(re.escape("{i}"), r"(\d+)"))
    return sorted(int(match[1]) for match in map(regex.fullmatch, keys) if match)


def _tokenizer(name: str, config: TokenizerConfig, *, target: str, suffix: str) -> Table:
    """Any of the tokenizer's classes.

    Args:
      target: what generation embeddings stand for, in the names of the blocks and the projection.
      suffix: of the reverse Q-Former's names.
    """
    rows, constants = _encoder(config.encoder, "encoder/")
    rows.append(_one("quantize.embedding.weight", "codebook/vectors"))
    for i in range(2):
        # The tanh between them is number 1.
        rows += _dense(f"encode_task_layer.{2 * i}.", f"to_code/{i}/")
        rows += _dense(f"decode_task_layer.{2 * i}.", f"from_code/{i}/")
    layers = range(config.decoder_depth)
    if config.reconstruction:
        rows += _decoder("", "reconstruction/", layers)
    rows += _decoder(f"_{target}", "generation/decoder/", layers)
    if config.generation.kind == "image_down":
        # Only a ReLU lies between two maps.
        for i in range(len(IMAGE_DOWN_WIDTHS)):
            rows += _dense(f"image_down.{2 * i}.", f"generation/down/{i}/", bias=False)
    else:
        prefix, ours = f"Reverse_Qformer{suffix}.bert.", "generation/reverse_qformer/"
        rows.append(_one(f"reverse_tokens{suffix}", f"{ours}query_tokens", LEADING_ONE))
        rows += _qformer(config.reverse_qformer, prefix, ours)
        constants |= _position_ids(config.reverse_qformer, prefix)
    rows += _dense(f"distill_{target}_proj.", "generation/proj/")
    return Table(name, tuple(rows), constants)


def _encoder(config: EncoderConfig, ours: str) -> tuple[Rows, dict[str, np.ndarray]]:
    rows = _vit(config.vit, VIT, f"{ours}vit/")
    rows += _norm("ln_vision.", f"{ours}ln_vision/")
    rows.append(_one("query_tokens", f"{ours}qformer/query_tokens", LEADING_ONE))
    rows += _qformer(config.qformer, "Qformer.bert.", f"{ours}qformer/")
    if config.contrastive_dim:
        rows += _dense("vision_proj.", f"{ours}vision_proj/")
        rows += _dense("text_proj.", f"{ours}text_proj/")
        rows.append(_one("temp", f"{ours}temperature"))
    return rows, _position_ids(config.qformer, "Qformer.bert.")


def _vit(config: ViTConfig, prefix: str, ours: str) -> Rows:
    layers = range(config.depth)
    block, our_block = f"{prefix}blocks.{{i}}.", f"{ours}blocks/"
    return [
        _one(f"{prefix}cls_token", f"{ours}class_token", LEADING_ONE),
        Row(f"{prefix}pos_embed", (f"{ours}positions",), LEADING_ONE, grid=True),
        _one(f"{prefix}patch_embed.proj.weight", f"{ours}patch_embed/kernel", PATCHES),
        _one(f"{prefix}patch_embed.proj.bias", f"{ours}patch_embed/bias"),
        *_block(block, our_block, layers),
        _one(f"{block}attn.q_bias", f"{our_block}attention/q_bias", HEADS, layers),
        _one(f"{block}attn.v_bias", f"{our_block}attention/v_bias", HEADS, layers),
    ]


def _decoder(suffix: str, ours: str, layers: range) -> Rows:
    block, our_block = f"blocks{suffix}.{{i}}.", f"{ours}blocks/"
    biases = tuple(f"{our_block}attention/{name}_bias" for name in "qkv")
    return [
        _one(f"pos_embed{suffix}", f"{ours}positions", LEADING_ONE),
        *_block(block, our_block, layers),
        Row(f"{block}attn.qkv.bias", biases, HEADS, layers),
    ]


def _block(prefix: str, ours: str, layers: range) -> Rows:
    """A pre-norm block, but for the biases of queries, keys and values."""
    return [
        *_norm(f"{prefix}norm1.", f"{ours}norm1/", layers),
        _one(f"{prefix}attn.qkv.weight", f"{ours}attention/qkv", QKV, layers),
        *_dense(f"{prefix}attn.proj.", f"{ours}attention/out/", layers),
        *_norm(f"{prefix}norm2.", f"{ours}norm2/", layers),
        *_dense(f"{prefix}mlp.fc1.", f"{ours}mlp/up/", layers),
        *_dense(f"{prefix}mlp.fc2.", f"{ours}mlp/down/", layers),
    ]


def _qformer(config: QFormerConfig, prefix: str, ours: str) -> Rows:
    """A Q-Former, but for its queries, which lie outside of it."""
    layers = range(config.depth)
    crossing = range(0, config.depth, config.cross_attention_every)
    layer = f"{prefix}encoder.layer.{{i}}."
    rows = _norm(f"{prefix}embeddings.LayerNorm.", f"{ours}norm/")
    rows += _attention(f"{layer}attention.", f"{ours}layers/attention/", layers)
    rows += _attention(f"{layer}crossattention.", f"{ours}cross/", crossing)
    rows += _feed_forward(layer, "_query", f"{ours}layers/query_feed_forward/", layers)
    if config.vocab_size:
        embeddings = f"{prefix}embeddings."
        rows += _feed_forward(layer, "", f"{ours}layers/text_feed_forward/", layers)
        rows.append(_one(f"{embeddings}word_embeddings.weight", f"{ours}words"))
        rows.append(_one(f"{embeddings}position_embeddings.weight", f"{ours}positions"))
    return rows


def _attention(prefix: str, ours: str, layers: range) -> Rows:
    rows = []
    for name in ("query", "key", "value"):
        rows += _dense(f"{prefix}self.{name}.", f"{ours}{name}/", layers)
    rows += _dense(f"{prefix}output.dense.", f"{ours}out/", layers)
    return rows + _norm(f"{prefix}output.LayerNorm.", f"{ours}norm/", layers)


def _feed_forward(layer: str, suffix: str, ours: str, layers: range) -> Rows:
    return [
        *_dense(f"{layer}intermediate{suffix}.dense.", f"{ours}mlp/up/", layers),
        *_dense(f"{layer}output{suffix}.dense.", f"{ours}mlp/down/", layers),
        *_norm(f"{layer}output{suffix}.LayerNorm.", f"{ours}norm/", layers),
    ]


def bert(config: QFormerConfig) -> Table:
    """A BERT under BertModel's names, as the text tower of a Q-Former without queries.

    The queries' feed-forward path is a copy of the text's: rows of the same names, twice. What SEED
    has no use for: token types, which BLIP-2 left out, the pooled first token, and the heads.
    """
    layers, layer = range(config.depth), "encoder.layer.{i}."
    rows = _norm("embeddings.LayerNorm.", "norm/")
    rows += _attention(f"{layer}attention.", "layers/attention/", layers)
    rows += _feed_forward(layer, "", "layers/text_feed_forward/", layers)
    rows += _feed_forward(layer, "", "layers/query_feed_forward/", layers)
    rows.append(_one("embeddings.word_embeddings.weight", "words"))
    rows.append(_one("embeddings.position_embeddings.weight", "positions"))
    ignored = ("embeddings.token_type_embeddings.weight", "*.position_ids", "pooler.*", "cls.*")
    return Table("bert", tuple(rows), ignored=ignored)


def _position_ids(config: QFormerConfig, prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}embeddings.position_ids": np.arange(config.max_positions)[None]}


def _dense(prefix: str, ours: str, layers: range | None = None, *, bias: bool = True) -> Rows:
    rows = [_one(f"{prefix}weight", f"{ours}kernel", LINEAR, layers)]
    return [*rows, _one(f"{prefix}bias", f"{ours}bias", SAME, layers)] if bias else rows


def _norm(prefix: str, ours: str, layers: range | None = None) -> Rows:
    return [
        _one(f"{prefix}weight", f"{ours}scale", SAME, layers),
        _one(f"{prefix}bias", f"{ours}bias", SAME, layers),
    ]


def _one(torch: str, ours: str, layout: Layout = SAME, layers: range | None = None) -> Row:
    return Row(torch, (ours,), layout, layers)
