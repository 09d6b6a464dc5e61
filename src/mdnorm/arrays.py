"""Arrays of users to tensors."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["as_real_array", "as_real_tensor"]


def as_real_tensor(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Return a tensor as it is, or a copy of an array (a list, a DataFrame) as a CPU tensor.

    Parameters
    ----------
    values : tensor or array
        Of any real dtype, booleans included. The columns of a DataFrame may have different ones; see
        `as_real_array`.
    name : str
        Of the argument, for the error message.

    Raises
    ------
    TypeError
        None, complex or not numeric.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(
                f"{name} must be real, got dtype {values.dtype}: pass its real and imaginary part as columns."
            )
        return values
    if values is None:
        raise TypeError(f"{name} must be a tensor or an array, got None.")
    array = as_real_array(values, name)
    # A copy in native byte order: tensors cannot share read-only, byte-swapped or negatively strided memory.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def as_real_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return an array of real numbers.

    Parameters
    ----------
    values : array
        An array, a list or a DataFrame. Where its columns are of several types, or of types with a value of
        their own for what is missing (``Int64``, ``boolean``), numpy makes Python objects of them: these are
        taken as the numbers that they are, as int64 or, with fractions or gaps (NaN), float64.
    name : str
        Of the argument, for the error message.

    Returns
    -------
    array
        Of a boolean, integer or floating-point dtype.

    Raises
    ------
    TypeError
        Complex or not numeric; the message names the columns of a DataFrame that are not.
    """
    array = np.asarray(values)
    wrong: list[Any] = []
    if array.dtype.kind == "O":
        # DataFrames of pandas and of polars; the columns of other tables have no names there.
        columns = list(getattr(values, "columns", ())) if hasattr(values, "dtypes") else []
        if array.ndim == 2 and len(columns) == array.shape[1]:
            wrong = [name for name, column in zip(columns, array.T, strict=True) if not _is_numeric(column)]
        if not wrong and _is_numeric(array):
            array = _as_numbers(array)
    if array.dtype.kind not in "biuf":
        what = f"got an array of dtype {array.dtype}"
        if wrong:
            shown = ", ".join(map(repr, wrong[:5])) + (", …" if len(wrong) > 5 else "")
            what = f"but the column(s) {shown} are not"
        raise TypeError(
            f"{name} must be real and numeric, {what}: encode categories as columns (one-hot) first, or let "
            "mdnorm.Design do so."
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
    kinds = set(map(type, entries))
    if all(map(_is_missing, kinds)):
        return array
    if all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        return array.astype(bool)
    if all(issubclass(kind, (numbers.Integral, np.bool_)) for kind in kinds):
        try:
            return array.astype(np.int64)
        except OverflowError:
            return array.astype(np.float64)
    floats = [float("nan") if _is_missing(type(entry)) else float(entry) for entry in entries]
    return np.array(floats, dtype=np.float64).reshape(array.shape)
