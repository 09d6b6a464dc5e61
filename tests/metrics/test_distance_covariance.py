"""Distance covariance, partial and conditional distance correlation, and the interval of the jackknife."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import dcor
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import tiles_of

from mdnorm.metrics import (
    conditional_distance_correlation_sqr,
    distance_correlation_interval,
    distance_correlation_sqr,
    distance_covariance_sqr,
    partial_distance_correlation,
)

TOLERANCE = 1e-9


def _three(n: int, p: int, q: int, r: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, r))
    x = rng.standard_normal((n, p)) + z[:, :1]
    y = x[:, :1] ** 2 + rng.standard_normal((n, q)) - z[:, -1:]
    if seed % 3 == 0:
        x, z = np.round(x), np.round(z, 1)
    return x, y, z


_SHAPES = st.tuples(*(st.integers(low, high) for low, high in ((5, 80), (1, 9), (1, 3), (1, 7), (0, 999))))


# -- covariance -------------------------------------------------------------------------------------------


@given(_SHAPES, st.sampled_from([1e-3, 1.0, 40.0]))
def test_covariance_equals_dcor(shape: tuple[int, ...], scale: float) -> None:
    x, y, _ = _three(*shape)  # type: ignore[arg-type]
    x = scale * x
    expected = float(dcor.u_distance_covariance_sqr(x, y, method="naive"))
    assert distance_covariance_sqr(x, y) == pytest.approx(expected, abs=TOLERANCE * scale)


def test_covariance_of_a_constant_is_zero_and_under_independence_about_zero() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 2))
    assert distance_covariance_sqr(x, np.full(30, 0.1)) == 0
    values = [distance_covariance_sqr(*rng.standard_normal((2, 30, 2))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(300)
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("exponent", [-150, 0, 150])
def test_covariance_scales_with_the_units(exponent: int) -> None:
    x, y, _ = _three(40, 3, 1, 1, 1)
    assert distance_covariance_sqr(2.0**exponent * x, y / 4) == pytest.approx(
        2.0**exponent * distance_covariance_sqr(x, y) / 4, rel=1e-12, abs=0
    )


def test_covariance_too_large_for_float64() -> None:
    x = 1e300 * np.arange(5.0)
    with pytest.raises(OverflowError, match="larger than any float64 number"):
        distance_covariance_sqr(x, x)


# -- partial ----------------------------------------------------------------------------------------------


@given(_SHAPES)
def test_partial_equals_dcor(shape: tuple[int, ...]) -> None:
    x, y, z = _three(*shape)  # type: ignore[arg-type]
    expected = float(dcor.partial_distance_correlation(x, y, z))
    # Where a distance variance is 0 up to rounding, that of dcor is rounding over rounding.
    varies = all(distance_correlation_sqr(v, v) > 0 for v in (x, y, z))
    if varies and max(abs(distance_correlation_sqr(v, z)) for v in (x, y)) < 0.999:
        assert partial_distance_correlation(x, y, z) == pytest.approx(expected, abs=TOLERANCE)


def test_partial_of_a_common_cause_is_small_and_of_a_mask_large() -> None:
    rng = np.random.default_rng(0)
    z, first, second = rng.standard_normal((3, 400))
    x, y = z + 0.3 * first, z + 0.3 * second
    assert distance_correlation_sqr(x, y) > 0.6
    assert abs(partial_distance_correlation(x, y, z)) < 0.05
    assert partial_distance_correlation(first, first + second, second) > distance_correlation_sqr(
        first, first + second
    )


def test_partial_where_nothing_is_left() -> None:
    x, y, z = _three(30, 2, 1, 1, 1)
    constant = np.ones(30)
    assert partial_distance_correlation(x, y, x) == 0
    assert partial_distance_correlation(x, y, 3 * y + 1) == 0
    assert partial_distance_correlation(x, constant, z) == 0
    assert partial_distance_correlation(x, y, constant) == distance_correlation_sqr(x, y)


def test_partial_returns_a_tensor_for_any_tensor() -> None:
    x, y, z = _three(20, 2, 1, 1, 1)
    expected = partial_distance_correlation(x, y, z)
    assert type(expected) is float
    for k in range(3):
        arguments: list[Any] = [x, y, z]
        arguments[k] = torch.from_numpy(arguments[k])
        result = partial_distance_correlation(*arguments)
        assert isinstance(result, torch.Tensor)
        assert result.item() == expected
    with pytest.raises(ValueError, match=r"x, y and z must .* 20 rows in x, 20 in y and 19 in z"):
        partial_distance_correlation(x, y, z[1:])
    with pytest.raises(ValueError, match=r"z has NaN .* from x, y and z"):
        partial_distance_correlation(x, y, np.full(20, np.nan))


# -- conditional ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        np.repeat([3, 1, 2], [10, 20, 30]),
        np.repeat(["b", "a"], 30),
        np.repeat([True, False], 30),
        torch.arange(60) % 4,
        (torch.arange(60) % 2).to(torch.bfloat16),
        [None if False else "only"] * 60,
    ],
    ids=["integers", "strings", "booleans", "tensor", "bfloat16", "one class"],
)
def test_conditional_is_the_correlation_within_each_class(labels: Any) -> None:
    x, y, _ = _three(60, 3, 1, 1, 2)
    y[::7] = 1e8  # what is large in one class must not cost digits in another
    result = conditional_distance_correlation_sqr(x, y, labels)
    plain = labels.tolist() if hasattr(labels, "tolist") else labels
    assert list(result.values) == sorted(set(plain)) == list(result.counts)
    for label, value in result.values.items():
        inside = np.array([other == label for other in plain])
        assert result.counts[label] == inside.sum()
        assert value == pytest.approx(distance_correlation_sqr(x[inside], y[inside]), abs=1e-12)
    assert result.mean == pytest.approx(
        sum(result.counts[label] * value for label, value in result.values.items()) / 60
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mean = 0.0  # type: ignore[misc]


def test_conditional_with_a_variable_that_is_constant_in_one_class() -> None:
    x, y, _ = _three(60, 3, 1, 1, 1)
    x[:30] = 7.1
    result = conditional_distance_correlation_sqr(x, y, np.repeat([0, 1], 30))
    assert result.values[0] == 0
    assert result.values[1] == distance_correlation_sqr(x[30:], y[30:])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.zeros((20, 2)), ValueError, r"labels must have shape \(n,\).* got \(20, 2\)"),
        (np.zeros(19), ValueError, "19 rows in labels and 20 in x"),
        (np.repeat(["a", "b", "c"], [16, 3, 1]), ValueError, r"at least 4 samples.* 'b' \(3\), 'c' \(1\)"),
        (np.r_[np.zeros(19), np.nan], ValueError, r"labels has missing .* in row\(s\) 19 \(1 of 20"),
        (np.array([None] + ["a"] * 19, dtype=object), ValueError, r"labels has missing .* in row\(s\) 0"),
        (np.array([1] + ["a"] * 19, dtype=object), TypeError, "'labels' mixes numbers .1. and strings"),
    ],
)
def test_conditional_checks_the_labels(labels: Any, error: type[Exception], message: str) -> None:
    x, y, _ = _three(20, 3, 1, 1, 1)
    with pytest.raises(error, match=message):
        conditional_distance_correlation_sqr(x, y, labels)


# -- interval ---------------------------------------------------------------------------------------------


@given(_SHAPES, st.sampled_from([None, 3]))
def test_leave_one_out_equals_leaving_one_out(shape: tuple[int, ...], tile_size: int | None) -> None:
    x, y, _ = _three(*shape)  # type: ignore[arg-type]
    if len(np.unique(x, axis=0)) < 4:
        return
    n = len(x)
    with tiles_of(tile_size):
        result = distance_correlation_interval(x, y)
        assert result.estimate == distance_correlation_sqr(x, y)
    expected = np.array(
        [distance_correlation_sqr(np.delete(x, i, axis=0), np.delete(y, i, axis=0)) for i in range(n)]
    )
    np.testing.assert_allclose(result.leave_one_out, expected, atol=1e-10)
    error = math.sqrt((n - 1) / n * ((expected - expected.mean()) ** 2).sum())
    assert result.standard_error == pytest.approx(error, abs=TOLERANCE)
    assert -1 <= result.lower <= result.estimate <= result.upper <= 1
    half = scipy.stats.t.ppf(0.975, n - 1) * error
    if result.lower > -1 and result.upper < 1:
        assert result.upper - result.estimate == pytest.approx(half + 2 / n, abs=TOLERANCE)
        below = math.hypot(half, (scipy.stats.chi2.ppf(0.95, 1) - 1) / n)
        assert result.estimate - result.lower == pytest.approx(below, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["offset", "outlier", "duplicates", "many scalars"])
def test_leave_one_out_of_difficult_data(kind: str) -> None:
    x, y, _ = _three(1500 if kind == "many scalars" else 60, 1 if kind == "many scalars" else 12, 1, 1, 1)
    if kind == "offset":
        x, y = x + 1e6, y - 1e5
    elif kind == "outlier":
        x[5] = 1e6
    elif kind == "duplicates":
        x[10:40] = x[0]
    result = distance_correlation_interval(x, y)
    for i in (0, 5, 40):
        expected = distance_correlation_sqr(np.delete(x, i, axis=0), np.delete(y, i, axis=0))
        assert result.leave_one_out[i] == pytest.approx(expected, abs=1e-9)


def _population_value(correlation: float) -> float:
    """Squared distance correlation of a bivariate normal distribution (Székely et al. 2007, theorem 7)."""
    r = correlation
    numerator = r * math.asin(r) + math.sqrt(1 - r**2) - r * math.asin(r / 2) - math.sqrt(4 - r**2) + 1
    return numerator / (1 + math.pi / 3 - math.sqrt(3))


@pytest.mark.parametrize("correlation", [0.1, 0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("n", [10, 20, 50])
def test_interval_covers_the_population_value_for_few_rows(n: int, correlation: float) -> None:
    rng = np.random.default_rng(0)
    value = _population_value(correlation)
    covered = 0
    for _ in range(200):
        x, noise = rng.standard_normal((2, n))
        result = distance_correlation_interval(x, correlation * x + math.sqrt(1 - correlation**2) * noise)
        covered += result.lower <= value <= result.upper
    assert covered >= 180


@pytest.mark.parametrize("correlation", [0.5, 0.8])
def test_interval_covers_the_population_value(correlation: float) -> None:
    rng = np.random.default_rng(0)
    value = _population_value(correlation)
    results = []
    for _ in range(300):
        x, noise = rng.standard_normal((2, 300))
        y = correlation * x + math.sqrt(1 - correlation**2) * noise
        results.append(distance_correlation_interval(x, y))
    covered = np.mean([result.lower <= value <= result.upper for result in results])
    # The simulation has a standard error of 0.013, and close to independence the intervals are wide.
    assert 0.91 <= covered <= 0.99
    spread = np.std([result.estimate for result in results])
    assert np.mean([result.standard_error for result in results]) == pytest.approx(spread, rel=0.15)


def test_interval_of_identical_variables_and_of_another_confidence() -> None:
    x, y, _ = _three(50, 2, 1, 1, 1)
    same = distance_correlation_interval(x, x)
    assert same.standard_error < 1e-12
    assert same.upper == 1
    assert same.lower == pytest.approx(1 - (scipy.stats.chi2.ppf(0.95, 1) - 1) / 50, abs=1e-12)
    wide, narrow = distance_correlation_interval(x, y, 0.99), distance_correlation_interval(x, y, 0.5)
    assert wide.confidence == 0.99
    assert wide.upper - wide.lower > 2 * (narrow.upper - narrow.lower)
    assert distance_correlation_interval(torch.from_numpy(x), y) == distance_correlation_interval(x, y)


def test_interval_without_the_only_sample_that_would_make_the_rest_constant() -> None:
    x = np.zeros(20)
    x[[3, 7]] = 1.0
    y = np.random.default_rng(0).standard_normal(20)
    result = distance_correlation_interval(x, y)
    # Without one of the two, the other alone differs: no distance variance is left.
    assert result.leave_one_out[3] == result.leave_one_out[7] == 0
    assert result.leave_one_out[0] != 0


@pytest.mark.parametrize(
    ("x", "y", "arguments", "message"),
    [
        (np.arange(4.0), np.arange(4.0), {}, "at least 5 rows, got 4"),
        (np.arange(9.0), np.ones(9), {}, "y has no distance variance"),
        (np.eye(9)[2], np.arange(9.0), {}, "x has no distance variance"),
        (np.arange(9.0), np.arange(9.0), {"confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
        (np.arange(9.0), np.arange(9.0), {"confidence": math.nan}, "confidence must be between 0 and 1"),
    ],
)
def test_interval_errors(x: Any, y: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance_correlation_interval(x, y, **arguments)
