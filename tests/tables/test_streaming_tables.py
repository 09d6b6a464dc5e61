import datetime
import sys
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from mdnorm.design import Design
from mdnorm.design.table_file import TableFileError
from mdnorm.sklearn import MetadataResidualizer
from mdnorm.tables import MetadataModel
from mdnorm.tables.design_sample import DesignSample
from mdnorm.tables.streaming import residualize_file

N, D = 700, 5
NAMES = [f"f{index}" for index in range(D)]


def people(n=N, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "subject": [f"sub-{index:04}" for index in range(n)],
            "age": rng.uniform(20, 80, n).round(2),
            "site": rng.choice(["york", "oslo", "rome"], n),
            "sick": rng.integers(0, 2, n),
        }
    )


def values(table: pd.DataFrame, d=D, seed=1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(table), d)) * rng.uniform(0.5, 3, d) + 100
    features += np.outer(table["age"] - 50, rng.standard_normal(d)) / 10
    features += np.outer(table["site"] == "rome", rng.standard_normal(d))
    return features + np.outer(table["sick"], rng.standard_normal(d))


def expected(features, table, *, numeric=("age",), categories=("site",), labels=("sick",), ridge=0.0):
    """Least squares by numpy, and the metadata's part subtracted about its mean."""
    blocks = [table[list(numeric)].to_numpy(float)]
    blocks += [(table[[c]].to_numpy() == sorted(table[c].unique())[1:]).astype(float) for c in categories]
    metadata = np.column_stack(blocks)
    protected = table[list(labels)].to_numpy(float)
    design = np.column_stack([metadata, protected, np.ones(len(table))])
    beta = np.linalg.lstsq(design, features.astype(float), rcond=None)[0][: metadata.shape[1]]
    return features - (metadata - metadata.mean(0)) @ beta


@pytest.fixture
def folder(tmp_path):
    """The same table in every form: all in one, and features beside metadata."""
    table = people()
    features = values(table)
    whole = table.assign(**dict(zip(NAMES, features.astype(np.float32).T, strict=True)))
    order = ["subject", "f0", "age", "f1", "f2", "site", "f3", "f4", "sick"]
    arrow = pa.Table.from_pandas(whole[order], preserve_index=False)
    pq.write_table(arrow, tmp_path / "table.parquet", row_group_size=300, compression="zstd")
    whole[order].to_csv(tmp_path / "table.csv", index=False)
    table.to_csv(tmp_path / "people.csv", index=False)
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), tmp_path / "people.parquet")
    np.save(tmp_path / "features.npy", features.astype(np.float32))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(features))
    return tmp_path


def as_matrix(path, names=NAMES) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    table = (
        pq.read_table(path)
        if path.suffix == ".parquet"
        else pa.csv.read_csv(path, pa.csv.ReadOptions(block_size=2**24))
    )
    return np.column_stack([table.column(name).to_numpy() for name in names])


SOURCES = ["table.parquet", "table.csv", "features.npy", "fortran.npy"]


def options(source: str, folder, metadata="people.csv", **others: Any) -> dict[str, Any]:
    separate = {} if source.startswith("table") else {"metadata": folder / metadata}
    return {"formula": "age + C(site)", "labels": ["sick"], **separate, **others}


# --------------------------------------------------------------------------------------------------------
# The result
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [7, 37, 300, 10_000])
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_and_batch_size_gives_least_squares(source: str, batch_rows: int, folder) -> None:
    out = folder / ("out." + source.split(".")[1])
    metadata = "people.parquet" if batch_rows == 37 else "people.csv"
    summary = residualize_file(
        folder / source, out, **options(source, folder, metadata, batch_rows=batch_rows)
    )
    table = people()
    result = as_matrix(out)
    assert result.dtype == (np.float32 if source in ("table.parquet", "features.npy") else np.float64)
    np.testing.assert_allclose(result, expected(as_matrix(folder / source), table), rtol=1e-6)
    assert (summary.num_rows, summary.num_rows_fitted, summary.num_features) == (N, N, D)
    assert summary.metadata_names == ("age", "C(site)[T.rome]", "C(site)[T.york]")
    assert summary.label_names == ("sick",)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("empirical_bayes", [False, True])
def test_sites_as_the_estimator_in_memory(scale: bool, empirical_bayes: bool, folder) -> None:
    out = folder / "out.parquet"
    residualize_file(
        folder / "table.parquet",
        out,
        formula="age",
        labels=["sick"],
        site="site",
        scale=scale,
        empirical_bayes=empirical_bayes,
        batch_rows=61,
    )
    table, features = people(), as_matrix(folder / "table.parquet").astype(float)
    estimator = MetadataResidualizer(site="site", scale=scale, empirical_bayes=empirical_bayes)
    estimator.fit(features, metadata=table[["age", "site"]], labels=table[["sick"]])
    wanted = estimator.transform(features, metadata=table[["age", "site"]], labels=table[["sick"]])
    np.testing.assert_allclose(as_matrix(out), wanted, rtol=1e-6)


