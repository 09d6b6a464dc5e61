"""Columns equal those of formulaic and pandas; what is saved, missing or unseen does what it says."""

import copy
import datetime
import json
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from formulaic import model_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mdnorm.design import ConfoundedDesignWarning, Design, FormulaError, TableWarning
from mdnorm.design.reader import read_columns
from mdnorm.layer import MetadataNorm

# Our own recurrences against those of formulaic, in float64.
TOLERANCE = 1e-12


def _table(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": rng.uniform(20, 80, n),
            "iq": rng.normal(100, 15, n),
            "site": rng.choice(["a", "b", "c", "d"], n),
            "sex": rng.choice(["m", "f"], n),
            "batch": rng.integers(1, 4, n),
            "diagnosis": rng.choice(["healthy", "ill", "very ill"], n),
        }
    )


def _matrix(design: Design, table: Any) -> np.ndarray:
    return design.transform(table, labels=False, dtype=torch.float64).metadata.numpy()


# --------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "formula",
    [
        "age",
        "age + C(site) + bs(age, df=4)",
        "C(site) * sex",
        "site:sex",
        "age:C(site)",
        "age*site*sex",
        "site:sex:age",
        "age:iq + age:site:sex + sex",
        "C(batch):age + C(batch):site",
        "(age + sex + site)**2 - age:sex",
        "poly(age, 3)*sex",
        "bs(age, knots=[30, 50], degree=2):site",
        "bs(age, df=6, degree=2, lower_bound=0, upper_bound=100)",
        "cr(age, df=4, constraints='center')",
        "cr(iq, knots=[90, 100, 110], constraints='center')",
        "scale(iq) + center(age)",
        "I(center(age)**2) + {age / iq - 1}",
        "log(age) + exp(-age / 100) + log10(iq) + log2(age**2)",
        "0 + site",
        "site - 1",
    ],
)
def test_columns_and_names_equal_formulaic(formula: str) -> None:
    table = _table()
    design = Design(formula, standardize=False).fit(table)
    with_intercept = formula.replace("0 + ", "").replace(" - 1", "" if formula == "site - 1" else " - 1")
    expected = model_matrix(with_intercept, table).drop(columns="Intercept")
    assert list(design.metadata_names) == list(expected.columns)
    np.testing.assert_allclose(
        _matrix(design, table), expected.to_numpy(float), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    "formula", ["bs(age, df=5)*site", "cr(age, df=4, constraints='center')", "poly(age, 4)"]
)
def test_new_rows_equal_those_of_formulaics_model_spec(formula: str) -> None:
    train, test = _table(200, 0), _table(50, 1)
    inside = test[(test["age"] > train["age"].min()) & (test["age"] < train["age"].max())]
    spec = model_matrix(formula, train).model_spec
    expected = spec.get_model_matrix(inside).drop(columns="Intercept").to_numpy(float)
    result = _matrix(Design(formula, standardize=False).fit(train), inside)
    np.testing.assert_allclose(result, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_functions_equal_numpy() -> None:
    table = _table()
    age = table["age"].to_numpy()
    for text, expected in {
        "sqrt(age)": np.sqrt(age),
        "log1p(age)": np.log1p(age),
        "expm1(-age)": np.expm1(-age),
        "abs(age - 50)": np.abs(age - 50),
        "I(+age**0.5 * 2)": 2 * np.sqrt(age),
        "standardize(age)": (age - age.mean()) / age.std(ddof=1),
    }.items():
        result = _matrix(Design([text], standardize=False).fit(table), table)
        np.testing.assert_allclose(result[:, 0], expected, rtol=TOLERANCE)


def test_a_natural_spline_with_one_column_is_a_line() -> None:
    table = _table()
    np.testing.assert_allclose(
        np.abs(_matrix(Design("cr(age, 1)").fit(table), table)),
        np.abs(_matrix(Design("age").fit(table), table)),
        atol=TOLERANCE,
    )


def test_reference_and_levels() -> None:
    table = _table()
    expected = model_matrix("C(batch, contr.treatment(base=2))", table).drop(columns="Intercept")
    for text in ("C(batch, 2)", "C(batch, reference=2)", "C(batch, levels=[2, 1, 3])"):
        design = Design(text, standardize=False).fit(table)
        np.testing.assert_array_equal(_matrix(design, table), expected.to_numpy(float))
        assert design.metadata_names == (f"{text}[T.1]", f"{text}[T.3]")
        assert design.levels == {text: (2, 1, 3)}


@pytest.mark.parametrize("formula", ["age*site + bs(iq, df=5)", ["age", "site", "iq"]])
def test_standardized_columns_have_mean_0_and_deviation_1(formula: Any) -> None:
    table = _table()
    raw = _matrix(Design(formula, standardize=False).fit(table), table)
    result = _matrix(Design(formula).fit(table), table)
    np.testing.assert_allclose(result, (raw - raw.mean(0)) / raw.std(0), rtol=1e-10, atol=TOLERANCE)


def test_more_rows_than_a_chunk() -> None:
    table = _table(70_000)
    table.loc[40_000, "age"] = np.nan
    result = _matrix(Design("age*site", missing="mean").fit(table), table)
    raw = model_matrix("age*site", table, na_action="ignore").drop(columns="Intercept").to_numpy(float)
    expected = (raw - np.nanmean(raw, 0)) / np.nanstd(raw, 0)
    expected[40_000, [0, 4, 5, 6]] = 0
    np.testing.assert_allclose(result, expected, atol=1e-9)


def test_labels_are_numbers_as_they_are_and_categories_as_0_and_1() -> None:
    table = _table()
    design = Design("age", labels=["iq", "diagnosis", "C(batch)"]).fit(table)
    labels = design.transform(table, dtype=torch.float64).labels
    assert labels is not None
    assert design.label_names == (
        "iq",
        "diagnosis[T.ill]",
        "diagnosis[T.very ill]",
        "C(batch)[T.2]",
        "C(batch)[T.3]",
    )
    dummies = pd.get_dummies(table[["diagnosis", "batch"]], columns=["diagnosis", "batch"], drop_first=True)
    np.testing.assert_array_equal(labels[:, 0].numpy(), table["iq"])
    np.testing.assert_array_equal(labels[:, 1:].numpy(), dummies.to_numpy(float))
    assert (design.num_metadata, design.num_labels) == (1, 5)


def test_the_result_goes_straight_into_the_layer() -> None:
    table = _table()
    table["ill"] = table["diagnosis"] != "healthy"
    design = Design("age + site", labels="ill").fit(table)
    layer = MetadataNorm(7, design.num_metadata, design.num_labels, estimator="batch", prior=0)
    features = torch.randn(len(table), 7) + 3 * design.transform(table).metadata[:, :1]
    metadata, labels = design.transform(table)
    assert metadata.dtype == torch.get_default_dtype()
    out = layer(features, metadata, labels)
    assert torch.equal(out, layer(features, *design.transform(table)))
    full = torch.column_stack([torch.ones(len(table)), metadata, labels])  # type: ignore[list-item]
    slopes = torch.linalg.lstsq(full, out.detach()).solution[1 : 1 + design.num_metadata]
    assert slopes.abs().max() < 1e-4


# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


def test_every_kind_of_table_gives_the_same() -> None:
    table = _table()
    table["site"] = table["site"].astype("category")
    table["member"] = table["sex"] == "m"
    table["visit"] = pd.date_range("2020-01-01", periods=len(table), freq="7h", unit="us")
    table.loc[3, "age"] = np.nan
    table.loc[5, "sex"] = None
    table.loc[9, "visit"] = pd.NaT
    formula = "age*site + C(batch) + sex + member + visit"
    design = Design(formula, labels="diagnosis", missing="mean").fit(table)
    expected = design.transform(table)
    days = (table["visit"] - pd.Timestamp(0)) / pd.Timedelta(days=1)
    column = expected.metadata[:, design.metadata_names.index("visit")]
    np.testing.assert_allclose(column, ((days - days.mean()) / days.std(ddof=0)).fillna(0), atol=1e-6)

    arrow = pa.Table.from_pandas(table)
    others: dict[str, Any] = {
        "polars": pl.from_pandas(table),
        "arrow": arrow,
        "pandas, backed by arrow": arrow.to_pandas(types_mapper=pd.ArrowDtype),
        "pandas, nullable": table.convert_dtypes(),
        "another index and order of columns": table.set_index(table.index[::-1])[list(table)[::-1]],
        "dict of series": dict(table.items()),
        "dict of lists": {name: column.tolist() for name, column in table.items()},
        "dict of arrays": {name: column.to_numpy() for name, column in table.items()},
        "pandas objects": table.astype(object),
    }
    for name, other in others.items():
        for fitted in (design, Design(formula, labels="diagnosis", missing="mean").fit(other)):
            result = fitted.transform(other)
            assert fitted.metadata_names == design.metadata_names, name
            torch.testing.assert_close(result.metadata, expected.metadata, rtol=0, atol=1e-6, msg=name)
            assert torch.equal(result.labels, expected.labels), name  # type: ignore[arg-type]


def test_dict_of_tensors_and_a_single_row() -> None:
    table = {"age": torch.arange(20.0), "site": list("abcd") * 5, "sex": np.array(["m", "f"] * 10)}
    design = Design("age*site + sex").fit(table)
    expected = design.transform(table).metadata
    for row in (0, 7, 19):
        single = {"age": table["age"][row], "site": table["site"][row], "sex": table["sex"][row]}
        torch.testing.assert_close(design.transform(single).metadata, expected[row : row + 1])
    plain = {"age": 7, "site": "d", "sex": "f", "name": "not read"}
    torch.testing.assert_close(design.transform(plain).metadata, expected[7:8])
    assert design.transform({"age": [], "site": [], "sex": []}).metadata.shape == (0, design.num_metadata)


def test_dates_of_python_and_numpy_count_days() -> None:
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=i) for i in range(9)]
    for column in (
        days,
        np.array(days, dtype="datetime64[D]"),
        pl.Series(days),
        pd.to_datetime(pd.Series(days)).dt.tz_localize("UTC"),
        [datetime.datetime(d.year, d.month, d.day, tzinfo=datetime.timezone.utc) for d in days],
    ):
        design = Design(["day"], standardize=False).fit({"day": column})
        np.testing.assert_array_equal(_matrix(design, {"day": column})[:, 0], 18262 + np.arange(9.0))


