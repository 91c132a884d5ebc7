"""The suites of the language model, through the command line."""

import json

import pytest
from tiny import write_pictures

from seed_jax import SeedOPT, evaluate
from seed_jax.cli import UserError
from seed_jax.data.questions import Question
from seed_jax.evaluation import vqa, writing
from seed_jax.evaluation.journal import Journal
from tests.tiny_seed_opt import save_seed_opt

PICTURES = 6

# What one test compiles serves the others.
pytestmark = pytest.mark.xdist_group("writing_suites")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writing")
    save_seed_opt(folder / "model")
    write_pictures(folder / "pictures", PICTURES)
    return folder


def run(there, suite, output, *options):
    arguments = {"model": there / "model", "suite": suite, "output": output, "batch-size": 4}
    evaluate.main([*(f"--{name}={value}" for name, value in arguments.items()), *options])
    return json.loads((output / "results.json").read_text())["suites"][suite]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_captions_are_the_models_and_survive_an_interruption(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # Java takes its time
    data = f"--data={there / 'pictures'}"
    calls = []
    caption = SeedOPT.caption

    def interrupted(self, pictures, **options):
        calls.append(len(pictures))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return caption(self, pictures, **options)

    monkeypatch.setattr(SeedOPT, "caption", interrupted)
    output = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        run(there, "captioning", output, data)
    assert len(lines(output / "captioning.jsonl")) == 1 + 4
    result = run(there, "captioning", output, data)
    assert len(calls) == 3  # the four captions of the first batch are not written again
    assert result["figures"]["pictures"] == PICTURES
    assert result["settings"]["model"]["kind"] == "seed_opt"
    assert set(result["versions"]) >= {"jax", "pycocoevalcap", "seed_jax"}
    assert "METEOR is left out" in (output / "table.md").read_text()

    _, *rows = lines(output / "captioning.jsonl")
    files = sorted((there / "pictures").glob("*.png"))
    expected = caption(SeedOPT.from_pretrained(there / "model"), files)
    assert [row["caption"] for row in rows] == expected

    run(there, "captioning", output, data)
    assert "measured already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another batch_size; name another --output"):
        run(there, "captioning", output, data, "--batch-size=3")
    assert len(calls) == 3


def write_vqa(folder):
    """Files in VQAv2's layout, two questions about each of three pictures."""
    questions, annotations = [], []
    for number in range(PICTURES):
        image = 1 + number // 2
        questions.append({"image_id": image, "question": "What?", "question_id": number})
        answers = [{"answer": "cat"}] * 4 + [{"answer": "dog"}] * 6
        annotations.append(
            {
                "question_id": number,
                "image_id": image,
                "answer_type": "other" if number % 2 else "yes/no",
                "answers": answers,
            }
        )
    subset = {"data_subtype": "val2014"}
    (folder / "questions.json").write_text(json.dumps({"questions": questions, **subset}))
    (folder / "answers.json").write_text(json.dumps({"annotations": annotations, **subset}))
    images = folder / "val2014"
    images.mkdir()
    return images


def test_answers_to_an_official_file(there, tmp_path, monkeypatch):
    images = write_vqa(tmp_path)
    for number, file in enumerate(sorted((there / "pictures").glob("*.png"))[:3], 1):
        (images / f"COCO_val2014_{number:012}.jpg").write_bytes(file.read_bytes())
    # The random model's answers are nothing to count by.
    monkeypatch.setattr(SeedOPT, "answer", lambda self, pictures, questions: ["A cat."] * 4)
    result = run(
        there,
        "vqa",
        tmp_path / "results",
        f"--data={tmp_path / 'questions.json'}",
        f"--answers={tmp_path / 'answers.json'}",
        f"--images={tmp_path}",
    )
    figures = result["figures"]
    # Four of ten people said so.
    assert figures["accuracy"] == pytest.approx({"all": 1.0, "other": 1.0, "yes/no": 1.0})
    assert (figures["questions"], figures["pictures"]) == (PICTURES, 3)


def test_rules_of_accuracy():
    asked = [
        Question("1", b"", "1", "What?", ["cat"] * 3 + ["dog"] * 7, "other"),
        Question("2", b"", "1", "Is it?", ["yes"] * 10, "yes/no"),
    ]
    found = vqa.score("vqa", asked, ["cat", ""])
    assert found["accuracy"] == pytest.approx({"other": 0.9, "yes/no": 0.0, "all": 0.45})
    exact = vqa.score("exact", [asked[1]._replace(answers=["Yes"])], ["yes."])
    assert exact["accuracy"]["all"] == 1.0
    several = vqa.score("any", [asked[0]._replace(answers=["a cat", "kitten"])], ["dog"])
    assert several["accuracy"]["all"] == 0.0


def test_unreadable_pictures_and_empty_answers_are_told(tmp_path, capsys):
    picture = write_pictures(tmp_path / "pictures", 1) / "000.png"
    tasks = [writing.Task(str(i), picture.read_bytes) for i in range(150)]
    tasks[7] = writing.Task("7", lambda: b"no picture")
    written = writing.write(
        tasks,
        Journal(None, ""),
        lambda pictures, texts: ["", *["a"] * (len(pictures) - 1)],
        batch_size=50,
        what="answer",
    )
    assert set(written) == {task.id for task in tasks} - {"7"}
    told = capsys.readouterr().out
    assert "3 of 149 answers are empty, and count as wrong" in told
    assert "1 pictures could not be read" in told
    tasks[8] = tasks[7]._replace(id="8")
    with pytest.raises(UserError, match="2 of 150 pictures can't be read"):
        writing.write(
            tasks, Journal(None, ""), lambda p, t: ["a"] * len(p), batch_size=50, what="a"
        )
