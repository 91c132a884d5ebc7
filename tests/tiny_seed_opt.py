"""A SEED-OPT small enough for tests, with random weights."""

import shutil
from pathlib import Path

from flax import nnx

from seed_jax import model_dir
from seed_jax.data.text import load_tokenizer
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPTConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from seed_jax.seed_opt import KIND
from seed_jax.tasks.language_model import PACKAGED
from tests.random_weights import random_weights
from tests.tiny import CODES, QUERIES, save_tokenizer

SIZES = OPTConfig(
    # Seven more than the tokenizer has, as in the published ones.
    vocab_size=1543,
    width=24,
    depth=3,
    heads=2,
    mlp_dim=40,
    max_positions=64,
    lora=LoRAConfig(rank=3, alpha=5.0, dropout=0.0, targets=("query", "value", "up")),
)


def config(code_input: str) -> VisualOPTConfig:
    return VisualOPTConfig(
        opt=SIZES, codes=CODES, code_dim=4, picture_codes=QUERIES, code_input=code_input
    )


def save_seed_opt(folder: Path, config: VisualOPTConfig) -> Path:
    """A language model with random weights, adapters included, as stage 3 leaves it."""
    model = random_weights(lambda: VisualOPT(config, rngs=nnx.Rngs(0)))
    tokenizer = save_tokenizer(folder / "tokenizer")

    def add_files(partial):
        load_tokenizer(PACKAGED).save_pretrained(partial / "text_tokenizer")
        shutil.copytree(tokenizer, partial / "tokenizer")

    model_dir.save(
        folder / "model",
        kind=KIND,
        config=config,
        module=model,
        add_files=add_files,
        tokenizer_hash=model_dir.describe(tokenizer)["content_hash"],
    )
    return folder / "model"
