"""Group gaps: how differently a classifier treats the groups of a metadata column.

The rates and their intervals are those of `mdnorm.metrics.rates`. The interval of a difference is put
together from those of the two groups (Newcombe 1998; Zou & Donner 2008).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.arrays import as_real_tensor, check_same_order, checked_weights
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_confidence, check_integer, check_same_rows
from mdnorm.metrics.columns import Categories, as_categories, as_column
from mdnorm.metrics.rates import Estimate, Problem, Rate, combined, estimates
from mdnorm.metrics.samples import Weights
from mdnorm.plain import PlainResult
from mdnorm.text import listed

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

# More groups than this are a continuous column, or identifiers.
_MAX_GROUPS = 100

# Scores that are probabilities sum to 1 up to this.
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class GroupResult:
    """The `rates` of one group, by the names that `group_gaps` lists.

    `group` is the value of the group column, `num_rows` the number of its rows, `label_counts` gives the rows
    of each label class, and a group that `is_small` has too few rows to be compared.
    """

    group: Any
    num_rows: int
    label_counts: dict[Any, int]
    rates: dict[str, Rate]
    is_small: bool = False


@dataclass(frozen=True)
class Difference:
    """How much a rate, by its name `rate`, differs between the groups `lower` and `higher`.

    The `value` is the rate of `higher` minus that of `lower`. Its interval from `low` to `high` is
    simultaneous: it holds for all pairs of groups at once.
    """

    rate: str
    value: float
    low: float
    high: float
    lower: Any
    higher: Any


@dataclass(frozen=True)
class Gap:
    """How much a rate differs between groups.

    The `value` is the difference of the pair of groups whose interval has the largest lower limit (of several
    pairs, the largest difference), None where fewer than two groups can be compared; `low` and `high` are the
    limits of its interval, which holds for all pairs at once, `lowest` and `highest` the two groups. The
    `bound` is the largest upper limit of all pairs: no two groups differ by more. The `rate` is the name of
    the rate; the gap in several rates is the gap in one of them.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    lowest: Any = None
    highest: Any = None
    bound: float | None = None
    rate: str | None = None


@dataclass(frozen=True)
class GroupGaps(PlainResult):
    """What `group_gaps` found.

    The `groups` are in the order of the group column's values, `gaps` has the gap of each rate by its name,
    and `pairs` the difference of each pair of groups that are large enough. `classes` are the label classes,
    and `positive` is the positive one of two, None of more. The `notes` say which rates are not defined, and
    which groups are too small to be compared.
    """

    groups: tuple[GroupResult, ...]
    gaps: dict[str, Gap]
    pairs: dict[str, tuple[Difference, ...]] = field(repr=False)
    classes: tuple[Any, ...]
    positive: Any
    num_rows: int
    confidence: float
    min_group_rows: int
    notes: tuple[str, ...] = ()


