"""The design of a batch about a mean: the matrices that its features are multiplied by.

They are small, N×K numbers, so on the CPU the calls take the time and not the arithmetic. `centred_design`
therefore computes them in NumPy, whose calls cost a fraction of torch's, wherever the values can be read; on
a GPU, while a graph is traced and in the transforms of `torch.func` it computes the same in torch.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.functional import Gram
from mdnorm.weights import can_leave_torch, product, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CentredDesign", "centred_design", "silent_as_torch"]

# With more numbers the arithmetic takes the time, and torch spreads it over its threads.
_MOST_IN_NUMPY = 2**16

_NUMPY_DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def silent_as_torch() -> AbstractContextManager[Any]:
    """Return a context for a training step, in which NumPy says as little of an overflow as torch does."""
    # One for the step: entering it costs as much as a product.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else np.errstate(all="ignore")


def centred_design(columns: Tensor, num_metadata: int, mean: Tensor | None = None) -> CentredDesign:
    """Return the design of a batch about a mean, in whichever way is the quicker one.

    Parameters
    ----------
    columns : (N, K) tensor
        Design columns [m, y], see `mdnorm.functional.design_columns`.
    num_metadata : int
        K_m: the first columns are metadata.
    mean : (K,) tensor, optional
        None: that of the batch.
    """
    if columns.numel() <= _MOST_IN_NUMPY and columns.dtype == torch.float64 and can_leave_torch(columns):
        return _ArrayDesign(columns.numpy(force=True).T, num_metadata, mean)
    return CentredDesign(columns, num_metadata, mean)


class CentredDesign:
    """Design columns of a batch about a mean.

    Parameters
    ----------
    columns, num_metadata, mean
        See `centred_design`.

    Attributes
    ----------
    gram : Gram
        Of the batch. Only where no mean was given.
    """

    gram: Gram

    def __init__(self, columns: Tensor, num_metadata: int, mean: Tensor | None = None) -> None:
        self._columns = columns
        self._num_metadata = num_metadata
        if mean is None:
            self.gram = Gram.from_columns(columns, num_metadata)
            mean = self.gram.mean
        self._mean = mean

    def about(self, mean: Tensor) -> CentredDesign:
        """Return the same columns about another mean."""
        return CentredDesign(self._columns, self._num_metadata, mean)

    def basis(self, center: bool, dtype: torch.dtype) -> Tensor:
        """Return the columns that multiply the removed coefficients, (N, R): `functional.effect_basis`."""
        width = self._num_metadata
        return functional.effect_basis(self._columns[:, :width], self._mean[:width], center).to(dtype)

    def moment_rows(self, dtype: torch.dtype) -> Tensor:
        """Return the rows that take features to their moments, (K + 1, N): `functional.moment_rows`."""
        return functional.moment_rows(self._columns, self._mean).to(dtype)

    def projected_rows(self, operator: Tensor, dtype: torch.dtype, count: Tensor | None = None) -> Tensor:
        """Return `operator` (R, K + 1) times the moment rows, (R, N): `functional.projected_rows`."""
        return functional.projected_rows(operator, self._columns, self._mean, count).to(dtype)


class _ArrayDesign(CentredDesign):
    """The same in NumPy; the columns are rows here, (K, N), each in one piece."""

    def __init__(self, columns: NDArray[Any], num_metadata: int, mean: Tensor | None = None) -> None:
        self._array = columns
        self._num_metadata = num_metadata
        self._divisor = max(columns.shape[1], 1)
        if mean is not None:
            self._centred = columns - mean.numpy(force=True)[:, None]
            return
        own = np.add.reduce(columns, 1)
        own /= self._divisor
        self._centred = centred = columns - own[:, None]
        covariance = product(centred, centred.T)
        covariance /= self._divisor
        count = np.array([columns.shape[1]], columns.dtype)
        self.gram = Gram(
            torch.from_numpy(own), torch.from_numpy(covariance), torch.from_numpy(count), num_metadata
        )

    def about(self, mean: Tensor) -> CentredDesign:
        return _ArrayDesign(self._array, self._num_metadata, mean)

    def basis(self, center: bool, dtype: torch.dtype) -> Tensor:
        width, num_samples = self._num_metadata, self._centred.shape[1]
        basis = np.empty((width + center, num_samples), _NUMPY_DTYPES[dtype])
        basis[:width] = self._centred[:width]
        if center:
            basis[width:] = 1
        return torch.from_numpy(basis.T)

    def moment_rows(self, dtype: torch.dtype) -> Tensor:
        width, num_samples = self._centred.shape
        rows = np.empty((width + 1, num_samples), _NUMPY_DTYPES[dtype])
        np.divide(self._centred, self._divisor, out=rows[:-1], casting="same_kind")
        rows[-1] = 1 / self._divisor
        return torch.from_numpy(rows)

    def projected_rows(self, operator: Tensor, dtype: torch.dtype, count: Tensor | None = None) -> Tensor:
        divisor = self._divisor if count is None else max(float(read(count)), 1.0)
        scaled = operator.numpy(force=True) / divisor
        rows = product(scaled[:, :-1], self._centred)
        if operator.shape[0] > self._num_metadata:
            rows += scaled[:, -1:]
        return torch.from_numpy(rows.astype(_NUMPY_DTYPES[dtype], copy=False))
