"""Questions about pictures and their answers, from the official files of VQAv2, OK-VQA and GQA.

VQAv2 and OK-VQA have a file of questions and one of answers, ten to a question, of pictures of COCO
by number. GQA has both in one, an answer to a question.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from seed_jax.cli import UserError
from seed_jax.data.annotations import (
    locate,
    not_known,
    read_json,
    refuse_twice,
    tell,
)
from seed_jax.data.sources import Record, Source

# Of the pictures of the package, all of which show one thing.
WHAT = "What is this?"
BENCHMARKS = {("vqa", 214354): "VQAv2 val", ("gqa", 12578): "GQA", ("vqa", 5046): "OK-VQA"}


class Question(NamedTuple):
    """A question about a picture.

    Attributes:
      picture: file, or encoded picture.
      kind: by which figures are told apart; '' where there are no kinds.
    """

    id: str
    picture: Path | bytes
    picture_id: str
    question: str
    answers: list[str]
    kind: str = ""


class Questions(NamedTuple):
    """Questions and how their answers are judged.

    Attributes:
      rule: 'vqa' (ten people's answers), 'exact' (one answer) or 'any' (several right ones).
      benchmark: what the paper calls these data, if they are its.
    """

    path: str
    rule: Literal["vqa", "exact", "any"]
    questions: list[Question]
    benchmark: str | None = None


def of_source(source: Source) -> Questions:
    """What a source's pictures show: right is any of a picture's captions."""
    records: Iterable[Record] = (source[index] for index in range(len(source)))
    questions = [
        Question(record["id"], record["image"], record["id"], WHAT, record["captions"])
        for record in records
    ]
    return Questions(source.path, "any", questions)


def open_questions(
    path: Path, answers: Path | None, folder: Path | None, *, allow_missing: bool = False
) -> Questions:
    """Opens official files.

    Args:
      answers: of VQAv2 and OK-VQA.
      folder: where the pictures lie.

    Raises:
      UserError: no such files, or of another kind; questions and answers of different splits; ids
        that are there twice; or too many pictures are missing.
    """
    content = read_json(path)
    try:
        if isinstance(content, dict) and "questions" in content:
            rule: Literal["vqa", "exact"] = "vqa"
            questions, names = _vqa(path, content, answers)
        elif (
            isinstance(content, dict) and content and all("imageId" in q for q in content.values())
        ):
            rule = "exact"
            questions, names = _gqa(content)
        else:
            raise not_known(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise not_known(path, f"an entry lacks {error}") from None
    benchmark = BENCHMARKS.get(("gqa" if rule == "exact" else "vqa", len(questions)))
    files = locate(path, folder, names, allow_missing=allow_missing)
    there = [
        question._replace(picture=file)
        for question, file in zip(questions, files, strict=True)
        if file is not None
    ]
    return Questions(str(path), rule, there, benchmark)


def _vqa(
    path: Path, content: dict[str, Any], answers: Path | None
) -> tuple[list[Question], list[tuple[str, ...]]]:
    if answers is None:
        raise UserError(f"{path} has questions alone; name the file of answers by --answers")
    answered = read_json(answers)
    if not isinstance(answered, dict) or "annotations" not in answered:
        raise not_known(answers)
    split, other = content.get("data_subtype"), answered.get("data_subtype")
    if split != other:
        raise UserError(
            f"{answers} has answers of {other}, but the questions in {path} are of {split}; name "
            "files of one split"
        )
    refuse_twice(path, (entry["question_id"] for entry in content["questions"]), "question")
    refuse_twice(answers, (entry["question_id"] for entry in answered["annotations"]), "question")
    by_id = {entry["question_id"]: entry for entry in answered["annotations"]}
    asked = {entry["question_id"] for entry in content["questions"]}
    if bare := [str(one) for one in asked if one not in by_id]:
        raise UserError(f"{answers} has no answers to {tell(sorted(bare), 'question')} of {path}")
    if over := [str(one) for one in by_id if one not in asked]:
        raise UserError(f"{path} lacks {tell(sorted(over), 'question')} that {answers} answers")
    questions: list[Question] = []
    names: list[tuple[str, ...]] = []
    for entry in content["questions"]:
        answer, number = by_id[entry["question_id"]], int(entry["image_id"])
        if answer["image_id"] != entry["image_id"]:
            raise UserError(
                f"{answers}: the answer to question {entry['question_id']} is of picture "
                f"{answer['image_id']}, not {entry['image_id']} as in {path}"
            )
        said = [one["answer"] for one in answer["answers"]]
        kind = answer.get("answer_type", "")
        questions.append(
            Question(str(entry["question_id"]), b"", str(number), entry["question"], said, kind)
        )
        # The name of 2014 and its folder, and that of 2017.
        name = f"COCO_{split}_{number:012}.jpg"
        names.append((name, f"{split}/{name}", f"{number:012}.jpg"))
    return questions, names


def _gqa(content: dict[str, Any]) -> tuple[list[Question], list[tuple[str, ...]]]:
    questions = [
        Question(
            key,
            b"",
            str(entry["imageId"]),
            entry["question"],
            [entry["answer"]],
            entry.get("types", {}).get("structural", ""),
        )
        for key, entry in content.items()
    ]
    names = [f"{question.picture_id}.jpg" for question in questions]
    return questions, [(name, f"images/{name}") for name in names]
