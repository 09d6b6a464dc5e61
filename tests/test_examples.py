"""Each example runs, and does what it is there for: the features no longer know the metadata."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
STACKS = ["accelerate_loop", "huggingface_trainer", "lightning_example", "monai_engine", "plain_pytorch"]

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
