"""The suites of the language model, through the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from seed_jax import SeedOPT, evaluate, inference
from seed_jax.cli import UserError
from seed_jax.data.questions import Question
from seed_jax.data.sources import open_source
from seed_jax.evaluation import compression, vqa, writing
from seed_jax.evaluation.journal import Journal
from seed_jax.models.generation import NOTHING
from seed_jax.models.generator import Written
from tests.tiny import QUERIES, write_pictures
from tests.tiny_diffusion import save_stable_diffusion
from tests.tiny_seed_opt import config, save_seed_opt

PICTURES = 6
VISUAL = config("codebook")

# What one test compiles serves the others.
pytestmark = pytest.mark.xdist_group("writing_suites")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writing")
    save_seed_opt(folder, VISUAL)
    write_pictures(folder / "pictures", PICTURES)
    save_stable_diffusion(folder / "diffusion")
    return folder


def run(there, suite, output, *options):
    arguments = {"model": there / "model", "suite": suite, "output": output, "batch-size": 4}
    evaluate.main([*(f"--{name}={value}" for name, value in arguments.items()), *options])
    return json.loads((output / "results.json").read_text())["suites"].get(suite)


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


# Two questions about each of three pictures: its number, what is asked, what ten people said, what
# the model says, and how right that is: of the ten, who are left out in turn, a third for each
# other who said so.
VQA = [
    (1, "What is it?", {"cat": 4, "dog": 6}, "A cat.", 1),
    (1, "Is it red?", {"yes": 10}, "yes", 1),
    (2, "What stands there?", {"tree": 2, "bush": 8}, "tree", (2 * 1 / 3 + 8 * 2 / 3) / 10),
    (2, "Is it old?", {"no": 9, "yes": 1}, "yes", (1 * 0 + 9 * 1 / 3) / 10),
    (3, "Where is it?", {"at sea": 10}, "ashore", 0),
    (3, "Is it a boat?", {"yes": 7, "no": 3}, "no", (3 * 2 / 3 + 7 * 1) / 10),
]


def write_vqa(folder):
    """`VQA` in files of VQAv2's layout, answers in another order than questions."""
    questions, annotations = [], []
    for number, (image, question, said, _, _) in enumerate(VQA):
        questions.append({"image_id": image, "question": question, "question_id": number})
        annotations.append(
            {
                "question_id": number,
                "image_id": image,
                "answer_type": "yes/no" if number % 2 else "other",
                "answers": [{"answer": a} for a, count in said.items() for _ in range(count)],
            }
        )
    subset = {"data_subtype": "val2014"}
    (folder / "questions.json").write_text(json.dumps({"questions": questions, **subset}))
    given = {"annotations": annotations[::-1], **subset}
    (folder / "answers.json").write_text(json.dumps(given))
    images = folder / "val2014"
    images.mkdir()
    return images


def test_answers_to_an_official_file(there, tmp_path, monkeypatch):
    images = write_vqa(tmp_path)
    pixels = {}
    for number, file in enumerate(sorted((there / "pictures").glob("*.png"))[:3], 1):
        (images / f"COCO_val2014_{number:012}.jpg").write_bytes(file.read_bytes())
        pixels[Image.open(file).tobytes()] = number
    answers = {(image, question): answer for image, question, _, answer, _ in VQA}

    # The random model's answers are nothing to count by.
    def answer(self, pictures, questions):
        seen = [pixels[picture.tobytes()] for picture in pictures]
        return [answers[pair] for pair in zip(seen, questions, strict=True)]

    monkeypatch.setattr(SeedOPT, "answer", answer)
    result = run(
        there,
        "vqa",
        tmp_path / "results",
        f"--data={tmp_path / 'questions.json'}",
        f"--answers={tmp_path / 'answers.json'}",
        f"--images={tmp_path}",
    )
    figures = result["figures"]
    right = np.array([row[-1] for row in VQA])
    expected = {"all": right.mean(), "other": right[::2].mean(), "yes/no": right[1::2].mean()}
    assert figures["accuracy"] == pytest.approx(expected)
    assert (figures["questions"], figures["pictures"]) == (PICTURES, 3)


