"""The reader of tables: what the values of a column are is decided here, for all that take columns."""

from __future__ import annotations

import datetime
import difflib
import math
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm.text import listed

# What the values of a column are. A column without any value is "empty", and fits every other kind.
KINDS = ("number", "date", "string", "boolean")

_MICROSECONDS_PER_DAY = 86_400_000_000


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    kind: str  # one of `KINDS`, or "empty" where every value is missing
    # (n,): integers or float64 for numbers, float64 days since 1970-01-01 for dates; otherwise indices into
    # `distinct`. What stands in a missing row means nothing.
    values: NDArray[Any]
    missing: NDArray[np.bool_]  # (n,)
    categorical: bool  # strings, booleans, and what the table itself calls a category
    # The different values of strings, booleans and categories, in no particular order.
    distinct: tuple[Any, ...] | None = None
    # Levels in the order that the table declares (an ordered categorical, an Enum).
    order: tuple[Any, ...] | None = None
    # All levels that a categorical type declares, whether a row has them or not.
    declared: tuple[Any, ...] = ()

    def rows(self, index: NDArray[Any]) -> Column:
        """Return the column with these rows only, a mask or indices, and their `distinct` values."""
        values, missing, distinct = self.values[index], self.missing[index], self.distinct
        if distinct is not None:
            there, values = np.unique(values, return_inverse=True)
            distinct = tuple(distinct[place] for place in there)
        kind = "empty" if len(missing) and missing.all() else self.kind
        return replace(self, kind=kind, values=values, missing=missing, distinct=distinct)

    def with_declared(self) -> Column:
        """Return the column with all declared levels among the `distinct` ones, so that they are `levels`."""
        if self.distinct is None:
            return self
        return replace(self, distinct=tuple(dict.fromkeys([*self.distinct, *self.declared])))

    def as_category(self) -> Column:
        """Return the column as a category, whatever it holds."""
        if self.distinct is not None or self.kind == "empty":
            return replace(self, categorical=True)
        levels, codes = np.unique(self.values, return_inverse=True)
        return replace(self, values=codes, categorical=True, distinct=tuple(levels.tolist()))

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
            there = set(present)
            return tuple(level for level in self.order if level in there)
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
    """Return the names of the columns of a table; those that are not strings are left out."""
    return [name for name in _cells(table)[0] if isinstance(name, str)]


def read_columns(table: Any, names: Iterable[str]) -> tuple[dict[str, Column], int]:
    """Return some columns of a table, and its number of rows.

    A table is what narwhals reads (a DataFrame of pandas or polars, a table of pyarrow); or a mapping from
    names to sequences, arrays, tensors or columns that were read before, all of one length, or to single
    values: one row. Columns that are not asked for may be of any type, or have a name twice.
    """
    names = list(dict.fromkeys(names))
    present, cell_at = _cells(table)
    places = {name: place for place, name in enumerate(present)}
    for name in names:
        if name not in places:
            texts = [each for each in present if isinstance(each, str)]
            close = difflib.get_close_matches(name, texts, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"the table has no column {name!r}: {hint}The columns with a string as name are "
                f"{listed(texts, 20) or 'none'}."
            )
    _check_once(present, names)
    cells = {name: cell_at(places[name]) for name in names}
    cells = _as_sequences(cells) if isinstance(table, Mapping) else cells
    columns = {name: read_column(name, cell) for name, cell in cells.items()}
    return columns, _check_lengths(columns, "the columns")


def read_table(
    table: Any, what: str = "metadata", unnamed: str = "m", single: str | None = None
) -> dict[str, Column]:
    """Return all columns of a table of any kind, by name.

    It is a DataFrame or Series (pandas, polars, pyarrow), a mapping from names to columns, or an array or
    nested list, (n,) or (n, K), and `what` names the argument in messages. Columns without names are called
    `unnamed` and their number, from 0; the one of an array (n,) or a Series `single`, if that is given.
    """
    refuse_no_table(table, what)
    if isinstance(table, Tensor | np.ndarray | list | tuple):
        array = _as_array(table)
        if array.ndim not in (1, 2):
            raise ValueError(
                f"{what} must have shape (num_rows,) or (num_rows, num_columns), got {array.shape}."
            )
        names = [single if single and array.ndim == 1 else f"{unnamed}0"]
        names += [f"{unnamed}{index}" for index in range(1, array.shape[-1] if array.ndim == 2 else 1)]
        matrix = array[:, None] if array.ndim == 1 else array
        columns = {name: _of_array(name, values) for name, values in zip(names, matrix.T, strict=False)}
    elif type(table).__name__ in ("Series", "ChunkedArray") and hasattr(table, "__array__"):
        name = str(getattr(table, "name", None) or single or f"{unnamed}0")
        columns = {name: read_column(name, table)}
    else:
        try:
            present, cell_at = _cells(table)
        except TypeError as error:
            raise TypeError(
                f"{what} must be a DataFrame of pandas, polars or pyarrow, a mapping of names to columns, or "
                f"an array, got {type(table).__name__}."
            ) from error
        texts = list(map(str, present))  # the names of pandas may be numbers
        _check_once(texts, texts)
        columns = {name: read_column(name, cell_at(place)) for place, name in enumerate(texts)}
    _check_lengths(columns, f"the columns of {what}")
    return columns


