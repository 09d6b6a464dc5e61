"""`MetadataResidualizer` against least squares, fairlearn and neuroHarmonize, and inside scikit-learn."""

import contextlib
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import statsmodels.api as sm
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import mdnorm.tables
import reference
from mdnorm import metadata_norm
from mdnorm.design import LeakageWarning
from mdnorm.sklearn import MetadataResidualizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    from neuroHarmonize import harmonizationApply, harmonizationLearn


# Before, a pipeline's score took no metadata for its transformers.
routed_scores = pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8), reason="scikit-learn below 1.8"
)


@pytest.fixture
def _routing() -> Iterator[None]:
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def _table(n: int = 90, num_features: int = 5, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
    """Features, metadata of every kind, a binary label that goes with them."""
    rng = np.random.default_rng(seed)
    site = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    label = (rng.random(n) < 0.3 + 0.2 * site).astype(int)
    frame = pd.DataFrame(
        {
            "age": rng.integers(20, 80, n) + 5.0 * label,
            "sex": rng.choice(["m", "f"], n),
            "site": np.array(["york", "oslo", "rome"])[site],
        }
    )
    features = (
        rng.standard_normal((n, num_features)) * (1 + site[:, None]) + 2.0 * label[:, None] + site[:, None]
    )
    features += 0.1 * frame[["age"]].to_numpy() + (frame[["sex"]] == "m").to_numpy() + 100
    return features, frame, label


def _indicators(frame: pd.DataFrame) -> np.ndarray:
    return pd.get_dummies(frame, drop_first=True).to_numpy(float)


# --------------------------------------------------------------------------------------------------------
# scikit-learn's own checks
# --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no metadata. X is returned unchanged:UserWarning")
@pytest.mark.filterwarnings("ignore::mdnorm.design.LeakageWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [
        MetadataResidualizer(),
        MetadataResidualizer(metadata_columns=(0,)),
        MetadataResidualizer(metadata_columns=(0,), keep_metadata=True, ridge=0.1, protect_target=False),
        MetadataResidualizer(metadata_columns=(0,), strength=0.5),
    ]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


# --------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------


@given(st.integers(12, 60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 10**6))
def test_equals_least_squares_and_the_layer(
    n: int, num_features: int, num_metadata: int, num_labels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.standard_normal((n, num_labels)) if num_labels else None
    metadata = rng.standard_normal((n, num_metadata)) + (0 if labels is None else labels[:, :1]) + 50
    features = rng.standard_normal((n, num_features)) + metadata[:, :1] - 200
    result = MetadataResidualizer().fit_transform(features, labels, metadata=metadata)
    np.testing.assert_allclose(result, reference.residual(features, metadata, labels), atol=1e-9)
    np.testing.assert_allclose(result, metadata_norm(torch.from_numpy(features), metadata, labels), atol=1e-9)


def test_labels_are_protected_and_needed_in_fit_only() -> None:
    features, frame, label = _table()
    metadata = _indicators(frame)
    residualizer = MetadataResidualizer().fit(features, label, metadata=frame)
    result = residualizer.transform(features, metadata=frame)
    np.testing.assert_allclose(result, reference.residual(features, metadata, label[:, None]), atol=1e-9)
    assert residualizer.metadata_names_ == ["age", "sex[T.m]", "site[T.rome]", "site[T.york]"]
    # The same labels in other forms, and as labels, and not protected.
    words = np.array(["control", "patient"])[label]
    for other in (words, words.astype(object), label.astype(float), label.astype(bool), label[:, None]):
        np.testing.assert_allclose(
            MetadataResidualizer().fit(features, other, metadata=frame).coef_, residualizer.coef_, atol=1e-10
        )
    as_covariate = MetadataResidualizer().fit(features, metadata=frame, labels=words)
    np.testing.assert_allclose(as_covariate.coef_, residualizer.coef_, atol=1e-10)
    unprotected = MetadataResidualizer(protect_target=False).fit(features, label, metadata=frame)
    np.testing.assert_allclose(
        unprotected.transform(features, metadata=frame), reference.residual(features, metadata), atol=1e-9
    )


def test_classes_are_indicators_and_numbers_are_numbers() -> None:
    features, frame, _ = _table()
    grade = np.random.default_rng(0).integers(0, 4, len(frame))
    metadata = frame["age"].to_numpy()[:, None]
    classes = MetadataResidualizer().fit_transform(features, grade, metadata=metadata)
    np.testing.assert_allclose(
        classes, reference.residual(features, metadata, np.eye(4)[grade][:, 1:]), atol=1e-9
    )
    for settings, y in (({"protect_target": "continuous"}, grade), ({}, grade.astype(float))):
        numbers = MetadataResidualizer(**settings).fit_transform(features, y, metadata=metadata)
        np.testing.assert_allclose(numbers, reference.residual(features, metadata, grade[:, None]), atol=1e-9)
    floats = MetadataResidualizer(protect_target="categorical").fit_transform(
        features, grade.astype(float), metadata=metadata
    )
    np.testing.assert_allclose(floats, classes, atol=1e-12)


def test_a_ridge_shrinks() -> None:
    features, frame, _ = _table()
    metadata = _indicators(frame)
    norms = [
        np.linalg.norm(MetadataResidualizer(ridge=ridge).fit(features, metadata=metadata).coef_)
        for ridge in (0.0, 1.0, 1e9)
    ]
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] < 1e-6


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e6]), st.lists(st.integers(0, 89), max_size=3))
def test_weights_are_those_of_statsmodels(seed: int, offset: float, cuts: list[int]) -> None:
    features, frame, label = _table(seed=seed)
    metadata = _indicators(frame)
    weights = np.random.default_rng(seed).choice([0.0, 0.2, 1.0, 30.0], 90, p=[0.2, 0.3, 0.3, 0.2])
    fitted = MetadataResidualizer()
    for rows in np.split(np.arange(90), sorted({0, *cuts}))[1:]:
        # The first chunk may be of one row, and the weights of a chunk may all be 0.
        arguments = {"metadata": metadata[rows] + offset, "sample_weight": weights[rows], "classes": [0, 1]}
        fitted.partial_fit(features[rows] - offset, label[rows], **arguments)
    design = np.column_stack([metadata, label])
    design = sm.add_constant(design - np.average(design, axis=0, weights=weights))
    for column, coefficients in zip(features.T, fitted.coef_.T, strict=True):
        expected = sm.WLS(column - 100, design, weights).fit().params
        np.testing.assert_allclose(coefficients, expected[1:-1], atol=1e-8 if offset else 1e-10)
    np.testing.assert_allclose(fitted.metadata_mean_, np.average(metadata, 0, weights) + offset, rtol=1e-12)
    assert fitted.moments_[None].num_rows == np.count_nonzero(weights)


