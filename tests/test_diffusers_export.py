"""What draws from codes, out to diffusers, and run there without seed_jax."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from seed_jax import SeedTokenizer, export, model_dir
from seed_jax.cli import UserError
from seed_jax.interop import keys
from seed_jax.interop.state_dict import to_torch
from seed_jax.models.teacher import PACKAGED
from seed_jax.models.tokenizer import GenerationConfig
from tests.random_weights import random_weights
from tests.tiny import CODES, QUERIES, TOKENIZER, save_tokenizer

# Layers with and without cross-attention, and the packaged Stable Diffusion's text states.
SIZES = dataclasses.replace(
    TOKENIZER,
    decoder_depth=2,
    generation=GenerationConfig(queries=77, depth=3, output_dim=128),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = random_weights(lambda: SeedTokenizer(SIZES, rngs=nnx.Rngs(0)))
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    model_dir.save(path, kind="seed_tokenizer", config=SIZES, module=tokenizer)
    return path


# Run in a process of its own.
EMBED_AND_DRAW = """
import json, runpy, sys, torch
from draw_from_codes import GenerationEmbeddings
codes = torch.tensor(json.loads(sys.argv.pop(1)))
print(json.dumps(GenerationEmbeddings()(codes).tolist()))
runpy.run_path("draw_from_codes.py", run_name="__main__")
assert not any(name.startswith("seed_jax") for name in sys.modules)
"""


def test_pytorch_embeds_and_draws_what_we_do(model, tmp_path):
    folder = tmp_path / "pt"
    export.main(["--model", str(model), "--format", "diffusers", "--output", str(folder)])
    codes = np.random.default_rng(1).integers(0, CODES, (2, QUERIES))
    ours = np.asarray(SeedTokenizer.from_pretrained(model).embed(codes))

    lines = [{"image": f"{i}.png", "codes": row} for i, row in enumerate(codes.tolist())]
    (tmp_path / "codes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-c", EMBED_AND_DRAW, json.dumps(codes.tolist())]
    command += [str(tmp_path / "codes.jsonl"), "drawn", "--steps", "2"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    theirs = np.array(json.loads(run.stdout.splitlines()[0]))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    drawn = [np.asarray(Image.open(folder / "drawn" / f"{i}.png")) for i in range(2)]
    assert drawn[0].shape == drawn[1].shape == (64, 64, 3)
    assert drawn[0].std() > 5


def test_the_script_goes_as_far_as_suits_the_model(model, tmp_path):
    arguments = ["--model", str(model), "--format", "diffusers", "--output"]
    export.main([*arguments, str(tmp_path / "packaged")])
    # Any other one is taken to be of Stable Diffusion's size.
    own = str(tmp_path / "packaged/stable_diffusion")
    export.main([*arguments, str(tmp_path / "other"), "--diffusion", own])
    told = {
        name: json.loads((tmp_path / name / "generation.json").read_text())["guidance_scale"]
        for name in ("packaged", "other")
    }
    assert told == {"packaged": 2.0, "other": 7.5}

    # What it draws from is the tokenizer's, and what it draws by the directory's, bit by bit.
    tokenizer = SeedTokenizer.from_pretrained(model)
    named = to_torch(nnx.state(tokenizer), keys.seed1_tokenizer(SIZES))
    written = safetensors.numpy.load_file(tmp_path / "packaged/generation.safetensors")
    assert written.keys() == {key for key in named if key.startswith(keys.GENERATION)}
    for key, tensor in written.items():
        assert tensor.tobytes() == named[key].tobytes(), key
    for file in Path(own).rglob("*.safetensors"):
        copied = tmp_path / "other/stable_diffusion" / file.relative_to(own)
        assert copied.read_bytes() == (PACKAGED / file.relative_to(own)).read_bytes()


def test_widths_must_fit(tmp_path):
    other = save_tokenizer(tmp_path / "other")
    arguments = ["--format", "diffusers", "--output", str(tmp_path / "pt")]
    with pytest.raises(
        UserError, match="12 wide, but the packaged Stable Diffusion draws from 128"
    ):
        export.main(["--model", str(other), *arguments])
    with pytest.raises(UserError, match="nowhere: no such directory"):
        export.main(["--model", str(other), *arguments, "--diffusion", "nowhere"])
    assert not (tmp_path / "pt").exists()
