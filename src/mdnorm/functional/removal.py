"""Removal of an effect from features, with its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mdnorm.distributed import all_reduce_sum, world_size
from mdnorm.functional.dtypes import cast_to, compute_dtype, full_precision
from mdnorm.functional.positions import as_matrix, expand_positions, gradient_matrix
from mdnorm.weights import all_finite, is_transforming, ratio, read, write_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.weights import Weight

__all__ = [
    "remove_effect",
    "remove_regression",
    "remove_running_regression",
    "remove_shared_regression",
    "rescale",
]


def remove_effect(
    features: Tensor, basis: Tensor, coefficients: Tensor, positions: tuple[int, ...] = ()
) -> Tensor:
    """Return ``features − basis @ coefficients``, the coefficients taken as given (evaluation).

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    basis : (N, R) tensor
    coefficients : (R, D) tensor
        D: the number of values of a sample, or of channels where `positions` are given.
    positions : tuple of int
        Dimensions that share a coefficient, from `position_dims`.

    Returns
    -------
    (N, ...) tensor, dtype of the features. The gradient reaches the features unchanged.
    """
    dtype = compute_dtype(features)
    # Autocast would run these products below float32.
    with full_precision(features.device):
        return _subtract_effect(features, basis.to(dtype), coefficients.to(dtype), positions)


def _subtract_effect(
    features: Tensor, basis: Tensor, coefficients: Tensor, positions: tuple[int, ...]
) -> Tensor:
    """`remove_effect` where dtypes and autocast are taken care of."""
    if positions:
        return (features - expand_positions(basis @ coefficients, positions)).to(features.dtype)
    return _subtract_product(features, as_matrix(features, (), basis.dtype), basis, coefficients)


def rescale(
    features: Tensor, basis: Tensor, coefficients: Tensor, mean: Tensor, positions: tuple[int, ...] = ()
) -> Tensor:
    """Return ``mean + (features − mean) · exp(−½ basis @ coefficients)``: an effect on log-variances removed.

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    basis : (N, R) tensor
    coefficients : (R, D) tensor
        Effects on the log-variance.
    mean : (D,) tensor
        What stays in place.
    positions : tuple of int
        Dimensions that share a coefficient, from `position_dims`.

    Returns
    -------
    (N, ...) tensor, dtype of the features
    """
    dtype = compute_dtype(features)
    with full_precision(features.device):
        effect = basis.to(dtype) @ coefficients.to(dtype)
        # ±30 is a factor of 3 million: far beyond any effect, and it keeps a wild one from overflowing.
        factor = torch.exp(-0.5 * effect.clamp(-30, 30))
        centre = mean.to(dtype).unsqueeze(0)
        if positions:
            factor, centre = expand_positions(factor, positions), expand_positions(centre, positions)
        else:
            factor = factor.reshape(features.shape)
            centre = centre.reshape(1, *features.shape[1:])
        return torch.lerp(centre.expand_as(features), features.to(dtype), factor).to(features.dtype)


def _without_effect(
    features: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    positions: tuple[int, ...],
    matrix: Tensor | None,
) -> Tensor:
    """Return the output of an autograd function; `matrix` is the features' where that is known already."""
    if matrix is None or positions:
        out = _subtract_effect(features, basis, coefficients, positions)
    else:
        out = _subtract_product(features, matrix, basis, coefficients)
    # Detached, it is no view: an in-place ReLU may follow.
    return out.detach()


class _TransformableRemoveRegression(torch.autograd.Function):
    """``out = f − B Q A f`` and its transpose, in the form that torch.func and torch.compile take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor, basis: Tensor, operator: Tensor | None, rows: Tensor, positions: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        matrix = as_matrix(features, positions, rows.dtype)
        moments = rows @ matrix
        coefficients = moments if operator is None else operator @ moments
        return _without_effect(features, basis, coefficients, positions, matrix), moments

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        features, basis, operator, rows, ctx.positions = inputs
        ctx.shape = features.shape
        ctx.save_for_backward(basis, rows if operator is None else operator @ rows)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        basis, projector = ctx.saved_tensors
        positions = ctx.positions
        with full_precision(grad.device):
            matrix = gradient_matrix(grad, positions, basis.dtype)
            result = _subtract_projected(grad, matrix, projector, basis.mT @ matrix, positions, ctx.shape)
        return result, None, None, None, None


def remove_regression(
    features: Tensor,
    basis: Tensor,
    operator: Tensor | None,
    rows: Tensor,
    positions: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Return ``features − basis @ operator @ rows @ features`` and the moments ``rows @ features``.

    The coefficients ``operator @ rows @ features`` come from the features themselves, and the gradient flows
    through them as well as through the features (paper, section 3). Basis, operator and rows are constants.

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    basis : (N, R) tensor
    operator : (R, L) tensor, or None for the identity
    rows : (L, N) tensor
    positions : tuple of int
        Dimensions that share a coefficient, from `position_dims`.

    Returns
    -------
    out : (N, ...) tensor, dtype of the features
    moments : (L, D) tensor, float32 or float64, without gradient
    """
    dtype = compute_dtype(features)
    basis, rows = cast_to(basis, dtype), cast_to(rows, dtype)
    if operator is not None:
        operator = cast_to(operator, dtype)
    with full_precision(features.device):
        if torch.compiler.is_compiling() or is_transforming():
            return _TransformableRemoveRegression.apply(  # type: ignore[no-any-return, no-untyped-call]
                features, basis, operator, rows, positions
            )
        matrix = as_matrix(features.detach(), positions, dtype)
        moments = rows @ matrix
        coefficients, projector = moments, rows
        if operator is not None:
            coefficients, projector = operator @ moments, operator @ rows
        out: Tensor = _RemoveRegression.apply(  # type: ignore[no-untyped-call]
            features, basis, coefficients, projector, positions, None, matrix
        )
    return out, moments


