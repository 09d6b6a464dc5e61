"""Coefficients: covariance of the design to the operator `Q` with ``β = Q C``, and what it is applied to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from mdnorm.functional.gram import Gram
from mdnorm.weights import can_read, is_small, product

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "apply_operator",
    "coefficient_operator",
    "column_scale",
    "effect_basis",
    "moment_rows",
    "projected_rows",
    "recursive_update",
    "removal_operator",
]


# A column counts as constant when its standard deviation is below this fraction of its mean, a direction as
# collinear (or as determined by the labels) when it keeps less than this share of its variance. Both are far
# above float64 rounding and far below anything a measured column shows.
_CONSTANT_RTOL = 1e-12
_COLLINEAR_RTOL = 1e-11
# Largest element of the inverse of a correlation matrix up to which it is taken as it is.
_WELL_CONDITIONED = 1e5


def coefficient_operator(gram: Gram, ridge: float | Tensor = 0.0) -> Tensor:
    """Return `Q` with ``[β_m; β_y] = Q C``, `C` the cross covariance of design columns and features.

    Parameters
    ----------
    gram : Gram
        Of the batch or of the training set.
    ridge : float or (1,) tensor
        λ ≥ 0 (as a tensor, > 0), added to the variance of each standardised metadata column. The label
        columns are not penalised: that would let part of their effect be removed with the metadata. With
        λ > 0 the result depends on how the metadata are coded, as ridge regression does.

    Returns
    -------
    (K, K) tensor
        Rows in the order of the columns, [m, y]. Constant columns get a zero row; where metadata columns
        are collinear the removed part ``(m − m̄)·β_m`` is still unique; where the labels determine a
        direction of the metadata exactly, the removed part is uncorrelated with that direction.
    """
    inverse = _well_conditioned_inverse(gram, ridge)
    return _rank_revealing_operator(gram, ridge) if inverse is None else torch.from_numpy(inverse)


def _rank_revealing_operator(gram: Gram, ridge: float | Tensor) -> Tensor:
    num_metadata = gram.num_metadata
    scale = column_scale(gram)
    correlation = gram.covariance / torch.outer(scale, scale)
    s_mm = correlation[:num_metadata, :num_metadata]
    s_my = correlation[:num_metadata, num_metadata:]
    s_yy_inverse = _symmetric_pinv(correlation[num_metadata:, num_metadata:])
    # Rows of [I, −S_my S_yy⁺]: what is left of the metadata once the labels have explained their share.
    protection = s_my @ s_yy_inverse
    partial = s_mm - protection @ s_my.mT
    if isinstance(ridge, Tensor) or ridge > 0:
        identity = torch.eye(num_metadata, dtype=partial.dtype, device=partial.device)
        partial_inverse = torch.linalg.solve_ex(partial + ridge * identity, identity)[0]
    else:
        whitening = _whitening(s_mm)
        partial_inverse = (
            whitening @ _symmetric_pinv(whitening.mT @ partial @ whitening, top=1.0) @ whitening.mT
        )
    metadata_rows = torch.cat([partial_inverse, -partial_inverse @ protection], dim=1)
    selector = torch.eye(correlation.shape[0], dtype=partial.dtype, device=partial.device)[num_metadata:]
    label_rows = s_yy_inverse @ (selector - s_my.mT @ metadata_rows)
    return torch.cat([metadata_rows, label_rows]) / torch.outer(scale, scale)


def _well_conditioned_inverse(gram: Gram, ridge: float | Tensor) -> NDArray[Any] | None:
    """Return the coefficient operator where every direction clearly varies, else None.

    With no direction to drop, the pseudo-inverses are inverses and their formula is that of the blocks of one
    inverse. Its largest element bounds the smallest eigenvalue of the correlation matrix from below, and with
    it every eigenvalue that would be compared with `_COLLINEAR_RTOL`. NumPy and numbers, since for K×K
    numbers on the CPU the call is what takes the time; None where they cannot be read.
    """
    if not can_read(gram.covariance):
        return None
    covariance = gram.covariance.numpy(force=True)
    variance = covariance.diagonal()
    least = torch.finfo(gram.covariance.dtype).tiny ** 0.5
    for value, mean in zip(variance.tolist(), gram.mean.tolist(), strict=True):
        threshold = _CONSTANT_RTOL * abs(mean) + least
        # Also for a NaN.
        if not value > threshold * threshold:
            return None
    scale = np.sqrt(variance)
    units = scale[:, None] * scale
    correlation = covariance / units
    if ridge > 0:
        correlation[range(gram.num_metadata), range(gram.num_metadata)] += float(ridge)
    inverse = _positive_definite_inverse(correlation)
    if inverse is None:
        return None
    # Of a positive definite matrix the largest element is on the diagonal.
    for value in inverse.diagonal().tolist():
        if not abs(value) < _WELL_CONDITIONED:
            return None
    inverse /= units
    return inverse


def _positive_definite_inverse(matrix: NDArray[Any]) -> NDArray[Any] | None:
    """Return the inverse of a positive definite matrix, None where it turns out not to be one."""
    if len(matrix) == 2:
        # By numbers, as for a metadata and a label column: LAPACK takes several times as long to start.
        (first, between), (_, second) = matrix.tolist()
        determinant = first * second - between * between
        if not determinant > 0:
            return None
        inverse: NDArray[Any] = np.array(((second, -between), (-between, first)), matrix.dtype)
        inverse /= determinant
        return inverse
    try:
        inverse = np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        return None
    return inverse


def column_scale(gram: Gram) -> Tensor:
    """Return each column's standard deviation (K,), infinite for a constant one (what it divides is 0)."""
    deviation = gram.covariance.diagonal().clamp_min(0).sqrt()
    threshold = _CONSTANT_RTOL * gram.mean.abs() + torch.finfo(deviation.dtype).tiny ** 0.5
    return torch.where(deviation > threshold, deviation, torch.inf)


