"""Distance correlation against `dcor`, against extended precision, and its invariances, errors and memory."""

from __future__ import annotations

from typing import Any

import dcor
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles import LargestTensor, tiles_of

from mdnorm.metrics import distance_correlation_sqr

TOLERANCE = 1e-9


def _u_centred(x: np.ndarray) -> tuple[np.ndarray, float]:
    """U-centred distances of (n, p) in extended precision, and how much larger the distances are."""
    x = x.astype(np.longdouble)
    n = len(x)
    distances = np.zeros((n, n), dtype=np.longdouble)
    for column in x.T:
        distances += (column[:, None] - column) ** 2
    distances = np.sqrt(distances)
    sums = distances.sum(axis=0)
    centred = distances - sums / (n - 2) - sums[:, None] / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0)
    size = np.sqrt((centred**2).sum())
    return centred, float(np.sqrt((distances**2).sum()) / size) if size > 0 else np.inf


def _reference(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The statistic by its definition, in extended precision, and the loss of digits to expect of others."""
    (a, a_loss), (b, b_loss) = (_u_centred(z.reshape(len(z), -1)) for z in (x, y))
    denominator = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / denominator) if denominator > 0 else 0.0, max(a_loss, b_loss)


def _dcor(x: np.ndarray, y: np.ndarray) -> float:
    # The method "auto" takes, for two single columns, an algorithm that loses digits to a common offset.
    return float(dcor.u_distance_correlation_sqr(x, y, method="naive"))


def _dependent(n: int, p: int, q: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x[:, :1] ** 2 + rng.standard_normal((n, q))


@st.composite
def _variables(draw: st.DrawFn, n: int) -> np.ndarray:
    """(n,) or (n, p) with ties, duplicated rows, constant columns, offsets and scales."""
    num_columns = draw(st.sampled_from([None, 1, 2, 3, 10]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n,) if num_columns is None else (n, num_columns)
    kind = draw(st.sampled_from(["normal", "binary", "levels", "skewed", "constant"]))
    if kind == "normal":
        values = rng.standard_normal(shape)
    elif kind == "binary":
        values = (rng.random(shape) < draw(st.sampled_from([0.1, 0.5]))).astype(float)
    elif kind == "levels":
        values = rng.integers(0, 4, shape) / 3
    elif kind == "skewed":
        values = np.exp(3 * rng.standard_normal(shape))
    else:
        values = np.full(shape, rng.standard_normal())
    if draw(st.booleans()):
        values[rng.integers(0, n, n // 2)] = values[0]
    if num_columns is not None and draw(st.booleans()):
        values[:, 0] = 3.7
    scale = draw(st.sampled_from([1e-6, 1.0, 1e5]))
    return scale * values + draw(st.sampled_from([0.0, -3.0, 1e6]))


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(4, 60))
    return draw(_variables(n)), draw(_variables(n))


# -- values -----------------------------------------------------------------------------------------------


@given(_pairs(), st.sampled_from([None, 1, 7, 64]))
def test_equals_the_definition_and_dcor(pair: tuple[np.ndarray, np.ndarray], tile_size: int | None) -> None:
    x, y = pair
    with tiles_of(tile_size):
        result = distance_correlation_sqr(x, y)
    expected, loss = _reference(x, y)
    assert -1 <= result <= 1
    if loss < 1e5:
        assert result == pytest.approx(expected, abs=TOLERANCE)
    if loss < 1e2:  # dcor subtracts sums of squares: it loses twice as many digits
        assert result == pytest.approx(_dcor(x, y), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("n", "p", "q"),
    [(4, 1, 1), (5, 3, 2), (300, 1, 1), (300, 5, 2), (500, 84, 1), (2000, 1, 1), (2000, 3, 2)],
)
def test_equals_dcor_for_many_samples(n: int, p: int, q: int) -> None:
    x, y = _dependent(n, p, q)
    assert distance_correlation_sqr(x, y) == pytest.approx(
        float(dcor.u_distance_correlation_sqr(x, y)), abs=TOLERANCE
    )


@pytest.mark.parametrize(("p", "q"), [(1, 1), (4, 1), (4, 3)])
def test_large_offsets_cost_no_digits(p: int, q: int) -> None:
    x, y = _dependent(1000, p, q)
    x, y = x + 1e6, y - 2e6
    result = distance_correlation_sqr(x, y)
    assert result == pytest.approx(_dcor(x, y), abs=TOLERANCE)
    assert result == pytest.approx(_reference(x, y)[0], abs=1e-12)


@pytest.mark.parametrize("p", [1, 3])
def test_a_far_outlier_does_not_hide_the_other_samples(p: int) -> None:
    # The case the row effects are for: without them not one digit of the result is right.
    x, y = _dependent(50, p, 1)
    x[7] = 1e9
    assert distance_correlation_sqr(x, y) == pytest.approx(_reference(x, y)[0], abs=1e-7)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e6])
def test_constant_is_zero_as_in_dcor(offset: float) -> None:
    x, y = np.full((20, 3), offset), _dependent(20, 2, 1)[1]
    assert dcor.u_distance_correlation_sqr(x, y) == 0
    assert distance_correlation_sqr(x, y) == 0
    assert distance_correlation_sqr(y, x[:, 0]) == 0
    assert distance_correlation_sqr(x, x) == 0


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-3 / 7])
@pytest.mark.parametrize("n", [4, 23, 200])
@pytest.mark.parametrize("kind", ["one differs", "all equally far apart"])
def test_no_distance_variance_but_rounding_is_zero(kind: str, n: int, scale: float) -> None:
    # U-centring takes all of these distances away: dcor may return any number here, rounding over rounding.
    x = scale * (np.eye(n)[:, n // 3] if kind == "one differs" else np.eye(n))
    x = x - x.mean()
    assert distance_correlation_sqr(x, _dependent(n, 1, 2)[1]) == 0
    assert distance_correlation_sqr(x, x) == 0


@pytest.mark.parametrize("exponent", [-320, -200, 200, 300])
@pytest.mark.parametrize("p", [1, 3])
def test_extreme_scales_neither_overflow_nor_vanish(exponent: int, p: int) -> None:
    x = np.round(1000 * _dependent(40, p, 1)[0])  # still distinct among the subnormal numbers
    y = _dependent(40, p, 1)[1]
    scaled = x * 1e100 * 10.0 ** (exponent - 100) if exponent > 0 else x * 10.0**exponent
    expected = distance_correlation_sqr(x, y)
    assert distance_correlation_sqr(scaled, y) == pytest.approx(
        expected, abs=1e-3 if exponent < -300 else 1e-12
    )


def test_huge_constant_column_beside_small_values() -> None:
    x, y = _dependent(30, 2, 1)
    beside = np.column_stack([np.full(30, 1e300), 1e-20 * x])
    assert distance_correlation_sqr(beside, y) == pytest.approx(distance_correlation_sqr(x, y), abs=1e-12)


def test_is_negative_about_half_of_the_time_under_independence() -> None:
    rng = np.random.default_rng(0)
    values = [distance_correlation_sqr(*rng.standard_normal((2, 30, 2))) for _ in range(200)]
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8
    assert abs(np.mean(values)) < 0.02


def test_is_one_of_a_variable_with_itself_and_finds_nonlinear_dependence() -> None:
    x, _ = _dependent(100, 3, 1)
    assert distance_correlation_sqr(x, x) == pytest.approx(1, abs=1e-12)
    assert distance_correlation_sqr(x[:, 0], x[:, 0] ** 2) > 0.1


# -- invariances ------------------------------------------------------------------------------------------


@given(st.integers(4, 80), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1000))
def test_invariances(n: int, p: int, q: int, seed: int) -> None:
    x, y = _dependent(n, p, q, seed)
    rng = np.random.default_rng(seed + 1)
    rotation, _ = np.linalg.qr(rng.standard_normal((p, p)))
    order = rng.permutation(n)
    expected = distance_correlation_sqr(x, y)
    for name, other in {
        "symmetry": (y, x),
        "translation": (x + 10 * rng.standard_normal(p), y - 5),
        "rotation": (x @ rotation, y),
        "scaling": (3.3 * x, 1e-4 * y),
        "reflection": (-x, y),
        "row order": (x[order], y[order]),
        "constant column": (np.column_stack([x, np.ones(n)]), y),
    }.items():
        assert distance_correlation_sqr(*other) == pytest.approx(expected, abs=TOLERANCE), name


def test_permuting_one_variable_alone_changes_the_result() -> None:
    x, y = _dependent(60, 2, 1)
    assert abs(distance_correlation_sqr(x, y) - distance_correlation_sqr(x[::-1], y)) > 1e-3


# -- inputs -----------------------------------------------------------------------------------------------


def test_tensors_give_a_tensor_and_arrays_a_float() -> None:
    x, y = _dependent(30, 2, 1)
    expected = distance_correlation_sqr(x, y)
    assert type(expected) is float
    tensor, column = torch.from_numpy(x), torch.from_numpy(y)
    for pair in ((tensor, column), (tensor, y), (x, column)):
        result: Any = distance_correlation_sqr(*pair)
        assert isinstance(result, torch.Tensor)
        assert result.shape == ()
        assert result.dtype == torch.float64
        assert result.item() == expected
    assert distance_correlation_sqr(x.tolist(), y[:, 0].tolist()) == expected


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.int8, torch.uint8, torch.bool],
    ids=str,
)
def test_every_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(40, 3)).abs().round().to(dtype)
    y = torch.randn(40)
    result = distance_correlation_sqr(x, y)
    assert result.dtype == torch.float64
    assert result == distance_correlation_sqr(x.double(), y.double())
    if dtype != torch.bfloat16:
        assert distance_correlation_sqr(x.numpy(), y.numpy()) == result.item()


def test_small_differences_of_large_low_precision_values_count() -> None:
    # The values are exact in float16, sums and squares of them are not.
    x = torch.tensor([1000.0, 1001.0, 1002.0, 1003.0, 1001.0, 1000.0], dtype=torch.float16)
    assert distance_correlation_sqr(x, x - 1000).item() == pytest.approx(1, abs=1e-12)


def test_gradients_are_detached_and_inputs_unchanged() -> None:
    x, y = (torch.from_numpy(z).requires_grad_() for z in _dependent(20, 2, 1))
    before = x.detach().clone()
    assert not distance_correlation_sqr(x, y).requires_grad
    assert torch.equal(x, before)


def test_odd_memory_layouts() -> None:
    x, y = _dependent(30, 4, 2)
    expected = distance_correlation_sqr(x, y)
    frozen = x.copy()
    frozen.flags.writeable = False
    for other in (
        np.asfortranarray(x),
        x[::-1][::-1],
        x.astype(">f8"),
        frozen,
        np.repeat(x, 2, axis=1)[:, ::2],
    ):
        assert distance_correlation_sqr(other, y) == expected
    assert distance_correlation_sqr(torch.from_numpy(x.T.copy()).T, y).item() == expected


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (np.zeros((5, 2)), np.zeros(6), ValueError, "5 rows in x and 6 in y"),
        (np.zeros((3, 2)), np.zeros(3), ValueError, "at least 4 rows, got 3"),
        (np.zeros((0, 2)), np.zeros((0, 1)), ValueError, "at least 4 rows, got 0"),
        (np.zeros((5, 2, 3)), np.zeros(5), ValueError, r"x must have shape .* got \(5, 2, 3\).*x\.reshape"),
        (np.zeros(5), np.float64(1.0), ValueError, r"y must have shape .* got \(\)"),
        (np.zeros((5, 0)), np.zeros(5), ValueError, r"x must have at least one column, got shape \(5, 0\)"),
        (
            np.zeros(5),
            np.array([0, np.nan, 1, np.inf, 2]),
            ValueError,
            r"y has NaN .* row\(s\) 1, 3 \(2 of 5",
        ),
        (np.full((9, 2), np.nan), np.zeros(9), ValueError, r"x has NaN .* 0, 1, 2, 3, 4, … \(9 of 9 rows\)"),
        (np.zeros(5, dtype=complex), np.zeros(5), TypeError, "x must be real and numeric.*complex128"),
        (torch.zeros(5), torch.zeros(5, dtype=torch.complex64), TypeError, "y must be real.*complex64"),
        (np.array(["a"] * 5), np.zeros(5), TypeError, "x must be real and numeric.*encode categories"),
        (np.zeros(5), np.array([None] * 5), TypeError, "y must be real and numeric.*object"),
        (torch.zeros(5, device="meta"), torch.zeros(5), ValueError, r"x is on meta but y is on cpu.*y\.to"),
    ],
)
def test_errors_name_the_argument(x: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distance_correlation_sqr(x, y)


# -- memory and devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 84])
@pytest.mark.parametrize("tile_size", [None, 32])
@pytest.mark.parametrize("weights", [None, torch.rand(4000)], ids=["", "weights"])
def test_no_tensor_is_larger_than_a_tile_or_the_input(
    weights: torch.Tensor | None, tile_size: int | None, p: int
) -> None:
    n = 4000
    x, y = torch.randn(n, p), torch.randn(n, 2)  # two scalars would need no tile
    with tiles_of(tile_size), LargestTensor() as largest:
        distance_correlation_sqr(x, y, weights=weights)
    assert n * 16 <= largest.elements <= max(n * (tile_size or 64), n * p)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    x, y = (torch.from_numpy(z) for z in _dependent(500, 20, 1))
    expected = distance_correlation_sqr(x, y)
    for tile_size in (None, 64):
        with tiles_of(tile_size):
            result = distance_correlation_sqr(x.cuda(), y.cuda())
        assert result.device.type == "cuda"
        assert result.item() == pytest.approx(expected.item(), abs=1e-12)
    assert distance_correlation_sqr(x.cuda(), y.numpy()).device.type == "cuda"
    with pytest.raises(ValueError, match="x is on cuda:0 but y is on cpu"):
        distance_correlation_sqr(x.cuda(), y)
