"""How alike pictures and their drawings are: the suite through the command line, and its parts."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPConfig

from seed_jax import SeedTokenizer, evaluate, inference
from seed_jax.cli import UserError
from seed_jax.data.sources import open_source
from seed_jax.data.transforms import CLIP_MEAN, CLIP_STD, resize
from seed_jax.diffusion import StableDiffusion
from seed_jax.evaluation import perceptual, reconstruction
from seed_jax.evaluation.encoders import clip_encoder
from seed_jax.evaluation.reconstruction import ROWS
from seed_jax.models import inception
from seed_jax.pieces import Pieces
from tests import reference_fid
from tests.tiny import SIDE, text_tokenizer, write_pictures
from tests.tiny_diffusion import save_models_and_pictures

PICTURES = 10
CLIP_SIDE = 8

# What is drawn for one test serves another.
pytestmark = pytest.mark.xdist_group("reconstruction")


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """model/, diffusion/ and pictures/."""
    return save_models_and_pictures(tmp_path_factory.mktemp("reconstruction"), PICTURES)


def files_of(there: Path) -> list[Path]:
    return sorted((there / "pictures").glob("*.png"))


@pytest.fixture(scope="module")
def drawn(there) -> dict[str, np.ndarray]:
    """All pictures drawn from each row of the table, as one batch."""
    model = SeedTokenizer.from_pretrained(there / "model")
    diffusion = StableDiffusion.from_pretrained(str(there / "diffusion"))
    lines = (there / "pictures" / "captions.jsonl").read_text().splitlines()
    originals = np.stack([resize(Image.open(file), SIDE) for file in files_of(there)])
    codes_PQ = np.asarray(jax.jit(model.encode)(originals))
    embed = jax.jit(model.embed)
    embeddings = {
        "codes": embed(codes_PQ),
        "caption": diffusion.text_states([json.loads(line)["captions"][0] for line in lines]),
        "shuffled": embed(codes_PQ[reconstruction.another(PICTURES)]),
    }
    settings = {"steps": 2, "scheduler": "ddim", "guidance_scale": 1}
    return {row: np.asarray(diffusion.draw(embeddings[row], **settings)) for row in ROWS}


def measure(there: Path, *options: str) -> dict:
    run(there, *options)
    return json.loads((there / "results.json").read_text())


def run(there: Path, *options: str) -> None:
    arguments = {
        "model": there / "model",
        "suite": "reconstruction",
        "data": there / "pictures",
        "diffusion": there / "diffusion",
        "steps": 2,
        "scheduler": "ddim",
        "guidance-scale": 1,
        "batch-size": 8,
        "output": there / "results.json",
    }
    evaluate.main([*(f"--{name}={value}" for name, value in arguments.items()), *options])


def test_every_thing_gets_another():
    for count in (2, 3, 10, 251):
        places = reconstruction.another(count)
        assert sorted(places) == list(range(count))
        assert (places != np.arange(count)).all()
        np.testing.assert_array_equal(places, reconstruction.another(count))


def mean_difference(a, b):
    return np.abs(a.astype(float) - b).mean((1, 2, 3))


def test_figures_against_a_simple_computation(there, drawn, tmp_path, monkeypatch, capsys):
    # Smaller than it should be, to be quick.
    monkeypatch.setattr(inception, "SIDE", 75)
    network = reference_fid.save_inception(tmp_path / "inception.pth")
    network.INPUT_IMAGE_SIZE = 75
    # What it really measures, `test_lpips` has.
    monkeypatch.setattr(perceptual, "open_lpips", lambda trunk, heads: mean_difference)
    # Two batches, the second one not full.
    options = [f"--inception={tmp_path / 'inception.pth'}", "--lpips", "trunk", "heads"]
    results = measure(there, *options)
    table = capsys.readouterr().out

    model = SeedTokenizer.from_pretrained(there / "model")
    image_features = jax.jit(lambda images: model.image_features(model.causal_embeddings(images)))

    def features(pictures):
        return np.asarray(image_features(np.stack([resize(p, SIDE) for p in pictures])))

    originals_PE = features(map(Image.open, files_of(there)))
    alike = {}
    for row in ROWS:
        drawn_PE = features(map(Image.fromarray, drawn[row]))
        alike[row] = np.sum(originals_PE * drawn_PE, axis=1).mean()
        assert results[row] == pytest.approx(alike[row], abs=2e-3)
        assert f"{results[row]:.3f}" in table
    # Two rows that were swapped would show.
    assert np.diff(sorted(alike.values())).min() > 4e-3, alike
    assert results["encoder"] == f"stage-1 encoder of {there / 'model'}"
    assert "CLIP" not in table
    assert results["pictures"] == PICTURES

    side = drawn["codes"].shape[1]
    true = np.stack([resize(Image.open(file), side) for file in files_of(there)])
    for row, found in results["fid"].items():
        expected = reference_fid.distance(
            *(reference_fid.features(network, pictures) for pictures in (true, drawn[row]))
        )
        assert found == pytest.approx(expected, rel=1e-2)
        assert f"{found:.1f}" in table
    assert set(results["fid"]) == {"codes", "caption"}
    for row in ROWS:
        expected = mean_difference(true, drawn[row]).mean()
        assert results["lpips"][row] == pytest.approx(expected, rel=1e-2)
        assert f"{results['lpips'][row]:.3f}" in table
    assert len(set(results["lpips"].values())) == 3
    assert f"FID of {PICTURES} pictures. Of fewer than 2049" in table


def test_an_interrupted_evaluation_goes_on(there, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "BLOCK", 1)
    options = ["--suite=all", f"--output={tmp_path / 'whole'}"]
    run(there, *options)
    made, make, stops = [], Pieces.__call__, {1, 6, 30}

    def interrupted(self, name, making):
        def counted():
            if len(made) in stops:
                stops.remove(len(made))
                raise KeyboardInterrupt
            made.append(name)
            return making()

        return make(self, name, counted)

    monkeypatch.setattr(Pieces, "__call__", interrupted)
    options[1] = f"--output={tmp_path / 'interrupted'}"
    while stops:
        with pytest.raises(KeyboardInterrupt):
            run(there, *options)
    run(there, *options)
    # None was made twice: pictures, captions; codes, drawings; the curve; JPEGs.
    assert len(made) == 2 + 2 + 2 + 2 + 10 + 28
    whole, found = (
        json.loads((tmp_path / name / "results.json").read_text())["suites"]
        for name in ("whole", "interrupted")
    )
    assert set(found) == {"retrieval", "reconstruction", "codebook", "compression"}
    for name in found:
        assert found[name]["figures"] == whole[name]["figures"]
    for sheet in (tmp_path / "whole").glob("*.png"):
        again = tmp_path / "interrupted" / sheet.name
        np.testing.assert_array_equal(Image.open(again), Image.open(sheet))


def test_pictures_that_cannot_be_read_are_told_by_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "BLOCK", 1)
    folder = write_pictures(tmp_path / "pictures", 100)
    (folder / "003.png").write_text("not a picture")
    batches = []

    def brightness(pictures):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(pictures)
        return {"mean": pictures.mean((1, 2, 3))}

    def embed():
        return inference.over_pictures(
            brightness,
            open_source(folder),
            batch_size=40,
            image_size=SIDE,
            kept=Pieces(tmp_path / "pieces", "these settings"),
        )

    with pytest.raises(KeyboardInterrupt):
        embed()
    first, second = batches
    batches.clear()
    found = embed()
    assert len(batches) == 1
    assert "003.png" in capsys.readouterr().out
    assert found["index"].tolist() == [0, 1, 2, *range(4, 100)]
    expected = np.concatenate([np.delete(first, 3, axis=0), second, batches[0][:20]])
    np.testing.assert_array_equal(found["mean"], expected.mean((1, 2, 3)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP, as transformers' PyTorch saves it."""
    import torch
    from transformers import CLIPModel

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 9},
        vision_config={**sizes, "image_size": CLIP_SIDE, "patch_size": 4},
        projection_dim=6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder, model


