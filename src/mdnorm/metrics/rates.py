"""Rates of a group of rows, and what the interval of each is computed from; intervals of shares and of sums.

Nearly every rate is a share of rows, or a mean of such shares, so its interval is Wilson's, which is valid
for as few as ten rows and for shares of 0 and 1. Where subjects have several rows, or rows have weights, the
interval is that of fewer, independent rows. The calibration error is no share: its interval is a bootstrap's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Weights of resamples that are in memory at once.
_CHUNK_ELEMENTS = 2**22

# Of a sum of parts that are 1 together.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Rate:
    """A rate with its interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Problem:
    """Labels and predictions as codes (n,) into `classes`, groups as codes into `groups`, and the options."""

    true: Integers
    guessed: Integers
    members: Integers
    groups: tuple[Any, ...]
    classes: tuple[Any, ...]
    positive: int | None
    clusters: Integers | None
    weights: Floats
    num_bootstrap: int
    num_bins: int
    seed: int
    probabilities: Floats | None = None


@dataclass(frozen=True)
class Estimate:
    """A rate: a mean of shares with their numbers of independent rows, or a value with its error."""

    value: float
    shares: tuple[tuple[float, float], ...] = ()
    error: float | None = None
    freedom: float = np.inf
    bias: float = 0.0
    largest: float = 1.0

    def limits(self, confidence: float) -> tuple[float, float]:
        """Return the interval; where the error is not known, the whole range of the rate."""
        from scipy.special import stdtrit

        if self.shares:
            values = [share for share, _ in self.shares]
            intervals = [wilson(share, size, confidence) for share, size in self.shares]
            return combined(np.full(len(values), 1 / len(values)), values, intervals)
        if self.error is None:
            return 0.0, self.largest
        half = float(stdtrit(min(self.freedom, 1e9), (1 + confidence) / 2)) * self.error
        low, high = self.value - self.bias - half, self.value - self.bias + half
        return min(max(0.0, low), self.value), min(max(high, self.value), self.largest)

    def rate(self, confidence: float) -> Rate:
        """Return the rate with its interval."""
        if not np.isfinite(self.value):
            return Rate(None)
        return Rate(float(self.value), *self.limits(confidence))


def estimates(problem: Problem, inside: NDArray[np.bool_]) -> dict[str, Estimate]:
    """Return the rates of the rows that are `inside` by name; an undefined one is NaN."""
    true, guessed, positive = problem.true[inside], problem.guessed[inside], problem.positive
    weights, owners = problem.weights[inside], np.arange(inside.sum())
    if problem.clusters is not None:
        owners = np.unique(problem.clusters[inside], return_inverse=True)[1].reshape(-1)

    def share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Estimate:
        if not among.any():
            return Estimate(float("nan"))
        value = float(np.average(hits[among], weights=weights[among]))
        return Estimate(value, ((value, effective_rows(hits[among], owners[among], weights[among])),))

    everyone = np.ones(true.size, dtype=bool)
    recalls = [share(guessed == code, true == code) for code in range(len(problem.classes))]
    rates = {
        "accuracy": share(true == guessed, everyone),
        "balanced_accuracy": Estimate(
            float(np.mean([recall.value for recall in recalls])),
            tuple(part for recall in recalls for part in recall.shares),
        ),
    }
    if positive is None:
        rates |= {f"recall[{name}]": recalls[code] for code, name in enumerate(problem.classes)}
    else:
        rates["true_positive_rate"] = recalls[positive]
        rates["false_positive_rate"] = share(guessed == positive, true != positive)
        rates["positive_rate"] = share(guessed == positive, everyone)
    if problem.probabilities is not None:
        within = problem.probabilities[inside]
        rates["calibration_error"] = _calibration_error(within, true, weights, owners, problem)
        rates["brier_score"] = _brier_score(within, true, positive, weights, owners)
    return rates


def _calibration_error(
    probabilities: Floats, true: Integers, weights: Floats, owners: Integers, options: Problem
) -> Estimate:
    """Return the expected calibration error: ``Σ_bins |Σ rows w · (confidence − outcome)| / Σ w``."""
    if options.positive is not None:
        confidences, outcomes = probabilities, true == options.positive
    else:
        # Of several classes the likeliest one is right or wrong.
        confidences, outcomes = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    # Bins closed below, and one of its own for 1, as those of torchmetrics.
    edges = np.linspace(0, 1, options.num_bins + 1)
    columns = np.zeros((true.size, options.num_bins + 2))
    rows = np.arange(true.size)
    columns[rows, np.searchsorted(edges, confidences, side="right") - 1] = confidences - outcomes
    columns[:, -1] = 1
    # Every sum is of rows: those of a subject stand for the subject, and a row takes its weight along.
    totals = np.zeros((int(owners.max()) + 1, columns.shape[1]))
    np.add.at(totals, owners, columns * weights[:, None])

    def of_sums(sums: Floats) -> Floats:
        return np.asarray(np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1])

    value = float(of_sums(totals.sum(axis=0)))
    size = totals.shape[0]
    if options.num_bootstrap == 0 or size < 2:
        return Estimate(value)
    rng = np.random.default_rng(options.seed)
    resampled = np.empty(options.num_bootstrap)
    for chunk in np.array_split(resampled, 1 + options.num_bootstrap * size // _CHUNK_ELEMENTS):
        chunk[:] = of_sums(rng.multinomial(size, np.full(size, 1 / size), chunk.size) @ totals)
    bias = max(0.0, float(resampled.mean()) - value)
    return Estimate(value, error=float(resampled.std()), bias=bias)


def _brier_score(
    probabilities: Floats, true: Integers, positive: int | None, weights: Floats, owners: Integers
) -> Estimate:
    """Return the mean squared error of the probabilities, summed over classes where there are columns."""
    if positive is not None:
        errors: Floats = np.square(probabilities - (true == positive))
    else:
        errors = np.square(probabilities - np.eye(probabilities.shape[1])[true]).sum(axis=1)
    value = float(np.average(errors, weights=weights))
    sums = np.bincount(owners, weights * (errors - value))
    largest = 1.0 if positive is not None else 2.0
    if sums.size < 2:
        return Estimate(value)
    error = float(np.sqrt(np.square(sums / weights.sum()).sum() * sums.size / (sums.size - 1)))
    return Estimate(value, error=error, freedom=sums.size - 1, largest=largest)


# -- intervals --------------------------------------------------------------------------------------------


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
