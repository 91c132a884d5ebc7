"""Folders and files that can't be converted: one line that names them, and nothing written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from seed_jax import convert, model_dir
from seed_jax.cli import UserError
from seed_jax.interop.torch_io import INDEX_SUFFIX
from seed_jax.interop.transformers_folder import TORCH_FILE
from seed_jax.tasks.language_model import PACKAGED
from tests.test_torch_io import Code

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A BERT in pieces."""
    folder = tmp_path_factory.mktemp("bert")
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    model.save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.fixture
def bert(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bert"))


def pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refused(source: str, weights: Path, *more: str) -> str:
    """The line that converting ends with; nothing may be left where it would have written."""
    output = weights.parent / "output"
    with pytest.raises(UserError) as error:
        convert.main(
            ["--source", source, "--weights", str(weights), "--output", str(output), *more]
        )
    assert not output.exists()
    line = str(error.value)
    assert "\n" not in line
    return line


def test_a_piece_that_has_not_been_downloaded(bert):
    piece = pieces(bert)[1]
    piece.unlink()
    line = refused("bert", bert)
    index = bert / f"{TORCH_FILE}{INDEX_SUFFIX}"
    assert line == f"{piece} is missing, which {index} names; download the rest"


def test_a_piece_that_was_cut_short(bert):
    piece = pieces(bert)[1]
    piece.write_bytes(piece.read_bytes()[:-1])
    assert refused("bert", bert).startswith(f"{piece} is damaged or cut short; download it again")


def test_an_index_that_leaves_out_a_piece(bert):
    file = bert / f"{TORCH_FILE}{INDEX_SUFFIX}"
    index = json.loads(file.read_text())
    left_out = pieces(bert)[0].name
    kept = {key: name for key, name in index["weight_map"].items() if name != left_out}
    file.write_text(json.dumps({**index, "weight_map": kept}))
    line = refused("bert", bert)
    assert line.startswith(f"{bert} does not fit bert: missing: ")
    file.write_text("[]")
    assert refused("bert", bert) == f"{file} is not an index of weights"


def test_folders_of_another_model_or_of_none(bert, tmp_path):
    config = bert / "config.json"
    assert refused("opt", bert) == f"{config} describes a model of type bert, not opt"
    assert "describes a model of type bert, not blip-2" in refused("blip2-hf", bert)
    assert "describes a model of type opt, not bert" in refused("bert", copied(PACKAGED, tmp_path))
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "hidden_act": "relu"}))
    assert refused("bert", bert) == f"{config}: hidden_act is 'relu'; the Q-Former has 'gelu'"
    config.write_text(json.dumps({**values, "hidden_size": 24}))
    assert "of another shape: " in refused("bert", bert)
    config.unlink()
    assert refused("bert", bert).startswith(
        f"{config} is missing; name a folder with a model of type bert"
    )
    assert "takes one folder as --weights" in refused("bert", pieces(bert)[0])


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def test_a_file_of_another_model(whole, tmp_path):
    piece = copied(whole, tmp_path) / pieces(whole)[0].name
    for source in ("seed1", "seed2", "blip2", "eva-vit-g"):
        assert f"{piece} lacks " in refused(source, piece)


def test_weights_that_would_run_code(bert, tmp_path):
    for piece in bert.glob("model*"):
        piece.unlink()
    file, harm = bert / "pytorch_model.bin", tmp_path / "harm"
    file.write_bytes(pickle.dumps({"a": Code(harm)}))
    assert refused("bert", bert).startswith(f"{file} is refused: it holds more than tensors")
    torch.save({"model": {"a": torch.zeros(2), "b": Code(harm)}}, tmp_path / "evil.pth")
    for source in ("seed1", "eva-vit-g"):
        assert "evil.pth is refused" in refused(source, tmp_path / "evil.pth")
    assert not harm.exists()


def test_options_of_other_sources(bert):
    assert refused("bert", bert, "--vit", "x.pth") == "--vit is not for --source bert"
    assert refused("bert", bert, "--image-size", "28") == "--image-size is not for --source bert"


def test_what_exists_is_replaced_on_request_alone(bert, tmp_path):
    output = tmp_path / "output"
    arguments = ["--source", "bert", "--weights", str(bert), "--output", str(output)]
    convert.main(arguments)
    (output / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="output exists; name another --output"):
        convert.main(arguments)
    # Nor is it lost to weights that turn out to be no good.
    config = bert / "config.json"
    good = config.read_text()
    config.write_text("{}")
    with pytest.raises(UserError, match="is not the config of a model of type bert"):
        convert.main([*arguments, "--overwrite"])
    assert (output / "mine.txt").read_text() == "keep"
    config.write_text(good)
    convert.main([*arguments, "--overwrite"])
    assert not (output / "mine.txt").exists()
    assert model_dir.describe(output)["kind"] == "bert"
