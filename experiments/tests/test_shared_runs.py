"""Runs shared between processes: the store, the claims, and what a killed one costs under torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdnorm_experiments.commands import app
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.runner import RunFailedError, Runner
from mdnorm_experiments.settings import plan, train
from mdnorm_experiments.synthetic import SETTING
from processes import output_of, torchrun

needs_processes = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


@needs_processes
def test_an_experiment_goes_on_after_a_worker_is_killed(tmp_path):
    arguments = ["--methods", "none", "--batch-sizes", 16, "--seeds", 4, "--epochs", 1]
    small = ["--group-size", 100]
    process = torchrun(
        "--max-restarts", 2, "-m", "mdnorm_experiments", "synthetic", *arguments, *small, "--out", tmp_path
    )
    results = tmp_path / "results.json"
    deadline = time.monotonic() + 90
    while not results.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    stored = json.loads(results.read_text())
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output = output_of(process)
    assert "exitcode: -9" in output
    rows = json.loads(results.read_text())
    assert rows[: len(stored)] == stored
    runs = plan(
        SETTING, ["none"], 4, batch_sizes=[16], epochs=1, size=100, features_dir=tmp_path / "features"
    )
    assert len(stored) < len(rows) == len(runs) == 4
    store = ResultStore(results)
    assert all(store.find(run.settings()) is not None for run in runs)
    finished = re.search(r"(\d) of 4 trainings are already finished", output)
    assert finished is not None
    assert int(finished[1]) >= len(stored)
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / ".claims").exists()
    # And a row is what one process alone measures.
    again = train(runs[-1], lambda: None)
    found = store.find(runs[-1].settings())
    assert found is not None
    assert found["bacc"] == again["bacc"]


def test_jobs_and_torchrun_are_one_too_many(tmp_path, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    arguments = ["synthetic", "--quick", "--jobs", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "say --nproc-per-node 2 instead" in " ".join(result.stderr.split())


class Task:
    epochs = 1

    def __init__(self, seed: int, fails: bool = False) -> None:
        self.seed, self.fails = seed, fails

    def settings(self):
        return {"method": "test", "seed": self.seed}


def square(task, epoch_done):
    if task.fails:
        raise ValueError("diverged")
    return {"value": task.seed**2}


class TestSharedStore:
    def test_rows_of_others_are_kept_and_seen(self, tmp_path):
        first, second = (ResultStore(tmp_path / "results.json") for _ in range(2))
        first.add({"seed": 0}, {})
        second.add({"seed": 1}, {})
        assert second.rows == [{"seed": 0}, {"seed": 1}]
        assert first.find({"seed": 1}) is None
        first.refresh()
        assert first.find({"seed": 1}) == {"seed": 1}
        first.clear_claims()
        assert [file.name for file in tmp_path.iterdir()] == ["results.json"]

    def test_a_run_that_two_have_trained_has_one_row(self, tmp_path):
        first, second = (ResultStore(tmp_path / "results.json") for _ in range(2))
        assert first.add({"seed": 0}, {"value": 1}) == {"seed": 0, "value": 1}
        assert second.add({"seed": 0}, {"value": 2}) == {"seed": 0, "value": 1}
        assert second.rows == ResultStore(tmp_path / "results.json").rows == first.rows

    def test_a_claim_is_held_once_and_given_back(self, tmp_path):
        first, second = (ResultStore(tmp_path / "results.json") for _ in range(2))
        with (
            first.claim({"seed": 0}) as mine,
            second.claim({"seed": 0}) as theirs,
            second.claim({"seed": 1}) as another,
        ):
            assert (mine, theirs, another) == (True, False, True)
        with second.claim({"seed": 0}) as theirs:
            assert theirs

    def test_what_another_finished_meanwhile_is_not_trained_again(self, tmp_path):
        store, other = (ResultStore(tmp_path / "results.json") for _ in range(2))
        trained = []

        def training(task, epoch_done):
            trained.append(task.seed)
            if task.seed == 0:
                other.add(Task(1).settings(), {"value": "of the other"})
            return square(task, epoch_done)

        rows = Runner(store, training).run([Task(0), Task(1), Task(2)])
        assert trained == [0, 2]
        assert [row["value"] for row in rows] == [0, "of the other", 4]

    def test_a_failure_ends_after_the_others_are_done(self, tmp_path):
        store = ResultStore(tmp_path / "results.json")
        with pytest.raises(RunFailedError, match="diverged"):
            Runner(store, square).run([Task(0, fails=True), Task(1)])
        assert [row["seed"] for row in store.rows] == [1]

    def test_the_run_of_a_process_that_died_is_taken_over(self, tmp_path):
        store = ResultStore(tmp_path / "results.json")
        script = f"""
        import pathlib, time
        from mdnorm_experiments.results import ResultStore
        store = ResultStore(pathlib.Path({str(tmp_path / "results.json")!r}))
        with store.claim({Task(0).settings()!r}) as claimed:
            print(claimed, flush=True)
            time.sleep(60)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process, process.stdout:
            assert process.stdout.readline() == "True\n"
            with store.claim(Task(0).settings()) as claimed:
                assert not claimed
            process.kill()
            process.wait()
        assert [row["value"] for row in Runner(store, square).run([Task(0)])] == [0]
