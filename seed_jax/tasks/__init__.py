"""A task is one stage of SEED's training: what is built, what trains, and the loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from seed_jax.cli import UserError
from seed_jax.data.text import CaptionField
from seed_jax.models.layers import REMAT, Compute

Batch = dict[str, jax.Array]
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def compute_of(config: ConfigDict) -> Compute:
    """How the config says to run a model.

    Raises:
      UserError: an unknown precision or way to recompute.
    """
    for field, known in (("precision", PRECISIONS), ("remat", REMAT)):
        if config[field] not in known:
            raise UserError(f"config.{field} is {config[field]!r}; it can be {', '.join(known)}")
    return Compute(PRECISIONS[config.precision], remat=config.remat, unroll=config.unroll)


def picture_size(config: ConfigDict) -> int:
    """Pixels a side of the pictures that a stage reads; 0: none, as where their codes are known."""
    return 0 if config.get("codes") else config.image_size


class Task(Protocol):
    """What the training loop asks of a stage. `model` is what `build` made.

    Attributes:
      contrastive: whether the loss compares rows. Then `outputs` may run twice, and finds in its
        second batch the dict of what it has seen, so that nothing frozen runs again. If not, the
        loss must be linear in the outputs, with factors that depend on the batch alone.
    """

    contrastive: bool

    def __init__(self, config: ConfigDict) -> None: ...

    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """The module that trains, teachers included; runs under `jax.eval_shape` too."""

    def trains(self, path: tuple) -> bool:
        """Whether the parameter at this path of the module trains."""

    def text_fields(self) -> Mapping[str, CaptionField]:
        """How captions become ids, by the name they get in a batch."""

    def prepare(self, model: Any, batches: Any) -> None:
        """Once, before the first step: loads earlier stages' weights, looks at data if need be."""

    def outputs(self, model: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
        """Runs the networks on some rows of a batch.

        Returns:
          What the loss is made of, with gradients, and what else is seen on the way, for metrics
          and `after_update`. Both are pytrees of arrays with a row for each of the batch, float32
          in the former, and of scalars that are means over equally many rows.
        """

    def loss(
        self, model: Any, batch: Batch, outputs: Any, seen: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and metrics of a whole batch, given what `outputs` made of all its rows."""

    def after_update(self, model: Any, seen: Any, key: jax.Array) -> None:
        """Changes variables of the module in place after the optimizer's update (inside jit)."""

    def save(self, model: Any, path: Path) -> None:
        """Writes the model directory that users load."""
