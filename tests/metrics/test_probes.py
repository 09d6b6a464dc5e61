"""Probes against scikit-learn and explicit refits, their p-values under independence, and their errors."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, t
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.proportion import proportion_confint

from mdnorm.metrics import probe_folds, probe_ridge, probe_scores
from mdnorm.metrics.columns import Categories
from mdnorm.metrics.probes import ProbeResult, ProbeScore, probe


def _data(n: int, p: int, num_classes: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, p) and a target that depends on two of them; in classes of different sizes where asked."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) * rng.uniform(0.1, 10, p) + rng.uniform(-5, 5, p)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    y = z[:, 0] - z[:, -1] + 0.7 * rng.standard_normal(n)
    if not num_classes:
        return x, y
    shares = np.arange(1, num_classes + 1)
    return x, np.digitize(y, np.quantile(y, np.cumsum(shares)[:-1] / shares.sum()))


def _splits(strata: np.ndarray, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(StratifiedKFold(5, shuffle=True, random_state=seed).split(strata, strata))


def _within_folds(x: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(x[train])
    return scaler.transform(x[train]), scaler.transform(x[test])


# -- against references -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(100, 5), (60, 200)])
def test_r2_equals_ridge_of_scikit_learn(n: int, p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_ridge, "_STRENGTHS", np.array([0.3]))
    x, y = _data(n, p)
    errors, totals = 0.0, 0.0
    for train, test in _splits(np.zeros(n)):
        z_train, z_test = _within_folds(x, train, test)
        predicted = Ridge(alpha=0.3 * len(train)).fit(z_train, y[train]).predict(z_test)
        error, total = ((y[test] - predicted) ** 2).sum(), ((y[test] - y[train].mean()) ** 2).sum()
        errors, totals = errors + error, totals + total
    result = probe(x, y, num_permutations=0)
    assert result.score == pytest.approx(1 - errors / totals, abs=1e-9)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_classes_are_decided_as_by_linear_discriminants_with_equal_priors(num_classes: int) -> None:
    x, y = _data(2000, 6, num_classes)
    decided = np.empty_like(y)
    for train, test in _splits(y):
        model = LinearDiscriminantAnalysis(priors=np.full(num_classes, 1 / num_classes))
        decided[test] = model.fit(x[train], y[train]).predict(x[test])
    expected = balanced_accuracy_score(y, decided)
    assert expected > 1 / num_classes + 0.1
    assert probe(x, y, num_permutations=0).score == pytest.approx(expected, abs=0.01)


def test_balanced_accuracy_is_the_mean_recall_over_all_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _data(150, 3, 3)
    decided = np.full(150, -1)
    splits = iter(_splits(y))
    original = probe_scores.decisions

    def recorded(*args: Any) -> Any:
        out = original(*args)
        decided[next(splits)[1]] = out[:, 0]
        return out

    monkeypatch.setattr(probe_scores, "decisions", recorded)
    result = probe(x, y, num_permutations=0)
    assert result.score == pytest.approx(balanced_accuracy_score(y, decided), abs=1e-12)


def test_decisions_are_those_of_the_discriminant_in_plain_sums() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, (90, 3))
    left_out = 0.2 * (classes[:, :, None] == np.arange(3)) + 0.1 * rng.standard_normal((90, 3, 3))
    scores = rng.standard_normal((50, 3, 4))
    decided = probe_ridge.decisions(scores, classes, left_out)
    for target in range(3):
        own = np.column_stack([left_out[:, target], -left_out[:, target].sum(axis=1)])
        indicators = np.eye(4)[classes[:, target]]
        root = np.diag(indicators.mean(axis=0) ** -0.5)
        between = root @ own.T @ indicators @ root / 90
        values, vectors = np.linalg.eigh((between + between.T) / 2)
        between = vectors @ np.diag(values.clip(0)) @ vectors.T
        inverse = np.linalg.inv(np.eye(4) - between)
        offsets = np.diag(root @ between @ inverse @ root) / 2
        expected = scores[:, target] @ root @ inverse @ root - offsets
        np.testing.assert_array_equal(decided[:, target], expected.argmax(axis=1))


@pytest.mark.parametrize("largest", [1, 4, 30])
def test_left_out_residuals_equal_refits(largest: int) -> None:
    rng = np.random.default_rng(1)
    z = rng.standard_normal((80, 6))
    z -= z.mean(axis=0)
    y = rng.standard_normal((80, 2)) + z[:, :2]
    subjects = None if largest == 1 else np.minimum(rng.integers(0, 200, 80) // largest, 80)
    eigenvalues, vectors = np.linalg.eigh(z.T @ z)
    weights = 1 / (eigenvalues + 3.0)
    left_out = probe_ridge._LeftOut(z @ vectors, subjects)
    residuals = y - Ridge(alpha=3.0).fit(z, y).predict(z)
    result, means = left_out.residuals(residuals, weights), left_out.means(y)
    for block in np.unique(np.arange(80) if subjects is None else subjects):
        rows = (np.arange(80) if subjects is None else subjects) == block
        refit = Ridge(alpha=3.0).fit(z[~rows], y[~rows])
        np.testing.assert_allclose(result[rows], y[rows] - refit.predict(z[rows]), atol=1e-9)
        np.testing.assert_allclose(means[rows], np.tile(y[~rows].mean(axis=0), (rows.sum(), 1)), atol=1e-12)


@pytest.mark.parametrize(("n", "p"), [(50, 4), (30, 100), (40, 30)])
def test_the_strength_is_the_strongest_of_nearly_the_best_generalised_cross_validation(
    n: int, p: int
) -> None:
    x, y = _data(n, p)
    z = StandardScaler().fit_transform(x)
    basis = probe_ridge.Basis(z, z, None)
    errors = []
    for strength in probe_ridge._STRENGTHS:
        inner = np.linalg.solve(z @ z.T + strength * n * np.eye(n), z @ z.T)
        hat = inner.T + 1 / n
        if n - np.trace(hat) >= min(20, n / 2):
            errors.append((((np.eye(n) - hat) @ y) ** 2).sum() / (n - np.trace(hat)) ** 2)
    assert len(errors) == len(basis.weights)
    centred = (y - y.mean())[:, None]
    expected = next(i for i, error in enumerate(errors) if (1 - 10 / n) * error <= min(errors))
    assert basis._generalised(centred, basis.train.T @ centred, 1)[0] == expected


@pytest.mark.parametrize("model", ["linear", "nonlinear"])
@pytest.mark.parametrize(("n", "p"), [(160, 128), (160, 130), (100, 80), (80, 64)])
def test_a_probe_that_knows_nothing_is_no_worse_than_the_mean(
    n: int, p: int, model: Literal["linear", "nonlinear"]
) -> None:
    """Where the training rows are about as many as the features, a fit through every row looks good."""
    for seed in range(30 if model == "linear" else 4):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((n, p)), rng.standard_normal(n)
        assert probe(x, y, num_permutations=0, model=model).score > -0.1
        if model == "linear" and seed < 5:
            pairs = np.arange(n) // 2
            assert probe(x, y, num_permutations=0, groups=pairs).score > -0.1


def test_as_many_rows_as_features_do_not_hide_a_clear_signal() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((160, 100))
    assert probe(x, x @ rng.standard_normal(100), num_permutations=0).score > 0.99
    x = rng.standard_normal((160, 128))
    assert probe(x, x @ rng.standard_normal(128), num_permutations=0).score > 0.8


# -- known cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["linear", "nonlinear"])
@pytest.mark.parametrize("kind", ["number", "two classes", "five classes", "rare class"])
def test_an_encoded_target_is_predicted_perfectly(model: Any, kind: str) -> None:
    rng = np.random.default_rng(0)
    y = {
        "number": rng.standard_normal(100),
        "two classes": rng.integers(0, 2, 100),
        "five classes": rng.integers(0, 5, 100),
        "rare class": np.arange(100) < 6,
    }[kind]
    code = y[:, None] if kind == "number" else np.eye(5)[y.astype(int)]
    x = np.hstack([code, rng.standard_normal((100, 4))]) @ rng.standard_normal((code.shape[1] + 4, 12))
    result = probe(x, y, model=model, num_permutations=20, num_landmarks=20)
    assert result.score == pytest.approx(1, abs=1e-6)
    assert result.p_value == 1 / 21


@pytest.mark.parametrize(
    ("labelled", "num_classes", "model"),
    [(False, 0, "linear"), (False, 3, "linear"), (True, 2, "linear"), (False, 2, "nonlinear")],
)
def test_p_values_are_uniform_under_independence(labelled: bool, num_classes: int, model: Any) -> None:
    p_values, values = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((48, 3))
        y = rng.integers(0, num_classes, 48) if num_classes else rng.standard_normal(48)
        labels = np.arange(48) % 2 if labelled else None
        result = probe(x, y, labels=labels, model=model, num_permutations=39, num_landmarks=8, seed=seed)
        score = result.pooled if labelled else result.scored
        assert score is not None
        p_values.append(score.p_value or 0)
        values.append(score.value - score.chance)
    # Uniform on 1/40 … 1; moved to the middle of its steps.
    assert kstest(np.array(p_values) - 1 / 80, "uniform").pvalue > 0.01
    assert abs(np.mean(values)) < 0.08


@pytest.mark.parametrize("kind", ["quadratic", "product", "radius"])
def test_the_nonlinear_probe_finds_what_the_linear_one_cannot(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 5))
    y = {"quadratic": x[:, 0] ** 2, "product": x[:, 0] * x[:, 1], "radius": (x**2).sum(axis=1)}[kind]
    assert probe(x, y, num_permutations=0).score < 0.05
    result = probe(x, y, model="nonlinear", num_permutations=20)
    assert result.score > 0.4
    assert result.p_value == 1 / 21


def test_the_nonlinear_probe_keeps_a_class_in_a_component_of_a_small_variance() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    x = rng.standard_normal((400, 10)) + 30 * rng.standard_normal((400, 1))
    x[:, 0] = x[:, 1] + 0.05 * (2 * y - 1 + rng.standard_normal(400))
    linear = probe(x, y, num_permutations=0).score
    assert linear > 0.8
    assert probe(x, y, model="nonlinear", num_permutations=0).score == pytest.approx(linear, abs=0.02)


def test_a_rare_class_is_not_left_at_chance() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(1000) < 40
    x = rng.standard_normal((1000, 20))
    x[:, 0] += 2 * y
    assert probe(x, y, num_permutations=0).score > 0.75
    wide = np.hstack([x, rng.standard_normal((1000, 1500))])
    wide[:, :40] += y[:, None]
    assert probe(wide, y, num_permutations=0).score > 0.75


@pytest.mark.parametrize("model", ["linear", "nonlinear"])
def test_many_more_features_than_rows(model: Any) -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal(60)
    x = rng.standard_normal((60, 3000))
    assert (probe(x, y, model=model, num_permutations=20).p_value or 0) > 1 / 21
    x[:, :1500] += y[:, None]
    result = probe(x, y, model=model, num_permutations=20)
    assert result.score > 0.7
    assert result.p_value == 1 / 21


@pytest.mark.parametrize("model", ["linear", "nonlinear"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_constant_features_are_at_chance(model: Any, num_classes: int) -> None:
    _, y = _data(40, 3, num_classes)
    result = probe(np.full((40, 4), 0.1), y, model=model, num_permutations=20)
    assert result.score == pytest.approx(result.chance, abs=1e-12)
    assert result.p_value == 1


def test_a_column_of_rounding_is_a_constant() -> None:
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 200)
    features = rng.standard_normal((200, 5))
    expected = probe(features, age, num_permutations=20)
    left = np.column_stack([features, -1e-17 * age])
    assert probe(left, age, num_permutations=20).score == pytest.approx(expected.score, abs=1e-12)
    left[3, -1] = 1e-3
    assert probe(left, age, num_permutations=20).score > -1


def test_a_constant_column_changes_nothing() -> None:
    x, y = _data(60, 3)
    beside = np.column_stack([x, np.full(60, 7.0)])
    assert probe(beside, y).score == pytest.approx(probe(x, y).score, abs=0.02)


# -- labels and groups ------------------------------------------------------------------------------------


def test_labels_show_what_is_left_beyond_the_label() -> None:
    rng = np.random.default_rng(0)
    label = np.repeat(["patient", "control"], 150)
    age = 50 + 20 * (label == "patient") + rng.normal(0, 5, 300)
    x = rng.standard_normal((300, 4)) + 2 * (label == "patient")[:, None]
    result = probe(x, age, labels=label, num_permutations=99)
    assert result.score > 0.6
    assert result.scored.permutation_mean == pytest.approx(result.score, abs=0.03)
    assert (result.p_value or 0) > 0.05
    assert probe(x, age, num_permutations=99).p_value == 0.01
    assert [within.label for within in result.within_labels] == ["control", "patient"]
    assert all(within.score < 0.05 for within in result.within_labels)
    assert result.pooled.value == pytest.approx(np.mean([r.score for r in result.within_labels]))
    assert (result.pooled.p_value or 0) > 0.05


def test_within_a_label_class_is_the_probe_of_its_rows() -> None:
    x, y = _data(120, 4)
    label = np.arange(120) % 3
    result = probe(x, y, labels=label, num_permutations=20)
    for code, within in enumerate(result.within_labels):
        alone = probe(x[label == code], y[label == code], num_permutations=20)
        assert within.scored.value == pytest.approx(alone.score, abs=1e-9)
        assert within.scored.p_value == alone.p_value
        assert within.num_rows == 40


def test_label_classes_that_cannot_be_probed_are_named() -> None:
    x, y = _data(100, 3, 2)
    label = np.repeat(["few", "many", "constant"], [6, 64, 30])
    y[70:] = 0
    result = probe(x, y, labels=label, num_permutations=20)
    assert [within.label for within in result.within_labels] == ["many"]
    assert dict(result.left_out).keys() == {"few", "constant"}
    assert "6 rows, 10 are needed" in dict(result.left_out)["few"]
    assert "target is constant" in dict(result.left_out)["constant"]


@pytest.mark.parametrize("num_classes", [0, 2])
def test_groups_keep_subjects_from_being_recognised(num_classes: int) -> None:
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(30), 8)
    of_subject = rng.permutation(np.arange(30) % 2) if num_classes else rng.standard_normal(30)
    x = rng.standard_normal((30, 40))[subjects] + 0.1 * rng.standard_normal((240, 40))
    y = of_subject[subjects]
    free = probe(x, y, num_permutations=20)
    assert free.score > 0.9
    assert free.p_value == 1 / 21
    kept = probe(x, y, groups=subjects, num_permutations=99)
    assert kept.score < kept.chance + 0.15
    assert (kept.p_value or 0) > 0.05


def test_p_values_with_subjects_are_uniform_under_independence() -> None:
    p_values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        subjects = np.repeat(np.arange(16), 3)
        x = rng.standard_normal((16, 3))[subjects] + 0.3 * rng.standard_normal((48, 3))
        y = rng.standard_normal(16)[subjects] + 0.3 * rng.standard_normal(48)
        p_values.append(probe(x, y, groups=subjects, num_permutations=39, seed=seed).p_value or 0)
    assert kstest(np.array(p_values) - 1 / 80, "uniform").pvalue > 0.01


@given(st.integers(0, 1000), st.booleans())
def test_folds_and_permutations_keep_their_promises(seed: int, labelled: bool) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(40, 120))
    y, label = rng.integers(0, 2, n), rng.integers(0, 2, n) if labelled else None
    setting = probe_folds.Settings("linear", 4, 5, 10, 0.95, seed)
    classes = Categories(y, (0, 1))
    fold = probe_folds.folds(y, classes, label, None, setting, [])
    counts = np.array([np.bincount(fold[y == code], minlength=4) for code in (0, 1)])
    assert np.ptp(counts, axis=1).max() <= 2
    orders = probe_folds.permutations(fold, label, None, setting)
    assert (orders[:, 0] == np.arange(n)).all()
    for order in orders.T:
        assert (np.sort(order) == np.arange(n)).all()
        assert (fold[order] == fold).all()
        assert label is None or (label[order] == label).all()

    subjects = rng.integers(0, 25, n)
    fold = probe_folds.folds(y.astype(float), None, None, subjects, setting, [])
    for subject in np.unique(subjects):
        assert np.unique(fold[subjects == subject]).size == 1
    for order in probe_folds.permutations(fold, None, subjects, setting).T:
        donors = subjects[order]
        pairs = {(a, b) for a, b in zip(subjects, donors, strict=True)}
        # Each subject gets the rows of one subject, and no two of the same one.
        assert len(pairs) == np.unique(subjects).size == np.unique(donors).size


# -- invariances and inputs -------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(12, 60), st.integers(1, 80), st.sampled_from([0, 2, 3]), st.integers(0, 1000))
def test_scores_are_in_range_and_do_not_depend_on_units(n: int, p: int, num_classes: int, seed: int) -> None:
    x, y = _data(n, p, num_classes, seed)
    result = probe(x, y, num_permutations=20, seed=seed)
    assert result.score <= 1
    assert num_classes == 0 or result.score >= 0
    assert result.p_value in [pytest.approx(k / 21) for k in range(1, 22)]
    scales = 10.0 ** np.random.default_rng(seed).uniform(-3, 3, p)
    target = 3 * y + 7 if num_classes == 0 else np.array(["a", "b", "c"])[y]
    other = probe(scales * x, target, num_permutations=20, seed=seed)
    assert other.score == pytest.approx(result.score, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_extreme_scales(scale: float) -> None:
    x, y = _data(50, 3)
    expected = probe(x, y, num_permutations=0).score
    assert probe(x * scale, y * scale, num_permutations=0).score == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("model", ["linear", "nonlinear"])
def test_the_same_seed_gives_the_same_result(model: Any) -> None:
    x, y = _data(80, 6, 3)
    label, subjects = np.arange(80) % 2, np.arange(80) // 3
    np.random.seed(3)  # noqa: NPY002 - the global state must not matter

    def run(seed: int) -> ProbeResult:
        return probe(
            x, y, model=model, labels=label, groups=subjects, num_permutations=20, num_landmarks=8, seed=seed
        )

    first = run(1)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert run(1) == first
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert run(2) != first


def test_kinds_of_input() -> None:
    x, y = _data(60, 3, 2)
    expected = probe(x, y, num_permutations=20)
    assert expected.classes == (0, 1)
    assert expected.class_counts == (20, 40)
    for features, target in (
        (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)),
        (x.tolist(), y.tolist()),
        (np.asfortranarray(x), y[:, None]),
        (x, y.astype(bool)),
    ):
        assert probe(features, target, num_permutations=20).scored == expected.scored
    assert probe(x, np.array(["f", "m"])[y], num_permutations=20).scored == expected.scored


def test_the_task_is_guessed_and_said() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 2))
    grade = np.arange(60) % 4
    result = probe(x, grade, num_permutations=0)
    assert result.task == "classification"
    assert "task='regression'" in result.notes[0]
    assert probe(x, grade, task="regression", num_permutations=0).scored.name == "r2"
    sites = probe(x, np.arange(60) % 12, num_permutations=0)
    assert sites.task == "regression"
    assert "12 distinct whole numbers and was taken as a quantity: pass task='class" in sites.notes[0]
    for told in (np.arange(60) % 13, np.arange(60) % 12 + 0.5):
        assert probe(x, told, num_permutations=0).notes == ()
    assert probe(x, np.arange(60), num_permutations=0).task == "regression"
    assert probe(x, grade / 3, num_permutations=0).task == "regression"
    assert probe(x, grade % 2 * 1.5, num_permutations=0).task == "classification"


def test_folds_are_reduced_with_a_note() -> None:
    x, _ = _data(40, 2)
    result = probe(x, np.arange(40) < 3, num_permutations=0)
    assert result.num_folds == 3
    assert "3 folds instead of 5" in result.notes[0]
    result = probe(x, np.arange(40) % 2, groups=np.arange(40) % 4, num_permutations=20, task="regression")
    assert result.num_folds == 4
    assert any("4 subjects only" in note for note in result.notes)


def test_to_dict_is_json() -> None:
    x, y = _data(60, 3, 3)
    result = probe(x, y, labels=np.arange(60) % 2, num_permutations=20)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["scored"]["value"] == result.score
    assert [within["label"] for within in values["within_labels"]] == [0, 1]
    assert json.loads(json.dumps(probe(x, x[:, 0]).to_dict()))["task"] == "regression"


X, Y = np.random.default_rng(0).standard_normal((20, 2)), np.arange(20.0)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (X, Y[:19], {}, ValueError, "20 rows in features and 19 in target"),
        (X, Y, {"labels": Y[:3]}, ValueError, "20 rows in features and 3 in labels"),
        (X, Y, {"groups": Y[:3]}, ValueError, "20 rows in features and 3 in groups"),
        (X[:9], Y[:9], {}, ValueError, "at least 10 rows, got 9"),
        (X[:0], Y[:0], {}, ValueError, "target has no rows"),
        (
            np.where(X > 2, np.nan, np.inf),
            Y,
            {},
            ValueError,
            r"features has NaN .* row\(s\) 0, 1, 2, 3, 4, …",
        ),
        (X, np.where(Y == 3, np.nan, Y), {}, ValueError, r"target has missing .* row\(s\) 3 \(1 of 20"),
        (X, [None, *"ab" * 9, "a"], {}, ValueError, r"target has missing .* row\(s\) 0 "),
        (X, Y, {"groups": [None] * 20}, ValueError, "groups has missing"),
        (X, np.ones(20), {}, ValueError, "target is constant: all of its 20 rows are 1,"),
        (X, np.ones(20), {"task": "regression"}, ValueError, "target is constant"),
        (
            X,
            [f"s{i}" for i in range(20)],
            {},
            ValueError,
            "different value in each .* 's0', 's1'.*identifier",
        ),
        (X, ["a"] * 19 + ["b"], {}, ValueError, r"1 class\(es\) with one row only: 'b'"),
        (X, Y < 5, {"groups": Y < 5}, ValueError, r"2 class\(es\) with one subject only"),
        (X, Y, {"groups": np.ones(20)}, ValueError, "groups has one subject only"),
        (X, ["a", "b"] * 10, {"task": "regression"}, TypeError, "must be numeric for task='regression'"),
        (X, [1, "b"] * 10, {"task": "classification"}, TypeError, None),
        (X, np.arange(20).astype("M8[D]"), {}, TypeError, "target must hold numbers or categories"),
        (X, X, {}, ValueError, r"target must have shape \(n,\)"),
        (X[:, :0], Y, {}, ValueError, r"features must have .* got shape \(20, 0\)"),
        (X[:, :, None], Y, {}, ValueError, "features.reshape"),
        (X.astype(str), Y, {}, TypeError, "features must be real and numeric"),
        (X, Y, {"model": "deep"}, ValueError, "model must be 'linear' or 'nonlinear'"),
        (X, Y, {"task": "ranking"}, ValueError, "task must be"),
        (X, Y, {"num_folds": 1}, ValueError, "num_folds must be at least 2"),
        (X, Y, {"num_permutations": -1}, ValueError, "num_permutations must be at least 0"),
        (X, Y, {"num_permutations": 19}, ValueError, "at least 20, got 19.* or 0 for no p-value"),
        (X, Y, {"confidence": 95}, ValueError, "confidence must be between 0 and 1, got 95"),
        (X, Y, {"num_landmarks": True}, TypeError, "num_landmarks must be an integer"),
        (X, Y, {"seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_errors_name_the_argument(
    x: Any, y: Any, options: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    if message is None:  # NumPy makes strings of numbers beside strings, objects stay as they are
        y, message = np.array(y, dtype=object), "mixes numbers \\(1\\) and strings"
    with pytest.raises(error, match=message):
        probe(x, y, **options)


# -- intervals --------------------------------------------------------------------------------------------


def test_the_interval_of_r2_is_that_of_the_jackknife() -> None:
    x, y = _data(60, 3)
    result = probe(x, y, num_permutations=0, confidence=0.9)
    # The out-of-fold errors of the same ridge, and R² without each row in turn.
    errors, totals = np.empty(60), np.empty(60)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(x, np.zeros(60))
    for train, test in folds:
        scaler = StandardScaler().fit(x[train])
        z = scaler.transform(x[train])
        basis = probe_ridge.Basis(z, scaler.transform(x[test]), None)
        _, predicted, _ = basis.fit(y[train][:, None, None])
        totals[test] = (y[test] - y[train].mean()) ** 2
        errors[test] = (y[test] - y[train].mean() - predicted[:, 0, 0]) ** 2
    assert result.score == pytest.approx(1 - errors.sum() / totals.sum())
    left_out = 1 - (errors.sum() - errors) / (totals.sum() - totals)
    spread = np.sqrt(2.25 * 59 / 60 * ((left_out - left_out.mean()) ** 2).sum())
    half = t.ppf(0.95, 59) * spread
    assert result.scored.low == pytest.approx(result.score - half, abs=0.05 * half)
    # At least what the correlation of prediction and target allows.
    assert result.scored.high >= result.score + 0.95 * half


def test_the_interval_of_balanced_accuracy_is_put_together_from_those_of_the_classes() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [100, 40])
    x = rng.standard_normal((140, 3)) + y[:, None]
    score = probe(x, y, num_permutations=0, num_folds=5).scored
    # Of two equal halves the mean is off by half of the root of the summed squares of what each is off by.
    width = 0
    for size in (100, 40):
        low, high = proportion_confint(score.value * size / 2.25, size / 2.25, method="wilson")
        width += (high - low) ** 2
    assert score.high - score.low == pytest.approx(np.sqrt(width) / 2, rel=0.1)
    # Two rows of each subject that are alike say what one does.
    twice = np.repeat(np.arange(140), 2)
    again = probe(x[twice], y[twice], groups=twice, num_permutations=0).scored
    assert again.high - again.low == pytest.approx(score.high - score.low, rel=0.1)


@pytest.mark.parametrize("effect", [0.0, 0.3, 0.6])
def test_intervals_of_a_probe_cover_its_mean_score(effect: float) -> None:
    rng = np.random.default_rng(0)
    scores: dict[str, list[ProbeScore]] = {"number": [], "sign": []}
    for _ in range(100):
        x = rng.standard_normal((100, 2))
        y = effect * x[:, 0] + rng.standard_normal(100)
        scores["number"].append(probe(x, y, num_permutations=0).scored)
        scores["sign"].append(probe(x, y > 0, num_permutations=0).scored)
    for name, parts in scores.items():
        mean = np.mean([score.value for score in parts])
        assert sum(mean <= score.high for score in parts) >= 90
        # R² of a probe that finds nothing is a constant a little below 0.
        if effect or name == "sign":
            assert sum(score.low <= mean <= score.high for score in parts) >= 88
        assert all(score.low <= score.value <= score.high for score in parts)
