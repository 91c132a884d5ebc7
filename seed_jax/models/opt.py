"""OPT (arXiv 2205.01068): a decoder-only language model, with room for adapters and a KV cache.

Shapes in names: B batch, T tokens, S cached positions, D width, N heads, H head dim, L layers,
E word embedding width, V words.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax import sharding
from seed_jax.models import layers, lora
from seed_jax.models.layers import Array, Compute
from seed_jax.models.lora import LoRAConfig

# OPT's position table begins with a row that nothing reads and the one that padding reads.
POSITION_OFFSET = 2

KeysValues = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Sizes; the defaults are OPT-2.7B's.

    Attributes:
      word_dim: width of the word embeddings, where it is not the model's (OPT-350M); 0: it is.
      pre_norm: normalise before each sublayer. OPT-350M does so after it.
      tied_head: the output layer is the word embeddings' own table.
      dropout: of each sublayer's output, in training.
      int8: the layers' kernels are held in 8 bits, and can't train; their adapters can.
    """

    vocab_size: int = 50_272
    width: int = 2560
    depth: int = 32
    heads: int = 32
    mlp_dim: int = 10_240
    max_positions: int = 2048
    word_dim: int = 0
    pre_norm: bool = True
    tied_head: bool = True
    dropout: float = 0.0
    int8: bool = False
    lora: LoRAConfig = LoRAConfig(rank=0)


class Layer(nnx.Module):
    """Causal self-attention and a ReLU feed-forward path, each of which adds to its input."""

    def __init__(self, config: OPTConfig, *, compute: Compute, rngs: nnx.Rngs):
        width = config.width

        def linear(name: str, din: int, dout: int, axes: tuple[str, str]) -> nnx.Linear:
            return lora.linear(
                name,
                din,
                dout,
                axes=axes,
                lora=config.lora,
                int8=config.int8,
                compute=compute,
                rngs=rngs,
            )

        self.attention_norm, self.mlp_norm = (
            layers.layer_norm(width, epsilon=1e-5, compute=compute, rngs=rngs) for _ in range(2)
        )
        self.query, self.key, self.value = (
            linear(name, width, width, ("embed", "heads")) for name in ("query", "key", "value")
        )
        self.out = linear("out", width, width, ("heads", "embed"))
        self.up = linear("up", width, config.mlp_dim, ("embed", "mlp"))
        self.down = linear("down", config.mlp_dim, width, ("mlp", "embed"))
        self.config = config

    def __call__(
        self,
        x_BTD: Array,
        mask_BTS: Array,
        key: Array | None = None,
        past: KeysValues | None = None,
        at: Array | int = 0,
    ) -> tuple[Array, KeysValues]:
        """Runs the layer.

        Args:
          mask_BTS: bool, True where a token may look.
          key: dropout key; None evaluates.
          past: keys and values [B, S, N, H]; those of `x_BTD` are written into them from position
            `at` on. None looks at `x_BTD` alone.

        Returns:
          [B, T, D], and the keys and values that were looked at.
        """
        keys = [None] * 8 if key is None else list(jax.random.split(key, 8))
        h_BTD = self.attention_norm(x_BTD) if self.config.pre_norm else x_BTD
        q_BTNH, k_BTNH, v_BTNH = (
            lora.apply(layer, h_BTD, keys.pop()).reshape(*h_BTD.shape[:2], self.config.heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        k_BSNH, v_BSNH = k_BTNH, v_BTNH
        if past is not None:
            k_BSNH, v_BSNH = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=1)
                for old, new in zip(past, (k_BTNH, v_BTNH), strict=True)
            )
        y_BTNH = layers.attention(q_BTNH, k_BSNH, v_BSNH, mask_BTS[:, None])
        y_BTD = lora.apply(self.out, y_BTNH.reshape(h_BTD.shape), keys.pop())
        x_BTD = x_BTD + layers.dropout(y_BTD, self.config.dropout, keys.pop())
        if not self.config.pre_norm:
            x_BTD = self.attention_norm(x_BTD)

        h_BTD = self.mlp_norm(x_BTD) if self.config.pre_norm else x_BTD
        h_BTF = jax.nn.relu(lora.apply(self.up, h_BTD, keys.pop()))
        y_BTD = lora.apply(self.down, h_BTF, keys.pop())
        x_BTD = x_BTD + layers.dropout(y_BTD, self.config.dropout, keys.pop())
        if not self.config.pre_norm:
            x_BTD = self.mlp_norm(x_BTD)
        return x_BTD, (k_BSNH, v_BSNH)


