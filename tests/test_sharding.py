"""The mesh: what fits on it, and that splitting changes no number."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from configs import tiny_causal_qformer, tiny_codebook
from seed_jax import sharding, state
from seed_jax.cli import UserError
from seed_jax.models import tokenizer
from seed_jax.tasks.causal_qformer import CausalQFormer
from seed_jax.tasks.codebook import Codebook
from tests.test_train import small

MESHES = [
    ({"data": 1}, 1),
    ({"data": 8}, 8),
    ({"data": 2, "fsdp": 4}, 8),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
]


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


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Both stages' tasks and configs; stage 2 starts from an untrained stage 1."""
    folder = tmp_path_factory.mktemp("init")
    first = small(tiny_causal_qformer.get_config())
    task = CausalQFormer(first)
    task.save(nnx.jit(lambda: task.build(rngs=nnx.Rngs(0)))(), folder)
    second = small(tiny_codebook.get_config(), init=str(folder))
    second.model.codebook.size = 64
    second.codebook_health.kmeans_batches = 0  # there are no batches to take them from
    return {"causal_qformer": (first, task), "codebook": (second, Codebook(second))}


def losses_on(meshes, config, task, steps: int) -> list[list[float]]:
    """Of a few steps from the same start, on each mesh."""
    graphdef, start, shardings, tx = state.create(task, config, meshes[0])
    model = nnx.merge(graphdef, start.params, start.rest)
    task.prepare(model, iter(()))
    # Copied, not made anew on each mesh: compiling how it is made takes as long as the steps.
    start = jax.tree.map(np.array, state.with_model(start, model, task, shardings))
    runs = []
    for mesh in meshes:
        shardings = sharding.tree_shardings(start, mesh)
        current = jax.device_put(start, shardings)
        step = state.make_train_step(task, graphdef, tx, config, shardings)
        rng = np.random.default_rng(0)
        losses = []
        for _ in range(steps):
            batch = {"image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8)}
            for name, field in task.text_fields().items():
                batch[name] = rng.integers(5, 200, (16, field.length), np.int32)
                batch[f"{name}_mask"] = np.ones((16, field.length), bool)
            current, metrics = step(current, sharding.put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    return runs


@pytest.mark.parametrize("stage", ["causal_qformer", "codebook"])
def test_losses_are_the_same_on_every_split(recipes, stage):
    config, task = recipes[stage]
    meshes = [sharding.make_mesh(sizes, jax.devices()[:count]) for sizes, count in MESHES]
    runs = losses_on(meshes, config, task, steps=4)
    assert len(set(runs[0])) == 4
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], rtol=1e-5)
