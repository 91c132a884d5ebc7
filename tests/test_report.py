"""The quickstart's last step, on a run made up here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seed_jax import evaluate, report
from seed_jax.cli import UserError
from seed_jax.data.sources import open_source, write_array_record
from tests.tiny import CODES, write_pictures
from tests.tiny_diffusion import save_stable_diffusion
from tests.tiny_seed_opt import config, save_seed_opt

PICTURES = 12


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


def test_the_summary_has_what_the_language_model_reads_and_draws(run):
    written = summary_of(run)["seed_opt"]
    assert 0 <= written["captions"]["shuffled_cider"] <= 10
    assert 0 <= written["captions"]["cider"] <= 10
    assert written["drawings"]["chance_r10"] == summary_of(run)["retrieval"]["style"]["chance_r10"]
    assert 0 <= written["drawings"]["mean"] <= 1


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


@pytest.mark.parametrize("name", ["curves.png", "pictures.png", "drawings.png"])
def test_the_drawings_have_something_on_them(run, name):
    with Image.open(run / name) as drawing:
        pixels = np.asarray(drawing.convert("L"))
    assert pixels.shape[0] > 400
    assert pixels.std() > 10


def test_a_stage_that_was_not_run_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"causal_qformer/metrics\.jsonl is missing"):
        report.main(["--run", str(tmp_path)])
