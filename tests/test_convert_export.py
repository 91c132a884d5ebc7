"""Tokenizers out to the original's layout and back in, by the command lines."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from ml_collections import ConfigDict

from configs import tiny_causal_qformer
from seed_jax import SeedTokenizer, convert, export, model_dir
from seed_jax.cli import UserError
from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import CausalEncoder, TokenizerConfig
from seed_jax.tasks.causal_qformer import CausalQFormer
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
    assert "ignored: head.weight, norm.bias" in told
    hashes = {model_dir.describe(m)["content_hash"] for m in (model, tmp_path / "back")}
    assert len(hashes) == 1


def blip2_weights(exported) -> dict[str, np.ndarray]:
    """Names that BLIP-2's file has, a few with no use here, and the ViT's."""
    weights = safetensors.numpy.load_file(exported[1] / "seed_tokenizer.safetensors")
    parts = ("visual_encoder.", "ln_vision.", "query_tokens", "Qformer.bert.")
    weights = {key: value for key, value in weights.items() if key.startswith(parts)}
    config = model_dir.load_config(exported[0], "seed_tokenizer", TokenizerConfig).encoder
    empty = nnx.eval_shape(lambda: CausalEncoder(config, compute=Compute(), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for name in ("vision_proj", "text_proj"):
        dout, din = getattr(empty, name).kernel.shape[::-1]
        weights[f"{name}.weight"] = rng.normal(size=(dout, din)).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(size=dout).astype(np.float32)
    return weights | {
        "temp": np.array(0.05, np.float32),
        "itm_head.weight": np.zeros((2, 16), np.float32),
        "Qformer.cls.predictions.bias": np.zeros(11, np.float32),
    }


def test_blip2_is_what_stage_1_starts_from(exported, tmp_path, capsys):
    weights = blip2_weights(exported)
    safetensors.numpy.save_file(weights, tmp_path / "blip2.safetensors")
    arguments = ["--source", "blip2", "--weights", str(tmp_path / "blip2.safetensors"), *HEADS]
    convert.main([*arguments, "--output", str(tmp_path / "model")])
    told = capsys.readouterr().out
    assert "2 ignored" in told
    assert "ignored: Qformer.cls.predictions.bias, itm_head.weight" in told

    config = tiny_causal_qformer.get_config().unlock()
    config.init, config.tokenizer = str(tmp_path / "model"), str(exported[0] / "text_tokenizer")
    sizes = model_dir.describe(tmp_path / "model")["config"]
    config.model = ConfigDict(sizes)
    task = CausalQFormer(config.lock())
    model = task.build(rngs=nnx.Rngs(1))
    task.prepare(model, iter(()))
    assert float(model.temperature[...]) == pytest.approx(0.05)
    np.testing.assert_array_equal(model.text_proj.kernel[...].T, weights["text_proj.weight"])
    np.testing.assert_array_equal(model.qformer.query_tokens[...], weights["query_tokens"][0])


def test_a_vit_for_larger_pictures(exported, tmp_path):
    _, folder = exported
    arguments = ["--source", "seed1", "--weights", str(folder / "seed_tokenizer.safetensors")]
    arguments += ["--output", str(tmp_path / "larger"), *HEADS, "--image-size"]
    with pytest.raises(UserError, match="no multiple of the ViT's patches"):
        convert.main([*arguments, str(2 * SIDE - 1)])
    convert.main([*arguments, str(2 * SIDE)])
    tokenizer = SeedTokenizer.from_pretrained(tmp_path / "larger")
    codes = tokenizer.encode(jnp.zeros((1, 2 * SIDE, 2 * SIDE, 3), jnp.uint8))
    assert codes.shape == (1, tokenizer.config.encoder.qformer.queries)


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
    arguments = ["--model", str(model), "--format", "seed", "--output", str(output)]
    export.main(arguments)
    (output / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="pt exists; name another --output"):
        export.main(arguments)
    assert (output / "mine.txt").read_text() == "keep"
    export.main([*arguments, "--overwrite"])
    assert sorted(p.name for p in output.iterdir()) == ["README.md", "seed_tokenizer.safetensors"]
    card = (output / "README.md").read_text()
    assert model_dir.describe(model)["content_hash"] in card
    sizes = json.loads(card.split("```json\n")[1].split("```")[0])
    assert sizes["encoder"]["vit"]["heads"] == 2
