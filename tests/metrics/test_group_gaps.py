"""Group gaps against fairlearn, scikit-learn, torchmetrics and plain resampling; undefined rates; errors."""

from __future__ import annotations

import json
from typing import Any

import fairlearn.metrics as fairlearn
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, recall_score
from statsmodels.api import OLS
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from mdnorm.metrics import GroupGaps, group_gaps, quantile_groups, rates
from mdnorm.metrics.rates import effective_rows, wilson


def _data(
    n: int = 600, num_classes: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions, groups and scores; the third group is predicted worse."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, num_classes, n)
    groups = np.array(["a", "b", "c"])[rng.choice(3, n, p=[0.5, 0.3, 0.2])]
    logits = (
        rng.standard_normal((n, num_classes))
        + np.where(groups == "c", 0.5, 2)[:, None] * np.eye(num_classes)[y]
    )
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return y, scores.argmax(axis=1), groups, scores


def _rates(result: GroupGaps, name: str) -> dict[Any, Any]:
    return {group.group: group.rates[name].value for group in result.groups}


def _calibration_error(confidences: np.ndarray, outcomes: np.ndarray, num_bins: int) -> float:
    """The definition: weighted mean of |confidence − frequency| over bins [low, high)."""
    bins = np.minimum(np.floor(confidences * num_bins), num_bins)
    return float(
        sum(
            abs(confidences[bins == b].sum() - outcomes[bins == b].sum()) / len(confidences)
            for b in np.unique(bins)
        )
    )


# -- against references -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [0, 1])
def test_rates_and_gaps_of_two_classes_equal_fairlearn_and_scikit_learn(positive: int) -> None:
    y, p, g, scores = _data()
    result = group_gaps(y, p, g, scores=scores[:, positive], positive=positive, num_bootstrap=0)
    for name, function in {
        "accuracy": accuracy_score,
        "balanced_accuracy": balanced_accuracy_score,
        "true_positive_rate": lambda a, b: recall_score(a, b, pos_label=positive),
        "false_positive_rate": lambda a, b: 1 - recall_score(a, b, pos_label=1 - positive),
        "positive_rate": lambda a, b: (b == positive).mean(),
    }.items():
        expected = {group: function(y[g == group], p[g == group]) for group in "abc"}
        assert _rates(result, name) == pytest.approx(expected, abs=1e-12)
        gap = result.gaps[name]
        assert gap.value == pytest.approx(max(expected.values()) - min(expected.values()), abs=1e-12)
        assert (gap.lowest, gap.highest) == (min(expected, key=expected.get), max(expected, key=expected.get))
    true, guessed = (y == positive).astype(int), (p == positive).astype(int)
    assert result.gaps["demographic_parity"].value == pytest.approx(
        fairlearn.demographic_parity_difference(true, guessed, sensitive_features=g), abs=1e-12
    )
    assert result.gaps["equalized_odds"].value == pytest.approx(
        fairlearn.equalized_odds_difference(true, guessed, sensitive_features=g), abs=1e-12
    )
    for group in "abc":
        rows = g == group
        assert _rates(result, "brier_score")[group] == pytest.approx(
            brier_score_loss(true[rows], scores[rows, positive]), abs=1e-12
        )
        assert _rates(result, "calibration_error")[group] == pytest.approx(
            _calibration_error(scores[rows, positive], true[rows], 10), abs=1e-9
        )


def test_rates_and_gaps_of_several_classes_equal_scikit_learn() -> None:
    y, p, g, scores = _data(num_classes=3)
    result = group_gaps(y, p, g, scores=scores, num_bootstrap=0, num_bins=7)
    assert result.positive is None
    recalls = {group: recall_score(y[g == group], p[g == group], average=None) for group in "abc"}
    widths = []
    for code in range(3):
        expected = {group: recalls[group][code] for group in "abc"}
        assert _rates(result, f"recall[{code}]") == pytest.approx(expected, abs=1e-12)
        widths.append(max(expected.values()) - min(expected.values()))
        assert result.gaps[f"recall[{code}]"].value == pytest.approx(widths[-1], abs=1e-12)
    worst = result.gaps["worst_recall"]
    assert any(
        worst.value == pytest.approx(abs(recalls[a][code] - recalls[b][code]), abs=1e-12)
        for code in range(3)
        for a, b in ("ab", "ac", "bc")
    )
    assert worst.bound > max(widths)
    for group in "abc":
        rows = g == group
        assert _rates(result, "balanced_accuracy")[group] == pytest.approx(recalls[group].mean(), abs=1e-12)
        assert _rates(result, "brier_score")[group] == pytest.approx(
            ((scores[rows] - np.eye(3)[y[rows]]) ** 2).sum(axis=1).mean(), abs=1e-12
        )
        assert _rates(result, "calibration_error")[group] == pytest.approx(
            _calibration_error(scores[rows].max(axis=1), p[rows] == y[rows], 7), abs=1e-9
        )


def test_intervals_of_rates_and_differences_equal_those_of_statsmodels() -> None:
    y, p, g, _ = _data(200)
    p[g == "b"] = y[g == "b"]
    result = group_gaps(y, p, g, confidence=0.9, min_group_rows=1)
    counts = {group: (int((y == p)[g == group].sum()), int((g == group).sum())) for group in "abc"}
    for group in result.groups:
        hits, size = counts[group.group]
        low, high = proportion_confint(hits, size, alpha=0.1, method="wilson")
        assert (group.rates["accuracy"].low, group.rates["accuracy"].high) == pytest.approx((low, high))
    assert len(result.pairs["accuracy"]) == 3
    for pair in result.pairs["accuracy"]:
        # Three pairs, so that each has a third of the error.
        low, high = confint_proportions_2indep(
            *counts[pair.higher], *counts[pair.lower], alpha=0.1 / 3, method="newcomb", compare="diff"
        )
        assert (pair.low, pair.high) == pytest.approx((low, high))


def test_rows_of_subjects_count_as_the_robust_error_of_statsmodels_says() -> None:
    rng = np.random.default_rng(0)
    owners = rng.integers(0, 40, 200)
    hits = rng.random(200) < np.repeat([0.2, 0.9], 20)[owners]
    size = effective_rows(hits, owners)
    fit = OLS(hits.astype(float), np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": owners})
    share = hits.mean()
    assert np.sqrt(share * (1 - share) / size) == pytest.approx(fit.bse[0], rel=1e-6)
    assert 40 < size < 100
    assert effective_rows(np.ones(200, bool), owners) == np.unique(owners).size
    for size in range(2, 12):
        # Rows of one subject are one, whatever rounding makes of a sum that is 0.
        assert effective_rows(np.arange(size) < size // 2, np.zeros(size, np.int64)) == 1


@pytest.mark.parametrize("size", [10, 15, 40])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_intervals_cover_down_to_ten_rows(size: int, share: float) -> None:
    """The exact coverage: the sum of the probabilities of the counts whose interval has the share in it."""
    hits = np.arange(size + 1)
    inside = [low <= share <= high for low, high in (wilson(k / size, size, 0.95) for k in hits)]
    assert binom.pmf(hits, size, share)[inside].sum() > 0.9


def test_a_small_group_hides_no_gap_between_large_ones() -> None:
    rng = np.random.default_rng(0)
    for num_small in (0, 15, 20, 24, 60):
        g = np.r_[np.repeat("A", 1000), np.repeat("B", 1000), np.repeat("C", num_small)]
        y = np.arange(g.size) % 2
        right = rng.random(g.size) < np.vectorize({"A": 0.95, "B": 0.8, "C": 0.7}.get)(g)
        result = group_gaps(y, np.where(right, y, 1 - y), g)
        for name in ("accuracy", "equalized_odds"):
            assert result.gaps[name].low > 0.08
            assert result.gaps[name].value >= 0.12
        assert sum(group.is_small for group in result.groups) == (num_small == 15)


def test_intervals_equal_those_of_plain_resampling() -> None:
    y, p, g, scores = _data(400)
    result = group_gaps(y, p, g, scores=scores, num_bootstrap=4000, confidence=0.9)
    rng = np.random.default_rng(5)
    rows = np.flatnonzero(g == "c")
    values = []
    for _ in range(4000):
        drawn = rng.choice(rows, rows.size)
        values.append(
            [
                (y == p)[drawn].mean(),
                p[drawn][y[drawn] == 1].mean(),
                ((scores[drawn, 1] - y[drawn]) ** 2).mean(),
            ]
        )
    rates = result.groups[2].rates
    for name, column in zip(
        ("accuracy", "true_positive_rate", "brier_score"), np.array(values).T, strict=True
    ):
        low, high = np.quantile(column, [0.05, 0.95])
        assert rates[name].low == pytest.approx(low, abs=0.012)
        assert rates[name].high == pytest.approx(high, abs=0.012)


def test_subjects_are_resampled_with_all_their_rows() -> None:
    y, p, g, scores = _data(400)
    subjects = np.random.default_rng(1).integers(0, 90, 400)
    result = group_gaps(y, p, g, scores=scores, subjects=subjects, num_bootstrap=4000, confidence=0.9)
    rng = np.random.default_rng(5)
    rows_of = [np.flatnonzero((g == "c") & (subjects == s)) for s in np.unique(subjects[g == "c"])]
    values = []
    for _ in range(4000):
        drawn = np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
        values.append([(y == p)[drawn].mean(), p[drawn][y[drawn] == 1].mean()])
    for name, column in zip(("accuracy", "true_positive_rate"), np.array(values).T, strict=True):
        rate, (low, high) = result.groups[2].rates[name], np.quantile(column, [0.05, 0.95])
        assert rate.low == pytest.approx(low, abs=0.012)
        assert rate.high == pytest.approx(high, abs=0.012)
    # A subject for each row is no subjects.
    same = group_gaps(y, p, g, subjects=np.arange(400), num_bootstrap=50).to_dict()
    assert same == group_gaps(y, p, g, num_bootstrap=50).to_dict()
    with pytest.raises(ValueError, match="400 rows in labels and 3 in subjects"):
        group_gaps(y, p, g, subjects=[1, 2, 3])


@pytest.mark.parametrize("true_gap", [0.0, 0.2])
def test_intervals_of_gaps_cover_the_gap(true_gap: float) -> None:
    covered = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        g, y = rng.integers(0, 4, 400), rng.integers(0, 2, 400)
        accuracy = 0.7 + true_gap * np.array([0, 0.3, 0.6, 1])[g]
        p = np.where(rng.random(400) < accuracy, y, 1 - y)
        gap = group_gaps(y, p, g, num_bootstrap=200, confidence=0.9, seed=seed).gaps["accuracy"]
        assert 0 <= gap.low <= gap.value <= gap.high <= 1
        covered += gap.low <= true_gap <= gap.high
    assert covered >= 24  # 27 are expected at least


# -- undefined rates and small groups ---------------------------------------------------------------------


def test_a_group_without_positives_has_no_true_positive_rate() -> None:
    y, p, g, _ = _data()
    y[g == "b"] = 0
    result = group_gaps(y, p, g)
    rates = result.groups[1].rates
    assert (rates["true_positive_rate"].value, rates["true_positive_rate"].low) == (None, None)
    assert rates["balanced_accuracy"].value is None
    assert rates["false_positive_rate"].value == pytest.approx(p[g == "b"].mean())
    others = [p[(g == group) & (y == 1)].mean() for group in "ac"]
    gap = result.gaps["true_positive_rate"]
    assert gap.value == pytest.approx(max(others) - min(others))
    assert gap.low is not None
    assert {gap.lowest, gap.highest} == {"a", "c"}
    assert any("group 'b' has no row of class(es) 1" in note for note in result.notes)


def test_without_two_groups_that_have_it_a_gap_is_none() -> None:
    y = np.array([1, 0, 1, 0] + [0] * 4)
    result = group_gaps(y, y, np.repeat(["a", "b"], 4), min_group_rows=1)
    for name in ("true_positive_rate", "balanced_accuracy"):
        assert (result.gaps[name].value, result.gaps[name].low, result.gaps[name].lowest) == (
            None,
            None,
            None,
        )
    assert result.gaps["false_positive_rate"].value == 0
    assert result.gaps["equalized_odds"].value == 0


def test_small_groups_are_named_apart() -> None:
    y, p, g, _ = _data()
    g = g.astype("<U5")
    g[:5], y[:5] = "small", [1, 0, 0, 0, 0]
    result = group_gaps(y, p, g)
    small = result.groups[-1]
    assert (small.group, small.num_rows, small.label_counts) == ("small", 5, {0: 4, 1: 1})
    assert [group.is_small for group in result.groups] == [False, False, False, True]
    rate = small.rates["true_positive_rate"]
    assert rate.value in (0, 1)
    # One row tells next to nothing.
    assert rate.high - rate.low > 0.7
    assert any("group 'small' has 5 row(s), fewer than 20" in note for note in result.notes)
    others = group_gaps(y[5:], p[5:], g[5:])
    assert result.gaps == others.gaps
    assert result.pairs == others.pairs
    compared = group_gaps(y, p, g, min_group_rows=5)
    assert any("small" in (pair.lower, pair.higher) for pair in compared.pairs["accuracy"])


def test_a_group_of_one_row() -> None:
    y, p, g, scores = _data()
    g = g.astype("<U5")
    g[0] = "one"
    result = group_gaps(y, p, g, scores=scores)
    assert result.groups[-1].rates["accuracy"].value == float(y[0] == p[0])
    json.dumps(result.to_dict(), allow_nan=False)


# -- properties and inputs --------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(6, 80), st.integers(2, 4), st.integers(2, 5), st.integers(0, 10**6))
def test_everything_is_in_range_and_row_order_does_not_matter(
    n: int, num_classes: int, num_groups: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    y, p, g = rng.integers(0, num_classes, n), rng.integers(0, num_classes, n), rng.integers(0, num_groups, n)
    y[:num_classes], g[:2] = np.arange(num_classes), [0, 1]
    scores = rng.dirichlet(np.ones(num_classes), n)
    result = group_gaps(y, p, g, scores=scores, num_bootstrap=50, min_group_rows=1, seed=seed)
    values = [rate for group in result.groups for rate in group.rates.values()]
    for value in [*values, *result.gaps.values()]:
        if value.value is not None:
            assert 0 <= value.value <= 2
        if value.low is not None:
            assert 0 <= value.low <= value.high <= 2 + 1e-12
    assert sum(group.num_rows for group in result.groups) == n
    order = rng.permutation(n)
    other = group_gaps(y[order], p[order], g[order], scores=scores[order], num_bootstrap=0, min_group_rows=1)
    for name, gap in result.gaps.items():
        if name == "calibration_error":
            continue  # Its interval, and so the pair that is named, is of resamples.
        assert other.gaps[name].value == (None if gap.value is None else pytest.approx(gap.value, abs=1e-9))
    json.dumps(result.to_dict(), allow_nan=False)


def test_perfect_predictions_have_no_gaps() -> None:
    y, _, g, _ = _data()
    result = group_gaps(y, y, g, scores=y.astype(float))
    assert all(
        gap.value == 0
        for name, gap in result.gaps.items()
        if name not in ("positive_rate", "demographic_parity")
    )
    # None was seen, which does not show that there is none.
    assert result.gaps["accuracy"].low == 0
    assert 0 < result.gaps["accuracy"].high < 0.05


def test_the_same_seed_gives_the_same_result() -> None:
    y, p, g, scores = _data()
    first = group_gaps(y, p, g, scores=scores, seed=3)
    assert group_gaps(y, p, g, scores=scores, seed=3) == first
    assert group_gaps(y, p, g, scores=scores, seed=4) != first


def test_many_rows_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p, g, scores = _data()
    expected = group_gaps(y, p, g, scores=scores, num_bootstrap=50)
    monkeypatch.setattr(rates, "_CHUNK_ELEMENTS", 1000)
    result = group_gaps(y, p, g, scores=scores, num_bootstrap=50)
    assert result == expected


def test_kinds_of_input() -> None:
    y, p, g, scores = _data()
    expected = group_gaps(y, p, g, scores=scores[:, 1])
    for labels, predictions, probabilities in (
        (torch.from_numpy(y), torch.from_numpy(p), torch.from_numpy(scores[:, 1:])),
        (y.astype(bool), p.astype(bool), scores),
        (pd.Series(y), p.tolist(), scores[:, 1].tolist()),
    ):
        result = group_gaps(labels, predictions, pd.Series(g), scores=probabilities)
        assert result.gaps == expected.gaps
    named = group_gaps(
        np.array(["no", "yes"])[y], np.array(["no", "yes"])[p], g, scores=scores, positive="yes"
    )
    assert named.gaps == expected.gaps
    assert named.positive == "yes"


def test_groups_keep_the_order_of_categories() -> None:
    y, p, g, _ = _data()
    ordered = pd.Categorical(g, categories=["c", "unused", "a", "b"])
    result = group_gaps(y, p, pd.Series(ordered), num_bootstrap=0)
    assert [group.group for group in result.groups] == ["c", "a", "b"]
    assert _rates(result, "accuracy") == _rates(group_gaps(y, p, g, num_bootstrap=0), "accuracy")


def test_a_predicted_class_without_rows_is_noted() -> None:
    result = group_gaps([0, 1, 0, 1], [0, 1, 2, 1], list("aabb"), num_bootstrap=0)
    assert result.classes == (0, 1, 2)
    assert "that no row has as its label: 2" in result.notes[0]


def test_probabilities_that_reach_0_and_1_are_no_classes() -> None:
    rng = np.random.default_rng(0)
    groups = rng.choice(["a", "b"], 400)
    logits = rng.normal(0, 30, 400)
    y, saturated = (logits > 0).astype(int), torch.sigmoid(torch.from_numpy(logits).float())
    assert {0.0, 1.0} & {*saturated.tolist()}
    with pytest.raises(ValueError, match=r"but the labels are only 0, 1.*probabilities as scores"):
        group_gaps(y, saturated, groups)
    expected = fairlearn.MetricFrame(
        metrics=accuracy_score, y_true=y, y_pred=saturated.numpy() > 0.5, sensitive_features=groups
    )
    classes = group_gaps(y, saturated.round(), groups, scores=saturated, num_bootstrap=0)
    assert _rates(classes, "accuracy") == expected.by_group.to_dict() == {"a": 1.0, "b": 1.0}
    # Labels that are no whole numbers themselves are classes like any other.
    assert _rates(group_gaps(y / 2, y / 2, groups, positive=0.5), "accuracy") == {"a": 1.0, "b": 1.0}


A, G = np.array([0, 1, 0, 1]), ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("labels", "predictions", "groups", "options", "error", "message"),
    [
        (A, A[:3], G, {}, ValueError, "4 rows in labels and 3 in predictions"),
        (A, A, G[:3], {}, ValueError, "4 rows in labels and 3 in groups"),
        ([], [], [], {}, ValueError, "labels has no rows"),
        ([0, 1, np.nan, 1], A, G, {}, ValueError, r"labels has missing .* row\(s\) 2"),
        (A, A, ["a", None, "b", "b"], {}, ValueError, r"groups has missing .* row\(s\) 1"),
        (A * 0, A * 0, G, {}, ValueError, "labels must have at least two classes, got 0 only"),
        (A, A, ["a"] * 4, {}, ValueError, "at least two groups, got 'a' only"),
        (["n", "y"] * 2, ["n", "y"] * 2, G, {}, ValueError, "positive must name .* 'n', 'y'"),
        (A, A, G, {"positive": 7}, ValueError, "positive must be one of the classes 0, 1, got 7"),
        ([0, 1, 2, 1], A, G, {"positive": 1}, ValueError, "positive is for two classes, got 3"),
        (A, ["n", "y"] * 2, G, {}, TypeError, "must be of one kind, got 0 in labels and 'n'"),
        (
            A,
            [0.3, 0.7, 0.2, 0.9],
            G,
            {},
            ValueError,
            "hold 0.2, .*the labels are only.*probabilities as scores",
        ),
        (A, np.float32([0, 1, 0.25, 0.5]), G, {}, ValueError, "hold 0.25, 0.5, but .* probabilities"),
        (A, A + 5, G, {}, ValueError, "predictions hold 5, 6, but the labels are only 0, 1"),
        (
            A,
            A,
            G,
            {"scores": [0.5] * 3},
            ValueError,
            r"scores must have shape \(4,\) or \(4, 2\).*got \(3,\)",
        ),
        (A, A, G, {"scores": [0.5, 2, np.nan, 1]}, ValueError, r"probabilities, but row\(s\) 1, 2"),
        (A, A, G, {"scores": np.full((4, 2), 0.6)}, ValueError, "do not sum to 1"),
        ([0, 1, 2, 1], A, G, {"scores": [0.5] * 4}, ValueError, r"scores must have shape \(4, 3\)"),
        (A, A, G, {"scores": ["x"] * 4}, TypeError, "scores must be real and numeric"),
        (A, A, G, {"weights": [1, 1, 1]}, ValueError, r"weights must have shape \(4,\).*got \(3,\)"),
        (A, A, G, {"weights": [1, -1, 1, np.nan]}, ValueError, r"finite and not negative: row\(s\) \[1, 3\]"),
        (A, A, G, {"weights": np.zeros(4)}, ValueError, "weights must be above 0 in some row, got 0 in all"),
        (A, A, G, {"weights": [1, 1, 0, 0]}, ValueError, "at least two groups, got 'a' only"),
        (A, A, G, {"weights": ["x"] * 4}, TypeError, "weights must be real and numeric"),
        (A, A, G, {"confidence": 95}, ValueError, "confidence must be between 0 and 1"),
        (A, A, G, {"confidence": "high"}, TypeError, "confidence must be a number"),
        (A, A, G, {"num_bootstrap": -1}, ValueError, "num_bootstrap must be at least 0"),
        (A, A, G, {"num_bins": 0}, ValueError, "num_bins must be at least 1"),
        (A, A, G, {"seed": 1.5}, TypeError, "seed must be an integer"),
        (
            np.tile(A, 30),
            np.tile(A, 30),
            np.arange(120) * 0.1,
            {},
            ValueError,
            "120 different values.*quantile",
        ),
    ],
)
def test_errors_name_the_argument(
    labels: Any, predictions: Any, groups: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        group_gaps(labels, predictions, groups, **options)


# -- quantile groups --------------------------------------------------------------------------------------


@given(
    st.integers(1, 80),
    st.integers(1, 8),
    st.sampled_from([1e-7, 1.0, 1e6]),
    st.booleans(),
    st.integers(0, 999),
)
def test_quantile_groups_divide_the_range(n: int, num: int, scale: float, whole: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-5, 12, n).astype(float) if whole else scale * rng.standard_normal(n)
    result = quantile_groups(values, num)
    counts = np.bincount(result.codes)
    assert len(result.categories) == len(counts) <= num
    assert counts.sum() == len(result) == n
    assert counts.min() > 0
    for code in range(len(counts) - 1):
        assert values[result.codes == code].max() < values[result.codes == code + 1].min()
    if not whole and n >= num:
        assert np.ptp(counts) <= 2


def test_quantile_groups_have_readable_names() -> None:
    ages = np.arange(20, 80)
    assert list(quantile_groups(ages, 4).categories) == ["20–34", "35–49", "50–64", "65–79"]
    assert list(quantile_groups([0.12, 0.31, 0.52, 0.9], 2).categories) == ["0.12–0.31", "0.52–0.9"]
    assert list(quantile_groups([-3, -1, 2, 5], 2).categories) == ["-3 to -1", "2–5"]
    assert list(quantile_groups([0, 0, 0, 0, 1, 7], 4).categories) == ["0", "1", "7"]
    assert list(quantile_groups([1e-9, 3e-9, 5e-9, 7e-9], 2).categories) == ["1e-09–3e-09", "5e-09–7e-09"]
    assert quantile_groups(torch.full((5,), 3.0)).tolist() == ["3"] * 5


def test_quantile_groups_keep_their_order_as_groups() -> None:
    y, p, _, _ = _data()
    age = np.random.default_rng(0).uniform(5, 120, 600).round()
    groups = quantile_groups(age, 3)
    assert len(groups) == 600
    result = group_gaps(y, p, groups, num_bootstrap=0)
    assert [group.group for group in result.groups] == list(groups.categories)
    assert [group.num_rows for group in result.groups] == np.bincount(groups.codes).tolist()


@pytest.mark.parametrize(
    ("values", "num", "error", "message"),
    [
        (["a", "b"], 2, TypeError, "values must be numbers"),
        ([1.0, np.nan], 2, ValueError, "values has missing"),
        ([], 2, ValueError, "values has no rows"),
        ([1.0, 2.0], 0, ValueError, "num_groups must be at least 1"),
        ([1.0, 2.0], 2.0, TypeError, "num_groups must be an integer"),
    ],
)
def test_quantile_groups_errors(values: Any, num: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantile_groups(values, num)


def test_rows_that_were_shuffled_apart_are_refused() -> None:
    y, p, groups, _ = _data()
    y, p, groups = (
        pd.Series(values, index=[f"sub-{row}" for row in range(len(y))]) for values in (y, p, groups)
    )
    group_gaps(y, p, groups, num_bootstrap=0)
    for arguments in ((y, p.sample(frac=1, random_state=0), groups), (y, p, groups.iloc[::-1])):
        with pytest.raises(ValueError, match="same row labels as labels, but in another order"):
            group_gaps(*arguments, num_bootstrap=0)
