"""A SEED-OPT directory small enough to write in a test, with random weights."""

from pathlib import Path

from flax import nnx

from seed_jax import model_dir
from seed_jax.data.text import load_tokenizer
from seed_jax.models.opt import OPTConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from seed_jax.seed_opt import KIND
from seed_jax.tasks.language_model import PACKAGED
from tests.random_weights import random_weights
from tests.tiny import CODES, QUERIES, TOKENIZER, save_tokenizer

VISUAL = VisualOPTConfig(
    opt=OPTConfig(vocab_size=1536, width=16, depth=1, heads=2, mlp_dim=24, max_positions=64),
    codes=CODES,
    code_dim=TOKENIZER.codebook.dim,
    picture_codes=QUERIES,
)


def save_seed_opt(path: Path) -> Path:
    """Writes the model directory of a language model and its tokenizer."""

    def add_files(folder: Path) -> None:
        load_tokenizer(PACKAGED).save_pretrained(folder / "text_tokenizer")
        save_tokenizer(folder / "tokenizer")

    tokenizer_hash = model_dir.describe(save_tokenizer(path.with_name("eyes")))["content_hash"]
    model_dir.save(
        path,
        kind=KIND,
        config=VISUAL,
        module=random_weights(lambda: VisualOPT(VISUAL, rngs=nnx.Rngs(0))),
        add_files=add_files,
        tokenizer_hash=tokenizer_hash,
    )
    return path