@pytest.mark.parametrize("combat", [{}, {"scale": True}, {"scale": True, "empirical_bayes": True}])
@pytest.mark.parametrize("site", [None, "site"])
def test_a_weight_is_a_number_of_rows(site: str | None, combat: dict[str, Any]) -> None:
    features, frame, label = _table()
    settings = {} if site is None else {"site": site, **combat}
    weights = np.random.default_rng(1).integers(0, 3, 90)
    rows = np.repeat(np.arange(90), weights)
    expected = MetadataResidualizer(**settings).fit(features[rows], label[rows], metadata=frame.iloc[rows])
    weighted = MetadataResidualizer(**settings)
    weighted.fit(features, label, metadata=frame, sample_weight=weights)
    streamed = MetadataResidualizer(**settings)
    typed = frame.assign(sex=frame["sex"].astype("category"))
    typed = typed if site else typed.assign(site=frame["site"].astype("category"))
    for part, factor in ((slice(0, 40), 1), (slice(0, 90), 0), (slice(40, 90), 1)):
        arguments = {"metadata": typed[part], "sample_weight": factor * weights[part], "classes": [0, 1]}
        streamed.partial_fit(features[part], label[part], **arguments)
    for fitted in (weighted, streamed):
        assert sum(part.num_rows for part in fitted.moments_.values()) == np.count_nonzero(weights)
        assert fitted.sites_ == expected.sites_
        np.testing.assert_allclose(fitted.coef_, expected.coef_, atol=1e-11)
        np.testing.assert_allclose(
            fitted.transform(features, metadata=frame),
            expected.transform(features, metadata=frame),
            atol=1e-10,
        )


def test_weights_of_0_are_too_few_rows() -> None:
    features, frame, label = _table()
    weights = np.zeros(90)
    with pytest.raises(ValueError, match="Sample weights must contain at least one non-zero number"):
        MetadataResidualizer().fit(features, label, metadata=frame, sample_weight=weights)
    weights[:4] = 25.0
    with pytest.raises(ValueError, match=r"n_samples=4\): 4 row\(s\) for \d linearly independent"):
        MetadataResidualizer().fit(features, label, metadata=frame, sample_weight=weights)


@pytest.mark.parametrize("first", [1, 30])
@pytest.mark.parametrize("offset", [0.0, 1e6, -3e8])
@pytest.mark.parametrize("site", [None, "site"])
def test_rows_in_an_order_that_says_nothing_of_the_rest(first: int, offset: float, site: str | None) -> None:
    """Sorted by site, so that a chunk has one; constant columns in the first chunk; far from zero."""
    features, frame, label = _table()
    order = np.lexsort([frame["age"], frame["site"]])
    features, frame, label = features[order], frame.iloc[order].reset_index(drop=True), label[order]
    frame.loc[: first - 1, "age"] = 40.0
    features[:first] = features[0]
    metadata = _indicators(frame)
    expected = reference.residual(features, metadata, label[:, None])
    frame["age"] += offset
    typed = frame.assign(sex=pd.Categorical(frame["sex"]))
    typed = typed if site else typed.assign(site=pd.Categorical(frame["site"]))
    streamed = MetadataResidualizer(site=site)
    for part in np.split(np.arange(90), [first, first + 7, 60]):
        streamed.partial_fit(features[part] + offset, label[part], metadata=typed.iloc[part], classes=[0, 1])
    result = streamed.transform(features + offset, metadata=typed) - offset
    # Features and metadata have no more digits than that themselves.
    np.testing.assert_allclose(result, expected, atol=1e-10 + 8 * np.spacing(abs(offset)))


def test_float32_stays_and_far_offsets_cost_no_more_than_its_digits() -> None:
    features, frame, label = _table()
    exact = MetadataResidualizer().fit_transform(features, label, metadata=frame)
    single = MetadataResidualizer().fit_transform(features.astype(np.float32), label, metadata=frame)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, rtol=1e-6)
    far = MetadataResidualizer().fit_transform(
        features + 1e6, label, metadata=frame.assign(age=frame["age"] + 1e6)
    )
    np.testing.assert_allclose(far - 1e6, exact, atol=1e-8)
    assert (
        MetadataResidualizer().fit_transform(np.arange(20).reshape(10, 2), metadata=np.arange(10)).dtype
        == float
    )


def test_metadata_that_the_label_determines_protect_the_label() -> None:
    features, _, label = _table()
    result = MetadataResidualizer().fit_transform(features, label, metadata=10.0 * label)
    np.testing.assert_allclose(result, features, atol=1e-9)


# --------------------------------------------------------------------------------------------------------
# Where metadata come from
# --------------------------------------------------------------------------------------------------------


def test_tables_of_every_kind_are_read_alike() -> None:
    features, frame, label = _table()
    expected = MetadataResidualizer().fit_transform(features, label, metadata=frame)
    for table in (
        frame.astype({"sex": "category", "site": "category"}),
        frame.astype({"age": object}),
        frame.to_numpy(),
        pl.DataFrame({name: frame[name].to_numpy() for name in frame}),
        pl.DataFrame({name: frame[name].to_numpy() for name in frame}).with_columns(
            pl.col("site").cast(pl.Enum(["oslo", "rome", "york"])), pl.col("sex").cast(pl.Categorical)
        ),
    ):
        np.testing.assert_allclose(
            MetadataResidualizer().fit_transform(features, label, metadata=table), expected, atol=1e-9
        )
    numeric = _indicators(frame)
    for table in (
        numeric,
        numeric.tolist(),
        torch.from_numpy(numeric),
        pd.DataFrame(numeric, columns=list("abcd")),
    ):
        np.testing.assert_allclose(
            MetadataResidualizer().fit_transform(features, label, metadata=table), expected, atol=1e-9
        )
    age = MetadataResidualizer().fit_transform(features, metadata=frame["age"].to_numpy())
    for column in (frame["age"], frame[["age"]], pl.Series("age", frame["age"].to_numpy())):
        np.testing.assert_allclose(
            MetadataResidualizer().fit_transform(features, metadata=column), age, atol=1e-12
        )


