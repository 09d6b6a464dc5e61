"""The arguments of an audit: read into arrays and columns, and cut to the rows in use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.arrays import as_real_array
from mdnorm.auditing.columns import Column, as_column, as_columns, printable
from mdnorm.auditing.reading import InputError, as_input_error
from mdnorm.auditing.settings import MIN_ROWS, Settings
from mdnorm.design.leakage import is_discrete
from mdnorm.design.roles import stand_ins
from mdnorm.metrics.checks import check_integer, check_same_rows
from mdnorm.metrics.probe_folds import LEAST_VARIATION
from mdnorm.text import listed

# A feature whose spread is more than this many times that of another is measured in another unit.
_MIXED_UNITS = 100.0

# Squares of sums of larger values, or of the differences of smaller ones, may not be there in float64.
_LARGEST = 1e100

_SUBJECT_NAME = re.compile(
    r"(^|[_\W])(subjects?|participants?|patients?|persons?|sub|ppt)([_\W]|$)", re.IGNORECASE
)
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Predictions:
    """What a model predicted, for the rows of the audit."""

    # Predicted classes, as text; predicted numbers where the label is continuous.
    classes: NDArray[Any]
    # Predicted probabilities of the positive class.
    scores: NDArray[np.float64] | None = None
    positive: str | None = None

    def rows(self, index: NDArray[Any]) -> Predictions:
        """Return the predictions for these rows only."""
        scores = None if self.scores is None else self.scores[index]
        return replace(self, classes=self.classes[index], scores=scores)


@dataclass(frozen=True)
class Inputs:
    """What is audited: by the names of treatments features, titles and predictions, all of n rows."""

    # (n, …) as given, (n, p) float64 once `aligned`.
    features: Mapping[str, NDArray[Any]]
    titles: Mapping[str, str]
    # Without the label and the columns that are other arguments.
    columns: Sequence[Column]
    label: Column | None
    predictions: Mapping[str, Predictions]
    subjects: NDArray[Any] | None
    held_out: NDArray[np.bool_] | None

    def rows(self, index: NDArray[Any]) -> Inputs:
        """Return these rows only."""
        return Inputs(
            {name: values[index] for name, values in self.features.items()},
            self.titles,
            [column.rows(index) for column in self.columns],
            None if self.label is None else self.label.rows(index),
            {name: part.rows(index) for name, part in self.predictions.items()},
            None if self.subjects is None else self.subjects[index],
            None if self.held_out is None else self.held_out[index],
        )


# -- reading ----------------------------------------------------------------------------------------------


def as_treatments(features: Any, after: Any) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the features and the title of every treatment, by its name."""
    if isinstance(features, Mapping):
        if after is not None:
            raise InputError(
                "features is a mapping of treatments: give the features of after as one more entry of it."
            )
        if not features:
            raise InputError("features is a mapping without treatments: give one at least.")
        given = {str(name): _as_features(values, f"features[{name!r}]") for name, values in features.items()}
        return given, {name: printable(name) for name in given}
    given = {"before": _as_features(features, "features")}
    if after is None:
        return given, {"before": "these features"}
    given["after"] = _as_features(after, "after")
    return given, {"before": "the features before", "after": "the features after"}


