"""Flexible metadata columns: a line cannot remove a curve, and a protected label lets the curve through.

Plain functions from values to columns; the columns go into `MetadataNorm` as metadata. What a basis learns
from data (knots, a range) is an argument, so that training and inference use the same one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdnorm.arrays import as_real_tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["interactions", "polynomial", "spline", "spline_knots"]


def _as_vector(values: Tensor | ArrayLike, name: str = "values") -> Tensor:
    tensor = as_real_tensor(values, name)
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 1:
        raise ValueError(f"{name} must have shape (N,) or (N, 1), got {tuple(tensor.shape)}.")
    # Integers may be too large for float32: days or seconds since some date.
    least = torch.float32 if tensor.is_floating_point() else torch.float64
    tensor = tensor.to(torch.promote_types(tensor.dtype, least))
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has NaN or infinite values: drop or impute these rows first.")
    return tensor


def polynomial(values: Tensor | ArrayLike, degree: int, *, low: float, high: float) -> Tensor:
    """Return the powers 1 … degree of the values, mapped so that [low, high] becomes [−1, 1].

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
    scaled = (_as_vector(values) - (low + high) / 2) / ((high - low) / 2)
    return torch.stack([scaled**power for power in range(1, degree + 1)], 1)


def spline_knots(values: Tensor | ArrayLike, num_columns: int, degree: int = 3) -> Tensor:
    """Return knots for `spline` with `num_columns` columns: inner ones at quantiles of the training values.

    Parameters
    ----------
    values : (N,) or (N, 1)
        Of the training data.
    num_columns : int
        Columns that `spline` is to have, at least `degree`.
    degree : int
        Of `spline`, at least 0.

    Returns
    -------
    (num_columns − degree + 2,) tensor, float64
        The ends of the range and the inner knots, ascending.

    Raises
    ------
    ValueError
        A negative degree, too few columns, no values, or so few different values that knots coincide.
    """
    _check_degree(degree)
    if num_columns < degree:
        raise ValueError(f"num_columns must be at least degree={degree}, got {num_columns}.")
    vector = _as_vector(values).double()
    if vector.numel() == 0:
        raise ValueError("no values: the knots come from the training data.")
    # Not torch.quantile, which takes no more than 16 million values.
    ranks = torch.linspace(0, vector.numel() - 1, num_columns - degree + 2, dtype=vector.dtype)
    ranks, ordered = ranks.to(vector.device), vector.sort().values
    knots = torch.lerp(ordered[ranks.floor().long()], ordered[ranks.ceil().long()], ranks.frac())
    if bool((knots.diff() <= 0).any()):
        raise ValueError(
            f"values have too few different values for {num_columns} spline columns: take fewer columns, or "
            "one-hot columns."
        )
    return knots


def _check_degree(degree: int) -> None:
    if degree < 0:
        raise ValueError(f"degree must not be negative, got {degree}.")


def spline(values: Tensor | ArrayLike, knots: Tensor | ArrayLike, degree: int = 3) -> Tensor:
    """Return the B-spline basis of the values, without its first column (the intercept has it).

    Values outside the knots are moved to their ends: the effect is constant there.

    Parameters
    ----------
    values : (N,) or (N, 1)
    knots : (L,)
        Ends and inner knots, ascending; from `spline_knots`.
    degree : int
        3: cubic.

    Returns
    -------
    (N, L + degree − 2) tensor, float32 or wider

    Raises
    ------
    ValueError
        A wrong shape, NaN, a negative degree, or knots that do not ascend.

    References
    ----------
    de Boor, A Practical Guide to Splines (1978), chapter X.
    """
    _check_degree(degree)
    vector = _as_vector(values)
    inner = _as_vector(knots, "knots").double().to(vector.device)
    if inner.numel() < 2 or bool((inner.diff() <= 0).any()):
        raise ValueError(f"knots must be at least two ascending numbers, got {inner.tolist()}.")
    x = vector.double().clamp(inner[0], inner[-1]).unsqueeze(1)
    full = torch.cat([inner[:1].expand(degree), inner, inner[-1:].expand(degree)])
    # The last interval is closed, or the largest value would lie in none.
    interval = (torch.searchsorted(full, x, right=True) - 1).clamp(degree, full.numel() - degree - 2)
    basis = (interval == torch.arange(full.numel() - 1, device=x.device)).double()
    for order in range(1, degree + 1):
        left, right = full[: -order - 1], full[order + 1 :]
        rise, fall = full[order:-1] - left, right - full[1:-order]
        up = torch.where(rise > 0, (x - left) / rise, 0.0)
        down = torch.where(fall > 0, (right - x) / fall, 0.0)
        basis = up * basis[:, :-1] + down * basis[:, 1:]
    return basis[:, 1:].to(vector.dtype)


def interactions(first: Tensor | ArrayLike, second: Tensor | ArrayLike) -> Tensor:
    """Return all products of a column of `first` and one of `second`: effects that depend on each other.

    Parameters
    ----------
    first, second : (N, A) and (N, B) tensors or arrays

    Returns
    -------
    (N, A · B) tensor
        Add it to `first` and `second` themselves, which it does not contain.

    Raises
    ------
    ValueError
        Not two matrices with the same number of rows.
    """
    first, second = as_real_tensor(first, "first"), as_real_tensor(second, "second")
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0]:
        raise ValueError(
            "first and second must be matrices with one row a sample, got shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    return (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
