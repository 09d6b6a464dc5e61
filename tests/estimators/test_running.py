import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mdnorm import MetadataNorm, fit_gram, recalibrate
from reference import remove, residual, weighted_least_squares


def batches(sizes, k_m=2, k_y=1, shape=(3, 2), seed=3):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    for n in sizes:
        metadata = 4 + torch.randn(n, k_m, **options)
        labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
        effect = (metadata[:, :1] + 2 * labels.sum(1, keepdim=True)).reshape(n, *[1] * len(shape))
        yield torch.randn(n, *shape, **options) + effect, metadata, labels


class NumpyRunning:
    """The estimator in plain numpy, with all samples so far and their weights instead of moments."""

    def __init__(self, window, prior, center):
        self.window, self.prior, self.center = window, prior, center
        self.seen, self.weights = [], []
        self.adjoint, self.adjoint_weight = 0.0, 0.0

    def forward(self, features, metadata, labels):
        n = len(features)
        decay = max(0.0, 1 - n / self.window) if n else 1.0
        self.seen.append((features.reshape(n, -1), metadata, labels))
        self.weights = [w * decay for w in self.weights] + [1.0]
        f, m, y = (np.concatenate([batch[i] for batch in self.seen]) for i in range(3))
        weights = np.concatenate(
            [np.full(len(b[0]), w) for b, w in zip(self.seen, self.weights, strict=True)]
        )
        share = self.prior / (self.prior + weights.sum())
        beta = weighted_least_squares(f, m, y, weights, share)
        self.mean = np.average(m, axis=0, weights=weights)
        out = remove(features, metadata, beta, self.mean, self.center)
        # β = P f over all samples so far; this batch's rows of P, as if the batch stood for them all.
        x = np.column_stack([m, y, np.ones(len(m))])
        rows = np.column_stack([metadata, labels, np.ones(n)])
        k_m = metadata.shape[1]
        shrinkage = np.zeros(x.shape[1])
        shrinkage[:k_m] = share * np.average((m - self.mean) ** 2, axis=0, weights=weights)
        inverse = np.linalg.inv((x * weights[:, None]).T @ x / weights.sum() + np.diag(shrinkage))
        projector = inverse @ rows.T / max(n, 1)
        self.projector, self.basis = projector[:k_m], metadata - self.mean
        if self.center:
            # The removed part is (m − m̄) β_m + (β_0 + m̄ β_m).
            self.projector = np.vstack([self.projector, projector[-1] + self.mean @ projector[:k_m]])
            self.basis = np.column_stack([self.basis, np.ones(n)])
        self.count, self.decay = n, decay
        return out

    def backward(self, gradient):
        flat = gradient.reshape(self.count, -1)
        self.adjoint_weight = self.adjoint_weight * self.decay + self.count
        share = self.count / self.adjoint_weight
        self.adjoint = (1 - share) * self.adjoint + share * (self.basis.T @ flat)
        return (flat - self.projector.T @ self.adjoint).reshape(gradient.shape)


def numpy_batch(batch):
    return [part.detach().numpy() for part in batch]


