"""OPT in transformers' folders and adapters in PEFT's: their names of weights, read and written."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from seed_jax.cli import UserError
from seed_jax.interop import state_dict, transformers_folder
from seed_jax.interop.state_dict import LINEAR, SAME, ArrayLike, Layout, Row, Table
from seed_jax.interop.torch_io import StoredTensor, write_safetensors
from seed_jax.interop.transformers_folder import CONFIG, TORCH_FILE
from seed_jax.models.layers import Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPT, OPTConfig

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Ours -> transformers'.
LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
# `final_layer_norm` of a layer, and of the decoder, are two things.
DECODER = "model.decoder."


def opt(config: OPTConfig) -> Table:
    """transformers' OPTForCausalLM."""
    # Files may hold the output layer even where it is the word embeddings.
    ignored = ("lm_head.weight",) if config.tied_head else ()
    return Table("opt", tuple(_base(config)), ignored=ignored)


def peft(config: OPTConfig) -> Table:
    """The adapters alone, as PEFT saves them."""
    return Table("the adapters of opt", tuple(_adapters(config, "base_model.model.")))


def _base(config: OPTConfig) -> list[Row]:
    layers, layer = range(config.depth), f"{DECODER}layers.{{i}}."
    rows = [
        Row(f"{DECODER}embed_tokens.weight", ("words",)),
        Row(f"{DECODER}embed_positions.weight", ("positions",)),
    ]
    if not config.tied_head:
        rows.append(Row("lm_head.weight", ("head",)))
    if config.word_dim not in (0, config.width):
        rows += [
            Row(f"{DECODER}{name}.weight", (f"{name}/kernel",), LINEAR)
            for name in ("project_in", "project_out")
        ]
    if config.pre_norm:
        rows += _pair(f"{DECODER}final_layer_norm.", "norm/scale", "norm/bias", SAME)
    for ours, torch in NORMS.items():
        prefix = f"layers/{ours}/"
        rows += _pair(f"{layer}{torch}.", f"{prefix}scale", f"{prefix}bias", SAME, layers)
    for ours, torch in LINEARS.items():
        prefix = f"layers/{ours}/"
        rows += _pair(f"{layer}{torch}.", f"{prefix}kernel", f"{prefix}bias", LINEAR, layers)
    return rows


def _pair(
    prefix: str, weight: str, bias: str, layout: Layout, layers: range | None = None
) -> list[Row]:
    return [
        Row(f"{prefix}weight", (weight,), layout, layers),
        Row(f"{prefix}bias", (bias,), SAME, layers),
    ]


def _adapters(config: OPTConfig, prefix: str) -> list[Row]:
    return [
        Row(
            f"{prefix}{DECODER}layers.{{i}}.{LINEARS[name]}.lora_{letter}.weight",
            (f"layers/{name}/lora_{letter.lower()}",),
            LINEAR,
            range(config.depth),
        )
        for name in config.lora.targets
        for letter in "AB"
    ]


def read_config(folder: str | Path) -> OPTConfig:
    """The sizes in a transformers folder.

    Raises:
      UserError: no config.json of an OPT there.
    """
    folder = Path(folder)
    return config_of(transformers_folder.read_config(folder, "opt"), folder / CONFIG)


