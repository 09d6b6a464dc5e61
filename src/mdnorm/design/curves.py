"""Several columns from one variable: what ``bs``, ``cr`` and ``poly`` learn from the training data, and keep.

formulaic places the knots and finds the columns. Each of its columns is a polynomial between two knots, and
that is what is kept: numbers that a file can hold, that are checked when they are read, and that give the
columns of new rows without formulaic and pandas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.design.formula import FormulaError
from mdnorm.design.saved import numbers_in, read
from mdnorm.extras import requires

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_MAX_DF = 100
_MAX_DEGREE = 20
_CHUNK_ROWS = 2**13


@dataclass(frozen=True, eq=False)
class Curve:
    """Columns that are polynomials of one variable between breaks, and constant beyond the outer ones."""

    breaks: Vector  # (L + 1,), ascending; the outer ones are the ends of the training range
    # (degree + 1, L, K), of Chebyshev polynomials in the variable, mapped from each interval to [−1, 1].
    coefficients: NDArray[np.float64]

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return int(self.coefficients.shape[2])

    def columns(self, values: Vector) -> Matrix:
        """Return (n, K) for n finite values; those outside the training range move to its ends."""
        result = np.empty((len(values), self.num_columns))
        for start in range(0, len(values), _CHUNK_ROWS):  # intermediate results stay in the cache
            rows = slice(start, start + _CHUNK_ROWS)
            clipped = np.clip(values[rows], self.breaks[0], self.breaks[-1])
            interval = np.searchsorted(self.breaks[1:-1], clipped, side="right")
            place = _place(clipped, self.breaks[interval], self.breaks[interval + 1])[:, None]
            result[rows] = chebyshev.chebval(place, self.coefficients[:, interval], tensor=False)
        return result

    def state(self) -> dict[str, Any]:
        """Return what was learnt, as JSON has it."""
        return {"breaks": self.breaks.tolist(), "coefficients": self.coefficients.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Curve:
        """Return what `state` gave; ValueError where it is of no curve."""
        breaks = np.array(numbers_in(state, "breaks"))
        coefficients = np.array(read(state, "coefficients", list))
        if coefficients.dtype.kind not in "if" or not np.isfinite(coefficients).all():
            raise ValueError("its curve has coefficients that are no finite numbers")
        with np.errstate(over="ignore"):
            gaps = np.diff(breaks)
        if not len(gaps) or not (np.isfinite(gaps) & (gaps > 0)).all():
            raise ValueError("its curve has breaks that do not ascend")
        fits = coefficients.ndim == 3 and coefficients.shape[1] == len(breaks) - 1
        if not fits or not 1 <= len(coefficients) <= _MAX_DEGREE + 1 or not coefficients.shape[2]:
            raise ValueError("its curve has coefficients for another number of breaks, or of no degree")
        return cls(breaks, coefficients.astype(np.float64))


def _place(values: Vector, left: Vector, right: Vector) -> Vector:
    """Return where between left (−1) and right (1) values lie."""
    return np.asarray(((values - left) - (right - values)) / (right - left))


def fit_curve(function: str, values: Vector, options: Mapping[str, Any], what: str) -> Curve:
    """Return the columns that formulaic's function finds for the training values (n,), which are finite.

    The options are checked by `parse_factor`; `what` is the factor, for messages.

    References
    ----------
    de Boor, A Practical Guide to Splines (1978), chapter X. Wood, Generalized Additive Models: An
    Introduction with R (2006), section 4.1.
    """
    name = "degree" if function == "poly" else "df"
    degree = options.get("degree", 1 if function == "poly" else 3)
    if function == "bs" and not 1 <= degree <= _MAX_DEGREE:
        raise FormulaError(f"{what}: degree must be between 1 and {_MAX_DEGREE}, got {degree}.")
    df = degree if function == "poly" else options.get("df")
    if df is not None:
        least, most = (degree if function == "bs" else 1), (_MAX_DEGREE if function == "poly" else _MAX_DF)
        if not least <= df <= most:
            raise FormulaError(f"{what} would have {df} columns: {name} must be between {least} and {most}.")
        options = {**options, name: df}
    breaks, columns = _breaks_and_columns(function, values, options, what)
    if (np.diff(breaks) <= 0).any():
        raise _too_few(what, df or len(breaks), values)
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    left, right = breaks[:-1, None], breaks[1:, None]
    points = np.clip((left + right) / 2 + (right - left) / 2 * nodes, left, right)
    # Rounding moves the points a little: the polynomials go through those that were computed.
    system = chebyshev.chebvander(_place(points, left, right), degree)
    at_points = columns(points.ravel()).reshape(*points.shape, -1)
    try:
        coefficients: Matrix = np.linalg.solve(system, at_points).astype(np.float64)
    except np.linalg.LinAlgError:
        raise _too_few(what, df or len(breaks), values) from None
    return Curve(breaks, np.moveaxis(coefficients, 1, 0))


def _too_few(what: str, df: int, values: Vector) -> ValueError:
    return ValueError(
        f"{what}: there are {len(np.unique(values))} different values, too few for {df} columns: take a "
        "smaller df (or degree), give the knots, or make it a category with C()."
    )


def _breaks_and_columns(
    function: str, values: Vector, options: Mapping[str, Any], what: str
) -> tuple[Vector, Callable[[Vector], Matrix]]:
    """Return the breaks that formulaic finds for the training values, and its columns for any others."""
    with requires("design"):
        from formulaic.transforms import basis_spline, natural_cubic_spline, poly
    low, high = (
        float(end if (given := options.get(name)) is None else given)
        for name, end in (("lower_bound", values.min()), ("upper_bound", values.max()))
    )
    inner = [float(knot) for knot in options.get("knots") or ()]
    points = [low, *inner, high]
    if not (np.diff(points) > 0).all() and function != "poly":
        raise ValueError(f"{what}: the knots must ascend between the ends of the range, got {points}.")
    df, inside = options.get("df"), values[(values >= low) & (values <= high)]
    most = options["degree"] if function == "poly" else df
    if most is not None and len(np.unique(inside)) <= most:
        raise _too_few(what, most, inside)
    chosen: dict[str, Any] = {**options, "_state": {}}
    if function == "poly":
        transform = poly
    elif function == "bs":
        transform, chosen["extrapolation"] = basis_spline, "clip"
    elif df is None and options.get("knots") is None:
        raise ValueError(f"{what}: give df (the number of columns), or knots.")
    elif df == 1 or (df is None and not inner):
        # A natural spline without inner knots is a line, which formulaic does not do.
        mean = float(np.clip(values, low, high).mean())
        return np.array([low, high]), lambda points: ((points - mean) / (high - low))[:, None]
    else:
        transform, chosen["extrapolation"], chosen["constraints"] = natural_cubic_spline, "clip", "center"

    def columns(points: Vector) -> Matrix:
        result = transform(points, **chosen)
        if function == "poly":
            return np.asarray(result)
        return np.column_stack(list(dict(result).values()))

    columns(values)
    knots = chosen["_state"].get("knots", [low, high])
    # B-splines have their outer knots several times.
    outer = options.get("degree", 3) if function == "bs" else 0
    return np.array(knots[outer : len(knots) - outer]), columns


def polynomial(values: Tensor | ArrayLike, degree: int, *, low: float, high: float) -> Tensor:
    """Return the powers 1 … degree of the values, mapped so that [low, high] becomes [−1, 1].

    For tensors whose range is known, on any device; a `Design` with ``poly(x, degree)`` learns it.

    Parameters
    ----------
    values : (N,) or (N, 1)
    degree : int
        At least 1.
    low, high : float
        Of the training data. The layer's result does not depend on them, rounding does.

    Returns
    -------
    (N, degree) tensor, float32 or wider

    Raises
    ------
    ValueError
        A wrong shape, NaN, a degree below 1 or an empty range.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}.")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must be below high and both finite, got low={low} and high={high}.")
    tensor = as_real_tensor(values, "values")
    if tensor.ndim != 1 and (tensor.ndim != 2 or tensor.shape[1] != 1):
        raise ValueError(f"values must have shape (N,) or (N, 1), got {tuple(tensor.shape)}.")
    # Integers may be too large for float32: days or seconds since some date.
    least = torch.float32 if tensor.is_floating_point() else torch.float64
    tensor = tensor.reshape(-1).to(torch.promote_types(tensor.dtype, least))
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("values has NaN or infinite values: drop or impute these rows first.")
    scaled = (tensor - (low + high) / 2) / ((high - low) / 2)
    return torch.stack([scaled**power for power in range(1, degree + 1)], 1)
