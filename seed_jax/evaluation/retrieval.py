"""Image-text retrieval as Table 1 of the paper measures it.

Shapes: P pictures, C captions, M queries, G gallery items, E contrastive width, R resamples.
"""

import textwrap
from typing import Any

import numpy as np

from seed_jax.data import transforms
from seed_jax.data.sources import Source
from seed_jax.drawing import Shown
from seed_jax.evaluation import intervals, tables, usage
from seed_jax.evaluation.suite import Evaluation, Measured, evenly
from seed_jax.inference import Embeddings

KS = (1, 5, 10)
ON_SHEET, TITLE_WIDTH = 32, 40
WAYS = {"i2t": "image to text", "t2i": "text to image"}
# Table 1, in per cent: R@1, 5, 10 from pictures to captions, then back, and their mean.
PAPER = {
    "Flickr30K 1K": {
        "embeddings": (90.0, 99.6, 99.9, 80.0, 95.3, 97.6, 93.7),
        "codes": (86.3, 98.6, 99.5, 75.9, 93.2, 96.7, 91.7),
    },
    "COCO 5K": {
        "embeddings": (71.9, 91.1, 95.9, 56.7, 80.7, 87.7, 80.7),
        "codes": (65.7, 88.1, 93.8, 52.5, 78.0, 86.0, 77.4),
    },
}


def first_hit_ranks(
    query_ME: np.ndarray,
    gallery_GE: np.ndarray,
    query_label_M: np.ndarray,
    gallery_label_G: np.ndarray,
    *,
    block: int = 256,
) -> np.ndarray:
    """How many gallery items come before the first one that bears the query's label.

    Items are ordered by similarity, equal ones by their place in the gallery, so features that
    are all alike rank as a guess would. A NaN is a miss, not a tie.

    Args:
      query_ME, gallery_GE: float features; similarity is their dot product.
      query_label_M, gallery_label_G: integers; each query's label occurs in the gallery.
      block: queries ranked at a time, so that the whole [M, G] matrix never exists.

    Returns:
      int64 [M], 0 where the best match bears the label.
    """
    by_label_G = np.argsort(gallery_label_G, kind="stable")
    first_M, end_M = (
        np.searchsorted(gallery_label_G, query_label_M, side, sorter=by_label_G)
        for side in ("left", "right")
    )
    own_M = [by_label_G[first:end] for first, end in zip(first_M, end_M, strict=True)]
    ranks = []
    for start in range(0, len(query_ME), block):
        rows = slice(start, start + block)
        similarity_MG = query_ME[rows] @ gallery_GE.T
        np.nan_to_num(similarity_MG, copy=False, nan=np.finfo(similarity_MG.dtype).min)
        hit_M1 = np.array(
            [[line_G[own].max()] for line_G, own in zip(similarity_MG, own_M[rows], strict=True)]
        )
        ranks_M = np.count_nonzero(similarity_MG > hit_M1, axis=1)
        for row in np.flatnonzero(np.count_nonzero(similarity_MG == hit_M1, axis=1) > 1):
            equal_G = similarity_MG[row] == hit_M1[row]
            own = own_M[start + row]
            ranks_M[row] += np.count_nonzero(equal_G[: own[equal_G[own]].min()])
        ranks.append(ranks_M)
    return np.concatenate(ranks)


