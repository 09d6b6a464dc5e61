import copy

import numpy as np
import pytest
import torch
from torch import nn

from mdnorm import MetadataNorm, fit_gram, penalty_loss, recalibrate
from reference import remove, residual


def data(n=200, k_m=2, k_y=1, shape=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    metadata = 4 + torch.randn(n, k_m, **options) @ (torch.eye(k_m) + 0.5).double()
    labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
    effect = (metadata.sum(1) + 2 * labels.sum(1)).reshape(n, *[1] * len(shape))
    return torch.randn(n, *shape, **options) + effect, metadata, labels


def prepared(metadata, labels, size=(3, 2), **options):
    layer = MetadataNorm(
        size, metadata.shape[1], 1, estimator="penalty", **{"dtype": torch.float64} | options
    )
    fit_gram(layer, metadata, labels)
    return layer


def whitening(metadata, labels):
    """Return the map from coefficients of whitened columns [y, 1, m] to those of the columns, in numpy.

    Whitening is unique up to a rotation: this is the symmetric root of the correlations (ZCA-cor).
    """
    columns = np.column_stack([labels, metadata])
    values, vectors = np.linalg.eigh(np.corrcoef(columns.T))
    slopes = (vectors / np.sqrt(values)) @ vectors.T / columns.std(0)[:, None]
    p = labels.shape[1]
    root = np.insert(np.insert(slopes, p, 0, axis=0), p, 0, axis=1)
    root[p] = -columns.mean(0) @ np.delete(root, p, 0)
    root[p, p] = 1
    return root


def whitened(metadata, labels):
    """Return the whitened columns, and the map from their coefficients to those of the columns."""
    root = whitening(metadata, labels)
    rows = np.column_stack([labels, np.ones(len(labels)), metadata]) @ root
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(rows.shape[1]), atol=1e-10)
    return rows, root


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_loss_and_gradient(granularity):
    shape = (3, 2, 4) if granularity == "channel" else (3, 2)
    features, metadata, labels = data(shape=shape)
    layer = prepared(metadata, labels, 3 if granularity == "channel" else shape, granularity=granularity)
    nn.init.normal_(layer.estimator.weight)
    rows, _ = whitened(metadata, labels)
    part = slice(0, 30)
    layer(features[part], metadata[part], labels[part])
    loss = penalty_loss(layer)
    (gradient,) = torch.autograd.grad(loss, layer.estimator.weight)
    fitted = rows[part] @ layer.estimator.weight.detach().numpy()
    fitted = fitted[:, :, None, None] if granularity == "channel" else fitted.reshape(30, 3, 2)
    error = features[part].numpy() - fitted
    sharing = 8 if granularity == "channel" else 1
    assert float(loss.detach()) == pytest.approx(0.5 * (error**2).sum() / 30 / sharing)
    summed = error.mean((2, 3)) if granularity == "channel" else error.reshape(30, 6)
    np.testing.assert_allclose(gradient, -rows[part].T @ summed / 30, atol=1e-10)


@pytest.mark.parametrize("center", [False, True])
def test_gradient_steps_equal_the_recursion(center):
    """A step removes the effect of the coefficients before it; η moves them to the batch's estimate."""
    features, metadata, labels = data()
    layer = prepared(metadata, labels, center=center)
    rows, root = whitened(metadata, labels)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    gamma = np.zeros((4, 6))
    mean = metadata.mean(0).numpy()

    def coefficients():
        return (root @ gamma)[[2, 3, 0, 1]]

    for part in torch.arange(200).split(30):
        out = layer(features[part], metadata[part], labels[part])
        expected = remove(features[part], metadata[part].numpy(), coefficients(), mean, center)
        np.testing.assert_allclose(out.detach(), expected, atol=1e-9)
        optimizer.zero_grad()
        penalty_loss(layer).backward()
        optimizer.step()
        x, f = rows[part.numpy()], features[part].flatten(1).numpy()
        gamma = gamma + 0.2 * x.T @ (f - x @ gamma) / len(part)
        np.testing.assert_allclose(layer.estimator.weight.detach(), gamma, atol=1e-9)
    # Evaluation shows the parameter as the optimiser left it, without another forward pass in training.
    actual = layer.eval()(features, metadata)
    expected = remove(features, metadata.numpy(), coefficients(), mean, center)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_converges_to_least_squares(center):
    """Whitened columns: plain gradient descent with η = ½ halves the error each step, whatever the units."""
    features, metadata, labels = data()
    scaled = metadata * torch.tensor([1e-3, 1e4], dtype=torch.float64)
    layer = prepared(scaled, labels, center=center)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(60):
        layer(features, scaled, labels)
        optimizer.zero_grad()
        penalty_loss(layer).backward()
        optimizer.step()
    # Without centring lstsq loses digits on columns that differ by 10⁷, so the reference has plain units.
    expected = residual(features, metadata, labels, center)
    np.testing.assert_allclose(layer.eval()(features, scaled), expected, atol=1e-8)


