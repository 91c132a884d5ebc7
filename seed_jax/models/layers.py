"""What every model here is made of: dense maps, attention, pre-norm blocks, stacks of layers.

Shapes in names: B batch, T query tokens, S key tokens, D width, N heads, H head dim, L layers.

Parameters carry the names of their dims in the `axes` metadata; `seed_jax.sharding` maps names to
mesh axes. A stacked parameter has the layer dim in front of the dims that `axes` names. Those whose
`exact` metadata is true stay float32 where frozen weights are stored in the compute type.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from seed_jax import sharding

Array = jax.Array
M = TypeVar("M")
S = TypeVar("S")

# So many vectors, of as many sequences, are few; see `times_rows`.
FEW_VECTORS = 16

_target: ContextVar[str] = ContextVar("target", default="")

# What the forward pass of a layer keeps for the backward pass; the rest is computed again.
REMAT = {
    "none": None,  # keeps all, and is no policy
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model runs, as opposed to what it is.

    Attributes:
      dtype: of activations and matmuls. LayerNorm statistics, softmax and vector quantisation stay
        in float32 whatever it says.
      remat: what the backward pass recomputes, a key of `REMAT`: 'none', 'dots' all of a layer but
        its products with weights, 'full' the whole layer.
      unroll: unroll the loop over layers: slower to compile, faster to run when layers are small.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: bool = False


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces for 'cpu', 'gpu' or 'tpu', whatever this machine has."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """What is traced for: 'cpu', 'gpu' or 'tpu'."""
    return _target.get() or jax.default_backend()


def dense(
    din: int,
    dout: int,
    *,
    axes: tuple[str | None, str | None],
    compute: Compute,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    exact: bool = False,
) -> nnx.Linear:
    """A linear layer [..., din] -> [..., dout] whose kernel dims are named by `axes`.

    An `exact` one runs in float32, and is kept so where it is frozen, whatever `compute` says.
    """
    return nnx.Linear(
        din,
        dout,
        use_bias=use_bias,
        dtype=jnp.float32 if exact else compute.dtype,
        kernel_metadata={"axes": axes, "exact": exact},
        bias_metadata={"axes": axes[1:], "exact": exact},
        rngs=rngs,
    )


def lookup(table: nnx.Param, ids: Array) -> Array:
    """Rows of a table [rows, D], ids [...] to [..., D]."""
    # Each device then reads whole rows for its own ids. From a table that is split along D, XLA may
    # make every device look up the ids of all.
    return sharding.constrain(table[...], table.get_metadata()["axes"][0], None)[ids]


class RowLinear(nnx.Module):
    """An `nnx.Linear` for a loop over tokens, its kernel stored [dout, din].

    A product with one vector reads such a kernel in order: on a CPU in half the time.
    """

    def __init__(self, linear: nnx.Linear):
        self.kernel = nnx.Param(linear.kernel[...].T)
        self.bias = linear.bias
        self.dtype = linear.dtype

    def __call__(self, x: Array) -> Array:
        """[..., din] -> [..., dout]."""
        y = times_rows(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)


def times_rows(x: Array, table_OI: Array, *, preferred_element_type: Any = None) -> Array:
    """Products with the rows of a table, [..., I] -> [..., O]."""
    vectors = math.prod(x.shape[:-1])
    if 1 < vectors <= FEW_VECTORS and platform() == "cpu":
        # XLA's CPU backend is up to twice as fast with the table on the left. The barriers keep
        # it from putting the sides back.
        x_IM = jax.lax.optimization_barrier(x.reshape(vectors, -1).T)
        y_OM = jnp.matmul(table_OI, x_IM, preferred_element_type=preferred_element_type)
        return jax.lax.optimization_barrier(y_OM).T.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...i,oi->...o", x, table_OI, preferred_element_type=preferred_element_type)


def layer_norm(width: int, *, epsilon: float, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last dim, statistics in float32."""
    # The fast variance, E[x²] - E[x]², cancels badly where a channel's mean is far from zero, as
    # in deep ViT residual streams.
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=compute.dtype, use_fast_variance=False, rngs=rngs
    )


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Dropout with an explicit key; no key means evaluation."""
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, which all of SEED's parts use."""
    return jax.nn.gelu(x, approximate=False)


def _flash_available(dtype: Any, head_dim: int, lengths: tuple[int, int], masked: bool) -> bool:
    # The gradient of a masked one is there for even lengths alone.
    if masked and any(length % 2 for length in lengths):
        return False
    if jax.default_backend() != "gpu" or dtype not in (jnp.float16, jnp.bfloat16):
        return False
    capability = float(jax.devices()[0].compute_capability)
    largest = 256 if capability >= 9.0 else 128
    return capability >= 8.0 and head_dim <= largest and head_dim % 8 == 0


