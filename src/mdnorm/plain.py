"""Results as plain values, for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def as_plain(value: Any) -> Any:
    """Return what JSON can hold: dataclasses as dictionaries, arrays as lists, NaN and infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: as_plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): as_plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return as_plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PlainResult:
    """A dataclass of results that `to_dict` turns into plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold; undefined numbers are None."""
        plain: dict[str, Any] = as_plain(self)
        return plain
