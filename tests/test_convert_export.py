"""Tokenizers out to the original's layout and back in, by the command lines."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from seed_jax import SeedTokenizer, convert, export, model_dir
from seed_jax.cli import UserError
from tests.tiny import SIDE, save_tokenizer

HEADS = ["--vit-heads", "2", "--qformer-heads", "2", "--decoder-heads", "2"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = save_tokenizer(folder / "model")
    export.main(["--model", str(model), "--format", "seed", "--output", str(folder / "pt"), "--pt"])
    return model, folder / "pt"


@pytest.mark.parametrize("name", ["seed_tokenizer.safetensors", "seed_tokenizer.pt"])
def test_out_and_back_is_bitwise_the_same_model(exported, tmp_path, name):
    model, folder = exported
    arguments = ["--source", "seed1", "--weights", str(folder / name)]
    convert.main([*arguments, "--output", str(tmp_path / "back"), *HEADS])
    there, back = model_dir.describe(model), model_dir.describe(tmp_path / "back")
    assert back["content_hash"] == there["content_hash"]
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)), jnp.uint8)
    codes = [SeedTokenizer.from_pretrained(m).encode(images) for m in (model, tmp_path / "back")]
    np.testing.assert_array_equal(*codes)


def test_the_file_of_torch_holds_the_same_tensors(exported):
    _, folder = exported
    ours = safetensors.numpy.load_file(folder / "seed_tokenizer.safetensors")
    theirs = torch.load(folder / "seed_tokenizer.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor.numpy(), err_msg=key)
    assert "visual_encoder.blocks.0.attn.qkv.weight" in ours
    assert "distill_text_proj.weight" in ours


def test_the_vit_can_come_from_a_file_of_its_own(exported, tmp_path, capsys):
    model, folder = exported
    weights = safetensors.numpy.load_file(folder / "seed_tokenizer.safetensors")
    prefix = "visual_encoder."
    vit = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if prefix in key}
    vit |= {"head.weight": np.zeros((3, 16), np.float32), "norm.bias": np.zeros(16, np.float32)}
    safetensors.numpy.save_file(vit, tmp_path / "eva.safetensors")
    safetensors.numpy.save_file(weights, tmp_path / "rest.safetensors")
    convert.main(
        [
            *("--source", "seed1", "--weights", str(tmp_path / "rest.safetensors")),
            *("--vit", str(tmp_path / "eva.safetensors"), "--output", str(tmp_path / "back")),
            *HEADS,
        ]
    )
    told = capsys.readouterr().out
    assert "2 ignored" in told
    assert "ignored: head.weight" in told
    hashes = {model_dir.describe(m)["content_hash"] for m in (model, tmp_path / "back")}
    assert len(hashes) == 1


def test_mistakes_cost_one_line_and_nothing_written(exported, tmp_path):
    _, folder = exported
    file, output = str(folder / "seed_tokenizer.safetensors"), str(tmp_path / "out")
    with pytest.raises(UserError, match="say --source seed1"):
        convert.main(["--source", "seed2", "--weights", file, "--output", output, *HEADS])
    weights = safetensors.numpy.load_file(file)
    del weights["query_tokens"], weights["ln_vision.bias"]
    weights["stranger"] = np.zeros(2, np.float32)
    weights["query_tokens"] = np.zeros((1, 8, 16), np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "other.safetensors")
    other = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"missing: ln_vision.bias \| unexpected: stranger"):
        convert.main(["--source", "seed1", "--weights", other, "--output", output, *HEADS])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "seed_tokenizer.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.safetensors is damaged or cut short"):
        convert.main(["--source", "seed1", "--weights", str(cut), "--output", output, *HEADS])
    assert not (tmp_path / "out").exists()


def test_what_exists_is_replaced_on_request_alone(exported, tmp_path):
    model, _ = exported
    output = tmp_path / "pt"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    arguments = ["--model", str(model), "--format", "seed", "--output", str(output)]
    with pytest.raises(UserError, match="pt exists; name another --output"):
        export.main(arguments)
    assert (output / "mine.txt").read_text() == "keep"
    export.main([*arguments, "--overwrite"])
    assert sorted(p.name for p in output.iterdir()) == ["README.md", "seed_tokenizer.safetensors"]
    card = (output / "README.md").read_text()
    assert model_dir.describe(model)["content_hash"] in card
    sizes = json.loads(card.split("```json\n")[1].split("```")[0])
    assert sizes["encoder"]["vit"]["heads"] == 2