def test_declared_order_of_levels_is_kept_and_absent_levels_are_dropped() -> None:
    sizes = ["small", "medium", "large", "huge"]
    values = ["large", "small", "medium", "small", "large"]
    for column in (
        pd.Series(pd.Categorical(values, categories=sizes, ordered=True)),
        pl.Series(values, dtype=pl.Enum(sizes)),
    ):
        design = Design(["size"]).fit({"size": column})
        assert design.levels == {"size": ("small", "medium", "large")}
    # A polars Categorical has its categories in order of appearance, which is no order.
    assert Design(["size"]).fit({"size": pl.Series(values, dtype=pl.Categorical)}).levels == {
        "size": ("large", "medium", "small")
    }


def test_levels_match_whatever_the_numeric_type() -> None:
    design = Design("C(batch)", missing="mean").fit({"batch": [1, 2, 3, 2]})
    expected = _matrix(design, {"batch": [3, 1]})
    assert design.metadata_names == ("C(batch)[T.2]", "C(batch)[T.3]")
    for column in (np.array([3.0, 1.0]), np.array([3, 1], dtype=np.uint8), pd.Series([3, 1], dtype="Int64")):
        np.testing.assert_array_equal(_matrix(design, {"batch": column}), expected)
    with_gap = Design("C(batch)", missing="mean").fit({"batch": [1.0, 2.0, np.nan, 3.0]})
    assert with_gap.metadata_names == design.metadata_names
    large = Design("C(id)").fit({"id": np.array([2**53, 2**53 + 1, 2**53 + 2])})
    assert large.levels == {"C(id)": (2**53, 2**53 + 1, 2**53 + 2)}


