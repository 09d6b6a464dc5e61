"""Whether the columns of a table are such as a design can use; errors name rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mdnorm.design.reader import Column, shown_rows

if TYPE_CHECKING:
    from mdnorm.design.matrices import Design


def check_kinds(columns: Mapping[str, Column], kinds: Mapping[str, str]) -> None:
    """Raise a TypeError where a column is of another kind than in training."""
    for name, column in columns.items():
        trained = kinds[name]
        # A category of numbers is compared by value whatever the numeric type; 0/1 stand for booleans.
        same = {trained, column.kind} <= {"number", "boolean"} or trained == column.kind
        if not same and column.kind != "empty":
            example = column.examples(~column.missing)[0]
            raise TypeError(
                f"column {name!r} had values of kind {trained} in training and now has {column.kind}s, "
                f"{example!r} for example: convert it."
            )


def check_missing(design: Design, columns: Mapping[str, Column]) -> None:
    """Raise a ValueError where values are missing that the design cannot do without, or infinite."""
    label_variables = {name for factor in design._label_factors for name in factor.variables}
    incomplete = {name: column for name, column in columns.items() if column.missing.any()}
    for name, column in incomplete.items():
        if name in label_variables:
            otherwise = ", or pass labels=False" if design._is_fitted else ""
            raise ValueError(
                f"label {name!r} is missing in {shown_rows(column.missing)}: drop these rows (and their "
                f"samples){otherwise}."
            )
    if design.missing == "error" and incomplete:
        where = "; ".join(f"{name!r} in {shown_rows(column.missing)}" for name, column in incomplete.items())
        raise ValueError(
            f"metadata are missing: {where}. Drop or fill these rows, or say "
            'missing="mean" (no correction beyond the average) or missing="indicator".'
        )
    if design.missing == "indicator" and design._is_fitted:
        for name, column in incomplete.items():
            if name not in design._terms.indicators:
                raise ValueError(
                    f"metadata are missing: {name!r} in {shown_rows(column.missing)}. It had no missing "
                    'values in training, so that there is no indicator for it; missing="mean" needs none.'
                )
    for name, column in columns.items():
        if column.values.dtype.kind == "f":
            infinite = np.isinf(column.values) & ~column.missing
            if infinite.any():
                raise ValueError(
                    f"column {name!r} has infinite values in {shown_rows(infinite)}: correct them, or "
                    "make them missing."
                )


def check_fits(matrix: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError where a value is too large for the dtype of the result."""
    bad = ~torch.isfinite(matrix)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"column {names[column]!r} is too large for {matrix.dtype} in row {row}: correct the value, or "
            "pass dtype=torch.float64."
        )
