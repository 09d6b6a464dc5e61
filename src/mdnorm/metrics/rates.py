"""Rates of counts, and means of them, where some are not defined."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["mean_of_defined", "ratio"]

Floats = NDArray[np.float64]


def ratio(values: Floats, totals: Floats) -> Floats:
    """Return ``values / totals`` of arrays of one shape; NaN where a total is 0."""
    divided: Floats = np.divide(values, totals, out=np.full(values.shape, np.nan), where=totals > 0)
    return divided


def mean_of_defined(values: Floats, axis: int) -> Floats:
    """Return the mean over the values that are finite; NaN where none is."""
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=axis), defined.sum(axis=axis).astype(np.float64))
