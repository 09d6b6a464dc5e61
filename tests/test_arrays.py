"""Arrays and DataFrames of every kind of numbers; what is not numeric is named."""

from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import mdnorm
from mdnorm.arrays import as_real_tensor

AGES = [20.5, 30.0, 40.25]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pd.DataFrame({"age": AGES, "sick": [True, False, True]}), torch.float64),
        (pd.DataFrame({"count": pd.array([1, 2, 3], "Int64"), "age": AGES}), torch.float64),
        (pd.DataFrame({"count": pd.array([1, 2, 3], "Int64"), "sick": [True, False, True]}), torch.int64),
        (pd.DataFrame({"a": pd.array([True, False, True], "boolean"), "b": [True, True, False]}), torch.bool),
        (pd.DataFrame({"age": AGES, "dose": [Decimal("0.5"), Decimal(1), Decimal(2)]}), torch.float64),
        (pl.DataFrame({"age": AGES, "sick": [True, False, True]}), torch.float64),
        ([[1, 2.5], [Decimal(3), 4]], torch.float64),
        ([2**70, 1], torch.float64),
    ],
)
def test_numbers_of_several_types(table, expected):
    tensor = as_real_tensor(table, "metadata")
    assert tensor.dtype == expected
    rows = table.to_numpy().tolist() if hasattr(table, "to_numpy") else table
    assert tensor.double().tolist() == np.array(rows, dtype=np.float64).tolist()


def test_missing_values_are_named_by_who_looks_at_them():
    table = pd.DataFrame({"count": pd.array([1, None, 3], "Int64"), "age": AGES})
    tensor = as_real_tensor(table, "metadata")
    assert tensor.isnan().nonzero().tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"metadata has NaN or infinite values in column\(s\) \[0\]"):
        mdnorm.MetadataNorm(2, 2)(torch.randn(3, 2), table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"age": AGES, "site": list("abc")}), r"the column\(s\) 'site' are not: encode categ"),
        (pd.DataFrame({"age": AGES, 3: pd.Categorical(list("aba"))}), r"the column\(s\) 3 are not"),
        (pl.DataFrame({"age": AGES, "site": list("abc")}), r"the column\(s\) 'site' are not"),
        (
            pd.DataFrame({"sex": list("mfm"), "day": [pd.Timestamp(0)] * 3}),
            r"the column\(s\) 'sex', 'day' are",
        ),
        (np.array([None, None]), "got an array of dtype object: encode"),
        (np.array(["a", "b"]), "got an array of dtype <U1: encode"),
        ([1 + 2j], "got an array of dtype complex128"),
    ],
)
def test_what_is_not_numeric_is_named(table, message):
    with pytest.raises(TypeError, match=f"metadata must be real and numeric, (but )?{message}"):
        as_real_tensor(table, "metadata")
