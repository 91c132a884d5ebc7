"""What the codes are like: how many are in use, what the first of them tell, who shares them.

*Causal*: what codes 1 to k keep by themselves. The decoders attend to all positions, so a code is
hidden by putting in its place what is known without looking at the picture, the mean of what stands
there over all pictures. All codes hidden is a guess, none hidden the tokenizer as it is; the last k
codes, kept in the same way, show whether the first ones tell more.

*Semantic*: pictures that share many codes should show alike things. For each the picture with most
of its codes is looked up, and their captions are compared.

Shapes: P pictures, Q codes a picture, C codes, D width, R resamples, E contrastive width, N
neighbours, K numbers of codes kept.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seed_jax import drawing, inference
from seed_jax.cli import UserError
from seed_jax.data import transforms
from seed_jax.data.sources import Source
from seed_jax.drawing import Shown
from seed_jax.evaluation import intervals, retrieval, tables
from seed_jax.evaluation.suite import Evaluation, Measured, evenly
from seed_jax.evaluation.usage import usage
from seed_jax.models.layers import Array
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.pieces import Arrays, Pieces, join

RESAMPLES = 200
NEIGHBOURS = 5
ON_SHEET, DRAWN_ON_SHEET = 8, 5
COMPARED_AT_ONCE = 64


def evaluate(evaluation: Evaluation) -> Measured:
    """Usage, perplexity and entropy of the codes, and both analyses."""
    embedded = evaluation.embedded
    codes = embedded.codes
    assert codes is not None
    used, spans = intervals.with_intervals(
        lambda weights_RP: usage(codes.codes_PQ, codes.codebook_size, weights_RP),
        len(codes.codes_PQ),
        resamples=RESAMPLES,
        normal=True,
    )
    curve, curve_spans = causal(
        evaluation.tokenizer,
        evaluation.runner,
        embedded,
        batch_size=evaluation.args.batch_size,
        kept=evaluation.pieces("codebook"),
    )
    alike, alike_spans = semantic(embedded)
    figures = used | {"causal": curve, "semantic": alike}
    spans |= {"causal": curve_spans, "semantic": alike_spans}
    sheets = {"codes_shared": shared_sheet(embedded, evaluation.source)}
    try:
        sheets["codes_first"] = first_codes_sheet(evaluation)
    except UserError as error:
        print(f"codebook: nothing is drawn from the first codes: {error}")
    counts = {"pictures": len(codes.codes_PQ), "codes": codes.codebook_size}
    return Measured(figures | counts | {"intervals": spans}, evaluation.benchmark, sheets)


def steps(positions: int) -> list[int]:
    """How many codes are kept: none, then powers of two, then all."""
    powers = [2**i for i in range(positions.bit_length()) if 2**i < positions]
    return [0, *powers, positions]


def hide(
    model: SeedTokenizer, codes_PQ: np.ndarray
) -> Callable[[SeedTokenizer, Array, Array], Array]:
    """A function of (model, codes, which are kept, bool) to dequantised codes, the others hidden.

    Args:
      codes_PQ: of all pictures, over which means are taken.
    """
    size, positions = model.config.codebook.size, codes_PQ.shape[1]
    table_CD = jax.jit(lambda m: m.dequantize(m.codebook.vectors[...][None])[0])(model)
    shares_QC = np.stack([np.bincount(codes_P, minlength=size) for codes_P in codes_PQ.T])
    mean_QD = jnp.asarray(shares_QC / len(codes_PQ), jnp.float32) @ table_CD

    def dequantized(model: SeedTokenizer, codes_BQ: Array, kept_BQ: Array) -> Array:
        x_BQD = model.dequantize(model.codebook.lookup(codes_BQ))
        return jnp.where(kept_BQ[..., None], x_BQD, mean_QD[None])

    assert mean_QD.shape[0] == positions
    return dequantized


def causal(
    model: SeedTokenizer,
    runner: inference.Runner,
    embedded: inference.Embeddings,
    *,
    batch_size: int,
    kept: Pieces,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first and the last k codes keep, with intervals.

    Args:
      runner: holds `model`.
      kept: has what an interrupted run decoded, and gets the rest.

    Returns:
      For 'first' and 'last', by k: 'retrieval' (R@mean), 'reconstruction' and 'generation' (cosine
      of causal and generation embeddings to those of all codes).
    """
    codes = embedded.codes
    assert codes is not None
    pictures, positions = codes.codes_PQ.shape
    size = runner.batch_size(min(batch_size, pictures))
    dequantized = hide(model, codes.codes_PQ)

    @runner.compile
    def keep(model: SeedTokenizer, codes_BQ: Array, kept_BQ: Array) -> dict[str, Array]:
        def decoded(kept_BQ: Array) -> tuple[Array, Array]:
            x_BQD = dequantized(model, codes_BQ, kept_BQ)
            return model.decode_causal(x_BQD), model.generation(x_BQD)

        causal_BQD, generation = decoded(kept_BQ)
        whole_BQD, whole = decoded(jnp.ones_like(kept_BQ))
        return {
            "features": model.image_features(causal_BQD),
            "reconstruction": _cosine(causal_BQD, whole_BQD),
            "generation": _cosine(generation, whole),
        }

    def decode(kept_BQ: np.ndarray) -> Arrays:
        parts = []
        for start in range(0, pictures, size):
            rows = np.minimum(start + np.arange(size), pictures - 1)
            parts.append(jax.device_get(keep(codes.codes_PQ[rows], kept_BQ)))
        return {name: array[:pictures] for name, array in join(parts).items()}

    order = np.arange(positions)
    figures: dict[str, Any] = {}
    spans: dict[str, Any] = {}
    for end, place in (("first", order), ("last", order[::-1])):
        figures[end], spans[end] = {}, {}
        for count in steps(positions):
            kept_BQ = np.broadcast_to(place < count, (size, positions))
            outputs = kept(f"{end}-{count}", partial(decode, kept_BQ))
            features_PE = outputs.pop("features")
            recall, recall_span = retrieval.retrieval(
                features_PE, embedded.text_CE, embedded.picture_of_caption_C
            )
            found, found_spans = intervals.of_means(outputs)
            figures[end][str(count)] = {"retrieval": recall["mean"], **found}
            spans[end][str(count)] = {"retrieval": recall_span["mean"], **found_spans}
    return figures, spans


