"""Measure what features know of metadata columns; nothing is drawn or phrased here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdnorm.auditing.columns import Column
from mdnorm.auditing.reading import InputError
from mdnorm.auditing.results import ColumnAudit, Measure, Projection, Representation
from mdnorm.extras import requires
from mdnorm.metrics import (
    distance_correlation_chi_squared_p_value,
    distance_correlation_interval,
    distance_correlation_sqr,
)
from mdnorm.metrics.checks import check_confidence, check_integer
from mdnorm.metrics.group_gaps import QuantileGroups, group_gaps, quantile_groups
from mdnorm.metrics.probes import ProbeScore, probe

__all__ = ["Predictions", "Settings", "measure_column", "project", "within_classes"]

MODELS: tuple[Literal["linear", "nonlinear"], ...] = ("linear", "nonlinear")

# Fewer rows in a label class say nothing about it.
_MIN_CLASS_ROWS = 20
_NUM_BINS = 4


@dataclass(frozen=True)
class Settings:
    """How an audit measures.

    Attributes
    ----------
    num_permutations : int
        Of each probe's permutation test.
    num_bootstrap : int
        Of the intervals of group gaps.
    confidence : float
        Of every interval.
    num_folds : int
        Of the cross-validation of probes.
    seed : int

    Raises
    ------
    InputError
        A setting is of another type, or out of its range.
    """

    num_permutations: int = 200
    num_bootstrap: int = 300
    confidence: float = 0.95
    num_folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_permutations": 1, "num_bootstrap": 0, "num_folds": 2, "seed": 0}
        try:
            for name, low in least.items():
                check_integer(name, getattr(self, name), low)
            check_confidence(self.confidence)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error


@dataclass(frozen=True)
class Predictions:
    """What a model predicted, for the rows of the audit.

    Attributes
    ----------
    classes : (n,) array of str
    scores : (n,) array or None
        Predicted probability of the positive class.
    positive : str or None
        Which class is the positive one.
    """

    classes: NDArray[np.str_]
    scores: NDArray[np.float64] | None = None
    positive: str | None = None


def within_classes(label: Column) -> tuple[NDArray[np.str_], str]:
    """Return the label classes to look within, and a note; a continuous label is cut in four."""
    if label.kind == "categorical":
        return label.values, ""
    classes = np.full(len(label.values), "", dtype=object)
    classes[label.present] = np.asarray(_quarters(label.rows(label.present)))
    note = (
        f"The label {label.name} is continuous: “the same {label.name}” means the same quarter of its range."
    )
    return classes.astype(np.str_), note


def _quarters(column: Column) -> QuantileGroups:
    """Return a continuous column without missing values in four groups, with names as its values are read."""
    groups = quantile_groups(column.values, num_groups=_NUM_BINS)
    if not column.is_date:
        return groups
    parts = [column.values[groups.codes == code] for code in range(len(groups.names))]
    names = tuple(f"{column.text(part.min())} to {column.text(part.max())}" for part in parts)
    # Dates a few seconds apart.
    return replace(groups, names=names) if len(set(names)) == len(names) else groups


def _one_row_each(subjects: NDArray[Any] | None, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Return one row of each subject, drawn at random: all rows where there are no subjects."""
    if subjects is None:
        return np.arange(num_rows)
    order = np.random.default_rng(seed).permutation(num_rows)
    return np.sort(order[np.unique(subjects[order], return_index=True)[1]])


