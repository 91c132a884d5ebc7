"""Plans: what is counted, by numbers worked out by hand, and a tiny config from end to end."""

import dataclasses
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from flax import nnx

from configs import (
    tiny_causal_qformer,
)
from seed_jax import plan, sharding
from seed_jax.cli import UserError
from seed_jax.data import pipeline, sources
from seed_jax.planning import cost, stand_ins, targets
from seed_jax.planning.cost import Efficiency, Work
from seed_jax.planning.targets import TARGETS, GiB, Target, Topology
from seed_jax.train import TASKS
from tests.test_train import small

# Two hosts of four devices: 1 GB/s between devices, 0.1 GB/s between hosts.
MACHINE = Target(
    peak={"float32": 1e12}, memory=1 << 30, bandwidth=1e10, link=1e9, domain=4, host_network=1e8
)

HLO = """\
HloModule jit_train_step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f16[4,8])) -> (s32[], f16[4,8]) {
  %p = (s32[], f16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %h = f16[4,8]{1,0} get-tuple-element(%p), index=1
  %r = f16[4,8]{1,0} all-reduce(%h), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %t = (s32[], f16[4,8]{1,0}) tuple(%i, %r)
}

ENTRY %main (a: f32[100], b: f16[4,8]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f16[4,8]{1,0} parameter(1)
  %start = (f32[100]{0}, f32[400]{0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %done = f32[400]{0} all-gather-done(%start)
  %alone = f32[100]{0} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add
  %s = (s32[], f16[4,8]{1,0}) tuple(%zero, %b)
  %loop = (s32[], f16[4,8]{1,0}) while(%s), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %both = f32[50]{0} reduce-scatter(%a), replica_groups={}, to_apply=%add
  ROOT %next = f32[100]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_collectives_of_a_program():
    gather, loop, scatter, permute = sorted(
        cost.collectives(HLO, 8), key=lambda c: ("gath", "all-r", "redu", "coll").index(key(c))
    )
    assert gather.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert gather.sent() == 400 * 3
    assert loop.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert loop.times == 3
    assert loop.sent() == 3 * 64 * 2 * 1 / 2
    assert scatter.sent() == 400 * 7 / 8
    assert permute.sent() == 400
    # Within a host by links; of four pairs across hosts, each has a quarter of the network.
    assert gather.seconds(MACHINE) == pytest.approx(1200 / 1e9)
    assert loop.seconds(MACHINE) == pytest.approx(192 * 4 / 1e8)
    # One ring through both hosts has it for itself.
    assert scatter.seconds(MACHINE) == pytest.approx(350 / 1e8)


def key(collective: cost.Collective) -> str:
    return {"all-gather": "gath", "all-reduce": "all-r", "reduce-scatter": "redu"}.get(
        collective.kind, "coll"
    )


def test_roofline():
    share = Efficiency(compute=0.5, memory=0.5, network=0.5)
    sent = [cost.Collective("all-reduce", 1e6, np.arange(4)[None], 2)]
    time = cost.roofline(Work(2e12, 1e9), 5e8, sent, MACHINE, 1e12, share)
    assert time.compute == pytest.approx(4)  # 2e12 / 0.5e12
    assert time.memory == pytest.approx(0.6)  # (2 * 1e9 + 2 * 5e8) / 5e9
    assert time.network == pytest.approx(0.006)  # 1e6 * 2 * 2 * 3 / 4 / 0.5e9
    assert time.step == pytest.approx(4.006)
    slow = cost.roofline(Work(2e12, 1e11), 0, [], MACHINE, 1e12, share)
    assert slow.step == slow.memory == pytest.approx(40)


def test_work_counts_loops_branches_and_convolutions():
    def program(w, x, image, kernel):
        def layer(x, _):
            return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None

        x, _ = jax.lax.scan(layer, x, length=5)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return x, jax.lax.conv(image, kernel, (1, 1), "VALID")

    shapes = [(4, 4), (3, 4), (2, 3, 8, 8), (7, 3, 3, 3)]
    jaxpr = jax.make_jaxpr(program)(*(jnp.zeros(shape) for shape in shapes))
    product, convolution = 2 * 3 * 4 * 4, 2 * (2 * 7 * 6 * 6) * (3 * 3 * 3)
    counted = cost.work(jaxpr.jaxpr)
    assert counted.flops == 7 * product + convolution
    read = 4 * (3 * 4 + 4 * 4 + 3 * 4)
    assert counted.traffic == 7 * read + 4 * (2 * 3 * 64 + 7 * 27 + 2 * 7 * 36)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    config = small(tiny_causal_qformer.get_config(), train_vit=False).unlock()
    stand_ins.stand_in(
        config, stand_ins.CONFIGS / "tiny_causal_qformer.py", tmp_path_factory.mktemp("stand_ins")
    )
    topology = Topology(jax.devices(), "cpu")
    return config, topology, plan.make(config, topology)


def test_a_tiny_config(planned):
    config, _, made = planned
    model = nnx.eval_shape(lambda: TASKS[config.task](config).build(rngs=nnx.Rngs(0)))
    sizes = {path: value.size * 4 for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    trained = sum(size for path, size in sizes.items() if path[0] != "vit")
    memory = made.memory
    assert memory.params == sum(sizes.values())
    assert memory.trained == trained
    assert memory.optimizer == pytest.approx(2 * trained, rel=1e-3)  # Adam's moments, and counters
    assert memory.batch == 2 * (32 * 32 * 3 + 4 + 32 * 4 + 32)  # picture, index, text and its mask
    # On a mesh of data alone: the gradients of what trains, and those of the attention, which both
    # towers use, perhaps apart; and the features that each row is compared with.
    reduced = sum(c.sent() for c in made.sent if c.kind == "all-reduce")
    shared = sum(size for path, size in sizes.items() if "attention" in path and path[0] != "vit")
    features = 2 * 16 * 128 * 4
    assert 2 * 7 / 8 * trained <= reduced <= 2 * 7 / 8 * (trained + shared + features)


def test_changes_come_from_the_least_costly_on():
    config = small(tiny_causal_qformer.get_config(), batch_size=32).unlock()
    config.mesh.update(data=-1, tensor=2)  # 4 x 1 x 2, so that a device has 8 rows
    mesh = sharding.make_mesh(config.mesh.to_dict())
    full, counts = {"remat": "full"}, ({}, *({"accumulate": n} for n in (2, 4, 8)))
    assert list(plan.changes(config, mesh)) == [
        {"remat": "dots"},
        full,
        *({**full, **count} for count in counts[1:]),
        *({**full, **count, "mesh.fsdp": 2} for count in counts),
        *({**full, **count, "mesh.fsdp": 4} for count in counts),
    ]
    # Packed captions stay together; a mesh without -1 keeps its size; what is used up is left out.
    config.update(remat="full", accumulate=2, sequences={"per_row": 2})
    config.mesh.data = 4
    assert list(plan.changes(config, mesh)) == [
        {"accumulate": 4},
        {"mesh.data": 2, "mesh.fsdp": 2},
        {"accumulate": 4, "mesh.data": 2, "mesh.fsdp": 2},
        {"mesh.data": 1, "mesh.fsdp": 4},
        {"accumulate": 4, "mesh.data": 1, "mesh.fsdp": 4},
    ]
    for change in plan.changes(config, mesh):
        config.update_from_flattened_dict(change)
        assert sharding.make_mesh(config.mesh.to_dict()).size == 8


SMALL = (
    "--config=configs/tiny_causal_qformer.py",
    "--target=v100-16gb",
    "--devices=8",
    "--config.batch_size=512",
    "--config.image_size=32",
    "--config.unroll=False",
    "--config.model.vit.image_size=32",
    "--config.model.vit.width=32",
    "--config.model.vit.depth=1",
    "--config.model.vit.mlp_dim=64",
    "--config.model.qformer.width=32",
    "--config.model.qformer.depth=1",
    "--config.model.qformer.mlp_dim=64",
    "--config.model.qformer.encoder_width=32",
)


@pytest.fixture
def plan_on(monkeypatch, capsys):
    """The command line on eight devices of so many bytes: its exit status and what it printed."""
    topology = Topology(jax.devices(), "cpu", "a plug-in")
    monkeypatch.setattr(targets, "topology", lambda target, count: topology)

    def run(memory: int, *arguments: str) -> tuple[int, str]:
        device = dataclasses.replace(TARGETS["v100-16gb"], memory=memory)
        monkeypatch.setitem(TARGETS, "v100-16gb", device)
        command, status = ["plan", *SMALL, *arguments], 0
        monkeypatch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
        with flagsaver.flagsaver(), warnings.catch_warnings():
            # ml_collections loads configs by a way that Python means to drop.
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            try:
                plan.main(plan.parse_flags(command, needed="target"))
            except SystemExit as left:
                status = left.code
        return status, capsys.readouterr().out

    return run


def test_flags_that_are_suggested_do_fit(plan_on, monkeypatch):
    status, out = plan_on(GiB)
    assert status == 0
    assert "of 1: fits" in out
    assert "for 8 processors in their place, since a plug-in" in out
    compiled, sizes = plan.compiled, []

    def noted(*given):
        memory, program = compiled(*given)
        sizes.append(memory.total)
        return memory, program

    monkeypatch.setattr(plan, "compiled", noted)
    # Too little for so many activations, enough for the state.
    status, out = plan_on(tight := GiB // 64)
    assert status == 1
    assert "DOES NOT FIT" in out
    found = re.search(r"^it fits with (.*)$", out, re.MULTILINE)[1].split()
    tried = re.findall(r"^  (--config.*): [\d.]+ GiB$", out, re.MULTILINE)
    assert " ".join(found) == tried[-1]
    # What was asked for, and more than one way to change it; the last one is the first that fits.
    assert len(sizes) == 1 + len(tried) > 2
    assert [size > 0.9 * tight for size in sizes] == [True] * len(tried) + [False]
    status, out = plan_on(tight, *found)
    assert status == 0
    assert "DOES NOT FIT" not in out


def test_nothing_makes_it_fit(plan_on):
    status, out = plan_on(1024)
    assert status == 1
    assert "take more devices" in out
    # What could not be enough, and that is all of it, was not compiled.
    assert "--config" not in out.split("looking")[1]


def test_a_program_that_xla_finds_too_large(plan_on, monkeypatch):
    compiled, calls = plan.compiled, []

    def refuse(config, topology, mesh):
        calls.append(config.accumulate)
        if config.accumulate < 2:
            memory, _ = compiled(config, topology, mesh)
            raise plan.TooLarge("no room", dataclasses.replace(memory, temporaries=0))
        return compiled(config, topology, mesh)

    monkeypatch.setattr(plan, "compiled", refuse)
    status, out = plan_on(GiB)
    assert status == 1
    assert "DOES NOT FIT: no room" in out
    assert "--config.remat=full: no room" in out
    assert "it fits with --config.remat=full --config.accumulate=2" in out


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("INTERNAL", UserError, r"^XLA can't compile the step: INTERNAL: first$"),
        ("RESOURCE_EXHAUSTED", plan.TooLarge, r"^RESOURCE_EXHAUSTED: first$"),
    ],
)
def test_what_xla_says_is_one_line(planned, monkeypatch, code, kind, said):
    config, topology, made = planned

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(f"{code}: first\nsecond")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(UserError, match=said) as raised:
        plan.compiled(config, topology, sharding.make_mesh({}, topology.devices[:1]))
    assert type(raised.value) is kind
    if kind is plan.TooLarge:
        assert raised.value.memory.params == made.memory.params
        assert raised.value.memory.temporaries == 0


def test_shapes_are_those_of_the_pipeline():
    config = small(tiny_causal_qformer.get_config())
    texts = TASKS[config.task](config).text_fields()
    sizes = {"batch_size": 16, "image_size": 32, "texts": texts}
    source = sources.open_source("embedded", "train")
    data = pipeline.train_pipeline(source, data=config.data, seed=0, **sizes)
    batch = {name: (array.shape, array.dtype) for name, array in next(data).items()}
    data.close()
    assert pipeline.train_shapes(**sizes) == batch


def test_devices_that_hosts_do_not_come_in():
    with pytest.raises(UserError, match="--devices=12: hosts have 8"):
        targets.topology(TARGETS["v100-16gb"], 12)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("--devices=0", "devices"),
        ("--efficiency=2", "efficiency"),
        ("--config=configs/nowhere.py", "configs/nowhere.py"),
        ("--config.task=none", "config.task is 'none'; the stages are causal_qformer"),
        ("--config.precision=bfloat16", "v100-16gb does not compute in bfloat16"),
        ("--config.mesh.fsdp=3", "config.mesh: data=-1 x fsdp=3 x tensor=1 does not fit 8"),
        ("--config.batch_size=12", "config.batch_size=12 can't be split"),
    ],
)
def test_mistakes(plan_on, changed, said):
    with pytest.raises(UserError) as raised:
        plan_on(GiB, changed)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_target_that_is_unknown():
    done = subprocess.run(
        [sys.executable, "-m", "seed_jax.plan", *SMALL, "--target=v200"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "USE_TORCH": "0", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert all(name in line for name in TARGETS)


@pytest.mark.parametrize(
    ("describe", "target", "said"),
    [
        (targets._gpus, "h100-80gb", "can't describe 8 GPUs; .*: INTERNAL: first$"),
        (targets._tpus, "tpu-v4", "--devices=8: no slice v4:2x2x2 can be described: .* first$"),
        (targets._tpus, "tpu-v5e", "--devices=8: no slice v5e:4x2 can be described: .* first$"),
    ],
)
def test_machines_that_a_plug_in_does_not_know(describe, target, said, monkeypatch):
    from jax._src import xla_bridge

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: first\nsecond")

    class Plugin:
        __path__ = ("/nowhere",)

        @staticmethod
        def _get_library_path() -> str:
            return "/nowhere/library.so"

    for name in ("PATH", "XLA_FLAGS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back when the test ends
    monkeypatch.setattr(targets.importlib, "import_module", lambda name: Plugin)
    monkeypatch.setattr(xla_bridge, "register_plugin", lambda *_, **__: None)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=said):
        describe(TARGETS[target], 8)
