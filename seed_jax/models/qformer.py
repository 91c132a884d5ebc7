"""The Q-Former: a BERT whose learned queries read an encoder, and which can read text too.

Shapes: B batch, Q queries, T text tokens, X = Q + T positions of a joint pass, E encoder tokens,
D width, N heads, H head dim, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax.models import layers
from seed_jax.models.layers import Array, Compute


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes; the defaults are SEED's causal Q-Former (BERT base).

    Attributes:
      queries: 0 leaves out what reads an encoder: a BERT that reads text alone.
      causal: queries see only the queries before them (and themselves).
      cross_attention_every: layers 0, k, 2k, … read the encoder.
      encoder_width: width of what the queries read.
      vocab_size: of the text tower; 0 builds none.
      max_positions: longest text.
    """

    queries: int = 32
    causal: bool = True
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    encoder_width: int = 1408
    cross_attention_every: int = 2
    vocab_size: int = 0
    max_positions: int = 512
    dropout: float = 0.1
    epsilon: float = 1e-12


class Attention(nnx.Module):
    """BERT's attention sublayer: attend, project, add, normalise (post-norm)."""

    def __init__(
        self, config: QFormerConfig, source_width: int, *, compute: Compute, rngs: nnx.Rngs
    ):
        width = config.width
        self.query = layers.dense(width, width, axes=("embed", "heads"), compute=compute, rngs=rngs)
        self.key, self.value = (
            layers.dense(source_width, width, axes=("embed", "heads"), compute=compute, rngs=rngs)
            for _ in range(2)
        )
        self.out = layers.dense(width, width, axes=("heads", "embed"), compute=compute, rngs=rngs)
        self.norm = layers.layer_norm(width, epsilon=config.epsilon, compute=compute, rngs=rngs)
        self.heads = config.heads
        self.dropout = config.dropout

    def __call__(
        self, x_BTD: Array, source_BSD: Array, mask: Array | None, key: Array | None
    ) -> Array:
        q_BTNH, k_BSNH, v_BSNH = (
            x.reshape(*x.shape[:2], self.heads, -1)
            for x in (self.query(x_BTD), self.key(source_BSD), self.value(source_BSD))
        )
        probs_key, out_key = (None, None) if key is None else jax.random.split(key)
        y_BTNH = layers.attention(
            q_BTNH, k_BSNH, v_BSNH, mask, dropout_rate=self.dropout, key=probs_key
        )
        y_BTD = self.out(y_BTNH.reshape(x_BTD.shape))
        return self.norm(layers.dropout(y_BTD, self.dropout, out_key) + x_BTD)


