"""Writing on from a prompt: one compiled loop over a KV cache of fixed size.

Prompts are padded on the left. Greedy decoding and sampling are here; `beam_search.py` has the
other loop.

Shapes in names: B batch, T prompt tokens, S = T + the most that can be written, V ids, G tokens
written.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from seed_jax.models.grammar import Grammar
from seed_jax.models.layers import Array

# What stands after the end of a row, and is no token.
NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; the defaults are greedy.

    Attributes:
      max_new, min_new: bounds of how many tokens are written.
      stop: ids that end a row.
      beams: of a beam search; 1 searches none.
      length_penalty: beams are ranked by log probability / length ** penalty.
      temperature: of sampling; 0 takes the likeliest token.
      top_k: sample among so many likeliest tokens; 0 among all.
      top_p: sample among the likeliest tokens that together reach this probability.
      repetition_penalty: above 1, words that were there before become less likely.
    """

    max_new: int = 32
    min_new: int = 0
    stop: tuple[int, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@runtime_checkable
class CachedModel(Protocol):
    """A language model that can go on from a cache; `OPT` and `VisualOPT` are."""

    def next_logits(
        self, ids_BT: Array, positions_BT: Array, mask_BTS: Array, cache: Any, at: Array | int
    ) -> tuple[Array, Any]:
        """Logits after the last token, float32 [B, V], and the cache; see `OPT.cached`."""

    def empty_cache(self, batch: int, length: int) -> Any:
        """A pytree of arrays, batch first."""

    def unstack(self) -> None:
        """Before any other call."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a model has read.

    Attributes:
      mask_BS: bool, the places of the cache that hold tokens.
      position_B: int32, of the next token among its row's tokens.
      at: int32, the next token's place in the cache.
    """

    cache: Any
    mask_BS: Array
    position_B: Array
    at: Array

    def rows(self, index_R: Array) -> "Context":
        """Some rows, in this order, repeated or not."""
        cache, mask_RS, position_R = jax.tree.map(
            lambda a: a[index_R], (self.cache, self.mask_BS, self.position_B)
        )
        return Context(cache, mask_RS, position_R, self.at)


def read_prompt(
    model: CachedModel, ids_BT: Array, mask_BT: Array, new: int
) -> tuple[Array, Context]:
    """Logits [B, V] after prompts, with room for `new` tokens."""
    batch, length = ids_BT.shape
    mask_BS = jnp.pad(mask_BT, ((0, 0), (0, new)))
    earlier_TS = jnp.tril(jnp.ones((length, length + new), bool))
    count_BT = jnp.cumsum(mask_BT, axis=1)
    logits_BV, cache = model.next_logits(
        ids_BT,
        count_BT * mask_BT - 1,
        earlier_TS[None] & mask_BS[:, None],
        model.empty_cache(batch, length + new),
        0,
    )
    return logits_BV, Context(cache, mask_BS, count_BT[:, -1], jnp.int32(length))


def read_token(model: CachedModel, token_B: Array, context: Context) -> tuple[Array, Context]:
    """Logits [B, V] after one more token."""
    mask_BS = context.mask_BS | (jnp.arange(context.mask_BS.shape[1]) == context.at)[None]
    logits_BV, cache = model.next_logits(
        token_B[:, None], context.position_B[:, None], mask_BS[:, None], context.cache, context.at
    )
    return logits_BV, Context(cache, mask_BS, context.position_B + 1, context.at + 1)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules that hold for every way of choosing.

    Attributes:
      grammar: None allows any id.
    """

    decoding: Decoding
    grammar: Grammar | None

    def start(self, ids_BT: Array, mask_BT: Array, vocab_size: int) -> "Past":
        """What the rules need to know of prompts."""
        state_B = jnp.zeros(ids_BT.shape[0], jnp.int32)
        if self.grammar is not None:
            state_B = self.grammar.start(ids_BT[:, -1])
        seen_BV = jnp.zeros((len(ids_BT), vocab_size), bool)
        if self.decoding.repetition_penalty != 1:
            rows_B1 = jnp.arange(len(ids_BT))[:, None]
            seen_BV = seen_BV.at[rows_B1, jnp.where(mask_BT, ids_BT, vocab_size)].set(True)
        return Past(state_B, seen_BV)

    def only_allowed(self, logits_BV: Array, past: "Past", step: Array) -> Array:
        """Minus infinity where the grammar, or the least length, forbids an id."""
        allowed_BV = jnp.ones_like(logits_BV, bool)
        between_B = jnp.ones(len(logits_BV), bool)
        if self.grammar is not None:
            allowed_BV = self.grammar.allowed(past.state_B, self.decoding.max_new - step)
            between_B = self.grammar.may_stop(past.state_B)
        if self.decoding.min_new and self.decoding.stop:
            early_B = (step < self.decoding.min_new) & between_B
            stops_V = is_stop(jnp.arange(logits_BV.shape[1]), self.decoding)
            allowed_BV &= ~(early_B[:, None] & stops_V[None])
        return jnp.where(allowed_BV, logits_BV, -jnp.inf)

    def penalize(self, scores_BV: Array, past: "Past") -> Array:
        """Makes words that were there before less likely (arXiv 1909.05858, section 4.1)."""
        penalty = self.decoding.repetition_penalty
        if penalty == 1:
            return scores_BV
        seen_BV = past.seen_BV
        if self.grammar is not None:
            # A picture may well hold a code twice.
            seen_BV &= (jnp.arange(scores_BV.shape[1]) < self.grammar.words)[None]
        lower_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
        return jnp.where(seen_BV, lower_BV, scores_BV)

    def advance(self, past: "Past", token_B: Array) -> "Past":
        """What the rules need to know one token on."""
        state_B, seen_BV = past.state_B, past.seen_BV
        if self.grammar is not None:
            state_B = self.grammar.advance(state_B, token_B)
        if self.decoding.repetition_penalty != 1:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        return Past(state_B, seen_BV)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """What the rules know of what was written: the grammar's state, and the ids that were there."""

    state_B: Array
    seen_BV: Array

    def rows(self, index_R: Array) -> "Past":
        return jax.tree.map(lambda a: a[index_R], self)


def is_stop(ids: Array, decoding: Decoding) -> Array:
    """Whether ids, of any shape, end a row."""
    return jnp.isin(ids, jnp.array(decoding.stop, jnp.int32))


def sample(scores_BV: Array, key_B: Array, decoding: Decoding) -> Array:
    """The next tokens int32 [B], of scores that the rules have been applied to."""
    if decoding.temperature == 0:
        return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    scores_BV = scores_BV / decoding.temperature
    size = scores_BV.shape[1]
    if 0 < decoding.top_k < size:
        kth_B = jax.lax.top_k(scores_BV, decoding.top_k)[0][:, -1]
        scores_BV = jnp.where(scores_BV < kth_B[:, None], -jnp.inf, scores_BV)
    if decoding.top_p < 1:
        sorted_BV = jax.lax.top_k(scores_BV, size)[0]
        probs_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        last_B = jnp.maximum(jnp.sum(before_BV < decoding.top_p, axis=-1) - 1, 0)
        least_B1 = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=1)
        scores_BV = jnp.where(scores_BV < least_B1, -jnp.inf, scores_BV)
    return jax.vmap(jax.random.categorical)(key_B, scores_BV).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the loop stands.

    Attributes:
      step: int32, tokens written.
      ids_BG: int32, what was written; `NOTHING` after a row's end.
      done_B: bool, rows that have ended.
      logits_BGV: the model's own logits, before any rule; None unless asked for.
    """

    step: Array
    ids_BG: Array
    done_B: Array
    past: Past
    context: Context
    logits_BGV: Array | None

    @property
    def going_on(self) -> Array:
        return ~jnp.all(self.done_B)

    def settled(self) -> np.ndarray:
        """The tokens that stay, whatever comes, int32 [B, ...]; `NOTHING` after a row's end."""
        return np.asarray(self.ids_BG)[:, : int(self.step)]


