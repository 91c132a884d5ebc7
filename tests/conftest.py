"""What every test runs under: 8 simulated devices, exact matmuls, no silent broadcasting."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and run little; with LLVM's optimisations, most of their time is its.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        # In program order: short of threads, devices could wait for one another for ever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
)

# A program that one test compiled is there for the next, whichever worker runs it: workers inherit
# the folder's name, and the process that made it takes it away.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:
    made = tempfile.TemporaryDirectory(prefix="seed_jax_tests_")
    os.environ[CACHE] = made.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        metavar="DIR",
        help="cases that were run through the original code (default: tests/golden)",
    )
    parser.addoption(
        "--every-mesh",
        action="store_true",
        help="train on every split of 1, 2, 4 and 8 devices, instead of some",
    )


@pytest.fixture(scope="session")
def golden(request) -> Path:
    """The directory of golden cases."""
    return request.config.getoption("--golden")