def test_columns_of_a_table_are_found_by_name_whatever_their_order() -> None:
    features, frame, label = _table()
    residualizer = MetadataResidualizer().fit(features, label, metadata=frame)
    shuffled = frame.assign(note="x")[["note", "site", "age", "sex"]]
    np.testing.assert_array_equal(
        residualizer.transform(features, metadata=shuffled), residualizer.transform(features, metadata=frame)
    )


@pytest.mark.parametrize("order", [["york", "oslo", "rome", "bern"], ["bern", "rome", "york", "oslo"]])
@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_declared_level_without_rows_is_an_unseen_one(order: list[str], kind: str) -> None:
    """Whichever the reference is: nothing is known of the level, so nothing beyond the average is removed."""
    features, frame, _ = _table()

    def typed(values: Any) -> Any:
        if kind == "polars":
            return pl.DataFrame({"site": pl.Series(values, dtype=pl.Enum(order))})
        return pd.DataFrame({"site": pd.Categorical(values, categories=order)})

    sites = frame["site"].to_numpy()
    strict = MetadataResidualizer().fit(features, metadata=typed(sites))
    assert not any("bern" in name for name in strict.metadata_names_)
    with pytest.raises(ValueError, match=r"'site' has level\(s\) 'bern'.*unseen=\"mean\""):
        strict.transform(features[:1], metadata=typed(["bern"]))
    lenient = MetadataResidualizer(unseen="mean").fit(features, metadata=typed(sites))
    np.testing.assert_allclose(lenient.transform(features[:1], metadata=typed(["bern"])), features[:1])
    # In parts, levels may come later: they have a column, but what no row had is still unseen.
    streamed, early = MetadataResidualizer(unseen="mean"), sites != "york"
    for rows in (early, ~early):
        streamed.partial_fit(features[rows], metadata=typed(sites[rows]))
    np.testing.assert_allclose(
        streamed.transform(features, metadata=typed(sites)),
        lenient.transform(features, metadata=typed(sites)),
        atol=1e-9,
    )
    with pytest.raises(ValueError, match="'bern'"):
        MetadataResidualizer().partial_fit(features, metadata=typed(sites)).transform(
            features[:1], metadata=typed(["bern"])
        )
    # Protected labels are held out of the scaling, which a level without rows cannot be.
    scaled = MetadataResidualizer(site="sex", scale=True)
    scaled.fit(features, metadata=frame[["sex"]], labels=typed(sites))
    with pytest.raises(ValueError, match="labels column 'site' has level"):
        scaled.transform(features[:1], metadata=frame[["sex"]][:1], labels=typed(["bern"]))


def test_the_categories_of_polars_are_those_of_the_column() -> None:
    features, frame, label = _table()
    sex = pl.Series("sex", frame["sex"].tolist(), dtype=pl.Categorical)
    _ = pl.Series("town", [f"town {i}" for i in range(300)], dtype=pl.Categorical)
    fitted = MetadataResidualizer().fit(features, metadata=pl.DataFrame([sex]))
    assert fitted.metadata_names_ == ["sex[T.m]"]
    with pytest.raises(ValueError, match="'town 1'"):
        fitted.transform(
            features[:1], metadata=pl.DataFrame({"sex": pl.Series(["town 1"], dtype=pl.Categorical)})
        )
    protected = MetadataResidualizer().fit(features, label, metadata=label, labels=pl.DataFrame([sex]))
    assert protected.protected_names_ == ["sex[T.m]", "y[T.1]"]
    table = pl.DataFrame({"u": features[:, 0], "sex": sex})
    assert MetadataResidualizer(metadata_columns=["sex"]).fit(table).metadata_names_ == ["sex[T.m]"]


def test_a_formula_says_which_columns_and_how() -> None:
    features, frame, label = _table()
    curved = MetadataResidualizer("poly(age, 2) + site").fit(features, label, metadata=frame)
    assert curved.metadata_names_ == ["poly(age, 2)[1]", "poly(age, 2)[2]", "site[T.rome]", "site[T.york]"]
    age = frame["age"].to_numpy()
    design = np.column_stack([age, age**2, pd.get_dummies(frame["site"], drop_first=True).to_numpy(float)])
    np.testing.assert_allclose(
        curved.transform(features, metadata=frame),
        reference.residual(features, design, label[:, None]),
        atol=1e-8,
    )
    with pytest.raises(ValueError, match="no column 'weight'"):
        MetadataResidualizer("age + weight").fit(features, metadata=frame)
    with pytest.raises(ValueError, match="'site' is the site and in formula as well"):
        MetadataResidualizer("age + site", site="site").fit(features, metadata=frame)
    with pytest.raises(ValueError, match="formula='age' needs metadata"):
        MetadataResidualizer("age", metadata_columns=()).fit(features)


def test_missing_metadata_by_rule() -> None:
    features, frame, label = _table()
    frame.loc[[3, 50], "age"] = np.nan
    with pytest.raises(ValueError, match=r"'age' in rows 3, 50"):
        MetadataResidualizer().fit(features, label, metadata=frame)
    filled = frame.assign(age=frame["age"].fillna(frame["age"].mean()))
    np.testing.assert_allclose(
        MetadataResidualizer(missing="mean").fit_transform(features, label, metadata=frame),
        MetadataResidualizer().fit_transform(features, label, metadata=filled),
        atol=1e-9,
    )
    indicated = filled.assign(missing=frame["age"].isna().astype(float))
    fitted = MetadataResidualizer(missing="indicator").fit(features, label, metadata=frame)
    np.testing.assert_allclose(
        fitted.transform(features, metadata=frame),
        MetadataResidualizer().fit_transform(features, label, metadata=indicated),
        atol=1e-9,
    )


