"""`Moments` against least squares on the whole table in float64."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnorm.tables import Moments


def _table(
    n: int, num_features: int, num_columns: int, seed: int, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    design = rng.standard_normal((n, num_columns)) @ (np.eye(num_columns) + 0.3)
    features = design @ rng.standard_normal((num_columns, num_features)) + rng.standard_normal(
        (n, num_features)
    )
    return features + offset, design - offset


def _least_squares(features: np.ndarray, design: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    # Centred by hand: a column of ones beside a column of 1e6 would cost the reference its digits.
    weights = np.ones(len(features)) if weights is None else weights
    root = np.sqrt(weights)[:, None]
    x = design - np.average(design, axis=0, weights=weights)
    f = features - np.average(features, axis=0, weights=weights)
    return np.linalg.lstsq(x * root, f * root, rcond=None)[0]


def _in_blocks(features: np.ndarray, design: np.ndarray, cuts: list[int]) -> list[Moments]:
    parts = np.split(np.arange(len(features)), sorted(min(cut, len(features)) for cut in cuts))
    return [
        Moments.empty(features.shape[1], design.shape[1]).update(features[part], design[part])
        for part in parts
    ]


def _assert_close(a: Moments, b: Moments, rtol: float = 1e-9) -> None:
    assert (a.num_metadata, a.num_rows) == (b.num_metadata, b.num_rows)
    scale_x, scale_f = np.sqrt(np.diagonal(b.gram)), np.sqrt(b.feature_squares)
    scale_x, scale_f = np.where(scale_x > 0, scale_x, 1), np.where(scale_f > 0, scale_f, 1)
    assert a.count == pytest.approx(b.count)
    np.testing.assert_allclose(a.design_mean, b.design_mean, rtol=rtol, atol=rtol * scale_x.max(initial=0))
    np.testing.assert_allclose(a.feature_mean, b.feature_mean, rtol=rtol, atol=rtol * scale_f.max(initial=0))
    np.testing.assert_allclose((a.gram - b.gram) / np.outer(scale_x, scale_x), 0, atol=rtol)
    np.testing.assert_allclose((a.cross - b.cross) / np.outer(scale_x, scale_f), 0, atol=rtol)
    np.testing.assert_allclose(a.feature_squares / scale_f**2, b.feature_squares / scale_f**2, atol=rtol)


# --------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6, -3e8])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_coefficients_are_those_of_least_squares_also_far_from_zero(offset: float, block: int) -> None:
    features, design = _table(1000, 6, 3, seed=0, offset=offset)
    moments = Moments.empty(6, 2, 1)
    for start in range(0, 1000, block):
        moments.update(features[start : start + block], design[start : start + block])
    expected = _least_squares(features, design)
    np.testing.assert_allclose(moments.solve(), expected, atol=1e-8 if abs(offset) < 1e7 else 1e-6)
    residual = features - features.mean(0) - (design - design.mean(0)) @ expected
    np.testing.assert_allclose(moments.residual_squares(expected), (residual**2).sum(0), rtol=1e-6)


def test_float32_features_are_summed_in_float64() -> None:
    features, design = _table(5000, 3, 2, seed=1, offset=1e4)
    single = features.astype(np.float32)
    moments = Moments.empty(3, 2).update(single, design)
    np.testing.assert_allclose(
        moments.solve(), _least_squares(single.astype(np.float64), design), atol=1e-9, rtol=0
    )


def test_many_features_and_many_rows_are_taken_in_steps_of_the_same_result() -> None:
    for n, num_features in ((300, 3000), (200_000, 2)):
        features, design = _table(n, num_features, 2, seed=2, offset=100.0)
        moments = Moments.empty(num_features, 2).update(features, design)
        assert moments.num_rows == n
        np.testing.assert_allclose(moments.solve(), _least_squares(features, design), atol=1e-10)
        np.testing.assert_allclose(moments.feature_squares, n * features.var(0), rtol=1e-10)


def test_means_are_those_of_an_exact_sum() -> None:
    features, design = _table(60_000, 2, 2, seed=13, offset=1e8 / 3)
    moments = Moments.empty(2, 2).update(features, design)
    for mean, table in ((moments.feature_mean, features), (moments.design_mean, design)):
        exact = [math.fsum(column) / len(table) for column in table.T]
        np.testing.assert_allclose(mean, exact, rtol=2 * np.finfo(float).eps)


@given(st.integers(5, 60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_weights_are_repeated_rows(n: int, num_features: int, num_columns: int, seed: int) -> None:
    features, design = _table(n, num_features, num_columns, seed, offset=50.0)
    weights = np.random.default_rng(seed).integers(0, 4, n)
    weighted = Moments.empty(num_features, num_columns).update(features, design, weights)
    repeated = Moments.empty(num_features, num_columns).update(
        np.repeat(features, weights, axis=0), np.repeat(design, weights, axis=0)
    )
    assert weighted.num_rows == np.count_nonzero(weights)
    repeated.num_rows = weighted.num_rows
    _assert_close(weighted, repeated)


def test_weights_need_not_be_whole_numbers() -> None:
    features, design = _table(50, 3, 2, seed=3)
    weights = np.random.default_rng(0).random(50)
    moments = Moments.empty(3, 2).update(features, design, weights)
    np.testing.assert_allclose(moments.solve(), _least_squares(features, design, weights), atol=1e-11)


def test_ridge_penalises_metadata_only() -> None:
    features, design = _table(80, 3, 3, seed=4)
    design = design * [1.0, 100.0, 0.01]
    ridge = 0.7
    x = design - design.mean(0)
    penalty = 80 * ridge * np.diag([*x[:, :2].var(0), 0.0])
    expected = np.linalg.solve(x.T @ x + penalty, x.T @ (features - features.mean(0)))
    np.testing.assert_allclose(
        Moments.empty(3, 2, 1).update(features, design).solve(ridge), expected, rtol=1e-9
    )


def test_collinear_and_constant_columns_do_not_change_the_fitted_values() -> None:
    features, design = _table(60, 4, 2, seed=5)
    wide = np.column_stack([design, design @ [[2.0], [-1.0]], np.full(60, 1e5)])
    moments = Moments.empty(4, 4).update(features, wide)
    coefficients = moments.solve()
    assert moments.design_rank() == 3
    assert np.all(coefficients[3] == 0)
    np.testing.assert_allclose(
        (wide - wide.mean(0)) @ coefficients,
        (design - design.mean(0)) @ _least_squares(features, design),
        atol=1e-10,
    )


def test_only_protected_columns_or_none() -> None:
    features, design = _table(40, 3, 2, seed=6)
    np.testing.assert_allclose(
        Moments.empty(3, 0, 2).update(features, design).solve(ridge=9.0),
        _least_squares(features, design),
        atol=1e-11,
    )
    nothing = Moments.empty(3, 0).update(features, design[:, :0])
    assert nothing.solve().shape == (0, 3)
    assert nothing.design_rank() == 1
    np.testing.assert_allclose(nothing.feature_squares, 40 * features.var(0))


# --------------------------------------------------------------------------------------------------------
# Additivity
# --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 80),
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.integers(0, 80), min_size=2, max_size=2),
    st.sampled_from([0.0, 1e6]),
    st.integers(0, 10**6),
)
def test_merging_is_associative_commutative_and_the_whole(
    n: int, num_features: int, num_columns: int, cuts: list[int], offset: float, seed: int
) -> None:
    features, design = _table(n, num_features, num_columns, seed, offset)
    a, b, c = _in_blocks(features, design, cuts)
    whole = Moments.empty(num_features, num_columns).update(features, design)
    for together in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b), b.merge(c).merge(a)):
        _assert_close(together, whole)
    streamed = a.copy()
    for part in np.split(np.arange(n), sorted(min(cut, n) for cut in cuts))[1:]:
        streamed.update(features[part], design[part])
    _assert_close(streamed, whole)


@given(st.integers(2, 50), st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(n: int, seed: int) -> None:
    features, design = _table(n, 3, 2, seed, offset=1e5)
    order = np.random.default_rng(seed).permutation(n)
    _assert_close(
        Moments.empty(3, 2).update(features[order], design[order]),
        Moments.empty(3, 2).update(features, design),
    )


def test_merge_and_copy_leave_their_arguments_alone() -> None:
    features, design = _table(20, 2, 1, seed=7)
    a, b = _in_blocks(features, design, [8])
    before = {name: value.copy() for name, value in a.to_arrays().items()}
    a.merge(b)
    a.copy().update(features, design)
    for name, value in a.to_arrays().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("columns", [0, 2])
def test_arrays_come_back_from_npz_and_json(tmp_path: Any, columns: int) -> None:
    features, design = _table(30, 3, 2, seed=8)
    moments = Moments.empty(3, min(columns, 1), columns - min(columns, 1)).update(
        features, design[:, :columns]
    )
    np.savez(tmp_path / "moments.npz", **moments.to_arrays())
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as arrays:
        from_npz = Moments.from_arrays(arrays)
    text = json.dumps({name: value.tolist() for name, value in moments.to_arrays().items()})
    for other in (from_npz, Moments.from_arrays(json.loads(text))):
        assert (other.count, other.num_rows, other.num_metadata) == (30, 30, moments.num_metadata)
        for name, value in moments.to_arrays().items():
            np.testing.assert_array_equal(other.to_arrays()[name], value)


def test_the_state_does_not_grow_with_the_rows() -> None:
    small, large = (Moments.empty(5, 3).update(*_table(n, 5, 3, seed=9)) for n in (10, 5000))
    sizes = [sum(value.size for value in moments.to_arrays().values()) for moments in (small, large)]
    assert sizes[0] == sizes[1] == 3 + 3 + 5 + 9 + 15 + 5


# --------------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "design", "weights", "message"),
    [
        (np.zeros(4), np.zeros((4, 2)), None, r"features must have shape .* got \(4,\)"),
        (np.zeros((4, 2)), np.zeros((4, 2)), None, "features has 2 column.*have 3"),
        (np.zeros((4, 3)), np.zeros((4, 1)), None, "design has 1 column.*have 2"),
        (np.zeros((4, 3)), np.zeros((5, 2)), None, "4 rows and design 5"),
        (np.full((4, 3), np.nan), np.zeros((4, 2)), None, r"features has NaN .*column\(s\) \[0, 1, 2\], row"),
        (
            np.array([[0, 1, np.inf], [0, 1, -np.inf]]),
            np.zeros((2, 2)),
            None,
            r"features has .*column\(s\) \[2\]",
        ),
        (np.zeros((2, 3)), np.array([[0, 1], [np.nan, 1]]), None, r"design has NaN .*\[0\], row\(s\) \[1\]"),
        (np.array([[1e200] * 3, [-1e200] * 3]), np.zeros((2, 2)), None, "overflow float64: rescale"),
        (np.zeros((2, 3)), np.zeros((2, 2)), [1.0], r"weights must have shape \(2,\)"),
        (np.zeros((2, 3)), np.zeros((2, 2)), [1.0, -1.0], r"not negative: row\(s\) \[1\]"),
    ],
)
def test_bad_blocks_are_refused_and_change_nothing(
    features: np.ndarray, design: np.ndarray, weights: Any, message: str
) -> None:
    moments = Moments.empty(3, 2).update(*_table(20, 3, 2, seed=10))
    before = moments.copy()
    with pytest.raises(ValueError, match=message):
        moments.update(features, design, weights)
    for name, value in moments.to_arrays().items():
        np.testing.assert_array_equal(value, before.to_arrays()[name])


def test_a_bad_row_in_a_late_step_changes_nothing() -> None:
    features, design = _table(3000, 200, 1, seed=11)
    features[-1, 5] = np.nan
    moments = Moments.empty(200, 1)
    with pytest.raises(ValueError, match=r"column\(s\) \[5\], row\(s\) \[2999\]"):
        moments.update(features, design)
    assert moments.count == 0
    assert not moments.cross.any()


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="features must be real and numeric, got an array of dtype <U1"):
        Moments.empty(1, 1).update(np.array([["a"]]), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="no rows"):
        Moments.empty(1, 1).solve()
    with pytest.raises(ValueError, match="ridge must be at least 0, got -1"):
        Moments.empty(1, 1).solve(-1)
    with pytest.raises(ValueError, match=r"same columns .* \(1, 1, 1\) and \(1, 2, 1\)"):
        Moments.empty(1, 1).merge(Moments.empty(1, 1, 1))
    arrays = Moments.empty(2, 1).to_arrays()
    with pytest.raises(ValueError, match=r"gram must have shape \(1, 1\), got \(2, 2\)"):
        Moments.from_arrays({**arrays, "gram": np.eye(2)})
    with pytest.raises(ValueError, match=r"missing \['gram'\], unknown \['grams'\]"):
        Moments.from_arrays({("grams" if name == "gram" else name): value for name, value in arrays.items()})


def test_zero_weights_and_empty_blocks_count_as_nothing() -> None:
    features, design = _table(10, 2, 1, seed=12)
    features[0] = np.nan
    weights = np.array([0.0] + [1.0] * 9)
    moments = Moments.empty(2, 1).update(features, design, weights).update(features[:0], design[:0])
    assert (moments.count, moments.num_rows) == (9, 9)
    np.testing.assert_allclose(moments.solve(), _least_squares(features[1:], design[1:]), atol=1e-12)
    assert Moments.empty(2, 1).update(features[:0], design[:0]).count == 0
