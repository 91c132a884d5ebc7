"""Folders that say how large a model is and hold no weights, where a config names what isn't there.

Tasks read sizes from the directories of earlier stages; a plan needs nothing else of them.
"""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from seed_jax import base_opt, model_dir
from seed_jax.data import features, prepared
from seed_jax.data.codes import HASH_DIGITS, LINES
from seed_jax.data.mixture import split_paths
from seed_jax.data.pipeline import Drawing
from seed_jax.data.text import EMBEDDED_TOKENIZER
from seed_jax.models import teacher
from seed_jax.models.opt import OPTConfig
from seed_jax.models.tokenizer import EncoderConfig, TokenizerConfig
from seed_jax.tasks import causal_qformer, codebook
from seed_jax.tasks.language_model import PACKAGED as PACKAGED_OPT

CONFIGS = Path(__file__).parents[2] / "configs"
OPT = OPTConfig()  # 2.7B
NO_HASH = "0" * 64  # of weights that are not there
# Stable Diffusion 1.x: the text model of CLIP ViT-L/14 (openai/clip-vit-large-patch14).
TEXT_ENCODER = {
    "vocab_size": 49_408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


def stand_in(config: ConfigDict, recipe: Path, folder: Path) -> list[str]:
    """Makes `config` name folders written to `folder` in place of directories that aren't there.

    Args:
      recipe: the file that the config is of. An earlier stage's sizes are those of the recipe
        beside it of the same family, such as tiny_codebook.py for tiny_seed_opt.py.

    Returns:
      What stands for what, a line each.
    """
    said: list[str] = []

    def absent(field: str) -> bool:
        return bool(config.get(field)) and not Path(config[field].split(",")[0]).is_dir()

    def put(field: str, path: Path, what: str) -> None:
        said.append(f"config.{field}: {what}")
        config[field] = str(path)

    def earlier(name: str) -> Path:
        beside = recipe.with_name(recipe.name.replace(config.task, name))
        return beside if beside.is_file() else CONFIGS / f"{name}.py"

    if absent("tokenizer"):
        put("tokenizer", EMBEDDED_TOKENIZER, "the packaged one, cut and padded alike")
    no_init = not config.get("init") or absent("init")
    if config.task == "causal_qformer" and not config.train_vit and no_init:
        vit = config.model.vit.to_dict()
        put("init", _write(folder / "vit", causal_qformer.VIT_KIND, vit), "config.model.vit")
    if config.task in ("codebook", "seed_opt") and no_init:
        first = earlier("causal_qformer")
        encoder = model_dir.from_dict(EncoderConfig, _recipe(first).model.to_dict())
        sizes: EncoderConfig | TokenizerConfig = encoder
        names = [first.name]
        if config.task == "seed_opt":
            second = earlier("codebook")
            given = _recipe(second).model.to_dict()
            sizes = model_dir.from_dict(TokenizerConfig, {"encoder": encoder, **given})
            names.append(second.name)
        kind = causal_qformer.KIND if config.task == "codebook" else codebook.KIND
        path = _write(folder / "init", kind, dataclasses.asdict(sizes))
        shutil.copytree(EMBEDDED_TOKENIZER, path / "text_tokenizer")
        put("init", path, f"the sizes of {' and '.join(names)}")
    if absent("teacher"):
        path = folder / "teacher"
        shutil.copytree(teacher.PACKAGED / "tokenizer", path / "tokenizer")
        (path / "text_encoder").mkdir()
        described = {"model_type": "clip_text_model", **TEXT_ENCODER}
        (path / "text_encoder/config.json").write_text(json.dumps(described))
        put("teacher", path, "the sizes of Stable Diffusion 1.x's text encoder")
    if not all(Path(made).is_dir() for made in features.folders(config.data)):
        qformer = model_dir.load_config(config.init, causal_qformer.KIND, EncoderConfig).qformer
        text = teacher.load_config(config.teacher)
        made = features.Settings(
            model=model_dir.describe(config.init)["content_hash"],
            teacher="",
            precision=config.precision,
            image_size=config.image_size,
            views=1,
            seed=0,
            drawing=Drawing.of(config.data),
            split="",
            causal=(qformer.queries, qformer.width),
            states=(text.max_position_embeddings, text.hidden_size),
        )
        path = folder / "features"
        path.mkdir()
        report = {"format": features.FORMAT, **dataclasses.asdict(made)}
        (path / prepared.REPORT).write_text(json.dumps(report))
        said.append("config.data.features: the shapes that these make")
        config.data.features = str(path)
    if config.get("codes") and not Path(config.codes).exists():
        known = model_dir.load_config(config.init, codebook.KIND, TokenizerConfig)
        path = folder / f"known{LINES}"
        of_tokenizer = model_dir.describe(config.init)["content_hash"][:HASH_DIGITS]
        codes = [0] * known.encoder.qformer.queries
        line = {"image": "", "codes": codes, "model": of_tokenizer}
        path.write_text(json.dumps(line) + "\n")
        sets = split_paths(config.data.path)
        said.append("config.codes: known, so that no picture is read")
        config.codes = ",".join([str(path)] * len(sets))
    if absent("opt"):
        path = _write(folder / "opt", base_opt.KIND, dataclasses.asdict(OPT))
        (path / "params").mkdir()
        shutil.copytree(PACKAGED_OPT, path / "text_tokenizer")
        put("opt", path, "the sizes of OPT-2.7B")
    return said


def _recipe(path: Path) -> ConfigDict:
    return runpy.run_path(str(path))["get_config"]()


def _write(path: Path, kind: str, config: dict[str, Any]) -> Path:
    path.mkdir()
    described = {
        "format": model_dir.FORMAT,
        "kind": kind,
        "config": config,
        "content_hash": NO_HASH,
    }
    (path / "config.json").write_text(json.dumps({**described, "files": {}}))
    return path