def test_missing_features_are_named_or_skipped() -> None:
    features, frame, label = _table()
    table = pd.DataFrame(features, columns=list("abcde"))
    table.loc[[3, 50], "b"] = np.nan
    table.loc[60, "d"] = np.nan
    with pytest.raises(ValueError, match=r"'b', 'd' .*rows 3, 50, 60 .*missing_features='skip'"):
        MetadataResidualizer().fit(table, label, metadata=frame)
    complete = table.notna().all(axis=1).to_numpy()
    expected = MetadataResidualizer().fit(table[complete], label[complete], metadata=frame[complete])
    skipping = MetadataResidualizer(missing_features="skip").fit(table, label, metadata=frame)
    np.testing.assert_allclose(skipping.coef_, expected.coef_, atol=1e-10)
    streamed = MetadataResidualizer(missing_features="skip")
    typed = frame.astype({"sex": "category", "site": "category"})
    for rows in (slice(0, 40), slice(40, 90)):
        streamed.partial_fit(table[rows], label[rows], metadata=typed[rows], classes=[0, 1])
    np.testing.assert_allclose(streamed.coef_, expected.coef_, atol=1e-10)
    result = skipping.transform(table, metadata=frame)
    np.testing.assert_array_equal(np.isnan(result), table.isna())
    filled = expected.transform(table.fillna(0), metadata=frame)
    present = table.notna().to_numpy()
    np.testing.assert_allclose(result[present], filled[present], atol=1e-9)
    np.testing.assert_allclose(
        skipping.inverse_transform(pd.DataFrame(result, columns=table.columns), metadata=frame)[present],
        features[present],
        atol=1e-9,
    )
    for value in (np.inf, -np.inf):
        table.loc[70, "e"] = value
        with pytest.raises(ValueError, match=r"X has infinite values: .*'e' "):
            skipping.fit(table, label, metadata=frame)


