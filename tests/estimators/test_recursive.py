import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnorm import MetadataNorm, fit_gram
from mdnorm.estimators import RecursiveEstimator
from mdnorm.functional import recursive_update
from reference import design_matrix, remove

PRIOR = RecursiveEstimator.prior


def batches(sizes, k_m=2, k_y=1, shape=(3, 2), seed=3, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    for n in sizes:
        metadata = offset + torch.randn(n, k_m, **options)
        labels = torch.randn(n, k_y, **options) + 0.3 * metadata[:, :1]
        effect = (metadata[:, :1] + 2 * labels.sum(1, keepdim=True)).reshape(n, *[1] * len(shape))
        yield torch.randn(n, *shape, **options) + effect + 7, metadata, labels


class NumpyRecursion:
    """Recursive least squares with forgetting in its inverse form: P⁻¹ ← λ P⁻¹ + XᵀX, the prior its floor."""

    def __init__(self, num_columns, window=None, momentum=None):
        self.window, self.momentum = window, momentum
        self.information = np.eye(num_columns) / PRIOR
        self.beta = np.zeros((num_columns, 6))

    def update(self, rows, features):
        n = len(rows)
        decay = max(1 - n / self.window, 1e-12) if self.window else 1 - (self.momentum or 0)
        values, vectors = np.linalg.eigh(self.information * (decay if n else 1.0))
        self.information = (vectors * np.maximum(values, 1 / PRIOR)) @ vectors.T + rows.T @ rows
        flat = features.reshape(n, 6)
        self.beta = self.beta + np.linalg.solve(self.information, rows.T @ (flat - rows @ self.beta))
        return np.linalg.inv(self.information)


class TestRecursion:
    @pytest.mark.parametrize("n", [1, 7, 20])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("memory", [{"window": 100}, {"momentum": 0.05}, {"momentum": None}])
    def test_equals_the_inverse_form(self, n, center, memory):
        layer = MetadataNorm(
            (3, 2), 2, 1, estimator="recursive", center=center, dtype=torch.float64, **memory
        )
        reference = NumpyRecursion(4, **memory)
        weight, mean = 0.0, np.zeros(2)
        for features, metadata, labels in batches([n] * 30):
            out = layer(features, metadata, labels)
            covariance = reference.update(design_matrix(metadata, labels), features.numpy())
            decay = 1 - n / 100 if "window" in memory else 1 - (memory["momentum"] or 0)
            weight = weight * decay + n
            mean = mean + (metadata.numpy().mean(0) - mean) * n / weight
            factor = layer.estimator.factor
            # The prior of 10⁴ sets the condition number, and with it what the inverse form rounds.
            np.testing.assert_allclose(factor @ factor.mT, covariance, atol=1e-8, rtol=1e-7)
            np.testing.assert_allclose(layer.estimator.all_coefficients.flatten(1), reference.beta, atol=1e-7)
            expected = remove(features, metadata.numpy(), reference.beta, mean, center)
            np.testing.assert_allclose(out, expected, atol=1e-7)
        evaluated = layer.eval()(features, metadata)
        np.testing.assert_allclose(evaluated, expected, atol=1e-7)

    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
        k_m=st.integers(1, 4),
        k_y=st.integers(0, 3),
        window=st.floats(5, 500),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=30)
    def test_over_shapes(self, sizes, k_m, k_y, window, seed):
        layer = MetadataNorm((3, 2), k_m, k_y, estimator="recursive", window=window, dtype=torch.float64)
        reference = NumpyRecursion(k_m + k_y + 1, window)
        for features, metadata, labels in batches(sizes, k_m, k_y, seed=seed):
            layer(features, metadata, labels if k_y else None)
            reference.update(design_matrix(metadata, labels), features.numpy())
        # Batches of one with a short window leave directions at the prior: condition number 10⁵ and more.
        np.testing.assert_allclose(
            layer.estimator.all_coefficients.flatten(1),
            reference.beta,
            atol=1e-5,
        )

    def test_without_forgetting_it_is_ridge_regression_over_all_samples(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", momentum=None, dtype=torch.float64)
        data = list(batches((1, 7, 20, 1, 20)))
        for batch in data:
            layer(*batch)
        f, m, y = (np.concatenate([batch[i].numpy() for batch in data]) for i in range(3))
        x = design_matrix(m, y)
        beta = np.linalg.solve(x.T @ x + np.eye(4) / PRIOR, x.T @ f.reshape(len(f), -1))
        np.testing.assert_allclose(layer.estimator.all_coefficients.flatten(1), beta, atol=1e-8)
        np.testing.assert_allclose(
            layer.eval()(f_ := torch.tensor(f), torch.tensor(m)),
            remove(f_, m, beta, m.mean(0), False),
            atol=1e-7,
        )

    def test_a_batch_beyond_the_window_forgets_the_past(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", window=50, dtype=torch.float64)
        (features, metadata, labels), new = batches((50, 60))
        layer(features + 100 * metadata[:, :1, None], metadata, labels)
        layer(*new)
        beta = np.linalg.lstsq(design_matrix(*new[1:]), new[0].numpy().reshape(60, -1), rcond=None)[0]
        # The prior draws to the past with a weight of 10⁻⁴ against 60 samples: 100 · 10⁻⁴ / 60.
        np.testing.assert_allclose(layer.estimator.all_coefficients.flatten(1), beta, atol=1e-3)

    @pytest.mark.parametrize("shape", [(3, 2, 4)])
    def test_channels_are_regressed_by_their_position_means(self, shape):
        layer = MetadataNorm(3, 2, 1, estimator="recursive", granularity="channel", dtype=torch.float64)
        plain = MetadataNorm(3, 2, 1, estimator="recursive", dtype=torch.float64)
        for features, metadata, labels in batches((20, 3), shape=shape):
            out = layer(features, metadata, labels)
            means = features.mean((2, 3))
            removed = means - plain(means, metadata, labels)
            torch.testing.assert_close(out, features - removed[:, :, None, None])

    def test_the_coefficients_are_constants_for_the_gradient(self):
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", dtype=torch.float64)
        for features, metadata, labels in batches((20, 20)):
            out = layer(features.requires_grad_(), metadata, labels)
            weight = torch.randn_like(out)
            (out * weight).sum().backward()
            assert torch.equal(features.grad, weight)


class TestStandardisation:
    """Columns far from zero: `fit_gram` gives the units in which the prior means the same for all."""

    def test_recursion_in_standardised_columns(self):
        data = list(batches((20, 20, 7), offset=1950.0))
        m, y = (np.concatenate([batch[i].numpy() for batch in data]) for i in (1, 2))
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", dtype=torch.float64)
        fit_gram(layer, m, y)
        columns = np.column_stack([m, y])
        mean, scale = columns.mean(0), columns.std(0)
        reference = NumpyRecursion(4, window=500)
        for features, metadata, labels in data:
            layer(features, metadata, labels)
            standardised = (np.column_stack([metadata, labels]) - mean) / scale
            reference.update(np.column_stack([standardised, np.ones(len(features))]), features.numpy())
        np.testing.assert_allclose(layer.estimator.all_coefficients.flatten(1), reference.beta, atol=1e-8)
        expected = reference.beta[:2] / scale[:2, None]
        np.testing.assert_allclose(layer.estimator.coefficients.flatten(1), expected, atol=1e-8)

    @pytest.mark.parametrize("center", [False, True])
    def test_does_not_change_what_is_removed(self, center):
        """The label part stays with `center`, too, whatever the columns are standardised by."""
        data = list(batches((200,) * 5, offset=2.0))
        outs = []
        for standardise in (False, True):
            layer = MetadataNorm(
                (3, 2), 2, 1, estimator="recursive", momentum=None, center=center, dtype=torch.float64
            )
            if standardise:
                fit_gram(layer, torch.cat([d[1] for d in data]), torch.cat([d[2] + 1 for d in data]))
            for features, metadata, labels in data:
                layer(features, metadata, labels + 1)
            outs.append(layer.eval()(data[0][0], data[0][1]))
        # They differ by the prior, 10⁻⁴ against 1000 samples.
        torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)

    def test_a_new_training_set_changes_the_units_and_not_the_effect(self):
        """Continual learning: `fit_gram` again for each stage."""
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive", center=True, dtype=torch.float64)
        first, second = batches((300, 300))
        fit_gram(layer, *first[1:])
        layer(*first)
        before = layer.estimator.factor @ layer.estimator.factor.mT
        shifted = 5 + 3 * second[1]
        x_old = (
            torch.cat([shifted, second[2]], 1) - layer.estimator.column_mean
        ) / layer.estimator.column_scale
        one = torch.ones(300, 1, dtype=torch.float64)
        predicted = torch.cat([x_old, one], 1) @ layer.estimator.all_coefficients.flatten(1)
        variance = (torch.cat([x_old, one], 1) @ before * torch.cat([x_old, one], 1)).sum(1)
        fit_gram(layer, shifted, second[2])
        x_new = (
            torch.cat([shifted, second[2]], 1) - layer.estimator.column_mean
        ) / layer.estimator.column_scale
        rows = torch.cat([x_new, one], 1)
        torch.testing.assert_close(rows @ layer.estimator.all_coefficients.flatten(1), predicted)
        after = layer.estimator.factor @ layer.estimator.factor.mT
        torch.testing.assert_close((rows @ after * rows).sum(1), variance)

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
        assert not layer.estimator.coefficients[2].any()

    @pytest.mark.parametrize("offset", [2000.0, 1.7e9])
    def test_unstandardised_columns_leave_the_state_finite(self, offset):
        """A year, a time stamp: badly conditioned, and still no NaN for ever."""
        layer = MetadataNorm((3, 2), 2, 1, estimator="recursive")
        for features, metadata, labels in batches([20] * 50, offset=offset):
            layer(features.float(), metadata, labels)
        assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


class TestUpdate:
    @given(n=st.integers(0, 40), k=st.integers(1, 8), decay=st.floats(0.05, 1), seed=st.integers(0, 1000))
    def test_equals_the_inverse(self, n, k, decay, seed):
        rng = np.random.default_rng(seed)
        root, rows = rng.normal(size=(k, k)) + 2 * np.eye(k), rng.normal(size=(n, k))
        if np.linalg.cond(root) > 1e3:
            return
        factor = recursive_update(torch.tensor(root), torch.tensor(rows), decay, 1e12)
        information = decay * np.linalg.inv(root @ root.T) + rows.T @ rows
        expected = np.linalg.inv(information)
        tolerance = 1e-12 * np.linalg.cond(information) * np.abs(expected).max()
        np.testing.assert_allclose(factor @ factor.mT, expected, atol=tolerance)

    def test_decay_as_a_tensor(self):
        root, rows = torch.randn(3, 3).double(), torch.randn(5, 3).double()
        decay = torch.tensor([0.9], dtype=torch.float64)
        assert torch.equal(recursive_update(root, rows, decay, 1e4), recursive_update(root, rows, 0.9, 1e4))

    @pytest.mark.parametrize(
        ("dtype", "steps", "tolerance"), [(torch.float32, 20_000, 2e-4), (torch.float64, 5000, 1e-12)]
    )
    def test_stays_positive_definite_over_many_steps(self, dtype, steps, tolerance):
        """The last column is zero (a constant that was standardised): nothing ever excites it.

        The same, over 10⁶ steps, is in benchmarks/recursive_stability.py.
        """
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(64, 2, 4, generator=generator, dtype=torch.float64)
        data[..., 3] = 0
        factor, decay = (PRIOR**0.5 * torch.eye(4)).to(dtype), 0.999
        information = np.eye(4) / PRIOR
        for step in range(steps):
            rows = data[step % 64]
            factor = recursive_update(factor, rows.to(dtype), decay, PRIOR)
            information = decay * information + (rows.mT @ rows).numpy()
            information[3, 3] = 1 / PRIOR
        covariance = (factor @ factor.mT).double()
        assert torch.linalg.eigvalsh(covariance)[0] > 0
        assert float(covariance[3, 3]) == pytest.approx(PRIOR, rel=tolerance)
        exact = np.linalg.inv(information[:3, :3])
        # Errors fade with the window, so they are those of about a thousand steps, not of all.
        np.testing.assert_allclose(covariance[:3, :3], exact, atol=tolerance * np.abs(exact).max())


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_does_not_enter_the_state(bad):
    layer = MetadataNorm((3, 2), 2, 1, estimator="recursive")
    (features, *columns), (first, *rest) = batches((9, 20))
    for seen in (False, True):
        before = state(layer)
        spoilt = features.float()
        spoilt[0, 1] = bad
        layer(spoilt, *columns)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key]), (key, seen)
        layer(first.float(), *rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_regressed_in_float32(dtype):
    layers = [MetadataNorm((3, 2), 2, 1, estimator="recursive") for _ in range(2)]
    for features, metadata, labels in batches((20, 20)):
        low = features.to(dtype)
        out = layers[0](low, metadata, labels)
        layers[1](low.float(), metadata, labels)
        assert out.dtype == dtype
    for key, value in layers[1].state_dict().items():
        assert torch.equal(layers[0].state_dict()[key], value), key


def test_an_empty_batch_leaves_the_state():
    layer = MetadataNorm((3, 2), 2, 1, estimator="recursive")
    full, empty = batches((9, 0))
    layer(full[0].float(), *full[1:])
    before = state(layer)
    assert layer(empty[0].float(), *empty[1:]).shape == (0, 3, 2)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


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


def test_takes_no_ridge():
    with pytest.raises(ValueError, match=r"estimator='recursive' has a prior of its own.*got 0\.1"):
        RecursiveEstimator(ridge=0.1)


def test_default_settings():
    estimator = RecursiveEstimator()
    assert (estimator.momentum, estimator.window) == (None, 500)
    assert estimator.uses_training_gram
