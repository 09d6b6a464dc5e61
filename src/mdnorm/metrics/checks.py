"""Checks of arguments that several measures share."""

from __future__ import annotations

from typing import Any

import numpy as np

from mdnorm.text import listed

__all__ = ["MIN_PERMUTATIONS", "check_confidence", "check_integer", "check_permutations", "listed"]

# With fewer, the smallest possible p-value is not below 0.05.
MIN_PERMUTATIONS = 20


def check_integer(name: str, value: Any, least: int) -> None:
    """Check an argument that counts something.

    Parameters
    ----------
    name : str
        Name of the argument, for the error message.
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


def check_permutations(value: Any, *, none_is_allowed: bool = False) -> None:
    """Check a number of permutations: enough for a p-value below 0.05, or, where that is allowed, none.

    Parameters
    ----------
    value : object
    none_is_allowed : bool

    Raises
    ------
    TypeError
        `value` is not an integer.
    ValueError
        It is below 20.
    """
    check_integer("num_permutations", value, 0 if none_is_allowed else 1)
    if value < MIN_PERMUTATIONS and not (none_is_allowed and value == 0):
        raise ValueError(
            f"num_permutations must be at least {MIN_PERMUTATIONS}, got {value}: the p-value of {value} "
            f"permutations is never below {1 / (1 + value):.2g}, so that nothing can be found at 0.05"
            + (", or 0 for no p-value." if none_is_allowed else ".")
        )


def check_confidence(value: Any) -> None:
    """Check the confidence of an interval.

    Parameters
    ----------
    value : object

    Raises
    ------
    TypeError
        It is not a number.
    ValueError
        It is not between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"confidence must be a number, got {value!r}.")
    if not 0 < value < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {value}: for example 0.95.")
