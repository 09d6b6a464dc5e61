"""The quick form of every setting, as a user runs it: what it writes, and that correction helps."""

from __future__ import annotations

import json
import statistics

import pytest
from typer.testing import CliRunner

from mdnorm_experiments.commands import app
from mdnorm_experiments.settings import SETTINGS, get_setting


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("synthetic", "continual")])
def test_quick(name, tmp_path):
    arguments = [name, "--quick", "--jobs", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    setting = get_setting(name)
    rows = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert tuple(rows) == setting.quick_methods
    for file in ("table.md", "report.html", "audit/report.html", "figures/examples.png"):
        assert (tmp_path / file).stat().st_size > 0
    cheats = rows[setting.quick_methods[0]]
    assert cheats["bacc_confounded"] > cheats["bacc"] + 0.03
    corrected = [row["recalibrated"] for row in rows.values() if "recalibrated" in row]
    assert max(row["bacc"] for row in corrected) > cheats["bacc"]

    def dependence(row):
        return statistics.fmean(value for found in row["dcor2"].values() for value in found.values())

    assert min(map(dependence, corrected)) < dependence(cheats) / 2
