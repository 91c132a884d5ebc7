"""The device mesh, and the one table that says which mesh axis a named dim is split over."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seed_jax.cli import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Named dim (the `axes` metadata of a parameter, or a batch's first) -> mesh axis or axes.
AXIS_RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "codes": "tensor",
}


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh `data` x `fsdp` x `tensor` over all devices.

    Args:
      sizes: devices along each axis; one of them may be -1 and takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    known = int(np.prod([n for n in shape if n != -1]))
    if shape.count(-1) == 1 and known > 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or int(np.prod(shape)) != len(devices):
        wanted = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in MESH_AXES)
        raise UserError(
            f"config.mesh: {wanted} does not fit {len(devices)} devices; the sizes must "
            "multiply to that number, and at most one of them may be -1"
        )
    # Explicit axes, jax's default, ask for a sharding at every matmul; Auto lets XLA propagate.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str = "array"
) -> NamedSharding:
    """The sharding of an array whose last dims are named `axes`; dims in front are not split.

    A dim that its mesh axis does not divide stays whole.

    Raises:
      ValueError: two dims of one array map to the same mesh axis.
    """
    spec: list[Any] = [None] * (len(shape) - len(axes))
    used: list[str] = []
    for dim, axis in zip(shape[len(spec) :], axes, strict=True):
        rule = AXIS_RULES.get(axis) if axis else None
        names = (rule,) if isinstance(rule, str) else tuple(rule or ())
        splits = int(np.prod([mesh.shape[n] for n in names]))
        if dim % splits:
            names = ()
        if set(names) & set(used):
            raise ValueError(f"{name}: mesh axis used twice in {tuple(axes)}")
        used += names
        spec.append(names or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation whose first dims are split as their names say; XLA chooses for the others.

    Left to itself, XLA splits activations like the weights of an `fsdp` axis that they meet, and
    each device then holds the whole batch. Does nothing where no mesh is set.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec: list[Any] = [AXIS_RULES[axis] if axis else None for axis in axes]
    spec += [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a pytree of arrays in which `nnx.Variable`s name their dims in `axes`.

    Optimizer states keep the variables of the parameters they belong to, so they are split alike.
    Arrays without names are replicated.
    """
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    shardings = []
    for path, leaf in leaves:
        axes = leaf.get_metadata().get("axes", ()) if isinstance(leaf, nnx.Variable) else ()
        shape = jax.tree.leaves(leaf)[0].shape
        shardings.append(named_sharding(mesh, axes, shape, jax.tree_util.keystr(path)))
    return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch is split over its first dim."""
    return NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch this process's devices hold, in order.

    A process whose devices lie side by side on a mesh axis has rows that lie side by side; where
    the `tensor` axis goes across processes, these have the same rows.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index for row in range(rows)[index[0]]})


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (see `local_rows`) become global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def host_device() -> jax.Device:
    """This machine's processor, as a device for what is whole for a while and too large for others.

    The first device, if JAX_PLATFORMS leaves the processor out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def on_host(tree: Any) -> Any:
    """A pytree of arrays, split or not, as whole numpy arrays in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)
