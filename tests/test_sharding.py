"""The mesh: what fits on it, and that splitting changes no number."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from seed_jax import optim, sharding, state
from seed_jax.cli import UserError
from seed_jax.models import tokenizer
from tests import stages

MESHES = {
    "one": {"data": 1},
    "data": {"data": 2},
    "two axes": {"fsdp": 2, "tensor": 2},
    "fsdp": {"fsdp": 8},
    "all axes": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS = 20


def every_mesh() -> dict[str, dict[str, int]]:
    """All splits of 1, 2, 4 and 8 devices by name; those of `MESHES` have the same ones twice."""
    powers = (1, 2, 4, 8)
    return {
        f"{data} x {fsdp} x {tensor}": {"data": data, "fsdp": fsdp, "tensor": tensor}
        for data, fsdp, tensor in itertools.product(powers, powers, powers)
        if data * fsdp * tensor <= 8
    }


def test_minus_one_takes_what_is_left():
    mesh = sharding.make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 16}])
def test_a_mesh_that_does_not_fit_says_how_many_devices_there_are(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(sizes)


def test_one_mesh_axis_twice_in_one_array_is_an_error_that_names_it():
    mesh = sharding.make_mesh({"tensor": -1})
    with pytest.raises(ValueError, match=r"qkv: mesh axis used twice"):
        sharding.named_sharding(mesh, ("heads", "mlp"), (8, 8), "qkv")


def test_every_large_parameter_of_the_full_model_is_split():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    abstract = nnx.state(
        nnx.eval_shape(
            lambda: tokenizer.SeedTokenizer(tokenizer.TokenizerConfig(), rngs=nnx.Rngs(0))
        )
    )
    shardings = sharding.tree_shardings(abstract, mesh)
    whole = [
        jax.tree_util.keystr(path)
        for (path, array), split in zip(
            jax.tree.leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True
        )
        if array.size > 1e6 and split.spec == PartitionSpec(*[None] * array.ndim)
    ]
    assert whole == []


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_split_changes_no_loss_and_divides_activations(stage, tmp_path, request):
    config, task = stages.make(stage, tmp_path, steps=STEPS)
    graphdef, start, tx = stages.start(config, task)
    batches = [stages.batch(config, task, number) for number in range(STEPS)]
    runs, memory = [], {}
    every = every_mesh() if request.config.getoption("--every-mesh") else {}
    for name, sizes in (MESHES | every).items():
        count = int(np.prod(list(sizes.values())))
        mesh = sharding.make_mesh(sizes, jax.devices()[:count])
        current, shardings = stages.place(start, mesh)
        on_mesh = [sharding.put_batch(batch, mesh) for batch in batches]
        step = state.make_train_step(task, graphdef, tx, config, shardings)
        compiled = step.lower(current, on_mesh[0]).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        losses = []
        for batch in on_mesh:
            current, metrics = compiled(current, batch)
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert len(set(runs[0])) == STEPS
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], rtol=1e-5)
    assert memory["fsdp"] < memory["one"] / 4


def test_the_optimizers_state_is_split_as_its_parameters():
    config, task = stages.make("causal_qformer", Path())
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    tx = optim.make_optimizer(config.optimizer, config.steps)
    model = nnx.eval_shape(lambda: task.build(rngs=nnx.Rngs(0)))
    abstract = jax.eval_shape(lambda model: state.initial(task, config, tx, model), model)
    shardings = sharding.tree_shardings(abstract, mesh)
    params = jax.tree.leaves(shardings.params)
    assert sum(any(split.spec) for split in params) > len(params) / 2
    moments = [split for split in jax.tree.leaves(shardings.opt_state) if any(split.spec)]
    assert moments == 2 * [split for split in params if any(split.spec)]
