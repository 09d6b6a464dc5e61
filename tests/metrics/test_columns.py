"""Columns of users to arrays and classes: kinds of input, the order of classes, missing values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdnorm.metrics.columns import as_categories, as_column
from mdnorm.text import listed


@given(st.lists(st.one_of(st.integers(-3, 3)), min_size=1, max_size=30), st.booleans())
def test_codes_point_to_the_names_in_their_order(values: list[int], text: bool) -> None:
    column = [f"class {value}" for value in values] if text else values
    result = as_categories(column, "target")
    assert [result.names[code] for code in result.codes] == column
    assert list(result.names) == sorted(set(column))
    assert result.counts.tolist() == [column.count(name) for name in result.names]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=20), st.permutations("abcde"))
def test_categoricals_keep_their_order_without_unused_classes(values: list[str], order: list[str]) -> None:
    column = pd.Categorical(values, categories=order)
    for categories in (column, pd.Series(column)):
        result = as_categories(categories, "groups")
        assert list(result.names) == [name for name in order if name in values]
        assert [result.names[code] for code in result.codes] == values


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 1],
        np.array([[1], [2], [1]]),
        torch.tensor([1, 2, 1]),
        pd.Series([1, 2, 1], index=[7, 8, 9]),
        pd.Series([1, 2, 1], dtype="Int64"),
        pl.Series([1, 2, 1]),
        np.array([1, 2, 1], dtype=object),
    ],
)
def test_whole_numbers_of_every_kind(values: Any) -> None:
    result = as_categories(values, "labels")
    assert result.names == (1, 2)
    assert result.codes.tolist() == [0, 1, 0]
    assert as_column(values, "labels").tolist() == [1, 2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_tensors_of_every_float(dtype: torch.dtype) -> None:
    column = as_column(torch.tensor([0.5, 2.0], dtype=dtype, requires_grad=True), "target")
    assert column.tolist() == [0.5, 2.0]


def test_names_are_python_scalars() -> None:
    for values in (np.array([True, False]), np.array([2, 1], dtype=np.int8), np.array(["b", "a"])):
        assert all(type(name) in (bool, int, str) for name in as_categories(values, "labels").names)


def test_the_input_is_not_changed() -> None:
    values = np.array([True, False], dtype=object)
    assert as_column(values, "labels").dtype == bool
    assert values.dtype == object


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, TypeError, "labels must be a column with one value per row, got None"),
        ([], ValueError, "labels has no rows"),
        (3, ValueError, r"labels must have shape \(n,\).* got \(\)"),
        (np.zeros((3, 2)), ValueError, r"labels must have shape \(n,\).* got \(3, 2\)"),
        (
            [1.0, np.nan, np.inf],
            ValueError,
            r"labels has missing or infinite .* row\(s\) 1, 2 \(2 of 3 rows\)",
        ),
        (pd.Series([1, None], dtype="Int64"), ValueError, r"row\(s\) 1"),
        (pd.Categorical(["a", None]), ValueError, r"row\(s\) 1"),
        (["a", None], ValueError, r"row\(s\) 1"),
        ([1j], TypeError, "values of type complex"),
        (pd.Series(pd.to_datetime(["2020-01-01"])), TypeError, "days since the first"),
        (np.array([1, "a"], dtype=object), TypeError, r"'labels' mixes numbers \(1\) and strings"),
    ],
)
def test_errors_name_the_argument(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_categories(values, "labels")


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(range(9), 3) == "0, 1, 2, …"