class _RemoveRegression(torch.autograd.Function):
    """``out = f − B P f`` and its transpose, each one fused product; saves the design, not the features.

    With a group, `P f` is a sum over its processes, and so is ``Bᵀ g`` in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        basis: Tensor,
        coefficients: Tensor,
        projector: Tensor,
        positions: tuple[int, ...],
        group: ProcessGroup | None,
        matrix: Tensor | None,
    ) -> Tensor:
        ctx.positions, ctx.shape, ctx.group = positions, features.shape, group
        ctx.save_for_backward(basis, projector)
        return _without_effect(features, basis, coefficients, positions, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, projector = ctx.saved_tensors
        positions = ctx.positions
        with full_precision(grad.device):
            matrix = gradient_matrix(grad, positions, basis.dtype)
            adjoint = basis.mT @ matrix
            if ctx.group is not None:
                adjoint = all_reduce_sum(adjoint, ctx.group)
            result = _subtract_projected(grad, matrix, projector, adjoint, positions, ctx.shape)
        return (result, *(None,) * 6)


def _subtract_projected(
    grad: Tensor,
    matrix: Tensor,
    projector: Tensor,
    adjoint: Tensor,
    positions: tuple[int, ...],
    shape: torch.Size,
) -> Tensor:
    """Return ``grad − projectorᵀ @ adjoint``, spread evenly over the positions; `matrix` is grad reduced."""
    if positions:
        sharing = 1
        for dim in positions:
            sharing *= shape[dim]
        return (grad - expand_positions(projector.mT @ adjoint / max(sharing, 1), positions)).to(grad.dtype)
    return _subtract_product(grad, matrix, projector.mT, adjoint)


def _subtract_product(features: Tensor, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``matrix − left @ right`` in shape and dtype of the features, whose matrix (N, D) it is."""
    out = torch.addmm(matrix, left, right, alpha=-1)
    if features.ndim == 2 and features.dtype == out.dtype:
        return out
    return out.to(features.dtype).reshape(features.shape)


def remove_shared_regression(
    features: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    projector: Tensor,
    positions: tuple[int, ...],
    group: ProcessGroup,
) -> Tensor:
    """Return ``features − basis @ coefficients``, coefficients that came from the samples of all processes.

    As `remove_regression`, the gradient flows through the coefficients: one collective of R·D numbers adds up
    in the backward pass what the losses of all processes say about them. So the gradient is that of the sum
    of their losses, which `DistributedDataParallel` and FSDP2 divide by the number of processes.

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
        N ≥ 0 of this process.
    basis : (N, R) tensor
    coefficients : (R, D) tensor
        The sum over all processes of ``projector @ features``.
    projector : (R, N) tensor
        Operator times this process's moment rows, scaled by the number of all samples.
    positions : tuple of int
        Dimensions that share a coefficient, from `position_dims`.
    group : ProcessGroup

    Returns
    -------
    (N, ...) tensor, dtype of the features. Can be differentiated any number of times, on all processes alike.
    """
    dtype = compute_dtype(features)
    with full_precision(features.device):
        out: Tensor = _RemoveRegression.apply(  # type: ignore[no-untyped-call]
            features, basis.to(dtype), coefficients.to(dtype), projector.to(dtype), positions, group, None
        )
    return out