def check_curve(figures, recall):
    """From a guess, without codes, to the tokenizer as it is, with all of them."""
    assert set(figures["causal"]["first"]) == {"0", "1", "2", "4", str(QUERIES)}
    for end in ("first", "last"):
        whole, nothing = (figures["causal"][end][k] for k in (str(QUERIES), "0"))
        assert whole["retrieval"] == pytest.approx(recall["codes"]["mean"])
        assert whole["reconstruction"] == pytest.approx(1, abs=1e-5)
        # All pictures look alike: one in six is found first, five in six among five, all among ten.
        by_guess = np.mean([1 / PICTURES, 5 / PICTURES, 1])
        assert nothing["retrieval"] == pytest.approx(by_guess, abs=0.1)
        assert nothing["reconstruction"] < 0.99
    for figure, (low, high) in zip(
        figures["entropy_by_position"], figures["intervals"]["entropy_by_position"], strict=True
    ):
        assert low <= figure <= high


def test_all_suites_at_once(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    output = tmp_path / "results"
    options = ["--limit=5", "--steps=1", "--guidance-scale=1", "--batch-size=8"]
    run(
        there,
        "all",
        output,
        f"--data={there / 'pictures'}",
        f"--diffusion={there / 'diffusion'}",
        *options,
    )
    assert "vqa is left out: " in capsys.readouterr().out
    suites = json.loads((output / "results.json").read_text())["suites"]
    assert set(suites) == set(evaluate.SUITES) - {"vqa"}
    figures = {name: suite["figures"] for name, suite in suites.items()}
    assert figures["retrieval"]["pictures"] == PICTURES
    assert figures["captioning"]["pictures"] == figures["reconstruction"]["pictures"] == 5
    # Of pictures and their first captions, spread over all six.
    embedded = inference.embed(
        there / "model" / "tokenizer", open_source(there / "pictures"), batch_size=8
    )
    some = np.linspace(0, PICTURES - 1, 5).astype(int)
    first = np.searchsorted(embedded.picture_of_caption_C, some)
    alike = np.sum(embedded.image_PE[some] * embedded.text_CE[first], axis=1).mean()
    assert figures["drawing"]["picture"] == pytest.approx(alike, abs=1e-4)
    check_curve(figures["codebook"], figures["retrieval"])
    # Eight codes of four bits.
    assert figures["compression"]["code_bytes"] == 4
    table = (output / "table.md").read_text()
    for name in suites:
        assert f"| {name} " in table
        assert f"## {name}: " in table
    sheets = ("captioning", "codes_first", "codes_shared", "drawing", "reconstruction", "retrieval")
    for sheet in sheets:
        assert (output / f"{sheet}.png").stat().st_size > 1000


def test_a_whole_drawing_is_all_codes_between_its_marks(there):
    model = SeedOPT.from_pretrained(there / "model")
    code, length = VISUAL.opt.vocab_size, VISUAL.picture_codes
    whole = [VISUAL.begin, *[code] * length, VISUAL.end]
    rows = {
        "whole": whole,
        "a word in it": [*whole[:3], 7, *whole[4:]],
        "no beginning": [code, *whole[1:]],
        "no end": [*whole[:-1], code],
        "too short": [*whole[:-2], VISUAL.end, NOTHING],
    }
    model._generator = lambda ids, mask, decoding, seed: Written(np.array([*rows.values()]), None)
    assert model.draws_whole(list(rows)).tolist() == [True, False, False, False, False]


def test_jpeg_is_the_smallest_that_is_as_similar():
    bytes_PG = np.tile([100.0, 200, 400, 300], (20, 1))
    similarity_PG = np.tile([0.3, 0.6, 0.9, 0.7], (20, 1))
    found = compression.compare(bytes_PG, similarity_PG, np.full(20, 0.65))
    assert (found["jpeg_bytes"], found["best"]) == (300, 3)
    assert found["intervals"]["jpeg_bytes"] == [300, 300]
    assert compression.compare(bytes_PG, similarity_PG, np.full(20, 0.95))["best"] is None


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
    tasks = [writing.Task(str(i), lambda: writing.read(picture)) for i in range(150)]
    tasks[7] = writing.Task("7", lambda: writing.read(b"no picture"))
    written = writing.write(
        tasks,
        Journal(),
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
        writing.write(tasks, Journal(), lambda p, t: ["a"] * len(p), batch_size=50, what="a")
