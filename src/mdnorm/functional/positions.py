"""Which dimensions of features share coefficients, and features as a matrix of samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Granularity",
    "as_matrix",
    "expand_positions",
    "gradient_matrix",
    "position_dims",
]


Granularity = Literal["element", "channel"]


def position_dims(features: Tensor, granularity: Granularity, channel_dim: int = 1) -> tuple[int, ...]:
    """Return the dimensions over which one coefficient is shared: none for "element", else all positions.

    Parameters
    ----------
    features : (N, ...) tensor
        At least 2 dimensions, the first one the samples.
    granularity : "element" or "channel"
        "element": every value of a sample has its own coefficients (the paper). "channel": one set of
        coefficients a channel, shared by all positions, of which there can be any number.
    channel_dim : int
        Where the channels are: 1 for (N, C, H, W), −1 for tokens (N, T, D).

    Raises
    ------
    ValueError
        Fewer than 2 dimensions, an unknown granularity, or a channel_dim that is not a feature dimension.
    """
    if features.ndim < 2:
        raise ValueError(
            f"features must have shape (num_samples, ...) with at least 2 dimensions, got "
            f"{tuple(features.shape)}."
        )
    if granularity == "element":
        return ()
    if granularity != "channel":
        raise ValueError(f"granularity must be 'element' or 'channel', got {granularity!r}.")
    channel = channel_dim + features.ndim if channel_dim < 0 else channel_dim
    if not 1 <= channel < features.ndim:
        raise ValueError(
            f"channel_dim={channel_dim} is not a feature dimension of features with shape "
            f"{tuple(features.shape)} (dimension 0 holds the samples)."
        )
    return tuple(dim for dim in range(1, features.ndim) if dim != channel)


def as_matrix(features: Tensor, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reduce features to the (N, D) matrix that is regressed: flattened, or averaged over the positions.

    Averaging is exact: all positions of a sample share its design row, so regressing every position is
    regressing their mean.
    """
    if positions:
        return features.to(dtype).mean(positions)
    if features.ndim == 2 and features.dtype == dtype:
        # As it is: for a small batch each call counts.
        return features
    return features.flatten(1).to(dtype)


def gradient_matrix(grad: Tensor, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reduce the features' gradient to that of the (N, D) matrix, summed over the positions."""
    return grad.to(dtype).sum(positions) if positions else as_matrix(grad, (), dtype)


def expand_positions(matrix: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Return a matrix with a dimension of length 1 in the place of each that shares coefficients."""
    for dim in positions:
        matrix = matrix.unsqueeze(dim)
    return matrix
