"""Random intercepts of subjects against dense matrices, statsmodels and longitudinal ComBat's formulas."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.optimize import brentq

from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import fit_location_scale
from mdnorm.tables.combat import SiteCodes, site_moments
from mdnorm.tables.subjects import fit_random_intercepts

pytestmark = pytest.mark.filterwarnings("ignore::mdnorm.design.LeakageWarning")

_COMBAT: dict[str, Any] = {"site": "site", "subject": "who", "scale": True}


def _table(
    kind: str = "travelling", seed: int = 0, num_subjects: int = 40, num_features: int = 7
) -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
    """Features, metadata and a label of each subject; subjects vary from not at all to three times the noise.

    "balanced" has three rows of each subject, else 1 to 4; at sites by chance, or "nested": each at one.
    """
    rng = np.random.default_rng(seed)
    counts = np.full(num_subjects, 3) if kind == "balanced" else rng.integers(1, 5, num_subjects)
    who = np.repeat(np.arange(num_subjects), counts)
    n = len(who)
    site = rng.integers(0, 3, num_subjects)[who] if kind == "nested" else rng.integers(0, 3, n)
    age, label = rng.integers(20, 80, n).astype(float), rng.integers(0, 2, num_subjects)[who].astype(float)
    features = rng.standard_normal((n, num_features)) * rng.uniform(0.5, 2, (3, num_features))[site]
    features += (rng.standard_normal((num_subjects, num_features)) * np.linspace(0, 3, num_features))[who]
    features += 2 * rng.standard_normal((3, num_features))[site] + 0.1 * age[:, None] + label[:, None] + 10
    frame = pd.DataFrame(
        {"site": np.array(["york", "oslo", "rome"])[site], "age": age, "who": [f"p{index}" for index in who]}
    )
    return features, frame, label


def _matrices(frame: pd.DataFrame, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The design with a column for each site, and the indicators of the subjects."""
    sites, subjects = (pd.get_dummies(frame[name]).to_numpy(float) for name in ("site", "who"))
    return np.column_stack([sites, frame["age"], label]), subjects


def _dense(column: np.ndarray, design: np.ndarray, subjects: np.ndarray) -> dict[str, Any]:
    """The mixed model of one feature: where the derivative of the restricted likelihood is 0."""
    n, p = design.shape

    def at(ratio: float) -> dict[str, Any]:
        precision = np.linalg.inv(np.eye(n) + ratio * subjects @ subjects.T)
        inverse = np.linalg.inv(design.T @ precision @ design)
        beta = inverse @ design.T @ precision @ column
        projection = precision - precision @ design @ inverse @ design.T @ precision
        whitened = projection @ column
        squares = column @ whitened
        slope = np.trace(subjects.T @ projection @ subjects)
        slope -= (n - p) * np.square(subjects.T @ whitened).sum() / squares
        effects = ratio * subjects.T @ precision @ (column - design @ beta)
        return {
            "slope": slope, "beta": beta, "scale": squares / (n - p), "effects": effects, "ratio": ratio
        }  # fmt: skip

    if at(0.0)["slope"] >= 0:
        return at(0.0)
    return at(brentq(lambda ratio: at(ratio)["slope"], 0, 1e3, xtol=1e-13, rtol=1e-13))


def _codes(column: pd.Series) -> SiteCodes:
    levels = sorted(set(column))
    return SiteCodes(column.map(levels.index).to_numpy(np.intp), list(levels))


