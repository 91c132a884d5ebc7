"""What every test runs under: 8 simulated devices, exact matmuls, no silent broadcasting."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and run little; with LLVM's optimisations, most of their time is its.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)

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


@pytest.fixture(scope="session")
def golden(request) -> Path:
    """The directory of golden cases."""
    return request.config.getoption("--golden")