def test_odd_names_of_columns() -> None:
    rng = np.random.default_rng(0)
    table = {
        "my age": rng.normal(50, 5, 20),
        "µg": rng.normal(size=20),
        r"a\1": rng.normal(size=20),
        "a.b": rng.normal(size=20),
        "log": rng.uniform(1, 2, 20),
        "class": rng.normal(size=20),
        "C": list("xyxyxyxyxyxyxyxyxyxy"),
    }
    formula = "`my age` + bs(`my age`, df=4) + log(log) + µg + I(µg*2) + `a.b` + `class` + C(C) + exp(`a\\1`)"
    design = Design(formula, standardize=False).fit(table)
    result = _matrix(Design.from_json(design.to_json()), table)
    names = design.metadata_names
    np.testing.assert_array_equal(result[:, names.index("`my age`")], table["my age"])
    np.testing.assert_array_equal(result[:, names.index("log(log)")], np.log(table["log"]))
    np.testing.assert_array_equal(result[:, names.index("I(`µg` * 2)")], 2 * table["µg"])
    np.testing.assert_array_equal(result[:, names.index(r"exp(`a\1`)")], np.exp(table[r"a\1"]))
    np.testing.assert_array_equal(result[:, names.index("`class`")], table["class"])
    listed = Design(list(table), standardize=False).fit(table)
    assert listed.metadata_names == ("`my age`", "`µg`", r"`a\1`", "`a.b`", "log", "`class`", "C[T.y]")


# --------------------------------------------------------------------------------------------------------
# Missing and unseen
# --------------------------------------------------------------------------------------------------------


def test_missing_mean_is_no_correction_beyond_the_average() -> None:
    train, new = _table(), _table(4, 1)
    design = Design("age*site + iq", missing="mean").fit(train)
    complete = _matrix(design, new)
    new.loc[1, "age"] = np.nan
    new.loc[2, "site"] = None
    names = design.metadata_names
    result = _matrix(design, new)
    for row, variable in ((1, "age"), (2, "site")):
        for column, name in enumerate(names):
            expected = 0 if variable in name else complete[row, column]
            assert result[row, column] == expected, (row, name)
    np.testing.assert_array_equal(result[[0, 3]], complete[[0, 3]])
    raw = Design("age*site + iq", missing="mean", standardize=False).fit(train)
    np.testing.assert_allclose(_matrix(raw, new)[1, 0], train["age"].mean())


def test_missing_mean_learns_from_the_complete_rows() -> None:
    table = _table()
    holes = table.copy()
    holes.loc[::3, "age"] = np.nan
    holes.loc[1::4, "site"] = None
    for formula in ("bs(age, df=4)", "cr(age, df=3)", "poly(age, 2)", "I(scale(age)**2)"):
        design = Design(formula, missing="mean").fit(holes)
        complete = Design(formula).fit(table[holes["age"].notna()])
        np.testing.assert_allclose(_matrix(design, table), _matrix(complete, table), atol=TOLERANCE)
    crossed = Design("age:site", missing="mean").fit(holes)
    both = table[holes["age"].notna() & holes["site"].notna()]
    np.testing.assert_allclose(
        _matrix(crossed, table), _matrix(Design("age:site").fit(both), table), atol=TOLERANCE
    )


