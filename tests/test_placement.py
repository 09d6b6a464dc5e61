"""Where to put the layer: the page shows the stored rows, and the benchmark runs."""

import json
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
