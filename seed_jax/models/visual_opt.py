"""OPT with a visual vocabulary: codes are words like any other (SEED, section 3.3).

Ids count on from OPT's words: first the C codes, then [IMG] and [/IMG].

Shapes in names: B batch, T tokens, C codes, K code dim, E word embedding width, V OPT's words.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from seed_jax.models import layers
from seed_jax.models.layers import Array, Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPT, KeysValues, OPTConfig, logits

MARKERS = 2


@dataclasses.dataclass(frozen=True)
class VisualOPTConfig:
    """Sizes; the defaults are SEED-OPT 2.7B's.

    Attributes:
      codes: size of the visual codebook.
      code_dim: width of its vectors.
      picture_codes: codes of a picture.
      code_input: what a code's embedding is: 'codebook', a linear layer on its frozen vector, as in
        the paper, or 'learned', a row of its own, as in SEED-LLaMA.
    """

    opt: OPTConfig = OPTConfig()
    codes: int = 8192
    code_dim: int = 32
    picture_codes: int = 32
    code_input: Literal["codebook", "learned"] = "codebook"

    @property
    def begin(self) -> int:
        """The id of [IMG]."""
        return self.opt.vocab_size + self.codes

    @property
    def end(self) -> int:
        """The id of [/IMG]."""
        return self.begin + 1

    @property
    def vocab_size(self) -> int:
        """Words, codes and markers."""
        return self.end + 1


class VisualOPT(nnx.Module):
    """Words and codes in, logits of both out. On words alone it is OPT, to the bit."""

    def __init__(self, config: VisualOPTConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs):
        word_dim = config.opt.word_dim or config.opt.width
        init = nnx.initializers.normal(0.02)

        def table(rows: int, dim: int, axes: tuple[str | None, str | None]) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (rows, dim)), axes=axes)

        self.opt = OPT(config.opt, compute=compute, rngs=rngs)
        from_codebook = config.code_input == "codebook"
        self.vectors = (
            table(config.codes, config.code_dim, ("codes", None)) if from_codebook else None
        )
        self.project = (
            layers.dense(
                config.code_dim, word_dim, axes=(None, "embed"), compute=compute, rngs=rngs
            )
            if from_codebook
            else None
        )
        own_rows = MARKERS if from_codebook else config.codes + MARKERS
        self.rows = table(own_rows, word_dim, (None, "embed"))
        self.outputs = table(config.codes + MARKERS, word_dim, ("vocab", "embed"))
        self.config = config

    def __call__(self, ids_BT: Array, segments_BT: Array, *, key: Array | None = None) -> Array:
        """Logits float32 [B, T, V + C + 2]; arguments as for `OPT.hidden_states`."""
        return self.logits(self.opt.hidden_states(self.embed(ids_BT), segments_BT, key=key)[0])

    def embed(self, ids_BT: Array) -> Array:
        """Embeddings of words, codes and markers, [B, T, E]."""
        words = self.config.opt.vocab_size
        visual_BT = ids_BT - words
        word_BTE = layers.lookup(self.opt.words, jnp.minimum(ids_BT, words - 1))
        if self.vectors is None or self.project is None:
            visual_BTE = layers.lookup(self.rows, jnp.maximum(visual_BT, 0))
        else:
            code_BT = jnp.clip(visual_BT, 0, self.config.codes - 1)
            marker_BT = jnp.maximum(visual_BT - self.config.codes, 0)
            visual_BTE = jnp.where(
                (visual_BT >= self.config.codes)[..., None],
                layers.lookup(self.rows, marker_BT),
                self.project(layers.lookup(self.vectors, code_BT)),
            )
        return jnp.where((visual_BT >= 0)[..., None], visual_BTE, word_BTE)

    def logits(self, x_BTE: Array) -> Array:
        """Float32 [B, T, V + C + 2]."""
        return jnp.concatenate(
            [self.opt.word_logits(x_BTE), logits(x_BTE, self.outputs[...])], axis=-1
        )

    def next_logits(
        self,
        ids_BT: Array,
        positions_BT: Array,
        mask_BTS: Array,
        cache: list[KeysValues],
        at: Array | int,
    ) -> tuple[Array, list[KeysValues]]:
        """Logits after the last token, float32 [B, V + C + 2], and the cache; see `OPT.cached`."""
        x_BTE, cache = self.opt.cached(self.embed(ids_BT), positions_BT, mask_BTS, cache, at)
        return self.logits(x_BTE[:, -1:])[:, 0], cache

    def empty_cache(self, batch: int, length: int) -> list[KeysValues]:
        """See `OPT.empty_cache`."""
        return self.opt.empty_cache(batch, length)

    def unstack(self) -> None:
        """See `OPT.unstack`."""
        self.opt.unstack()


def as_opt(model: VisualOPT) -> OPT:
    """The same model as an OPT whose words go on with the codes and markers, without adapters.

    Adapters are left out; `lora.merge` first where they should count.
    """
    config = dataclasses.replace(
        model.config.opt,
        vocab_size=model.config.vocab_size,
        tied_head=False,
        lora=LoRAConfig(rank=0),
    )
    plain = nnx.eval_shape(lambda: OPT(config, compute=model.opt.compute, rngs=nnx.Rngs(0)))
    head = model.opt.words if model.opt.head is None else model.opt.head
    weights = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model.opt, nnx.Param))}
    weights["words",] = model.embed(jnp.arange(config.vocab_size)[None])[0]
    weights["head",] = jnp.concatenate([head[...], model.outputs[...]])
    layers.take_weights(plain, weights)
    return plain
