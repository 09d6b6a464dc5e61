"""Bias-corrected squared distance correlation in memory linear in the number of samples.

Notation. `a_ij = |x_i − x_j|` and `b_ij = |y_i − y_j|` are the Euclidean distances between the n samples. A
distance matrix is U-centred (Székely & Rizzo 2014, definition 2) by taking row and column effects away
outside the diagonal, ``A_ij = a_ij − a_i./(n−2) − a_.j/(n−2) + a../((n−1)(n−2))``. With the inner product
``(A·B) = Σ_{i≠j} A_ij B_ij / (n(n−3))`` the statistic is ``(A·B) / √((A·A)(B·B))``.

How it is computed. The inner product expands into sums that one pass over tiles of rows collects,

    n(n−3)·(A·B) = Σ_{i≠j} a_ij b_ij − 2/(n−2)·Σ_i a_i. b_i. + a.. b.. / ((n−1)(n−2)),

but its three terms may be far larger than their difference. U-centring does not see a term ``r_i + r_j``
added outside the diagonal, so before they are summed the distances are reduced by row effects estimated
from the distances to a few anchor samples. What remains is of the size of `A` itself: with m anchors the
expansion loses at most a factor of the order of n/m of the float64 precision, whatever the data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from mdnorm.arrays import as_real_tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["distance_correlation_sqr"]

# Fewer samples leave the bias correction undefined: it divides by n − 3.
_MIN_SAMPLES = 4

# More anchors estimate the row effects better, which nothing needs, and each costs n distances.
_NUM_ANCHORS = 16

# Distances in one tile, and rows at least. On a CPU the two tiles should stay in the cache (2^17 float64
# values are 1 MiB), but a tile of few rows spends its time waiting for threads where cores are shared.
# Elsewhere it should be large enough to hide the cost of a kernel launch.
_TILE_ELEMENTS_CPU = 2**17
_TILE_ELEMENTS_ACCELERATOR = 2**24
_MIN_TILE_SIZE = 64

# U-centred distances below this multiple of √p times the distances are nothing but rounding.
_ROUNDING = 32 * torch.finfo(torch.float64).eps


@overload
def distance_correlation_sqr(x: Tensor, y: Tensor | ArrayLike, *, tile_size: int | None = None) -> Tensor: ...


@overload
def distance_correlation_sqr(x: ArrayLike, y: Tensor, *, tile_size: int | None = None) -> Tensor: ...


@overload
def distance_correlation_sqr(x: ArrayLike, y: ArrayLike, *, tile_size: int | None = None) -> float: ...


def distance_correlation_sqr(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, tile_size: int | None = None
) -> Tensor | float:
    """Return the bias-corrected squared distance correlation of two samples.

    It estimates a population value that is 0 if and only if the two random vectors are independent, whatever
    the form of the dependence. The estimate is 0 on average under independence, and therefore **slightly
    negative** about half of the time there: do not take its square root.

    Parameters
    ----------
    x : tensor or array, (n,) or (n, p)
        One row per sample, of any real dtype; n ≥ 4, p ≥ 1, finite values.
    y : tensor or array, (n,) or (n, q)
        The other variable, rows in the order of `x`. Two tensors must be on the same device; an array beside
        a tensor is taken to the tensor's device.
    tile_size : int, optional
        Rows of the distance matrices that are in memory at once. The default suits the device. The result
        depends on it only by rounding.

    Returns
    -------
    Tensor, () float64, or float
        A value between −1 and 1: a tensor on the device of the inputs where `x` or `y` is a tensor, a Python
        float otherwise. It is 0 where the distance variance of either variable is 0 up to rounding: a
        constant, a variable in which only one sample differs from the others, samples that are all equally
        far apart (each of a category of its own, one-hot coded).

    Raises
    ------
    TypeError
        An input is complex or not numeric, or `tile_size` is not an integer.
    ValueError
        An input has the wrong shape, no columns, or NaN or infinite values; the inputs differ in their number
        of rows or in their device; there are fewer than 4 rows; `tile_size` is below 1.

    Notes
    -----
    Everything is computed in float64, whatever the dtype of the inputs, from exact pairwise differences: a
    large common offset costs no digits. Memory is O(n·tile_size + n·(p + q)), arithmetic O(n²·(p + q)).

    The metric is not differentiable: inputs that require a gradient are detached.

    On a device without float64 (MPS) the result is computed, and returned, on the CPU.

    References
    ----------
    .. [1] Székely, G. J., & Rizzo, M. L. (2013). The distance correlation t-test of independence in high
       dimension. Journal of Multivariate Analysis, 117, 193–213.
    .. [2] Székely, G. J., & Rizzo, M. L. (2014). Partial distance correlation with methods for
       dissimilarities. The Annals of Statistics, 42(6), 2382–2412.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(8.0)
    >>> round(distance_correlation_sqr(x, x), 12)
    1.0
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.device != y.device:
        raise ValueError(
            f"x is on {x.device} but y is on {y.device}: move one of them, for example "
            f"y.to({str(x.device)!r})."
        )
    returns_tensor = isinstance(x, Tensor) or isinstance(y, Tensor)
    x_rows, y_rows = _as_rows(x, "x"), _as_rows(y, "y")
    if x_rows.shape[0] != y_rows.shape[0]:
        raise ValueError(
            f"x and y must have one row per sample each, got {x_rows.shape[0]} rows in x and "
            f"{y_rows.shape[0]} in y: pass the same samples in the same order."
        )
    num_samples = x_rows.shape[0]
    if num_samples < _MIN_SAMPLES:
        raise ValueError(
            f"x and y must have at least {_MIN_SAMPLES} rows, got {num_samples}: the bias-corrected estimate "
            "is not defined for fewer samples, pool more of them."
        )
    if not isinstance(x, Tensor):
        x_rows = x_rows.to(y_rows.device)
    elif not isinstance(y, Tensor):
        y_rows = y_rows.to(x_rows.device)
    tile_size = _checked_tile_size(tile_size, num_samples, x_rows.device)
    _check_finite(x_rows, "x")
    _check_finite(y_rows, "y")

    with torch.no_grad():
        result = _distance_correlation_sqr(_rescaled(x_rows), _rescaled(y_rows), tile_size)
    return result if returns_tensor else float(result)


