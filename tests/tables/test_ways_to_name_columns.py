"""Columns named by any sequence, and models named by the path of their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mdnorm.design.table_file import TableFileError
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import residualize_dask, residualize_file

NAMES = ["w", "x", "y", "z"]
OTHERS = ["age", "site", "scanner"]


@pytest.fixture
def table() -> pd.DataFrame:
    random = np.random.default_rng(6)
    columns = {
        "age": random.uniform(20, 80, 150),
        **{name: random.integers(0, 2, 150) for name in OTHERS[1:]},
    }
    features = pd.DataFrame(random.standard_normal((150, 4)) + columns["site"][:, None], columns=NAMES)
    return features.assign(**columns)


def without(features: np.ndarray, *metadata: np.ndarray) -> np.ndarray:
    """Features without what least squares say of metadata columns."""
    columns = np.column_stack(metadata).astype(float)
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(columns)), columns]), features, rcond=None)[0][1:]
    return features - (columns - columns.mean(0)) @ slopes


@pytest.mark.parametrize(
    "named", [pd.Index(OTHERS), np.array(OTHERS), pd.Series(OTHERS), np.array([4, 5, 6]), range(4, 7)]
)
def test_metadata_columns_are_any_sequence(table: pd.DataFrame, named: Any) -> None:
    model = MetadataResidualizer(metadata_columns=named).set_output(transform="pandas")
    out = model.fit_transform(table)
    wanted = without(table[NAMES].to_numpy(), *table[OTHERS].to_numpy().T)
    np.testing.assert_allclose(out, wanted)
    np.testing.assert_allclose(model.inverse_transform(out, metadata=table[OTHERS].to_numpy()), table)


@pytest.mark.parametrize(
    "named",
    [np.array(OTHERS[1:]), pd.Index(OTHERS[1:]), pd.Series(OTHERS[1:]), np.array([1, 2]), range(1, 3)],
)
def test_sites_are_any_sequence(table: pd.DataFrame, named: Any) -> None:
    site, scanner = table["site"].to_numpy(), table["scanner"].to_numpy()
    model = MetadataResidualizer("age", site=named).fit(table[NAMES], metadata=table[OTHERS])
    wanted = without(table[NAMES].to_numpy(), table["age"].to_numpy(), site, scanner, site * scanner)
    np.testing.assert_allclose(model.transform(table[NAMES], metadata=table[OTHERS]), wanted)
    there = MetadataResidualizer("age", site=named, reference_site=np.array([0, 1]))
    assert not there.fit(table[NAMES], metadata=table[OTHERS]).site_location_[1].any()


def test_a_position_may_be_an_integer_of_numpy(table: pd.DataFrame) -> None:
    model = MetadataResidualizer("age", site=np.int64(1)).fit(table[NAMES], metadata=table[OTHERS])
    wanted = without(table[NAMES].to_numpy(), table["age"].to_numpy(), table["site"].to_numpy())
    np.testing.assert_allclose(model.transform(table[NAMES], metadata=table[OTHERS]), wanted)
    with pytest.raises(ValueError, match="names no column"):
        MetadataResidualizer(site=np.array([], dtype=str)).fit(table[NAMES], metadata=table[OTHERS])


def test_a_model_may_be_the_path_of_its_file(table: pd.DataFrame, tmp_path: Path) -> None:
    dask = pytest.importorskip("dask")
    frames = pytest.importorskip("dask.dataframe")
    source, out, saved = (tmp_path / name for name in ("t.parquet", "out.parquet", "fit.safetensors"))
    table.to_parquet(source)
    wanted = without(table[NAMES].to_numpy(), table["age"].to_numpy())
    options: Any = {"formula": pd.Index(["age"]), "features": pd.Index(NAMES), "progress": False}
    residualize_file(source, out, save_model=saved, **options)
    for path in (saved, str(saved)):
        out.unlink()
        residualize_file(source, out, apply=path, progress=False)
        np.testing.assert_allclose(pd.read_parquet(out)[NAMES], wanted)
        with dask.config.set(scheduler="sync"):
            result = residualize_dask(frames.from_pandas(table, npartitions=2), apply=path).features.compute()
        np.testing.assert_allclose(result[NAMES], wanted)
    with pytest.raises(TypeError, match="apply must be a MetadataModel or the path of one, got int"):
        residualize_file(source, out, apply=3, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TableFileError, match=r"none.safetensors does not exist"):
        residualize_file(source, out, apply=tmp_path / "none.safetensors", progress=False)
    with pytest.raises(ValueError, match="formula, features: not with apply="):
        residualize_file(source, out, apply=saved, **options)
