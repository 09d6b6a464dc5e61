"""`summary` of fitted regressions against statsmodels and against one-way variance components."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from numpy.testing import assert_allclose
from safetensors import safe_open
from safetensors.numpy import save_file

from mdnorm import Design
from mdnorm.integration.recalibration import Recalibration
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import MetadataModel, Moments, residualize_file
from mdnorm.text import aligned

FORMULA = "f ~ age + C(scanner) + C(y) + dose"


def _data(
    n: int = 120, num_features: int = 3, seed: int = 0
) -> tuple[np.ndarray, pd.DataFrame, np.ndarray, pd.DataFrame]:
    """Features, metadata with sites, labels, a covariate: all of them related."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    frame = pd.DataFrame(
        {
            "age": rng.normal(50, 10, n) + 4 * label,
            "scanner": rng.choice(["A", "B", "C"], n),
            "site": rng.choice(["york", "oslo", "rome", "bern"], n, p=[0.4, 0.3, 0.2, 0.1]),
        }
    )
    labels = pd.DataFrame({"dose": rng.normal(size=n) + 0.02 * frame["age"]})
    features = rng.normal(size=(n, num_features)) * (1 + (frame["site"] == "oslo").to_numpy()[:, None])
    features += 0.03 * frame[["age"]].to_numpy() * rng.normal(size=num_features) + label[:, None] * 0.5 + 100
    features += pd.factorize(frame["site"])[0][:, None] * rng.normal(size=num_features)
    return features, frame, label, labels


def _table(features: np.ndarray, *parts: Any) -> pd.DataFrame:
    frame, label, labels = parts
    return pd.concat([frame, labels], axis=1).assign(y=label, f=features)


