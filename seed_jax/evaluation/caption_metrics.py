"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions, by pycocoevalcap.

Its tokenizer (PTB), METEOR and SPICE run in Java. Without it captions are split by a rule of thumb
instead, and those two metrics are left out; SPICE also needs a file that is not in the package.

Shapes: P pictures, R resamples.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from seed_jax.evaluation import intervals

ORDERS = 4
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_FETCH = "python -m pycocoevalcap.spice.get_stanford_models"
# As PTB's tokenizer splits "man's" and "don't".
CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
TOKENS = re.compile(r"n't|'\w+|\w+(?:[-.,'/:]\w+)*|[^\w\s]")

# Texts by picture; as candidates one each.
Texts = Mapping[str, Sequence[str]]


class Scored(NamedTuple):
    """Scores of each picture, from which totals are made.

    Attributes:
      bleu: [P, 2 + 2 * 4]: words written, words of the nearest reference, n-grams written, n-grams
        that a reference has.
      means: metrics whose total is the mean, float [P].
      totals: METEOR's, which is none.
      left_out: metric -> why it is not there.
      tokenizer: 'PTB' or 'simple'.
    """

    bleu: np.ndarray
    means: dict[str, np.ndarray]
    totals: dict[str, float]
    left_out: dict[str, str]
    tokenizer: str


def score(references: Texts, written: Texts, *, java: str = "java") -> Scored:
    """Scores one text for each picture against its references.

    Args:
      java: the program.
    """
    runs_java = shutil.which(java) is not None
    tokenize = tokenize_ptb if runs_java else tokenize_simply
    references, written = tokenize(references), tokenize(written)
    means, totals, left_out = {}, {}, {}
    means["ROUGE-L"] = np.asarray(Rouge().compute_score(references, written)[1])
    means["CIDEr"] = np.asarray(Cider().compute_score(references, written)[1])
    if runs_java:
        totals["METEOR"], means["METEOR"] = _meteor(references, written)
    else:
        left_out["METEOR"] = "it runs in Java, which is not on PATH"
    if reason := without_spice(runs_java):
        left_out["SPICE"] = reason
    else:
        means["SPICE"] = _spice(references, written)
    tokenizer = "PTB" if runs_java else "simple"
    return Scored(_bleu(references, written), means, totals, left_out, tokenizer)


def without_spice(runs_java: bool) -> str:
    """Why SPICE can't run; '' if it can."""
    if not runs_java:
        return "it runs in Java, which is not on PATH"
    folder = Path(spice.__file__).parent / "lib"
    if missing := [name for name in SPICE_JARS if not (folder / name).is_file()]:
        return f"{missing[0]} is not in {folder}; fetch it once: {SPICE_FETCH}"
    return ""


def measure(scored: Scored, weights_RP: np.ndarray) -> dict[str, Any]:
    """All metrics, float [R] each, as fractions (CIDEr: from 0 to 10)."""
    found = {f"BLEU-{n + 1}": value for n, value in enumerate(bleu(weights_RP @ scored.bleu))}
    for name, values_P in scored.means.items():
        # METEOR's total comes from sums of its own; how it moves is taken from the mean.
        shift = scored.totals[name] - values_P.mean() if name in scored.totals else 0.0
        found[name] = intervals.mean(weights_RP, values_P) + shift
    return found


def bleu(sums_RS: np.ndarray) -> list[np.ndarray]:
    """BLEU-1 to 4, float [R] each, from sums of `Scored.bleu`."""
    written_R, reference_R = sums_RS[:, 0], sums_RS[:, 1]
    guessed_RN, right_RN = sums_RS[:, 2 : 2 + ORDERS], sums_RS[:, 2 + ORDERS :]
    # pycocoevalcap's own way to keep out of division by zero, so that figures are the same.
    precision_RN = (right_RN + 1e-15) / (guessed_RN + 1e-9)
    logs_RN = np.cumsum(np.log(precision_RN), axis=1) / np.arange(1, ORDERS + 1)
    shortness_R = np.minimum(0.0, 1 - reference_R / np.maximum(written_R, 1e-9))
    return list(np.exp(logs_RN + shortness_R[:, None]).T)


def _bleu(references: Texts, written: Texts) -> np.ndarray:
    scorer = BleuScorer(n=ORDERS)
    for key, texts in written.items():
        scorer += (texts[0], references[key])
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        nearest = min(counts["reflen"], key=lambda reference: (abs(reference - length), reference))
        rows.append([length, nearest, *counts["guess"], *counts["correct"]])
    return np.array(rows, float)


def _meteor(references: Texts, written: Texts) -> tuple[float, np.ndarray]:
    meteor = Meteor()
    try:
        total, scores = meteor.compute_score(references, written)
    finally:
        meteor.meteor_p.stdout.close()
        meteor.meteor_p.stderr.close()
    return total, np.array(scores)


def _spice(references: Texts, written: Texts) -> np.ndarray:
    # It sorts the pictures.
    places = {key: place for place, key in enumerate(sorted(references))}
    _, scores = spice.Spice().compute_score(references, written)
    return np.array([scores[places[key]]["All"]["f"] for key in written])


def tokenize_ptb(texts: Texts) -> dict[str, list[str]]:
    """Lower-case words between spaces, without punctuation, by the Stanford tokenizer."""
    # Whatever breaks a line would be two texts for it.
    entries = {key: [{"caption": " ".join(t.split())} for t in own] for key, own in texts.items()}
    return PTBTokenizer().tokenize(entries)


def tokenize_simply(texts: Texts) -> dict[str, list[str]]:
    """Nearly the same, by a rule of thumb."""

    def words(text: str) -> str:
        found = TOKENS.findall(CLITICS.sub(r" \1", text.lower().replace("’", "'")))
        return " ".join(
            word for word in found if word[0].isalnum() or (word[0] == "'" and word[1:])
        )

    return {key: [words(text) for text in own] for key, own in texts.items()}
