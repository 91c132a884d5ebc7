"""The SEED tokenizer: picture -> causal embeddings -> visual codes -> generation embeddings.

Shapes: B batch, S image side, T tokens, Q queries (32), K code dim, D Q-Former width,
E contrastive width, G generation queries (77), O output width.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax import model_dir
from seed_jax.models import layers
from seed_jax.models.layers import Array, Compute
from seed_jax.models.qformer import QFormer, QFormerConfig
from seed_jax.models.quantizer import Codebook, CodebookConfig
from seed_jax.models.vit import ViT, ViTConfig

# Hidden widths of the published SEED-2 file's MLP; fixed there, whatever the other sizes are.
IMAGE_DOWN_WIDTHS = (256, 128, 32)
# Where the learned temperature of the contrastive loss starts.
START_TEMPERATURE = 0.07


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The causal encoder's sizes.

    Attributes:
      contrastive_dim: width of the shared image-text space; 0 leaves out the contrastive heads, as
        published tokenizer files do.
      text_length: longest caption, in tokens.
    """

    vit: ViTConfig = ViTConfig()
    qformer: QFormerConfig = QFormerConfig()
    contrastive_dim: int = 0
    text_length: int = 32


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What the codes are turned into for the image decoder.

    Attributes:
      kind: 'reverse_qformer', or 'image_down', the published SEED-2 file's MLP, which flattens the
        32 positions into one vector.
      queries: of the reverse Q-Former: 77 for Stable Diffusion text states, 1 for an image vector.
      depth: layers of the reverse Q-Former.
      output_dim: width of the generation embeddings.
    """

    kind: Literal["reverse_qformer", "image_down"] = "reverse_qformer"
    queries: int = 77
    depth: int = 4
    output_dim: int = 768

    @property
    def one_vector(self) -> bool:
        """Whether a picture's generation embedding is one vector, not text states."""
        return self.kind == "image_down" or self.queries == 1


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The whole tokenizer's sizes; the defaults are SEED's.

    Attributes:
      decoder_heads, decoder_depth: of the pre-norm blocks after the codebook.
      reconstruction: build the branch that reconstructs causal embeddings. The published SEED-1
        file lacks it.
    """

    encoder: EncoderConfig = EncoderConfig()
    codebook: CodebookConfig = CodebookConfig()
    decoder_heads: int = 12
    decoder_depth: int = 4
    reconstruction: bool = True
    generation: GenerationConfig = GenerationConfig()

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """As the Q-Former, but not causal, without text, and reading dequantised codes."""
        qformer = self.encoder.qformer
        return dataclasses.replace(
            qformer,
            queries=self.generation.queries,
            causal=False,
            depth=self.generation.depth,
            encoder_width=qformer.width,
            vocab_size=0,
        )


class CausalEncoder(nnx.Module):
    """ViT, `ln_vision`, causal Q-Former and the contrastive heads: what stage 1 trains."""

    def __init__(self, config: EncoderConfig, *, compute: Compute, rngs: nnx.Rngs):
        width, dim = config.qformer.width, config.contrastive_dim
        self.vit = ViT(config.vit, compute=compute, rngs=rngs)
        self.ln_vision = layers.layer_norm(
            config.vit.width, epsilon=1e-5, compute=compute, rngs=rngs
        )
        self.qformer = QFormer(config.qformer, compute=compute, rngs=rngs)
        self.vision_proj, self.text_proj = (
            layers.dense(width, dim, axes=("embed", None), compute=compute, rngs=rngs)
            if dim
            else None
            for _ in range(2)
        )
        self.temperature = nnx.Param(jnp.float32(START_TEMPERATURE), axes=()) if dim else None
        self.config = config

    def image_states(self, images: Array) -> Array:
        """ViT features after `ln_vision`, [B, T, ViT width]; images as for `causal_embeddings`."""
        return self.ln_vision(self.vit(images))

    def causal_embeddings(self, images: Array, *, key: Array | None = None) -> Array:
        """Causal embeddings [B, Q, D].

        Args:
          images: [B, S, S, 3], uint8 RGB pixels or floats already normalised.
          key: dropout key; None evaluates.
        """
        return self.qformer(self.image_states(images), key=key)

    def image_features(self, causal_BQD: Array) -> Array:
        """The last query in the contrastive space, float32 [B, E], L2-normalised."""
        assert self.vision_proj is not None
        return l2_normalize(self.vision_proj(causal_BQD[:, -1]))

    def text_features(self, ids_BT: Array, mask_BT: Array, *, key: Array | None = None) -> Array:
        """Captions in the contrastive space, float32 [B, E], L2-normalised.

        Args:
          ids_BT: int32 token ids, [CLS] first, padded on the right.
          mask_BT: bool, False at padding.
        """
        assert self.text_proj is not None
        states_BTD = self.qformer(text_ids_BT=ids_BT, text_mask_BT=mask_BT, key=key)
        return l2_normalize(self.text_proj(states_BTD[:, 0]))


class Decoder(nnx.Module):
    """Learned positions and pre-norm blocks on the dequantised codes, [B, Q, D] -> [B, Q, D]."""

    def __init__(self, config: TokenizerConfig, *, compute: Compute, rngs: nnx.Rngs):
        qformer = config.encoder.qformer
        init = nnx.initializers.truncated_normal(0.02)
        self.positions = nnx.Param(
            init(rngs.params(), (qformer.queries, qformer.width)), axes=(None, "embed")
        )
        self.blocks = layers.stack(
            config.decoder_depth,
            lambda r: layers.Block(
                qformer.width,
                config.decoder_heads,
                4 * qformer.width,
                epsilon=1e-6,
                key_bias=True,
                compute=compute,
                rngs=r,
            ),
            rngs=rngs,
        )
        self.compute = compute

    def __call__(self, x_BQD: Array, *, outputs: bool = False) -> tuple[Array, Array | None]:
        x_BQD = x_BQD + self.positions[...][None].astype(x_BQD.dtype)
        return layers.apply_blocks(self.blocks, x_BQD, compute=self.compute, outputs=outputs)


class GenerationHead(nnx.Module):
    """Dequantised codes -> what the image decoder draws from (section 3.2)."""

    def __init__(self, config: TokenizerConfig, *, compute: Compute, rngs: nnx.Rngs):
        generation, qformer = config.generation, config.encoder.qformer
        width = qformer.width

        def dense(din: int, dout: int, use_bias: bool) -> nnx.Linear:
            return layers.dense(
                din, dout, axes=("embed", None), use_bias=use_bias, compute=compute, rngs=rngs
            )

        self.decoder = Decoder(config, compute=compute, rngs=rngs)
        reverses = generation.kind == "reverse_qformer"
        self.reverse_qformer = (
            QFormer(config.reverse_qformer, compute=compute, rngs=rngs) if reverses else None
        )
        widths = (width, *IMAGE_DOWN_WIDTHS)
        self.down = (
            None
            if reverses
            else nnx.List([dense(i, o, use_bias=False) for i, o in itertools.pairwise(widths)])
        )
        flat = width if reverses else widths[-1] * qformer.queries
        self.proj = dense(flat, generation.output_dim, use_bias=True)

    def __call__(self, x_BQD: Array, *, key: Array | None = None) -> Array:
        """[B, Q, D] -> [B, G, O], or [B, O] where the target is a single vector."""
        x_BQD, _ = self.decoder(x_BQD)
        if self.reverse_qformer is not None:
            y_BGO = self.proj(self.reverse_qformer(x_BQD, key=key))
            return y_BGO[:, 0] if y_BGO.shape[1] == 1 else y_BGO
        return self.proj(self.shrink(x_BQD).reshape(x_BQD.shape[0], -1))

    def shrink(self, x_BQD: Array) -> Array:
        """The `image_down` MLP on each position, [B, Q, D] -> [B, Q, 32]."""
        assert self.down is not None
        for i, linear in enumerate(self.down):
            x_BQD = linear(jax.nn.relu(x_BQD) if i else x_BQD)
        return x_BQD


class SeedTokenizer(nnx.Module):
    """Pictures to 32 causally ordered visual codes, and codes to generation embeddings.

    Source: SEED (arXiv 2307.08041), section 3; SEED-2's heads (arXiv 2310.01218).
    """

    def __init__(
        self,
        config: TokenizerConfig,
        *,
        compute: Compute = Compute(),
        rngs: nnx.Rngs,
    ):
        width, dim = config.encoder.qformer.width, config.codebook.dim

        def dense(din: int, dout: int, *, exact: bool = False) -> nnx.Linear:
            return layers.dense(
                din, dout, axes=("embed", None), compute=compute, rngs=rngs, exact=exact
            )

        self.encoder = CausalEncoder(config.encoder, compute=compute, rngs=rngs)
        self.codebook = Codebook(config.codebook, rngs=rngs)
        # What decides a code runs in float32: rounding here would change codes.
        self.to_code = nnx.List([dense(width, width, exact=True), dense(width, dim, exact=True)])
        self.from_code = nnx.List([dense(dim, dim), dense(dim, width)])
        self.reconstruction = (
            Decoder(config, compute=compute, rngs=rngs) if config.reconstruction else None
        )
        self.generation = GenerationHead(config, compute=compute, rngs=rngs)
        self.config = config

    @classmethod
    def from_pretrained(cls, path: str | Path, *, compute: Compute = Compute()) -> "SeedTokenizer":
        """Loads a model directory.

        Raises:
          UserError: a file is missing or damaged, or it holds another kind of model.
        """
        return model_dir.load(path, "seed_tokenizer", TokenizerConfig, cls, compute)

    def causal_embeddings(self, images: Array) -> Array:
        """[B, S, S, 3] (uint8 pixels, or normalised floats) -> causal embeddings [B, Q, D]."""
        return self.encoder.causal_embeddings(images)

    def code_vectors(self, causal_BQD: Array) -> Array:
        """Causal embeddings to the vectors that are quantised, float32 [B, Q, K]."""
        first, second = self.to_code
        return second(jnp.tanh(first(causal_BQD)))

    def dequantize(self, e_BQK: Array) -> Array:
        """Code vectors to the width of the decoders, [B, Q, K] -> [B, Q, D]."""
        first, second = self.from_code
        return second(jnp.tanh(first(e_BQK)))

    def encode(self, images: Array) -> Array:
        """Visual codes int32 [B, Q]; images as for `causal_embeddings`."""
        return self.codebook.nearest(self.code_vectors(self.causal_embeddings(images)))

    def embed(self, codes_BQ: Array) -> Array:
        """Generation embeddings of codes: [B, 77, O] text states, or [B, O] image embeddings."""
        return self.generation(self.dequantize(self.codebook.lookup(codes_BQ)))

    def reconstruct_causal(self, codes_BQ: Array) -> Array:
        """Causal embeddings [B, Q, D] reconstructed from codes.

        Raises:
          ValueError: this model was built without the reconstruction branch.
        """
        return self.decode_causal(self.dequantize(self.codebook.lookup(codes_BQ)))

    def decode_causal(self, x_BQD: Array) -> Array:
        """The reconstruction branch on dequantised codes, [B, Q, D] -> [B, Q, D]."""
        if self.reconstruction is None:
            raise ValueError(
                "this tokenizer has no reconstruction branch (the published SEED-1 file lacks it)"
            )
        return self.reconstruction(x_BQD)[0]

    def image_features(self, causal_BQD: Array) -> Array:
        """See `CausalEncoder.image_features`."""
        return self.encoder.image_features(causal_BQD)

    def text_features(self, ids_BT: Array, mask_BT: Array) -> Array:
        """See `CausalEncoder.text_features`."""
        return self.encoder.text_features(ids_BT, mask_BT)


def l2_normalize(x_BE: Array) -> Array:
    """Rows of length one, float32."""
    x_BE = x_BE.astype(jnp.float32)
    return x_BE / jnp.maximum(jnp.linalg.norm(x_BE, axis=-1, keepdims=True), 1e-12)
