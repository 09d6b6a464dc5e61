"""Group gaps: how differently a classifier treats the groups of a metadata column.

The rates of a group are computed by fairlearn's ``MetricFrame`` from functions of scikit-learn, fairlearn and
torchmetrics. Their bootstrap is our own: every rate is a ratio of sums over the rows of a group, so a
resample of the rows is a vector of weights, and one matrix product gives the sums of all resamples at once.
``MetricFrame`` draws and splits a table for each (67 ms for 2000 rows and four rates, more than a minute for
1000 resamples), and resamples across groups, in which a small group may be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_confidence, check_integer, listed
from mdnorm.metrics.columns import Categories, as_categories, as_column
from mdnorm.metrics.rates import ratio

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Gap", "GroupGaps", "GroupResult", "QuantileGroups", "Rate", "group_gaps", "quantile_groups"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Below this number of rows the rows of a group stand for few others, however often they are resampled.
_SMALL_GROUP = 20

# An interval needs this share of the resamples to have the rate defined.
_MIN_DEFINED = 0.9

# More groups than this are a continuous column, or identifiers.
_MAX_GROUPS = 100

# Weights of resamples that are in memory at once.
_CHUNK_ELEMENTS = 2**22

# Scores that are probabilities sum to 1 up to this.
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rate:
    """A rate with its bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the rate as values that JSON can hold."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class GroupResult:
    """The rates of one group.

    Attributes
    ----------
    group : object
        The value of the group column.
    num_rows : int
    label_counts : dict
        Label class -> rows.
    rates : dict of str to Rate
        See `group_gaps`.
    """

    group: Any
    num_rows: int
    label_counts: dict[Any, int]
    rates: dict[str, Rate]

    def to_dict(self) -> dict[str, Any]:
        """Return the rates as values that JSON can hold."""
        return {
            "group": self.group,
            "num_rows": self.num_rows,
            "label_counts": {str(label): count for label, count in self.label_counts.items()},
            "rates": {name: rate.to_dict() for name, rate in self.rates.items()},
        }


@dataclass(frozen=True)
class Gap:
    """The largest difference of a rate between two groups, with its bootstrap interval.

    Attributes
    ----------
    value, low, high : float or None
        None where fewer than two groups have the rate.
    lowest, highest : object
        The groups between which it is.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    lowest: Any = None
    highest: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return the gap as values that JSON can hold."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "lowest": self.lowest,
            "highest": self.highest,
        }


@dataclass(frozen=True)
class GroupGaps:
    """What `group_gaps` found.

    Attributes
    ----------
    groups : tuple of GroupResult
        In the order of the group column's values.
    gaps : dict of str to Gap
    classes : tuple
        The label classes.
    positive : object
        The positive class; None with more than two classes.
    num_rows : int
    confidence : float
    num_bootstrap : int
    notes : tuple of str
        Which rates are not defined, or rest on few rows.
    """

    groups: tuple[GroupResult, ...]
    gaps: dict[str, Gap]
    classes: tuple[Any, ...]
    positive: Any
    num_rows: int
    confidence: float
    num_bootstrap: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold."""
        return {
            "groups": [group.to_dict() for group in self.groups],
            "gaps": {name: gap.to_dict() for name, gap in self.gaps.items()},
            "classes": list(self.classes),
            "positive": self.positive,
            "num_rows": self.num_rows,
            "confidence": self.confidence,
            "num_bootstrap": self.num_bootstrap,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class QuantileGroups:
    """A continuous column in groups.

    Attributes
    ----------
    codes : (n,) int64
        The group of each row, a position in `names`.
    names : tuple of str
        The range of values of each group, in ascending order.
    counts : tuple of int
        Rows of each group.
    """

    codes: Integers
    names: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """The names, so that the groups keep their order where the object is passed as `groups`."""
        return self.names

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.names, dtype=dtype)[self.codes]

    def __len__(self) -> int:
        return int(self.codes.size)

    def to_dict(self) -> dict[str, Any]:
        """Return names and counts as values that JSON can hold."""
        return {"names": list(self.names), "counts": list(self.counts)}


