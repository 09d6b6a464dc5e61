"""Factors of a formula with what they learnt from the training data: levels, curves, means and deviations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.curves import Curve, fit_curve
from mdnorm.design.formula import Factor, quoted
from mdnorm.design.reader import Column, shown_rows
from mdnorm.design.roles import odd_cell
from mdnorm.design.saved import numbers_in, read
from mdnorm.text import listed

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Evaluated:
    """Values of a factor over a table: codes of a category, or (n,) or (n, k) numbers."""

    values: NDArray[Any]
    unusable: Mask


@dataclass(frozen=True, eq=False)
class FittedFactor:
    """A factor and what it learnt."""

    factor: Factor
    kind: str  # "category", "numeric" or "curve"
    levels: tuple[Any, ...] = ()  # of a category, the reference first
    curve: Curve | None = None
    moments: dict[str, list[float]] = field(default_factory=dict)  # of what is in ``center`` and ``scale``

    def width(self, reduced: bool) -> int:
        """Return the number of columns; `reduced`: a category leaves out its reference."""
        if self.kind == "category":
            return len(self.levels) - reduced
        return 1 if self.curve is None else self.curve.num_columns

    def names(self, reduced: bool) -> list[str]:
        """Return the names of the columns."""
        text = self.factor.text
        if self.kind == "category":
            mark = "T." if reduced else ""
            return [f"{text}[{mark}{level}]" for level in self.levels[int(reduced) :]]
        if self.curve is not None:
            return [f"{text}[{index + 1}]" for index in range(self.curve.num_columns)]
        return [text]

    def evaluate(
        self, columns: Mapping[str, Column], *, label: bool = False, unseen: str = "error"
    ) -> Evaluated:
        """Return the values over a table.

        A level that was not in training is an error where `unseen` is "error", and in a label always; so are
        strings where numbers are needed, and a number that is not finite.
        """
        factor = self.factor
        if self.kind == "category":
            column = columns[factor.variables[0]]
            codes = column.codes(self.levels)
            new = codes == -2
            if (label or unseen == "error") and new.any():
                otherwise = ', or build the design with unseen="mean" (no correction beyond the average)'
                raise ValueError(
                    f"{'label' if label else 'column'} {column.name!r} has level(s) "
                    f"{listed(column.examples(new))} in {shown_rows(new)}, not in the training "
                    f"data, which has {listed(self.levels, 10)}: correct or drop these rows"
                    f"{'' if label else otherwise}."
                )
            return Evaluated(codes, codes < 0)
        missing = any_missing(factor, columns)
        values = factor.evaluate(_numbers(factor, columns), self.moments)
        _check_finite(factor, values, missing, columns)
        if self.curve is None:
            return Evaluated(np.where(missing, 0.0, values), missing)
        return Evaluated(self.curve.columns(np.where(missing, self.curve.breaks[0], values)), missing)

    def state(self) -> dict[str, Any]:
        """Return what was learnt, as JSON has it."""
        state: dict[str, Any] = {"kind": self.kind}
        if self.kind == "category":
            state["levels"] = list(self.levels)
        if self.curve is not None:
            state["curve"] = self.curve.state()
        if self.moments:
            state["moments"] = self.moments
        return state


def factor_from_state(factor: Factor, state: Mapping[str, Any]) -> FittedFactor:
    """Return what `FittedFactor.state` gave; ValueError where it does not fit the factor."""
    kind = read(state, "kind", str)
    if kind not in ({"column": ("category", "numeric")}.get(factor.kind, (factor.kind,))):
        raise ValueError(f"its factor {factor.text!r} cannot be of kind {kind!r}")
    if kind == "category":
        levels = tuple(read(state, "levels", list))
        if any(type(level) not in (str, int, float, bool) for level in levels) or not levels:
            raise ValueError(f"its factor {factor.text!r} has levels that are no levels")
        if len(set(levels)) < len(levels):
            raise ValueError(f"its factor {factor.text!r} has a level twice")
        return FittedFactor(factor, kind, levels=levels)
    saved = read(state, "moments", dict) if "moments" in state else {}
    moments = {key: numbers_in(saved, key) for key in factor.moment_keys}
    if any(len(pair) != 2 for pair in moments.values()):
        raise ValueError(f"its factor {factor.text!r} has no mean and deviation")
    curve = Curve.from_state(read(state, "curve", dict)) if kind == "curve" else None
    return FittedFactor(factor, kind, curve=curve, moments=moments)


def fit_factor(factor: Factor, columns: Mapping[str, Column]) -> FittedFactor:
    """Learn what a factor needs from the columns of the training data."""
    missing = any_missing(factor, columns)
    if missing.all():
        raise ValueError(
            f"{factor.text!r}: no row has all of {', '.join(map(repr, factor.variables))}: take it out."
        )
    kind = factor.kind
    if kind == "column":
        column = columns[factor.variables[0]]
        problem = None if column.declared else odd_cell(column)
        if problem is not None:
            raise ValueError(
                f"{problem}: correct the cell or make it missing, or make the column a category with "
                f"C({factor.text})."
            )
        kind = "category" if column.categorical else "numeric"
    if kind == "category":
        return FittedFactor(factor, kind, levels=_fitted_levels(factor, columns[factor.variables[0]]))
    moments: dict[str, list[float]] = {}
    values = factor.evaluate(_numbers(factor, columns), moments)
    _check_finite(factor, values, missing, columns)
    if kind == "numeric":
        return FittedFactor(factor, kind, moments=moments)
    curve = fit_curve(factor.function, values[~missing], factor.options, repr(factor.text))
    return FittedFactor(factor, kind, curve=curve, moments=moments)


def any_missing(factor: Factor, columns: Mapping[str, Column]) -> Mask:
    """Return (n,) where a variable of the factor is missing."""
    return np.asarray(np.logical_or.reduce([columns[name].missing for name in factor.variables]))


def _numbers(factor: Factor, columns: Mapping[str, Column]) -> dict[str, Matrix]:
    for name in factor.variables:
        if columns[name].kind == "string":
            raise TypeError(
                f"{factor.text!r} needs numbers, but column {name!r} has strings: use "
                f"C({quoted(name)}), or convert it."
            )
    return {name: columns[name].as_float() for name in factor.variables}


def _check_finite(factor: Factor, values: Matrix, missing: Mask, columns: Mapping[str, Column]) -> None:
    bad = ~np.isfinite(values) & ~missing
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        at = ", ".join(f"{name} = {columns[name].as_float()[row]:g}" for name in factor.variables)
        raise ValueError(
            f"{factor.text!r} is not a finite number in {shown_rows(bad)}, where {at}: correct the values, "
            "or use another function."
        )


def _fitted_levels(factor: Factor, column: Column) -> tuple[Any, ...]:
    """Return the levels in the training data, the reference first."""
    levels = column.levels()
    if column.kind == "date":
        raise TypeError(f"{factor.text!r}: dates count as days; make a string column of them for a category.")
    if "levels" in factor.options:
        given, present = tuple(factor.options["levels"]), set(levels)
        extra = present - set(given)
        if extra:
            in_order = [level for level in levels if level in extra]
            raise ValueError(
                f"{factor.text!r}: column {column.name!r} has level(s) {listed(in_order)}, which "
                "levels= does not list."
            )
        levels = tuple(level for level in given if level in present)
    reference = factor.options.get("reference", levels[0])
    if reference not in levels:
        raise ValueError(
            f"{factor.text!r}: the reference {reference!r} is not a level in the training data, which has "
            f"{listed(levels, 10)}."
        )
    at = levels.index(reference)
    return (levels[at], *levels[:at], *levels[at + 1 :])
