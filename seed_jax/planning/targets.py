"""Machines that a step can be compiled for without owning one, and what they can do.

XLA compiles for a described topology: no device and no driver is needed, only the plug-in that
requirements-plan.txt installs.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from seed_jax.cli import UserError, first_line

GiB = 2**30
GIGA, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device, by its maker's data sheet.

    Attributes:
      peak: FLOP/s by the precision of the config.
      memory: bytes.
      bandwidth: of its memory, bytes/s.
      link: bytes/s one way from a device to the others of its domain.
      domain: devices joined by those links; 0: all there are.
      host_network: bytes/s one way between domains, shared by the devices of one.
      gpu: the rest that XLA wants to know of a GPU; empty for a TPU.
    """

    peak: dict[str, float]
    memory: int
    bandwidth: float
    link: float
    domain: int = 0
    host_network: float = 0.0
    gpu: dict[str, Any] = dataclasses.field(default_factory=dict)

    def domain_of(self, devices: int) -> int:
        return min(self.domain or devices, devices)


def _v100(memory: int) -> Target:
    return Target(
        peak={"float16": 125 * TERA, "float32": 15.7 * TERA},
        memory=memory,
        bandwidth=900 * GIGA,
        link=150 * GIGA,
        domain=8,
        host_network=12.5 * GIGA,  # one 100 Gb/s port for eight
        gpu={
            "name": f"Tesla V100-SXM2-{memory // GiB}GB",
            "capability": (7, 0),
            "cores": 80,
            "fpus": 64,
            "clock": 1.53,
            "l2": 6_291_456,
            "shared": (98_304, 98_304),
        },
    )


TARGETS: dict[str, Target] = {
    "v100-16gb": _v100(16 * GiB),
    "v100-32gb": _v100(32 * GiB),
    "a100-80gb": Target(
        peak={"float16": 312 * TERA, "bfloat16": 312 * TERA, "float32": 19.5 * TERA},
        memory=80 * GiB,
        bandwidth=2039 * GIGA,
        link=300 * GIGA,
        domain=8,
        host_network=100 * GIGA,  # four 200 Gb/s ports for eight
        gpu={
            "name": "NVIDIA A100-SXM4-80GB",
            "capability": (8, 0),
            "cores": 108,
            "fpus": 64,
            "clock": 1.41,
            "l2": 41_943_040,
            "shared": (167_936, 166_912),
        },
    ),
    "h100-80gb": Target(
        peak={"float16": 989 * TERA, "bfloat16": 989 * TERA, "float32": 67 * TERA},
        memory=80 * GiB,
        bandwidth=3350 * GIGA,
        link=450 * GIGA,
        domain=8,
        host_network=200 * GIGA,  # four 400 Gb/s ports for eight
        gpu={
            "name": "NVIDIA H100 80GB HBM3",
            "capability": (9, 0),
            "cores": 132,
            "fpus": 128,
            "clock": 1.98,
            "l2": 52_428_800,
            "shared": (233_472, 232_448),
        },
    ),
    # Their matrix units have no float32: XLA does it in six passes of bfloat16.
    "tpu-v4": Target(
        peak={"bfloat16": 275 * TERA, "float32": 275 * TERA / 6},
        memory=32 * GiB,
        bandwidth=1228 * GIGA,
        link=100 * GIGA,  # two of its six links
    ),
    "tpu-v5e": Target(
        peak={"bfloat16": 197 * TERA, "float32": 197 * TERA / 6},
        memory=16 * GiB,
        bandwidth=819 * GIGA,
        link=100 * GIGA,  # two of its four links
    ),
}

# What XLA is told of a GPU (the protobuf GpuTargetConfigProto, as text).
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {shared[0]}
  shared_memory_per_block_optin: {shared[1]}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for: described ones, or this machine's processor in their place.

    Attributes:
      platform: 'gpu', 'tpu' or 'cpu', as `layers.platform` has it.
      missing: the package whose lack made it the processor.
    """

    devices: list[Any]
    platform: str
    missing: str = ""

    def options(self) -> dict[str, str | bool]:
        """Of the compiler."""
        if self.platform != "gpu":
            return {}
        # Autotuning runs kernels on a real GPU. Without it Triton gets tiles by default, which for
        # some products of A100s and H100s don't exist and fail the compilation; cuBLAS takes all.
        return {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}


def topology(target: Target, count: int) -> Topology:
    """Describes `count` devices; to be called before anything else asks JAX for its devices.

    Raises:
      UserError: no machines of this kind have so many devices.
    """
    if target.gpu and count % target.domain_of(count):
        raise UserError(
            f"--devices={count}: hosts have {target.domain} of these each; take a multiple of that"
        )
    needed = ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc") if target.gpu else ("libtpu",)
    missing = [name for name in needed if not _is_installed(name)]
    # Described devices are all that is needed: real ones should not be taken.
    jax.config.update("jax_platforms", "cpu")
    if missing:
        jax.config.update("jax_num_cpu_devices", count)
        return Topology(jax.devices("cpu"), "cpu", missing[0])
    if target.gpu:
        return Topology(_gpus(target, count), "gpu")
    return Topology(_tpus(target, count), "tpu")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _gpus(target: Target, count: int) -> list[Any]:
    nvcc = next(iter(importlib.import_module("nvidia.cuda_nvcc").__path__))
    os.environ["PATH"] = f"{nvcc}/bin:{os.environ['PATH']}"  # XLA looks for ptxas there
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={nvcc}"
    plugin = importlib.import_module("jax_plugins.xla_cuda12")
    from jax._src import xla_bridge

    xla_bridge.register_plugin(
        "cuda", priority=500, library_path=str(plugin._get_library_path()), options={}
    )
    domain = target.domain_of(count)
    described = {
        "target_config": _GPU.format(
            memory=target.memory, bandwidth=int(target.bandwidth), **target.gpu
        ),
        "topology": f"{count // domain}x1x{domain}",
    }
    # The first call loads the plug-in and fails, since there is no driver.
    with contextlib.suppress(Exception):
        topologies.get_topology_desc("planned", platform="cuda", **described)
    try:
        return topologies.get_topology_desc("planned", platform="cuda", **described).devices
    except Exception as error:
        raise UserError(
            f"the CUDA plug-in can't describe {count} GPUs; install requirements-plan.txt anew: "
            f"{first_line(error)}"
        ) from error


def _tpus(target: Target, count: int) -> list[Any]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if target is TARGETS["tpu-v4"]:
        # Both cores of a chip work as one device.
        shape, extra = _box(count, 3), {"chip_config_name": "megacore"}
        name = "v4:" + "x".join(map(str, shape))
    else:
        name, extra = "v5e:" + "x".join(map(str, _box(count, 2))), {}
    try:
        return topologies.get_topology_desc(name, platform="tpu", **extra).devices
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"--devices={count}: no slice {name} can be described: {reason}") from error


def _box(count: int, dims: int) -> list[int]:
    """The box of `count` chips that is closest to a cube, its shortest side last."""
    if dims == 1:
        return [count]
    side = next(s for s in range(math.floor(count ** (1 / dims) + 1e-9), 0, -1) if count % s == 0)
    return [*_box(count // side, dims - 1), side]
