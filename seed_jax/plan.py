"""Whether a config fits a cluster and what it costs there, before anything is booked.

    python -m seed_jax.plan --config configs/NAME.py --target v100-32gb --devices 64

Compiles the real training step for described devices: no weights, no data, no cluster. Directories
of earlier stages that aren't there are stood in for by their sizes. Needs an environment made of
requirements-plan.txt; in another one it compiles for this machine's processor, and says so. Exits
with 1 if the step does not fit.
"""

import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from seed_jax import cli, sharding, state
from seed_jax.cli import UserError, first_line
from seed_jax.data import features, pipeline
from seed_jax.models import layers
from seed_jax.planning import cost, stand_ins, targets
from seed_jax.planning import features as feature_cost
from seed_jax.planning.cost import Collective, Efficiency, Work
from seed_jax.planning.targets import TARGETS, GiB, Target, Topology
from seed_jax.tasks import picture_size
from seed_jax.train import check_batch, find_task, parse_flags

# Of a device's memory; the rest is for the driver, NCCL's and cuBLAS's buffers and gaps.
USABLE = 0.9
DAY = 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device holds, in bytes.

    Attributes:
      params: parameters and variables, frozen ones included.
      trained: the part of `params` that trains.
      optimizer: its state.
      temporaries: activations, gradients, and all else that a step needs for a while.
    """

    params: int
    trained: int
    optimizer: int
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.params + self.optimizer + self.batch + self.temporaries


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device holds, computes and sends in a step."""

    memory: Memory
    work: Work
    sent: list[Collective]


class TooLarge(UserError):
    """XLA gave up, as it does for TPUs, since a device has too little memory.

    Attributes:
      memory: what is known of it: all but the temporaries, which are 0.
    """

    def __init__(self, message: str, memory: Memory):
        super().__init__(message)
        self.memory = memory


def make(config: ConfigDict, topology: Topology) -> Plan:
    """Plans a config whose directories are all there, if by stand-ins.

    Raises:
      UserError: as `compiled`.
    """
    mesh = sharding.make_mesh(config.mesh.to_dict(), topology.devices)
    memory, hlo = compiled(config, topology, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    # The work of one device: that of its rows of the batch, of which `tensor` has a share.
    alone = sharding.make_mesh({}, jax.devices("cpu")[:1])
    part = config.copy_and_resolve_references().unlock()
    part.batch_size = config.batch_size // shards
    with layers.compiling_for(topology.platform):
        step, small, rows = abstract_step(part, alone)
        counted = cost.work(step.trace(small, rows).jaxpr.jaxpr).times(1 / mesh.shape["tensor"])
    return Plan(memory, counted, cost.collectives(hlo, mesh.size))


def compiled(config: ConfigDict, topology: Topology, mesh: Mesh) -> tuple[Memory, str]:
    """Compiles the step of a config: what it takes, and the program as text.

    Raises:
      TooLarge: XLA knows that it can't fit.
      UserError: the config doesn't work, or not on so many devices, or not in XLA.
    """
    check_batch(config, mesh)
    with layers.compiling_for(topology.platform):
        step, current, batch = abstract_step(config, mesh)
        kept = Memory(
            params=held(current.params) + held(current.rest),
            trained=held(current.params),
            optimizer=held(current.opt_state),
            batch=held(batch),
            temporaries=0,
        )
        lowered = step.lower(current, batch)
    try:
        program = lowered.compile(compiler_options=topology.options())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(first_line(error), kept) from error
        raise UserError(f"XLA can't compile the step: {first_line(error)}") from error
    memory, hlo = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert hlo is not None
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return dataclasses.replace(kept, temporaries=memory.temp_size_in_bytes + max(extra, 0)), hlo


def abstract_step(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Wrapped, Any, Any]:
    """The training step, and the shapes and shardings of the state and the batch it takes."""
    task = find_task(config)(config)
    graphdef, init, shardings, tx = state.lazily(task, config, mesh)
    current = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(init),
        shardings,
    )
    split, rows = sharding.batch_sharding(mesh), config.batch_size
    if folders := features.folders(config.data):
        batch_shapes = features.train_shapes(features.read_settings(folders[0]), rows)
    else:
        batch_shapes = pipeline.train_shapes(
            batch_size=rows, image_size=picture_size(config), texts=task.text_fields()
        )
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for name, (shape, dtype) in batch_shapes.items()
    }
    step = state.make_train_step(task, graphdef, tx, config, shardings)
    return cast(jax.stages.Wrapped, step), current, batch