def refuse_no_table(values: Any, what: str) -> None:
    """Raise TypeError where the argument `what` is a lazy frame or records, and say how to make a table."""
    first = values[0] if isinstance(values, list | tuple) and values else None
    if hasattr(values, "collect") and hasattr(values, "lazy"):
        raise TypeError(f"{what} is a lazy frame, {type(values).__name__}: collect() it first.")
    if isinstance(first, Mapping) or (isinstance(values, np.ndarray) and values.dtype.names):
        raise TypeError(
            f"{what} has records, each with the values of a row: make a table of them, "
            f"pandas.DataFrame({what})."
        )


def _check_lengths(columns: Mapping[str, Column], what: str) -> int:
    """Return the number of rows; raise ValueError where columns differ in it."""
    lengths = {name: len(column.missing) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name!r}: {length}" for name, length in lengths.items())
        raise ValueError(f"{what} must have the same number of rows, got {counts}.")
    return next(iter(lengths.values()), 0)


def read_column(name: str, values: Any) -> Column:
    """Return one column: a (n,) or (n, 1) tensor, array, Series or list, or a Column, which is returned.

    Values that are neither numbers, categories nor dates, or of several of these kinds, are a TypeError that
    has the name in it, another shape a ValueError.
    """
    if isinstance(values, Column):
        return replace(values, name=name)
    if type(values).__name__ == "Categorical" and hasattr(values, "categories"):
        import pandas as pd

        values = pd.Series(values)
    if hasattr(values, "__array__") and not isinstance(values, Tensor | np.ndarray):  # a Series
        with requires("design"):
            import narwhals.stable.v1 as nw
        series = nw.from_native(values, series_only=True, pass_through=True)
        if isinstance(series, nw.Series):
            return _of_series(name, series)
    elif not isinstance(values, Tensor | np.ndarray):
        values = list(values)
        if not values or not isinstance(values[0], np.ndarray | Tensor):
            return _of_objects(name, values)
    return _of_array(name, _as_array(values))


def _as_array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
    if isinstance(values, np.ndarray):
        return values
    array = np.asarray(values)
    # NumPy would turn the numbers beside a text into texts, and booleans beside numbers into numbers.
    return np.asarray(values, dtype=object) if array.dtype.kind in "USO" else array


def _cells(table: Any) -> tuple[list[Any], Callable[[int], Any]]:
    """Return the names of the columns of a table, and what gives the column at a place."""
    if isinstance(table, Mapping):
        return list(table), list(table.values()).__getitem__
    if type(table).__name__ == "RecordBatch":  # narwhals knows the columns of tables only
        import pyarrow

        table = pyarrow.Table.from_batches([table])
    has = partial(hasattr, type(table))  # A frame itself has attributes of the names of its columns.
    if has("column_names") and has("column"):  # pyarrow
        return list(table.column_names), table.column
    if has("to_series") and has("columns"):  # polars
        return list(table.columns), table.to_series
    if has("iloc") and has("columns") and not has("compute"):
        return list(table.columns), lambda place: table.iloc[:, place]
    raise TypeError(
        "table must be a DataFrame (pandas, polars), a pyarrow table or a mapping from names to columns, "
        f"got {type(table).__name__}: collect() a lazy one first, make a pandas.DataFrame of "
        "records, and give a single row as a dict."
    )


def _check_once(names: Sequence[Any], asked: Iterable[Any]) -> None:
    counts = Counter(names)
    for name in asked:
        if counts[name] > 1:
            raise ValueError(f"there is more than one column of the name {name!r}: rename or drop one.")


