"""What `mdnorm.recalibrate` found: layer by layer, in numbers and in sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from mdnorm.text import aligned

# From where on a share is called smaller than 1.
_SIGNIFICANT = 0.05
# Rows a column below which there is a warning.
_FEW_ROWS = 5


@dataclass(frozen=True, eq=False)
class RecalibratedLayer:
    """One recalibrated layer.

    Attributes
    ----------
    name : str
        "" where the model is the layer.
    rows, new_rows : int
        Of `loader` and of `held_out`, those of positive weight; 0 without.
    columns : int
        Number of linearly independent metadata and label columns.
    standard_errors : (K_m, *num_features) array, float64
        Of the least-squares coefficients of `loader`, in the units of `MetadataNorm.coefficients`; infinite
        where rows are too few to tell.
    noise : float
        Share of the mean square of the least-squares coefficients that is noise, at most 1.
    kept : float
        Length of the new coefficients over that of the least-squares ones (of `held_out` where it is given),
        both in standard errors. 1: nothing was shrunk.
    found_again, found_again_error, p_value : float or None
        The share of the effect in `loader` that the rows of `held_out` show, 1 for all of it and 0 for none;
        its standard error; and the one-sided p-value of the hypothesis that it is 1. None without
        `held_out`, or without an effect.
    """

    name: str
    rows: int
    new_rows: int
    columns: int
    standard_errors: NDArray[np.float64] = field(repr=False)
    noise: float
    kept: float
    found_again: float | None = None
    found_again_error: float | None = None
    p_value: float | None = None

    @property
    def memorised(self) -> bool:
        """Whether new rows show clearly less of the effect than the rows of `loader` do."""
        return self.p_value is not None and self.p_value < _SIGNIFICANT

    @property
    def verdict(self) -> str:
        """One sentence on what new rows say."""
        if self.found_again is None or self.found_again_error is None:
            if not self.new_rows:
                return "unknown whether it memorised: no held_out"
            return "no clear effect in the rows of loader, so nothing to find again"
        shown = f"{100 * self.found_again:.0f} % ± {100 * self.found_again_error:.0f} %"
        if self.memorised:
            return f"this network memorised: new rows show {shown} of the effect that its training rows have"
        return f"no sign of memorising: new rows show {shown} of the effect that the training rows have"

    @property
    def warnings(self) -> list[str]:
        """What a user must not miss: that the network memorised, that rows are too few."""
        called = f"the layer {self.name!r}" if self.name else "the layer"
        warnings = []
        if self.memorised:
            warnings.append(f"{called}: {self.verdict} (p = {self.p_value:.2g}).")
        given = {"loader": self.rows} | ({"held_out": self.new_rows} if self.new_rows else {})
        few = [f"{rows} row(s) of {name}" for name, rows in given.items() if rows < _FEW_ROWS * self.columns]
        if few:
            warnings.append(
                f"{called} was recalibrated on {' and '.join(few)} for {self.columns} column(s) of metadata "
                f"and labels: fewer than {_FEW_ROWS} a column tell little about the effect of the metadata. "
                "Give more rows, or fewer columns."
            )
        return warnings


@dataclass(frozen=True)
class Recalibration:
    """What `mdnorm.recalibrate` did; its text is a table.

    Attributes
    ----------
    layers : tuple of RecalibratedLayer
        In the order in which they run.
    """

    layers: tuple[RecalibratedLayer, ...]

    @property
    def names(self) -> list[str]:
        """Names of the layers, in the order in which they run."""
        return [layer.name for layer in self.layers]

    def __str__(self) -> str:
        head = ["layer", "rows", "new rows", "columns", "noise", "kept", "found again"]
        lines = aligned([head, *(_cells(layer) for layer in self.layers)])
        verdicts = [f"{layer.name or 'layer'}: {layer.verdict}." for layer in self.layers]
        legend = [
            "noise: how much of the least-squares coefficients is chance",
            "kept: length of the coefficients over that of the least-squares ones",
            "found again: share of the effect in the training rows that new rows show, ± standard error",
        ]
        return "\n".join([*lines, "", *verdicts, "", *legend])


def _cells(layer: RecalibratedLayer) -> list[str]:
    found = "–"
    if layer.found_again is not None and layer.found_again_error is not None:
        found = f"{layer.found_again:.2f} ± {layer.found_again_error:.2f} (p = {layer.p_value:.2g})"
    numbers = [str(layer.rows), str(layer.new_rows or "–"), str(layer.columns)]
    return [layer.name or "layer", *numbers, f"{layer.noise:.0%}", f"{layer.kept:.0%}", found]


def probability_below(value: float, expected: float, error: float, freedom: int) -> float:
    """Return the probability of at most this value of Student's t distribution about `expected`."""
    # With x = √ν tan θ the density is cos θ to the power ν − 1, which has no tails to lose.
    end = math.atan2(value - expected, error * math.sqrt(freedom))
    angles = [torch.linspace(-math.pi / 2, to, 4001, dtype=torch.float64) for to in (end, math.pi / 2)]
    below, total = (float(torch.trapezoid(part.cos() ** (freedom - 1), part)) for part in angles)
    return below / total
