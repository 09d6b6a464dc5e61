"""Features into which a subtraction writes the metadata, for readers that tell small differences apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.text import listed

# Discrete: no more different values than this, and several rows for each.
_MAX_DISTINCT = 20
_ROWS_OF_A_VALUE = 5

# Excess kurtosis of a heavy tail: that of a log-normal with a deviation of 1 is above 100, of a Laplace 3.
_HEAVY = 20.0

_ROWS = 10_000


class LeakageWarning(UserWarning):
    """Residuals of these features let a non-linear reader find the metadata that were subtracted."""


def is_discrete(values: NDArray[np.float64]) -> bool:
    """Whether numbers (n,), all finite, have few different values, each several times."""
    # Most features show in their first rows that they have more.
    if len(np.unique(values[: 4 * _MAX_DISTINCT])) > _MAX_DISTINCT:
        return False
    return len(np.unique(values)) <= min(_MAX_DISTINCT, len(values) // _ROWS_OF_A_VALUE)


def leaking_features(features: NDArray[Any], names: Sequence[Any]) -> str | None:
    """Return a sentence on discrete and heavy-tailed features, (n, D), or None where there are none.

    A subtraction moves the few values of a discrete feature by amounts that differ from row to row, however
    small: which shifted value it is tells the metadata of the row. The bulk of a heavy-tailed feature is
    moved by more than its own width. The first 10 000 rows are looked at; missing values are left out.

    References
    ----------
    Hamdan, Love, von Polier, Weis, Schwender, Eickhoff & Patil, Confound-leakage: confound removal in machine
    learning leads to leakage, GigaScience 12 (2023).
    """
    discrete, heavy = [], []
    for name, column in zip(names, features[:_ROWS].T, strict=True):
        values = column[np.isfinite(column)].astype(np.float64)
        if len(values) < 2 * _ROWS_OF_A_VALUE or values.min() == values.max():
            continue
        if is_discrete(values):
            discrete.append(name)
            continue
        # In units of the largest one, so that powers are numbers whatever the unit of the feature.
        deviations = values - values.mean()
        deviations /= np.abs(deviations).max()
        if np.mean(deviations**4) / np.mean(deviations**2) ** 2 - 3 > _HEAVY:
            heavy.append(name)
    found = [
        f"{len(columns)} feature(s) {what} ({listed(columns)})"
        for what, columns in (("have few different values", discrete), ("have heavy tails", heavy))
        if columns
    ]
    if not found:
        return None
    return (
        f"{' and '.join(found)}: after the subtraction a non-linear model, such as a random forest, can read "
        "the metadata in them, and by the metadata the label. Use linear models on the result, transform "
        "such features before, or erase within labels (mdnorm.erasure), which needs no metadata of new rows."
    )
