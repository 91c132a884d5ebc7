"""Accuracy of answers, on the cases that the challenge's page works out or names."""

import pytest

from seed_jax.evaluation.vqa_accuracy import accuracy, normalize


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_ten_people_each_left_out_in_turn(agreeing, expected):
    people = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert accuracy("red", people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("two", "2"),
        ("none", "0"),
        ("a dog and the cat", "dog and cat"),
        ("dont", "don't"),
        ("shouldntve", "shouldn't've"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("what?", "what"),
        ("t-shirt", "t shirt"),
        ("black\nand\twhite", "black and white"),
    ],
)
def test_answers_are_written_alike(answer, expected):
    assert normalize(answer) == expected


def test_people_are_written_alike_too():
    assert accuracy("2", ["Two", "two.", "2", "two"] + ["3"] * 6) == pytest.approx(1.0)
