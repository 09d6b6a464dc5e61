"""Columns as users list them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from mdnorm.design.formula import Factor, parse_factor, quoted

__all__ = ["column_or_factor", "in_order"]


def in_order(name: str, entries: Any) -> tuple[str, ...]:
    """Return a sequence of column names as a tuple; raise TypeError where it is none, or has no order."""
    if isinstance(entries, (Set, Mapping)):
        raise TypeError(
            f"{name} is a {type(entries).__name__}, whose order is not part of its meaning, but columns need "
            "one: give a list."
        )
    if not isinstance(entries, Iterable):
        raise TypeError(f"{name} must be a string or a list of column names, got {entries!r}.")
    return tuple(entries)


def column_or_factor(entry: str) -> Factor:
    """Return what an entry of a list means: a call such as ``C(site)``, otherwise the name of a column."""
    if not isinstance(entry, str):
        raise TypeError(f"columns must be given by name, got {entry!r} of type {type(entry).__name__}.")
    is_call = re.fullmatch(r"\w+\(.*\)", entry.strip(), re.DOTALL)
    return parse_factor(entry.strip() if is_call else quoted(entry))
