"""OPT-125M's shape with random weights, beside transformers and PEFT on the same CPU.

    python benchmarks/opt.py [--repeats 3] [--only prefill decode training]

Prints one JSON object a line: what was measured, ours and theirs. Float32: bfloat16 products with
vectors are slow in XLA on a CPU. Needs torch and, for training, peft; without them, ours alone is
measured. Both sides take turns, since numbers on a shared machine vary; compare those of one run.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from seed_jax import losses
from seed_jax.models.generation import Decoding
from seed_jax.models.generator import Generator
from seed_jax.models.layers import Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPT, OPTConfig

SIZES = OPTConfig(
    vocab_size=50_272, width=768, depth=12, heads=12, mlp_dim=3072, max_positions=2048
)
LORA = LoRAConfig(rank=16, alpha=32.0, dropout=0.0)
PROMPT, NEW = 64, 32
ROWS, LENGTH = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    kinds = ["prefill", "decode", "training"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    theirs = importlib.util.find_spec("torch") is not None
    if "prefill" in args.only:
        report(
            "prefill", "tokens/s", PROMPT * 4, prefill(), torch_prefill() if theirs else None, args
        )
    if "decode" in args.only:
        for batch in (1, 8):
            report(
                f"decode, batch {batch}",
                "ms a step",
                NEW,
                decode(batch),
                torch_decode(batch) if theirs else None,
                args,
            )
    if "training" in args.only:
        peft = theirs and importlib.util.find_spec("peft") is not None
        report(
            "LoRA training",
            "tokens/s",
            ROWS * LENGTH,
            training(),
            torch_training() if peft else None,
            args,
        )


def report(
    what: str,
    unit: str,
    count: int,
    ours: Callable[[], Any],
    theirs: Callable[[], Any] | None,
    args: argparse.Namespace,
) -> None:
    """Prints the best of the repeats of both."""
    best = {"ours": float("inf"), "theirs": float("inf")}
    for run in (ours, theirs):
        if run is not None:
            run()  # compiles
    for _ in range(args.repeats):
        for name, run in (("ours", ours), ("theirs", theirs)):
            if run is not None:
                began = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - began)
    rate = (lambda s: 1e3 * s / count) if unit == "ms a step" else (lambda s: count / s)
    row = {"what": what, "unit": unit, "ours": round(rate(best["ours"]), 1)}
    if theirs is not None:
        row |= {
            "theirs": round(rate(best["theirs"]), 1),
            "times as fast": round(best["theirs"] / best["ours"], 2),
        }
    print(json.dumps(row), flush=True)


def ids_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, SIZES.vocab_size, (batch, length))


def build(config: OPTConfig) -> OPT:
    """A model whose weights are small noise."""
    abstract = nnx.eval_shape(lambda: OPT(config, compute=Compute(unroll=True), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def noise(a: Any) -> jax.Array:
        return jnp.asarray(rng.standard_normal(a.shape, np.float32) * np.float32(0.02))

    return nnx.merge(graphdef, jax.tree.map(noise, state))


def prefill() -> Callable[[], Any]:
    generator, ids = Generator(build(SIZES)), ids_of(4, PROMPT)
    return lambda: generator(ids, None, Decoding(max_new=1))


def decode(batch: int) -> Callable[[], Any]:
    generator, ids = Generator(build(SIZES)), ids_of(batch, 4)
    return lambda: generator(ids, None, Decoding(max_new=NEW))


def training() -> Callable[[], Any]:
    model = build(OPTConfig(**{**vars(SIZES), "lora": LORA}))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    tx = optax.adamw(1e-4)
    ids = jnp.asarray(ids_of(ROWS, LENGTH), jnp.int32)

    @jax.jit
    def step(adapters: nnx.State, opt_state: Any) -> tuple[nnx.State, Any]:
        def loss(adapters: nnx.State) -> jax.Array:
            ones = jnp.ones_like(ids)
            logits = nnx.merge(graphdef, adapters, rest)(ids, ones)
            return losses.each_token(logits, ids).mean()

        updates, opt_state = tx.update(jax.grad(loss)(adapters), opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    state = (adapters, tx.init(adapters))
    return lambda: jax.block_until_ready(step(*state))


def torch_model() -> Any:
    from transformers import OPTConfig as TorchConfig
    from transformers import OPTForCausalLM

    config = TorchConfig(
        vocab_size=SIZES.vocab_size,
        hidden_size=SIZES.width,
        num_hidden_layers=SIZES.depth,
        num_attention_heads=SIZES.heads,
        ffn_dim=SIZES.mlp_dim,
        dropout=0.0,
    )
    return OPTForCausalLM(config).eval()


def torch_prefill() -> Callable[[], Any]:
    import torch

    model, ids = torch_model(), torch.tensor(ids_of(4, PROMPT))

    def run() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    return run


def torch_decode(batch: int) -> Callable[[], Any]:
    import torch

    model, ids = torch_model(), torch.tensor(ids_of(batch, 4))
    model.generation_config.eos_token_id = None

    def run() -> None:
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )

    return run


def torch_training() -> Callable[[], Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    config = LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=targets
    )
    model = get_peft_model(torch_model(), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.tensor(ids_of(ROWS, LENGTH))

    def run() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
