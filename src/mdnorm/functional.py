"""Regression of features on metadata: the maths of Metadata Normalization, stateless and differentiable.

Notation (Lu et al., CVPR 2021, section 3). Each of N samples has metadata `m` (K_m columns), label columns
`y` (K_y) and features `f` (D values). The model is ``f = m·β_m + y·β_y + β_0 + r``; only the metadata part
is removed::

    out = f − (m − m̄)·β_m                       (the mean of the features stays)
    out = f − m·β_m − β_0                        (``center=True``, the authors' form)

The label columns are in the regression only so that an effect which label and metadata share is not thrown
away with the metadata.

How the coefficients are computed. With `x = [m, y]`, its covariance `S` and its cross covariance `C` with
the features, the Frisch–Waugh–Lovell theorem gives the metadata rows of the full regression as

    β_m = (S_mm − S_my S_yy⁺ S_ym)⁺ (C_m − S_my S_yy⁺ C_y),

that is, a matrix `Q` that depends on the design alone, times `C`. Everything is a mean over samples, so
nothing depends on the batch size. The pseudo-inverses are taken in the space of whitened metadata columns,
where a direction either varies or does not: constant and collinear columns are handled, the result does not
depend on how the metadata are coded (units, reference category), and where the labels determine a direction
of the metadata exactly, what is removed is uncorrelated with that direction, so the label is protected.

The map from features to output is linear, ``out = (I − B P) f`` with `B` and `P` made of the design, so the
gradient needs no activation: only `B` and `P` (N numbers a column) are saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.distributed import all_reduce_sum, eager, world_size
from mdnorm.weights import (
    all_finite,
    at_least,
    can_leave_torch,
    can_read,
    is_small,
    is_transforming,
    product,
    ratio,
    read,
    write_,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch.distributed import ProcessGroup

    from mdnorm.weights import Weight

__all__ = [
    "Gram",
    "coefficient_operator",
    "design_columns",
    "effect_basis",
    "feature_moments",
    "merge_cross_moments_",
    "metadata_norm",
    "moment_rows",
    "position_dims",
    "recursive_update",
    "removal_operator",
    "remove_effect",
    "remove_regression",
    "remove_running_regression",
    "remove_shared_regression",
    "rescale",
    "share_gram",
    "share_moments",
]

Granularity = Literal["element", "channel"]

# A column counts as constant when its standard deviation is below this fraction of its mean, a direction as
# collinear (or as determined by the labels) when it keeps less than this share of its variance. Both are far
# above float64 rounding and far below anything a measured column shows.
_CONSTANT_RTOL = 1e-12
_COLLINEAR_RTOL = 1e-11
# Largest element of the inverse of a correlation matrix up to which it is taken as it is.
_WELL_CONDITIONED = 1e5


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


# --------------------------------------------------------------------------------------------------------
# Design: metadata and labels -> columns
# --------------------------------------------------------------------------------------------------------


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


class NoSamplesError(ValueError):
    """Statistics of a data set without a sample."""


@dataclass(frozen=True)
class Gram:
    """Gram matrix of the design `[m, y, 1]`, kept as mean and covariance and updated by batches.

    Mean and centred covariance carry the same information as ``E[x xᵀ]`` and do not lose digits when a
    column is far from zero (a year of birth, a time stamp).

    Attributes
    ----------
    mean : (K,) tensor
        Mean of the columns `[m, y]`, K = K_m + K_y.
    covariance : (K, K) tensor
        Their covariance with divisor N.
    count : (1,) tensor
        Number of samples (a weight; any non-negative number). Not 0-dimensional: torch.compile takes a
        0-dimensional float64 buffer for a constant and loses its updates.
    num_metadata : int
        K_m: the first columns are metadata, the rest labels.
    """

    mean: Tensor
    covariance: Tensor
    count: Tensor
    num_metadata: int

    @classmethod
    def from_columns(cls, columns: Tensor, num_metadata: int) -> Gram:
        """Return the Gram matrix of design columns (N, K), N ≥ 0."""
        # max(N, 1): an empty batch has mean 0, covariance 0 and weight 0, and no NaN.
        divisor = max(columns.shape[0], 1)
        mean = columns.sum(0) / divisor
        centred = columns - mean
        covariance = (centred.mT @ centred).div_(divisor)
        count = torch.full((1,), columns.shape[0], dtype=columns.dtype, device=columns.device)
        return cls(mean, covariance, count, num_metadata)

    @classmethod
    def from_data(
        cls,
        metadata: Tensor | ArrayLike | Iterable[Any],
        labels: Tensor | ArrayLike | None = None,
        *,
        num_metadata: int | None = None,
        num_labels: int | None = None,
    ) -> Gram:
        """Return the Gram matrix of a whole training set, in one call or streamed.

        Parameters
        ----------
        metadata : (N, K_m) tensor or array, or an iterable of batches
            Each batch of an iterable (a `DataLoader`, a generator) is `metadata`, a pair
            `(metadata, labels)` or a mapping with the keys "metadata" and, with labels, "labels". One such
            mapping, or what `mdnorm.Design.transform` returns, may also stand for the whole set.
        labels : (N, K_y), optional
            Only with metadata given as one table.
        num_metadata, num_labels : int, optional
            What is expected of K_m and K_y, as for `design_columns`.

        Raises
        ------
        ValueError
            No sample at all, what `design_columns` refuses, or a sequence of arrays that can be read in two
            ways (two batches, or metadata and labels; batches of one column, or rows) where the expected
            sizes do not tell.
        """
        gram: Gram | None = None
        for batch_metadata, batch_labels in _batches(metadata, labels, num_metadata, num_labels):
            columns, width = design_columns(
                batch_metadata, batch_labels, num_metadata=num_metadata, num_labels=num_labels
            )
            batch = cls.from_columns(columns, width)
            if gram is not None and batch.mean.shape != gram.mean.shape:
                raise ValueError(
                    f"a batch has {batch.mean.shape[0]} design columns, the batches before it "
                    f"had {gram.mean.shape[0]}."
                )
            gram = batch if gram is None else gram.merge(batch)
        if gram is None or float(gram.count) == 0:
            raise NoSamplesError("no samples: the Gram matrix needs the metadata of the training set.")
        return gram

    def merge(self, other: Gram, decay: float | Tensor = 1.0) -> Gram:
        """Return the Gram matrix of both sets together, this one's weight first multiplied by `decay`.

        Exact pairwise update of mean and covariance (Chan, Golub & LeVeque 1983).
        """
        count = self.count * decay + other.count
        share = other.count / count.clamp_min(torch.finfo(count.dtype).tiny)
        # What has no weight may be NaN: an unusable batch.
        has_weight = other.count > 0
        step = torch.where(has_weight, other.mean - self.mean, 0.0)
        covariance = (
            (1 - share) * self.covariance
            + share * torch.where(has_weight, other.covariance, 0.0)
            + share * (1 - share) * torch.outer(step, step)
        )
        return Gram(self.mean + share * step, covariance, count, self.num_metadata)

    def merge_(self, other: Gram, weight: Weight, decay: Weight) -> tuple[Tensor, Weight]:
        """Merge in place; return the step (K,) from this mean to the other one, and the other's share.

        As `merge`, of `other` with the given weight instead of its count. Where that is 0 (an unusable batch,
        whose values may be NaN) mean and covariance stay, and the step is 0.
        """
        count = read(self.count) * decay + weight
        share = weight / at_least(count, torch.finfo(self.count.dtype).tiny)
        if isinstance(share, Tensor):
            has_weight = share > 0
            step = torch.where(has_weight, other.mean - self.mean, 0.0)
            covariance = torch.where(has_weight, other.covariance, self.covariance)
            self.covariance.lerp_(covariance, share).addr_(step * (share * (1 - share)), step)
            self.mean.add_(step * share)
        elif share == 0:
            step = torch.zeros_like(self.mean)
        else:
            step = self._merge_arrays_(other, share)
        write_(self.count, count)
        return step, share

    def _merge_arrays_(self, other: Gram, share: float) -> Tensor:
        """Merge mean and covariance in place in NumPy: for K×K numbers on the CPU the calls take the time."""
        mean, covariance = self.mean.numpy(force=True), self.covariance.numpy(force=True)
        step = other.mean.numpy(force=True) - mean
        shift = share * step
        merged = (1 - share) * covariance
        merged += share * other.covariance.numpy(force=True)
        merged += ((1 - share) * shift)[:, None] * step
        # By torch, which keeps count of what changes in place.
        self.covariance.copy_(torch.from_numpy(merged))
        self.mean.copy_(torch.from_numpy(mean + shift))
        return torch.from_numpy(step)

    @property
    def matrix(self) -> Tensor:
        """The Gram matrix ``E[x xᵀ]`` of `x = [m, y, 1]`, shape (K + 1, K + 1) (paper, section 3)."""
        extended = torch.cat([self.mean, self.mean.new_ones(1)])
        matrix = torch.outer(extended, extended)
        matrix[:-1, :-1] += self.covariance
        return matrix


def _batches(
    metadata: Any, labels: Any, num_metadata: int | None, num_labels: int | None
) -> Iterable[tuple[Any, Any]]:
    if _is_array(metadata) or (
        isinstance(metadata, (list, tuple)) and metadata and _is_number_table(metadata)
    ):
        yield metadata, labels
        return
    if labels is not None:
        raise ValueError("labels come with each batch, as (metadata, labels), when metadata is an iterable.")
    if _names_its_parts(metadata) or _is_pair(metadata, num_labels):
        yield _parts_of(metadata)
        return
    _refuse_rows(metadata, num_metadata)
    for batch in metadata:
        yield _parts_of(batch)


def _parts_of(batch: Any) -> tuple[Any, Any]:
    """Return metadata and labels (None without) of what stands for a batch."""
    if isinstance(batch, Mapping):
        if "metadata" not in batch:
            raise ValueError(
                f"a batch has the keys {sorted(map(str, batch))}: metadata must be under 'metadata', labels "
                "under 'labels'. Select them from your loader, e.g. ((b['age'], b['y']) for b in loader)."
            )
        return batch["metadata"], batch.get("labels")
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) != 2:
        raise ValueError(
            f"a batch must be metadata or (metadata, labels), got {len(batch)} items: "
            "select the two from your loader, e.g. ((b[1], b[2]) for b in loader)."
        )
    return batch[0], batch[1]


def _names_its_parts(values: Any) -> bool:
    """Whether this is a mapping or a named pair (`mdnorm.design.DesignMatrices`): no sequence of batches."""
    return isinstance(values, Mapping) or getattr(values, "_fields", None) == ("metadata", "labels")


def _is_pair(values: Any, num_labels: int | None) -> bool:
    """Whether two arrays are metadata and labels, no batches of metadata; raise where that is open."""
    if not isinstance(values, (list, tuple)) or len(values) != 2 or not all(map(_is_array, values)):
        return False
    if num_labels is not None:
        return num_labels > 0
    if len(values[0]) != len(values[1]):
        return False
    raise ValueError(
        "metadata is a sequence of two arrays with the same number of rows, which may be metadata and labels "
        "or two batches: give the labels as the argument labels, or the batches joined to one table."
    )


def _refuse_rows(values: Any, num_metadata: int | None) -> None:
    """Raise where a list of 1-dimensional arrays may be the rows of a table."""
    if not isinstance(values, (list, tuple)) or not values or num_metadata == 1:
        return
    if not all(_is_array(row) and row.ndim == 1 for row in values):
        return
    lengths = {len(row) for row in values}
    if len(lengths) == 1 and lengths != {1}:
        raise ValueError(
            f"metadata is a sequence of {len(values)} 1-dimensional arrays of {lengths.pop()} values, which "
            "may be the rows of a table or batches of one column: join rows to one table (numpy.stack, "
            "torch.stack), or give batches as columns, (n, 1)."
        )


def _is_array(values: Any) -> bool:
    return isinstance(values, Tensor) or hasattr(values, "__array__")


def _is_number_table(values: list[Any] | tuple[Any, ...]) -> bool:
    first = values[0]
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, (bool, int, float))


# --------------------------------------------------------------------------------------------------------
# Coefficients: covariance of the design -> the operator Q with β = Q C
# --------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------


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


def _as_matrix(features: Tensor, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
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


def _gradient_matrix(grad: Tensor, positions: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reduce the features' gradient to that of the (N, D) matrix, summed over the positions."""
    return grad.to(dtype).sum(positions) if positions else _as_matrix(grad, (), dtype)


