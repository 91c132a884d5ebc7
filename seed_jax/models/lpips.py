"""LPIPS (arXiv 1801.03924): a distance of two pictures that agrees with what people see.

Activations of a network for classification are compared place by place, each channel weighted by
how much it was found to matter. Version 0.1 of the authors' weights.

Shapes in names: B batch, H height, W width, C channels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from seed_jax.models.layers import Array

# Of ImageNet, for pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10


class Conv(NamedTuple):
    """A convolution and ReLU: its place in torchvision's `features`, and its sizes."""

    place: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """Groups of convolutions; activations after each are compared, and pooled before the next."""

    window: int
    groups: tuple[tuple[Conv, ...], ...]
    # Pools stand between these groups alone.
    pooled: tuple[bool, ...]


ALEX = Trunk(
    3,
    (
        (Conv(0, 64, 11, 4, 2),),
        (Conv(3, 192, 5, 1, 2),),
        (Conv(6, 384),),
        (Conv(8, 256),),
        (Conv(10, 256),),
    ),
    (False, True, True, False, False),
)
VGG = Trunk(
    2,
    (
        (Conv(0, 64), Conv(2, 64)),
        (Conv(5, 128), Conv(7, 128)),
        (Conv(10, 256), Conv(12, 256), Conv(14, 256)),
        (Conv(17, 512), Conv(19, 512), Conv(21, 512)),
        (Conv(24, 512), Conv(26, 512), Conv(28, 512)),
    ),
    (False, True, True, True, True),
)


class LPIPS(nnx.Module):
    """AlexNet or VGG16 with the weights of channels, in float32."""

    def __init__(self, trunk: Trunk, *, rngs: nnx.Rngs):
        convs, width = {}, 3
        for conv in (conv for group in trunk.groups for conv in group):
            convs[str(conv.place)] = nnx.Conv(
                width,
                conv.width,
                (conv.kernel, conv.kernel),
                strides=conv.stride,
                padding=conv.padding,
                # Weights come from files alone; drawing them would take longer than reading them.
                kernel_init=nnx.initializers.zeros,
                rngs=rngs,
            )
            width = conv.width
        self.convs = nnx.Dict(convs)
        self.heads = nnx.List(nnx.Param(jnp.zeros(group[-1].width)) for group in trunk.groups)
        self.trunk = trunk

    def __call__(self, a_BHWC: Array, b_BHWC: Array) -> Array:
        """Distances of uint8 pictures [B, H, W, 3], float32 [B]."""
        total_B = jnp.zeros(len(a_BHWC))
        activations = zip(self._activations(a_BHWC), self._activations(b_BHWC), strict=True)
        for head_C, (a, b) in zip(self.heads, activations, strict=True):
            squares_BHW = jnp.einsum("BHWC,C->BHW", (_unit(a) - _unit(b)) ** 2, head_C[...])
            total_B += jnp.mean(squares_BHW, axis=(1, 2))
        return total_B

    def _activations(self, pictures_BHWC: Array) -> list[Array]:
        shift, scale = (jnp.array(each).reshape(1, 1, 1, 3) for each in (SHIFT, SCALE))
        x_BHWC = (pictures_BHWC.astype(jnp.float32) / 127.5 - 1 - shift) / scale
        found, window = [], (self.trunk.window,) * 2
        for group, pooled in zip(self.trunk.groups, self.trunk.pooled, strict=True):
            if pooled:
                x_BHWC = nnx.max_pool(x_BHWC, window, strides=(2, 2))
            for conv in group:
                x_BHWC = nnx.relu(self.convs[str(conv.place)](x_BHWC))
            found.append(x_BHWC)
        return found


def _unit(x_BHWC: Array) -> Array:
    return x_BHWC / (jnp.linalg.norm(x_BHWC, axis=-1, keepdims=True) + EPSILON)
