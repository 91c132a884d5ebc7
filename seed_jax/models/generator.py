"""Runs a language model's compiled loops: all at once, or piece by piece for who reads along."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax.models import beam_search, generation
from seed_jax.models.beam_search import Beams
from seed_jax.models.generation import NOTHING, CachedModel, Decoding, Progress, Rules
from seed_jax.models.grammar import Grammar
from seed_jax.models.layers import Array

STREAMED_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written, on the host.

    Attributes:
      ids: int32 [B, G], `NOTHING` after a row's end.
      logits: float32 [B, G, V], the model's own, before any rule; None unless asked for.
    """

    ids: np.ndarray
    logits: np.ndarray | None

    def rows(self) -> list[list[int]]:
        """Each row's ids without what is behind its end; a stop token stays."""
        return [row[row != NOTHING].tolist() for row in self.ids]


class Generator:
    """A language model that writes on. A loop is compiled once for each shape and `Decoding`."""

    def __init__(self, model: nnx.Module):
        """`model` is a `CachedModel`, which is taken apart; it serves no other purpose after.

        It may lie on the host, and is run on the first device.
        """
        assert isinstance(model, CachedModel)
        model.unstack()
        graphdef, state = nnx.split(model)
        self._state = jax.device_put(state, jax.local_devices()[0])

        def start(
            state: nnx.State,
            ids_BT: Array,
            mask_BT: Array,
            key_B: Array,
            rules: Rules,
            logits: bool,
        ) -> Progress | Beams:
            loop = beam_search if rules.decoding.beams > 1 else generation
            return loop.start(nnx.merge(graphdef, state), ids_BT, mask_BT, key_B, rules, logits)

        def advance(
            state: nnx.State,
            progress: Any,
            key_B: Array,
            until: Array | int,
            rules: Rules,
        ) -> Progress | Beams:
            loop = beam_search if rules.decoding.beams > 1 else generation
            return loop.advance(nnx.merge(graphdef, state), progress, key_B, until, rules)

        self._start = jax.jit(start, static_argnames=("rules", "logits"))
        self._advance = jax.jit(advance, static_argnames="rules", donate_argnames="progress")

    def __call__(
        self,
        ids_BT: np.ndarray,
        mask_BT: np.ndarray | None,
        decoding: Decoding,
        *,
        grammar: Grammar | None = None,
        seed: int = 0,
        logits: bool = False,
    ) -> Written:
        """Goes on from prompts.

        Args:
          ids_BT: int32, padded on the left.
          mask_BT: bool, False at padding; None where there is none.
          grammar: None allows any id.
          seed: of sampling. A row's draws depend on the seed and the row's number alone.
          logits: whether to return them; not of a beam search.
        """
        prompt = self._prompt(ids_BT, mask_BT, seed)
        rules = Rules(decoding, grammar)
        progress = self._start(self._state, *prompt, rules=rules, logits=logits)
        progress = self._advance(self._state, progress, prompt[2], decoding.max_new, rules=rules)
        kept = progress.logits_BGV if isinstance(progress, Progress) else None
        return Written(np.asarray(progress.ids_BG), None if kept is None else np.asarray(kept))

    def stream(
        self,
        ids_BT: np.ndarray,
        mask_BT: np.ndarray | None,
        decoding: Decoding,
        *,
        grammar: Grammar | None = None,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """As a call, piece by piece: each time all ids that are certain so far, int32 [B, ...]."""
        prompt = self._prompt(ids_BT, mask_BT, seed)
        rules = Rules(decoding, grammar)
        progress = self._start(self._state, *prompt, rules=rules, logits=False)
        yield progress.settled()
        while progress.going_on:
            until = progress.step + STREAMED_AT_ONCE
            progress = self._advance(self._state, progress, prompt[2], until, rules=rules)
            yield progress.settled()

    @staticmethod
    def _prompt(
        ids_BT: np.ndarray, mask_BT: np.ndarray | None, seed: int
    ) -> tuple[Array, Array, Array]:
        ids = jnp.asarray(ids_BT, jnp.int32)
        mask = jnp.ones(ids.shape, bool) if mask_BT is None else jnp.asarray(mask_BT, bool)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(ids)))
        return ids, mask, keys_B
