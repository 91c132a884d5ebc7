"""Pictures drawn from texts: the suite through the command line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from seed_jax import SeedOPT, evaluate
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.data.transforms import resize
from seed_jax.diffusion import StableDiffusion
from seed_jax.evaluation.reconstruction import another
from seed_jax.models import inception
from tests import reference_fid
from tests.tiny import SIDE, write_pictures
from tests.tiny_diffusion import save_stable_diffusion
from tests.tiny_seed_opt import config, save_seed_opt

PICTURES, BATCH = 20, 8

# What one test compiles serves the other.
pytestmark = pytest.mark.xdist_group("text_to_picture")


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """model/, diffusion/ and pictures/."""
    folder = tmp_path_factory.mktemp("text_to_picture")
    save_seed_opt(folder, config("codebook"))
    save_stable_diffusion(folder / "diffusion")
    write_pictures(folder / "pictures", PICTURES)
    return folder


def arguments(there: Path, output: Path, **changes) -> list[str]:
    named = {
        "model": there / "model",
        "suite": "drawing",
        "data": there / "pictures",
        "diffusion": there / "diffusion",
        "steps": 2,
        "scheduler": "ddim",
        "guidance-scale": 1,
        "batch-size": BATCH,
        "output": output,
        **changes,
    }
    return [f"--{name}={value}" for name, value in named.items()]


def figures(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["suites"]["drawing"]["figures"]


def test_figures_against_a_simple_computation(there, tmp_path, monkeypatch, capsys):
    # Smaller than it should be, to be quick.
    monkeypatch.setattr(inception, "SIDE", 75)
    network = reference_fid.save_inception(tmp_path / "inception.pth")
    network.INPUT_IMAGE_SIZE = 75
    # The random model draws nothing whole. The last text is one of those that count, so that its
    # copies in the padded batch would show.
    monkeypatch.setattr(
        SeedOPT, "draws_whole", lambda self, texts, seed: np.array(["boat" in t for t in texts])
    )
    output = tmp_path / "results"
    evaluate.main(arguments(there, output, inception=tmp_path / "inception.pth"))
    found, table = figures(output), capsys.readouterr().out

    model = SeedOPT.from_pretrained(there / "model")
    tokenizer = model.tokenizer
    diffusion = StableDiffusion.from_pretrained(str(there / "diffusion"))
    files = sorted((there / "pictures").glob("*.png"))
    originals = [Image.open(file) for file in files]
    lines = (there / "pictures" / "captions.jsonl").read_text().splitlines()
    texts = [json.loads(line)["captions"][0] for line in lines]
    drawn = []
    for start in range(0, PICTURES, BATCH):
        count = min(BATCH, PICTURES - start)
        rows = [*range(start, start + count)] + [start + count - 1] * (BATCH - count)
        asked = [texts[row] for row in rows]
        codes_BQ = model.draw(asked, seed=start)
        embeddings = jax.jit(tokenizer.embed)(codes_BQ)
        options = {"first": start, "steps": 2, "scheduler": "ddim", "guidance_scale": 1}
        drawn += list(np.asarray(diffusion.draw(embeddings, **options)))[:count]

    image_features = jax.jit(
        lambda images: tokenizer.image_features(tokenizer.causal_embeddings(images))
    )

    def seen(pictures):
        return np.asarray(image_features(np.stack([resize(p, SIDE) for p in pictures])))

    field = TextField(
        load_tokenizer(there / "model/tokenizer/text_tokenizer"),
        tokenizer.config.encoder.text_length,
    )
    text_PE = np.asarray(jax.jit(tokenizer.text_features)(*field.batch(texts)))
    drawings_PE = seen(Image.fromarray(picture) for picture in drawn)
    others = another(PICTURES)
    expected = {
        "drawn": np.sum(text_PE * drawings_PE, axis=1).mean(),
        "shuffled": np.sum(text_PE[others] * drawings_PE, axis=1).mean(),
        "picture": np.sum(text_PE * seen(originals), axis=1).mean(),
    }
    for row, value in expected.items():
        assert found[row] == pytest.approx(value, abs=2e-3)
        assert f"{found[row]:.3f}" in table
    # Two rows that were swapped would show.
    assert np.diff(sorted(expected.values())).min() > 4e-3, expected
    assert found["whole"] == pytest.approx(np.mean(["boat" in text for text in texts]))
    assert found["texts"] == PICTURES

    side = drawn[0].shape[0]
    true = np.stack([resize(original, side) for original in originals])
    distance = reference_fid.distance(
        *(reference_fid.features(network, pictures) for pictures in (true, np.stack(drawn)))
    )
    assert found["fid"] == {"drawn": pytest.approx(distance, rel=1e-2)}
    assert f"{found['fid']['drawn']:.1f}" in table


def test_a_killed_evaluation_goes_on(there, tmp_path):
    evaluate.main(arguments(there, tmp_path / "whole"))
    output = tmp_path / "killed"
    given = arguments(there, output)
    killed = subprocess.Popen([sys.executable, "-m", "seed_jax.evaluate", *given])
    pieces = output / "pieces" / "drawing"
    while not (there_then := sorted(pieces.glob("*.npz"))):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (output / "results.json").exists()
    written = {file: file.stat().st_mtime_ns for file in there_then}
    evaluate.main(given)
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert figures(output) == figures(tmp_path / "whole")
    sheets = [Image.open(tmp_path / name / "drawing.png") for name in ("whole", "killed")]
    np.testing.assert_array_equal(*sheets)