class FeedForward(nnx.Module):
    """BERT's feed-forward sublayer, post-norm."""

    def __init__(self, config: QFormerConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.mlp = layers.MLP(config.width, config.mlp_dim, compute=compute, rngs=rngs)
        self.norm = layers.layer_norm(
            config.width, epsilon=config.epsilon, compute=compute, rngs=rngs
        )
        self.dropout = config.dropout

    def __call__(self, x_BTD: Array, key: Array | None) -> Array:
        return self.norm(layers.dropout(self.mlp(x_BTD), self.dropout, key) + x_BTD)


class Layer(nnx.Module):
    """Self-attention over queries and text together, then a feed-forward path for each."""

    def __init__(self, config: QFormerConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.attention = Attention(config, config.width, compute=compute, rngs=rngs)
        self.query_feed_forward = FeedForward(config, compute=compute, rngs=rngs)
        self.text_feed_forward = (
            FeedForward(config, compute=compute, rngs=rngs) if config.vocab_size else None
        )

    def __call__(
        self,
        x_BXD: Array,
        queries: int,
        mask: Array | None,
        cross: Attention | None,
        encoder_BED: Array | None,
        key: Array | None,
    ) -> Array:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        x_BXD = self.attention(x_BXD, x_BXD, mask, keys[0])
        query_BQD, text_BTD = x_BXD[:, :queries], x_BXD[:, queries:]
        parts = []
        if queries:
            if cross is not None:
                assert encoder_BED is not None
                query_BQD = cross(query_BQD, encoder_BED, None, keys[1])
            parts.append(self.query_feed_forward(query_BQD, keys[2]))
        if text_BTD.shape[1]:
            assert self.text_feed_forward is not None
            parts.append(self.text_feed_forward(text_BTD, keys[3]))
        return jnp.concatenate(parts, axis=1)


def attention_mask(queries: int, text_mask_BT: Array | None, *, causal: bool) -> Array | None:
    """Who may attend to whom in a pass over `queries` queries followed by text.

    Queries are causal among themselves if asked for; everything else is open both ways, but for
    text padding, which nobody sees.

    Args:
      text_mask_BT: bool, True at tokens, False at padding; None for a pass without text.

    Returns:
      bool [B or 1, 1, X, X] (or [B, 1, 1, T] for text alone); None where all is open.
    """
    if text_mask_BT is None:
        return jnp.tril(jnp.ones((queries, queries), bool))[None, None] if causal else None
    padding_B11X = jnp.pad(text_mask_BT.astype(bool), ((0, 0), (queries, 0)), constant_values=True)[
        :, None, None
    ]
    if not (queries and causal):
        return padding_B11X
    total = queries + text_mask_BT.shape[1]
    allowed_XX = jnp.ones((total, total), bool)
    corner = jnp.tril(jnp.ones((queries, queries), bool))
    return allowed_XX.at[:queries, :queries].set(corner)[None, None] & padding_B11X


class QFormer(nnx.Module):
    """Learned queries that read an encoder through cross-attention; optionally a text tower.

    Source: BLIP-2 (arXiv 2301.12597, section 3.1); the causal mask is SEED's (section 3.1).
    """

    def __init__(self, config: QFormerConfig, *, compute: Compute, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        width = config.width

        def table(rows: int, axis: str | None) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (rows, width)), axes=(axis, "embed"))

        self.query_tokens = table(config.queries, None) if config.queries else None
        self.words = table(config.vocab_size, "vocab") if config.vocab_size else None
        self.positions = table(config.max_positions, None) if config.vocab_size else None
        self.norm = layers.layer_norm(width, epsilon=config.epsilon, compute=compute, rngs=rngs)
        self.layers = layers.stack(
            config.depth, lambda r: Layer(config, compute=compute, rngs=r), rngs=rngs
        )
        self.cross = (
            layers.stack(
                -(-config.depth // config.cross_attention_every),
                lambda r: Attention(config, config.encoder_width, compute=compute, rngs=r),
                rngs=rngs,
            )
            if config.queries
            else None
        )
        self.config = config
        self.compute = compute

    def __call__(
        self,
        encoder_BED: Array | None = None,
        text_ids_BT: Array | None = None,
        text_mask_BT: Array | None = None,
        *,
        key: Array | None = None,
    ) -> Array:
        """Runs the queries (when there is an encoder to read), the text (when given), or both.

        Args:
          encoder_BED: what the queries read; None runs text alone.
          text_ids_BT: int32 token ids; None runs the queries alone.
          text_mask_BT: bool, False at padding.
          key: dropout key; None evaluates.

        Returns:
          [B, X, D]: queries first, then text.
        """
        return self.hidden_states(encoder_BED, text_ids_BT, text_mask_BT, key=key, every=False)[-1]

    def hidden_states(
        self,
        encoder_BED: Array | None = None,
        text_ids_BT: Array | None = None,
        text_mask_BT: Array | None = None,
        *,
        key: Array | None = None,
        every: bool = True,
    ) -> list[Array]:
        """The embedding and every layer's output, L + 1 of [B, X, D]; arguments as for a call.

        Without `every`, the last alone.
        """
        x_BXD, queries, mask = self._embed(encoder_BED, text_ids_BT, text_mask_BT)
        embed_key, layer_keys = None, None
        if key is not None:
            embed_key, layers_key = jax.random.split(key)
            layer_keys = jax.random.split(layers_key, self.config.depth)
        x_BXD = layers.dropout(x_BXD, self.config.dropout, embed_key)
        hidden = [x_BXD]
        size = self.config.cross_attention_every

        def group(x_BXD: Array, stacked: tuple) -> tuple[Array, list[Array]]:
            """Layers of which the first reads the encoder."""
            members, cross, keys = stacked
            seen = []
            for i in range(jax.tree.leaves(members)[0].shape[0]):
                layer, layer_key = jax.tree.map(lambda p: p[i], (members, keys))  # noqa: B023
                x_BXD = layer(
                    x_BXD, queries, mask, cross if i == 0 else None, encoder_BED, layer_key
                )
                seen.append(x_BXD)
            return x_BXD, seen if every else []

        # Layers come in groups that begin with cross-attention; a depth that is no multiple of the
        # group leaves a short one, which runs after the loop.
        whole, rest = divmod(self.config.depth, size)
        split = whole * size
        per_layer = (self.layers, layer_keys)
        grouped, grouped_keys = jax.tree.map(
            lambda p: p[:split].reshape(whole, size, *p.shape[1:]), per_layer
        )
        cross = jax.tree.map(lambda p: p[:whole], self.cross)
        if whole:
            x_BXD, seen = layers.scan(
                group, x_BXD, (grouped, cross, grouped_keys), compute=self.compute
            )
            if every:
                hidden += [seen[i % size][i // size] for i in range(split)]
        if rest:
            members, keys = jax.tree.map(lambda p: p[split:], per_layer)
            last_cross = jax.tree.map(lambda p: p[-1], self.cross)
            x_BXD, seen = group(x_BXD, (members, last_cross, keys))
            hidden += seen
        return hidden if every else [x_BXD]

    def _embed(
        self, encoder_BED: Array | None, text_ids_BT: Array | None, text_mask_BT: Array | None
    ) -> tuple[Array, int, Array | None]:
        """The normalised input embeddings, how many of them are queries, and the mask."""
        parts = []
        queries = 0
        if encoder_BED is not None:
            assert self.query_tokens is not None
            queries = self.config.queries
            shape = (encoder_BED.shape[0], queries, self.config.width)
            parts.append(jnp.broadcast_to(self.query_tokens[...][None], shape))
        if text_ids_BT is not None:
            assert self.words is not None and self.positions is not None
            words_BTD = layers.lookup(self.words, text_ids_BT)
            parts.append(words_BTD + self.positions[: text_ids_BT.shape[1]][None])
        mask = attention_mask(queries, text_mask_BT, causal=self.config.causal and queries > 0)
        return self.norm(jnp.concatenate(parts, axis=1)), queries, mask
