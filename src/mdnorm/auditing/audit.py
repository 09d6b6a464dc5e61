"""From features and metadata to a report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.auditing.columns import (
    Column,
    as_classes,
    as_column,
    as_columns,
    intersection,
    printable,
)
from mdnorm.auditing.findings import find
from mdnorm.auditing.measuring import (
    MIN_ROWS,
    MODELS,
    Predictions,
    Settings,
    feature_sets,
    measure_column,
    projections_of,
)
from mdnorm.auditing.reading import InputError
from mdnorm.auditing.report import Report
from mdnorm.design.roles import stand_ins
from mdnorm.metrics import cka

__all__ = ["audit", "number_of_steps"]

_PROJECTED_ROWS = 1000


def audit(
    features: Any,
    metadata: Any,
    labels: Any = None,
    *,
    after: Any = None,
    predictions: Any = None,
    predictions_after: Any = None,
    scores: Any = None,
    scores_after: Any = None,
    positive: Any = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    intersect: Sequence[Sequence[str]] = (),
    held_out: Any = None,
    subjects: Any = None,
    names: tuple[str, str] | None = None,
    max_rows: int = 2000,
    settings: Settings | None = None,
    project: str | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure what features know of metadata, and give a verdict on every column.

    For every metadata column: the distance correlation with an interval, cross-validated probes (linear and
    non-linear) with permutation tests, both over all samples and given the label, and, where predictions are
    given, the model's rates by group.

    Parameters
    ----------
    features : (n, p) or (n, …) array or tensor, or mapping
        One row a sample; more dimensions are flattened. Or names of treatments to such features of the same
        samples; the first is what the others are compared with.
    metadata : DataFrame, mapping, array or sequence of Column
        Of pandas, polars or pyarrow; or names to columns; or what `mdnorm.auditing.columns.as_columns` made
        of these; rows in the order of `features`. Missing values are fine: a column is measured on the rows
        where it is there.
    labels : str or (n,) array, optional
        Name of a metadata column, or the labels themselves: what the features are meant to know.
    after : (n, …) array or tensor, optional
        Features of the same samples after a treatment, or from another model: two treatments.
    predictions, predictions_after : str or (n,) array, optional
        What is predicted from `features` and `after` (the name of a metadata column, or the values): classes
        where the label is of classes, numbers where it is continuous. Of several treatments `predictions` is
        a mapping of their names.
    scores, scores_after : str or (n,) array, optional
        Predicted probabilities of the positive class, for calibration; a mapping as above.
    positive : optional
        Which label is the positive one. The larger of two by default.
    kinds : mapping, optional
        Names of metadata columns to "continuous" or "categorical", where the inferred kind is wrong.
    ignore : sequence of str
        Metadata columns to leave out: names, and patterns such as "voxel_*".
    keep : sequence of str
        Metadata columns that are meant to stay in the features, as the label is: their loss is harm.
    intersect : sequence of sequences of str
        Columns of classes whose combinations are audited too, such as ``[("gender", "ethnicity")]``.
    held_out : str or (n,) array of bool, optional
        Rows that no treatment was fitted on. They are audited apart from the others, and decide: most
        corrections look perfect on the rows they were fitted on.
    subjects : str or (n,) array, optional
        Who a row belongs to, where a subject has several: they stay together in the cross-validation and in
        the intervals of the gaps between groups, and distance correlations are those of one row of each.
    names : pair of str, optional
        What to call the features before and after in the report.
    max_rows : int
        More rows than this are sampled (seeded), and the report says so.
    settings : Settings, optional
        How to measure, and the limits from which on something is harm.
    project : str, optional
        Name of what is audited, for the head of the page.
    facts : mapping, optional
        Shown under "How it was made" on the page.
    progress : callable, optional
        Called with a text before each of the steps that `number_of_steps` counts.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        The inputs do not fit together, or too little is left to measure; the message says what.
    mdnorm.extras.MissingExtraError
        A package of the extra ``mdnorm[audit]`` is missing.

    Examples
    --------
    >>> import numpy as np, mdnorm
    >>> rng = np.random.default_rng(0)
    >>> site = rng.integers(0, 3, 200)
    >>> features = rng.standard_normal((200, 4)) + 3 * np.eye(3)[site][:, [0, 1, 2, 0]]
    >>> report = mdnorm.audit(features, {"site": site})
    >>> report.findings[0].level
    'strong'
    """
    settings = settings or Settings()
    step = progress or (lambda text: None)
    notes: list[str] = []
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < MIN_ROWS:
        raise InputError(f"max_rows must be a whole number of at least {MIN_ROWS}, got {max_rows!r}.")

    given, titles = _treatments(features, after, names)
    first = next(iter(given))
    num_rows = len(given[first])
    by_treatment = _by_treatment(
        given, predictions, predictions_after, scores, scores_after, several=isinstance(features, Mapping)
    )
    used_names = {
        printable(argument)
        for argument in (
            labels,
            subjects,
            held_out,
            *(part for pair in by_treatment.values() for part in pair),
        )
        if isinstance(argument, str)
    }
    columns = as_columns(metadata, kinds, ignore)
    if not columns:
        raise InputError("there are no metadata columns to audit.")
    by_name = {column.name: column for column in columns}
    _check_rows(given, columns, num_rows)
    for group in intersect:
        parts = [_named(name, by_name, "an intersection") for name in group]
        columns.append(intersection(parts))
    to_keep = {_named(name, by_name, "what is meant to stay").name for name in keep}

    label = _label(labels, by_name, kinds, num_rows)
    predicted = {
        name: _predictions(classes, probabilities, label, positive, by_name, num_rows)
        for name, (classes, probabilities) in by_treatment.items()
    }
    subject_values = None if subjects is None else _values(subjects, by_name, num_rows, "subjects")
    is_held_out = None if held_out is None else _flags(held_out, by_name, num_rows)

    rows = _rows_to_use(num_rows, max_rows, settings.seed, notes)
    used = {key: np.asarray(values[rows], np.float64).reshape(len(rows), -1) for key, values in given.items()}
    finite = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in used.values()])
    if not finite.all():
        notes.append(
            f"{int((~finite).sum())} of {len(rows)} rows have missing or infinite features and were left out."
        )
        rows = rows[finite]
        used = {key: values[finite] for key, values in used.items()}
    for part, what in ((rows, "rows with finite features"), *_parts(rows, is_held_out)):
        if len(part) < MIN_ROWS:
            raise InputError(
                f"only {len(part)} {what} are left of {num_rows}: an audit needs at least {MIN_ROWS}."
            )
    _note_odd_features(used, titles, notes, standardize=settings.standardize)

    if subject_values is not None:
        num_subjects = len(np.unique(subject_values[rows]))
        if num_subjects < len(rows):
            notes.append(
                f"{len(rows)} rows are of {num_subjects} subjects: distance correlations are those of one "
                f"row of each (seed {settings.seed}), since their intervals and tests are for independent "
                "rows."
            )
    else:
        notes.extend(_suggested_subjects(columns, rows))

    kept = [column.rows(rows) for column in columns if column.name not in used_names]
    kept = [_again_auditable(column) for column in kept]
    left_out = [column for column in kept if not column.is_auditable]
    audited = [column for column in kept if column.is_auditable]
    shown_label = None
    if label is not None:
        shown_label = _again_auditable(label.rows(rows))
        if not shown_label.is_auditable:
            raise InputError(f"the label {shown_label.name!r} cannot be used: {shown_label.note}")
        audited.append(shown_label)
    sets = feature_sets(
        {key: (titles[key], values) for key, values in used.items()},
        None if is_held_out is None else is_held_out[rows],
        standardize=settings.standardize,
    )
    kept_predictions = {
        key: Predictions(
            prediction.classes[rows],
            None if prediction.scores is None else prediction.scores[rows],
            prediction.positive,
        )
        for name, prediction in predicted.items()
        for key in sets
        if key == name or key.startswith(f"{name}, ")
    }

    measured = []
    for column in audited:
        role = "keep" if column.name in to_keep else "remove"
        try:
            measured.append(
                measure_column(
                    column,
                    sets,
                    shown_label,
                    kept_predictions,
                    None if subject_values is None else subject_values[rows],
                    settings,
                    step,
                    "label" if column is shown_label else role,
                )
            )
        except ValueError as error:
            left_out.append(replace(column, note=f"it cannot be measured: {error}"))
    audited = [column for column in audited if column.name in {done.name for done in measured}]
    if all(column.is_label for column in measured):
        raise InputError(
            "no metadata column can be audited: "
            + " ".join(f"{column.name}: {column.note}" for column in left_out)
        )
    notes += [f"{column.name} was left out: {column.note}" for column in left_out]
    step("projection and similarity")
    label_name = None if shown_label is None else shown_label.name
    findings = find(measured, sets, label_name, settings)
    # The columns in the order of their verdicts, the label last.
    order = {name: place for place, name in enumerate(dict.fromkeys(finding.column for finding in findings))}
    last = list(used)[-1]
    return Report(
        findings=tuple(findings),
        columns=tuple(sorted(measured, key=lambda column: (column.is_label, order[column.name]))),
        left_out=tuple(left_out),
        notes=tuple(notes),
        label=label_name,
        sets=sets,
        settings=settings,
        similarity=float(cka(used[first], used[last])) if last != first else None,
        facts={
            "project": None if project is None else printable(project),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "rows_given": num_rows,
            "rows_used": len(rows),
            "features": {key: list(values.shape) for key, values in used.items()},
            "fingerprint": _fingerprint(used, audited),
            "settings": asdict(settings),
            "max_rows": max_rows,
            "versions": _versions(),
            **(facts or {}),
        },
        projections=projections_of(used, _PROJECTED_ROWS, settings.seed),
        values=tuple(audited),
    )


