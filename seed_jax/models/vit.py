"""The EVA-CLIP vision transformer that SEED sees through (as in BLIP-2, without its last block).

Shapes: B batch, S image side, P patch side, G patches a side, T = 1 + G² tokens, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax.data.transforms import normalize
from seed_jax.models import layers
from seed_jax.models.layers import Array, Compute


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes; the defaults are ViT-g as SEED uses it (39 of EVA's 40 blocks)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_dim: int = 6144
    epsilon: float = 1e-6

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2


class ViT(nnx.Module):
    """Pre-norm ViT with a class token and learned absolute positions; no final norm.

    Source: EVA (arXiv 2211.07636) as used by BLIP-2 (arXiv 2301.12597); section 3.1 of SEED.
    """

    def __init__(self, config: ViTConfig, *, compute: Compute, rngs: nnx.Rngs):
        width = config.width
        init = nnx.initializers.truncated_normal(0.02)
        patch_dim = 3 * config.patch_size**2
        self.patch_embed = layers.dense(
            patch_dim, width, axes=(None, "embed"), compute=compute, rngs=rngs
        )
        self.class_token = nnx.Param(init(rngs.params(), (1, width)), axes=(None, "embed"))
        self.positions = nnx.Param(
            init(rngs.params(), (config.tokens, width)), axes=(None, "embed")
        )
        self.blocks = layers.stack(
            config.depth,
            lambda r: layers.Block(
                width,
                config.heads,
                config.mlp_dim,
                epsilon=config.epsilon,
                key_bias=False,
                compute=compute,
                rngs=r,
            ),
            rngs=rngs,
        )
        self.config = config
        self.compute = compute

    def embed_patches(self, images: Array) -> Array:
        """Images [B, S, S, 3] to patch embeddings [B, G², D], row by row."""
        size, patch = self.config.image_size, self.config.patch_size
        batch, side = images.shape[0], size // patch
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images are {images.shape[1:]}; this model sees {(size, size, 3)}")
        # Patches do not overlap, so the original's convolution is one matmul. Like it, it leaves
        # out a border narrower than a patch.
        images = images[:, : side * patch, : side * patch]
        patches = images.reshape(batch, side, patch, side, patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * side, -1)
        return self.patch_embed(patches)

    def embed(self, images: Array) -> Array:
        """Class token and patches with their positions, [B, T, D]."""
        patches_BTD = self.embed_patches(images)
        batch, _, width = patches_BTD.shape
        token_B1D = jnp.broadcast_to(self.class_token[...][None], (batch, 1, width))
        x_BTD = jnp.concatenate([token_B1D.astype(patches_BTD.dtype), patches_BTD], axis=1)
        return x_BTD + self.positions[...][None].astype(x_BTD.dtype)

    def __call__(self, images: Array) -> Array:
        """Images [B, S, S, 3], uint8 pixels or normalised floats, to the last block's [B, T, D]."""
        if images.dtype == jnp.uint8:
            images = normalize(images)
        x_BTD, _ = layers.apply_blocks(self.blocks, self.embed(images), compute=self.compute)
        return x_BTD


def interpolate_positions(positions_TD: Array, tokens: int) -> Array:
    """Brings position embeddings to another grid, as checkpoints of another image size are loaded.

    Args:
      positions_TD: class position first, then a square grid row by row.
      tokens: 1 + the patches of the new square grid.

    Returns:
      [tokens, D]: the class position as it was, the grid resampled bicubically (a = -0.75, pixel
      centres aligned, no antialiasing, edges replicated, as PyTorch's `interpolate` does).
    """
    class_1D, grid = positions_TD[:1], positions_TD[1:]
    old, new = round(grid.shape[0] ** 0.5), round((tokens - 1) ** 0.5)
    if old == new:
        return positions_TD
    weights = _bicubic_weights(old, new)
    grid = grid.reshape(old, old, -1)
    grid = jnp.einsum("io,jp,opd->ijd", weights, weights, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([class_1D, grid.reshape(new * new, -1)])


def _bicubic_weights(old: int, new: int, a: float = -0.75) -> Array:
    """The [new, old] matrix of one-dim cubic convolution resampling (Keys 1981)."""
    centres = (jnp.arange(new, dtype=jnp.float32) + 0.5) * (old / new) - 0.5
    first = jnp.floor(centres).astype(jnp.int32) - 1
    taps = first[:, None] + jnp.arange(4)[None]
    x = jnp.abs(centres[:, None] - taps)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    weights = jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))
    taps = jnp.clip(taps, 0, old - 1)
    return jnp.zeros((new, old)).at[jnp.arange(new)[:, None], taps].add(weights)
