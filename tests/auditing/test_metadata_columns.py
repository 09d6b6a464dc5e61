import datetime

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from mdnorm.auditing.columns import as_column, as_columns, intersection, stand_ins
from mdnorm.auditing.reading import InputError

N = 60
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RNG.standard_normal(N), "continuous"),
        (RNG.integers(20, 80, N), "continuous"),
        (RNG.integers(0, 4, N), "categorical"),
        (RNG.integers(0, 4, N) / 2, "continuous"),
        (np.arange(N) % 2 == 0, "categorical"),
        (["Graz", "Wien"] * (N // 2), "categorical"),
        (np.full(N, 3.0), "constant"),
        (["x"] * N, "constant"),
        ([None] * N, "constant"),
        (np.arange(N), "identifier"),
        (np.arange(N) + 1000, "identifier"),
        ([f"subject {i}" for i in range(N)], "identifier"),
        (torch.arange(N) % 3, "categorical"),
        (torch.randn(N), "continuous"),
        (np.datetime64("2020-01-01") + np.arange(N)[::-1] ** 2, "continuous"),
    ],
)
def test_kinds_are_inferred(values, kind):
    column = as_column("x", values)
    assert column.kind == kind
    assert column.is_auditable == (kind in ("continuous", "categorical"))
    assert len(column.values) == len(column.present) == N
    assert column.describe()


def test_names_tell_identifiers_from_measurements():
    values = RNG.permutation(10**6)[:N]
    for name in ("subject_id", "id", "UID", "Unnamed: 0", "row"):
        assert as_column(name, values).kind == "identifier"
    for name in ("volume", "idle", "width"):
        assert as_column(name, values).kind == "continuous"


@pytest.mark.parametrize(
    ("values", "is_doubtful"),
    [
        (np.repeat(np.arange(12), 5), True),
        (np.repeat(np.arange(12), 5)[1:], False),
        (np.repeat(np.arange(12), 5) + 0.5, False),
        (np.repeat(np.arange(10), 6), False),  # read as classes
        (np.repeat(np.arange(100), 5), True),
        (np.repeat(np.arange(101), 5), False),
        (np.array([*np.repeat(np.arange(12.0), 5), np.nan]), True),
        (np.datetime64("2020-01-01") + np.repeat(np.arange(12), 5), False),
    ],
)
def test_whole_numbers_of_many_rows_each_may_be_codes(values, is_doubtful):
    assert as_column("x", values).num_codes == is_doubtful * pd.Series(values).nunique()
    assert as_column("x", values, "categorical").num_codes == 0
    assert as_column("x", values, "continuous").num_codes == 0


def test_kinds_can_be_given():
    sites = RNG.integers(0, 30, N)
    assert as_column("site", sites).kind == "continuous"
    column = as_column("site", sites, "categorical")
    assert column.kind == "categorical"
    assert set(column.values) == {str(site) for site in sites}
    assert as_column("stage", RNG.integers(0, 4, N), "continuous").kind == "continuous"
    assert as_column("stage", ["1", "2"] * 30, "continuous").values[1] == 2
    assert as_column("subject", np.arange(N), "continuous").kind == "continuous"
    with pytest.raises(InputError, match="'stage' cannot be read as continuous"):
        as_column("stage", ["1", "two"] * 30, "continuous")
    with pytest.raises(InputError, match="must be continuous or categorical, got 'number'"):
        as_column("stage", sites, "number")


def test_missing_and_infinite_values():
    column = as_column("age", [1.5, None, np.nan, np.inf, 2.5, 3.5])
    np.testing.assert_array_equal(column.present, [True, False, False, False, True, True])
    assert column.num_missing == 3
    assert "1 infinite" in column.note
    site = as_column("site", ["a", None, "", "b", "a", "b"])
    np.testing.assert_array_equal(site.present, [True, False, False, True, True, True])


