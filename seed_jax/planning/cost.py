"""What a step costs: its arithmetic, what it sends between devices, and how long that takes."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from seed_jax.planning.targets import Target

# Bytes of an element, by HLO's names; types narrower than a byte don't come up.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of the matrix products and convolutions, and bytes of their operands and results."""

    flops: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.traffic + other.traffic)

    def times(self, count: float) -> "Work":
        return Work(self.flops * count, self.traffic * count)


def work(jaxpr: Jaxpr) -> Work:
    """Counts a traced program, loops as often as they run.

    XLA's own analysis counts the body of a loop once. A loop whose length the data decide counts
    once here too; of the branches of a condition, the one with the most FLOPs.
    """
    total = Work()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = _aval(eqn.invars[0]).shape
            depth = math.prod(shape[dim] for dim in contract)
            total += _product(eqn, depth)
        elif name == "conv_general_dilated":
            kernel = _aval(eqn.invars[1]).shape
            out_dim = eqn.params["dimension_numbers"].rhs_spec[0]
            total += _product(eqn, math.prod(kernel) // kernel[out_dim])
        elif name == "cond":
            branches = [work(branch.jaxpr) for branch in eqn.params["branches"]]
            total += max(branches, key=lambda branch: branch.flops)
        else:
            times = eqn.params["length"] if name == "scan" else 1
            for inner in _inner(eqn.params):
                total += work(inner).times(times)
    return total


def _product(eqn: Any, depth: int) -> Work:
    arrays = [_aval(v) for v in (*eqn.invars, *eqn.outvars)]
    traffic = sum(array.size * array.dtype.itemsize for array in arrays)
    return Work(2.0 * arrays[-1].size * depth, traffic)


def _aval(variable: Any) -> jax.core.ShapedArray:
    return variable.aval


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: as HLO calls it, such as 'all-reduce'.
      size: bytes that a device brings.
      groups: int [groups, members], who takes part.
      times: how often it runs in a step.
    """

    kind: str
    size: float
    groups: np.ndarray
    times: int

    def sent(self) -> float:
        """Bytes that a device sends in a step, by ring algorithms."""
        members = self.groups.shape[1]
        per_byte = {
            "all-reduce": 2 * (members - 1) / members,
            "all-gather": members - 1,
            "reduce-scatter": (members - 1) / members,
            "all-to-all": (members - 1) / members,
            "collective-permute": 1,
        }[self.kind]
        return self.size * per_byte * self.times

    def seconds(self, target: Target) -> float:
        """The time that takes at full bandwidth: of the links, or of the network where it has to.

        Devices of one domain in one group share a ring, which leaves the domain once; groups that
        have fewer devices in it share its network with others.
        """
        if not target.domain:
            return self.sent() / target.link
        domains = self.groups // target.domain
        if (domains == domains[:, :1]).all():
            return self.sent() / target.link
        here = int((domains[0] == domains[0, 0]).sum())
        rings = max(1, target.domain // here)
        return max(self.sent() / target.link, self.sent() * rings / target.host_network)


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_KIND = re.compile(
    r"^(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?$"
)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Those of a compiled program, given as text; loops run as often as XLA found out."""
    computation, entry = "", ""
    sizes: dict[str, float] = {}
    found: list[tuple[str, str, float, np.ndarray]] = []
    calls: dict[str, list[tuple[str, int]]] = {}  # computation -> who calls it, how often
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
            entry = computation if line.startswith("ENTRY") else entry
            continue
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = match.groups()
        sizes[name] = _shape_bytes(shape)
        trips = 1
        if opcode == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            trips = int(known[1]) if known else 1
        for called in re.findall(r"(?:body|calls|to_apply|computation)=%?([\w.\-]+)", rest):
            calls.setdefault(called, []).append((computation, trips))
        for names in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", rest):
            for called in names.replace("%", "").split(", "):
                calls.setdefault(called, []).append((computation, 1))
        if kind := _KIND.match(opcode):
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            size = sum(sizes[operand] for operand in operands)
            found.append((computation, kind[1], size, _groups(rest, devices)))

    def runs(name: str) -> int:
        if name == entry:
            return 1
        return sum(runs(caller) * trips for caller, trips in calls.get(name, []))

    return [
        Collective(kind, size, groups, runs(where))
        for where, kind, size, groups in found
        if groups.shape[1] > 1
    ]


def _shape_bytes(shape: str) -> float:
    parts = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in parts
    )


def _groups(text: str, devices: int) -> np.ndarray:
    """Members of each group, int [groups, members], from either way that HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return np.array([[int(n) for n in pair.split(",")] for pair in _braces(pairs[1])])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in _braces(listed[1])])
    return np.arange(devices)[None]


def _braces(text: str) -> list[str]:
    return re.findall(r"\{([\d,]+)\}", text)


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The shares of the data sheet's figures that are counted on."""

    # Of a V100, what NVIDIA's own tuned transformer reached on one (arXiv 1909.08053, abstract);
    # they and newer kinds have reached about half since.
    compute: float = 0.3
    memory: float = 0.6
    network: float = 0.6


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step that each resource is busy."""

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """The slower of arithmetic and memory; then the network, as if nothing hid it."""
        return max(self.compute, self.memory) + self.network


def roofline(
    one: Work,
    state_bytes: float,
    sent: list[Collective],
    target: Target,
    peak: float,
    share: Efficiency,
) -> Time:
    """The time of a step.

    Args:
      one: the work of one device.
      state_bytes: of parameters that train and optimizer state on it, read and written once a step.
    """
    # What lies between the products (norms, activations, residuals) is taken to move as much again.
    traffic = 2 * one.traffic + 2 * state_bytes
    return Time(
        one.flops / (peak * share.compute),
        traffic / (target.bandwidth * share.memory),
        sum(c.seconds(target) for c in sent) / share.network,
    )