class TestRecursion:
    @given(
        sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
        k_m=st.integers(1, 3),
        k_y=st.integers(0, 2),
        window=st.floats(25, 300) | st.just(math.inf),
        prior=st.sampled_from([0, 1, 20]),
        center=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=30)
    def test_forward_adjoint_and_gradient(self, sizes, k_m, k_y, window, prior, center, seed):
        # The first batch has enough samples for an inverse, the window (exponential) for it to stay so.
        sizes = [24, *sizes]
        options = {"window": window, "prior": prior, "center": center, "dtype": torch.float64}
        layer = MetadataNorm((3, 2), k_m, k_y, estimator="running", **options)
        reference = NumpyRunning(window, prior, center)
        for features, metadata, labels in batches(sizes, k_m, k_y, seed=seed):
            features.requires_grad_()
            out = layer(features, metadata, labels if k_y else None)
            expected = reference.forward(*numpy_batch((features, metadata, labels)))
            # The reference inverts a Gram matrix of columns with mean 4: it loses some digits.
            np.testing.assert_allclose(out.detach(), expected, atol=1e-8)
            gradient = torch.randn(out.shape, dtype=torch.float64) / len(features) + 0.1
            out.backward(gradient)
            expected = reference.backward(gradient.numpy())
            np.testing.assert_allclose(features.grad, expected, atol=1e-8)
            # That of coefficients of the metadata in units of their deviation in the first batch.
            adjoint = layer.estimator.adjoint.clone()
            adjoint[:k_m] /= layer.estimator.scale[-k_m:, None]
            np.testing.assert_allclose(adjoint, reference.adjoint, atol=1e-8)
            assert float(layer.estimator.adjoint_weight) == pytest.approx(reference.adjoint_weight)

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("window", [90, math.inf])
    @pytest.mark.parametrize("averaging", [1.5, 3.0, 0])
    def test_evaluation_removes_an_average_over_some_windows(self, averaging, window, center):
        """Each batch weighs by its samples and fades by the root of the window's decay."""
        options = {"window": window, "prior": 2, "center": center, "dtype": torch.float64}
        if averaging != 1.5:
            options["averaging"] = averaging
        layer = MetadataNorm((3, 2), 2, 1, estimator="running", **options)
        lines, means, weights, seen, per_sample = [], [], [], [], np.zeros(0)
        for batch in batches((30, 40, 7, 1, 25)):
            n = len(batch[0])
            kept = 1 - n / window
            layer.train()(*batch)
            seen.append(numpy_batch(batch))
            per_sample = np.concatenate([per_sample * kept, np.ones(n)])
            f, m, y = (np.concatenate(parts) for parts in zip(*seen, strict=True))
            share = 2 / (2 + per_sample.sum())
            beta = weighted_least_squares(f.reshape(len(f), -1), m, y, per_sample, share)
            means.append(np.average(m, axis=0, weights=per_sample))
            # Slopes and the value at the mean metadata.
            lines.append(np.vstack([beta[:2], beta[-1] + means[-1] @ beta[:2]]))
            is_latest = window == math.inf or not averaging
            weights = [0.0 if is_latest else w * kept ** (1 / averaging) for w in weights] + [float(n)]
        line, mean = (np.average(values, axis=0, weights=weights) for values in (lines, means))
        features, metadata, _ = numpy_batch(next(batches((9,), seed=5)))
        removed = (metadata - mean) @ line[:2] + (line[2] if center else 0)
        out = layer.eval()(torch.from_numpy(features), torch.from_numpy(metadata))
        np.testing.assert_allclose(out, features - removed.reshape(features.shape), atol=1e-9)

    @pytest.mark.parametrize("prior", [0, 5])
    def test_the_average_follows_recalibrated_coefficients(self, prior):
        options = {"window": 50, "prior": prior, "dtype": torch.float64}
        layer = MetadataNorm((3, 2), 2, 1, estimator="running", **options)
        first, second = batches((40, 10))
        layer(*first)
        recalibrate(layer, [first], shrink=False)
        exact = layer.coefficients
        layer.train()(*second)
        # 10 of 40 · (1 − 10 / 50)^⅔ + 10 samples.
        share = 10 / (40 * 0.8 ** (2 / 3) + 10)
        f, m, y = (torch.cat(parts).numpy() for parts in zip(first, second, strict=True))
        per_sample = np.repeat([0.8, 1.0], [40, 10])
        latest = weighted_least_squares(f.reshape(50, -1), m, y, per_sample, prior / (prior + 42))[:2]
        expected = (1 - share) * exact.flatten(1) + share * torch.from_numpy(latest)
        torch.testing.assert_close(layer.coefficients.flatten(1), expected)

    def test_channels_equal_their_positions_as_samples(self):
        """Sharing over positions is the element form with every position a sample of its own."""
        options = {"estimator": "running", "decay": 0, "dtype": torch.float64}
        shared = MetadataNorm(3, 2, 1, granularity="channel", window=60, prior=1, **options)
        flat = MetadataNorm(3, 2, 1, window=60 * 8, prior=8, **options)
        for features, metadata, labels in batches((20, 20, 7, 1), shape=(3, 2, 4)):
            a = features.requires_grad_()
            b = features.detach().movedim(1, -1).reshape(-1, 3).requires_grad_()
            out = shared(a, metadata, labels)
            rows = flat(b, metadata.repeat_interleave(8, 0), labels.repeat_interleave(8, 0))
            np.testing.assert_allclose(out.detach().movedim(1, -1).reshape(-1, 3), rows.detach(), atol=1e-10)
            gradient = torch.randn(out.shape, dtype=torch.float64)
            out.backward(gradient)
            rows.backward(gradient.movedim(1, -1).reshape(-1, 3))
            np.testing.assert_allclose(a.grad.movedim(1, -1).reshape(-1, 3), b.grad, atol=1e-10)
            torch.testing.assert_close(shared.estimator.adjoint, flat.estimator.adjoint)

    @pytest.mark.parametrize("granularity", ["element", "channel"])
    def test_element_and_channel_agree_on_a_conv_map_of_one_position(self, granularity):
        size = (3, 1, 1) if granularity == "element" else 3
        options = {"estimator": "running", "decay": 0, "dtype": torch.float64}
        layer = MetadataNorm(size, 2, 1, granularity=granularity, **options)
        plain = MetadataNorm(3, 2, 1, **options)
        for features, metadata, labels in batches((20, 5), shape=(3, 1, 1)):
            a, b = features.clone().requires_grad_(), features.flatten(1).requires_grad_()
            out, expected = layer(a, metadata, labels), plain(b, metadata, labels)
            torch.testing.assert_close(out.flatten(1), expected)
            out.pow(2).mean().backward()
            expected.pow(2).mean().backward()
            torch.testing.assert_close(a.grad.flatten(1), b.grad)