def causal_mask(segments_BT: Array) -> Array:
    """Who may look where: at itself and earlier tokens of the same sequence; bool [B, T, T].

    Args:
      segments_BT: int, the number of the sequence that a token belongs to; 0 is padding. A mask of
        zeros and ones is one sequence a row.
    """
    length = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    earlier_TT = jnp.tril(jnp.ones((length, length), bool))
    return same_BTT & earlier_TT[None] & (segments_BT > 0)[:, :, None]


def logits(x_BTE: Array, table_VE: Array) -> Array:
    """Products with the rows of a table, float32 [B, T, V], in the precision of `x_BTE`."""
    table_VE = table_VE.astype(x_BTE.dtype)
    if x_BTE.dtype == jnp.float16 and layers.platform() == "cpu":
        # XLA's CPU backend lacks the float16 product with float32 sums that is asked for below.
        x_BTE, table_VE = x_BTE.astype(jnp.float32), table_VE.astype(jnp.float32)
    logits_BTV = layers.times_rows(x_BTE, table_VE, preferred_element_type=jnp.float32)
    return sharding.constrain(logits_BTV, "batch")


class OPT(nnx.Module):
    """Words in, the next word's logits out."""

    def __init__(self, config: OPTConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs):
        width, word_dim = config.width, config.word_dim or config.width
        init = nnx.initializers.normal(0.02)

        def table(rows: int, dim: int, axis: str | None) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (rows, dim)), axes=(axis, "embed"))

        def project(din: int, dout: int) -> nnx.Linear | None:
            if din == dout:
                return None
            return layers.dense(
                din, dout, axes=("embed", None), use_bias=False, compute=compute, rngs=rngs
            )

        self.words = table(config.vocab_size, word_dim, "vocab")
        self.head = None if config.tied_head else table(config.vocab_size, word_dim, "vocab")
        self.positions = table(config.max_positions + POSITION_OFFSET, width, None)
        self.project_in, self.project_out = project(word_dim, width), project(width, word_dim)
        self.layers: Layer | nnx.List[Layer] = layers.stack(
            config.depth, lambda r: Layer(config, compute=compute, rngs=r), rngs=rngs
        )
        self.norm = (
            layers.layer_norm(width, epsilon=1e-5, compute=compute, rngs=rngs)
            if config.pre_norm
            else None
        )
        self.config = config
        self.compute = compute

    def __call__(self, ids_BT: Array, segments_BT: Array, *, key: Array | None = None) -> Array:
        """Logits float32 [B, T, V]; see `hidden_states` for the arguments."""
        words_BTE = layers.lookup(self.words, ids_BT)
        return self.word_logits(self.hidden_states(words_BTE, segments_BT, key=key)[0])

    def hidden_states(
        self,
        words_BTE: Array,
        segments_BT: Array,
        *,
        key: Array | None = None,
        outputs: bool = False,
    ) -> tuple[Array, Array | None]:
        """Runs embedded words through the layers.

        Args:
          segments_BT: as for `causal_mask`.
          key: dropout key; None evaluates.

        Returns:
          [B, T, E], which `word_logits` takes, and with `outputs` each layer's input [L, B, T, D].
        """
        mask_BTT = causal_mask(segments_BT)
        x_BTD = self.embed(words_BTE, mask_BTT.sum(axis=-1) - 1)
        keys_L = None if key is None else jax.random.split(key, self.config.depth)

        def body(x_BTD: Array, layer_and_key: tuple) -> tuple[Array, Array | None]:
            layer, key = layer_and_key
            return layer(x_BTD, mask_BTT, key)[0], x_BTD if outputs else None

        assert isinstance(self.layers, Layer)
        x_BTD, inputs_LBTD = layers.scan(body, x_BTD, (self.layers, keys_L), compute=self.compute)
        return self.finish(x_BTD), inputs_LBTD

    def embed(self, words_BTE: Array, positions_BT: Array) -> Array:
        """Word embeddings and positions [B, T, D]; a position of -1 is padding's."""
        x_BTD = words_BTE.astype(self.compute.dtype)
        if self.project_in is not None:
            x_BTD = self.project_in(x_BTD)
        rows_BTD = layers.lookup(self.positions, positions_BT + POSITION_OFFSET)
        return x_BTD + rows_BTD.astype(self.compute.dtype)

    def finish(self, x_BTD: Array) -> Array:
        """The last layer's output to what is compared with word embeddings, [B, T, E]."""
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return x_BTD if self.project_out is None else self.project_out(x_BTD)

    def word_logits(self, x_BTE: Array) -> Array:
        """Float32 [B, T, V]."""
        table = self.words if self.head is None else self.head
        return logits(x_BTE, table[...])

    def unstack(self) -> None:
        """Takes the layers apart, for `cached`.

        A loop over tokens would otherwise copy every layer's weights out of the stack for each
        token, which on a CPU takes twice as long as the token.
        """
        assert isinstance(self.layers, Layer)
        apart = []
        for i in range(self.config.depth):
            layer = jax.tree.map(lambda p: p[i], self.layers)  # noqa: B023
            for name in lora.TARGETS:
                linear = getattr(layer, name)
                if not isinstance(linear, lora.LoRALinear):
                    setattr(layer, name, layers.RowLinear(linear))
            apart.append(layer)
        self.layers = nnx.List(apart)

    def cached(
        self,
        words_BTE: Array,
        positions_BT: Array,
        mask_BTS: Array,
        cache: list[KeysValues],
        at: Array | int,
    ) -> tuple[Array, list[KeysValues]]:
        """As `hidden_states`, for tokens that also see those in a cache; layers must be unstacked.

        Args:
          mask_BTS: bool, True where a token may look, this call's own places included.
          cache: see `empty_cache`.
          at: the place in the cache where these tokens begin.
        """
        assert isinstance(self.layers, nnx.List)
        x_BTD = self.embed(words_BTE, positions_BT)
        new = []
        for layer, past in zip(self.layers, cache, strict=True):
            x_BTD, keys_values = layer(x_BTD, mask_BTS, None, past, at)
            new.append(keys_values)
        return self.finish(x_BTD), new

    def next_logits(
        self,
        ids_BT: Array,
        positions_BT: Array,
        mask_BTS: Array,
        cache: list[KeysValues],
        at: Array | int,
    ) -> tuple[Array, list[KeysValues]]:
        """Logits after the last token, float32 [B, V], and the cache; see `cached`."""
        words_BTE = layers.lookup(self.words, ids_BT)
        x_BTE, cache = self.cached(words_BTE, positions_BT, mask_BTS, cache, at)
        return self.word_logits(x_BTE[:, -1:])[:, 0], cache

    def empty_cache(self, batch: int, length: int) -> list[KeysValues]:
        """Keys and values of `length` tokens [B, S, N, H], in each layer."""
        config = self.config
        shape = (batch, length, config.heads, config.width // config.heads)
        zeros: Any = jnp.zeros(shape, self.compute.dtype)
        return [(zeros, zeros) for _ in range(config.depth)]
