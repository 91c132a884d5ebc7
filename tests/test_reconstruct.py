"""Pictures and codes drawn again through the command line, and what it refuses."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from seed_jax import SeedTokenizer, drawing, generate, tokenize
from seed_jax.cli import UserError
from seed_jax.interop import diffusers_weights
from seed_jax.models import teacher
from seed_jax.reconstruct import main, output_name
from tests.test_diffusion_weights import random_model
from tests.tiny import CODES, QUERIES
from tests.tiny_diffusion import save_models_and_pictures

PICTURES = 5


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """model/, diffusion/, pictures/ and codes.jsonl."""
    folder = save_models_and_pictures(tmp_path_factory.mktemp("reconstruct"), PICTURES)
    arguments = {"model": "model", "images": "pictures", "output": "codes.jsonl"}
    tokenize.main([f"--{name}={folder / path}" for name, path in arguments.items()])
    return folder


def reconstruct(there: Path, images: Path, output: Path, *options: str) -> dict[str, np.ndarray]:
    arguments = {
        "model": there / "model",
        "diffusion": there / "diffusion",
        "images": images,
        "output": output,
        "steps": 2,
        "batch-size": 3,
    }
    main([*(f"--{name}={value}" for name, value in arguments.items()), *options])
    return {file.name: np.asarray(Image.open(file)) for file in output.glob("*.png")}


def test_pictures_and_their_codes_are_drawn_alike(there, tmp_path):
    drawn = reconstruct(there, there / "pictures", tmp_path / "pictures")
    assert sorted(drawn) == [*(f"{i:03}.png" for i in range(PICTURES)), "sheet.png"]
    assert drawn["000.png"].std() > 1
    images = ["--model", str(there / "model"), "--images", str(there / "pictures")]
    tokenize.main([*images, "--output", str(tmp_path / "shards"), "--format", "parquet"])
    for codes in (there / "codes.jsonl", tmp_path / "shards"):
        again = reconstruct(there, codes, tmp_path / f"from {codes.name}")
        for name in drawn.keys() - {"sheet.png"}:
            np.testing.assert_array_equal(drawn[name], again[name])
    assert (drawn["000.png"] != drawn["001.png"]).any()


def line(**changes) -> str:
    return json.dumps({"image": "a.png", "codes": [0] * QUERIES} | changes) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(codes=[0] * (QUERIES - 1)), rf"codes.jsonl:1 has {QUERIES - 1} codes; this model"),
        (
            line(codes=[CODES] * QUERIES),
            rf"no code {CODES}; they go from 0 to {CODES - 1}",
        ),
        (line(codes=[-1] * QUERIES), "there is no code -1"),
        (line() + line(model="another"), "codes.jsonl:2 has codes of another tokenizer"),
        ("[1, 2]\n", "codes.jsonl:1 is no line of codes"),
        ("", "holds no codes"),
    ],
)
def test_bad_codes(there, tmp_path, text, message):
    codes = tmp_path / "codes.jsonl"
    codes.write_text(text)
    with pytest.raises(UserError, match=message):
        reconstruct(there, codes, tmp_path / "out")


def test_models_that_do_not_fit(there, tmp_path):
    diffusion = shutil.copytree(there / "diffusion", tmp_path / "diffusion")
    config = diffusion / "unet" / "config.json"
    facts = json.loads(config.read_text())
    shutil.rmtree(diffusion / "text_encoder")
    config.write_text(json.dumps(facts | {"use_linear_projection": True}))
    with pytest.raises(UserError, match=r"Stable Diffusion 2\.x"):
        reconstruct(there, there / "pictures", tmp_path / "out", f"--diffusion={diffusion}")
    shutil.rmtree(diffusion / "unet")
    with pytest.raises(UserError, match="has no unet/"):
        reconstruct(there, there / "pictures", tmp_path / "out", f"--diffusion={diffusion}")


def test_the_packaged_diffusion_model_is_the_default(there, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "PACKAGED", there / "diffusion")
    options = ["--model", there / "model", "--images", there / "codes.jsonl", "--steps", 1]
    options = [*map(str, options), "--output", str(tmp_path / "out")]
    main(options)
    assert len(list((tmp_path / "out").glob("*.png"))) == PICTURES + 1

    # A language model that always writes the same codes.
    tokenizer = SeedTokenizer.from_pretrained(there / "model")
    codes_1Q = np.zeros((1, QUERIES), np.int32)
    writer = SimpleNamespace(tokenizer=tokenizer, draw=lambda *_, **__: codes_1Q)
    monkeypatch.setattr(generate.SeedOPT, "from_pretrained", lambda path, compute: writer)
    file = tmp_path / "drawn.png"
    draw = ["--model=seed_opt", "--draw=a cat", "--steps=1", f"--output={file}"]
    generate.main(draw)
    assert np.asarray(Image.open(file)).std() > 1

    wide = shutil.copytree(there / "diffusion", tmp_path / "wide")
    shutil.rmtree(wide / "text_encoder")
    diffusers_weights.save(random_model("unet", cross_attention_dim=20), wide / "unet")
    monkeypatch.setattr(teacher, "PACKAGED", wide)
    with pytest.raises(UserError, match=rf"12 wide, but {wide} draws from 20; name as --diffusion"):
        main(options)
    with pytest.raises(UserError, match=rf"^seed_opt makes .* 12 wide, but {wide} draws from 20"):
        generate.main(draw)


def test_no_steps_are_refused(there, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        reconstruct(there, there / "pictures", tmp_path / "out", "--steps=0")
    assert stopped.value.code == 2
    assert "--steps: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ([], drawing.PACKAGED_GUIDANCE_SCALE),
        (["--diffusion=sd"], 7.5),
        (["--guidance-scale=0"], 0),
        (["--diffusion=sd", "--guidance-scale=3"], 3),
    ],
)
def test_how_far_drawings_are_pushed(options, scale):
    parser = argparse.ArgumentParser()
    drawing.add_arguments(parser)
    assert drawing.settings(parser.parse_args(options))["guidance_scale"] == scale


def test_drawings_stay_in_their_folder():
    assert output_name(Path("out"), "cats/1.jpg") == Path("out/cats/1.png")
    assert output_name(Path("out"), "noto/1f34e") == Path("out/noto/1f34e.png")
    assert output_name(Path("out"), "/root/../../a.b.webp") == Path("out/root/a.b.png")
