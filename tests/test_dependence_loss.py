"""The penalty on dependent outputs: its value, gradient, memory, multipliers, effect on training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import dcor
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loss_processes import run, train
from mdnorm import DependenceLoss
from mdnorm.metrics import cka, conditional_distance_correlation_sqr, distance_correlation_sqr, hsic

DEPENDENT = {"at_most": 1e-9, "warm_up": 1}


def data(n: int = 60, classes: int = 2, columns: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that depend on the first metadata column, metadata, labels."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % classes
    metadata = torch.randn(n, columns, dtype=torch.float64, generator=generator) + labels[:, None]
    outputs = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    outputs[:, 0] += 2 * metadata[:, 0]
    return outputs, metadata, labels


def evaluated(multipliers: list[float], *given: Any, **options: Any) -> tuple[DependenceLoss, Tensor]:
    """The loss with these multipliers in evaluation, and its value of a batch."""
    loss = DependenceLoss(**options)
    loss(*given)
    loss.multipliers = torch.tensor(multipliers, dtype=torch.float64)
    return loss, loss.eval()(*given)


# -- value and gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_value_is_the_mean_distance_correlation_within_classes(classes: int) -> None:
    outputs, metadata, labels = data(70, classes)
    loss, value = evaluated([2, 0.5], outputs, metadata, labels, unit=0)
    logits = outputs - outputs.mean(1, keepdim=True)
    ours = [conditional_distance_correlation_sqr(logits, column, labels).mean for column in metadata.T]
    theirs = [
        sum(
            float((labels == c).sum())
            * dcor.u_distance_correlation_sqr(logits[labels == c].numpy(), column[labels == c].numpy())
            for c in range(classes)
        )
        / len(labels)
        for column in metadata.T
    ]
    assert loss.dependence.tolist() == pytest.approx(ours, abs=1e-12)
    assert ours == pytest.approx(theirs, abs=1e-10)
    assert float(value) == pytest.approx(2 * ours[0] + 0.5 * ours[1], abs=1e-12)


def test_a_variable_of_several_columns() -> None:
    outputs, metadata, _ = data(40, columns=3)
    _, value = evaluated([1.0], outputs, metadata, None, unit=0, softmax=False, variables={"site": [0, 2]})
    expected = distance_correlation_sqr(outputs, metadata[:, [0, 2]])
    assert float(value) == pytest.approx(float(expected), abs=1e-12)


def test_hsic_is_the_kernel_alignment() -> None:
    outputs, metadata, labels = data(60, 1, 1)
    loss, value = evaluated([1.0], outputs, metadata, labels, measure="hsic", unit=2.0, softmax=False)
    expected = cka(outputs, metadata, kernel="rbf", bandwidth=(2.0, None))
    assert float(loss.dependence) == pytest.approx(float(expected), abs=1e-12)
    # The value has a constant for the scale of the outputs, which hardly vary in units of the bandwidth.
    criterion = hsic(outputs, metadata, bandwidth=(2.0, None)) / hsic(metadata, metadata).sqrt()
    assert float(value) == pytest.approx(float(criterion) / 0.5, abs=1e-12)


def test_what_a_continuous_label_explains_is_not_punished() -> None:
    _outputs, metadata, _ = data(300, 1, 1)
    label = metadata[:, 0] + 0.1 * torch.randn(300, dtype=torch.float64)
    of_label = torch.stack([label**2, -label], 1)
    loss, _ = evaluated([1.0], of_label, metadata, label, labels="continuous")
    assert abs(float(loss.dependence)) < 0.02
    loss, _ = evaluated([1.0], metadata * torch.tensor([1.0, -1.0]), metadata, label, labels="continuous")
    assert float(loss.dependence) > 0.9


@pytest.mark.parametrize("labels", ["classes", "continuous"])
@pytest.mark.parametrize(("measure", "unit"), [("dcor2", 100.0), ("hsic", 20.0)], ids=["dcor2", "hsic"])
def test_gradient(measure: Any, unit: float, labels: Any) -> None:
    outputs, metadata, classes = data(24)
    # With so large a unit the scale is a constant of which nothing depends on the outputs.
    loss, _ = evaluated([1.0, 2.0], outputs, metadata, classes, measure=measure, unit=unit, labels=labels)
    assert torch.autograd.gradcheck(
        lambda values: loss(values, metadata, classes), outputs.requires_grad_(), atol=1e-8, rtol=1e-5
    )


def test_gradient_of_the_distance_correlation_but_for_its_scale() -> None:
    outputs, metadata, labels = data(40, 1, 1)
    outputs.requires_grad_()
    _, value = evaluated([1.0], outputs, metadata, labels, unit=0, softmax=False)
    (gradient,) = torch.autograd.grad(value, outputs)
    step = 1e-6 * torch.randn_like(outputs)

    def covariance(x: Tensor) -> float:
        own = dcor.u_distance_covariance_sqr(x.numpy(), x.numpy())
        return dcor.u_distance_correlation_sqr(x.numpy(), metadata.numpy()) * math.sqrt(own)

    x = outputs.detach()
    change = (covariance(x + step) - covariance(x - step)) / 2
    scale = math.sqrt(dcor.u_distance_covariance_sqr(x.numpy(), x.numpy()))
    assert float((gradient * step).sum()) == pytest.approx(change / scale, rel=1e-5)


def test_logits_cannot_hide_behind_what_a_softmax_does_not_see() -> None:
    _, metadata, labels = data(100, 2, 1)
    hidden = torch.cat([metadata, -metadata], 1) + 100 * torch.randn(100, 1, dtype=torch.float64)
    seen, _ = evaluated([1.0], hidden, metadata, labels)
    unseen, _ = evaluated([1.0], hidden, metadata, labels, softmax=False)
    assert float(seen.dependence) > 0.9
    assert float(unseen.dependence) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    outputs, metadata, labels = data(60)
    outputs = outputs.to(dtype).requires_grad_()
    _, value = evaluated([1.0, 0.0], outputs, metadata.float(), labels.to(torch.uint8))
    _, expected = evaluated([1.0, 0.0], outputs.detach().double(), metadata.float().double(), labels)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert outputs.grad is not None
    assert outputs.grad.dtype == dtype
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_autocast_and_half_precision_of_the_module() -> None:
    network, (inputs, metadata, labels) = nn.Linear(3, 2), data(60)
    loss = DependenceLoss(**DEPENDENT).half()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(network(inputs.float()), metadata, labels)
        value.backward()
    assert loss.memory.dtype == torch.float64
    assert float(network.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_a_compiled_step() -> None:
    outputs, metadata, labels = data(40)
    loss, expected = evaluated([1.0, 1.0], outputs, metadata, labels)
    compiled = torch.compile(lambda x: loss(2 * x, metadata, labels), backend="eager")
    assert float(compiled(outputs / 2)) == pytest.approx(float(expected))


# -- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_small_batches_have_the_gradient_of_the_window_on_average(batch_size: int) -> None:
    torch.manual_seed(0)
    _, metadata, labels = data(200)
    inputs = torch.cat([metadata, torch.randn(200, 2, dtype=torch.float64)], 1)
    weight = torch.randn(4, 2, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"window": 200, "warm_up": 10**9, "unit": 1.0}
    whole = DependenceLoss(**options)
    whole(inputs @ weight, metadata, labels)
    whole.multipliers = torch.ones(2, dtype=torch.float64)
    (expected,) = torch.autograd.grad(whole.eval()(inputs @ weight, metadata, labels), weight)
    loss = DependenceLoss(**options)
    loss(inputs @ weight, metadata, labels)
    total = torch.zeros_like(weight)
    # The memory is full, and the next batches are those that leave it: each window has every sample once.
    batches = torch.arange(200).flip(0).split(batch_size)
    for rows in batches:
        loss.multipliers = torch.ones(2, dtype=torch.float64)
        rows = rows.flip(0)
        (gradient,) = torch.autograd.grad(loss(inputs[rows] @ weight, metadata[rows], labels[rows]), weight)
        total += gradient / len(batches)
    assert total.flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-6, abs=1e-9)


def test_the_memory_is_that_of_the_last_samples() -> None:
    outputs, metadata, labels = data(60)
    loss = DependenceLoss(window=20, softmax=False)
    for rows in torch.arange(60).split(5):
        loss(outputs[rows], metadata[rows], labels[rows])
    last = {tuple(row) for row in torch.cat([outputs, metadata, labels[:, None]], 1)[-20:].tolist()}
    assert {tuple(row) for row in loss.memory.tolist()} == last
    assert not loss.memory.requires_grad


def test_a_class_with_too_few_samples_contributes_nothing() -> None:
    outputs, metadata, labels = data(40)
    labels[:3] = 7
    without = torch.arange(3, 40)
    _, value = evaluated([1.0, 1.0], outputs, metadata, labels)
    _, expected = evaluated([1.0, 1.0], outputs[without], metadata[without], labels[without])
    assert float(value) == pytest.approx(float(expected))


def test_evaluation_changes_nothing() -> None:
    outputs, metadata, labels = data(40)
    loss = DependenceLoss(**DEPENDENT)
    loss(outputs, metadata, labels)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(outputs[:20], metadata[:20], labels[:20])
    for name in ("memory", "multipliers"):
        assert torch.equal(before[name], loss.state_dict()[name])


def test_training_that_is_resumed_goes_on_the_same(tmp_path: Path) -> None:
    outputs, metadata, labels = data(60)
    first = DependenceLoss(window=30, warm_up=40)
    for rows in torch.arange(40).split(8):
        first(outputs[rows], metadata[rows], labels[rows])
    torch.save(first.state_dict(), tmp_path / "loss.pt")
    second = DependenceLoss(window=30, warm_up=40)
    second.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    for rows in torch.arange(40, 60).split(5):
        given = outputs[rows], metadata[rows], labels[rows]
        assert torch.equal(first(*given), second(*given))


# -- multipliers ------------------------------------------------------------------------------------------


def test_multipliers_rise_and_fall_within_their_bound() -> None:
    outputs, metadata, labels = data(100)
    loss = DependenceLoss(strength=2.0, warm_up=400, at_most=0.05, window=100)
    seen = []
    for _ in range(8):
        loss(outputs, metadata, labels)
        seen.append(float(loss.multipliers.sum()))
    assert seen == pytest.approx(sorted(seen))
    assert 0 < seen[0] <= 1.0
    assert float(loss.multipliers.sum()) == pytest.approx(2.0)
    for _ in range(3):
        loss(torch.ones(100, 3), metadata, labels)
    assert float(loss.multipliers.sum()) < 0.6


def test_a_fixed_strength_is_reached_after_the_warm_up() -> None:
    outputs, metadata, labels = data(50)
    loss = DependenceLoss(at_most=None, strength=1.0, warm_up=200)
    for step in range(6):
        loss(outputs, metadata, labels)
        assert loss.multipliers.tolist() == pytest.approx([min(1.0, 0.25 * (step + 1)) / 2] * 2)


def confounded(n: int, link: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs: a weak sign of the label, a strong one of metadata that go with it."""
    labels = torch.arange(n) % 2
    sign = 2.0 * labels - 1
    metadata = link * sign + torch.randn(n)
    return torch.stack([sign + torch.randn(n), 2 * metadata + 0.1 * torch.randn(n)], 1), metadata, labels


