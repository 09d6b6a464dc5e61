"""Checks of arguments that several measures share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

# With fewer, the smallest possible p-value is not below 0.05.
MIN_PERMUTATIONS = 20


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise TypeError where an argument is no integer, ValueError where it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_permutations(value: Any, *, none_is_allowed: bool = False) -> None:
    """Check a number of permutations: enough for a p-value below 0.05, or, where that is allowed, none."""
    check_integer("num_permutations", value, 0 if none_is_allowed else 1)
    if value < MIN_PERMUTATIONS and not (none_is_allowed and value == 0):
        raise ValueError(
            f"num_permutations must be at least {MIN_PERMUTATIONS}, got {value}: the p-value of {value} "
            f"permutations is never below {1 / (1 + value):.2g}, so that nothing can be found at 0.05"
            + (". Pass more, or 0 for no p-value." if none_is_allowed else ".")
        )


def check_confidence(value: Any) -> None:
    """Raise TypeError or ValueError where the confidence of an interval is no number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"confidence must be a number, got {value!r}.")
    if not 0 < value < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {value}: for example 0.95.")


def check_same_rows(**counts: int) -> None:
    """Raise ValueError where arguments, by name, differ in their numbers of rows."""
    if len(set(counts.values())) > 1:
        first, *rest = counts
        named = [f"{counts[first]} rows in {first}", *(f"{counts[name]} in {name}" for name in rest)]
        raise ValueError(
            f"{joined(counts)} must have one row per sample each, got {joined(named)}: pass the same samples "
            "in the same order."
        )


def joined(words: Iterable[str]) -> str:
    """Return words as a sentence lists them: ``x, y and z``."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
