"""Tests of independence against `dcor`, against all permutations, and their rates of rejection."""

from __future__ import annotations

import itertools
import math
from typing import Any

import dcor
import numpy as np
import pytest
import scipy.stats
import torch
from scipy.interpolate import make_lsq_spline
from tiles import tiles_of

from mdnorm.metrics import (
    conditional_independence_test,
    distance_correlation_chi_squared_p_value,
    distance_correlation_permutation_test,
    distance_correlation_sqr,
    distance_correlation_t_test,
    partial_distance_correlation,
)
from mdnorm.metrics.independence import permutations, residuals_given


def _pair(n: int, p: int, q: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, 0.3 * x[:, :1] ** 2 + rng.standard_normal((n, q))


# -- t-test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "q"), [(4, 3, 3), (5, 10, 10), (40, 30, 20), (100, 1, 1), (1500, 1, 1)])
def test_t_test_equals_dcor(n: int, p: int, q: int) -> None:
    x, y = _pair(n, p, q)
    result = distance_correlation_t_test(x, y)
    expected = dcor.independence.distance_correlation_t_test(x, y)
    assert result.estimate == pytest.approx(float(dcor.u_distance_correlation_sqr(x, y)), abs=1e-9)
    assert result.statistic == pytest.approx(float(expected.statistic), rel=1e-8)
    assert result.p_value == pytest.approx(float(expected.pvalue), rel=1e-7)
    assert result.degrees_of_freedom == n * (n - 3) // 2 - 1


def test_t_test_at_its_limits() -> None:
    x, y = _pair(20, 5, 5)
    assert distance_correlation_t_test(x, x).p_value < 1e-300
    assert distance_correlation_t_test(x, np.ones(20)).p_value == 0.5
    tensors = distance_correlation_t_test(torch.from_numpy(x), torch.from_numpy(y))
    assert tensors == distance_correlation_t_test(x, y)
    assert type(tensors.p_value) is float


def test_t_test_rejects_at_its_level_with_many_columns() -> None:
    rng = np.random.default_rng(0)
    values = [distance_correlation_t_test(*rng.standard_normal((2, 20, 60))).p_value for _ in range(500)]
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)


# -- permutations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "q"), [(30, 1, 1), (30, 8, 2), (30, 2, 9), (1300, 1, 1)])
@pytest.mark.parametrize("tile_size", [None, 7])
def test_values_are_correlations_of_permuted_samples(n: int, p: int, q: int, tile_size: int | None) -> None:
    x, y = _pair(n, p, q)
    with tiles_of(tile_size):
        result = distance_correlation_permutation_test(x, y, num_permutations=20, seed=3)
        assert result.estimate == pytest.approx(distance_correlation_sqr(x, y), abs=1e-13)
    for value, order in zip(
        result.permuted, permutations(20, n, None, torch.Generator().manual_seed(3)), strict=True
    ):
        # The wider variable stays.
        pair = (x, y[order.numpy()]) if p >= q else (x[order.numpy()], y)
        assert value == pytest.approx(distance_correlation_sqr(*pair), abs=1e-12)


def test_p_value_counts_values_that_are_as_large() -> None:
    x, y = _pair(25, 2, 1)
    result = distance_correlation_permutation_test(x, y, num_permutations=200)
    assert result.p_value == (1 + (result.permuted >= result.estimate).sum()) / 201
    assert result.num_permutations == len(result.permuted) == 200
    assert distance_correlation_permutation_test(x, x, num_permutations=99).p_value == 0.01


def test_is_close_to_the_p_value_of_allpermutations() -> None:
    x, y = _pair(6, 1, 1, seed=3)
    values = [distance_correlation_sqr(x, y[list(order)]) for order in itertools.permutations(range(6))]
    exact = np.mean(np.array(values) >= distance_correlation_sqr(x, y) - 1e-12)
    assert 0.05 < exact < 0.95
    result = distance_correlation_permutation_test(x, y, num_permutations=2000)
    assert result.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 2000))


def test_ties_count_as_as_large() -> None:
    # Many orders of a binary variable are the same order: their values differ by rounding at most.
    x = np.repeat([0.0, 1.0], [5, 3])
    exact = 1 / math.comb(8, 3)  # the places of the three
    result = distance_correlation_permutation_test(x, x + 0.1, num_permutations=3000)
    assert result.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 3000))


def test_same_seed_same_result() -> None:
    x, y = _pair(40, 3, 1)
    first, again, other = (
        distance_correlation_permutation_test(x, y, num_permutations=20, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.permuted, again.permuted)
    assert (first.permuted != other.permuted).all()
    state = torch.random.get_rng_state()
    distance_correlation_permutation_test(x, y, num_permutations=20)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_permutations_in_several_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _pair(40, 3, 1)
    whole = distance_correlation_permutation_test(x, y, num_permutations=20).permuted
    monkeypatch.setattr("mdnorm.metrics.independence._PERMUTATION_ELEMENTS", 3 * 40)
    parts = distance_correlation_permutation_test(x, y, num_permutations=20).permuted
    np.testing.assert_allclose(parts, whole, atol=1e-14)


def test_strata_are_permuted_within_and_fully() -> None:
    strata = np.array(["b", "a", "c", "a", "b", "a", "b"])
    codes = torch.from_numpy(np.unique(strata, return_inverse=True)[1])
    orders = permutations(3000, 7, codes, torch.Generator().manual_seed(0)).numpy()
    assert (strata[orders] == strata).all()
    assert (np.sort(orders, axis=1) == np.arange(7)).all()
    different, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(different) == 36  # 3! · 3! · 1!
    assert counts.min() > 3000 / 36 - 5 * math.sqrt(3000 / 36)


def test_strata_account_for_a_common_cause() -> None:
    rng = np.random.default_rng(0)
    p_values, ignored = [], []
    for _ in range(60):
        stratum = rng.integers(0, 2, 60)
        x, y = rng.standard_normal((2, 60)) + 2 * stratum
        arguments: dict[str, Any] = {"num_permutations": 99}
        p_values.append(distance_correlation_permutation_test(x, y, strata=stratum, **arguments).p_value)
        ignored.append(distance_correlation_permutation_test(x, y, **arguments).p_value)
    assert np.mean(np.array(p_values) <= 0.05) < 0.15
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.15)
    assert np.mean(np.array(ignored) <= 0.05) > 0.9