def quantile_groups(values: Any, num_groups: int = 4) -> QuantileGroups:
    """Divide a continuous column into groups of about equally many rows, named by their range of values.

    Parameters
    ----------
    values : tensor, array, list or Series, (n,)
        Numbers, finite.
    num_groups : int
        At most; equal values stay in one group, so there may be fewer.

    Returns
    -------
    QuantileGroups
        To be passed as `groups` to `group_gaps`, or as an array of names.

    Raises
    ------
    TypeError
        Values that are not numbers; `num_groups` is not an integer.
    ValueError
        A wrong shape, NaN or infinite values, no rows; `num_groups` below 1.

    Examples
    --------
    >>> quantile_groups([20, 25, 31, 44, 52, 60, 61, 80]).names
    ('20–25', '31–44', '52–60', '61–80')
    """
    with requires("metrics"):
        import pandas as pd
    check_integer("num_groups", num_groups, 1)
    column = as_column(values, "values")
    if column.dtype.kind not in "biuf":
        raise TypeError(
            f"values must be numbers, got {column.dtype} such as {listed(column.tolist(), 1)}: pass a column "
            "of categories as groups as it is."
        )
    numbers = column.astype(np.float64)
    if np.unique(numbers).size <= num_groups:
        codes = np.unique(numbers, return_inverse=True)[1].reshape(-1)
    else:
        codes = np.asarray(pd.qcut(numbers, num_groups, labels=False, duplicates="drop"))
        codes = np.unique(codes, return_inverse=True)[1].reshape(-1)
    codes = codes.astype(np.int64)
    number = int(codes.max()) + 1
    limits = [(numbers[codes == code].min(), numbers[codes == code].max()) for code in range(number)]
    counts = tuple(int(count) for count in np.bincount(codes, minlength=number))
    return QuantileGroups(codes, _range_names(limits), counts)


def _range_names(limits: list[tuple[float, float]]) -> tuple[str, ...]:
    """Return "low–high" with as few digits as keep the limits apart; whole numbers in full."""
    distinct = sorted({limit for pair in limits for limit in pair})
    whole = all(value == round(value) and abs(value) < 1e15 for value in distinct)

    def text(value: float, digits: int) -> str:
        if whole:
            return str(round(value))
        rounded = float(f"{value:.{digits}g}")
        if rounded != 0 and not 1e-4 <= abs(rounded) < 1e15:
            return f"{value:.{digits}g}"
        return np.format_float_positional(rounded, trim="-")

    digits = next(
        (
            digits
            for digits in range(2, 17)
            if len({text(value, digits) for value in distinct}) == len(distinct)
        ),
        17,
    )
    names = []
    for low, high in limits:
        # A dash beside a minus sign cannot be read.
        dash = "–" if low >= 0 else " to "
        names.append(text(low, digits) if low == high else f"{text(low, digits)}{dash}{text(high, digits)}")
    return tuple(names)


