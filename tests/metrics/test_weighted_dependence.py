"""Weighted distance correlation against its definition, a mean over all quadruples of distinct rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from tiles import tiles_of

from mdnorm import balancing_weights
from mdnorm.metrics import (
    conditional_distance_correlation_sqr,
    distance_correlation_sqr,
    distance_covariance_sqr,
    partial_distance_correlation,
)
from mdnorm.metrics.pairwise import quadruple_weight

TOLERANCE = 1e-9


def _covariance(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Return the mean of a_ij b_ij − 2 a_ij b_ik + a_ij b_kl over distinct i, j, k, l, term by term."""
    a, b = (cdist(z.reshape(len(z), -1), z.reshape(len(z), -1)) for z in (x, y))
    i, j, k, m = np.ogrid[tuple(slice(len(w)) for _ in range(4))]
    distinct = (i != j) & (i != k) & (i != m) & (j != k) & (j != m) & (k != m)
    masses = w[i] * w[j] * w[k] * w[m] * distinct
    return float(np.average(a[i, j] * (b[i, j] - 2 * b[i, k] + b[k, m]), weights=masses))


def _correlation(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    return _covariance(x, y, w) / np.sqrt(_covariance(x, x, w) * _covariance(y, y, w))


def _data(n: int, p: int, q: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two dependent variables, and weights that go with both."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    y = x[:, :1] ** 2 + rng.standard_normal((n, q))
    return x, y, np.exp(rng.standard_normal(n) + 0.5 * x[:, 0] - 0.3 * y[:, 0])


_SIZES = (st.integers(4, 14), st.sampled_from([1, 2, 7]), st.sampled_from([1, 2]), st.integers(0, 1000))


# -- values -----------------------------------------------------------------------------------------------


@given(*_SIZES, st.sampled_from([None, 1, 3, 16]))
def test_equals_the_mean_over_distinct_quadruples(
    n: int, p: int, q: int, seed: int, tile_size: int | None
) -> None:
    x, y, w = _data(n, p, q, seed)
    with tiles_of(tile_size):
        covariance = distance_covariance_sqr(x, y, weights=w)
        correlation = distance_correlation_sqr(x, y, weights=w)
    size = np.sqrt(_covariance(x, x, w) * _covariance(y, y, w))
    assert covariance == pytest.approx(_covariance(x, y, w), abs=TOLERANCE * size)
    assert correlation == pytest.approx(_correlation(x, y, w), abs=TOLERANCE)
    assert -1 <= correlation <= 1


def test_partial_correlation_is_made_of_weighted_correlations() -> None:
    x, y, w = _data(12, 2, 1)
    z = np.random.default_rng(1).standard_normal(12) + x[:, 0]
    xy, xz, yz = (_correlation(a, b, w) for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_distance_correlation(x, y, z, weights=w) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("n", "p"), [(4, 1), (5, 3), (60, 1), (300, 9), (1500, 1)])
def test_equal_weights_are_no_weights(n: int, p: int) -> None:
    x, y, _ = _data(n, p, 1)
    w = np.full(n, 0.3)
    for measure in (distance_correlation_sqr, distance_covariance_sqr):
        assert measure(x, y, weights=w) == pytest.approx(measure(x, y), rel=1e-10, abs=1e-14)
    z = np.random.default_rng(1).standard_normal(n)
    expected = partial_distance_correlation(x, y, z)
    assert partial_distance_correlation(x, y, z, weights=w) == pytest.approx(expected, abs=1e-10)


@given(*_SIZES)
def test_a_row_of_weight_0_is_left_out(n: int, p: int, q: int, seed: int) -> None:
    x, y, w = _data(n, p, q, seed)
    rng = np.random.default_rng(seed)
    where = np.sort(rng.integers(0, n + 1, 3))
    # What these rows are may be as large as it likes, and a constant may only differ there.
    more = [np.insert(np.column_stack([z, np.ones(n)]), where, 1e200 * rng.random(), axis=0) for z in (x, y)]
    result = distance_correlation_sqr(*more, weights=np.insert(w, where, 0))
    assert result == distance_correlation_sqr(x, y, weights=w)
    result = distance_covariance_sqr(*more, weights=np.insert(w, where, 0))
    assert result == distance_covariance_sqr(x, y, weights=w)


@given(*_SIZES)
def test_invariances(n: int, p: int, q: int, seed: int) -> None:
    x, y, w = _data(n, p, q, seed)
    order = np.random.default_rng(seed).permutation(n)
    expected = distance_correlation_sqr(x, y, weights=w)
    for name, (a, b, c) in {
        "symmetry": (y, x, w),
        "translation": (x + 1e6, y - 5, w),
        "scaling": (3.3 * x, 1e-4 * y, w),
        "row order": (x[order], y[order], w[order]),
        "scale of the weights": (x, y, w * 1e-3),
        "tiny weights": (x, y, w * 1e-300),
        "huge weights": (x, y, w * 1e305),
    }.items():
        # An offset of 1e6 leaves the values themselves ten digits.
        tolerance = 1e-6 if name == "translation" else TOLERANCE
        assert distance_correlation_sqr(a, b, weights=c) == pytest.approx(expected, abs=tolerance), name


def test_other_weights_give_another_result() -> None:
    x, y, w = _data(60, 2, 1)
    assert abs(distance_correlation_sqr(x, y, weights=w) - distance_correlation_sqr(x, y)) > 1e-3


def test_a_far_outlier_does_not_hide_the_other_samples() -> None:
    # Against the same mean in extended precision and as a product of contrasts, which loses few digits.
    x, y, w = _data(12, 2, 1)
    x[7] = 1e9
    i, j, k, m = np.array(list(itertools.permutations(range(12), 4))).T
    contrasts = []
    for z in (x.astype(np.longdouble), y.astype(np.longdouble)):
        d = np.sqrt(np.square(z[:, None] - z).sum(axis=2))
        contrasts.append(d[i, j] + d[k, m] - d[i, k] - d[j, m])
    a, b = contrasts
    xy, xx, yy = (np.average(c, weights=w[i] * w[j] * w[k] * w[m]) for c in (a * b, a * a, b * b))
    expected = float(xy / np.sqrt(xx * yy))
    assert distance_correlation_sqr(x, y, weights=w) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("n", [4, 23, 200])
@pytest.mark.parametrize("kind", ["constant", "one differs", "all equally far apart"])
def test_no_distance_variance_is_zero(kind: str, n: int) -> None:
    _, y, w = _data(n, 1, 2)
    x = {
        "constant": np.full(n, 0.1),
        "one differs": np.eye(n)[:, n // 3] / 7,
        "all equally far apart": np.eye(n),
    }
    assert distance_correlation_sqr(x[kind], y, weights=w) == 0
    assert distance_correlation_sqr(x[kind], x[kind], weights=w) == 0


def test_a_variable_with_itself_is_1_and_variances_are_not_negative() -> None:
    for seed in range(10):
        x, _, w = _data(5, 1, 1, seed)
        assert distance_covariance_sqr(x, x, weights=w) >= 0
        assert distance_correlation_sqr(x, x, weights=w) == pytest.approx(1, abs=1e-12)


def test_it_is_0_on_average_where_the_weights_make_independent() -> None:
    values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        x, y = rng.random((2, 60))
        weights = 1 / (0.3 + ((x > 0.5) == (y > 0.5)))
        kept = rng.random(60) < 0.3 / weights * 2  # more often where x and y agree
        values.append(distance_covariance_sqr(x[kept], y[kept], weights=weights[kept]))
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5
    assert np.std(values) > 0


def test_few_rows_with_much_of_the_weight_cost_few_digits() -> None:
    x, y, w = _data(10, 2, 1)
    w[:2] = [3e3, 500]
    assert 1e-6 < quadruple_weight(torch.from_numpy(w)) < 1e-4
    extended = _correlation(*(z.astype(np.longdouble) for z in (x, y)), w.astype(np.longdouble))
    assert distance_correlation_sqr(x, y, weights=w) == pytest.approx(extended, abs=1e-8)


# -- within labels ----------------------------------------------------------------------------------------


def test_within_labels_every_class_has_its_weighted_correlation() -> None:
    x, y, w = _data(24, 2, 1)
    labels = np.array(["a", "b", "c"])[np.arange(24) % 3]
    w[[2, 5, 8, 11, 14, 17, 20, 23]] = 0  # all of c
    w[0] = 0
    result = conditional_distance_correlation_sqr(x, y, labels, weights=w)
    expected = {k: _correlation(x[labels == k], y[labels == k], w[labels == k]) for k in "ab"}
    assert result.values == pytest.approx(expected, abs=TOLERANCE)
    assert result.counts == {"a": 7, "b": 8}
    masses = [w[labels == k].sum() for k in "ab"]
    assert result.mean == pytest.approx(np.average(list(expected.values()), weights=masses), abs=TOLERANCE)
    kept = w > 0
    assert result == conditional_distance_correlation_sqr(x[kept], y[kept], labels[kept], weights=w[kept])
    equal = conditional_distance_correlation_sqr(x, y, labels, weights=np.full(24, 7.0))
    plain = conditional_distance_correlation_sqr(x, y, labels)
    assert (equal.counts, equal.values) == (plain.counts, pytest.approx(plain.values, abs=1e-12))
    assert equal.mean == pytest.approx(plain.mean, abs=1e-12)


def test_within_labels_errors_name_the_class() -> None:
    x, y, w = _data(24, 2, 1)
    labels = np.arange(24) // 12
    with pytest.raises(ValueError, match=r"each class of labels .* at least 4 samples, got fewer of 1 \(3\)"):
        conditional_distance_correlation_sqr(x, y, labels, weights=np.where(np.arange(24) < 15, w, 0))
    w[12:] = [1.0] * 2 + [1e-7] * 10
    with pytest.raises(ValueError, match="weights of label 1 are nearly all on fewer than 4 rows"):
        conditional_distance_correlation_sqr(x, y, labels, weights=w)


# -- inputs -----------------------------------------------------------------------------------------------


def test_kinds_of_weights() -> None:
    x, y, _ = _data(40, 2, 1)
    w = balancing_weights(y[:, 0] > 0.5, x)
    expected = distance_correlation_sqr(x, y, weights=w.weights.numpy())
    assert type(expected) is float
    for weights in (w, w.weights, w.weights.tolist(), w.weights.clone().requires_grad_()):
        assert distance_correlation_sqr(x, y, weights=weights) == expected
    whole = np.arange(40) % 3
    assert distance_correlation_sqr(x, y, weights=whole) == distance_correlation_sqr(x, y, weights=whole / 1)
    result: Any = distance_correlation_sqr(torch.from_numpy(x), y, weights=w)
    assert (result.dtype, result.requires_grad, result.item()) == (torch.float64, False, expected)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(7), ValueError, r"weights must have shape \(8,\), one weight a row, got \(7,\)"),
        (np.ones((8, 2)), ValueError, r"weights must have shape \(8,\), one weight a row, got \(8, 2\)"),
        ([1, 1, -1, 1, 1, 1, 1, 1], ValueError, r"weights must be finite and not negative: row\(s\) \[2\]"),
        ([1, 1, 1, np.nan, 1, 1, 1, np.inf], ValueError, r"finite and not negative: row\(s\) \[3, 7\]"),
        (np.zeros(8), ValueError, "weights must be above 0 in at least 4 rows, got 0 of 8"),
        ([1, 2, 3, 0, 0, 0, 0, 0], ValueError, "weights must be above 0 in at least 4 rows, got 3 of 8"),
        ([1] * 3 + [1e-9] * 5, ValueError, "weights are nearly all on fewer than 4 rows"),
        (["a"] * 8, TypeError, "weights must be real and numeric"),
    ],
)
def test_errors_say_what_is_wrong_with_the_weights(
    weights: Any, error: type[Exception], message: str
) -> None:
    x, y, _ = _data(8, 2, 1)
    for measure in (distance_correlation_sqr, distance_covariance_sqr):
        with pytest.raises(error, match=message):
            measure(x, y, weights=weights)
    with pytest.raises(error, match=message):
        partial_distance_correlation(x, y, x[:, 0], weights=weights)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    x, y, w = map(torch.from_numpy, _data(500, 20, 1))
    expected = distance_correlation_sqr(x, y, weights=w)
    # Weights come from wherever they are: those of `balancing_weights` are on the CPU.
    for weights in (w, w.cuda()):
        result = distance_correlation_sqr(x.cuda(), y.cuda(), weights=weights)
        assert result.device.type == "cuda"
        assert result.item() == pytest.approx(expected.item(), abs=1e-12)
