"""The design of a batch is the same from NumPy and from torch, and NumPy stays out where it must."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mdnorm
from mdnorm import MetadataNorm, centred_design, functional, weights
from mdnorm.centred_design import CentredDesign
from mdnorm.functional import Gram, coefficients
from mdnorm.functional import columns as design


def make_columns(n, k=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 3, k, dtype=torch.float64)
    return torch.randn(n, k, generator=generator, dtype=torch.float64) * scale + 10 * scale


def in_torch(monkeypatch):
    for module in (weights, coefficients):
        monkeypatch.setattr(module, "can_read", lambda tensor: False)
    for module in (weights, design, centred_design):
        monkeypatch.setattr(module, "can_leave_torch", lambda tensor: False)


def assert_equal(actual, expected, dtype):
    assert actual.dtype == expected.dtype == dtype
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    rtol = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("n", [0, 1, 7, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("own_mean", [False, True])
class TestBothWays:
    def designs(self, n, own_mean):
        columns = make_columns(n)
        mean = None if own_mean else make_columns(50, seed=1).mean(0)
        quick = centred_design.centred_design(columns, 3, mean)
        assert type(quick) is not CentredDesign
        return quick, CentredDesign(columns, 3, mean)

    def test_matrices(self, n, dtype, center, own_mean):
        quick, plain = self.designs(n, own_mean)
        other = make_columns(30, seed=2).mean(0)
        operator = functional.removal_operator(Gram.from_columns(make_columns(90, seed=3), 3), center=center)
        for a, b in ((quick, plain), (quick.about(other), plain.about(other))):
            assert_equal(a.basis(center, dtype), b.basis(center, dtype), dtype)
            assert_equal(a.moment_rows(dtype), b.moment_rows(dtype), dtype)
            for count in (None, torch.tensor([400.0], dtype=torch.float64)):
                actual = a.projected_rows(operator, dtype, count)
                assert_equal(actual, b.projected_rows(operator, dtype, count), dtype)

    def test_gram(self, n, dtype, center, own_mean):
        quick, plain = self.designs(n, own_mean)
        if not own_mean:
            assert not hasattr(quick, "gram")
            return
        for name in ("mean", "covariance", "count"):
            assert_equal(getattr(quick.gram, name), getattr(plain.gram, name), torch.float64)
        assert quick.gram.num_metadata == plain.gram.num_metadata == 3


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("estimator", ["dataset", "batch", "running"])
def test_training_is_the_same_both_ways(estimator, center, monkeypatch):
    results = []
    for quick in (True, False):
        if not quick:
            in_torch(monkeypatch)
        generator = torch.Generator().manual_seed(0)
        layer = MetadataNorm(
            6, 2, 1, estimator=estimator, center=center, momentum=0.3, dtype=torch.float64
        ).train()
        columns = make_columns(300, 3)
        mdnorm.fit_gram(layer, columns[:, :2], columns[:, 2:])
        seen = []
        for start, n in ((0, 40), (40, 7), (47, 0), (47, 60)):
            features = torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_()
            rows = columns[start : start + n]
            out = layer(features, rows[:, :2], rows[:, 2:])
            out.backward(torch.randn(n, 6, generator=generator, dtype=torch.float64))
            seen += [out.detach(), features.grad]
        results.append((seen, layer.state_dict()))
    (quick_seen, quick_state), (plain_seen, plain_state) = results
    torch.testing.assert_close(quick_seen, plain_seen, rtol=1e-9, atol=1e-9)
    assert quick_state.keys() == plain_state.keys()
    for name, value in plain_state.items():
        torch.testing.assert_close(quick_state[name], value, rtol=1e-9, atol=1e-12)
    assert float(plain_state["estimator.coefficients"].abs().max()) > 0


class TestNumpyStaysOut:
    def test_of_many_numbers(self):
        columns = torch.ones(centred_design._MOST_IN_NUMPY // 2 + 1, 2, dtype=torch.float64)
        assert type(centred_design.centred_design(columns, 1)) is CentredDesign
        assert type(centred_design.centred_design(columns[1:], 1)) is not CentredDesign

    def test_of_transforms(self):
        kinds = []

        def look(columns):
            kinds.append(type(centred_design.centred_design(columns, 1)))
            return columns

        torch.func.vmap(look)(torch.ones(2, 3, 2, dtype=torch.float64))
        assert kinds == [CentredDesign]

    def test_of_recorded_graphs(self):
        layer = MetadataNorm(4, 1, estimator="batch", check_finite=False)
        layer(torch.randn(9, 4), torch.randn(9, 1))
        layer.eval()
        features, one, two = torch.randn(5, 4), torch.randn(5, 1), torch.randn(5, 1)
        graph = make_fx(lambda f, m: layer(f, m))(features, one)
        torch.testing.assert_close(graph(features, two), layer(features, two))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_of_traced_functions(self):
        def columns_of(metadata):
            return functional.design_columns(metadata, check_finite=False)[0]

        one, two = torch.randn(5, 2), torch.randn(5, 2)
        traced = torch.jit.trace(columns_of, one)
        assert torch.equal(traced(two), two.double())


@pytest.mark.parametrize("estimator", ["dataset", "batch", "running"])
@pytest.mark.parametrize("huge", [1e30, 1e200, float("nan")])
def test_overflow_is_as_silent_as_in_torch(estimator, huge):
    layer = MetadataNorm(4, 1, estimator=estimator, check_finite=False)
    mdnorm.fit_gram(layer, torch.arange(10.0))
    metadata = np.array([huge, -huge, 0.0, 1.0])
    # A NumPy warning would be an error here.
    assert layer(torch.randn(4, 4), metadata).shape == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float16, torch.bfloat16, torch.float32])
def test_columns_of_any_dtype(dtype):
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    columns, width = functional.design_columns(values.to(dtype), values[:, :1].requires_grad_())
    assert width == 2
    assert not columns.requires_grad
    assert torch.equal(columns, torch.cat([values, values[:, :1]], 1).double().detach())
    assert torch.equal(values, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))


def test_columns_are_a_copy():
    metadata = torch.ones(3, 1, dtype=torch.float64)
    columns, _ = functional.design_columns(metadata)
    columns += 1
    assert torch.equal(metadata, torch.ones(3, 1, dtype=torch.float64))


def test_in_place_changes_of_the_state_are_counted():
    layer = MetadataNorm(4, 1, estimator="running")
    buffers = dict(layer.named_buffers())
    before = {name: buffer._version for name, buffer in buffers.items()}
    layer(torch.randn(9, 4), torch.randn(9))
    for name in ("coefficients", "gram_mean", "gram_covariance", "gram_count", "cross_covariance"):
        assert buffers[f"estimator.{name}"]._version > before[f"estimator.{name}"]


class TestPositiveDefiniteInverse:
    @pytest.mark.parametrize("k", [1, 2, 3, 6])
    @pytest.mark.parametrize("noise", [1.0, 1e-2])
    def test_inverts(self, k, noise):
        generator = np.random.default_rng(k)
        root = generator.normal(size=(k, 1)) + noise * generator.normal(size=(k, 8))
        matrix = root @ root.T / 8
        inverse = coefficients._positive_definite_inverse(matrix)
        np.testing.assert_allclose(inverse @ matrix, np.eye(k), atol=1e-15 * np.linalg.cond(matrix) * 8)
        np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-14 * np.linalg.cond(matrix))

    @pytest.mark.parametrize("k", [2, 3])
    @pytest.mark.parametrize("value", [1.0, float("nan")])
    def test_of_no_such_matrix(self, k, value):
        inverse = coefficients._positive_definite_inverse(np.full((k, k), value))
        assert inverse is None or not np.isfinite(inverse).all()
