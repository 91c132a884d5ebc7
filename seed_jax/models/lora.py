"""Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen linear layers, and merging them in.

Shapes in names: R rank; [..., din] -> [..., dout] for a layer's input and output.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from seed_jax.models import layers
from seed_jax.models.int8 import Int8Linear
from seed_jax.models.layers import Array, Compute

TARGETS = ("query", "key", "value", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers get adapters, and of what size; the defaults are SEED-LLaMA's.

    Attributes:
      rank: of the product that is added to a kernel; 0 builds no adapters.
      alpha: the product is scaled by alpha / rank.
      dropout: of what the adapters read, in training.
      targets: names of layers, out of `TARGETS`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRALinear(nnx.Linear):
    """A linear layer and an adapter: x W + b + scale · (x A) B, with B zero at the start."""

    def __init__(
        self,
        din: int,
        dout: int,
        *,
        axes: tuple[str | None, str | None],
        config: LoRAConfig,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            din,
            dout,
            dtype=compute.dtype,
            kernel_metadata={"axes": axes},
            bias_metadata={"axes": axes[1:]},
            rngs=rngs,
        )
        # As PEFT starts them.
        bound = 1 / math.sqrt(din)
        down = jax.random.uniform(rngs.params(), (din, config.rank), minval=-bound, maxval=bound)
        self.lora_a = nnx.LoRAParam(down, axes=(axes[0], None))
        self.lora_b = nnx.LoRAParam(jnp.zeros((config.rank, dout)), axes=(None, axes[1]))
        self.config = config

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """[..., din] -> [..., dout]; `key` is for dropout, None evaluates."""
        x_A = layers.dropout(x.astype(self.dtype), self.config.dropout, key)
        a, b = self.lora_a[...].astype(self.dtype), self.lora_b[...].astype(self.dtype)
        return super().__call__(x) + (x_A @ a) @ b * self.config.scale

    def merged_kernel(self) -> Array:
        """The one kernel that does what kernel and adapter do, in the kernel's type."""
        delta = jnp.einsum("...dr,...ro->...do", self.lora_a[...], self.lora_b[...])
        kernel = self.kernel[...]
        return (kernel.astype(delta.dtype) + self.config.scale * delta).astype(kernel.dtype)


class Int8LoRALinear(LoRALinear, Int8Linear):
    """An adapter beside a kernel of 8 bits."""


def linear(
    name: str,
    din: int,
    dout: int,
    *,
    axes: tuple[str | None, str | None],
    lora: LoRAConfig,
    int8: bool,
    compute: Compute,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer, its kernel in 8 bits if so said, with an adapter if `lora` has it by name."""
    if lora.rank and name in lora.targets:
        adapted = Int8LoRALinear if int8 else LoRALinear
        return adapted(din, dout, axes=axes, config=lora, compute=compute, rngs=rngs)
    if int8:
        return Int8Linear(
            din,
            dout,
            dtype=compute.dtype,
            kernel_metadata={"axes": axes},
            bias_metadata={"axes": axes[1:]},
            rngs=rngs,
        )
    return layers.dense(din, dout, axes=axes, compute=compute, rngs=rngs)


def apply(layer: nnx.Linear | layers.RowLinear, x: Array, key: Array | None) -> Array:
    """Runs a layer that `linear` made, with dropout where there is an adapter to drop from."""
    return layer(x, key) if isinstance(layer, LoRALinear) else layer(x)


def merge(source: nnx.Module, target: nnx.Module) -> None:
    """Writes a model's weights, adapters merged in, into the same model built without adapters."""
    merged = {
        (*path, "kernel"): module.merged_kernel()
        for path, module in nnx.iter_modules(source)
        if isinstance(module, LoRALinear)
    }
    weights = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(source, nnx.Param))}
    layers.take_weights(target, weights | merged)
