import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass

import pytest
import torch

from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.runner import RunFailedError, Runner


@dataclass(frozen=True)
class Task:
    seed: int
    epochs: int = 2
    fails: bool = False
    dies: bool = False

    def settings(self):
        return {"method": "test"} | asdict(self)


def train(task, epoch_done):
    if task.fails:
        raise ValueError("diverged")
    if task.dies:
        os._exit(3)
    for _ in range(task.epochs):
        epoch_done()
    return {"value": task.seed**2, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_in_the_order_of_the_runs_and_nothing_twice(tmp_path, jobs):
    store, epochs, told = ResultStore(tmp_path / "results.json"), [], []
    told_of = (lambda: epochs.append(1), told.append)
    threads = torch.get_num_threads()
    runner = Runner(store, train, jobs)
    rows = runner.run([Task(2), Task(0)], *told_of)
    assert [row["value"] for row in rows] == [4, 0]
    assert {row["threads"] for row in rows} == {1}
    assert torch.get_num_threads() == threads
    assert len(epochs) == 4
    rows = runner.run([Task(0), Task(3), Task(2)], *told_of)
    assert [row["value"] for row in rows] == [0, 9, 4]
    assert len(told) == len(store.rows) == 3
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_that_fail_or_cannot_be_stored_do_not_cost_the_others(tmp_path, jobs):
    store = ResultStore(tmp_path / "results.json")
    with pytest.raises(RunFailedError) as error:
        Runner(store, train, jobs).run([Task(0), Task(1, fails=True), Task(float("nan")), Task(2)])
    failed, not_stored = sorted(str(error.value).splitlines())
    assert failed == "method=test, seed=1: ValueError: diverged"
    assert not_stored.startswith("method=test, seed=nan: ValueError")
    assert "JSON compliant" in not_stored
    assert sorted(row["seed"] for row in store.rows) == [0, 2]


def test_a_worker_that_dies_is_reported(tmp_path):
    store = ResultStore(tmp_path / "results.json")
    with pytest.raises(RunFailedError, match="seed=1: BrokenProcessPool"):
        Runner(store, train, 2).run([Task(1, dies=True)])
    assert Runner(store, train, 2).run([Task(5)])[0]["value"] == 25


def test_jobs_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        Runner(ResultStore(tmp_path / "results.json"), train, 0)


SCRIPT = """
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.runner import Runner

@dataclass(frozen=True)
class Task:
    seed: int
    epochs: int = 1
    def settings(self):
        return asdict(self)

def train(task, epoch_done):
    for _ in range(1 if task.seed < 2 else 600):
        time.sleep(0.1)
        epoch_done()
    return {"value": 1}

if __name__ == "__main__":
    Runner(ResultStore(Path("results.json")), train, 2).run([Task(seed) for seed in range(6)])
"""


@pytest.mark.parametrize(
    ("signal_number", "to_group"),
    # Ctrl-C reaches the whole group; a kill of the parent must not leave workers behind.
    [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGKILL, False)],
)
def test_interruption_keeps_what_is_finished_and_leaves_no_process(tmp_path, signal_number, to_group):
    (tmp_path / "work.py").write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, "work.py"], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    results = tmp_path / "results.json"
    deadline = time.monotonic() + 60
    while not (results.exists() and results.read_text().count("value") == 2):
        assert time.monotonic() < deadline, "no two rows in time"
        time.sleep(0.1)
    (os.killpg if to_group else os.kill)(process.pid, signal_number)
    _, errors = process.communicate(timeout=30)
    assert (b"KeyboardInterrupt" in errors) == (signal_number == signal.SIGINT)
    assert sorted(row["seed"] for row in json.loads(results.read_text())) == [0, 1]
    deadline = time.monotonic() + 20
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.1)


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