def group_gaps(
    labels: Any,
    predictions: Any,
    groups: Any,
    *,
    scores: Tensor | ArrayLike | None = None,
    positive: Any = None,
    subjects: Any = None,
    weights: Weights = None,
    confidence: float = 0.95,
    min_group_rows: int = 20,
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
    groups : array-like, (n,)
        The group of each row. Divide a continuous column with `quantile_groups` first.
    scores : tensor or array, (n,) or (n, number of classes), optional
        Predicted probabilities, for calibration: of the positive class, or one column for each class in the
        order of `GroupGaps.classes` (sorted).
    positive : object, optional
        Which of two classes is positive. Default: 1 where they are 0 and 1 or −1 and 1, True of booleans.
    subjects : array-like, (n,), optional
        The subject of each row, where subjects have several rows: intervals are then wider, since rows of the
        same subject carry less information than independent ones.
    weights : array-like, (n,), optional
        Of the rows, such as those of `mdnorm.balancing_weights`: finite, not negative, not all 0. Only their
        ratios matter: rates are shares of the weight, as of `sample_weight=` in scikit-learn. A row of weight
        0 might as well be left out. Rows are counted without weights.
    confidence : float
        Confidence level of the intervals, between 0 and 1.
    min_group_rows : int
        Smaller groups get rates but are not compared: they can neither cause a gap nor hide one.
    num_bootstrap, seed : int
        Resamples for the interval of the calibration error (0 for none), and their seed.
    num_bins : int
        Bins of equal width for the expected calibration error.

    Returns
    -------
    GroupGaps
        Rates of each group, and how far they are apart.

        - ``accuracy``; ``balanced_accuracy`` (mean recall, of groups that have every class).
        - Two classes: ``true_positive_rate``, ``false_positive_rate``, ``positive_rate`` (share predicted
          positive). More: ``recall[class]`` of each.
        - With scores: ``calibration_error`` (expected calibration error; with more than two classes of the
          predicted class) and ``brier_score`` (mean squared error of the probabilities, summed over the
          classes where they are more than two).

        Gaps beside those of the rates: ``demographic_parity`` (of the positive rate) and ``equalized_odds``
        (of the true and false positive rates together) for two classes, ``worst_recall`` (of the recalls of
        all classes together) for more.

    Raises
    ------
    TypeError, ValueError
        A wrong type or shape, different numbers of rows, missing values, one class or one group only, more
        than 100 groups, predictions that are no class of the labels or no whole numbers (probabilities), a
        positive class that is not a label or is not clear, scores that are not probabilities, weights that
        are negative, NaN or infinite, or all 0.
    MissingExtraError
        SciPy is not installed.

    Notes
    -----
    A rate that a group cannot have (a true positive rate without positives) is None with a note, and gaps are
    those of the other groups.

    Intervals of shares are Wilson's; with `subjects`, of the number of independent rows with the same
    standard error (the design effect of the linearised variance). With weights the number of rows of a share
    is the effective one, ``(Σ w)² / Σ w²`` of the rows that it is a share of, the weights taken as known.
    Intervals of means of shares and of differences are combined from these (Newcombe's hybrid score interval
    [2]_, [3]_). Those of differences have the confidence ``1 − (1 − confidence) / number of pairs``, so that
    they hold for all pairs at once (Bonferroni) and the largest lower limit is a lower limit of the largest
    difference. The interval of the Brier score is Student's. The interval of the calibration error is normal,
    with the standard error of the bootstrap; since the error is larger in resamples than in the data, the
    interval is moved down by the mean difference.

    References
    ----------
    .. [1] Hardt, M., Price, E., & Srebro, N. (2016). Equality of opportunity in supervised learning. Advances
       in Neural Information Processing Systems 29.
    .. [2] Newcombe, R. G. (1998). Interval estimation for the difference between independent proportions:
       comparison of eleven methods. Statistics in Medicine, 17(8), 873–890.
    .. [3] Zou, G. Y., & Donner, A. (2008). Construction of confidence limits about effect measures: a general
       approach. Statistics in Medicine, 27(10), 1693–1702.
    .. [4] Guo, C., Pleiss, G., Sun, Y., & Weinberger, K. Q. (2017). On calibration of modern neural networks.
       ICML.

    Examples
    --------
    >>> result = group_gaps([0, 1] * 40, [0, 1] * 20 + [0, 0] * 20, ["a"] * 40 + ["b"] * 40)
    >>> gap = result.gaps["true_positive_rate"]
    >>> gap.value, gap.lowest, gap.highest, round(gap.low, 2)
    (1.0, 'b', 'a', 0.77)
    """
    check_confidence(confidence)
    check_integer("min_group_rows", min_group_rows, 1)
    check_integer("num_bootstrap", num_bootstrap, 0)
    check_integer("num_bins", num_bins, 1)
    check_integer("seed", seed, 0)
    given = {"labels": labels, "predictions": predictions, "groups": groups, "subjects": subjects}
    check_same_order(**given, scores=scores, weights=weights)
    columns, weight, kept = _columns(given, weights)
    true, guessed, members = columns["labels"], columns["predictions"], columns["groups"]
    notes: list[str] = []
    classes, positive_code = _classes(true, guessed, positive, notes)
    true_codes, guessed_codes = (
        np.array([classes.index(name) for name in column.names])[column.codes] for column in (true, guessed)
    )
    problem = Problem(
        true_codes,
        guessed_codes,
        members.codes,
        members.names,
        classes,
        positive_code,
        None if subjects is None else columns["subjects"].codes,
        weight,
        num_bootstrap,
        num_bins,
        seed,
        None if scores is None else _probabilities(scores, classes, positive_code, kept),
    )
    rates = [estimates(problem, members.codes == code) for code in range(len(members.names))]
    _note_undefined(problem, rates, min_group_rows, notes)
    large = [code for code in range(len(members.names)) if members.counts[code] >= min_group_rows]
    groups_of = [(problem.groups[code], rates[code]) for code in large]
    pairs = {name: tuple(_pairs(name, groups_of, confidence)) for name in rates[0]}
    return GroupGaps(
        groups=tuple(
            GroupResult(
                group=group,
                num_rows=int(members.counts[code]),
                label_counts={
                    name: int(((members.codes == code) & (problem.true == k)).sum())
                    for k, name in enumerate(problem.classes)
                },
                rates={name: estimate.rate(confidence) for name, estimate in rates[code].items()},
                is_small=code not in large,
            )
            for code, group in enumerate(members.names)
        ),
        gaps=_gaps(pairs, groups_of, confidence, problem),
        pairs=pairs,
        classes=problem.classes,
        positive=None if problem.positive is None else problem.classes[problem.positive],
        num_rows=int(true.codes.size),
        confidence=float(confidence),
        min_group_rows=int(min_group_rows),
        notes=tuple(notes),
    )


# -- inputs -----------------------------------------------------------------------------------------------


def _columns(
    given: Mapping[str, Any], weights: Weights
) -> tuple[dict[str, Categories], Floats, NDArray[np.bool_]]:
    """Return columns and weights, at most 1, of the rows of a weight above 0, and which rows these are."""
    columns = {
        name: as_categories(values, name)
        for name, values in given.items()
        if name != "subjects" or values is not None
    }
    num_rows = len(columns["labels"].codes)
    for name, column in columns.items():
        check_same_rows(**{"labels": num_rows, name: len(column.codes)})
    weight = np.ones(num_rows)
    if weights is not None:
        weight = checked_weights(weights, num_rows, torch.from_numpy(weight)).numpy()
        if not weight.any():
            raise ValueError("weights must be above 0 in some row, got 0 in all.")
        weight = weight / weight.max()
    kept = weight > 0
    columns = {name: column.of_rows(kept) for name, column in columns.items()}
    names = columns["groups"].names
    if len(names) < 2:
        raise ValueError(f"groups must have at least two groups, got {names[0]!r} only.")
    if len(names) > _MAX_GROUPS:
        raise ValueError(
            f"groups has {len(names)} different values, at most {_MAX_GROUPS} can be compared: "
            "divide a continuous column with quantile_groups, merge rare groups."
        )
    return columns, weight[kept], kept


def _classes(
    true: Categories, guessed: Categories, positive: Any, notes: list[str]
) -> tuple[tuple[Any, ...], int | None]:
    """Return the classes of labels and predictions, and the position of the positive one of two."""
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
    # Probabilities that reach 0 or 1 have classes in common with the labels.
    fractions = [name for name in unknown if isinstance(name, float) and not name.is_integer()]
    if fractions or (unknown and not set(true.names) & set(guessed.names)):
        raise ValueError(
            f"predictions hold {listed(fractions or unknown)}, but the labels are only "
            f"{listed(true.names)}: pass predicted classes, and probabilities as scores."
        )
    if unknown:
        notes.append(f"predictions has class(es) that no row has as its label: {listed(unknown)}.")
    if positive is not None:
        if positive not in classes:
            raise ValueError(f"positive must be one of the classes {listed(classes)}, got {positive!r}.")
        if len(classes) > 2:
            raise ValueError(
                f"positive is for two classes, got {len(classes)} ({listed(classes)}): compare one with the "
                "rest by passing labels == positive and predictions == positive."
            )
        return classes, classes.index(positive)
    if len(classes) != 2:
        return classes, None
    if classes not in ((0, 1), (-1, 1)):
        raise ValueError(f"positive must name the positive one of the classes {listed(classes)}.")
    return classes, 1


def _probabilities(
    scores: Tensor | ArrayLike, classes: tuple[Any, ...], positive: int | None, kept: NDArray[np.bool_]
) -> Floats:
    """Return the probability of the positive class (n,), or of all classes (n, C)."""
    array: Floats = as_real_tensor(scores, "scores").detach().cpu().double().numpy()
    num_rows, num_classes = kept.size, len(classes)
    if array.shape == (num_rows, 1):
        array = array[:, 0]
    if array.shape != (num_rows, num_classes) and (array.shape != (num_rows,) or positive is None):
        binary = "" if positive is None else f"({num_rows},) or "
        raise ValueError(
            f"scores must have shape {binary}({num_rows}, {num_classes}), one row per sample and one column "
            f"for each of the classes {listed(classes)}, got {array.shape}."
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
    if array.ndim == 2 and positive is not None:
        array = array[:, positive]
    return array[kept]


# -- differences ------------------------------------------------------------------------------------------

_Groups = list[tuple[Any, dict[str, Estimate]]]


def _pairs(rate: str, groups: _Groups, confidence: float, num_rates: int = 1) -> Iterator[Difference]:
    """Yield the difference between each two groups; intervals hold for all pairs of `num_rates` at once."""
    defined = [(name, rates[rate]) for name, rates in groups if np.isfinite(rates[rate].value)]
    num_pairs = max(1, len(defined) * (len(defined) - 1) // 2) * num_rates
    confidence = 1 - (1 - confidence) / num_pairs
    for pair in combinations(defined, 2):
        (lower, low), (higher, high) = sorted(pair, key=lambda item: item[1].value)
        limits = combined(
            np.array([-1.0, 1.0]), [low.value, high.value], [low.limits(confidence), high.limits(confidence)]
        )
        yield Difference(rate, high.value - low.value, *limits, lower=lower, higher=higher)


def _gaps(
    pairs: Mapping[str, tuple[Difference, ...]], groups: _Groups, confidence: float, problem: Problem
) -> dict[str, Gap]:
    def gap(differences: Iterable[Difference]) -> Gap:
        tried = list(differences)
        if not tried:
            return Gap(None)
        best = max(tried, key=lambda pair: (max(0.0, pair.low), pair.value))
        bound = max(pair.high for pair in tried)
        return Gap(best.value, max(0.0, best.low), best.high, best.lower, best.higher, bound, best.rate)

    gaps = {name: gap(differences) for name, differences in pairs.items()}
    together = ["true_positive_rate", "false_positive_rate"]
    if problem.positive is None:
        together = [name for name in pairs if name.startswith("recall[")]
    else:
        gaps["demographic_parity"] = gaps["positive_rate"]
    gaps["worst_recall" if problem.positive is None else "equalized_odds"] = gap(
        pair for name in together for pair in _pairs(name, groups, confidence, len(together))
    )
    return gaps


def _note_undefined(
    problem: Problem, rates: list[dict[str, Estimate]], min_group_rows: int, notes: list[str]
) -> None:
    for index, group in enumerate(problem.groups):
        inside = problem.members == index
        missing = [name for name, estimate in rates[index].items() if not np.isfinite(estimate.value)]
        if missing:
            absent = [
                name for code, name in enumerate(problem.classes) if not (problem.true[inside] == code).any()
            ]
            notes.append(
                f"group {group!r} has no row of class(es) {listed(absent)}: {', '.join(missing)} not defined."
            )
        if inside.sum() < min_group_rows:
            notes.append(
                f"group {group!r} has {int(inside.sum())} row(s), fewer than {min_group_rows}: it is not "
                "compared with the others."
            )


# -- groups of a continuous column ------------------------------------------------------------------------


def quantile_groups(values: Any, num_groups: int = 4) -> pd.Categorical:
    """Divide a continuous column into groups of about equally many rows, named by their range of values.

    Parameters
    ----------
    values : tensor, array, list or Series, (n,)
        Numbers, finite.
    num_groups : int
        The largest number of groups; there may be fewer, since equal values stay in one group.

    Returns
    -------
    pandas.Categorical, (n,)
        Ordered, with the ranges of values as categories; to be passed as `groups` to `group_gaps`.

    Raises
    ------
    TypeError, ValueError
        Values that are not finite numbers of shape (n,), no rows; `num_groups` is no integer of at least 1.
    MissingExtraError
        pandas is not installed.

    Examples
    --------
    >>> list(quantile_groups([20, 25, 31, 44, 52, 60, 61, 80]).categories)
    ['20–25', '31–44', '52–60', '61–80']
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
    edges = np.unique(numbers)
    if edges.size > num_groups:
        # Each group is closed above.
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, num_groups + 1)[1:]))
    found, codes = np.unique(np.searchsorted(edges, numbers), return_inverse=True)
    limits = [(numbers[codes == code].min(), numbers[codes == code].max()) for code in range(len(found))]
    return pd.Categorical.from_codes(codes, _range_names(limits), ordered=True)


def _range_names(limits: list[tuple[float, float]]) -> list[str]:
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

    digits = 2
    while digits < 17 and len({text(value, digits) for value in distinct}) < len(distinct):
        digits += 1
    names = []
    for low, high in limits:
        # A dash next to a minus sign is hard to read.
        dash = "–" if low >= 0 else " to "
        names.append(text(low, digits) if low == high else f"{text(low, digits)}{dash}{text(high, digits)}")
    return names
