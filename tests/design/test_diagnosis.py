"""The diagnosis of a design equals that of statsmodels and numpy, and finds what was put in."""

import math
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from statsmodels.stats.outliers_influence import variance_inflation_factor

from mdnorm.design import ConfoundedDesignWarning, Design, DesignDiagnosis, collinearity


def _table(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    ill = rng.integers(0, 2, n)
    return pd.DataFrame(
        {
            "ill": ill,
            "age": 50 + 5 * ill + 10 * rng.normal(size=n),
            "iq": rng.normal(100, 15, n),
            "site": rng.choice(["a", "b", "c"], n),
            "sex": rng.choice(["f", "m"], n),
        }
    )


def _diagnosis(formula: Any, table: Any, **options: Any) -> DesignDiagnosis:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfoundedDesignWarning)
        return Design(formula, labels="ill" if "ill" in table else None).fit(table).diagnose(table, **options)


def _columns(formula: Any, table: pd.DataFrame) -> np.ndarray:
    matrices = Design(formula, labels="ill", standardize=False).fit(table).transform(table)
    assert matrices.labels is not None
    return np.column_stack([matrices.metadata.double(), matrices.labels.double()])


@pytest.mark.parametrize("formula", ["age + iq", "age*site + sex", "bs(age, df=4) + C(site)"])
def test_numbers_equal_statsmodels_numpy_and_scipy(formula: str) -> None:
    table = _table()
    diagnosis = _diagnosis(formula, table)
    columns = _columns(formula, table)
    with_intercept = np.column_stack([np.ones(len(columns)), columns])
    expected = [variance_inflation_factor(with_intercept, i) for i in range(1, with_intercept.shape[1])]
    np.testing.assert_allclose(list(diagnosis.variance_inflation.values()), expected, rtol=1e-4)

    centred = columns - columns.mean(0)
    unit = centred / np.linalg.norm(centred, axis=0)
    assert diagnosis.condition_number == pytest.approx(np.linalg.cond(unit), rel=1e-4)
    angles = subspace_angles(unit[:, :-1], unit[:, -1:])
    assert diagnosis.canonical_correlations == pytest.approx(np.cos(angles), rel=1e-4)
    assert diagnosis.label_r2["ill"] == pytest.approx(1 - 1 / expected[-1], rel=1e-4)
    assert not diagnosis.warnings


