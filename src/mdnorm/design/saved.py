"""Reading saved JSON as data that may be anything: every value is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def read(state: Mapping[str, Any], key: str, type_: type[T]) -> T:
    """Return ``state[key]``; ValueError where it is not there, or not of the type."""
    if key not in state:
        raise ValueError(f"it has no {key!r}")
    value = state[key]
    if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
        raise ValueError(f"its {key!r} is {type(value).__name__}, not {type_.__name__}")
    return value


def numbers_in(state: Mapping[str, Any], key: str) -> list[float]:
    """Return ``state[key]``; ValueError where it is no list of finite numbers."""
    values = read(state, key, list)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"its {key!r} has a value that is not a finite number")
    return [float(value) for value in values]
