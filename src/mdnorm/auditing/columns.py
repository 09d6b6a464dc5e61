"""What a metadata column is: numbers, classes, an identifier, a constant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdnorm.auditing.reading import InputError, as_input_error, matching
from mdnorm.design.reader import Column as TableColumn
from mdnorm.design.reader import read_column, read_table
from mdnorm.design.roles import may_be_codes, odd_cell, stand_ins

Kind = Literal["continuous", "categorical", "constant", "identifier"]

_MAX_CLASSES_OF_NUMBERS = 10
_MAX_CLASSES = 200
_SECONDS_OF_A_DAY = 86_400
_IDENTIFIER_NAME = re.compile(r"(^|[_\W])(u?id|uuid|index|row|unnamed)([_\W]|$)", re.IGNORECASE)


# Controls, line separators, marks of writing direction, and halves of surrogate pairs.
_NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Larger whole numbers are not all apart as floats: they are read as text.
_LARGEST_EXACT = 2**53


@dataclass(frozen=True)
class Column:
    """A column of metadata; one that is constant or an identifier cannot be audited."""

    name: str
    kind: Kind
    # float64, NaN where missing, if continuous; otherwise str, "" where missing.
    values: NDArray[Any]
    present: NDArray[np.bool_]
    # What the reader should know about how it was read; may be empty.
    note: str = ""
    # Whether the values are the seconds since 1970 of dates.
    is_date: bool = False
    # The number of values where whole numbers that may be codes were taken as continuous; otherwise 0.
    num_codes: int = 0

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
        """Return the values for a distance: (n, 1) numbers in any unit, or (n, classes) indicators."""
        if self.kind == "continuous":
            # A power of two changes no digit, and no square can overflow.
            exponent = np.frexp(np.abs(self.values).max(initial=0.0, where=self.present))[1]
            scaled: NDArray[np.float64] = np.ldexp(self.values, -exponent)[:, None]
            return scaled
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
    """Return the columns of a table, of a tensor or array without names, or columns that were read before.

    `kinds` says where the inferred kind is not what is meant, `ignore` has names and patterns ("voxel_*") to
    leave out. What does not fit is an InputError.
    """
    kinds = dict(kinds or {})
    if isinstance(metadata, (list, tuple)) and all(isinstance(column, Column) for column in metadata):
        if kinds:
            raise InputError("these metadata columns were read before: give kinds= to as_columns.")
        ignored = matching([column.name for column in metadata], ignore, "metadata column")
        return [column for column in metadata if column.name not in ignored]
    with as_input_error():
        table = read_table(metadata, unnamed="metadata ", single="metadata")
    matching(list(table), list(kinds), "metadata column")
    ignored = matching(list(table), ignore, "metadata column")
    return [as_column(name, values, kinds.get(name)) for name, values in table.items() if name not in ignored]


def as_column(name: str, values: Any, kind: str | None = None, what: str | None = None) -> Column:
    """Return a column, its kind inferred unless given; `what` it is in messages, by default metadata.

    Whole numbers of at most ten distinct values are classes, other numbers continuous; strings and booleans
    are classes. Strings that are nearly all different, and whole numbers that count the rows or are called an
    id, are identifiers. Of dates, the seconds count.
    """
    name = printable(name)
    what = what or f"metadata column {name!r}"
    if kind not in (None, "continuous", "categorical"):
        raise InputError(f"{what}: the kind must be continuous or categorical, got {kind!r}.")
    if np.isscalar(values) or (
        isinstance(values, (list, tuple)) and np.ndim(np.asarray(values, dtype=object)) != 1
    ):
        raise InputError(f"{what} must have shape (n,), got {np.shape(values)}.")
    try:
        column = read_column(name, values)
    except (TypeError, ValueError) as error:
        raise InputError(str(error).replace(f"column {name!r}", what, 1)) from error
    if column.kind == "date" and not column.categorical:
        seconds = np.where(column.missing, np.nan, column.values * _SECONDS_OF_A_DAY)
        numeric = _numeric(name, seconds, kind)
        return replace(numeric, is_date=numeric.kind == "continuous", num_codes=0)
    if kind == "continuous" and column.kind in ("string", "boolean"):
        with as_input_error(f"{what} cannot be read as continuous: "):
            numbers = [float(text) if text else np.nan for text in _texts(column).tolist()]
        return _numeric(name, np.array(numbers), kind)
    if column.kind in ("number", "empty") and not (column.categorical or _is_too_long(column)):
        return _numeric(name, column.as_float(), kind)
    if kind is None and column.kind == "string" and not column.declared:
        problem = odd_cell(column)
        if problem is not None:
            problem = problem.replace(f"column {name!r}", what, 1)
            raise InputError(
                f"{problem}: correct it, make it missing, or say that the column is categorical (kinds=)."
            )
    return _categorical(name, _texts(column), forced=kind is not None)


def _is_too_long(column: TableColumn) -> bool:
    """Whether there are whole numbers that are not all apart as floats: they are read as text."""
    values = column.values
    is_whole = column.distinct is None and values.dtype.kind in "iu" and len(values) > 0
    return is_whole and max(int(values.max()), -int(values.min())) > _LARGEST_EXACT


def _texts(column: TableColumn) -> NDArray[np.str_]:
    """Return the values as printable text, "" where missing."""
    if column.distinct is None:
        texts = column.values.astype(np.str_)
    else:
        names = [
            _class_names(np.array([float(value)]))[0] if isinstance(value, float) else printable(value)
            for value in column.distinct
        ]
        texts = np.array(names, dtype=np.str_)[column.values]
    return np.where(column.missing, "", texts)


def intersection(columns: Sequence[Column]) -> Column:
    """Return the column of all combinations of several categorical ones: "gender × ethnicity"."""
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
    texts = list(map(", ".join, zip(*(column.values.tolist() for column in columns), strict=True)))
    return Column(name, "categorical", np.where(present, texts, ""), present)


def _numeric(name: str, values: NDArray[np.float64], kind: str | None) -> Column:
    present = np.isfinite(values)
    notes = []
    infinite = int(np.isinf(values).sum())
    if infinite:
        notes.append(f"{infinite} infinite value(s) count as missing.")
    for code in stand_ins(values[present]):
        what = f"{int((values == code).sum())} value(s) of {_number(code)} seem to stand for missing ones"
        if kind is None:
            notes.append(f"{what} and count as such: give the kind of the column to keep them.")
            present &= values != code
        else:
            notes.append(f"{what}, but are kept.")
    values = np.where(present, values, np.nan)
    distinct = np.unique(values[present])
    if len(distinct) < 2:
        shown = _class_names(values) if kind == "categorical" else values
        return Column(name, "constant", shown, present, _constant_note(distinct))
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
    is_doubtful = kind is None and may_be_codes(distinct, int(present.sum()))
    num_codes = len(distinct) if is_doubtful else 0
    return Column(name, "continuous", values, present, note, num_codes=num_codes)


def _class_names(values: NDArray[np.float64]) -> NDArray[np.str_]:
    def class_name(value: float) -> str:
        if not np.isfinite(value):
            return ""
        return str(int(value)) if value == round(value) else f"{value:g}"

    distinct, index = np.unique(values, return_inverse=True)
    return np.array([class_name(value) for value in distinct.tolist()], dtype=np.str_)[index]


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
    what = f"every row has the same value ({distinct[0]})" if len(distinct) else "no values at all"
    return f"{what}: not audited."
