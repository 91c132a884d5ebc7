"""U-Nets and autoencoders in diffusers' folders: read in either layout, written in PyTorch's.

`table` says what PyTorch's diffusers calls each parameter of the Flax models; `interop.state_dict`
reads and writes with it.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx, serialization, traverse_util

from seed_jax import model_dir
from seed_jax.cli import UserError
from seed_jax.interop import state_dict
from seed_jax.interop.state_dict import LINEAR, SAME, Layout, Row, Table
from seed_jax.interop.torch_io import INDEX_SUFFIX, StoredTensor, read_weights, write_safetensors
from seed_jax.models.layers import Compute
from seed_jax.models.stable_diffusion import Autoencoder, UNet

M = TypeVar("M", UNet, Autoencoder)

TORCH_FILE = "diffusion_pytorch_model.safetensors"
# In the order in which they are looked for; an index names the files of a model in pieces.
FILES = (
    TORCH_FILE,
    f"{TORCH_FILE}{INDEX_SUFFIX}",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_flax_model.msgpack",
)

# [height, width, in, out] <-> [out, in, height, width]
CONVOLUTION = Layout(lambda s: (s[3], s[2], s[0], s[1]), (2, 3, 1, 0))
# The Flax autoencoder kept the first names of its attention; PyTorch's has others since, though not
# in the published files of Stable Diffusion 1.x.
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LISTS = "down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def table(module: UNet | Autoencoder) -> Table:
    """What PyTorch's diffusers calls the parameters of a model, which may be abstract."""
    name = "a U-Net" if isinstance(module, UNet) else "an autoencoder"
    return Table(f"{name} of these sizes", rows(module))


def rows(module: nnx.Module) -> tuple[Row, ...]:
    """PyTorch's names of the parameters of one of diffusers' or transformers' Flax models."""
    params = model_dir.flat_params(nnx.state(module, nnx.Param))
    return tuple(
        Row(_torch_key(path), (path,), _layout(path, param.ndim)) for path, param in params.items()
    )


def _torch_key(path: str) -> str:
    """'params/mid_block/attentions_0/query/kernel' -> 'mid_block.attentions.0.to_q.weight'."""
    *parents, leaf = path.split("/")[1:]
    renamed = [
        ATTENTION.get(parent) or re.sub(rf"^({LISTS}|net|to_out)_(\d+)$", r"\1.\2", parent)
        for parent in parents
    ]
    return ".".join([*renamed, LEAVES.get(leaf, leaf)])


def _layout(path: str, ndim: int) -> Layout:
    if not path.endswith("/kernel"):
        return SAME
    return CONVOLUTION if ndim == 4 else LINEAR


def to_torch(module: UNet | Autoencoder) -> dict[str, np.ndarray]:
    """The state dict that PyTorch's diffusers loads, in the parameters' types."""
    return state_dict.to_torch(nnx.state(module, nnx.Param), table(module))


def save(module: UNet | Autoencoder, folder: Path, *, dtype: Any = np.float16) -> None:
    """Writes `unet/` or `vae/` of a pipeline as PyTorch's diffusers does: config, safetensors."""
    kind = "UNet2DConditionModel" if isinstance(module, UNet) else "AutoencoderKL"
    config: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.39.0"}
    config |= dataclasses.asdict(module.config)
    if isinstance(module, Autoencoder):
        levels = len(module.config.block_out_channels)
        config["down_block_types"] = ["DownEncoderBlock2D"] * levels
        config["up_block_types"] = ["UpDecoderBlock2D"] * levels
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    named = state_dict.lazy_torch(nnx.state(module, nnx.Param), table(module))
    tensors = {key: tensor.astype(dtype) for key, tensor in named.items()}
    write_safetensors(tensors, folder / TORCH_FILE, metadata={"format": "pt"})


def load(build: Callable[..., M], config: Any, file: Path, *, compute: Compute) -> M:
    """A model with the weights of a file, in the compute type.

    Args:
      build: `UNet` or `Autoencoder`.
      file: one of `FILES`; no code in it is run.

    Raises:
      UserError: the file is damaged, or with every weight that is missing, unexpected or of
        another shape.
    """
    abstract = nnx.eval_shape(lambda: build(config, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, compute.dtype), state)
    abstract = nnx.merge(graphdef, state)
    if file.suffix == ".msgpack":
        flat, target = read_flax(file), model_dir.flat_params(state)
        model_dir.check_params(file, {k: np.shape(v) for k, v in flat.items()}, target)
        arrays = {k: jax.numpy.asarray(v, target[k].dtype) for k, v in flat.items()}
        return nnx.merge(graphdef, model_dir.unflatten_params(state, arrays))
    weights = _modern(read_weights(file))
    return state_dict.load(weights, table(abstract), abstract, source=str(file))


def _modern(weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """An autoencoder's old names of attention are replaced by those that came after."""
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(ATTENTION)})(?=\.)")
    return {old.sub(lambda m: ATTENTION[m[0]], key): value for key, value in weights.items()}


def read_flax(file: Path) -> dict[str, np.ndarray]:
    """The parameters in a .msgpack file of Flax, by path: 'params/conv_in/kernel'.

    Raises:
      UserError: it is damaged.
    """
    try:
        tree = serialization.msgpack_restore(file.read_bytes())
        flat = traverse_util.flatten_dict({"params": tree}, sep="/")
    except Exception as error:  # whatever msgpack makes of bytes that are none of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is damaged or cut short; download it again ({reason})") from error
    return flat
