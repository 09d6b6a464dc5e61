"""Arrays of users to tensors."""

from __future__ import annotations

import math
import numbers
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.text import listed


def as_real_tensor(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Return a tensor (see `plain_tensor`), or a copy of an array (a list, a DataFrame) as a CPU tensor.

    It may be of any real dtype, booleans included; see `as_real_array` for DataFrames. What is None, complex
    or not numeric is a TypeError that names the argument.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(
                f"{name} must be real, got {values.dtype}: give real and imaginary part as two columns."
            )
        return plain_tensor(values)
    if values is None:
        raise TypeError(f"{name} must be a tensor or an array, got None.")
    array = as_real_array(values, name)
    # A copy in native byte order: tensors cannot share read-only, byte-swapped or negatively strided memory.
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def as_real_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return an array, a list or a DataFrame as an array of booleans, integers or floating-point numbers.

    Python objects (of columns of several types, or with gaps, as of ``Int64``) are taken as the numbers that
    they are, as int64 or, with fractions or gaps (NaN), float64. What is complex or not numeric is a
    TypeError that names the argument, and the columns of a DataFrame.
    """
    if isinstance(values, (list, tuple)) and any(isinstance(part, Tensor) and part.ndim for part in values):
        raise TypeError(
            f"{name} is a {type(values).__name__} of tensors, which may be its columns or its rows: give one "
            "tensor, torch.stack(columns, 1)."
        )
    # NumPy would take what lies behind a mask for data.
    masked: Any = values
    array = np.array(masked.tolist(), dtype=object) if np.ma.is_masked(values) else np.asarray(values)
    # DataFrames of pandas and of polars; the columns of other tables have no names there.
    dtypes = getattr(values, "dtypes", None)
    columns = list(getattr(values, "columns", ())) if dtypes is not None else []
    # Categories of numbers are numbers to NumPy. Of labels they are the classes.
    kinds = [] if dtypes is None or name == "labels" else list(map(str, np.atleast_1d(dtypes)))
    wrong = [name for name, kind in zip(columns or [name], kinds, strict=False) if kind == "category"]
    if array.dtype.kind == "O" and not wrong:
        if array.ndim == 2 and len(columns) == array.shape[1]:
            wrong = [name for name, column in zip(columns, array.T, strict=True) if not _is_numeric(column)]
        if not wrong and _is_numeric(array):
            array = _as_numbers(array)
    if array.dtype.kind not in "biuf" or wrong:
        what = f"got an array of dtype {array.dtype}"
        if wrong:
            what = f"but the column(s) {listed(wrong)} are not"
        raise TypeError(
            f"{name} must be real and numeric, {what}: encode categories as columns, as mdnorm.Design does."
        )
    return array


def _is_missing(kind: type) -> bool:
    return kind is type(None) or kind.__name__ == "NAType"


def _is_numeric(array: NDArray[Any]) -> bool:
    return all(
        issubclass(kind, (numbers.Real, Decimal, np.bool_)) or _is_missing(kind)
        for kind in set(map(type, array.ravel().tolist()))
    )


def _as_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """Return Python objects that are numbers or missing as an array of numbers."""
    entries = array.ravel().tolist()
    if all(_is_missing(type(entry)) for entry in entries):
        return array
    numbers = np.array([math.nan if _is_missing(type(entry)) else entry for entry in entries])
    kind = {"b": np.bool_, "i": np.int64}.get(numbers.dtype.kind, np.float64)
    return numbers.astype(kind).reshape(array.shape)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which K×K statistics are kept on `device`: float64 wherever it exists."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_traced() -> bool:
    """Whether a graph is being traced or a transform of torch.func is at work: values cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor without what a subclass adds to it (the affine matrix of MONAI's MetaTensor, say)."""
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


def columns_of(
    values: Tensor | ArrayLike,
    name: str,
    *,
    num_samples: int | None = None,
    num_columns: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return metadata or labels (N,) or (N, K), of any real dtype, as a tensor of columns (N, K), checked.

    What is expected of N, K and the device may be None: anything. A ValueError names the argument.
    """
    tensor = as_real_tensor(values, name)
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(1)
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} must have shape (num_samples,) or (num_samples, K), got {tuple(tensor.shape)}."
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} but the features are on {device}: {name}.to({str(device)!r})."
        )
    if num_samples is not None and tensor.shape[0] != num_samples:
        raise ValueError(f"{name} has {tensor.shape[0]} rows but there are {num_samples} samples.")
    if num_columns is not None and tensor.shape[1] != num_columns:
        raise ValueError(f"{name} has {tensor.shape[1]} column(s) but num_{name}={num_columns} was expected.")
    if name == "metadata" and tensor.shape[1] == 0:
        raise ValueError("metadata has no columns: there is nothing to remove.")
    return tensor


def label_columns(labels: Tensor | ArrayLike, num_labels: int | None) -> Tensor:
    """Turn integer labels (N,) or (N, 1) into one-hot columns where `num_labels` is above 1.

    An index outside 0 … num_labels − 1 is a ValueError; and so are, without `num_labels`, integers other than
    two values: class indices, of which one column would make a ranking.
    """
    tensor = as_real_tensor(labels, "labels")
    if num_labels in (0, 1) or not (tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[1] == 1)):
        return tensor
    if num_labels is None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return tensor
    if tensor.is_floating_point():
        raise ValueError(
            f"labels has 1 column(s) of {tensor.dtype} but num_labels={num_labels} was expected: class "
            "indices must be integers (labels.long()), label columns must be that many."
        )
    # As int64: torch has no minimum of the larger unsigned integers.
    indices = tensor.reshape(-1).long()
    is_hidden = is_traced() if num_labels is None else torch.compiler.is_compiling()
    low, high = (0, 0) if is_hidden or not len(indices) else map(int, indices.aminmax())
    if num_labels is None:
        # Two values are one column however they are coded.
        if (low < 0 or high > 1) and not (low == -1 and bool((indices.abs() == 1).all())):
            raise ValueError(
                f"labels are integers from {low} to {high}: give num_labels or one-hot columns for class "
                "indices, labels.float() for one column of an ordinal or continuous label."
            )
        return tensor
    if low < 0 or high >= num_labels:
        raise ValueError(
            f"labels has class index {low if low < 0 else high}, but num_labels={num_labels} allows 0 to "
            f"{num_labels - 1} only."
        )
    # A comparison instead of one_hot: it needs no check of its own, so it can be traced.
    return indices.unsqueeze(1) == torch.arange(num_labels, device=indices.device)


def check_finite_columns(columns: Tensor, **blocks: Tensor) -> None:
    """Raise ValueError where columns have NaN or infinite values, or values whose squares overflow.

    `columns` are all blocks in the dtype that they are computed in, the blocks named by their arguments.
    """
    # While a graph is traced nothing can be looked at; eager calls check every batch.
    if torch.compiler.is_compiling() or math.isfinite(torch.linalg.vector_norm(columns.detach())):
        return
    raise_not_finite(columns.dtype, **blocks)


def raise_not_finite(dtype: torch.dtype, **blocks: Tensor) -> NoReturn:
    """Raise ValueError: a block has NaN or infinite values, or squares that are too large for the dtype."""
    for name, block in blocks.items():
        finite = torch.isfinite(block)
        if not bool(finite.all()):
            bad_rows, bad_columns = (~finite).nonzero(as_tuple=True)
            rows = sorted(set(bad_rows.tolist()))
            raise ValueError(
                f"{name} has NaN or infinite values in column(s) {sorted(set(bad_columns.tolist()))[:5]}, "
                f"row(s) {listed(rows)} ({len(rows)} of {block.shape[0]} rows): drop or impute these."
            )
    for name, block in blocks.items():
        if not math.isfinite(torch.linalg.vector_norm(block.detach().to(dtype))):
            largest = block.detach().abs().amax(0)
            raise ValueError(
                f"{name} has values up to {float(largest.max()):.3g} in column {int(largest.argmax())}, "
                "whose squares overflow: give the column in a larger unit."
            )
    raise ValueError(f"the squares of the values of {' and '.join(blocks)} overflow together: rescale them.")


def design_blocks(
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None,
    num_metadata: int | None = None,
    num_labels: int | None = None,
    **expected: Any,
) -> dict[str, Tensor]:
    """Return metadata and, if given, labels as columns of one length, as `columns_of` checks them."""
    blocks = {"metadata": columns_of(metadata, "metadata", num_columns=num_metadata, **expected)}
    if labels is not None:
        expected["num_samples"] = blocks["metadata"].shape[0]
        labels = label_columns(labels, num_labels)
        blocks["labels"] = columns_of(labels, "labels", num_columns=num_labels, **expected)
    return blocks


def design_columns(
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None,
    features: Tensor,
    num_metadata: int | None,
    num_labels: int | None,
    check_finite: bool,
) -> tuple[Tensor, int]:
    """Return the checked design columns ``[y, 1, m]`` of a training batch, constants (N, K), and K_m."""
    options: Any = {"num_samples": len(features), "device": features.device}
    blocks = design_blocks(metadata, labels, num_metadata, num_labels, **options)
    if blocks["metadata"].requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "metadata.requires_grad is True, but in training metadata are constants to the layer: give "
            "metadata.detach(). In evaluation the gradient reaches metadata."
        )
    dtype = statistics_dtype(features.device)
    parts = [block.detach().to(dtype) for block in reversed(blocks.values())]
    parts.insert(len(parts) - 1, torch.ones_like(parts[-1][:, :1]))
    columns = torch.cat(parts, 1)
    if check_finite:
        check_finite_columns(columns, **blocks)
    return columns, blocks["metadata"].shape[1]


def refuse_bad_weights(weights: Tensor) -> None:
    """Raise ValueError where weights (N,) are NaN, infinite or negative."""
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(f"weights must be finite and not negative: row(s) {bad.nonzero()[:5, 0].tolist()}.")


def checked_weights(values: Tensor | ArrayLike, num_rows: int, like: Tensor) -> Tensor:
    """Return weights (num_rows,) in the dtype and on the device of `like`, finite and not negative."""
    weights = as_real_tensor(values, "weights").detach().to(like)
    if weights.shape != (num_rows,):
        raise ValueError(
            f"weights must have shape ({num_rows},), one weight a row, got {tuple(weights.shape)}."
        )
    refuse_bad_weights(weights)
    return weights


def row_weights(
    weights: Tensor | ArrayLike | None,
    columns: Tensor,
    mask: Tensor | None,
    dims: tuple[int, ...],
    check: bool,
) -> Tensor | None:
    """Return the weight of each sample in the fit (N,), its positions included; None where all weigh 1."""
    if weights is None and mask is None:
        return None
    result = columns.new_ones(len(columns))
    if weights is not None:
        result = (
            columns_of(weights, "weights", num_samples=len(columns), device=columns.device)
            .detach()
            .to(columns.dtype)
        )
        if result.shape[1] != 1:
            raise ValueError(f"weights must have shape (num_samples,), got {tuple(result.shape)}.")
        result = result[:, 0]
        if check and not torch.compiler.is_compiling():
            refuse_bad_weights(result)
    # Every position counts the same, so a sample counts as the share of its positions that are there.
    return result if mask is None else result * mask.to(result.dtype).mean(dims)[:, 0]


def plain_features(features: Tensor) -> Tensor:
    """Return features without what a subclass adds; raise TypeError where they are no real tensor."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}.")
    if not features.is_floating_point():
        raise TypeError(f"features must have a floating-point dtype, got {features.dtype}.")
    return plain_tensor(features)


def position_mask(mask: Tensor | ArrayLike, features: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return a mask (N, positions) as one that spreads over the features."""
    if not dims:
        raise ValueError("mask= needs granularity='channel' and features with positions.")
    tensor = as_real_tensor(mask, "mask")
    tensor = tensor if isinstance(mask, Tensor) else tensor.to(features.device)
    expected = tuple(features.shape[dim] for dim in (0, *dims))
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"mask must have shape {expected}, samples and positions, got {tuple(tensor.shape)}."
        )
    if tensor.device != features.device:
        raise ValueError(f"mask is on {tensor.device} but the features are on {features.device}.")
    (channel,) = set(range(1, features.ndim)) - set(dims)
    return (tensor if tensor.dtype == torch.bool else tensor != 0).unsqueeze(channel)


def check_same_order(**tables: Any) -> None:
    """Refuse pandas objects of which the same row labels come in another order; by names of arguments.

    Rows belong together by position, where every row would then get the values of another one. Indexes with
    other labels say nothing: features often come out of a model without any.
    """
    known: dict[str, Any] = {}
    for name, table in tables.items():
        index = getattr(table, "index", None)
        # The method of a list, or of polars' frames, is no index.
        if index is None or callable(index) or not hasattr(index, "equals"):
            continue
        for other, labels in known.items():
            if len(index) != len(labels) or index.equals(labels):
                continue
            if index.is_unique and labels.is_unique and not len(index.difference(labels)):
                row = int(np.flatnonzero(np.asarray(index != labels))[0])
                raise ValueError(
                    f"{name} has the same row labels as {other}, but in another order (row {row}: "
                    f"{index[row]!r} and {labels[row]!r}): bring them into one order, for example with "
                    f"{name}.loc[{other}.index], or drop the labels with reset_index(drop=True) if rows "
                    "belong together by position."
                )
        known[name] = index