def group_gaps(
    labels: Any,
    predictions: Any,
    groups: Any,
    *,
    scores: Tensor | ArrayLike | None = None,
    positive: Any = None,
    subjects: Any = None,
    confidence: float = 0.95,
    num_bootstrap: int = 1000,
    num_bins: int = 10,
    seed: int = 0,
) -> GroupGaps:
    """Compare what a classifier gets right, and what it gets wrong, between groups.

    Parameters
    ----------
    labels : array-like, (n,)
        The true classes, of any kind.
    predictions : array-like, (n,)
        The predicted classes, of the kind of `labels`.
    groups : array-like or QuantileGroups, (n,)
        The group of each row. Divide a continuous column with `quantile_groups` first.
    scores : tensor or array, (n,) or (n, number of classes), optional
        Predicted probabilities, for calibration: of the positive class, or one column for each class in the
        order of `GroupGaps.classes` (sorted).
    positive : object, optional
        The positive one of two classes. The default is 1 or True of 0 and 1 (or −1 and 1), False and True.
    subjects : array-like, (n,), optional
        Whose sample a row is, where subjects have several: they are resampled with all their rows of a group,
        since rows of the same subject say less than as many of others.
    confidence : float
        Of the bootstrap intervals, between 0 and 1.
    num_bootstrap : int
        Resamples of the rows of each group; 0 for no intervals.
    num_bins : int
        Bins of equal width for the expected calibration error.
    seed : int
        Of the resamples: the same seed gives the same result.

    Returns
    -------
    GroupGaps
        Rates of each group, and the gap of each (the largest difference between two groups).

        - ``accuracy``; ``balanced_accuracy`` (mean recall, of groups that have every class).
        - Two classes: ``true_positive_rate``, ``false_positive_rate``, ``positive_rate`` (share predicted
          positive). More: ``recall[class]`` of each.
        - With scores: ``calibration_error`` (expected calibration error; with more than two classes of the
          predicted class) and ``brier_score`` (mean squared error of the probabilities, summed over the
          classes where they are more than two).

        Gaps beside those of the rates: ``demographic_parity`` (of the positive rate) and ``equalized_odds``
        (the larger gap of true and false positive rate) for two classes, ``worst_recall`` (the largest gap of
        recall of any class) for more.

    Raises
    ------
    TypeError
        An argument is of the wrong type.
    ValueError
        A wrong shape, different numbers of rows, missing values, one class or one group only, more than 100
        groups, a positive class that is not a label or is not clear, scores that are not probabilities.
    MissingExtraError
        fairlearn or torchmetrics is not installed.

    Notes
    -----
    A rate that a group cannot have (a true positive rate without positives) is None with a note, and gaps are
    those of the other groups; fairlearn's own functions would take it as 0.

    Rows are resampled within groups. Intervals of rates are percentiles; those of the calibration error,
    which is larger in resamples than in the rows they come from, are moved down by the mean of this
    difference. An interval of a rate that fewer than 90 % of the resamples have (a group with one or two
    positives) is None.

    A largest difference is larger in samples than in the population, and larger again in resamples, so that
    its percentiles would exclude a gap of 0 where there is none. Its interval is therefore the gap plus or
    minus the quantile of the largest difference between groups of the resamples' *deviations*, as in Tukey's
    range test: the gap of the rates can be wrong by no more. It is conservative for a large gap between many
    groups.

    References
    ----------
    .. [1] Hardt, M., Price, E., & Srebro, N. (2016). Equality of opportunity in supervised learning. Advances
       in Neural Information Processing Systems 29.
    .. [2] Efron, B., & Tibshirani, R. J. (1993). An Introduction to the Bootstrap. Chapman & Hall.
    .. [3] Guo, C., Pleiss, G., Sun, Y., & Weinberger, K. Q. (2017). On calibration of modern neural networks.
       ICML.

    Examples
    --------
    >>> result = group_gaps([0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0, 0], list("aaaabbbb"))
    >>> gap = result.gaps["true_positive_rate"]
    >>> gap.value, gap.lowest, gap.highest
    (1.0, 'b', 'a')
    """
    with requires("metrics"):
        import fairlearn.metrics  # noqa: F401 - fails here rather than in the middle
        import torchmetrics  # noqa: F401
    _check_options(confidence, num_bootstrap, num_bins, seed)
    true = as_categories(labels, "labels")
    guessed = as_categories(predictions, "predictions")
    members = as_categories(groups, "groups")
    given = [("predictions", guessed), ("groups", members)]
    clusters: Integers | None = None
    if subjects is not None:
        owners = as_categories(subjects, "subjects")
        given.append(("subjects", owners))
        clusters = owners.codes
    for name, column in given:
        length = column.codes.size
        if length != true.codes.size:
            raise ValueError(
                f"labels and {name} must have one row per sample each, got {true.codes.size} rows in labels "
                f"and {length} in {name}: pass the same samples in the same order."
            )
    _check_groups(members)
    notes: list[str] = []
    problem = _problem(true, guessed, members, positive, notes)
    probabilities = None if scores is None else _probabilities(scores, problem)

    by_group = _point_values(problem, probabilities, num_bins)
    names = list(by_group)
    resampled = _resampled(problem, probabilities, names, num_bins, num_bootstrap, seed, clusters)
    _note_undefined(problem, by_group, notes)

    group_rates = tuple(
        GroupResult(
            group=group,
            num_rows=int(members.counts[index]),
            label_counts={
                name: int(((members.codes == index) & (problem.true == code)).sum())
                for code, name in enumerate(problem.classes)
            },
            rates={
                name: Rate(
                    _defined(by_group[name][index]),
                    *_interval(
                        by_group[name][index],
                        resampled[:, index, position],
                        confidence,
                        shifted=name == "calibration_error",
                    ),
                )
                for position, name in enumerate(names)
            },
        )
        for index, group in enumerate(members.names)
    )
    return GroupGaps(
        groups=group_rates,
        gaps=_gaps(problem, by_group, resampled, confidence),
        classes=problem.classes,
        positive=None if problem.positive is None else problem.classes[problem.positive],
        num_rows=int(true.codes.size),
        confidence=float(confidence),
        num_bootstrap=int(num_bootstrap),
        notes=tuple(notes),
    )


