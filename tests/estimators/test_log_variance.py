import numpy as np
import pytest
import torch

from mdnorm import MetadataNorm, recalibrate
from mdnorm.estimators import LogVarianceEstimator
from reference import design_matrix, weighted_least_squares


def batches(sizes, k_m=2, k_y=1, shape=(3, 2), seed=3):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    for n in sizes:
        metadata = 4 + torch.randn(n, k_m, **options)
        labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
        effect, spread = metadata.sum(1) + 2 * labels.sum(1), (0.4 * (metadata[:, 0] - 4)).exp()
        noise = torch.randn(n, *shape, **options)
        ones = [1] * len(shape)
        yield noise * spread.reshape(n, *ones) + effect.reshape(n, *ones), metadata, labels


class NumpyScale:
    """The estimator in plain numpy: all samples so far with their weights, and the log r² each had then."""

    def __init__(self, window):
        self.window = window
        self.seen, self.weights = [], []
        self.logs, self.log_weights = [], []

    def forward(self, features, metadata, labels):
        n, k_m = len(features), metadata.shape[1]
        flat = features.reshape(n, features.shape[1], -1)  # (N, C, positions), or D values with one position
        decay = max(0.0, 1 - n / self.window)
        self.seen.append((flat.mean(2), metadata, labels))
        self.weights = [w * decay for w in self.weights] + [1.0]
        f, m, y = (np.concatenate([batch[i] for batch in self.seen]) for i in range(3))
        weights = np.concatenate(
            [np.full(len(b[0]), w) for b, w in zip(self.seen, self.weights, strict=True)]
        )
        beta = weighted_least_squares(f, m, y, weights)
        self.mean_f, self.mean_m = (np.average(part, axis=0, weights=weights) for part in (f, m))
        squared = (flat - (design_matrix(metadata, labels) @ beta)[:, :, None]) ** 2
        x = design_matrix(m, y)
        rows = design_matrix(metadata, labels)
        noise = 1 - np.einsum("nk,kl,nl->n", rows, np.linalg.pinv((x * weights[:, None]).T @ x), rows)
        used = noise > 1e-3
        floor = 1e-6 * squared.mean((0, 2), keepdims=True)
        log = np.log(squared + floor) - np.log(np.where(used, noise, 1))[:, None, None]
        self.logs.append((log.mean(2), metadata, labels, noise * used))
        self.log_weights = [w * decay for w in self.log_weights] + [1.0]
        gamma = np.zeros((k_m, f.shape[1]))
        log, m, y = (np.concatenate([batch[i] for batch in self.logs]) for i in range(3))
        w = np.concatenate([b[3] * w for b, w in zip(self.logs, self.log_weights, strict=True)])
        if w.sum() > 0:
            x, total = design_matrix(m, y), w.sum()
            variance = np.average((m - np.average(m, axis=0, weights=w)) ** 2, axis=0, weights=w)
            penalty = np.zeros(x.shape[1])
            penalty[:k_m] = np.pi**2 / 2 / total * variance
            weighted = x * w[:, None] / total
            gamma = np.linalg.solve(weighted.T @ x + np.diag(penalty), weighted.T @ log)[:k_m]
        factor = np.exp(-0.5 * (metadata - self.mean_m) @ gamma)
        centre = self.mean_f[:, None]
        return (centre + (flat - centre) * factor[:, :, None]).reshape(features.shape), gamma


@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("k_y", [0, 1])
def test_equals_its_recursion_in_numpy(granularity, k_y):
    shape = (6,) if granularity == "element" else (3, 5)
    layer = MetadataNorm(
        shape if granularity == "element" else 3,
        2,
        k_y,
        estimator="batch",
        granularity=granularity,
        scale=True,
        window=100,
        dtype=torch.float64,
    )
    reference = NumpyScale(100)
    for features, metadata, labels in batches((20, 20, 7, 1, 1, 30), 2, k_y, shape):
        layer(features, metadata, labels if k_y else None)
        scaled = layer.scale_estimator.evaluate(features, metadata, (2,) if granularity == "channel" else ())
        expected, gamma = reference.forward(*(part.numpy() for part in (features, metadata, labels)))
        np.testing.assert_allclose(layer.scale_estimator.coefficients, gamma, atol=1e-8)
        np.testing.assert_allclose(scaled, expected, atol=1e-8)


def test_scaling_comes_before_the_removal_of_the_mean():
    """The regression of the mean is fitted on the scaled features, so nothing of it comes back."""
    layer = MetadataNorm(6, 2, 1, estimator="batch", scale=True, dtype=torch.float64)
    features, metadata, labels = next(batches((60,), shape=(6,)))
    out = layer(features, metadata, labels)
    slopes = np.linalg.lstsq(design_matrix(metadata, labels), out.numpy(), rcond=None)[0][:2]
    np.testing.assert_allclose(slopes, 0, atol=1e-10)


def log_variance_slopes(features, metadata, labels):
    """Of log r² on the design, by numpy."""
    x = design_matrix(metadata, labels)
    residual = features - x @ np.linalg.lstsq(x, features, rcond=None)[0]
    return np.linalg.lstsq(x, np.log(residual**2), rcond=None)[0][: metadata.shape[1]]


