"""Checked input of the measures of dependence: rows of samples on one device, in float64."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.metrics.checks import listed

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Samples", "as_codes", "as_samples"]


@dataclass(frozen=True)
class Samples:
    """Variables of the same samples.

    Attributes
    ----------
    rows : tuple of Tensor, (n, p) float64 each
        Without their constant columns, which add nothing to a distance, and scaled by a power of two to
        absolute values of at most 1. Squares of squares can then neither overflow nor vanish, and no value
        is rounded. A variable that is constant has no column left.
    exponents : tuple of int
        The values of variable k were divided by ``2 ** exponents[k]``.
    returns_tensor : bool
        Whether one of the variables came as a tensor.
    """

    rows: tuple[Tensor, ...]
    exponents: tuple[int, ...]
    returns_tensor: bool

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

    def select(self, index: Tensor) -> Samples:
        """Return the samples that `index` selects."""
        rescaled = [_rescaled(rows[index]) for rows in self.rows]
        exponents = tuple(before + after for before, (_, after) in zip(self.exponents, rescaled, strict=True))
        return Samples(tuple(rows for rows, _ in rescaled), exponents, self.returns_tensor)


def as_samples(*, min_samples: int, reason: str, **variables: Tensor | ArrayLike) -> Samples:
    """Check variables that are measured on the same samples.

    Parameters
    ----------
    min_samples : int
        Rows that the measure needs.
    reason : str
        Why fewer rows are not enough, for the error message.
    **variables : tensor or array, (n,) or (n, p)
        By the names of their arguments. Tensors must be on the same device; arrays are moved there.

    Raises
    ------
    TypeError
        A variable is complex or not numeric.
    ValueError
        A variable has the wrong shape, no columns, or NaN or infinite values; the variables differ in their
        number of rows or in their device; there are fewer than `min_samples` rows.
    """
    devices = {name: values.device for name, values in variables.items() if isinstance(values, Tensor)}
    for name, device in devices.items():
        first, expected = next(iter(devices.items()))
        if device != expected:
            raise ValueError(
                f"{first} is on {expected} but {name} is on {device}: move one of them, for example "
                f"{name}.to({str(expected)!r})."
            )
    rows = {name: _as_rows(values, name) for name, values in variables.items()}
    counts = {name: values.shape[0] for name, values in rows.items()}
    if len(set(counts.values())) > 1:
        named = [
            f"{count} rows in {name}" if i == 0 else f"{count} in {name}"
            for i, (name, count) in enumerate(counts.items())
        ]
        raise ValueError(
            f"{_joined(counts)} must have one row per sample each, got {_joined(named)}: pass the same "
            "samples in the same order."
        )
    num_samples = next(iter(counts.values()))
    if num_samples < min_samples:
        raise ValueError(
            f"{_joined(counts)} must have at least {min_samples} rows, got {num_samples}: {reason}, pool "
            "more samples."
        )
    if devices:
        # On a device without float64 the rows have come to the CPU.
        target = next(rows[name].device for name in devices)
        rows = {name: values.to(target) for name, values in rows.items()}
    for name, values in rows.items():
        _check_finite(values, name, _joined(counts))
    rescaled = [_rescaled(values) for values in rows.values()]
    return Samples(
        tuple(values for values, _ in rescaled), tuple(exponent for _, exponent in rescaled), bool(devices)
    )


def _joined(names: Iterable[str]) -> str:
    words = list(names)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _as_rows(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Return `values` as a float64 tensor of shape (n, p) that carries no gradient."""
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


def _check_finite(rows: Tensor, name: str, all_names: str) -> None:
    # A sum that is finite has no NaN or infinity in it, and needs no table of flags.
    if bool(torch.isfinite(rows.sum())):
        return
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return
    raise ValueError(
        f"{name} has NaN or infinite values in row(s) {listed(bad)} ({len(bad)} of {rows.shape[0]} rows): "
        f"drop these rows from {all_names}, or impute them."
    )


def _rescaled(rows: Tensor) -> tuple[Tensor, int]:
    """Return `rows` without constant columns, divided by a power of two, and its exponent."""
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


def as_codes(labels: Tensor | ArrayLike, name: str, num_samples: int) -> tuple[Tensor, list[Hashable]]:
    """Return the classes of samples as numbers.

    Parameters
    ----------
    labels : tensor or array, (n,)
        Booleans, numbers or strings.
    name : str
        Name of the argument, for error messages.
    num_samples : int
        n.

    Returns
    -------
    codes : Tensor, (n,) int64
        On the CPU: index of the class of every sample.
    classes : list
        The classes in order, as Python values.

    Raises
    ------
    TypeError
        The labels cannot be ordered.
    ValueError
        They have the wrong shape, another number of rows, or NaN.
    """
    if isinstance(labels, Tensor):
        # NumPy has no bfloat16.
        tensor = labels.detach().cpu()
        array = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    else:
        array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(
            f"{name} must have shape (n,), one class per sample, got {array.shape}: encode combinations of "
            "several variables as one."
        )
    if array.shape[0] != num_samples:
        raise ValueError(
            f"{name} must have one row per sample, got {array.shape[0]} rows in {name} and {num_samples} in "
            "x: pass the same samples in the same order."
        )
    try:
        # Only NaN differs from itself.
        missing = np.flatnonzero(np.asarray(array != array, dtype=bool)).tolist()
        classes, codes = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise TypeError(
            f"{name} must be booleans, numbers or strings without missing values, got values that cannot be "
            f"ordered ({error})."
        ) from error
    if missing:
        raise ValueError(
            f"{name} has NaN in row(s) {listed(missing)} ({len(missing)} of {num_samples} rows): drop these "
            "rows from all inputs."
        )
    return torch.from_numpy(codes.astype(np.int64)), classes.tolist()
