import json
import re

import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from chromium import needs_chromium
from mdnorm.auditing import columns
from mdnorm.commands import app

N = 120


def call(*arguments):
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, N)
    site = rng.integers(0, 3, N)
    features = rng.standard_normal((N, 4))
    features[:, 0] += 2 * label
    np.save(tmp_path / "after.npy", features)
    features[:, 1] += 4 * site
    np.save(tmp_path / "before.npy", features)
    rows = ["participant,diagnosis,site,age,predicted"]
    for i in range(N):
        age = "" if i % 10 == 0 else f"{20 + rng.random() * 60:.1f}"
        rows.append(f"sub-{i:03},{label[i]},{'ABC'[site[i]]},{age},{int(features[i, 0] > 1)}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    return tmp_path


def quick(files, *arguments):
    return call(
        files / "before.npy", files / "metadata.csv", "--permutations", 20, "--out", files / "out", *arguments
    )


# Where a test looks at no other than the site.
ONE_COLUMN = [part for name in ("diagnosis", "age", "predicted") for part in ("--ignore", name)]


def test_from_files_to_report(files):
    result = quick(
        files,
        *("--label", "diagnosis", "--after", files / "after.npy", "--prediction", "predicted"),
    )
    assert result.exit_code == 0, result.output
    assert "participant: identifier (120 distinct values in 120 rows" in result.stderr
    assert "site: categorical (" in result.stderr
    assert "age: continuous (" in result.stderr
    assert "site is found in the features before given diagnosis: " in result.stdout
    assert "chance 33 %" in result.stdout
    assert "cannot be decided" in result.stdout
    assert "participant was left out" in result.stdout
    content = json.loads((files / "out" / "report.json").read_text())
    assert {column["name"] for column in content["columns"][:2]} == {"site", "age"}
    assert content["columns"][2]["name"] == "diagnosis"
    assert next(c for c in content["columns"] if c["name"] == "age")["num_missing"] == 12
    assert content["facts"]["features_files"]["before"].endswith("before.npy")
    assert (files / "out" / "report.html").stat().st_size > 10**6
    assert (files / "out" / "figures" / "overview.png").exists()


def test_the_verdicts_are_complete_at_eighty_columns(files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = (files / "metadata.csv").read_text().replace("site", "manufacturer_of_the_scanner", 1)
    (files / "metadata.csv").write_text(table)
    result = quick(files, "--label", "diagnosis", "--after", files / "after.npy")
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in result.stdout
    starts = "".join(line.split("  ")[0] for line in lines)
    assert "manufacturer_of_the_scanner" in starts


def test_the_table_is_read_once(files, monkeypatch):
    read = []
    original = columns.as_column
    monkeypatch.setattr(columns, "as_column", lambda name, *rest: read.append(name) or original(name, *rest))
    assert quick(files, "--ignore", "age").exit_code == 0
    assert read == ["participant", "diagnosis", "site", "predicted"]


def test_json_and_options(files):
    result = quick(
        files,
        "--json",
        "--kind",
        "site=categorical",
        "--ignore",
        "predicted",
        "--ignore",
        "age",
        "--max-rows",
        100,
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [column["name"] for column in content["columns"]] == ["site", "diagnosis"]
    assert content["facts"]["rows_used"] == 100
    assert "100 of 120 rows were sampled" in content["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "disease"], "no metadata column 'disease' for the labels"),
        (["--after", "nowhere.npy"], "nowhere.npy does not exist"),
        (["--kind", "site"], "--kind 'site': give COLUMN="),
        (["--kind", "site=number"], "must be continuous or categorical"),
        (["--ignore", "sight"], "no metadata column 'sight'"),
        (["--prediction", "a", "--prediction", "b"], "--prediction was given 2 times, but there are 1 set"),
        (["--prediction", "predicted"], "need the labels"),
        (["--label", "diagnosis", "--prediction", "site"], "but the labels are only"),
        (["--label", "diagnosis", "--subject", "age"], "12 missing value(s)"),
        (["--key", "hidden"], "no named arrays, so a key ('hidden') says nothing"),
        (["--columns", "roi_*"], "no named columns, so columns ('roi_*') say nothing"),
    ],
)
def test_bad_options_exit_with_2(files, arguments, message):
    result = quick(files, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (files / "out" / "report.html").exists()


def damaged(files, name, content):
    path = files / name
    path.write_bytes(content)
    return path


def test_bad_files_exit_with_2(files):
    good, table = files / "before.npy", files / "metadata.csv"
    half = damaged(files, "half.npy", good.read_bytes()[:900])
    empty = damaged(files, "empty.csv", b"")
    short = damaged(files, "short.csv", b"age\n1\n2\n")
    for arguments, message in [
        ((half, table), "half.npy is truncated"),
        ((good, empty), "empty.csv is empty"),
        ((good, short), "120 rows in features and 2 in metadata"),
        ((files / "none.npy", table), "none.npy does not exist"),
        ((good, good), "tables can be read from .parquet, .csv, .tsv"),
    ]:
        result = call(*arguments, "--out", files / "out")
        assert result.exit_code == 2, message
        assert message in " ".join(result.stderr.split())


def test_columns_that_are_no_features_are_said(files):
    table = files / "metadata.csv"
    result = call(table, table, "--permutations", 20, "--out", files / "out")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"not taken as features: .*\(text\)", " ".join(result.stderr.split()))


def test_outputs_that_cannot_be_written_exit_with_2(files):
    (files / "taken").write_text("a file")
    result = quick(files, *ONE_COLUMN, "--out", files / "taken")
    assert result.exit_code == 2
    assert "cannot write to" in result.stderr
    (files / "out").mkdir()
    with FileLock(files / "out" / ".lock"):
        result = quick(files, *ONE_COLUMN)
    assert result.exit_code == 2
    assert "another process is writing" in " ".join(result.stderr.split())


def test_key_and_columns_are_for_the_files_that_they_fit(files):
    features = np.load(files / "before.npy")
    np.savez(files / "after.npz", hidden=features, other=features)
    result = quick(files, "--after", files / "after.npz", "--key", "hidden", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["facts"]["features"]["after"] == list(features.shape)


def test_several_treatments_with_predictions_of_their_own(files):
    table = (files / "metadata.csv").read_text().splitlines()
    names = table[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in table[1:]]
    (files / "predicted.csv").write_text("said\n" + "\n".join(row["predicted"] for row in rows))
    result = call(
        *("--features", f"raw={files / 'before.npy'}", "--features", f"combat={files / 'after.npy'}"),
        files / "metadata.csv",
        *("--label", "diagnosis", "--predictions", files / "predicted.csv", "--prediction", "said"),
        *("--prediction", "said"),
        *("--ignore", "predicted", "--keep", "age", "--intersect", "site,site", "--permutations", 20),
        *("--out", files / "out", "--json", "--raw", "--project", "my study"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["titles"] == {"raw": "raw", "combat": "combat"}
    assert content["facts"]["project"] == "my study"
    assert content["facts"]["settings"]["standardize"] is False
    by_name = {column["name"]: column for column in content["columns"]}
    assert by_name["age"]["role"] == "keep"
    assert by_name["site × site"]["kind"] == "categorical"
    assert by_name["site"]["representations"]["raw"]["group_gaps"]["num_rows"] == N
    assert by_name["site"]["representations"]["combat"]["group_gaps"]["num_rows"] == N


def test_conditions_decide_the_exit_code(files):
    for condition, code, word in [
        ("site: probe > 0.6", 3, "failed: site: probe in these features is"),
        ("site: probe > 0.98", 4, "whether it is above 0.98 cannot be decided"),
        ("site: dcor2 > 0.99", 0, "passed: site: dcor2"),
        ("site: dcor2 > 0.99; site: share > 0.2", 3, "failed: site: share"),
        ("site: gap > 0.05", 4, "was not measured"),
        ("sight: gap > 0.05", 2, "a condition is about 'sight'"),
        ("site < 3", 2, "is no condition"),
    ]:
        result = quick(files, "--fail-on", condition, *ONE_COLUMN)
        assert result.exit_code == code, (condition, result.output)
        assert word in " ".join(result.stderr.split())


def test_the_page_is_printed_where_there_is_a_browser(files, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    result = quick(files, "--pdf")
    assert result.exit_code == 2
    assert "--pdf needs Chromium or Chrome" in " ".join(result.stderr.split())
    assert not (files / "out" / "report.html").exists()
    broken = files / "chromium"
    broken.write_text("#!/bin/sh\necho no display >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(broken))
    result = quick(files, "--pdf", *ONE_COLUMN)
    assert result.exit_code == 2
    assert "could not print the page: no display" in " ".join(result.stderr.split())
    assert (files / "out" / "report.html").exists()


@needs_chromium
def test_the_printed_page_has_one_side(files):
    result = quick(files, "--pdf", "--ignore", "age")
    assert result.exit_code == 0, result.output
    content = (files / "out" / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "raw"], "give NAME=FILE"),
        (["--features", "raw=a.npy", "--features", "raw=b.npy"], "was given twice"),
        (["--features", "raw=a.npy", "b.npy"], "give METADATA only"),
        ([], "give FEATURES and METADATA, got 1 file(s)"),
    ],
)
def test_which_files_are_what(files, arguments, message):
    result = call(files / "metadata.csv", *arguments, "--out", files / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
