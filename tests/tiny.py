"""A tokenizer small enough to build in a test, and pictures for it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seed_jax import model_dir
from seed_jax.models.qformer import QFormerConfig
from seed_jax.models.quantizer import CodebookConfig
from seed_jax.models.tokenizer import (
    EncoderConfig,
    GenerationConfig,
    SeedTokenizer,
    TokenizerConfig,
)
from seed_jax.models.vit import ViTConfig

QUERIES, CODES, SIDE = 8, 16, 16
COLOURS = ["red", "green", "blue", "yellow", "grey", "brown", "pink", "black"]
THINGS = ["cat", "dog", "tree", "house", "boat"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", ",", "a", "one", "more", *COLOURS, *THINGS]

ENCODER = EncoderConfig(
    vit=ViTConfig(image_size=SIDE, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32),
    qformer=QFormerConfig(
        queries=QUERIES,
        width=16,
        depth=1,
        heads=2,
        mlp_dim=32,
        encoder_width=16,
        vocab_size=len(VOCABULARY),
        max_positions=8,
    ),
    contrastive_dim=8,
    text_length=8,
)
TOKENIZER = TokenizerConfig(
    encoder=ENCODER,
    codebook=CodebookConfig(size=CODES, dim=4),
    decoder_heads=2,
    decoder_depth=1,
    generation=GenerationConfig(queries=7, depth=1, output_dim=12),
)


def text_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )


def random_module(seed: int) -> SeedTokenizer:
    """A tokenizer with normal weights, by NumPy: to compile initialisers takes seconds."""
    rng = np.random.default_rng(seed)
    constants = {"bias": 0.0, "scale": 1.0, "temperature": 0.07}
    module = nnx.eval_shape(lambda: SeedTokenizer(TOKENIZER, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    weights = {}
    for name, abstract in model_dir.flat_params(state).items():
        kind = name.rsplit("/", 1)[-1]
        values = constants[kind] if kind in constants else rng.normal(size=abstract.shape)
        weights[name] = jnp.broadcast_to(jnp.asarray(values, abstract.dtype), abstract.shape)
    return nnx.merge(graphdef, model_dir.unflatten_params(state, weights))


def save_tokenizer(path: Path, *, seed: int = 0) -> Path:
    """Writes the model directory of a tokenizer with random weights."""
    model_dir.save(
        path,
        kind="seed_tokenizer",
        config=TOKENIZER,
        module=random_module(seed),
        add_files=lambda folder: text_tokenizer().save_pretrained(folder / "text_tokenizer"),
    )
    return path


def write_pictures(folder: Path, count: int) -> Path:
    """Noise of `count` colours, 24 pixels wide, with one or two captions each."""
    folder.mkdir()
    with (folder / "captions.jsonl").open("w") as file:
        for number in range(count):
            rng = np.random.default_rng(number)
            pixels = rng.integers(0, 256, 3) // 2 + rng.integers(0, 128, (20, 24, 3))
            name = f"{number:03}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            colour, thing = COLOURS[number % 8], THINGS[number % 5]
            captions = [f"a {colour} {thing}", f"one more {colour} {thing}"][: 1 + number % 2]
            file.write(json.dumps({"image": name, "captions": captions, "tags": ["a"]}) + "\n")
    return folder
