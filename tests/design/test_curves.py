"""Curves equal those of scipy and numpy, whatever the knots, the degree and the origin of the numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline, CubicSpline

from mdnorm import metadata_norm
from mdnorm.design import Design, polynomial


def _values(n: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(3.0, 20.0, n)


def _columns(design: Design, values: Any) -> np.ndarray:
    return design.transform({"x": values}, dtype=torch.float64).metadata.numpy()


@settings(max_examples=40)
@given(
    degree=st.integers(1, 6),
    inner=st.integers(0, 6),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 1950.0]),
)
def test_splines_equal_those_of_scipy_without_the_first_column(
    degree: int, inner: int, seed: int, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    knots = offset + np.cumsum(0.1 + rng.random(inner + 2))
    x = np.append(rng.uniform(knots[0], knots[-1], 30), knots[[0, -1]])
    factor = f"bs(x, knots={knots[1:-1].tolist()}, degree={degree})"
    design = Design([factor], standardize=False).fit({"x": x})
    full = np.concatenate([[knots[0]] * degree, knots, [knots[-1]] * degree])
    new = rng.uniform(knots[0], knots[-1], 50)
    expected = BSpline.design_matrix(new, full, degree).toarray()[:, 1:]
    np.testing.assert_allclose(_columns(design, new), expected, atol=1e-9)


def test_knots_are_at_quantiles() -> None:
    x = _values()
    for df, degree in ((3, 3), (4, 3), (7, 3), (5, 1)):
        knots = np.quantile(x, np.linspace(0, 1, df - degree + 2))[1:-1].tolist()
        found = Design([f"bs(x, df={df}, degree={degree})"]).fit({"x": x})
        given_knots = Design([f"bs(x, knots={knots}, degree={degree})"]).fit({"x": x})
        np.testing.assert_allclose(_columns(found, x), _columns(given_knots, x), atol=1e-9)


def test_natural_splines_span_those_of_scipy() -> None:
    x = _values(200)
    knots = np.quantile(np.unique(x), np.linspace(0, 1, 5))
    columns = np.column_stack([np.ones(200), _columns(Design("cr(x, df=4)").fit({"x": x}), x)])
    expected = CubicSpline(knots, np.eye(5), bc_type="natural")(x)
    fitted = columns @ np.linalg.lstsq(columns, expected, rcond=None)[0]
    np.testing.assert_allclose(fitted, expected, atol=1e-9)


def test_polynomials_of_a_high_degree_are_orthonormal() -> None:
    x = _values(400)
    columns = _columns(Design("poly(x, 20)", standardize=False).fit({"x": x}), x)
    np.testing.assert_allclose(columns.T @ columns, np.eye(20), atol=1e-7)
    np.testing.assert_allclose(columns.sum(0), 0, atol=1e-7)


class TestPolynomial:
    @given(
        degree=st.integers(1, 8),
        low=st.floats(-1e6, 1e6),
        width=st.floats(1e-3, 1e6),
        seed=st.integers(0, 99),
    )
    def test_equals_vander(self, degree: int, low: float, width: float, seed: int) -> None:
        x = low + width * np.random.default_rng(seed).random(20)
        high = low + width
        scaled = (x - (low + high) / 2) / ((high - low) / 2)
        columns = polynomial(x, degree, low=low, high=high)
        # The mapping loses what the midpoint and the width round to.
        tolerance = 1e-14 * degree * (1 + abs(low) / width)
        np.testing.assert_allclose(columns, np.vander(scaled, degree + 1, True)[:, 1:], atol=tolerance)

    def test_dtype_and_shape(self) -> None:
        for array in (np.arange(5), torch.arange(5), torch.arange(5.0)[:, None], [0, 1, 2, 3, 4]):
            columns = polynomial(array, 2, low=0, high=4)
            assert columns.dtype.is_floating_point
            torch.testing.assert_close(columns[:, 1].double(), torch.tensor([1, 0.25, 0, 0.25, 1]).double())
        assert polynomial(torch.ones(3).half(), 1, low=0, high=1).dtype == torch.float32
        assert polynomial(torch.ones(3).double(), 1, low=0, high=1).dtype == torch.float64
        assert polynomial(torch.ones(0), 3, low=0, high=1).shape == (0, 3)

    def test_the_range_does_not_change_what_the_layer_removes(self) -> None:
        x, features = _values(), torch.randn(50, 4, dtype=torch.float64)
        outs = [
            metadata_norm(features, polynomial(x, 3, low=low, high=high))
            for low, high in ((x.min(), x.max()), (0, 1000))
        ]
        torch.testing.assert_close(outs[0], outs[1], atol=1e-7, rtol=0)

    @pytest.mark.parametrize(
        ("values", "degree", "low", "high", "message"),
        [
            ([1.0], 0, 0, 1, "degree must be at least 1, got 0"),
            ([1.0], 1, 1, 1, "low must be below high.*low=1 and high=1"),
            ([1.0], 1, 2, float("nan"), "low must be below high"),
            ([1.0], 1, 0, float("inf"), "both finite.*high=inf"),
            (torch.ones(3, 2), 1, 0, 2, r"values must have shape.*\(3, 2\)"),
            ([float("nan")], 1, 0, 2, "values has NaN or infinite values"),
        ],
    )
    def test_errors(self, values: Any, degree: int, low: float, high: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            polynomial(values, degree, low=low, high=high)

    def test_integers_keep_their_digits(self) -> None:
        # Time stamps a second apart are one number in float32.
        stamps = torch.arange(1_700_000_000, 1_700_000_100)
        columns = polynomial(stamps, 1, low=1_700_000_000, high=1_700_000_099)
        assert columns.dtype == torch.float64
        assert len(columns.unique()) == 100


def test_a_curve_goes_with_its_columns_and_not_with_a_line() -> None:
    """What they are for: beside a label that follows the metadata, a line leaves the curve."""
    rng = np.random.default_rng(0)
    label = np.repeat([0.0, 1.0], 1000)
    confounder = rng.uniform(1 + 2 * label, 4 + 2 * label)
    feature = torch.tensor((confounder - 3.5)[:, None] ** 3)
    labels = torch.tensor(label)
    line = metadata_norm(feature, torch.tensor(confounder), labels)[:, 0].numpy()
    for cubic in (polynomial(confounder, 3, low=1, high=6), Design("poly(x, 3)").fit({"x": confounder})):
        if isinstance(cubic, Design):
            cubic = torch.from_numpy(_columns(cubic, confounder))
        curve = metadata_norm(feature, cubic, labels)[:, 0].numpy()
        np.testing.assert_allclose(curve, curve.mean(), atol=1e-9)
    for group in (label == 0, label == 1):
        assert line[group].std() > 0.5


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
def test_small_integers_do_not_overflow_in_products(dtype: type) -> None:
    first: np.ndarray = np.array([60, 100, 11], dtype)
    second: np.ndarray = np.array([3, 100, 1], dtype)
    design = Design("x:y + I(x**2)", standardize=False)
    result = design.fit_transform({"x": first, "y": second}, dtype=torch.float64).metadata.numpy()
    names = list(design.metadata_names)
    np.testing.assert_array_equal(result[:, names.index("x:y")], first.astype(float) * second)
    np.testing.assert_array_equal(result[:, names.index("I(x ** 2)")], first.astype(float) ** 2)
