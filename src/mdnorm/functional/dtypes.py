"""The dtypes that features and statistics are computed in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "cast_to",
    "check_floating",
    "compute_dtype",
    "full_precision",
    "statistics_dtype",
]


_AS_IT_IS = contextlib.nullcontext()


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which K×K statistics are kept on `device`: float64 wherever it exists."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype in which features are regressed: their own, but never below float32."""
    return torch.promote_types(features.dtype, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast does not compute below float32."""
    # Entering torch.autocast costs as much as a small product: only where there is something to switch off.
    if torch.is_autocast_enabled(device.type):
        return cast("AbstractContextManager[None]", torch.autocast(device.type, enabled=False))
    return _AS_IT_IS


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype, or itself: to ask is cheaper than a conversion of nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_floating(features: Tensor) -> None:
    """Raise TypeError where features are not a tensor of real floating-point numbers."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}.")
    if not features.is_floating_point():
        raise TypeError(f"features must have a floating-point dtype, got {features.dtype}.")