def test_a_site_alone_and_labels_without_formula(folder) -> None:
    for labels in ([], ["sick"]):
        residualize_file(
            folder / "fortran.npy",
            folder / "out.npy",
            site="site",
            labels=labels,
            metadata=folder / "people.csv",
        )
        table, features = people(), np.load(folder / "fortran.npy")
        estimator = MetadataResidualizer(site="site").fit(
            features,
            metadata=table[["site"]],
            labels=table[labels] if labels else None,
        )
        wanted = estimator.transform(features, metadata=table[["site"]])
        np.testing.assert_allclose(np.load(folder / "out.npy"), wanted, rtol=1e-10)


def test_ridge_as_the_estimator_in_memory(folder) -> None:
    residualize_file(
        folder / "fortran.npy",
        folder / "out.npy",
        formula=["age", "sick"],
        ridge=0.3,
        metadata=folder / "people.csv",
    )
    table, features = people(), np.load(folder / "fortran.npy")
    metadata = table[["age", "sick"]]
    wanted = MetadataResidualizer(ridge=0.3).fit_transform(features, metadata=metadata)
    np.testing.assert_allclose(np.load(folder / "out.npy"), wanted, rtol=1e-10)


def test_splines_and_missing_values_as_the_design_in_memory(tmp_path) -> None:
    table = people()
    table.loc[::7, "age"] = np.nan
    features = values(people())
    np.save(tmp_path / "features.npy", features)
    table.to_csv(tmp_path / "people.csv", index=False)
    for missing in ("mean", "indicator"):
        residualize_file(
            tmp_path / "features.npy",
            tmp_path / "out.npy",
            formula="bs(age, df=4)",
            missing=missing,
            metadata=tmp_path / "people.csv",
            batch_rows=50,
        )
        metadata = Design("bs(age, df=4)", missing=missing).fit_transform(table).metadata.double().numpy()
        design = np.column_stack([metadata, np.ones(N)])
        beta = np.linalg.lstsq(design, features, rcond=None)[0][:-1]
        wanted = features - (metadata - metadata.mean(0)) @ beta
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, rtol=1e-6)


@given(
    n=st.integers(12, 60),
    d=st.integers(1, 4),
    k=st.integers(1, 3),
    batch=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    order=st.sampled_from("CF"),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_array_any_batch(n: int, d: int, k: int, batch: int, seed: int, order: Any, tmp_path) -> None:
    rng = np.random.default_rng(seed)
    metadata = rng.standard_normal((n, k)) * 10.0 ** rng.integers(-3, 4, k) + rng.integers(-5, 5, k)
    features = rng.standard_normal((n, d)) + metadata @ rng.standard_normal((k, d))
    np.save(tmp_path / "f.npy", np.asarray(features, order=order))
    names = [f"x{index}" for index in range(k)]
    pd.DataFrame(metadata, columns=names).to_parquet(tmp_path / "m.parquet")
    residualize_file(
        tmp_path / "f.npy",
        tmp_path / "o.npy",
        formula=names,
        metadata=tmp_path / "m.parquet",
        batch_rows=batch,
    )
    design = np.column_stack([metadata, np.ones(n)])
    beta = np.linalg.lstsq(design / np.abs(design).max(0), features, rcond=None)[0]
    beta = (beta / np.abs(design).max(0)[:, None])[:-1]
    wanted = features - (metadata - metadata.mean(0)) @ beta
    scale = np.abs(features).max()
    np.testing.assert_allclose(np.load(tmp_path / "o.npy") / scale, wanted / scale, atol=1e-8)


# --------------------------------------------------------------------------------------------------------
# What stays
# --------------------------------------------------------------------------------------------------------


def test_parquet_keeps_schema_codecs_row_groups_and_other_columns(folder) -> None:
    source, out = folder / "table.parquet", folder / "out.parquet"
    residualize_file(source, out, **options("table.parquet", folder, batch_rows=128))
    before, after = pq.ParquetFile(source), pq.ParquetFile(out)
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    groups = [after.metadata.row_group(index).num_rows for index in range(after.num_row_groups)]
    assert groups == [300, 300, 100]
    assert {after.metadata.row_group(0).column(i).compression for i in range(9)} == {"ZSTD"}
    others = ["subject", "age", "site", "sick"]
    assert after.read(others).equals(before.read(others))


def test_row_groups_too_large_for_memory_are_split(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mdnorm.tables.files._MAX_ROW_GROUP_BYTES", 4000)
    table = people(400).assign(f0=np.arange(400.0))
    pq.write_table(pa.Table.from_pandas(table), tmp_path / "t.parquet")
    residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age", features=["f0"], batch_rows=23
    )
    metadata = pq.ParquetFile(tmp_path / "o.parquet").metadata
    assert metadata.num_rows == 400
    assert metadata.num_row_groups > 3


def test_integers_become_floats_and_nothing_else_changes_type(tmp_path) -> None:
    table = people(50).assign(count=np.arange(50), half=np.linspace(0, 1, 50).astype(np.float16))
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), tmp_path / "t.parquet")
    residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age", features=["count", "half"]
    )
    schema = pq.read_schema(tmp_path / "o.parquet")
    assert schema.field("count").type == pa.float64()
    assert schema.field("half").type == pa.float32()
    assert schema.field("sick").type == pa.int64()


