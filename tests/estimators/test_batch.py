import numpy as np
import pytest
import torch

from mdnorm import MetadataNorm
from mdnorm.estimators import BatchEstimator
from reference import remove, residual


def batches(sizes=(20, 20, 7, 1, 20), k_m=2, k_y=1, shape=(3, 2)):
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    for n in sizes:
        metadata = 4 + torch.randn(n, k_m, **options)
        labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
        features = torch.randn(n, *shape, **options) + metadata[:, :1, None] + 2 * labels[:, :, None]
        yield features, metadata, labels


def weighted_fit(seen, weights):
    """Weighted least squares over all samples so far: what the running moments must equal."""
    features = np.concatenate([f.numpy().reshape(len(f), -1) for f, _, _ in seen])
    metadata, labels = (np.concatenate([b[i].numpy() for b in seen]) for i in (1, 2))
    x = np.column_stack([metadata, labels, np.ones(len(metadata))])
    root = np.sqrt(np.concatenate([np.full(len(b[0]), w) for b, w in zip(seen, weights, strict=True)]))[
        :, None
    ]
    beta = np.linalg.lstsq(x * root, features * root, rcond=None)[0]
    return beta, (metadata * root**2).sum(0) / (root**2).sum()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.3, 1.0])
def test_evaluation_is_weighted_least_squares_over_the_past(center, momentum):
    layer = MetadataNorm(
        (3, 2), 2, 1, estimator="batch", momentum=momentum, center=center, dtype=torch.float64
    )
    seen, weights = [], []
    for features, metadata, labels in batches((20, 20, 7, 1, 20)):
        out = layer.train()(features, metadata, labels)
        expected = residual(features, metadata, labels, center)
        if len(features) > 4:
            np.testing.assert_allclose(out, expected, atol=1e-10)
        decay = 1 if momentum is None else 1 - momentum
        seen, weights = [*seen, (features, metadata, labels)], [w * decay for w in weights] + [1.0]
    beta, mean = weighted_fit(seen, weights)
    features, metadata, _ = next(iter(batches((9,))))
    shaped = beta.reshape(len(beta), 3, 2)
    effect = np.einsum("nk,kab->nab", (metadata.numpy() - (0 if center else mean)), shaped[:2])
    expected = features.numpy() - effect - (shaped[-1] if center else 0)
    np.testing.assert_allclose(layer.eval()(features, metadata), expected, atol=1e-9)
    assert remove is not None
    assert float(layer.estimator.gram_count) == pytest.approx(
        sum(w * len(b[0]) for w, b in zip(weights, seen, strict=True))
    )


def test_batches_of_one_add_up_to_the_fit_over_all():
    """A batch of one has no variation of its own; the running moments see that between batches."""
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", momentum=None, dtype=torch.float64)
    data = next(iter(batches((40,))))
    for i in range(40):
        single = [part[i : i + 1] for part in data]
        torch.testing.assert_close(layer(*single), single[0])
    expected = residual(*data)
    np.testing.assert_allclose(layer.eval()(data[0], data[1]), expected, atol=1e-9)


def test_channel_granularity_keeps_moments_of_the_position_means():
    layer = MetadataNorm(3, 2, 1, estimator="batch", granularity="channel", dtype=torch.float64)
    features, metadata, labels = next(iter(batches((30,), shape=(3, 4))))
    layer(features, metadata, labels)
    torch.testing.assert_close(layer.estimator.feature_mean, features.mean((0, 2)))
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
    layer = MetadataNorm(2, 1, estimator="batch", momentum=0.01, dtype=torch.float64)
    features, metadata = torch.randn(50, 2).double(), torch.randn(50).double()
    out = layer(features, metadata)
    torch.testing.assert_close(layer.eval()(features, metadata), out)


def test_default_settings():
    estimator = BatchEstimator()
    assert (estimator.momentum, estimator.ridge, estimator.center) == (0.1, 0, False)
    assert not estimator.is_allocated
