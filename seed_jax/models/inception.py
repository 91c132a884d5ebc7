"""The Inception network whose features the FID compares, as TensorFlow published it in 2015.

It differs from later Inceptions (means at a picture's edge leave out the padding, the last block
takes a maximum in place of a mean, pictures are resized as TensorFlow 1 did), and figures that
differ in any of this can't be compared. Source: "GANs Trained by a Two Time-Scale Update Rule"
(arXiv 1706.08500) for the FID, arXiv 1512.00567 for the network, and pytorch-fid's and
torch-fidelity's port for the names of its parts.

Shapes in names: B batch, H height, W width, C channels, S side.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax.models.layers import Array

SIDE, FEATURES = 299, 2048
EPSILON = 1e-3


class Conv(NamedTuple):
    """A convolution, normalised and rectified; padded to keep its input's size, or not at all."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Branches(NamedTuple):
    """Steps beside one another, whose outputs are joined along the channels."""

    branches: tuple["Steps", ...]


Pool = Callable[[Array], Array]
Steps = Sequence[Conv | Branches | Pool]

halve = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))
maximum = partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
# Of what lies inside the picture.
mean = partial(
    nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
)


def shrinking(name: str, width: int) -> Conv:
    """3 x 3, every second place."""
    return Conv(name, width, (3, 3), stride=2, padding="VALID")


def block_35(name: str, pool_width: int) -> Branches:
    """At 35 x 35 places: 1 x 1, 5 x 5, twice 3 x 3, mean."""
    return Branches(
        (
            [Conv(f"{name}.branch1x1", 64)],
            [Conv(f"{name}.branch5x5_1", 48), Conv(f"{name}.branch5x5_2", 64, (5, 5))],
            [
                Conv(f"{name}.branch3x3dbl_1", 64),
                Conv(f"{name}.branch3x3dbl_2", 96, (3, 3)),
                Conv(f"{name}.branch3x3dbl_3", 96, (3, 3)),
            ],
            [mean, Conv(f"{name}.branch_pool", pool_width)],
        )
    )


def block_17(name: str, width: int) -> Branches:
    """At 17 x 17 places: 7 x 7 by rows and columns, once and twice."""
    row, column = (1, 7), (7, 1)
    return Branches(
        (
            [Conv(f"{name}.branch1x1", 192)],
            [
                Conv(f"{name}.branch7x7_1", width),
                Conv(f"{name}.branch7x7_2", width, row),
                Conv(f"{name}.branch7x7_3", 192, column),
            ],
            [
                Conv(f"{name}.branch7x7dbl_1", width),
                Conv(f"{name}.branch7x7dbl_2", width, column),
                Conv(f"{name}.branch7x7dbl_3", width, row),
                Conv(f"{name}.branch7x7dbl_4", width, column),
                Conv(f"{name}.branch7x7dbl_5", 192, row),
            ],
            [mean, Conv(f"{name}.branch_pool", 192)],
        )
    )


def block_8(name: str, pool: Pool) -> Branches:
    """At 8 x 8 places: 3 x 3 by rows beside columns."""

    def beside(branch: str) -> Branches:
        row = Conv(f"{name}.{branch}a", 384, (1, 3))
        column = Conv(f"{name}.{branch}b", 384, (3, 1))
        return Branches(([row], [column]))

    return Branches(
        (
            [Conv(f"{name}.branch1x1", 320)],
            [Conv(f"{name}.branch3x3_1", 384), beside("branch3x3_2")],
            [
                Conv(f"{name}.branch3x3dbl_1", 448),
                Conv(f"{name}.branch3x3dbl_2", 384, (3, 3)),
                beside("branch3x3dbl_3"),
            ],
            [pool, Conv(f"{name}.branch_pool", 192)],
        )
    )


