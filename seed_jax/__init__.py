"""SEED, the image tokenizer that lets a language model see and draw (arXiv 2307.08041), in JAX."""

from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.seed_opt import SeedOPT

__all__ = ["SeedOPT", "SeedTokenizer"]
