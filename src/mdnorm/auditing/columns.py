"""What a metadata column is: numbers, classes, an identifier, a constant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.auditing.reading import InputError, matching
from mdnorm.extras import requires

__all__ = [
    "Column",
    "Kind",
    "as_classes",
    "as_column",
    "as_columns",
    "intersection",
    "printable",
    "stand_ins",
]

Kind = Literal["continuous", "categorical", "constant", "identifier"]

_MAX_CLASSES_OF_NUMBERS = 10
_MAX_CLASSES = 200
_SECONDS_OF_A_DAY = 86_400
_IDENTIFIER_NAME = re.compile(r"(^|[_\W])(u?id|uuid|index|row|unnamed)([_\W]|$)", re.IGNORECASE)


# Controls, line separators, marks of writing direction, and halves of surrogate pairs.
_NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Larger whole numbers are not all apart as floats: they are read as text.
_LARGEST_EXACT = 2**53

# How often a number stands for a missing value at least.
_LEAST_STAND_INS = 3


@dataclass(frozen=True)
class Column:
    """A column of metadata.

    Attributes
    ----------
    name : str
    kind : {"continuous", "categorical", "constant", "identifier"}
        The latter two cannot be audited.
    values : (n,) array
        float64, NaN where missing, if continuous; otherwise str, "" where missing.
    present : (n,) array of bool
        False where the value is missing.
    note : str
        What the reader should know about how it was read; may be empty.
    is_date : bool
        Whether the values are the seconds since 1970 of dates.
    """

    name: str
    kind: Kind
    values: NDArray[Any]
    present: NDArray[np.bool_]
    note: str = ""
    is_date: bool = False

    @property
    def is_auditable(self) -> bool:
        """Whether there is something to measure."""
        return self.kind in ("continuous", "categorical")

    @property
    def num_missing(self) -> int:
        """Number of rows without a value."""
        return int((~self.present).sum())

    def rows(self, index: NDArray[Any]) -> Column:
        """Return the column with these rows only."""
        return replace(self, values=self.values[index], present=self.present[index])

    def design_matrix(self) -> NDArray[np.float64]:
        """Return the values for a distance: (n, 1) numbers, or (n, number of classes) indicators."""
        if self.kind == "continuous":
            return np.asarray(self.values, np.float64)[:, None]
        classes, codes = np.unique(self.values, return_inverse=True)
        return np.eye(len(classes))[codes]

    def text(self, value: float) -> str:
        """Return a value of a continuous column as it is read: a number of four digits, or a date."""
        if not self.is_date:
            return _number(value)
        values = self.values[self.present]
        has_times = bool(np.any(values % _SECONDS_OF_A_DAY))
        date = np.datetime64(round(value), "s")
        return str(date.astype("datetime64[m]" if has_times else "datetime64[D]")).replace("T", " ")

    def describe(self) -> str:
        """Return a few words on the values."""
        values = self.values[self.present]
        if self.kind == "continuous":
            low, middle, high = map(self.text, (values.min(), float(np.median(values)), values.max()))
            return f"{low} to {high}, median {middle}"
        if self.kind == "categorical":
            classes, counts = np.unique(values, return_counts=True)
            order = np.argsort(-counts, kind="stable")
            shown = ", ".join(f"{classes[i]} ({counts[i]})" for i in order[:6])
            return shown + (f", … ({len(classes)} classes)" if len(classes) > 6 else "")
        return self.note


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def printable(name: Any) -> str:
    """Return a name as text that a page, a figure and a file can hold, in one line."""
    return _NOT_PRINTABLE.sub("\ufffd", str(name)).strip() or "(no name)"


def as_columns(
    metadata: Any, kinds: Mapping[str, str] | None = None, ignore: Sequence[str] = ()
) -> list[Column]:
    """Return the columns of a table.

    Parameters
    ----------
    metadata : DataFrame, Series, mapping, tensor, array or sequence of Column
        Of pandas, polars or pyarrow; or names to columns of length n; or (n,) or (n, K) without names; or
        columns that were read before.
    kinds : mapping, optional
        Names to "continuous" or "categorical", where the inferred kind is not what is meant.
    ignore : sequence of str
        Names, and patterns such as "voxel_*", to leave out.

    Raises
    ------
    InputError
        A name in `kinds` or `ignore` does not exist, a kind is unknown or given for columns that were read
        before, columns differ in length, or a column cannot be read as its kind.
    """
    kinds = dict(kinds or {})
    if isinstance(metadata, (list, tuple)) and all(isinstance(column, Column) for column in metadata):
        if kinds:
            raise InputError("these metadata columns were read before: give their kinds there.")
        ignored = matching([column.name for column in metadata], ignore, "metadata column")
        return [column for column in metadata if column.name not in ignored]
    table = _as_mapping(metadata)
    matching(list(table), list(kinds), "metadata column")
    ignored = matching(list(table), ignore, "metadata column")
    lengths = {name: len(values) for name, values in table.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the metadata columns differ in length: {lengths}.")
    return [as_column(name, values, kinds.get(name)) for name, values in table.items() if name not in ignored]


def _as_mapping(metadata: Any) -> dict[str, Any]:
    if isinstance(metadata, Mapping):
        return {str(name): _as_array(values) for name, values in metadata.items()}
    if isinstance(metadata, (Tensor, np.ndarray, list, tuple)):
        values = _as_array(metadata)
        if values.ndim == 1:
            return {"metadata": values}
        if values.ndim != 2:
            raise InputError(f"metadata must have shape (n,) or (n, columns), got {values.shape}.")
        return {f"metadata {index}": values[:, index] for index in range(values.shape[1])}
    with requires("audit"):
        import narwhals as nw
    try:
        frame = nw.from_native(metadata, eager_only=True, allow_series=True)
    except TypeError as error:
        raise InputError(
            "metadata must be a DataFrame of pandas, polars or pyarrow, a mapping of names to columns, or an "
            f"array, got {type(metadata).__name__}."
        ) from error
    if isinstance(frame, nw.Series):
        return {str(frame.name or "metadata"): _series_values(frame)}
    return {str(name): _series_values(frame[name]) for name in frame.columns}


def _as_array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().double() if values.is_floating_point() else values.cpu())
    if type(values).__module__.split(".")[0] in ("pandas", "polars", "pyarrow"):
        with requires("audit"):
            import narwhals as nw
        return _series_values(nw.from_native(values, series_only=True))
    return np.asarray(values)


def _series_values(series: Any) -> NDArray[Any]:
    """Return a narwhals series as floats (NaN where missing), dates (NaT) or objects (None)."""
    import narwhals as nw

    kind = series.dtype
    if kind.is_integer() and max(series.max() or 0, -(series.min() or 0)) > _LARGEST_EXACT:
        return np.array([None if value is None else str(value) for value in series.to_list()], dtype=object)
    if kind.is_numeric():
        return np.asarray(series.cast(nw.Float64).to_numpy(), np.float64)
    if kind in (nw.Datetime, nw.Date):
        # Of a time zone: the moment, in UTC.
        series = series.cast(nw.Datetime("us")) if kind == nw.Date else series
        stamps = series.dt.timestamp("ms").cast(nw.Float64).to_numpy()
        is_missing = np.isnan(stamps)
        dates = np.where(is_missing, 0, stamps).astype(np.int64).astype("datetime64[ms]")
        dates[is_missing] = np.datetime64("NaT")
        return dates
    if kind == nw.Duration:
        return np.asarray(series.dt.total_milliseconds().cast(nw.Float64).to_numpy(), np.float64) / 1000
    if kind.is_nested():
        raise InputError(
            f"metadata column {series.name!r} holds {kind}: a column must hold one value for each sample."
        )
    return np.array(series.to_list(), dtype=object)


def as_column(name: str, values: Any, kind: str | None = None) -> Column:
    """Return a column, its kind inferred unless given.

    Whole numbers of at most ten distinct values are classes, other numbers continuous; strings and booleans
    are classes. Strings that are nearly all different, and whole numbers that count the rows or are called an
    id, are identifiers. Of dates, the seconds count.

    Parameters
    ----------
    name : str
    values : (n,) array or tensor
    kind : {"continuous", "categorical"}, optional

    Raises
    ------
    InputError
        The kind is unknown, or the values cannot be read as it.
    """
    name = printable(name)
    if kind is not None and kind not in ("continuous", "categorical"):
        raise InputError(
            f"metadata column {name!r}: the kind must be continuous or categorical, got {kind!r}."
        )
    values = _as_array(values)
    array = _numbers_or_texts(values, f"metadata column {name!r}")
    if array.dtype.kind == "f":
        column = _numeric(name, array, kind)
        return replace(column, is_date=column.kind == "continuous" and values.dtype.kind == "M")
    if kind == "continuous":
        try:
            return _numeric(name, np.array([float(text) if text else np.nan for text in array]), kind)
        except ValueError as error:
            raise InputError(f"metadata column {name!r} cannot be read as continuous: {error}.") from error
    return _categorical(name, array, forced=kind is not None)


def as_classes(values: Any, name: str) -> NDArray[np.str_]:
    """Return the classes of rows by the names that `as_column` gives them: 1 and 1.0 are the class "1".

    Parameters
    ----------
    values : (n,) array or tensor
    name : str
        For the error message.

    Returns
    -------
    (n,) array of str
        "" where missing.

    Raises
    ------
    InputError
        Another shape.
    """
    array = _numbers_or_texts(values, name)
    return _class_names(array) if array.dtype.kind == "f" else array


def _numbers_or_texts(values: Any, name: str) -> NDArray[Any]:
    """Return float64, NaN where missing, or strings, "" where missing."""
    array = _as_array(values)
    if array.ndim != 1:
        raise InputError(f"{name} must have shape (n,), got {array.shape}.")
    if array.dtype.kind in "mM":
        array = np.where(
            np.isnat(array), np.nan, array.astype(f"{array.dtype.kind}8[ms]").astype(np.int64) / 1000
        )
    if array.dtype.kind == "O" and all(value is None or _is_number(value) for value in array.tolist()):
        array = np.array([np.nan if value is None else float(value) for value in array.tolist()])
    if (
        array.dtype.kind in "iu"
        and max(int(array.max(initial=0)), -int(array.min(initial=0))) > _LARGEST_EXACT
    ):
        array = array.astype(np.str_)
    if array.dtype.kind in "iuf":
        return array.astype(np.float64)
    texts = ["" if _is_missing(value) else printable(value) for value in array.tolist()]
    return np.array(texts, dtype=np.str_)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def _is_missing(value: Any) -> bool:
    return (
        value is None or (isinstance(value, float) and np.isnan(value)) or str(value).strip() in ("", "<NA>")
    )


def stand_ins(values: NDArray[np.float64]) -> list[float]:
    """Return numbers such as −9999 or 999 that seem to stand for a missing value.

    They are made of nines only (at least two, or one where it is negative), are the smallest or the largest,
    occur three times or more, and are further from the other values than these are from each other (and
    than half of the largest of them), or negative where no other value is.

    Parameters
    ----------
    values : (n,) array
        Finite.
    """
    found = []
    for _ in range(2):
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) < 3:
            break
        for end, others in ((0, distinct[1:]), (-1, distinct[:-1])):
            value = float(distinct[end])
            is_code = re.fullmatch(r"-9+|9{2,}", f"{value:.15g}") is not None
            distance = float(np.abs(others - value).min())
            is_apart = distance > max(np.ptp(others), 0.5 * float(np.abs(others).max()))
            is_apart |= value < 0 <= others[0]
            if is_code and counts[end] >= _LEAST_STAND_INS and is_apart:
                found.append(value)
                values = values[values != value]
                break
    return found


def intersection(columns: Sequence[Column]) -> Column:
    """Return the column of all combinations of several: "gender × ethnicity".

    Raises
    ------
    InputError
        A column is continuous; fewer than two are given.
    """
    name = " × ".join(column.name for column in columns)
    if len(columns) < 2:
        raise InputError(f"an intersection needs two columns at least, got {name!r}.")
    for column in columns:
        if column.kind != "categorical":
            raise InputError(
                f"the intersection {name} is of classes, but {column.name} is {column.kind}: leave it out, "
                "or group its values first."
            )
    present = np.logical_and.reduce([column.present for column in columns])
    texts = [
        ", ".join(values) for values in zip(*(column.values.tolist() for column in columns), strict=True)
    ]
    return Column(name, "categorical", np.where(present, texts, ""), present)


def _numeric(name: str, values: NDArray[np.float64], kind: str | None) -> Column:
    present = np.isfinite(values)
    notes = []
    infinite = int(np.isinf(values).sum())
    if infinite:
        notes.append(f"{infinite} infinite value(s) count as missing.")
    for code in stand_ins(values[present]):
        number = int((values == code).sum())
        if kind is None:
            notes.append(
                f"{number} value(s) of {_number(code)} seem to stand for missing ones and count as such: "
                "give the kind of the column to keep them."
            )
            present &= values != code
        else:
            notes.append(
                f"{number} value(s) of {_number(code)} seem to stand for missing ones, but are kept."
            )
    values = np.where(present, values, np.nan)
    distinct = np.unique(values[present])
    if len(distinct) < 2:
        return Column(name, "constant", values, present, _constant_note(distinct))
    whole = bool(np.all(distinct == np.round(distinct)))
    if kind is None and whole and _counts_rows(name, distinct, int(present.sum())):
        note = "every row has a number of its own, like a row number or an id: not audited."
        return Column(name, "identifier", values, present, note)
    classes = kind == "categorical" or (
        kind is None and whole and len(distinct) <= _MAX_CLASSES_OF_NUMBERS and len(distinct) < present.sum()
    )
    if classes and kind is None:
        notes.append(f"Whole numbers with {len(distinct)} distinct values: read as classes.")
    note = " ".join(notes)
    if classes:
        return Column(name, "categorical", _class_names(values), present, note)
    return Column(name, "continuous", values, present, note)


def _class_names(values: NDArray[np.float64]) -> NDArray[np.str_]:
    def class_name(value: float) -> str:
        if not np.isfinite(value):
            return ""
        return str(int(value)) if value == round(value) else f"{value:g}"

    return np.array([class_name(value) for value in values.tolist()], dtype=np.str_)


def _counts_rows(name: str, distinct: NDArray[np.float64], num_present: int) -> bool:
    if len(distinct) < num_present or num_present < 20:
        return False
    return bool(distinct[-1] - distinct[0] == num_present - 1) or bool(_IDENTIFIER_NAME.search(name))


def _categorical(name: str, texts: NDArray[np.str_], *, forced: bool) -> Column:
    present = texts != ""
    distinct = np.unique(texts[present])
    if len(distinct) < 2:
        return Column(name, "constant", texts, present, _constant_note(distinct))
    num_present = int(present.sum())
    if not forced and num_present >= 20 and len(distinct) > 0.5 * num_present:
        note = f"{len(distinct)} distinct values in {num_present} rows, like an id or free text: not audited."
        return Column(name, "identifier", texts, present, note)
    if len(distinct) > _MAX_CLASSES:
        note = f"{len(distinct)} classes are more than {_MAX_CLASSES}: not audited. Group them first."
        return Column(name, "identifier", texts, present, note)
    return Column(name, "categorical", texts, present)


def _constant_note(distinct: NDArray[Any]) -> str:
    if len(distinct) == 0:
        return "no values at all: not audited."
    return f"every row has the same value ({distinct[0]}): not audited."