def test_collinear_and_constant_columns():
    features, metadata, labels = data()
    redundant = torch.cat([metadata, metadata.sum(1, keepdim=True), torch.ones(200, 1)], 1)
    layer = prepared(redundant, labels)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(60):
        layer(features, redundant, labels)
        optimizer.zero_grad()
        penalty_loss(layer).backward()
        optimizer.step()
    expected = residual(features, metadata, labels)
    np.testing.assert_allclose(layer.eval()(features, redundant), expected, atol=1e-8)


def test_the_losses_keep_to_their_own_side():
    """The penalty does not reach the network, the task does not reach the coefficients."""
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    nn.init.normal_(layer.estimator.weight)
    features.requires_grad_()
    out = layer(features, metadata, labels)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert layer.estimator.weight.grad is None
    assert torch.equal(features.grad, weight)
    features.grad = None
    penalty_loss(layer).backward()
    assert features.grad is None
    assert layer.estimator.weight.grad.any()


def test_evaluation_leaves_no_loss_behind():
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    layer.eval()(features, metadata)
    assert layer.estimator.loss is None


def test_a_forgotten_loss_is_warned_of_before_evaluation():
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    optimizer = torch.optim.SGD([layer.estimator.weight], 0.1)
    layer(features, metadata, labels)
    layer.eval().train()  # One batch may be there for the sizes.
    layer(features, metadata, labels)
    with pytest.warns(UserWarning, match="it removes nothing: add mdnorm.penalty_loss"):
        layer.eval()
    layer.train()(features, metadata, labels)
    penalty_loss(layer).backward()
    optimizer.step()
    layer.eval()


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_one_and_none(n):
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    out = layer(features[:n], metadata[:n], labels[:n])
    assert torch.equal(out, features[:n])
    loss = penalty_loss(layer)
    loss.backward()
    assert torch.isfinite(loss)
    assert bool(layer.estimator.weight.grad.any()) == (n == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The parameter stays in float32, and the sum of squares does not overflow (float16 ends at 65 504)."""
    features, metadata, labels = data(shape=(64,))
    layer = prepared(metadata, labels, 64, dtype=None).to(dtype)
    assert layer.estimator.weight.dtype == torch.float32
    low = (20 * features).to(dtype)
    out = layer(low, metadata, labels)
    loss = penalty_loss(layer)
    loss.backward()
    assert out.dtype == dtype
    expected = 0.5 * low.double().square().sum() / len(features)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.isfinite(layer.estimator.weight.grad).all()


def test_the_parameter_of_a_half_model_is_still_that_of_the_optimizer():
    features, metadata, labels = data()
    layer = prepared(metadata, labels, dtype=None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    layer.half()
    layer(features.half(), metadata, labels)
    penalty_loss(layer).backward()
    optimizer.step()
    assert layer.estimator.weight.any()


def test_deepcopy_after_a_forward_pass():
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    layer(features, metadata, labels)
    twin = copy.deepcopy(layer)
    assert twin.estimator.loss is None
    assert layer.estimator.loss is not None
    with pytest.raises(RuntimeError, match="call penalty_loss after a forward pass"):
        penalty_loss(twin)
    twin(features, metadata, labels)
    assert penalty_loss(twin) == penalty_loss(layer)


def test_state_dict_holds_the_parameter_and_the_gram_matrix():
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    nn.init.normal_(layer.estimator.weight)
    for sizes in ((None, None, None), ((3, 2), 2, 1)):
        twin = MetadataNorm(*sizes, estimator="penalty", dtype=torch.float64)
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin.estimator.weight, layer.estimator.weight)
        assert torch.equal(twin(features, metadata, labels), layer(features, metadata, labels))
        assert penalty_loss(twin) == penalty_loss(layer)


def test_needs_the_gram_matrix():
    features, metadata, labels = data()
    layer = MetadataNorm((3, 2), 2, 1, estimator="penalty", dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"estimator='penalty' needs.*mdnorm\.fit_gram"):
        layer(features, metadata, labels)
    fit_gram(layer, metadata, labels)
    layer(features, metadata, labels)
    layer.reset_parameters()
    assert layer.estimator.loss is None
    with pytest.raises(RuntimeError, match="fit_gram"):
        layer(features, metadata, labels)


def test_lazy_sizes():
    features, metadata, labels = data()
    layer = MetadataNorm(None, None, None, estimator="penalty", dtype=torch.float64)
    fit_gram(layer, metadata, labels)
    assert list(layer.parameters()) == []
    layer(features, metadata, labels)
    assert [p.shape for p in layer.parameters()] == [(4, 6)]


def test_memory_format_does_not_lose_what_recalibration_writes():
    """`model.to(memory_format=…)` restrides 4-d buffers."""
    features, metadata, labels = data(shape=(3, 2, 2))
    layer = prepared(metadata, labels, (3, 2, 2)).to(memory_format=torch.channels_last)
    recalibrate(layer, [(features, metadata, labels)], shrink=False)
    expected = residual(features, metadata, labels)
    np.testing.assert_allclose(layer.eval()(features, metadata), expected, atol=1e-9)


def test_default_settings():
    assert MetadataNorm(3, 1, estimator="penalty").estimator.prior == 0


def test_the_prior_shrinks_what_is_removed_and_not_the_parameter():
    features, metadata, labels = data()
    layer = prepared(metadata, labels, prior=50)
    recalibrate(layer, [(features, metadata, labels)], shrink=False)
    rows, _ = whitened(metadata, labels)
    np.testing.assert_allclose(layer.estimator.weight.detach(), rows.T @ features.flatten(1).numpy() / 200)
    expected = residual(features, metadata, labels, share=50 / 250)
    np.testing.assert_allclose(layer.eval()(features, metadata), expected, atol=1e-9)


def one_hot_data(n=120):
    """Four sites of equal size: equal eigenvalues, so whitening is far from unique."""
    generator = torch.Generator().manual_seed(1)
    metadata = torch.eye(4, dtype=torch.float64).repeat(n // 4, 1)
    labels = (torch.rand(n, 1, generator=generator) > 0.5).double()
    return torch.randn(n, 3, 2, generator=generator, dtype=torch.float64), metadata, labels


def removed(layer, features, metadata):
    return features - layer.eval()(features, metadata)


def test_the_whitening_of_a_parameter_is_the_same_on_every_machine(monkeypatch):
    """Eigenvectors have no sign and, of equal eigenvalues, no direction: another LAPACK gives others."""
    features, metadata, labels = one_hot_data()
    layer = prepared(metadata, labels)
    nn.init.normal_(layer.estimator.weight)
    expected = removed(layer, features, metadata)
    eigh = torch.linalg.eigh

    def other(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([-1.0, 1.0]).double().repeat(5)[: len(values)]

    monkeypatch.setattr(torch.linalg, "eigh", other)
    copied = MetadataNorm((3, 2), 4, 1, estimator="penalty", dtype=torch.float64)
    copied.load_state_dict(layer.state_dict())
    torch.testing.assert_close(removed(copied, features, metadata), expected)


def test_the_same_data_in_other_batches_change_nothing():
    features, metadata, labels = one_hot_data()
    layer = prepared(metadata, labels)
    nn.init.normal_(layer.estimator.weight)
    expected = removed(layer, features, metadata)
    fit_gram(layer, zip(metadata.split(37), labels.split(37), strict=True))
    torch.testing.assert_close(removed(layer, features, metadata), expected)


def test_what_is_learned_is_put_in_the_columns_of_new_data():
    features, metadata, labels = data()
    layer = prepared(metadata, labels)
    nn.init.normal_(layer.estimator.weight)
    query = np.column_stack([labels, np.ones(200), metadata])

    def line():
        return query @ root @ layer.estimator.weight.detach().numpy()

    root = whitening(metadata, labels)
    expected, removed_before = line(), removed(layer, features, metadata)
    shifted, other = 3 * metadata + 5 + metadata.flip(1), labels - 1
    fit_gram(layer, shifted, other)
    root = whitening(shifted, other)
    np.testing.assert_allclose(line(), expected, atol=1e-9)
    # The slopes stay; nothing is removed at the mean metadata of the new set.
    slopes = removed_before - removed_before.mean(0)
    after = removed(layer, features, metadata)
    torch.testing.assert_close(after - after.mean(0), slopes)
    centre = shifted.mean(0, keepdim=True)
    torch.testing.assert_close(layer(features[:1], centre), features[:1])


def test_takes_no_window():
    with pytest.raises(TypeError, match=r"estimator='penalty'.*window"):
        MetadataNorm(3, 1, estimator="penalty", window=100)
