import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnorm import MetadataNorm, fit_gram
from reference import design_matrix, remove


def batches(sizes, k_m=2, k_y=1, shape=(3, 2), seed=3, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    for n in sizes:
        metadata = offset + torch.randn(n, k_m, **options)
        labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
        effect = (metadata[:, :1] + 2 * labels.sum(1, keepdim=True)).reshape(n, *[1] * len(shape))
        yield torch.randn(n, *shape, **options) + effect + 7, metadata, labels


class NumpyRecursion:
    """R-MDN's recursion on the rows z = [y, 1, m], in the units of a layer that has seen its first batch."""

    def __init__(self, layer):
        estimator = layer.estimator
        self.origin, self.scale = estimator.origin.numpy(), estimator.scale.numpy()
        self.window, self.num_labels = estimator.window, estimator.num_labels
        self.covariance = np.eye(len(self.origin)) / estimator.prior
        self.beta = np.zeros((len(self.origin), estimator.num_values))
        self.weight, self.mean = 0.0, np.zeros(estimator.num_metadata)

    def update(self, features, metadata, labels):
        n, p = len(features), self.num_labels + 1
        decay = 1 - n / self.window
        rows = np.column_stack([labels, np.ones(n), metadata])
        rows = (rows - self.origin) * self.scale
        self.covariance = np.linalg.inv(decay * np.linalg.inv(self.covariance) + rows.T @ rows)
        self.beta += self.covariance @ rows.T @ (features.reshape(n, -1).numpy() - rows @ self.beta)
        self.weight = decay * self.weight + n
        self.mean += (metadata.numpy() - self.mean).sum(0) / max(self.weight, 1)
        # Of the columns themselves, in the order [m, y, 1].
        slopes = np.delete(self.beta * self.scale[:, None], p - 1, 0)
        intercept = self.beta[p - 1] - np.delete(self.origin, p - 1) @ slopes
        self.plain = np.vstack([slopes[p - 1 :], slopes[: p - 1], intercept])

    def remove(self, features, metadata, center):
        return remove(features, metadata.numpy(), self.plain, self.mean, center)


class TestRecursion:
    @pytest.mark.parametrize("n", [1, 7, 20])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("window", [100, math.inf])
    @pytest.mark.parametrize("prior", [1e-4, 1.0])
    def test_equals_the_form_of_its_authors(self, n, center, window, prior):
        layer = MetadataNorm(
            (3, 2),
            2,
            1,
            estimator="recursive",
            center=center,
            window=window,
            prior=prior,
            dtype=torch.float64,
        )
        reference = None
        for batch in batches([n] * 30):
            out = layer(*batch)
            reference = reference or NumpyRecursion(layer)
            reference.update(*batch)
            np.testing.assert_allclose(out, reference.remove(*batch[:2], center), atol=1e-8)
            np.testing.assert_allclose(layer.coefficients.flatten(1), reference.plain[:2], atol=1e-8)
        evaluated = layer.eval()(*batch[:2])
        np.testing.assert_allclose(evaluated, reference.remove(*batch[:2], center), atol=1e-8)

    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
        k_m=st.integers(1, 4),
        k_y=st.integers(0, 3),
        window=st.floats(31, 500),
        prior=st.sampled_from([1e-4, 1.0]),
        center=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=30)
    def test_over_shapes(self, sizes, k_m, k_y, window, prior, center, seed):
        layer = MetadataNorm(
            (3, 2),
            k_m,
            k_y,
            estimator="recursive",
            center=center,
            window=window,
            prior=prior,
            dtype=torch.float64,
        )
        reference = None
        for features, metadata, labels in batches(sizes, k_m, k_y, seed=seed):
            out = layer(features, metadata, labels if k_y else None)
            if not len(features):
                continue
            reference = reference or NumpyRecursion(layer)
            reference.update(features, metadata, labels)
            np.testing.assert_allclose(out, reference.remove(features, metadata, center), atol=1e-8)
            np.testing.assert_allclose(layer.coefficients.flatten(1), reference.plain[:k_m], atol=1e-8)

    def test_without_forgetting_it_is_ridge_regression_over_all_samples(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", window=math.inf, dtype=torch.float64)
        data = list(batches((1, 7, 20, 1, 20)))
        f, m, y = (torch.cat([batch[i] for batch in data]) for i in range(3))
        fit_gram(layer, m, y)
        for batch in data:
            layer(*batch)
        x = design_matrix(m, y)
        mean, scale = x.mean(0), x.std(0)
        mean[-1], scale[-1] = 0, 1
        z = (x - mean) / scale
        beta = np.linalg.solve(z.T @ z + np.eye(4), z.T @ f.flatten(1).numpy()) / scale[:, None]
        np.testing.assert_allclose(layer.coefficients.flatten(1), beta[:2], atol=1e-8)
        expected = remove(f, m.numpy(), beta, mean[:2], False)
        np.testing.assert_allclose(layer.eval()(f, m), expected, atol=1e-8)

    def test_a_batch_beyond_the_window_forgets_the_past_and_the_prior(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", window=50, dtype=torch.float64)
        (features, metadata, labels), new = batches((50, 60))
        layer(features + 100 * metadata[:, :1, None], metadata, labels)
        layer(*new)
        beta = np.linalg.lstsq(design_matrix(*new[1:]), new[0].flatten(1).numpy(), rcond=None)[0]
        np.testing.assert_allclose(layer.coefficients.flatten(1), beta[:2], atol=1e-8)

    def test_channels_are_regressed_by_their_position_means(self):
        layer = MetadataNorm(3, 2, 1, estimator="recursive", granularity="channel", dtype=torch.float64)
        plain = MetadataNorm(3, 2, 1, estimator="recursive", dtype=torch.float64)
        for features, metadata, labels in batches((20, 3), shape=(3, 2, 4)):
            out = layer(features, metadata, labels)
            means = features.mean((2, 3))
            removed = means - plain(means, metadata, labels)
            torch.testing.assert_close(out, features - removed[:, :, None, None])

    def test_the_coefficients_are_constants_for_the_gradient(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", decay=0, dtype=torch.float64)
        for features, metadata, labels in batches((20, 20)):
            out = layer(features.requires_grad_(), metadata, labels)
            weight = torch.randn_like(out)
            (out * weight).sum().backward()
            assert torch.equal(features.grad, weight)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-11)])
    def test_stays_right_over_many_steps(self, dtype, tolerance):
        """The last column is constant: nothing ever excites it."""
        steps, decay = 5000, 0.999
        layer = MetadataNorm(1, 3, 0, estimator="recursive", window=2000, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        metadata = torch.randn(steps, 2, 3, generator=generator, dtype=torch.float64)
        metadata[..., 2] = 3
        features = metadata.sum(2, keepdim=True) + torch.randn(steps, 2, 1, generator=generator)
        for batch in zip(features.to(dtype), metadata, strict=True):
            layer(*batch)
        root = np.repeat(decay ** (np.arange(steps)[::-1] / 2), 2)[:, None]
        estimator = layer.estimator
        origin, scale = estimator.origin.numpy()[:3], estimator.scale.numpy()[:3]
        rows = np.column_stack([np.ones(2 * steps), metadata[..., :2].reshape(-1, 2)])
        rows = (rows - origin) * scale * root
        # Of the prior, 0.999⁵⁰⁰⁰ = 0.7 % of a sample are left.
        rows = np.vstack([rows, decay ** (steps / 2) * np.eye(3)])
        values = np.vstack([features.reshape(-1, 1).numpy() * root, np.zeros((3, 1))])
        beta = np.linalg.lstsq(rows, values, rcond=None)[0] * scale[:, None]
        np.testing.assert_allclose(layer.coefficients[:2], beta[1:], atol=tolerance)
        assert not layer.coefficients[2].any()
        assert np.linalg.eigvalsh(estimator.gram).min() > -1e-15
        gram = rows[:-3].T @ rows[:-3] / (root**2).sum()
        np.testing.assert_allclose(estimator.gram[:3, :3], gram, atol=1e-11 * np.abs(gram).max())


class TestUnits:
    """Columns far from zero: the first batch or `fit_gram` gives units in which one prior suits all."""

    def test_recursion_in_the_units_of_the_training_set(self):
        data = list(batches((20, 20, 7), offset=1950.0))
        m, y = (torch.cat([batch[i] for batch in data]) for i in (1, 2))
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", dtype=torch.float64)
        fit_gram(layer, m, y)
        reference = NumpyRecursion(layer)
        columns = np.column_stack([y, m])
        np.testing.assert_allclose(np.delete(reference.origin, 1), columns.mean(0))
        np.testing.assert_allclose(np.delete(reference.scale, 1), 1 / columns.std(0))
        for batch in data:
            layer(*batch)
            reference.update(*batch)
        np.testing.assert_allclose(layer.coefficients.flatten(1), reference.plain[:2], atol=1e-8)

    @pytest.mark.parametrize("center", [False, True])
    def test_do_not_change_what_is_removed(self, center):
        """The label part stays with `center`, too, whatever the columns are standardised by."""
        data = list(batches((200,) * 5, offset=2.0))
        outs = []
        for standardise in (False, True):
            layer = MetadataNorm(
                (3, 2),
                2,
                1,
                estimator="recursive",
                window=math.inf,
                prior=1e-4,
                center=center,
                dtype=torch.float64,
            )
            if standardise:
                fit_gram(layer, torch.cat([d[1] for d in data]), torch.cat([d[2] + 1 for d in data]))
            for features, metadata, labels in data:
                layer(features, metadata, labels + 1)
            outs.append(layer.eval()(data[0][0], data[0][1]))
        # They differ by the prior, 10⁻⁴ against 1000 samples.
        torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)

    def test_a_new_training_set_changes_nothing(self):
        """Continual learning: `fit_gram` again for each stage."""
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", center=True, dtype=torch.float64)
        first, second = batches((300, 300))
        fit_gram(layer, *first[1:])
        layer(*first)
        before = state(layer)
        fit_gram(layer, 5 + 3 * second[1], second[2])
        assert_state(layer, before)

    def test_a_constant_column_of_the_training_set(self):
        layer = MetadataNorm((3, 2), 3, 1, estimator="recursive", dtype=torch.float64)
        plain = MetadataNorm((3, 2), 2, 1, estimator="recursive", dtype=torch.float64)
        features, metadata, labels = next(batches((100,)))
        constant = torch.cat([metadata, torch.full((100, 1), 3.0)], 1)
        fit_gram(layer, constant, labels)
        fit_gram(plain, metadata, labels)
        for part in torch.arange(100).split(9):
            out = layer(features[part], constant[part], labels[part])
            expected = plain(features[part], metadata[part], labels[part])
            torch.testing.assert_close(out, expected)
        assert not layer.coefficients[2].any()

    @pytest.mark.parametrize("n", [1, 20])
    @pytest.mark.parametrize("offset", [2000.0, 1.7e9])
    def test_unstandardised_columns_leave_the_state_finite(self, offset, n):
        """A year, a time stamp: of one sample, which has no deviation, the unit is its size."""
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive")
        for features, metadata, labels in batches([n] * 50, offset=offset):
            assert torch.isfinite(layer(features.float(), metadata, labels)).all()
        assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_state(layer, expected):
    for key, value in layer.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_does_not_enter_the_state(bad):
    layer = MetadataNorm((3, 2), 2, 1, estimator="recursive")
    (features, *columns), (first, *rest) = batches((9, 20))
    learned = {"coefficients", "mean", "gram", "cross", "weight", "coefficients_weight", "prior_weight"}
    for seen in (False, True):
        before = state(layer)
        spoilt = features.float()
        spoilt[0, 1] = bad
        layer(spoilt, *columns)
        after = state(layer)
        # The units come from the metadata alone, which are finite.
        for key in after if seen else {f"estimator.{name}" for name in learned}:
            assert torch.equal(after[key], before[key]), (key, seen)
        layer(first.float(), *rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_regressed_in_float32(dtype):
    layers = [MetadataNorm((3, 2), 2, 1, estimator="recursive") for _ in range(2)]
    for features, metadata, labels in batches((20, 20)):
        low = features.to(dtype)
        out = layers[0](low, metadata, labels)
        layers[1](low.float(), metadata, labels)
        assert out.dtype == dtype
    assert_state(layers[0], state(layers[1]))


def test_an_empty_batch_leaves_the_state():
    layer = MetadataNorm((3, 2), 2, 1, estimator="recursive")
    full, empty = batches((9, 0))
    for seen in (False, True):
        before = state(layer)
        assert layer(empty[0].float(), *empty[1:]).shape == (0, 3, 2), seen
        assert_state(layer, before)
        layer(full[0].float(), *full[1:])


@pytest.mark.parametrize("prior", [1.0, 100.0])
def test_a_first_batch_without_weight_is_left_as_it_is(prior):
    layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", prior=prior, dtype=torch.float64)
    features, metadata, labels = next(batches((9,)))
    assert torch.equal(layer(features, metadata, labels, weights=torch.zeros(9)), features)
    reference = MetadataNorm((3, 2), 2, 1, estimator="recursive", prior=prior, dtype=torch.float64)
    out = layer(features, metadata, labels)
    torch.testing.assert_close(out, reference(features, metadata, labels))


def test_many_samples_need_no_square_matrix_of_them():
    """An N×N matrix of 20 000 samples would take 3.2 GB: the largest tensor is the design."""
    layer = MetadataNorm(1, 2, 1, estimator="recursive", dtype=torch.float64)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else [out]
            largest.append(max((t.numel() for t in tensors if isinstance(t, torch.Tensor)), default=0))
            return out

    batch = next(batches((20_000,), shape=(1,)))
    with Watch():
        layer(*batch)
    assert max(largest) <= 2 * 20_000 * 4


def test_default_settings():
    estimator = MetadataNorm(3, 1, estimator="recursive").estimator
    assert (estimator.window, estimator.prior, estimator.averaging) == (500, 1, 0)
    assert estimator.prior_on_all
