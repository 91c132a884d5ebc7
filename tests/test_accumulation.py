"""Microbatches: the numbers of the batch they are of, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax import accumulation, sharding
from seed_jax.models.vit import ViT
from tests import stages

COUNT = 4


@pytest.mark.parametrize(
    ("stage", "frozen_vit"),
    [*((stage, False) for stage in stages.STAGES), ("causal_qformer", True)],
)
def test_microbatches_have_the_gradients_of_their_batch(stage, frozen_vit, tmp_path, monkeypatch):
    changes = {"train_vit": False, "init": stages.save_first(tmp_path)} if frozen_vit else {}
    traced = []
    vit = ViT.__call__
    monkeypatch.setattr(ViT, "__call__", lambda *inputs: traced.append(1) or vit(*inputs))
    config, task = stages.make(stage, tmp_path, **changes)
    graphdef, current, _ = stages.start(config, task)
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    current, _ = stages.place(current, mesh)
    batch = stages.batch(config, task, 0)
    if stage == "seed_opt":
        # Targets are not spread evenly: one microbatch has none.
        batch["pair_target"][1::COUNT] = False
    batch = sharding.put_batch(batch, mesh)

    found, memory = [], []
    for count in (1, COUNT):

        def gradients(params, rest, batch, count=count):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return accumulation.gradients(
                    task,
                    lambda params: nnx.merge(graphdef, params, rest),
                    params,
                    batch,
                    jax.random.key(0),
                    scale=jnp.float32(8),
                    count=count,
                )

        compiled = jax.jit(gradients).lower(current.params, current.rest, batch).compile()
        found.append(compiled(current.params, current.rest, batch))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)

    if frozen_vit:
        # Once for either count: a frozen ViT does not run for the second pass again.
        assert len(traced) == 2
        found = [(grads, metrics) for grads, metrics, _ in found]
    (whole_grads, *whole), (grads, *rest) = found
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole_grads))
    assert largest > 0.01
    for (path, expected), got in zip(
        jax.tree.leaves_with_path(whole_grads), jax.tree.leaves(grads), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * largest, err_msg=name)
    # Metrics, and what codebooks are kept healthy by, are the whole batch's, row by row.
    for expected, got in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert memory[1] < memory[0] / 2


def test_rows_stay_on_their_device_and_pictures_with_their_row():
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    batch = {"row": np.arange(8), "picture": np.arange(16)}
    batch = sharding.put_batch(batch, mesh)

    @jax.jit
    def split(batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return accumulation.split(batch, 2)

    parts = split(batch)
    for name, array in parts.items():
        before = {s.device: set(s.data.tolist()) for s in batch[name].addressable_shards}
        after = {s.device: set(s.data.reshape(-1).tolist()) for s in array.addressable_shards}
        assert before == after
    assert parts["row"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert (parts["picture"] // 2).tolist() == np.repeat(parts["row"], 2, axis=1).tolist()
    assert accumulation.join(parts["row"]).tolist() == list(range(8))