def start(
    model: CachedModel,
    ids_BT: Array,
    mask_BT: Array,
    key_B: Array,
    rules: Rules,
    keep_logits: bool,
) -> Progress:
    """Reads the prompts and writes the first token."""
    decoding, batch = rules.decoding, len(ids_BT)
    logits_BV, context = read_prompt(model, ids_BT, mask_BT, decoding.max_new)
    shape = (batch, decoding.max_new)
    progress = Progress(
        jnp.int32(0),
        jnp.full(shape, NOTHING, jnp.int32),
        jnp.zeros(batch, bool),
        rules.start(ids_BT, mask_BT, logits_BV.shape[1]),
        context,
        jnp.zeros((*shape, logits_BV.shape[1])) if keep_logits else None,
    )
    return write(progress, logits_BV, context, key_B, rules)


def advance(
    model: CachedModel, progress: Progress, key_B: Array, until: Array, rules: Rules
) -> Progress:
    """Writes until `until` tokens are there, or all rows have ended."""

    def going_on(progress: Progress) -> Array:
        return (progress.step < until) & progress.going_on

    def body(progress: Progress) -> Progress:
        last_B = jax.lax.dynamic_index_in_dim(progress.ids_BG, progress.step - 1, 1, keepdims=False)
        # A row that has ended goes on with any token; nothing of it is kept.
        logits_BV, context = read_token(model, jnp.maximum(last_B, 0), progress.context)
        return write(progress, logits_BV, context, key_B, rules)

    return jax.lax.while_loop(going_on, body, progress)


def write(
    progress: Progress, logits_BV: Array, context: Context, key_B: Array, rules: Rules
) -> Progress:
    """Chooses one more token a row."""
    step, past = progress.step, progress.past
    scores_BV = rules.only_allowed(rules.penalize(logits_BV, past), past, step)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
    token_B = sample(scores_BV, keys_B, rules.decoding)
    done_B = (
        progress.done_B | is_stop(token_B, rules.decoding) | (step + 1 == rules.decoding.max_new)
    )
    kept_B = jnp.where(progress.done_B, NOTHING, token_B)
    logits_BGV = progress.logits_BGV
    if logits_BGV is not None:
        logits_BGV = logits_BGV.at[:, step].set(logits_BV)
    return Progress(
        step + 1,
        progress.ids_BG.at[:, step].set(kept_B),
        done_B,
        rules.advance(past, token_B),
        context,
        logits_BGV,
    )
