"""The whole in one call: least squares within a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdnorm.distributed import eager, world_size
from mdnorm.functional.coefficients import (
    effect_basis,
    moment_rows,
    projected_rows,
    removal_operator,
)
from mdnorm.functional.columns import design_columns
from mdnorm.functional.dtypes import check_floating
from mdnorm.functional.gram import Gram
from mdnorm.functional.moments import feature_moments, share_moments
from mdnorm.functional.positions import Granularity, position_dims
from mdnorm.functional.removal import remove_regression, remove_shared_regression

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch.distributed import ProcessGroup

__all__ = [
    "metadata_norm",
]


def metadata_norm(
    features: Tensor,
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None = None,
    gram: Gram | None = None,
    *,
    granularity: Granularity = "element",
    channel_dim: int = 1,
    ridge: float = 0.0,
    center: bool = False,
    check_finite: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Remove from features what the metadata explain, by least squares in this batch.

    Parameters
    ----------
    features : (N, ...) tensor
        Floating dtype; (N, D), (N, C, L), (N, C, H, W), (N, C, T, H, W), (N, T, D), …
    metadata : (N,) or (N, K_m)
        What is removed. Constants: no gradient flows to them.
    labels : (N,) or (N, K_y), optional
        What is protected: in the regression, never removed.
    gram : Gram, optional
        Gram matrix of the training set (the paper's form: β = G⁻¹ · mean over the batch of x fᵀ). None takes
        the batch's own (ordinary least squares: residuals orthogonal to the metadata within the batch).
    granularity, channel_dim
        See `position_dims`.
    ridge : float
        See `coefficient_operator`.
    center : bool
        Remove the intercept as well, as the authors' code does.
    check_finite : bool
        Look for NaN and infinite metadata.
    process_group : ProcessGroup, optional
        The batch is that of all its processes together; each gives its samples and gets them back. None: of
        this process alone.

    Returns
    -------
    (N, ...) tensor, dtype of the features
        With fewer samples than columns, or one sample, the directions that vary within the batch are
        removed; with none (one sample, constant metadata, an empty batch) the features come back unchanged
        (`center=False`).

    Raises
    ------
    TypeError, ValueError
        See `design_columns` and `position_dims`.

    References
    ----------
    Lu et al., Metadata Normalization, CVPR 2021 (arXiv:2104.09052), section 3.
    """
    check_floating(features)
    positions = position_dims(features, granularity, channel_dim)
    columns, num_metadata = design_columns(
        metadata,
        labels,
        num_samples=features.shape[0],
        num_metadata=None if gram is None else gram.num_metadata,
        num_labels=None if gram is None or labels is None else gram.mean.shape[0] - gram.num_metadata,
        device=features.device,
        check_finite=check_finite,
    )
    if gram is not None and gram.mean.shape[0] != columns.shape[1]:
        raise ValueError(
            f"gram was made with {gram.mean.shape[0] - num_metadata} label column(s), but labels "
            f"{'is None' if labels is None else f'has {columns.shape[1] - num_metadata}'}."
        )
    if world_size(process_group) > 1:
        return eager(_shared_metadata_norm)(
            features, columns, num_metadata, gram, positions, ridge, center, process_group
        )
    if gram is None:
        gram = Gram.from_columns(columns, num_metadata)
    out, _ = remove_regression(
        features,
        effect_basis(columns[:, :num_metadata], gram.mean[:num_metadata], center),
        removal_operator(gram, ridge=ridge, center=center),
        moment_rows(columns, gram.mean),
        positions,
    )
    return out


def _shared_metadata_norm(
    features: Tensor,
    columns: Tensor,
    num_metadata: int,
    gram: Gram | None,
    positions: tuple[int, ...],
    ridge: float,
    center: bool,
    group: ProcessGroup,
) -> Tensor:
    local = Gram.from_columns(columns, num_metadata)
    moments = feature_moments(features.detach(), moment_rows(columns, local.mean), positions)
    origin = torch.zeros_like(local.mean) if gram is None else gram.mean
    batch, moments = share_moments(local, moments, group, origin)
    if gram is None:
        gram = batch
    else:
        # Cross moments about the mean of the given matrix.
        step = (batch.mean - gram.mean).to(moments.dtype)
        moments = torch.cat([moments[:-1] + torch.outer(step, moments[-1]), moments[-1:]])
    operator = removal_operator(gram, ridge=ridge, center=center)
    return remove_shared_regression(
        features,
        effect_basis(columns[:, :num_metadata], gram.mean[:num_metadata], center),
        operator.to(moments.dtype) @ moments,
        projected_rows(operator, columns, gram.mean, batch.count),
        positions,
        group,
    )
