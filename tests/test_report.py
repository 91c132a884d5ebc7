"""The quickstart's last step, on a run made up here."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocoevalcap.cider.cider import Cider

from seed_jax import SeedOPT, evaluate, inference, report
from seed_jax.cli import UserError
from seed_jax.data.sources import open_source, write_array_record
from tests.tiny import CODES, write_pictures
from tests.tiny_diffusion import save_stable_diffusion
from tests.tiny_seed_opt import config, save_seed_opt

PICTURES = 12

# One report serves all tests.
pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of both held-out splits, in one file."""
    folder = tmp_path_factory.mktemp("data")
    source = open_source(write_pictures(folder / "pictures", 2 * PICTURES))
    records = [source[i] | {"id": f"drawn/{i}"} for i in range(len(source))]
    for i, record in enumerate(records):
        record["split"] = "style" if i < PICTURES else "concept"
    write_array_record(folder / "pictures.array_record", records)
    return folder / "pictures.array_record"


@contextmanager
def perfect_seed_opt():
    """A SEED-OPT that captions codes by their picture's first caption, and draws it so."""
    embed, captions, codes = inference.embed, {}, {}

    def remember(model, source, **options):
        embedded = embed(model, source, **options)
        for index, codes_Q in zip(embedded.index_P, embedded.codes.codes_PQ, strict=True):
            caption = source[int(index)]["captions"][0]
            captions[codes_Q.tobytes()], codes[caption] = caption, codes_Q
        assert len(captions) == len(codes)  # no two pictures are the same to it
        return embedded

    def caption(self, pictures):
        return [captions[codes_Q.tobytes()] for codes_Q in pictures]

    def draw(self, texts, *, seed):
        return np.stack([codes[text] for text in texts])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "embed", remember)
        patch.setattr(SeedOPT, "caption", caption)
        patch.setattr(SeedOPT, "draw", draw)
        yield


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """The folder that a quickstart leaves, reported on."""
    run = tmp_path_factory.mktemp("run")
    seed_opt = save_seed_opt(run / "made", config("codebook"))
    seed_opt.rename(run / "seed_opt")
    (run / "made/tokenizer").rename(run / "tokenizer")
    for stage, panels in report.PANELS.items():
        (run / stage).mkdir()
        names = [name for group in panels.values() for name in group]
        rows = [{"step": step} | dict.fromkeys(names, 1 / step) for step in (1, 2, 3)]
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"run": run, "data": data, "max-tags": 1, "started": 0, "steps": 2, "batch-size": 8}
    options["diffusion"] = save_stable_diffusion(run / "diffusion")
    with perfect_seed_opt():
        report.main([f"--{name}={value}" for name, value in options.items()])
    return run


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_the_summary_has_the_figures_of_both_splits(run):
    summary = summary_of(run)
    assert set(summary) == {"retrieval", "codebook", "reconstruction", "seed_opt", "seconds"}
    assert set(summary["retrieval"]) == {"style", "concept"}
    for results in summary["retrieval"].values():
        assert results["chance_r10"] > 10 / (2 * PICTURES)
        for of in ("embeddings", "codes"):
            recalls = [results[of][way][k] for way in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
            assert results[of]["mean"] == pytest.approx(np.mean(recalls))
    assert 1 / CODES <= summary["codebook"]["usage"] <= 1
    assert 1 <= summary["codebook"]["perplexity"] <= CODES
    assert summary["seconds"] > 0
    alike = summary["reconstruction"]
    assert alike["pictures"] == PICTURES
    assert all(-1 <= alike[row] <= 1 for row in ("codes", "caption", "shuffled"))


def test_the_summary_has_what_the_language_model_reads_and_draws(run, data):
    written, read = summary_of(run)["seed_opt"], summary_of(run)["retrieval"]["style"]
    source = open_source(data, "style")
    true = {i: source[i]["captions"] for i in range(PICTURES)}
    cider, _ = Cider().compute_score(true, {i: own[:1] for i, own in true.items()})
    assert written["captions"]["cider"] == pytest.approx(cider)
    assert written["captions"]["shuffled_cider"] < cider / 2
    # Drawings are the pictures' own codes.
    drawings = written["drawings"]
    assert {name: drawings[name] for name in read["codes"]} == read["codes"]
    assert drawings["chance_r10"] == read["chance_r10"]


def test_the_folder_it_writes_evaluates_to_the_same_figures(run, tmp_path):
    output = tmp_path / "results.json"
    arguments = ["--suite", "retrieval", "--model", run / "tokenizer"]
    arguments += ["--data", run / "some_folder", "--output", output]
    evaluate.main([str(argument) for argument in arguments])
    found, told = json.loads(output.read_text()), summary_of(run)["retrieval"]["style"]
    # The folder has the pictures in another order, so that others are drawn for the intervals.
    for results in (found, told):
        assert results.pop("intervals")
    assert found == told


# Text and axes are grey, or nearly so. Without its curves, a plot has 0.0002 of colour; codes alone
# would be 0.24 of the cards, pictures alone 0.12; each of four pictures in a drawing is 0.17.
@pytest.mark.parametrize(
    ("name", "share"), [("curves.png", 0.005), ("pictures.png", 0.28), ("drawings.png", 0.6)]
)
def test_the_drawings_have_something_on_them(run, name, share):
    with Image.open(run / name) as drawing:
        pixels = np.asarray(drawing.convert("RGB")).astype(int)
    assert pixels.shape[0] > 400
    assert np.mean(np.ptp(pixels, axis=-1) > 40) > share


def test_a_stage_that_was_not_run_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"causal_qformer/metrics\.jsonl is missing"):
        report.main(["--run", str(tmp_path)])
