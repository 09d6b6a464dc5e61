"""The ablation plans its own methods, and an interruption leaves its rows and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mdnorm_experiments")

# In a process of its own: the benchmark adds to the methods that there are.
SCRIPT = """
import sys
import synthetic_ablation

def run(runner, runs):
    assert {run.method for run in runs} == set(synthetic_ablation.VARIANTS)
    runner.store.add(runs[0].settings(), {"bacc": 0.5})
    sys.exit("interrupted")

synthetic_ablation.Runner.run = run
synthetic_ablation.main()
"""


def test_an_interrupted_ablation(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent.parent / "benchmarks"), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, "interrupted\n")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
