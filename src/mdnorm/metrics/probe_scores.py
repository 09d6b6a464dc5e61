"""Scores of a probe, with intervals and p-values, over the folds of one set of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.metrics.columns import Categories
from mdnorm.metrics.probe_folds import CHUNK_ELEMENTS, Settings, UnusableError, folds, permutations
from mdnorm.metrics.probe_ridge import Basis, decisions, representations
from mdnorm.metrics.rates import combined, effective_rows, wilson
from mdnorm.plain import PlainResult

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Fewer rows say nothing about any target.
MIN_ROWS = 10


@dataclass(frozen=True)
class ProbeScore(PlainResult):
    """The score of a probe, by its `name` "r2" or "balanced_accuracy".

    The `value` is that on rows that were not trained on, larger is better; `chance` that of predictions that
    know nothing, 0 or 1 / number of classes; `low` to `high` the confidence interval of the score of this
    kind of probe, fitted to as many rows (another kind of probe may score higher). The `p_value` is the share
    of permuted targets that score as well, ``(1 + #) / (1 + num_permutations)``; `permutation_mean` and
    `permutation_high` are mean and 95 % quantile of their scores. The `tail_p_value` can be smaller, to
    correct for many tests: where fewer than a tenth of at least 100 permutations score as well, it is that of
    an exponential tail fitted to the best tenth. All four are None without permutations.
    """

    name: str
    value: float
    chance: float
    low: float
    high: float
    p_value: float | None = None
    permutation_mean: float | None = None
    permutation_high: float | None = None
    tail_p_value: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Scores (1 + N,) of the target, which is the first, and of its permutations."""

    name: str
    values: Floats
    chance: float
    interval: tuple[float, float]
    counts: Integers
    num_rows: int
    num_folds: int

    def score(self) -> ProbeScore:
        """Return the score of the target, compared with those of the permutations."""
        observed, permuted = float(self.values[0]), self.values[1:]
        score = ProbeScore(self.name, observed, self.chance, *self.interval)
        if permuted.size == 0:
            return score
        # Up to rounding: a permutation that changes nothing has to count.
        as_good = int((permuted >= observed - 1e-12 * max(1.0, abs(observed))).sum())
        p_value = (1 + as_good) / (1 + permuted.size)
        return replace(
            score,
            p_value=p_value,
            permutation_mean=float(permuted.mean()),
            permutation_high=float(np.quantile(permuted, 0.95)),
            tail_p_value=_tail_p_value(observed, permuted, p_value),
        )


def pooled(outcomes: list[Outcome]) -> ProbeScore | None:
    """Return the mean score over label classes, weighted by rows; these are independent samples."""
    if not outcomes:
        return None
    sizes = np.array([outcome.num_rows for outcome in outcomes], dtype=np.float64)
    weights = sizes / sizes.sum()
    values = np.stack([outcome.values for outcome in outcomes])
    return replace(
        outcomes[0],
        values=weights @ values,
        chance=float(weights @ [outcome.chance for outcome in outcomes]),
        interval=combined(weights, values[:, 0], [outcome.interval for outcome in outcomes]),
    ).score()


def _tail_p_value(observed: float, permuted: Floats, p_value: float) -> float:
    """Return the p-value from an exponential tail through the best tenth of the permuted scores.

    Knijnenburg, T. A., Wessels, L. F. A., Reinders, M. J. T., & Shmulevich, I. (2009). Fewer permutations,
    more accurate P-values. Bioinformatics, 25(12), i161–i168.
    """
    number = permuted.size // 10
    # Few different scores mean few ways to permute: there is no tail to fit.
    if number < 10 or np.unique(permuted).size < permuted.size // 2:
        return p_value
    best = np.sort(permuted)[-number - 1 :]
    excess = float((best[1:] - best[0]).mean())
    if observed <= best[0] or excess <= 0:
        return p_value
    return float(number / permuted.size * np.exp(-(observed - best[0]) / excess))


def probe_rows(
    rows: Floats,
    values: Floats | Integers,
    classes: Categories | None,
    labels: Integers | None,
    subjects: Integers | None,
    settings: Settings,
    notes: list[str],
) -> Outcome:
    """Probe these rows: all of them, or those of one label class."""
    num_rows = rows.shape[0]
    if num_rows < MIN_ROWS:
        raise UnusableError(f"it has {num_rows} rows, {MIN_ROWS} are needed.")
    fold = folds(values, classes, labels, subjects, settings, notes)
    num_folds = int(fold.max()) + 1
    orders = permutations(fold, labels, subjects, settings)
    counts = np.zeros(0, dtype=np.int64)
    present = np.zeros(0, dtype=np.int64)
    if classes is not None:
        counts = np.bincount(values.astype(np.int64), minlength=len(classes.names))
        present, codes = np.unique(values, return_inverse=True)
        values = codes.reshape(-1)
    num_targets = orders.shape[1]
    scorer = _RegressionScores(num_targets) if classes is None else _ClassScores(num_targets, present.size)
    width = max(1, present.size - 1)
    step = max(1, CHUNK_ELEMENTS // (num_rows * width))
    chunks = [slice(start, start + step) for start in range(0, orders.shape[1], step)]

    for index in range(num_folds):
        train, test = (fold != index).nonzero()[0], (fold == index).nonzero()[0]
        bases = [
            Basis(z_train, z_test, None if subjects is None else subjects[train])
            for z_train, z_test in representations(rows[train], rows[test], settings)
        ]
        for columns in chunks:
            targets = values[orders[:, columns]]
            coded = targets[train][:, :, None]
            if classes is not None:
                # The indicator of the last class is what the others leave of 1.
                coded = coded == np.arange(width)
            coded = coded.astype(np.float64)
            fits = zip(*(basis.fit(coded) for basis in bases), strict=True)
            errors, *fitted = map(np.stack, fits)
            # For each target the representation with the smallest left-out error.
            best, target = errors.argmin(axis=0), np.arange(errors.shape[1])
            predicted, left_out = (np.moveaxis(part[best, :, target], 0, 1) for part in fitted)
            scorer.add(columns, predicted, left_out, targets[train], targets[test])
    # Of the target itself, the rows are in the order of their folds.
    order = np.argsort(fold, kind="stable")
    owners = order if subjects is None else subjects[order]
    # The folds share training rows, so that their scores vary together (Nadeau & Bengio 2003).
    interval = scorer.interval(owners, settings.confidence, 1 + num_folds / (num_folds - 1))
    return Outcome(scorer.name, scorer.values(), scorer.chance, interval, counts, num_rows, num_folds)


class _RegressionScores:
    """Collects R² over folds."""

    name, chance = "r2", 0.0

    def __init__(self, num_targets: int) -> None:
        self.errors = np.zeros(num_targets)
        self.totals = np.zeros(num_targets)
        self.observed: list[Floats] = []

    def add(
        self, columns: slice, predicted: Floats, left_out: Floats, train: NDArray[Any], test: NDArray[Any]
    ) -> None:
        centred = test - train.mean(axis=0)
        self.errors[columns] += np.square(centred - predicted[:, :, 0]).sum(axis=0)
        self.totals[columns] += np.square(centred).sum(axis=0)
        if columns.start == 0:
            self.observed.append(np.column_stack([centred[:, 0], predicted[:, 0, 0]]))

    def interval(self, owners: Integers, confidence: float, inflation: float) -> tuple[float, float]:
        """Return the interval of ``1 − Σ errors / Σ totals``, a ratio of sums over independent owners.

        A probe that finds nothing predicts the mean, and its R² hardly varies: the interval would be too
        narrow. So the upper limit is at least the square of the upper limit of the correlation between
        prediction and target (Fisher's interval), which does not depend on how far predictions are shrunken.
        """
        from scipy.special import ndtri, stdtrit

        target, predicted = np.concatenate(self.observed).T
        errors, totals = np.square(target - predicted), np.square(target)
        share = errors.sum() / totals.sum()
        codes = np.unique(owners, return_inverse=True)[1].reshape(-1)
        sums = np.bincount(codes, errors - share * totals)
        spread = np.sqrt(inflation * np.square(sums).sum() * sums.size / (sums.size - 1)) / totals.sum()
        high = 1 - share + stdtrit(sums.size - 1, (1 + confidence) / 2) * spread
        low = 2 * (1 - share) - high
        # Folds differ in their means, which is no correlation.
        target, predicted = np.concatenate([part - part.mean(axis=0) for part in self.observed]).T
        length = np.sqrt(np.square(predicted).sum() * np.square(target).sum())
        correlation = np.clip(predicted @ target / length, 0, 1 - 1e-12) if length > 0 else 0.0
        largest = np.arctanh(correlation) + ndtri((1 + confidence) / 2) / np.sqrt(
            max(1, sums.size / inflation - 3)
        )
        return float(low), min(1.0, float(max(high, np.tanh(largest) ** 2)))

    def values(self) -> Floats:
        scores: Floats = 1 - self.errors / self.totals
        return scores


class _ClassScores:
    """Collects balanced accuracy over folds."""

    name = "balanced_accuracy"

    def __init__(self, num_targets: int, num_classes: int) -> None:
        self.num_classes, self.chance = num_classes, 1 / num_classes
        self.rows = np.zeros((num_targets, num_classes))
        self.hits = np.zeros((num_targets, num_classes))
        self.observed: list[Integers] = []

    def add(
        self, columns: slice, predicted: Floats, left_out: Floats, train: NDArray[Any], test: NDArray[Any]
    ) -> None:
        scores = np.concatenate([predicted, -predicted.sum(axis=2, keepdims=True)], axis=2)
        decided = decisions(scores, train, left_out)
        if columns.start == 0:
            self.observed.append(np.column_stack([test[:, 0], decided[:, 0]]))
        for code in range(self.num_classes):
            inside = test == code
            self.rows[columns, code] += inside.sum(axis=0)
            self.hits[columns, code] += (inside & (decided == code)).sum(axis=0)

    def interval(self, owners: Integers, confidence: float, inflation: float) -> tuple[float, float]:
        """Return the interval of the mean of the recalls, each a share of the rows of a class."""
        true, decided = np.concatenate(self.observed).T
        recalls, limits = [], []
        for code in range(self.num_classes):
            hits = decided[true == code] == code
            recalls.append(float(hits.mean()))
            size = effective_rows(hits, owners[true == code]) / inflation
            limits.append(wilson(recalls[-1], size, confidence))
        mean = np.full(self.num_classes, 1 / self.num_classes)
        return combined(mean, recalls, limits)

    def values(self) -> Floats:
        # A permutation that exchanges subjects may leave a class without rows.
        recalls = np.where(self.rows > 0, self.hits / np.maximum(self.rows, 1), np.nan)
        return np.asarray(np.nanmean(recalls, axis=1))
