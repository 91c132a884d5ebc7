"""What a SEED-OPT says of pictures, and what it draws of their captions, in figures.

Shapes in names: P pictures, Q codes of a picture, E contrastive width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from pycocoevalcap.cider.cider import Cider
from tqdm import tqdm

from seed_jax.evaluation import retrieval, writing
from seed_jax.evaluation.caption_metrics import tokenize_simply
from seed_jax.evaluation.journal import Journal
from seed_jax.inference import Embeddings
from seed_jax.seed_opt import SeedOPT

SHUFFLES = 10


def caption_all(model: SeedOPT, codes_PQ: np.ndarray, *, batch_size: int) -> list[str]:
    """A caption of each picture, from its codes."""
    tasks = [writing.Task(str(i), partial(codes_PQ.__getitem__, i)) for i in range(len(codes_PQ))]
    written = writing.write(
        tasks,
        Journal(),
        lambda codes, _: model.caption(codes),
        batch_size=batch_size,
        what="caption",
    )
    return list(written.values())


def draw_all(model: SeedOPT, texts: Sequence[str], *, batch_size: int) -> np.ndarray:
    """Codes drawn from each text, int32 [P, Q]."""
    drawn = []
    with tqdm(total=len(texts), unit="drawing", desc="drawings", dynamic_ncols=True) as bar:
        for start in range(0, len(texts), batch_size):
            # The number as the seed, so that equal texts in two batches are drawn differently.
            drawn.append(model.draw(texts[start : start + batch_size], seed=start))
            bar.update(len(drawn[-1]))
    return np.concatenate(drawn)


def caption_results(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How well captions fit their own pictures, and how well other pictures': the control.

    Args:
      references: the true captions of each picture.

    Returns:
      'cider', from 0 to 10, and 'shuffled_cider', the mean of `SHUFFLES` ways to take each
      picture's codes from another picture.
    """
    count = len(captions)
    # Words are split without Java, which not every machine has.
    written = tokenize_simply({str(i): [caption] for i, caption in enumerate(captions)})
    true = tokenize_simply({str(i): own for i, own in enumerate(references)})

    def cider(shift: int) -> float:
        """CIDEr-D (arXiv 1411.5726) by pycocoevalcap, each picture under another's caption."""
        shifted = {str(i): written[str((i - shift) % count)] for i in range(count)}
        return float(Cider().compute_score(true, shifted)[0])

    shifts = np.unique(np.linspace(1, count - 1, SHUFFLES, dtype=int))
    shuffled = [cider(int(shift)) for shift in shifts]
    return {"cider": cider(0), "shuffled_cider": float(np.mean(shuffled))}


def drawing_results(model: SeedOPT, drawn_PQ: np.ndarray, embedded: Embeddings) -> dict[str, Any]:
    """How well drawings are found by the captions that they were drawn from, and find them.

    Args:
      drawn_PQ: codes, a row for each picture of `embedded`.
      embedded: the pictures' captions.
    """
    tokenizer, owner_C = model.tokenizer, embedded.picture_of_caption_C
    causal_PQD = tokenizer.reconstruct_causal(jnp.asarray(drawn_PQ))
    features_PE = np.asarray(tokenizer.image_features(causal_PQD))
    recalls, intervals = retrieval.retrieval(features_PE, embedded.text_CE, owner_C)
    return {**recalls, "intervals": intervals, "chance_r10": retrieval.chance_recall(owner_C)}


def table(results: dict[str, Any]) -> str:
    """The figures of 'captions' and 'drawings', a line each."""
    captions, drawings = results["captions"], results["drawings"]
    found = (drawings["i2t"]["r10"] + drawings["t2i"]["r10"]) / 2
    return (
        f"captions    {captions['cider']:.3f} CIDEr, {captions['shuffled_cider']:.3f} for captions "
        f"of other pictures\n"
        f"drawings    {found:.3f} R@10 from codes to caption and back, by chance "
        f"{drawings['chance_r10']:.3f}"
    )
