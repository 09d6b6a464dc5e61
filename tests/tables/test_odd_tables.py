"""Tables that are none, arrays with a mask, and numbers so small that their squares are 0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from mdnorm import Design
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import residualize_file

N = 120


def data() -> tuple[np.ndarray, pd.DataFrame]:
    random = np.random.default_rng(8)
    frame = pd.DataFrame({"age": random.uniform(20, 80, N), "site": random.integers(0, 3, N)})
    return random.standard_normal((N, 3)) + 0.1 * frame[["age"]].to_numpy(), frame


def without(features: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Features without what least squares say of a column."""
    slope = np.linalg.lstsq(np.column_stack([np.ones(len(column)), column]), features, rcond=None)[0][1]
    return features - np.outer(column - column.mean(), slope)


TABLES = {
    "lazy": (
        lambda frame: pl.DataFrame(frame.to_dict("list")).lazy(),
        r"is a lazy frame, LazyFrame: collect\(\) it",
    ),
    "records": (lambda frame: frame.to_dict("records"), r"has records.*pandas\.DataFrame\("),
    "recarray": (lambda frame: frame.to_records(index=False), r"has records.*pandas\.DataFrame\("),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("argument", ["X", "metadata", "labels"])
def test_what_is_no_table_yet_is_said_with_the_way_to_one(kind: str, argument: str) -> None:
    features, frame = data()
    make, message = TABLES[kind]
    arguments: dict[str, Any] = {"X": features, "metadata": frame[["age"]]}
    table = pd.DataFrame(features, columns=list("xyz")) if argument == "X" else frame
    with pytest.raises(TypeError, match=f"^{argument} {message}"):
        MetadataResidualizer().fit(**{**arguments, argument: make(table)})
    with pytest.raises(TypeError, match=r"collect\(\) a lazy one first, make a pandas.DataFrame of records"):
        Design("age").fit(make(frame))


def test_a_mapping_of_features_and_a_lazy_target() -> None:
    features, frame = data()
    with pytest.raises(TypeError, match=r"^X is a mapping .*pandas\.DataFrame\(X\)"):
        MetadataResidualizer().fit(dict(enumerate(features.T)), metadata=frame["age"])
    with pytest.raises(TypeError, match=r"^y is a lazy frame"):
        MetadataResidualizer().fit(features, pl.LazyFrame({"y": [1.0]}), metadata=frame["age"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_masked_values_are_missing(dtype: Any) -> None:
    features, frame = data()
    features = (100 * features).astype(dtype)
    mask = np.zeros((N, 3), bool)
    mask[[3, 50], [0, 2]] = True
    masked = np.ma.masked_array(np.where(mask, 10**6, features), mask)
    with pytest.raises(ValueError, match=r"feature\(s\) 0, 2 .*missing.* in rows 3, 50 "):
        MetadataResidualizer().fit(masked, metadata=frame["age"])
    model = MetadataResidualizer(missing_features="skip").fit(masked, metadata=frame["age"])
    rest = ~mask.any(1)
    wanted = without(features[rest].astype(float), frame["age"].to_numpy()[rest])
    out = model.transform(masked, metadata=frame["age"])
    np.testing.assert_allclose(out[rest], wanted, rtol=1e-4 if dtype == np.float32 else 1e-10)
    np.testing.assert_array_equal(np.isnan(out), mask)
    assert out.dtype == (np.float32 if dtype == np.float32 else np.float64)
    whole = MetadataResidualizer().fit_transform(np.ma.masked_array(features), metadata=frame["age"])
    np.testing.assert_array_equal(
        whole, MetadataResidualizer().fit_transform(features, metadata=frame["age"])
    )


@pytest.mark.parametrize("unit", [1e-160, 1e-170, 1e-300])
def test_numbers_whose_squares_are_too_small(unit: float, tmp_path: Path) -> None:
    features, frame = data()
    age, site = frame["age"].to_numpy(), frame["site"].to_numpy()
    with pytest.raises(ValueError, match=r"design column\(s\) 'm0' have values below 1e-150, .*smaller unit"):
        MetadataResidualizer().fit(features, metadata=age * unit)
    with pytest.raises(ValueError, match=r"design column\(s\) 'y' have values below"):
        MetadataResidualizer().fit(features, age * unit, metadata=features[:, 0])
    for settings in ({"scale": True}, {"empirical_bayes": True}, {"scale": True, "empirical_bayes": True}):
        with pytest.raises(ValueError, match=r"feature\(s\) 0, 1, 2 have values below 1e-150"):
            MetadataResidualizer(site=0, **settings).fit(features * unit, metadata=site)
    # The plain regression needs no squares of features, and a design in standard units none of its columns.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = MetadataResidualizer().fit_transform(features * unit, metadata=age)
    np.testing.assert_allclose(out / unit, without(features, age), rtol=1e-12, atol=1e-12)
    table = pd.DataFrame(features, columns=list("xyz")).assign(age=age * unit)
    table.to_parquet(tmp_path / "t.parquet")
    residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age", progress=False, features=list("xyz")
    )
    result = pd.read_parquet(tmp_path / "o.parquet")[list("xyz")]
    np.testing.assert_allclose(result, without(features, age), rtol=1e-12, atol=1e-12)


def test_numbers_that_are_hardly_numbers() -> None:
    _, frame = data()
    with pytest.raises(ValueError, match="'age' has values too small to be divided by: rescale"):
        Design("age").fit({"age": frame["age"] * 1e-310})


def test_a_column_of_zeros_is_constant_not_too_small() -> None:
    features, frame = data()
    features[:, 1] = 0
    both = np.column_stack([frame["age"], np.zeros(N)])
    out = MetadataResidualizer().fit_transform(features, metadata=both)
    np.testing.assert_allclose(out, without(features, frame["age"].to_numpy()), atol=1e-12)
    model = MetadataResidualizer(site=0, scale=True, empirical_bayes=True)
    assert not model.fit_transform(features, metadata=frame["site"])[:, 1].any()