def number_of_steps(num_columns: int, num_representations: int) -> int:
    """Return how often `audit` reports progress for so many audited columns, the label among them."""
    return num_columns * num_representations * (1 + len(MODELS)) + 1


def _as_features(values: Any, name: str) -> NDArray[Any]:
    """Return (n, …) of a real dtype; a memory map stays one."""
    if isinstance(values, Tensor):
        # numpy has no bfloat16.
        values = (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be real numbers, got dtype {array.dtype}.")
    if array.ndim == 0 or len(array) == 0 or array.size == 0:
        raise InputError(f"{name} must have one row for each sample, got shape {array.shape}.")
    return array


def _treatments(
    features: Any, after: Any, names: tuple[str, str] | None
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the features and the titles of every treatment."""
    if isinstance(features, Mapping):
        if after is not None or names is not None:
            raise InputError("features of named treatments are all there are: leave out after and names.")
        if not features:
            raise InputError("features is a mapping without treatments: give one at least.")
        given = {str(name): _as_features(values, f"features[{name!r}]") for name, values in features.items()}
        return given, {name: printable(name) for name in given}
    given = {"before": _as_features(features, "features")}
    titles = ["these features"]
    if after is not None:
        given["after"] = _as_features(after, "after")
        titles = ["the features before", "the features after"]
    return given, dict(zip(given, map(printable, names or titles), strict=False))


def _by_treatment(
    given: Mapping[str, NDArray[Any]],
    predictions: Any,
    predictions_after: Any,
    scores: Any,
    scores_after: Any,
    *,
    several: bool,
) -> dict[str, tuple[Any, Any]]:
    """Return predictions and scores of every treatment that has some."""
    named = []
    for what, first, second in (
        ("predictions", predictions, predictions_after),
        ("scores", scores, scores_after),
    ):
        if isinstance(first, Mapping) or several:
            if second is not None or not (first is None or isinstance(first, Mapping)):
                raise InputError(f"{what} of named treatments must be a mapping of their names.")
            unknown = [name for name in first or {} if name not in given]
            if unknown:
                raise InputError(f"{what} belong to no features {unknown[0]!r}; there are {_listed(given)}.")
            named.append(dict(first or {}))
            continue
        if second is not None and "after" not in given:
            raise InputError(f"{what}_after belong to the features after: give these too.")
        parts = {"before": first, "after": second}
        named.append({name: part for name, part in parts.items() if part is not None})
    classes, probabilities = named
    for name in probabilities:
        if name not in classes:
            raise InputError(f"scores are used beside predictions: give those of {name!r} too.")
    return {name: (part, probabilities.get(name)) for name, part in classes.items()}


def _named(name: str, by_name: Mapping[str, Column], where: str) -> Column:
    column = by_name.get(printable(name))
    if column is None:
        raise InputError(f"no metadata column {name!r} for {where}; there are {_listed(by_name)}.")
    return column


def _parts(rows: NDArray[Any], held_out: NDArray[np.bool_] | None) -> list[tuple[NDArray[Any], str]]:
    if held_out is None:
        return []
    inside = held_out[rows]
    return [(rows[inside], "held-out rows"), (rows[~inside], "rows that are not held out")]


def _flags(argument: Any, by_name: Mapping[str, Column], num_rows: int) -> NDArray[np.bool_]:
    """Return which rows are held out, from booleans, 0 and 1, or their names."""
    values = as_classes(_values(argument, by_name, num_rows, "held_out"), "held_out")
    truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    strange = sorted({str(value) for value in values if str(value).lower() not in truth})
    if strange:
        raise InputError(
            f"held_out must say true or false for each row, got {', '.join(map(repr, strange[:5]))}."
        )
    return np.array([truth[str(value).lower()] for value in values], dtype=bool)


def _check_rows(given: Mapping[str, NDArray[Any]], columns: Sequence[Column], num_rows: int) -> None:
    counts = {"features": num_rows, "metadata": len(columns[0].values)}
    counts |= {name: len(values) for name, values in list(given.items())[1:]}
    if len(set(counts.values())) > 1:
        raise InputError(
            "row counts differ: "
            + ", ".join(f"{count} in {name}" for name, count in counts.items())
            + ". Each must have one row for each sample, in the same order."
        )


def _label(
    labels: Any, by_name: Mapping[str, Column], kinds: Mapping[str, str] | None, num_rows: int
) -> Column | None:
    if labels is None:
        return None
    if isinstance(labels, str):
        column = _named(labels, by_name, "the labels")
    else:
        name = "label" if "label" not in by_name else "label given"
        column = as_column(name, labels, (kinds or {}).get(name))
    if len(column.values) != num_rows:
        raise InputError(f"labels have {len(column.values)} rows, features {num_rows}.")
    return column


def _listed(by_name: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, by_name))


def _values(argument: Any, by_name: Mapping[str, Column], num_rows: int, name: str) -> NDArray[Any]:
    """Return a column by its name, or an array as it is, checked for its length."""
    if isinstance(argument, str):
        column = _named(argument, by_name, name)
        if not column.present.all():
            raise InputError(f"the column {argument!r} for {name} has {column.num_missing} missing value(s).")
        return column.values
    values = argument.detach().cpu().numpy() if isinstance(argument, Tensor) else np.asarray(argument)
    if values.shape != (num_rows,):
        raise InputError(f"{name} must have shape ({num_rows},), got {values.shape}.")
    return values


def _predictions(
    classes: Any,
    probabilities: Any,
    label: Column | None,
    positive: Any,
    by_name: Mapping[str, Column],
    num_rows: int,
) -> Predictions:
    if label is None:
        raise InputError("predictions need the labels to compare with.")
    values = _values(classes, by_name, num_rows, "predictions")
    if label.kind == "continuous":
        if probabilities is not None or positive is not None:
            raise InputError("scores and a positive class are for labels of classes, not for numbers.")
        return Predictions(_finite(values, "predictions"))
    # Read as the labels are, so that 1, 1.0 and "1" of a table mean the same class.
    names = as_classes(values, "predictions")
    strange = sorted(set(names.tolist()) - set(label.values[label.present].tolist()))
    if strange:
        raise InputError(
            f"predictions hold {', '.join(map(repr, strange[:5]))}, which no label is; there are "
            f"{', '.join(map(repr, np.unique(label.values[label.present]).tolist()[:10]))}."
        )
    scores = None
    if probabilities is not None:
        scores = _probabilities(_values(probabilities, by_name, num_rows, "scores"))
    positive_name = None if positive is None else str(as_classes([positive], "positive")[0])
    if positive_name is not None and positive_name not in label.values[label.present]:
        raise InputError(f"positive={positive!r} is not one of the labels.")
    return Predictions(names, scores, positive_name)


def _finite(values: NDArray[Any], name: str) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}.") from error
    if not np.isfinite(numbers).all():
        raise InputError(f"{name} must be finite numbers, but some are NaN or infinite.")
    return numbers


def _probabilities(values: NDArray[Any]) -> NDArray[np.float64]:
    scores = _finite(values, "scores")
    if scores.min() < 0 or scores.max() > 1:
        raise InputError(
            f"scores must be probabilities from 0 to 1, got {scores.min():.3g} to {scores.max():.3g}: apply "
            "the sigmoid or softmax first."
        )
    return scores


def _rows_to_use(num_rows: int, max_rows: int, seed: int, notes: list[str]) -> NDArray[np.int64]:
    if num_rows <= max_rows:
        return np.arange(num_rows)
    notes.append(
        f"{max_rows} of {num_rows} rows were sampled (seed {seed}); a larger max_rows takes more of them."
    )
    return np.sort(np.random.default_rng(seed).choice(num_rows, max_rows, replace=False))


# A feature whose spread is more than this many times that of another is measured in another unit.
_MIXED_UNITS = 100.0


def _note_odd_features(
    used: Mapping[str, NDArray[np.float64]], titles: Mapping[str, str], notes: list[str], *, standardize: bool
) -> None:
    for key, values in used.items():
        spread = values.std(axis=0)
        constant = int((np.ptp(values, axis=0) == 0).sum())
        if constant == values.shape[1]:
            raise InputError(f"all features ({key}) are constant: there is nothing to audit.")
        if constant:
            notes.append(f"{constant} of {values.shape[1]} features ({titles[key]}) are constant.")
        ratio = spread.max() / spread[spread > 0].min()
        if ratio > _MIXED_UNITS and not standardize:
            notes.append(
                f"Features ({titles[key]}) differ {ratio:.0f}-fold in their spread and are not standardised: "
                "dcor² is that of the largest."
            )
        ends = np.abs(np.stack([values.min(axis=0), values.max(axis=0)]))
        suspects = np.flatnonzero(np.isin(ends, [float("9" * digits) for digits in range(1, 16)]).any(axis=0))
        codes = {code for index in suspects for code in stand_ins(values[:, index])}
        if codes:
            listed = ", ".join(f"{code:.15g}" for code in sorted(codes))
            notes.append(
                f"Features ({titles[key]}) hold {listed}, which seems to stand for missing values: write NaN "
                "instead, and these rows are left out."
            )


def _suggested_subjects(columns: Sequence[Column], rows: NDArray[np.int64]) -> list[str]:
    """Return a note where a column with the name of subjects has several rows of the same value."""
    notes = []
    for column in columns:
        values = column.values[rows][column.present[rows]]
        if column.kind == "constant" or not _SUBJECT_NAME.search(column.name) or len(values) == 0:
            continue
        distinct = len(np.unique(values))
        if 1 < distinct < len(values):
            notes.append(
                f"{len(values)} rows have {distinct} values of {column.name}: if these are subjects, name "
                "the column as such, since rows of the same subject are not independent."
            )
    return notes


_SUBJECT_NAME = re.compile(
    r"(^|[_\W])(subjects?|participants?|patients?|persons?|sub|ppt)([_\W]|$)", re.IGNORECASE
)


def _fingerprint(used: Mapping[str, NDArray[np.float64]], columns: Sequence[Column]) -> str:
    """Return twelve digits that change with any value of the rows in use."""
    digest = hashlib.sha256()
    for values in used.values():
        digest.update(np.ascontiguousarray(values).tobytes())
    for column in columns:
        digest.update(repr((column.name, column.values.tolist())).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:12]


def _again_auditable(column: Column) -> Column:
    """Return the column, as a constant if it is one on the rows in use."""
    if not column.is_auditable:
        return column
    distinct = np.unique(column.values[column.present])
    if len(distinct) > 1 and column.present.sum() >= MIN_ROWS:
        return column
    note = (
        "every row in use has the same value: not audited."
        if len(distinct) < 2
        else f"only {int(column.present.sum())} rows have a value, fewer than {MIN_ROWS}: not audited."
    )
    return replace(column, kind="constant", note=note)


def _versions() -> dict[str, str]:
    import sklearn

    import mdnorm

    return {
        "mdnorm": mdnorm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }
