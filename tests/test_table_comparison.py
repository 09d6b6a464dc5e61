"""The comparison of ways to take metadata out of tables, on few rows, and the page that shows all of it."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmark_modules import load
from mdnorm.sklearn import MetadataResidualizer

ROOT = Path(__file__).parent.parent
comparison = load("table_comparison")

STORED = ROOT / "docs/results/table-comparison.json"
REAL = ["penguins", "diabetes", "breast-cancer", "digits"]


def small_sites(seed=0, shares=(0.2, 0.8), num_features=12, scale=False):
    split = comparison._site_split(seed, 200, num_features, shares, scale=scale)
    return comparison.standardised(split)


def transformed(name, split, part="held_out"):
    method = comparison.METHODS[name]
    return method.fit(split.train, **method.options)(getattr(split, part))


def within_labels(values, label):
    values = np.array(values, dtype=np.float64)
    for level in np.unique(label):
        values[label == level] -= values[label == level].mean(axis=0)
    return values


# --------------------------------------------------------------------------------------------------------
# The methods
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sites", "age"])
def test_without_labels_three_packages_do_the_same(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import OracleEraser

    split = small_sites(shares=(0.3, 0.5, 0.8)) if case == "sites" else comparison.curved_age(0)
    columns = comparison.Columns(split.train.metadata)
    train, held_out = columns(split.train.metadata), columns(split.held_out.metadata)
    model = MetadataResidualizer(protect_target=False).fit(
        split.train.features, split.train.label, metadata=train
    )
    ours = model.transform(split.held_out.features, metadata=held_out)
    fairlearn = transformed("correlation-remover", split)
    eraser = OracleEraser.fit(torch.from_numpy(split.train.features), torch.from_numpy(train))
    oracle = eraser(torch.from_numpy(split.held_out.features), torch.from_numpy(held_out)).numpy()
    np.testing.assert_allclose(ours, fairlearn, atol=1e-10)
    np.testing.assert_allclose(ours, oracle, atol=1e-10)
    assert np.abs(ours - split.held_out.features).max() > 0.1


def test_site_scale_is_neuroharmonize_with_the_label_as_covariate():
    split = small_sites(shares=(0.3, 0.5, 0.8), scale=True)
    ours, theirs = transformed("mdnorm-scale", split), transformed("neuroharmonize-label", split)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(ours - transformed("neuroharmonize", split)).max() > 0.01
    assert np.abs(ours - transformed("neuroharmonize-given", split)).max() > 0.01


@pytest.mark.parametrize("name", ["leace", "leace-orth", "splince", "correlation-remover"])
def test_without_labels_no_covariance_with_the_metadata_is_left_in_training_rows(name):
    split = small_sites(shares=(0.3, 0.5, 0.8))
    features = transformed(name, split, "train")
    concept = comparison.Columns(split.train.metadata)(split.train.metadata)
    before = np.abs(split.train.features.T @ concept).max() / len(concept)
    after = np.abs((features - features.mean(axis=0)).T @ concept).max() / len(concept)
    assert after < 1e-8 < 0.1 < before


@pytest.mark.parametrize("name", ["leace-within", "leace-kept", "mdnorm"])
def test_with_labels_no_covariance_within_them_is_left_in_training_rows(name):
    split = small_sites()
    concept = comparison.Columns(split.train.metadata)(split.train.metadata)
    label = split.train.label
    features, concept = (
        within_labels(values, label) for values in (transformed(name, split, "train"), concept)
    )
    assert np.abs(features.T @ concept).max() / len(concept) < 1e-8
    whole = transformed("leace", split, "train")
    assert np.abs(within_labels(whole, label).T @ concept).max() / len(concept) > 0.05


@pytest.mark.parametrize("name", ["leace-kept", "splince"])
def test_where_class_means_are_kept_they_are_those_before(name):
    split = small_sites()
    features, moved = (transformed(method, split, "train") for method in (name, "leace-within"))
    for label in (0, 1):
        rows = split.train.label == label
        np.testing.assert_allclose(features[rows].mean(axis=0), split.train.features[rows].mean(axis=0))
        assert np.abs(moved[rows].mean(axis=0) - split.train.features[rows].mean(axis=0)).max() > 0.01


def test_the_mdnorm_row_is_least_squares_with_the_label_in_the_regression():
    split = small_sites(shares=(0.3, 0.5, 0.8))
    site = pd.get_dummies(split.train.metadata["site"], dtype=float).to_numpy()
    rows = np.column_stack([site, split.train.label])
    effects = np.linalg.lstsq(rows, split.train.features, rcond=None)[0][:3]
    held_out = pd.get_dummies(split.held_out.metadata["site"], dtype=float).to_numpy()
    expected = split.held_out.features - (held_out - site.mean(axis=0)) @ effects
    np.testing.assert_allclose(transformed("mdnorm", split), expected, atol=1e-10)


@pytest.mark.parametrize("name", list(comparison.METHODS))
def test_a_row_is_transformed_without_looking_at_the_other_new_rows(name):
    numbers = comparison.METHODS[name].needs == "numbers"
    split = comparison.curved_age(1) if numbers else small_sites(1)
    method = comparison.METHODS[name]
    assert comparison.usable(method, split.train)
    transform = method.fit(split.train, **method.options)
    # Of both sites, which neuroHarmonize needs.
    chosen = np.array([0, 1, 3, 50, 51])
    whole, alone = transform(split.held_out), transform(split.held_out.rows(chosen))
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(whole[chosen], alone, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in comparison.METHODS if name != "neuroharmonize-given"])
def test_labels_of_held_out_rows_are_not_used(name):
    numbers = comparison.METHODS[name].needs == "numbers"
    split = comparison.curved_age(1) if numbers else small_sites(1)
    method = comparison.METHODS[name]
    transform = method.fit(split.train, **method.options)
    swapped = comparison.replace(split.held_out, label=1 - split.held_out.label)
    np.testing.assert_array_equal(transform(split.held_out), transform(swapped))


# --------------------------------------------------------------------------------------------------------
# What the page claims, on few rows
# --------------------------------------------------------------------------------------------------------


def fitted(name, split):
    method = comparison.METHODS[name]
    return method.fit(split.train, **method.options)


def test_a_label_that_goes_with_the_site_is_not_erased_with_it():
    names = ["reference", "none", "correlation-remover", "leace", "mdnorm"]
    splits = [comparison.standardised(comparison.correlated_sites(seed)) for seed in range(5)]
    kept = {
        name: np.mean([comparison.accuracy(split, fitted(name, split)) for split in splits]) for name in names
    }
    assert kept["mdnorm"] > kept["correlation-remover"] + 0.02
    assert kept["mdnorm"] > kept["leace"] + 0.02
    assert kept["mdnorm"] > kept["none"] + 0.02
    assert kept["mdnorm"] > kept["reference"] - 0.03
    split = splits[0]
    left = {
        name: comparison.probes(transformed(name, split), split.held_out, "linear", 0)[1]
        for name in ("none", "correlation-remover", "mdnorm")
    }
    assert left["none"] > 0.8
    assert left["mdnorm"] < left["correlation-remover"] - 0.2


def test_spread_needs_a_method_that_knows_it():
    split = small_sites(0, (0.5, 0.5, 0.5), 20, scale=True)
    names = ("none", "mdnorm", "mdnorm-scale")
    left = {name: comparison.dependence(transformed(name, split), split)["dcor2_within"] for name in names}
    assert 3 * left["mdnorm-scale"] < left["mdnorm"] < left["none"] / 2
    location, scale = (
        comparison.probes(transformed(name, split), split.held_out, "nonlinear", 0)[1] for name in names[1:]
    )
    assert scale < location - 0.2


def test_curves_need_a_basis():
    split = comparison.standardised(comparison.curved_age(0))
    line, spline = (
        comparison.dependence(transformed(name, split), split)["dcor2_within"]
        for name in ("mdnorm", "mdnorm-spline")
    )
    assert spline < 0.03 < 0.1 < line
    found = comparison.probes(transformed("mdnorm-spline", split), split.held_out, "nonlinear", 0)
    assert found[1] < 0.1
    assert comparison.accuracy(split, fitted("mdnorm-spline", split)) > 0.03 + comparison.accuracy(
        split, fitted("none", split)
    )


# --------------------------------------------------------------------------------------------------------
# The data
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_label_allows_the_accuracy_that_the_page_says(seed):
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((3, 20)) / np.sqrt(3)
    effect = comparison._label_effect(rng, loadings)
    noise = comparison._noise(rng, loadings, 40_000)
    direction = np.linalg.solve(np.cov(noise.T), effect)
    # The best classifier there is: a normal distribution each, with the same known covariance.
    threshold = direction @ effect / 2
    right = [(noise @ direction < threshold).mean(), ((noise + effect) @ direction > threshold).mean()]
    assert np.mean(right) == pytest.approx(0.87, abs=0.005)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=80),
    st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3),
    st.integers(0, 2**16),
)
def test_thinned_rows_have_the_shares_and_are_as_many_as_possible(rows, shares, seed):
    strata, label = np.array(rows).T
    chosen = comparison.thinned(strata, label, np.array(shares), np.random.default_rng(seed))
    assert (np.diff(chosen) > 0).all()
    for stratum, share in enumerate(shares):
        inside = label[chosen[strata[chosen] == stratum]]
        ones, zeros = (((strata == stratum) & (label == value)).sum() for value in (1, 0))
        assert abs((inside == 1).sum() - share * inside.size) <= 1
        # Of one label all rows are there, or the shares could be had with more.
        assert (inside == 1).sum() == ones or (inside == 0).sum() == zeros


@pytest.mark.parametrize("case", REAL)
def test_real_data_are_halved_and_nothing_else(case):
    split = comparison.CASES[case].split(0)
    again, other = comparison.CASES[case].split(0), comparison.CASES[case].split(1)
    np.testing.assert_array_equal(split.train.features, again.train.features)
    assert other.train.features.shape != split.train.features.shape or not np.array_equal(
        other.train.features, split.train.features
    )
    train, held_out, independent = (
        {row.tobytes() for row in table.features}
        for table in (split.train, split.held_out, split.independent)
    )
    assert not train & held_out
    assert independent <= held_out
    assert (split.independent.label == 1).sum() == (split.independent.label == 0).sum() > 25
    for table in (split.train, split.held_out, split.independent):
        assert len(table.features) == len(table.metadata) == len(table.label)
        assert np.isfinite(table.features).all()


@pytest.mark.parametrize("case", ["penguins", "digits"])
def test_training_rows_are_chosen_so_that_label_and_metadata_go_together(case):
    split = comparison.CASES[case].split(0)

    def agreement(table):
        values = table.metadata.iloc[:, 0]
        codes = values.map({"Chinstrap": 0, "Adelie": 1, "Gentoo": 2}) if case == "penguins" else values
        return np.corrcoef(codes.to_numpy(float), table.label)[0, 1]

    assert agreement(split.train) > 0.3
    assert abs(agreement(split.independent)) < 0.05


def test_columns_come_from_the_training_rows():
    rng = np.random.default_rng(0)
    train = pd.DataFrame({"age": rng.uniform(20, 80, 50), "site": rng.choice(["a", "b", "c"], 50)})
    new = pd.DataFrame({"age": [30.0, 900.0], "site": ["c", "a"]})
    raw = np.column_stack([train["age"], pd.get_dummies(train["site"], dtype=float).to_numpy()[:, 1:]])
    expected = (np.array([[30.0, 0, 1], [900.0, 0, 0]]) - raw.mean(axis=0)) / raw.std(axis=0)
    columns = comparison.Columns(train)
    np.testing.assert_allclose(columns(new), expected)
    np.testing.assert_allclose(columns(train).std(axis=0), 1)
    flexible = comparison.Columns(train, flexible=True)
    assert flexible(new).shape == (2, 7)
    # Beyond the training ages a spline stays where it was at the oldest.
    oldest = pd.DataFrame({"age": [train["age"].max()], "site": ["a"]})
    np.testing.assert_allclose(flexible(new)[1], flexible(oldest)[0])
    assert comparison.Columns(train, all_levels=True)(new).shape == (2, 4)


# --------------------------------------------------------------------------------------------------------
# Table, figure and page
# --------------------------------------------------------------------------------------------------------


def row(method, accuracy, linear):
    zeros = dict.fromkeys([*comparison._HEADINGS, "nonlinear"], 0.0)
    return (
        {"case": "age", "method": method, "seed": 0}
        | zeros
        | {
            "accuracy": accuracy,
            "linear_within": linear,
            "dcor2": -0.0001,
            "dcor2_within": -0.0123,
        }
    )


def test_the_table_has_means_and_deviations():
    rows = [row("none", 0.8, 0.5), row("none", 0.9, 0.52), row("mdnorm", 0.7, -0.03)]
    found = comparison.summary(rows, "age")
    assert list(found) == ["none", "mdnorm"]
    assert found["none"]["accuracy"] == pytest.approx((0.85, 0.05 * 2**0.5))
    lines = comparison.markdown(rows, "age").splitlines()
    assert lines[2] == "| nothing done | 0.000 | −0.012 | 0 | 51 | 0 | 0 | 0 | 85.0 ± 7.1 |"
    assert lines[3] == "| mdnorm | 0.000 | −0.012 | 0 | −3 | 0 | 0 | 0 | 70.0 ± 0.0 |"
    assert comparison.summary(rows, "digits") == {}


def test_the_command_measures_once_and_prints_the_tables_again(tmp_path, monkeypatch, capsys):
    def few(seed):
        split = comparison._site_split(seed, 80, 4, (0.3, 0.7))
        return comparison.replace(split, held_out=split.held_out.rows(np.arange(80)))

    case = comparison.Case("Few rows", few, 2)
    monkeypatch.setattr(comparison, "CASES", {"few": case})
    names = ["none", "leace", "mdnorm", "mdnorm-spline", "mdnorm-scale"]
    methods = {name: comparison.METHODS[name] for name in names}
    monkeypatch.setattr(comparison, "METHODS", methods)
    comparison.main(["--out", str(tmp_path), "--cases", "few", "--seeds", "1"])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "table-comparison.json").read_text())
    # A site is no continuous column.
    assert [entry["method"] for entry in rows] == ["none", "leace", "mdnorm", "mdnorm-scale"]
    assert all(np.isfinite(entry[name]) for entry in rows for name in comparison._HEADINGS)
    assert (tmp_path / "table_comparison.png").stat().st_size > 10_000
    assert printed.count("\n| ") == 4 + 2

    # One method anew leaves the rows of the others as they are.
    rows[0]["accuracy"] = 0.25
    (tmp_path / "table-comparison.json").write_text(json.dumps(rows))
    comparison.main(["--out", str(tmp_path), "--seeds", "1", "--methods", "leace"])
    assert json.loads((tmp_path / "table-comparison.json").read_text()) == rows
    printed = capsys.readouterr().out

    def fail(seed):
        raise AssertionError("measured again")

    monkeypatch.setattr(comparison, "CASES", {"few": comparison.Case("Few rows", fail, 2)})
    comparison.main(["--out", str(tmp_path), "--markdown"])
    assert capsys.readouterr().out == printed


def test_the_page_shows_the_stored_rows():
    rows = json.loads(STORED.read_text(encoding="utf-8"))
    page = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    for name, case in comparison.CASES.items():
        assert {entry["seed"] for entry in rows if entry["case"] == name} == set(range(case.seeds))
        assert comparison.markdown(rows, name) in page, name
