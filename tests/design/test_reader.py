"""One column, one answer: what the reader takes a column of any table for."""

import datetime
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from mdnorm.arrays import check_same_order
from mdnorm.design import Design, TableWarning
from mdnorm.design.reader import read_column, read_columns, read_table
from mdnorm.design.roles import odd_cell, why_no_feature

N = 40


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 2, None], "number", [1, 2, np.nan]),
        (np.array([1, 2.5, None], dtype=object), "number", [1, 2.5, np.nan]),
        ([Decimal("0.5"), Decimal(2)], "number", [0.5, 2]),
        (torch.tensor([1.5, 2], dtype=torch.bfloat16), "number", [1.5, 2]),
        (pd.Series([1, None], dtype="Int64"), "number", [1, np.nan]),
        (pd.Series([1.5, None], dtype="double[pyarrow]"), "number", [1.5, np.nan]),
        (pa.chunked_array([[1], [None]]), "number", [1, np.nan]),
        (pl.Series([1, None], dtype=pl.UInt8), "number", [1, np.nan]),
        (pd.Series([True, False]), "boolean", [1, 0]),
        ([datetime.date(1970, 1, 3), None], "date", [2, np.nan]),
        (np.array(["1970-01-03T12", "NaT"], "M8[h]"), "date", [2.5, np.nan]),
        (pd.Series(pd.to_timedelta(["36h", None])), "number", [1.5, np.nan]),
        (pl.Series([datetime.timedelta(hours=36)]), "number", [1.5]),
        ([None, float("nan")], "empty", [np.nan, np.nan]),
    ],
    ids=str,
)
def test_numbers_dates_and_booleans(values: Any, kind: str, expected: list[float]) -> None:
    column = read_column("x", values)
    assert column.kind == kind
    np.testing.assert_array_equal(column.as_float(), expected)


@pytest.mark.parametrize(
    "values",
    [
        ["b", "a", None, "a", " "],
        np.array(["b", "a", None, "a", ""], dtype=object),
        pd.Series(["b", "a", None, "a", ""]),
        pd.Series(["b", "a", None, "a", None], dtype="category"),
        pd.Series(["b", "a", None, "a", None], dtype="string[pyarrow]"),
        pd.Categorical(["b", "a", None, "a", None], categories=["z", "b", "a"]),
        pl.Series(["b", "a", None, "a", None]),
        pl.Series(["b", "a", None, "a", None], dtype=pl.Categorical),
        pa.chunked_array([["b", "a"], [None, "a", ""]]),
        pa.chunked_array([pa.array(["b", "a", None, "a", None]).dictionary_encode()]),
    ],
    ids=lambda values: type(values).__name__,
)
def test_texts_have_the_levels_that_rows_have(values: Any) -> None:
    column = read_column("x", values)
    assert (column.kind, column.categorical, column.levels()) == ("string", True, ("a", "b"))
    assert column.codes(column.levels()).tolist() == [1, 0, -1, 0, -1]


def test_orders_intervals_and_names_that_are_no_numbers() -> None:
    order = ["low", "mid", "high", "never"]
    for values in (
        pd.Series(pd.Categorical(["high", "low", "mid"], order, ordered=True)),
        pl.Series(["high", "low", "mid"], dtype=pl.Enum(order)),
    ):
        column = read_column("x", values)
        assert column.levels() == ("low", "mid", "high")
        assert column.with_declared().levels() == tuple(order)
    cut = pd.cut(pd.Series([1, 5, 9, 5]), [0, 3, 6, 10])
    assert read_column("x", cut).levels() == ("(0, 3]", "(3, 6]", "(6, 10]")
    ids = [uuid.UUID(int=2**100 + i) for i in range(2)]
    assert read_column("x", ids).levels() == tuple(map(str, ids))
    assert read_column("x", [2**70, 2**70 + 1]).levels() == (str(2**70), str(2**70 + 1))
    assert read_column("x", [2**53, 2**53 + 1]).levels() == (2**53, 2**53 + 1)
    assert read_column("x", np.array([3, 1]).astype(float)).as_category().levels() == (1, 3)


def test_tables_of_every_kind_have_names() -> None:
    matrix = np.arange(6.0).reshape(3, 2)
    for table in (matrix, matrix.tolist(), torch.from_numpy(matrix), matrix.astype(object)):
        columns = read_table(table)
        assert list(columns) == ["m0", "m1"]
        np.testing.assert_array_equal(columns["m1"].as_float(), matrix[:, 1])
    assert list(read_table([["a", 1], ["b", 2]])) == ["m0", "m1"]
    assert list(read_table(pd.Series([1, 2], name="age"))) == ["age"]
    assert list(read_table(np.arange(3), single="metadata")) == ["metadata"]
    assert list(read_table(pd.DataFrame(matrix))) == ["0", "1"]
    twice = pd.DataFrame(matrix, columns=["a", "a"]).assign(b=1.5)
    assert list(read_columns(twice, ["b"])[0]) == ["b"]
    for fails in (lambda: read_columns(twice, ["a"]), lambda: read_table(twice)):
        with pytest.raises(ValueError, match="more than one column of the name 'a'"):
            fails()
    odd = pd.DataFrame({"compute": [1, 2], "to_series": [3, 4], "column_names": [5, 6]})
    assert list(read_table(odd)) == list(read_columns(odd, odd.columns)[0]) == list(odd)
    with pytest.raises(ValueError, match="same number of rows, got 'a': 2, 'b': 1"):
        read_table({"a": [1, 2], "b": [1]})
    with pytest.raises(TypeError, match=r"'x' mixes numbers .* and strings"):
        read_column("x", [1, "a"])


