"""Metadata tables to numeric columns: numbers as they are, categories as indicators against a reference."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ColumnEncoder", "category_values", "named_columns"]

FloatArray = NDArray[np.float64]


@dataclass
class ColumnEncoder:
    """Encodes the columns of one table always alike.

    Parameters
    ----------
    name : str
        Of the argument that the tables come from, for messages.
    site : str or int, optional
        Name (or position) of the column that is not encoded but returned as it is, as site of each row.
    """

    name: str
    site: Hashable | None = None
    columns_: list[Hashable] = field(default_factory=list)
    levels_: dict[Hashable, list[Any]] = field(default_factory=dict)
    names_: list[str] = field(default_factory=list)

    def fit(self, table: Any) -> ColumnEncoder:
        """Learn columns and levels.

        Parameters
        ----------
        table : (n,) or (n, K) array, or DataFrame
            Numeric and boolean columns stay as they are. Columns of strings, objects or a categorical dtype
            get one indicator a level, the first level left out: the levels of the dtype where it has them,
            else those present, sorted.
        """
        columns = named_columns(table, self.name)
        if isinstance(self.site, int) and self.site not in columns and 0 <= self.site < len(columns):
            self.site = list(columns)[self.site]
        if self.site is not None and self.site not in columns:
            raise ValueError(f"site={self.site!r} is not a column of {self.name}; it has {list(columns)}.")
        self.columns_ = list(columns)
        self.levels_, self.names_ = {}, []
        for column, values in columns.items():
            if column == self.site:
                continue
            levels = _levels(values, f"{self.name} column {column!r}")
            if levels is None:
                self.names_.append(str(column))
            else:
                self.levels_[column] = levels
                self.names_ += [f"{column}[{level}]" for level in levels[1:]]
        return self

    @property
    def groups(self) -> list[tuple[str, list[str]]]:
        """Each column of the table, but the site, with the names of its encoded columns."""
        names, groups = iter(self.names_), []
        for column in self.columns_:
            if column != self.site:
                width = len(self.levels_[column]) - 1 if column in self.levels_ else 1
                groups.append((str(column), list(itertools.islice(names, width))))
        return groups

    def transform(self, table: Any, num_rows: int) -> tuple[FloatArray, NDArray[Any] | None]:
        """Return the encoded columns (n, K), float64, and the sites (n,) where a column is the site.

        Raises
        ------
        TypeError
            A column is neither numeric nor categorical.
        ValueError
            Another number of rows than `num_rows`, other columns than in `fit`, NaN, infinite or missing
            values, a level that `fit` did not see.
        """
        columns = named_columns(table, self.name)
        if list(columns) != self.columns_:
            missing = [column for column in self.columns_ if column not in columns]
            by_position = all(isinstance(column, int) for column in columns)
            if missing or by_position or any(isinstance(column, int) for column in self.columns_):
                raise ValueError(
                    f"{self.name} has the columns {list(columns)}, but {self.columns_} were there in fit."
                )
        blocks, sites = [np.empty((num_rows, 0))], None
        for column in self.columns_:
            values, label = columns[column], f"{self.name} column {column!r}"
            if len(values) != num_rows:
                raise ValueError(
                    f"{self.name} has {len(values)} rows but X has {num_rows}: one row a sample is needed."
                )
            if column == self.site:
                sites = category_values(values, label)
            elif column in self.levels_:
                blocks.append(_indicators(category_values(values, label), self.levels_[column], label))
            else:
                blocks.append(_numbers(values, label)[:, None])
        return np.concatenate(blocks, axis=1), sites


def named_columns(table: Any, name: str) -> dict[Hashable, Any]:
    """Return the columns of a table by name, or by position where it has no names.

    Raises
    ------
    ValueError
        `table` is neither one- nor two-dimensional.
    """
    if hasattr(table, "columns") and hasattr(table, "__getitem__"):  # pandas, polars, pyarrow
        names = getattr(table, "column_names", None) or list(table.columns)
        return {column: table[column] for column in names}
    if hasattr(table, "name") and hasattr(table, "to_numpy"):  # a Series
        return {0 if table.name is None else table.name: table}
    array = np.asarray(table)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (num_rows,) or (num_rows, num_columns), got {array.shape}.")
    return dict(enumerate(array.T))


def _dtype_levels(values: Any) -> Sequence[Any] | None:
    categories = getattr(values.dtype, "categories", None)  # pandas, polars Enum
    if categories is None and hasattr(values, "cat") and str(values.dtype) == "Categorical":
        categories = values.cat.getcategory_values()
    return None if categories is None else list(categories)


def _levels(values: Any, label: str) -> list[Any] | None:
    """Return the levels of a categorical column, None for a numeric one."""
    levels = _dtype_levels(values) if hasattr(values, "dtype") else None
    if levels is not None:
        return list(levels)
    if np.asarray(values).dtype.kind in "biuf" or _as_numbers(values) is not None:
        return None
    present = set(category_values(values, label).tolist())
    return sorted(present, key=lambda level: (str(type(level)), level))


def _as_numbers(values: Any) -> FloatArray | None:
    """Return a column of objects as numbers where all of them are, None else."""
    array = np.asarray(values)
    if array.dtype.kind in "biuf":
        return array.astype(np.float64)
    if array.dtype.kind != "O" or not all(
        isinstance(v, (bool, int, float, np.number, np.bool_)) or _is_missing(v) for v in array
    ):
        return None
    missing = [_is_missing(v) for v in array]
    if all(missing) and len(array):
        return None
    return np.array([np.nan if m else float(v) for m, v in zip(missing, array, strict=True)])


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def _numbers(values: Any, label: str) -> FloatArray:
    numbers = _as_numbers(values)
    if numbers is None:
        raise TypeError(f"{label} was numeric in fit, now it is not (dtype {np.asarray(values).dtype}).")
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise ValueError(
            f"{label} has NaN or infinite values in {len(bad)} of {len(numbers)} rows (first: "
            f"{bad[:5].tolist()}): drop or impute these rows."
        )
    return numbers


def category_values(values: Any, label: str) -> NDArray[Any]:
    """Return a column as an array whose values can be told apart by equality.

    Parameters
    ----------
    values : (n,) array or column of a DataFrame
    label : str
        What the column is, for messages.

    Raises
    ------
    TypeError
        Values of another kind than numbers, strings and objects.
    ValueError
        Missing values.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biufOUST":
        raise TypeError(f"{label} must hold numbers, strings or categories, got dtype {array.dtype}.")
    missing: list[int] = []
    if array.dtype.kind == "f":
        missing = np.flatnonzero(np.isnan(array)).tolist()
    elif array.dtype.kind == "O":
        missing = [row for row, value in enumerate(array.tolist()) if _is_missing(value)]
    if missing:
        raise ValueError(
            f"{label} has missing values in {len(missing)} of {len(array)} rows (first: {missing[:5]}): drop "
            "these rows, or make 'missing' a level."
        )
    return array.astype(object) if array.dtype.kind in "UST" else array


def _indicators(values: NDArray[Any], levels: list[Any], label: str) -> FloatArray:
    out = np.zeros((len(values), len(levels)))
    known = np.zeros(len(values), dtype=bool)
    for column, level in enumerate(levels):
        equal = np.asarray(values == level)
        out[:, column] = equal
        known |= equal
    if not known.all():
        unknown = sorted({str(value) for value in values[~known]})
        raise ValueError(
            f"{label} has level(s) {unknown[:5]} that were not there in fit "
            f"({[str(v) for v in levels][:10]}). Give the column a categorical dtype with all its "
            "levels, or leave these rows out."
        )
    return out[:, 1:]