@pytest.mark.parametrize("kind", ["counts", "tails", "normal"])
def test_features_into_which_a_subtraction_writes_the_metadata_are_named(kind: str) -> None:
    """A forest reads the label in the residuals of features that know nothing; see docs/leakage.md."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    confounder = label + rng.normal(0, 0.7, 300)
    features = {
        "counts": rng.poisson(1.0, (300, 8)).astype(float),
        "tails": np.exp(2 * rng.normal(size=(300, 8))),
        "normal": rng.normal(size=(300, 8)),
    }[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = MetadataResidualizer().fit(features[:200], label[:200], metadata=confounder[:200])
    leaks = kind != "normal"
    assert [entry.category for entry in caught] == [LeakageWarning] * leaks
    # How heavy a tail is, 200 rows do not say of every feature.
    assert not leaks or int(str(caught[0].message).split()[0]) >= 5
    train, test = (
        fitted.transform(features[rows], metadata=confounder[rows]) for rows in (slice(200), slice(200, 300))
    )
    forest = RandomForestClassifier(100, random_state=0)
    before = forest.fit(features[:200], label[:200]).score(features[200:], label[200:])
    after = forest.fit(train, label[:200]).score(test, label[200:])
    assert before < 0.62
    assert after > 0.68 if leaks else after < 0.62


def test_the_same_row_labels_in_another_order_are_refused() -> None:
    features, frame, label = _table()
    names = [f"sub-{row}" for row in range(90)]
    table = pd.DataFrame(features, index=names)
    ordered, shuffled = frame.set_axis(names), frame.set_axis(names).sample(frac=1, random_state=0)
    for arguments in (
        {"metadata": shuffled},
        {"metadata": ordered, "y": pd.Series(label, index=names[::-1])},
        {"metadata": ordered, "labels": shuffled},
    ):
        with pytest.raises(ValueError, match=r"same row labels as .*, but in another order"):
            MetadataResidualizer().fit(table, **arguments)
    fitted = MetadataResidualizer().fit(table, metadata=ordered)
    with pytest.raises(ValueError, match=r"metadata\.loc\[X\.index\]"):
        fitted.transform(table, metadata=shuffled)
    # Other labels say nothing: rows belong together by position.
    np.testing.assert_array_equal(
        fitted.transform(table.reset_index(drop=True), metadata=ordered),
        fitted.transform(table, metadata=ordered),
    )


@pytest.mark.parametrize("output", ["default", "pandas", "polars"])
def test_kept_columns_keep_their_values_and_types(output: str) -> None:
    features, frame, _ = _table()
    dates = 20210301 + np.arange(90)
    table = pd.DataFrame(features[:, :2].astype(np.float32), columns=["u", "v"])
    table = table.assign(scan_date=dates, site=frame["site"])
    columns = ["scan_date"] if output == "default" else ["scan_date", "site"]
    table = table[["u", *columns, "v"]]
    kept = MetadataResidualizer(metadata_columns=columns, keep_metadata=True).set_output(transform=output)
    result = kept.fit_transform(table)
    scan_dates = result[:, 1] if output == "default" else result["scan_date"].to_numpy()
    np.testing.assert_array_equal(scan_dates, dates)
    if output != "default":
        assert result["u"].to_numpy().dtype == np.float32
        assert result["scan_date"].to_numpy().dtype == np.int64
        assert result["site"].to_list() == frame["site"].to_list()
    dropped = MetadataResidualizer(metadata_columns=columns[:1])
    table = table[["u", "scan_date", "v"]]
    back = dropped.inverse_transform(dropped.fit_transform(table), metadata=table[["scan_date"]])
    np.testing.assert_array_equal(back[:, 1], dates)


@pytest.mark.parametrize("keep_metadata", [False, True])
def test_metadata_as_columns_of_the_table(keep_metadata: bool) -> None:
    features, frame, label = _table()
    expected = MetadataResidualizer().fit_transform(features, label, metadata=frame)
    names = [f"x{i}" for i in range(5)]
    whole = pd.concat([frame[["sex"]], pd.DataFrame(features, columns=names), frame[["age", "site"]]], axis=1)
    residualizer = MetadataResidualizer(metadata_columns=["age", "sex", "site"], keep_metadata=keep_metadata)
    result = residualizer.fit_transform(whole, label)
    out = list(residualizer.get_feature_names_out())
    assert out == (list(whole.columns) if keep_metadata else names)
    positions = [out.index(name) for name in names]
    np.testing.assert_allclose(result[:, positions].astype(float), expected, atol=1e-9)
    back = residualizer.inverse_transform(
        pd.DataFrame(result, columns=out) if keep_metadata else result,
        **({} if keep_metadata else {"metadata": frame}),
    )
    np.testing.assert_allclose(back[:, 1:6].astype(float), features, atol=1e-9)
    np.testing.assert_array_equal(
        residualizer.transform(whole),
        clone(residualizer)
        .fit(pl.DataFrame(whole.to_dict("list")), label)
        .transform(pl.DataFrame(whole.to_dict("list"))),
    )
    if keep_metadata:
        assert list(result[:, 0]) == list(frame["sex"])
    assert list(residualizer.feature_names_in_) == list(whole.columns)


@pytest.mark.parametrize("column", ["age", 0])
def test_a_single_column_without_brackets(column: Any) -> None:
    table = pd.DataFrame({"age": [1.0, 2, 3, 4], "a": [1.0, 3, 2, 4], "g": 0.0, "e": 1.0})
    with pytest.raises(TypeError, match=rf"'metadata_columns'.*array-like or None. Got {column!r}"):
        MetadataResidualizer(metadata_columns=column).fit(table)


def test_metadata_columns_by_position_and_numeric_keeping() -> None:
    features, frame, label = _table()
    table = np.column_stack([features, frame["age"], np.arange(90) % 2]).astype(np.float32)
    dropped = MetadataResidualizer(metadata_columns=[-2, 6]).fit(table, label)
    kept = MetadataResidualizer(metadata_columns=[5, 6], keep_metadata=True).fit(table, label)
    np.testing.assert_array_equal(kept.transform(table)[:, :5], dropped.transform(table))
    np.testing.assert_array_equal(kept.transform(table)[:, 5:], table[:, 5:])
    assert kept.transform(table).dtype == np.float32
    np.testing.assert_allclose(kept.inverse_transform(kept.transform(table)), table, rtol=1e-6)
    np.testing.assert_allclose(
        dropped.inverse_transform(dropped.transform(table), metadata=table[:, 5:]), table, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_output_tables_have_names(kind: str) -> None:
    features, frame, label = _table()
    table = (pd if kind == "pandas" else pl).DataFrame({f"x{i}": features[:, i] for i in range(5)})
    residualizer = MetadataResidualizer().set_output(transform=kind)
    result = residualizer.fit_transform(table, label, metadata=frame)
    assert type(result) is type(table)
    assert list(result.columns) == list(table.columns)
    np.testing.assert_allclose(
        result.to_numpy(), MetadataResidualizer().fit_transform(features, label, metadata=frame), atol=1e-12
    )


def test_without_metadata_nothing_changes_and_a_warning_says_so() -> None:
    features, frame, label = _table()
    with pytest.warns(UserWarning, match=r"no metadata: X is returned unchanged.*metadata_columns=\(\)"):
        residualizer = MetadataResidualizer().fit(features, label)
    np.testing.assert_array_equal(residualizer.transform(features), features)
    np.testing.assert_array_equal(
        MetadataResidualizer(metadata_columns=()).fit_transform(features, label), features
    )
    with pytest.raises(ValueError, match="metadata= was given, but fit had none"):
        residualizer.transform(features, metadata=frame)


# --------------------------------------------------------------------------------------------------------
# Streaming
# --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 89), min_size=1, max_size=4), st.booleans(), st.integers(0, 100))
def test_partial_fit_is_fit(cuts: list[int], combat: bool, seed: int) -> None:
    features, frame, label = _table(seed=seed)
    settings: dict[str, Any] = {"site": "site", "scale": True, "empirical_bayes": True} if combat else {}
    typed = frame.assign(sex=pd.Categorical(frame["sex"], categories=["f", "m"]))
    if not combat:
        typed["site"] = pd.Categorical(typed["site"], categories=["oslo", "rome", "york"])
    whole = MetadataResidualizer(**settings).fit(features, label, metadata=typed)
    streamed = MetadataResidualizer(**settings)
    for part in np.split(np.arange(90), sorted(cuts)):
        if len(part):
            streamed.partial_fit(features[part], label[part], metadata=typed.iloc[part], classes=[0, 1])
    np.testing.assert_allclose(
        streamed.transform(features, metadata=typed), whole.transform(features, metadata=typed), atol=1e-8
    )
    np.testing.assert_allclose(streamed.coef_, whole.coef_, atol=1e-9)


def test_estimates_after_partial_fit_are_those_of_all_rows_and_survive_copies() -> None:
    features, frame, label = _table()
    metadata = frame["age"].to_numpy()
    streamed = MetadataResidualizer().partial_fit(
        features[:2], label[:2], metadata=metadata[:2], classes=[0, 1]
    )
    with pytest.raises(ValueError, match="n_samples=2"):
        streamed.transform(features, metadata=metadata)
    streamed.partial_fit(features[2:40], label[2:40], metadata=metadata[2:40])
    early = streamed.coef_.copy()
    streamed.partial_fit(features[40:], label[40:], metadata=metadata[40:])
    for copy in (streamed, pickle.loads(pickle.dumps(streamed))):
        assert np.abs(copy.coef_ - early).max() > 1e-4
        np.testing.assert_allclose(
            copy.coef_, MetadataResidualizer().fit(features, label, metadata=metadata).coef_, atol=1e-10
        )
    refitted = streamed.fit(features[:40], label[:40], metadata=metadata[:40])
    np.testing.assert_allclose(refitted.coef_, early, atol=1e-10)
    assert not hasattr(clone(streamed), "coef_")


def test_a_failed_partial_fit_changes_nothing() -> None:
    features, frame, label = _table()
    residualizer = MetadataResidualizer(site="site").fit(features, label, metadata=frame)
    before = residualizer.moments_["york"].cross.clone()
    spoilt = frame.assign(age=np.nan)
    with pytest.raises(ValueError, match="'age' in rows 0, 1"):
        residualizer.partial_fit(features, label, metadata=spoilt)
    np.testing.assert_array_equal(residualizer.moments_["york"].cross, before)
    for settings, message in (
        ({"y": label + 5, "metadata": frame}, r"y column 'y' has level\(s\) .*5.*classes="),
        ({"metadata": frame}, "y=None, but fit had y"),
        ({"y": label, "metadata": frame.assign(sex="x")}, r"'sex' has level\(s\) 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            residualizer.partial_fit(features, **settings)


# --------------------------------------------------------------------------------------------------------
# Sites
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empirical_bayes", [True, False])
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_equals_neuroharmonize_in_training_and_on_new_rows(empirical_bayes: bool) -> None:
    features, frame, label = _table()
    labels = pd.DataFrame({"age": frame["age"], "dx": label})
    with_site = labels.assign(SITE=frame["site"])
    train = np.arange(90) % 3 > 0
    state = np.random.get_state()  # noqa: NPY002 (the reference seeds the global generator)
    with contextlib.redirect_stdout(io.StringIO()):
        model, expected = harmonizationLearn(features[train], with_site[train], eb=empirical_bayes)
        expected_new = harmonizationApply(features[~train], with_site[~train], model)
    np.random.set_state(state)  # noqa: NPY002
    residualizer = MetadataResidualizer(site="site", scale=True, empirical_bayes=empirical_bayes)
    for rows, other in ((train, expected), (~train, expected_new)):
        arguments = {"metadata": frame[["site"]][rows], "labels": labels[rows]}
        if rows is train:
            residualizer.fit(features[rows], **arguments)
        result = residualizer.transform(features[rows], **arguments)
        np.testing.assert_allclose(result, other, atol=1e-8)
        np.testing.assert_allclose(
            residualizer.inverse_transform(result, **arguments), features[rows], atol=1e-9
        )
    assert residualizer.sites_ == ["oslo", "rome", "york"]


def test_a_site_column_is_one_more_category_until_scale_is_asked_for() -> None:
    features, frame, label = _table()
    np.testing.assert_allclose(
        MetadataResidualizer(site="site").fit_transform(features, label, metadata=frame),
        MetadataResidualizer().fit_transform(features, label, metadata=frame),
        atol=1e-9,
    )
    # By position in an array, as a number, and among the columns of X.
    codes = frame["site"].astype("category").cat.codes.to_numpy().astype(float)
    expected = MetadataResidualizer(site="site", scale=True).fit_transform(
        features, metadata=frame[["site", "age"]]
    )
    metadata = np.column_stack([frame["age"], codes])
    np.testing.assert_allclose(
        MetadataResidualizer(site=1, scale=True).fit_transform(features, metadata=metadata),
        expected,
        atol=1e-9,
    )
    inside = MetadataResidualizer(site=6, scale=True, metadata_columns=[5, 6])
    np.testing.assert_allclose(
        inside.fit_transform(np.column_stack([features, metadata])), expected, atol=1e-9
    )


def test_scale_is_equal_across_sites_afterwards_and_labels_stay() -> None:
    features, frame, label = _table(2000)
    labels = {"labels": label.astype(float)}
    location = MetadataResidualizer(site="site").fit_transform(features, metadata=frame, **labels)
    both = MetadataResidualizer(site="site", scale=True).fit_transform(features, metadata=frame, **labels)

    def deviations(table: np.ndarray) -> np.ndarray:
        residual = table - label[:, None] * (table[label == 1].mean(0) - table[label == 0].mean(0))
        return np.array([residual[frame["site"] == site].std(0) for site in ("york", "oslo", "rome")])

    assert np.ptp(deviations(location), axis=0).min() > 1.5
    assert np.ptp(deviations(both), axis=0).max() < 0.1
    for site in ("york", "oslo", "rome"):
        rows = (frame["site"] == site).to_numpy()
        effect = both[rows & (label == 1)].mean(0) - both[rows & (label == 0)].mean(0)
        np.testing.assert_allclose(effect, 2.0, atol=0.5)


@pytest.mark.filterwarnings("ignore:.*rows have a (site|subject) that was not in the fit")
def test_a_site_that_was_not_in_fit() -> None:
    features, frame, _ = _table()
    known = (frame["site"] != "rome").to_numpy()
    residualizer = MetadataResidualizer(site="site", scale=True).fit(features[known], metadata=frame[known])
    with pytest.raises(ValueError, match=r"\['rome'\] were not in fit.*adapt.*unseen='mean'"):
        residualizer.transform(features, metadata=frame)
    mean = clone(residualizer).set_params(unseen="mean").fit(features[known], metadata=frame[known])
    result = mean.transform(features, metadata=frame)
    before = residualizer.transform(features[known], metadata=frame[known])
    np.testing.assert_array_equal(result[known], before)
    columns = np.column_stack([frame["age"], frame["sex"] == "m"]).astype(float)
    np.testing.assert_allclose(
        result[~known], (features - (columns - mean.metadata_mean_) @ mean.coef_)[~known], atol=1e-9
    )

    residualizer.adapt(features, metadata=frame)
    assert residualizer.sites_ == ["oslo", "york", "rome"]
    adapted = residualizer.transform(features, metadata=frame)
    np.testing.assert_array_equal(adapted[known], before)
    of_york = (frame["site"] == "york").to_numpy()
    np.testing.assert_allclose(adapted[~known].mean(0), adapted[of_york].mean(0))
    np.testing.assert_allclose(adapted[~known].std(0, ddof=1), adapted[of_york].std(0, ddof=1))
    assert np.abs(result[~known].mean(0) - adapted[of_york].mean(0)).max() > 0.5
    with pytest.raises(ValueError, match="all rows are of sites that are known already"):
        residualizer.adapt(features, metadata=frame)
    residualizer.partial_fit(features[known], metadata=frame[known])  # estimates all from what was fitted
    assert residualizer.sites_ == ["oslo", "york"]
    with pytest.raises(ValueError, match="adapt is for sites"):
        MetadataResidualizer().fit(features, metadata=frame).adapt(features, metadata=frame)


def test_labels_in_adapt_keep_their_effect_out_of_the_location() -> None:
    features, frame, label = _table(600)
    known = (frame["site"] != "rome").to_numpy()
    patients = known | (label == 1)  # of the new site there are only patients
    locations = []
    for y in (label[patients], None):
        residualizer = MetadataResidualizer(site="site").fit(
            features[known], label[known], metadata=frame[known]
        )
        residualizer.adapt(features[patients], y, metadata=frame[patients])
        locations.append(residualizer.site_location_[-1])
    expected = 2.0 * (1 - label[known].mean())
    np.testing.assert_allclose(locations[1] - locations[0], expected, atol=0.5)


# --------------------------------------------------------------------------------------------------------
# Pipelines and cross-validation
# --------------------------------------------------------------------------------------------------------


def _leaky(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """60 metadata columns that say nothing about the label, 50 features that say a little."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    metadata, label = rng.standard_normal((n, 60)), rng.integers(0, 2, n)
    effects, signal = fixed.standard_normal((60, 50)), 0.15 * fixed.standard_normal(50)
    return metadata @ effects + rng.standard_normal((n, 50)) + label[:, None] * signal, metadata, label


