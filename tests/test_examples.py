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
