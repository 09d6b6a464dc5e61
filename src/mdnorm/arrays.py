"""Arrays of users to tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def as_real_tensor(values: Tensor | ArrayLike, name: str) -> Tensor:
    """Return a tensor as it is, or a copy of an array (a list, a DataFrame) as a CPU tensor.

    Parameters
    ----------
    values : tensor or array
        Of any real dtype, booleans included.
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
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} must be real and numeric, got an array of dtype {array.dtype}: encode categories as "
            "columns (one-hot) first."
        )
    # A copy in native byte order: tensors cannot share read-only, byte-swapped or negatively strided memory.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