def _as_features(values: Any, name: str) -> NDArray[Any]:
    """Return (n, …) of a real dtype; a memory map stays one."""
    if isinstance(values, Tensor):
        # numpy has no bfloat16.
        values = (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    with as_input_error():
        array = as_real_array(values, name)
    if array.ndim == 0 or len(array) == 0 or array.size == 0:
        raise InputError(f"{name} must have one row for each sample, got shape {array.shape}.")
    return array


def by_treatment(what: str, given: Any, treatments: Sequence[str]) -> dict[str, Any]:
    """Return the predictions, or the scores, of every treatment that has some; without names of the first."""
    if not isinstance(given, Mapping):
        return {} if given is None else {treatments[0]: given}
    for name in given:
        if name not in treatments:
            known = listed(treatments)
            raise InputError(f"{what} has {name!r}, but there are no such features; there are {known}.")
    return dict(given)


class Metadata:
    """The metadata columns, and the arguments that may name one of them."""

    def __init__(
        self,
        metadata: Any,
        kinds: Mapping[str, str] | None,
        ignore: Sequence[str],
        features: Mapping[str, NDArray[Any]],
    ) -> None:
        self.columns = as_columns(metadata, kinds, ignore)
        if not self.columns:
            raise InputError("there are no metadata columns to audit.")
        self.kinds = dict(kinds or {})
        self.by_name = {column.name: column for column in self.columns}
        # Columns that are an argument, and not audited.
        self.used: set[str] = set()
        first, *others = features
        self.num_rows = len(features[first])
        counts = {"features": self.num_rows, "metadata": len(self.columns[0].values)}
        # What the argument after is called among the treatments.
        is_after = (first, *others) == ("before", "after")
        counts |= {name if is_after else f"features[{name!r}]": len(features[name]) for name in others}
        with as_input_error():
            check_same_rows(**counts)

    def named(self, name: str, where: str) -> Column:
        """Return a column; `where` says what for, in a message."""
        if printable(name) not in self.by_name:
            known = ", ".join(map(repr, self.by_name))
            raise InputError(f"no metadata column {name!r} for {where}; there are {known}.")
        return self.by_name[printable(name)]

    def values(self, argument: Any, name: str) -> NDArray[Any]:
        """Return a column by its name, or an array as it is, checked for its length."""
        if isinstance(argument, str):
            column = self.named(argument, name)
            self.used.add(column.name)
            if column.num_missing:
                raise InputError(
                    f"{name}={argument!r} has {column.num_missing} missing value(s): fill them in."
                )
            return column.values
        values = argument.detach().cpu().numpy() if isinstance(argument, Tensor) else np.asarray(argument)
        if values.shape != (self.num_rows,):
            raise InputError(f"{name} must have shape ({self.num_rows},), got {values.shape}.")
        return values

    def label(self, labels: Any) -> Column | None:
        """Return the label, from a name or from its values."""
        if labels is None:
            return None
        if isinstance(labels, str):
            column = self.named(labels, "the labels")
            self.used.add(column.name)
        else:
            name = "label" if "label" not in self.by_name else "label given"
            column = as_column(name, labels, self.kinds.get(name), "the argument labels")
        if len(column.values) != self.num_rows:
            raise InputError(f"labels have {len(column.values)} rows, features {self.num_rows}.")
        return column

    def flags(self, held_out: Any) -> NDArray[np.bool_]:
        """Return which rows are held out, from booleans, 0 and 1, or their names."""
        values = _classes(self.values(held_out, "held_out"), "held_out")
        strange = sorted({str(value) for value in values if str(value).lower() not in _TRUTH})
        if strange:
            raise InputError(f"held_out must say true or false for each row, got {listed(strange)}.")
        return np.array([_TRUTH[str(value).lower()] for value in values], dtype=bool)

    def predictions(
        self, classes: Mapping[str, Any], scores: Mapping[str, Any], label: Column | None, positive: Any
    ) -> dict[str, Predictions]:
        """Return what was predicted from every treatment, read as the labels are."""
        for name in scores:
            if name not in classes:
                raise InputError(f"scores are used beside predictions: give those of {name!r} too.")
        return {
            name: self._predictions(part, scores.get(name), label, positive) for name, part in classes.items()
        }

    def _predictions(self, classes: Any, scores: Any, label: Column | None, positive: Any) -> Predictions:
        if label is None:
            raise InputError("predictions need the labels to compare with.")
        values = self.values(classes, "predictions")
        if label.kind == "continuous":
            if scores is not None or positive is not None:
                raise InputError("the labels are continuous, not classes: leave out scores and positive.")
            return Predictions(_finite(values, "predictions"))
        # Read as the labels are, so that 1, 1.0 and "1" of a table mean the same class.
        names = _classes(values, "predictions")
        known = np.unique(label.values[label.present]).tolist()
        strange = listed(sorted(set(names.tolist()) - set(known)))
        if strange:
            raise InputError(f"predictions hold {strange}, but the labels are only {listed(known, 10)}.")
        if scores is not None:
            scores = _finite(self.values(scores, "scores"), "scores")
            if scores.min() < 0 or scores.max() > 1:
                raise InputError(
                    f"scores must be probabilities from 0 to 1, got {scores.min():.3g} to "
                    f"{scores.max():.3g}: apply the sigmoid or softmax first."
                )
        if positive is not None:
            given, positive = positive, str(_classes([positive], "positive")[0])
            if positive not in known:
                raise InputError(f"positive={given!r} is not one of the labels.")
        return Predictions(names, scores, positive)


def _classes(values: Any, name: str) -> NDArray[np.str_]:
    return as_column(name, values, "categorical", f"the argument {name}").values


def _finite(values: NDArray[Any], name: str) -> NDArray[np.float64]:
    with as_input_error(f"{name} must be numbers: "):
        numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all():
        raise InputError(f"{name} must be finite numbers, but some are NaN or infinite.")
    return numbers


# -- the rows in use --------------------------------------------------------------------------------------


def aligned(inputs: Inputs, max_rows: int, settings: Settings) -> tuple[Inputs, list[str]]:
    """Return the rows in use, at most `max_rows` and all with finite features, and notes for the reader."""
    with as_input_error():
        check_integer("max_rows", max_rows, MIN_ROWS)
    notes = []
    num_rows = len(next(iter(inputs.features.values())))
    rows = np.arange(num_rows)
    if num_rows > max_rows:
        notes.append(
            f"{max_rows} of {num_rows} rows were sampled (seed {settings.seed}); a larger max_rows takes "
            "more of them."
        )
        rows = np.sort(np.random.default_rng(settings.seed).choice(num_rows, max_rows, replace=False))
    inputs = inputs.rows(rows)
    features = {
        name: np.asarray(values, np.float64).reshape(len(rows), -1)
        for name, values in inputs.features.items()
    }
    finite = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in features.values()])
    if not finite.all():
        notes.append(
            f"{int((~finite).sum())} of {len(rows)} rows have missing or infinite features and were left out."
        )
    inputs = replace(inputs, features=features).rows(finite)
    counts = {"rows with finite features": int(finite.sum())}
    if inputs.held_out is not None:
        counts["held-out rows"] = int(inputs.held_out.sum())
        counts["rows that are not held out"] = int((~inputs.held_out).sum())
    for what, count in counts.items():
        if count < MIN_ROWS:
            raise InputError(
                f"only {count} {what} are left of {num_rows}: an audit needs at least {MIN_ROWS}."
            )
    for name, values in inputs.features.items():
        notes += _notes_on_features(name, inputs.titles[name], values, standardize=settings.standardize)
    notes += _notes_on_leakage(inputs)
    return inputs, notes + _notes_on_subjects(inputs, settings.seed)


