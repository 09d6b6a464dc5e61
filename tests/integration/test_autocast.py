"""Mixed precision: autocast in both half precisions, and the loss scale of GradScaler.

That the state of a layer is not lowered is tested in tests/test_layer.py.
"""

import copy

import pytest
import torch
from feature_models import ESTIMATORS, loss_of, make_data, make_model, state_of
from torch import nn

import mdnorm
from mdnorm.estimators import LeastSquares


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def layers(model):
    return [module for module in model.modules() if isinstance(module, mdnorm.MetadataNorm)]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_step_from_the_same_state_is_that_of_float32_up_to_rounding(dtype, estimator, scale):
    """The network is smooth: a ReLU that changes sides would be an error of its own size."""
    model = make_model(estimator, scale=scale)
    for seed in range(3):
        loss_of(model, *make_data(32, seed)).backward()
    model.zero_grad()
    twin = copy.deepcopy(model)
    batch = make_data(32, seed=9)
    expected = loss_of(model, *batch)
    expected.backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype):
        loss = loss_of(twin, *batch)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    tolerance = 16 * torch.finfo(dtype).eps
    assert abs(loss.item() - expected.item()) < tolerance * max(expected.item(), 1)
    if estimator == "running":
        # The running adjoint is still that of unscaled losses, which the next test is about.
        return
    gradient, exact = (
        torch.cat([parameter.grad.flatten() for parameter in each.parameters()]) for each in (twin, model)
    )
    assert (gradient - exact).norm() < tolerance * exact.norm()


def train_scaled(model, scaler, num_steps, overflow=(), follow=True):
    """Train with a loss scale; at the steps in `overflow` the loss is beyond float32."""
    optimizer, before = optimizer_of(model), []
    for step in range(num_steps):
        loss = loss_of(model, *make_data(16, step))
        before.append(state_of(model))
        optimizer.zero_grad()
        factor = float("inf") if step in overflow else 1.0
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        old = scaler.get_scale()
        scaler.update()
        if follow:
            for layer in layers(model):
                if isinstance(layer.estimator, LeastSquares) and layer.estimator.adjoint_source == "window":
                    layer.estimator.adjoint.mul_(scaler.get_scale() / old)
    return before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_skipped_step_leaves_weights_and_backward_state(estimator):
    """Non-finite gradients enter neither the parameters (GradScaler) nor the running adjoint (the layer)."""
    model = make_model(estimator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    states = train_scaled(model, scaler, 3, overflow=(2,), follow=False)
    assert scaler.get_scale() == 2.0**3
    after = state_of(model)
    for name, value in states[-1].items():
        # After the forward pass of the step that overflowed, nothing changed any more.
        assert torch.equal(after[name], value), name
    train_scaled(model, scaler, 3)
    assert all(torch.isfinite(value).all() for value in state_of(model).values())


@pytest.mark.parametrize("estimator", ["batch", "dataset", "recursive", "running"])
def test_the_loss_scale_does_not_matter_to_the_training(estimator):
    """Powers of two are exact, so the weights are bit-identical: growing, skipping and shrinking included.

    "running" gets there when its adjoint is multiplied with the scale, as docs/compatibility.md says.
    """
    states = {}
    for enabled in (True, False):
        model = make_model(estimator)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3, enabled=enabled)
        train_scaled(model, scaler, 8, overflow=(4,) if enabled else ())
        if enabled:
            assert scaler.get_scale() == 2.0**9
            states[enabled] = state_of(model)
            continue
        # Without a scaler the step that was skipped has to be skipped by hand.
        model = make_model(estimator)
        optimizer = optimizer_of(model)
        for step in range(8):
            loss = loss_of(model, *make_data(16, step))
            if step == 4:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states[enabled] = state_of(model)
    for name, value in states[True].items():
        if name.endswith("adjoint"):
            value = value / 2.0**9
        assert torch.equal(value, states[False][name]), name


def test_without_following_the_scale_the_adjoint_catches_up_within_the_window():
    model, exact = make_model("running", window=32), make_model("running", window=32)
    for step in range(12):
        factor = 1.0 if step < 4 else 2.0
        for each, scale in ((model, factor), (exact, 2.0)):
            (scale * loss_of(each, *make_data(16, step))).backward()
        differences = [
            float((a.estimator.adjoint - b.estimator.adjoint).abs().max())
            for a, b in zip(layers(model), layers(exact), strict=True)
        ]
        if step == 3:
            first = differences
    # A batch of 16 halves what a window of 32 remembers (of which the first four batches fill 30); the last
    # layer hears of nothing else.
    assert differences[1] == pytest.approx(2.0**-8 * 30 / 32 * first[1], rel=1e-3)
    assert differences[0] < 2.0**-3 * first[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_under_autocast_learns_and_stays_finite(estimator, dtype):
    model = make_model(estimator)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    optimizer, losses = optimizer_of(model), []
    for step in range(15):
        images, metadata, labels = make_data(32, step % 3)
        with torch.autocast("cpu", dtype), mdnorm.metadata(model, metadata, labels):
            logits = model(images)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.isfinite(value).all() for value in state_of(model).values())