@routed_scores
@pytest.mark.usefixtures("_routing")
def test_residualising_before_cross_validation_leaks_and_in_a_pipeline_does_not() -> None:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    pipeline = make_pipeline(MetadataResidualizer(), *clone(classifier))
    honest, leaked, true = [], [], []
    for seed in range(4):
        features, metadata, label = _leaky(120, seed)
        honest += list(cross_validate(pipeline, features, label, params={"metadata": metadata})["test_score"])
        everything = MetadataResidualizer().fit_transform(features, label, metadata=metadata)
        leaked += list(cross_val_score(classifier, everything, label))
        pipeline.fit(features, label, metadata=metadata)
        fresh, fresh_metadata, fresh_label = _leaky(2000, 1000 + seed)
        true.append(pipeline.score(fresh, fresh_label, metadata=fresh_metadata))
    assert np.mean(leaked) > 0.8
    assert np.mean(true) < 0.6
    assert abs(np.mean(honest) - np.mean(true)) < 0.06


@pytest.mark.usefixtures("_routing")
def test_coefficients_come_from_the_training_fold_only() -> None:
    features, frame, label = _table()
    pipeline = make_pipeline(MetadataResidualizer(), StandardScaler(), LogisticRegression())
    spoilt_features, spoilt_frame = features.copy(), frame.copy()
    folds = list(KFold(3).split(features))
    test_rows = folds[0][1]
    spoilt_features[test_rows] *= -1000
    spoilt_frame.loc[test_rows, "age"] = 1e6
    spoilt_label = label.copy()
    spoilt_label[test_rows] = 1 - label[test_rows]
    estimators = [
        cross_validate(
            pipeline, x, y, params={"metadata": table}, cv=folds[:1], return_estimator=True, scoring=None
        )["estimator"][0]
        for x, table, y in ((features, frame, label), (spoilt_features, spoilt_frame, spoilt_label))
    ]
    np.testing.assert_array_equal(estimators[0][0].coef_, estimators[1][0].coef_)
    train = folds[0][0]
    np.testing.assert_array_equal(
        estimators[0][0].coef_,
        MetadataResidualizer().fit(features[train], label[train], metadata=frame.iloc[train]).coef_,
    )


