import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from filelock import FileLock
from typer.testing import CliRunner

from mdnorm_experiments import commands
from mdnorm_experiments.commands import app
from mdnorm_experiments.data.faces import make_faces, write_image_folder
from mdnorm_experiments.settings import SETTINGS, data_of, get_setting

RESULTS = Path(__file__).parents[2] / "docs" / "results"

SMALL = [
    "--methods",
    "none,mdn-last-dataset",
    "--batch-sizes",
    "64",
    "--seeds",
    "1",
    "--epochs",
    "1",
    "--group-size",
    "30",
]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def synthetic(out, *arguments):
    return call("synthetic", *SMALL, "--jobs", "1", "--out", out, *arguments)


def test_experiment_from_start_to_report_and_again_without_work(tmp_path):
    out = tmp_path / "new" / "folder"
    handler = signal.getsignal(signal.SIGTERM)
    first = synthetic(out, "--json")
    assert first.exit_code == 0, first.output
    assert signal.getsignal(signal.SIGTERM) is handler
    rows = json.loads(first.stdout)
    assert [row["method"] for row in rows] == ["none", "mdn-last-dataset"]
    assert json.loads((out / "results.json").read_text()) == rows
    assert (out / "report.html").stat().st_size > 50_000
    header, *lines = (out / "metadata.csv").read_text().splitlines()
    assert header.split(",") == [
        "group",
        "effect",
        "confounder",
        "prediction_none_batch64",
        "score_none_batch64",
        "prediction_mdn-last-dataset_batch64",
        "score_mdn-last-dataset_batch64",
    ]
    assert len(lines) == 4000
    right = sum(line.split(",")[0] == line.split(",")[3] for line in lines) / 4000
    assert right == pytest.approx(sum(rows[0]["accuracy"].values()) / 2)
    before = (out / "results.json").stat().st_mtime_ns
    second = synthetic(out)
    assert second.exit_code == 0
    assert "2 of 2 trainings are already finished" in second.stderr
    assert "MDN, last layer" in second.stdout
    assert "83.3 %" in second.stdout
    assert (out / "results.json").stat().st_mtime_ns == before
    more = synthetic(out, "--seeds", "2", "--json")
    assert "2 of 4 trainings are already finished" in more.stderr
    assert [row for row in json.loads(more.stdout) if row["seed"] == 0] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "none,magic"], "unknown method(s) magic"),
        (["--methods", ","], "unknown method(s) (none given)"),
        (["--batch-sizes", "20;200"], "not a list of whole numbers"),
        (["--batch-sizes", "0"], "batch size must be at least 1"),
        (["--learning-rate", "-1"], "learning rate must be a positive number"),
        (["--epochs", "0"], "--epochs"),
        (["--methods", "batchnorm", "--batch-sizes", "1"], "nothing to run"),
        (["--variant", "cubic"], "unknown variant 'cubic': choose from plain, sites, quadratic, variance"),
    ],
)
def test_bad_options_end_with_2(tmp_path, arguments, message):
    result = synthetic(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "results.json").exists()


def test_a_damaged_result_file_ends_with_2_and_stays(tmp_path):
    (tmp_path / "results.json").write_text('[{"meth')
    result = synthetic(tmp_path)
    assert result.exit_code == 2
    assert "not complete JSON" in " ".join(result.stderr.split())
    assert (tmp_path / "results.json").read_text() == '[{"meth'


def test_two_writers_are_kept_apart(tmp_path):
    tmp_path.joinpath("features").mkdir()
    with FileLock(tmp_path / ".lock"):
        result = synthetic(tmp_path)
    assert result.exit_code == 2
    assert "another process is writing" in " ".join(result.stderr.split())


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    result = synthetic(tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "cannot write to" in result.stderr


def test_sigterm_keeps_the_finished_trainings(tmp_path):
    """As a batch system sends it."""
    command = [sys.executable, "-m", "mdnorm_experiments", "synthetic", *SMALL, "--seeds", "500"]
    command += ["--jobs", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    results = tmp_path / "results.json"
    while not results.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; finished trainings are stored" in " ".join(stderr.split())
    assert json.loads(results.read_text())[0]["method"] == "none"
    assert not (tmp_path / ".claims").exists()


def test_a_failed_training_ends_with_1_and_keeps_the_others(tmp_path):
    # The two rows of the first call are claimed and stored; those of the second fail.
    assert synthetic(tmp_path).exit_code == 0
    assert not (tmp_path / ".claims").exists()
    result = synthetic(tmp_path, "--learning-rate", "1e30")
    assert result.exit_code == 1
    assert "some trainings failed" in result.stderr
    assert "NaN or infinite" in " ".join(result.stderr.split())
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert not (tmp_path / ".claims").exists()


def continual(out, *arguments):
    small = ["--methods", "none,mdn-last-dataset", "--batch-size", "16", "--seeds", "1", "--epochs", "1"]
    sizes = ["--group-size", "10", "--test-group-size", "8", "--jobs", "1"]
    return call("continual", *small, *sizes, "--out", out, *arguments)


def test_continual_from_start_to_report_and_again_without_work(tmp_path):
    out = tmp_path / "new" / "folder"
    first = continual(out, "--json", "--seed", "3")
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)
    assert [(row["setting"], row["method"], row["seed"]) for row in rows] == [
        ("continual", "none", 3),
        ("continual", "mdn-last-dataset", 3),
    ]
    assert json.loads((out / "results.json").read_text()) == rows
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "figures",
        "report.html",
        "results.json",
        "table.md",
    ]
    second = continual(out, "--seed", "3")
    assert second.exit_code == 0
    assert "2 of 2 trainings are already finished" in second.stderr
    for text in ("MDN, last layer", "recalibrated", "ACCd", "Above the limit, by stage", "56.25, 50 %"):
        assert text in second.stdout


