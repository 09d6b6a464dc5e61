"""A design in a checkpoint: raw metadata of new rows give the same logits in a fresh model."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn

from mdnorm.design import Design
from mdnorm.integration.design import AttachedDesign, attach_design, design_of

NETWORK = """
import sys, torch
from torch import nn
import mdnorm
class Network(nn.Module):
    def __init__(self, num_metadata, num_labels):
        super().__init__()
        self.encoder = nn.Linear(5, 8)
        self.norm = mdnorm.MetadataNorm(8, num_metadata, num_labels)
        self.head = nn.Linear(8, 1)
    def forward(self, images, metadata, labels=None):
        return self.head(self.norm(self.encoder(images), metadata, labels).relu())
"""
exec(NETWORK)
Network: Any = globals()["Network"]


def _table(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": rng.uniform(20, 80, n),
            "site": rng.choice(["a", "b", "c"], n),
            "diagnosis": rng.choice(["healthy", "ill"], n),
        }
    )


def _trained() -> Any:
    table = _table(200)
    design = Design("bs(age, df=4) + site", labels="diagnosis", missing="mean").fit(table)
    model = Network(design.num_metadata, design.num_labels)
    attach_design(model, design)
    metadata, labels = design.transform(table)
    images = torch.randn(200, 5)
    for rows in torch.arange(200).split(20):
        model(images[rows], metadata[rows], labels[rows])
    return model.eval()


def _logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    new = _table(10, 1).drop(columns="diagnosis")
    new.loc[3, "age"] = np.nan
    metadata, labels = design_of(model).transform(new)
    assert labels is None
    return model(images, metadata)  # type: ignore[no-any-return]


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
@pytest.mark.parametrize("fresh_design", ["empty", "another"])
def test_through_a_file_into_a_fresh_model(tmp_path: Path, file_format: str, fresh_design: str) -> None:
    model, images = _trained(), torch.randn(10, 5)
    expected = _logits(model, images)
    fresh = Network(6, 1).eval()
    attach_design(fresh, None if fresh_design == "empty" else Design(["x"]).fit({"x": [1.0, 2.0]}))
    if file_format == "torch":
        torch.save(model.state_dict(), tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", weights_only=True)
    else:
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    fresh.load_state_dict(state)
    assert torch.equal(_logits(fresh, images), expected)
    # And the buffer is the model's own, not the file's.
    state["metadata_design.json"].zero_()
    assert torch.equal(_logits(fresh, images), expected)


def test_in_a_fresh_process(tmp_path: Path) -> None:
    model, images = _trained(), torch.randn(1, 5)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(images, tmp_path / "images.pt")
    row = {"age": 33.5, "site": "b"}
    code = NETWORK + (
        "import safetensors.torch\n"
        "from mdnorm.integration.design import attach_design, design_of\n"
        "model = Network(6, 1).eval()\n"
        "attach_design(model)\n"
        f"safetensors.torch.load_model(model, {str(tmp_path / 'model.safetensors')!r})\n"
        f"images = torch.load({str(tmp_path / 'images.pt')!r}, weights_only=True)\n"
        f"print(model(images, design_of(model).transform({row!r}).metadata).item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = model(images, design_of(model).transform(row).metadata).item()
    assert float(result.stdout) == pytest.approx(expected, rel=1e-6)


def test_casts_and_copies_leave_the_bytes_alone() -> None:
    model = _trained()
    text = design_of(model).to_json()
    for other in (
        copy.deepcopy(model),
        copy.deepcopy(model).half(),
        copy.deepcopy(model).double(),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).to("cpu", torch.float64),
        nn.DataParallel(copy.deepcopy(model)),
        torch.optim.swa_utils.AveragedModel(model, use_buffers=True),
    ):
        assert design_of(other).to_json() == text
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    assert design_of(averaged).to_json() == text
    assert list(AttachedDesign(design_of(model)).parameters()) == []


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = _trained().cuda()
    assert model.metadata_design.json.is_cuda
    assert design_of(model).num_metadata == 6
    fresh = Network(6, 1).cuda()
    attach_design(fresh)
    fresh.load_state_dict(_trained().state_dict())
    assert fresh.metadata_design.json.device.type == "cuda"


def test_loading_by_assignment_and_onto_the_meta_device() -> None:
    model, images = _trained(), torch.randn(10, 5)
    expected = _logits(model, images)
    with torch.device("meta"):
        fresh = Network(6, 1).eval()
        attach_design(fresh)
    with pytest.raises(RuntimeError, match="has no design yet"):
        design_of(fresh)
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(_logits(fresh, images), expected)


def test_sequential_models_still_run() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = torch.randn(2, 3)
    expected = model(x)
    attach_design(model, Design(["x"]).fit({"x": [1.0, 2.0]}))
    assert torch.equal(model(x), expected)


def test_a_second_design_replaces_the_first() -> None:
    model = _trained()
    attach_design(model, Design(["x"]).fit({"x": [1.0, 2.0]}))
    assert design_of(model).metadata_names == ("x",)
    wrapped = nn.ModuleDict({"inner": model})
    attach_design(wrapped, Design(["y"]).fit({"y": [1.0, 2.0]}))
    assert design_of(model).metadata_names == ("y",)
    assert not hasattr(wrapped, "metadata_design")


def test_errors() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="the model has no design: attach_design"):
        design_of(model)
    with pytest.raises(RuntimeError, match="not fitted"):
        attach_design(model, Design(["x"]))
    attach_design(model)
    with pytest.raises(RuntimeError, match="has no design yet"):
        design_of(model)
    with pytest.raises(RuntimeError, match=r"Missing key.*metadata_design\.json"):
        model.load_state_dict(nn.Linear(2, 2).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*metadata_design\.json"):
        nn.Linear(2, 2).load_state_dict(model.state_dict())
    taken = nn.Linear(2, 2)
    taken.metadata_design = nn.ReLU()
    with pytest.raises(ValueError, match="something else of the name 'metadata_design'"):
        attach_design(taken)
    two = nn.ModuleList([_trained(), _trained()])
    with pytest.raises(ValueError, match="has 2 designs"):
        design_of(two)


@pytest.mark.parametrize("damage", ["zeros", "truncated", "not ascii", "floats"])
def test_damaged_bytes_are_an_error(damage: str) -> None:
    state = _trained().state_dict()
    text = state["metadata_design.json"]
    state["metadata_design.json"] = {
        "zeros": torch.zeros_like(text),
        "truncated": text[: len(text) // 2],
        "not ascii": text | 128,
        "floats": text.float(),
    }[damage]
    fresh = Network(6, 1)
    attach_design(fresh)
    if damage == "floats":
        with pytest.raises(RuntimeError, match="size mismatch"):
            fresh.load_state_dict(state)
        return
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match=r"not a saved design|damaged"):
        design_of(fresh)