def config_of(values: Mapping[str, Any], file: Path) -> OPTConfig:
    """The sizes that transformers' config of an OPT tells.

    Args:
      file: it lies there.

    Raises:
      UserError: a size is missing.
    """
    try:
        width = values["hidden_size"]
        word_dim = values.get("word_embed_proj_dim") or width
        return OPTConfig(
            vocab_size=values["vocab_size"],
            width=width,
            depth=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            mlp_dim=values["ffn_dim"],
            max_positions=values["max_position_embeddings"],
            word_dim=0 if word_dim == width else word_dim,
            pre_norm=values.get("do_layer_norm_before", True),
            tied_head=values.get("tie_word_embeddings", True),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not the config of an OPT ({error!r})") from None


def read_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a transformers folder under OPTForCausalLM's names; none is read yet.

    Raises:
      UserError: no weights there, or a file is missing or damaged.
    """
    # The files of the larger sizes leave out the first part of the names.
    return {
        f"model.{key}" if key.startswith("decoder.") else key: tensor
        for key, tensor in transformers_folder.read_tensors(Path(folder)).items()
    }


def load(
    folder: str | Path,
    *,
    compute: Compute = Compute(),
    tensors: Mapping[str, ArrayLike] | None = None,
    config: OPTConfig | None = None,
    stored: Any = None,
) -> OPT:
    """The OPT of a transformers folder.

    At its peak, memory holds the model and one tensor.

    Args:
      tensors, config: what `read_tensors` and `read_config` found there, if that is known already.
      stored: the type that holds the weights; None: the compute type.

    Raises:
      UserError: see `read_config` and `read_tensors`; or a weight is missing or of another shape.
    """
    sizes = config or read_config(folder)
    abstract = nnx.eval_shape(lambda: OPT(sizes, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    dtype = stored or compute.dtype
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), state)
    tensors = read_tensors(folder) if tensors is None else tensors
    return state_dict.load(tensors, opt(sizes), nnx.merge(graphdef, state), source=str(folder))


def save(model: OPT, folder: Path, *, dtype: Any = np.float16, **facts: Any) -> None:
    """Writes an OPT without adapters as transformers does.

    Args:
      facts: further entries of config.json, such as token ids.
    """
    config = model.config
    described = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "ffn_dim": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "word_embed_proj_dim": config.word_dim or config.width,
        "do_layer_norm_before": config.pre_norm,
        "tie_word_embeddings": config.tied_head,
        "dropout": config.dropout,
        "dtype": np.dtype(dtype).name,
        **facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    named = state_dict.lazy_torch(nnx.state(model, nnx.Param), opt(config))
    tensors = {key: tensor.astype(dtype) for key, tensor in named.items()}
    write_safetensors(tensors, folder / TORCH_FILE, metadata={"format": "pt"})


def read_peft_config(folder: str | Path) -> LoRAConfig:
    """What PEFT's adapter_config.json says of a LoRA's size.

    Raises:
      UserError: it is missing, or not of a LoRA of linear layers of OPT.
    """
    file = Path(folder) / PEFT_CONFIG
    if not file.is_file():
        raise UserError(f"{file} is missing; name a folder as PEFT saves it")
    ours = {torch.split(".")[-1]: name for name, torch in LINEARS.items()}
    try:
        values = _json(file)
        targets = {ours[target] for target in values["target_modules"]}
        return LoRAConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values["lora_dropout"],
            targets=tuple(name for name in LINEARS if name in targets),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not of a LoRA of OPT's linear layers ({error!r})") from None


def save_peft(adapters: nnx.State, config: OPTConfig, folder: Path, *, base: str) -> None:
    """Writes adapters as PEFT does.

    Args:
      adapters: of an OPT with this config.
      base: what to name as the model that they belong to.
    """
    lora = config.lora
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [LINEARS[name].split(".")[-1] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    write_safetensors(state_dict.lazy_torch(adapters, peft(config)), folder / PEFT_FILE)


def with_adapters(model: OPT, weights: Mapping[str, ArrayLike], lora: LoRAConfig) -> OPT:
    """An OPT without adapters, and those of a PEFT state dict, as one model.

    Raises:
      UserError: a weight is missing, unexpected or of another shape.
    """
    config = dataclasses.replace(model.config, lora=lora)
    abstract = nnx.eval_shape(lambda: OPT(config, compute=model.compute, rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(abstract)
    adapters = nnx.state(abstract, nnx.LoRAParam)
    loaded = state_dict.load_state(weights, peft(config), adapters, source="the adapters")
    return nnx.merge(graphdef, loaded, nnx.state(model))


def _json(file: Path) -> Any:
    return json.loads(file.read_text())
