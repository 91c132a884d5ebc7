"""Beam search: the K likeliest ways to go on are followed at once.

The same search as transformers' `generate(num_beams=K)` without early stopping: the 2K best
continuations keep K beams alive whichever of them end, and a row is done once no living beam can
overtake the worst of its K finished ones.

Shapes in names: B batch, K beams, M candidates, V ids, G tokens written.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from seed_jax.models.generation import (
    NOTHING,
    CachedModel,
    Context,
    Past,
    Rules,
    is_stop,
    read_prompt,
    read_token,
)
from seed_jax.models.layers import Array

# The score of what is not there. It takes part in sums, so it is no infinity.
ABSENT = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Where the search stands.

    Attributes:
      step: int32, tokens written.
      ids_BKG, scores_BK: living beams, best first; log probabilities.
      ended_BKG, ended_scores_BK: finished ones, best first; divided by length ** penalty.
      improvable_B: bool, rows in which a living beam can still overtake a finished one.
      stuck: bool, no candidate of any row goes on.
      past, context: of B * K rows.
    """

    step: Array
    ids_BKG: Array
    scores_BK: Array
    ended_BKG: Array
    ended_scores_BK: Array
    improvable_B: Array
    stuck: Array
    past: Past
    context: Context

    @property
    def going_on(self) -> Array:
        return jnp.any(self.improvable_B) & ~self.stuck

    @property
    def ids_BG(self) -> Array:
        """The best finished beam of each row, int32; `NOTHING` after its end."""
        return self.ended_BKG[:, 0]

    def settled(self) -> np.ndarray:
        """The tokens that all beams of a row share, int32 [B, ...]; `NOTHING` behind them."""
        if not self.going_on:
            return np.asarray(self.ids_BG)
        beams = np.concatenate([self.ids_BKG, self.ended_BKG], axis=1)
        there = np.concatenate([self.scores_BK, self.ended_scores_BK], axis=1) > ABSENT / 2
        settled = np.full(beams.shape[::2], NOTHING, np.int32)
        for row, own in enumerate(beams):
            alive = own[there[row]]
            shared = np.cumprod((alive == alive[0]).all(axis=0)).astype(bool)
            settled[row, shared] = alive[0, shared]
        return settled


def start(
    model: CachedModel, ids_BT: Array, mask_BT: Array, key_B: Array, rules: Rules, _: bool
) -> Beams:
    """Reads the prompts and writes the first token of each beam."""
    beams, batch = rules.decoding.beams, len(ids_BT)
    logits_BV, context = read_prompt(model, ids_BT, mask_BT, rules.decoding.max_new)
    rows_R = jnp.repeat(jnp.arange(batch), beams)
    nothing_BKG = jnp.full((batch, beams, rules.decoding.max_new), NOTHING, jnp.int32)
    absent_BK = jnp.full((batch, beams), ABSENT)
    begun = Beams(
        step=jnp.int32(0),
        ids_BKG=nothing_BKG,
        # All beams begin alike: only one of them may be continued.
        scores_BK=absent_BK.at[:, 0].set(0.0),
        ended_BKG=nothing_BKG,
        ended_scores_BK=absent_BK,
        improvable_B=jnp.ones(batch, bool),
        stuck=jnp.array(False),
        past=rules.start(ids_BT, mask_BT, logits_BV.shape[1]).rows(rows_R),
        context=context.rows(rows_R),
    )
    return write(begun, logits_BV[rows_R], begun.context, rules)


def advance(model: CachedModel, beams: Beams, key_B: Array, until: Array, rules: Rules) -> Beams:
    """Writes until `until` tokens are there, or no beam can improve on what is finished."""

    def going_on(beams: Beams) -> Array:
        return (beams.step < until) & beams.going_on

    def body(beams: Beams) -> Beams:
        last_BK = jax.lax.dynamic_index_in_dim(beams.ids_BKG, beams.step - 1, 2, keepdims=False)
        logits_RV, context = read_token(model, jnp.maximum(last_BK, 0).reshape(-1), beams.context)
        return write(beams, logits_RV, context, rules)

    return jax.lax.while_loop(going_on, body, beams)


def write(beams: Beams, logits_RV: Array, context: Context, rules: Rules) -> Beams:
    """Extends the beams by one token; R = B * K rows."""
    decoding = rules.decoding
    batch, width = beams.scores_BK.shape
    size, step = logits_RV.shape[1], beams.step
    scores_RV = jax.nn.log_softmax(rules.only_allowed(logits_RV, beams.past, step))
    scores_RV = rules.penalize(scores_RV, beams.past)
    totals_BKV = scores_RV.reshape(batch, width, size) + beams.scores_BK[..., None]

    candidates = min(max(2, 1 + len(decoding.stop)) * width, width * size)
    scores_BM, index_BM = jax.lax.top_k(totals_BKV.reshape(batch, -1), candidates)
    parent_BM, token_BM = index_BM // size, (index_BM % size).astype(jnp.int32)
    ids_BMG = _take(beams.ids_BKG, parent_BM).at[:, :, step].set(token_BM)
    ends_BM = is_stop(token_BM, decoding) | (step + 1 == decoding.max_new)

    living_BM = scores_BM + ends_BM * ABSENT
    scores_BK, chosen_BK = jax.lax.top_k(living_BM, width)
    parent_BK, token_BK = (_take(a, chosen_BK) for a in (parent_BM, token_BM))
    rows_R = (parent_BK + width * jnp.arange(batch)[:, None]).reshape(-1)

    # Only the first K may end: the others are there to keep K beams alive.
    ending_BM = ends_BM & (jnp.arange(candidates) < width)[None] & beams.improvable_B[:, None]
    length = (step + 1).astype(jnp.float32) ** decoding.length_penalty
    rated_BM = scores_BM / length + ~ending_BM * ABSENT
    merged_scores = jnp.concatenate([beams.ended_scores_BK, rated_BM], axis=1)
    ended_scores_BK, kept_BK = jax.lax.top_k(merged_scores, width)
    ended_BKG = _take(jnp.concatenate([beams.ended_BKG, ids_BMG], axis=1), kept_BK)

    # While fewer than K have finished, the worst of them counts as absent.
    best_B = scores_BK[:, 0] / length
    return Beams(
        step=step + 1,
        ids_BKG=_take(ids_BMG, chosen_BK),
        scores_BK=scores_BK,
        ended_BKG=ended_BKG,
        ended_scores_BK=ended_scores_BK,
        improvable_B=beams.improvable_B & (best_B > ended_scores_BK[:, -1]),
        stuck=jnp.all(ends_BM),
        past=rules.advance(beams.past.rows(rows_R), token_BK.reshape(-1)),
        context=context.rows(rows_R),
    )


def _take(values_BM: Array, index_BK: Array) -> Array:
    """Entries of the second dim, by row; [B, M, ...] -> [B, K, ...]."""
    return jax.vmap(lambda values, index: values[index])(values_BM, index_BK)
