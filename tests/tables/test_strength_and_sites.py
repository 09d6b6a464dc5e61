"""Removal in part against fairlearn and by its definition; sites that several columns name."""

import contextlib
import io
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fairlearn.preprocessing import CorrelationRemover
from neuroCombat import neuroCombat
from sklearn.base import clone

from mdnorm.sklearn import MetadataResidualizer

_COMBAT: dict[str, Any] = {"scale": True, "empirical_bayes": True}
_BOTH = ["site", "scanner"]


def _table(n: int = 200, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    site, scanner, dose = rng.integers(0, 2, n), rng.integers(0, 3, n), rng.integers(0, 9, n) * 1.0
    features = rng.standard_normal((n, 6)) * rng.uniform(0.5, 2, (2, 3, 6))[site, scanner]
    features += rng.standard_normal((2, 6))[site] + rng.standard_normal((3, 6))[scanner] + dose[:, None]
    names = {"site": np.array(["york", "oslo"])[site], "scanner": np.array([1.5, 3.0, 7.0])[scanner]}
    return features, pd.DataFrame(names | {"dose": dose})


# --------------------------------------------------------------------------------------------------------
# In part
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_part_is_that_of_fairlearn(strength: float) -> None:
    features, frame = _table()
    table = np.column_stack([frame["dose"], features])
    expected = CorrelationRemover(sensitive_feature_ids=[0], alpha=strength).fit(table).transform(table)
    result = MetadataResidualizer(metadata_columns=[0], strength=strength).fit_transform(table)
    np.testing.assert_allclose(result, expected, atol=1e-10)


@pytest.mark.parametrize("extra", [{}, {"subject": "who"}, {"covariance": True}, {"unseen": "mean"}])
@pytest.mark.parametrize("strength", [0.0, 0.4])
@pytest.mark.filterwarnings("ignore:.*rows have a (site|subject) that was not in the fit")
def test_a_part_lies_between_and_is_undone(extra: dict[str, Any], strength: float) -> None:
    features, frame = _table()
    frame = frame.assign(who=np.arange(200) // 3)[["site", "dose", *(["who"] if "subject" in extra else [])]]
    settings = {"site": "site", **_COMBAT, **extra}
    whole = MetadataResidualizer(**settings).fit(features, metadata=frame)
    part = MetadataResidualizer(strength=strength, **settings).fit(features, metadata=frame)
    frame.loc[:9, "site"] = "bern" if "unseen" in extra else frame.loc[:9, "site"]
    result = part.transform(features, metadata=frame)
    expected = (1 - strength) * features + strength * whole.transform(features, metadata=frame)
    np.testing.assert_allclose(result, expected, atol=1e-12)
    if strength == 0:
        np.testing.assert_allclose(result, features, rtol=1e-15)
    if strength > 0 and "covariance" in extra:
        with pytest.raises(ValueError, match=r"cannot undo a part of the covariances: strength=0\.4"):
            part.inverse_transform(result, metadata=frame)
        return
    np.testing.assert_allclose(part.inverse_transform(result, metadata=frame), features, atol=1e-10)


@pytest.mark.parametrize("strength", [-0.1, 1.1, np.nan, True, "half"])
def test_a_strength_is_a_number_from_0_to_1(strength: Any) -> None:
    features, frame = _table()
    with pytest.raises(ValueError, match=r"strength must be a number from 0 to 1|'strength'.*\[0.0, 1.0\]"):
        MetadataResidualizer(strength=strength).fit(features, metadata=frame[["dose"]])


def test_a_part_has_no_summary() -> None:
    features, frame = _table()
    model = MetadataResidualizer(strength=0.5).fit(features, metadata=frame[["dose"]])
    with pytest.raises(ValueError, match=r"strength=0\.5: a summary is of one .*Fit with strength=1"):
        model.summary()


# --------------------------------------------------------------------------------------------------------
# Sites of several columns
# --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_several_columns_are_combat_of_their_combinations() -> None:
    features, frame = _table()
    joined = frame["site"] + frame["scanner"].astype(str)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = neuroCombat(
            features.T.copy(), frame.assign(site=joined), "site", continuous_cols=["dose"]
        )["data"].T
    model = MetadataResidualizer(site=_BOTH, **_COMBAT)
    arguments = {"metadata": frame[_BOTH], "labels": frame[["dose"]]}
    result = model.fit_transform(features, **arguments)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    np.testing.assert_allclose(model.inverse_transform(result, **arguments), features, atol=1e-9)
    assert model.sites_ == [(site, scanner) for site in ("oslo", "york") for scanner in (1.5, 3.0, 7.0)]
    assert {record["site"] for record in model.summary().sites} == set(model.sites_)
    copy = pickle.loads(pickle.dumps(clone(model))).fit(features, **arguments)
    np.testing.assert_array_equal(copy.transform(features, **arguments), result)

    parts = clone(model)
    for rows in np.array_split(np.random.default_rng(1).permutation(200), 3):
        parts.partial_fit(features[rows], **{name: table.iloc[rows] for name, table in arguments.items()})
    by_name = {site: place for place, site in enumerate(parts.sites_)}
    order = [by_name[site] for site in model.sites_]
    np.testing.assert_allclose(parts.site_location_[order], model.site_location_, atol=1e-9)


def test_columns_by_position_and_one_column_in_a_list() -> None:
    features, frame = _table()
    expected = MetadataResidualizer("dose", site=_BOTH).fit_transform(features, metadata=frame)
    numbers = np.column_stack([frame["site"] == "york", frame["scanner"], frame["dose"]]).astype(float)
    by_place = MetadataResidualizer(site=(0, 1)).fit_transform(features, metadata=numbers)
    np.testing.assert_allclose(by_place, expected, atol=1e-10)
    inside = MetadataResidualizer(site=[6, 7], metadata_columns=[6, 7, 8])
    np.testing.assert_allclose(
        inside.fit_transform(np.column_stack([features, numbers])), expected, atol=1e-10
    )
    model = MetadataResidualizer(site=["site"]).fit(features, metadata=frame)
    assert model.sites_ == ["oslo", "york"]


def test_a_new_combination_of_known_sites_is_a_new_site() -> None:
    features, frame = _table()
    new = ((frame["site"] == "york") & (frame["scanner"] == 7)).to_numpy()
    table = frame[_BOTH]
    model = MetadataResidualizer(site=_BOTH, **_COMBAT).fit(features[~new], metadata=table[~new])
    with pytest.raises(ValueError, match=r"site\(s\) \[\('york', 7\)\] were not in fit"):
        model.transform(features, metadata=table)
    model.adapt(features, metadata=table)
    assert model.sites_[-1] == ("york", 7.0)
    assert np.isfinite(model.transform(features, metadata=table)).all()
    of_reference = ((frame["site"] == "oslo") & (frame["scanner"] == 3)).to_numpy()
    for reference in (("oslo", 3.0), ["oslo", 3.0]):
        settings = {"site": _BOTH, "reference_site": reference, **_COMBAT}
        result = MetadataResidualizer(**settings).fit_transform(features, metadata=table)
        np.testing.assert_array_equal(result[of_reference], features[of_reference])
    with pytest.raises(
        ValueError, match=r"reference_site='oslo' has no rows; the sites are \[\('oslo', 1.5\)"
    ):
        MetadataResidualizer(site=_BOTH, reference_site="oslo").fit(features, metadata=table)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ([], r"site=\[\] names no column"),
        (["site", "scaner"], "site='scaner' is not a column of metadata; it has .*'scanner'"),
        (["site", "site"], "must be different columns"),
    ],
)
def test_columns_that_do_not_fit(site: list[str], message: str) -> None:
    features, frame = _table()
    with pytest.raises(ValueError, match=message):
        MetadataResidualizer(site=site).fit(features, metadata=frame)


def test_a_missing_part_of_a_site_is_named() -> None:
    features, frame = _table()
    frame.loc[3, "scanner"] = np.nan
    with pytest.raises(ValueError, match="column 'scanner', the site, is missing in row 3"):
        MetadataResidualizer(site=_BOTH).fit(features, metadata=frame)
