"""Decay of what is removed: its gradient, what it does not depend on, and what it is for."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import mdnorm
from mdnorm import MetadataNorm, fit_gram

LEAST_SQUARES = ["batch", "dataset", "running", "recursive"]


def data(n=40, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    metadata, labels = torch.randn(n, 2, **options), torch.randn(n, 1, **options).sign()
    features = torch.randn(n, d, **options) + metadata[:, :1] - 2 * metadata[:, 1:] + 4 * labels
    return features, metadata, labels


def gradients(estimator, decay, loss_unit=1.0, feature_unit=1.0, weights=None, steps=1, **options):
    layer = MetadataNorm(6, 2, 1, estimator=estimator, dtype=torch.float64, decay=decay, **options)
    features, metadata, labels = data()
    fit_gram(layer, metadata, labels)
    for step in range(steps):
        leaf = (features * feature_unit).requires_grad_()
        out = layer(leaf, metadata, labels, weights)
        torch.manual_seed(step)
        out.backward(torch.randn_like(out) * loss_unit)
    return layer, leaf, out.detach()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("estimator", LEAST_SQUARES)
class TestGradient:
    def test_is_the_effect_in_the_size_of_the_losses_gradient(self, estimator, center):
        _, plain, _ = gradients(estimator, 0, center=center)
        _, decayed, out = gradients(estimator, 0.7, rise=0, center=center)
        # What was taken from the features about their means, which "center" removes as well.
        effect = decayed.detach() - out
        effect = effect - effect.mean(0) if center else effect
        torch.manual_seed(0)
        size = torch.randn_like(out).norm()
        expected = 0.7 * size * effect / effect.norm()
        np.testing.assert_allclose(decayed.grad - plain.grad, expected, atol=1e-8)

    def test_does_not_depend_on_units(self, estimator, center):
        _, first, _ = gradients(estimator, 0.7, rise=0, center=center)
        _, scaled, _ = gradients(estimator, 0.7, 1e4, 1e-6, rise=0, center=center)
        np.testing.assert_allclose(scaled.grad, first.grad * 1e4, rtol=1e-6, atol=1e-6)

    def test_rises_with_the_samples(self, estimator, center):
        options = {"center": center, "prior": 0, "averaging": 0, "window": 40}
        _, full, _ = gradients(estimator, 1, rise=0, steps=3, **options)
        _, plain, _ = gradients(estimator, 0, steps=3, **options)
        layer, partly, _ = gradients(estimator, 1, rise=400, steps=3, **options)
        assert float(layer.estimator.seen) == 120
        share = (partly.grad - plain.grad) / (full.grad - plain.grad)
        np.testing.assert_allclose(share, np.full_like(share, 0.3), rtol=1e-6)

    def test_a_sample_without_weight_is_not_held(self, estimator, center):
        weights = torch.ones(40, dtype=torch.float64)
        weights[::2] = 0
        _, plain, _ = gradients(estimator, 0, weights=weights, center=center)
        _, decayed, _ = gradients(estimator, 1, weights=weights, rise=0, center=center)
        difference = decayed.grad - plain.grad
        assert (difference[::2].abs() < 1e-12).all()
        assert (difference[1::2].abs() > 1e-6).any(1).all()


@pytest.mark.parametrize("estimator", LEAST_SQUARES)
def test_is_weak_while_the_features_tell_little_of_the_labels(estimator):
    """Here the effect of the labels is a hundredth of that of the metadata, and so is the decay."""
    features, metadata, labels = data(4000)
    noise = features - 4 * labels - metadata[:, :1] + 2 * metadata[:, 1:]
    sizes = []
    for labels_effect in (0.01, 3):
        results = []
        for decay in (0, 1):
            options = {"estimator": estimator, "prior": 0, "dtype": torch.float64, "rise": 0}
            layer = MetadataNorm(6, 2, 1, decay=decay, window=1e9, **options)
            fit_gram(layer, metadata, labels)
            leaf = (1e-6 * noise + metadata[:, :1] + labels_effect * labels).requires_grad_()
            out = layer(leaf, metadata, labels)
            torch.manual_seed(0)
            out.backward(torch.randn_like(out))
            results.append(leaf.grad)
        torch.manual_seed(0)
        sizes.append(float((results[1] - results[0]).norm() / torch.randn_like(out).norm()))
    np.testing.assert_allclose(sizes, [0.01, 1], rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("estimator", LEAST_SQUARES)
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_is_finite_in_small_batches_without_effect_and_without_gradient(estimator, dtype, n):
    layer = MetadataNorm(4, 2, 1, estimator=estimator, rise=0)
    fit_gram(layer, torch.randn(50, 2), torch.randn(50, 1))
    for features in (torch.zeros(n, 4), torch.randn(n, 4), torch.full((n, 4), 6e4)):
        for scale in (0.0, 1.0, 1e3):
            leaf = features.to(dtype).requires_grad_()
            out = layer(leaf, torch.randn(n, 2), torch.randn(n, 1))
            out.backward(torch.full_like(out, scale))
            assert leaf.grad.isfinite().all()


def test_maps_and_tokens_have_none_by_default():
    for shape, options in (((6, 3), {}), (6, {"granularity": "channel"})):
        results = []
        for decay in (None, 0, 1):
            layer = MetadataNorm(shape, 2, 1, decay=decay, rise=0, dtype=torch.float64, **options)
            features, metadata, labels = data(d=18)
            leaf = features.view(40, 6, 3).requires_grad_()
            layer(leaf, metadata, labels).square().sum().backward()
            results.append(leaf.grad)
        assert torch.equal(results[0], results[1])
        assert not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("shape", [(18, 1, 1), (1, 18), (18, 1)])
@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}], ids=str)
def test_pooled_maps_are_vectors(shape, options):
    """As behind the average pooling of a ResNet: what one gets is what the flat features get."""
    if options:
        options = options | {"channel_dim": 1 + shape.index(18)}
    gradients = []
    for number, more in ((shape, options), ((18,), {})):
        layer = MetadataNorm(number if not more else 18, 2, 1, rise=0, dtype=torch.float64, **more)
        features, metadata, labels = data(d=18)
        leaf = features.view(40, *number).requires_grad_()
        layer(leaf, metadata, labels).square().sum().backward()
        gradients.append(leaf.grad.flatten(1))
    torch.testing.assert_close(*gradients)


def test_wrong_settings_are_errors():
    for name, value in (("decay", -1), ("decay", float("inf")), ("rise", -1)):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, at least 0, got {value}"):
            MetadataNorm(4, 1, **{name: value})
    with pytest.raises(TypeError, match="decay must be a number"):
        MetadataNorm(4, 1, decay="strong")


# -- an overfitting network ----------------------------------------------------------------------------------


def confounded(n, generator):
    """x tells a little of y and, given y, nothing of m; m tells y well."""
    labels = torch.randint(0, 2, (n,), generator=generator)
    signs = 2.0 * labels.unsqueeze(1) - 1
    metadata = torch.randn(n, 1, generator=generator) + 0.96 * signs
    inputs = torch.randn(n, 32, generator=generator)
    inputs[:, :4] += 0.45 * signs
    return inputs, labels, metadata


def slope_and_accuracies(seed, **options):
    """Return the slope of the logit on m over the label's effect, and accuracy with m given and shuffled."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels, metadata = confounded(1200, generator)
    new_inputs, new_labels, new_metadata = confounded(4000, generator)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    if options:
        mdnorm.insert(net, after="2", num_metadata=1, num_labels=1, example=inputs[:2], **options)

    def given(*parts):
        return mdnorm.metadata(net, *parts) if options else nullcontext()

    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    for _ in range(30):
        for rows in torch.randperm(1200, generator=generator).split(32):
            with given(metadata[rows], labels[rows]):
                logits = net(inputs[rows])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
    net.eval()
    order = torch.randperm(4000, generator=generator)
    results = []
    with torch.no_grad():
        for told in (new_metadata, new_metadata[order]):
            with given(told):
                logits = net(new_inputs)
            difference = logits[:, 1] - logits[:, 0]
            results.append((difference, float(((difference > 0) == new_labels).double().mean())))
    design = torch.cat([torch.ones(4000, 1), new_labels.unsqueeze(1), new_metadata], 1).double()
    effects = torch.linalg.lstsq(design, results[0][0].double().unsqueeze(1)).solution[:, 0]
    return float(effects[2] / effects[1]), results[0][1], results[1][1]


def test_a_network_that_memorises_is_not_handed_the_metadata():
    """The published gradient hands them over; with decay the output depends on them no more than without."""
    plain, published, decayed = (
        np.mean([slope_and_accuracies(seed, **options) for seed in range(3)], 0)
        for options in ({}, {"decay": 0}, {"decay": None})
    )
    assert published[0] > 0.1
    assert published[2] < plain[2] - 0.01
    assert abs(decayed[0]) <= 0.03
    assert decayed[2] >= plain[2]
