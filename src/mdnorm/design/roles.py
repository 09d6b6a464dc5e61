"""What a column is likely to be: a measure, a code, an identifier, numbers with stand-ins or an odd cell."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.reader import Column

# Whole numbers with no more different values than this are codes, and every value has two rows on average.
_MAX_CODES = 10

# Of a category with many levels there are at most so many, with so many rows each on average.
_MAX_LEVELS = 100
_ROWS_OF_A_LEVEL = 5

# As many rows are needed to say that a column names them, and this share of different values.
_LEAST_ROWS = 20
_NEARLY_ALL = 0.95

# How often a number stands for a missing value at least.
_LEAST_STAND_INS = 3

# A text that is a number.
NUMBER = re.compile(r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")

# A column of text with more different numbers than this is one of numbers, whatever else is in it.
FEW_NUMBERS = 10


class TableWarning(UserWarning):
    """Something in a table is probably not what it seems; the message says which column and what to do."""


def is_code(values: NDArray[np.float64]) -> bool:
    """Whether numbers, all of them present, are few whole ones: codes of a category."""
    whole = np.array_equal(values, np.round(values))
    return whole and len(np.unique(values)) <= min(_MAX_CODES, len(values) // 2)


def may_be_codes(distinct: NDArray[np.float64], num_rows: int) -> bool:
    """Whether the different values of a column of numbers may be codes of a category with many levels.

    They are whole, at most 100, and have five rows each on average. So are ages in years: nobody but the user
    can tell.
    """
    few = len(distinct) <= min(_MAX_LEVELS, num_rows // _ROWS_OF_A_LEVEL)
    return few and np.array_equal(distinct, np.round(distinct))


def why_no_feature(column: Column) -> str | None:
    """Return why a column is no feature unless someone names it; None: it is one.

    Features are measures: numbers that are neither codes nor identifiers.
    """
    if column.kind == "empty":
        return "no values"
    if column.kind != "number" or column.categorical:
        return {"date": "dates", "boolean": "true and false"}.get(column.kind, "text")
    values = column.as_float()[~column.missing]
    if is_code(values):
        count = len(np.unique(values))
        return f"codes: {count} different whole number{'s' if count > 1 else ''}"
    if len(values) < _LEAST_ROWS or not np.array_equal(values, np.round(values)):
        return None
    number = len(np.unique(column.values[~column.missing]))
    if number < _NEARLY_ALL * len(values):
        return None
    return f"like an identifier: {number} different whole numbers in {len(values)} rows"


def stand_ins(values: NDArray[np.float64]) -> list[float]:
    """Return numbers such as −9999 or 999 that seem to stand for a missing value among finite values (n,).

    They are made of nines only (at least two, or one where it is negative), are the smallest or the largest,
    occur three times or more, and are further from the other values than these are from each other (and
    than half of the largest of them), or negative where no other value is.
    """
    found: list[float] = []
    if not len(values) or not any(_is_nines(float(end)) for end in (values.min(), values.max())):
        return found
    for _ in range(2):
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) < 3:
            break
        for end, others in ((0, distinct[1:]), (-1, distinct[:-1])):
            value = float(distinct[end])
            distance = float(np.abs(others - value).min())
            is_apart = distance > max(np.ptp(others), 0.5 * float(np.abs(others).max()))
            is_apart |= value < 0 <= others[0]
            if _is_nines(value) and counts[end] >= _LEAST_STAND_INS and is_apart:
                found.append(value)
                values = values[values != value]
                break
    return found


def _is_nines(value: float) -> bool:
    return re.fullmatch(r"-9+|9{2,}", f"{value:.15g}") is not None


def stand_in_warning(column: Column) -> str | None:
    """Return a sentence where numbers of a column seem to stand for missing values; otherwise None."""
    if column.kind != "number" or column.categorical:
        return None
    values = column.as_float()[~column.missing]
    values = values[np.isfinite(values)]
    found = stand_ins(values)
    if not found:
        return None
    numbers = " and ".join(f"{value:g} in {int((values == value).sum())} row(s)" for value in found)
    return (
        f"column {column.name!r} has {numbers}, far from all other values, which probably stands for missing "
        "values: if so, replace it by NaN."
    )


def code_warning(column: Column, role: str) -> str | None:
    """Return a sentence where integers, which count as a measure, may be codes of a category, or None."""
    if column.kind != "number" or column.categorical or column.values.dtype.kind not in "iu":
        return None
    values = column.as_float()[~column.missing]
    count = len(np.unique(values))
    if count < 3 or not is_code(values):
        return None
    return (
        f"{role} {column.name!r} has {count} different integers, which count as a measure: write "
        f"C({column.name}) where they are codes of a category, or make them floats where they are none."
    )


def level_warning(column: Column) -> str | None:
    """Return a sentence where nearly every row has a text of its own, and so a column; otherwise None."""
    num_rows = int((~column.missing).sum())
    if column.kind != "string" or column.declared or num_rows < _LEAST_ROWS:
        return None
    num_levels = len(column.levels())
    if num_levels < _NEARLY_ALL * num_rows:
        return None
    return (
        f"column {column.name!r} has {num_levels} different texts in {num_rows} rows, such as "
        f"{column.levels()[0]!r}, and each becomes an indicator of its own: convert dates and numbers, group "
        "the texts, or leave the column out where it names the rows."
    )


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