def _notes_on_leakage(inputs: Inputs) -> list[str]:
    """Say where features were discrete and a treatment gave nearly every row a value of its own."""
    (_, first), *others = inputs.features.items()
    discrete = [index for index, column in enumerate(first.T) if np.ptp(column) and is_discrete(column)]
    notes = []
    for name, values in others:
        if values.shape[1] != first.shape[1]:
            continue
        changed = sum(not is_discrete(values[:, index]) for index in discrete)
        if changed:
            notes.append(
                f"{changed} of {first.shape[1]} features had few different values and have many "
                f"({inputs.titles[name]}): what was subtracted differs from row to row, so that a non-linear "
                "model may read the metadata in the digits of the result, whatever the measures here show."
            )
    return notes


def _notes_on_features(name: str, title: str, values: NDArray[np.float64], *, standardize: bool) -> list[str]:
    notes = []
    largest = np.abs(values).max()
    constant = np.ptp(values, axis=0) <= LEAST_VARIATION * largest
    if constant.all():
        raise InputError(f"all features ({name}) are constant: there is nothing to audit.")
    if not 1 / _LARGEST < largest < _LARGEST:
        raise InputError(
            f"features ({name}) have values up to {largest:.3g}, whose squares float64 cannot hold: give "
            "them in another unit."
        )
    if constant.any():
        notes.append(f"{int(constant.sum())} of {values.shape[1]} features ({title}) are constant.")
    spread = values[:, ~constant].std(axis=0)
    ratio = spread.max() / spread.min()
    if ratio > _MIXED_UNITS and not standardize:
        notes.append(
            f"The spreads of the features ({title}) differ by a factor of {ratio:.0f}, and they are not "
            "standardised: dcor² is that of the feature with the largest numbers."
        )
    ends = np.abs(np.stack([values.min(axis=0), values.max(axis=0)]))
    suspects = np.flatnonzero(np.isin(ends, [float("9" * digits) for digits in range(1, 16)]).any(axis=0))
    codes = {code for index in suspects for code in stand_ins(values[:, index])}
    if codes:
        notes.append(
            f"Features ({title}) hold {', '.join(f'{code:.15g}' for code in sorted(codes))}, which seems to "
            "stand for missing values: write NaN instead, and these rows are left out."
        )
    return notes


def _notes_on_subjects(inputs: Inputs, seed: int) -> list[str]:
    """Say what was done with repeated subjects, or which column seems to name them."""
    if inputs.subjects is not None:
        num_rows, num_subjects = len(inputs.subjects), len(np.unique(inputs.subjects))
        if num_subjects == num_rows:
            return []
        return [
            f"{num_rows} rows are of {num_subjects} subjects. Distance correlations use one row of each "
            f"subject (seed {seed}), since their intervals and tests are for independent rows."
        ]
    notes = []
    for column in inputs.columns:
        values = column.values[column.present]
        if column.kind == "constant" or not _SUBJECT_NAME.search(column.name) or len(values) == 0:
            continue
        distinct = len(np.unique(values))
        if 1 < distinct < len(values):
            notes.append(
                f"{len(values)} rows have {distinct} values of {column.name}. If these are subjects, pass "
                "the column as subjects, since rows of the same subject are not independent."
            )
    return notes
