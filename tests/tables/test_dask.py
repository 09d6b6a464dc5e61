import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.delayed import delayed
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnorm.design.roles import TableWarning
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import MetadataModel, residualize_dask

N, D = 600, 4
NAMES = [f"f{index}" for index in range(D)]


@pytest.fixture(autouse=True)
def _in_this_process():
    with dask.config.set(scheduler="synchronous"):
        yield


def people(n=N) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.uniform(20, 80, n),
            "site": rng.choice(["york", "oslo", "rome"], n),
            "sick": rng.integers(0, 2, n),
        }
    )


def values(table: pd.DataFrame) -> np.ndarray:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((len(table), D)) + 10
    features += np.outer(table["age"] - 50, rng.standard_normal(D)) / 10
    return features + np.outer(table["site"] == "rome", rng.standard_normal(D))


def least_squares(features: np.ndarray, metadata: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    blocks = [metadata, np.ones((len(metadata), 1)), *([] if labels is None else [labels])]
    beta = np.linalg.lstsq(np.column_stack(blocks), features, rcond=None)[0][: metadata.shape[1]]
    return features - (metadata - metadata.mean(0)) @ beta


def whole() -> pd.DataFrame:
    table = people()
    return table.assign(**dict(zip(NAMES, values(table).T, strict=True)))


def columns(table: pd.DataFrame) -> np.ndarray:
    sites = (table[["site"]].to_numpy() == ["rome", "york"]).astype(float)
    return np.column_stack([table["age"], sites])


# --------------------------------------------------------------------------------------------------------
# The result
# --------------------------------------------------------------------------------------------------------


@given(
    n=st.integers(10, 60),
    chunk=st.integers(1, 60),
    other=st.integers(1, 60),
    width=st.integers(1, 3),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=15)
def test_arrays_of_any_chunks_give_least_squares(
    n: int, chunk: int, other: int, width: int, dtype: Any
) -> None:
    rng = np.random.default_rng(n)
    metadata = rng.standard_normal((n, 2)) + np.array([0, 50])
    features = (rng.standard_normal((n, 3)) + metadata @ rng.standard_normal((2, 3)) + 3).astype(dtype)
    with dask.config.set(scheduler="synchronous"):
        result, model = residualize_dask(
            da.from_array(features, chunks=(chunk, width)), da.from_array(metadata, chunks=(other, 2))
        )
        out = result.compute()
    assert result.shape == (n, 3)
    assert out.dtype == result.dtype == dtype
    assert model.design is not None
    assert model.design.metadata_names == ("m0", "m1")
    wanted = least_squares(features.astype(float), metadata)
    np.testing.assert_allclose(out, wanted, rtol=2e-6, atol=2e-6 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("partitions", [1, 3, 20])
def test_one_frame_with_everything(partitions: int) -> None:
    table = whole()
    frame = dd.from_pandas(table, npartitions=partitions)
    result, model = residualize_dask(frame, formula="age + site", labels="sick")
    out = result.compute()
    assert model.feature_names == tuple(NAMES)
    wanted = least_squares(table[NAMES].to_numpy(), columns(table), table[["sick"]].to_numpy())
    np.testing.assert_allclose(out[NAMES], wanted, rtol=1e-10)
    assert list(out.columns) == list(table.columns)
    assert out.index.equals(table.index)
    np.testing.assert_array_equal(out["age"], table["age"])


def test_frames_of_the_same_partitions_sites_and_a_fitted_model() -> None:
    table = whole()
    features, metadata = table[NAMES].astype({"f0": np.float32}), table[["age", "site", "sick"]]
    how = {"formula": "age", "site": "site", "labels": ["sick"], "scale": True, "empirical_bayes": True}
    result, model = residualize_dask(
        dd.from_pandas(features, npartitions=5), dd.from_pandas(metadata, npartitions=5), **how
    )
    assert result.dtypes["f0"] == np.float32
    assert result.dtypes["f1"] == np.float64
    estimator = MetadataResidualizer(site="site", scale=True, empirical_bayes=True)
    arrays = features.to_numpy(float)
    estimator.fit(arrays, metadata=metadata[["age", "site"]], labels=metadata[["sick"]])
    wanted = estimator.transform(arrays, metadata=metadata[["age", "site"]], labels=metadata[["sick"]])
    np.testing.assert_allclose(result.compute(), wanted, rtol=1e-6)
    again = residualize_dask(
        dd.from_pandas(features, npartitions=2), dd.from_pandas(metadata, npartitions=2), apply=model
    )
    assert isinstance(again.model, MetadataModel)
    np.testing.assert_allclose(again.features.compute(), result.compute(), rtol=1e-12)


@pytest.mark.parametrize("site", [None, "site"])
def test_weights_as_the_estimator_in_memory(site: str | None) -> None:
    table = whole()
    weights = np.random.default_rng(2).choice([0.0, 0.5, 1.0, 7.0], N)
    weights[:100] = 0  # all of the first partition
    frame = dd.from_pandas(table.assign(weight=weights), npartitions=6)
    formula = "age" if site else "age + site"
    result, model = residualize_dask(frame, formula=formula, labels="sick", site=site, weights="weight")
    assert model.feature_names == tuple(NAMES)
    estimator = MetadataResidualizer(site=site)
    features, metadata = table[NAMES].to_numpy(), table[["age", "site"]]
    estimator.fit(features, metadata=metadata, labels=table[["sick"]], sample_weight=weights)
    wanted = estimator.transform(features, metadata=metadata)
    np.testing.assert_allclose(result.compute()[NAMES], wanted, rtol=1e-10)


def test_array_beside_a_frame_and_unknown_chunks() -> None:
    table = whole()
    frame = dd.from_pandas(table, npartitions=4)
    unknown = frame[NAMES].to_dask_array()
    assert np.isnan(unknown.shape[0])
    result = residualize_dask(unknown, frame[["age", "site"]], formula="age + site").features
    wanted = least_squares(table[NAMES].to_numpy(), columns(table))
    np.testing.assert_allclose(result.compute(), wanted, rtol=1e-10)


def test_rare_levels_and_empty_partitions_are_no_obstacle() -> None:
    table = whole()
    table.loc[N - 1, "site"] = "bern"
    frame = dd.from_pandas(table, npartitions=6)
    frame = frame[(frame["age"] > 0) & (frame.index >= 150)]  # the first partition becomes empty
    kept = table.iloc[150:]
    with pytest.warns(TableWarning, match=r"stay as they are: sick \(codes: 2 different whole numbers\)"):
        result, model = residualize_dask(frame, formula="C(site)")
    assert model.design is not None
    assert "sick" not in model.feature_names
    assert model.design.levels == {"C(site)": ("bern", "oslo", "rome", "york")}
    indicators = (kept[["site"]].to_numpy() == ["oslo", "rome", "york"]).astype(float)
    wanted = least_squares(kept[NAMES].to_numpy(), indicators)
    # age is a number that is not used otherwise: a feature, too.
    np.testing.assert_allclose(result.compute()[NAMES], wanted, rtol=1e-10)


# --------------------------------------------------------------------------------------------------------
# A cluster
# --------------------------------------------------------------------------------------------------------


def slow_block(index: int, rows: int, folder: str) -> np.ndarray:
    """Return rows of the table, after a while; leave a mark that this was begun."""
    (Path(folder) / f"{index}-{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.15)
    return values(people())[index * rows : (index + 1) * rows]


@contextmanager
def cluster_of_three() -> Iterator[Client]:
    """Start three processes, forked from one that has imported what they need: each would take seconds."""
    with dask.config.set({"scheduler": None, "distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(
            ["distributed", "dask.dataframe", "mdnorm.tables.distributed"]
        )
        with (
            LocalCluster(
                n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
            ) as cluster,
            Client(cluster) as client,
        ):
            client.wait_for_workers(3, timeout=60)
            yield client


def test_a_worker_that_is_killed_midway_changes_nothing(tmp_path) -> None:
    rows, count = 20, N // 20
    blocks = [
        da.from_delayed(delayed(slow_block)(index, rows, str(tmp_path)), (rows, D), np.float64)
        for index in range(count)
    ]
    features = da.concatenate(blocks)
    metadata = da.from_array(people()[["age"]].to_numpy(), chunks=(rows, 1))
    killed: list[int] = []

    def kill(pids: dict[str, int], after: int) -> None:
        """Kill the worker that began the latest block, once so many were begun."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            marks = sorted(tmp_path.iterdir(), key=lambda mark: int(mark.name.split("-")[2]))
            if len(marks) >= after:
                pid = int(marks[-1].name.split("-")[1])
                assert pid in pids.values()
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            time.sleep(0.01)

    with cluster_of_three() as client:
        thread = threading.Thread(target=kill, args=(client.run(os.getpid), 8))
        thread.start()
        result, model = residualize_dask(features, metadata)
        out = result.compute(scheduler=client)
        thread.join()
    assert len(killed) == 1
    # Each block is made for the coefficients and for the result, those of the dead worker once more.
    assert len(list(tmp_path.iterdir())) >= 2 * count
    wanted = least_squares(values(people()), people()[["age"]].to_numpy())
    np.testing.assert_allclose(out, wanted, rtol=1e-10)
    assert model.location_scale.coefficients.shape == (1, D)


# --------------------------------------------------------------------------------------------------------
# What cannot be used
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": np.zeros((5, 2))}, TypeError, "features must be an array or DataFrame of Dask"),
        ({"metadata": np.zeros((5, 2))}, TypeError, "metadata must be an array or DataFrame of Dask"),
        ({"metadata": None}, ValueError, "features is an array, which has no columns"),
        ({"features": da.zeros((N, 2, 2))}, ValueError, r"shape \(num_rows, num_columns\)"),
        ({"features": da.zeros((N, 2), dtype=complex)}, TypeError, "real and numeric"),
        ({"metadata": da.zeros((N + 1, 1))}, ValueError, "600 rows and metadata 601"),
        ({"formula": "height"}, ValueError, "no column 'height'"),
        ({"ridge": -1.0}, ValueError, "ridge must be"),
        ({"scale": True}, ValueError, "scale=True needs site"),
        ({"feature_names": ["a"]}, ValueError, "feature_names= has 1 names for 4 columns"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "features": da.from_array(values(people()), chunks=(100, D)),
        "metadata": da.from_array(people()[["age"]].to_numpy(), chunks=(100, 1)),
    }
    with pytest.raises(error, match=message):
        residualize_dask(**{**arguments, **change})


def test_partitions_that_do_not_fit_are_errors() -> None:
    table = whole()
    features = dd.from_pandas(table[NAMES], npartitions=4)
    with pytest.raises(ValueError, match="features has 4 partitions and metadata 3"):
        residualize_dask(features, dd.from_pandas(table[["age"]], npartitions=3), formula="age")
    with pytest.raises(ValueError, match=r"a partition has 150 rows of features and \d+ of metadata"):
        residualize_dask(
            features,
            dd.from_pandas(table[["age"]].iloc[:500], npartitions=4),
            formula="age",
        )
    with pytest.raises(ValueError, match="'age' is both a feature and metadata"):
        residualize_dask(dd.from_pandas(table, npartitions=2), formula="age", feature_names=["age"])
    with pytest.raises(ValueError, match="feature 'site' is not among the numeric"):
        residualize_dask(dd.from_pandas(table, npartitions=2), formula="age", feature_names=["site"])


def test_values_that_cannot_be_used_are_errors() -> None:
    features, metadata = values(people()), people()[["age"]].to_numpy()
    features[333, 1] = np.nan
    good = da.from_array(metadata, chunks=(100, 1))
    with pytest.raises(ValueError, match=r"feature\(s\) '1' .*in row 33"):
        residualize_dask(da.from_array(features, chunks=(100, D)), good)
    model = residualize_dask(da.from_array(values(people()), chunks=(100, D)), good).model
    with pytest.raises(ValueError, match=r"feature\(s\) '1'"):
        residualize_dask(da.from_array(features, chunks=(100, D)), good, apply=model).features.compute()
    nullable = whole().convert_dtypes()
    nullable["count"] = pd.array([1, None] * (N // 2), dtype="Int64")
    with pytest.raises(ValueError, match=r"feature\(s\) 'count' .*in rows 1,"):
        residualize_dask(
            dd.from_pandas(nullable, npartitions=2), formula="age", feature_names=[NAMES[0], "count"]
        )
    metadata = metadata.copy()
    metadata[5] = np.nan
    with pytest.raises(ValueError, match="metadata are missing: 'm0' in row 5"):
        residualize_dask(
            da.from_array(values(people()), chunks=(100, D)), da.from_array(metadata, chunks=(100, 1))
        )
    few = da.from_array(values(people())[:2], chunks=(1, D))
    with pytest.raises(ValueError, match=r"2 row\(s\) for 2 linearly independent"):
        residualize_dask(few, good[:2])