# --------------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Labels and predictions as codes (n,) into `classes`, groups as codes into `groups`."""

    true: Integers
    guessed: Integers
    members: Integers
    groups: tuple[Any, ...]
    classes: tuple[Any, ...]
    positive: int | None


def _check_options(confidence: float, num_bootstrap: int, num_bins: int, seed: int) -> None:
    check_confidence(confidence)
    for name, value, least in (
        ("num_bootstrap", num_bootstrap, 0),
        ("num_bins", num_bins, 1),
        ("seed", seed, 0),
    ):
        check_integer(name, value, least)


def _check_groups(members: Categories) -> None:
    if len(members.names) < 2:
        raise ValueError(f"groups must have at least two groups, got {members.names[0]!r} only.")
    if len(members.names) > _MAX_GROUPS:
        raise ValueError(
            f"groups has {len(members.names)} different values, at most {_MAX_GROUPS} can be compared: "
            "divide a continuous column with quantile_groups, merge rare groups."
        )


def _problem(
    true: Categories, guessed: Categories, members: Categories, positive: Any, notes: list[str]
) -> _Problem:
    if len(true.names) < 2 and positive is None:
        raise ValueError(
            f"labels must have at least two classes, got {true.names[0]!r} only: there is nothing to tell "
            "apart."
        )
    unknown = [name for name in guessed.names if name not in true.names]
    try:
        classes = tuple(sorted({*true.names, *unknown})) if unknown else true.names
    except TypeError as error:
        raise TypeError(
            f"labels and predictions must be of one kind, got {true.names[0]!r} in labels and {unknown[0]!r} "
            "in predictions."
        ) from error
    if unknown and not set(true.names) & set(guessed.names):
        raise ValueError(
            f"predictions and labels have no class in common, got {listed(guessed.names)} and "
            f"{listed(true.names)}: pass predicted classes, and probabilities as scores."
        )
    if unknown:
        notes.append(f"predictions has class(es) that no row has as its label: {listed(unknown)}.")
    code: int | None = None
    if positive is not None:
        if positive not in classes:
            raise ValueError(f"positive must be one of the classes {listed(classes)}, got {positive!r}.")
        if len(classes) > 2:
            raise ValueError(
                f"positive is for two classes, got {len(classes)} ({listed(classes)}): compare one with the "
                "rest by passing labels == positive and predictions == positive."
            )
        code = classes.index(positive)
    elif len(classes) == 2:
        if classes not in ((0, 1), (-1, 1)):
            raise ValueError(f"positive must name the positive one of the classes {listed(classes)}.")
        code = 1
    order = {name: index for index, name in enumerate(classes)}
    return _Problem(
        np.array([order[name] for name in true.names])[true.codes],
        np.array([order[name] for name in guessed.names])[guessed.codes],
        members.codes,
        members.names,
        classes,
        code,
    )


def _probabilities(scores: Tensor | ArrayLike, problem: _Problem) -> Floats:
    """Return the probability of the positive class (n,), or of all classes (n, C)."""
    array = as_real_tensor(scores, "scores").detach().cpu().double().numpy()
    num_rows, num_classes = problem.true.size, len(problem.classes)
    if array.shape == (num_rows, 1):
        array = array[:, 0]
    if array.shape != (num_rows, num_classes) and (array.shape != (num_rows,) or problem.positive is None):
        binary = "" if problem.positive is None else f"({num_rows},) or "
        raise ValueError(
            f"scores must have shape {binary}({num_rows}, {num_classes}), one row per sample and one column "
            f"for each of the classes {listed(problem.classes)}, got {array.shape}."
        )
    # Also true of NaN.
    bad = ~((array >= 0) & (array <= 1))
    if array.ndim == 2:
        bad = bad.any(axis=1) | ~(np.abs(array.sum(axis=1) - 1) <= _SUM_TOLERANCE)
    if bad.any():
        rows = bad.nonzero()[0].tolist()
        raise ValueError(
            f"scores must be probabilities, but row(s) {listed(rows)} ({len(rows)} of {num_rows} rows) are "
            "NaN, outside 0 to 1, or do not sum to 1: apply a sigmoid or softmax to logits, drop rows with "
            "NaN from every argument."
        )
    if array.ndim == 2 and problem.positive is not None:
        array = array[:, problem.positive]
    probabilities: Floats = array
    return probabilities


