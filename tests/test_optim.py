"""Schedule, decay mask and loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import causal_qformer
from seed_jax import optim
from seed_jax.optim import LossScale
from seed_jax.tasks.causal_qformer import CausalQFormer
from tests.test_train import small, tiny_causal_qformer


def test_the_schedule_warms_up_and_ends_where_the_recipe_says():
    config = causal_qformer.get_config()
    rate = optim.schedule(config.optimizer, config.steps)
    np.testing.assert_allclose(
        [rate(0), rate(1000), rate(2000), rate(config.steps)],
        [3e-7, (3e-7 + 3e-5) / 2, 3e-5, 3e-6],
        rtol=1e-5,
    )


def test_biases_norms_and_the_temperature_do_not_decay():
    task = CausalQFormer(small(tiny_causal_qformer.get_config()))
    params = nnx.state(nnx.eval_shape(lambda: task.build(rngs=nnx.Rngs(0))))
    mask = optim.decay_mask(params)
    spared = {
        "/".join(map(str, path))
        for path, decays in nnx.to_flat_state(mask)
        if not decays.get_value()
    }
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert {n for n in names if n.endswith(("bias", "scale"))} | {"temperature"} == spared
    assert "qformer/query_tokens" in names - spared


def test_the_loss_scale_halves_on_overflow_and_grows_after_good_steps():
    scale = LossScale.start("float16")
    scale = scale.update(jnp.bool_(False))
    assert (scale.value, scale.skipped) == (2.0**15, 1)
    for _ in range(LossScale.GROW_AFTER):
        scale = scale.update(jnp.bool_(True))
    assert (scale.value, scale.good_steps) == (2.0**16, 0)
    assert (scale.skipped, scale.grown) == (1, 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_precisions_are_not_scaled(precision):
    assert LossScale.start(precision).value == 1
    assert jax.tree.all(jax.tree.map(lambda a: a.weak_type is False, LossScale.start(precision)))