@pytest.mark.parametrize(("measure", "batch_size"), [("dcor2", 50), ("dcor2", 4), ("hsic", 50)])
def test_a_network_keeps_the_constraint_and_its_accuracy(measure: Any, batch_size: int) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    epochs, window, warm_up = (15, 300, 4000) if batch_size > 4 else (6, 100, 2000)
    loss = DependenceLoss(measure, at_most=0.02, strength=10.0, warm_up=warm_up, window=window)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    inputs, metadata, labels = confounded(1000, 1.0)
    for _ in range(epochs):
        for rows in torch.randperm(1000).split(batch_size):
            optimizer.zero_grad()
            logits = network(inputs[rows])
            total = cross_entropy(logits, labels[rows]) + loss(logits, metadata[rows], labels[rows])
            total.backward()
            optimizer.step()
    assert float(loss.dependence) < 0.04
    assert float(loss.multipliers) < 10
    # New samples, in which metadata and label are independent. Without the loss: 0.41, and 77 %.
    inputs, metadata, labels = confounded(2000, 0.0)
    logits = network(inputs).detach()
    assert conditional_distance_correlation_sqr(logits[:, 0] - logits[:, 1], metadata, labels).mean < 0.15
    assert float((logits.argmax(1) == labels).double().mean()) > 0.79


