"""SEED-OPT out to transformers and PEFT, run there, and back in."""

import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from seed_jax import SeedOPT, base_opt, convert, export, model_dir
from seed_jax.cli import UserError
from seed_jax.data.text import load_tokenizer
from seed_jax.interop import opt_weights
from seed_jax.interop.seed_opt_folders import code_token
from seed_jax.interop.torch_io import read_weights
from seed_jax.models.generation import Decoding
from seed_jax.models.layers import Compute
from seed_jax.models.opt import OPT, OPTConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from seed_jax.seed_opt import KIND, merged
from seed_jax.tasks.language_model import PACKAGED
from tests.tiny import CODES, QUERIES
from tests.tiny_seed_opt import SIZES, config, save_seed_opt

# One model of each kind serves all tests.
pytestmark = pytest.mark.xdist_group("opt_export")


@pytest.fixture(scope="module", params=["codebook", "learned"])
def model(request, tmp_path_factory):
    return save_seed_opt(tmp_path_factory.mktemp("seed_opt"), config(request.param))


def ours(folder) -> VisualOPT:
    return model_dir.load(folder, KIND, VisualOPTConfig, VisualOPT, Compute())


def some_ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(4, vocab_size, (2, 20))


def check_logits(theirs: torch.nn.Module, model: VisualOPT) -> None:
    ids = some_ids(model.config.vocab_size)
    expected = np.asarray(model(ids, np.ones_like(ids)))
    with torch.no_grad():
        found = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_transformers_writes_what_we_write(model, tmp_path):
    export.main(["--model", str(model), "--format", "hf", "--output", str(tmp_path / "hf")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    check_logits(theirs, merged(ours(model)))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    codes = [3, 0, CODES - 1, *[1] * (QUERIES - 3)]
    picture = "[IMG]" + "".join(map(code_token, codes)) + "[/IMG]"
    ids = tokenizer(f"{picture}<s>A photo of", add_special_tokens=False).input_ids
    begin = SIZES.vocab_size + CODES
    assert ids[: QUERIES + 2] == [begin, *(SIZES.vocab_size + np.array(codes)), begin + 1]
    assert tokenizer.decode(ids[: QUERIES + 2]).replace(" ", "") == picture

    prompt = [np.array(codes), "A photo of"]
    # All tokens are allowed here and there, but for a picture's grammar: ask for words alone.
    (text,) = SeedOPT.from_pretrained(model).generate(
        [prompt], decoding=Decoding(max_new=8), pictures=False
    )
    bos = tokenizer.bos_token_id
    prompt_ids = [
        *ids[: QUERIES + 2],
        bos,
        *tokenizer("A photo of", add_special_tokens=False).input_ids,
    ]
    written = theirs.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=list(range(len(load_tokenizer(PACKAGED)), len(tokenizer))),
    )[0, len(prompt_ids) :]
    assert [tokenizer.decode(written, skip_special_tokens=True).strip()] == text


def test_it_comes_back(model, tmp_path, capsys):
    export.main(["--model", str(model), "--format", "hf", "--output", str(tmp_path / "hf")])
    arguments = ["--source", "opt", "--weights", str(tmp_path / "hf")]
    convert.main([*arguments, "--output", str(tmp_path / "back")])
    assert "none missing" in capsys.readouterr().out
    back = model_dir.load(tmp_path / "back", base_opt.KIND, OPTConfig, OPT, Compute())
    ids = some_ids(back.config.vocab_size)
    np.testing.assert_allclose(
        back(ids, np.ones_like(ids)), merged(ours(model))(ids, np.ones_like(ids)), atol=1e-5
    )
    # And out once more, bit by bit.
    opt_weights.save(back, tmp_path / "again", dtype=np.float32)
    first, second = (opt_weights.read_tensors(tmp_path / name) for name in ("hf", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(np.asarray(tensor), np.asarray(second[name]), err_msg=name)


def test_peft_adds_our_adapters(model, tmp_path):
    export.main(["--model", str(model), "--format", "peft", "--output", str(tmp_path / "peft")])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft/base")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    check_logits(theirs, ours(model))

    arguments = ["--source", "peft", "--weights", str(tmp_path / "peft")]
    with pytest.raises(UserError, match="--base"):
        convert.main([*arguments, "--output", str(tmp_path / "back")])
    base_folder = str(tmp_path / "peft/base")
    convert.main([*arguments, "--base", base_folder, "--output", str(tmp_path / "back")])
    back = model_dir.load(tmp_path / "back", base_opt.KIND, OPTConfig, OPT, Compute())
    assert back.config.lora == dataclasses.replace(SIZES.lora)
    expected = nnx.to_flat_state(nnx.state(ours(model).opt, nnx.LoRAParam))
    found = dict(nnx.to_flat_state(nnx.state(back, nnx.LoRAParam)))
    assert len(expected) == len(found) == 6
    for path, value in expected:
        np.testing.assert_array_equal(found[path][...], value[...], err_msg=str(path))
    # And out once more, bit by bit.
    again = nnx.state(back, nnx.LoRAParam)
    opt_weights.save_peft(again, back.config, tmp_path / "again", base="base")
    first, second = (read_weights(tmp_path / n / opt_weights.PEFT_FILE) for n in ("peft", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert np.asarray(tensor).tobytes() == np.asarray(second[name]).tobytes(), name


def test_what_is_refused(model, tmp_path):
    tokenizer = str(model / "tokenizer")
    with pytest.raises(UserError, match="seed_tokenizer model, not a seed_opt model"):
        export.main(["--model", tokenizer, "--format", "hf", "--output", str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        convert.main(
            ["--source", "opt", "--weights", str(tmp_path), "--output", str(tmp_path / "back")]
        )
