"""Two tables whose rows belong together by position: what shows that they do not; and paths of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mdnorm.design.table_file import TableFileError
from mdnorm.tables import residualize_file


@pytest.fixture
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    random = np.random.default_rng(7)
    people = pd.DataFrame({"id": np.arange(1000, 1120), "age": random.uniform(20, 80, 120)})
    people["sex"] = random.choice(["f", "m"], 120)
    scans = pd.DataFrame({"id": people["id"], "sex": people["sex"]})
    for name in ("x", "y"):
        scans[name] = random.standard_normal(120) + 0.1 * people["age"]
    return scans, people


def written(table: pd.DataFrame, path: Path) -> Path:
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def run(
    scans: pd.DataFrame, people: pd.DataFrame, folder: Path, kinds: tuple[str, str], **options: Any
) -> Any:
    source = written(scans, folder / f"scans.{kinds[0]}")
    metadata = written(people, folder / f"people.{kinds[1]}")
    out = folder / f"out.{kinds[0]}"
    options = {"formula": "age", "features": ["x", "y"], "batch_rows": 50, **options}
    residualize_file(source, out, metadata=metadata, progress=False, **options)
    return (pd.read_parquet if kinds[0] == "parquet" else pd.read_csv)(out)


KINDS = [("csv", "csv"), ("parquet", "csv"), ("csv", "parquet"), ("parquet", "parquet")]


@pytest.mark.parametrize("kinds", KINDS)
def test_rows_in_another_order_are_seen_in_a_common_column(
    tables: tuple[pd.DataFrame, pd.DataFrame], kinds: tuple[str, str], tmp_path: Path
) -> None:
    scans, people = tables
    design = np.column_stack([np.ones(120), people["age"]])
    features = scans[["x", "y"]].to_numpy()
    slope = np.linalg.lstsq(design, features, rcond=None)[0][1]
    wanted = features - np.outer(people["age"] - people["age"].mean(), slope)
    np.testing.assert_allclose(run(scans, people, tmp_path, kinds)[["x", "y"]], wanted)
    (tmp_path / f"out.{kinds[0]}").unlink()
    for rows in (np.r_[1, 0, 2:120], np.r_[0:118, 119, 118]):
        other = people.iloc[rows].drop(columns="sex")
        with pytest.raises(
            TableFileError, match=r"row (0|118) .* has 'id' (1000|1118) in .*1 rows more.*--key"
        ):
            run(scans, other, tmp_path, kinds)
        assert not (tmp_path / f"out.{kinds[0]}").exists()
    # A key says which rows are the same, whatever else differs.
    other = people.assign(sex="f")
    with pytest.raises(TableFileError, match=r"'sex' 'm' in .* and 'f' in "):
        run(scans, other, tmp_path, kinds)
    np.testing.assert_allclose(run(scans, other, tmp_path, kinds, key="id")[["x", "y"]], wanted)
    with pytest.raises(TableFileError, match=r"row 0 .*'id' 1000 in .* into the same order\.$"):
        run(scans, people.iloc[::-1], tmp_path, kinds, key="id")


@pytest.mark.parametrize("kinds", KINDS)
def test_the_same_values_in_another_type_are_the_same(
    tables: tuple[pd.DataFrame, pd.DataFrame], kinds: tuple[str, str], tmp_path: Path
) -> None:
    scans, people = tables
    scans = scans.assign(age=people["age"].astype(np.float32), note=["3"] * 119 + ["?"], gap=1.0)
    people = people.assign(id=people["id"].astype(float), note=["3"] * 119 + ["?"], gap=1)
    scans.loc[3, "gap"] = np.nan
    people["gap"] = people["gap"].astype("Int64").where(people.index != 3)
    run(scans, people, tmp_path, kinds)
    run(scans, people, tmp_path, kinds, features=["x", "y", "age"])
    people.loc[5, "age"] += 1
    with pytest.raises(TableFileError, match=r"row 5 .* has 'age' "):
        run(scans, people, tmp_path, kinds, features=["x", "y", "age"])


def test_what_is_no_table_is_said_before_the_name_of_the_result(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(30.0), "age": np.arange(30.0) ** 2})
    packed, table = tmp_path / "x.csv.gz", tmp_path / "x.csv"
    for path in (packed, table):
        frame.to_csv(path, index=False)
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    for source, out, message in (
        (packed, tmp_path / "out.csv", r"x\.csv\.gz: tables can be read from .*, not from \.gz"),
        (tmp_path, tmp_path / "out.csv", "is not a file but a folder"),
        (tmp_path / "no.csv", tmp_path / "out.parquet", r"no\.csv does not exist"),
        (table, folder, r"folder\.csv is a folder: give the name of a file to write"),
    ):
        with pytest.raises(TableFileError, match=message):
            residualize_file(source, out, formula="age", progress=False)
    (tmp_path / "fit.safetensors").mkdir()
    with pytest.raises(TableFileError, match=r"fit\.safetensors is a folder"):
        residualize_file(table, tmp_path / "out.csv", formula="age", save_model=tmp_path / "fit.safetensors")