class TestLargeBatches:
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("n", [50, 80])
    def test_a_batch_as_large_as_the_window_is_batch_least_squares(self, n, granularity, center):
        size = (3, 2) if granularity == "element" else 3
        options = {"granularity": granularity, "center": center, "dtype": torch.float64}
        running = MetadataNorm(size, 2, 1, estimator="running", window=50, **options)
        batch = MetadataNorm(size, 2, 1, estimator="batch", **options)
        history, data = batches((30, n))
        for layer in (running, batch):  # Both measure columns from the same origin, in the same units.
            layer(history[0].requires_grad_(), *history[1:]).sum().backward()
        a, b = data[0].clone().requires_grad_(), data[0].clone().requires_grad_()
        weight = torch.randn_like(a)
        out, expected = running(a, *data[1:]), batch(b, *data[1:])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        (out.tanh() * weight).sum().backward()
        (expected.tanh() * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)

    def test_the_first_batch_counts_in_full(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="running", window=1e6, dtype=torch.float64)
        data = next(batches((40,)))
        np.testing.assert_allclose(layer(*data), residual(*data, share=1 / 41), atol=1e-10)

    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("center", [False, True])
    def test_gradcheck_where_nothing_but_this_batch_is_in_the_state(self, granularity, center):
        size = (3, 2) if granularity == "element" else 3
        history, data = batches((30, 9))
        options = {"granularity": granularity, "center": center, "dtype": torch.float64}
        layer = MetadataNorm(size, 2, 1, estimator="running", window=9, **options)
        layer(history[0].requires_grad_(), *history[1:]).sum().backward()
        assert torch.autograd.gradcheck(lambda f: layer(f, *data[1:]), data[0].requires_grad_())


# -- the expected gradient ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, estimator, **options):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 1)
        self.norm = MetadataNorm(3, 1, 1, estimator=estimator, decay=0, **options)
        self.double()

    def forward(self, images, metadata, labels):
        return self.last(torch.tanh(self.norm(self.first(images), metadata, labels)))


