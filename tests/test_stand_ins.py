"""What stands in a plan for what is not there, and what known outputs of earlier stages save."""

import jax
import pytest
from flax import nnx

from configs import causal_qformer, codebook, seed_opt, tiny_codebook, tiny_seed_opt
from seed_jax import plan, sharding
from seed_jax.planning import cost, stand_ins
from seed_jax.planning import features as feature_cost
from seed_jax.planning.cost import Efficiency
from seed_jax.planning.targets import Target
from seed_jax.train import TASKS
from tests.test_train import small


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (causal_qformer, {"sizes.vit.width": 1408}),
        (codebook, {"sizes.encoder.vit.depth": 39, "teacher_config.hidden_size": 768}),
        (seed_opt, {"tokenizer_sizes.codebook.size": 8192, "sizes.opt.width": 2560}),
    ],
)
def test_stand_ins_of_the_papers_configs(recipe, wanted, tmp_path):
    config = recipe.get_config().unlock()
    said = stand_ins.stand_in(config, stand_ins.CONFIGS / f"{config.task}.py", tmp_path)
    assert said
    task = TASKS[config.task](config)
    for path, value in wanted.items():
        found = task
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value


def test_features_take_the_frozen_networks_out_of_the_step(tmp_path):
    config = small(tiny_codebook.get_config(), init="not there").unlock()
    config.data.features = "not there either"
    recipe = stand_ins.CONFIGS / "tiny_codebook.py"
    # Of the sizes of the recipe beside it, which is not cut down.
    config.image_size = 64
    said = stand_ins.stand_in(config, recipe, tmp_path)
    assert any("config.data.features" in line for line in said)
    mesh = sharding.make_mesh({"data": -1})
    step, current, batch = plan.abstract_step(config, mesh)
    assert plan.held(batch) == 2 * (32 * 128 * 2 + 77 * 128 * 2 + 4)

    plain = config.copy_and_resolve_references()
    plain.data.features = ""
    task = TASKS["codebook"](plain)
    graphdef, model = nnx.split(nnx.eval_shape(lambda: task.build(rngs=nnx.Rngs(0))))
    needed = {
        path: value.size * 4
        for path, value in nnx.to_flat_state(model)
        if path[:2] != ("tokenizer", "encoder") and path[0] != "teacher"
    }
    needed["vision_proj"] = 4 * (128 * 128 + 128)  # that loss.retrieval goes by
    assert plan.held(current.params) + plan.held(current.rest) == sum(needed.values())

    plain_step, plain_current, plain_batch = plan.abstract_step(plain, mesh)
    frozen = jax.make_jaxpr(lambda m, b: task._run_frozen(nnx.merge(graphdef, m), b))(
        model, plain_batch
    )
    flops = [
        cost.work(one.trace(*given).jaxpr.jaxpr).flops
        for one, given in ((plain_step, (plain_current, plain_batch)), (step, (current, batch)))
    ]
    assert flops[0] - flops[1] == cost.work(frozen.jaxpr).flops > 0

    # Which is what the pass costs that writes them, and a run from pictures tells nothing of it.
    a_view = feature_cost.work_of_a_view(config).flops
    assert config.batch_size * a_view == cost.work(frozen.jaxpr).flops
    target = Target(peak={"float32": 1e9}, memory=0, bandwidth=1, link=1, domain=0, host_network=0)
    given = (2.0, target, 5, Efficiency(compute=0.5))
    read, written = feature_cost.told(config, *given)
    row = 2 * (32 * 128 + 77 * 128) + 4
    assert f"{config.batch_size * row / 2 / 1e9:.3g} GB/s" in read
    assert f"{a_view * 1e6 / 5 / 0.5e9 / 3600:.2g} hours a million views" in written
    assert feature_cost.told(plain, *given) == []


def test_known_codes_take_tokenizer_and_pictures_out_of_the_step(tmp_path):
    config = tiny_seed_opt.get_config().unlock()
    config.codes = "not there"
    said = stand_ins.stand_in(config, stand_ins.CONFIGS / "tiny_seed_opt.py", tmp_path)
    assert "config.codes: known, so that no picture is read" in said
    _, current, batch = plan.abstract_step(config, sharding.make_mesh({"data": -1}))
    assert "image" not in batch
    assert {path[0] for path, _ in nnx.to_flat_state(current.rest)} == {"model"}
