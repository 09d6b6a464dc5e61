"""HSIC and CKA against their definitions with full kernel matrices, and their invariances and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import tiles_of

from mdnorm.metrics import cka, hsic
from mdnorm.metrics import kernels as kernels_module


def _kernel_matrix(x: np.ndarray, kernel: str, bandwidth: float | None = None) -> np.ndarray:
    x = x.reshape(len(x), -1)
    if kernel == "linear":
        return x @ x.T
    distances = np.sqrt(((x[:, None] - x) ** 2).sum(axis=-1))
    if bandwidth is None:
        pairs = distances[np.triu_indices(len(x), 1)]
        bandwidth = float(np.median(pairs) or np.median(pairs[pairs > 0]))
    return np.exp(-(distances**2) / (2 * bandwidth**2))


def _song_2012(k: np.ndarray, kernel_of_y: np.ndarray) -> float:
    """The unbiased estimate as in equation 5 of Song et al. (2012)."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), kernel_of_y - np.diag(np.diag(kernel_of_y))
    ones = np.ones(n)
    value = (
        np.trace(k @ m)
        + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (ones @ k @ m @ ones)
    )
    return float(value / (n * (n - 3)))


def _over_distinct_quadruples(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimate as a mean over all choices of different samples i, j, q, r."""
    n = len(k)
    index = [
        (i, j, q, r) for i in range(n) for j in range(n) for q in range(n) for r in range(n)
        if len({i, j, q, r}) == 4
    ]  # fmt: skip
    i, j, q, r = np.array(index).T
    return float(np.mean(k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]))


def _pair(n: int, p: int, q: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    y = x[:, :1] ** 2 + x[:, -1:] + rng.standard_normal((n, q))
    return (np.round(x), np.round(y)) if seed % 3 == 0 and n > 30 else (x, y)


@given(
    st.integers(4, 70), st.integers(1, 10), st.integers(1, 5), st.integers(0, 999),
    st.sampled_from(["rbf", "linear"]), st.sampled_from([None, 1, 13]),
)  # fmt: skip
def test_equal_their_definition(
    n: int, p: int, q: int, seed: int, kernel: Any, tile_size: int | None
) -> None:
    x, y = _pair(n, p, q, seed)
    k, m = _kernel_matrix(x, kernel), _kernel_matrix(y, kernel)
    scale = np.sqrt(_song_2012(k, k) * _song_2012(m, m))
    with tiles_of(tile_size):
        assert hsic(x, y, kernel=kernel) == pytest.approx(_song_2012(k, m), rel=1e-9, abs=1e-10 * scale)
        assert cka(x, y, kernel=kernel) == pytest.approx(_song_2012(k, m) / scale, abs=1e-9)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("n", [4, 5, 8])
def test_hsic_is_the_mean_over_different_samples(kernel: Any, n: int) -> None:
    x, y = _pair(n, 2, 1, 1)
    expected = _over_distinct_quadruples(_kernel_matrix(x, kernel), _kernel_matrix(y, kernel))
    assert hsic(x, y, kernel=kernel) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_are_about_zero_under_independence(kernel: Any) -> None:
    rng = np.random.default_rng(0)
    values = np.array([cka(*rng.standard_normal((2, 20, 30)), kernel=kernel) for _ in range(200)])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
    assert (values < 0).mean() > 0.3
    covariances = np.array([hsic(*rng.standard_normal((2, 20, 3)), kernel=kernel) for _ in range(200)])
    assert abs(covariances.mean()) < 4 * covariances.std() / np.sqrt(200)


@given(st.integers(5, 60), st.integers(1, 5), st.integers(0, 100))
def test_invariances(n: int, p: int, seed: int) -> None:
    x, y = _pair(n, p, 2, seed)
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((p, p)))
    order = rng.permutation(n)
    for kernel in ("linear", "rbf"):
        expected = cka(x, y, kernel=kernel)  # type: ignore[call-overload]
        for name, pair in {
            "symmetry": (y, x),
            "translation": (x + 100, y - 3),
            "rotation": (x @ rotation, y),
            "scaling": (1e-3 * x, 1e4 * y),
            "row order": (x[order], y[order]),
        }.items():
            assert cka(*pair, kernel=kernel) == pytest.approx(expected, abs=1e-8), name  # type: ignore[call-overload]
    assert cka(x @ rotation * 3, x) == pytest.approx(1, abs=1e-9)
    assert hsic(3 * x, y / 2, kernel="linear") == pytest.approx(
        9 / 4 * hsic(x, y, kernel="linear"), rel=1e-9, abs=1e-10
    )


def test_the_linear_kernel_from_columns_and_from_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _pair(200, 7, 3, 1)
    x += 1e3
    from_columns = hsic(x, y, kernel="linear")
    monkeypatch.setattr(kernels_module, "_MAX_LOSS", 0.0)
    from_pairs = hsic(x, y, kernel="linear")
    assert from_columns == pytest.approx(from_pairs, rel=1e-10)
    assert from_columns != from_pairs


def test_a_far_outlier_costs_the_linear_kernel_no_digits() -> None:
    x, y = _pair(50, 3, 1, 1)
    x[3] *= 1e7
    # The mean is far from all samples: about it, even extended precision would not do.
    k, m = (_kernel_matrix((v - np.median(v, axis=0)).astype(np.longdouble), "linear") for v in (x, y))
    expected = _song_2012(k, m) / np.sqrt(_song_2012(k, k)) / np.sqrt(_song_2012(m, m))
    assert cka(x, y) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("bandwidth", [0.5, (0.5, 2.0), (None, 2.0)])
def test_bandwidth(bandwidth: Any) -> None:
    x, y = _pair(30, 3, 1, 1)
    x = 7 * x  # the bandwidth is in the units of the input
    first, second = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    expected = _song_2012(_kernel_matrix(x, "rbf", first), _kernel_matrix(y, "rbf", second))
    assert hsic(x, y, bandwidth=bandwidth) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_median_of_distances_above_zero_where_most_are_zero() -> None:
    x = np.r_[np.zeros(40), 1.0, 2.0, 5.0]
    y = np.random.default_rng(0).standard_normal(43)
    expected = _song_2012(_kernel_matrix(x, "rbf"), _kernel_matrix(y, "rbf"))
    assert hsic(x, y) == pytest.approx(expected, rel=1e-9)


def test_bandwidth_of_many_samples_is_that_of_some() -> None:
    x, y = _pair(2500, 2, 1, 1)
    result = hsic(x, y)
    assert result == hsic(x, y)
    distances = np.sqrt(((x[:2000, None] - x[:2000]) ** 2).sum(-1)[np.triu_indices(2000, 1)])
    near = hsic(x, y, bandwidth=(float(np.median(distances)), None))
    assert result == pytest.approx(near, rel=0.05)
    assert result != near


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_a_constant_is_zero(kernel: Any) -> None:
    x = np.random.default_rng(0).standard_normal((20, 2))
    for pair in ((x, np.full(20, 0.1)), (np.full(20, 0.1), x), (np.ones(20), np.ones(20))):
        assert hsic(*pair, kernel=kernel) == 0
        assert cka(*pair, kernel=kernel) == 0


def test_categories_with_one_sample_each_have_no_kernel_variance() -> None:
    x = np.random.default_rng(0).standard_normal((20, 2))
    for kernel in ("linear", "rbf"):
        assert cka(np.eye(20), x, kernel=kernel) == 0  # type: ignore[call-overload]


def test_tensors_give_a_tensor_and_arrays_a_float() -> None:
    x, y = _pair(20, 3, 1, 1)
    for function in (hsic, cka):
        expected = function(x, y)
        assert type(expected) is float
        tensor = torch.from_numpy(x).requires_grad_()
        result = function(tensor, y)
        assert isinstance(result, torch.Tensor)
        assert result.dtype == torch.float64
        assert not result.requires_grad
        assert result.item() == expected
        # Only the input is rounded.
        assert function(x.astype(np.float32), y) == function(x.astype(np.float32).astype(float), y)


@pytest.mark.parametrize("function", [hsic, cka])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "cosine"}, "kernel must be 'rbf' or 'linear', got 'cosine'"),
        ({"kernel": "linear", "bandwidth": 1.0}, "the linear kernel has no bandwidth"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth must be .* got 0.0"),
        ({"kernel": "rbf", "bandwidth": float("nan")}, "bandwidth must be .* got nan"),
        ({"kernel": "rbf", "bandwidth": (1.0, -1.0)}, r"bandwidth must be .* got \(1.0, -1.0\)"),
        ({"kernel": "rbf", "bandwidth": (1.0,)}, r"bandwidth must be .* got \(1.0,\)"),
        ({"y": np.zeros(9)}, "10 rows in x and 9 in y"),
        ({"x": np.zeros(3), "y": np.zeros(3)}, "at least 4 rows, got 3: the bias-corrected estimate"),
        ({"y": np.full(10, np.nan)}, "y has NaN"),
    ],
)
def test_errors_name_the_argument(function: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{"x": np.arange(10.0), "y": np.arange(10.0), **arguments})


def test_overflow_of_the_linear_kernel() -> None:
    x = 1e160 * np.arange(6.0)
    with pytest.raises(OverflowError, match="larger than any float64"):
        hsic(x, x, kernel="linear")
    assert cka(x, x) == pytest.approx(1)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    x, y = _pair(300, 20, 2, 1)
    for kernel in ("linear", "rbf"):
        expected = cka(x, y, kernel=kernel)  # type: ignore[call-overload]
        assert cka(torch.from_numpy(x).cuda(), y, kernel=kernel).item() == pytest.approx(expected, abs=1e-12)  # type: ignore[call-overload]
