import json

import pytest

from mdnorm_experiments.results import ResultsError, ResultStore


def test_rows_survive_and_are_found_by_their_settings(tmp_path):
    path = tmp_path / "results.json"
    store = ResultStore(path)
    store.add({"method": "none", "seed": 0, "options": {"window": 2000}}, {"bacc": 0.9})
    store.add({"method": "none", "seed": 1, "options": {"window": 2000}}, {"bacc": 0.8})
    again = ResultStore(path)
    assert again.rows == store.rows
    assert again.find({"method": "none", "seed": 1})["bacc"] == 0.8
    assert again.find({"method": "none", "seed": 2}) is None
    assert again.find({"method": "none", "options": {"window": 1}}) is None
    assert again.find({"unheard": None}) is None


@pytest.mark.parametrize("content", ['[{"method": "none"}, {"meth', '{"rows": []}', "[1, 2]", "", "\udcff"])
def test_a_damaged_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"results\.json.*not touched"):
        ResultStore(path)
    assert path.read_bytes() == before


def test_a_row_that_cannot_be_written_costs_nothing(tmp_path):
    path = tmp_path / "results.json"
    store = ResultStore(path)
    store.add({"seed": 0}, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.add({"seed": 1}, {"bacc": float("nan")})
    assert json.loads(path.read_text()) == [{"seed": 0}]
    assert store.rows == [{"seed": 0}]
    store.clear_claims()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