def test_csv_keeps_the_text_of_other_columns(tmp_path) -> None:
    rows = [f"00{i},{20 + i},NA,{i * i}," + '"a, ""b"""' for i in range(8)]
    (tmp_path / "t.csv").write_text("id;age;gap;f;note\n".replace(";", ",") + "\n".join(rows) + "\n")
    residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age", features=["f"])
    before = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    after = pd.read_csv(tmp_path / "o.csv", dtype=str, keep_default_na=False)
    others = ["id", "age", "gap", "note"]
    pd.testing.assert_frame_equal(after[others], before[others])
    age, f = before["age"].astype(float), before["f"].astype(float)
    wanted = f - np.polyfit(age, f, 1)[0] * (age - age.mean())
    np.testing.assert_allclose(after["f"].astype(float), wanted, rtol=1e-10)


def test_csv_types_are_those_of_all_rows(tmp_path) -> None:
    # The first block has only whole numbers and no text; a reader that guesses from it fails on the rest.
    n = 200_000
    lines = [f"{i % 50},{'7' if i < n - 1 else 'x'},{i % 9 + (0.5 if i == n - 1 else 0)}" for i in range(n)]
    (tmp_path / "t.csv").write_text("age,code,f\n" + "\n".join(lines) + "\n")
    summary = residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="code", features=["f"])
    assert summary.metadata_names == ("code[T.x]",)
    assert summary.num_rows == n


def test_arrays_of_more_dimensions_and_integers(tmp_path) -> None:
    table = people(30)
    table.to_parquet(tmp_path / "people.parquet")
    images = np.random.default_rng(0).integers(0, 255, (30, 4, 3)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    residualize_file(
        tmp_path / "images.npy", tmp_path / "o.npy", formula="age", metadata=tmp_path / "people.parquet"
    )
    out = np.load(tmp_path / "o.npy")
    assert out.shape == (30, 4, 3)
    wanted = expected(images.reshape(30, 12).astype(float), table, categories=(), labels=())
    np.testing.assert_allclose(out.reshape(30, 12), wanted, atol=1e-10)


# --------------------------------------------------------------------------------------------------------
# Rows to fit to, saved coefficients
# --------------------------------------------------------------------------------------------------------


def test_fit_rows_of_a_column_leak_nothing_from_the_others(folder) -> None:
    table = people()
    train = np.arange(N) % 3 > 0
    table.assign(train=train).to_csv(folder / "people.csv", index=False)
    features = np.load(folder / "fortran.npy")
    changed = np.where(train[:, None], features, 1e3 - 5 * features)
    np.save(folder / "changed.npy", changed)
    out, model = folder / "out.npy", folder / "model.safetensors"
    summary = residualize_file(
        folder / "changed.npy",
        out,
        **options("changed.npy", folder, fit_rows="train", save_model=model, batch_rows=64),
    )
    assert summary.num_rows_fitted == train.sum()
    residualize_file(
        folder / "fortran.npy",
        folder / "other.npy",
        **options("fortran.npy", folder, fit_rows="train", batch_rows=700),
    )
    np.testing.assert_allclose(np.load(out)[train], np.load(folder / "other.npy")[train], rtol=1e-12)
    part = expected(features[train], table[train])
    np.testing.assert_allclose(np.load(out)[train], part, rtol=1e-10)
    residualize_file(
        folder / "fortran.npy",
        folder / "applied.npy",
        metadata=folder / "people.csv",
        apply=MetadataModel.load(model),
    )
    np.testing.assert_allclose(np.load(folder / "applied.npy"), np.load(folder / "other.npy"), rtol=1e-12)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("site", [None, "site"])
def test_weights_as_the_estimator_in_memory(source: str, site: str | None, folder) -> None:
    table, features = people(), as_matrix(folder / source).astype(float)
    weights = np.random.default_rng(2).choice([0.0, 0.5, 1.0, 7.0], N)
    metadata = table[["age", "site"]]
    others = {} if source.startswith("table") else {"metadata": folder / "weighted.parquet"}
    table.assign(weight=weights).to_parquet(folder / "weighted.parquet")
    out = folder / f"out.{source.split('.')[1]}"
    if source.startswith("table"):
        whole = table.assign(weight=weights, **dict(zip(NAMES, features.T.astype(np.float32), strict=True)))
        whole.to_csv(folder / "table.csv", index=False)
        whole.to_parquet(folder / "table.parquet", index=False)
    summary = residualize_file(
        folder / source,
        out,
        formula="age" if site else "age + C(site)",
        labels=["sick"],
        site=site,
        scale=site is not None,
        weights="weight",
        batch_rows=61,
        **others,
    )
    assert summary.num_rows_fitted == np.count_nonzero(weights)
    estimator = MetadataResidualizer(site=site, scale=site is not None)
    arguments = {"metadata": metadata, "labels": table[["sick"]]}
    wanted = estimator.fit(features, sample_weight=weights, **arguments).transform(features, **arguments)
    np.testing.assert_allclose(as_matrix(out), wanted, rtol=1e-6)


def test_weights_of_0_are_rows_that_are_not_fitted_to(folder) -> None:
    table = people()
    train = np.arange(N) % 3 > 0
    table.loc[~train, "site"] = "rome"
    table.assign(train=train, weight=train * 2.5).to_csv(folder / "people.csv", index=False)
    results = []
    for how in ({"fit_rows": "train"}, {"weights": "weight"}, {"fit_rows": "train", "weights": "weight"}):
        summary = residualize_file(
            folder / "fortran.npy", folder / "out.npy", **options("fortran.npy", folder, batch_rows=64, **how)
        )
        assert summary.num_rows_fitted == train.sum()
        results.append(np.load(folder / "out.npy"))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-12)