def held(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def changes(config: ConfigDict, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """What takes less memory, the least costly first, as keys of the config.

    Recomputing costs arithmetic, microbatches cost a pass more or smaller products, and a state
    that is split over more devices has to be gathered by them; each comes on top of the one before.
    """
    ways = list(layers.REMAT)
    later = ways[ways.index(config.remat) + 1 :]
    for way in later:
        yield {"remat": way}
    remat = {"remat": later[-1]} if later else {}
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    rows = config.batch_size // (data * fsdp) // config.get("sequences", {}).get("per_row", 1)
    counts = [config.accumulate * n for n in doublings(rows // config.accumulate)]
    for count in counts:
        yield {**remat, "accumulate": count}
    for n in doublings(data):
        split = (
            {"mesh.fsdp": fsdp * n}
            if config.mesh.data == -1
            else {"mesh.data": data // n, "mesh.fsdp": fsdp * n}
        )
        yield {**remat, **split}
        for count in counts:
            yield {**remat, "accumulate": count, **split}


def doublings(whole: int) -> list[int]:
    """The powers of two from 2 on that divide a whole."""
    return [2**i for i in range(1, whole.bit_length()) if whole % 2**i == 0]


def suggest(config: ConfigDict, topology: Topology, memory: Memory, usable: float) -> str:
    """The first of the changes with which the config fits, as flags, or '' if none does.

    Changes that can't be enough are not compiled. The others are printed with what came of them.

    Args:
      memory: what the config takes as it is.
    """
    mesh = sharding.make_mesh(config.mesh.to_dict(), topology.devices)
    known = config
    for change in changes(config, mesh):
        changed = config.copy_and_resolve_references().unlock()
        changed.update_from_flattened_dict(change)
        split = sharding.make_mesh(changed.mesh.to_dict(), topology.devices)
        # At best, a state shrinks as more devices share it, and activations as microbatches do;
        # gradients, as large as what trains, are left out. Recomputing may save any activations.
        least = (memory.params + memory.optimizer) * mesh.shape["fsdp"] / split.shape["fsdp"]
        if changed.remat == known.remat:
            activations = max(memory.temporaries - memory.trained, 0)
            least += activations * known.accumulate / changed.accumulate
        if least > usable:
            continue
        given = " ".join(f"--config.{key}={value}" for key, value in change.items())
        try:
            memory, _ = compiled(changed, topology, split)
        except TooLarge as error:
            print(f"  {given}: {error}", flush=True)
            continue
        mesh, known = split, changed
        print(f"  {given}: {memory.total / GiB:.2f} GiB", flush=True)
        if memory.total <= usable:
            return given
    return ""


def report(config: ConfigDict, plan: Plan, target: Target, devices: int, share: Efficiency) -> str:
    """The plan in words."""
    peak, used = target.peak[config.precision], plan.work.flops
    memory = plan.memory
    state_bytes = memory.trained + memory.optimizer
    time = cost.roofline(plan.work, state_bytes, plan.sent, target, peak, share)
    sent, run = sum(c.sent() for c in plan.sent), time.step * config.steps
    pictures = config.steps * config.batch_size
    lines = [
        "memory of a device, GiB",
        f"  parameters {memory.params / GiB:.2f} (trained {memory.trained / GiB:.2f}), "
        f"optimizer {memory.optimizer / GiB:.2f}, batch {memory.batch / GiB:.2f}, "
        f"activations and temporaries {memory.temporaries / GiB:.2f}",
        f"  together {memory.total / GiB:.2f} of {target.memory / GiB:.0f}: "
        + ("fits" if memory.total <= USABLE * target.memory else "DOES NOT FIT"),
        "a step",
        f"  {used * devices / 1e15:.3g} PFLOP, {used / 1e12:.3g} TFLOP a device",
        f"  {sent / 1e6:.4g} MB sent by a device, in {sum(c.times for c in plan.sent)} collectives",
        f"  {time.step:.3g} s: compute {time.compute:.3g}, memory {time.memory:.3g}, "
        f"network {time.network:.3g}",
        f"the run: {config.steps} steps of {config.batch_size}, {pictures / 1e6:.4g} million "
        f"pictures, {run / DAY:.3g} days = {run / 3600:.3g} hours",
        *feature_cost.told(config, time.step, target, devices, share),
        "assumed",
        f"  {share.compute:.0%} of {peak / 1e12:.4g} TFLOP/s ({config.precision}); "
        f"{share.memory:.0%} of {target.bandwidth / 1e9:.0f} GB/s of memory, through which "
        "operands and results of each product go, and as much again between them",
        f"  {share.network:.0%} of {target.link / 1e9:.0f} GB/s from device to device"
        + (
            f" and {target.host_network / 1e9:g} GB/s from host to host of {target.domain}"
            if target.host_network
            else ""
        )
        + "; ring algorithms, and nothing sent while computing",
        f"  {USABLE:.0%} of the memory is usable (set XLA_PYTHON_CLIENT_MEM_FRACTION to it); data "
        "come as fast as they are used; no time for checkpoints or restarts; attention without "
        "cuDNN's fused kernels",
    ]
    return "\n".join(lines)


USAGE = (
    "python -m seed_jax.plan --config configs/NAME.py --target v100-32gb --devices 64 "
    "[--config.key=value ...]"
)
_TARGET = flags.DEFINE_enum("target", "v100-32gb", list(TARGETS), "The kind of device.")
_DEVICES = flags.DEFINE_integer("devices", 64, "How many of them.", lower_bound=1)
_EFFICIENCY = flags.DEFINE_float(
    "efficiency", Efficiency.compute, "Share of the peak FLOP/s to count on.", 0.01, 1.0
)


def main(_: list[str]) -> None:
    config: ConfigDict = flags.FLAGS.config.copy_and_resolve_references().unlock()
    target, devices = TARGETS[_TARGET.value], _DEVICES.value
    find_task(config)
    if config.precision not in target.peak:
        raise UserError(
            f"{_TARGET.value} does not compute in {config.precision}; take "
            f"--config.precision={next(iter(target.peak))}"
        )
    topology = targets.topology(target, devices)
    recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0])
    with tempfile.TemporaryDirectory() as folder:
        said = stand_ins.stand_in(config, recipe, Path(folder))
        print(f"{recipe} on {devices} x {_TARGET.value}, mesh {config.mesh.to_dict()}")
        print("\n".join(f"  {line}" for line in said))
        if topology.missing:
            print(
                f"  compiled for {devices} processors in their place, since {topology.missing} is "
                "not installed (requirements-plan.txt): memory and collectives are a rough guide"
            )
        usable = USABLE * target.memory
        try:
            plan = make(config, topology)
            print(report(config, plan, target, devices, Efficiency(compute=_EFFICIENCY.value)))
            memory, fits = plan.memory, plan.memory.total <= usable
        except TooLarge as error:
            print(f"DOES NOT FIT: {error}")
            memory, fits = error.memory, False
        if fits:
            return
        print("looking for what makes it fit", flush=True)
        flags_that_fit = suggest(config, topology, memory, usable)
        if flags_that_fit:
            print(f"it fits with {flags_that_fit}")
        else:
            print("neither remat, accumulate nor mesh.fsdp makes it fit; take more devices")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(
        lambda: app.run(
            main, flags_parser=lambda argv: parse_flags(argv, needed="target", usage=USAGE)
        )
    )
