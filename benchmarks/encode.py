"""Time and memory of pictures to codes with the full-size tokenizer, random weights.

    python benchmarks/encode.py [--batch 1 8] [--dtype float32] [--repeats 3]

Prints one JSON object a line: batch, seconds (best of the repeats) and peak memory of the process.
Numbers on a shared machine vary; compare those of one run.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import SeedTokenizer, TokenizerConfig
from seed_jax.tasks import PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    compute = Compute(PRECISIONS[args.dtype])
    print(json.dumps({"matmul_gflops": round(matmul_gflops()), "device": str(jax.devices()[0])}))
    graphdef, state = build(compute)

    @jax.jit
    def encode(state: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state).encode(images)

    for batch in args.batch:
        side = TokenizerConfig().encoder.vit.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
        images = jnp.asarray(pixels)
        began = time.perf_counter()
        compiled = encode.lower(state, images).compile()
        compile_seconds = time.perf_counter() - began
        seconds = [timed(compiled, state, images) for _ in range(args.repeats)]
        print(
            json.dumps(
                {
                    "batch": batch,
                    "dtype": args.dtype,
                    "seconds": round(min(seconds), 2),
                    "pictures_per_second": round(batch / min(seconds), 3),
                    "compile_seconds": round(compile_seconds, 1),
                    "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                }
            ),
            flush=True,
        )


def build(compute: Compute) -> tuple[nnx.GraphDef, nnx.State]:
    """The full-size tokenizer, every weight small noise (initialising takes longer otherwise)."""
    abstract = nnx.eval_shape(
        lambda: SeedTokenizer(TokenizerConfig(), compute=compute, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def noise(shape: tuple[int, ...]) -> jax.Array:
        weights = rng.standard_normal(shape, np.float32)
        weights *= 0.02  # in place: the largest of these takes 1.3 GB
        # JAX may keep NumPy's memory as its own instead of copying it.
        return jax.device_put(weights, may_alias=True)

    return graphdef, jax.tree.map(lambda a: noise(a.shape), state)


def timed(run: Callable[..., jax.Array], *arguments: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - began


def matmul_gflops(side: int = 2048) -> float:
    """This machine's float32 matmul speed, to read the other figures by."""
    a = jnp.ones((side, side))
    matmul = jax.jit(lambda a: a @ a)
    jax.block_until_ready(matmul(a))
    return 2 * side**3 / min(timed(matmul, a) for _ in range(5)) / 1e9


if __name__ == "__main__":
    main()
