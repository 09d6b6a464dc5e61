import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mdnorm.commands import app

N = 200


def call(*arguments):
    return CliRunner().invoke(app, ["residualize", *map(str, arguments)])


def message(result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "age": rng.uniform(20, 80, N).round(1),
            "site": rng.choice(["york", "oslo"], N),
            "sick": rng.integers(0, 2, N),
            "volume": rng.standard_normal(N),
            "voxel_1": rng.standard_normal(N),
        }
    )
    table["volume"] += table["age"] / 10
    table.to_parquet(tmp_path / "table.parquet", row_group_size=50)
    table.to_csv(tmp_path / "table.csv", index=False)
    table[["age", "site", "sick"]].to_csv(tmp_path / "people.csv", index=False)
    np.save(tmp_path / "features.npy", table[["volume", "voxel_1"]].to_numpy())
    return tmp_path


def correlation(path) -> float:
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return abs(np.corrcoef(table["age"], table["volume"])[0, 1])


@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_from_table_to_table(folder, name):
    out = folder / "new" / ("out." + name.split(".")[1])
    assert correlation(folder / name) > 0.5
    result = call(folder / name, "--out", out, "--formula", "age + site", "--label", "sick")
    assert result.exit_code == 0, result.output
    assert f"{N} rows, 2 feature(s) without age, site[T.york], sick protected" in result.stdout
    assert f"fitted to {N} rows" in result.stdout
    assert correlation(out) < 0.1


def test_json_names_what_was_done(folder):
    result = call(
        *(folder / "table.parquet", "--out", folder / "out.parquet", "--formula", "age"),
        *("--site", "site", "--scale", "--empirical-bayes", "--features", "volume, voxel_*"),
        *("--fit-rows", "0.5", "--seed", 1, "--json"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["feature_names"] == ["volume", "voxel_1"]
    assert content["sites"] == ["oslo", "york"]
    assert content["num_rows"] == N
    assert 60 < content["num_rows_fitted"] < 140


def test_coefficients_are_saved_and_applied(folder):
    saved = folder / "fit" / "age.safetensors"
    first = call(
        *(folder / "features.npy", "--out", folder / "a.npy", "--metadata", folder / "people.csv"),
        *("--formula", "bs(age, df=4) + C(site)", "--label", "sick", "--save-model", saved),
    )
    assert first.exit_code == 0, first.output
    half = np.load(folder / "features.npy")[:80]
    np.save(folder / "half.npy", half)
    pd.read_csv(folder / "people.csv").iloc[:80].to_csv(folder / "half.csv", index=False)
    second = call(
        *(folder / "half.npy", "--out", folder / "b.npy", "--metadata", folder / "half.csv"),
        *("--apply", saved),
    )
    assert second.exit_code == 0, second.output
    assert "not fitted here" in second.stdout
    np.testing.assert_allclose(np.load(folder / "b.npy"), np.load(folder / "a.npy")[:80], rtol=1e-12)


def test_a_confounded_design_is_a_warning(folder):
    table = pd.read_csv(folder / "table.csv")
    table["scanner"] = np.where(table["sick"] == 1, "A", "B")
    table.to_csv(folder / "confounded.csv", index=False)
    result = call(
        folder / "confounded.csv", "--out", folder / "o.csv", "--formula", "scanner", "--label", "sick"
    )
    assert result.exit_code == 0
    assert "warning: The design is confounded" in message(result)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "nothing to remove: give formula="),
        (["--formula", "height"], "has no column 'height'"),
        (["--formula", "age +"], "formula"),
        (["--formula", "__import__('os')"], "there is no function __import__()"),
        (["--formula", "age", "--missing", "drop"], "missing must be"),
        (["--formula", "age", "--scale"], "scale=True needs site="),
        (["--formula", "age", "--features", "cortex"], "no column 'cortex'"),
        (["--formula", "age", "--fit-rows", "2"], "fit_rows must be a share"),
        (["--formula", "age", "--metadata", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--apply", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--formula", "age", "--save-model", "c.json"], "kept in a .safetensors file"),
    ],
)
def test_bad_options_exit_with_2(folder, arguments, text):
    result = call(folder / "table.parquet", "--out", folder / "out.parquet", *arguments)
    assert result.exit_code == 2
    assert text in message(result)
    assert "Traceback" not in result.output
    assert not (folder / "out.parquet").exists()


def test_bad_files_exit_with_2(folder):
    content = (folder / "table.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(content[: len(content) // 2])
    (folder / "text.csv").write_text("age,volume\n1,2\n3,4,5\n")
    pd.read_csv(folder / "people.csv").iloc[:-1].to_csv(folder / "short.csv", index=False)
    (folder / "taken").write_text("a file")
    for table, out, more, text in [
        ("half.parquet", "o.parquet", (), "half.parquet cannot be read as Parquet"),
        ("text.csv", "o.csv", (), "text.csv cannot be read as CSV"),
        ("table.parquet", "o.csv", (), "name it o.parquet"),
        ("table.parquet", "table.parquet", (), "is an input"),
        ("features.npy", "o.npy", ("--metadata", folder / "short.csv"), "200 rows and"),
        ("features.npy", "o.npy", ("--metadata", folder / "features.npy"), "tables can be read from"),
        ("table.parquet", "taken/o.parquet", (), "cannot write to"),
    ]:
        result = call(folder / table, "--out", folder / out, "--formula", "age", *more)
        assert result.exit_code == 2, text
        assert text in message(result), message(result)
        assert not (folder / "o.parquet").exists()
        assert not (folder / "o.npy").exists()
    assert pq.ParquetFile(folder / "table.parquet").metadata.num_rows == N


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=["ctrl-c", "term"]
)
def test_interrupted_it_leaves_no_file(folder, number, status):
    n = 60_000
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"age": rng.uniform(20, 80, n)})
    table = table.assign(**{f"f{index}": rng.standard_normal(n) for index in range(8)})
    table.to_parquet(folder / "large.parquet")
    (folder / "out").mkdir()
    # Small blocks, so that there is time while the result is written.
    command = [sys.executable, "-m", "mdnorm", "residualize", str(folder / "large.parquet")]
    command += ["--out", str(folder / "out" / "o.parquet"), "--formula", "age", "--batch-rows", "50"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any((folder / "out").iterdir()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "it was too fast to be interrupted"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert ("interrupted" in stderr) == (number == signal.SIGINT)
    assert os.listdir(folder / "out") == []  # noqa: PTH208
