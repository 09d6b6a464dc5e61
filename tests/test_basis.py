import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from mdnorm import basis, metadata_norm


def values(n=50, seed=0):
    return np.random.default_rng(seed).gamma(3.0, 20.0, n)


class TestPolynomial:
    @given(
        degree=st.integers(1, 8),
        low=st.floats(-1e6, 1e6),
        width=st.floats(1e-3, 1e6),
        seed=st.integers(0, 99),
    )
    def test_equals_vander(self, degree, low, width, seed):
        x = low + width * np.random.default_rng(seed).random(20)
        high = low + width
        scaled = (x - (low + high) / 2) / ((high - low) / 2)
        columns = basis.polynomial(x, degree, low=low, high=high)
        # The mapping loses what the midpoint and the width round to.
        tolerance = 1e-14 * degree * (1 + abs(low) / width)
        np.testing.assert_allclose(columns, np.vander(scaled, degree + 1, True)[:, 1:], atol=tolerance)

    def test_dtype_and_shape(self):
        for array in (np.arange(5), torch.arange(5), torch.arange(5.0)[:, None], [0, 1, 2, 3, 4]):
            columns = basis.polynomial(array, 2, low=0, high=4)
            assert columns.dtype.is_floating_point
            torch.testing.assert_close(columns[:, 1].double(), torch.tensor([1, 0.25, 0, 0.25, 1]).double())
        assert basis.polynomial(torch.ones(3).half(), 1, low=0, high=1).dtype == torch.float32
        assert basis.polynomial(torch.ones(3).double(), 1, low=0, high=1).dtype == torch.float64
        assert basis.polynomial(torch.ones(0), 3, low=0, high=1).shape == (0, 3)

    def test_the_range_does_not_change_what_the_layer_removes(self):
        x, features = values(), torch.randn(50, 4, dtype=torch.float64)
        outs = [
            metadata_norm(features, basis.polynomial(x, 3, low=low, high=high))
            for low, high in ((x.min(), x.max()), (0, 1000))
        ]
        torch.testing.assert_close(outs[0], outs[1], atol=1e-7, rtol=0)


class TestSpline:
    @given(
        degree=st.integers(0, 5),
        inner=st.integers(0, 6),
        seed=st.integers(0, 99),
        offset=st.sampled_from([0.0, 1950.0]),
    )
    def test_equals_scipy_without_its_first_column(self, degree, inner, seed, offset):
        rng = np.random.default_rng(seed)
        knots = offset + np.cumsum(0.1 + rng.random(inner + 2))
        x = rng.uniform(knots[0], knots[-1], 30)
        full = np.concatenate([[knots[0]] * degree, knots, [knots[-1]] * degree])
        expected = BSpline.design_matrix(x, full, degree).toarray()[:, 1:]
        actual = basis.spline(x, knots, degree)
        assert actual.shape == (30, len(knots) + degree - 2)
        np.testing.assert_allclose(actual, expected, atol=1e-9 if offset else 1e-12)

    @pytest.mark.parametrize("degree", [0, 1, 3])
    def test_ends_knots_and_beyond(self, degree):
        """The first value has only the column that was left out, the last one only the last column."""
        knots = np.array([2.0, 3.0, 5.0, 9.0])
        x = np.array([2.0, 9.0, -100.0, 1e6])
        columns = basis.spline(x, knots, degree).numpy()
        last = np.eye(columns.shape[1])[-1]
        np.testing.assert_allclose(columns, [0 * last, last, 0 * last, last], atol=1e-15)
        full = np.concatenate([[2.0] * degree, knots, [9.0] * degree])
        expected = BSpline.design_matrix(knots, full, degree).toarray()[:, 1:]
        np.testing.assert_allclose(basis.spline(knots, knots, degree), expected, atol=1e-14)

    @given(degree=st.integers(0, 4), num=st.integers(4, 10), seed=st.integers(0, 99))
    def test_a_partition_of_unity(self, degree, num, seed):
        x = values(seed=seed)
        knots = basis.spline_knots(x, num, degree).numpy()
        columns = basis.spline(x, knots, degree).numpy()
        assert columns.shape == (50, num)
        total = columns.sum(1)
        assert columns.min() >= 0
        assert total.max() <= 1 + 1e-12
        inside = x >= float(knots[1])
        if len(knots) > 2 and degree == 0:
            # Step functions: the first one, left out, ends at the first inner knot.
            np.testing.assert_allclose(total[inside], 1, atol=1e-12)
            assert not total[~inside].any()
        if degree:
            full = np.concatenate([[knots[0]] * degree, knots, [knots[-1]] * degree])
            first = BSpline.design_matrix(np.clip(x, knots[0], knots[-1]), full, degree).toarray()[:, 0]
            np.testing.assert_allclose(total + first, 1, atol=1e-12)

    def test_spans_the_polynomials_of_its_degree(self):
        x = values()
        knots = basis.spline_knots(x, 6)
        design = np.column_stack([basis.spline(x, knots), np.ones(50)])
        cubic = np.vander((x - x.mean()) / x.std(), 4)
        fitted = design @ np.linalg.lstsq(design, cubic, rcond=None)[0]
        np.testing.assert_allclose(fitted, cubic, atol=1e-9)

    def test_dtype_and_memory_layout(self):
        knots = [0.0, 1.0, 3.0]
        table = torch.rand(20, 3)
        assert basis.spline(table[:, 1], knots).dtype == torch.float32
        expected = basis.spline(table[:, 1].clone().double(), knots)
        torch.testing.assert_close(basis.spline(table.double()[:, 1], knots), expected)
        torch.testing.assert_close(basis.spline(table[:, 1:2], knots).double(), expected)
        assert basis.spline(torch.ones(0), knots).shape == (0, 4)


