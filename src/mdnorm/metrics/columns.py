"""Columns of users (labels, groups, metadata) to arrays and to classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.reader import Column, read_column
from mdnorm.text import listed


@dataclass(frozen=True)
class Categories:
    """A column of classes: `codes` (n,) int64 into `names`, Python scalars in their order."""

    codes: NDArray[np.int64]
    names: tuple[Any, ...]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each class, (number of classes,)."""
        return np.bincount(self.codes, minlength=len(self.names)).astype(np.int64)

    def of_rows(self, kept: NDArray[np.bool_]) -> Categories:
        """Return the classes of some of the rows, without those that are in none of them."""
        codes = self.codes[kept]
        present = np.flatnonzero(np.bincount(codes))
        return Categories(np.searchsorted(present, codes), tuple(self.names[code] for code in present))


def _read(values: Any, name: str) -> Column:
    if values is None:
        raise TypeError(f"{name} must be a column with one value per row, got None.")
    shape = tuple(np.shape(values))
    if len(shape) != 1 and not (len(shape) == 2 and shape[1] == 1):
        raise ValueError(
            f"{name} must have shape (n,), one value per row, got {shape}: pass one column at a time."
        )
    if shape[0] == 0:
        raise ValueError(f"{name} has no rows: check how the rows were selected.")
    column = read_column(name, np.asarray(values) if isinstance(values, list) and len(shape) == 2 else values)
    if column.kind == "date":
        raise TypeError(
            f"{name} must hold numbers or categories, got dates: convert it to a number first, for example "
            "to days since the first."
        )
    bad = column.missing.copy()
    if column.distinct is None and column.values.dtype.kind == "f":
        bad |= ~np.isfinite(column.values)
    if bad.any():
        rows = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} has missing or infinite values in row(s) {listed(rows)} ({len(rows)} of {bad.size} "
            "rows): drop these rows from every argument, or give missing values a category of their own."
        )
    return column


def as_column(values: Any, name: str) -> NDArray[Any]:
    """Return one value per row, (n,) or (n, 1), as an array (n,): booleans, numbers, or strings as objects.

    None, complex values, dates and values of several kinds are a TypeError; the wrong shape, no rows, and
    missing or infinite values a ValueError.
    """
    column = _read(values, name)
    if column.distinct is None:
        return column.values
    array: NDArray[Any] = np.array(column.distinct, dtype=object)[column.values]
    return array.astype(bool) if column.kind == "boolean" else array


def as_categories(values: Any, name: str) -> Categories:
    """Return a column, as of `as_column`, as classes: sorted, or in the order of a categorical type.

    Classes without a row are left out.
    """
    column = _read(values, name)
    names = column.levels()
    if column.declared:
        place = {level: index for index, level in enumerate(column.declared)}
        names = tuple(sorted(names, key=place.__getitem__))
    return Categories(column.codes(names), names)
