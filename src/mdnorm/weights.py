"""Weights of batches in running averages: numbers where they can be read at once, tensors elsewhere.

A running average needs a handful of operations on single numbers. As tensors they cost as much as the whole
of a small layer; on a GPU, or while a graph is traced, reading them would wait for the device or break the
graph. So the same formula works on a `Weight`, which is whichever of the two costs nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import TypeAlias

    Weight: TypeAlias = float | Tensor

__all__ = ["all_finite", "at_least", "can_read", "is_transforming", "positive", "ratio", "read", "write_"]


def can_read(tensor: Tensor) -> bool:
    """Whether the values of a tensor are at hand: on the CPU, no graph being traced, no wrapper around it."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and not is_transforming()
    )


def is_transforming() -> bool:
    """Whether a transform of torch.func (vmap, grad) is at work."""
    # No public name says so; torch.autograd.Function itself asks in this way.
    return bool(torch._C._are_functorch_transforms_active())


def read(tensor: Tensor) -> Weight:
    """Return the number in a (1,) tensor, or the tensor itself where that would wait."""
    return float(tensor) if can_read(tensor) else tensor


def write_(tensor: Tensor, weight: Weight) -> Tensor:
    """Put a weight in a (1,) tensor."""
    return tensor.copy_(weight) if isinstance(weight, Tensor) else tensor.fill_(weight)


def at_least(weight: Weight, floor: float) -> Weight:
    """Return the larger of the two."""
    return weight.clamp_min(floor) if isinstance(weight, Tensor) else max(weight, floor)


def positive(weight: Weight, value: float, otherwise: float) -> Weight:
    """Return `value` where the weight is positive, else `otherwise`."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, torch.full_like(weight, value), otherwise)
    return value if weight > 0 else otherwise


def ratio(part: Weight, whole: Weight, dtype: torch.dtype) -> Weight:
    """Return the share of a part in the whole, 0 in an empty whole; a tensor in the given dtype."""
    share = part / at_least(whole, 1e-30)
    return share.to(dtype) if isinstance(share, Tensor) else share


def all_finite(tensor: Tensor) -> bool | Tensor:
    """Whether no value is NaN or infinite, nor their sum: as a 0-dimensional tensor where that waits."""
    total = tensor.sum()
    return math.isfinite(total) if can_read(tensor) else torch.isfinite(total)
