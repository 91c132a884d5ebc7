"""Gradients of a batch that need not fit in memory at once: it runs in microbatches.

Losses, gradients and metrics are those of the whole batch, dropout masks apart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax import sharding
from seed_jax.models.layers import Array
from seed_jax.tasks import Batch, Task

Metrics = dict[str, Array]


def gradients(
    task: Task,
    merge: Callable[[nnx.State], Any],
    params: nnx.State,
    batch: Batch,
    key: Array,
    *,
    scale: Array,
    count: int,
) -> tuple[nnx.State, Metrics, Any]:
    """Gradients of the loss of `batch`, run in `count` microbatches one after the other.

    Each microbatch is pulled back from the gradient with respect to its outputs. A contrastive loss
    has that gradient once all outputs are known, so a first pass computes them without gradients
    and keeps them (gradient caching, arXiv 2101.06983); all pairs of the batch stay negatives of
    each other. Other losses are linear in the outputs, and their gradient is known beforehand.

    Args:
      merge: makes the model of its trained parameters.
      scale: what the loss is multiplied by, float32.

    Returns:
      The gradients of the scaled loss, the metrics (with 'loss', unscaled), and what the task saw.
    """

    def run(params: nnx.State, part: tuple[Batch, Array]) -> tuple[Any, Any]:
        return task.outputs(merge(params), *part)

    def loss(params: nnx.State, outputs: Any, seen: Any) -> tuple[Array, Metrics]:
        value, metrics = task.loss(merge(params), batch, outputs, seen)
        return value * scale, {"loss": value, **metrics}

    if count == 1:

        def whole(params: nnx.State) -> tuple[Array, tuple[Metrics, Any]]:
            outputs, seen = run(params, (batch, key))
            value, metrics = loss(params, outputs, seen)
            return value, (metrics, seen)

        grads, (metrics, seen) = jax.grad(whole, has_aux=True)(params)
        return grads, metrics, seen

    def joint_loss(params: nnx.State, *stacked: Any) -> tuple[Array, Metrics]:
        return loss(params, *(jax.tree.map(join, part) for part in stacked))

    parts = (split(batch, count), jax.random.split(key, count))

    def all_outputs(params: nnx.State) -> tuple[Any, Any]:
        return jax.lax.map(lambda part: run(params, part), parts)

    if task.contrastive:
        first = all_outputs(params)
        rows, keys = parts
        parts = ({**rows, **first[1]}, keys)
    else:
        first = jax.tree.map(jnp.zeros_like, jax.eval_shape(all_outputs, params))
    (grads, pulls), _ = jax.grad(joint_loss, argnums=(0, 1), has_aux=True)(params, *first)

    def add(grads: nnx.State, one: tuple[Any, Any]) -> tuple[nnx.State, tuple[Any, Any]]:
        part, pull = one
        outputs, back, seen = jax.vjp(lambda params: run(params, part), params, has_aux=True)
        return jax.tree.map(jnp.add, grads, *back(pull)), (outputs, seen)

    grads, (outputs, seen) = jax.lax.scan(add, grads, (parts, pulls))
    _, metrics = joint_loss(params, outputs, seen)
    return grads, metrics, jax.tree.map(join, seen)


def split(batch: Batch, count: int) -> Batch:
    """Row i of a batch goes to microbatch i modulo `count`, so that no row changes its device.

    Arrays with more rows than others hold several for one of theirs, such as the pictures of a row
    of packed captions; these stay together.

    Returns:
      Arrays [count, rows of a microbatch, ...].
    """
    rows = min(len(array) for array in batch.values())

    def divide(array: Array) -> Array:
        array_NM = array.reshape(rows // count, count, len(array) // rows, *array.shape[1:])
        array_NM = array_NM.swapaxes(0, 1).reshape(count, -1, *array.shape[1:])
        return sharding.constrain(array_NM, None, "batch")

    return {name: divide(array) for name, array in batch.items()}


def join(stacked: Array) -> Array:
    """Puts rows back where `split` took them from, [count, rows, ...]; the mean of scalars."""
    if stacked.ndim == 1:
        return stacked.mean()
    return stacked.swapaxes(0, 1).reshape(-1, *stacked.shape[2:])
