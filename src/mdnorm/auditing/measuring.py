"""Measure what features know of metadata columns; nothing is drawn or phrased here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mdnorm.auditing.columns import Column
from mdnorm.auditing.inputs import Inputs, Predictions
from mdnorm.auditing.reading import InputError
from mdnorm.auditing.results import ColumnAudit, FeatureSet, Measure, Representation
from mdnorm.auditing.settings import MIN_ROWS, Settings
from mdnorm.extras import requires
from mdnorm.metrics import (
    GroupGaps,
    conditional_independence_test,
    distance_correlation_chi_squared_p_value,
    distance_correlation_interval,
    distance_correlation_permutation_test,
    distance_correlation_sqr,
    group_gaps,
    probe,
    quantile_groups,
)
from mdnorm.metrics.independence import CHI_SQUARED_MIN_SAMPLES, permutations, residuals_given
from mdnorm.metrics.probe_scores import ProbeScore
from mdnorm.metrics.rates import combined

MODELS: tuple[Literal["linear", "nonlinear"], ...] = ("linear", "nonlinear")

# A continuous column is cut into this many groups for the rates of predictions.
_NUM_GROUPS = 4

# Permutations that the linear association is compared with.
_NUM_ASSOCIATIONS = 100

_SCORE_NAMES = {"r2": "R²", "balanced_accuracy": "balanced accuracy"}


def measure(
    inputs: Inputs,
    sets: Mapping[str, FeatureSet],
    keep: Collection[str],
    settings: Settings,
    step: Callable[[str], None],
) -> tuple[list[ColumnAudit], list[Column]]:
    """Return the measures of every column and of the label, and the columns that cannot be audited.

    `keep` are names of columns that are meant to stay; `step` is called with what is done next.
    """
    label = inputs.label
    if label is not None:
        label = _checked(label)
        if not label.is_auditable:
            raise InputError(f"the label {label.name!r} cannot be used: {label.note}")
    columns = [_checked(column) for column in inputs.columns]
    left_out = [column for column in columns if not column.is_auditable]
    measured = []
    for column in [column for column in columns if column.is_auditable] + ([label] if label else []):
        role = "label" if column is label else "keep" if column.name in keep else "remove"
        try:
            measured.append(_measure_column(column, sets, label, inputs, settings, step, role))
        except ValueError as error:
            left_out.append(replace(column, note=f"it cannot be measured: {error}"))
    if all(column.is_label for column in measured):
        reasons = " ".join(f"{column.name}: {column.note}" for column in left_out)
        raise InputError(f"no metadata column can be audited: {reasons}")
    return measured, left_out


def _checked(column: Column) -> Column:
    """Return the column, as a constant if it is one on the rows in use."""
    if not column.is_auditable:
        return column
    distinct, count = np.unique(column.values[column.present]), int(column.present.sum())
    note = "every row in use has the same value: not audited." if len(distinct) < 2 else ""
    if not note and count < MIN_ROWS:
        note = f"only {count} rows have a value, fewer than {MIN_ROWS}: not audited."
    return replace(column, kind="constant", note=note) if note else column


def _measure_column(
    column: Column,
    sets: Mapping[str, FeatureSet],
    label: Column | None,
    inputs: Inputs,
    settings: Settings,
    step: Callable[[str], None],
    role: str,
) -> ColumnAudit:
    """Measure one column, or the label, against every set of features, on the rows where it is there.

    Rows of the same subject are never in training and test folds at once. Distance correlations, whose
    intervals and tests are for independent rows, are those of one row of each. A ValueError says why the
    column cannot be measured on these rows.
    """
    subjects = inputs.subjects
    given = None if label is None or role == "label" else label
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
        step(f"{column.name}, {part.full_title}")
        rows = np.flatnonzero(present & part.rows)
        shown = column.rows(rows)
        if len(rows) < MIN_ROWS or len(np.unique(shown.values)) < 2:
            where = f" of the {part.part}" if part.part else ""
            raise ValueError(f"{len(rows)} rows{where}: {MIN_ROWS} are needed, with two different values.")
        owners = None if subjects is None else subjects[rows]
        measured[key] = _Measuring(
            part.values[rows],
            None if part.whitened is None else part.whitened[rows],
            shown,
            None if given is None else given.rows(rows),
            owners,
            settings,
            notes,
        ).representation(step)
        if given is None or part.treatment not in inputs.predictions:
            continue
        predicted, target = inputs.predictions[part.treatment].rows(rows), given.rows(rows)
        if given.kind == "continuous":
            test = _prediction_test(target, predicted, shown, settings)
            measured[key] = replace(measured[key], prediction_test=test)
        else:
            try:
                gaps = _group_gaps(target, predicted, shown, owners, settings)
                measured[key] = replace(measured[key], group_gaps=gaps)
            except ValueError as error:
                measured[key] = replace(measured[key], why_no_gaps=str(error))
    rows = np.flatnonzero(present & used)
    return ColumnAudit(
        name=column.name,
        kind=column.kind,
        description=column.rows(rows).describe(),
        note=" ".join(dict.fromkeys(filter(None, notes))),
        num_rows=len(rows),
        num_missing=column.num_missing,
        num_codes=column.num_codes,
        role=role,
        association_with_label=association,
        representations=measured,
    )


def _one_row_each(subjects: NDArray[Any] | None, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Return one row of each subject, drawn at random: all rows where there are no subjects."""
    if subjects is None:
        return np.arange(num_rows)
    order = np.random.default_rng(seed).permutation(num_rows)
    return np.sort(order[np.unique(subjects[order], return_index=True)[1]])


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
        column, label, settings = self.column, self.label, self.settings
        single = _one_row_each(self.subjects, len(self.features), settings.seed)
        values = column.design_matrix()
        # What is measured given the label, within which rows, and strata of rows that can be exchanged there.
        features, whitened, rest, parts = self.features, self.whitened, values, {"": single}
        classes = tenths = None
        if label is not None and label.kind == "categorical":
            classes = label.values
            parts = self._rows_of_classes(classes, single)
        elif label is not None:
            tenths = np.argsort(np.argsort(label.values, kind="stable")) * 10 // len(values)
            features, rest = (residuals_given(part, label.values) for part in (features, values))
            whitened = None if whitened is None else residuals_given(whitened, label.values)
        within, flat = {}, []
        for name, rows in parts.items():
            if label is not None:
                within[name] = self._dependence(features, rest, rows, strata=tenths)
            if whitened is not None:
                flat.append(self._dependence(whitened, rest, rows, strata=tenths, interval=False))
        probes: dict[str, Measure] = {}
        probes_within: dict[str, Measure] = {}
        for model in MODELS:
            probes[model], score = _probe(self.features, column, model, classes, self.subjects, settings)
            if tenths is not None:
                is_number = column.kind == "continuous"
                target = replace(column, values=rest[:, 0]) if is_number else column
                score = _probe(features, target, model, None, self.subjects, settings)[0]
            if score is not None and within:
                probes_within[model] = score
            step(f"{column.name}, {model} probe")
        return Representation(
            self._dependence(self.features, values, single),
            _pooled(within.values()),
            within if classes is not None else {},
            _pooled(flat),
            probes,
            probes_within,
            _association_z(self.features, values, tenths if classes is None else classes, settings.seed),
        )

    def _rows_of_classes(
        self, classes: NDArray[np.str_], single: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """Return the rows of every class of the label that has enough rows of more than one value."""
        found = {}
        for name in map(str, np.unique(classes[single])):
            inside = single[classes[single] == name]
            if len(inside) < MIN_ROWS:
                self.notes.append(
                    f"Class {name} of the label has {len(inside)} rows, too few to look within."
                )
            elif len(np.unique(self.column.values[inside])) < 2:
                self.notes.append(f"Within class {name} of the label, {self.column.name} never changes.")
            else:
                found[name] = inside
        return found

    def _dependence(
        self,
        features: NDArray[np.float64],
        values: NDArray[np.float64],
        rows: NDArray[np.int64],
        *,
        strata: NDArray[Any] | None = None,
        interval: bool = True,
    ) -> Measure:
        """Return dcor² of `rows` of features and values."""
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
            options = {"num_permutations": settings.num_permutations, "seed": settings.seed}
            strata = None if strata is None else strata[rows]
            p_value = distance_correlation_permutation_test(
                features, values, strata=strata, **options
            ).p_value
        return Measure("dcor²", value, 0.0, len(rows), low, high, p_value)


def _association_z(
    features: NDArray[np.float64], values: NDArray[np.float64], strata: NDArray[Any] | None, seed: int
) -> float:
    """Return how far log ‖XᵀY‖² within strata is from its mean under permutation, in standard deviations."""
    codes = np.zeros(len(values), np.int64) if strata is None else np.unique(strata, return_inverse=True)[1]
    members = np.eye(codes.max() + 1)[codes]
    shares = members / members.sum(axis=0)
    left, right = (part - members @ (shares.T @ part) for part in (features, values))
    generator = torch.Generator().manual_seed(seed)
    orders = permutations(_NUM_ASSOCIATIONS, len(codes), torch.from_numpy(codes), generator).numpy()
    products = np.stack([left.T @ column[orders].T for column in right.T])
    tiny = np.finfo(float).tiny
    permuted = np.log(np.square(products).sum(axis=(0, 1)) + tiny)
    spread = float(permuted.std())
    if spread == 0:
        return 0.0
    return float((np.log(np.square(left.T @ right).sum() + tiny) - permuted.mean()) / spread)


def _pooled(measures: Collection[Measure]) -> Measure | None:
    """Return the mean over classes weighted by rows; classes are independent samples."""
    if not measures:
        return None
    with requires("audit"):
        from scipy.stats import combine_pvalues

    weights = np.array([measure.num_rows for measure in measures], float)
    weights /= weights.sum()
    values = [measure.value for measure in measures]
    intervals = [(part.low, part.high) for part in measures if part.low is not None and part.high is not None]
    low, high = combined(weights, values, intervals) if len(intervals) == len(measures) else (None, None)
    # Fisher's method takes no p-value of exactly 0.
    p_value = combine_pvalues([max(measure.p_value or 0.0, 1e-300) for measure in measures]).pvalue
    num_rows = sum(measure.num_rows for measure in measures)
    return Measure("dcor²", float(weights @ values), 0.0, num_rows, low, high, float(p_value))


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
    explained = None if classes is None else result.scored.permutation_mean
    overall = _as_measure(result.scored, result.num_rows, notes, explained)
    if not result.pooled:
        return overall, None
    num_rows = sum(part.num_rows for part in result.within_labels)
    return overall, _as_measure(result.pooled, num_rows, left_out)


def _as_measure(
    score: ProbeScore, num_rows: int, notes: tuple[str, ...], explained: float | None = None
) -> Measure:
    found = score.value, score.chance, num_rows, score.low, score.high, score.p_value
    return Measure(_SCORE_NAMES[score.name], *found, explained, notes, score.tail_p_value)


def _group_gaps(
    label: Column, predictions: Predictions, column: Column, subjects: NDArray[Any] | None, settings: Settings
) -> GroupGaps:
    """Return the rates by group; a continuous column is cut in four."""
    classes = np.unique(label.values)
    is_binary = len(classes) == 2
    return group_gaps(
        label.values,
        predictions.classes,
        _quarters(column) if column.kind == "continuous" else column.values,
        # With more than two classes calibration needs the probabilities of all.
        scores=predictions.scores if is_binary else None,
        positive=(predictions.positive or str(classes[-1])) if is_binary else None,
        subjects=subjects,
        confidence=settings.confidence,
        min_group_rows=settings.min_group_rows,
        num_bootstrap=settings.num_bootstrap,
        seed=settings.seed,
    )


def _quarters(column: Column) -> Any:
    """Return a continuous column without missing values in four groups, with names as its values are read."""
    groups = quantile_groups(column.values, num_groups=_NUM_GROUPS)
    if not column.is_date:
        return groups
    parts = [column.values[groups.codes == code] for code in range(len(groups.categories))]
    names = [f"{column.text(part.min())} to {column.text(part.max())}" for part in parts]
    # Dates a few seconds apart.
    return groups.rename_categories(names) if len(set(names)) == len(names) else groups


def _prediction_test(
    label: Column, predictions: Predictions, column: Column, settings: Settings
) -> Measure | None:
    """Test predicted numbers against a column given the target; None where there are too few rows."""
    if len(label.values) < 2 * MIN_ROWS:
        return None
    target, values = label.values, column.design_matrix()
    predicted = np.asarray(predictions.classes, np.float64)[:, None]
    test = conditional_independence_test(
        predicted, values, target, num_permutations=settings.num_permutations, seed=settings.seed
    )
    limits = distance_correlation_interval(
        residuals_given(predicted, target), residuals_given(values, target), confidence=settings.confidence
    )
    return Measure("dcor²", test.estimate, 0.0, len(target), limits.lower, limits.upper, p_value=test.p_value)
