"""What the measures share in checking their arguments, and in saying what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["check_integer", "listed"]


def check_integer(name: str, value: Any, least: int) -> None:
    """Check an argument that counts something.

    Parameters
    ----------
    name : str
        Of the argument, for the error message.
    value : object
    least : int
        The smallest value allowed.

    Raises
    ------
    TypeError
        `value` is not an integer.
    ValueError
        It is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def listed(values: Iterable[Any], limit: int = 5) -> str:
    """Return the first few of `values` for an error message."""
    items = [repr(value) for value in values]
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")
