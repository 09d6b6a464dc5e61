"""Columns from one variable: what each learns from the training data, and keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mdnorm import basis
from mdnorm.design.saved import numbers_in, read

__all__ = ["BASES", "Basis", "CubicRegressionSpline", "Polynomial", "Spline", "basis_from_state"]

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_MAX_COLUMNS = 1000
_MAX_DEGREE = 20
_CHUNK_ROWS = 2**13


class Basis(Protocol):
    """Several columns from one variable."""

    @property
    def low(self) -> float:
        """Lower end of the range."""

    @property
    def num_columns(self) -> int:
        """Number of columns."""

    def columns(self, values: Vector) -> Matrix:
        """Return (n, num_columns) for n finite values; those outside the training range move to its ends."""

    def state(self) -> dict[str, Any]:
        """Return what was learnt, as JSON has it."""


def _clipped(values: Vector, low: float, high: float) -> Vector:
    clipped: Vector = np.clip(values, low, high)
    return clipped


def _checked_knots(values: Vector, options: Mapping[str, Any], what: str) -> tuple[float, float, list[float]]:
    """Return the ends of the range and the inner knots that the caller gave."""
    low, high = (float(values.min()), float(values.max()))
    low = float(options["lower_bound"]) if options.get("lower_bound") is not None else low
    high = float(options["upper_bound"]) if options.get("upper_bound") is not None else high
    inner = [float(knot) for knot in options.get("knots") or ()]
    if not all(first < second for first, second in zip([low, *inner], [*inner, high], strict=True)):
        raise ValueError(
            f"{what}: the knots must ascend between the ends of the range, got {[low, *inner, high]}."
        )
    return low, high, inner


@dataclass(frozen=True)
class Spline:
    """B-spline without its first column (`mdnorm.basis.spline`)."""

    knots: tuple[float, ...]
    degree: int
    type: ClassVar[str] = "bs"

    @classmethod
    def fit(cls, values: Vector, options: Mapping[str, Any], what: str) -> Spline:
        """Place the knots: at quantiles of the values, or as given."""
        degree, df = options.get("degree", 3), options.get("df")
        if not 1 <= degree <= _MAX_DEGREE:
            raise ValueError(f"{what}: degree must be between 1 and {_MAX_DEGREE}, got {degree}.")
        low, high, inner = _checked_knots(values, options, what)
        if df is not None and options.get("knots") is None:
            if not degree <= df <= _MAX_COLUMNS:
                raise ValueError(f"{what}: df must be between degree={degree} and {_MAX_COLUMNS}, got {df}.")
            inside = values[(values >= low) & (values <= high)]
            try:
                if len(np.unique(inside)) <= df:
                    raise ValueError
                inner = basis.spline_knots(inside, df, degree).tolist()[1:-1] if df > degree else []
                _checked_knots(values, {**options, "knots": inner}, what)
            except ValueError:
                raise ValueError(
                    f"{what}: there are too few different values for {df} columns, knots would coincide: "
                    "take a smaller df, give the knots, or make it a category with C()."
                ) from None
        return cls((low, *inner, high), degree)

    @property
    def low(self) -> float:
        """Lower end of the range."""
        return self.knots[0]

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return len(self.knots) + self.degree - 2

    def columns(self, values: Vector) -> Matrix:
        """Return (n, num_columns) for n finite values."""
        result = np.empty((len(values), self.num_columns))
        for start in range(0, len(values), _CHUNK_ROWS):  # intermediate results stay in the cache
            rows = slice(start, start + _CHUNK_ROWS)
            result[rows] = basis.spline(torch.from_numpy(values[rows]), self.knots, self.degree).numpy()
        return result

    def state(self) -> dict[str, Any]:
        """Return what was learnt, as JSON has it."""
        return {"type": self.type, "knots": list(self.knots), "degree": self.degree}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Spline:
        """Return what `state` gave; ValueError where it is of no such basis."""
        knots, degree = numbers_in(state, "knots"), read(state, "degree", int)
        if len(knots) < 2 or not 1 <= degree <= _MAX_DEGREE or bool((np.diff(knots) <= 0).any()):
            raise ValueError("its spline has knots or a degree that no spline has")
        return cls(tuple(knots), degree)


@dataclass(frozen=True)
class CubicRegressionSpline:
    """Natural cubic regression spline, parametrised by its values at the knots, and centred (Wood 2006, 4.1).

    The columns are combinations that have mean 0 over the training data: without this constraint they would
    contain the intercept, which the layer has itself.
    """

    knots: tuple[float, ...]
    constraint: tuple[tuple[float, ...], ...]  # (number of knots, number of knots − 1)
    type: ClassVar[str] = "cr"

    @classmethod
    def fit(cls, values: Vector, options: Mapping[str, Any], what: str) -> CubicRegressionSpline:
        """Place the knots: at quantiles of the different values, or as given."""
        df = options.get("df")
        low, high, inner = _checked_knots(values, options, what)
        if options.get("knots") is None:
            if df is None:
                raise ValueError(f"{what}: give df (the number of columns), or knots.")
            if not 1 <= df <= _MAX_COLUMNS:
                raise ValueError(f"{what}: df must be between 1 and {_MAX_COLUMNS}, got {df}.")
            distinct = np.unique(values[(values >= low) & (values <= high)])
            inner = np.quantile(distinct, np.linspace(0, 1, df + 1)[1:-1]).tolist()
            if len(distinct) <= df:
                raise ValueError(
                    f"{what}: there are {len(distinct)} different values, too few for {df} columns: take a "
                    "smaller df, give the knots, or make it a category with C()."
                )
        knots = (low, *inner, high)
        means = cls._unconstrained(_clipped(values, low, high), np.array(knots)).mean(0)
        rotation = np.linalg.qr(means[:, None], mode="complete")[0][:, 1:]
        return cls(knots, tuple(map(tuple, rotation.tolist())))

    @property
    def low(self) -> float:
        """Lower end of the range."""
        return self.knots[0]

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return len(self.knots) - 1

    @staticmethod
    def _unconstrained(values: Vector, knots: Vector) -> Matrix:
        gaps, rows = np.diff(knots), np.arange(len(values))
        # Second derivatives at the inner knots follow from continuity; they are 0 at both ends.
        curvature = np.zeros((len(knots), len(knots)))
        if len(knots) > 2:
            second_difference = np.zeros((len(knots) - 2, len(knots)))
            tridiagonal = np.zeros((len(knots) - 2, len(knots) - 2))
            for i in range(len(knots) - 2):
                second_difference[i, i : i + 3] = 1 / gaps[i], -1 / gaps[i] - 1 / gaps[i + 1], 1 / gaps[i + 1]
                tridiagonal[i, i] = (gaps[i] + gaps[i + 1]) / 3
                if i:
                    tridiagonal[i, i - 1] = tridiagonal[i - 1, i] = gaps[i] / 6
            curvature[1:-1] = np.linalg.solve(tridiagonal, second_difference)
        left = np.clip(np.searchsorted(knots, values) - 1, 0, len(knots) - 2)
        gap, rise, fall = gaps[left], values - knots[left], knots[left + 1] - values
        result = ((fall**3 / gap - gap * fall) / 6)[:, None] * curvature[left]
        result += ((rise**3 / gap - gap * rise) / 6)[:, None] * curvature[left + 1]
        result[rows, left] += fall / gap
        result[rows, left + 1] += rise / gap
        return result

    def columns(self, values: Vector) -> Matrix:
        """Return (n, num_columns) for n finite values."""
        knots = np.array(self.knots)
        free = self._unconstrained(_clipped(values, knots[0], knots[-1]), knots)
        result: Matrix = free @ np.array(self.constraint)
        return result

    def state(self) -> dict[str, Any]:
        """Return what was learnt, as JSON has it."""
        return {
            "type": self.type,
            "knots": list(self.knots),
            "constraint": [list(row) for row in self.constraint],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CubicRegressionSpline:
        """Return what `state` gave; ValueError where it is of no such basis."""
        knots, rows = numbers_in(state, "knots"), read(state, "constraint", list)
        constraint = tuple(tuple(numbers_in({"constraint": row}, "constraint")) for row in rows)
        shape_fits = len(rows) == len(knots) and all(len(row) == len(knots) - 1 for row in constraint)
        if len(knots) < 2 or not shape_fits or bool((np.diff(knots) <= 0).any()):
            raise ValueError("its spline has knots that no spline has")
        return cls(tuple(knots), constraint)


@dataclass(frozen=True)
class Polynomial:
    """Orthogonal polynomials of the training values, by their three-term recurrence; or plain powers."""

    low: float
    high: float
    alpha: tuple[float, ...]  # one for each degree
    norms: tuple[float, ...]  # squared norms of the degrees 0, 1, …; empty for plain powers
    type: ClassVar[str] = "poly"

    @classmethod
    def fit(cls, values: Vector, options: Mapping[str, Any], what: str) -> Polynomial:
        """Find the polynomials that are orthogonal over the values."""
        degree = options.get("degree", 1)
        if not 1 <= degree <= _MAX_DEGREE:
            raise ValueError(f"{what}: degree must be between 1 and {_MAX_DEGREE}, got {degree}.")
        distinct = len(np.unique(values))
        if distinct <= degree:
            raise ValueError(
                f"{what}: there are {distinct} different values, too few for degree {degree}: take a smaller "
                "one, or make it a category with C()."
            )
        low, high = float(values.min()), float(values.max())
        if options.get("raw"):
            return cls(low, high, (0.0,) * degree, ())
        alpha: list[float] = []
        norms = [float(len(values))]
        before, last = np.zeros_like(values), np.ones_like(values)
        for order in range(degree):
            alpha.append(float((values * last**2).sum() / norms[-1]))
            beta = norms[-1] / norms[-2] if order else 0.0
            before, last = last, (values - alpha[-1]) * last - beta * before
            norms.append(float((last**2).sum()))
        return cls(low, high, tuple(alpha), tuple(norms))

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return len(self.alpha)

    def columns(self, values: Vector) -> Matrix:
        """Return (n, num_columns) for n finite values."""
        values = _clipped(values, self.low, self.high)
        if not self.norms:
            return np.stack([values**power for power in range(1, self.num_columns + 1)], 1)
        before, last = np.zeros_like(values), np.ones_like(values)
        result = []
        for order, alpha in enumerate(self.alpha):
            beta = self.norms[order] / self.norms[order - 1] if order else 0.0
            before, last = last, (values - alpha) * last - beta * before
            result.append(last / np.sqrt(self.norms[order + 1]))
        return np.stack(result, 1)

    def state(self) -> dict[str, Any]:
        """Return what was learnt, as JSON has it."""
        return {
            "type": self.type,
            "low": self.low,
            "high": self.high,
            "alpha": list(self.alpha),
            "norms": list(self.norms),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Polynomial:
        """Return what `state` gave; ValueError where it is of no such basis."""
        low, high = numbers_in({"range": [state.get("low"), state.get("high")]}, "range")
        alpha, norms = numbers_in(state, "alpha"), numbers_in(state, "norms")
        degree_fits = 1 <= len(alpha) <= _MAX_DEGREE and len(norms) in (0, len(alpha) + 1)
        if not degree_fits or low > high or any(norm <= 0 for norm in norms):
            raise ValueError("its polynomial has coefficients that no polynomial has")
        return cls(low, high, tuple(alpha), tuple(norms))


BASES: dict[str, type[Spline | CubicRegressionSpline | Polynomial]] = {
    "bs": Spline,
    "cr": CubicRegressionSpline,
    "cs": CubicRegressionSpline,
    "poly": Polynomial,
}


def basis_from_state(state: Mapping[str, Any]) -> Basis:
    """Return the basis that a saved state describes.

    Raises
    ------
    ValueError
        The state is of no basis.
    """
    for cls in BASES.values():
        if state.get("type") == cls.type:
            return cls.from_state(state)
    raise ValueError(f"it has a factor of the unknown type {state.get('type')!r}")


def option_names(function: str) -> Sequence[str]:
    """Return the options of a basis in the order in which they may be given without a name."""
    return {
        "bs": ("df", "knots", "degree", "include_intercept", "lower_bound", "upper_bound", "extrapolation"),
        "cr": ("df", "knots", "lower_bound", "upper_bound", "constraints", "extrapolation"),
        "cs": ("df", "knots", "lower_bound", "upper_bound", "constraints", "extrapolation"),
        "poly": ("degree", "raw"),
    }[function]