def test_missing_indicator() -> None:
    table = _table()
    table.loc[::5, "age"] = np.nan
    table.loc[::7, "site"] = None
    design = Design("age + site + iq", missing="indicator", standardize=False).fit(table)
    assert design.metadata_names[-2:] == ("age[missing]", "site[missing]")
    result = _matrix(design, table)
    np.testing.assert_array_equal(result[:, -2], table["age"].isna())
    np.testing.assert_array_equal(result[:, -1], table["site"].isna())
    np.testing.assert_array_equal(
        result[:, :-2],
        _matrix(Design("age + site + iq", missing="mean", standardize=False).fit(table), table),
    )
    loaded = Design.from_json(design.to_json())
    np.testing.assert_array_equal(_matrix(loaded, table), result)
    table.loc[2, "iq"] = np.nan
    with pytest.raises(ValueError, match=r"'iq' in row 2 \(1 of 200.*no missing values in training"):
        design.transform(table)


def test_unseen_mean() -> None:
    design = Design("age*site", unseen="mean").fit(_table())
    result = _matrix(design, {"age": [30.0, 30.0], "site": ["a", "elsewhere"]})
    names = design.metadata_names
    for column, name in enumerate(names):
        assert result[1, column] == (0 if "site" in name else result[0, column])


@pytest.mark.parametrize(
    ("design", "change", "message"),
    [
        (Design("age + site"), {"age": {3: np.nan, 8: np.nan}, "site": {4: None}},
         r"'age' in rows 3, 8 \(2 of 200, counted from 0\); 'site' in row 4 .*missing=\"mean\""),
        (Design("age + site"), {"site": {4: "z", 6: "y"}},
         r"'site' has level\(s\) 'z', 'y' in rows 4, 6 .*which has 'a', 'b', 'c', 'd'.*unseen=\"mean\""),
        (Design("age", labels="diagnosis", missing="mean"), {"diagnosis": {7: None}},
         r"label 'diagnosis' is missing in row 7 .*drop these rows"),
        (Design("age", labels="diagnosis", unseen="mean"), {"diagnosis": {7: "odd"}},
         r"label 'diagnosis' has level\(s\) 'odd' in row 7"),
        (Design("age", missing="mean"), {"age": {2: np.inf}}, r"column 'age' has infinite values in row 2 "),
        (Design("log(age)"), {"age": {2: -1.0}}, r"'log\(age\)' is not a finite number in row 2 .*age = -1"),
        (Design("age:iq"), {"age": {2: 1e200}, "iq": {2: 1e200}}, r"the product 'age:iq' is too large"),
        (Design("age"), {"age": {2: 1e300}}, r"column 'age' is too large for torch.float32 in row 2"),
    ],
)  # fmt: skip
def test_bad_cells_are_named(design: Design, change: dict[str, dict[int, Any]], message: str) -> None:
    table = _table()
    design.fit(table)
    for column, cells in change.items():
        for row, value in cells.items():
            table.loc[row, column] = value
    with pytest.raises(ValueError, match=message):
        design.transform(table)


@pytest.mark.parametrize("formula", ["bs(age, df=5)", "cr(age, df=4)", "poly(age, 3)"])
def test_values_outside_of_the_training_range_move_to_its_ends(formula: str) -> None:
    train = _table()
    design = Design(formula).fit(train)
    low, high = train["age"].min(), train["age"].max()
    ends = _matrix(design, {"age": [low, high]})
    beyond = _matrix(design, {"age": [-1e6, 1e6]})
    assert np.isfinite(beyond).all()
    np.testing.assert_allclose(beyond, ends, atol=TOLERANCE)


def test_a_numeric_column_extrapolates_as_a_line() -> None:
    design = Design("age").fit({"age": [0.0, 1.0, 2.0]})
    np.testing.assert_allclose(_matrix(design, {"age": [4.0]}), [[3 / np.sqrt(2 / 3)]])


# --------------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------------


