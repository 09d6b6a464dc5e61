"""Names and tables as text, for messages and for reports that are printed; warnings."""

from __future__ import annotations

import sys
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

# What stands between a user's line and the code that warns.
_INSIDE = ("mdnorm", "torch", "sklearn", "lightning", "transformers")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line of the user from which the package was called, however many calls lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def listed(values: Iterable[Any], limit: int = 5) -> str:
    """Return the first few of `values` for a message: ``'a', 'b', …``."""
    items = [repr(value) for value in values]
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")


def short(text: str, longest: int = 40) -> str:
    """Return a text, cut to its first letters where it does not fit into a table or a figure."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Return a line for each row of cells (all of the same length), with the columns below each other.

    Line breaks and whatever else does not print are shown as their escapes.

    Examples
    --------
    >>> print(*aligned([("name", "rows"), ("the\nfirst", "3")]), sep="\n")
    name        rows
    the\nfirst  3
    """
    table = [
        ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in cell) for cell in row] for row in rows
    ]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return lines


def _width(text: str) -> int:
    """Return how many places a terminal gives a text: two to an East Asian letter, none to an accent."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "FW") for c in text)