def test_frames_of_every_library_give_the_same_columns():
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=i * i) for i in range(N)]
    data = {
        "age": [None if i == 3 else 20.0 + i / 7 for i in range(N)],
        "site": ["a" if i % 3 else None for i in range(N - 1)] + ["b"],
        "stage": [i % 4 for i in range(N)],
        "flag": [i % 2 == 0 for i in range(N)],
        "day": days,
    }
    frames = [
        pd.DataFrame({**data, "day": pd.to_datetime(days)}),
        pl.DataFrame(data),
        pa.table(data),
        {name: np.array(values, dtype=object) for name, values in data.items() if name != "day"},
    ]
    first = {column.name: column for column in as_columns(frames[0])}
    assert [column.kind for column in first.values()] == [
        "continuous",
        "categorical",
        "categorical",
        "categorical",
        "continuous",
    ]
    for frame in frames[1:]:
        for column in as_columns(frame):
            expected = first[column.name]
            assert column.kind == expected.kind
            np.testing.assert_array_equal(column.present, expected.present)
            np.testing.assert_array_equal(column.values, expected.values)


def test_categories_and_dictionaries_are_read_as_text():
    series = pd.Series(["a", "b", None] * 20, dtype="category")
    column = as_columns(pd.DataFrame({"site": series}))[0]
    assert column.kind == "categorical"
    assert column.num_missing == 20
    assert as_columns(pl.DataFrame({"site": pl.Series(["a", "b"] * 30, dtype=pl.Categorical)}))[0].kind == (
        "categorical"
    )


