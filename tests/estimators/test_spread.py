import numpy as np
import pytest
import torch

from mdnorm import MetadataNorm, recalibrate
from reference import SpreadReplay, design_matrix


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
    dims = (2,) if granularity == "channel" else ()
    reference = None
    for features, metadata, labels in batches((20, 20, 7, 1, 1, 30), 2, k_y, shape):
        layer(features, metadata, labels if k_y else None)
        spread = layer.spread
        rows = np.column_stack([labels, np.ones(len(labels)), metadata])
        rows = (rows - spread.origin.numpy()) * spread.scale.numpy()
        reference = reference or SpreadReplay(spread)
        reference.step(rows, features.numpy())
        expected = reference.evaluate(rows, features.numpy())
        np.testing.assert_allclose(spread.coefficients, reference.gamma, atol=1e-8)
        np.testing.assert_allclose(spread.evaluate(features, metadata, dims), expected, atol=1e-8)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_factor_is_kept_within_a_tenth_and_ten(sign):
    layer = MetadataNorm(6, 2, 1, estimator="batch", scale=True, dtype=torch.float64)
    for batch in batches((60, 60), shape=(6,)):
        layer(*batch)
    far = torch.full((5, 2), 4.0, dtype=torch.float64)
    far[:, 0] += 1000 * sign
    features = torch.randn(5, 6, dtype=torch.float64)
    spread = layer.spread
    centre = spread.cross[1]
    factor = (spread.evaluate(features, far, ()) - centre) / (features - centre)
    torch.testing.assert_close(factor, torch.full_like(factor, 10.0**-sign))


def test_scaling_comes_before_the_removal_of_the_mean():
    """The regression of the mean is fitted on the scaled features, so nothing of it comes back."""
    layer = MetadataNorm(6, 2, 1, estimator="batch", scale=True, prior=0, dtype=torch.float64)
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
    layer = MetadataNorm(4, 2, 1, estimator=estimator, scale=True, window=n, prior=0, dtype=torch.float64)
    data = [torch.tensor(part) for part in (features, metadata, label)]
    for part in torch.arange(n).split(batch_size):
        layer(*(block[part] for block in data))
    # Standard error of a slope of log r² (sd 2.2) between two groups of n / 3.
    error = 2.2 * np.sqrt(6 / n)
    before = log_variance_slopes(features, metadata, label)
    np.testing.assert_allclose(before, 2 * np.log([[2.0] * 4, [4.0] * 4]), atol=4 * error)
    recalibrate(layer, [tuple(data)], shrink=False)  # the mean; the scale stays that of the run
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
            scaled = layer.spread.evaluate(features, metadata, ())
            assert torch.isfinite(scaled).all()
            assert (scaled - layer.spread.cross[layer.spread.num_labels]).abs().max() < 30


def test_the_first_sample_of_a_site_does_not_blow_up():
    """The fit goes through it, so its residual is zero, however many samples of other sites came before."""
    for seed in range(10):
        layer = MetadataNorm(4, 3, estimator="running", scale=True, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for site in [0] * 12 + [1, 0, 2, 1, 0, 2]:
            features = torch.randn(1, 4, generator=generator, dtype=torch.float64)
            metadata = torch.eye(3)[[site]]
            layer(features, metadata)
            scaled = layer.spread.evaluate(features, metadata.double(), ())
            assert (scaled - layer.spread.cross[layer.spread.num_labels]).abs().max() < 30


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
    layer = MetadataNorm(6, 2, 1, estimator="recursive", scale=True, decay=0, dtype=torch.float64)
    for features, metadata, labels in batches((40, 40), shape=(6,)):
        out = layer(features.requires_grad_(), metadata, labels)
        weight = torch.randn_like(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), features)
    spread = layer.spread
    rows = (metadata - spread.origin[2:]) * spread.scale[2:]
    factor = torch.exp(-0.5 * (rows - spread.mean) @ spread.coefficients)
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
    for key, value in exact.spread.state_dict().items():
        torch.testing.assert_close(layer.spread.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_default_settings():
    assert MetadataNorm(3, 1, estimator="batch").spread is None
    assert MetadataNorm(3, 1, scale=True).spread.window == 2000
    assert MetadataNorm(3, 1, scale=True, window=70).spread.window == 70


def test_has_no_intercept_to_remove():
    layer = MetadataNorm(4, 1, scale=True, center=True)
    layer(torch.randn(20, 4), torch.randn(20, 1))
    assert (layer.spread.center, layer.estimator.center) == (False, True)
