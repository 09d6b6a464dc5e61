"""ComBat from statistics against neuroCombat and neuroHarmonize on the tables themselves."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuroCombat import neuroCombat
from neuroCombat.neuroCombat import aprior, bprior, it_sol

from mdnorm.tables import LocationScale, Moments, fit_location_scale

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    from neuroHarmonize import harmonizationLearn

# The references print their progress, and one of them uses np.matrix.
pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002 (a reference seeds the global generator)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    np.random.set_state(state)  # noqa: NPY002


def _table(
    n: int = 160, num_features: int = 25, seed: int = 0, share: tuple[float, ...] = (0.5, 0.3, 0.15, 0.05)
) -> tuple[np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    site = rng.choice(len(share), n, p=share)
    # Whole numbers: the references round covariates to float32.
    frame = pd.DataFrame(
        {
            "SITE": np.array(["berlin", "basel", "york", "oslo"])[site],
            "age": rng.integers(20, 80, n) + 3.0 * site,
            "sex": rng.integers(0, 2, n).astype(float),
            "dose": rng.integers(0, 9, n).astype(float),
        }
    )
    features = rng.standard_normal((n, num_features)) * rng.uniform(0.4, 3, (len(share), num_features))[site]
    features += 2 * rng.standard_normal((len(share), num_features))[site] + rng.uniform(-50, 50, num_features)
    covariates = frame[["age", "sex", "dose"]].to_numpy()
    return features + covariates @ (0.3 * rng.standard_normal((3, num_features))), frame


def _moments(features: np.ndarray, frame: pd.DataFrame, num_metadata: int = 0) -> dict[Any, Moments]:
    covariates, site = frame.drop(columns="SITE").to_numpy(float), frame["SITE"].to_numpy()
    return {
        name: Moments.empty(features.shape[1], num_metadata, covariates.shape[1] - num_metadata).update(
            features[site == name], covariates[site == name]
        )
        for name in sorted(set(site))
    }


def _index(model: LocationScale, frame: pd.DataFrame) -> np.ndarray:
    return np.array([model.sites.index(site) if site in model.sites else -1 for site in frame["SITE"]])


def _harmonised(model: LocationScale, features: np.ndarray, frame: pd.DataFrame) -> np.ndarray:
    return model.remove(features, frame.drop(columns="SITE").to_numpy(float), _index(model, frame))


# --------------------------------------------------------------------------------------------------------
# Against the references
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [["SITE"], ["SITE", "age"], ["SITE", "age", "sex", "dose"]])
@pytest.mark.parametrize("empirical_bayes", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_equals_neurocombat(columns: list[str], empirical_bayes: bool, scale: bool) -> None:
    features, frame = _table()
    frame = frame[columns]
    with _quiet():
        expected = neuroCombat(
            features.T.copy(),
            frame,
            "SITE",
            continuous_cols=columns[1:],
            eb=empirical_bayes,
            mean_only=not scale,
        )
    model = fit_location_scale(_moments(features, frame), scale=scale, empirical_bayes=empirical_bayes)
    np.testing.assert_allclose(_harmonised(model, features, frame), expected["data"].T, atol=1e-9)
    estimates = expected["estimates"]
    np.testing.assert_allclose(model.pooled_scale, np.sqrt(estimates["var.pooled"][:, 0]), rtol=1e-10)
    np.testing.assert_allclose(
        model.location, estimates["gamma.star"] * np.sqrt(estimates["var.pooled"].T), rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(model.scale**2, np.array(estimates["delta.star"]), rtol=1e-9)


@given(
    st.integers(60, 120),
    st.integers(2, 12),
    st.sampled_from([(0.5, 0.5), (0.4, 0.4, 0.2), (0.6, 0.2, 0.1, 0.1)]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_equals_neuroharmonize_on_any_table(
    n: int, num_features: int, share: tuple[float, ...], empirical_bayes: bool, seed: int
) -> None:
    features, frame = _table(n, num_features, seed, share)
    if frame["SITE"].value_counts().min() < 3:
        return
    with _quiet():
        expected = harmonizationLearn(features, frame, eb=empirical_bayes)[1]
    model = fit_location_scale(_moments(features, frame), scale=True, empirical_bayes=empirical_bayes)
    np.testing.assert_allclose(_harmonised(model, features, frame), expected, atol=1e-7)


@pytest.mark.parametrize("empirical_bayes", [True, False])
def test_new_sites_are_estimated_as_all_others(empirical_bayes: bool) -> None:
    # What neuroHarmonize means to do with ``orig_model``, where its call of neuroCombat fails.
    features, frame = _table()
    new = (frame["SITE"] == "york").to_numpy()
    with _quiet():
        reference = harmonizationLearn(features[~new], frame[~new], eb=empirical_bayes)[0]
    covariates = frame.drop(columns="SITE").to_numpy(float)
    expected_mean = reference["stand_mean"][:, :1] + reference["B_hat"][3:].T @ covariates[new].T
    deviation = np.sqrt(reference["var_pooled"])
    standardised = (features[new].T - expected_mean) / deviation
    location, variance = standardised.mean(1), standardised.var(1, ddof=1)
    if empirical_bayes:
        location, variance = it_sol(
            standardised,
            location,
            variance,
            location.mean(),
            location.var(ddof=1),
            aprior(variance),
            bprior(variance),
        )
    expected = (standardised - location[:, None]) / np.sqrt(variance)[:, None] * deviation + expected_mean

    model = fit_location_scale(
        _moments(features[~new], frame[~new]), scale=True, empirical_bayes=empirical_bayes
    )
    rows = _moments(features[new], frame[new])
    adapted = model.with_sites(rows)
    np.testing.assert_allclose(_harmonised(adapted, features[new], frame[new]), expected.T, atol=1e-9)
    with pytest.raises(ValueError, match=r"\['york'\] are part of the model already"):
        adapted.with_sites(rows)


@pytest.mark.parametrize("empirical_bayes", [True, False])
def test_equals_neurocombat_with_a_reference_site(
    monkeypatch: pytest.MonkeyPatch, empirical_bayes: bool
) -> None:
    monkeypatch.setattr(np, "int", int, raising=False)  # a name that NumPy had when the reference was written
    features, frame = _table()
    with _quiet():
        expected = neuroCombat(
            features.T.copy(),
            frame,
            "SITE",
            continuous_cols=["age", "sex", "dose"],
            eb=empirical_bayes,
            ref_batch="basel",
        )["data"].T
    model = fit_location_scale(
        _moments(features, frame), scale=True, empirical_bayes=empirical_bayes, reference_site="basel"
    )
    result = _harmonised(model, features, frame)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    of_reference = (frame["SITE"] == "basel").to_numpy()
    np.testing.assert_array_equal(result[of_reference], features[of_reference])


def test_a_smaller_tolerance_goes_on_to_the_fixed_point_of_the_reference() -> None:
    features, frame = _table()
    with _quiet():
        estimates = neuroCombat(features.T.copy(), frame, "SITE", continuous_cols=["age", "sex", "dose"])
    info, fitted = estimates["info"], estimates["estimates"]
    standardised = (features.T - fitted["stand.mean"] - fitted["mod.mean"]) / np.sqrt(fitted["var.pooled"])
    model = fit_location_scale(_moments(features, frame), scale=True, empirical_bayes=True, tolerance=1e-13)
    priors = [fitted[name] for name in ("gamma_hat", "delta_hat", "gamma_bar", "t2", "a_prior", "b_prior")]
    for row, members in enumerate(info["batch_info"]):
        location, variance = it_sol(standardised[:, members], *(prior[row] for prior in priors), conv=1e-13)
        np.testing.assert_allclose(model.location[row] / model.pooled_scale, location, atol=1e-10)
        np.testing.assert_allclose(model.scale[row] ** 2, variance, rtol=1e-10)


# --------------------------------------------------------------------------------------------------------
# What it is for
# --------------------------------------------------------------------------------------------------------


def test_location_only_is_least_squares_with_site_columns() -> None:
    features, frame = _table()
    model = fit_location_scale(_moments(features, frame, num_metadata=1))
    sites = pd.get_dummies(frame["SITE"]).to_numpy(float)
    removed = np.column_stack([sites, frame[["age"]]])
    design = np.column_stack([removed, frame[["sex", "dose"]]])
    coefficients = np.linalg.lstsq(design, features, rcond=None)[0]
    expected = features - (removed - removed.mean(0)) @ coefficients[: removed.shape[1]]
    np.testing.assert_allclose(_harmonised(model, features, frame), expected, atol=1e-9)


@pytest.mark.parametrize("empirical_bayes", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("reference_site", [None, "oslo"])
def test_restore_is_the_inverse(empirical_bayes: bool, scale: bool, reference_site: str | None) -> None:
    features, frame = _table()
    model = fit_location_scale(
        _moments(features, frame, num_metadata=1),
        scale=scale,
        empirical_bayes=empirical_bayes,
        reference_site=reference_site,
    )
    design, index = frame.drop(columns="SITE").to_numpy(float), _index(model, frame)
    index[:10] = -1
    there = model.remove(features, design, index)
    assert np.abs(there - features).max() > 0.5
    np.testing.assert_allclose(model.restore(there, design, index), features, atol=1e-10)


def test_one_site_has_no_site_effect() -> None:
    features, frame = _table()
    frame = frame.assign(SITE="berlin")
    model = fit_location_scale(_moments(features, frame), scale=True, empirical_bayes=True)
    np.testing.assert_array_equal(_harmonised(model, features, frame), features)


# --------------------------------------------------------------------------------------------------------
# Edges
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empirical_bayes", [True, False])
def test_features_without_variance_take_no_part(empirical_bayes: bool) -> None:
    features, frame = _table()
    site = frame["SITE"].astype("category").cat.codes.to_numpy()
    constant, by_site = np.full(len(frame), 0.1), 0.3 + 0.1 * site
    explained = 0.7 * frame["age"].to_numpy() + 0.1
    wide = np.column_stack([constant, features, by_site, explained])
    settings: dict[str, Any] = {"scale": True, "empirical_bayes": empirical_bayes}
    model = fit_location_scale(_moments(wide, frame), **settings)
    alone = fit_location_scale(_moments(features, frame), **settings)
    assert np.array_equal(np.flatnonzero(model.pooled_scale == 0), [0, 26, 27])
    result = _harmonised(model, wide, frame)
    np.testing.assert_allclose(result[:, 1:26], _harmonised(alone, features, frame), atol=1e-9)
    np.testing.assert_allclose(result[:, 0], constant, atol=1e-12)
    np.testing.assert_allclose(result[:, 26], by_site.mean(), atol=1e-12)
    np.testing.assert_allclose(result[:, 27], explained, atol=1e-9)


def test_a_feature_constant_within_one_site_is_treated_as_neurocombat_means_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The reference puts 1 for a variance of exactly 0, and misses those that rounding has made 1e-32.
    monkeypatch.setitem(
        neuroCombat.__globals__, "convert_zeroes", lambda variance: np.where(variance < 1e-20, 1, variance)
    )
    features, frame = _table()
    features[(frame["SITE"] == "york").to_numpy(), 3] = 0.0
    frame = frame[["SITE"]]
    for empirical_bayes in (False, True):
        with _quiet():
            expected = neuroCombat(features.T.copy(), frame, "SITE", eb=empirical_bayes)["data"].T
        model = fit_location_scale(_moments(features, frame), scale=True, empirical_bayes=empirical_bayes)
        np.testing.assert_allclose(_harmonised(model, features, frame), expected, atol=1e-9)


def test_features_that_agree_give_a_point_prior_and_no_nan() -> None:
    features, frame = _table(num_features=1)
    twice = np.column_stack([features, -3 * features])
    model = fit_location_scale(_moments(twice, frame), scale=True, empirical_bayes=True)
    result = _harmonised(model, twice, frame)
    assert np.isfinite(result).all()
    estimated = fit_location_scale(_moments(twice, frame), scale=True)
    np.testing.assert_allclose(model.scale, estimated.scale, rtol=1e-9)


def test_what_cannot_be_estimated_is_said() -> None:
    features, frame = _table()
    lonely = frame.copy()
    lonely.loc[0, "SITE"] = "rome"
    with pytest.raises(ValueError, match=r"site 'rome' has 1 row\(s\).*scale=False.*merge"):
        fit_location_scale(_moments(features, lonely), scale=True)
    location = fit_location_scale(_moments(features, lonely))
    np.testing.assert_allclose(
        _harmonised(location, features, lonely)[0],
        location.mean
        + (lonely.drop(columns="SITE").to_numpy(float)[0] - location.design_mean) @ location.coefficients,
    )
    with pytest.raises(ValueError, match="n_features=1 with residual variance: it needs at least 2"):
        fit_location_scale(_moments(features[:, :1], frame), scale=True, empirical_bayes=True)
    with pytest.raises(ValueError, match="reference_site='rome' has no rows"):
        fit_location_scale(_moments(features, frame), reference_site="rome")
    with pytest.raises(ValueError, match="no rows"):
        fit_location_scale({"a": Moments.empty(2, 0)})
    with pytest.raises(ValueError, match="did not settle"):
        fit_location_scale(_moments(features, frame), scale=True, empirical_bayes=True, tolerance=-1.0)


def test_protected_columns_that_the_sites_determine_are_refused() -> None:
    features, frame = _table()
    patients = frame["SITE"].isin(["york", "oslo"]).astype(float)
    confounded = frame.assign(dx=patients)
    with pytest.raises(ValueError, match=r"protected, dx \(constant within each site\)"):
        fit_location_scale(_moments(features, confounded), column_names=["age", "sex", "dose", "dx"])
    shifted = frame.assign(dx=patients + 0.5 * frame["age"])
    with pytest.raises(ValueError, match=r"protected column 0, .*\(together with the metadata\)"):
        fit_location_scale(_moments(features, shifted))
    # As metadata it is only counted to the sites, and twice the same protected column is no matter.
    field = pd.DataFrame({"SITE": frame["SITE"], "field": patients, "age": frame["age"]})
    model = fit_location_scale(_moments(features, field, num_metadata=1))
    assert np.all(model.coefficients[0] == 0)
    twice = frame.assign(again=2 * frame["age"] + 1)
    np.testing.assert_allclose(
        _harmonised(fit_location_scale(_moments(features, twice)), features, twice),
        _harmonised(fit_location_scale(_moments(features, frame)), features, frame),
        atol=1e-8,
    )
