"""What a SEED-OPT says of pictures, and what it draws of their captions, in figures.

Shapes in names: P pictures, Q codes of a picture, E contrastive width.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from seed_jax.evaluation import retrieval
from seed_jax.inference import Embeddings
from seed_jax.seed_opt import SeedOPT


def caption_all(model: SeedOPT, codes_PQ: np.ndarray, *, batch_size: int) -> list[str]:
    """A caption of each picture, from its codes."""
    captions: list[str] = []
    with tqdm(total=len(codes_PQ), unit="caption", desc="captions", dynamic_ncols=True) as bar:
        for start in range(0, len(codes_PQ), batch_size):
            captions += model.caption(list(codes_PQ[start : start + batch_size]))
            bar.update(len(captions) - bar.n)
    return captions


def draw_all(model: SeedOPT, texts: Sequence[str], *, batch_size: int) -> np.ndarray:
    """Codes drawn from each text, int32 [P, Q]."""
    drawn = []
    with tqdm(total=len(texts), unit="drawing", desc="drawings", dynamic_ncols=True) as bar:
        for start in range(0, len(texts), batch_size):
            # The number as the seed, so that equal texts in two batches are drawn differently.
            drawn.append(model.draw(texts[start : start + batch_size], seed=start))
            bar.update(len(drawn[-1]))
    return np.concatenate(drawn)


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that two texts have in common, as SQuAD's (arXiv 1606.05250, section 6.1)."""
    words, wanted = (Counter(re.findall(r"\w+", t.lower())) for t in (text, reference))
    common = (words & wanted).total()
    return 2 * common / (words.total() + wanted.total()) if common else 0.0


def caption_results(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How well captions fit their own pictures, and how well other pictures': the control.

    Args:
      references: the true captions of each picture; the nearest counts.

    Returns:
      'token_f1', and 'shuffled_token_f1', the mean over all pictures that a caption isn't of.
    """
    f1_PP = np.array([[max(token_f1(c, r) for r in true) for true in references] for c in captions])
    own, count = float(np.trace(f1_PP)), len(captions)
    return {
        "token_f1": own / count,
        "shuffled_token_f1": float(f1_PP.sum() - own) / (count * (count - 1)),
    }


def drawing_results(model: SeedOPT, drawn_PQ: np.ndarray, embedded: Embeddings) -> dict[str, Any]:
    """How well drawings are found by the captions that they were drawn from, and find them.

    Args:
      drawn_PQ: codes, a row for each picture of `embedded`.
      embedded: the pictures' captions.
    """
    tokenizer, owner_C = model.tokenizer, embedded.picture_of_caption_C
    causal_PQD = tokenizer.reconstruct_causal(jnp.asarray(drawn_PQ))
    features_PE = np.asarray(tokenizer.image_features(causal_PQD))
    return retrieval.retrieval(features_PE, embedded.text_CE, owner_C) | {
        "chance_r10": retrieval.chance_recall(owner_C)
    }


def table(results: dict[str, Any]) -> str:
    """The figures of 'captions' and 'drawings', a line each."""
    captions, drawings = results["captions"], results["drawings"]
    found = (drawings["i2t"]["r10"] + drawings["t2i"]["r10"]) / 2
    return (
        f"captions    {captions['token_f1']:.3f} token F1, {captions['shuffled_token_f1']:.3f} for "
        f"captions of other pictures\n"
        f"drawings    {found:.3f} R@10 from codes to caption and back, by chance "
        f"{drawings['chance_r10']:.3f}"
    )
