"""Frozen linear layers in 8 bits, under adapters: half of float16's memory.

QLoRA's idea (arXiv 2305.14314) with int8, by qwix: weights alone are quantised, with a scale for
each output, and made floats of again where they are used.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from seed_jax import sharding
from seed_jax.models import layers
from seed_jax.models.layers import Array


class Int8Linear(nnx.Linear):
    """`nnx.Linear` whose kernel is int8 `values` [din, dout] times float32 `scale` [1, dout]."""

    def __init__(
        self,
        din: int,
        dout: int,
        *,
        dtype: Any,
        kernel_metadata: dict[str, Any],
        bias_metadata: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        """Zero: what is quantised comes from elsewhere, and float kernels may not find room."""
        axes = kernel_metadata["axes"]
        self.values = nnx.Param(jnp.zeros((din, dout), jnp.int8), axes=axes, exact=True)
        self.scale = nnx.Param(jnp.ones((1, dout)), axes=(None, axes[1]), exact=True)
        self.bias = nnx.Param(jnp.zeros(dout), **bias_metadata)
        self.dtype = dtype

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """[..., din] -> [..., dout]."""
        assert self.bias is not None
        kernel = self.float_kernel().astype(self.dtype)
        y = jnp.matmul(x.astype(self.dtype), kernel, out_sharding=out_sharding)
        return y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)

    def float_kernel(self) -> Array:
        """Float32 [..., din, dout]; stacked layers have theirs in front."""
        values = self.values[...]
        return qwix.dequantize(qwix.QArray(values, self.scale[...], qtype=values.dtype))


def quantize(kernel: np.ndarray | Array) -> dict[str, np.ndarray]:
    """'values' and 'scale' of an `Int8Linear` or a stack of them, for a kernel [..., din, dout]."""
    if kernel.ndim > 2:
        # One at a time, since a float32 copy of all of them may be more than there is room for.
        each = [quantize(layer) for layer in kernel]
        return {name: np.stack([layer[name] for layer in each]) for name in each[0]}
    with jax.default_device(sharding.host_device()):
        rounded = qwix.quantize(
            jnp.asarray(np.asarray(kernel), jnp.float32), jnp.int8, channelwise_axes=(1,)
        )
    return {"values": np.asarray(rounded.qvalue), "scale": np.asarray(rounded.scale)}


def dequantize(source: nnx.Module, target: nnx.Module) -> None:
    """Writes a model's weights into the same model built with float kernels, in its dtypes."""
    weights = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(source, nnx.Param))}
    for path, module in nnx.iter_modules(source):
        if isinstance(module, Int8Linear):
            del weights[*path, "values"], weights[*path, "scale"]
            weights[*path, "kernel"] = module.float_kernel().astype(module.dtype)
    layers.take_weights(target, weights)