NETWORK: Steps = [
    shrinking("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    halve,
    block_35("Mixed_5b", 32),
    block_35("Mixed_5c", 64),
    block_35("Mixed_5d", 64),
    Branches(
        (
            [shrinking("Mixed_6a.branch3x3", 384)],
            [
                Conv("Mixed_6a.branch3x3dbl_1", 64),
                Conv("Mixed_6a.branch3x3dbl_2", 96, (3, 3)),
                shrinking("Mixed_6a.branch3x3dbl_3", 96),
            ],
            [halve],
        )
    ),
    block_17("Mixed_6b", 128),
    block_17("Mixed_6c", 160),
    block_17("Mixed_6d", 160),
    block_17("Mixed_6e", 192),
    Branches(
        (
            [Conv("Mixed_7a.branch3x3_1", 192), shrinking("Mixed_7a.branch3x3_2", 320)],
            [
                Conv("Mixed_7a.branch7x7x3_1", 192),
                Conv("Mixed_7a.branch7x7x3_2", 192, (1, 7)),
                Conv("Mixed_7a.branch7x7x3_3", 192, (7, 1)),
                shrinking("Mixed_7a.branch7x7x3_4", 192),
            ],
            [halve],
        )
    ),
    block_8("Mixed_7b", mean),
    block_8("Mixed_7c", maximum),
]


class ConvNorm(nnx.Module):
    """See `Conv`; statistics are those of training."""

    def __init__(self, conv: Conv, din: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            din,
            conv.width,
            conv.kernel,
            strides=conv.stride,
            padding=conv.padding,
            use_bias=False,
            # Weights come from a file alone; drawing them would take longer than reading them.
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(conv.width, use_running_average=True, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x_BHWC: Array) -> Array:
        return nnx.relu(self.bn(self.conv(x_BHWC)))


class Inception(nnx.Module):
    """The network up to its last pooling, in float32."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.convs = nnx.Dict(
            {conv.name: ConvNorm(conv, din, rngs=rngs) for conv, din in _convolutions(NETWORK, 3)}
        )

    def __call__(self, pictures_BHWC: Array) -> Array:
        """uint8 pictures of any size [B, H, W, 3] to float32 features [B, 2048]."""
        x_BSSC = resize_like_tensorflow(pictures_BHWC.astype(jnp.float32), SIDE)
        x_BHWC = self._run(NETWORK, (x_BSSC - 128) / 128)
        return jnp.mean(x_BHWC, axis=(1, 2))

    def _run(self, steps: Steps, x_BHWC: Array) -> Array:
        for step in steps:
            if isinstance(step, Branches):
                outputs = [self._run(branch, x_BHWC) for branch in step.branches]
                x_BHWC = jnp.concatenate(outputs, axis=-1)
            else:
                x_BHWC = (self.convs[step.name] if isinstance(step, Conv) else step)(x_BHWC)
        return x_BHWC


def _convolutions(steps: Steps, width: int) -> Iterator[tuple[Conv, int]]:
    """All convolutions, each with the width of its input."""
    for step in steps:
        if isinstance(step, Branches):
            for branch in step.branches:
                yield from _convolutions(branch, width)
        elif isinstance(step, Conv):
            yield step, width
        width = _width(step, width)


def _width(step: Conv | Branches | Pool, width: int) -> int:
    """The channels that a step leaves."""
    if isinstance(step, Conv):
        return step.width
    if not isinstance(step, Branches):
        return width
    total = 0
    for branch in step.branches:
        inner = width
        for each in branch:
            inner = _width(each, inner)
        total += inner
    return total


def resize_like_tensorflow(x_BHWC: Array, side: int) -> Array:
    """Bilinear as TensorFlow 1 did: no smoothing, and a pixel's place is its upper left corner."""

    def places(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place_S = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low_S = place_S.astype(int)
        return low_S, np.minimum(low_S + 1, size - 1), place_S - low_S.astype(np.float32)

    for axis in (2, 1):
        low_S, high_S, share_S = places(x_BHWC.shape[axis])
        low, high = jnp.take(x_BHWC, low_S, axis=axis), jnp.take(x_BHWC, high_S, axis=axis)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        x_BHWC = low + (high - low) * share_S.reshape(shape)
    return x_BHWC