def _as_sequences(cells: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a mapping; single values as one row of them."""
    single = [name for name, cell in cells.items() if _is_single(cell)]
    if single and len(single) < len(cells):
        other = next(name for name in cells if name not in single)
        raise ValueError(
            f"{single[0]!r} is a single value and {other!r} a sequence: give every column one value a row."
        )
    if not single:
        return cells
    return {name: [cell.item() if hasattr(cell, "item") else cell] for name, cell in cells.items()}


def _is_single(cell: Any) -> bool:
    if isinstance(cell, str | bytes):
        return True
    if isinstance(cell, Tensor | np.ndarray | np.generic):
        return cell.ndim == 0
    return not hasattr(cell, "__len__") and not isinstance(cell, Column)


def _of_array(name: str, values: NDArray[Any]) -> Column:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(
            f"column {name!r} must have shape (number of rows,), got {values.shape}: give each column of it "
            "a name of its own."
        )
    if np.ma.is_masked(values):  # None, where the mask is
        return _of_objects(name, values.tolist())
    if values.dtype.kind in "iuf":
        return _of_numbers(name, values)
    if values.dtype.kind in "mM":
        missing = np.isnat(values)
        unit = f"{values.dtype.kind}8[us]"
        days = np.where(missing, np.zeros(1, unit), values.astype(unit)).astype(np.int64)
        kind = "date" if values.dtype.kind == "M" else "number"
        return _of_numbers(name, days / _MICROSECONDS_PER_DAY, missing, kind)
    return _of_objects(name, values.tolist())


def _of_numbers(
    name: str, values: NDArray[Any], missing: NDArray[np.bool_] | None = None, kind: str = "number"
) -> Column:
    if missing is None:
        missing = np.zeros(len(values), dtype=bool)
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
        missing = missing | np.isnan(values)
    return Column(name, "empty" if len(missing) and missing.all() else kind, values, missing, False)


def _of_objects(
    name: str,
    values: list[Any],
    *,
    categorical: bool = False,
    declared: Sequence[Any] = (),
    ordered: bool = False,
) -> Column:
    """Return a column of Python objects, of the one kind that all of them are."""
    try:
        index_of = {value: index for index, value in enumerate(dict.fromkeys(values))}
    except TypeError:
        value = next(value for value in values if not isinstance(value, Hashable))
        raise _wrong_type(name, value) from None
    indices = np.fromiter(map(index_of.__getitem__, values), np.int64, len(values))
    distinct = list(map(_plain, index_of))
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
        whole = all(isinstance(value, int) for value in numbers)
        if not whole or all(-(2**63) <= value < 2**63 for value in numbers):
            dtype = np.int64 if whole else np.float64
            return _of_numbers(name, np.array(numbers, dtype=dtype)[indices], missing)
        # Identifiers of more digits than an integer has stay apart as texts.
        distinct = [value if gone else str(value) for value, gone in zip(distinct, absent, strict=True)]
        kind = "string"
    is_category = categorical or kind in ("string", "boolean")
    levels = tuple(map(_plain, declared))
    return Column(
        name, kind, indices, missing, is_category, tuple(distinct), levels if ordered else None, levels
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, where it only names something: intervals and UUIDs are texts."""
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, uuid.UUID) or type(value).__name__ == "Interval" else value


def _is_missing(value: Any) -> bool:
    # NaN and NaT are not equal to themselves; pandas.NA answers a comparison with neither.
    if isinstance(value, str):
        return not value.strip()
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
    if dtype in (nw.Date, nw.Datetime, nw.Duration):
        return _of_array(name, np.asarray(series.to_numpy()))
    if dtype in (nw.Categorical, nw.Enum):
        # polars has one pool of categories for the whole process: those of a Categorical declare nothing.
        native = series.to_native()
        if hasattr(getattr(native, "array", None), "_pa_array"):  # pandas, on top of Arrow
            native = native.array.__arrow_array__()
            series = nw.from_native(native, series_only=True)
        is_pool = type(native).__module__.startswith("polars") and dtype == nw.Categorical
        own = getattr(native, "dtype", getattr(native, "type", None))
        ordered = dtype == nw.Enum or bool(getattr(own, "ordered", False))
        declared = [] if is_pool else series.cat.get_categories().to_list()
        return _of_objects(name, series.to_list(), categorical=True, declared=declared, ordered=ordered)
    if dtype in (nw.String, nw.Boolean, nw.Object, nw.Unknown):
        return _of_objects(name, series.to_list())
    raise TypeError(
        f"column {name!r} has dtype {dtype}: metadata are numbers, strings, booleans, categories or dates; "
        "convert it first."
    )