def retrieval(
    image_PE: np.ndarray, text_CE: np.ndarray, picture_of_caption_C: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recall both ways and R@mean, the mean of all six, as fractions; and their intervals.

    A picture is found when any of its captions is among the best k; each caption is a query of
    its own, as is the custom on COCO and Flickr30K. For the intervals the queries are drawn anew;
    what they search in stays.

    Args:
      picture_of_caption_C: int, the row in `image_PE` that each caption belongs to.
    """
    pictures = len(image_PE)
    pictures_P = np.arange(pictures)
    i2t_P = first_hit_ranks(image_PE, text_CE, pictures_P, picture_of_caption_C)
    t2i_C = first_hit_ranks(text_CE, image_PE, picture_of_caption_C, pictures_P)
    captions_P = np.bincount(picture_of_caption_C, minlength=pictures)
    found_by_caption = {
        k: np.bincount(picture_of_caption_C, weights=t2i_C < k, minlength=pictures) for k in KS
    }

    def measure(weights_RP: np.ndarray) -> dict[str, Any]:
        i2t = {f"r{k}": intervals.mean(weights_RP, i2t_P < k) for k in KS}
        t2i = {f"r{k}": intervals.mean(weights_RP, found_by_caption[k], captions_P) for k in KS}
        return {"i2t": i2t, "t2i": t2i, "mean": np.mean([*i2t.values(), *t2i.values()], axis=0)}

    return intervals.with_intervals(measure, pictures)


def chance_recall(picture_of_caption_C: np.ndarray, k: int = 10) -> float:
    """R@k of guessing, both ways averaged: the figure to read a recall against."""
    captions_P = np.bincount(picture_of_caption_C)
    total = len(picture_of_caption_C)
    draws_k = np.arange(min(k, total))
    # k captions drawn without replacement all miss the picture's own.
    misses_P = np.prod(
        np.clip(total - captions_P[:, None] - draws_k[None], 0, None) / (total - draws_k), axis=1
    )
    i2t = 1.0 - np.mean(misses_P)
    return float((i2t + min(1.0, k / len(captions_P))) / 2)


def results(embedded: Embeddings) -> dict[str, Any]:
    """The figures of one set of pictures and captions, as fractions between 0 and 1.

    Returns:
      For 'embeddings' (the causal embeddings) and 'codes' (the embeddings that the decoder
      reconstructs from the codes): recall both ways and their mean; their 'intervals';
      'chance_r10'; the numbers of 'pictures' and 'captions'; for 'codebook' the share of the codes
      that these pictures use and their perplexity. A stage-1 model has no 'codes' and no
      'codebook'.
    """
    texts, owner_C = embedded.text_CE, embedded.picture_of_caption_C
    found: dict[str, Any] = {"intervals": {}}
    features = {"embeddings": embedded.image_PE}
    if codes := embedded.codes:
        features["codes"] = codes.image_PE
        found["codebook"] = usage.health(codes.codes_PQ, codes.codebook_size)
    for name, image_PE in features.items():
        found[name], found["intervals"][name] = retrieval(image_PE, texts, owner_C)
    found["chance_r10"] = chance_recall(owner_C)
    return found | {"pictures": len(embedded.image_PE), "captions": len(texts)}


def evaluate(evaluation: Evaluation) -> Measured:
    """See `results`."""
    embedded = evaluation.embedded
    shown = {"retrieval": sheet(embedded, evaluation.source)}
    return Measured(results(embedded), evaluation.benchmark, shown)


def sheet(embedded: Embeddings, source: Source) -> list[Shown]:
    """Some pictures, spread evenly over all, under the caption nearest to each."""
    image_PE = embedded.codes.image_PE if embedded.codes else embedded.image_PE
    shown = []
    for row in evenly(len(image_PE), ON_SHEET):
        nearest = int(np.argmax(embedded.text_CE @ image_PE[row]))
        mark = "✓ " if embedded.picture_of_caption_C[nearest] == row else ""
        title = textwrap.shorten(mark + embedded.captions[nearest], TITLE_WIDTH)
        picture = transforms.decode(source[int(embedded.index_P[row])]["image"])
        shown.append(Shown(title, {"": np.asarray(picture)}))
    return shown


def table(found: dict[str, Any]) -> str:
    """The figures beside Table 1, in per cent."""
    places = [(way, f"r{k}") for way in WAYS for k in KS] + [("mean",)]
    names = [name for name in ("embeddings", "codes") if name in found]
    published = tables.published(PAPER, found)
    head = ["per cent", *names]
    head += [f"{name}, paper on {data}" for data in published for name in names]
    rows = []
    for number, place in enumerate(places):
        way, *k = place
        row = [f"{WAYS[way]}, R@{k[0][1:]}" if k else "mean of the six"]
        for name in names:
            interval = tables.at(found, "intervals", name, *place)
            row.append(tables.figure(tables.at(found, name, *place), interval, percent=True))
        row += [f"{published[data][name][number]:.1f}" for data in published for name in names]
        rows.append(row)
    lines = [
        tables.markdown(head, rows),
        "",
        f"{found['pictures']} pictures, {found['captions']} captions; guessing would reach "
        f"{100 * found['chance_r10']:.1f} at R@10, both ways averaged.",
    ]
    if health := found.get("codebook"):
        lines.append(
            f"These pictures use {100 * health['usage']:.1f} % of the codes, perplexity "
            f"{health['perplexity']:.1f}."
        )
    return "\n".join(lines)


def headline(found: dict[str, Any]) -> list[tables.Line]:
    """R@mean of both."""
    return [
        tables.Line(
            f"R@mean, {name}, %",
            tables.figure(found[name]["mean"], found["intervals"][name]["mean"], percent=True),
            tables.theirs(PAPER, found, name, -1),
        )
        for name in ("embeddings", "codes")
        if name in found
    ]