# -- degenerate and bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["dcor2", "hsic"])
@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-8, 1e-3])
def test_the_gradient_fades_where_outputs_hardly_vary(measure: Any, spread: float) -> None:
    outputs, metadata, labels = data(60)
    outputs = (5 + spread * outputs).requires_grad_()
    _, value = evaluated([1.0, 1.0], outputs, metadata, labels, measure=measure)
    (gradient,) = torch.autograd.grad(value, outputs)
    assert value.isfinite()
    # Mean cross entropy has up to 1/60 for each sample.
    assert float(gradient.abs().max()) <= spread


@pytest.mark.parametrize("case", ["constant metadata", "one class", "no samples", "one sample", "one column"])
def test_nothing_to_estimate(case: str) -> None:
    outputs, metadata, labels = data(30)
    if case == "constant metadata":
        metadata = torch.ones_like(metadata)
    elif case == "one class":
        labels = torch.zeros_like(labels)
    elif case == "one column":
        outputs = outputs[:, 0]
    else:
        rows = slice(0, 0 if case == "no samples" else 1)
        outputs, metadata, labels = outputs[rows], metadata[rows], labels[rows]
    outputs.requires_grad_()
    loss = DependenceLoss(**DEPENDENT)
    for _ in range(2):
        value = loss(outputs, metadata, labels)
        (gradient,) = torch.autograd.grad(value, outputs)
        assert gradient.isfinite().all()
    assert (float(value.detach()) > 0) == (case in ("one class", "one column"))