# --------------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------------


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


def _check_finite(rows: Tensor, name: str) -> None:
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return
    shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
    raise ValueError(
        f"{name} has NaN or infinite values in row(s) {shown} ({len(bad)} of {rows.shape[0]} rows): drop "
        "these rows from both x and y, or impute them."
    )


def _checked_tile_size(tile_size: int | None, num_samples: int, device: torch.device) -> int:
    if tile_size is None:
        elements = _TILE_ELEMENTS_CPU if device.type == "cpu" else _TILE_ELEMENTS_ACCELERATOR
        return max(_MIN_TILE_SIZE, elements // num_samples)
    if isinstance(tile_size, bool) or not isinstance(tile_size, int):
        raise TypeError(f"tile_size must be an integer or None, got {tile_size!r}.")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got {tile_size}: pass None for the default.")
    return tile_size


def _rescaled(rows: Tensor) -> Tensor:
    """Return `rows` without the constant columns, scaled to absolute values of at most 1.

    Neither changes the statistic: constant columns add nothing to a distance, and the factor is a power of
    two, so no value is rounded. Squares of squares can then neither overflow nor vanish.
    """
    lowest, highest = rows.amin(dim=0), rows.amax(dim=0)
    rows = rows[:, lowest < highest]
    if rows.shape[1] == 0:
        return rows
    _, exponent = math.frexp(float(rows.abs().max()))
    # A factor of 2^±1000 suffices for all of float64 and is itself a finite float64 number.
    return rows * math.ldexp(1.0, -min(max(exponent, -1000), 1000))


# --------------------------------------------------------------------------------------------------------
# The statistic
# --------------------------------------------------------------------------------------------------------


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distances between (s, p) and (t, p), in shape (s, t)."""
    if rows.shape[1] == 1:
        return (rows - others.T).abs_()
    # The matrix-product form cancels where samples are close together, and a duplicate would not be at 0.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _row_effects(rows: Tensor) -> Tensor:
    """Return `r` of shape (n,) such that ``r_i + r_j`` is close to the distance of sample i to sample j.

    Where the distances have this form exactly, so does the estimate: their U-centred form is 0, and only
    rounding may remain of them.
    """
    num_samples = rows.shape[0]
    num_anchors = min(_NUM_ANCHORS, num_samples)
    anchors = torch.arange(num_anchors, device=rows.device) * num_samples // num_anchors
    sums = _distances(rows, rows[anchors]).sum(dim=1)
    # Σ_k (r_i + r_k) over the anchors is m·r_i + R, or (m − 2)·r_i + R where i, at distance 0 of itself, is
    # one of them, with R = Σ_k r_k.
    anchor_sums = sums[anchors]
    total = anchor_sums.sum() / (2 * (num_anchors - 1))
    effects = (sums - total) / num_anchors
    effects[anchors] = (anchor_sums - total) / (num_anchors - 2)
    return effects


def _reduced_tile(rows: Tensor, effects: Tensor, start: int, stop: int) -> Tensor:
    """Return ``a_ij − r_i − r_j`` for rows ``start … stop − 1`` and columns ``start …``, 0 unless j > i."""
    tile = _distances(rows[start:stop], rows[start:])
    tile -= effects[start:stop, None]
    tile -= effects[start:]
    tile[:, : stop - start].triu_(diagonal=1)
    return tile


def _is_rounding(centred_sum: Tensor, effects: Tensor, num_columns: int) -> Tensor:
    """Tell whether ``Σ A_ij²`` is within what rounding leaves of ``Σ (r_i + r_j)²``, both over i ≠ j."""
    num_samples = effects.shape[0]
    distances_sum = 2 * (num_samples - 2) * effects.square().sum() + 2 * effects.sum().square()
    return centred_sum <= _ROUNDING**2 * num_columns * distances_sum


def _distance_correlation_sqr(x: Tensor, y: Tensor, tile_size: int) -> Tensor:
    """Compute the statistic for rescaled rows; one without columns is a constant."""
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    if x.shape[1] == 0 or y.shape[1] == 0:
        return zero
    num_samples = x.shape[0]
    x_effects, y_effects = _row_effects(x), _row_effects(y)

    # Row sums and, over pairs i < j, the sums of the products xx, yy and xy.
    x_sums, y_sums = torch.zeros_like(x_effects), torch.zeros_like(y_effects)
    xx, yy, xy = zero.clone(), zero.clone(), zero.clone()
    for start in range(0, num_samples, tile_size):
        stop = min(start + tile_size, num_samples)
        a = _reduced_tile(x, x_effects, start, stop)
        b = _reduced_tile(y, y_effects, start, stop)
        # A pair i < j belongs to the row of i and, by symmetry, to the row of j.
        x_sums[start:stop] += a.sum(dim=1)
        x_sums[start:] += a.sum(dim=0)
        y_sums[start:stop] += b.sum(dim=1)
        y_sums[start:] += b.sum(dim=0)
        a, b = a.flatten(), b.flatten()
        xx += torch.dot(a, a)
        yy += torch.dot(b, b)
        xy += torch.dot(a, b)

    def centred(pairs: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rows_term = 2 / (num_samples - 2) * torch.dot(left, right)
        total_term = left.sum() * right.sum() / ((num_samples - 1) * (num_samples - 2))
        return 2 * pairs - rows_term + total_term

    xx, yy = centred(xx, x_sums, x_sums), centred(yy, y_sums, y_sums)
    xy = centred(xy, x_sums, y_sums)
    undefined = _is_rounding(xx, x_effects, x.shape[1]) | _is_rounding(yy, y_effects, y.shape[1])
    # Two roots, since the product of two small variances could vanish; the limits hold up to rounding.
    return torch.where(undefined, zero, (xy / (xx.sqrt() * yy.sqrt())).clamp(-1, 1))
