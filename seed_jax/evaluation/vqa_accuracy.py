"""Accuracy of answers as the VQA challenge scores them (visualqa.org/evaluation.html).

An answer is as right as people agree with it: with three who gave it, wholly. Each of the ten is
left out in turn and the answer scored against the other nine. First all are written alike: no
punctuation, no articles, digits for number words, apostrophes in contractions.
"""

import re
from collections.abc import Sequence

AGREE = 3
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that people write without their apostrophes.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_apostrophes(word: str) -> set[str]:
    """A contraction with any of its apostrophes left out."""
    spellings = {""}
    for letter in word:
        more = {spelling + letter for spelling in spellings}
        spellings = more | spellings if letter == "'" else more
    return spellings - {word}


CONTRACTED = {
    bare: word for word in CONTRACTIONS.split() for bare in sorted(_without_apostrophes(word))
}


def normalize(answer: str) -> str:
    """An answer as it is compared."""
    given = answer = " ".join(answer.split())
    # A comma between digits groups them; all marks are dropped without a trace then.
    joined = re.search(r"\d,\d", given) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in given or f" {mark}" in given
        answer = answer.replace(mark, "" if beside_space or joined else " ")
    # Periods go unless they stand before a digit.
    answer = re.sub(r"\.(?!\d)", "", answer)
    words = [NUMBERS.get(word, word) for word in answer.lower().split()]
    return " ".join(CONTRACTED.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """How right an answer is, from 0 to 1.

    Args:
      people: what each of them answered, usually ten.
    """
    answer, people = normalize(answer), [normalize(one) for one in people]
    agreeing = people.count(answer)
    others = len(people) - agreeing
    # Left out in turn: those who agree find one fewer.
    total = agreeing * min(1.0, (agreeing - 1) / AGREE) + others * min(1.0, agreeing / AGREE)
    return total / len(people)
