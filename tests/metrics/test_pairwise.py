"""Distances from matrix products, tiles, products of U-centred matrices and of their rows."""

from __future__ import annotations

import dcor
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import tiles_of

from mdnorm.metrics import distance_correlation_sqr, partial_distance_correlation
from mdnorm.metrics import pairwise as pairwise_module
from mdnorm.metrics.pairwise import (
    Distances,
    GaussianKernel,
    LinearKernel,
    centred_products,
    permuted_products,
    row_products,
)


def _cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n, p = 300, 20
    x = rng.standard_normal((n, p))
    centres = rng.standard_normal((5, p))
    return {
        "normal": x,
        "duplicates": x[rng.integers(0, 60, n)],
        "a few close pairs": np.concatenate([x[:-3], x[:3] + 1e-9]),
        "tight clusters far apart": 1e3 * centres[rng.integers(0, 5, n)] + 1e-4 * x,
        "two levels of clusters": centres[rng.integers(0, 5, n)] + 1e-2 * x[rng.integers(0, 40, n)],
        "large common offset": x + 1e6,
        "integers": rng.integers(0, 3, (n, p)).astype(float),
        "one-hot": np.eye(p)[rng.integers(0, p, n)],
        "on a line": np.outer(np.linspace(0, 1, n), np.ones(p)) + 1e-6 * x,
        "mostly zero": np.maximum(x - 2.2, 0),
        "norms of all sizes": x * np.exp(3 * rng.standard_normal((n, 1))),
        "six columns": x[:, :6],
        "five columns": x[:, :5],
    }


def _distances_in_extended_precision(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.longdouble)
    return np.sqrt(((x[:, None] - x) ** 2).sum(axis=-1))


@pytest.mark.parametrize("kind", _cases())
@pytest.mark.parametrize("by_index", [False, True])
def test_distances_are_precise_whatever_their_size(kind: str, by_index: bool) -> None:
    x = _cases()[kind]
    n = len(x)
    expected = _distances_in_extended_precision(x)
    distances = Distances(torch.from_numpy(x))
    first, second = slice(10, 90), slice(10, n)
    if by_index:
        order = torch.from_numpy(np.random.default_rng(1).permutation(n))
        first, second = order[first], order[second]
    block = distances.block(first, second, torch.empty(80, n - 10, dtype=torch.float64)).numpy()
    expected = expected[np.asarray(np.r_[first])][:, np.asarray(np.r_[second])]
    apart = np.broadcast_to(np.r_[first][:, None] != np.r_[second], expected.shape)
    np.testing.assert_allclose(block[apart], expected[apart].astype(float), rtol=2e-12)
    assert (block[apart & (expected == 0)] == 0).all()


@pytest.mark.parametrize("kind", _cases())
def test_correlation_equals_dcor(kind: str) -> None:
    x = _cases()[kind]
    rng = np.random.default_rng(3)
    y = x[:, 0] / np.abs(x[:, 0]).max() + 0.1 * rng.standard_normal(len(x))
    expected = float(dcor.u_distance_correlation_sqr(x, y))
    for tile_size in (None, 7):
        with tiles_of(tile_size):
            assert distance_correlation_sqr(x, y) == pytest.approx(expected, abs=1e-9)
            assert distance_correlation_sqr(x, x) == pytest.approx(1, abs=1e-12)


def test_tiles_of_several_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _cases()["duplicates"]
    y = np.random.default_rng(0).standard_normal((len(x), 2)) + x[:, :1]
    expected = distance_correlation_sqr(x, y)
    for rows in (8, 1, 40, 299):
        monkeypatch.setattr(pairwise_module, "_TILE_CPU", (rows, 50))
        assert distance_correlation_sqr(x, y) == pytest.approx(expected, abs=1e-13)


def _u_centred(matrix: np.ndarray) -> np.ndarray:
    n = len(matrix)
    matrix = matrix - np.diag(np.diag(matrix))
    sums = matrix.sum(axis=0)
    centred = matrix - sums / (n - 2) - sums[:, None] / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0)
    return centred


