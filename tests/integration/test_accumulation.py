"""Gradient accumulation: each micro-batch is a batch to the layer (docs/compatibility.md)."""

import copy
import math

import pytest
import torch
from feature_models import ESTIMATORS, loss_of, make_data, make_model, state_of

import mdnorm
from mdnorm import MetadataNorm
from reference import design_matrix


def accumulate(model, parts, divide=True):
    """Backward passes of several losses, whose mean is that of the whole batch."""
    total = sum(len(part[0]) for part in parts)
    for part in parts:
        loss = loss_of(model, *part)
        (loss * (len(part[0]) / total if divide else 1.0)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def split(batch, size):
    return list(zip(*(part.split(size) for part in batch), strict=True))


@pytest.mark.parametrize("size", [8, 12])
def test_penalty_the_gradient_is_exactly_that_of_the_whole_batch(size):
    """Its coefficients are constants until the optimiser's step; 12 leaves a partial micro-batch."""
    model = make_model("penalty").double()
    for name, parameter in model.named_parameters():
        if name.endswith("estimator.weight"):
            torch.nn.init.normal_(parameter)
    twin = copy.deepcopy(model)
    batch = tuple(part.double() for part in make_data(32, seed=2))
    expected = accumulate(model, [batch])
    torch.testing.assert_close(accumulate(twin, split(batch, size)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["batch", "dataset", "running", "recursive"])
@pytest.mark.parametrize("size", [8, 12])
def test_a_cumulative_state_is_that_of_the_whole_batch(estimator, size):
    """And both are the least-squares fit, which is found here by a QR decomposition of all samples."""
    torch.manual_seed(0)
    options = {"estimator": estimator, "window": math.inf, "prior": 0.0, "dtype": torch.float64}
    layers = [MetadataNorm(4, 2, 1, **options) for _ in range(2)]
    metadata, labels = (part.double() for part in make_data(32, seed=3)[1:])
    mdnorm.fit_gram(torch.nn.ModuleList(layers), metadata, labels)
    features = torch.randn(32, 4, dtype=torch.float64) + metadata[:, :1]
    batch = (features, metadata, labels)
    layers[0](*batch)
    for part in split(batch, size):
        layers[1](*part)
    design = torch.as_tensor(design_matrix(metadata, labels))
    slopes = torch.linalg.lstsq(design, features).solution[:2]
    for layer in layers:
        torch.testing.assert_close(layer.coefficients, slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dividing_the_loss_or_the_gradient_is_the_same(estimator):
    """The running adjoint takes a constant factor of all losses as it comes."""
    model = make_model(estimator).double()
    twin = copy.deepcopy(model)
    for seed in range(3):
        parts = split(tuple(part.double() for part in make_data(32, seed)), 8)
        model.zero_grad()
        twin.zero_grad()
        expected = accumulate(model, parts, divide=False) / 4
        torch.testing.assert_close(accumulate(twin, parts), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["running", "recursive"])
def test_the_window_counts_samples_whatever_the_micro_batch(estimator):
    """With a long memory the gradient of micro-batches is that of the batch, up to the share of a batch."""
    model = make_model(estimator, window=4000).double()
    for seed in range(60):
        loss_of(model, *(part.double() for part in make_data(64, seed))).backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    batch = tuple(part.double() for part in make_data(32, seed=99))
    # What the adjoint remembers is the scale of the losses before: those of whole batches, not divided.
    expected, actual = accumulate(model, [batch]), accumulate(twin, split(batch, 4), divide=False) / 8
    assert (actual - expected).norm() < 0.02 * expected.norm()
    for name, value in state_of(model).items():
        if name.endswith(".weight") and "estimator" in name:
            torch.testing.assert_close(twin.state_dict()[name], value, rtol=1e-2, atol=0)
