"""Caption metrics against pycocoevalcap called directly, and cases one can count."""

import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from seed_jax.evaluation import caption_metrics, captioning
from seed_jax.evaluation.caption_metrics import tokenize_simply

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="runs in Java")

REFERENCES = {
    "1": ["a red cat sits on the mat", "the cat on a mat"],
    "2": ["two dogs run in a green field", "dogs running through the grass", "two dogs"],
    "3": ["a house beside a tree", "a small house and a large tree"],
    "4": ["a boat"],
}
WRITTEN = {
    "1": "a red cat on the mat",
    "2": "two dogs running in the grass",
    "3": "a tree",
    "4": "",
}


@pytest.fixture
def no_java(monkeypatch):
    """Java takes its time."""
    monkeypatch.setenv("PATH", "")


def one_each(texts: dict[str, str]) -> dict[str, list[str]]:
    return {key: [text] for key, text in texts.items()}


@pytest.mark.usefixtures("no_java")
def test_metrics_are_pycocoevalcaps():
    figures = captioning.score(REFERENCES, WRITTEN, dict.fromkeys(WRITTEN))["all"]
    written = one_each(WRITTEN)
    theirs, _ = Bleu(4).compute_score(REFERENCES, written, verbose=0)
    assert [figures[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(theirs, rel=1e-6)
    assert figures["CIDEr"] == pytest.approx(Cider().compute_score(REFERENCES, written)[0])


def test_bleu_by_hand():
    scored = caption_metrics.score({"1": ["a b c d e f"]}, {"1": ["a b c d x"]}, java="none")
    found = caption_metrics.measure(scored, np.ones((1, 1)))
    # Four of five words, three of four pairs and so on fit, and it is one word of six short.
    short = np.exp(1 - 6 / 5)
    assert found["BLEU-1"][0] == pytest.approx(4 / 5 * short)
    assert found["BLEU-4"][0] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * short)


@pytest.mark.usefixtures("no_java")
def test_domains_have_figures_of_their_own():
    domains = {"1": "in-domain", "2": "out-domain", "3": "in-domain", "4": "out-domain"}
    found = captioning.score(REFERENCES, WRITTEN, domains)
    rouge = {name: found[name]["ROUGE-L"] for name in ("in-domain", "out-domain", "all")}
    assert rouge["all"] == pytest.approx((rouge["in-domain"] + rouge["out-domain"]) / 2)
    assert rouge["in-domain"] != rouge["out-domain"]
    part = {key: REFERENCES[key] for key in ("1", "3")}
    theirs, _ = Bleu(4).compute_score(
        part, one_each({key: WRITTEN[key] for key in part}), verbose=0
    )
    assert found["in-domain"]["BLEU-2"] == pytest.approx(theirs[1], rel=1e-6)


def test_without_java_there_is_the_rest_and_the_reason():
    scored = caption_metrics.score(REFERENCES, one_each(WRITTEN), java="no-such-java")
    assert set(scored.means) == {"ROUGE-L", "CIDEr"}
    assert set(scored.left_out) == {"METEOR", "SPICE"}
    assert all("not on PATH" in reason for reason in scored.left_out.values())
    assert scored.tokenizer == "simple"


@needs_java
def test_words_are_split_as_the_stanford_tokenizer_does():
    texts = {
        "1": ["A man's dog, running.", "They don't run; it’s 10:30!"],
        "2": ["a tear-off calendar (of 1,000 pages)", "", "left/right U.S. flag"],
    }
    ours, theirs = tokenize_simply(texts), caption_metrics.tokenize_ptb(texts)
    assert ours["1"] == theirs["1"]
    assert ours["2"][1] == theirs["2"][1] == ""


@needs_java
def test_meteor_knows_a_caption_that_is_a_reference():
    same = {key: [own[0]] for key, own in REFERENCES.items()}
    scored = caption_metrics.score(REFERENCES, same)
    assert scored.totals["METEOR"] == pytest.approx(1.0)
    assert scored.tokenizer == "PTB"
