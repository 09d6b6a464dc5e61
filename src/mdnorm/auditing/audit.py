"""From features and metadata to a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.auditing.columns import Column, as_classes, as_column, as_columns
from mdnorm.auditing.findings import find
from mdnorm.auditing.measuring import MODELS, Predictions, Settings, measure_column, project
from mdnorm.auditing.reading import InputError
from mdnorm.auditing.report import Report, titles_of
from mdnorm.metrics import cka

__all__ = ["audit", "number_of_steps"]

_MIN_ROWS = 20
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
    subjects: Any = None,
    names: tuple[str, str] | None = None,
    max_rows: int = 2000,
    settings: Settings | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure what features know of metadata, and say it in plain words.

    For every metadata column: the distance correlation with an interval, cross-validated probes (linear and
    non-linear) with permutation tests, both over all samples and among samples of the same label, and, where
    predictions are given, the model's rates by group.

    Parameters
    ----------
    features : (n, p) or (n, …) array or tensor
        One row a sample; more dimensions are flattened.
    metadata : DataFrame, mapping, array or sequence of Column
        Of pandas, polars or pyarrow; or names to columns; or what `mdnorm.auditing.columns.as_columns` made
        of these; rows in the order of `features`. Missing values are fine: a column is measured on the rows
        where it is there.
    labels : str or (n,) array, optional
        Name of a metadata column, or the labels themselves: what the features are meant to know.
    after : (n, …) array or tensor, optional
        Features of the same samples after a treatment, or from another model.
    predictions, predictions_after : str or (n,) array, optional
        Predicted labels (the name of a metadata column, or the values) that belong to `features` and `after`.
    scores, scores_after : str or (n,) array, optional
        Predicted probabilities of the positive class, for calibration.
    positive : optional
        Which label is the positive one. The larger of two by default.
    kinds : mapping, optional
        Names of metadata columns to "continuous" or "categorical", where the inferred kind is wrong.
    ignore : sequence of str
        Metadata columns to leave out: names, and patterns such as "voxel_*".
    subjects : str or (n,) array, optional
        Who a row belongs to, where a subject has several: they stay together in the cross-validation and in
        the intervals of the gaps between groups, and distance correlations are those of one row of each.
    names : pair of str, optional
        What to call the features before and after in the report.
    max_rows : int
        More rows than this are sampled (seeded), and the report says so.
    settings : Settings, optional
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
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < _MIN_ROWS:
        raise InputError(f"max_rows must be a whole number of at least {_MIN_ROWS}, got {max_rows!r}.")

    given = {"before": _as_features(features, "features")}
    if after is not None:
        given["after"] = _as_features(after, "after")
    num_rows = len(given["before"])
    reserved = _names_in(labels, predictions, predictions_after, scores, scores_after, subjects)
    columns = as_columns(metadata, kinds, ignore)
    if not columns:
        raise InputError("there are no metadata columns to audit.")
    by_name = {column.name: column for column in columns}
    _check_rows(given, columns, num_rows)

    label = _label(labels, by_name, kinds, num_rows)
    predicted = {}
    for key, classes, probabilities, suffix in (
        ("before", predictions, scores, ""),
        ("after", predictions_after, scores_after, "_after"),
    ):
        if classes is None and probabilities is None:
            continue
        if classes is None:
            raise InputError(f"scores{suffix} are used beside predictions{suffix}: give these too.")
        if key not in given:
            raise InputError(f"predictions{suffix} belong to the features after: give these too.")
        predicted[key] = _predictions(classes, probabilities, label, positive, by_name, num_rows, suffix)
    subject_values = None if subjects is None else _values(subjects, by_name, num_rows, "subjects")

    rows = _rows_to_use(given, max_rows, settings.seed, notes)
    used = {key: np.asarray(values[rows], np.float64).reshape(len(rows), -1) for key, values in given.items()}
    finite = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in used.values()])
    if not finite.all():
        notes.append(
            f"{int((~finite).sum())} of {len(rows)} rows have missing or infinite features and were left out."
        )
        rows = rows[finite]
        used = {key: values[finite] for key, values in used.items()}
    if len(rows) < _MIN_ROWS:
        raise InputError(
            f"only {len(rows)} rows with finite features are left of {num_rows}: an audit needs at least "
            f"{_MIN_ROWS}."
        )
    _note_constant_features(used, notes)

    if subject_values is not None:
        num_subjects = len(np.unique(subject_values[rows]))
        if num_subjects < len(rows):
            notes.append(
                f"{len(rows)} rows are of {num_subjects} subjects: distance correlations are those of one "
                f"row of each (seed {settings.seed}), since their intervals and tests are for independent "
                "rows."
            )

    kept = [column.rows(rows) for column in columns if column.name not in reserved]
    kept = [_again_auditable(column) for column in kept]
    left_out = [column for column in kept if not column.is_auditable]
    audited = [column for column in kept if column.is_auditable]
    shown_label = None
    if label is not None:
        shown_label = _again_auditable(label.rows(rows))
        if not shown_label.is_auditable:
            raise InputError(f"the label {shown_label.name!r} cannot be used: {shown_label.note}")
        audited.append(shown_label)
    kept_predictions = {
        key: Predictions(
            prediction.classes[rows],
            None if prediction.scores is None else prediction.scores[rows],
            prediction.positive,
        )
        for key, prediction in predicted.items()
    }

    measured = []
    for column in audited:
        try:
            measured.append(
                measure_column(
                    column,
                    used,
                    shown_label,
                    kept_predictions,
                    None if subject_values is None else subject_values[rows],
                    settings,
                    step,
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
    titles = titles_of(list(used), names)
    return Report(
        findings=tuple(find(measured, titles, None if shown_label is None else shown_label.name)),
        columns=tuple(measured),
        left_out=tuple(left_out),
        notes=tuple(notes),
        label=None if shown_label is None else shown_label.name,
        titles=titles,
        similarity=float(cka(used["before"], used["after"])) if "after" in used else None,
        facts={
            "rows_given": num_rows,
            "rows_used": len(rows),
            "features": {key: list(values.shape) for key, values in used.items()},
            "settings": asdict(settings),
            "max_rows": max_rows,
            "versions": _versions(),
            **(facts or {}),
        },
        projections={key: project(values, _PROJECTED_ROWS, settings.seed) for key, values in used.items()},
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


def _names_in(*arguments: Any) -> set[str]:
    return {argument for argument in arguments if isinstance(argument, str)}


def _check_rows(given: Mapping[str, NDArray[Any]], columns: Sequence[Column], num_rows: int) -> None:
    counts = {"features": num_rows, "metadata": len(columns[0].values)}
    if "after" in given:
        counts["after"] = len(given["after"])
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
        if labels not in by_name:
            raise InputError(f"no metadata column {labels!r} for the labels; there are {_listed(by_name)}.")
        column = by_name[labels]
    else:
        name = "label" if "label" not in by_name else "label given"
        column = as_column(name, labels, (kinds or {}).get(name))
    if len(column.values) != num_rows:
        raise InputError(f"labels have {len(column.values)} rows, features {num_rows}.")
    return column


def _listed(by_name: Mapping[str, Column]) -> str:
    return ", ".join(map(repr, by_name))


def _values(argument: Any, by_name: Mapping[str, Column], num_rows: int, name: str) -> NDArray[Any]:
    """Return a column by its name, or an array as it is, checked for its length."""
    if isinstance(argument, str):
        if argument not in by_name:
            raise InputError(f"no metadata column {argument!r} for {name}; there are {_listed(by_name)}.")
        column = by_name[argument]
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
    suffix: str,
) -> Predictions:
    if label is None or label.kind != "categorical":
        raise InputError(f"predictions{suffix} need the labels, as classes, to compare with.")
    values = _values(classes, by_name, num_rows, f"predictions{suffix}")
    # Read as the labels are, so that 1, 1.0 and "1" of a table mean the same class.
    names = as_classes(values, f"predictions{suffix}")
    strange = sorted(set(names.tolist()) - set(label.values[label.present].tolist()))
    if strange:
        raise InputError(
            f"predictions{suffix} hold {', '.join(map(repr, strange[:5]))}, which no label is; there are "
            f"{', '.join(map(repr, np.unique(label.values[label.present]).tolist()[:10]))}."
        )
    scores = None
    if probabilities is not None:
        scores = _probabilities(_values(probabilities, by_name, num_rows, f"scores{suffix}"), suffix)
    positive_name = None if positive is None else str(as_classes([positive], "positive")[0])
    if positive_name is not None and positive_name not in label.values[label.present]:
        raise InputError(f"positive={positive!r} is not one of the labels.")
    return Predictions(names, scores, positive_name)


def _probabilities(values: NDArray[Any], suffix: str) -> NDArray[np.float64]:
    try:
        scores = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"scores{suffix} must be numbers: {error}.") from error
    if not np.isfinite(scores).all():
        raise InputError(f"scores{suffix} must be probabilities, but some are NaN or infinite.")
    if scores.min() < 0 or scores.max() > 1:
        raise InputError(
            f"scores{suffix} must be probabilities from 0 to 1, got {scores.min():.3g} to "
            f"{scores.max():.3g}: apply the sigmoid or softmax first."
        )
    return scores


def _rows_to_use(
    given: Mapping[str, NDArray[Any]], max_rows: int, seed: int, notes: list[str]
) -> NDArray[np.int64]:
    num_rows = len(given["before"])
    if num_rows <= max_rows:
        return np.arange(num_rows)
    notes.append(
        f"{max_rows} of {num_rows} rows were sampled (seed {seed}); a larger max_rows takes more of them."
    )
    return np.sort(np.random.default_rng(seed).choice(num_rows, max_rows, replace=False))


def _note_constant_features(used: Mapping[str, NDArray[np.float64]], notes: list[str]) -> None:
    for key, values in used.items():
        constant = int((np.ptp(values, axis=0) == 0).sum())
        if constant == values.shape[1]:
            raise InputError(f"all features ({key}) are constant: there is nothing to audit.")
        if constant:
            notes.append(f"{constant} of {values.shape[1]} features ({key}) are constant.")


def _again_auditable(column: Column) -> Column:
    """Return the column, as a constant if it is one on the rows in use."""
    if not column.is_auditable:
        return column
    distinct = np.unique(column.values[column.present])
    if len(distinct) > 1 and column.present.sum() >= _MIN_ROWS:
        return column
    note = (
        "every row in use has the same value: not audited."
        if len(distinct) < 2
        else f"only {int(column.present.sum())} rows have a value, fewer than {_MIN_ROWS}: not audited."
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