@pytest.mark.parametrize("missing", ["error", "mean"])
@pytest.mark.parametrize("wide", [3, 512])
def test_many_levels_give_the_numbers_of_their_columns(
    wide: int, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The widest category is taken by the means of its groups, the condition number of many columns in steps.
    monkeypatch.setattr(collinearity, "_WIDE", wide)
    rng = np.random.default_rng(3)
    table = _table(400)
    table["site"] = rng.choice([f"s{i}" for i in range(25)], 400)
    table["age"] += table["site"].str[1:].astype(int)
    table["region"] = rng.choice(["n", "s", "w"], 400)
    if missing == "mean":
        table.loc[rng.random(400) < 0.1, "site"] = None
        table.loc[rng.random(400) < 0.1, "age"] = None
    formula = "C(site) + age*region + iq"
    design = Design(formula, labels="ill", missing=missing).fit(table)
    diagnosis = design.diagnose(table)
    metadata, labels = design.transform(table, dtype=torch.float64)
    assert labels is not None
    columns = np.column_stack([metadata, labels])
    unit = (columns - columns.mean(0)) / np.linalg.norm(columns - columns.mean(0), axis=0)
    inverse = np.linalg.inv(unit.T @ unit)
    np.testing.assert_allclose(list(diagnosis.variance_inflation.values()), np.diag(inverse), rtol=1e-6)
    assert diagnosis.condition_number == pytest.approx(np.linalg.cond(unit), rel=0.02 if wide == 3 else 1e-6)
    assert diagnosis.label_r2["ill"] == pytest.approx(1 - 1 / inverse[-1, -1], rel=1e-6)
    names = [*diagnosis.metadata_names, *diagnosis.label_names]
    for term, inside in ((name, [names.index(n) for n in own]) for name, own in design.terms.items()):
        if term == "ill":
            continue
        block = np.ix_(inside, inside)
        expected = np.linalg.det((unit.T @ unit)[block]) * np.linalg.det(inverse[block])
        assert diagnosis.term_variance_inflation[term] == pytest.approx(
            expected ** (1 / len(inside)), rel=1e-6
        )
    angles = subspace_angles(unit[:, :-1], unit[:, -1:])
    assert diagnosis.canonical_correlations == pytest.approx(np.cos(angles), rel=1e-6)
    for variable in ("site", "age", "region", "iq"):
        own = unit[:, [i for i, name in enumerate(names) if variable in name]]
        share = np.linalg.norm(own @ np.linalg.lstsq(own, unit[:, -1], rcond=None)[0]) ** 2
        assert diagnosis.association[variable] == pytest.approx(share, rel=1e-6)


def test_collinear_with_the_levels_of_a_category() -> None:
    table = _table(300)
    table["funding"] = table["site"].map({"a": 1.0, "b": 2.0, "c": 2.0})
    table["months"] = 12 * table["age"]
    diagnosis = _diagnosis("site + funding + age + months + sex", table)
    assert diagnosis.collinear == (("site[T.b]", "site[T.c]", "funding"), ("age", "months"))
    assert math.isinf(diagnosis.condition_number)
    for name, inflation in diagnosis.variance_inflation.items():
        assert math.isinf(inflation) == (name not in ("sex[T.m]", "ill")), name
    assert math.isfinite(diagnosis.term_variance_inflation["sex"])
    assert math.isinf(diagnosis.term_variance_inflation["site"])


def test_dates_as_levels_take_no_longer_than_their_number() -> None:
    table = {"visit": [f"2013-{i % 2700}" for i in range(3000)], "y": [i % 2 for i in range(3000)]}
    start = time.process_time()
    with pytest.warns(ConfoundedDesignWarning, match="visit determines y exactly"):
        design = Design("visit", labels="y").fit(table)
    diagnosis = design.diagnose(table)
    assert time.process_time() - start < 5  # 90 seconds and more with a regression for each level
    assert diagnosis.determined_labels == {"y": ("visit",)}
    assert len(diagnosis.variance_inflation) == 2700


def test_the_verdict_comes_first() -> None:
    table = _table()
    fine = _diagnosis("age + site", table)
    assert fine.verdict == "Fine: label and metadata can be told apart in this table."
    assert str(fine).startswith(fine.verdict)
    assert fine.verdict in fine._repr_html_()
    table["scanner"] = np.where(table["ill"] == 1, "s1", "s2")
    assert str(_diagnosis("age + scanner", table)).startswith(
        "Confounded: the correction cannot be relied on"
    )
    assert _diagnosis("age", table.drop(columns="ill")).verdict.startswith("Fine: nothing stands against it")


def test_term_inflation_is_the_generalised_one_of_fox_and_monette() -> None:
    table = _table()
    diagnosis = _diagnosis("bs(age, df=4) + iq + site", table)
    correlation = np.corrcoef(_columns("bs(age, df=4) + iq + site", table).T)
    # Terms are in order of their degree, not moved: a spline of 4 columns, a number, 2 levels, the label.
    for name, inside in {"bs(age, df=4)": [0, 1, 2, 3], "iq": [4], "site": [5, 6]}.items():
        outside = [i for i in range(8) if i not in inside]
        ratio = (
            np.linalg.det(correlation[np.ix_(inside, inside)])
            * np.linalg.det(correlation[np.ix_(outside, outside)])
            / np.linalg.det(correlation)
        )
        assert diagnosis.term_variance_inflation[name] == pytest.approx(ratio ** (1 / len(inside)), rel=1e-4)
    assert diagnosis.term_variance_inflation["iq"] == pytest.approx(diagnosis.variance_inflation["iq"])


def test_association_of_one_variable_is_its_r2() -> None:
    table = _table()
    diagnosis = _diagnosis("age + iq*site", table)
    assert diagnosis.association["age"] == pytest.approx(np.corrcoef(table["age"], table["ill"])[0, 1] ** 2)
    assert set(diagnosis.association) == {"age", "iq", "site"}


def test_collinear_columns_are_named_together() -> None:
    table = _table()
    table["months"] = 12 * table["age"] + 3
    table["other"] = table["iq"] - 2 * table["ill"]
    diagnosis = _diagnosis("age + months + sex", table)
    assert diagnosis.collinear == (("age", "months"),)
    assert math.isinf(diagnosis.condition_number)
    assert math.isinf(diagnosis.variance_inflation["age"])
    assert diagnosis.variance_inflation["sex[T.m]"] < 1.1
    assert math.isinf(diagnosis.term_variance_inflation["months"])
    assert not diagnosis.warnings  # harmless: the same is removed
    assert "age, months are collinear" in str(diagnosis)
    assert _diagnosis("iq + other", table).collinear == (("iq", "other", "ill"),)


def test_a_line_beside_its_spline_is_a_note_and_no_warning() -> None:
    diagnosis = _diagnosis("age + bs(age, df=4) + site", _table())
    assert diagnosis.collinear == (("age", *(f"bs(age, df=4)[{i}]" for i in range(1, 5))),)
    assert not diagnosis.warnings
    assert len(diagnosis.notes) == 1


def test_a_site_with_one_label_only_determines_it() -> None:
    table = _table()
    table["scanner"] = np.where(table["ill"] == 1, "s1", "s2")
    table["machine"] = table["scanner"] + np.random.default_rng(5).choice(["x", "y"], len(table))
    same = _diagnosis("age + scanner", table)
    assert same.determined_labels == {"ill": ("scanner",)}
    assert same.determined_by_labels == ("scanner[T.s2]",)
    assert same.association["scanner"] == pytest.approx(1)
    (sentence,) = same.warnings
    assert "scanner determines ill exactly: each value comes with one label only" in sentence
    finer = _diagnosis("age + machine", table)
    assert finer.determined_labels == {"ill": ("machine",)}
    assert finer.determined_by_labels == ()
    both = _diagnosis("scanner + machine", table)
    assert both.determined_labels == {"ill": ("scanner", "machine")}


def test_metadata_that_determine_the_label_only_together() -> None:
    table = _table()
    table["first"] = np.random.default_rng(1).normal(size=len(table))
    table["second"] = table["ill"] - table["first"]
    diagnosis = _diagnosis("first + second", table)
    assert diagnosis.determined_labels == {"ill": ()}
    assert "the metadata together determine ill exactly" in diagnosis.warnings[0]


def test_metadata_that_the_label_determines() -> None:
    table = _table()
    table["ill"] = np.random.default_rng(0).choice(["none", "mild", "severe"], len(table))
    table["clinic"] = np.where(table["ill"] == "severe", "special", "general")
    diagnosis = _diagnosis("age + clinic", table)
    assert diagnosis.determined_by_labels == ("clinic[T.special]",)
    assert any("severe" in name for name in diagnosis.determined_labels)
    table["ill"] = np.random.default_rng(0).choice(["p", "q", "r", "s"], len(table))
    table["clinic"] = np.where(table["ill"] < "r", "first", "second")
    halves = _diagnosis("age + clinic", table)
    assert halves.determined_labels == {}
    (sentence,) = halves.warnings
    assert "the label determines clinic exactly" in sentence


def test_nearly_determined_labels_are_warned_of() -> None:
    table = _table()
    table["score"] = table["ill"] + 0.05 * table["iq"] / 15
    diagnosis = _diagnosis("score + age", table)
    assert diagnosis.determined_labels == {}
    (sentence,) = diagnosis.warnings
    assert "nearly determine ill" in sentence
    assert diagnosis.variance_inflation["ill"] > 10


def test_too_few_rows_is_the_only_warning() -> None:
    diagnosis = _diagnosis("age + iq + bs(age, df=4) + site", _table(8))
    (sentence,) = diagnosis.warnings
    assert "8 rows are too few for 9 columns" in sentence


def test_sparse_cells_are_counted() -> None:
    table = _table()
    table.loc[:2, "site"] = "rare"
    table.loc[:2, "ill"] = [0, 0, 1]
    table.loc[table["site"] == "a", "ill"] = 0
    counts = pd.crosstab(table["site"], table["ill"])
    diagnosis = _diagnosis("site*sex + age", table, min_rows=10)
    found = {
        (cell.levels["site"], cell.levels.get("ill"), cell.levels.get("sex")): cell.num_rows
        for cell in diagnosis.sparse_cells
        if "site" in cell.levels
    }
    for (site, ill), count in counts.stack().items():
        assert found.get((site, str(ill), None)) == (count if count < 10 else None)
    for (site, sex), count in pd.crosstab(table["site"], table["sex"]).stack().items():
        assert found.get((site, None, sex)) == (count if count < 10 else None)
    assert [cell.num_rows for cell in diagnosis.sparse_cells] == sorted(found.values())
    assert "site = a, ill = 1: no rows" in str(diagnosis)
    assert _diagnosis("site*sex + age", table, min_rows=1).sparse_cells == diagnosis.sparse_cells[:1]


def test_constant_columns_are_left_out() -> None:
    table = _table()
    table["coil"], table["one"] = "c", 3.0
    diagnosis = _diagnosis("age + coil + one", table)
    assert diagnosis.constant == ("one", "coil")
    assert math.isnan(diagnosis.variance_inflation["one"])
    assert math.isfinite(diagnosis.condition_number)
    assert "one, coil are constant" in diagnosis.notes[0]
    one_label = Design("age", labels="ill").fit(table).diagnose(table[table["ill"] == 1])
    assert one_label.constant == ("ill",)
    assert one_label.canonical_correlations == ()


def test_without_labels() -> None:
    table = _table().drop(columns="ill")
    diagnosis = _diagnosis("age + site", table)
    assert diagnosis.label_names == ()
    assert diagnosis.association == {}
    assert not diagnosis.warnings
    with pytest.raises(ValueError, match="at least 2"):
        Design("age").fit(table).diagnose(table[:1])


def test_the_page_is_escaped() -> None:
    table = _table()
    table["site"] = np.where(table["site"] == "a", "<script>", table["site"])
    table.loc[table["site"] == "<script>", "ill"] = 0
    page = _diagnosis("site + age", table)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "R² of ill on the metadata" in page


@given(st.integers(12, 60), st.integers(0, 1000), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_units_and_order_of_rows_mean_nothing(n: int, seed: int, shift: float, scale: float) -> None:
    table = _table(n, seed)
    other = table.sample(frac=1, random_state=seed)
    other["age"] = shift + scale * other["age"]
    first, second = (_diagnosis("age + iq", each) for each in (table, other))
    assert second.condition_number == pytest.approx(first.condition_number, rel=1e-6)
    assert list(second.variance_inflation.values()) == pytest.approx(
        list(first.variance_inflation.values()), rel=1e-6
    )
    assert second.collinear == first.collinear
