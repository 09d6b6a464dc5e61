"""Columns of users (labels, groups, metadata) to arrays and to classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm.metrics.checks import listed

__all__ = ["Categories", "as_categories", "as_column"]


@dataclass(frozen=True)
class Categories:
    """A column of classes: `codes` (n,) int64 into `names`, Python scalars in their order."""

    codes: NDArray[np.int64]
    names: tuple[Any, ...]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each class, (number of classes,)."""
        return np.bincount(self.codes, minlength=len(self.names)).astype(np.int64)


def as_column(values: Any, name: str) -> NDArray[Any]:
    """Return one value per row as an array (n,): booleans, numbers, or strings and other objects.

    Parameters
    ----------
    values : tensor, array, list or Series, (n,) or (n, 1)
        Not complex, not dates, nothing missing.
    name : str
        Of the argument, for the error message.

    Raises
    ------
    TypeError
        None, complex, or dates.
    ValueError
        The wrong shape, no rows, or missing or infinite values.
    """
    with requires("metrics"):
        import pandas as pd
    if values is None:
        raise TypeError(f"{name} must be a column with one value per row, got None.")
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        array: NDArray[Any] = (values.double() if values.is_floating_point() else values).numpy()
    else:
        array = np.asarray(values)
    shape = array.shape
    if array.ndim == 2 and shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"{name} must have shape (n,), one value per row, got {shape}: pass one column at a time."
        )
    if array.size == 0:
        raise ValueError(f"{name} has no rows: check how the rows were selected.")
    if array.dtype.kind in "cmM":
        raise TypeError(
            f"{name} must hold numbers or categories, got dtype {array.dtype}: convert it to a number first, "
            "for dates for example to days since the first."
        )
    bad = np.asarray(pd.isna(array))
    if array.dtype.kind == "f":
        bad |= ~np.isfinite(array)
    if bad.any():
        rows = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} has missing or infinite values in row(s) {listed(rows)} ({len(rows)} of {array.size} "
            "rows): drop these rows from every argument, or give missing values a category of their own."
        )
    if array.dtype.kind == "O":
        array = array.copy()
        if all(isinstance(value, (bool, np.bool_)) for value in array):
            return array.astype(bool)
        if all(isinstance(value, (int, float, np.number, bool, np.bool_)) for value in array):
            return as_column(np.asarray(array.tolist()), name)
    return array


def as_categories(values: Any, name: str) -> Categories:
    """Return a column as classes: sorted, or in the order of a pandas categorical; unused ones are dropped.

    Parameters and errors are those of `as_column`; values that cannot be sorted among each other are a
    TypeError.
    """
    array = as_column(values, name)
    try:
        distinct, codes = np.unique(array, return_inverse=True)
    except TypeError as error:
        types = sorted({type(value).__name__ for value in array})
        raise TypeError(
            f"{name} mixes values of types {', '.join(types)}, which have no common order: convert it to "
            "strings."
        ) from error
    names = distinct.tolist()
    categories = getattr(getattr(values, "cat", values), "categories", None)
    if categories is not None:
        position = {value: index for index, value in enumerate(np.asarray(categories).tolist())}
        order = np.array(sorted(range(len(names)), key=lambda index: position[names[index]]))
        names = [names[index] for index in order]
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        codes = rank[codes]
    return Categories(codes.reshape(-1).astype(np.int64), tuple(names))
