"""The Gram matrix of the design: of a batch, of a training set, running."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdnorm.functional.columns import design_columns
from mdnorm.weights import at_least, read, write_

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mdnorm.weights import Weight

__all__ = [
    "Gram",
    "NoSamplesError",
]


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
