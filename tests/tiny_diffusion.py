"""A Stable Diffusion directory small enough to write in a test, with random weights."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from seed_jax.interop import diffusers_weights
from tests.test_diffusion_samplers import CONFIG
from tests.test_diffusion_weights import UNET, random_model
from tests.tiny import TOKENIZER, VOCABULARY, save_tokenizer, text_tokenizer, write_pictures

WIDTH, STATES = UNET.cross_attention_dim, TOKENIZER.generation.queries


def save_stable_diffusion(folder: Path) -> Path:
    """A whole directory in diffusers layout, its text encoder written by transformers' PyTorch."""
    diffusers_weights.save(random_model("unet"), folder / "unet", dtype=np.float32)
    diffusers_weights.save(random_model("vae"), folder / "vae", dtype=np.float32)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(CONFIG))
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=STATES,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    text_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def save_models_and_pictures(folder: Path, pictures: int) -> Path:
    """A tokenizer in model/, what draws from its codes in diffusion/, and pictures/."""
    save_tokenizer(folder / "model")
    save_stable_diffusion(folder / "diffusion")
    write_pictures(folder / "pictures", pictures)
    return folder
