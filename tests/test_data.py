"""Sources and captions, on small files made here; test_pipeline.py has the batches."""

import json
import pickle
from random import Random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from seed_jax.cli import UserError
from seed_jax.data import text
from seed_jax.data.sources import open_source, write_array_record
from tests.pictures import picture, records, word_tokenizer, write_records


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


# Folders


def test_folder_with_captions_file(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "sub/deep/c.webp"):
        (tmp_path / name).write_bytes(picture(0))
    # Neither a picture nor the system's own files are records.
    for name in ("notes.md", "._b.JPG"):
        (tmp_path / name).write_bytes(b"?")
    lines = [
        {"image": "sub/deep/c.webp", "captions": ["one", " two "], "tags": ["x"], "split": "test"},
        {"file_name": "b.JPG", "caption": "bee \u2028 line"},
        {"image": "./sub/deep/c.webp", "caption": "three", "tags": ["x", "y"]},
        {"image": "a.png", "caption": "ay"},
    ]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")

    source = open_source(tmp_path)

    assert [source.name(i) for i in range(len(source))] == ["a.png", "b.JPG", "sub/deep/c.webp"]
    assert source[0] == {"id": "a.png", "image": picture(0), "captions": ["ay"], "tags": []}
    assert source[1]["captions"] == ["bee \u2028 line"]
    assert source[2] == {
        "id": "sub/deep/c.webp",
        "image": picture(0),
        "captions": ["one", "two", "three"],
        "tags": ["x", "y"],
        "split": "test",
    }
    assert [record["id"] for record in open_source(tmp_path, "test")] == ["sub/deep/c.webp"]


def test_folder_with_text_beside_each_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("first line\n\n  second line  \n")
    assert open_source(str(tmp_path))[0]["captions"] == ["first line", "second line"]


def test_folder_without_captions_where_none_are_needed(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(UserError, match=r"a\.png has no caption: there is no captions\.jsonl and"):
        open_source(tmp_path)
    assert open_source(tmp_path, captions=False)[0]["captions"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "caption"', r"captions\.jsonl:3: not JSON: .* at column 29"),
        ('["a.png", "a cat"]', r"captions\.jsonl:3: not an object such as"),
        ('{"picture": "a.png"}', r'captions\.jsonl:3: no "image" or "file_name"'),
        ('{"image": "gone.png", "caption": "x"}', r"captions\.jsonl:3: gone\.png is not in "),
        ('{"image": "captions.jsonl"}', r"captions\.jsonl:3: captions\.jsonl is not a picture"),
        ('{"image": "a.png", "caption": 3}', r'captions\.jsonl:3: "caption" must be a text'),
        ('{"image": "a.png", "captions": [1]}', r'captions\.jsonl:3: "caption" must be a text'),
        ('{"image": "a.png", "caption": " "}', r"a\.png has no caption: captions\.jsonl has no"),
        ("", r"a\.png has no caption \(nor have 1 others\): captions\.jsonl has no line for it"),
    ],
)
def test_captions_file_that_cannot_be_used(tmp_path, line, message):
    names = ["a.png", "b.png", "c.png"] if line == "" else ["a.png", "b.png"]
    for name in names:
        (tmp_path / name).write_bytes(picture(0))
    good = json.dumps({"image": "b.png", "caption": "bee"})
    (tmp_path / "captions.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)


def test_captions_that_are_not_utf8(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text"):
        open_source(tmp_path)


def test_paths_with_nothing_to_read(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.array_record").write_bytes(b"hello")
    write_array_record(tmp_path / "empty.array_record", [])
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "gone", "gone': no such file or folder"),
        ("", "'': no such file or folder"),
        (tmp_path / "empty", "empty: no pictures"),
        (tmp_path / "notes.txt", "neither a folder nor"),
        (tmp_path / "cut.array_record", "cut.array_record: cut short, or not an ArrayRecord file"),
        (tmp_path / "empty.array_record", "empty.array_record: no records"),
        (tmp_path, "cut.array_record: cut short"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(path)


# ArrayRecord


def test_array_record_shards_in_order(tmp_path):
    write_array_record(tmp_path / "part-1.array_record", records(7)[4:])
    assert write_array_record(tmp_path / "part-0.array_record", records(7)[:4]) == 4

    source = open_source(tmp_path)
    assert [source[i] for i in range(len(source))] == records(7)
    one = open_source(tmp_path / "part-1.array_record")
    assert [one.name(i) for i in range(3)] == ["picture-4", "picture-5", "picture-6"]


def test_array_record_split(tmp_path):
    path = write_records(tmp_path / "x.array_record", 8)
    source = open_source(path, "test")
    assert [source[i]["id"] for i in range(len(source))] == ["picture-3", "picture-7"]
    assert source.name(1) == "picture-7"
    assert len(open_source(path, "")) == 8
    with pytest.raises(UserError, match="no pictures in split 'style'; its splits: test, train"):
        open_source(path, "style")


def test_an_open_source_can_be_sent_to_a_worker(tmp_path):
    source = open_source(write_records(tmp_path / "x.array_record", 8), "test")
    assert source[0]["id"] == "picture-3"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


# Captions


def test_text_field_gives_what_the_tokenizer_gives(tokenizer):
    captions = ["a red cat", "the dog on the mat on the mat", "", "unknown words"]
    field = pickle.loads(pickle.dumps(text.TextField(tokenizer, 6)))
    expected = tokenizer(captions, padding="max_length", truncation=True, max_length=6)

    ids, mask = field.batch(captions)

    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))
    np.testing.assert_array_equal(field(captions[1])[0], ids[1])
    np.testing.assert_array_equal(field(captions[1])[1], mask[1])


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(tokenizer):
    left = pickle.loads(pickle.dumps(tokenizer))
    left.padding_side = left.truncation_side = "left"
    left(["a"], padding="max_length", truncation=True, max_length=3)
    ids, mask = text.TextField(left, 8)("a red cat")
    assert mask.tolist() == [True] * 5 + [False] * 3
    assert ids[5:].tolist() == [0, 0, 0]


def test_tokenizer_from_a_folder_and_none_where_there_is_none(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "pipeline" / "tokenizer")
    loaded = text.load_tokenizer(tmp_path / "pipeline", subfolder="tokenizer")
    assert loaded("a red cat")["input_ids"] == tokenizer("a red cat")["input_ids"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no tokenizer there; give a folder") as error:
        text.load_tokenizer(tmp_path / "empty")
    assert "\n" not in str(error.value)


def test_caption_for_evaluation_is_the_first_with_the_first_tags():
    record = records(1)[0]
    assert text.choose_caption(record, None, 0) == "a red cat"
    assert text.choose_caption(record, None, 2) == "a red cat, mat, blue"
    assert text.choose_caption(record, None, 9) == "a red cat, mat, blue, on"


def test_caption_for_training_draws_captions_and_tags_in_any_order():
    record = records(1)[0]
    drawn = {text.choose_caption(record, Random(seed), 2) for seed in range(500)}
    tags = ["", ", mat", ", blue", ", on", ", mat, blue", ", blue, mat", ", mat, on", ", on, mat",
            ", blue, on", ", on, blue"]  # fmt: skip
    assert drawn == {caption + tail for caption in record["captions"] for tail in tags}
    with pytest.raises(UserError, match="picture-0 has no caption"):
        text.choose_caption({**record, "captions": []}, Random(0), 2)