@routed_scores
@pytest.mark.usefixtures("_routing")
def test_grid_search_with_routed_metadata_and_with_metadata_columns() -> None:
    features, frame, label = _table()
    routed = make_pipeline(
        MetadataResidualizer().set_fit_request(metadata=True).set_transform_request(metadata=True),
        StandardScaler(),
        LogisticRegression(),
    )
    search = GridSearchCV(routed, {"metadataresidualizer__ridge": [0.0, 1.0]}, cv=3)
    search.fit(features, label, metadata=frame)
    assert search.score(features, label, metadata=frame) > 0.5
    assert search.best_estimator_.predict(features, metadata=frame).shape == (90,)
    # A scorer by name passes metadata to no one: there they are columns of X.
    whole = pd.concat([pd.DataFrame(features).add_prefix("x"), frame], axis=1)
    inside = make_pipeline(
        MetadataResidualizer(metadata_columns=list(frame)), StandardScaler(), LogisticRegression()
    )
    scores = cross_val_score(inside, whole, label, scoring="accuracy", cv=3)
    expected = cross_validate(routed, features, label, params={"metadata": frame}, cv=3)["test_score"]
    np.testing.assert_allclose(scores, expected)


@pytest.mark.usefixtures("_routing")
def test_sample_weights_are_routed_on_request() -> None:
    features, frame, label = _table()
    weights = np.arange(90.0)
    pipeline = make_pipeline(MetadataResidualizer().set_fit_request(sample_weight=True))
    pipeline.fit(features, label, metadata=frame, sample_weight=weights)
    expected = MetadataResidualizer().fit(features, label, metadata=frame, sample_weight=weights)
    np.testing.assert_array_equal(pipeline[0].coef_, expected.coef_)


# --------------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------------


def test_diabetes_blood_values_without_age_and_sex() -> None:
    data = load_diabetes(as_frame=True, scaled=False)
    blood, people = data.data[["s1", "s2", "s3", "s4", "s5", "s6"]], data.data[["age", "sex", "bmi"]]
    result = MetadataResidualizer(protect_target=False).fit_transform(blood, data.target, metadata=people)
    together = np.corrcoef(np.column_stack([result, people]).T)[:6, 6:]
    assert np.abs(np.corrcoef(np.column_stack([blood, people]).T)[:6, 6:]).max() > 0.4
    np.testing.assert_allclose(together, 0, atol=1e-10)
    np.testing.assert_allclose(result.mean(0), blood.to_numpy().mean(0))
    protected = MetadataResidualizer().fit_transform(blood, data.target, metadata=people)
    partial = Ridge(alpha=1e-9).fit(np.column_stack([people, data.target]), blood).coef_[:, -1]
    kept = np.linalg.lstsq(np.column_stack([data.target, people, np.ones(442)]), protected, rcond=None)[0][0]
    np.testing.assert_allclose(kept, partial, rtol=1e-6)


@routed_scores
@pytest.mark.usefixtures("_routing")
@pytest.mark.filterwarnings("ignore::mdnorm.design.LeakageWarning")
def test_breast_cancer_texture_without_size() -> None:
    data = load_breast_cancer(as_frame=True)
    size = ["mean radius", "mean area", "mean perimeter"]  # nearly collinear
    features = data.data.drop(columns=size)
    residualizer = MetadataResidualizer(protect_target=False)
    result = residualizer.fit_transform(features, metadata=data.data[size])
    assert np.abs(np.corrcoef(np.column_stack([result, data.data[size]]).T)[:-3, -3:]).max() < 1e-7
    pipeline = make_pipeline(MetadataResidualizer(), StandardScaler(), LogisticRegression())
    scores = cross_validate(pipeline, features, data.target, params={"metadata": data.data[size]}, cv=3)
    assert scores["test_score"].mean() > 0.85


