"""Short answers by the language model: VQAv2 and OK-VQA by the challenge's accuracy, GQA by match.

Pictures of the package come with no questions: "What is this?" is asked of each, and one of its
captions is right.
"""

import textwrap
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from seed_jax import seed_opt
from seed_jax.cli import UserError
from seed_jax.data import questions
from seed_jax.data.annotations import is_annotation_file
from seed_jax.data.questions import Question, Questions
from seed_jax.data.sequences import QUESTION_PROMPT
from seed_jax.drawing import Shown
from seed_jax.evaluation import intervals, tables, writing
from seed_jax.evaluation.suite import Evaluation, Measured, evenly
from seed_jax.evaluation.vqa_accuracy import accuracy, normalize

WHOLE = "all"
PAPER = {"VQAv2 val": {WHOLE: 42.8}, "GQA": {WHOLE: 28.8}}
RULES = {
    "vqa": "VQA accuracy, ten people's answers",
    "exact": "exact match",
    "any": "match with one of several",
}
ON_SHEET = 24


def evaluate(evaluation: Evaluation) -> Measured:
    """Asks every question and scores the answers."""
    asked = open_questions(evaluation)
    model = evaluation.seed_opt
    tasks = [
        writing.Task(question.id, partial(writing.read, question.picture), question.question)
        for question in asked.questions
    ]
    written = writing.write(
        tasks,
        evaluation.journal("vqa"),
        model.answer,
        batch_size=evaluation.args.batch_size,
        what="answer",
    )
    answered = [question for question in asked.questions if question.id in written]
    figures = score(asked.rule, answered, [written[question.id] for question in answered])
    figures |= {"prompt": QUESTION_PROMPT, "beams": seed_opt.ANSWER.beams}
    return Measured(figures, asked.benchmark, {"vqa": sheet(answered, written)})


def open_questions(evaluation: Evaluation) -> Questions:
    """The questions of the data; see `evaluate`.

    Raises:
      UserError: see `questions.open_questions`; or the data have no questions.
    """
    args = evaluation.args
    if is_annotation_file(args.data):
        asked = questions.open_questions(
            Path(args.data), args.answers, args.images, allow_missing=args.allow_missing
        )
        if args.limit and args.limit < len(asked.questions):
            some = [asked.questions[place] for place in evenly(len(asked.questions), args.limit)]
            return asked._replace(questions=some, benchmark=None)
        return asked
    if has_questions(evaluation):
        return questions.of_source(evaluation.few)
    raise UserError(f"{args.data} has no questions; name a file of them (docs/evaluation.md)")


def has_questions(evaluation: Evaluation) -> bool:
    """Whether there is something to ask about pictures that are not from a file of questions."""
    return evaluation.args.data == "embedded"


def score(rule: str, asked: list[Question], answers: list[str]) -> dict[str, Any]:
    """Accuracy of all ('all') and of each kind of question, and intervals.

    Questions about a picture are drawn together.
    """
    judge = accuracy if rule == "vqa" else _matches
    right = np.array(
        [
            judge(answer, question.answers) if answer.strip() else 0.0
            for question, answer in zip(asked, answers, strict=True)
        ]
    )
    pictures = {picture: row for row, picture in enumerate({q.picture_id for q in asked})}
    owners = np.array([pictures[question.picture_id] for question in asked])
    kinds: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(asked):
        if question.kind:
            kinds[question.kind].append(place)
    places = {name: np.array(own) for name, own in sorted(kinds.items())}
    places[WHOLE] = np.arange(len(asked))

    def measure(weights_RP: np.ndarray) -> dict[str, Any]:
        return {
            name: intervals.mean(
                weights_RP,
                np.bincount(owners[own], weights=right[own], minlength=len(pictures)),
                np.bincount(owners[own], minlength=len(pictures)),
            )
            for name, own in places.items()
        }

    figures, spans = intervals.with_intervals(measure, len(pictures))
    counts = {"questions": len(asked), "pictures": len(pictures)}
    return {"accuracy": figures, "intervals": spans, "rule": rule} | counts


def _matches(answer: str, right: list[str]) -> float:
    return float(normalize(answer) in map(normalize, right))


def sheet(asked: list[Question], written: dict[str, str]) -> list[Shown]:
    """Some pictures with question and answer, spread evenly over all."""
    some = evenly(len(asked), ON_SHEET)
    shown = []
    for question in (asked[place] for place in some):
        picture = np.asarray(writing.read(question.picture))
        title = textwrap.shorten(f"{question.question} {written[question.id]}", 40)
        shown.append(Shown(title, {"": picture}))
    return shown


def table(found: dict[str, Any]) -> str:
    """A row for each kind of question, and one for all."""
    published = tables.published(PAPER, found)
    head = [f"per cent ({RULES[found['rule']]})", "", *(f"paper on {data}" for data in published)]
    rows = []
    for kind, value in found["accuracy"].items():
        cell = tables.figure(value, found["intervals"][kind], percent=True)
        theirs = [figures.get(kind) for figures in published.values()]
        rows.append([kind, cell, *("" if x is None else f"{x:.1f}" for x in theirs)])
    told = (
        f"{found['questions']} questions about {found['pictures']} pictures, prompt "
        f"“{found['prompt']}”, {found['beams']} beams."
    )
    return f"{tables.markdown(head, rows)}\n\n{told}"


def headline(found: dict[str, Any]) -> list[tables.Line]:
    span = found["intervals"][WHOLE]
    value = tables.figure(found["accuracy"][WHOLE], span, percent=True)
    return [tables.Line(f"{RULES[found['rule']]}, %", value, tables.theirs(PAPER, found, WHOLE))]