@pytest.fixture
def planned(monkeypatch):
    """What the commands would do: they stop, with exit code 7, before anything is trained or written."""
    calls = []

    def stop(setting, runs, out, *args, **kwargs):
        calls.append((runs, out))
        raise typer.Exit(7)

    monkeypatch.setattr(commands, "_run_all", stop)
    return calls


@pytest.mark.parametrize(
    ("arguments", "cells"),
    [
        (["--quick"], 6),
        ([], 18),
        (["--quick", "--seeds", "2", "--methods", "none"], 2),
        (["--methods", "all"], 48),
    ],
)
def test_what_continual_plans(tmp_path, planned, arguments, cells):
    assert call("continual", "--out", tmp_path, *arguments).exit_code == 7
    ((runs, _),) = planned
    assert len(runs) == cells


@pytest.mark.parametrize(
    "arguments",
    [[], ["synthetic", "--help"], ["continual", "--help"], ["mri", "--help"]],
)
def test_help(arguments):
    output = call(*arguments).output
    assert "Usage" in output
    assert "settings of the paper" in output or "--methods" in output


def test_variants_have_a_folder_each(planned):
    for variant in ("plain", "quadratic"):
        assert call("synthetic", "--variant", variant).exit_code == 7
    assert [out.as_posix() for _, out in planned] == ["results/synthetic", "results/synthetic-quadratic"]
    assert [{run.variant for run in runs} for runs, _ in planned] == [{"plain"}, {"quadratic"}]
    assert planned[1][0][0].features_file.startswith("results/synthetic-quadratic/features/")


def test_what_cannot_be_trained_is_said(tmp_path, planned):
    arguments = ["--methods", "batchnorm", "--batch-sizes", "1,8", "--out", tmp_path]
    result = call("synthetic", *arguments)
    assert "left out: BatchNorm cannot train with batch size 1." in " ".join(result.stderr.split())
    ((runs, _),) = planned
    assert {run.batch_size for run in runs} == {8}


def test_every_setting_has_a_command_with_its_own_options():
    assert [command.name for command in app.registered_commands] == list(SETTINGS)
    for name in SETTINGS:
        text = call(name, "--help").output
        assert ("--columns" in text) == (name in ("image", "video", "mri"))
        assert ("--variant" in text) == (name == "synthetic")
        assert "--methods" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age", "does not name each column once"),
        ("age=", "does not name each column once"),
        ("age=A,age=B", "does not name each column once"),
        ("shoes=A", "columns may name subject, age, sex, site, label, got shoes"),
        ("age=A", "no column for the age (A); it has participant_id, age, sex, site, dx"),
    ],
)
def test_names_of_columns_that_cannot_be(tmp_path, text, message):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\tsite\tdx\n")
    result = call("mri", "--data", tmp_path, "--columns", text, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_names_of_columns_reach_the_loader_and_the_rows(tmp_path, planned):
    faces = make_faces(120, seed=0, correlation=0.2)
    table = write_image_folder(tmp_path, faces)
    table.write_text(table.read_text().replace("filename,gender,shade", "photo,who,skin", 1))
    columns = "file=photo, label=who,shade=skin"
    assert call("image", "--data", tmp_path, "--columns", columns, "--methods", "none").exit_code == 7
    ((runs, _),) = planned
    assert runs[0].settings()["columns"] == {"file": "photo", "label": "who", "shade": "skin"}
    assert len(data_of(runs[0]).train) > 60


@pytest.mark.parametrize("name", ["synthetic", "continual", "digits", "mri"])
def test_printed_tables_are_complete_at_eighty_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for table in get_setting(name).tables(rows):
        commands._print_table(table)
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        for heading in table.headings:
            assert all(word in printed for word in heading.split()), heading
        # No number is cut or broken.
        for line in table.lines:
            for cell in line[1:]:
                assert cell in printed, cell