def test_errors_about_rows_say_how_they_are_counted(folder) -> None:
    features = np.load(folder / "fortran.npy")
    features[3, 0], features[9, 1] = np.nan, np.inf
    np.save(folder / "odd.npy", features)
    given = options("odd.npy", folder, missing_features="skip")
    with pytest.raises(ValueError, match=f"row 8 .*counted from 0|row 8 .*of {N - 1}") as caught:
        residualize_file(folder / "odd.npy", folder / "out.npy", **given)
    assert f"counted among the {N - 1} of them that are fitted to" in str(caught.value)


def test_a_share_of_rows_is_the_same_whatever_the_batches(folder) -> None:
    results = []
    for batch_rows, seed in ((17, 3), (700, 3), (700, 4)):
        summary = residualize_file(
            folder / "fortran.npy",
            folder / "out.npy",
            **options("fortran.npy", folder, fit_rows=0.5, batch_rows=batch_rows, seed=seed),
        )
        results.append((summary.num_rows_fitted, np.load(folder / "out.npy")))
    assert 0.4 * N < results[0][0] < 0.6 * N
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-12)
    assert np.abs(results[0][1] - results[2][1]).max() > 1e-6


def test_coefficients_of_sites_saved_and_applied_to_new_rows(folder) -> None:
    saved = folder / "combat.safetensors"
    how = {"formula": "age", "labels": ["sick"], "site": "site", "scale": True, "empirical_bayes": True}
    residualize_file(folder / "table.parquet", folder / "out.parquet", save_model=saved, **how)
    new = people(40, seed=9)
    features = values(new, seed=1)
    frame = new.assign(**dict(zip(NAMES, features.T, strict=True)))
    frame.to_csv(folder / "new.csv", index=False)
    model = MetadataModel.load(saved)
    summary = residualize_file(folder / "new.csv", folder / "new_out.csv", apply=model)
    assert summary.num_rows_fitted == 0
    assert summary.sites == ("oslo", "rome", "york")
    wanted = model.remove(features, new)
    np.testing.assert_allclose(as_matrix(folder / "new_out.csv"), wanted, rtol=1e-12)
    estimator = MetadataResidualizer(site="site", scale=True, empirical_bayes=True)
    table, old = people(), as_matrix(folder / "table.parquet").astype(float)
    estimator.fit(old, metadata=table[["age", "site"]], labels=table[["sick"]])
    reference = estimator.transform(features, metadata=new[["age", "site"]], labels=new[["sick"]])
    np.testing.assert_allclose(wanted, reference, rtol=1e-8)


def test_apply_needs_no_labels_where_nothing_is_scaled(folder) -> None:
    saved = folder / "model.safetensors"
    residualize_file(
        folder / "table.parquet",
        folder / "out.parquet",
        **options("table.parquet", folder, save_model=saved),
    )
    table = pq.read_table(folder / "table.parquet").drop_columns(["sick"])
    pq.write_table(table, folder / "unlabelled.parquet")
    residualize_file(folder / "unlabelled.parquet", folder / "other.parquet", apply=MetadataModel.load(saved))
    np.testing.assert_allclose(
        as_matrix(folder / "other.parquet"), as_matrix(folder / "out.parquet"), rtol=1e-6
    )


