"""Design: metadata and labels to columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.functional.dtypes import statistics_dtype
from mdnorm.weights import all_finite, can_leave_torch, is_transforming

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "design_columns",
    "label_columns",
]


def _as_columns(values: Tensor | ArrayLike, name: str, device: torch.device | None) -> Tensor:
    tensor = as_real_tensor(values, name)
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(1)
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} must have shape (num_samples,) or (num_samples, num_columns), got {tuple(tensor.shape)}."
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} but the features are on {device}: "
            f"move it with {name}.to({str(device)!r})."
        )
    return tensor


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    """Return all blocks in one constant tensor (N, K)."""
    arrays = []
    for block in blocks:
        # NumPy knows no bfloat16.
        if block.dtype == torch.bfloat16 or not can_leave_torch(block):
            break
        arrays.append(block.numpy(force=True).T)
    else:
        # In NumPy, since the calls take the time; each column in one piece, as its sums want it.
        joined = np.empty((sum(map(len, arrays)), blocks[0].shape[0]))
        np.concatenate(arrays, out=joined)
        return torch.from_numpy(joined.T)
    dtype = statistics_dtype(blocks[0].device)
    return torch.cat([block.detach().to(dtype) for block in blocks], dim=1)


def _check_finite(block: Tensor, name: str) -> None:
    finite = torch.isfinite(block)
    if bool(finite.all()):
        return
    bad_rows, bad_columns = (~finite).nonzero(as_tuple=True)
    rows = sorted(set(bad_rows.tolist()))
    shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    raise ValueError(
        f"{name} has NaN or infinite values in column(s) {sorted(set(bad_columns.tolist()))}, row(s) {shown} "
        f"({len(rows)} of {block.shape[0]} rows): drop or impute these rows before they reach the layer."
    )


def label_columns(labels: Tensor | ArrayLike, num_labels: int | None) -> Tensor | ArrayLike:
    """Turn class indices into one-hot columns where the number of label columns asks for it.

    Parameters
    ----------
    labels : (N,) or (N, K_y)
        Class indices (integer dtype, shape (N,) or (N, 1)), or label columns.
    num_labels : int or None
        Number of label columns expected. Integer labels of one column become one-hot columns when this is
        above 1; with 1 they stay one column (a binary or ordinal label).

    Raises
    ------
    ValueError
        A class index is outside 0 … num_labels − 1; or `num_labels` is None and the labels are integers other
        than two values: class indices, of which one column would make a ranking.
    """
    if num_labels is None:
        return _refuse_classes(labels)
    if num_labels < 2:
        return labels
    tensor = as_real_tensor(labels, "labels")
    if not _is_single_column(tensor):
        return tensor
    if tensor.is_floating_point():
        raise ValueError(
            f"labels has 1 column(s) of {tensor.dtype} but num_labels={num_labels} was expected: class "
            "indices must be integers (labels.long()), label columns must be that many."
        )
    indices = tensor.reshape(-1).long()
    if not torch.compiler.is_compiling() and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"labels has class index {low if low < 0 else high}, but num_labels={num_labels} allows "
                f"0 to {num_labels - 1} only."
            )
    # A comparison instead of one_hot: it needs no check of its own, so it can be traced.
    return indices.unsqueeze(1) == torch.arange(num_labels, device=indices.device)


def _is_single_column(tensor: Tensor) -> bool:
    return tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[1] == 1)


def _refuse_classes(labels: Tensor | ArrayLike) -> Tensor:
    """Return labels whose number of columns nobody gave; raise where one column would rank classes."""
    tensor = as_real_tensor(labels, "labels")
    if not _is_single_column(tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor
    if torch.compiler.is_compiling() or is_transforming() or not tensor.numel():
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    # Two values are one column however they are coded.
    if (low >= 0 and high <= 1) or (low == -1 and bool((tensor.abs() == 1).all())):
        return tensor
    raise ValueError(
        f"labels are integers from {low} to {high} and nothing says how many classes there are: give "
        "num_labels (or, to functions without it, one-hot columns) for class indices, labels.float() for one "
        "column of an ordinal or continuous label."
    )


def design_columns(
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None = None,
    *,
    num_samples: int | None = None,
    num_metadata: int | None = None,
    num_labels: int | None = None,
    device: torch.device | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, int]:
    """Check metadata and labels and put them side by side as the columns `x = [m, y]` of the design.

    The intercept is not a column: it is handled by centring.

    Parameters
    ----------
    metadata : (N,) or (N, K_m)
        Tensor or array of any real dtype, booleans included.
    labels : (N,) or (N, K_y), optional
        Label columns; integer class indices become one-hot columns (see `label_columns`).
    num_samples, num_metadata, num_labels : int, optional
        What is expected of N, K_m and K_y; None accepts anything, but integer labels only of two values.
    device : torch.device, optional
        Where the columns must be; None accepts any device.
    check_finite : bool
        Look for NaN and infinite values (on a GPU this waits for the device).

    Returns
    -------
    columns : (N, K_m + K_y) tensor, float64 (float32 on devices without float64)
    num_metadata : int
        K_m.

    Raises
    ------
    TypeError
        A complex or non-numeric input.
    ValueError
        A wrong number of dimensions, rows or columns, a wrong device, a NaN or infinite value.
    """
    metadata_block = _as_columns(metadata, "metadata", device)
    blocks = [("metadata", metadata_block, num_metadata)]
    if labels is not None:
        blocks.append(
            ("labels", _as_columns(label_columns(labels, num_labels), "labels", device), num_labels)
        )
    rows = metadata_block.shape[0] if num_samples is None else num_samples
    for name, block, expected in blocks:
        if block.shape[0] != rows:
            raise ValueError(
                f"{name} has {block.shape[0]} rows but there are {rows} samples: one row a sample is needed."
            )
        if expected is not None and block.shape[1] != expected:
            raise ValueError(
                f"{name} has {block.shape[1]} column(s) but num_{name}={expected} was expected "
                f"(shape {tuple(block.shape)})."
            )
    if metadata_block.shape[1] == 0:
        raise ValueError("metadata has no columns: there is nothing to remove.")
    columns = _side_by_side([block for _, block, _ in blocks])
    # While a graph is traced nothing can be looked at; eager calls check every batch.
    if check_finite and not torch.compiler.is_compiling() and not bool(all_finite(columns)):
        # Or finite values overflowed in the sum.
        for name, block, _ in blocks:
            _check_finite(block, name)
    return columns, metadata_block.shape[1]