@pytest.mark.parametrize("kind", ["balanced", "travelling", "nested"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_mixed_model_in_dense_matrices(kind: str, seed: int) -> None:
    features, frame, label = _table(kind, seed)
    metadata = np.column_stack([frame["age"], label, 2 * frame["age"] + 1])  # the last one tells nothing new
    found = fit_random_intercepts(features, metadata, _codes(frame["site"]), _codes(frame["who"]))
    design, subjects = _matrices(frame, label)
    for place, column in enumerate(features.T):
        expected = _dense(column, design, subjects)
        np.testing.assert_allclose(found.residual_scale[place] ** 2, expected["scale"], rtol=1e-9)
        np.testing.assert_allclose(
            found.variance[place], expected["ratio"] * expected["scale"], rtol=1e-8, atol=1e-12
        )
        order = [sorted(set(frame["who"])).index(name) for name in found.subjects]
        np.testing.assert_allclose(found.effects[:, place], expected["effects"][order], atol=1e-8)


@pytest.mark.parametrize("kind", ["balanced", "travelling", "nested"])
def test_coefficients_are_those_of_the_mixed_model(kind: str) -> None:
    features, frame, label = _table(kind)
    residualizer = MetadataResidualizer("age", site="site", subject="who").fit(
        features, metadata=frame, labels=label
    )
    design, subjects = _matrices(frame, label)
    codes = _codes(frame["who"]).codes
    for place, column in enumerate(features.T):
        beta = _dense(column, design, subjects)["beta"]
        sites, age, labelled = beta[:3], beta[3], beta[4]
        np.testing.assert_allclose(residualizer.coef_[0, place], age, rtol=1e-8)
        np.testing.assert_allclose(residualizer.protected_coef_[0, place], labelled, rtol=1e-7)
        mean = design[:, :3].mean(0) @ sites
        np.testing.assert_allclose(residualizer.site_location_[:, place], sites - mean, atol=1e-8)
        if residualizer.subject_variance_[place] > 0.1:
            # statsmodels stops where the likelihood is flat to about 1e-7 of itself.
            model = sm.MixedLM(column, design, codes).fit(reml=True, method="bfgs", gtol=1e-9)
            np.testing.assert_allclose(beta, model.fe_params, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(residualizer.subject_variance_[place], model.cov_re[0, 0], rtol=1e-3)


def _longitudinal_combat(
    features: np.ndarray, frame: pd.DataFrame, label: np.ndarray, empirical_bayes: bool
) -> np.ndarray:
    """The formulas of Beer et al. (2020), in the order of their code in R."""
    design, subjects = _matrices(frame, label)
    models = [_dense(column, design, subjects) for column in features.T]
    beta, effects = (np.stack([model[name] for model in models], axis=1) for name in ("beta", "effects"))
    sigma = np.sqrt([model["scale"] for model in models])
    predicted = design @ beta + subjects @ effects
    # Effects of the sites whose sum over the rows is 0.
    of_site = beta[:3] - design[:, :3].mean(0) @ beta[:3]
    of_row = design[:, :3] @ of_site
    standard = (features - predicted + of_row) / sigma
    out = np.empty_like(features)
    for site in range(3):
        rows = design[:, site] == 1
        part, count = standard[rows], rows.sum()
        gamma, delta = part.mean(0), part.var(0, ddof=1)
        if empirical_bayes:
            start, center, spread = gamma, gamma.mean(), gamma.var(ddof=1)
            mean, variance = delta.mean(), delta.var(ddof=1)
            shape, rate = (mean**2 + 2 * variance) / variance, (mean**3 + mean * variance) / variance
            for _ in range(500):  # where theirs stops after 30
                gamma, delta = (
                    (count * spread * start + delta * center) / (count * spread + delta),
                    (rate + 0.5 * np.square(part - gamma).sum(0)) / (count / 2 + shape - 1),
                )
        out[rows] = sigma / np.sqrt(delta) * (part - gamma) + (predicted - of_row)[rows]
    return out


@pytest.mark.parametrize("kind", ["balanced", "travelling", "nested"])
def test_equals_longitudinal_combat(kind: str) -> None:
    features, frame, label = _table(kind)
    metadata = np.column_stack([frame["age"], label])
    sites, subjects = _codes(frame["site"]), _codes(frame["who"])
    arguments = {"metadata": frame[["site", "who"]], "labels": metadata}
    plain = MetadataResidualizer(**_COMBAT).fit_transform(features, **arguments)
    np.testing.assert_allclose(plain, _longitudinal_combat(features, frame, label, False), atol=1e-7)

    intercepts = fit_random_intercepts(features, metadata, sites, subjects)
    own = intercepts.of(subjects)
    moments = site_moments(features - own, metadata[:, :0], metadata, sites)
    settings: dict[str, Any] = {
        "scale": True, "empirical_bayes": True, "pooled_scale": intercepts.residual_scale
    }  # fmt: skip
    exact = fit_location_scale(moments, tolerance=1e-13, **settings)
    result = exact.remove(features - own, metadata, sites.codes) + own
    np.testing.assert_allclose(result, _longitudinal_combat(features, frame, label, True), atol=1e-7)
    # The estimator stops as the other packages do.
    model = fit_location_scale(moments, **settings)
    shrunk = MetadataResidualizer(empirical_bayes=True, **_COMBAT).fit_transform(features, **arguments)
    np.testing.assert_allclose(shrunk, model.remove(features - own, metadata, sites.codes) + own, atol=1e-10)


def test_new_subjects_have_no_intercept_and_known_ones_keep_theirs() -> None:
    features, frame, label = _table()
    residualizer = MetadataResidualizer(**_COMBAT).fit(features, label, metadata=frame[["site", "who"]])
    known = residualizer.transform(features, metadata=frame[["site", "who"]])
    np.testing.assert_allclose(
        residualizer.inverse_transform(known, metadata=frame[["site", "who"]]), features, atol=1e-9
    )
    strangers = frame[["site", "who"]].assign(who="nobody")
    result = residualizer.transform(features, metadata=strangers)
    center, codes = residualizer.mean_, _codes(frame["site"]).codes
    expected = (features - center - residualizer.site_location_[codes]) / residualizer.site_scale_[codes]
    np.testing.assert_allclose(result, expected + center, atol=1e-9)
    assert np.abs(result - known).max() > 0.1


def test_sites_of_other_subjects_are_told_from_their_people() -> None:
    # Few people, each with many rows and nearly all at one site: least squares takes them for the site.
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(12), 20)
    site = np.where(rng.random(240) < 0.85, who % 2, 1 - who % 2)
    own = 3 * rng.standard_normal((12, 200))
    features = rng.standard_normal((240, 200)) + own[who] + 1.0 * site[:, None]
    frame = pd.DataFrame({"site": site, "who": who})
    errors = []
    for table, subject in ((frame[["site"]], None), (frame, "who")):
        model = MetadataResidualizer(site="site", subject=subject).fit(features, metadata=table)
        errors.append(np.abs(np.diff(model.site_location_, axis=0) - 1).mean())
    assert errors[1] < 0.2 * errors[0]
    # A new site, of which only people are known that were elsewhere before.
    new = features[site == 1] + 5
    model.adapt(new, metadata=frame[site == 1].assign(site=2))
    np.testing.assert_allclose(np.diff(model.site_location_, axis=0)[-1], 5, atol=1e-9)


def test_features_without_variance_and_other_tables() -> None:
    features, frame, _ = _table()
    metadata = frame[["site", "who"]]
    number = frame["who"].str[1:].astype(float).to_numpy()
    wide = np.column_stack([features, np.full(len(frame), 0.1), number, 2.0 * (frame["site"] == "york")])
    plain = MetadataResidualizer(empirical_bayes=True, **_COMBAT).fit_transform(features, metadata=metadata)
    result = MetadataResidualizer(empirical_bayes=True, **_COMBAT).fit_transform(wide, metadata=metadata)
    np.testing.assert_allclose(result[:, :7], plain, atol=1e-9)
    np.testing.assert_allclose(result[:, 7], 0.1, atol=1e-12)
    np.testing.assert_allclose(result[:, 8], number, atol=1e-6)
    np.testing.assert_allclose(np.ptp(result[:, 9]), 0, atol=1e-9)
    one = MetadataResidualizer(**_COMBAT).fit_transform(features[:, :1], metadata=metadata)
    many = MetadataResidualizer(**_COMBAT).fit_transform(features, metadata=metadata)
    np.testing.assert_allclose(one, many[:, :1], atol=1e-9)
    far = MetadataResidualizer(**_COMBAT).fit_transform(features + 1e6, metadata=metadata)
    np.testing.assert_allclose(far - 1e6, many, atol=1e-7)
    narrow = MetadataResidualizer(**_COMBAT).fit_transform(features.astype(np.float32), metadata=metadata)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, many, atol=1e-4)
    spoilt = features.copy()
    spoilt[3, 2] = np.nan
    skipping = MetadataResidualizer(missing_features="skip", **_COMBAT)
    without = MetadataResidualizer(**_COMBAT).fit(np.delete(features, 3, 0), metadata=metadata.drop(index=3))
    np.testing.assert_allclose(
        np.delete(skipping.fit_transform(spoilt, metadata=metadata), 3, 0),
        without.transform(np.delete(features, 3, 0), metadata=metadata.drop(index=3)),
        atol=1e-9,
    )
    np.testing.assert_array_equal(
        skipping.transform(features, metadata=metadata),
        MetadataResidualizer(**_COMBAT)
        .fit(features, metadata=metadata, sample_weight=np.arange(len(frame)) != 3)
        .transform(features, metadata=metadata),
    )
    without_sites = MetadataResidualizer(subject="who").fit(features, metadata=frame[["age", "who"]])
    design = np.column_stack([np.ones(len(frame)), frame["age"]])
    beta = _dense(features[:, 4], design, pd.get_dummies(frame["who"]).to_numpy(float))["beta"]
    np.testing.assert_allclose(without_sites.coef_[0, 4], beta[1], rtol=1e-8)


def test_many_features_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, frame, label = _table()
    arguments = (label[:, None], _codes(frame["site"]), _codes(frame["who"]))
    whole = fit_random_intercepts(features, *arguments)
    monkeypatch.setattr("mdnorm.tables.subjects._STEP_VALUES", 70)
    parts = fit_random_intercepts(features, *arguments)
    for name in ("effects", "variance", "residual_scale"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {"who": range(40)}, "no subject has more than one row .*leave subject= out"),
        ({}, {"who": "somebody"}, "determine the subjects .40 rows of 1 subjects, 4 independent columns"),
        ({}, {"site": "as who"}, "determine the subjects"),
        (
            {"site": None, "scale": False, "formula": "C(age)"},
            {"age": range(40)},
            "too few rows for subject=",
        ),
        ({"ridge": 1.0}, {}, "subject='who' fits a mixed model, which has no penalty"),
        ({"subject": "site"}, {}, "site and subject must be different columns"),
        ({"subject": "whom"}, {}, "subject='whom' is not a column of metadata"),
        ({"formula": "age + who"}, {}, "'who' is the subject and in formula as well"),
        ({}, {"who": [None] * 40}, "column 'who', the subject, is missing in rows 0, 1"),
    ],
)
def test_what_cannot_be_fitted_says_why(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    features, frame, _ = (part[:40] for part in _table("balanced"))
    changes = {"site": frame["who"]} if changes.get("site") == "as who" else changes
    frame = frame.assign(**changes)
    with pytest.raises(ValueError, match=message):
        MetadataResidualizer(**({"formula": "age"} | _COMBAT | settings)).fit(features, metadata=frame)


def test_what_is_not_there_for_subjects_says_so() -> None:
    features, frame, _ = _table()
    residualizer = MetadataResidualizer(**_COMBAT)
    with pytest.raises(ValueError, match="subject='who' needs all rows at once"):
        residualizer.partial_fit(features, metadata=frame)
    with pytest.raises(ValueError, match="rows have no weights: leave sample_weight out"):
        residualizer.fit(features, metadata=frame, sample_weight=np.arange(len(frame)) + 1.0)
    with pytest.raises(ValueError, match="subject='who' needs metadata with that column"):
        MetadataResidualizer(subject="who", metadata_columns=()).fit(features)
    with pytest.raises(ValueError, match="subject='who': a summary is of one least-squares regression"):
        residualizer.fit(features, metadata=frame).summary()
    with pytest.raises(ValueError, match="fit had subject=, which needs all rows at once"):
        residualizer.set_params(subject=None).partial_fit(features, metadata=frame)
    residualizer.set_params(subject="who")
    with pytest.raises(ValueError, match="metadata has the columns"):
        residualizer.transform(features, metadata=frame[["site", "age"]])
