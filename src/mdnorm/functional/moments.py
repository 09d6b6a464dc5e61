"""Moments of features and design, of a batch, running, and of several processes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdnorm.distributed import world_size
from mdnorm.functional.dtypes import cast_to, compute_dtype, full_precision
from mdnorm.functional.gram import Gram
from mdnorm.functional.positions import as_matrix
from mdnorm.weights import is_small

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.weights import Weight

__all__ = [
    "feature_moments",
    "merge_cross_moments_",
    "share_gram",
    "share_moments",
]


def feature_moments(features: Tensor, rows: Tensor, positions: tuple[int, ...] = ()) -> Tensor:
    """Return the moments ``rows @ features``, without gradient.

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    rows : (L, N) tensor
        See `moment_rows`. The product is in the wider of its dtype and that of the features if that is
        float64, else in float32.
    positions : tuple of int
        Dimensions that share a coefficient, from `position_dims`.

    Returns
    -------
    (L, D) tensor
    """
    dtype = compute_dtype(features)
    with full_precision(features.device):
        return cast_to(rows.detach(), dtype) @ as_matrix(features.detach(), positions, dtype)


def merge_cross_moments_(
    cross: Tensor, mean: Tensor, batch: Tensor, step: Tensor, share: Weight
) -> tuple[Tensor, Tensor]:
    """Update the running cross covariance and mean of features in place by those of a batch.

    The pairwise update of `Gram.merge`, for the design columns against the features.

    Parameters
    ----------
    cross : (K, D) tensor
        Running covariance of columns and features, changed in place.
    mean : (D,) tensor
        Running mean of the features, changed in place.
    batch : (K + 1, D) tensor
        The batch's moments ``[E[(x − x̄) fᵀ]; E[fᵀ]]``, x̄ the batch's own mean.
    step : (K,) tensor
        Mean of the batch's columns minus their running mean; finite, see `Gram.merge_`.
    share : float or (1,) tensor
        Weight of the batch in the result.

    Returns
    -------
    cross, mean
    """
    if not isinstance(share, Tensor) and is_small(cross):
        return _merge_cross_arrays_(cross, mean, batch, step, share)
    step = cast_to(step, cross.dtype)
    if isinstance(share, Tensor):
        share = cast_to(share, cross.dtype)
    batch_cross, batch_mean = batch[:-1], batch[-1]
    cross.lerp_(batch_cross, share)
    cross.addr_(step * (share * (1 - share)), batch_mean - mean)
    mean.lerp_(batch_mean, share)
    return cross, mean


def _merge_cross_arrays_(
    cross: Tensor, mean: Tensor, batch: Tensor, step: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """`merge_cross_moments_` of few numbers, in NumPy."""
    old_mean, moments = mean.numpy(force=True), batch.numpy(force=True)
    difference = moments[-1] - old_mean
    merged = (1 - share) * cross.numpy(force=True)
    merged += share * moments[:-1]
    merged += (share * (1 - share) * step.numpy(force=True))[:, None] * difference
    # By torch, which keeps count of what changes in place.
    cross.copy_(torch.from_numpy(merged))
    mean.copy_(torch.from_numpy(old_mean + share * difference))
    return cross, mean


@torch.no_grad()
def share_gram(local: Gram, sums: Tensor, group: ProcessGroup) -> tuple[Gram, Tensor]:
    """Merge the Gram matrices of all processes and add up `sums`, in one collective.

    The buffer has ``sums.numel() + K² + W·(K + 1)`` numbers for W processes, in float64: in float32 the
    sum of the Gram matrices would make a direction of exactly collinear columns look as if it varied. Every
    process's count and mean have a place of their own in it, from which the covariance between the processes
    follows without cancellation, however far from zero a column is.

    Parameters
    ----------
    local : Gram
        Of this process, a count of 0 included.
    sums : tensor of any shape
        Of the same shape on all processes.
    group : ProcessGroup

    Returns
    -------
    Gram, and the summed tensor in float64; the same on every process.
    """
    width = local.mean.shape[0]
    places = local.mean.new_zeros(world_size(group), width + 1)
    place = torch.distributed.get_rank(group)
    places[place, 0] = local.count.squeeze()
    places[place, 1:] = local.mean
    within = local.count * local.covariance
    buffer = torch.cat([sums.reshape(-1).to(within.dtype), within.reshape(-1), places.reshape(-1)])
    torch.distributed.all_reduce(buffer, group=group)
    total, within, places = buffer.split([sums.numel(), within.numel(), places.numel()])
    places = places.view(-1, width + 1)
    counts, means = places[:, 0], places[:, 1:]
    count = counts.sum().reshape(1)
    shares = counts / count.clamp_min(torch.finfo(count.dtype).tiny)
    mean = shares @ means
    steps = means - mean
    covariance = within.view(width, width) / count.clamp_min(torch.finfo(count.dtype).tiny)
    covariance = covariance + (shares.unsqueeze(1) * steps).mT @ steps
    return Gram(mean, covariance, count, local.num_metadata), total.view(sums.shape)


@torch.no_grad()
def share_moments(local: Gram, moments: Tensor, group: ProcessGroup, origin: Tensor) -> tuple[Gram, Tensor]:
    """Return Gram matrix and feature moments over the samples of all processes, in one collective.

    Parameters
    ----------
    local : Gram
        Of this process's samples; a count of 0 included.
    moments : (K + 1, D) tensor
        Theirs, ``[E[(x − x̄) fᵀ]; E[fᵀ]]`` with their own mean x̄.
    group : ProcessGroup
    origin : (K,) tensor
        The same on all processes, the nearer to the mean of the columns the better (a running mean).

    Returns
    -------
    gram : Gram
    moments : (K + 1, D) tensor, dtype of `moments`
        About the mean of `gram`.
    """
    precise = moments.to(local.mean.dtype)
    cross = precise[:-1] + torch.outer(local.mean - origin, precise[-1])
    gram, total = share_gram(local, local.count * torch.cat([cross, precise[-1:]]), group)
    total = total / gram.count.clamp_min(torch.finfo(total.dtype).tiny)
    cross = total[:-1] - torch.outer(gram.mean - origin, total[-1])
    return gram, torch.cat([cross, total[-1:]]).to(moments.dtype)
