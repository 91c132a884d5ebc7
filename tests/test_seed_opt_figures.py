"""Figures of captions, against counts made by hand."""

import pytest

from seed_jax.evaluation.seed_opt import caption_results, token_f1


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("a red apple", "a red apple", 1.0),
        ("A red, red apple!", "red apple", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
        ("apple", "a red apple", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("pear", "a red apple", 0.0),
        ("", "a red apple", 0.0),
    ],
)
def test_token_f1(text, reference, f1):
    assert token_f1(text, reference) == pytest.approx(f1)


def test_captions_are_compared_with_their_own_and_with_all_others():
    captions = ["red apple", "blue car", "red car"]
    true = [["red apple"], ["a car", "blue car"], ["green car"]]
    # Own: 1, 1, and half the words of "green car". Others: apple finds nothing; "blue car" shares
    # its car with "green car"; "red car" its red with "red apple", its car with "a car".
    results = caption_results(captions, true)
    assert results["token_f1"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert results["shuffled_token_f1"] == pytest.approx((0 + 0 + 0 + 0.5 + 0.5 + 0.5) / 6)