def measure_column(
    column: Column,
    representations: Mapping[str, NDArray[np.float64]],
    label: Column | None,
    predictions: Mapping[str, Predictions],
    subjects: NDArray[Any] | None,
    settings: Settings,
    step: Callable[[str], None],
) -> ColumnAudit:
    """Measure one column against every set of features, on the rows where it is there.

    Parameters
    ----------
    column : Column
        Continuous or categorical.
    representations : mapping
        Names to features (n, p), finite.
    label : Column or None
        `column` itself where the label is looked at.
    predictions : mapping
        Names of representations to what was predicted from them.
    subjects : (n,) array or None
        Rows of the same subject are never in training and test folds at once. Distance correlations, whose
        intervals and tests are for independent rows, are those of one row of each.
    settings : Settings
    step : callable
        Called with what is done next.

    Raises
    ------
    ValueError
        The column cannot be measured on these rows; the message says why.
    """
    is_label = label is not None and column.name == label.name
    classes_in_use = None if label is None or is_label else label
    present = column.present if classes_in_use is None else column.present & classes_in_use.present
    rows = np.flatnonzero(present)
    shown = column.rows(rows)
    kept_subjects = None if subjects is None else subjects[rows]
    single = _one_row_each(kept_subjects, len(rows), settings.seed)
    association = None
    classes: NDArray[np.str_] | None = None
    class_names: list[str] = []
    class_notes: list[str] = []
    if classes_in_use is not None:
        kept_label = classes_in_use.rows(rows)
        unlabelled = int((column.present & ~present).sum())
        if unlabelled:
            class_notes.append(f"{unlabelled} rows without a label were left out.")
        association = float(
            distance_correlation_sqr(
                shown.rows(single).design_matrix(), kept_label.rows(single).design_matrix()
            )
        )
        classes, note = within_classes(kept_label)
        class_names, left_out = _usable_classes(classes[single], shown.rows(single))
        class_notes += [*([note] if note else []), *left_out]
    measured = {}
    for key, features in representations.items():
        step(f"{column.name}, {key}")
        measured[key] = _measure(
            features[rows], shown, classes, class_names, kept_subjects, single, settings, step
        )
        if key in predictions and label is not None and not is_label:
            gaps = _group_gaps(label.rows(rows), predictions[key], rows, shown, kept_subjects, settings)
            measured[key] = replace(measured[key], group_gaps=gaps)
    return ColumnAudit(
        name=column.name,
        kind=column.kind,
        description=shown.describe(),
        note=" ".join(filter(None, (column.note, *class_notes))),
        num_rows=len(rows),
        num_missing=column.num_missing,
        is_label=is_label,
        association_with_label=association,
        representations=measured,
    )


def _usable_classes(classes: NDArray[np.str_], column: Column) -> tuple[list[str], list[str]]:
    """Return the label classes with enough rows of more than one value, and why others are left out."""
    usable, notes = [], []
    for name in np.unique(classes):
        inside = column.values[classes == name]
        if len(inside) < _MIN_CLASS_ROWS:
            notes.append(f"Class {name} of the label has {len(inside)} rows, too few to look within.")
        elif len(np.unique(inside)) < 2:
            notes.append(f"Within class {name} of the label, {column.name} never changes.")
        else:
            usable.append(str(name))
    return usable, notes


def _measure(
    features: NDArray[np.float64],
    column: Column,
    classes: NDArray[np.str_] | None,
    class_names: list[str],
    subjects: NDArray[Any] | None,
    single: NDArray[np.int64],
    settings: Settings,
    step: Callable[[str], None],
) -> Representation:
    dependence = _dependence(features[single], column.rows(single), settings)
    by_class = {}
    if classes is not None:
        for name in class_names:
            inside = single[classes[single] == name]
            by_class[name] = _dependence(features[inside], column.rows(inside), settings)
    probes: dict[str, Measure] = {}
    within: dict[str, Measure] = {}
    for model in MODELS:
        probes[model], pooled = _probe(features, column, model, classes, subjects, settings)
        if pooled is not None and by_class:
            within[model] = pooled
        step(f"{column.name}, {model} probe")
    return Representation(dependence, _pooled(by_class), by_class, probes, within)


def _dependence(features: NDArray[np.float64], column: Column, settings: Settings) -> Measure:
    values = column.design_matrix()
    interval = distance_correlation_interval(features, values, confidence=settings.confidence)
    p_value = distance_correlation_chi_squared_p_value(interval.estimate, len(values))
    return Measure("dcor²", interval.estimate, 0.0, len(values), interval.lower, interval.upper, p_value)


def _pooled(by_class: Mapping[str, Measure]) -> Measure | None:
    """Return the mean over classes weighted by rows; classes are independent samples."""
    if not by_class:
        return None
    with requires("audit"):
        from scipy.stats import combine_pvalues

    measures = list(by_class.values())
    weights = np.array([measure.num_rows for measure in measures], float)
    weights /= weights.sum()
    value = float(weights @ [measure.value for measure in measures])
    half = np.array([((measure.high or 0.0) - (measure.low or 0.0)) / 2 for measure in measures])
    spread = float(np.sqrt(np.square(weights * half).sum()))
    # Fisher's method takes no p-value of exactly 0.
    p_values = [max(measure.p_value or 0.0, 1e-300) for measure in measures]
    num_rows = sum(measure.num_rows for measure in measures)
    p_value = float(combine_pvalues(p_values).pvalue)
    return Measure("dcor²", value, 0.0, num_rows, value - spread, value + spread, p_value)


