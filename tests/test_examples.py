"""Each example runs, and does what it is there for: the features no longer know the metadata."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
STACKS = ["accelerate_loop", "lightning_example", "monai_engine", "plain_pytorch"]

# What other packages say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


def test_from_files_to_service(capsys, monkeypatch, tmp_path):
    """On files in the layout of BIDS that are there already; nothing is left beside them."""
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(FOLDER / "nifti_to_service.py"))
    names["make_files"](tmp_path / "study")
    # A participant without a volume is passed over.
    next((tmp_path / "study" / "sub-048").rglob("*.nii.gz")).unlink()
    files = sorted(tmp_path.rglob("*"))
    results = names["main"](tmp_path / "study")
    assert sorted(tmp_path.rglob("*")) == files
    assert 0 < results["probability"] < 1
    assert results["features"].shape == (47, 16)
    assert list(results["design"].label_levels.values()) == [{"CN": 0, "AD": 1}]
    assert {column.name for column in results["report"].columns} >= {"age", "site"}
    printed = capsys.readouterr().out
    for part in ("CN = 0, AD = 1", "class_layers.flatten.metadata_norm", "epoch 1:", "probability of AD"):
        assert part in printed


@pytest.mark.parametrize(("name", "rows", "width"), [("text", 300, 32), ("images", 400, 32)])
def test_from_a_table_with_gaps_to_service_with_hugging_face(
    name, rows, width, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    results = runpy.run_path(str(FOLDER / f"huggingface_{name}.py"))["main"]()
    assert list(tmp_path.iterdir()) == []
    assert 0 < results["probability"] < 1
    assert results["features"].shape == (rows, width)
    columns = {column.name: column.representations["before"] for column in results["report"].columns}
    # Without the layer dcor² with the site is above 0.1.
    for metadata in ("age", "site"):
        assert columns[metadata].dependence_within.value < 0.03
    assert columns["dx"].dependence.value > 0.2
    printed = capsys.readouterr().out
    for part in (
        "healthy = 0, ill = 1",
        "metadata_norm",
        "of unknown age, from Bern: probability",
        "within_sites",
    ):
        assert part in printed


@pytest.mark.parametrize("name", STACKS)
def test_the_dependence_is_gone(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    results = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()
    assert results["before"] > 0.05
    assert results["after"] < 0.03
    printed = capsys.readouterr().out
    for when in ("before", "after"):
        assert f"{when}: {results[when]:.3f}" in printed
    assert "metadata_norm" in printed
    assert list(tmp_path.iterdir()) == []
