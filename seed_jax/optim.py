"""The optimizer: schedule, decay mask, optax chain, and loss scaling for float16."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

# As in the original: no weight decay on biases, normalisations and the temperature.
UNDECAYED = {"bias", "q_bias", "k_bias", "v_bias", "scale", "temperature"}


def schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to the final rate at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=optimizer.warmup_from,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=max(steps, optimizer.warmup_steps + 1),
        end_value=optimizer.final_learning_rate,
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to."""

    def decays(path: tuple, _: Any) -> bool:
        names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        return not UNDECAYED.intersection(names)

    return jax.tree.map_with_path(decays, params)


def make_optimizer(optimizer: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with the config's schedule, decay mask and clipping (`clip_norm` 0 clips nothing)."""
    adamw = optax.adamw(
        schedule(optimizer, steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    if not optimizer.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (arXiv 1710.03740, section 3.2), which float16 gradients need.

    Attributes:
      value: float32, what the loss is multiplied by.
      good_steps: int32, finite steps since the last change.
      skipped, grown: int32, how often it was halved, with the step skipped, and doubled so far.
    """

    value: jax.Array
    good_steps: jax.Array
    skipped: jax.Array
    grown: jax.Array

    GROW_AFTER = 2000
    SMALLEST, LARGEST = 1.0, 2.0**24

    @classmethod
    def start(cls, precision: str) -> "LossScale":
        """65536 for float16; 1, for good, for the types that need no scaling."""
        value = 2.0**16 if precision == "float16" else cls.SMALLEST
        return cls(jnp.float32(value), jnp.int32(0), jnp.int32(0), jnp.int32(0))

    def update(self, finite: jax.Array) -> "LossScale":
        """Halves after an overflow, doubles after `GROW_AFTER` finite steps."""
        grow = finite & (self.good_steps + 1 >= self.GROW_AFTER)
        value = jnp.where(finite, self.value, jnp.maximum(self.value / 2, self.SMALLEST))
        value = jnp.where(grow, jnp.minimum(value * 2, self.LARGEST), value)
        good_steps = jnp.where(finite & ~grow, self.good_steps + 1, 0)
        return LossScale(value, good_steps, self.skipped + ~finite, self.grown + grow)