# --------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({}, {"metadata": np.zeros(7)}, ValueError, "metadata has 7 rows but X has 90"),
        ({}, {"metadata": np.zeros((90, 2, 2))}, ValueError, r"metadata must have shape .* got \(90, 2, 2\)"),
        (
            {},
            {"metadata": np.full(90, np.inf)},
            ValueError,
            "'m0' has infinite values .*90 of 90",
        ),
        (
            {},
            {"metadata": np.zeros(90, complex)},
            TypeError,
            "'m0' has values of type complex: metadata are numbers",
        ),
        ({}, {"metadata": np.array(["a", None] * 45, object)}, ValueError, "'m0' in rows 1, 3.*45 of 90"),
        ({}, {"metadata": np.zeros(90), "labels": np.zeros(3)}, ValueError, "labels has 3 rows"),
        ({}, {"metadata": np.zeros(90), "y": np.zeros(3)}, ValueError, "y has 3 rows but X has 90"),
        (
            {},
            {"metadata": np.zeros(90), "y": np.full(90, np.nan)},
            ValueError,
            "y column 'y' is missing in rows 0, 1",
        ),
        (
            {},
            {"metadata": np.zeros(90), "y": np.array(["a", None] * 45)},
            ValueError,
            "y column 'y' is missing in rows 1, 3.*45 of 90",
        ),
        (
            {},
            {"metadata": np.zeros(90), "y": np.full((90, 2), "a")},
            TypeError,
            "y has 2 columns.*labels=",
        ),
        ({}, {"metadata": np.eye(90)}, ValueError, "n_samples=90.* for 90 linearly independent.*ridge="),
        ({}, {"metadata": np.zeros(90), "sample_weight": -np.ones(90)}, ValueError, "not negative"),
        (
            {"metadata_columns": [0]},
            {"metadata": np.zeros(90)},
            ValueError,
            r"metadata are in X \(metadata_columns",
        ),
        (
            {"metadata_columns": ["age"]},
            {},
            ValueError,
            "metadata_columns has 'age', the columns of X are without",
        ),
        ({"metadata_columns": [9]}, {}, ValueError, "metadata_columns has 9, but X has n_features=5"),
        ({"metadata_columns": range(5)}, {}, ValueError, "all of them metadata_columns"),
        ({"ridge": -1.0}, {"metadata": np.zeros(90)}, ValueError, "'ridge'.*in the range.*Got -1"),
        ({"ridge": np.nan}, {"metadata": np.zeros(90)}, ValueError, "'ridge'.*in the range"),
        (
            {"protect_target": "yes"},
            {"metadata": np.zeros(90)},
            ValueError,
            "'protect_target'.*a str among.*'yes'",
        ),
        ({"unseen": "skip"}, {"metadata": np.zeros(90)}, ValueError, "'unseen'.*a str among.*'skip'"),
        ({"scale": True}, {"metadata": np.zeros(90)}, ValueError, "scale=True needs site="),
        (
            {"empirical_bayes": True},
            {"metadata": np.zeros(90)},
            ValueError,
            "empirical_bayes=True needs site=",
        ),
        (
            {"site": "scanner"},
            {"metadata": np.zeros(90)},
            ValueError,
            r"site='scanner' is not a column.*\['m0'\]",
        ),
        ({"site": 0}, {}, ValueError, "site=0 needs metadata"),
        (
            {"site": 0, "scale": True},
            {"metadata": np.array([0] * 89 + [1])},
            ValueError,
            r"site 1 has 1 row\(s\).*scale=False",
        ),
        (
            {"site": 0},
            {"metadata": np.arange(90) % 2, "y": np.arange(90) % 2},
            ValueError,
            r"sites determine what is to be protected, y\[T.1\] \(constant within each site\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:no metadata. X is returned unchanged:UserWarning")
def test_errors_of_fit_name_the_argument(
    settings: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MetadataResidualizer(**settings).fit(_table()[0], **arguments)


def test_errors_of_transform_name_the_argument() -> None:
    features, frame, label = _table()
    with pytest.raises(NotFittedError):
        MetadataResidualizer().transform(features, metadata=frame)
    fitted = MetadataResidualizer().fit(features, label, metadata=frame)
    for metadata, message in (
        (
            None,
            r"metadata=None, but fit had metadata.*set_transform_request\(metadata=True\).*metadata_columns=",
        ),
        (frame[["age"]], r"has the columns \['age'\], but \['age', 'sex', 'site'\] were there in fit"),
        (frame.to_numpy(), r"has the columns \['m0', 'm1', 'm2'\]"),
        (frame[:3], "metadata has 3 rows but X has 90"),
        (frame.assign(site="bern"), r"'site' has level\(s\) 'bern'"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted.transform(features, metadata=metadata)
    with pytest.raises(TypeError, match="'age' had values of kind number in training and now has strings"):
        fitted.transform(features, metadata=frame.assign(age="old"))
    with pytest.raises(ValueError, match="labels= was given, but fit had none"):
        fitted.transform(features, metadata=frame, labels=label)
    with pytest.raises(ValueError, match=r"X has missing \(NaN\) values: .*missing_features='skip'"):
        fitted.transform(np.full_like(features, np.nan), metadata=frame)
    scaled = MetadataResidualizer(site="site", scale=True).fit(features, metadata=frame, labels=label)
    with pytest.raises(ValueError, match="labels=None, but fit had labels"):
        scaled.transform(features, metadata=frame)
    located = MetadataResidualizer(site="site").fit(features, metadata=frame, labels=label)
    np.testing.assert_allclose(
        located.transform(features, metadata=frame),
        located.transform(features, metadata=frame, labels=label),
        atol=1e-12,
    )
    inside = MetadataResidualizer(metadata_columns=[0]).fit(features)
    with pytest.raises(ValueError, match="metadata= was given, but the metadata are in X"):
        inside.transform(features, metadata=frame["age"])
    for arguments, message in (
        ({}, r"metadata=None, but transform left out the columns \[0\]"),
        ({"metadata": np.zeros((90, 2))}, r"metadata has 2 column\(s\), metadata_columns has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            inside.inverse_transform(features[:, 1:], **arguments)
    with pytest.raises(ValueError, match="X has 5 features, but transform returns 4"):
        inside.inverse_transform(features, metadata=features[:, 0])


def test_only_the_estimator_needs_scikit_learn_and_says_so() -> None:
    program = """
import sys
for name in ("sklearn", "pandas", "scipy"):
    sys.modules[name] = None
import mdnorm.tables
mdnorm.tables.Moments.empty(1, 1)
try:
    import mdnorm.sklearn
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "the package 'sklearn' is missing: pip install 'mdnorm[tables]'\n"


def test_the_estimator_is_found_where_tables_are() -> None:
    assert mdnorm.tables.MetadataResidualizer is MetadataResidualizer
    with pytest.raises(AttributeError, match="no attribute 'Residualiser'"):
        _ = mdnorm.tables.Residualiser