def test_a_clip_sees_what_pytorchs_sees(there, drawn, clip):
    import torch

    folder, theirs = clip
    encoder = clip_encoder(str(folder))
    assert (encoder.name, encoder.size) == (str(folder), CLIP_SIDE)

    def seen(images):
        pixels = (images / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        with torch.no_grad():
            features = theirs.get_image_features(
                torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()
            ).numpy()
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    shape = (8, CLIP_SIDE, CLIP_SIDE, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_allclose(encoder.features(images), seen(images), rtol=0, atol=1e-5)

    text_tokenizer().save_pretrained(folder)
    texts = ["a red cat", "one more dog"]
    tokens = text_tokenizer()(texts, padding="max_length", max_length=9, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.get_text_features(tokens["input_ids"], tokens["attention_mask"]).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.texts(texts), expected, rtol=0, atol=1e-5)

    results = measure(there, f"--image-encoder={folder}")
    assert results["encoder"] == str(folder)

    def small(pictures):
        return seen(np.stack([resize(picture, CLIP_SIDE) for picture in pictures]))

    originals_PE = small(map(Image.open, files_of(there)))
    for row in ROWS:
        drawn_PE = small(map(Image.fromarray, drawn[row]))
        alike = np.sum(originals_PE * drawn_PE, axis=1).mean()
        assert results[row] == pytest.approx(alike, abs=2e-3)


def test_what_is_refused(there, clip, tmp_path):
    def refused(message: str, *options: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            measure(there, *options)
        assert "\n" not in str(error.value)

    nowhere = tmp_path / "nowhere"
    refused("no CLIP in transformers' layout there", f"--image-encoder={nowhere}")
    refused("no such directory", f"--diffusion={nowhere}")
    refused("a model directory is what", f"--model={nowhere}")
    one = write_pictures(tmp_path / "one", 1)
    refused("another is needed to draw from its codes", f"--data={one}")

    folder = shutil.copytree(clip[0], tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    refused(r"missing: vision_model\.encoder\.layers\.2", f"--image-encoder={folder}")

    mute = shutil.copytree(there / "diffusion", tmp_path / "mute")
    shutil.rmtree(mute / "text_encoder")
    refused("has no text_encoder/ and tokenizer/", f"--diffusion={mute}")
