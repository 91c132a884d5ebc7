"""Pictures to codes through the command line: right, resumable, and safe with bad input."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from seed_jax import SeedTokenizer
from seed_jax.cli import UserError
from seed_jax.tokenize import main
from tests.tiny import QUERIES, SIDE, save_tokenizer, write_pictures

PICTURES = 13


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model") / "tokenizer")


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "pictures", PICTURES)


def tokenize(model: Path, images: Path, output: Path, *options: str) -> list[dict]:
    main(["--model", str(model), "--images", str(images), "--output", str(output), *options])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def codes(model, tmp_path_factory) -> str:
    """What an uninterrupted run writes for `pictures`."""
    folder = tmp_path_factory.mktemp("codes")
    images, output = write_pictures(folder / "pictures", PICTURES), folder / "codes.jsonl"
    tokenize(model, images, output, "--batch-size", "5")
    return output.read_text()


def test_codes_are_those_of_each_picture_alone(model, pictures, codes):
    lines = [json.loads(line) for line in codes.splitlines()]

    assert [line["image"] for line in lines] == [f"{i:03}.png" for i in range(PICTURES)]
    encode = jax.jit(SeedTokenizer.from_pretrained(model).encode)
    for line in lines:
        picture = Image.open(pictures / line["image"])
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert line["codes"] == encode(pixels[None])[0].tolist()
    assert {len(line["codes"]) for line in lines} == {QUERIES}
    assert len({tuple(line["codes"]) for line in lines}) > 1


def test_an_interrupted_file_is_finished_as_if_it_had_never_been(model, pictures, codes, tmp_path):
    output = tmp_path / "codes.jsonl"
    output.write_text(codes[: len(codes) // 2])
    tokenize(model, pictures, output)
    assert output.read_text() == codes


def test_a_finished_file_is_left_alone(model, pictures, codes, tmp_path, capsys):
    output = tmp_path / "codes.jsonl"
    output.write_text(codes)
    tokenize(model, pictures, output)
    assert output.read_text() == codes
    assert "already" in capsys.readouterr().out


def test_another_models_codes_are_not_mixed_in(model, pictures, codes, tmp_path):
    output = tmp_path / "codes.jsonl"
    other = json.loads(codes.splitlines()[1]) | {"model": "0123456789abcdef"}
    text = codes.splitlines()[0] + "\n" + json.dumps(other) + "\ntorn"
    output.write_text(text)
    with pytest.raises(UserError, match=r"codes\.jsonl:2 was written with another model"):
        tokenize(model, pictures, output)
    assert output.read_text() == text


def test_a_file_of_something_else_is_not_touched(model, pictures, tmp_path):
    output = tmp_path / "notes.txt"
    output.write_text("my notes\nmore of them")
    with pytest.raises(UserError, match=r"notes\.txt:1 is not a line of codes"):
        tokenize(model, pictures, output)
    assert output.read_text() == "my notes\nmore of them"


def test_a_list_or_a_single_picture_gives_the_same_codes(model, pictures, codes, tmp_path):
    by_name = {line["image"]: line["codes"] for line in map(json.loads, codes.splitlines())}
    chosen = tmp_path / "list.txt"
    chosen.write_text("pictures/007.png\n\npictures/002.png\n")

    listed = tokenize(model, chosen, tmp_path / "listed.jsonl")
    single = tokenize(model, pictures / "007.png", tmp_path / "single.jsonl")

    assert [line["image"] for line in listed] == ["pictures/007.png", "pictures/002.png"]
    assert [line["codes"] for line in listed] == [by_name["007.png"], by_name["002.png"]]
    assert [line["codes"] for line in single] == [by_name["007.png"]]


def test_one_unreadable_picture_in_a_hundred_is_skipped_and_listed(model, tmp_path, capsys):
    pictures, output = write_pictures(tmp_path / "pictures", 100), tmp_path / "codes.jsonl"
    (pictures / "050.png").write_text("not a picture")

    lines = tokenize(model, pictures, output)

    assert len(lines) == 99
    assert "050.png" not in {line["image"] for line in lines}
    assert "050.png" in capsys.readouterr().out
    # Once more: all that is left is unreadable, but still one in a hundred.
    assert tokenize(model, pictures, output) == lines


def test_too_many_unreadable_pictures_stop_but_keep_what_is_written(model, pictures, tmp_path):
    output = tmp_path / "codes.jsonl"
    (pictures / "001.png").write_text("not a picture")

    with pytest.raises(UserError, match=r"1 of 13 pictures can't be read: 001\.png"):
        tokenize(model, pictures, output, "--batch-size", "8")
    assert len(output.read_text().splitlines()) == 7

    lines = tokenize(model, pictures, output, "--max-unreadable", "0.1")
    assert len(lines) == PICTURES - 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "no pictures"),
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_text("here"), "neither a folder nor"),
    ],
)
def test_nothing_to_tokenize_is_an_error_of_one_line(make, message, model, tmp_path):
    images = tmp_path / "images"
    make(images)
    with pytest.raises(UserError, match=message) as error:
        tokenize(model, images, tmp_path / "codes.jsonl")
    assert "\n" not in str(error.value)


def test_a_list_with_a_picture_that_is_not_there(model, tmp_path):
    chosen = tmp_path / "list.txt"
    chosen.write_text("nowhere.png\n")
    with pytest.raises(UserError, match=r"list\.txt:1: no such file .*nowhere\.png"):
        tokenize(model, chosen, tmp_path / "codes.jsonl")
    chosen.write_text("\n")
    with pytest.raises(UserError, match="lists no pictures"):
        tokenize(model, chosen, tmp_path / "codes.jsonl")


def test_a_model_directory_that_lacks_a_file(pictures, tmp_path):
    model = save_tokenizer(tmp_path / "model")
    missing = next(path for path in (model / "params").rglob("*") if path.is_file())
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing.name} is missing"):
        tokenize(model, pictures, tmp_path / "codes.jsonl")
