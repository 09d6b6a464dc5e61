import math

import numpy as np
import pytest
import torch

from mdnorm import MetadataNorm, fit_gram
from reference import dataset_residual, design_matrix, remove


def data(n=101, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    metadata = 2 + torch.randn(n, 2, **options)
    labels = torch.randn(n, 1, **options) + metadata[:, :1]
    features = torch.randn(n, 5, **options) + metadata @ torch.randn(2, 5, **options) + 3 * labels
    return features, metadata, labels


@pytest.mark.parametrize("center", [False, True])
def test_training_is_the_papers_form_and_evaluation_its_running_average(center):
    features, metadata, labels = data()
    options = {"window": 100, "prior": 0, "center": center, "dtype": torch.float64}
    layer = MetadataNorm(5, 2, 1, estimator="dataset", **options)
    fit_gram(layer, metadata, labels)
    x = design_matrix(metadata, labels)
    running, weight = 0, 0
    for part in torch.arange(101).split(20):  # the last batch has one sample
        out = layer(features[part], metadata[part], labels[part])
        expected = dataset_residual(features[part], metadata[part], labels[part], metadata, labels, center)
        np.testing.assert_allclose(out, expected, atol=1e-10)
        beta = np.linalg.solve(x.T @ x / 101, x[part.numpy()].T @ features[part].numpy() / len(part))
        weight = (1 - len(part) / 100) * weight + len(part)
        running = running + (beta - running) * len(part) / weight
    assert float(layer.estimator.coefficients_weight) == pytest.approx(weight)
    actual = layer.eval()(features, metadata)
    expected = remove(features, metadata.numpy(), running, metadata.mean(0).numpy(), center)
    np.testing.assert_allclose(actual, expected, atol=1e-10)


def test_the_prior_weighs_beside_the_training_set():
    features, metadata, labels = data()
    layer = MetadataNorm(5, 2, 1, prior=10, dtype=torch.float64, estimator="dataset")
    fit_gram(layer, metadata, labels)
    x, part = design_matrix(metadata, labels), slice(20)
    shrinkage = np.diag([*(10 / 111 * metadata.var(0, correction=0)), 0, 0])
    beta = np.linalg.solve(x.T @ x / 101 + shrinkage, x[part].T @ features[part].numpy() / 20)
    expected = remove(features[part], metadata[part].numpy(), beta, metadata.mean(0).numpy(), False)
    np.testing.assert_allclose(layer(features[part], metadata[part], labels[part]), expected, atol=1e-10)


def test_one_epoch_of_the_cumulative_average_is_the_fit_over_the_training_set():
    features, metadata, labels = data()
    layer = MetadataNorm(5, 2, 1, window=math.inf, prior=0, dtype=torch.float64, estimator="dataset")
    fit_gram(layer, metadata, labels)
    for part in torch.randperm(101).split(16):
        layer(features[part], metadata[part], labels[part])
    expected = dataset_residual(features, metadata, labels, metadata, labels)
    np.testing.assert_allclose(layer.eval()(features, metadata), expected, atol=1e-10)


def test_needs_the_gram_matrix():
    layer = MetadataNorm(5, 2, 1, estimator="dataset")
    features, metadata, labels = data()
    with pytest.raises(RuntimeError, match=r"call mdnorm\.fit_gram\(model, metadata, labels\) first"):
        layer(features, metadata, labels)
    fit_gram(layer, metadata, labels)
    layer(features, metadata, labels)
    layer.reset_parameters()
    assert not layer.estimator.coefficients.any()
    with pytest.raises(RuntimeError, match="fit_gram"):
        layer(features, metadata, labels)


def test_collinear_training_set():
    """The authors' inverse of XᵀX fails here."""
    features, metadata, labels = data()
    layer = MetadataNorm(5, 4, 1, prior=0, dtype=torch.float64, estimator="dataset")
    redundant = torch.cat([metadata, metadata.sum(1, keepdim=True), torch.ones(101, 1)], 1)
    fit_gram(layer, redundant, labels)
    expected = dataset_residual(features, metadata, labels, metadata, labels)
    np.testing.assert_allclose(layer(features, redundant, labels), expected, atol=1e-9)


def test_batch_with_overflowed_features_does_not_enter_the_state():
    features, metadata, labels = data()
    layer = MetadataNorm(5, 2, 1, estimator="dataset")
    fit_gram(layer, metadata, labels)
    layer(features, metadata, labels)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    features[0, 0] = float("nan")
    layer(features, metadata, labels)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_gram_matrix_is_loaded_with_the_state():
    features, metadata, labels = data()
    layer = MetadataNorm(5, 2, 1, prior=10, estimator="dataset")
    fit_gram(layer, metadata, labels)
    layer(features[:50], metadata[:50], labels[:50])
    copy = MetadataNorm(5, 2, 1, prior=10, estimator="dataset")
    copy.load_state_dict(layer.state_dict())
    expected = layer(features[50:], metadata[50:], labels[50:])
    assert torch.equal(copy(features[50:], metadata[50:], labels[50:]), expected)