def _three_matrices(n: int, seed: int = 0) -> tuple[list[pairwise_module.PairwiseMatrix], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    x, y, z = (rng.standard_normal((n, p)) for p in (8, 2, 3))
    matrices = [
        Distances(torch.from_numpy(x)),
        GaussianKernel(torch.from_numpy(y), 0.7),
        LinearKernel(torch.from_numpy(z)),
    ]
    squared = [((v[:, None] - v) ** 2).sum(-1) for v in (x, y)]
    full = [np.sqrt(squared[0]), np.exp(-squared[1] / (2 * 0.7**2)), z @ z.T]
    return matrices, [_u_centred(matrix) for matrix in full]


@given(st.integers(4, 90), st.sampled_from([None, 1, 9]), st.integers(0, 100))
def test_products_of_distances_and_kernels(n: int, tile_size: int | None, seed: int) -> None:
    matrices, centred = _three_matrices(n, seed)
    with tiles_of(tile_size):
        result = centred_products(matrices)
    expected = np.array([[(a * b).sum() for b in centred] for a in centred]) / (n * (n - 3))
    np.testing.assert_allclose(result.products, expected, rtol=1e-10, atol=1e-13)
    assert not result.is_zero.any()


@pytest.mark.parametrize("tile_size", [None, 1, 9])
def test_products_of_rows(tile_size: int | None) -> None:
    matrices, (a, b, _) = _three_matrices(60)
    with tiles_of(tile_size):
        effects = centred_products(matrices).effects
        result = row_products(matrices[0], matrices[1], effects[:2])
    expected = np.stack([(u * v).sum(axis=1) for u, v in ((a, a), (a, b), (b, b))])
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tile_size", [None, 1, 9])
def test_products_of_permuted_matrices(tile_size: int | None) -> None:
    n = 60
    matrices, (a, b, _) = _three_matrices(n)
    effects = centred_products(matrices).effects
    orders = np.stack([np.random.default_rng(seed).permutation(n) for seed in range(5)])
    for first, second, left, right, index in ((0, 1, a, b, [0, 1]), (1, 0, b, a, [1, 0])):
        pair = matrices[first], matrices[second]
        with tiles_of(tile_size):
            result = permuted_products(*pair, effects[index], torch.from_numpy(orders))
        expected = [(left * right[order][:, order]).sum() / (n * (n - 3)) for order in orders]
        np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-13)


def test_a_constant_has_no_products() -> None:
    x = torch.randn(30, 2, dtype=torch.float64)
    result = centred_products([Distances(x[:, :0]), Distances(x), Distances(x[:, :0])])
    assert result.is_zero.tolist() == [True, False, True]
    assert result.products[1, 1] > 0
    result.products[1, 1] = 0
    assert (result.products == 0).all()


def test_scalars_beside_constants_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of so many samples would take minutes."""
    monkeypatch.setattr(pairwise_module, "_tiled_sums", None)
    n = 100_000
    x, noise = np.random.default_rng(0).standard_normal((2, n))
    y, constant = x + noise, np.full(n, 3.0)
    assert distance_correlation_sqr(x, constant) == 0
    assert distance_correlation_sqr(constant, constant + 1) == 0
    assert distance_correlation_sqr(constant, constant, weights=1 + x**2) == 0
    expected = dcor.u_distance_correlation_sqr(x, y)
    assert partial_distance_correlation(x, y, constant) == pytest.approx(expected, rel=1e-10)
    correlations = centred_products(
        [Distances(torch.from_numpy(rows)) for rows in (x[:, None], np.empty((n, 0)), y[:, None])]
    ).correlations()
    np.testing.assert_allclose(correlations, [[1, 0, expected], [0, 0, 0], [expected, 0, 1]], rtol=1e-10)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    for kind, x in _cases().items():
        y = x[:, :1] ** 2
        expected = distance_correlation_sqr(x, y)
        result = distance_correlation_sqr(torch.from_numpy(x).cuda(), y)
        assert result.item() == pytest.approx(expected, abs=1e-11), kind