@pytest.mark.parametrize(
    ("estimator", "batch_size", "n"), [("running", 1, 1000), ("batch", 10, 3000), ("running", 100, 3000)]
)
def test_sites_with_scales_of_their_own(estimator, batch_size, n):
    rng = np.random.default_rng(0)
    site = rng.integers(0, 3, n)
    metadata = np.eye(3)[site][:, 1:]
    label = (rng.random((n, 1)) < 0.3 + 0.2 * site[:, None]).astype(float)
    spread = np.array([0.5, 1.0, 2.0])[site][:, None]
    features = spread * rng.normal(size=(n, 4)) + 0.3 * label + site[:, None] + 10
    layer = MetadataNorm(4, 2, 1, estimator=estimator, scale=True, window=n, dtype=torch.float64)
    data = [torch.tensor(part) for part in (features, metadata, label)]
    for part in torch.arange(n).split(batch_size):
        layer(*(block[part] for block in data))
    # Standard error of a slope of log r² (sd 2.2) between two groups of n / 3.
    error = 2.2 * np.sqrt(6 / n)
    before = log_variance_slopes(features, metadata, label)
    np.testing.assert_allclose(before, 2 * np.log([[2.0] * 4, [4.0] * 4]), atol=4 * error)
    recalibrate(layer, [tuple(data)])  # the mean; the scale stays that of the run
    out = layer.eval()(data[0], data[1]).numpy()  # no label is needed
    # The running fit used the coefficients of its time, and scales about the overall mean, which moves the
    # class means a little: not exactly zero on the same data, but within the error.
    assert np.abs(log_variance_slopes(out, metadata, label)).max() < 2 * error
    effect = np.linalg.lstsq(design_matrix(metadata, label), out, rcond=None)[0]
    np.testing.assert_allclose(effect[:2], 0, atol=1e-8)
    # Three standard errors of a difference of two groups of n / 3 of features with sd 1.
    np.testing.assert_allclose(effect[2], 0.3, atol=3 * np.sqrt(6 / n))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_the_first_samples_do_not_blow_up(batch_size):
    """With no more samples than columns the residuals are zero: their logarithm says nothing."""
    for seed in range(20):
        layer = MetadataNorm(4, 3, 1, estimator="running", scale=True)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(12):
            features = torch.randn(batch_size, 4, generator=generator)
            metadata = torch.randn(batch_size, 3, generator=generator)
            label = torch.randn(batch_size, 1, generator=generator)
            layer(features, metadata, label)
            scaled = layer.scale_estimator.evaluate(features, metadata, ())
            assert torch.isfinite(scaled).all()
            assert (scaled - layer.scale_estimator.feature_mean).abs().max() < 30


def test_the_first_sample_of_a_site_does_not_blow_up():
    """The fit goes through it, so its residual is zero, however many samples of other sites came before."""
    for seed in range(10):
        layer = MetadataNorm(4, 3, estimator="running", scale=True, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for site in [0] * 12 + [1, 0, 2, 1, 0, 2]:
            features = torch.randn(1, 4, generator=generator, dtype=torch.float64)
            metadata = torch.eye(3)[[site]]
            layer(features, metadata)
            scaled = layer.scale_estimator.evaluate(features, metadata.double(), ())
            assert (scaled - layer.scale_estimator.feature_mean).abs().max() < 30


def test_units_that_are_always_zero():
    layer = MetadataNorm(3, 2, 1, estimator="batch", scale=True)
    for features, metadata, labels in batches((20, 20, 1), shape=(3,)):
        features[:, 1] = 0
        out = layer(features.float(), metadata, labels)
        assert torch.isfinite(out).all()
        assert not out[:, 1].any()


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_one_and_none(n):
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", scale=True, dtype=torch.float64)
    for size in (n, 20, n):
        features, metadata, labels = next(batches((size,)))
        assert torch.isfinite(layer.train()(features, metadata, labels)).all()
        assert torch.isfinite(layer.eval()(features, metadata)).all()
    assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_does_not_enter_the_state(bad):
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", scale=True)
    first, second = batches((20, 9))
    layer(first[0].float(), *first[1:])
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    features = second[0].float()
    features[0, 0, 0] = bad
    layer(features, *second[1:])
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_factors_are_constants_for_the_gradient():
    layer = MetadataNorm(6, 2, 1, estimator="recursive", scale=True, dtype=torch.float64)
    for features, metadata, labels in batches((40, 40), shape=(6,)):
        out = layer(features.requires_grad_(), metadata, labels)
        weight = torch.randn_like(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), features)
    estimator = layer.scale_estimator
    factor = torch.exp(-0.5 * (metadata - estimator.gram_mean[:2]) @ estimator.coefficients)
    assert (factor.log().abs() > 0.1).any()
    torch.testing.assert_close(gradient, weight * factor)


def test_evaluation_before_training_changes_nothing():
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", scale=True).eval()
    features, metadata, _ = next(batches((9,)))
    assert torch.equal(layer(features, metadata), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = MetadataNorm((3, 2), 2, 1, estimator="batch", scale=True)
    exact = MetadataNorm((3, 2), 2, 1, estimator="batch", scale=True)
    for features, metadata, labels in batches((30, 30)):
        low = features.to(dtype)
        assert layer(low, metadata, labels).dtype == dtype
        exact(low.float(), metadata, labels)
    # The scale's state is the same: half-precision features are regressed in float32.
    for key in ("coefficients", "log_mean", "cross_covariance"):
        torch.testing.assert_close(
            getattr(layer.scale_estimator, key), getattr(exact.scale_estimator, key), rtol=1e-4, atol=1e-5
        )


def test_default_settings():
    estimator = LogVarianceEstimator()
    assert (estimator.momentum, estimator.window) == (None, 2000)
    assert MetadataNorm(3, 1, estimator="batch").scale_estimator is None
    assert MetadataNorm(3, 1, scale=True, window=70).scale_estimator.window == 70


def test_has_no_intercept_to_remove():
    with pytest.raises(ValueError, match="give center to the layer's estimator"):
        LogVarianceEstimator(center=True)
    MetadataNorm(4, 1, scale=True, center=True)(torch.randn(20, 4), torch.randn(20, 1))