def test_design_matrices():
    column = as_column("site", ["b", "a", "c"] * 20)
    np.testing.assert_array_equal(column.design_matrix()[:3], [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert as_column("age", np.linspace(1, 2, N)).design_matrix().shape == (N, 1)


def test_arrays_without_names():
    assert [c.name for c in as_columns(RNG.standard_normal((N, 2)))] == ["metadata 0", "metadata 1"]
    assert as_columns(torch.randn(N))[0].name == "metadata"


@pytest.mark.parametrize(
    ("metadata", "kinds", "ignore", "message"),
    [
        ({"a": [1, 2], "b": [1]}, None, (), "same number of rows, got"),
        ({"a": [1, 2]}, {"b": "categorical"}, (), "no metadata column 'b'; there are 'a'"),
        ({"a": [1, 2]}, None, ("c",), "no metadata column 'c'"),
        (3, None, (), "must be a DataFrame"),
        (np.zeros((2, 2, 2)), None, (), r"shape \(num_rows,\) or \(num_rows, num_columns\)"),
        (pl.DataFrame({"a": [[1], [2]]}), None, (), "has dtype List"),
    ],
)
def test_errors(metadata, kinds, ignore, message):
    with pytest.raises(InputError, match=message):
        as_columns(metadata, kinds, ignore)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{}], "metadata column 'a' has values of type dict"),
        (np.ones((2, 3)), r"metadata column 'a' must have shape \(number of rows,\), got \(2, 3\)"),
        ([[1, 2]], r"metadata column 'a' must have shape \(n,\), got \(1, 2\)"),
        (3, r"metadata column 'a' must have shape \(n,\), got \(\)"),
        ([*map(str, np.arange(20) / 8), "?"], "metadata column 'a' has numbers, but '[?]' in row 20"),
    ],
)
def test_an_error_names_the_column_once(values, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        as_column("a", values)
    assert str(caught.value).count("column 'a'") == 1


def test_columns_are_ignored_by_pattern():
    table = {"age": RNG.standard_normal(N), "roi_1": RNG.standard_normal(N), "roi_2": RNG.standard_normal(N)}
    assert [column.name for column in as_columns(table, ignore=["roi_*"])] == ["age"]


def test_columns_that_were_read_before_stay_as_they_are():
    table = {"age": RNG.standard_normal(N), "site": ["a", "b"] * (N // 2)}
    columns = as_columns(table)
    assert as_columns(columns) == columns
    assert as_columns(columns, ignore=["age"]) == columns[1:]
    with pytest.raises(InputError, match="were read before"):
        as_columns(columns, {"age": "categorical"})
    with pytest.raises(InputError, match="no metadata column 'sight'"):
        as_columns(columns, ignore=["sight"])


def test_classes_have_one_name_however_they_are_stored():
    for values in ([1, 0, 2], [1.0, 0.0, 2.0], ["1", "0", "2"], torch.tensor([1, 0, 2])):
        assert as_column("predictions", values, "categorical").values.tolist() == ["1", "0", "2"]
    assert as_column("predictions", [1, 1], "categorical").values.tolist() == ["1", "1"]
    assert as_column("predictions", [1.5, None], "categorical").values.tolist() == ["1.5", ""]
    with pytest.raises(InputError, match=r"'predictions' must have shape \(n,\), got \(1, 2\)"):
        as_column("predictions", [[1, 2]], "categorical")


@pytest.mark.parametrize("library", [pd.Series, pl.Series])
def test_a_series_is_a_table_of_one_column(library):
    values = [20.0 + i / 7 for i in range(N)]
    series = library(name="age", data=values) if library is pd.Series else library("age", values)
    columns = as_columns(series)
    assert [column.name for column in columns] == ["age"]
    np.testing.assert_array_equal(columns[0].values, values)
    assert [column.name for column in as_columns(pd.Series(values))] == ["metadata"]


def test_dates_keep_missing_values_and_times():
    stamps = pd.Series(pd.date_range("2024-03-01 08:30", periods=N, freq="37min", tz="Europe/Vienna"))
    stamps[4] = pd.NaT
    column = as_columns(pd.DataFrame({"scan": stamps}))[0]
    assert (column.kind, column.num_missing, column.is_date) == ("continuous", 1, True)
    assert column.describe().startswith("2024-03-01 07:30 to 2024-03-")
    assert column.rows(np.arange(N) > 9).is_date
    assert not as_columns({"age": np.arange(N) / 7})[0].is_date


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ([60.5, 90, 101, 140, 75] * 4 + [-9999] * 3, [-9999]),
        ([60.5, 90, 101, 140, 75] * 4 + [-9999] * 2, []),
        ([20.5, 30, 44, 80] * 4 + [-9] * 3, [-9]),
        ([20.5, 30, 44, 80] * 4 + [99] * 3, []),
        ([1, 2, 3, 4, 5] * 4 + [99] * 3, [99]),
        ([1, 2, 3, 4, 5] * 4 + [99] * 3 + [-99] * 3, [-99, 99]),
        ([-3.5, -9, 2, 4] * 5, []),
        ([1.5, 2, 3, 4] * 5 + [100] * 5, []),
        ([999, 999, 999, 1000.5, 1001] * 3, []),
        ([9999] * 20, []),
    ],
)
def test_numbers_that_stand_for_missing_values(values, codes):
    assert sorted(stand_ins(np.array(values, float))) == codes
    column = as_column("x", values)
    if codes:
        assert column.num_missing == sum(values.count(code) for code in codes)
        assert "seem to stand for missing" in column.note
    elif column.kind != "constant":
        assert column.num_missing == 0


def test_an_intersection_has_the_combinations_where_all_are_there():
    columns = as_columns({"a": ["x", "y", None, "x"] * 10, "b": ["1", "2", "1", None] * 10})
    both = intersection(columns)
    assert (both.name, both.kind) == ("a × b", "categorical")
    assert both.values[:4].tolist() == ["x, 1", "y, 2", "", ""]
    assert both.num_missing == 20


def test_whole_numbers_that_floats_cannot_hold_stay_apart():
    numbers = 2**53 + 1 + np.arange(N)
    chunks = pa.chunked_array([numbers])
    for values in (numbers, pd.Series(numbers), pl.Series(numbers), chunks, torch.from_numpy(numbers)):
        column = as_column("case", values)
        assert column.kind == "identifier"
        assert len(set(column.values.tolist())) == N
    table = pa.table({"case": pa.array([None, *numbers.tolist()])})
    assert as_columns(table)[0].num_missing == 1
    pair = as_column("scanner", np.where(np.arange(N) % 2, 2**53, 2**53 + 1))
    assert pair.kind == "categorical"
    assert len(set(pair.values.tolist())) == 2