def _subtract_product(features: Tensor, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``matrix − left @ right`` in shape and dtype of the features, whose matrix (N, D) it is."""
    out = torch.addmm(matrix, left, right, alpha=-1)
    if features.ndim == 2 and features.dtype == out.dtype:
        return out
    return out.to(features.dtype).reshape(features.shape)


def _expand(matrix: Tensor, positions: tuple[int, ...]) -> Tensor:
    for dim in positions:
        matrix = matrix.unsqueeze(dim)
    return matrix


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
        return (features - _expand(basis @ coefficients, positions)).to(features.dtype)
    return _subtract_product(features, _as_matrix(features, (), basis.dtype), basis, coefficients)


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
            factor, centre = _expand(factor, positions), _expand(centre, positions)
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
        matrix = _as_matrix(features, positions, rows.dtype)
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
            matrix = _gradient_matrix(grad, positions, basis.dtype)
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
    basis, rows = _cast(basis, dtype), _cast(rows, dtype)
    if operator is not None:
        operator = _cast(operator, dtype)
    with full_precision(features.device):
        if torch.compiler.is_compiling() or is_transforming():
            return _TransformableRemoveRegression.apply(  # type: ignore[no-any-return, no-untyped-call]
                features, basis, operator, rows, positions
            )
        matrix = _as_matrix(features.detach(), positions, dtype)
        moments = rows @ matrix
        coefficients, projector = moments, rows
        if operator is not None:
            coefficients, projector = operator @ moments, operator @ rows
        out: Tensor = _RemoveRegression.apply(  # type: ignore[no-untyped-call]
            features, basis, coefficients, projector, positions, None, matrix
        )
    return out, moments


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # To ask is cheaper than a conversion of nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
            matrix = _gradient_matrix(grad, positions, basis.dtype)
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
        return (grad - _expand(projector.mT @ adjoint / max(sharing, 1), positions)).to(grad.dtype)
    return _subtract_product(grad, matrix, projector.mT, adjoint)


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
            matrix = _gradient_matrix(grad, positions, basis.dtype)
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
    adjoint.lerp_(_cast(batch, adjoint.dtype), ratio(count, total, adjoint.dtype))
    return _cast(adjoint, batch.dtype)


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
            _cast(basis, dtype),
            _cast(coefficients, dtype),
            _cast(projector, dtype),
            adjoint,
            weight,
            count,
            decay,
            positions,
            samples,
            group,
        )
    return out


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
        return _cast(rows.detach(), dtype) @ _as_matrix(features.detach(), positions, dtype)


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
    step = _cast(step, cross.dtype)
    if isinstance(share, Tensor):
        share = _cast(share, cross.dtype)
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


def check_floating(features: Tensor) -> None:
    """Raise TypeError where features are not a tensor of real floating-point numbers."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}.")
    if not features.is_floating_point():
        raise TypeError(f"features must have a floating-point dtype, got {features.dtype}.")
