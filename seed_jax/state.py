"""The training state: built abstract, created sharded, advanced by one compiled step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seed_jax import optim, sharding
from seed_jax.accumulation import Metrics, gradients
from seed_jax.optim import LossScale
from seed_jax.tasks import PRECISIONS, Task

TrainStep = Callable[["TrainState", dict[str, jax.Array]], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and the frozen weights beside it.

    Attributes:
      step: int32, batches trained on so far, those that overflowed included.
      params: what the optimizer trains.
      rest: frozen parameters, and variables that the task updates itself.
      opt_state: optax's state, for `params` alone.
      loss_scale: constant 1 unless the precision is float16.
    """

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    opt_state: Any
    loss_scale: LossScale


def trained_by(task: Task) -> Callable[[tuple, Any], bool]:
    """The filter of the parameters that `task` trains."""
    return lambda path, value: isinstance(value, nnx.Param) and task.trains(path)


def lazily(
    task: Task, config: ConfigDict, mesh: Mesh
) -> tuple[nnx.GraphDef, Callable[[], TrainState], TrainState, optax.GradientTransformation]:
    """The task's model and its training state, before there is any of it.

    Returns:
      The graph definition; what makes the first state, already sharded over the mesh, or under
      `jax.eval_shape` its shapes; its shardings (a state of `NamedSharding`s); the optimizer.
    """
    tx = optim.make_optimizer(config.optimizer, config.steps)

    def build() -> nnx.Module:
        return task.build(rngs=nnx.Rngs(config.seed))

    def init() -> TrainState:
        return initial(task, config, tx, build())

    shardings = sharding.tree_shardings(jax.eval_shape(init), mesh)
    graphdef = nnx.graphdef(nnx.eval_shape(build))
    return graphdef, jax.jit(init, out_shardings=shardings), shardings, tx


def initial(
    task: Task, config: ConfigDict, tx: optax.GradientTransformation, model: nnx.Module
) -> TrainState:
    """The state in which training of `model` begins."""
    params, frozen, rest = nnx.state(model, trained_by(task), nnx.Param, ...)
    dtype = PRECISIONS[config.precision]

    def store(param: nnx.Variable) -> nnx.Variable:
        # Nothing is added to frozen weights: the type they compute in is precise enough.
        exact = param.get_metadata().get("exact")
        return param if exact else param.replace(param[...].astype(dtype))

    frozen = jax.tree.map(store, frozen, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return TrainState(
        jnp.int32(0),
        params,
        nnx.merge_state(frozen, rest),
        tx.init(params),
        LossScale.start(config.precision),
    )


def with_model(
    state: TrainState, model: nnx.Module, task: Task, shardings: TrainState
) -> TrainState:
    """`state` with the weights of `model`, placed as `shardings` says."""
    params, rest = nnx.state(model, trained_by(task), ...)
    return jax.device_put(dataclasses.replace(state, params=params, rest=rest), shardings)


def make_train_step(
    task: Task,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    shardings: TrainState,
) -> TrainStep:
    """The compiled step: (state, batch) -> (state, metrics). The old state's memory is reused."""
    learning_rate = optim.schedule(config.optimizer, config.steps)
    mesh = jax.tree.leaves(shardings)[0].mesh

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, metrics, seen = gradients(
                task,
                lambda params: nnx.merge(graphdef, params, state.rest),
                state.params,
                batch,
                key,
                scale=state.loss_scale.value,
                count=config.accumulate,
            )
        grads = jax.tree.map(lambda g: g / state.loss_scale.value, grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        # A copy: what the task changes in place must not change in the old state too, to which a
        # step that overflowed goes back.
        model = nnx.merge(graphdef, params, state.rest, copy=True)
        task.after_update(model, seen, key)
        params, rest = nnx.state(model, trained_by(task), ...)
        new = TrainState(state.step + 1, params, rest, opt_state, state.loss_scale)
        updates_made = state.step - state.loss_scale.skipped
        metrics |= {"learning_rate": learning_rate(updates_made), "grad_norm": grad_norm}
        if config.precision == "float16":
            finite = jnp.isfinite(grad_norm)
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            loss_scale = state.loss_scale.update(finite)
            new = dataclasses.replace(kept, step=state.step + 1, loss_scale=loss_scale)
            metrics |= {
                "loss_scale": loss_scale.value,
                "skipped": loss_scale.skipped,
                "grown": loss_scale.grown,
            }
        return new, metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
