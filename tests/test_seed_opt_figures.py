"""Figures of captions, against their limits and against pycocoevalcap called as its readers do."""

import pytest
from pycocoevalcap.cider.cider import Cider

from seed_jax.evaluation.seed_opt import caption_results

TRUE = [["red apple pie"], ["a small car", "blue car"], ["green old boat"], ["one white house"]]


def test_true_captions_score_high_and_shuffled_ones_nothing():
    results = caption_results([own[0] for own in TRUE], TRUE)
    assert results["cider"] > 5
    assert results["shuffled_cider"] == pytest.approx(0, abs=0.1)


def test_cider_is_that_of_pycocoevalcap():
    captions = ["Red pie!", "blue car", "a boat", "white house"]
    plain = ["red pie", "blue car", "a boat", "white house"]
    written = {i: [caption] for i, caption in enumerate(plain)}
    score, _ = Cider().compute_score(dict(enumerate(TRUE)), written)
    assert caption_results(captions, TRUE)["cider"] == pytest.approx(score)