@st.composite
def _metadata(draw: st.DrawFn) -> pd.DataFrame:
    n = draw(st.integers(8, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    levels = draw(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=5, unique=True))
    # Every level and enough numbers are there whatever is missing.
    site = np.array([*levels, *rng.choice(levels, n - len(levels))], dtype=object)
    age = rng.normal(draw(st.sampled_from([0.0, 1e6])), draw(st.sampled_from([1e-3, 1.0, 1e4])), n)
    table = pd.DataFrame({"site": site, "age": age})
    missing = draw(st.sampled_from([0.0, 0.2]))
    table.loc[5:, "age"] = np.where(rng.random(n - 5) < missing, np.nan, age[5:])
    table.loc[len(levels) :, "site"] = np.where(
        rng.random(n - len(levels)) < missing, None, site[len(levels) :]
    )
    return table


@settings(max_examples=25)
@given(
    _metadata(), st.integers(0, 100), st.sampled_from(["age*site", "age + site", "site:age", "poly(age, 2)"])
)
def test_order_of_rows_means_nothing(table: pd.DataFrame, seed: int, formula: str) -> None:
    order = np.random.default_rng(seed).permutation(len(table))
    first = Design(formula, missing="mean").fit(table)
    second = Design(formula, missing="mean").fit(table.iloc[order])
    assert first.metadata_names == second.metadata_names
    np.testing.assert_allclose(_matrix(second, table), _matrix(first, table), atol=1e-5)
    np.testing.assert_array_equal(_matrix(first, table.iloc[order]), _matrix(first, table)[order])


@settings(max_examples=25)
@given(_metadata(), st.sampled_from(["mean", "indicator"]))
def test_saved_and_loaded_it_gives_the_same_bits(table: pd.DataFrame, missing: str) -> None:
    design = Design("age*site + poly(age, 2) + cr(age, df=2) + center(age)", missing=missing).fit(table)
    loaded = Design.from_json(design.to_json())
    assert loaded.to_json() == design.to_json()
    assert loaded.metadata_names == design.metadata_names
    result = _matrix(design, table)
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(_matrix(loaded, table), result)


@given(_metadata())
def test_missing_rows_are_exactly_zero_and_the_mean_is_kept(table: pd.DataFrame) -> None:
    result = _matrix(Design("age + site", missing="mean").fit(table), table)
    assert (result[table["age"].isna(), 0] == 0).all()
    assert (result[table["site"].isna(), 1:] == 0).all()
    np.testing.assert_allclose(result.mean(0), 0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------
# Which level of a label is 1
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "levels"),
    [
        ("dx", ["AD", "CN"]),
        ("C(dx, levels=['CN', 'AD'])", ["CN", "AD"]),
        ("C(dx, reference='CN')", ["CN", "AD"]),
    ],
)
def test_the_level_of_a_label_that_is_1(label: str, levels: list[str]) -> None:
    table = {"age": [60, 70, 65, 75, 62, 58], "dx": ["AD", "CN", "CN", "AD", "AD", "CN"]}
    design = Design("age", labels=label)
    with pytest.raises(RuntimeError, match="not fitted"):
        _ = design.label_levels
    assert "label" not in repr(design).removeprefix("Design('age', labels=")
    design.fit(table)
    for one in (design, Design.from_json(design.to_json())):
        assert one.label_levels == {label: {levels[0]: 0, levels[1]: 1}}
        assert repr(one).endswith(f": 1 columns; label {label}: {levels[0]} = 0, {levels[1]} = 1")
        labels = one.transform(table).labels
        assert labels is not None
        assert labels[:, 0].tolist() == [float(value == levels[1]) for value in table["dx"]]
    diagnosis = design.diagnose(table)
    assert diagnosis.label_levels == design.label_levels
    assert f"{levels[0]} = 0, {levels[1]} = 1" in str(diagnosis)
    assert f"{levels[0]} = 0, {levels[1]} = 1" in diagnosis._repr_html_()
    assert not design.diagnose({"age": table["age"]}).label_levels
    with pytest.raises(ValueError, match="MCI"):
        design.transform({"age": 60, "dx": "MCI"})


def test_classes_that_count_as_a_measure_are_warned_of() -> None:
    """Integers 0, 1, 2 as one column make a ranking of three classes; floats say that it is meant."""
    table = {"age": np.arange(40.0), "dx": np.arange(40) % 3}
    with pytest.warns(TableWarning, match=r"label 'dx' has 3 different integers.*: write C\(dx\) where"):
        Design("age", labels="dx").fit(table)
    for labels, values in (("C(dx)", table["dx"]), ("dx", table["dx"] * 1.0), ("dx", table["dx"] % 2)):
        Design("age", labels=labels).fit(table | {"dx": values})


def test_codes_that_count_as_a_measure_are_warned_of() -> None:
    """Sites 1, 2, 3 as numbers make one slope, and most of what a site does would stay."""
    table = {"age": np.arange(40.0), "site": np.arange(40) % 3}
    for formula in ("age + site", ["age", "site"], "age:site + site"):
        with pytest.warns(TableWarning, match=r"column 'site' has 3 different integers.*: write C\(site\)"):
            Design(formula).fit(table)
    Design("age + C(site) + log(site + 1)").fit(table)
    Design("age + site").fit(table | {"site": table["site"] * 1.0})


def test_levels_of_labels_of_other_kinds() -> None:
    table = {"age": np.arange(40.0), "score": np.arange(40) % 3.0, "sex": ["f", "m"] * 20}
    table["kind"] = [chr(97 + i % 8) for i in range(40)]
    design = Design("age", labels=["score", "C(kind)", "sex"]).fit(table)
    assert list(design.label_levels) == ["C(kind)", "sex"]
    assert design.label_levels["C(kind)"]["h"] == 7
    text = "label C(kind): a = 0, b = 1, c = 2, d = 3, e = 4, f = 5, … (8 levels); label sex: f = 0, m = 1"
    assert text in repr(design)


# --------------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------------

EVERYTHING = (
    "age*site + C(batch, reference=2) + bs(age, df=5) + cr(iq, df=3) + poly(iq, 2) + I(scale(iq)**2) "
    "+ log(age)"
)


def test_round_trip_of_everything() -> None:
    table = _table()
    design = Design(EVERYTHING, labels=["diagnosis", "sex"], unseen="mean").fit(table)
    loaded = Design.from_json(design.to_json())
    new = _table(50, 3)
    new.loc[2, "site"] = "unseen"
    for first, second in zip(
        design.transform(new, dtype=torch.float64), loaded.transform(new, dtype=torch.float64), strict=True
    ):
        assert torch.equal(first, second)  # type: ignore[arg-type]
    assert repr(loaded) == repr(design)
    assert str(loaded.diagnose(table)) == str(design.diagnose(table))
    loaded.fit(new[new["site"] != "unseen"])  # still a design that can be fitted again