# --------------------------------------------------------------------------------------------------------
# Rates
# --------------------------------------------------------------------------------------------------------


def _point_values(problem: _Problem, probabilities: Floats | None, num_bins: int) -> dict[str, Floats]:
    """Return name -> (number of groups,), NaN where a rate is not defined."""
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
    from sklearn.metrics import accuracy_score, recall_score

    positive, num_classes = problem.positive, len(problem.classes)
    columns: Floats | None = probabilities

    def recall(code: int) -> Callable[[Integers, Integers], float]:
        def metric(true: Integers, guessed: Integers) -> float:
            if not (true == code).any():
                return float("nan")
            return float(recall_score(true, guessed, labels=[code], average=None)[0])

        return metric

    def balanced_accuracy(true: Integers, guessed: Integers) -> float:
        return float(np.mean([recall(code)(true, guessed) for code in range(num_classes)]))

    def true_positives(true: Integers, guessed: Integers) -> float:
        if not (true == positive).any():
            return float("nan")
        return float(true_positive_rate(true, guessed, pos_label=positive))

    def false_positives(true: Integers, guessed: Integers) -> float:
        if (true == positive).all():
            return float("nan")
        return float(false_positive_rate(true, guessed, pos_label=positive))

    def positives(true: Integers, guessed: Integers) -> float:
        return float(selection_rate(true, guessed, pos_label=positive))

    def calibration_error(true: Integers, guessed: Integers, rows: Integers) -> float:
        from torchmetrics.functional.classification import binary_calibration_error

        assert columns is not None
        # Of several classes the predicted one is right or wrong; the multiclass function rounds to float32.
        confidences, outcomes = _confidences(columns[rows.astype(np.int64)], np.asarray(true), positive)
        inputs = (
            torch.from_numpy(np.ascontiguousarray(confidences)),
            torch.from_numpy(outcomes.astype(np.int64)),
        )
        return float(binary_calibration_error(*inputs, n_bins=num_bins))

    def brier_score(true: Integers, guessed: Integers, rows: Integers) -> float:
        assert columns is not None
        return float(_squared_errors(columns[rows.astype(np.int64)], true, positive).mean())

    metrics: dict[str, Callable[..., float]] = {
        "accuracy": accuracy_score,
        "balanced_accuracy": balanced_accuracy,
    }
    if positive is not None:
        metrics["true_positive_rate"] = true_positives
        metrics["false_positive_rate"] = false_positives
        metrics["positive_rate"] = positives
    else:
        for code, name in enumerate(problem.classes):
            metrics[f"recall[{name}]"] = recall(code)
    rows = np.arange(problem.true.size)
    parameters: dict[str, dict[str, Integers]] = {}
    if columns is not None:
        metrics["calibration_error"] = calibration_error
        metrics["brier_score"] = brier_score
        parameters = {"calibration_error": {"rows": rows}, "brier_score": {"rows": rows}}
    frame = MetricFrame(
        metrics=metrics,
        y_true=problem.true,
        y_pred=problem.guessed,
        sensitive_features=problem.members,
        sample_params=parameters,
    )
    by_group = frame.by_group.sort_index()
    return {name: by_group[name].to_numpy(dtype=np.float64) for name in metrics}