def _whitening(matrix: Tensor) -> Tensor:
    """Return `W` with ``Wᵀ matrix W`` = identity on the range of `matrix` and zero elsewhere."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _COLLINEAR_RTOL * values[-1:].clamp_min(torch.finfo(values.dtype).tiny)
    return cast(Tensor, vectors * torch.where(kept, values, torch.inf).rsqrt())


def _symmetric_pinv(matrix: Tensor, top: float | None = None) -> Tensor:
    """Pseudo-inverse of a positive semi-definite matrix; `top` stands in for its largest eigenvalue."""
    if matrix.shape[0] == 0:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    yardstick = values[-1:].clamp_min(torch.finfo(values.dtype).tiny) if top is None else top
    inverse = torch.where(values > _COLLINEAR_RTOL * yardstick, values, torch.inf).reciprocal()
    return cast(Tensor, (vectors * inverse) @ vectors.mT)


def removal_operator(gram: Gram, *, ridge: float = 0.0, center: bool = False) -> Tensor:
    """Return the operator from feature moments to the coefficients that are removed.

    Parameters
    ----------
    gram : Gram
        Of the batch or of the training set, mean `μ = [μ_m, μ_y]`.
    ridge : float
        See `coefficient_operator`.
    center : bool
        Whether the intercept is removed too.

    Returns
    -------
    (R, K + 1) tensor
        R = K_m, or K_m + 1 with `center`. Times the moments ``[E[(x − μ) fᵀ]; E[fᵀ]]`` it gives the rows of
        β_m and, with `center`, the intercept of the centred metadata, ``β_0 + μ_m β_m = f̄ − μ_y β_y``.
    """
    inverse = _well_conditioned_inverse(gram, ridge)
    if inverse is not None:
        return _as_removal_operator(inverse, gram, center)
    operator = _rank_revealing_operator(gram, ridge)
    removed = torch.nn.functional.pad(operator[: gram.num_metadata], (0, 1))
    if not center:
        return removed
    intercept = torch.cat(
        [-gram.mean[gram.num_metadata :] @ operator[gram.num_metadata :], gram.mean.new_ones(1)]
    )
    return torch.cat([removed, intercept.unsqueeze(0)])


def _as_removal_operator(inverse: NDArray[Any], gram: Gram, center: bool) -> Tensor:
    width = gram.num_metadata
    operator = np.zeros((width + center, inverse.shape[1] + 1), inverse.dtype)
    operator[:width, :-1] = inverse[:width]
    if center:
        operator[width, :-1] = -gram.mean.numpy(force=True)[width:] @ inverse[width:]
        operator[width, -1] = 1
    return torch.from_numpy(operator)


def moment_rows(columns: Tensor, mean: Tensor, count: Tensor | None = None) -> Tensor:
    """Return the (K + 1, N) matrix that takes features to their moments ``[E[(x − μ) fᵀ]; E[fᵀ]]``.

    `count` is the number of samples of the mean where these are only some of them (another process has the
    rest); None: these are all.
    """
    divisor = max(columns.shape[0], 1) if count is None else count.clamp_min(1)
    return torch.cat([(columns - mean).mT, columns.new_ones(1, columns.shape[0])]) / divisor


def projected_rows(operator: Tensor, columns: Tensor, mean: Tensor, count: Tensor | None = None) -> Tensor:
    """Return ``operator @ moment_rows(columns, mean, count)``, (R, N), in fewer steps."""
    divisor = max(columns.shape[0], 1) if count is None else count.clamp_min(1)
    return torch.addmm(operator[:, -1:], operator[:, :-1], (columns - mean).mT).div_(divisor)


def effect_basis(metadata: Tensor, mean: Tensor, center: bool) -> Tensor:
    """Return the (N, R) columns that multiply the removed coefficients: `m − μ_m` and, with `center`, 1."""
    basis = metadata - mean
    return torch.cat([basis, basis.new_ones(basis.shape[0], 1)], dim=1) if center else basis


def apply_operator(operator: Tensor, cross: Tensor) -> Tensor:
    """Return the coefficients ``operator[:, :-1] @ cross``, (R, D), in the dtype of the moments.

    Parameters
    ----------
    operator : (R, K + 1) tensor
        See `removal_operator`.
    cross : (K, D) tensor
        Cross covariance of columns and features.
    """
    if is_small(cross):
        values = cross.numpy(force=True)
        coefficients = product(operator.numpy(force=True)[:, :-1].astype(values.dtype, copy=False), values)
        return torch.from_numpy(coefficients)
    return operator[:, :-1].to(cross.dtype) @ cross


def recursive_update(factor: Tensor, rows: Tensor, decay: Tensor | float, limit: float) -> Tensor:
    """One step of recursive least squares: the square root of the covariance of the coefficients.

    ``P' = (decay · P⁻¹ + XᵀX)⁻¹`` for ``P = factor factorᵀ``, in K×K arithmetic whatever the batch size. The
    square root is what is kept, so `P` is symmetric and positive semi-definite by construction after any
    number of steps, in float32 too, and its condition number is only that of the root.

    Parameters
    ----------
    factor : (K, K) tensor
        Any square root of `P`.
    rows : (N, K) tensor
        Rows `X` of the design, N ≥ 0.
    decay : float or (1,) tensor
        Forgetting factor, 0 < decay ≤ 1.
    limit : float
        Largest eigenvalue `P` may reach. Without it a direction that the data do not excite (a constant
        column) would grow by 1 / decay a step, for ever.

    Returns
    -------
    (K, K) tensor
        A square root of P'.
    """
    left, values, _ = torch.linalg.svd(factor / decay**0.5)
    root = left * values.clamp_max(limit**0.5)
    # P' = root (I + rootᵀ XᵀX root)⁻¹ rootᵀ = root (RᵀR)⁻¹ rootᵀ. R by QR: forming RᵀR would square the
    # condition number, and with unstandardised columns lose the identity.
    identity = torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
    triangle = torch.linalg.qr(torch.cat([identity, rows @ root]), mode="r")[1]
    return cast(Tensor, torch.linalg.solve_triangular(triangle, root, upper=True, left=False))