class TestKnots:
    def test_are_quantiles(self):
        x = values()
        for num, degree in ((3, 3), (4, 3), (7, 3), (5, 1), (4, 0)):
            expected = np.quantile(x, np.linspace(0, 1, num - degree + 2))
            knots = basis.spline_knots(x, num, degree)
            np.testing.assert_allclose(knots, expected, rtol=1e-14)
            assert knots.dtype == torch.float64

    def test_of_float32_values_contain_them(self):
        x = torch.rand(30)
        knots = basis.spline_knots(x, 5)
        assert float(knots[0]) == float(x.min())
        assert float(knots[-1]) == float(x.max())


class TestInteractions:
    @given(n=st.integers(0, 6), a=st.integers(1, 4), b=st.integers(1, 4))
    def test_all_products(self, n, a, b):
        first, second = torch.randn(n, a).double(), torch.randn(n, b).double()
        expected = [first[:, i] * second[:, j] for i in range(a) for j in range(b)]
        assert basis.interactions(first, second).shape == (n, a * b)
        assert torch.equal(basis.interactions(first, second), torch.stack(expected, 1))

    def test_one_hot_columns(self):
        site = torch.eye(2)[[0, 1, 1]]
        age = torch.tensor([[1.0], [2.0], [3.0]])
        assert basis.interactions(site, age).tolist() == [[1, 0], [0, 2], [0, 3]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: basis.polynomial([1.0], 0, low=0, high=1), "degree must be at least 1, got 0"),
        (lambda: basis.polynomial([1.0], 1, low=1, high=1), "low must be below high.*low=1 and high=1"),
        (lambda: basis.polynomial([1.0], 1, low=2, high=float("nan")), "low must be below high"),
        (lambda: basis.polynomial([1.0], 1, low=0, high=float("inf")), "both finite.*high=inf"),
        (lambda: basis.polynomial(torch.ones(3, 2), 1, low=0, high=2), r"values must have shape.*\(3, 2\)"),
        (lambda: basis.polynomial([float("nan")], 1, low=0, high=2), "values has NaN or infinite values"),
        (lambda: basis.spline([float("inf")], [0.0, 1.0]), "values has NaN or infinite values"),
        (lambda: basis.spline([0.5], [0.0, float("nan")]), "knots has NaN or infinite values"),
        (lambda: basis.spline([0.5], [0.0]), r"at least two ascending numbers, got \[0\.0\]"),
        (lambda: basis.spline([0.5], [0.0, 0.0, 1.0]), "at least two ascending numbers"),
        (lambda: basis.spline([0.5], [1.0, 0.0]), "at least two ascending numbers"),
        (lambda: basis.spline([0.5], np.ones((2, 2))), "knots must have shape"),
        (lambda: basis.spline([0.5], [0.0, 1.0], -1), "degree must not be negative, got -1"),
        (lambda: basis.spline_knots([0.5, 1.0], 2), "num_columns must be at least degree=3, got 2"),
        (lambda: basis.spline_knots(torch.ones(0), 4), "no values"),
        (lambda: basis.spline_knots([1.0, 1.0, 2.0], 9), "too few different values for 9 spline columns"),
        (lambda: basis.interactions(torch.ones(3), torch.ones(3, 1)), r"matrices.*got shapes \(3,\)"),
        (lambda: basis.interactions(torch.ones(3, 1), torch.ones(2, 1)), r"\(3, 1\) and \(2, 1\)"),
    ],
)
def test_errors(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_a_negative_degree():
    with pytest.raises(ValueError, match="degree must not be negative, got -1"):
        basis.spline_knots(torch.rand(20), 4, degree=-1)
    with pytest.raises(ValueError, match="degree must not be negative, got -1"):
        basis.spline(torch.rand(20), [0.0, 1.0], degree=-1)


def test_a_curve_goes_with_its_basis_and_not_with_a_line():
    """What the module is for: beside a label that follows the metadata, a line leaves the curve."""
    rng = np.random.default_rng(0)
    label = np.repeat([0.0, 1.0], 1000)
    confounder = rng.uniform(1 + 2 * label, 4 + 2 * label)
    feature = torch.tensor((confounder - 3.5)[:, None] ** 3)
    labels = torch.tensor(label)
    line = metadata_norm(feature, torch.tensor(confounder), labels)[:, 0].numpy()
    cubic = basis.polynomial(confounder, 3, low=1, high=6)
    curve = metadata_norm(feature, cubic, labels)[:, 0].numpy()
    for group in (label == 0, label == 1):
        assert line[group].std() > 0.5
    np.testing.assert_allclose(curve, curve.mean(), atol=1e-9)


def test_integers_keep_their_digits():
    """Time stamps a second apart are one number in float32."""
    stamps = torch.arange(1_700_000_000, 1_700_000_100)
    columns = basis.polynomial(stamps, 1, low=1_700_000_000, high=1_700_000_099)
    assert columns.dtype == torch.float64
    assert len(columns.unique()) == 100


def test_interactions_of_arrays():
    first, second = np.arange(6.0).reshape(3, 2), np.arange(3.0).reshape(3, 1)
    expected = torch.tensor(first * second)
    torch.testing.assert_close(basis.interactions(first, second), expected)
