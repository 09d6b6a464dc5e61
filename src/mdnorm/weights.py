"""Weights of batches in running averages: numbers where they can be read at once, tensors elsewhere.

A running average needs a handful of operations on single numbers. As tensors they cost as much as the whole
of a small layer; on a GPU, or while a graph is traced, reading them would wait for the device or break the
graph. So the same formula works on a `Weight`, which is whichever of the two costs nothing.

`can_leave_torch` and `is_small` say where small matrices, too, are better computed beside torch, in NumPy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Weight: TypeAlias = float | Tensor

__all__ = [
    "all_finite",
    "at_least",
    "can_leave_torch",
    "can_read",
    "is_small",
    "is_transforming",
    "positive",
    "product",
    "ratio",
    "read",
    "write_",
]


_PLAIN = (Tensor, nn.Parameter)
_BLAS_DTYPES = (torch.float32, torch.float64)
# Up to as many values, and as many multiplications, the call takes the time and not the arithmetic; and
# NumPy's BLAS starts no threads, which would fight with those of torch for the cores: it made steps take ten
# times as long. (OpenBLAS does from 10 000 values of an inner product on.)
_SMALL = 2**13
_FEW_MULTIPLICATIONS = 2**17
# No public names say whether a transform of torch.func is at work (torch.autograd.Function itself asks in
# this way), torch.jit.trace, or a dispatch mode (make_fx, FakeTensorMode, a profiler).
_transforms_are_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack


def can_read(tensor: Tensor) -> bool:
    """Whether the values of a tensor are at hand: on the CPU, no graph being traced, no wrapper around it."""
    # First, since what follows cannot be traced.
    if torch.compiler.is_compiling():
        return False
    return tensor.is_cpu and type(tensor) in _PLAIN and not _transforms_are_active()


def can_leave_torch(tensor: Tensor) -> bool:
    """Whether matrices can be computed beside torch: values that can be read, and nothing that records."""
    # To whatever follows the operations of torch, what NumPy computes would be a constant.
    return can_read(tensor) and _tracing_state() is None and _dispatch_modes() == 0


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read and are so few that NumPy, whose calls cost less, is quicker."""
    return tensor.numel() <= _SMALL and tensor.dtype in _BLAS_DTYPES and can_leave_torch(tensor)


def product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """Return ``left @ right`` of two matrices, by torch and its threads where it is no small product."""
    if left.size * right.shape[1] <= _FEW_MULTIPLICATIONS:
        result: NDArray[Any] = left @ right
        return result
    return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def is_transforming() -> bool:
    """Whether a transform of torch.func (vmap, grad) is at work."""
    return bool(_transforms_are_active())


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
    if is_small(tensor):
        # The quickest call that sees all values. Where squares overflow, the sum decides.
        values = tensor.numpy(force=True).ravel("K")
        if math.isfinite(np.vdot(values, values)):
            return True
    total = tensor.sum()
    return math.isfinite(total) if can_read(tensor) else torch.isfinite(total)
