"""Columns of text that were meant as numbers: one odd cell among them makes texts of all."""

from __future__ import annotations

import re

import numpy as np

from mdnorm.design.reader import Column

__all__ = ["FEW_NUMBERS", "NUMBER", "odd_cell", "odd_cell_text"]

NUMBER = re.compile(r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")
"""A text that is a number."""

FEW_NUMBERS = 10
"""A column of text with more different numbers than this is one of numbers, whatever else is in it."""


def odd_cell(column: Column) -> str | None:
    """Return what is wrong with a column of text most of whose values are numbers; None for all others.

    One odd cell ("?", "58,2") among numbers makes texts of all of them, and the column would silently become
    a category. Few different numbers may be names, such as the stages 1, 2, 3a and 3b.
    """
    if column.kind != "string" or column.distinct is None:
        return None
    counts = np.bincount(column.values[~column.missing], minlength=len(column.distinct))
    found = {index: str(value) for index, value in enumerate(column.distinct) if counts[index]}
    odd, numbers = [], []
    for index, text in found.items():
        if NUMBER.match(text):
            numbers.append(text)
        else:
            odd.append(index)
    num_odd = int(counts[odd].sum())
    if not odd or len(numbers) <= FEW_NUMBERS or 2 * num_odd >= counts.sum():
        return None
    if counts.max() == 1 and len(found) >= 20 and not any("." in text for text in numbers):
        return None  # Names of the rows, such as 17 and S18.
    row = int(np.flatnonzero((column.values == odd[0]) & ~column.missing)[0])
    return odd_cell_text(column.name, found[odd[0]], row, num_odd, int(counts.sum()))


def odd_cell_text(name: str, value: str, row: int, num_odd: int, num_present: int) -> str:
    """Return the sentence on an odd cell, the first of `num_odd` among the values that are there."""
    where = f"row {row} (counted from 0; {num_odd} of {num_present} values are no numbers)"
    return f"column {name!r} has numbers, but {value!r} in {where}"