class _RemoveRunningRegression(torch.autograd.Function):
    """``out = f − B β`` with a running β, and the running adjoint of its estimate in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        basis: Tensor,
        coefficients: Tensor,
        projector: Tensor,
        adjoint: Tensor,
        weight: Tensor,
        count: Weight,
        decay: Weight,
        positions: tuple[int, ...],
        samples: Tensor | int,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.positions, ctx.shape = positions, features.shape
        ctx.samples, ctx.group = samples, group
        # The two buffers are state, updated in the backward pass: the version of a saved tensor is guarded.
        ctx.adjoint, ctx.weight = adjoint, weight
        if isinstance(count, Tensor):
            ctx.save_for_backward(basis, projector, count, decay)
        else:
            ctx.save_for_backward(basis, projector)
            ctx.count, ctx.decay = count, decay
        return _without_effect(features, basis, coefficients, positions, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, projector, *weights = ctx.saved_tensors
        count, decay = weights or (ctx.count, ctx.decay)
        positions = ctx.positions
        with full_precision(grad.device):
            matrix = gradient_matrix(grad, positions, basis.dtype)
            batch = basis.mT @ matrix
            is_mean = isinstance(ctx.samples, int) and ctx.samples == 1
            if not is_mean:
                batch = batch / ctx.samples
            if ctx.group is not None:
                batch = all_reduce_sum(batch, ctx.group)
            adjoint = _update_adjoint(batch, ctx.adjoint, ctx.weight, count, decay)
            if not is_mean:
                adjoint = ctx.samples * adjoint
            result = _subtract_projected(grad, matrix, projector, adjoint, positions, ctx.shape)
        return (result, *(None,) * 10)


def _update_adjoint(batch: Tensor, adjoint: Tensor, weight: Tensor, count: Weight, decay: Weight) -> Tensor:
    """Move the running adjoint towards that of the batch, in place; return it in the batch's dtype."""
    # An overflowed gradient (a skipped step of mixed-precision training) must not enter the state.
    finite = all_finite(batch)
    if isinstance(finite, Tensor):
        used = finite.to(weight.dtype)
        count, decay = count * used, decay * used + (1 - used)
        batch = torch.where(finite, batch, 0.0)
    elif not finite:
        return adjoint.to(batch.dtype)
    total = read(weight) * decay + count
    write_(weight, total)
    adjoint.lerp_(cast_to(batch, adjoint.dtype), ratio(count, total, adjoint.dtype))
    return cast_to(adjoint, batch.dtype)


def remove_running_regression(
    features: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    projector: Tensor,
    adjoint: Tensor,
    weight: Tensor,
    *,
    count: Weight,
    decay: Weight,
    positions: tuple[int, ...] = (),
    reduction: Literal["mean", "sum"] = "mean",
    group: ProcessGroup | None = None,
    num_samples: Tensor | None = None,
) -> Tensor:
    """Return ``features − basis @ coefficients``; the gradient is that of least squares over many batches.

    Over a whole data set of N samples the coefficients are ``P f`` with a matrix `P` (R, N) of the design,
    and the gradient is ``g − Pᵀ Bᵀ g``: besides the batch at hand it needs a sum over all samples, ``Bᵀ g``.
    This function keeps a running mean of it, the *adjoint* of the coefficients, as the estimators keep a
    running mean of the moments in the forward pass. With fixed weights the expected gradient tends to the
    one over the whole data set as the window grows.

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    basis : (N, R) tensor
        What multiplies the coefficients.
    coefficients : (R, D) tensor
        Constants here.
    projector : (R, N) tensor
        The batch's rows of `P`, scaled as if the batch were the whole data set: operator @ moment rows.
    adjoint : (R, D) tensor
        State, updated in place by the backward pass.
    weight : (1,) tensor
        State: the decayed number of samples behind `adjoint`.
    count : float or (1,) tensor
        What this batch weighs.
    decay : float or (1,) tensor, as `count`
        What the past keeps of its weight.
    positions : tuple of int
        Dimensions that share a coefficient, from `position_dims`.
    reduction : "mean" or "sum"
        How the loss adds up the samples of the batch, a fixed factor apart. A wrong answer makes the gradient
        of a batch of another size wrong by the ratio of the sizes.
    group : ProcessGroup, optional
        The processes whose samples are one batch; `count` and `projector` are then of that. The backward pass
        has a collective of R·D numbers.
    num_samples : (1,) tensor, optional
        With a group, the number of samples of all its processes.

    Returns
    -------
    (N, ...) tensor, dtype of the features. Can be differentiated once.

    Notes
    -----
    A change of the loss scale reaches the running adjoint within its window.
    """
    dtype = compute_dtype(features)
    # The adjoint is that of a mean over samples; a loss that is a sum has the gradient of n of them. Each of
    # several processes has a mean of its own, and their gradients are averaged behind the backward pass.
    samples: Tensor | int = world_size(group)
    if reduction == "sum":
        samples = max(features.shape[0], 1) if num_samples is None else num_samples.clamp_min(1).to(dtype)
    with full_precision(features.device):
        out: Tensor = _RemoveRunningRegression.apply(  # type: ignore[no-untyped-call]
            features,
            cast_to(basis, dtype),
            cast_to(coefficients, dtype),
            cast_to(projector, dtype),
            adjoint,
            weight,
            count,
            decay,
            positions,
            samples,
            group,
        )
    return out
