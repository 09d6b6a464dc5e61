"""`Moments` against least squares on the whole table in float64."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mdnorm import Moments
from mdnorm.moments import NoSamplesError
from mdnorm.tables import fit_location_scale

EPS = np.finfo(float).eps


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


def _moments(features: np.ndarray, design: np.ndarray, weights: Any = None, protected: int = 0) -> Moments:
    empty = Moments.empty(features.shape[1], design.shape[1] - protected, protected)
    return empty.update(features, design, weights)


def _in_blocks(features: np.ndarray, design: np.ndarray, cuts: list[int]) -> list[Moments]:
    parts = np.split(np.arange(len(features)), sorted(min(cut, len(features)) for cut in cuts))
    return [_moments(features[part], design[part]) for part in parts]


def _assert_close(a: Moments, b: Moments, rtol: float = 1e-12) -> None:
    assert (a.num_metadata, a.num_rows) == (b.num_metadata, b.num_rows)
    assert a.weight == pytest.approx(b.weight, rel=1e-14)
    x, y = a.products(), b.products()
    scale_x, scale_f = np.sqrt(np.diagonal(y.gram)), np.sqrt(y.squares)
    scale_x, scale_f = np.where(scale_x > 0, scale_x, 1), np.where(scale_f > 0, scale_f, 1)
    np.testing.assert_allclose(x.design_mean, y.design_mean, rtol=4 * EPS, atol=rtol)
    np.testing.assert_allclose(x.feature_mean, y.feature_mean, rtol=4 * EPS, atol=rtol)
    np.testing.assert_allclose((x.gram - y.gram) / np.outer(scale_x, scale_x), 0, atol=rtol)
    np.testing.assert_allclose((x.cross - y.cross) / np.outer(scale_x, scale_f), 0, atol=rtol)
    np.testing.assert_allclose(x.squares / scale_f**2, y.squares / scale_f**2, atol=rtol)


def _assert_same(moments: Moments, arrays: dict[str, np.ndarray]) -> None:
    for name, value in moments.to_arrays().items():
        np.testing.assert_array_equal(value, arrays[name])


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
    np.testing.assert_allclose(moments.solve(), expected, atol=1e-12)
    residual = features - features.mean(0) - (design - design.mean(0)) @ expected
    model = fit_location_scale({None: moments})
    np.testing.assert_allclose(1000 * model.pooled_scale**2, (residual**2).sum(0), rtol=1e-10)


def test_float32_features_are_summed_in_float64() -> None:
    features, design = _table(5000, 3, 2, seed=1, offset=1e4)
    single = features.astype(np.float32)
    expected = _least_squares(single.astype(np.float64), design)
    np.testing.assert_allclose(_moments(single, design).solve(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "f2", "i4", "u1", "u2", "?"])
def test_features_of_every_dtype_and_layout(dtype: str) -> None:
    features = np.random.default_rng(0).integers(0, 2, (100, 5)).astype(dtype)
    design = _table(100, 1, 2, seed=0)[1]
    expected = _moments(features.astype(np.float64), design).to_arrays()
    frozen = features.copy()
    frozen.flags.writeable = False
    backwards = features[::-1, ::-1].copy()[::-1, ::-1]
    every_second = np.repeat(features, 2, axis=1)[:, ::2]
    for table in (features, np.asfortranarray(features), frozen, backwards, every_second):
        for name, value in _moments(table, design).to_arrays().items():
            np.testing.assert_allclose(value, expected[name], atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(table, features)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "num_features"), [(300, 3000), (200_000, 2)])
def test_many_features_and_many_rows_are_taken_in_steps_of_the_same_result(
    n: int, num_features: int, weighted: bool, order: Any
) -> None:
    features, design = _table(n, num_features, 2, seed=2, offset=100.0)
    weights = np.random.default_rng(3).random(n) if weighted else None
    moments = _moments(np.asarray(features, order=order), design, weights)
    assert moments.num_rows == n
    np.testing.assert_allclose(moments.solve(), _least_squares(features, design, weights), atol=1e-12)
    mean = np.average(features, axis=0, weights=weights)
    squares = np.average((features - mean) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(moments.squares / moments.weight, squares, rtol=1e-12)


def test_means_are_those_of_an_exact_sum() -> None:
    features, design = _table(60_000, 2, 2, seed=13, offset=1e8 / 3)
    means = _moments(features, design).products()
    for mean, table in ((means.feature_mean, features), (means.design_mean, design)):
        exact = [math.fsum(column) / len(table) for column in table.T]
        np.testing.assert_allclose(mean, exact, rtol=2 * EPS)


@given(
    st.integers(12, 60),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([0.0, 1e6]),
    st.integers(0, 10**6),
)
def test_weights_are_those_of_statsmodels(
    n: int, num_metadata: int, num_protected: int, offset: float, seed: int
) -> None:
    features, design = _table(n, 2, num_metadata + num_protected, seed, offset)
    weights = np.random.default_rng(seed).choice([0.0, 0.3, 1.0, 1e3], n, p=[0.2, 0.4, 0.3, 0.1])
    used = weights > 0
    if np.count_nonzero(used) < 8:
        return
    moments = _moments(features, design, weights, num_protected)
    assert moments.num_rows == np.count_nonzero(used)
    # statsmodels centres nothing: its own digits would be gone at 1e6.
    centred = design - np.average(design, axis=0, weights=weights)
    for column, coefficients in zip(features.T, moments.solve().T, strict=True):
        fit = sm.WLS(column - np.average(column, weights=weights), sm.add_constant(centred), weights).fit()
        condition = np.linalg.cond(centred * np.sqrt(weights)[:, None]) ** 2
        np.testing.assert_allclose(coefficients, fit.params[1:], atol=100 * EPS * n * condition)


@given(st.integers(5, 60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_weights_are_repeated_rows(n: int, num_features: int, num_columns: int, seed: int) -> None:
    features, design = _table(n, num_features, num_columns, seed, offset=50.0)
    weights = np.random.default_rng(seed).integers(0, 4, n)
    weighted = _moments(features, design, weights)
    repeated = _moments(np.repeat(features, weights, axis=0), np.repeat(design, weights, axis=0))
    assert weighted.num_rows == np.count_nonzero(weights)
    _assert_close(weighted, replace(repeated, num_rows=weighted.num_rows))


@pytest.mark.parametrize("row", [0, 700, 999])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_one_row_may_outweigh_all_others(row: int, offset: float) -> None:
    features, design = _table(1000, 3, 2, seed=3)
    features[row], design[row] = 50.0, -20.0
    features, design = features + offset, design + offset
    weights = np.ones(1000)
    weights[row] = 1e12
    # All of the weighted sums are about the heavy row, to twelve digits.
    x, f = np.delete(design - design[row], row, 0), np.delete(features - features[row], row, 0)
    expected = np.linalg.lstsq(x, f, rcond=None)[0]
    np.testing.assert_allclose(_moments(features, design, weights).solve(), expected, rtol=1e-8)


def test_ridge_penalises_metadata_only() -> None:
    features, design = _table(80, 3, 3, seed=4)
    design = design * [1.0, 100.0, 0.01]
    ridge = 0.7
    x = design - design.mean(0)
    penalty = 80 * ridge * np.diag([*x[:, :2].var(0), 0.0])
    expected = np.linalg.solve(x.T @ x + penalty, x.T @ (features - features.mean(0)))
    np.testing.assert_allclose(_moments(features, design, protected=1).solve(ridge), expected, rtol=1e-9)


def test_collinear_and_constant_columns_do_not_change_the_fitted_values() -> None:
    features, design = _table(60, 4, 2, seed=5)
    wide = np.column_stack([design, design @ [[2.0], [-1.0]], np.full(60, 1e5)])
    coefficients = _moments(features, wide).solve()
    assert np.all(coefficients[3] == 0)
    np.testing.assert_allclose(
        (wide - wide.mean(0)) @ coefficients,
        (design - design.mean(0)) @ _least_squares(features, design),
        atol=1e-10,
    )


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_labels_that_are_nearly_collinear_and_determine_the_metadata_invert_no_rounding(noise: float) -> None:
    features, design = _table(2000, 3, 3, seed=6)
    label, other = design[:, 0], design[:, 0] + noise * design[:, 1]
    determined = np.column_stack([label + other, design[:, 2], label, other])
    coefficients = _moments(features, determined, protected=2).solve()
    expected = _least_squares(features, determined[:, 1:])
    np.testing.assert_allclose(coefficients[0], 0, atol=1e-10)
    # The condition number of the labels' moments is that of their difference: 4 / noise².
    np.testing.assert_allclose(coefficients[1], expected[0], atol=1e-12 + 10 * EPS * 4 / noise**2)


def test_only_protected_columns_or_none() -> None:
    features, design = _table(40, 3, 2, seed=6)
    protected = _moments(features, design, protected=2)
    np.testing.assert_allclose(protected.solve(ridge=9.0), _least_squares(features, design), atol=1e-11)
    nothing = _moments(features, design[:, :0])
    assert nothing.solve().shape == (0, 3)
    np.testing.assert_allclose(nothing.squares, 40 * features.var(0))


# --------------------------------------------------------------------------------------------------------
# Additivity
# --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 80),
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.integers(0, 80), min_size=2, max_size=2),
    st.sampled_from([0.0, 1e6, -3e8]),
    st.integers(0, 10**6),
)
def test_merging_is_associative_commutative_and_the_whole(
    n: int, num_features: int, num_columns: int, cuts: list[int], offset: float, seed: int
) -> None:
    features, design = _table(n, num_features, num_columns, seed, offset)
    a, b, c = _in_blocks(features, design, cuts)
    whole = _moments(features, design)
    for together in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b), b.merge(c).merge(a)):
        _assert_close(together, whole)
    streamed = replace(a)
    for part in np.split(np.arange(n), sorted(min(cut, n) for cut in cuts))[1:]:
        streamed.update(features[part], design[part])
    _assert_close(streamed, whole)


@given(
    st.integers(20, 400),
    st.integers(1, 3),
    st.integers(0, 2),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(["as drawn", "sorted", "first chunk constant", "first chunk far away", "one row first"]),
    st.sampled_from([0.0, 1e6, -3e8]),
    st.sampled_from([1e-8, 1.0, 1e8]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_order_and_chunks_give_least_squares_within_the_worst_rounding(
    n: int,
    num_metadata: int,
    num_protected: int,
    cuts: list[int],
    kind: str,
    offset: float,
    size: float,
    weighted: bool,
    random: Any,
) -> None:
    num_columns = num_metadata + num_protected
    rng = np.random.default_rng(random.randrange(10**6))
    features, design = _table(n, 3, num_columns, random.randrange(10**6))
    weights = rng.choice([0.0, 1.0, 2.5], n, p=[0.1, 0.6, 0.3]) if weighted else np.ones(n)
    if kind == "sorted":
        order = np.argsort(design[:, 0])
        features, design = features[order], design[order]
    elif kind == "first chunk constant":
        features[: n // 4], design[: n // 4] = features[0], design[0]
    elif kind == "first chunk far away":
        features[: n // 4] += 1e3
        design[: n // 4] -= 1e3 * rng.random(num_columns)
    features, design = (features + offset) * size, (design + offset) / size
    cuts = [1, *cuts] if kind == "one row first" else cuts
    parts = [
        _moments(features[part], design[part], weights[part], num_protected)
        for part in np.split(np.arange(n), sorted(min(cut, n) for cut in cuts))
    ]
    # Two of them are put together, whichever they are, until one is left.
    num_parts = len(parts)
    while len(parts) > 1:
        first, second = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        parts.append(first.merge(second))
    assert parts[0].num_rows == np.count_nonzero(weights)

    # In units of the columns: an error of (rows + merges) eps in each mean of products, and their inverse.
    x, f = (
        np.asarray(table - np.average(np.longdouble(table), axis=0, weights=weights), float)
        * np.sqrt(weights)[:, None]
        for table in (design, features)
    )
    size_x, size_f = np.linalg.norm(x, axis=0), np.linalg.norm(f, axis=0)
    expected = np.linalg.lstsq(x / size_x, f / size_f, rcond=None)[0]
    condition = np.linalg.cond(x / size_x) ** 2
    # Directions below 1e-11 would count as collinear.
    assume(condition < 1e8)
    bound = (n + num_parts) * EPS * condition * num_columns * (1 + np.abs(expected).max())
    actual = parts[0].solve() * size_x[:, None] / size_f
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


@given(st.integers(2, 50), st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(n: int, seed: int) -> None:
    features, design = _table(n, 3, 2, seed, offset=1e5)
    order = np.random.default_rng(seed).permutation(n)
    _assert_close(_moments(features[order], design[order]), _moments(features, design))


def test_merge_and_copies_leave_their_arguments_alone() -> None:
    features, design = _table(20, 2, 1, seed=7)
    a, b = _in_blocks(features, design, [8])
    before = a.to_arrays()
    before = {name: value.copy() for name, value in before.items()}
    a.merge(b).update(features, design)
    replace(a).update(features, design)
    Moments.empty(2, 1).merge(a).update(features, design)
    _assert_same(a, before)


@pytest.mark.parametrize("columns", [0, 2])
def test_arrays_come_back_from_npz_and_json(tmp_path: Any, columns: int) -> None:
    features, design = _table(30, 3, 2, seed=8)
    weights = np.random.default_rng(0).random(30)
    moments = _moments(features, design[:, :columns], weights, columns // 2)
    np.savez(tmp_path / "moments.npz", **moments.to_arrays())
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as arrays:
        from_npz = Moments.from_arrays(arrays)
    text = json.dumps({name: value.tolist() for name, value in moments.to_arrays().items()})
    for other in (from_npz, Moments.from_arrays(json.loads(text))):
        assert (other.num_rows, other.num_metadata) == (30, moments.num_metadata)
        assert other.weight == moments.weight == pytest.approx(weights.sum())
        _assert_same(other, moments.to_arrays())


def test_the_state_does_not_grow_with_the_rows() -> None:
    small, large = (_moments(*_table(n, 5, 3, seed=9)) for n in (10, 5000))
    sizes = [sum(value.size for value in moments.to_arrays().values()) for moments in (small, large)]
    assert sizes[0] == sizes[1] == 3 + 2 * 4 + 2 * 5 + 4 * 4 + 4 * 5 + 5


# --------------------------------------------------------------------------------------------------------
# What layers take from them
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_units_and_averages_are_those_of_the_rows(offset: float) -> None:
    features, design = _table(50, 3, 3, seed=10, offset=offset)
    design = np.column_stack([design, np.full(50, 7.0)])  # a constant label
    parts = [_moments(features[rows], design[rows], protected=2) for rows in (slice(0, 9), slice(9, None))]
    moments = parts[0].merge(parts[1])
    units = moments.units
    assert units is not None
    rows = np.column_stack([design[:, 2:], np.ones(50), design[:, :2]])
    expected = np.where(np.arange(5) == 2, 0, rows.mean(0)), [1 / rows[:, 0].std(), 1 / 7, 1]
    np.testing.assert_allclose(units.origin, expected[0], rtol=4 * EPS)
    np.testing.assert_allclose(units.scale[:3], expected[1], rtol=1e-12)
    z = (rows - units.origin.numpy()) * units.scale.numpy() + [0.5, 0, 0, 2, -3]
    shifted = units._replace(origin=units.origin - torch.tensor([0.5, 0, 0, 2, -3]) / units.scale)
    gram, cross = moments.averages(shifted)
    np.testing.assert_allclose(gram, z.T @ z / 50, atol=1e-9 if offset else 1e-13)
    np.testing.assert_allclose(cross, z.T @ features / 50, rtol=1e-9 if offset else 1e-13, atol=1e-9)


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
        (np.zeros((2, 3)), np.array([[0, 1], [np.nan, 1]]), None, r"design has NaN .*\[0\], row\(s\) 1"),
        (np.array([[1e200] * 3, [-1e200] * 3]), np.zeros((2, 2)), None, "features has.*squares overflow"),
        (np.zeros((2, 3)), np.array([[0, 1e160], [0, 0]]), None, "design has.*squares overflow"),
        (np.zeros((2, 3)), np.zeros((2, 2)), [1.0], r"weights must have shape \(2,\)"),
        (np.zeros((2, 3)), np.zeros((2, 2)), [1.0, -1.0], r"not negative: row\(s\) \[1\]"),
        (np.zeros((2, 3)), np.zeros((2, 2)), [np.nan, 1.0], r"finite and not negative: row\(s\) \[0\]"),
    ],
)
def test_bad_blocks_are_refused_and_change_nothing(
    features: np.ndarray, design: np.ndarray, weights: Any, message: str
) -> None:
    moments = _moments(*_table(20, 3, 2, seed=10))
    before = {name: value.copy() for name, value in moments.to_arrays().items()}
    with pytest.raises(ValueError, match=message):
        moments.update(features, design, weights)
    _assert_same(moments, before)


def test_a_bad_row_in_a_late_step_changes_nothing() -> None:
    features, design = _table(3000, 200, 1, seed=11)
    features[-1, 5] = np.nan
    moments = Moments.empty(200, 1)
    with pytest.raises(ValueError, match=r"column\(s\) \[5\], row\(s\) 2999"):
        moments.update(features, design)
    assert moments.weight == 0
    assert not moments.cross.any()


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="features must be real and numeric, got an array of dtype <U1"):
        Moments.empty(1, 1).update(np.array([["a"]]), np.zeros((1, 1)))
    with pytest.raises(NoSamplesError, match="no rows"):
        Moments.empty(1, 1).solve()
    assert Moments.empty(1, 1).units is None
    with pytest.raises(ValueError, match="ridge must be at least 0, got -1"):
        Moments.empty(1, 1).solve(-1)
    with pytest.raises(ValueError, match=r"same columns .* \(1, 2, 1\) and \(1, 3, 1\)"):
        Moments.empty(1, 1).merge(Moments.empty(1, 1, 1))
    arrays = Moments.empty(2, 1).to_arrays()
    with pytest.raises(ValueError, match=r"gram must have shape \(2, 2\), got \(3, 3\)"):
        Moments.from_arrays({**arrays, "gram": np.eye(3)})
    with pytest.raises(ValueError, match=r"missing \['gram'\], unknown \['grams'\]"):
        Moments.from_arrays({("grams" if name == "gram" else name): value for name, value in arrays.items()})


def test_zero_weights_and_empty_blocks_count_as_nothing() -> None:
    features, design = _table(10, 2, 1, seed=12)
    features[0] = np.nan
    weights = np.array([0.0] + [1.0] * 9)
    moments = _moments(features, design, weights).update(features[:0], design[:0])
    assert (moments.weight, moments.num_rows) == (9, 9)
    _assert_close(moments, _moments(features[1:], design[1:]))
    assert Moments.empty(2, 1).update(features[:0], design[:0]).weight == 0
    assert Moments.empty(2, 1).update(features, design, np.zeros(10)).weight == 0


def test_columns_of_frames_are_those_of_before() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(20, 3)), columns=["age", "left", "right"])
    moments = Moments.empty(2, 1).update(table[["left", "right"]], table[["age"]])
    other = Moments.empty(2, 1).update(table[["right", "left"]], table[["age"]])
    for fails in (
        lambda: moments.update(table[["right", "left"]], table[["age"]]),
        lambda: moments.merge(other),
    ):
        with pytest.raises(ValueError, match=r"features has the columns \['right', 'left'\], before it had"):
            fails()
    assert moments.num_rows == 20
    # Arrays have no names, and names are not saved.
    assert moments.update(table[["right", "left"]].to_numpy(), table[["age"]]).num_rows == 40
    assert Moments.from_arrays(moments.to_arrays()).merge(other).num_rows == 60