def _confidences(
    probabilities: Floats, true: Integers, positive: int | None
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the probability of the positive, or of the likeliest, class (n,), and whether it is true."""
    if positive is not None:
        return probabilities, np.asarray(true == positive)
    return probabilities.max(axis=1), np.asarray(probabilities.argmax(axis=1) == true)


def _squared_errors(probabilities: Floats, true: Integers, positive: int | None) -> Floats:
    """Return the squared error of each row (n,), summed over classes where there are columns."""
    if positive is not None:
        errors: Floats = np.square(probabilities - (true == positive))
        return errors
    indicators = np.asarray(true)[:, None] == np.arange(probabilities.shape[1])
    summed: Floats = np.square(probabilities - indicators).sum(axis=1)
    return summed


def _row_sums(problem: _Problem, probabilities: Floats | None, num_bins: int) -> Floats:
    """Return columns (n, k) whose sums over rows give every rate: see `_rates_of_sums`."""
    num_classes = len(problem.classes)
    cells = problem.true * num_classes + problem.guessed
    parts = [(cells[:, None] == np.arange(num_classes**2)).astype(np.float64)]
    if probabilities is not None:
        confidences, outcomes = _confidences(probabilities, problem.true, problem.positive)
        # The bins of torchmetrics: closed below, and a bin of its own for 1.
        edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
        bins = torch.bucketize(torch.from_numpy(np.ascontiguousarray(confidences)), edges, right=True) - 1
        inside = bins.numpy()[:, None] == np.arange(num_bins + 1)
        parts.append(inside * (confidences - outcomes)[:, None])
        parts.append(_squared_errors(probabilities, problem.true, problem.positive)[:, None])
    return np.hstack(parts)


def _rates_of_sums(sums: Floats, problem: _Problem, names: list[str]) -> Floats:
    """Return the rates (B, number of names) of sums (B, k), NaN where one is not defined."""
    num_classes = len(problem.classes)
    table = sums[:, : num_classes**2].reshape(-1, num_classes, num_classes)
    total = table.sum(axis=(1, 2))
    recalls = ratio(np.einsum("bkk->bk", table), table.sum(axis=2))
    out = np.empty((sums.shape[0], len(names)))
    for position, name in enumerate(names):
        if name == "accuracy":
            out[:, position] = np.einsum("bkk->b", table) / total
        elif name == "balanced_accuracy":
            out[:, position] = recalls.mean(axis=1)
        elif name == "true_positive_rate":
            out[:, position] = recalls[:, problem.positive]
        elif name == "false_positive_rate":
            assert problem.positive is not None
            out[:, position] = 1 - recalls[:, 1 - problem.positive]
        elif name == "positive_rate":
            out[:, position] = table[:, :, problem.positive].sum(axis=1) / total
        elif name == "calibration_error":
            out[:, position] = np.abs(sums[:, num_classes**2 : -1]).sum(axis=1) / total
        elif name == "brier_score":
            out[:, position] = sums[:, -1] / total
        else:
            out[:, position] = recalls[:, [f"recall[{label}]" for label in problem.classes].index(name)]
    return out


def _resampled(
    problem: _Problem,
    probabilities: Floats | None,
    names: list[str],
    num_bins: int,
    num_bootstrap: int,
    seed: int,
    clusters: Integers | None,
) -> Floats:
    """Return the rates (num_bootstrap, number of groups, number of names) of resampled rows or clusters."""
    out = np.empty((num_bootstrap, len(problem.groups), len(names)))
    if num_bootstrap == 0:
        return out
    columns = _row_sums(problem, probabilities, num_bins)
    # A seed for each group, so that the others change nothing.
    seeds = np.random.SeedSequence(seed).spawn(len(problem.groups))
    for index, seed_sequence in enumerate(seeds):
        rng = np.random.default_rng(seed_sequence)
        inside = problem.members == index
        rows = columns[inside]
        if clusters is not None:
            # Every rate is of sums: those of a subject's rows stand for the subject.
            owners = np.unique(clusters[inside], return_inverse=True)[1].reshape(-1)
            totals = np.zeros((int(owners.max()) + 1, rows.shape[1]))
            np.add.at(totals, owners, rows)
            rows = totals
        size = rows.shape[0]
        step = max(1, _CHUNK_ELEMENTS // size)
        for start in range(0, num_bootstrap, step):
            num = min(step, num_bootstrap - start)
            drawn = rng.integers(size, size=(num, size))
            drawn += size * np.arange(num)[:, None]
            weights = np.bincount(drawn.reshape(-1), minlength=num * size).reshape(num, size)
            sums = weights.astype(np.float64) @ rows
            out[start : start + num, index] = _rates_of_sums(sums, problem, names)
    return out


# --------------------------------------------------------------------------------------------------------
# Intervals and gaps
# --------------------------------------------------------------------------------------------------------


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(
    value: float, resampled: Floats, confidence: float, *, shifted: bool
) -> tuple[float | None, float | None]:
    """Return the percentile interval, moved by the estimated bias where `shifted`; None without one."""
    if resampled.size == 0 or not np.isfinite(value):
        return None, None
    finite = np.isfinite(resampled)
    if finite.mean() < _MIN_DEFINED:
        return None, None
    resampled = resampled[finite]
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    if shifted:
        bias = max(0.0, float(resampled.mean()) - value)
        low, high = min(max(0.0, low - bias), value), max(high - bias, value)
    return float(low), float(high)


def _gaps(
    problem: _Problem, by_group: dict[str, Floats], resampled: Floats, confidence: float
) -> dict[str, Gap]:
    names = list(by_group)
    values = np.column_stack([by_group[name] for name in names])
    differences = _differences(values[None])[0]
    errors = _differences(_deviations(resampled, values))

    def gap(chosen: list[str]) -> Gap:
        defined = [names.index(name) for name in chosen if np.isfinite(differences[names.index(name)])]
        if not defined:
            return Gap(None)
        widest = max(defined, key=lambda position: differences[position])
        value = float(differences[widest])
        low, high = None, None
        # A resample without a rate that the rows have is NaN, and so is the maximum.
        largest = errors[:, defined].max(axis=1)
        finite = np.isfinite(largest)
        if finite.size and finite.mean() >= _MIN_DEFINED:
            error = float(np.quantile(largest[finite], confidence))
            low, high = max(0.0, value - error), value + error
            if names[widest] != "brier_score":
                high = min(1.0, high)
        column = values[:, widest]
        return Gap(
            value,
            low,
            high,
            lowest=problem.groups[int(np.nanargmin(column))],
            highest=problem.groups[int(np.nanargmax(column))],
        )

    gaps = {name: gap([name]) for name in names}
    if problem.positive is not None:
        gaps["demographic_parity"] = gap(["positive_rate"])
        gaps["equalized_odds"] = gap(["true_positive_rate", "false_positive_rate"])
    else:
        gaps["worst_recall"] = gap([name for name in names if name.startswith("recall[")])
    return gaps


def _deviations(resampled: Floats, values: Floats) -> Floats:
    """Return resampled rates (B, groups, names) less their mean; all NaN where a group has lost its rate."""
    if resampled.shape[0] == 0:
        return resampled
    finite = np.isfinite(resampled)
    lost = (~finite & np.isfinite(values)).any(axis=1, keepdims=True)
    means = ratio(np.where(finite, resampled, 0).sum(axis=0), finite.sum(axis=0).astype(np.float64))
    return np.where(lost, np.nan, resampled - means)


def _differences(rates: Floats) -> Floats:
    """Return the largest difference between groups, (B, names), of rates (B, groups, names).

    NaN where fewer than two groups have the rate.
    """
    finite = np.isfinite(rates)
    high = np.where(finite, rates, -np.inf).max(axis=1)
    low = np.where(finite, rates, np.inf).min(axis=1)
    enough = finite.sum(axis=1) >= 2
    differences: Floats = np.subtract(high, low, where=enough, out=np.full(high.shape, np.nan))
    return differences


def _note_undefined(problem: _Problem, by_group: dict[str, Floats], notes: list[str]) -> None:
    for index, group in enumerate(problem.groups):
        size = int((problem.members == index).sum())
        missing = [name for name, values in by_group.items() if not np.isfinite(values[index])]
        if missing:
            absent = [
                name
                for code, name in enumerate(problem.classes)
                if not (problem.true[problem.members == index] == code).any()
            ]
            notes.append(
                f"group {group!r} has no row of class(es) {listed(absent)}: {', '.join(missing)} not defined."
            )
        if size < _SMALL_GROUP:
            notes.append(f"group {group!r} has {size} row(s) only: its intervals are too narrow.")