def test_damaged_and_foreign_coefficients_are_errors(folder) -> None:
    saved = folder / "model.safetensors"
    residualize_file(
        folder / "fortran.npy", folder / "out.npy", **options("fortran.npy", folder, save_model=saved)
    )
    content = saved.read_bytes()
    for name, data, message in [
        ("half", content[: len(content) // 2], "damaged"),
        ("text", b"hello", "damaged"),
        ("swapped", content.replace(b"mdnorm.MetadataModel", b"mdnorm.MetadataMaker"), "no coefficients"),
    ]:
        path = folder / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(TableFileError, match=message):
            MetadataModel.load(path)
    with pytest.raises(TableFileError, match="does not exist"):
        MetadataModel.load(folder / "none.safetensors")
    model = MetadataModel.load(saved)
    np.save(folder / "wide.npy", np.zeros((N, D + 1)))
    with pytest.raises(TableFileError, match=r"wide\.npy has the features .*\(6\)"):
        residualize_file(folder / "wide.npy", folder / "o.npy", metadata=folder / "people.csv", apply=model)
    with pytest.raises(ValueError, match="formula, ridge: not with apply="):
        residualize_file(folder / "wide.npy", folder / "o.npy", formula="age", ridge=1.0, apply=model)


# --------------------------------------------------------------------------------------------------------
# Designs of more rows than fit
# --------------------------------------------------------------------------------------------------------


def test_a_sample_for_the_design_has_all_levels_gaps_and_ends_whatever_the_batches() -> None:
    n = 5000
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, n)
    age[[17, 4321]] = 1.0, 99.0
    age[100] = np.nan
    site = np.array(["a", "b"], dtype=object)[rng.integers(0, 2, n)]
    site[4000] = "rare"
    table = pa.table({"age": pa.array(age, from_pandas=True), "site": pa.array(site)})
    samples = []
    for step in (n, 123):
        sample = DesignSample(Design("bs(age, df=4) + site", missing="indicator"), 5, max_rows=200)
        for start in range(0, n, step):
            sample.add(table.slice(start, step))
        samples.append(sample.rows())
    first, second = (rows.to_pandas() for rows in samples)
    assert 200 < len(first) < 220
    assert set(first["site"]) == {"a", "b", "rare"}
    assert (first["age"].min(), first["age"].max()) == (1.0, 99.0)
    assert first["age"].isna().any()
    pd.testing.assert_frame_equal(first.iloc[:200], second.iloc[:200])
    assert len(samples[0]) == len(samples[1])
    assert abs(np.nanmedian(first["age"]) - 50) < 6


def test_more_rows_than_the_design_is_fitted_to(folder, monkeypatch) -> None:
    # The columns of numbers and categories span the same whatever they are centred at.
    monkeypatch.setattr(DesignSample.__init__, "__defaults__", (0, 50))
    residualize_file(
        folder / "fortran.npy", folder / "out.npy", **options("fortran.npy", folder, batch_rows=90)
    )
    wanted = expected(np.load(folder / "fortran.npy"), people())
    np.testing.assert_allclose(np.load(folder / "out.npy"), wanted, rtol=1e-10)


def test_metadata_and_labels_too_large_for_float32(tmp_path) -> None:
    table = people(60)
    table.assign(age=table["age"] * 1e60, sick=table["sick"] * 1e60).to_parquet(tmp_path / "people.parquet")
    features = values(table).astype(np.float32)
    np.save(tmp_path / "f.npy", features)
    for site in (None, "site"):
        residualize_file(
            tmp_path / "f.npy",
            tmp_path / "o.npy",
            formula="age",
            labels=["sick"],
            site=site,
            scale=site is not None,
            metadata=tmp_path / "people.parquet",
        )
        if site is None:
            wanted = expected(features, table, categories=())
        else:
            estimator = MetadataResidualizer(site="site", scale=True)
            both = {"metadata": table[["age", "site"]], "labels": table[["sick"]]}
            wanted = estimator.fit(features.astype(float), **both).transform(features.astype(float), **both)
        np.testing.assert_allclose(np.load(tmp_path / "o.npy"), wanted, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------
# What cannot be used
# --------------------------------------------------------------------------------------------------------


def fails(folder, message: str, source="table.parquet", error: Any = ValueError, **others: Any) -> None:
    before = sorted(folder.iterdir())
    out = folder / ("out." + source.split(".")[-1])
    with pytest.raises(error, match=message):
        residualize_file(folder / source, out, **options(source, folder, **others))
    assert sorted(folder.iterdir()) == before


def test_parameters_are_checked(folder) -> None:
    fails(folder, "nothing to remove", formula=None)
    fails(folder, "ridge must be", ridge=-1.0)
    fails(folder, "scale=True needs site", scale=True)
    fails(folder, "'site' is the site and in formula", site="site")
    fails(folder, "no column 'sight'", formula="sight")
    fails(folder, "no column 'voxel_.'", features=["voxel_*"])
    fails(folder, "'age' is both a feature and metadata", features=["age"])
    fails(folder, "'subject' are not numeric|'subject'.* not numeric", features=["subject"])
    fails(folder, "fit_rows must be a share", fit_rows=1.5)
    fails(folder, "no column 'train'", fit_rows="train")
    fails(folder, r"column 'age' chooses rows", fit_rows="age", formula="C(site)")
    fails(folder, "no column 'weight'", weights="weight")
    fails(folder, "'subject' has the weights: it must have numbers", weights="subject")
    for weight in (-1, np.inf, None):
        table = people().assign(weight=[1.0] * 5 + [weight] + [1.0] * (N - 6))
        table.to_csv(folder / "people.csv", index=False)
        message = r"'weight', the weights, must be finite .* row 5 "
        fails(folder, message, "fortran.npy", weights="weight")
    people().assign(weight=0).to_csv(folder / "people.csv", index=False)
    fails(folder, r"weights='weight'\) chooses no row", "fortran.npy", weights="weight")
    fails(folder, "batch_rows must be at least 1", batch_rows=0)
    fails(folder, "missing must be", missing="drop")
    fails(folder, "has no column names", source="features.npy", features=["f0"])
    fails(folder, "both a feature and metadata|take it out", labels=["age"])
    fails(folder, "key= compares two tables", key="subject")


def test_paths_are_checked(folder) -> None:
    with pytest.raises(TableFileError, match=r"name it out\.parquet"):
        residualize_file(folder / "table.parquet", folder / "out.csv", formula="age")
    with pytest.raises(TableFileError, match="is an input"):
        residualize_file(folder / "table.parquet", folder / "table.parquet", formula="age")
    with pytest.raises(TableFileError, match="does not exist"):
        residualize_file(folder / "table.parquet", folder / "no" / "out.parquet", formula="age")
    with pytest.raises(TableFileError, match="no columns for the metadata"):
        residualize_file(folder / "features.npy", folder / "out.npy", formula="age")
    with pytest.raises(TableFileError, match=r"not from \.xlsx"):
        residualize_file(folder / "table.xlsx", folder / "out.xlsx", formula="age")
    with pytest.raises(TableFileError, match=r"must be|kept in a \.safetensors"):
        residualize_file(
            folder / "table.parquet", folder / "out.parquet", formula="age", save_model=folder / "c.json"
        )


@pytest.mark.parametrize("source", ["table.parquet", "features.npy", "table.csv"])
def test_truncated_files_are_errors_before_anything_is_written(source: str, folder) -> None:
    content = (folder / source).read_bytes()
    (folder / source).write_bytes(content[: len(content) - len(content) // 3 - 7])
    if source == "table.csv":
        # Half a number is a number: only a row that lacks columns shows.
        (folder / source).write_bytes(content[: content.rindex(b"sub-0699") + 12])
    fails(folder, "truncated|cannot be read", source=source)
    (folder / source).write_bytes(b"")
    fails(folder, "empty", source=source)


@pytest.mark.parametrize("metadata", ["people.csv", "people.parquet"])
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("batch_rows", [50, 10_000])
def test_numbers_of_rows_must_be_the_same(change: int, metadata: str, batch_rows: int, folder) -> None:
    table = people(N + change)
    table.to_csv(folder / "people.csv", index=False)
    table.to_parquet(folder / "people.parquet")
    fails(
        folder,
        f"700 rows and .* {N + change}",
        "features.npy",
        TableFileError,
        metadata=metadata,
        batch_rows=batch_rows,
    )
    # Where neither file says how many rows it has, and nothing is fitted first.
    lines = (folder / "table.csv").read_text().splitlines()
    features = pd.read_csv(folder / "table.csv")[NAMES]
    features.to_csv(folder / "only.csv", index=False)
    assert len(lines) == N + 1
    model = folder / "model.safetensors"
    people().to_csv(folder / "good.csv", index=False)
    residualize_file(
        folder / "only.csv",
        folder / "o.csv",
        formula="age",
        metadata=folder / "good.csv",
        save_model=model,
    )
    (folder / "o.csv").unlink()
    with pytest.raises(TableFileError, match=r"people\.csv has (699 rows|more than the 700 rows)"):
        residualize_file(
            folder / "only.csv",
            folder / "o.csv",
            metadata=folder / "people.csv",
            apply=MetadataModel.load(model),
            batch_rows=batch_rows,
        )
    assert not (folder / "o.csv").exists()


def test_a_key_finds_rows_in_another_order(folder) -> None:
    how = options("table.parquet", folder, key="subject", metadata="people.csv", batch_rows=90)
    how["metadata"] = folder / "people.csv"
    features = {"features": NAMES}
    residualize_file(folder / "table.parquet", folder / "out.parquet", **how, **features)
    wanted = expected(as_matrix(folder / "table.parquet"), people())
    np.testing.assert_allclose(as_matrix(folder / "out.parquet"), wanted, rtol=1e-6)
    table = people()
    order = np.arange(N)
    order[[500, 501]] = 501, 500
    table.iloc[order].to_csv(folder / "people.csv", index=False)
    with pytest.raises(TableFileError, match=r"row 500 .* 'sub-0500' in .*table.* 'sub-0501' in .*people"):
        residualize_file(folder / "table.parquet", folder / "out2.parquet", **how, **features)


def test_values_that_cannot_be_used_are_named_with_their_rows(folder) -> None:
    features = np.load(folder / "fortran.npy")
    features[650, 3] = np.nan
    np.save(folder / "bad.npy", features)
    fails(folder, r"bad\.npy, rows 600 to 699.*feature\(s\) '3' .*row 50 ", "bad.npy", batch_rows=100)
    table = people()
    table.loc[333, "age"] = np.nan
    table.to_csv(folder / "people.csv", index=False)
    fails(folder, r"people\.csv.*'age' in row 333 \(1 of 700.*missing=\"mean\"", "fortran.npy")
    table = people()
    table.loc[333, "sick"] = np.nan
    table.to_csv(folder / "people.csv", index=False)
    fails(folder, r"'sick' is missing", "fortran.npy")
    fails(folder, r"label 'sick' is missing", "fortran.npy", missing="mean")
    table = people()
    table.loc[333, "site"] = None
    table.to_csv(folder / "people.csv", index=False)
    fails(
        folder,
        r"'site', the site, is missing in row 33",
        "fortran.npy",
        formula=None,
        site="site",
        batch_rows=100,
    )


@pytest.mark.filterwarnings("ignore:.*rows have a (site|subject) that was not in the fit")
def test_rows_that_the_fit_did_not_see_are_checked_before_the_long_pass(folder) -> None:
    table = people().assign(train=np.arange(N) < 400)
    table.loc[600, "site"] = "bern"
    table.to_csv(folder / "people.csv", index=False)
    stages = []
    fails(
        folder,
        "beside those that are fitted to .*fit_rows='train'.* 'bern'",
        "fortran.npy",
        fit_rows="train",
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert set(stages) == {"metadata"}
    residualize_file(
        folder / "fortran.npy",
        folder / "out.npy",
        **options("fortran.npy", folder, fit_rows="train", unseen="mean"),
    )
    features = np.load(folder / "fortran.npy")
    features[500, 2] = np.inf
    np.save(folder / "bad.npy", features)
    fails(folder, "'2' .* missing, infinite", "bad.npy", fit_rows="train", unseen="mean")


@pytest.mark.parametrize("progress", [True, False])
def test_bars_on_a_terminal(progress, folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    residualize_file(
        folder / "fortran.npy", folder / "out.npy", **options("fortran.npy", folder), progress=progress
    )
    shown = capsys.readouterr().err
    for stage in ("metadata", "fit", "write"):
        assert (f"\r{stage}:" in shown) is progress
    assert progress or shown == ""


@pytest.mark.filterwarnings("ignore:.*rows have a (site|subject) that was not in the fit")
def test_unseen_sites(folder) -> None:
    table = people().assign(train=np.arange(N) < 400)
    table.loc[600, "site"] = "bern"
    table.to_csv(folder / "people.csv", index=False)
    how = {"formula": "age", "site": "site", "fit_rows": "train"}
    fails(folder, r"site\(s\) \['bern'\]", "fortran.npy", **how)
    residualize_file(
        folder / "fortran.npy", folder / "out.npy", **options("fortran.npy", folder, unseen="mean", **how)
    )
    train = table["train"].to_numpy()
    features = np.load(folder / "fortran.npy")
    estimator = MetadataResidualizer(site="site", unseen="mean")
    estimator.fit(
        features[train], metadata=table.loc[train, ["age", "site"]], labels=table.loc[train, ["sick"]]
    )
    wanted = estimator.transform(features, metadata=table[["age", "site"]])
    np.testing.assert_allclose(np.load(folder / "out.npy"), wanted, rtol=1e-10)


def test_too_few_rows_and_constants(tmp_path) -> None:
    table = people(4)
    np.save(tmp_path / "f.npy", np.random.default_rng(0).standard_normal((4, 2)))
    table.assign(sick=1).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(ValueError, match=r"4 row\(s\) for \d linearly independent columns"):
        residualize_file(
            tmp_path / "f.npy",
            tmp_path / "o.npy",
            formula="age + I(age**2) + I(age**3)",
            metadata=tmp_path / "m.csv",
        )
    residualize_file(tmp_path / "f.npy", tmp_path / "o.npy", formula="sick", metadata=tmp_path / "m.csv")
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), np.load(tmp_path / "f.npy"))


def test_confounded_designs_are_reported(tmp_path) -> None:
    table = people(100)
    table["scanner"] = np.where(table["sick"] == 1, "A", "B")
    table["f"] = np.arange(100.0)
    table.to_csv(tmp_path / "t.csv", index=False)
    summary = residualize_file(
        tmp_path / "t.csv", tmp_path / "o.csv", formula="scanner", labels=["sick"], features=["f"]
    )
    assert "confounded" in summary.warnings[0]


# --------------------------------------------------------------------------------------------------------
# Text tables as they come
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["age,f\n", "age,f", "age;f\r\n"])
def test_a_header_without_rows(text: str, tmp_path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableFileError, match=r"t\.csv has a header but no rows"):
        residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")


def test_a_header_longer_than_a_block(tmp_path) -> None:
    table = values(people(6), 2)
    names = [f"{index:0400000}" for index in (1, 2)]
    lines = [",".join(["age", *names, "x" * 400_000])]
    lines += [f"{20 + row},{first!r},{second!r},x" for row, (first, second) in enumerate(table.tolist())]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    summary = residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
    assert summary.feature_names == tuple(names)
    wanted = table - np.outer(np.arange(6) - 2.5, np.polyfit(np.arange(6), table, 1)[0])
    np.testing.assert_allclose(as_matrix(tmp_path / "o.csv", names), wanted, rtol=1e-10)


@pytest.mark.parametrize(
    "content",
    [
        "age,place,f\n1,Zürich,2\n2,Köln,3\n3,Ulm,5\n4,Ulm,5\n".encode("latin-1"),
        "age,größe,f\n1,1,2\n2,2,3\n3,2,5\n4,2,5\n".encode("latin-1"),
        "age,size,f\n1,1,2\n2,2,3\n3,2,5\n4,2,5\n".encode("utf-16"),
        ("age,place,f\n" + "1,Ulm,2\n2,Ulm,3\n" * 400_000 + "3,Köln,5\n").encode("latin-1"),
    ],
    ids=["cells", "header", "utf-16", "later"],
)
def test_text_that_is_not_utf_8(content: bytes, tmp_path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(TableFileError, match=r"t\.csv is not UTF-8.*save it as UTF-8"):
        residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age + place", features="f")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_decimal_commas_are_no_categories(suffix: str, tmp_path) -> None:
    """They would be read as levels of a category, or a feature be left out, without a word."""
    delimiter = ";" if suffix == ".csv" else "\t"
    rows = [("age", "iq", "f"), *((f"{20 + i}", f"{90 + i}", f"{i}.5") for i in range(12))]
    table, out = tmp_path / f"t{suffix}", tmp_path / f"o{suffix}"
    table.write_text("\n".join(delimiter.join(row) for row in rows))
    residualize_file(table, out, formula="age")
    for column, name in enumerate(rows[0]):
        wrong = [list(row) for row in rows]
        for row in wrong[1:11]:
            row[column] = f"-{row[column].split('.')[0]},4"
        wrong[11][column] = "NA"
        table.write_text("\n".join(delimiter.join(row) for row in wrong))
        with pytest.raises(
            TableFileError, match=rf"column '{name}' has numbers with a comma, such as -\d+,4"
        ):
            residualize_file(table, out, formula="age")


def test_quoted_decimal_commas_between_commas(tmp_path) -> None:
    rows = [f'"{20 + i},5","{i},1",{i}.5' for i in range(12)]
    (tmp_path / "t.csv").write_text("\n".join(["age,electrodes,f", *rows]))
    with pytest.raises(TableFileError, match="column 'age' has numbers with a comma, such as 20,5"):
        residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")
    # Of a column that is only passed on, nothing is known.
    (tmp_path / "t.csv").write_text(
        "\n".join(["age,electrodes,f", *(row.replace(',5"', '"') for row in rows)])
    )
    residualize_file(tmp_path / "t.csv", tmp_path / "o.csv", formula="age")


# --------------------------------------------------------------------------------------------------------
# Types of columns
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1.0], [2.0], [3.0], [5.0], [6.0], [7.0]]),
        pa.array([{"a": 1}] * 6),
        pa.array([b"a"] * 6),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "how", [{"formula": "m"}, {"site": "m"}, {"formula": "age", "labels": ["m"]}], ids=str
)
def test_columns_that_are_no_metadata(column: pa.Array, how: dict[str, Any], tmp_path) -> None:
    table = pa.table({"m": column, "age": [1.0, 2, 3, 4, 5, 7], "f": [1.5, 2, 1, 2, 1, 4]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(TableFileError, match=r"t\.parquet: column 'm' has dtype (List|Struct|Binary)"):
        residualize_file(tmp_path / "t.parquet", tmp_path / "o.parquet", **how)
    pq.write_table(table.drop_columns("m"), tmp_path / "t.parquet")
    model = tmp_path / "c.safetensors"
    residualize_file(tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age", save_model=model)
    with pytest.raises(TypeError, match=r"column 'age' has dtype (List|Struct|Binary)"):
        MetadataModel.load(model).remove(np.ones((6, 1)), pa.table({"age": column}))


@pytest.mark.parametrize("kind", ["date", "timestamp", "csv"])
def test_sites_that_are_dates_are_saved(kind: str, tmp_path) -> None:
    days = [datetime.date(2024, 5, 1 + i % 2) for i in range(12)]
    features = np.random.default_rng(0).standard_normal(12) + np.arange(12) % 2
    table = pa.table({"day": days, "f": features})
    if kind == "timestamp":
        table = table.set_column(0, "day", table.column("day").cast(pa.timestamp("us")))
    source, out = (tmp_path / f"{name}.{'csv' if kind == 'csv' else 'parquet'}" for name in "to")
    pa.csv.write_csv(table, source) if kind == "csv" else pq.write_table(table, source)
    saved = str(tmp_path / "c.safetensors")
    summary = residualize_file(source, out, site="day", save_model=saved)
    assert summary.sites == ("2024-05-01", "2024-05-02")
    wanted = as_matrix(out, ["f"])
    np.testing.assert_allclose(wanted[::2].mean(), wanted[1::2].mean(), rtol=1e-12)
    residualize_file(source, out, apply=MetadataModel.load(saved))
    np.testing.assert_allclose(as_matrix(out, ["f"]), wanted, rtol=1e-12)


def test_sites_and_metadata_of_rare_types_are_numbers(tmp_path) -> None:
    """Decimals, and durations, which count in days as dates do."""
    rng = np.random.default_rng(0)
    dose, hours, values = np.arange(40) % 2 + 0.5, rng.integers(1, 99, 40), rng.standard_normal(40)
    columns = {
        "dose": pa.array([Decimal(str(value)) for value in dose]),
        "since": pa.array(hours * 3600, pa.duration("s")),
    }
    pq.write_table(pa.table({**columns, "f": values + dose + hours}), tmp_path / "t.parquet")
    saved = tmp_path / "c.safetensors"
    summary = residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", formula="since", site="dose", save_model=saved
    )
    assert summary.sites == ("0.5", "1.5")
    assert summary.feature_names == ("f",)
    model = MetadataModel.load(saved)
    assert model.design is not None
    days = hours[:, None] / 24
    wanted = reference.residual((values + dose + hours)[:, None], np.column_stack([days, dose > 1]))
    np.testing.assert_allclose(as_matrix(tmp_path / "o.parquet", ["f"]), wanted, atol=1e-9)


def test_a_single_name_is_not_read_letter_by_letter(tmp_path) -> None:
    people(40).assign(volume=np.arange(40.0), g=0.0).to_parquet(tmp_path / "t.parquet")
    summary = residualize_file(
        tmp_path / "t.parquet", tmp_path / "o.parquet", formula="age", labels="sick", features="vol*"
    )
    assert (summary.label_names, summary.feature_names) == (("sick",), ("volume",))


def test_after_an_error_while_writing_nothing_is_left(folder, monkeypatch) -> None:
    def interrupted(stage: str, done: int, total: int | None) -> None:
        if stage == "write" and done > 200:
            raise KeyboardInterrupt

    (folder / "out.parquet").write_bytes(b"what was there before")
    before = sorted(folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        residualize_file(
            folder / "table.parquet",
            folder / "out.parquet",
            **options("table.parquet", folder, batch_rows=50, progress=interrupted),
        )
    assert sorted(folder.iterdir()) == before
    assert (folder / "out.parquet").read_bytes() == b"what was there before"
