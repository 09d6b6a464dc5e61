"""Independence given a continuous variable, where partial distance correlation is wrong."""

from __future__ import annotations

import dcor
import numpy as np
import pytest
import torch
from scipy.interpolate import make_lsq_spline

from mdnorm.metrics import conditional_independence_test, partial_distance_correlation
from mdnorm.metrics.conditional import residuals_given


def test_residuals_are_those_of_a_least_squares_spline_of_scipy() -> None:
    rng = np.random.default_rng(0)
    given = np.sort(rng.standard_normal(150))
    values = np.column_stack([given**2 + rng.standard_normal(150), rng.standard_normal(150)])
    knots = np.quantile(given, np.linspace(0, 1, 10))
    inner = make_lsq_spline(given, values, np.r_[[knots[0]] * 3, knots, [knots[-1]] * 3], k=3)
    np.testing.assert_allclose(residuals_given(values, given), values - inner(given), atol=1e-8)


def test_the_estimate_is_dcor_of_the_residuals() -> None:
    z, x, y = np.random.default_rng(0).standard_normal((3, 120))
    result = conditional_independence_test(z**2 + x, z + x + y, z, num_permutations=20)
    left = residuals_given((z**2 + x)[:, None], z), residuals_given((z + x + y)[:, None], z)
    assert result.estimate == pytest.approx(dcor.u_distance_correlation_sqr(*left), abs=1e-9)
    again = conditional_independence_test(
        torch.from_numpy(z**2 + x), torch.from_numpy(z + x + y), torch.from_numpy(z), num_permutations=20
    )
    assert again.p_value == result.p_value == 1 / 21


def test_it_keeps_its_level_where_partial_distance_correlation_does_not() -> None:
    rng = np.random.default_rng(0)
    alarms, found = 0, 0
    for seed in range(60):
        z, x, y = rng.standard_normal((3, 150))
        test = conditional_independence_test(z**2 + x, z**2 + y, z, num_permutations=39, seed=seed)
        alarms += test.p_value <= 0.05
        same = conditional_independence_test(z**2 + x, z**2 + x + y, z, num_permutations=39, seed=seed)
        found += same.p_value <= 0.05
        assert partial_distance_correlation(z**2 + x, z**2 + y, z) > 0.1
    assert alarms <= 8  # 3 are expected
    assert found >= 57


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (np.zeros((50, 2)), {}, r"given must have shape \(n,\)"),
        (np.arange(49.0), {}, "50 rows in x, 50 in y and 49 in given"),
        (np.arange(50.0), {"num_permutations": 19}, "num_permutations must be at least 20"),
    ],
)
def test_errors(given: np.ndarray, options: dict[str, int], message: str) -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 50))
    with pytest.raises(ValueError, match=message):
        conditional_independence_test(x, y, given, **options)


def test_a_constant_given_variable_changes_nothing_and_few_rows_are_an_error() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 60))
    result = conditional_independence_test(x, y, np.ones(60), num_permutations=20)
    assert result.estimate == pytest.approx(dcor.u_distance_correlation_sqr(x, y), abs=1e-9)
    with pytest.raises(ValueError, match="at least 40 rows, got 39"):
        conditional_independence_test(x[:39], y[:39], np.arange(39.0))