def gradient(net, images, metadata, labels):
    net.zero_grad()
    logits = net(images, metadata, labels)
    nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.fixture
def _one_thread():
    """For tens of thousands of steps on tiny matrices, where threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def training_set():
    n = 96
    options = {"generator": torch.Generator().manual_seed(5), "dtype": torch.float64}
    metadata = torch.randn(n, 1, **options)
    labels = (torch.randn(n, 1, **options) + 0.7 * metadata > 0).double()
    along_metadata, along_labels = torch.tensor([[1, -1, 0.5, 2], [1, 1, -1, 0]], dtype=torch.float64)
    images = torch.randn(n, 4, **options) + metadata * along_metadata + labels * along_labels
    return images, metadata, labels


@pytest.fixture(scope="module")
def whole_gradient(training_set):
    """By autograd through least squares on the whole training set, without this package."""
    net = Net("batch")
    images, metadata, labels = training_set
    features = net.first(images)
    design = torch.cat([metadata, labels, torch.ones_like(labels)], 1)
    beta = torch.linalg.lstsq(design, features).solution
    logits = net.last(torch.tanh(features - (metadata - metadata.mean(0)) @ beta[:1]))
    nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def error_of_the_expected_gradient(training_set, exact, batch_size, estimator, epochs, **options):
    """Relative error of the mean gradient over shuffled epochs, the weights fixed, the state stationary.

    Within an epoch every sample comes once, so what is linear in the samples averages out exactly, and what
    remains is the bias of the estimator.
    """
    torch.manual_seed(0)
    net = Net(estimator, **options)
    if net.norm.estimator.gram_source == "dataset":
        fit_gram(net, *training_set[1:])
    # Burn-in by whole passes, three windows of them, and one epoch in small batches.
    for _ in range(3 * options.get("window", 0) // len(training_set[0]) + 1):
        gradient(net, *training_set)
    total, count = 0, 0
    for epoch in range(epochs + 1):
        for part in torch.randperm(len(training_set[0])).split(batch_size):
            batch_gradient = gradient(net, *(block[part] for block in training_set))
            if epoch:
                total, count = total + batch_gradient * len(part), count + len(part)
    return float((total / count - exact).norm() / exact.norm())


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_the_expected_gradient_tends_to_that_of_the_whole_training_set(
    training_set, whole_gradient, batch_size
):
    """What the two-sided estimator is for: any batch size gives the gradient of the data set's regression.

    The bias is that of the batch's share in the state and of the state's own variance, both of the order
    1 / window: measured 1.5 to 1.8 / window.
    """
    windows = [100, 1000, 10_000]
    errors = [
        error_of_the_expected_gradient(
            training_set, whole_gradient, batch_size, "running", 8, window=window, prior=0
        )
        for window in windows
    ]
    assert errors[0] > errors[1] > errors[2]
    assert all(error < 3 / window for error, window in zip(errors, windows, strict=True)), errors


@pytest.mark.usefixtures("_one_thread")
def test_without_the_backward_half_it_does_not(training_set, whole_gradient):
    """The same coefficients as constants (recursive least squares): the error does not know the window."""
    errors = [
        error_of_the_expected_gradient(
            training_set, whole_gradient, 20, "recursive", 4, window=window, prior=0
        )
        for window in (1000, 10_000)
    ]
    assert min(errors) > 0.2


@pytest.mark.usefixtures("_one_thread")
def test_the_papers_form_depends_on_the_batch_size_instead(training_set, whole_gradient):
    small, large = (
        error_of_the_expected_gradient(training_set, whole_gradient, size, "dataset", 6, prior=0)
        for size in (4, 96)
    )
    assert small > 0.05
    assert large < 1e-10


# -- the state ---------------------------------------------------------------------------------------------


def trained(**options):
    layer = MetadataNorm((3, 2), 2, 1, estimator="running", **options)
    for features, metadata, labels in batches((20, 7)):
        layer(features.float().requires_grad_(), metadata, labels).pow(2).mean().backward()
    return layer


def copy_of_state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("center", [False, True])
def test_batches_of_one_and_none(n, center):
    layer = MetadataNorm((3, 2), 2, 1, estimator="running", center=center, dtype=torch.float64)
    for size in (n, n, 20, n, n):
        features, metadata, labels = next(batches((size,)))
        out = layer(features.requires_grad_(), metadata, labels)
        out.pow(2).mean().backward() if size else out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(features.grad).all()
    assert all(torch.isfinite(value).all() for value in layer.state_dict().values())
    assert layer.estimator.adjoint.any()


def test_an_empty_batch_leaves_the_state():
    layer = trained()
    before = copy_of_state(layer)
    features, metadata, labels = next(batches((0,)))
    layer(features.float().requires_grad_(), metadata, labels).sum().backward()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_does_not_enter_the_state(bad, granularity):
    """Neither the features of the forward pass nor the gradient of the backward pass."""
    layer = MetadataNorm(
        (3, 2) if granularity == "element" else 3, 2, 1, estimator="running", granularity=granularity
    )
    (first, *columns), (features, *other) = batches((20, 9))
    layer(first.float().requires_grad_(), *columns).pow(2).mean().backward()
    before = copy_of_state(layer)
    features = features.float()
    features[3, 1] = bad
    features.requires_grad_()
    out = layer(features, *other)
    assert not torch.isfinite(out).all()
    out.sum().backward()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key

    features = torch.randn(9, 3, 2, requires_grad=True)
    out = layer(features, *other)
    gradient = torch.ones_like(out)
    gradient[2, 0] = bad
    out.backward(gradient)
    assert torch.equal(layer.estimator.adjoint, before["estimator.adjoint"])
    assert torch.equal(layer.estimator.adjoint_weight, before["estimator.adjoint_weight"])


def test_a_forward_without_a_backward_leaves_the_adjoint():
    layer = trained()
    before = copy_of_state(layer)
    layer(*next(batches((20,))))
    assert torch.equal(layer.estimator.adjoint, before["estimator.adjoint"])
    assert not torch.equal(layer.estimator.cross, before["estimator.cross"])
    with torch.no_grad():
        layer(*next(batches((20,))))
    assert torch.equal(layer.estimator.adjoint, before["estimator.adjoint"])


def test_evaluation_leaves_the_adjoint_and_passes_the_gradient_on():
    layer = trained().eval()
    before = copy_of_state(layer)
    features, metadata, _ = next(batches((20,)))
    layer(features.requires_grad_(), metadata).sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_two_forward_passes_before_one_backward_pass():
    """Both reach the adjoint, each with the weight of its forward pass."""
    data = list(batches((20, 20, 9)))
    layer = trained(dtype=torch.float64)
    reference = copy.deepcopy(layer)
    outs, inputs = [], []
    for features, metadata, labels in data[:2]:
        inputs.append(features.clone().requires_grad_())
        outs.append(layer(inputs[-1], metadata, labels))
    (outs[0].mean() + outs[1].mean()).backward()
    for features, metadata, labels in data[:2]:
        reference(features, metadata, labels)
    torch.testing.assert_close(layer.estimator.cross, reference.estimator.cross)
    assert float(layer.estimator.adjoint_weight) == float(layer.estimator.weight)


def test_the_state_survives_saving_with_its_adjoint():
    layer = trained()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = MetadataNorm(None, None, None, estimator="running")
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert twin.estimator.adjoint.any()
    features, metadata, labels = next(batches((9,)))
    a, b = (features.float().requires_grad_() for _ in range(2))
    layer(a, metadata, labels).pow(2).mean().backward()
    twin(b, metadata, labels).pow(2).mean().backward()
    assert torch.equal(a.grad, b.grad)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_a_deepcopy_has_an_adjoint_of_its_own():
    layer = trained()
    features, metadata, labels = next(batches((9,)))
    out = layer(features.float().requires_grad_(), metadata, labels)
    twin = copy.deepcopy(layer)
    out.pow(2).mean().backward()
    assert not torch.equal(layer.estimator.adjoint, twin.estimator.adjoint)


def test_double_backward_is_refused():
    layer = trained()
    features, metadata, labels = next(batches((9,)))
    features.requires_grad_()
    loss = layer(features, metadata, labels).pow(3).mean()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(loss, features, create_graph=True)


def test_a_sum_is_a_mean_times_the_batch_size():
    """The adjoint expects a fixed multiple of a mean."""
    data = list(batches((20, 20, 5)))
    states = {}
    for name in ("mean", "sum"):
        layer = MetadataNorm((3, 2), 2, 1, estimator="running", dtype=torch.float64)
        for features, metadata, labels in data:
            out = layer(features.clone().requires_grad_(), metadata, labels)
            per_sample = out.pow(2).flatten(1).sum(1)
            getattr(per_sample, name)().backward()
        states[name] = layer.estimator.adjoint.clone()
        if len(states) == 2:
            # Equal batches differ by the factor 20; the partial one of 5 makes the ratio uneven.
            ratio = states["sum"] / states["mean"]
            assert ratio.std() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(dtype):
    layer, exact = trained(), trained()
    features, metadata, labels = next(batches((20,)))
    low = features.to(dtype).requires_grad_()
    high = low.detach().float().requires_grad_()
    out, expected = layer(low, metadata, labels), exact(high, metadata, labels)
    assert out.dtype == dtype
    out.float().pow(2).mean().backward()
    expected.pow(2).mean().backward()
    assert low.grad.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    assert (out.float() - expected).abs().max() < epsilon * expected.abs().max()
    # The gradient that comes in was rounded as well: errors of a few roundings.
    assert (low.grad.float() - high.grad).abs().max() < 4 * epsilon * high.grad.abs().max()


def test_default_settings():
    estimator = MetadataNorm(4, 1).estimator
    assert (estimator.window, estimator.prior, estimator.averaging) == (500, 1, 1.5)
    assert (estimator.center, estimator.reduction) == (False, "mean")
    assert (estimator.gram_source, estimator.adjoint_source) == ("window", "window")


class TestReduction:
    def gradients(self, reduction, estimator_reduction):
        """Input gradients of 40 batches of 20 and a last one of 2, in units of a sample's own."""
        options = {"window": 200, "reduction": estimator_reduction, "dtype": torch.float64}
        layer = MetadataNorm(3, 1, estimator="running", **options)
        generator = torch.Generator().manual_seed(0)
        gradients = []
        for n in [20] * 40 + [2]:
            metadata = torch.randn(n, 1, generator=generator, dtype=torch.float64)
            features = torch.randn(n, 3, generator=generator, dtype=torch.float64) + metadata
            features.requires_grad_()
            loss = (layer(features, metadata) * (1 + metadata)).sum() / (n if reduction == "mean" else 1)
            loss.backward()
            gradients.append(features.grad * (n if reduction == "mean" else 1))
        return gradients

    def test_a_sum_is_a_mean_times_the_number_of_samples(self):
        means, sums = self.gradients("mean", "mean"), self.gradients("sum", "sum")
        for mean, total in zip(means, sums, strict=True):
            torch.testing.assert_close(mean, total)

    def test_a_sum_taken_for_a_mean_is_wrong_in_the_partial_batch(self):
        """What the argument is for: the whole batches hide it."""
        right, wrong = self.gradients("sum", "sum"), self.gradients("sum", "mean")
        torch.testing.assert_close(wrong[-2], right[-2])
        assert (wrong[-1] - right[-1]).abs().max() > 3

    def test_unknown(self):
        with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
            MetadataNorm(3, 1, estimator="running", reduction="none")