def test_samples_with_nan_outputs_are_left_out() -> None:
    outputs, metadata, labels = data(40)
    _, expected = evaluated([1.0, 1.0], outputs[2:], metadata[2:], labels[2:])
    outputs[0], outputs[1, 1] = math.nan, math.inf
    loss, value = evaluated([1.0, 1.0], outputs, metadata, labels)
    assert float(value) == pytest.approx(float(expected))
    assert loss.memory.isfinite().all()


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 12),
    size=st.sampled_from([0.0, 1e-200, 1e-20, 1.0, 1e20, 1e100]),
    measure=st.sampled_from(["dcor2", "hsic"]),
    unit=st.sampled_from([0.0, 1.0]),
    labels=st.sampled_from(["classes", "continuous"]),
)
def test_value_and_gradient_are_finite(
    seed: int, n: int, size: float, measure: Any, unit: float, labels: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = DependenceLoss(measure, unit=unit or float(measure == "hsic"), labels=labels, **DEPENDENT)
    for _ in range(3):
        # Whole numbers, so that there are ties and constants.
        outputs = size * torch.randint(-1, 2, (n, 2), generator=generator).double()
        outputs.requires_grad_()
        metadata = torch.randint(0, 3, (n, 2), generator=generator)
        label = torch.randint(0, 3, (n,), generator=generator)
        value = loss(outputs, metadata, label)
        (gradient,) = torch.autograd.grad(value, outputs)
        assert value.isfinite()
        assert bool(gradient.isfinite().all())
        assert bool(loss.multipliers.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "mmd"}, "measure must be 'dcor2' or 'hsic', got 'mmd'"),
        ({"labels": "ordinal"}, "labels must be 'classes' or 'continuous'"),
        ({"at_most": 0}, "at_most must be between 0 and 1"),
        ({"strength": -1.0}, "strength must be a positive number"),
        ({"unit": -1.0}, "unit must be a positive number"),
        ({"measure": "hsic", "unit": 0}, "unit must be a positive number"),
        ({"window": 4}, "window must be at least 20"),
        ({"warm_up": 0}, "warm_up must be at least 1"),
        ({"variables": {"age": []}}, r"column_names\['age'\] is empty"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DependenceLoss(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outputs": [1.0]}, TypeError, "must be a torch.Tensor"),
        ({"outputs": torch.zeros(30, dtype=torch.long)}, TypeError, "floating-point"),
        ({"outputs": torch.zeros(30, 2, 2)}, ValueError, r"outputs must have shape \(N,\) or \(N, D\)"),
        ({"metadata": torch.zeros(29, 2)}, ValueError, "metadata has 29 rows but there are 30 samples"),
        ({"metadata": torch.full((30, 2), math.nan)}, ValueError, "metadata has NaN or infinite values"),
        ({"metadata": None}, TypeError, "metadata must be a tensor or an array"),
        ({"labels": torch.zeros(31)}, ValueError, "labels has 31 rows but there are 30 samples"),
        ({"labels": torch.full((30,), math.nan)}, ValueError, "labels has NaN"),
        ({"labels": torch.zeros(30, 3)}, ValueError, r"give labels.argmax\(1\)"),
        ({"labels": torch.arange(30)}, ValueError, "no class of labels has 4 of the last 30 samples"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    outputs, metadata, labels = data(30)
    with pytest.raises(error, match=message):
        DependenceLoss(window=20)(**({"outputs": outputs, "metadata": metadata, "labels": labels} | change))


def test_other_columns_than_before() -> None:
    outputs, metadata, labels = data(30)
    loss = DependenceLoss()
    loss(outputs, metadata, labels)
    with pytest.raises(ValueError, match="each output needs a DependenceLoss of its own"):
        loss(outputs[:, :2], metadata, labels)
    with pytest.raises(ValueError, match="column 4"):
        DependenceLoss(variables={"age": [4]})(outputs, metadata, labels)


# -- processes --------------------------------------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, args=(str(tmp_path),), nprocs=2)
    expected = train(None)
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert torch.allclose(actual[name], value, rtol=1e-9, atol=1e-12), (rank, name)
