"""Retrieval figures, first by hand-made cases, then through the command line."""

import argparse
import json
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from seed_jax import SeedTokenizer
from seed_jax.cli import UserError
from seed_jax.data.sources import write_array_record
from seed_jax.evaluate import add_arguments, main
from seed_jax.evaluation import intervals, retrieval, tables
from seed_jax.evaluation.suite import Evaluation
from tests import pictures
from tests.tiny import CODES, SIDE, save_tokenizer, text_tokenizer, write_pictures


def test_ranks_against_a_full_sort():
    rng = np.random.default_rng(0)
    image_PE = rng.normal(size=(40, 8)).astype(np.float32)
    picture_C = np.sort(np.concatenate([np.arange(40), rng.integers(0, 40, size=60)]))
    text_CE = image_PE[picture_C] + rng.normal(size=(100, 8)).astype(np.float32)

    ranks = retrieval.first_hit_ranks(image_PE, text_CE, np.arange(40), picture_C, block=7)

    for picture in range(40):
        order = np.argsort(-(text_CE @ image_PE[picture]), kind="stable")
        assert ranks[picture] == np.flatnonzero(picture_C[order] == picture)[0]


def test_blocks_are_all_that_is_held_of_the_similarities():
    rng = np.random.default_rng(0)
    image_PE = rng.normal(size=(1000, 16)).astype(np.float32)
    text_CE = rng.normal(size=(5000, 16)).astype(np.float32)
    whole = len(image_PE) * len(text_CE) * text_CE.itemsize
    tracemalloc.start()
    retrieval.first_hit_ranks(text_CE, image_PE, np.arange(5000) // 5, np.arange(1000), block=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < whole / 8


def test_any_caption_of_a_picture_counts_but_each_is_its_own_query():
    image_PE = np.eye(2, dtype=np.float32)
    # Picture 0 has a good caption and one that describes picture 1.
    text_CE = np.array([[1, 0], [0, 0.9], [0, 1]], np.float32)

    result, _ = retrieval.retrieval(image_PE, text_CE, np.array([0, 0, 1]))

    assert result["i2t"]["r1"] == 1.0
    assert result["t2i"]["r1"] == pytest.approx(2 / 3)
    assert result["mean"] == pytest.approx((1 + 1 + 1 + 2 / 3 + 1 + 1) / 6)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_features_that_are_all_alike_score_as_a_guess(value):
    features_PE = np.full((50, 4), value, np.float32)
    picture_C = np.arange(50)

    result, _ = retrieval.retrieval(features_PE, features_PE, picture_C)

    for way in ("i2t", "t2i"):
        assert result[way] == pytest.approx({"r1": 1 / 50, "r5": 5 / 50, "r10": 10 / 50})
    assert retrieval.chance_recall(picture_C) == pytest.approx(10 / 50)


def test_intervals_cover_the_truth_as_often_as_they_say():
    # 200 sets of 80 pictures, each found with probability 0.3.
    rng = np.random.default_rng(0)
    covered = 0
    for found_P in rng.random((200, 80)) < 0.3:
        figures, spans = intervals.of_means({"found": found_P.astype(float)})
        assert figures["found"] == pytest.approx(found_P.mean())
        low, high = spans["found"]
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 200 <= 0.98


def test_captions_are_drawn_with_their_pictures():
    # One picture has nine captions that are found, nine have one that is not.
    sums_P, counts_P = np.array([9.0] + [0] * 9), np.array([9.0] + [1] * 9)
    figures, spans = intervals.with_intervals(
        lambda weights_RP: {"recall": intervals.mean(weights_RP, sums_P, counts_P)}, 10
    )
    assert figures["recall"] == pytest.approx(0.5)
    # (9 / 10) ** 10 of the draws lack that picture, and find nothing at all.
    assert spans["recall"][0] == 0.0


def test_chance_counts_every_caption_of_a_picture():
    # Two pictures, captions 1 and 3 of them: one draw of four finds the first with 1/4, the
    # second with 3/4; the other way one of two pictures is drawn.
    assert retrieval.chance_recall(np.array([0, 1, 1, 1]), k=1) == pytest.approx(0.5)
    # Three captions each of 20 pictures: C(57, 10) / C(60, 10) of all draws miss.
    misses = 50 * 49 * 48 / (60 * 59 * 58)
    chance = retrieval.chance_recall(np.repeat(np.arange(20), 3))
    assert chance == pytest.approx((1 - misses + 0.5) / 2)


def test_figures_that_there_are_none_of():
    assert tables.figure(0.719, [0.706, None], percent=True) == "71.9"
    assert tables.figure(None, [None, None]) == "–"


def test_a_gallery_smaller_than_k_is_always_hit():
    assert retrieval.chance_recall(np.arange(4)) == 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model") / "tokenizer")


def evaluate(model: Path, data: Path, output: Path, *options: str) -> dict:
    arguments = ["--model", model, "--suite", "retrieval", "--data", data, "--output", output]
    main([*map(str, arguments), *options])
    return json.loads(output.read_text())


def simple_recall(query_ME, gallery_GE, relevant_MG) -> dict[str, float]:
    order_MG = np.argsort(-(query_ME @ gallery_GE.T), axis=1, kind="stable")
    hits_MG = np.take_along_axis(relevant_MG, order_MG, axis=1)
    return {f"r{k}": hits_MG[:, :k].any(axis=1).mean() for k in (1, 5, 10)}


def test_the_command_agrees_with_a_simple_computation(model, tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 30)

    results = evaluate(model, folder, tmp_path / "r.json", "--batch-size", "8", "--max-tags", "1")

    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    pixels_PSS3 = np.stack(
        [
            Image.open(folder / row["image"]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            for row in rows
        ]
    )
    captions = [f"{caption}, a" for row in rows for caption in row["captions"]]
    picture_C = np.repeat(np.arange(30), [len(row["captions"]) for row in rows])
    encoded = text_tokenizer()(captions, padding="max_length", max_length=8, return_tensors="np")

    tokenizer = SeedTokenizer.from_pretrained(model)

    @jax.jit
    def features(images, ids, mask):
        causal_PQD = tokenizer.causal_embeddings(images)
        codes_PQ = tokenizer.encode(images)
        of_codes = tokenizer.image_features(tokenizer.reconstruct_causal(codes_PQ))
        texts = tokenizer.text_features(ids, mask)
        return tokenizer.image_features(causal_PQD), of_codes, texts, codes_PQ

    mask_CT = encoded["attention_mask"].astype(bool)
    *images, texts, codes_PQ = map(np.asarray, features(pixels_PSS3, encoded["input_ids"], mask_CT))
    relevant_PC = np.arange(30)[:, None] == picture_C[None]
    for name, image_PE in zip(("embeddings", "codes"), images, strict=True):
        i2t = simple_recall(image_PE, texts, relevant_PC)
        t2i = simple_recall(texts, image_PE, relevant_PC.T)
        assert results[name]["i2t"] == pytest.approx(i2t)
        assert results[name]["t2i"] == pytest.approx(t2i)
        assert results[name]["mean"] == pytest.approx(np.mean([*i2t.values(), *t2i.values()]))
    assert results["embeddings"] != results["codes"]
    assert (results["pictures"], results["captions"]) == (30, 45)
    assert results["codebook"]["usage"] == pytest.approx(len(np.unique(codes_PQ)) / CODES)
    shares = np.unique(codes_PQ, return_counts=True)[1] / codes_PQ.size
    perplexity = np.exp(-np.sum(shares * np.log(shares)))
    assert results["codebook"]["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    table = capsys.readouterr().out
    assert f"{100 * results['codes']['mean']:.1f}" in table


def test_an_unreadable_picture_takes_its_captions_with_it(model, tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 100)
    (folder / "003.png").write_text("not a picture")
    results = evaluate(model, folder, tmp_path / "results.json")
    assert (results["pictures"], results["captions"]) == (99, 150 - 2)
    assert "003.png" in capsys.readouterr().out


def test_a_record_without_captions_is_named(model, tmp_path):
    records = [
        {
            "id": f"p{number}",
            "image": pictures.picture(number),
            "captions": ["a cat"] * (number != 3),
        }
        for number in range(5)
    ]
    write_array_record(tmp_path / "pictures.array_record", records)
    with pytest.raises(UserError, match=r"pictures\.array_record: p3 has no caption"):
        evaluate(model, tmp_path / "pictures.array_record", tmp_path / "r.json")


def test_work_that_other_devices_began_is_not_gone_on_with(model, tmp_path, monkeypatch):
    arguments = ["--model", model, "--suite", "retrieval", "--data", "embedded"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    evaluation = Evaluation(parser.parse_args([*map(str, arguments)]), tmp_path)

    def kept(value: int) -> int:
        return int(evaluation.pieces("retrieval")("first", lambda: {"x": np.array(value)})["x"])

    assert (kept(1), kept(2)) == (1, 1)
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    assert kept(3) == 3


def test_a_folder_without_captions_is_an_error_of_one_line(model, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"000\.png has no caption"):
        evaluate(model, folder, tmp_path / "results.json")


def test_what_does_not_fit_is_refused_before_any_work(model, tmp_path):
    data = str(write_pictures(tmp_path / "pictures", 2))

    def refused(message: str, suite: str, output: Path) -> None:
        arguments = ["--model", str(model), "--data", data, "--output", str(output)]
        with pytest.raises(UserError, match=message):
            main([*arguments, "--suite", suite])

    refused("seed_tokenizer model, which has no words; name .* of stage 3", "vqa", tmp_path / "r")
    refused("all suites take a folder", "all", tmp_path / "r.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"loss": 1}')
    refused(r"results\.json is no results of seed_jax", "retrieval", tmp_path / "other")


def test_an_unknown_suite_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "m", "--suite", "retreival", "--data", "d"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err
