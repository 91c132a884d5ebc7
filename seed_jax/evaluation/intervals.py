"""Bootstrapped 95 % intervals: how far a figure would move with other pictures of the same kind.

Pictures are drawn again with replacement, each with all that belongs to it (its captions, its
questions), and the figure is computed anew. A suite writes its figures as one function of how often
each picture was drawn, so that a figure and its interval cannot come from two formulas.

Shapes: R resamples, P pictures.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

RESAMPLES = 1000
AT_ONCE = 50
LEVEL = 0.95
NORMAL = 1.959964  # deviations from the mean between which 95 % of a normal distribution lie
SEED = 0

# Figures by name, nested as one likes; each leaf float [R].
Measure = Callable[[np.ndarray], dict[str, Any]]


def with_intervals(
    measure: Measure, pictures: int, *, resamples: int = RESAMPLES, normal: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and their intervals.

    Args:
      measure: weights float64 [R, P], how often each picture counts, to figures.
      normal: figure ± 1.96 standard deviations of the resampled ones, for figures that resampling
        itself moves (fewer different pictures use fewer codes); otherwise quantiles.

    Returns:
      Figures as floats, each picture counted once, and the same names with [low, high]. A figure
      that a resample leaves undefined (NaN) goes without that resample.
    """
    figures = jax.tree.map(lambda value: float(value[0]), measure(np.ones((1, pictures))))
    rng = np.random.default_rng(SEED)
    drawn = []
    for start in range(0, resamples, AT_ONCE):
        size = min(AT_ONCE, resamples - start)
        weights_RP = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=size)
        drawn.append(measure(weights_RP.astype(np.float64)))

    def interval(figure: float, *parts: np.ndarray) -> list[float]:
        values_R = np.concatenate(parts)
        if np.isnan(figure) or np.isnan(values_R).all():
            return [float("nan"), float("nan")]
        if normal:
            half = NORMAL * float(np.nanstd(values_R))
            return [figure - half, figure + half]
        tail = (1 - LEVEL) / 2
        return np.nanquantile(values_R, [tail, 1 - tail]).tolist()

    return figures, jax.tree.map(interval, figures, *drawn)


def of_means(values: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means over the pictures, by name, and their intervals; see `with_intervals`.

    Args:
      values: float [P], one a picture.
    """
    pictures = len(next(iter(values.values())))
    return with_intervals(
        lambda weights_RP: {name: mean(weights_RP, each_P) for name, each_P in values.items()},
        pictures,
    )


def mean(weights_RP: np.ndarray, sums_P: np.ndarray, counts_P: np.ndarray | None = None) -> Any:
    """The mean over whatever pictures have several of, float [R]; NaN where none was drawn.

    Args:
      sums_P: each picture's sum, `counts_P` of how many (None: of one each).
    """
    counts_P = np.ones(len(sums_P)) if counts_P is None else counts_P
    with np.errstate(invalid="ignore"):
        return (weights_RP @ sums_P) / (weights_RP @ counts_P)
