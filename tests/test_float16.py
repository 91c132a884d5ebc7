"""float16: overflows cost a step and no more, and a run ends where a float32 one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax import sharding, state, train
from seed_jax.checkpoint import Checkpoints
from seed_jax.cli import UserError
from seed_jax.data.sources import open_source
from seed_jax.optim import LossScale
from tests import stages


def run_of(stage, folder, **changes):
    """State, shardings, compiled step and three batches of a stage."""
    config, task = stages.make(stage, folder, **changes)
    graphdef, current, tx = stages.start(config, task)
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    current, shardings = stages.place(current, mesh)
    step = state.make_train_step(task, graphdef, tx, config, shardings)
    batches = [sharding.put_batch(stages.batch(config, task, seed), mesh) for seed in range(3)]
    return current, shardings, step, batches


def values(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return all(map(np.array_equal, values(a), values(b)))


def test_an_overflow_is_skipped_and_a_restored_run_goes_on_bitwise(tmp_path):
    current, shardings, step, batches = run_of(
        "codebook", tmp_path, precision="float16", accumulate=2, **{"optimizer.warmup_steps": 0}
    )
    # No float16 gradient is small enough for this.
    scale = dataclasses.replace(LossScale.start("float16"), value=jnp.float32(2.0**40))
    current = dataclasses.replace(current, loss_scale=jax.device_put(scale, shardings.loss_scale))
    before = jax.tree.map(np.array, current)
    given = jax.tree.leaves(current)
    current, metrics = step(current, batches[0])
    assert all(array.is_deleted() for array in given)  # donated
    for part in ("params", "rest", "opt_state"):
        assert same(getattr(current, part), getattr(before, part))
    assert np.isfinite(metrics["loss"])
    assert (metrics["loss_scale"], metrics["skipped"], current.step) == (2.0**39, 1, 1)

    for number in range(1, 30):
        current, metrics = step(current, batches[number % 3])
    skipped = int(metrics["skipped"])
    assert 10 < skipped < 29
    assert metrics["loss_scale"] == 2.0 ** (40 - skipped)
    assert current.loss_scale.good_steps == 30 - skipped
    assert np.isfinite(metrics["grad_norm"])
    assert not same(current.params, before.params)

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(30, current, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    restored = checkpoints.restore(current, shardings).state
    checkpoints.close()
    (current, metrics), (restored, again) = (step(s, batches[0]) for s in (current, restored))
    assert same(current, restored)
    assert same(metrics, again)


def test_gradients_that_no_scale_mends_stop_the_run(tmp_path):
    source, mesh = open_source("embedded"), sharding.make_mesh({"data": -1})
    index_B = jax.device_put(np.arange(8), sharding.batch_sharding(mesh))

    def look_at(scale: float, grad_norm: float) -> None:
        named = {"loss": 1.0, "grad_norm": grad_norm, "loss_scale": scale}
        metrics = {name: jnp.float32(value) for name, value in named.items()}
        train.check_finite(5, metrics, index_B, source, tmp_path, precision="float16")

    look_at(2.0, np.inf)
    look_at(1.0, 3.0)
    with pytest.raises(UserError, match="step 5: grad_norm is inf, on the records"):
        look_at(1.0, np.inf)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_it_ends_where_float32_does(stage, tmp_path):
    ends = []
    for precision in ("float32", "float16"):
        current, _, step, batches = run_of(
            stage,
            tmp_path / precision,
            precision=precision,
            **{"optimizer.warmup_steps": 3},
            steps=30,
        )
        losses = []
        for number in range(30):
            current, metrics = step(current, batches[number % 3])
            losses.append(float(metrics["loss"]))
        assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])  # something was learned
        ends.append(np.mean(losses[-3:]))
    assert metrics["skipped"] < 10
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_frozen_weights_are_float16_but_those_that_decide_codes(tmp_path):
    config, task = stages.make("seed_opt", tmp_path, precision="float16")
    _, current, _ = stages.start(config, task)
    exact = {
        path[:3]
        for path, param in nnx.to_flat_state(current.rest)
        if param[...].dtype != jnp.float16
    }
    assert exact == {
        ("tokenizer", "codebook", "vectors"),
        ("tokenizer", "to_code", 0),
        ("tokenizer", "to_code", 1),
    }
    assert {a.dtype for a in jax.tree.leaves(current.params)} == {np.dtype(np.float32)}