def test_truncated_json_is_an_error_at_every_length() -> None:
    text = Design("age*site + bs(age, df=4)").fit(_table()).to_json()
    for length in range(0, len(text), 7):
        with pytest.raises(ValueError, match="not a saved design"):
            Design.from_json(text[:length])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truncated or no JSON"),
        ("[1, 2]", "its format is not 'mdnorm.Design'"),
        ('{"format": "else"}', "its format is not"),
        ('{"format": "mdnorm.Design", "version": 2}', "version 2, .*mdnorm reads 1"),
        ('{"format": "mdnorm.Design", "version": 1}', "damaged"),
        ("[" * 100_000, "truncated or no JSON"),
        ("9" * 10_000, "not a saved design"),
    ],
)
def test_foreign_json_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Design.from_json(text)


def _replaced(state: Any, path: list[Any], value: Any) -> str:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(state)


def test_damage_anywhere_is_an_error_or_harmless() -> None:
    table = _table()
    design = Design(EVERYTHING, labels="diagnosis", missing="mean", unseen="mean").fit(table)
    state = json.loads(design.to_json())

    def paths(value: Any, path: list[Any]) -> Any:
        if path:
            yield path
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in items:
            yield from paths(inner, [*path, key])

    num_rejected = 0
    for path in paths(state, []):
        for damage in (None, "nonsense(", -1.5, [[None]]):
            try:
                loaded = Design.from_json(_replaced(state, path, damage))
            except ValueError:
                num_rejected += 1
                continue
            try:
                metadata = loaded.transform(table, labels=False).metadata
            except (ValueError, TypeError):
                continue
            assert torch.isfinite(metadata).all(), (path, damage)
    assert num_rejected > 300


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["mean", 0], float("nan")),
        (["scale", 0], -1),
        (["mean"], [0.0]),
        (["factors", "bs(age, df=5)", "curve", "breaks"], [5, 4, 3]),
        (["factors", "bs(age, df=5)", "curve", "breaks"], [-1.7e308, 1.7e308, 1.75e308, 1.79e308]),
        (["factors", "bs(age, df=5)", "curve", "coefficients"], [[[1.0]]]),
        (["factors", "bs(age, df=5)", "curve", "coefficients"], [[[1.0] * 5] * 3] * 22),
        (["factors", "cr(iq, df=3)", "curve", "coefficients", 0], [[1.0]]),
        (["factors", "poly(iq, 2)", "curve", "coefficients"], [[[float("inf"), 0]]]),
        (["factors", "poly(iq, 2)", "curve", "coefficients"], [[["1", "2"]]]),
        (["factors", "bs(age, df=5)", "curve"], "pickle"),
        (["factors", "site", "levels"], ["a", "a"]),
        (["factors", "site", "kind"], "curve"),
        (["products", 0, "factors"], [["site", False]] * 200),
        (["products", 0, "factors"], [["os.system", False]]),
        (["products", 0, "factors"], [["diagnosis", False]]),
        (["indicators"], ["no such variable"]),
        (["labels"], "diagnosis"),
        (["label_factors"], ["age"]),
    ],
)
def test_contradictions_in_json_are_errors(path: list[Any], value: Any) -> None:
    state = json.loads(Design(EVERYTHING, labels="diagnosis").fit(_table()).to_json())
    with pytest.raises(ValueError, match="damaged"):
        Design.from_json(_replaced(state, path, value))


def test_pickle_and_deepcopy() -> None:
    table = _table()
    design = Design(EVERYTHING, labels="diagnosis").fit(table)
    expected = design.transform(table)
    for other in (pickle.loads(pickle.dumps(design)), copy.deepcopy(design)):
        assert torch.equal(other.transform(table).metadata, expected.metadata)
    matrices = pickle.loads(pickle.dumps(expected))
    assert matrices.metadata_names == expected.metadata_names
    assert torch.equal(matrices.labels, expected.labels)


class _RawRows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, table: pd.DataFrame, design: Design) -> None:
        self.rows, self.design = table.to_dict("records"), design

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        metadata, labels = self.design.transform(self.rows[index])
        assert labels is not None
        return metadata[0], labels[0]


def test_a_dataset_that_transforms_raw_rows() -> None:
    table = _table(30)
    design = Design("age*site", labels="diagnosis").fit(table)
    metadata, labels = next(iter(DataLoader(_RawRows(table, design), batch_size=30, num_workers=1)))
    torch.testing.assert_close(metadata, design.transform(table).metadata)
    assert torch.equal(labels, design.transform(table).labels)


