"""Measure what features know of metadata columns; nothing is drawn or phrased here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdnorm.auditing.columns import Column
from mdnorm.auditing.reading import InputError
from mdnorm.auditing.results import ColumnAudit, FeatureSet, Measure, Projection, Representation
from mdnorm.extras import requires
from mdnorm.metrics import (
    conditional_independence_test,
    distance_correlation_chi_squared_p_value,
    distance_correlation_interval,
    distance_correlation_permutation_test,
    distance_correlation_sqr,
)
from mdnorm.metrics.checks import check_confidence, check_integer, check_permutations
from mdnorm.metrics.conditional import residuals_given
from mdnorm.metrics.group_gaps import QuantileGroups, group_gaps, quantile_groups
from mdnorm.metrics.independence import CHI_SQUARED_MIN_SAMPLES
from mdnorm.metrics.probes import ProbeScore, probe
from mdnorm.metrics.rates import combined

__all__ = [
    "MIN_ROWS",
    "MODELS",
    "Predictions",
    "Settings",
    "feature_sets",
    "measure_column",
    "projections_of",
]

MODELS: tuple[Literal["linear", "nonlinear"], ...] = ("linear", "nonlinear")

# Fewer rows, of all or of a label class, say nothing.
MIN_ROWS = 20
_NUM_BINS = 4

# Whitening needs this many rows for each feature.
_ROWS_PER_WHITENED = 5


@dataclass(frozen=True)
class Settings:
    """How an audit measures, and from where on it calls what it finds harm.

    Attributes
    ----------
    num_permutations : int
        Of each probe's permutation test, at least 20.
    num_bootstrap : int
        Of the intervals of calibration errors.
    confidence : float
        Of every interval.
    num_folds : int
        Of the cross-validation of probes.
    seed : int
    standardize : bool
        Whether features are divided by their standard deviations, so that units do not matter.
    min_group_rows : int
        Groups with fewer rows are not compared with others.
    alpha : float
        Chance that any of all columns is found where features know none of them (Holm's method).
    max_probe : float
        Harm is a probe that comes further than this on the way from chance (0) to a perfect score (1).
    max_dcor2 : float
        Harm is a larger dcor².
    max_gap : float
        Harm is a larger difference of a rate between two groups.

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
    standardize: bool = True
    min_group_rows: int = 20
    alpha: float = 0.05
    max_probe: float = 0.2
    max_dcor2: float = 0.05
    max_gap: float = 0.1

    def __post_init__(self) -> None:
        least = {"num_bootstrap": 0, "num_folds": 2, "seed": 0, "min_group_rows": 1}
        try:
            check_permutations(self.num_permutations)
            for name, low in least.items():
                check_integer(name, getattr(self, name), low)
            check_confidence(self.confidence)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        for name in ("alpha", "max_probe", "max_dcor2", "max_gap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise InputError(f"{name} must be a number between 0 and 1, got {value!r}.")


@dataclass(frozen=True)
class Predictions:
    """What a model predicted, for the rows of the audit.

    Attributes
    ----------
    classes : (n,) array
        Predicted classes, as text; predicted numbers where the label is continuous.
    scores : (n,) array or None
        Predicted probability of the positive class.
    positive : str or None
        Which class is the positive one.
    """

    classes: NDArray[Any]
    scores: NDArray[np.float64] | None = None
    positive: str | None = None


def feature_sets(
    treatments: Mapping[str, tuple[str, NDArray[np.float64]]],
    held_out: NDArray[np.bool_] | None,
    *,
    standardize: bool,
) -> dict[str, FeatureSet]:
    """Return sets of features by name: of each treatment, on fitted and on held-out rows if there are such.

    Parameters
    ----------
    treatments : mapping
        Names to title and features (n, p), finite; the first is what the others are compared with.
    held_out : (n,) array of bool or None
        Which rows no treatment was fitted on.
    standardize : bool
    """
    first = next(iter(treatments))
    parts = {"": np.ones(len(treatments[first][1]), dtype=bool)}
    if held_out is not None:
        parts = {"training rows": ~held_out, "held-out rows": held_out}
    sets = {}
    for name, (title, features) in treatments.items():
        values = features - features.mean(axis=0)
        if standardize:
            spread = values.std(axis=0)
            # What is left of a constant is rounding.
            constant = np.ptp(features, axis=0) <= 1e-12 * np.abs(features).max()
            values = values / np.where(constant, np.inf, spread)
        whitened = _whitened(values)
        for part, rows in parts.items():
            suffix = f", {part}" if part else ""
            sets[name + suffix] = FeatureSet(
                title + suffix,
                values,
                whitened,
                rows,
                reference=None if name == first else first + suffix,
                is_decisive=(name != first or len(treatments) == 1) and part != "training rows",
            )
    return sets


def _whitened(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return uncorrelated components of equal variance; None where there are too few rows for them."""
    if len(values) < _ROWS_PER_WHITENED * values.shape[1]:
        return None
    left, singular, _ = np.linalg.svd(values, full_matrices=False)
    whitened: NDArray[np.float64] = left[:, singular > 1e-9 * singular[0]] * np.sqrt(len(values))
    return whitened


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
    sets: Mapping[str, FeatureSet],
    label: Column | None,
    predictions: Mapping[str, Predictions],
    subjects: NDArray[Any] | None,
    settings: Settings,
    step: Callable[[str], None],
    role: str = "remove",
) -> ColumnAudit:
    """Measure one column against every set of features, on the rows where it is there.

    Parameters
    ----------
    column : Column
        Continuous or categorical.
    sets : mapping
        Names to sets of features.
    label : Column or None
        `column` itself where the label is looked at.
    predictions : mapping
        Names of sets to what was predicted from them.
    subjects : (n,) array or None
        Rows of the same subject are never in training and test folds at once. Distance correlations, whose
        intervals and tests are for independent rows, are those of one row of each.
    settings : Settings
    step : callable
        Called with what is done next.
    role : str
        See `ColumnAudit`.

    Raises
    ------
    ValueError
        The column cannot be measured on these rows; the message says why.
    """
    given = None if label is None or column.name == label.name else label
    present = column.present if given is None else column.present & given.present
    used = np.logical_or.reduce([part.rows for part in sets.values()])
    notes: list[str] = [column.note]
    association = None
    if given is not None:
        unlabelled = int((column.present & ~present & used).sum())
        if unlabelled:
            notes.append(f"{unlabelled} rows without a label were left out.")
        rows = np.flatnonzero(present)
        single = rows[_one_row_each(None if subjects is None else subjects[rows], len(rows), settings.seed)]
        matrices = [part.rows(single).design_matrix() for part in (column, given)]
        association = float(distance_correlation_sqr(*matrices))
        if given.kind == "continuous":
            notes.append(
                f"The label {given.name} is continuous: “given {given.name}” means what a smooth function of "
                "it leaves of features and column."
            )
    measured = {}
    for key, part in sets.items():
        step(f"{column.name}, {part.title}")
        rows = np.flatnonzero(present & part.rows)
        shown = column.rows(rows)
        if len(rows) < MIN_ROWS or len(np.unique(shown.values)) < 2:
            where = f" of the {key.rpartition(', ')[2]}" if len(sets) > 1 and ", " in key else ""
            raise ValueError(f"{len(rows)} rows{where} with fewer than two values or fewer than {MIN_ROWS}.")
        measured[key] = _Measuring(
            part.values[rows],
            None if part.whitened is None else part.whitened[rows],
            shown,
            None if given is None else given.rows(rows),
            None if subjects is None else subjects[rows],
            settings,
            notes,
        ).representation(step)
        if key in predictions and label is not None and given is not None:
            there = label.rows(rows)
            if label.kind == "continuous":
                test = _prediction_test(there, predictions[key], rows, shown, settings)
                measured[key] = replace(measured[key], prediction_test=test)
            else:
                owners = None if subjects is None else subjects[rows]
                gaps = _group_gaps(there, predictions[key], rows, shown, owners, settings)
                measured[key] = replace(measured[key], group_gaps=gaps)
    rows = np.flatnonzero(present & used)
    return ColumnAudit(
        name=column.name,
        kind=column.kind,
        description=column.rows(rows).describe(),
        note=" ".join(dict.fromkeys(filter(None, notes))),
        num_rows=len(rows),
        num_missing=column.num_missing,
        role=role,
        association_with_label=association,
        representations=measured,
    )


def _usable_classes(classes: NDArray[np.str_], column: Column) -> tuple[list[str], list[str]]:
    """Return the label classes with enough rows of more than one value, and why others are left out."""
    usable, notes = [], []
    for name in np.unique(classes):
        inside = column.values[classes == name]
        if len(inside) < MIN_ROWS:
            notes.append(f"Class {name} of the label has {len(inside)} rows, too few to look within.")
        elif len(np.unique(inside)) < 2:
            notes.append(f"Within class {name} of the label, {column.name} never changes.")
        else:
            usable.append(str(name))
    return usable, notes


@dataclass(frozen=True)
class _Measuring:
    """One column against one set of features, on the rows where both and the label are there."""

    features: NDArray[np.float64]
    whitened: NDArray[np.float64] | None
    column: Column
    label: Column | None
    subjects: NDArray[Any] | None
    settings: Settings
    notes: list[str]

    def representation(self, step: Callable[[str], None]) -> Representation:
        column, label = self.column, self.label
        single = _one_row_each(self.subjects, len(self.features), self.settings.seed)
        values = column.design_matrix()
        strata = None
        by_class: dict[str, Measure] = {}
        within = whitened = None
        classes: NDArray[np.str_] | None = None
        if label is None:
            whitened = self._dependence(self.whitened, values, single, interval=False)
        elif label.kind == "categorical":
            classes = strata = label.values
            names, left_out = _usable_classes(classes[single], column.rows(single))
            self.notes.extend(left_out)
            parts = {name: single[classes[single] == name] for name in names}
            for name, inside in parts.items():
                found = self._dependence(self.features, values, inside)
                assert found is not None
                by_class[name] = found
            within = _pooled(by_class)
            if self.whitened is not None:
                whitened = _pooled(
                    {
                        name: measure
                        for name, inside in parts.items()
                        if (measure := self._dependence(self.whitened, values, inside, interval=False))
                        is not None
                    }
                )
        else:
            strata = np.argsort(np.argsort(label.values, kind="stable")) * 10 // len(label.values)
            rest = residuals_given(self.features, label.values)
            rest_of_column = residuals_given(values, label.values)
            within = self._dependence(rest, rest_of_column, single, strata=strata)
            if self.whitened is not None:
                rest_of_whitened = residuals_given(self.whitened, label.values)
                whitened = self._dependence(rest_of_whitened, rest_of_column, single, interval=False)
        dependence = self._dependence(self.features, values, single)
        assert dependence is not None
        probes: dict[str, Measure] = {}
        probes_within: dict[str, Measure] = {}
        for model in MODELS:
            probes[model], pooled = _probe(
                self.features, column, model, classes, self.subjects, self.settings
            )
            if label is not None and label.kind == "continuous":
                continuous = column.kind == "continuous"
                part = replace(column, values=rest_of_column[:, 0]) if continuous else column
                pooled = _probe(rest, part, model, None, self.subjects, self.settings)[0]
            if pooled is not None and within is not None:
                probes_within[model] = pooled
            step(f"{column.name}, {model} probe")
        return Representation(
            dependence,
            within,
            by_class,
            whitened,
            probes,
            probes_within,
            _association_z(self.features, values, strata, self.settings.seed),
        )

    def _dependence(
        self,
        features: NDArray[np.float64] | None,
        values: NDArray[np.float64],
        rows: NDArray[np.int64],
        *,
        strata: NDArray[Any] | None = None,
        interval: bool = True,
    ) -> Measure | None:
        """Return dcor² of `rows` of features and values; None without features."""
        if features is None:
            return None
        features, values, settings = features[rows], values[rows], self.settings
        low = high = None
        if interval:
            limits = distance_correlation_interval(features, values, confidence=settings.confidence)
            value, low, high = limits.estimate, limits.lower, limits.upper
        else:
            value = float(distance_correlation_sqr(features, values))
        if strata is None and len(rows) >= CHI_SQUARED_MIN_SAMPLES:
            p_value = distance_correlation_chi_squared_p_value(value, len(rows))
        else:
            p_value = distance_correlation_permutation_test(
                features,
                values,
                num_permutations=settings.num_permutations,
                seed=settings.seed,
                strata=None if strata is None else strata[rows],
            ).p_value
        return Measure("dcor²", value, 0.0, len(rows), low, high, p_value)


_NUM_ASSOCIATIONS = 100


def _association_z(
    features: NDArray[np.float64], values: NDArray[np.float64], strata: NDArray[Any] | None, seed: int
) -> float:
    """Return log ‖XᵀY‖² within strata in standard deviations from its mean under permutation."""
    codes = np.zeros(len(values), np.int64) if strata is None else np.unique(strata, return_inverse=True)[1]
    counts = np.bincount(codes)

    def centred(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.zeros((len(counts), columns.shape[1]))
        np.add.at(sums, codes, columns)
        return columns - (sums / counts[:, None])[codes]

    left, right = centred(features), centred(values)
    rng = np.random.default_rng(seed)
    order = np.argsort(codes, kind="stable")
    orders = np.empty((_NUM_ASSOCIATIONS, len(codes)), np.int64)
    for row in orders:
        shuffled = rng.permutation(len(codes))
        row[order] = shuffled[np.argsort(codes[shuffled], kind="stable")]
    products = np.stack([left.T @ column[orders].T for column in right.T])
    tiny = np.finfo(float).tiny
    permuted = np.log(np.square(products).sum(axis=(0, 1)) + tiny)
    spread = float(permuted.std())
    if spread == 0:
        return 0.0
    return float((np.log(np.square(left.T @ right).sum() + tiny) - permuted.mean()) / spread)


def _pooled(by_class: Mapping[str, Measure]) -> Measure | None:
    """Return the mean over classes weighted by rows; classes are independent samples."""
    if not by_class:
        return None
    with requires("audit"):
        from scipy.stats import combine_pvalues

    measures = list(by_class.values())
    weights = np.array([measure.num_rows for measure in measures], float)
    weights /= weights.sum()
    values = [measure.value for measure in measures]
    intervals = [(part.low, part.high) for part in measures if part.low is not None and part.high is not None]
    low, high = combined(weights, values, intervals) if len(intervals) == len(measures) else (None, None)
    # Fisher's method takes no p-value of exactly 0.
    p_values = [max(measure.p_value or 0.0, 1e-300) for measure in measures]
    return Measure(
        "dcor²",
        float(weights @ values),
        0.0,
        sum(measure.num_rows for measure in measures),
        low,
        high,
        float(combine_pvalues(p_values).pvalue),
    )


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
        # A class of few rows would be one in so many of a balanced accuracy.
        least = settings.min_group_rows if (counts >= settings.min_group_rows).sum() >= 2 else 0
        least = max(least, settings.num_folds)
        rare = names[counts < least]
        if len(names) - len(rare) < 2:
            raise ValueError(f"fewer than two classes have {least} rows.")
        if len(rare):
            inside = ~np.isin(column.values, rare)
            notes = (f"Classes with fewer than {least} rows were left out: {', '.join(rare)}.",)
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
        confidence=settings.confidence,
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
        score.low,
        score.high,
        p_value=score.p_value,
        explained_by_label=explained,
        notes=notes,
        tail_p_value=score.tail_p_value,
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
        min_group_rows=settings.min_group_rows,
        num_bootstrap=settings.num_bootstrap,
        seed=settings.seed,
    )
    return result.to_dict()


def _prediction_test(
    label: Column, predictions: Predictions, rows: NDArray[Any], column: Column, settings: Settings
) -> Measure | None:
    """Test predicted numbers against a column given the target; None where there are too few rows."""
    there = label.present
    if there.sum() < 2 * MIN_ROWS:
        return None
    target, values = label.values[there], column.rows(there).design_matrix()
    predicted = np.asarray(predictions.classes[rows][there], np.float64)[:, None]
    test = conditional_independence_test(
        predicted, values, target, num_permutations=settings.num_permutations, seed=settings.seed
    )
    limits = distance_correlation_interval(
        residuals_given(predicted, target), residuals_given(values, target), confidence=settings.confidence
    )
    return Measure("dcor²", test.estimate, 0.0, len(target), limits.lower, limits.upper, p_value=test.p_value)


def projections_of(
    treatments: Mapping[str, NDArray[np.float64]], num_points: int, seed: int
) -> dict[str, Projection]:
    """Return two principal components of standardised features, for at most `num_points` rows.

    Treatments of as many features are drawn on the same axes: those of all of them together.
    """
    with requires("audit"):
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

    def fitted(rows: NDArray[np.float64]) -> tuple[Any, Any]:
        scaler = StandardScaler().fit(rows)
        scaled = scaler.transform(rows)
        solver = "full" if min(scaled.shape) <= 500 else "randomized"
        return scaler, PCA(min(2, *scaled.shape), svd_solver=solver, random_state=seed).fit(scaled)

    count = len(next(iter(treatments.values())))
    rows = np.arange(count)
    if count > num_points:
        rows = np.sort(np.random.default_rng(seed).choice(count, num_points, replace=False))
    shared = None
    if len({values.shape[1] for values in treatments.values()}) == 1:
        shared = fitted(np.concatenate(list(treatments.values())))
    projections = {}
    for key, values in treatments.items():
        scaler, pca = shared or fitted(values)
        scaled = scaler.transform(values)
        points = pca.transform(scaled)
        total = float(np.square(scaled - scaled.mean(axis=0)).sum()) or 1.0
        shares = [float(share) for share in np.square(points - points.mean(axis=0)).sum(axis=0) / total]
        if points.shape[1] < 2:
            points = np.column_stack([points, np.zeros(count)])
            shares.append(0.0)
        projections[key] = Projection(points[rows], shares, rows, shared is not None)
    return projections
