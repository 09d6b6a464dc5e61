"""Weighted rates and gaps against fairlearn, scikit-learn, statsmodels and plain resampling."""

from __future__ import annotations

from typing import Any

import fairlearn.metrics as fairlearn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, recall_score
from statsmodels.api import WLS
from statsmodels.stats.proportion import proportion_confint
from test_group_gaps import _data

from mdnorm.metrics import group_gaps
from mdnorm.metrics.rates import effective_rows


@pytest.mark.parametrize("num_classes", [2, 3])
def test_weighted_rates_and_gaps_equal_fairlearn_and_scikit_learn(num_classes: int) -> None:
    y, p, g, scores = _data(num_classes=num_classes)
    w = np.exp(np.random.default_rng(1).standard_normal(600) + y)
    result = group_gaps(y, p, g, scores=scores, weights=w, num_bootstrap=0)
    for group in result.groups:
        rows = g == group.group
        a, b, c, s = y[rows], p[rows], w[rows], scores[rows]
        recalls = recall_score(a, b, average=None, sample_weight=c)
        bins = np.minimum(np.floor(s.max(axis=1) * 10), 10)
        right = s.max(axis=1) - (a == b)
        expected = {
            "accuracy": accuracy_score(a, b, sample_weight=c),
            "balanced_accuracy": balanced_accuracy_score(a, b, sample_weight=c),
            "brier_score": np.average(((s - np.eye(num_classes)[a]) ** 2).sum(axis=1), weights=c),
            "calibration_error": sum(abs((c * right)[bins == k].sum()) for k in np.unique(bins)) / c.sum(),
            **{f"recall[{k}]": recall for k, recall in enumerate(recalls)},
        }
        if num_classes == 2:
            expected["brier_score"] = brier_score_loss(a, s[:, 1], sample_weight=c)
            bins = np.minimum(np.floor(s[:, 1] * 10), 10)
            expected["calibration_error"] = (
                sum(abs((c * (s[:, 1] - a))[bins == k].sum()) for k in np.unique(bins)) / c.sum()
            )
            expected["false_positive_rate"] = 1 - expected.pop("recall[0]")
            expected["true_positive_rate"] = expected.pop("recall[1]")
            expected["positive_rate"] = np.average(b, weights=c)
        assert {name: rate.value for name, rate in group.rates.items()} == pytest.approx(expected, abs=1e-9)
        assert group.num_rows == rows.sum()
    options = {"sensitive_features": g, "sample_weight": w}
    if num_classes == 2:
        for name, function in {
            "demographic_parity": fairlearn.demographic_parity_difference,
            "equalized_odds": fairlearn.equalized_odds_difference,
        }.items():
            assert result.gaps[name].value == pytest.approx(function(y, p, **options), abs=1e-12)


def test_intervals_of_weighted_shares_are_those_of_the_effective_number_of_rows() -> None:
    y, p, g, _ = _data(300)
    w = np.random.default_rng(1).exponential(size=300)
    result = group_gaps(y, p, g, weights=w, confidence=0.9)
    for group in result.groups:
        for name, among in {"accuracy": y >= 0, "true_positive_rate": y == 1}.items():
            part = w[among & (g == group.group)]
            size = part.sum() ** 2 / (part**2).sum()
            rate = group.rates[name]
            low, high = proportion_confint(rate.value * size, size, alpha=0.1, method="wilson")
            assert (rate.low, rate.high) == pytest.approx((low, high))


def test_weighted_rows_of_subjects_count_as_the_robust_error_of_statsmodels_says() -> None:
    rng = np.random.default_rng(0)
    owners, w = rng.integers(0, 40, 200), rng.exponential(size=200)
    hits = rng.random(200) < np.repeat([0.2, 0.9], 20)[owners]
    fit = WLS(hits.astype(float), np.ones(200), w).fit(cov_type="cluster", cov_kwds={"groups": owners})
    share, size = np.average(hits, weights=w), effective_rows(hits, owners, w)
    assert fit.params[0] == pytest.approx(share)
    # The factor (n − 1) / (n − number of coefficients) of statsmodels is 1 here.
    assert np.sqrt(share * (1 - share) / size) == pytest.approx(fit.bse[0], rel=1e-6)
    every = np.array([w[owners == owner].mean() for owner in np.unique(owners)])
    assert effective_rows(np.ones(200, bool), owners, w) == pytest.approx(every.sum() ** 2 / (every**2).sum())


def test_resampled_rows_take_their_weights_along() -> None:
    y, p, g, scores = _data(400)
    w = np.exp(np.random.default_rng(1).standard_normal(400))
    result = group_gaps(y, p, g, scores=scores, weights=w, num_bootstrap=4000, confidence=0.9)
    rng, rows, values = np.random.default_rng(5), np.flatnonzero(g == "c"), []
    for _ in range(4000):
        drawn = rng.choice(rows, rows.size)
        errors = w[drawn] * (scores[drawn, 1] - y[drawn])
        bins = np.floor(scores[drawn, 1] * 10).astype(int)
        brier = np.average((scores[drawn, 1] - y[drawn]) ** 2, weights=w[drawn])
        values.append([np.abs(np.bincount(bins, errors)).sum() / w[drawn].sum(), brier])
    (error, brier), rates = np.std(values, axis=0), result.groups[2].rates
    half = 1.6449 * error
    middle = 2 * rates["calibration_error"].value - np.mean(values, axis=0)[0]
    assert rates["calibration_error"].high == pytest.approx(middle + half, abs=0.012)
    assert rates["brier_score"].high - rates["brier_score"].low == pytest.approx(2 * 1.66 * brier, rel=0.1)


@settings(max_examples=15)
@given(st.integers(40, 80), st.integers(2, 3), st.booleans(), st.integers(0, 10**6))
def test_equal_weights_are_none_their_scale_is_none_and_0_leaves_a_row_out(
    n: int, num_classes: int, with_subjects: bool, seed: int
) -> None:
    y, p, g, scores = _data(n, num_classes, seed)
    y[:num_classes], g[:2] = np.arange(num_classes), ["a", "b"]
    rng = np.random.default_rng(seed)
    w, subjects = rng.exponential(size=n), rng.integers(0, 25, n) if with_subjects else None

    def result(weights: Any, rows: Any = slice(None)) -> Any:
        found = group_gaps(
            y[rows],
            p[rows],
            g[rows],
            scores=scores[rows],
            subjects=subjects if subjects is None else subjects[rows],
            weights=weights,
            num_bootstrap=30,
            min_group_rows=1,
        )
        return [found.notes, *({**group.rates, "n": group.num_rows} for group in found.groups)]

    def close(one: Any, other: Any) -> bool:
        assert one[0] == other[0]
        for rates, expected in zip(one[1:], other[1:], strict=True):
            assert rates.pop("n") == expected.pop("n")
            for name, rate in rates.items():
                for key in ("value", "low", "high"):
                    assert getattr(rate, key) == pytest.approx(getattr(expected[name], key), abs=1e-9), name
        return True

    assert close(result(np.full(n, 0.7)), result(None))
    for scale in (1e305, 1e-305):
        assert close(result(w * scale), result(w))
    w[num_classes::5] = 0
    assert result(w) == result(w[w > 0], w > 0)
