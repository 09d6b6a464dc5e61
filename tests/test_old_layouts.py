"""States saved by earlier layouts load, and evaluate to what they did when they were saved.

Each file has, for some estimators, a state with features, metadata and the output of evaluation. A
safetensors file has no version, as any state that is stored as plain tensors.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdnorm import MetadataNorm

DATA = Path(__file__).parent / "data"
FILES = {
    "state_before_num_columns": ["batch", "dataset"],
    "state_before_averaging": ["running"],
    "state_version_1": ["batch", "dataset", "running", "recursive", "penalty"],
}
CASES = [(file, estimator) for file, estimators in FILES.items() for estimator in estimators]


def saved(file, estimator):
    tensors = load_file(DATA / f"{file}.safetensors")
    prefix = f"{estimator}.state."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return state, [tensors[f"{estimator}.{name}"] for name in ("features", "metadata", "output")]


@pytest.mark.parametrize("sizes", [(3, 2, 1), (None, None, None)])
@pytest.mark.parametrize(("file", "estimator"), CASES)
def test_loads_and_evaluates_to_the_same(file, estimator, sizes):
    state, (features, metadata, output) = saved(file, estimator)
    keys = set(state)
    layer = MetadataNorm(*sizes, estimator=estimator)
    layer.load_state_dict(state)
    assert set(state) == keys
    assert (layer.num_features, layer.num_metadata, layer.num_labels) == ((3,), 2, 1)
    torch.testing.assert_close(layer.eval()(features, metadata), output)
    assert not torch.equal(output, features)


@pytest.mark.parametrize(("file", "estimator"), CASES)
def test_training_goes_on_from_it(file, estimator):
    """The next batch moves the coefficients a little, it does not replace them."""
    state, _ = saved(file, estimator)
    layer = MetadataNorm(3, 2, 1, estimator=estimator)
    layer.load_state_dict(state)
    before = layer.estimator.coefficients.clone()
    metadata, labels = torch.randn(8, 2), torch.rand(8, 1).round()
    features = torch.randn(8, 3) + 5 * metadata[:, :1]
    layer(features.requires_grad_(), metadata, labels).square().mean().backward()
    moved = (layer.estimator.coefficients - before).abs().max()
    assert moved < 2.5
    assert (moved > 0) == (estimator != "penalty")


def test_what_cannot_be_known_is_still_missing():
    state, _ = saved("state_before_num_columns", "batch")
    del state["estimator.gram_mean"]
    with pytest.raises(RuntimeError, match=r"Missing key.*estimator\.num_columns.*estimator\.gram_mean"):
        MetadataNorm(3, 2, 1, estimator="batch").load_state_dict(state)
