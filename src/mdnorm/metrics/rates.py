"""Intervals of shares, and of sums of independent estimates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

# Of a sum of parts that are 1 together.
_ROUNDING = 1e-13


def wilson(share: float, size: float, confidence: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `size` rows, which need not be a whole number.

    Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference. Journal of the
    American Statistical Association, 22(158), 209–212.
    """
    from scipy.special import ndtri

    squared = float(ndtri((1 + confidence) / 2)) ** 2
    middle = (share + squared / (2 * size)) / (1 + squared / size)
    half = np.sqrt(squared * (share * (1 - share) / size + squared / (4 * size**2))) / (1 + squared / size)
    # Rounding must not move a limit to the other side of the share, or beyond 0 and 1.
    return min(max(0.0, float(middle - half)), share), max(min(1.0, float(middle + half)), share)


def effective_size(weights: NDArray[np.float64] | Tensor) -> float:
    """Return as how many samples of equal weight these count (Kish)."""
    scaled = weights / weights.max()  # squares of tiny ones could vanish
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def effective_rows(
    hits: NDArray[np.bool_], owners: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> float:
    """Return how many independent rows would give a share with the same standard error as these hits (n,).

    Rows of one subject, by `owners` (n,), are alike. The number is ``p (1 − p) / v`` with the linearised
    variance v of a ratio of sums over subjects (Kish's design effect), at most the effective number of rows.
    Where all hits are equal, it is that of the subjects, by their mean weights.
    """
    subjects = np.unique(owners, return_inverse=True)[1].reshape(-1)
    weights = np.ones(hits.size) if weights is None else weights
    number, size, share = int(subjects.max()) + 1, effective_size(weights), np.average(hits, weights=weights)
    if number == hits.size:
        return size
    sums = np.bincount(subjects, weights * (hits - share)) / weights.sum()
    variance = float(np.square(sums).sum()) * number / max(1, number - 1)
    # Of one subject, or of subjects that all have the same share, the sums are 0 but for rounding.
    if np.abs(sums).max() < _ROUNDING or hits.all() or not hits.any():
        return effective_size(np.bincount(subjects, weights) / np.bincount(subjects))
    return float(np.clip(share * (1 - share) / variance, 1, size))


def combined(
    weights: NDArray[np.float64], values: ArrayLike, intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Return the interval of ``Σ weights · values`` from those of the independent values (Zou & Donner 2008).

    Their reference is in `mdnorm.metrics.group_gaps`.
    """
    middle, limits = np.asarray(values, np.float64), np.asarray(intervals, np.float64)
    below = weights * (middle - np.where(weights > 0, limits[:, 0], limits[:, 1]))
    above = weights * (np.where(weights > 0, limits[:, 1], limits[:, 0]) - middle)
    value = float(weights @ middle)
    return value - float(np.sqrt(np.square(below).sum())), value + float(np.sqrt(np.square(above).sum()))