def test_rejects_at_its_level_under_independence_and_else_more() -> None:
    rng = np.random.default_rng(0)
    level, power = [], []
    for _ in range(200):
        x, noise = rng.standard_normal((2, 30))
        level.append(distance_correlation_permutation_test(x, noise, num_permutations=39).p_value)
        power.append(distance_correlation_permutation_test(x, x**2 + noise, num_permutations=39).p_value)
    assert np.mean(np.array(level) <= 0.05) == pytest.approx(0.05, abs=0.05)
    assert np.mean(np.array(power) <= 0.05) > 0.5


def test_a_constant_is_never_rejected() -> None:
    result = distance_correlation_permutation_test(np.arange(10.0), np.ones(10), num_permutations=20)
    assert result.p_value == 1
    assert result.estimate == 0
    assert (result.permuted == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_permutations": 0}, ValueError, "num_permutations must be at least 1, got 0"),
        ({"num_permutations": 19}, ValueError, "num_permutations must be at least 20, got 19.* below 0.05"),
        ({"num_permutations": 9.0}, TypeError, "num_permutations must be an integer, got 9.0"),
        ({"num_permutations": True}, TypeError, "num_permutations must be an integer, got True"),
        ({"strata": np.arange(10)}, ValueError, "every sample has a stratum of its own"),
        ({"strata": np.zeros(9)}, ValueError, "9 rows in strata and 10 in x"),
        ({"strata": np.zeros((10, 2))}, ValueError, r"strata must have shape \(n,\)"),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distance_correlation_permutation_test(np.arange(10.0), np.arange(10.0), **arguments)


@pytest.mark.parametrize("test", [distance_correlation_permutation_test, distance_correlation_t_test])
def test_samples_are_checked(test: Any) -> None:
    with pytest.raises(ValueError, match="10 rows in x and 9 in y"):
        test(np.arange(10.0), np.arange(9.0))
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        test(np.arange(3.0), np.arange(3.0))
    with pytest.raises(ValueError, match="x has NaN"):
        test(np.array([np.nan, 1, 2, 3]), np.arange(4.0))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    x, y = _pair(200, 8, 2)
    expected = distance_correlation_permutation_test(x, y, num_permutations=30)
    result = distance_correlation_permutation_test(torch.from_numpy(x).cuda(), y, num_permutations=30)
    np.testing.assert_allclose(result.permuted, expected.permuted, atol=1e-12)


def test_chi_squared_p_value_is_that_of_scipy() -> None:
    for estimate, n in ((0.1, 50), (0.0, 20), (-0.001, 300), (1.0, 1000)):
        expected = scipy.stats.chi2.sf(n * estimate + 1, 1)
        assert distance_correlation_chi_squared_p_value(estimate, n) == pytest.approx(expected, rel=1e-10)
    assert distance_correlation_chi_squared_p_value(-0.5, 20) == 1
    with pytest.raises(ValueError, match="from -1 to 1"):
        distance_correlation_chi_squared_p_value(float("nan"), 20)
    with pytest.raises(ValueError, match=r"at least 20, got 19.*permutation_test for few"):
        distance_correlation_chi_squared_p_value(0.5, 19)


@pytest.mark.parametrize("kind", ["scalars", "columns", "binary"])
def test_chi_squared_test_keeps_its_level(kind: str) -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        x, y = rng.standard_normal((2, 40, 5 if kind == "columns" else 1))
        if kind == "binary":
            x, y = x > 0, y > 0
        estimate = distance_correlation_sqr(x, y)
        found += distance_correlation_chi_squared_p_value(estimate, 40) < 0.05
    # 5 % of 400 and three standard deviations; for two binary variables the level is reached.
    assert found <= 33
    if kind == "binary":
        assert found >= 7


# -- given a continuous variable --------------------------------------------------------------------------


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
def test_errors_of_the_conditional_test(given: np.ndarray, options: dict[str, int], message: str) -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 50))
    with pytest.raises(ValueError, match=message):
        conditional_independence_test(x, y, given, **options)


def test_a_constant_given_variable_changes_nothing_and_few_rows_are_an_error() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 60))
    result = conditional_independence_test(x, y, np.ones(60), num_permutations=20)
    assert result.estimate == pytest.approx(dcor.u_distance_correlation_sqr(x, y), abs=1e-9)
    with pytest.raises(ValueError, match="at least 40 rows, got 39"):
        conditional_independence_test(x[:39], y[:39], np.arange(39.0))