_SCORE_NAMES = {"r2": "R²", "balanced_accuracy": "balanced accuracy"}


def _probe(
    features: NDArray[np.float64],
    column: Column,
    model: Literal["linear", "nonlinear"],
    classes: NDArray[np.str_] | None,
    subjects: NDArray[Any] | None,
    settings: Settings,
) -> tuple[Measure, Measure | None]:
    """Return the cross-validated score over all rows, and within `classes` (None where impossible)."""
    notes: tuple[str, ...] = ()
    if column.kind == "categorical":
        names, counts = np.unique(column.values, return_counts=True)
        rare = names[counts < settings.num_folds]
        if len(names) - len(rare) < 2:
            raise ValueError(f"fewer than two classes have {settings.num_folds} rows.")
        if len(rare):
            inside = ~np.isin(column.values, rare)
            notes = (f"Classes with fewer than {settings.num_folds} rows were left out: {', '.join(rare)}.",)
            features, column = features[inside], column.rows(inside)
            classes = None if classes is None else classes[inside]
            subjects = None if subjects is None else subjects[inside]
    result = probe(
        features,
        column.values,
        model=model,
        task="classification" if column.kind == "categorical" else "regression",
        labels=classes,
        groups=subjects,
        num_folds=settings.num_folds,
        num_permutations=settings.num_permutations,
        seed=settings.seed,
    )
    notes += result.notes
    left_out = tuple(f"Class {name} of the label: {reason}" for name, reason in result.left_out)
    # With labels the permutations stay within their classes: what they score is what the label tells.
    explained = None if classes is None else result.scores[0].permutation_mean
    overall = _as_measure(result.scores[0], result.num_rows, notes, explained)
    if not result.pooled:
        return overall, None
    num_rows = sum(part.num_rows for part in result.within_labels)
    return overall, _as_measure(result.pooled[0], num_rows, left_out)


def _as_measure(
    score: ProbeScore, num_rows: int, notes: tuple[str, ...], explained: float | None = None
) -> Measure:
    return Measure(
        _SCORE_NAMES[score.name],
        score.value,
        score.chance,
        num_rows,
        p_value=score.p_value,
        explained_by_label=explained,
        notes=notes,
    )


def _group_gaps(
    label: Column,
    predictions: Predictions,
    rows: NDArray[Any],
    column: Column,
    subjects: NDArray[Any] | None,
    settings: Settings,
) -> Mapping[str, Any]:
    """Return the rates by group of the rows with a label; a continuous column is cut in four."""
    there = label.present
    labels = label.values[there]
    groups: Any = column.values[there]
    if column.kind == "continuous":
        groups = _quarters(column.rows(there))
    classes = np.unique(labels)
    positive = predictions.positive
    if positive is None and len(classes) == 2:
        positive = str(classes[-1])
    result = group_gaps(
        labels,
        predictions.classes[rows][there],
        groups,
        # With more than two classes calibration needs the probabilities of all.
        scores=None if predictions.scores is None or len(classes) != 2 else predictions.scores[rows][there],
        positive=positive if len(classes) == 2 else None,
        subjects=None if subjects is None else subjects[there],
        confidence=settings.confidence,
        num_bootstrap=settings.num_bootstrap,
        seed=settings.seed,
    )
    return result.to_dict()


def project(features: NDArray[np.float64], num_points: int, seed: int) -> Projection:
    """Return two principal components of standardised features, for at most `num_points` rows."""
    with requires("audit"):
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(features)
    components = min(2, *scaled.shape)
    pca = PCA(components, svd_solver="full" if min(scaled.shape) <= 500 else "randomized", random_state=seed)
    points = pca.fit_transform(scaled)
    shares = [float(share) if np.isfinite(share) else 0.0 for share in pca.explained_variance_ratio_]
    if components < 2:
        points = np.column_stack([points, np.zeros(len(points))])
        shares.append(0.0)
    rows = np.arange(len(points))
    if len(points) > num_points:
        rows = np.sort(np.random.default_rng(seed).choice(len(points), num_points, replace=False))
    return Projection(points[rows], shares, rows)
