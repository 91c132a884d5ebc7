"""Image-text retrieval as Table 1 of the paper measures it: pure functions on arrays.

Shapes: P pictures, C captions, M queries, G gallery items, E contrastive width.
"""

import numpy as np

KS = (1, 5, 10)


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
    places_G = np.arange(len(gallery_GE))
    ranks = []
    for start in range(0, len(query_ME), block):
        rows = slice(start, start + block)
        similarity_MG = query_ME[rows] @ gallery_GE.T
        similarity_MG = np.nan_to_num(similarity_MG, nan=np.finfo(similarity_MG.dtype).min)
        relevant_MG = query_label_M[rows, None] == gallery_label_G[None]
        hit_M1 = np.argmax(np.where(relevant_MG, similarity_MG, -np.inf), axis=1)[:, None]
        hit_similarity_M1 = np.take_along_axis(similarity_MG, hit_M1, axis=1)
        ahead_MG = (similarity_MG > hit_similarity_M1) | (
            (similarity_MG == hit_similarity_M1) & (places_G[None] < hit_M1)
        )
        ranks.append(ahead_MG.sum(axis=1))
    return np.concatenate(ranks)


def recalls(ranks_M: np.ndarray) -> dict[str, float]:
    """R@1, R@5 and R@10 as fractions: how often the first hit is among the best k."""
    return {f"r{k}": float(np.mean(ranks_M < k)) for k in KS}


def retrieval(
    image_PE: np.ndarray, text_CE: np.ndarray, picture_of_caption_C: np.ndarray
) -> dict[str, dict[str, float] | float]:
    """Recall both ways and R@mean, the mean of all six.

    A picture is found when any of its captions is among the best k; each caption is a query of
    its own, as is the custom on COCO and Flickr30K.

    Args:
      picture_of_caption_C: int, the row in `image_PE` that each caption belongs to.
    """
    pictures_P = np.arange(len(image_PE))
    i2t = recalls(first_hit_ranks(image_PE, text_CE, pictures_P, picture_of_caption_C))
    t2i = recalls(first_hit_ranks(text_CE, image_PE, picture_of_caption_C, pictures_P))
    return {"i2t": i2t, "t2i": t2i, "mean": float(np.mean([*i2t.values(), *t2i.values()]))}


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