def attention(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    mask: Array | None = None,
    *,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Scaled dot-product attention, the one place where its implementation is chosen.

    Args:
      mask: bool, broadcastable to [B, N, T, S]; True where a query may attend to a key.
      dropout_rate, key: dropout of the attention probabilities, when a key is given.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`; softmax in float32.
    """
    if key is not None and dropout_rate > 0:
        # The fused kernels have no dropout of probabilities, which BERT trains with.
        scores_BNTS = jnp.einsum(
            "BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32
        )
        scores_BNTS = scores_BNTS * q_BTNH.shape[-1] ** -0.5
        if mask is not None:
            scores_BNTS = jnp.where(mask, scores_BNTS, jnp.finfo(jnp.float32).min)
        probs_BNTS = dropout(jax.nn.softmax(scores_BNTS), dropout_rate, key)
        return jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS.astype(v_BSNH.dtype), v_BSNH)
    dtype = q_BTNH.dtype
    if dtype == jnp.float16 and platform() == "cpu":
        # XLA's CPU backend lacks the float16 product with float32 sums that is asked for below.
        q_BTNH, k_BSNH, v_BSNH = (a.astype(jnp.float32) for a in (q_BTNH, k_BSNH, v_BSNH))
    implementation: Literal["cudnn", "xla"] = (
        "cudnn"
        if _flash_available(
            dtype, q_BTNH.shape[-1], (q_BTNH.shape[1], k_BSNH.shape[1]), mask is not None
        )
        else "xla"
    )
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, mask=mask, implementation=implementation
    ).astype(dtype)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one query-key-value kernel, as in ViTs (no mask).

    Args:
      key_bias: whether keys have a bias too. EVA's ViT has biases on queries and values alone.
    """

    def __init__(self, width: int, heads: int, *, key_bias: bool, compute: Compute, rngs: nnx.Rngs):
        head_dim = width // heads
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        zeros = jnp.zeros((heads, head_dim))
        bias_axes = ("heads", None)
        self.qkv = nnx.Param(
            init(rngs.params(), (width, 3, heads, head_dim)), axes=("embed", None, *bias_axes)
        )
        self.q_bias = nnx.Param(zeros, axes=bias_axes)
        self.k_bias = nnx.Param(zeros, axes=bias_axes) if key_bias else None
        self.v_bias = nnx.Param(zeros, axes=bias_axes)
        self.out = dense(width, width, axes=("heads", "embed"), compute=compute, rngs=rngs)
        self.compute = compute

    def __call__(self, x_BTD: Array) -> Array:
        k_bias = jnp.zeros_like(self.q_bias[...]) if self.k_bias is None else self.k_bias[...]
        bias_KNH = jnp.stack([self.q_bias[...], k_bias, self.v_bias[...]])
        x_BTD, qkv_DKNH, bias_KNH = (
            a.astype(self.compute.dtype) for a in (x_BTD, self.qkv[...], bias_KNH)
        )
        qkv_BTKNH = jnp.einsum("BTD,DKNH->BTKNH", x_BTD, qkv_DKNH) + bias_KNH[None, None]
        q_BTNH, k_BTNH, v_BTNH = (qkv_BTKNH[:, :, i] for i in range(3))
        return self.out(attention(q_BTNH, k_BTNH, v_BTNH).reshape(x_BTD.shape))


class MLP(nnx.Module):
    """Two dense maps with an exact GELU between them."""

    def __init__(self, width: int, mlp_dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.up = dense(width, mlp_dim, axes=("embed", "mlp"), compute=compute, rngs=rngs)
        self.down = dense(mlp_dim, width, axes=("mlp", "embed"), compute=compute, rngs=rngs)

    def __call__(self, x_BTD: Array) -> Array:
        return self.down(gelu(self.up(x_BTD)))


class Block(nnx.Module):
    """A pre-norm transformer block: the ViT's, and that of the decoders after the codebook."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        *,
        epsilon: float,
        key_bias: bool,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(width, epsilon=epsilon, compute=compute, rngs=rngs)
        self.attention = SelfAttention(width, heads, key_bias=key_bias, compute=compute, rngs=rngs)
        self.norm2 = layer_norm(width, epsilon=epsilon, compute=compute, rngs=rngs)
        self.mlp = MLP(width, mlp_dim, compute=compute, rngs=rngs)

    def __call__(self, x_BTD: Array) -> Array:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


def stack(count: int, make: Callable[[nnx.Rngs], M], *, rngs: nnx.Rngs) -> M:
    """One module whose parameters hold `count` layers in their leading dim."""
    return nnx.vmap(make)(rngs.split(count))


def scan(
    body: Callable[[Array, S], tuple[Array, Any]], x: Array, stacked: S, *, compute: Compute
) -> tuple[Array, Any]:
    """`jax.lax.scan` of `body` over stacked layers, as `compute` says to run them."""

    def on_mesh(x: Array, layer: S) -> tuple[Array, Any]:
        x, outputs = body(sharding.constrain(x, "batch"), layer)
        return sharding.constrain(x, "batch"), outputs

    if (policy := REMAT[compute.remat]) is not None:
        on_mesh = jax.checkpoint(on_mesh, prevent_cse=False, policy=policy)
    return jax.lax.scan(on_mesh, x, stacked, unroll=True if compute.unroll else 1)


def apply_blocks(
    blocks: Block, x_BTD: Array, *, compute: Compute, outputs: bool = False
) -> tuple[Array, Array | None]:
    """Runs stacked blocks: the result and, with `outputs`, each block's output [L, B, T, D]."""

    def body(x_BTD: Array, block: Block) -> tuple[Array, Array | None]:
        x_BTD = block(x_BTD)
        return x_BTD, x_BTD if outputs else None

    return scan(body, x_BTD, blocks, compute=compute)


def take_weights(module: nnx.Module, weights: Mapping[tuple, Array]) -> None:
    """Gives every parameter of a module, abstract or not, the array of its path in `weights`."""
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    nnx.update(module, nnx.from_flat_state((p, v.replace(weights[p])) for p, v in params))


def hold_linen(params: Any) -> nnx.Dict:
    """The parameters of a Linen module as NNX's, by path such as 'conv_in/kernel'."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return nnx.Dict({name: nnx.Param(value) for name, value in flat.items()})


def nest_linen(params: nnx.Dict) -> dict:
    """What a Linen module takes as its parameters, of what `hold_linen` made."""
    flat = {name: value[...] for name, value in params.items()}
    return traverse_util.unflatten_dict(flat, sep="/")