def test_a_table_of_many_columns_is_read_in_seconds() -> None:
    """Not in time that grows with the square of their number: minutes."""
    column = read_column("age", [1.0, 2.0])
    table = {f"c{index}": column for index in range(50_000)}
    assert len(read_columns(table, table)[0]) == len(read_table(table)) == len(table)


def _ages(odd: dict[int, Any]) -> list[Any]:
    ages = [f"{age:.1f}" for age in np.random.default_rng(0).uniform(20, 80, N)]
    return [odd.get(row, age) for row, age in enumerate(ages)]


@pytest.mark.parametrize("cell", ["?", ".", "58,2", "#NAME?", "unknown"])
def test_an_odd_cell_makes_no_category(cell: str) -> None:
    """As after pandas.read_csv, which makes texts of the whole column."""
    message = rf"'age' has numbers, but .* in row 7 \(counted from 0; 1 of {N} values.*C\(age\)"
    for table in (pd.DataFrame({"age": _ages({7: cell})}), {"age": _ages({7: cell})}):
        with pytest.raises(ValueError, match=message):
            Design("age").fit(table)
    with pytest.warns(TableWarning, match=f"'age' has {N} different texts in {N} rows"):
        assert Design("C(age)").fit({"age": _ages({7: cell})}).num_metadata == N - 1


def test_names_of_which_many_are_numbers_are_no_odd_cells() -> None:
    for values in (["1", "2", "3a", "3b"] * 10, [f"S{i}" if i % 9 == 0 else str(i) for i in range(N)]):
        assert odd_cell(read_column("x", values)) is None
    assert odd_cell(read_column("x", _ages({}))) is None


def test_numbers_that_stand_for_missing_values_warn() -> None:
    age = np.random.default_rng(0).uniform(20, 80, N)
    age[:4] = -9999
    with pytest.warns(TableWarning, match=r"'age' has -9999 in 4 row\(s\), far from all other values"):
        Design("age").fit({"age": age})


def test_texts_of_which_nearly_every_row_has_its_own_warn_at_the_line_of_the_user() -> None:
    dates = pd.date_range("2020-01-01", periods=N).strftime("%d.%m.%Y")
    for texts, num_texts in ((dates, N), ([*dates[:-2], dates[0], dates[1]], N - 2)):
        with pytest.warns(
            TableWarning, match=f"'scan' has {num_texts} different texts in {N} rows"
        ) as caught:
            design = Design("scan").fit({"scan": list(texts)})
        assert caught[0].filename == __file__
        assert design.num_metadata == pd.get_dummies(pd.Series(texts), drop_first=True).shape[1]
    for quiet in (
        list(dates[:-3]) + list(dates[:3]),  # 37 texts in 40 rows
        list(dates[:19]),  # too few rows
        pd.to_datetime(dates, format="%d.%m.%Y"),
        pd.Categorical(dates),
    ):
        Design("scan").fit({"scan": quiet})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.arange(N) + 1000, "like an identifier: 40 different whole numbers in 40 rows"),
        (np.arange(N) + 1000.0, "like an identifier: 40 different whole numbers in 40 rows"),
        (np.arange(N) % 2, "codes: 2 different whole numbers"),
        (np.full(N, 3), "codes: 1 different whole number"),
        (np.linspace(0, 1, N), None),
        (np.random.default_rng(0).integers(0, 25, N), None),
        (np.arange(5), None),
        (["a"] * N, "text"),
        ([datetime.date(2020, 1, 1)] * N, "dates"),
        ([None] * N, "no values"),
        ([True, False], "true and false"),
    ],
)
def test_what_is_a_feature_unless_someone_says_otherwise(values: Any, reason: str | None) -> None:
    assert why_no_feature(read_column("x", values)) == reason


def test_only_the_same_labels_in_another_order_are_refused() -> None:
    first = pd.DataFrame({"x": range(4)}, index=list("abcd"))
    check_same_order(a=first, b=first["x"], c=first.reset_index(drop=True), d=[1, 2], e=None, f=np.zeros(4))
    check_same_order(a=first, b=first.set_axis(list("abce")))
    check_same_order(a=first.set_axis(list("aabb")), b=first.set_axis(list("bbaa")))
    with pytest.raises(ValueError, match=r"b has the same row labels as a, .*order \(row 0: 'd'"):
        check_same_order(a=first, b=first.iloc[::-1])
