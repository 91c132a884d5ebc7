"""SEED-OPT as folders of transformers and PEFT, in which codes are tokens like any other.

The tokenizer gets `<img_00000>`, `<img_00001>`, … for the codes, `[IMG]` and `[/IMG]`. Embedding
and output rows of codes lie behind the words', the projection of codebook vectors folded in.
"""

import json
from pathlib import Path

import numpy as np
from flax import nnx
from tokenizers import AddedToken

from seed_jax.cli import UserError
from seed_jax.data.text import load_tokenizer
from seed_jax.interop import opt_weights
from seed_jax.models.visual_opt import VisualOPT, as_opt
from seed_jax.seed_opt import load_language_model, merged

BASE = "base"  # the folder beside adapters that holds what they belong to
BEGIN, END = "[IMG]", "[/IMG]"


def code_token(code: int) -> str:
    return f"<img_{code:05d}>"


def save_merged(path: Path, folder: Path) -> None:
    """Writes an `OPTForCausalLM` with its tokenizer, adapters merged in, float32.

    Args:
      path: model directory of stage 3.

    Raises:
      UserError: see `load_language_model`.
    """
    _save(merged(load_language_model(path)), path, folder)


def save_adapters(path: Path, folder: Path) -> None:
    """Writes the adapters for PEFT, and in `BASE` the model that they belong to.

    Raises:
      UserError: see `load_language_model`; or the model has no adapters.
    """
    model = load_language_model(path)
    if not model.config.opt.lora.rank:
        raise UserError(f"{path} has no adapters; export it with --format hf")
    adapters = nnx.state(model.opt, nnx.LoRAParam)
    opt_weights.save_peft(adapters, model.config.opt, folder, base=BASE)
    _save(model, path, folder / BASE)


def _save(model: VisualOPT, path: Path, folder: Path) -> None:
    tokenizer = load_tokenizer(path / "text_tokenizer")
    config = model.config
    # The smallest id that is free is the next token's: fill what the vocabulary left empty.
    names = [f"<unused_{i}>" for i in range(len(tokenizer), config.opt.vocab_size)]
    names += [*map(code_token, range(config.codes)), BEGIN, END]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"{path / 'text_tokenizer'} has words that the model has not, or tokens named like "
            f"codes: {len(tokenizer)} tokens with the codes, not {config.vocab_size}"
        )
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    opt_weights.save(as_opt(model), folder, dtype=np.float32, **ids)
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
