"""Sums over the pairs of two scalars by sorting, against all pairs, and distance correlation through them."""

from __future__ import annotations

import dcor
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import LargestTensor, tiles_of

from mdnorm.metrics import distance_correlation_sqr, distance_covariance_sqr, partial_distance_correlation
from mdnorm.metrics import pairwise as pairwise_module
from mdnorm.metrics.pairwise import Distances
from mdnorm.metrics.scalars import SortedScalar, sum_of_products

TOLERANCE = 1e-9


def _minima(x: np.ndarray) -> np.ndarray:
    """m_ij by its definition."""
    z = x - np.sort(x)[len(x) // 2]
    minima = np.minimum(np.abs(z)[:, None], np.abs(z)) * (np.sign(z)[:, None] * np.sign(z) > 0)
    np.fill_diagonal(minima, 0)
    return minima


@st.composite
def _scalars(draw: st.DrawFn, n: int) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "levels", "binary", "mostly zero", "constant", "outliers"]))
    values = {
        "normal": rng.standard_normal(n),
        "levels": rng.integers(-3, 4, n) / 3,
        "binary": (rng.random(n) < 0.3).astype(float),
        "mostly zero": np.maximum(rng.standard_normal(n) - 1, 0),
        "constant": np.full(n, 1.3),
        "outliers": rng.standard_cauchy(n) ** 3,
    }[kind]
    return values + draw(st.sampled_from([0.0, -2.0, 1e5]))


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 400))
    x = draw(_scalars(n))
    y = draw(_scalars(n))
    return x, draw(st.sampled_from([y, x, -x, x + y]))


@given(_pairs())
def test_sums_equal_those_over_all_pairs(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = map(_minima, pair)
    x, y = (SortedScalar.of(torch.from_numpy(values)) for values in pair)
    np.testing.assert_allclose(x.row_sums(), a.sum(axis=0), rtol=1e-12)
    # Terms are not negative, so that no difference can lose digits.
    np.testing.assert_allclose(2 * x.sum_of_squares(), (a**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(2 * sum_of_products(x, y.values), (a * b).sum(), rtol=1e-12)


def _long_pair(kind: str, n: int = 2500) -> tuple[np.ndarray, np.ndarray]:
    assert n >= pairwise_module._MIN_SAMPLES_FOR_SORTING
    rng = np.random.default_rng(0)
    x = rng.standard_normal(n)
    y = x**2 + rng.standard_normal(n)
    return {
        "normal": (x, y),
        "independent": (x, rng.standard_normal(n)),
        "identical": (x, x),
        "ties": (np.round(x), np.round(y)),
        "binary": ((x > 1).astype(float), (y > 0).astype(float)),
        "offset": (x + 1e6, y - 3e7),
        "two clusters far apart": (x + 1e6 * (y > 1), y),
        "heavy tails": (np.exp(2 * x), y),
        "mostly equal": (np.maximum(x - 1, 0), np.minimum(y, 0)),
        "small": (1e-200 * x, 1e-150 * y),
        "large": (1e200 * x, 1e150 * y),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["normal", "independent", "identical", "ties", "binary", "offset", "two clusters far apart",
     "heavy tails", "mostly equal"],
)  # fmt: skip
def test_equals_dcor_from_all_pairs(kind: str) -> None:
    x, y = _long_pair(kind)
    # Its fast methods lose digits to a common offset.
    expected = float(dcor.u_distance_correlation_sqr(x, y, method="naive"))
    assert distance_correlation_sqr(x, y) == pytest.approx(expected, abs=TOLERANCE)
    covariance = float(dcor.u_distance_covariance_sqr(x, y, method="naive"))
    scale = np.ptp(x) * np.ptp(y)
    assert distance_covariance_sqr(x, y) == pytest.approx(covariance, rel=1e-9, abs=1e-13 * scale)


@pytest.mark.parametrize("kind", ["normal", "ties", "offset", "heavy tails", "small", "large"])
def test_equals_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _long_pair(kind)
    z = np.round(x + y / np.abs(y).max() * np.abs(x).max(), 2 if kind != "small" else 250)
    by_sorting = distance_correlation_sqr(x, y), partial_distance_correlation(x, y, z)
    monkeypatch.setattr(pairwise_module, "_MIN_SAMPLES_FOR_SORTING", 10**9)
    by_tiles = distance_correlation_sqr(x, y), partial_distance_correlation(x, y, z)
    assert by_sorting == pytest.approx(by_tiles, abs=1e-11)
    assert by_sorting != by_tiles  # they were computed in two ways


def test_many_samples_against_the_fast_method_of_dcor() -> None:
    x, y = _long_pair("normal", 50_000)
    expected = float(dcor.u_distance_correlation_sqr(x, y, method="avl"))
    assert distance_correlation_sqr(x, y) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("position", [0, 1234])
def test_a_far_outlier_does_not_hide_the_other_samples(position: int) -> None:
    x, y = _long_pair("normal")
    x[position] = 1e9
    # U-centred, a sample infinitely far away is not there: its row of A is a multiple of n/(n−2) of none.
    others = np.arange(len(x)) != position
    expected = distance_correlation_sqr(x[others], y[others])
    assert distance_correlation_sqr(x, y) == pytest.approx(expected, abs=5e-3)
    assert distance_correlation_sqr(-x, y) == pytest.approx(distance_correlation_sqr(x, y), abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "one differs"])
def test_no_distance_variance_is_zero(kind: str) -> None:
    _, y = _long_pair("normal")
    x = np.full(len(y), 0.1)
    if kind == "one differs":
        x[17] = 5.0
    assert distance_correlation_sqr(x, y) == 0
    assert distance_correlation_sqr(x, x) == 0
    assert distance_covariance_sqr(x, y) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("kind", ["normal", "ties", "offset", "heavy tails", "mostly equal"])
@pytest.mark.parametrize("p", [2, 9])
def test_a_scalar_beside_columns(kind: str, p: int) -> None:
    n = 900
    y = _long_pair(kind)[1][:n]
    x = np.random.default_rng(1).standard_normal((n, p)) + np.tanh(y - np.median(y))[:, None]
    expected = float(dcor.u_distance_correlation_sqr(x, y))
    for size in (None, 17):
        with tiles_of(size):
            assert distance_correlation_sqr(x, y) == pytest.approx(expected, abs=TOLERANCE)
            assert distance_correlation_sqr(y, x) == pytest.approx(expected, abs=TOLERANCE)


def test_effects_are_in_the_order_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.standard_normal((700, p))) for p in (3, 1))
    effects = pairwise_module.centred_products([Distances(x), Distances(y)]).effects
    for rows, effect in zip((x, y), effects, strict=True):
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        sums = distances.sum(dim=1)
        expected = sums / 698 - sums.sum() / (2 * 699 * 698)
        np.testing.assert_allclose(effect, expected, rtol=1e-11)
        centred = (distances - effect - effect[:, None]).fill_diagonal_(0)
        np.testing.assert_allclose(centred.sum(dim=1), 0, atol=1e-10)


def test_memory_is_linear() -> None:
    n = 20_000
    x, y = torch.randn(2, n)
    with LargestTensor() as largest:
        distance_correlation_sqr(x, y)
    assert n <= largest.elements <= 4 * n