def _check(
    summary: Any, table: pd.DataFrame, features: np.ndarray, formula: str, weights: Any = None
) -> None:
    """Everything that statsmodels says of each feature, variable by variable and column by column."""
    rows = np.ones(len(table)) if weights is None else weights
    named = {"C(scanner)": "scanner", "C(y)": "y", "C(site)": "site"}
    for index, feature in enumerate(features.T):
        fit = smf.wls(formula, table.assign(f=feature)[rows > 0], weights=rows[rows > 0]).fit()
        assert summary.df_residual == fit.df_resid
        anova = sm.stats.anova_lm(fit, typ=3)
        tests = {r["variable"]: r for r in summary.variables if r["feature"] == f"x{index}"}
        assert set(tests) == {named.get(name, name) for name in anova.index} - {"Intercept", "Residual"}
        residual = anova.loc["Residual", "sum_sq"]
        for name in anova.index.drop(["Intercept", "Residual"]):
            test, expected = tests[named.get(name, name)], anova.loc[name]
            assert test["df"] == expected["df"]
            assert_allclose(test["F"], expected["F"], rtol=1e-8)
            assert_allclose(test["p"], expected["PR(>F)"], rtol=1e-8)
            eta = expected["sum_sq"] / (expected["sum_sq"] + residual)
            assert_allclose(test["partial_eta_squared"], eta, rtol=1e-8)
        columns = {r["column"]: r for r in summary.coefficients if r["feature"] == f"x{index}"}
        for name in fit.params.index.drop("Intercept"):
            if name.startswith("C(site)"):
                continue
            key = name.replace("C(scanner)[T.", "scanner[T.").replace("C(y)[T.", "y[T.")
            record = columns.pop(key)
            got = [record[what] for what in ("estimate", "standard_error", "t", "p")]
            wanted = [values[name] for values in (fit.params, fit.bse, fit.tvalues, fit.pvalues)]
            assert_allclose(got, wanted, rtol=1e-8)
        assert not columns
        record = summary.features[index]
        assert_allclose(record["residual_deviation"], np.sqrt(fit.scale), rtol=1e-8)
        assert_allclose(record["r_squared"], fit.rsquared, rtol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("site", [None, "site"])
def test_is_what_statsmodels_says(site: str | None, weighted: bool) -> None:
    features, frame, label, labels = _data()
    weights = np.random.default_rng(3).choice([0, 0.5, 1, 3], len(features)) if weighted else None
    used = frame if site else frame.drop(columns="site")
    estimator = MetadataResidualizer(site=site, scale=bool(site), empirical_bayes=bool(site))
    fitted = estimator.fit(features, label, metadata=used, labels=labels, sample_weight=weights)
    summary = fitted.summary()
    formula = FORMULA + (" + C(site)" if site else "")
    _check(summary, _table(features[:, 0], frame, label, labels), features, formula, weights)
    assert {r["variable"]: r["role"] for r in summary.variables} == {
        **({"site": "removed"} if site else {}),
        **{"age": "removed", "scanner": "removed", "dose": "protected", "y": "protected"},
    }
    assert [r["column"] for r in summary.coefficients[::3]] == [
        "age",
        "scanner[T.B]",
        "scanner[T.C]",
        "dose",
        "y[T.1]",
        "y[T.2]",
    ]
    assert summary.notes == ()


def test_partial_fit_says_what_fit_says() -> None:
    features, frame, label, labels = _data()
    settings: dict[str, Any] = {"site": "site", "scale": True}
    whole = MetadataResidualizer(**settings).fit(features, label, metadata=frame, labels=labels)
    parts = MetadataResidualizer(**settings)
    for rows in np.array_split(np.arange(len(features)), 5):
        parts.partial_fit(features[rows], label[rows], metadata=frame.iloc[rows], labels=labels.iloc[rows])
    for table in ("coefficients", "variables", "features", "sites", "site_effects"):
        one, other = (each.summary().to_frame(table) for each in (whole, parts))
        sort = [name for name in ("site", "variable", "column", "feature") if name in one]
        one, other = (each.sort_values(sort, ignore_index=True) for each in (one, other))
        pd.testing.assert_frame_equal(one, other, rtol=1e-8, check_dtype=False)


def _one_way(values: np.ndarray, site: np.ndarray) -> float:
    """The intraclass correlation by sums over rows and groups, as in textbooks."""
    groups = [values[site == name] for name in np.unique(site)]
    count = np.array([len(group) for group in groups])
    between = sum(len(g) * (g.mean() - values.mean()) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (len(values) - len(groups))
    size = (len(values) - (count**2).sum() / len(values)) / (len(groups) - 1)
    variance = (between - within) / size
    return float(variance / (variance + within))


@pytest.mark.parametrize("reference_site", [None, "rome"])
@pytest.mark.parametrize("scale", [False, True])
def test_sites_before_and_after(scale: bool, reference_site: str | None) -> None:
    features, frame, label, labels = _data()
    estimator = MetadataResidualizer(
        site="site", scale=scale, empirical_bayes=scale, reference_site=reference_site
    )
    estimator.fit(features, label, metadata=frame, labels=labels)
    after = estimator.transform(features, metadata=frame, labels=labels)
    summary, site = estimator.summary(), frame["site"].to_numpy()
    assert [r["site"] for r in summary.sites] == sorted(set(site))
    assert [r["rows"] for r in summary.sites] == frame["site"].value_counts().sort_index().tolist()
    for index, record in enumerate(summary.features):
        assert_allclose(record["icc_before"], _one_way(features[:, index], site), rtol=1e-8)
        assert_allclose(record["icc_after"], _one_way(after[:, index], site), rtol=1e-8)
        assert record["icc_after"] < record["icc_before"]
    effects = summary.to_frame("site_effects").set_index(["site", "feature"])
    for when, values in (("before", features), ("after", after)):
        groups = pd.DataFrame(values, columns=["x0", "x1", "x2"]).groupby(site)
        assert_allclose(effects[f"mean_{when}"].unstack(), groups.mean(), rtol=1e-8)
        assert_allclose(effects[f"deviation_{when}"].unstack(), groups.std(), rtol=1e-8)


def test_weights_of_one_size_change_nothing() -> None:
    features, frame, label, _ = _data()
    one, other = (
        MetadataResidualizer(site="site")
        .fit(features, label, metadata=frame, sample_weight=weights)
        .summary()
        for weights in (None, np.full(len(features), 7.0))
    )
    for table in ("coefficients", "variables", "features", "site_effects"):
        first, second = one.to_frame(table), other.to_frame(table)
        if table == "features":  # the deviation of a row of weight 1
            second["residual_deviation"] /= 7**0.5
        pd.testing.assert_frame_equal(first, second, rtol=1e-8)


def test_collinear_and_constant_columns() -> None:
    features, frame, label, _ = _data()
    metadata = pd.DataFrame(
        {"age": frame["age"], "days": 365 * frame["age"], "one": 1.0, "dose": np.arange(len(frame)) % 7.0}
    )
    summary = MetadataResidualizer().fit(features, label, metadata=metadata).summary()
    assert summary.rank == 5
    errors = {r["column"]: r["standard_error"] for r in summary.coefficients}
    assert [name for name, error in errors.items() if error is None] == ["age", "days", "one"]
    tests = {r["variable"]: r for r in summary.variables}
    assert [(name, tests[name]["df"], tests[name]["F"]) for name in ("age", "days", "one")] == [
        ("age", 0, None),
        ("days", 0, None),
        ("one", 0, None),
    ]
    assert summary.notes[0].startswith("No standard error: 'age', 'days', 'one' (constant, or a combination")
    assert summary.notes[1].startswith("No F test: 'age', 'days', 'one' (")
    assert "nan" not in str(summary)
    table = metadata.assign(f=features[:, -1], y=label)
    fit = smf.ols("f ~ age + dose + C(y)", table).fit()
    assert_allclose(errors["dose"], fit.bse["dose"], rtol=1e-8)
    assert summary.df_residual == fit.df_resid


def test_a_category_that_is_collinear_in_part() -> None:
    features, frame, label, _ = _data()
    metadata = pd.DataFrame({"scanner": frame["scanner"], "is_b": (frame["scanner"] == "B").astype(float)})
    summary = MetadataResidualizer().fit(features, label, metadata=metadata).summary()
    tests = {r["variable"]: r for r in summary.variables if r["feature"] == "x1"}
    table = metadata.assign(f=features[:, 1], y=label)
    full = smf.ols("f ~ C(scanner) + C(y)", table).fit()
    less = smf.ols("f ~ is_b + C(y)", table).fit()
    f, p, _ = full.compare_f_test(less)
    assert (tests["scanner"]["df"], tests["is_b"]["df"]) == (1, 0)
    assert_allclose([tests["scanner"]["F"], tests["scanner"]["p"]], [f, p], rtol=1e-8)


def test_a_column_that_the_sites_determine() -> None:
    features, frame, _, _ = _data()
    metadata = frame.assign(north=(frame["site"] == "oslo").astype(float))[["age", "site", "north"]]
    summary = MetadataResidualizer(site="site").fit(features, metadata=metadata).summary()
    table = metadata.assign(f=features[:, 0])
    f, p, df = (
        smf.ols("f ~ age + C(site)", table).fit().compare_f_test(smf.ols("f ~ age + north", table).fit())
    )
    test = summary.variables[0]
    assert (test["variable"], test["df"]) == ("site", df)
    assert_allclose([test["F"], test["p"]], [f, p], rtol=1e-8)
    assert "'north'" in summary.notes[0]


def test_features_without_residual_variance() -> None:
    features, frame, _, _ = _data()
    features[:, 0], features[:, 1] = 3, 2 * frame["age"] + 1
    summary = MetadataResidualizer().fit(features, metadata=frame[["age"]]).summary()
    assert [r["F"] is None for r in summary.variables] == [True, True, False]
    assert summary.notes == (
        "No tests: feature(s) 'x0', 'x1' have no variance beyond what the columns explain.",
    )


def test_many_features_and_one() -> None:
    features, frame, _, _ = _data(num_features=300)
    text = str(MetadataResidualizer(site="site").fit(features, metadata=frame).summary())
    assert "the 5 of 300 features with the largest F (the other 295 are in .variables)" in text
    assert "the 5 of 300 features with the largest |t| (the other 295 are in .coefficients)" in text
    assert len(text.splitlines()) < 60
    columns = np.random.default_rng(0).normal(size=(120, 25))
    text = str(MetadataResidualizer().fit(features, metadata=columns).summary())
    assert "the 1 of 300 features with the largest F (the other 299 are in .variables)" in text
    assert len(text.splitlines()) == 1 + 2 * (3 + 25)
    summary = MetadataResidualizer(site="site").fit(features[:, :1], metadata=frame).summary()
    assert "other" not in str(summary).split("Coefficients")[1]
    assert len(summary.variables) == 3
    assert len(summary.to_frame("variables")) == 3


def test_the_strongest_features_are_shown() -> None:
    rng = np.random.default_rng(0)
    age = rng.normal(size=60)
    features = rng.normal(size=(60, 9))
    features[:, 7] += 5 * age
    lines = str(MetadataResidualizer().fit(features, metadata=age).summary()).splitlines()
    first = lines[lines.index(next(line for line in lines if line.startswith("variable "))) + 1]
    assert first.split()[:3] == ["m0", "removed", "x7"]


def test_too_few_rows_and_ridge() -> None:
    rng = np.random.default_rng(0)
    features, columns = rng.normal(size=(5, 2)), rng.normal(size=(5, 4))
    # With nothing to remove no fit is refused.
    fitted = MetadataResidualizer(metadata_columns=()).fit(features, labels=columns)
    with pytest.raises(ValueError, match=r"too few rows for a summary \(n_samples=5\): 5 row\(s\) for 5 lin"):
        fitted.summary()
    with pytest.raises(ValueError, match=r"ridge=0\.1: .* Fit with ridge=0 for a summary"):
        MetadataResidualizer(ridge=0.1).fit(features, metadata=columns).summary()


def test_odd_names_and_wide_text() -> None:
    features, frame, label, _ = _data()
    metadata = frame.rename(columns={"age": "age\nin years", "scanner": "年齢"})
    table = pd.DataFrame(features, columns=["größe", "a\tb\x1b[31m", "$x$"])
    summary = MetadataResidualizer(site="site").fit(table, label, metadata=metadata).summary()
    text = str(summary)
    assert "age\\nin years" in text
    assert "a\\tb\\x1b[31m" in text
    assert "größe" in text
    assert "`年齢`[T.B]" in text
    assert text.isprintable() or set(text) - set("\n") == {c for c in text if c.isprintable()}
    assert summary.coefficients[0]["column"] == "`age\nin years`"
    assert aligned([("年", "1"), ("ab", "2")]) == ["年  1", "ab  2"]


def test_sites_of_adapt_are_not_part_of_the_fit() -> None:
    features, frame, _, _ = _data()
    estimator = MetadataResidualizer(site="site").fit(features, metadata=frame)
    before = estimator.summary()
    estimator.adapt(features[:9] + 5, metadata=frame[:9].assign(site="new"))
    assert estimator.summary().sites == before.sites
    assert len(before.sites) == 4


def test_plot_and_frames() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    features, frame, _, _ = _data()
    frame["site"] = frame["site"].replace("york", "$y_rk$")
    estimator = MetadataResidualizer(site="site", scale=True).fit(features, metadata=frame)
    figure = estimator.summary().plot()
    figure.canvas.draw()
    labels = [axis.get_title() for axis in figure.axes]
    assert labels == [
        "location before",
        "location after",
        "scale before",
        "scale after",
    ]
    assert next(label.get_text() for label in figure.axes[2].get_xticklabels()) == "$y_rk$"
    middles = [
        [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "-"] for axis in figure.axes
    ]
    assert np.ptp(middles[1]) < np.ptp(middles[0])
    plt.close(figure)
    alone = MetadataResidualizer().fit(features, metadata=frame[["age"]]).summary()
    with pytest.raises(ValueError, match="at least two sites, got 0"):
        alone.plot()
    with pytest.raises(ValueError, match="table must be one of"):
        alone.to_frame("coef")
    with pytest.raises(dataclasses.FrozenInstanceError):
        alone.rank = 3  # type: ignore[misc]
    assert alone.sites == []


def test_a_model_of_a_file_and_saved(tmp_path: Path) -> None:
    features, frame, label, labels = _data()
    table = frame.assign(y=label.astype(str), dose=labels["dose"], w=np.where(frame["age"] > 45, 2.0, 1.0))
    table[["x0", "x1", "x2"]] = features
    table.to_csv(tmp_path / "table.csv", index=False)
    settings: dict[str, Any] = {"site": "site", "scale": True, "weights": "w", "features": "x*"}
    residualize_file(
        tmp_path / "table.csv",
        tmp_path / "out.csv",
        formula="age + C(scanner)",
        labels=["C(y)", "dose"],
        save_model=tmp_path / "fit.safetensors",
        batch_rows=50,
        **settings,
    )
    model = MetadataModel.load(tmp_path / "fit.safetensors")
    summary = model.summary()
    full = "f ~ age + C(scanner) + C(site) + C(y) + dose"
    fit = smf.wls(full, table.assign(f=features[:, 1]), weights=table["w"]).fit()
    for record in summary.coefficients:
        if record["feature"] == "x1":
            name = record["column"]
            wanted = [fit.params[name], fit.bse[name], fit.pvalues[name]]
            assert_allclose([record[k] for k in ("estimate", "standard_error", "p")], wanted, rtol=1e-8)
    anova = sm.stats.anova_lm(fit, typ=3)
    for record in summary.variables:
        if record["feature"] == "x1":
            name = "C(site)" if record["variable"] == "site" else record["variable"]
            assert_allclose([record["F"], record["df"]], anova.loc[name, ["F", "df"]], rtol=1e-8)
    after = pd.read_csv(tmp_path / "out.csv")
    effects = summary.to_frame("site_effects").set_index(["site", "feature"])["mean_after"].unstack()
    weighted = after[["x0", "x1", "x2"]].mul(table["w"], axis=0).groupby(table["site"]).sum()
    assert_allclose(effects, weighted.div(table.groupby("site")["w"].sum(), axis=0), rtol=1e-8)
    with pytest.raises(ValueError, match="this model has no moments"):
        dataclasses.replace(model, moments=None).summary()


@pytest.mark.parametrize("change", ["less", "more", "shape", "infinite"])
def test_a_saved_model_whose_moments_are_damaged(change: str, tmp_path: Path) -> None:
    features, frame, _, _ = _data()
    frame.assign(x0=features[:, 0]).to_csv(tmp_path / "table.csv", index=False)
    path = tmp_path / "fit.safetensors"
    residualize_file(
        tmp_path / "table.csv",
        tmp_path / "out.csv",
        formula="age",
        site="site",
        features="x0",
        save_model=path,
    )
    model = MetadataModel.load(path)
    assert model.moments is not None
    with safe_open(path, framework="numpy") as file:
        tensors, state = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    kept = {name: array for name, array in tensors.items() if name.startswith("moments.")}
    wide = Moments.empty(2, 1).update(features[:, :2], frame[["age"]]).to_arrays()
    tensors |= {
        "less": {name: array[1:] for name, array in kept.items()},
        "more": {"moments.more": kept["moments.gram"]},
        "shape": {f"moments.{name}": np.stack([array] * len(model.moments)) for name, array in wide.items()},
        "infinite": {"moments.squares": kept["moments.squares"] * np.inf},
    }[change]
    save_file(tensors, path, metadata=state)
    with pytest.raises(ValueError, match=r"the coefficients in .* are damaged: .*[mM]oments"):
        MetadataModel.load(path)
    model.save(path, moments=False)
    assert MetadataModel.load(path).moments is None


def test_terms_are_variables() -> None:
    _, frame, label, _ = _data()
    table = frame.assign(y=label.astype(str))
    design = Design("age * C(scanner) + bs(age, df=4)", labels="y").fit(table)
    assert [*design.terms] == ["age", "C(scanner)", "bs(age, df=4)", "age:C(scanner)", "y"]
    assert sum(design.terms.values(), ()) == (*design.metadata_names, *design.label_names)
    assert_allclose(design.units[0], frame["age"].std(ddof=0))
    raw = Design("age", standardize=False).fit(table)
    assert raw.units.tolist() == [1.0]


def test_reports_share_their_tables() -> None:
    assert (
        str(Recalibration(())).splitlines()[0] == "layer  rows  new rows  columns  noise  kept  found again"
    )