def test_inference_needs_neither_formulaic_nor_pandas() -> None:
    text = Design("age*site + bs(age, df=4)").fit(_table()).to_json()
    code = (
        "import sys\n"
        "for name in ('formulaic', 'pandas', 'narwhals'): sys.modules[name] = None\n"
        "from mdnorm.design import Design\n"
        f"design = Design.from_json({text!r})\n"
        "print(tuple(design.transform({'age': 40, 'site': 'a'}).metadata.shape))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(1, 11)"


# --------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"formula": ""}, ValueError, "at least one metadata column"),
        ({"formula": "1"}, ValueError, "at least one metadata column"),
        ({"formula": []}, ValueError, "at least one metadata column"),
        ({"formula": [3]}, TypeError, "by name, got 3"),
        ({"formula": None}, TypeError, "formula must be a string or a list of column names, got None"),
        ({"formula": {"age", "site"}}, TypeError, "formula is a set, whose order.*give a list"),
        ({"formula": {"age": 1}}, TypeError, "formula is a dict"),
        ({"formula": "age", "labels": {"sick"}}, TypeError, "labels is a set"),
        ({"formula": "age", "labels": 3}, TypeError, "labels must be a string or a list.*got 3"),
        ({"formula": "y ~ age"}, FormulaError, "several parts.*labels="),
        ({"formula": "age | site"}, FormulaError, "several parts"),
        ({"formula": "age +"}, FormulaError, "cannot be read"),
        ({"formula": "age*("}, FormulaError, r"cannot be read: .*age\*\("),
        ({"formula": "2:age"}, FormulaError, "multiplies a term by 2"),
        ({"formula": "age", "labels": "age"}, ValueError, "'age' is both label and metadata"),
        (
            {"formula": "age", "missing": "drop"},
            ValueError,
            "missing must be 'error' or 'mean' or 'indicator'",
        ),
        ({"formula": "age", "unseen": "drop"}, ValueError, "unseen must be 'error' or 'mean', got 'drop'"),
        (
            {"formula": "cr(age, df=4, constraints='free')"},
            FormulaError,
            "only 'center' leaves the intercept",
        ),
        ({"formula": "bs(age, df='4')"}, FormulaError, "df='4' is not possible"),
        ({"formula": "bs(age, df=4, knots=[3])"}, FormulaError, "df or knots, not both"),
        ({"formula": "bs(age, size=4)"}, FormulaError, r"bs\(\) has the options df, knots"),
        ({"formula": "C(site, Sum)"}, FormulaError, "an option that is not allowed"),
        ({"formula": "C(site, levels=['a', 'a'])"}, FormulaError, "a list of different levels"),
        ({"formula": "C(log(site))"}, FormulaError, r"C\(\) takes the name of a column"),
        ({"formula": "log(age, 2)"}, FormulaError, r"log\(\) takes one argument"),
        ({"formula": "sin(age)"}, FormulaError, r"there is no function sin\(\)"),
        ({"formula": "np.log(age)"}, FormulaError, "a dot; write log"),
        ({"formula": ["a`b"]}, FormulaError, "rename it"),
    ],
)
def test_errors_when_built(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Design(**arguments)
    assert str(caught.value).isprintable()


def test_what_a_design_uses_of_a_table() -> None:
    design = Design("age:C(batch) + age + C(site)", labels=["diagnosis", "C(sex)"])
    assert sorted(design.variables()) == ["age", "batch", "diagnosis", "sex", "site"]
    assert sorted(design.variables(labels=False)) == ["age", "batch", "site"]
    assert design.declared_categories() == {"batch", "site", "sex"}
    table = _table()
    columns, _ = read_columns(table, design.variables())
    with pytest.raises(RuntimeError, match="not fitted"):
        design.transform_columns(columns, labels=True)
    expected = design.fit(table).transform(table, dtype=torch.float64)
    metadata, labels = design.transform_columns(columns, labels=True)
    np.testing.assert_array_equal(metadata, expected.metadata)
    np.testing.assert_array_equal(labels, expected.labels)
    assert design.transform_columns(columns, labels=False)[1] is None


def test_half_precision_columns() -> None:
    ages = torch.tensor([30.0, 41.5, 50.0, 66.0])
    for dtype in (torch.bfloat16, torch.float16):
        design = Design("age").fit({"age": ages.to(dtype)})
        expected = Design("age").fit({"age": ages}).transform({"age": ages})
        assert torch.equal(design.transform({"age": ages.to(dtype)}).metadata, expected.metadata)


SMALL = {"age": [30.0, 40.0, 50.0, 60.0], "site": list("abab"), "one": [1, 1, 1, 1], "none": [None] * 4}


@pytest.mark.parametrize(
    ("design", "table", "error", "message"),
    [
        (Design("aeg"), SMALL, ValueError, "no column 'aeg': did you mean 'age'"),
        (Design(["0"]), pd.DataFrame([[1, 2], [3, 4]]), ValueError, "no column '0'.*string as name are none"),
        (Design("age"), pd.Series({"age": 1}), TypeError, "got Series.*a single row as a dict"),
        (Design("age"), {"age": [1.0]}, ValueError, "1 row.*at least 2"),
        (Design("age"), {"age": []}, ValueError, "0 row"),
        (Design("age"), {"age": ["1", 2.0]}, TypeError, r"mixes strings \('1'\) and numbers \(2.0\)"),
        (Design("age"), {"age": [[1], [2]]}, TypeError, "values of type list"),
        (Design("age"), {"age": [1 + 2j, 3]}, TypeError, "values of type complex"),
        (Design("age"), {"age": np.zeros((3, 2))}, ValueError, r"shape \(number of rows,\), got \(3, 2\)"),
        (Design("age + site"), {"age": [1.0, 2.0], "site": ["a"]}, ValueError, "'age': 2, 'site': 1"),
        (Design("age + site"), {"age": [1.0, 2.0], "site": "a"}, ValueError, "'site' is a single value"),
        (Design("age"), [1, 2, 3], TypeError, "must be a DataFrame"),
        (Design("age"), pl.LazyFrame({"age": [1, 2]}), TypeError, "collect"),
        (Design("age"), pl.DataFrame({"age": [[1], [2]]}), TypeError, "dtype List"),
        (Design("age"), pd.DataFrame([[1, 2]], columns=["age", "age"]), ValueError,
         "more than one column of the name 'age'"),
        (Design("none"), SMALL, ValueError, "column 'none' has no values"),
        (Design("log(site)"), SMALL, TypeError, r"column 'site' has strings: use C\(site\)"),
        (Design("bs(age, df=9)"), SMALL, ValueError, "4 different values, too few for 9 columns"),
        (Design("cr(age, df=4)"), SMALL, ValueError, "4 different values, too few for 4 columns"),
        (Design("cr(age)"), SMALL, ValueError, "give df"),
        (Design("poly(age, 4)"), SMALL, ValueError, "4 different values, too few for 4 columns"),
        (Design("bs(age, degree=0)"), SMALL, ValueError, "degree must be between 1"),
        (Design("bs(age, knots=[99])"), SMALL, ValueError, "knots must ascend"),
        (Design("bs(one, df=4)"), SMALL, ValueError, "different values, too few|knots must ascend"),
        (Design("C(one)"), SMALL, ValueError, "no columns: every variable"),
        (Design("C(site, reference='z')"), SMALL, ValueError, "reference 'z' is not a level.*'a', 'b'"),
        (Design("C(site, levels=['a'])"), SMALL, ValueError, "level.*'b', which levels= does not list"),
        (Design("age", labels="C(one)"), SMALL, ValueError, "label 'C.one.' has the single level 1"),
        (Design("C(day)"), {"day": [datetime.date(2020, 1, 1)] * 3}, TypeError, "dates count as days"),
        (Design("age"), {"age": [1e300, -1e300, 1.0]}, ValueError, "too large to be squared"),
        (Design("age:iq", missing="mean"), {"age": [1.0, np.nan, 2], "iq": [np.nan, 1.0, np.nan]}, ValueError,
         "'age:iq' has no row in which all"),
    ],
)  # fmt: skip
def test_errors_of_fit(design: Design, table: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        design.fit(table)
    with pytest.raises(RuntimeError, match="not fitted"):
        design.transform(table)


def test_errors_of_transform() -> None:
    table = _table()
    design = Design("age + site", labels="diagnosis")
    for call in (lambda: design.transform(table), lambda: design.diagnose(table), design.to_json):
        with pytest.raises(RuntimeError, match="not fitted: call fit"):
            call()
    with pytest.raises(RuntimeError, match="not fitted"):
        _ = design.num_metadata
    design.fit(table)
    assert design.transform(table.drop(columns="diagnosis")).labels is None
    assert design.transform(table, labels=False).labels is None
    with pytest.raises(ValueError, match="no label column 'diagnosis'"):
        design.transform(table.drop(columns="diagnosis"), labels=True)
    with pytest.raises(ValueError, match="the design has no labels"):
        Design("age").fit(table).transform(table, labels=True)
    with pytest.raises(
        TypeError, match="'age' had values of kind number in training and now has strings, '30'"
    ):
        design.transform({"age": ["30"], "site": ["a"]})
    with pytest.raises(TypeError, match=r"'site' had values of kind string.*now has numbers, 3"):
        design.transform({"age": [30], "site": [3]})
    with pytest.raises(TypeError, match=r"dtype must be a floating-point one, got torch\.int64"):
        design.transform(table, dtype=torch.int64)
    with pytest.raises(ValueError, match="no column 'site'"):
        design.transform({"age": [30]})


def test_a_fit_that_fails_leaves_no_half_fitted_design() -> None:
    design = Design("age").fit(SMALL)
    with pytest.raises(ValueError, match="no column"):
        design.fit({"site": ["a", "b"]})
    with pytest.raises(RuntimeError, match="not fitted"):
        design.transform(SMALL)


def test_constant_columns_stay_zero() -> None:
    design = Design("age + one + site").fit({**SMALL, "one": [0.1] * 4})
    result = _matrix(design, {"age": [30.0], "one": [7.0], "site": ["a"]})
    assert result[0, design.metadata_names.index("one")] == 0
    assert design.diagnose({**SMALL, "one": [0.1] * 4}).constant == ("one",)


def test_constant_up_to_rounding_is_constant() -> None:
    # The mean of n times 0.1 is not always 0.1: standardised, the last digit would become a column of ±1.
    for n in range(2, 60):
        design = Design(["one", "age"]).fit({"one": [0.1] * n, "age": list(range(n))})
        assert _matrix(design, {"one": [0.1, 0.3], "age": [0, 1]})[:, 0].tolist() == [0, 0], n


def test_a_confounded_design_warns_once_and_a_sound_one_does_not() -> None:
    table = _table()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Design("age + C(site) + bs(age, df=4)", labels="diagnosis").fit(table)
    table["scanner"] = table["diagnosis"].str.upper()
    with pytest.warns(ConfoundedDesignWarning, match="scanner determines diagnosis") as caught:
        Design("age + scanner", labels="diagnosis").fit(table)
    assert len(caught) == 1
    assert caught[0].filename == __file__
