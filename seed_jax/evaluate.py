"""Measures a model: `python -m seed_jax.evaluate --model DIR --suite retrieval --data PATH`."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seed_jax import cli, drawing, inference, reconstruction, retrieval
from seed_jax.data.sources import open_source
from seed_jax.models import quantizer

Results = dict[str, Any]


def evaluate_retrieval(args: argparse.Namespace) -> Results:
    """Image-text retrieval, as in Table 1 of the paper; see `retrieval_results`."""
    source = open_source(args.data, args.split)
    return retrieval_results(
        inference.embed(args.model, source, batch_size=args.batch_size, max_tags=args.max_tags)
    )


def retrieval_results(embedded: inference.Embeddings) -> Results:
    """The figures of one set of pictures and captions, as fractions between 0 and 1.

    Returns:
      For 'embeddings' (the causal embeddings) and 'codes' (the embeddings that the decoder
      reconstructs from the codes): recall both ways and their mean; 'chance_r10'; the numbers of
      'pictures' and 'captions'; for 'codebook' the share of the codes that these pictures use and
      their perplexity. A stage-1 model has no 'codes' and no 'codebook'.
    """
    texts, owner_C = embedded.text_CE, embedded.picture_of_caption_C
    results: Results = {"embeddings": retrieval.retrieval(embedded.image_PE, texts, owner_C)}
    if codes := embedded.codes:
        results["codes"] = retrieval.retrieval(codes.image_PE, texts, owner_C)
        results["codebook"] = codebook_health(codes.codes_PQ, codes.codebook_size)
    results["chance_r10"] = retrieval.chance_recall(owner_C)
    return results | {"pictures": len(embedded.image_PE), "captions": len(texts)}


def codebook_health(codes_PQ: np.ndarray, size: int) -> dict[str, float]:
    """Usage and perplexity of `size` codes over all pictures together."""
    counts_C = quantizer.usage_counts(jnp.asarray(codes_PQ), size)
    return {name: float(value) for name, value in quantizer.codebook_health(counts_C).items()}


def retrieval_table(results: Results) -> str:
    """The figures as Table 1 prints them, in per cent."""
    ways = [
        ("i2t", "r1"),
        ("i2t", "r5"),
        ("i2t", "r10"),
        ("t2i", "r1"),
        ("t2i", "r5"),
        ("t2i", "r10"),
    ]
    lines = [
        f"{'per cent':<12}{'image to text':>20}{'text to image':>21}",
        f"{'':<12}" + "".join(f"{'R@' + k[1:]:>7}" for _, k in ways) + f"{'mean':>8}",
    ]
    for name in ("embeddings", "codes"):
        if row := results.get(name):
            cells = "".join(f"{100 * row[way][k]:7.1f}" for way, k in ways)
            lines.append(f"{name:<12}{cells}{100 * row['mean']:8.1f}")
    lines.append(
        f"{results['pictures']} pictures, {results['captions']} captions; guessing would reach "
        f"{100 * results['chance_r10']:.1f} at R@10, both ways averaged"
    )
    if health := results.get("codebook"):
        lines.append(
            f"codebook: these pictures use {100 * health['usage']:.1f} % of the codes, "
            f"perplexity {health['perplexity']:.1f}"
        )
    return "\n".join(lines)


def evaluate_reconstruction(args: argparse.Namespace) -> Results:
    """How alike pictures and their drawings are, as in Table 2; see `reconstruction.results`."""
    source = open_source(args.data, args.split)
    return reconstruction.results(
        *reconstruction.redraw(args, args.model, source, image_encoder=args.image_encoder)
    )


class Suite(NamedTuple):
    """What a suite measures, and how its results read."""

    evaluate: Callable[[argparse.Namespace], Results]
    table: Callable[[Results], str]


SUITES = {
    "retrieval": Suite(evaluate_retrieval, retrieval_table),
    "reconstruction": Suite(evaluate_reconstruction, reconstruction.table),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seed_jax.evaluate", description="Measures a trained model on a data set."
    )
    inference.add_arguments(parser)
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to measure")
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="a folder of pictures with captions.jsonl or a .txt beside each picture, a "
        ".array_record file or a folder of them, or 'embedded' for the packaged pictures",
    )
    parser.add_argument(
        "--max-tags",
        type=int,
        default=0,
        metavar="N",
        help="retrieval: append up to N of a picture's tags to each of its captions (default: "
        "captions alone)",
    )
    parser.add_argument(
        "--image-encoder",
        default="",
        metavar="DIR",
        help="reconstruction: compare pictures by this CLIP, a directory in transformers layout or "
        "a hub name (default: the model's own stage-1 encoder)",
    )
    parser.add_argument(
        "--output",
        type=inference.output_file,
        metavar="FILE",
        help="write the figures here, as JSON",
    )
    drawing.add_arguments(parser)
    args = parser.parse_args(argv)

    suite = SUITES[args.suite]
    results = suite.evaluate(args)
    print(suite.table(results))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
