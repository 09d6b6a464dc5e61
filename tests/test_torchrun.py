"""torchrun for real: what a killed process of the example costs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from processes import output_of, torchrun

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed_ddp.py"


def test_the_example_ends_with_the_same_bits_after_a_death(tmp_path):
    options = ["--epochs", 3, "--samples", 301]
    undisturbed = torchrun(EXAMPLE, *options, "--out", tmp_path / "undisturbed")
    # As the example's docstring says it: one restart for the death here, the others for what gloo may do.
    interrupted = torchrun(
        "--max-restarts", 3, EXAMPLE, *options, "--out", tmp_path / "interrupted", "--die-in-epoch", 1
    )
    output_of(undisturbed)
    output = output_of(interrupted)
    assert "exitcode: -9" in output
    assert output.count("epoch 0:") == 1
    assert (tmp_path / "interrupted" / "died").exists()
    folders = [tmp_path / "undisturbed", tmp_path / "interrupted"]
    losses = [json.loads((folder / "history.json").read_text()) for folder in folders]
    assert losses[0] == losses[1]
    assert losses[0][0] > losses[0][-1]
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in folders]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
