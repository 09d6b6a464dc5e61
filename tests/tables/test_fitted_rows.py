"""Which rows an estimate of tables comes from: those of positive weight that have all features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import residualize_dask, residualize_file

NAMES = ["x", "y", "z"]


def table(seed: int = 0, rows: int = 200) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    site = random.choice(list("ABC"), rows)
    features = random.standard_normal((rows, 3)) + 2.0 * np.searchsorted(list("ABC"), site)[:, None]
    age = random.uniform(20, 80, rows)
    return pd.DataFrame(features + 0.05 * age[:, None], columns=NAMES).assign(site=site, age=age)


def without_site_b(frame: pd.DataFrame, used: np.ndarray) -> np.ndarray:
    """Features of rows of A and B without the difference of B to A, as least squares on used rows says."""
    is_b = (frame["site"] == "B").to_numpy(float)[used]
    features = frame[NAMES].to_numpy()[used]
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(is_b)), is_b]), features, rcond=None)[0]
    return features - np.outer(is_b - is_b.mean(), slopes[1])


@pytest.mark.parametrize("by", ["weights", "skipped", "weights of a table of strings and numbers"])
def test_a_level_that_only_unused_rows_have_is_unseen(by: str) -> None:
    frame = table()
    used = (frame["site"] != "C").to_numpy()
    features, settings, weights = frame[NAMES].to_numpy(), {}, None
    if by == "skipped":
        features = np.where(used[:, None] | (np.arange(3) != 1), features, np.nan)
        settings = {"missing_features": "skip"}
    else:
        weights = used.astype(float)
    metadata = frame[["site"]] if by == "weights" else frame["site"].to_numpy()
    wanted = without_site_b(frame, used)
    for method in ("fit", "partial_fit"):
        strict: Any = getattr(MetadataResidualizer(**settings), method)(
            features, metadata=metadata, sample_weight=weights
        )
        assert len(strict.metadata_names_) == 1
        np.testing.assert_allclose(strict.transform(features[used], metadata=metadata[used]), wanted)
        with pytest.raises(ValueError, match=r"level\(s\) 'C' in rows .* not in the training data"):
            strict.transform(features, metadata=metadata)
        lenient = MetadataResidualizer(unseen="mean", **settings)
        getattr(lenient, method)(features, metadata=metadata, sample_weight=weights)
        out = lenient.transform(features, metadata=metadata)
        np.testing.assert_allclose(out[used], wanted)
        np.testing.assert_array_equal(out[~used], features[~used])  # the average of the fit: no correction


@pytest.mark.parametrize("how", ["file", "dask"])
def test_a_level_that_only_skipped_rows_have_is_unseen_in_files_and_on_clusters(
    how: str, tmp_path: Path
) -> None:
    dask = pytest.importorskip("dask")
    frames = pytest.importorskip("dask.dataframe")
    frame = table()
    used = (frame["site"] != "C").to_numpy()
    wanted = without_site_b(frame, used)
    frame.loc[~used, "y"] = np.nan
    frame.to_parquet(tmp_path / "table.parquet")

    def run(unseen: str) -> pd.DataFrame:
        options: Any = {"formula": "site", "missing_features": "skip", "unseen": unseen}
        if how == "file":
            out = tmp_path / "out.parquet"
            residualize_file(tmp_path / "table.parquet", out, progress=False, **options)
            return pd.read_parquet(out)
        with dask.config.set(scheduler="sync"):
            parts = frames.from_pandas(frame, npartitions=3)
            return residualize_dask(parts, feature_names=NAMES, **options).features.compute()

    out = run("mean")[NAMES].to_numpy()
    np.testing.assert_allclose(out[used], wanted)
    np.testing.assert_array_equal(out[~used], frame[NAMES].to_numpy()[~used])
    with pytest.raises(ValueError, match=r"level\(s\) 'C' in row.* not in the training data"):
        run("error")


def test_what_only_unused_rows_lack_or_have_is_no_error_of_fit() -> None:
    frame = table()
    frame.loc[:4, "age"], labels = np.nan, frame["age"].to_numpy() * 0
    labels[5:] = np.random.default_rng(1).standard_normal(195)
    labels[:5] = np.nan
    weights = (np.arange(200) >= 5).astype(float)
    arguments: Any = {"metadata": frame[["age"]], "labels": labels}
    fitted = MetadataResidualizer().fit(frame[NAMES], sample_weight=weights, **arguments)
    rest = {name: part[5:] for name, part in arguments.items()}
    design = np.column_stack([np.ones(195), frame["age"][5:], labels[5:]])
    slope = np.linalg.lstsq(design, frame[NAMES].to_numpy()[5:], rcond=None)[0][1]
    np.testing.assert_allclose(fitted.coef_, slope[None], rtol=1e-10)
    assert fitted.transform(frame[NAMES][5:], metadata=rest["metadata"]).shape == (195, 3)
    frame.loc[7, "age"] = np.nan
    arguments["metadata"] = frame[["age"]]
    with pytest.raises(ValueError, match=r"'age' in row 2 .*among the 195 of 200 that are fitted to"):
        MetadataResidualizer().fit(frame[NAMES], sample_weight=weights, **arguments)
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        MetadataResidualizer().fit(frame[NAMES], metadata=frame["site"], sample_weight=-weights)


@pytest.mark.parametrize("how", ["memory", "file", "dask"])
def test_the_mean_of_missing_values_is_weighted(how: str, tmp_path: Path) -> None:
    dask = pytest.importorskip("dask")
    frames = pytest.importorskip("dask.dataframe")
    frame = table()
    random = np.random.default_rng(2)
    frame["w"] = random.integers(0, 4, 200).astype(float)
    # Missing values at random would leave weighted and plain means too near to each other.
    frame["w"] *= 1.0 + 2 * (frame["age"] > 50)
    frame.loc[::5, "age"] = np.nan
    frame.to_parquet(tmp_path / "table.parquet")
    features, weights, known = frame[NAMES].to_numpy(), frame["w"].to_numpy(), frame["age"].notna()
    age = frame["age"].fillna(np.average(frame["age"][known], weights=weights[known])).to_numpy()
    root = np.sqrt(weights)[:, None]
    design = np.column_stack([np.ones(200), age])
    slope = np.linalg.lstsq(root * design, root * features, rcond=None)[0][1]
    wanted = features - np.outer(age - np.average(age, weights=weights), slope)
    assert np.abs(age[0] - frame["age"].mean()) > 2
    if how == "memory":
        model = MetadataResidualizer("age", missing="mean")
        model.fit(frame[NAMES], metadata=frame, sample_weight=weights)
        out = model.transform(frame[NAMES], metadata=frame)
    elif how == "file":
        path = tmp_path / "out.parquet"
        options: Any = {"formula": "age", "missing": "mean", "weights": "w", "progress": False}
        residualize_file(tmp_path / "table.parquet", path, features=NAMES, **options)
        out = pd.read_parquet(path)[NAMES].to_numpy()
    else:
        with dask.config.set(scheduler="sync"):
            result = residualize_dask(
                frames.from_pandas(frame, npartitions=3),
                formula="age",
                missing="mean",
                weights="w",
                feature_names=NAMES,
            )
            out = result.features.compute()[NAMES].to_numpy()
    np.testing.assert_allclose(out, wanted, rtol=1e-10)


@pytest.mark.parametrize("how", ["memory", "file", "dask"])
@pytest.mark.parametrize("settings", [{"formula": "age"}, {"site": "site"}])
def test_a_feature_without_any_value_is_named(how: str, settings: dict[str, Any], tmp_path: Path) -> None:
    dask = pytest.importorskip("dask")
    frames = pytest.importorskip("dask.dataframe")
    frame = table().assign(y=np.nan)
    frame.to_parquet(tmp_path / "table.parquet")
    options: Any = {"missing_features": "skip", **settings}

    def run() -> None:
        if how == "memory":
            MetadataResidualizer(**options).fit(frame[NAMES], metadata=frame[list(settings.values())])
        elif how == "file":
            source, out = tmp_path / "table.parquet", tmp_path / "out.parquet"
            residualize_file(source, out, features=NAMES, progress=False, **options)
        else:
            residualize_dask(frames.from_pandas(frame, npartitions=3), feature_names=NAMES, **options)

    message = r"'skip' leaves all of them out, since feature\(s\) 'y' have no value"
    with dask.config.set(scheduler="sync"), pytest.raises(ValueError, match=message):
        run()


def test_adapt_leaves_rows_out_that_lack_a_feature() -> None:
    frame = table(rows=300)
    features = frame[NAMES].to_numpy()
    model = MetadataResidualizer(site="site", missing_features="skip").fit(features, metadata=frame[["site"]])
    new = pd.DataFrame({"site": ["D"] * 300})
    partly = np.where((np.arange(300) == 3)[:, None] & (np.arange(3) == 1), np.nan, features)
    model.adapt(partly, metadata=new)
    rest = np.arange(300) != 3
    np.testing.assert_allclose(model.site_location_[-1], features[rest].mean(0) - model.mean_, atol=1e-12)
    out = model.transform(partly, metadata=new)
    np.testing.assert_allclose(np.nanmean(out[rest], 0), model.mean_)


@pytest.mark.parametrize("kind", [int, "Int64", object])
def test_whole_numbers_that_are_no_classes_are_refused(kind: Any) -> None:
    frame = table()
    y = pd.Series(np.random.default_rng(5).integers(0, 1000, 200)).astype(kind)
    number = y.nunique()
    for settings in ({}, {"ridge": 1.0}):
        with pytest.raises(
            ValueError, match=rf"y has {number} different whole numbers in 200 rows.*continuous"
        ):
            MetadataResidualizer(**settings).fit(frame[NAMES], y, metadata=frame["age"])
    model = MetadataResidualizer(protect_target="continuous").fit(frame[NAMES], y, metadata=frame["age"])
    design = np.column_stack([np.ones(200), frame["age"], y.astype(float)])
    wanted = np.linalg.lstsq(design, frame[NAMES].to_numpy(), rcond=None)[0]
    np.testing.assert_allclose(model.coef_, wanted[1:2])
    fractions = (y.astype(float) / 7).astype(object)  # numbers, whatever numpy calls them
    same = MetadataResidualizer().fit(frame[NAMES], fractions, metadata=frame["age"])
    assert same.protected_names_ == ["y"]
    np.testing.assert_allclose(same.coef_, wanted[1:2])


@pytest.mark.parametrize(
    ("classes", "rows", "fits"), [(20, 200, True), (21, 200, False), (5, 20, True), (6, 20, False)]
)
def test_how_many_whole_numbers_are_classes(classes: int, rows: int, fits: bool) -> None:
    frame, y = table(rows=rows), np.arange(rows) % classes
    model = MetadataResidualizer(ridge=1.0)
    if fits:
        assert len(model.fit(frame[NAMES], y, metadata=frame["age"]).protected_names_) == classes - 1
        return
    with pytest.raises(ValueError, match=f"y has {classes} different whole numbers in {rows} rows"):
        model.fit(frame[NAMES], y, metadata=frame["age"])
    model.partial_fit(frame[NAMES], y, metadata=frame["age"], classes=range(classes))
    assert len(model.protected_names_) == classes - 1


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_no_ridge_is_advised_against_protected_columns(ridge: float) -> None:
    frame, y = table(), np.arange(200)
    model = MetadataResidualizer(ridge=ridge, protect_target="categorical")
    with pytest.raises(
        ValueError, match=r"200 row\(s\) for 200 .* columns of protected .*fewer protected columns\.$"
    ):
        model.fit(frame[NAMES], y, metadata=frame["age"])
