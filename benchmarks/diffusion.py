"""Seconds of a sampling step of Stable Diffusion 1.4, random weights, beside diffusers in PyTorch.

    python benchmarks/diffusion.py [--dtype float32] [--batch 1] [--repeats 3]

A step is one call of the U-Net on both halves of guidance, 64 x 64 latents, and the sampler's step.
Ours runs in its compiled loop. The two take turns, so that a shared machine's load meets both: read
their ratio. Prints one JSON object a line; `peak_gb` is the process's so far, and ours comes first.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax import diffusion, samplers
from seed_jax.models.layers import Compute
from seed_jax.models.stable_diffusion import UNet, UNetConfig
from seed_jax.tasks import PRECISIONS

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOKENS, GUIDANCE = 77, 7.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--batch", type=int, default=1, help="pictures (1)")
    parser.add_argument("--steps", type=int, default=1, help="in a timed call (1)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    args = parser.parse_args()

    print(json.dumps({"machine": machine(), "dtype": args.dtype, "batch": args.batch}), flush=True)
    runs = {"ours": ours(args)}
    if not args.alone:
        runs["pytorch"] = pytorch(args)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - began) / args.steps)
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        print(json.dumps({"name": name, "seconds_a_step": round(value, 3)}))
    if not args.alone:
        print(json.dumps({"ours_over_pytorch": round(best["pytorch"] / best["ours"], 2)}))


def ours(args: argparse.Namespace) -> Callable[[], object]:
    """Compiles the loop and runs it once."""
    compute = Compute(PRECISIONS[args.dtype])
    abstract = nnx.eval_shape(lambda: UNet(UNetConfig(), compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    state = jax.tree.map(lambda a: noise(a.shape, 0.02).astype(compute.dtype), state)
    schedule = samplers.ddim(SCHEDULER, args.steps)
    latents, states = noise((args.batch, 64, 64, 4)), noise((args.batch, 2, TOKENS, 768))

    @jax.jit
    def sample(state: nnx.State, schedule: samplers.Schedule) -> jax.Array:
        unet = nnx.merge(graphdef, state)
        return diffusion.sample(unet, schedule, latents, states, GUIDANCE)[0]

    began = time.perf_counter()
    compiled = sample.lower(state, schedule).compile()
    report("ours", compile_seconds=round(time.perf_counter() - began, 1))
    run = lambda: jax.block_until_ready(compiled(state, schedule))
    run()
    report("ours", peak_gb=peak_gb())
    return run


def pytorch(args: argparse.Namespace) -> Callable[[], object]:
    """diffusers' U-Net and scheduler, in eager mode as its pipeline runs them."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, args.dtype))
        unet = UNet2DConditionModel(cross_attention_dim=768).eval()
        latents = torch.randn(args.batch, 4, 64, 64)
        states = torch.randn(2 * args.batch, TOKENS, 768)
    scheduler = DDIMScheduler(**SCHEDULER, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(args.steps)

    @torch.no_grad()
    def run() -> None:
        x = latents
        for timestep in scheduler.timesteps:
            unconditional, own = unet(torch.cat([x, x]), timestep, states).sample.chunk(2)
            mixed = unconditional + GUIDANCE * (own - unconditional)
            x = scheduler.step(mixed, timestep, x).prev_sample
        x.cpu()

    run()
    report("pytorch", threads=torch.get_num_threads(), peak_gb=peak_gb())
    return run


def noise(shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    values *= scale  # in place: weights take gigabytes
    return jnp.asarray(values)


def machine() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}"


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def report(name: str, **facts: object) -> None:
    print(json.dumps({"name": name, **facts}), flush=True)


if __name__ == "__main__":
    main()
