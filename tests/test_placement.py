"""Where to put the layer: the page shows the stored rows, and the benchmark runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark_modules import load

pytest.importorskip("mdnorm_experiments")

ROOT = Path(__file__).parent.parent
placement = load("placement")


def test_the_page_has_the_table_of_the_stored_rows():
    rows = json.loads((ROOT / "docs/results/placement.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/where-to-put-it.md").read_text(encoding="utf-8")
    assert "\n".join(placement.summary(rows)) in page
    assert {row["place"] for row in rows} == {"none", "oracle", *placement.NETWORKS["vit"].places}


@pytest.mark.parametrize("place", ["oracle", "last features"])
def test_a_small_training(place):
    row = placement.train(replace(placement.NETWORKS["vit"], size=120, epochs=1), place, 100)
    has_layer = place not in ("none", "oracle")
    assert (row["bacc_shuffled"] is not None) == has_layer
    assert 0.3 < row["bacc"] < 0.9


def test_an_interruption_leaves_the_rows_and_nothing_else(tmp_path, monkeypatch):
    def train(architecture, place, seed):
        if place == "oracle":
            raise KeyboardInterrupt
        return {"bacc": 0.5, "seconds_per_epoch": 1.0}

    monkeypatch.setattr(placement, "train", train)
    arguments = ["--networks", "vit", "--seeds", "100", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["placement.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        placement.main()
    assert [row["place"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["none"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
