"""Official annotation files, made up here in their layouts."""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from seed_jax.cli import UserError
from seed_jax.data import checksums
from seed_jax.data.annotations import open_annotations
from seed_jax.data.questions import open_questions
from tests.pictures import picture


def save(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


def put(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def karpathy(count: int, dataset: str = "coco") -> dict:
    splits = ["train", "val", "test", "test"]
    return {
        "dataset": dataset,
        "images": [
            {
                "filename": f"{i}.jpg",
                "filepath": "val2014",
                "imgid": i,
                "cocoid": 100 + i,
                "split": splits[i % 4],
                "sentences": [{"raw": f" caption {i}.{j}"} for j in range(6)],
            }
            for i in range(count)
        ],
    }


def coco(count: int, **more: str) -> dict:
    images = [{"id": i, "file_name": f"{i}.jpg", **more} for i in range(count)]
    annotations = [{"id": 10 * i, "image_id": i, "caption": f"caption {i}"} for i in range(count)]
    return {"images": images, "annotations": annotations}


def test_karpathys_splits_keep_the_test_pictures(tmp_path):
    file = save(tmp_path / "dataset_coco.json", karpathy(8))
    images = put(tmp_path / "images", "val2014/2.jpg", "val2014/3.jpg", "6.jpg", "7.jpg")
    source = open_annotations(file, images)
    assert [source[i]["id"] for i in range(len(source))] == ["102", "103", "106", "107"]
    assert source[0]["captions"] == [f"caption 2.{j}" for j in range(6)]
    assert source[2]["image"] == picture(2)
    assert source.benchmark is None  # eight pictures are not COCO's
    five = open_annotations(file, images, captions=5)
    assert len(five[0]["captions"]) == 5
    with pytest.raises(UserError, match="no pictures in split 'dev'; its splits: test, train, val"):
        open_annotations(file, images, "dev")


def test_whole_files_are_what_the_paper_measured_on(tmp_path):
    content = karpathy(4000, "flickr30k")
    images = put(tmp_path / "images", "2.jpg")
    for entry in content["images"]:
        entry["filename"] = "2.jpg"
    # Every second picture is of the test split.
    for entry in content["images"][2000:]:
        entry["split"] = "train"
    source = open_annotations(save(tmp_path / "dataset.json", content), images)
    assert (len(source), source.benchmark) == (1000, "Flickr30K 1K")


def test_files_that_are_not_the_published_ones_are_told(tmp_path, monkeypatch, capsys):
    images = put(tmp_path / "images", "2.jpg", "3.jpg")
    file = save(tmp_path / "dataset_coco.json", karpathy(4))

    def told() -> str:
        assert len(open_annotations(file, images)) == 2
        return capsys.readouterr().out

    assert told() == ""  # nothing is known of it
    archive = tmp_path / "caption_datasets.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(file, "datasets/dataset_coco.json")
    assert f"{archive} has SHA-256" in told()
    published = {archive.name: hashlib.sha256(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr(checksums, "PUBLISHED", published)
    assert told() == ""
    file.write_text(file.read_text().replace("caption 2.0", "caption 2,0"))
    assert f"{file} is not what {archive} holds" in told()
    monkeypatch.setitem(checksums.PUBLISHED, file.name, "0" * 64)
    assert "the published one 000000000000…; figures may not compare" in told()


def test_coco_and_nocaps(tmp_path):
    images = put(tmp_path / "images", "0.jpg", "1.jpg")
    source = open_annotations(save(tmp_path / "captions.json", coco(2)), images)
    assert [source[i]["captions"] for i in range(2)] == [["caption 0"], ["caption 1"]]
    assert "domain" not in source[0]
    nocaps = save(tmp_path / "nocaps.json", coco(2, domain="near-domain"))
    assert open_annotations(nocaps, images)[1]["domain"] == "near-domain"


def test_flickr30k(tmp_path):
    file = tmp_path / "results_20130124.token"
    file.write_text("7.jpg#0\tA cat .\n7.jpg#1\tIt sits .\n8.jpg#0\tA dog .\n")
    source = open_annotations(file, put(tmp_path / "images", "7.jpg", "8.jpg"))
    assert source[0]["captions"] == ["A cat .", "It sits ."]
    assert (source[1]["id"], len(source)) == ("8", 2)
    file.write_text("7.jpg#0\tA cat .\n7.jpg#0\tIt sits .\n")
    with pytest.raises(UserError, match=r"token:2: caption 7\.jpg#0 is there twice"):
        open_annotations(file, tmp_path)
    file.write_text("7.jpg A cat .\n")
    with pytest.raises(UserError, match=r"token:1 is not NAME\.jpg#NUMBER"):
        open_annotations(file, tmp_path)


def twice(content: dict) -> None:
    content["images"][1]["id"] = 0


def caption_twice(content: dict) -> None:
    content["annotations"][1]["id"] = 0


def foreign(content: dict) -> None:
    content["annotations"][1]["image_id"] = 77


def bare(content: dict) -> None:
    content["annotations"][1]["caption"] = " "


def headless(content: dict) -> None:
    del content["annotations"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (twice, r"1 picture id \(0\) there more than once"),
        (caption_twice, r"1 caption id \(0\) there more than once"),
        (foreign, "caption 10 is of picture 77, which the file does not list"),
        (bare, r"1 picture \(1\) without a caption"),
        (headless, "an entry lacks 'annotations'"),
    ],
)
def test_what_is_wrong_with_captions(spoil: Callable, message: str, tmp_path):
    content = coco(3)
    spoil(content)
    file = save(tmp_path / "captions.json", content)
    with pytest.raises(UserError, match=message) as error:
        open_annotations(file, put(tmp_path, "0.jpg", "1.jpg", "2.jpg"))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_pictures_are_counted(tmp_path, capsys):
    file = save(tmp_path / "captions.json", coco(200))
    images = put(tmp_path / "images", *(f"{i}.jpg" for i in range(198)))
    assert len(open_annotations(file, images)) == 198
    told = f"2 pictures (198.jpg, 199.jpg) of 200 in {file} are not in {images}"
    assert told in capsys.readouterr().out
    (images / "5.jpg").unlink()
    with pytest.raises(UserError, match=r"3 pictures \(5\.jpg, .*--allow-missing"):
        open_annotations(file, images)
    assert len(open_annotations(file, images, allow_missing=True)) == 197
    with pytest.raises(UserError, match="name the folder that they lie in"):
        open_annotations(file, tmp_path, allow_missing=True)
    with pytest.raises(UserError, match="say where they lie by --images"):
        open_annotations(file, None)
    with pytest.raises(UserError, match="no such folder"):
        open_annotations(file, tmp_path / "nowhere")


def test_files_that_are_none(tmp_path):
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps(coco(2))[:-9])
    with pytest.raises(UserError, match="not JSON, or cut short"):
        open_annotations(cut, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_annotations(tmp_path / "none.json", tmp_path)
    for name in ("none.tsv", "none.token"):
        with pytest.raises(UserError, match="no such file"):
            open_annotations(tmp_path / name, tmp_path)
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="not UTF-8 text"):
            open_annotations(tmp_path / name, tmp_path)
    for content in ([], {}, {"images": []}, {"images": [3]}, {"images": [{}], "annotations": []}):
        with pytest.raises(UserError, match="no annotation file of a kind"):
            open_annotations(save(tmp_path / "other.json", content), tmp_path)


def vqa() -> tuple[dict, dict]:
    asked = [{"question_id": i, "image_id": 5, "question": f"What {i}?"} for i in range(2)]
    answered = [
        {
            "question_id": i,
            "image_id": 5,
            "answer_type": "number",
            "answers": [{"answer": f"{i} {j}"} for j in range(10)],
        }
        for i in range(2)
    ]
    subset = {"data_subtype": "val2014"}
    return {"questions": asked, **subset}, {"annotations": answered, **subset}


@pytest.mark.parametrize(
    "name", ["COCO_val2014_000000000005.jpg", "val2014/COCO_val2014_000000000005.jpg"]
)
def test_questions_and_answers_meet(name, tmp_path):
    questions, answers = vqa()
    answers["annotations"].reverse()
    found = open_questions(
        save(tmp_path / "questions.json", questions),
        save(tmp_path / "answers.json", answers),
        put(tmp_path / "images", name),
    )
    assert found.rule == "vqa"
    assert [question.answers[3] for question in found.questions] == ["0 3", "1 3"]
    assert found.questions[0].picture == tmp_path / "images" / name
    assert found.questions[0].kind == "number"


def other_split(questions: dict, answers: dict) -> None:
    answers["data_subtype"] = "train2014"


def unanswered(questions: dict, answers: dict) -> None:
    answers["annotations"].pop()


def unasked(questions: dict, answers: dict) -> None:
    questions["questions"].pop()


def asked_twice(questions: dict, answers: dict) -> None:
    questions["questions"][1]["question_id"] = 0


def other_picture(questions: dict, answers: dict) -> None:
    answers["annotations"][0]["image_id"] = 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_split, "has answers of train2014, but the questions in .* are of val2014"),
        (unanswered, r"has no answers to 1 question \(1\)"),
        (unasked, r"lacks 1 question \(1\) that"),
        (asked_twice, r"1 question id \(0\) there more than once"),
        (other_picture, "the answer to question 0 is of picture 6, not 5"),
    ],
)
def test_what_is_wrong_with_questions(spoil: Callable, message: str, tmp_path):
    questions, answers = vqa()
    spoil(questions, answers)
    files = save(tmp_path / "questions.json", questions), save(tmp_path / "answers.json", answers)
    with pytest.raises(UserError, match=message) as error:
        open_questions(*files, tmp_path)
    assert "\n" not in str(error.value)


def test_questions_without_answers_and_other_files(tmp_path):
    file = save(tmp_path / "questions.json", vqa()[0])
    with pytest.raises(UserError, match="name the file of answers by --answers"):
        open_questions(file, None, tmp_path)
    with pytest.raises(UserError, match=re.escape("captions.json: no annotation file of a kind")):
        open_questions(save(tmp_path / "captions.json", coco(2)), None, tmp_path)


def test_gqa(tmp_path):
    entry = {"imageId": "n7", "question": "Is it?", "answer": "yes"}
    content = {"201": entry | {"types": {"structural": "verify"}}, "202": entry}
    file = save(tmp_path / "testdev_balanced_questions.json", content)
    found = open_questions(file, None, put(tmp_path, "images/n7.jpg"))
    assert (found.rule, found.benchmark) == ("exact", None)
    assert [(q.id, q.answers, q.kind) for q in found.questions] == [
        ("201", ["yes"], "verify"),
        ("202", ["yes"], ""),
    ]