def _cosine(a: Array, b: Array) -> Array:
    """Mean over all positions of the cosine, [B, ..., D] -> [B]."""
    products = jnp.sum(a * b, axis=-1)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosines = products / jnp.maximum(norms, 1e-12)
    return jnp.mean(cosines.reshape(len(cosines), -1), axis=-1)


def neighbours(codes_PQ: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The other pictures with most of a picture's codes, each in its place.

    Returns:
      Their rows and how many codes they share, int [P, count], best first.
    """
    rows, shared = [], []
    for start in range(0, len(codes_PQ), COMPARED_AT_ONCE):
        part_BQ = codes_PQ[start : start + COMPARED_AT_ONCE]
        shared_BP = sum(
            (part_BQ[:, q, None] == codes_PQ[None, :, q]).astype(np.int32)
            for q in range(codes_PQ.shape[1])
        )
        places_B = np.arange(len(part_BQ))
        shared_BP[places_B, start + places_B] = -1
        best_BN = np.argsort(-shared_BP, axis=1, kind="stable")[:, :count]
        rows.append(best_BN)
        shared.append(np.take_along_axis(shared_BP, best_BN, axis=1))
    return np.concatenate(rows), np.concatenate(shared)


def semantic(embedded: inference.Embeddings) -> tuple[dict[str, float], dict[str, Any]]:
    """How alike are captions of pictures that share codes.

    Returns:
      'shared', how many codes a picture shares with its nearest; 'nearest', the cosine of the two's
      first captions; 'any', of the captions of any two pictures; and intervals.
    """
    assert embedded.codes is not None
    codes_PQ = embedded.codes.codes_PQ
    first_P = np.searchsorted(embedded.picture_of_caption_C, np.arange(len(codes_PQ)))
    text_PE = embedded.text_CE[first_P]
    nearest_P1, shared_P1 = neighbours(codes_PQ, 1)
    nearest_P = np.sum(text_PE * text_PE[nearest_P1[:, 0]], axis=-1)
    others = len(text_PE) - 1
    any_P = (text_PE @ text_PE.sum(axis=0) - np.sum(text_PE**2, axis=-1)) / others
    return intervals.of_means({"shared": shared_P1[:, 0], "nearest": nearest_P, "any": any_P})


def shared_sheet(embedded: inference.Embeddings, source: Source) -> list[Shown]:
    """Pictures, each beside those that share most of its codes."""
    assert embedded.codes is not None
    codes_PQ = embedded.codes.codes_PQ
    pictures, positions = codes_PQ.shape
    nearest_PN, shared_PN = neighbours(codes_PQ, min(NEIGHBOURS, pictures - 1))
    shown = []
    for row in evenly(pictures, ON_SHEET):
        index = int(embedded.index_P[row])
        panels: dict[str, np.ndarray | None] = {"": _picture(source, index)}
        for place, (other, shared) in enumerate(
            zip(nearest_PN[row], shared_PN[row], strict=True), 1
        ):
            name = f"{place}: {shared} of {positions} codes"
            panels[name] = _picture(source, int(embedded.index_P[other]))
        shown.append(Shown(source[index]["captions"][0], panels))
    return shown


def _picture(source: Source, index: int) -> np.ndarray:
    return np.asarray(transforms.decode(source[index]["image"]))


def first_codes_sheet(evaluation: Evaluation) -> list[Shown]:
    """Pictures, each beside what is drawn from its first codes, the others hidden.

    Raises:
      UserError: nothing here draws from this tokenizer's codes.
    """
    embedded, source, model = evaluation.embedded, evaluation.source, evaluation.tokenizer
    diffusion = evaluation.diffusion
    assert embedded.codes is not None
    codes_PQ = embedded.codes.codes_PQ
    positions = codes_PQ.shape[1]
    dequantized = hide(model, codes_PQ)
    embed = jax.jit(lambda m, codes, kept: m.generation(dequantized(m, codes, kept)))
    counts = steps(positions)[1:]
    kept_KQ = np.arange(positions)[None] < np.array(counts)[:, None]
    rows = evenly(len(codes_PQ), DRAWN_ON_SHEET)
    codes_NQ = np.repeat(codes_PQ[rows], len(counts), axis=0)
    kept_NQ = np.tile(kept_KQ, (len(rows), 1))
    # As many at a time as are drawn elsewhere: to compile takes longer than to draw.
    size = min(evaluation.args.batch_size, len(evaluation.few))
    settings = drawing.settings(evaluation.args)
    pictures: list[np.ndarray] = []
    for start in range(0, len(codes_NQ), size):
        some = np.minimum(start + np.arange(size), len(codes_NQ) - 1)
        embeddings = embed(model, codes_NQ[some], kept_NQ[some])
        pictures += list(np.asarray(diffusion.draw(embeddings, first=start, **settings)))
    drawn = iter(pictures)
    shown = []
    for row in rows:
        index = int(embedded.index_P[row])
        panels: dict[str, np.ndarray | None] = {"": _picture(source, index)}
        for count in counts:
            panels["all codes" if count == positions else f"first {count}"] = next(drawn)
        shown.append(Shown(source[index]["captions"][0], panels))
    return shown


COLUMNS = {"retrieval": True, "reconstruction": False, "generation": False}


def table(found: Mapping[str, Any]) -> str:
    """Usage, then a row for each number of codes kept."""
    spans = found["intervals"]
    used = [
        ["codes in use, %", tables.figure(found["usage"], spans["usage"], percent=True)],
        ["perplexity", tables.figure(found["perplexity"], spans["perplexity"])],
        ["entropy, bits a code", tables.figure(found["entropy"], spans["entropy"], digits=2)],
    ]
    head = [f"of {found['codes']} codes, by {found['pictures']} pictures", ""]
    by_position = ", ".join(f"{bits:.1f}" for bits in found["entropy_by_position"])
    return "\n\n".join(
        [
            tables.markdown(head, used),
            f"Entropy by position, bits: {by_position}.",
            tables.markdown(*_curve(found, "first")),
            tables.markdown(*_curve(found, "last")),
            _semantic_line(found),
        ]
    )


def _curve(found: Mapping[str, Any], end: str) -> tuple[Sequence[str], list[list[str]]]:
    head = [
        f"{end} codes kept",
        "R@mean, %",
        "causal embeddings, cosine to all codes'",
        "generation embeddings, cosine",
    ]
    rows = []
    for count, figures in found["causal"][end].items():
        spans = found["intervals"]["causal"][end][count]
        cells = [
            tables.figure(figures[name], spans[name], percent=percent, digits=1 if percent else 3)
            for name, percent in COLUMNS.items()
        ]
        rows.append([count, *cells])
    return head, rows


def _semantic_line(found: Mapping[str, Any]) -> str:
    alike, spans = found["semantic"], found["intervals"]["semantic"]
    shared = tables.figure(alike["shared"], spans["shared"])
    nearest = tables.figure(alike["nearest"], spans["nearest"], digits=3)
    anything = tables.figure(alike["any"], spans["any"], digits=3)
    return (
        f"A picture shares {shared} codes with its nearest; the captions of the two have a cosine "
        f"of {nearest}, those of any two pictures {anything}."
    )


def headline(found: dict[str, Any]) -> list[tables.Line]:
    spans = found["intervals"]
    *_, half, _ = found["causal"]["first"]
    line = found["causal"]["first"][half]["retrieval"]
    span = spans["causal"]["first"][half]["retrieval"]
    return [
        tables.Line("codes in use, %", tables.figure(found["usage"], spans["usage"], percent=True)),
        tables.Line("perplexity", tables.figure(found["perplexity"], spans["perplexity"])),
        tables.Line(
            f"R@mean of the first {half} codes alone, %", tables.figure(line, span, percent=True)
        ),
    ]
