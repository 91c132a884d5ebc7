"""A frozen base in 8 bits: what rounding costs, what it saves, and training on top of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax import model_dir
from seed_jax.models import int8
from seed_jax.models.int8 import Int8Linear
from seed_jax.models.layers import Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPTConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from seed_jax.seed_opt import load_language_model
from seed_jax.train import train
from tests import stages
from tests.tiny import write_pictures


def kernel(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # Outputs of very different sizes: one scale for all would lose the small ones.
    return (rng.normal(size=shape) * np.geomspace(0.01, 10, shape[-1])).astype(np.float32)


def test_each_output_is_rounded_by_its_own_scale():
    stacked = kernel(3, 40, 24)
    parts = int8.quantize(stacked)
    assert parts["values"].dtype == np.int8
    assert parts["scale"].shape == (3, 1, 24)
    np.testing.assert_allclose(
        parts["scale"], np.abs(stacked).max(1, keepdims=True) / 127, rtol=1e-2
    )
    error = np.abs(parts["values"] * parts["scale"] - stacked)
    assert (error <= parts["scale"] * 0.51).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_computes_with_the_rounded_kernel(dtype):
    exact = nnx.Linear(40, 24, dtype=dtype, rngs=nnx.Rngs(0))
    layer = Int8Linear(
        40,
        24,
        dtype=dtype,
        kernel_metadata={"axes": (None, None)},
        bias_metadata={"axes": (None,)},
        rngs=nnx.Rngs(0),
    )
    for name, part in int8.quantize(kernel(40, 24)).items():
        getattr(layer, name)[...] = jnp.asarray(part)
    layer.bias[...] = exact.bias[...] = jnp.asarray(kernel(24, seed=1))
    exact.kernel[...] = layer.float_kernel()
    x = jnp.asarray(kernel(5, 40, seed=2))
    np.testing.assert_array_equal(layer(x), exact(x))
    assert layer(x).dtype == dtype


def test_the_full_size_base_takes_half_of_float16s_memory():
    def held(int8: bool) -> int:
        config = VisualOPTConfig(opt=OPTConfig(lora=LoRAConfig(), int8=int8))
        base = nnx.state(nnx.eval_shape(lambda: VisualOPT(config, rngs=nnx.Rngs(0))).opt.layers)
        _, frozen = nnx.split_state(base, nnx.LoRAParam, ...)
        exact = {p: v.get_metadata().get("exact") for p, v in nnx.to_flat_state(frozen)}
        return sum(
            v.size * (v.dtype.itemsize if exact[p] else 2) for p, v in nnx.to_flat_state(frozen)
        )

    assert held(True) / held(False) == pytest.approx(0.501, abs=0.001)


def losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_adapters_train_on_it_and_its_directory_loads_as_floats(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 20)
    for name in ("float", "int8"):
        (tmp_path / name).mkdir()
        changes = {"steps": 2} | {f"mesh.{axis}": 2 for axis in ("data", "fsdp", "tensor")}
        changes |= {"data.path": str(pictures), "data.split": "", "model.int8": name == "int8"}
        config, _ = stages.make("seed_opt", tmp_path / name, **changes)
        train(config, tmp_path / name / "run")
    rounded, exact = losses(tmp_path / "int8/run"), losses(tmp_path / "float/run")
    # Rounding shows, but hardly: the packaged OPT's loss with 8 bits is its own.
    np.testing.assert_allclose(rounded, exact, rtol=5e-3)
    assert rounded != exact

    folder = tmp_path / "int8/run/model"
    assert json.loads((folder / "config.json").read_text())["config"]["opt"]["int8"]
    stored = model_dir.load(folder, "seed_opt", VisualOPTConfig, VisualOPT, Compute())
    floats = load_language_model(folder)
    up = stored.opt.layers.up
    np.testing.assert_array_equal(
        floats.opt.layers.up.kernel[...], up.values[...].astype(jnp.float32) * up.scale[...]
    )
    np.testing.assert_array_equal(floats.opt.layers.up.lora_b[...], up.lora_b[...])
    # They begin as zeros.
    assert np.all(np.any(up.lora_b[...], axis=(1, 2)))
