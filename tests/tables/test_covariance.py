"""CovBat against its published steps, each done by neuroCombat and scikit-learn on the rows themselves."""

import contextlib
import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from neuroCombat import neuroCombat
from scipy.linalg import hadamard
from sklearn.decomposition import PCA

from mdnorm.sklearn import MetadataResidualizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:the matrix subclass:PendingDeprecationWarning", "ignore::mdnorm.design.LeakageWarning"
)

_SETTINGS: dict[str, Any] = {"site": "site", "scale": True, "covariance": True}


def _table(n: int = 180, num_features: int = 12, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Features whose covariances differ between three sites, and whole numbers that have an effect."""
    rng = np.random.default_rng(seed)
    site = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    dose = rng.integers(0, 9, n).astype(float)
    mixing = np.eye(num_features) + 0.4 * rng.standard_normal((3, num_features, num_features))
    features = np.einsum("nij,nj->ni", mixing[site], rng.standard_normal((n, num_features)))
    features += 2 * rng.standard_normal((3, num_features))[site] + 0.5 * dose[:, None] + 100
    return features, pd.DataFrame({"site": np.array(["york", "oslo", "rome"])[site], "dose": dose})


def _neurocombat(features: np.ndarray, frame: pd.DataFrame, columns: list[str], eb: bool) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, Any] = neuroCombat(features.T.copy(), frame, "site", continuous_cols=columns, eb=eb)
    return found


def _at(fitted: dict[str, Any], rows: np.ndarray, site: pd.Series, mean: np.ndarray) -> np.ndarray:
    """What neuroCombat's estimates make of any rows, less their mean."""
    estimates = fitted["estimates"]
    index = [list(estimates["batches"]).index(name) for name in site]
    spread = np.sqrt(np.asarray(estimates["var.pooled"])[:, 0])
    standard = (rows - mean) / spread
    location, variance = (np.asarray(estimates[name])[index] for name in ("gamma.star", "delta.star"))
    return (standard - location) / np.sqrt(variance) * spread


def _covbat(
    features: np.ndarray, frame: pd.DataFrame, train: np.ndarray, share: float, eb: bool
) -> np.ndarray:
    """The steps of the authors' code in R, estimated from some rows and applied to all."""
    columns = ["dose"] if "dose" in frame else []
    combat = _neurocombat(features[train], frame[train], columns, eb)
    # What neuroCombat calls the mean is that at a dose of 0.
    mean = np.broadcast_to(np.asarray(combat["estimates"]["stand.mean"])[:, 0], features.shape)
    if columns:
        known = np.column_stack([pd.get_dummies(frame["site"])[train].to_numpy(float), frame["dose"][train]])
        slope = np.linalg.lstsq(known, features[train], rcond=None)[0][-1]
        mean = mean + frame[["dose"]].to_numpy() * slope
    residual = _at(combat, features, frame["site"], mean)
    center, unit = residual[train].mean(0), residual[train].std(0, ddof=1)
    pca = PCA().fit((residual[train] - center) / unit)
    count = int(np.flatnonzero(np.cumsum(pca.explained_variance_ratio_) > share)[0]) + 1
    scores = pca.transform((residual - center) / unit)
    of_scores = _neurocombat(scores[train, :count], frame[train], [], eb=False)
    scores_mean = np.asarray(of_scores["estimates"]["stand.mean"])[:, 0]
    scores[:, :count] = _at(of_scores, scores[:, :count], frame["site"], scores_mean) + scores_mean
    return pca.inverse_transform(scores) * unit + center + mean


@pytest.mark.parametrize("empirical_bayes", [True, False])
@pytest.mark.parametrize("share", [0.95, 0.5])
@pytest.mark.parametrize("with_dose", [True, False])
def test_equals_the_published_steps_on_training_and_new_rows(
    empirical_bayes: bool, share: float, with_dose: bool
) -> None:
    features, frame = _table()
    frame = frame if with_dose else frame[["site"]]
    train = np.arange(len(frame)) % 4 > 0
    expected = _covbat(features, frame, train, share, empirical_bayes)
    settings = _SETTINGS | {"empirical_bayes": empirical_bayes, "covariance": True if share > 0.9 else share}
    labels = {"labels": frame[["dose"]]} if with_dose else {}
    residualizer = MetadataResidualizer(**settings).fit(
        features[train], metadata=frame.loc[train, ["site"]], **{k: v[train] for k, v in labels.items()}
    )
    result = residualizer.transform(features, metadata=frame[["site"]], **labels)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    np.testing.assert_allclose(
        residualizer.inverse_transform(result, metadata=frame[["site"]], **labels), features, atol=1e-9
    )


def test_covariances_of_sites_agree_afterwards() -> None:
    # Sites that differ in the variance along directions that they share, as the method supposes.
    rng = np.random.default_rng(0)
    site = rng.integers(0, 3, 3000)
    directions = hadamard(8) / np.sqrt(8)  # each has a part of each feature
    deviations = np.geomspace(3, 1, 8) * rng.uniform(0.5, 2, (3, 8))
    features = (rng.standard_normal((3000, 8)) * deviations[site]) @ directions
    sites = pd.DataFrame({"site": site})
    spread = []
    for covariance in (False, 1.0):
        settings = _SETTINGS | {"covariance": covariance}
        result = MetadataResidualizer(**settings).fit_transform(features, metadata=sites)
        spread.append(np.linalg.norm(np.ptp([np.cov(result[site == name].T) for name in range(3)], axis=0)))
    assert spread[1] < 0.2 * spread[0]


def test_all_rows_of_the_reference_site_stay() -> None:
    features, frame = _table()
    of_oslo = (frame["site"] == "oslo").to_numpy()
    result = MetadataResidualizer(reference_site="oslo", **_SETTINGS).fit_transform(
        features, metadata=frame[["site"]]
    )
    np.testing.assert_array_equal(result[of_oslo], features[of_oslo])
    assert np.abs(result - features)[~of_oslo].max() > 0.5


def test_a_weight_is_a_number_of_rows() -> None:
    features, frame = _table()
    weights = np.random.default_rng(1).integers(0, 4, len(frame))
    repeated = np.repeat(np.arange(len(frame)), weights)
    weighted = MetadataResidualizer(**_SETTINGS).fit(
        features, metadata=frame[["site"]], sample_weight=weights
    )
    longer = MetadataResidualizer(**_SETTINGS).fit(features[repeated], metadata=frame.loc[repeated, ["site"]])
    np.testing.assert_allclose(
        weighted.transform(features, metadata=frame[["site"]]),
        longer.transform(features, metadata=frame[["site"]]),
        atol=1e-9,
    )


@pytest.mark.filterwarnings("ignore:.*rows have a (site|subject) that was not in the fit")
def test_a_new_site_is_brought_to_the_others_or_left_as_the_average_one() -> None:
    features, frame = _table(400)
    new = (frame["site"] == "rome").to_numpy()
    sites = frame[["site"]]
    residualizer = MetadataResidualizer(unseen="mean", **_SETTINGS).fit(features[~new], metadata=sites[~new])
    np.testing.assert_allclose(
        residualizer.transform(features[new], metadata=sites[new]), features[new], atol=1e-9
    )
    residualizer.adapt(features, metadata=sites)
    assert residualizer.sites_ == ["oslo", "york", "rome"]
    result = residualizer.transform(features, metadata=sites)
    # In the scores of the others after ComBat it then has their mean and the variance within them.
    combat = MetadataResidualizer(**(_SETTINGS | {"covariance": False}))
    before = combat.fit_transform(features[~new], metadata=sites[~new])

    def scores(rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = (rows - before.mean(0)) / before.std(0) @ residualizer.components_.T
        return found

    frame_of_scores = pd.DataFrame(scores(before)).groupby(frame["site"][~new].to_numpy())
    pooled = (frame_of_scores.var(ddof=0) * frame_of_scores.count()).sum() / (~new).sum()
    np.testing.assert_allclose(scores(result[new]).mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scores(result[new]).var(0, ddof=1), pooled, rtol=1e-9)
    np.testing.assert_allclose(residualizer.inverse_transform(result, metadata=sites), features, atol=1e-9)


def test_tables_of_any_shape() -> None:
    features, frame = _table()
    sites, rng = frame[["site"]], np.random.default_rng(0)
    plain = MetadataResidualizer(**_SETTINGS).fit_transform(features, metadata=sites)
    # A feature without variance has no part in the components.
    constant = np.column_stack([features, np.full(len(frame), 0.1), 3.0 * (frame["site"] == "york")])
    both = MetadataResidualizer(**_SETTINGS).fit_transform(constant, metadata=sites)
    np.testing.assert_allclose(both[:, :-2], plain, atol=1e-9)
    np.testing.assert_allclose(both[:, -2], 0.1, atol=1e-12)
    np.testing.assert_allclose(np.ptp(both[:, -1]), 0, atol=1e-12)
    for table in (rng.standard_normal((len(frame), 300)), features[:, :1], np.ones((len(frame), 2))):
        residualizer = MetadataResidualizer(**_SETTINGS).fit(table, metadata=sites)
        result = residualizer.transform(table, metadata=sites)
        np.testing.assert_allclose(residualizer.inverse_transform(result, metadata=sites), table, atol=1e-8)
    one_site = frame[["site"]].assign(site="york")
    np.testing.assert_array_equal(
        MetadataResidualizer(**_SETTINGS).fit_transform(features, metadata=one_site), features
    )
    narrow = MetadataResidualizer(**_SETTINGS).fit_transform(features.astype(np.float32), metadata=sites)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": 1.5}, r"'covariance'.*in the range \[0.0, 1.0\]. Got 1.5"),
        ({"scale": False}, "covariance=True needs scale=True"),
        ({"site": None, "scale": False}, "covariance=True needs site="),
        ({"missing_features": "skip"}, "cannot keep single ones missing: impute them first"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    features, frame = _table()
    with pytest.raises(ValueError, match=message):
        MetadataResidualizer(**(_SETTINGS | settings)).fit(features, metadata=frame[["site"]])


def test_what_needs_all_rows_at_once_says_so() -> None:
    features, frame = _table()
    residualizer = MetadataResidualizer(**_SETTINGS)
    with pytest.raises(ValueError, match="covariance=True needs all rows at once: use fit"):
        residualizer.partial_fit(features, metadata=frame[["site"]])
    residualizer.fit(features, metadata=frame[["site"]])
    with pytest.raises(ValueError, match="covariance=True: a summary is of one least-squares regression"):
        residualizer.summary()
    residualizer.set_params(covariance=False).fit(features, metadata=frame[["site"]])
    assert not hasattr(residualizer, "components_")
