"""Columns of any table as arrays: numbers, categories and dates, and where they are missing."""

from __future__ import annotations

import datetime
import difflib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.extras import requires

__all__ = ["KINDS", "Column", "column_names", "read_columns", "shown", "shown_rows"]

# What the values of a column are. A column without any value is "empty", and fits every other kind.
KINDS = ("number", "date", "string", "boolean")

_MICROSECONDS_PER_DAY = 86_400_000_000


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    name : str
    kind : str
        One of `KINDS`, or "empty" where every value is missing.
    values : (n,) array
        Integers or float64 for numbers, float64 days since 1970-01-01 for dates; otherwise indices into
        `distinct`. What stands in a missing row means nothing.
    missing : (n,) bool array
    categorical : bool
        Strings, booleans, and what the table itself calls a category.
    distinct : tuple or None
        The different values of strings, booleans and categories, in no particular order.
    order : tuple or None
        Levels in the order that the table declares (an ordered categorical, an Enum).
    """

    name: str
    kind: str
    values: NDArray[Any]
    missing: NDArray[np.bool_]
    categorical: bool
    distinct: tuple[Any, ...] | None = None
    order: tuple[Any, ...] | None = None

    def as_float(self) -> NDArray[np.float64]:
        """Return numbers, booleans or days as (n,) float64, NaN where missing."""
        if self.kind == "empty":
            return np.full(len(self.missing), np.nan)
        if self.distinct is not None:
            of_distinct = [0.0 if _is_missing(value) else float(value) for value in self.distinct]
            numbers: NDArray[np.float64] = np.array(of_distinct, dtype=np.float64)[self.values]
        else:
            numbers = self.values.astype(np.float64)
        numbers[self.missing] = np.nan
        return numbers

    def codes(self, levels: Sequence[Any]) -> NDArray[np.int64]:
        """Return the (n,) index of each value among `levels`: −1 where missing, −2 where it is not there."""
        if self.kind == "empty":
            return np.full(len(self.missing), -1, dtype=np.int64)
        number_of = {level: index for index, level in enumerate(levels)}
        distinct, index = self.distinct, self.values
        if distinct is None:
            unique, index = np.unique(self.values, return_inverse=True)
            distinct = tuple(unique.tolist())
        of_distinct = np.array([number_of.get(value, -2) for value in distinct], dtype=np.int64)
        codes: NDArray[np.int64] = of_distinct[index]
        codes[self.missing] = -1
        return codes

    def levels(self) -> tuple[Any, ...]:
        """Return the distinct values that are there, in an order that does not depend on that of the rows."""
        if self.distinct is None:
            present = np.unique(self.values[~self.missing]).tolist()
        else:
            present = [value for value in self.distinct if not _is_missing(value)]
        if self.order is not None:
            return tuple(level for level in self.order if level in set(present))
        # A number read as float64 because others are missing is still the same level.
        return tuple(
            int(level) if isinstance(level, float) and level.is_integer() else level
            for level in sorted(present)
        )

    def examples(self, where: NDArray[np.bool_]) -> list[Any]:
        """Return the different values in some rows."""
        values = list(dict.fromkeys(self.values[where].tolist()))
        return values if self.distinct is None else [self.distinct[index] for index in values]


def shown(values: Iterable[Any], limit: int = 5) -> str:
    """Return the first of some values for a message, and a sign that there are more."""
    values = list(values)
    return ", ".join(map(str, values[:limit])) + (", …" if len(values) > limit else "")


def shown_rows(where: NDArray[np.bool_]) -> str:
    """Return for a message which rows, counted from 0, a mask selects."""
    rows = np.flatnonzero(where)
    return f"row{'s' if len(rows) > 1 else ''} {shown(rows)} ({len(rows)} of {len(where)}, counted from 0)"


def column_names(table: Any) -> list[str]:
    """Return the names of the columns of a table; those that are not strings are left out.

    Raises
    ------
    TypeError
        Not a table.
    """
    if isinstance(table, Mapping):
        return [name for name in table if isinstance(name, str)]
    return [name for name in _frame(table).columns if isinstance(name, str)]


def read_columns(table: Any, names: Iterable[str]) -> tuple[dict[str, Column], int]:
    """Return some columns of a table, and its number of rows.

    Parameters
    ----------
    table : DataFrame of pandas or polars, table of pyarrow, or mapping
        Whatever narwhals reads; or a mapping from names to sequences, arrays or tensors of one length, or to
        single values: one row.
    names : iterable of str
        The columns to read; others may be of any type.

    Raises
    ------
    TypeError
        Not a table, or a column of a type that is neither numbers, categories nor dates.
    ValueError
        A column is not there, or columns differ in length.
    """
    names = list(dict.fromkeys(names))
    present = column_names(table)
    for name in names:
        if name not in present:
            close = difflib.get_close_matches(name, present, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"the table has no column {name!r}: {hint}The columns with a string as name are "
                f"{shown(map(repr, present), 20) or 'none'}."
            )
    if isinstance(table, Mapping):
        return _of_mapping(table, names)
    frame = _frame(table)
    return {name: _of_series(name, frame[name]) for name in names}, len(frame)


def _frame(table: Any) -> Any:
    with requires("design"):
        import narwhals.stable.v1 as nw
    try:
        return nw.from_native(table, eager_only=True)
    except TypeError as error:
        raise TypeError(
            "table must be a DataFrame (pandas, polars), a pyarrow table or a mapping from names to columns, "
            f"got {type(table).__name__}: collect() a lazy one first, and give a single row as a dict."
        ) from error
    except ValueError as error:
        raise ValueError(f"the table cannot be read: {error}") from error


def _of_mapping(table: Mapping[Any, Any], names: list[str]) -> tuple[dict[str, Column], int]:
    cells = {name: table[name] for name in names}
    single = [name for name, cell in cells.items() if _is_single(cell)]
    if single and len(single) < len(cells):
        other = next(name for name in cells if name not in single)
        raise ValueError(
            f"{single[0]!r} is a single value and {other!r} a sequence: give every column one value a row."
        )
    if single:
        cells = {name: [cell.item() if hasattr(cell, "item") else cell] for name, cell in cells.items()}
    columns = {name: _of_values(name, cell) for name, cell in cells.items()}
    lengths = {name: len(column.missing) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name!r}: {length}" for name, length in lengths.items())
        raise ValueError(f"the columns must have the same number of rows, got {counts}.")
    return columns, next(iter(lengths.values()), 0)


def _is_single(cell: Any) -> bool:
    if isinstance(cell, str | bytes):
        return True
    if isinstance(cell, Tensor | np.ndarray | np.generic):
        return cell.ndim == 0
    return not hasattr(cell, "__len__")


def _of_values(name: str, values: Any) -> Column:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if hasattr(values, "__array__") and not isinstance(values, np.ndarray):  # a Series of any library
        with requires("design"):
            import narwhals.stable.v1 as nw
        series = nw.from_native(values, series_only=True, pass_through=True)
        if isinstance(series, nw.Series):
            return _of_series(name, series)
        values = np.asarray(values)
    if not isinstance(values, np.ndarray):
        return _of_objects(name, list(values))
    if values.ndim != 1:
        raise ValueError(
            f"column {name!r} must have shape (number of rows,), got {values.shape}: give each column of it "
            "a name of its own."
        )
    if values.dtype.kind in "iuf":
        return _of_numbers(name, values)
    if values.dtype.kind == "M":
        missing = np.isnat(values)
        days = np.where(missing, np.datetime64(0, "us"), values).astype("datetime64[us]").astype(np.int64)
        return Column(name, "date", days / _MICROSECONDS_PER_DAY, missing, False)
    return _of_objects(name, values.tolist())


def _of_numbers(name: str, values: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> Column:
    if missing is None:
        missing = np.zeros(len(values), dtype=bool)
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
        missing = missing | np.isnan(values)
    kind = "empty" if len(missing) and missing.all() else "number"
    return Column(name, kind, values, missing, False)


def _of_objects(
    name: str, values: list[Any], *, categorical: bool = False, order: tuple[Any, ...] | None = None
) -> Column:
    """Return a column of Python objects, of the one kind that all of them are."""
    try:
        index_of = {value: index for index, value in enumerate(dict.fromkeys(values))}
    except TypeError:
        value = next(value for value in values if not isinstance(value, Hashable))
        raise _wrong_type(name, value) from None
    indices = np.fromiter(map(index_of.__getitem__, values), np.int64, len(values))
    distinct = [value.item() if isinstance(value, np.generic) else value for value in index_of]
    absent = [_is_missing(value) for value in distinct]
    missing = np.array(absent, dtype=bool)[indices]
    examples = {
        _kind_of(value, name): value for value, gone in zip(distinct, absent, strict=True) if not gone
    }
    if len(examples) > 1:
        kinds = " and ".join(f"{kind}s ({value!r})" for kind, value in examples.items())
        raise TypeError(f"column {name!r} mixes {kinds}: give it one type.")
    kind = next(iter(examples), "empty")
    if kind == "date":
        days = [0.0 if gone else _days(value) for value, gone in zip(distinct, absent, strict=True)]
        return Column(name, kind, np.array(days, dtype=np.float64)[indices], missing, categorical)
    if kind == "number" and not categorical:
        numbers = [0 if gone else value for value, gone in zip(distinct, absent, strict=True)]
        # Identifiers beyond 2⁵³ stay exact as integers.
        exact = all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in numbers)
        return _of_numbers(name, np.array(numbers, dtype=np.int64 if exact else np.float64)[indices], missing)
    is_category = categorical or kind in ("string", "boolean")
    return Column(name, kind, indices, missing, is_category, tuple(distinct), order)


def _is_missing(value: Any) -> bool:
    # NaN and NaT are not equal to themselves; pandas.NA answers a comparison with neither.
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def _kind_of(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float | Decimal):
        return "number"
    if isinstance(value, str):
        return "string"
    if isinstance(value, datetime.date):
        return "date"
    raise _wrong_type(name, value)


def _wrong_type(name: str, value: Any) -> TypeError:
    return TypeError(
        f"column {name!r} has values of type {type(value).__name__}: metadata are numbers, strings, "
        "booleans, categories or dates."
    )


def _days(value: datetime.date) -> float:
    """Return the days since 1970-01-01; a time without a time zone counts as UTC."""
    if not isinstance(value, datetime.datetime):
        return float((value - datetime.date(1970, 1, 1)).days)
    zone = datetime.timezone.utc
    aware = value.replace(tzinfo=zone) if value.tzinfo is None else value
    return (aware - datetime.datetime(1970, 1, 1, tzinfo=zone)) / datetime.timedelta(days=1)


def _of_series(name: str, series: Any) -> Column:
    import narwhals.stable.v1 as nw

    dtype = series.dtype
    if dtype.is_numeric():
        if dtype == nw.Decimal:
            series = series.cast(nw.Float64)
        missing = series.is_null().to_numpy().astype(bool)
        fill = 0 if dtype.is_integer() else math.nan
        values = series.to_numpy() if not missing.any() else series.fill_null(fill).to_numpy()
        return _of_numbers(name, np.asarray(values), missing)
    if dtype in (nw.Date, nw.Datetime):
        stamps = series.dt.timestamp("us")
        missing = stamps.is_null().to_numpy().astype(bool)
        values = np.asarray(stamps.to_numpy() if not missing.any() else stamps.fill_null(0).to_numpy())
        days = values.astype(np.int64) / _MICROSECONDS_PER_DAY
        return Column(name, "empty" if len(days) and missing.all() else "date", days, missing, False)
    if dtype in (nw.Categorical, nw.Enum):
        # polars keeps the categories of a Categorical in order of appearance, and has one pool for all.
        declared = dtype == nw.Enum or bool(getattr(getattr(series.to_native(), "dtype", None), "ordered", 0))
        order = tuple(series.cat.get_categories().to_list()) if declared else None
        return _of_objects(name, series.to_list(), categorical=True, order=order)
    if dtype in (nw.String, nw.Boolean, nw.Object, nw.Unknown):
        return _of_objects(name, series.to_list())
    raise TypeError(
        f"column {name!r} has dtype {dtype}: metadata are numbers, strings, booleans, categories or dates; "
        "convert it first."
    )
