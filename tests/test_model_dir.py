"""Model directories: whole or refused, by name."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from seed_jax import SeedTokenizer, model_dir
from seed_jax.cli import UserError
from seed_jax.models.tokenizer import EncoderConfig, TokenizerConfig
from tests.test_models import SIZES, build


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    model_dir.save(path, kind="seed_tokenizer", config=SIZES, module=build())
    return path


def test_what_is_saved_comes_back_bit_by_bit(folder):
    loaded = SeedTokenizer.from_pretrained(folder)
    assert loaded.config == SIZES
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(build()))


def test_saving_again_replaces_and_the_hash_follows_the_weights(folder):
    first = model_dir.describe(folder)["content_hash"]
    model_dir.save(folder, kind="seed_tokenizer", config=SIZES, module=build())
    assert model_dir.describe(folder)["content_hash"] == first
    changed = SeedTokenizer.from_pretrained(folder)
    changed.codebook.vectors[...] = changed.codebook.vectors[...].at[0, 0].add(1.0)
    model_dir.save(folder, kind="seed_tokenizer", config=SIZES, module=changed)
    assert model_dir.describe(folder)["content_hash"] != first
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_any_missing_or_cut_file_is_named(folder):
    for name in json.loads((folder / "config.json").read_text())["files"]:
        file = folder / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            SeedTokenizer.from_pretrained(folder)
        file.write_bytes(content[:-1])
        if content:
            with pytest.raises(UserError, match=f"{name} has {len(content) - 1} bytes"):
                SeedTokenizer.from_pretrained(folder)
        file.write_bytes(content)
    SeedTokenizer.from_pretrained(folder)


def test_no_directory_no_description_another_kind(folder):
    with pytest.raises(UserError, match="no such directory"):
        model_dir.describe(folder / "nowhere")
    with pytest.raises(UserError, match="not a causal_encoder model"):
        model_dir.load_config(folder, "causal_encoder", EncoderConfig)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not a seed_jax model description"):
        model_dir.describe(folder)


def test_weights_that_do_not_fit_the_config_are_all_named(folder):
    file = folder / "config.json"
    description = json.loads(file.read_text())
    wider = dataclasses.replace(SIZES.codebook, size=99)
    description["config"] = dataclasses.asdict(
        dataclasses.replace(SIZES, codebook=wider, reconstruction=False)
    )
    file.write_text(json.dumps(description))
    with pytest.raises(UserError) as error:
        SeedTokenizer.from_pretrained(folder)
    assert "codebook/vectors is (8192, 32), not (99, 32)" in str(error.value)
    assert "reconstruction/positions is unexpected" in str(error.value)


def test_an_unknown_field_says_what_exists():
    with pytest.raises(UserError, match=r"config\.encoder\.vit\.widht does not exist; .*width"):
        model_dir.from_dict(TokenizerConfig, {"encoder": {"vit": {"widht": 3}}})
