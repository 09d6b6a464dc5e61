import math

import numpy as np
import pytest
import torch

from mdnorm import MetadataNorm
from reference import remove, residual, weighted_least_squares


def batches(sizes=(20, 20, 7, 1, 20), k_m=2, k_y=1, shape=(3, 2)):
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    for n in sizes:
        metadata = 4 + torch.randn(n, k_m, **options)
        labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
        features = torch.randn(n, *shape, **options) + metadata[:, :1, None] + 2 * labels[:, :, None]
        yield features, metadata, labels


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("prior", [0, 3])
@pytest.mark.parametrize("window", [math.inf, 60, 20])
def test_evaluation_is_weighted_least_squares_over_the_past(window, prior, center):
    options = {"window": window, "prior": prior, "center": center, "dtype": torch.float64}
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", **options)
    seen, weights = [], np.zeros(0)
    for batch in batches():
        out, n = layer.train()(*batch), len(batch[0])
        if n > 4:
            expected = residual(*batch, center, share=prior / (prior + n))
            np.testing.assert_allclose(out, expected, atol=1e-10)
        seen.append(batch)
        weights = np.concatenate([weights * (1 - n / window), np.ones(n)])
    f, m, y = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    share = prior / (prior + weights.sum())
    beta = weighted_least_squares(f.reshape(len(f), -1), m, y, weights, share)
    features, metadata, _ = next(batches((9,)))
    expected = remove(features, metadata.numpy(), beta, np.average(m, 0, weights), center)
    np.testing.assert_allclose(layer.eval()(features, metadata), expected, atol=1e-9)
    assert float(layer.estimator.weight) == pytest.approx(weights.sum())


def test_batches_of_one_add_up_to_the_fit_over_all():
    """A batch of one has no variation of its own; the running moments see that between batches."""
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", window=math.inf, prior=0, dtype=torch.float64)
    data = next(batches((40,)))
    for i in range(40):
        single = [part[i : i + 1] for part in data]
        torch.testing.assert_close(layer(*single), single[0])
    expected = residual(*data)
    np.testing.assert_allclose(layer.eval()(data[0], data[1]), expected, atol=1e-9)


def test_channel_granularity_keeps_moments_of_the_position_means():
    layer = MetadataNorm(3, 2, 1, estimator="batch", granularity="channel", dtype=torch.float64)
    features, metadata, labels = next(batches((30,), shape=(3, 4)))
    layer(features, metadata, labels)
    estimator = layer.estimator
    intercept = estimator.num_labels
    torch.testing.assert_close(estimator.cross[intercept], features.mean((0, 2)))
    wider = torch.randn(5, 3, 11, dtype=torch.float64)
    assert layer.eval()(wider, metadata[:5]).shape == (5, 3, 11)


def test_batch_with_overflowed_features_does_not_enter_the_state():
    layer = MetadataNorm(2, 1, estimator="batch")
    layer(torch.randn(8, 2), torch.randn(8))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    features = torch.randn(8, 2)
    features[3, 1] = float("inf")
    assert not torch.isfinite(layer(features, torch.randn(8))).all()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_first_batch_counts_in_full():
    layer = MetadataNorm(2, 1, estimator="batch", window=5000, dtype=torch.float64)
    features, metadata = torch.randn(50, 2).double(), torch.randn(50).double()
    out = layer(features, metadata)
    torch.testing.assert_close(layer.eval()(features, metadata), out)


def test_default_settings():
    estimator = MetadataNorm(4, 1, estimator="batch").estimator
    assert (estimator.window, estimator.prior, estimator.center) == (500, 1, False)
    assert (estimator.gram_source, estimator.adjoint_source) == ("batch", "batch")
    assert MetadataNorm(None, 1, estimator="batch").estimator is None
