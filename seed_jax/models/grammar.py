"""What may follow what in generated text: pictures come out whole, and text holds no codes.

Shapes in names: B rows, V ids. A row's state is how many ids are still to come of the picture it is
in: Q codes and the end marker after [IMG], 0 in text.
"""

import dataclasses

import jax.numpy as jnp

from seed_jax.models.layers import Array
from seed_jax.models.visual_opt import VisualOPTConfig


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Text with whole pictures in it, or without any.

    Attributes:
      words: ids below are words of the text; OPT's vocabulary has more rows than its tokenizer.
      pictures: whether text may turn into a picture by itself.
    """

    config: VisualOPTConfig
    words: int
    pictures: bool

    def start(self, last_B: Array) -> Array:
        """The states after prompts that end in these ids."""
        return self.advance(jnp.zeros_like(last_B), last_B)

    def advance(self, state_B: Array, token_B: Array) -> Array:
        """The states after one more token."""
        begun = self.config.picture_codes + 1
        return jnp.where(token_B == self.config.begin, begun, jnp.maximum(state_B - 1, 0))

    def allowed(self, state_B: Array, room: Array) -> Array:
        """Which ids may come next, bool [B, V].

        Args:
          room: int32, how many ids may still come. No picture begins that could not end.
        """
        config = self.config
        ids_1V = jnp.arange(config.vocab_size)[None]
        text_1V = ids_1V < self.words
        if self.pictures:
            text_1V |= (ids_1V == config.begin) & (room >= config.picture_codes + 2)
        code_1V = (ids_1V >= config.opt.vocab_size) & (ids_1V < config.begin)
        state_B1 = state_B[:, None]
        return jnp.where(
            state_B1 == 0, text_1V, jnp.where(state_B1 == 1, ids_1V == config.end, code_1V)
        )

    def may_stop(self, state_B: Array) -> Array:
        """Whether a row is between pictures, bool [B]."""
        return state_B == 0
