"""Checked input of the measures of dependence: rows of samples on one device, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast, overload

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mdnorm.arrays import as_real_tensor, checked_weights
from mdnorm.metrics.checks import check_same_rows, joined
from mdnorm.text import listed

# Fewer samples leave the bias correction undefined: it divides by n − 3.
MIN_SAMPLES = 4
UNDEFINED = "the bias-corrected estimate is not defined for fewer samples"

Weights: TypeAlias = Tensor | ArrayLike | None


class Measure(Protocol):
    """A measure of two samples: a tensor where one of them is a tensor, otherwise a float."""

    @overload
    def __call__(self, x: Tensor, y: Tensor | ArrayLike, **options: Any) -> Tensor: ...

    @overload
    def __call__(self, x: ArrayLike, y: Tensor, **options: Any) -> Tensor: ...

    @overload
    def __call__(self, x: ArrayLike, y: ArrayLike, **options: Any) -> float: ...


def measure(function: Callable[..., Tensor | float]) -> Measure:
    """Tell type checkers what a measure returns for which inputs."""
    return cast("Measure", function)


@dataclass(frozen=True)
class Samples:
    """Variables of the same samples."""

    # (n, p) float64 each, without their constant columns, which add nothing to a distance, and scaled by a
    # power of two to absolute values of at most 1. Squares of squares can then neither overflow nor vanish,
    # and no value is rounded. A variable that is constant has no column left.
    rows: tuple[Tensor, ...]
    # The values of variable k were divided by ``2 ** exponents[k]``.
    exponents: tuple[int, ...]
    # Whether one of the variables came as a tensor.
    returns_tensor: bool
    # Rows given, (number of them,) bool, that are here: all but those of weight 0.
    kept: Tensor
    # (n,) float64, above 0, the largest 1.
    weights: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return self.rows[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Device of all rows."""
        return self.rows[0].device

    def result(self, value: Tensor) -> Tensor | float:
        """Return `value` as it is where a variable came as a tensor, as a float otherwise."""
        return value if self.returns_tensor else float(value)


def as_samples(
    *,
    min_samples: int = MIN_SAMPLES,
    reason: str = UNDEFINED,
    weights: Weights = None,
    **variables: Tensor | ArrayLike,
) -> Samples:
    """Check variables (n,) or (n, p), by the names of their arguments, that are measured on the same samples.

    Tensors must be on the same device; arrays are moved there. `reason` says why fewer than `min_samples`
    rows, or rows of a weight above 0, are not enough. Errors are those that
    `mdnorm.metrics.distance_correlation_sqr` lists.
    """
    devices = {name: values.device for name, values in variables.items() if isinstance(values, Tensor)}
    for name, device in devices.items():
        first, expected = next(iter(devices.items()))
        if device != expected:
            raise ValueError(
                f"{first} is on {expected} but {name} is on {device}: move one of them, for example "
                f"{name}.to({str(expected)!r})."
            )
    rows = {name: as_rows(values, name) for name, values in variables.items()}
    check_same_rows(**{name: len(values) for name, values in rows.items()})
    num_samples = len(next(iter(rows.values())))
    if num_samples < min_samples:
        raise ValueError(
            f"{joined(rows)} must have at least {min_samples} rows, got {num_samples}: {reason}, pool more "
            "samples."
        )
    if devices:
        # On a device without float64 the rows have come to the CPU.
        target = next(rows[name].device for name in devices)
        rows = {name: values.to(target) for name, values in rows.items()}
    for name, values in rows.items():
        check_finite(values, name, joined(rows))
    like = next(iter(rows.values()))
    weight, kept = None, like.new_ones(num_samples, dtype=torch.bool)
    if weights is not None:
        weight = checked_weights(weights, num_samples, like)
        # The sum of large weights could overflow. Where all are 0, none of these is above it.
        weight = weight / weight.max()
        kept = weight > 0
        if int(kept.sum()) < min_samples:
            raise ValueError(
                f"weights must be above 0 in at least {min_samples} rows, got {int(kept.sum())} of "
                f"{num_samples}: {reason}, pool more samples."
            )
        weight, rows = weight[kept], {name: values[kept] for name, values in rows.items()}
    scaled, exponents = zip(*map(rescaled, rows.values()), strict=True)
    return Samples(scaled, exponents, bool(devices), kept, weight)


def as_rows(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Return values (n,) or (n, p) as a float64 tensor (n, p) that carries no gradient."""
    rows = as_real_tensor(values, name).detach()
    if rows.device.type == "mps":
        rows = rows.cpu()
    rows = rows.to(torch.float64)
    shape = tuple(rows.shape)
    if rows.ndim not in (1, 2):
        raise ValueError(
            f"{name} must have shape (n,) or (n, number of columns), got {shape}: give each sample one row, "
            f"for example {name}.reshape(n, -1)."
        )
    if rows.ndim == 1:
        rows = rows.unsqueeze(1)
    if rows.shape[1] == 0:
        raise ValueError(
            f"{name} must have at least one column, got shape {shape}: check how it was selected."
        )
    return rows


def check_finite(rows: Tensor, name: str, all_names: str, where: str = "") -> None:
    """Raise ValueError where rows have NaN or infinite values."""
    # A sum that is finite has no NaN or infinity in it, and needs no table of flags.
    if bool(torch.isfinite(rows.sum())):
        return
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} has NaN or infinite values {where}in row(s) {listed(bad)} ({len(bad)} of {len(rows)} "
            f"rows): drop these rows from {all_names}, or impute them."
        )


def rescaled(rows: Tensor) -> tuple[Tensor, int]:
    """Return rows without constant columns, divided by a power of two, and its exponent."""
    lowest, highest = torch.aminmax(rows, dim=0)
    varying = lowest < highest
    largest = torch.maximum(-lowest, highest)[varying]
    if largest.numel() == 0:
        return rows[:, varying], 0
    if not bool(varying.all()):
        rows = rows[:, varying]
    _, exponent = math.frexp(float(largest.max()))
    # A factor of 2^±1000 suffices for all of float64 and is itself a finite float64 number.
    exponent = min(max(exponent, -1000), 1000)
    return rows * math.ldexp(1.0, -exponent), exponent
