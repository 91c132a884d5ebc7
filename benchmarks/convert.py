"""A full-size SEED tokenizer with random weights, from the original's layout to ours and back.

    python benchmarks/convert.py [--folder DIR] [--suffix .pth] [--depth 39]

Writes the published files (`causal_qformer`, `seed_tokenizer`, `eva_vit_g`), converts and exports
them, each in a process of its own, and compares every tensor bit by bit. Prints a JSON object a
step: seconds, the process's peak memory, and its ratio to the weights. Takes 15 GB of disk.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from flax import nnx

from seed_jax.interop import keys, torch_io
from seed_jax.interop.state_dict import key_shapes
from seed_jax.lazy import LazyTensor
from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import SeedTokenizer, TokenizerConfig

GIB = 2**30
# Which names lie in which of the published files; the rest is in the last.
FILES = {
    "eva_vit_g": (keys.VIT,),
    "causal_qformer": ("Qformer.", "query_tokens", "ln_vision."),
    "seed_tokenizer": ("",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--suffix", choices=[".safetensors", ".pth"], default=".safetensors")
    parser.add_argument("--depth", type=int, default=39, help="blocks of the ViT; fewer for a try")
    parser.add_argument("--step", choices=["all", "write", "compare"], default="all")
    args = parser.parse_args()
    tensors = random_tensors(args.depth)
    if args.step == "write":
        write(tensors, args.folder, args.suffix)
    elif args.step == "compare":
        compare(tensors, args.folder)
    elif args.folder:
        run(args, args.folder, size_of(tensors))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(args, Path(folder), size_of(tensors))


def run(args: argparse.Namespace, folder: Path, size: int) -> None:
    own = [__file__, "--folder", str(folder), "--suffix", args.suffix, "--depth", str(args.depth)]
    vit, *others = (str(folder / f"{name}{args.suffix}") for name in FILES)
    output = ["--output", str(folder / "model"), "--overwrite"]
    back = ["--model", str(folder / "model"), "--output", str(folder / "back"), "--overwrite"]
    pt = ["--pt"] if args.suffix == ".pth" else []
    steps = {
        "write": [*own, "--step", "write"],
        "convert": [
            *("-m", "seed_jax.convert", "--source", "seed1", "--weights", *others),
            *("--vit", vit, *output),
        ],
        "export": ["-m", "seed_jax.export", "--format", "seed", *pt, *back],
        "compare": [*own, "--step", "compare"],
    }
    for name, command in steps.items():
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{name} failed")
        peak = usage.ru_maxrss * 1024
        row = {"step": name, "seconds": round(time.perf_counter() - began, 1)}
        row |= {"peak GiB": round(peak / GIB, 2), "weights GiB": round(size / GIB, 2)}
        print(json.dumps({**row, "ratio": round(peak / size, 2)}), flush=True)


def random_tensors(depth: int) -> dict[str, LazyTensor]:
    """The state dict of a SEED tokenizer; a tensor's values depend on its name alone."""
    config = dataclasses.replace(TokenizerConfig(), reconstruction=False)
    vit = dataclasses.replace(config.encoder.vit, depth=depth)
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, vit=vit))
    table = keys.seed1_tokenizer(config)
    empty = nnx.eval_shape(lambda: SeedTokenizer(config, compute=Compute(), rngs=nnx.Rngs(0)))
    float32 = np.dtype(np.float32)
    return {
        key: LazyTensor(value.shape, value.dtype, value.copy)
        if (value := table.constants.get(key)) is not None
        else LazyTensor(shape, float32, partial(noise, key, shape))
        for key, shape in key_shapes(table, nnx.state(empty, nnx.Param)).items()
    }


def noise(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, np.float32)


def size_of(tensors: dict[str, LazyTensor]) -> int:
    return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors.values())


def write(tensors: dict[str, LazyTensor], folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    left = dict(tensors)
    for name, prefixes in FILES.items():
        part = {key: left.pop(key) for key in list(left) if key.startswith(prefixes)}
        part = {key.removeprefix(keys.VIT): tensor for key, tensor in part.items()}
        save = torch_io.write_torch if suffix == ".pth" else torch_io.write_safetensors
        save(part, folder / f"{name}{suffix}")


def compare(tensors: dict[str, LazyTensor], folder: Path) -> None:
    for file in sorted(folder.glob("back/seed_tokenizer.*")):
        back = torch_io.read_weights(file)
        if back.keys() != tensors.keys():
            sys.exit(f"{file} differs in its keys: {sorted(back.keys() ^ tensors.keys())}")
        for key, tensor in tensors.items():
            if np.asarray(back[key]).tobytes() != np.asarray(tensor).tobytes():
                sys.exit(f"{file} differs in {key}")
        print(f"{len(back)} tensors of {file.name} are equal, bit by bit", flush=True)


if __name__ == "__main__":
    main()
