"""Balancing weights against independent computations, and every input that is refused."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

import mdnorm
from mdnorm import balancing_weights
from mdnorm.design import polynomial
from mdnorm.metrics import distance_correlation_sqr

matplotlib.use("Agg")
METHODS = ["propensity", "entropy", "distance"]


def confounded(num_samples=400, seed=0, num_classes=2, strength=1.0):
    """Classes that go with the first of three metadata columns."""
    rng = np.random.default_rng(seed)
    metadata = rng.standard_normal((num_samples, 3))
    score = strength * metadata[:, 0] + rng.standard_normal(num_samples)
    edges = np.quantile(score, np.linspace(0, 1, num_classes + 1)[1:-1])
    return np.digitize(score, edges), metadata


def continuous(num_samples=400, seed=0, strength=0.7):
    rng = np.random.default_rng(seed)
    metadata = rng.standard_normal((num_samples, 2))
    return strength * metadata[:, 0] + rng.standard_normal(num_samples), metadata


def effective(weights):
    return float(weights.sum() ** 2 / (weights**2).sum())


# -- propensity -------------------------------------------------------------------------------------------


@given(cells=st.lists(st.integers(3, 40), min_size=6, max_size=6))
def test_saturated_propensity_weights_are_the_ratio_of_shares(cells):
    """Two classes at three sites: p(y) p(site) / p(y, site), from counts."""
    table = np.array(cells).reshape(2, 3)
    labels, site = (np.repeat(index.ravel(), cells) for index in np.indices(table.shape))
    result = balancing_weights(labels, np.eye(3)[site], clip=None)
    share = table / table.sum()
    expected = share.sum(1, keepdims=True) * share.sum(0) / share
    np.testing.assert_allclose(result, expected[labels, site], rtol=1e-7)
    assert max(row.after for row in result.balance) < 1e-6


@pytest.mark.parametrize("num_classes", [2, 3])
def test_propensity_weights_are_those_of_statsmodels(num_classes):
    sm = pytest.importorskip("statsmodels.api")
    labels, metadata = confounded(num_classes=num_classes)
    design = sm.add_constant(metadata)
    fit = sm.MNLogit(labels, design).fit(disp=0, method="newton", tol=1e-12)
    own = fit.predict(design)[np.arange(len(labels)), labels]
    expected = np.bincount(labels)[labels] / len(labels) / own
    result = balancing_weights(labels, metadata, method="propensity", clip=None)
    np.testing.assert_allclose(result, expected / expected.mean(), rtol=1e-6)


# -- entropy ----------------------------------------------------------------------------------------------


def constraints(labels, metadata):
    """Columns whose weighted sums entropy balancing makes 0."""
    columns = (
        np.eye(labels.max() + 1)[labels] if labels.dtype.kind == "i" else labels.reshape(len(labels), -1)
    )
    y = (columns - columns.mean(0)) / columns.std(0)
    m = (metadata - metadata.mean(0)) / metadata.std(0)
    return np.concatenate([y, m, (y[:, :, None] * m[:, None]).reshape(len(y), -1)], 1)


@given(
    num_samples=st.integers(60, 400),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    offset=st.sampled_from([0.0, 100.0]),
    kind=st.sampled_from([2, 3, None]),
)
def test_entropy_weights_satisfy_the_constraints(num_samples, seed, scale, offset, kind):
    labels, metadata = (
        continuous(num_samples, seed, 0.3)
        if kind is None
        else confounded(num_samples, seed, num_classes=kind, strength=0.3)
    )
    result = balancing_weights(labels, scale * (metadata + offset), method="entropy", clip=None)
    sums = np.asarray(result) @ constraints(labels, metadata) / num_samples
    assert np.abs(sums).max() < 1e-8
    assert max(row.after for row in result.balance) < 1e-6
    assert float(result.weights.mean()) == pytest.approx(1, abs=1e-12)
    assert bool((result.weights > 0).all())


def test_entropy_weights_have_the_largest_entropy():
    labels, metadata = continuous(30, 3)
    result = balancing_weights(labels, metadata, method="entropy", clip=None)
    columns = constraints(labels, metadata)

    def negative_entropy(w):
        return (w * np.log(w)).sum()

    primal = minimize(
        negative_entropy,
        np.ones(30),
        jac=lambda w: np.log(w) + 1,
        bounds=[(1e-9, None)] * 30,
        constraints=[
            {"type": "eq", "fun": lambda w: columns.T @ w, "jac": lambda w: columns.T},
            {"type": "eq", "fun": lambda w: w.sum() - 30, "jac": lambda w: np.ones((1, 30))},
        ],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert primal.success
    np.testing.assert_allclose(result, primal.x, atol=1e-5)


# -- distance ---------------------------------------------------------------------------------------------


def distance_objective(labels, metadata):
    """Weighted distance covariance plus energy distances as Huling et al. write them, as a function of w."""
    n = len(labels)

    def distances(rows):
        matrix = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        return matrix / matrix.mean()

    def centred(a):
        return a - a.mean(0) - a.mean(1)[:, None] + a.mean()

    a = distances(labels.reshape(n, -1))
    b = distances((metadata - metadata.mean(0)) / metadata.std(0))
    product = centred(a) * centred(b)

    def objective(w):
        energy = sum(2 * w @ d.sum(1) - w @ d @ w - d.sum() for d in (a, b))
        return (w @ product @ w + energy) / n**2

    return objective


def test_distance_weights_are_those_of_a_general_solver():
    labels, metadata = continuous(40, 1, strength=2.0)
    result = balancing_weights(labels, metadata, method="distance", clip=None)
    objective = distance_objective(labels, metadata)
    general = minimize(
        objective,
        np.ones(40),
        bounds=[(0, None)] * 40,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 40},
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-15},
    )
    assert objective(np.asarray(result)) <= general.fun + 1e-9
    np.testing.assert_allclose(result, general.x, atol=0.01)
    assert float(result.weights.min()) == 0


@given(num_samples=st.integers(40, 200), seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_no_weights_have_a_smaller_distance_objective(num_samples, seed, scale):
    labels, metadata = continuous(num_samples, seed)
    result = balancing_weights(scale * labels, scale * metadata, method="distance", clip=None)
    objective = distance_objective(labels, metadata)
    own = objective(np.asarray(result))
    rng = np.random.default_rng(seed)
    others = [np.ones(num_samples), rng.exponential(size=num_samples)]
    others.append(np.asarray(balancing_weights(labels, metadata, method="entropy", clip=None)))
    # Nearby ones, too.
    others += [np.asarray(result) * rng.uniform(0.98, 1.02, num_samples) for _ in range(5)]
    assert all(own <= objective(other / other.mean()) + 1e-12 for other in others)


def test_distance_weights_of_samples_that_are_alike_are_equal():
    labels, metadata = continuous(50, 2)
    once = balancing_weights(labels, metadata, method="distance")
    twice = balancing_weights(np.tile(labels, 2), np.tile(metadata, (2, 1)), method="distance")
    np.testing.assert_allclose(twice, np.tile(np.asarray(once), 2), atol=1e-4)


# -- all methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_dependence_falls(method, num_classes):
    labels, metadata = confounded(600, num_classes=num_classes)
    result = balancing_weights(labels, metadata, method=method)
    assert result.dcor_sqr_before > 0.1
    assert abs(result.dcor_sqr_after) < 0.02
    worst = max(result.balance, key=lambda row: row.before)
    assert worst.name == "column 0"
    assert worst.after < 0.25 * worst.before
    assert result.effective_sample_size == pytest.approx(effective(np.asarray(result)))
    assert float(result.weights.mean()) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_dependence_on_continuous_labels_falls(method):
    labels, metadata = continuous(600)
    result = balancing_weights(labels, metadata, method=method)
    assert result.dcor_sqr_before > 0.1
    assert abs(result.dcor_sqr_after) < 0.02
    assert result.class_sizes == {}


@given(num_samples=st.integers(5, 200), columns=st.integers(1, 7), seed=st.integers(0, 1000))
def test_the_dependence_before_is_that_of_the_metrics(num_samples, columns, seed):
    rng = np.random.default_rng(seed)
    metadata, labels = rng.standard_normal((num_samples, columns)), rng.standard_normal(num_samples)
    assume(num_samples > columns + 3)
    try:
        result = balancing_weights(labels, metadata, method="distance")
    except ValueError:  # few samples
        return
    expected = distance_correlation_sqr(labels, (metadata - metadata.mean(0)) / metadata.std(0))
    assert result.dcor_sqr_before == pytest.approx(expected, abs=1e-10)


def test_the_dependence_after_is_that_of_the_metrics_with_the_weights():
    labels, metadata = confounded(80, 3, strength=0.5)
    result = balancing_weights(labels, metadata)
    scaled = (metadata - metadata.mean(0)) / metadata.std(0)
    expected = distance_correlation_sqr(labels, scaled, weights=result)
    assert result.dcor_sqr_after == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_base_weights_are_copies_of_samples(method):
    labels, metadata = confounded(80, 5, strength=0.5)
    copies = np.random.default_rng(1).integers(1, 4, 80)
    weighted = balancing_weights(labels, metadata, method=method, base_weights=copies, clip=None)
    repeated = balancing_weights(labels.repeat(copies), metadata.repeat(copies, 0), method=method, clip=None)
    np.testing.assert_allclose(
        np.repeat(np.asarray(weighted) / copies, copies) * copies.mean(), repeated, rtol=1e-4, atol=1e-4
    )
    for one, other in zip(weighted.balance, repeated.balance, strict=True):
        assert one[1:] == pytest.approx(other[1:], abs=1e-4)


def test_a_weighted_regression_is_unbiased():
    """The outcome depends on the class by 1 and on the confounder, non-linearly; many small data sets."""
    estimates = {"none": [], "propensity": [], "entropy": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        age = rng.standard_normal(400)
        labels = (rng.random(400) < 1 / (1 + np.exp(-age))).astype(int)
        outcome = labels + age + 0.5 * age**2 + rng.standard_normal(400)
        metadata = polynomial(torch.from_numpy(age), 2, low=-3, high=3)
        for method, values in estimates.items():
            weights = (
                np.ones(400)
                if method == "none"
                else np.asarray(balancing_weights(labels, metadata, method=method))
            )
            means = [np.average(outcome[labels == c], weights=weights[labels == c]) for c in (0, 1)]
            values.append(means[1] - means[0])
    means = {method: np.mean(values) for method, values in estimates.items()}
    assert means["none"] > 1.6
    assert means["propensity"] == pytest.approx(1, abs=0.06)
    assert means["entropy"] == pytest.approx(1, abs=0.06)


# -- clipping, result -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [3.0, 0.95])
def test_clipping_is_reported(clip):
    labels, metadata = confounded(strength=1.5)
    free = balancing_weights(labels, metadata, clip=None)
    result = balancing_weights(labels, metadata, clip=clip)
    raw = np.asarray(free)
    limit = clip if clip > 1 else np.quantile(raw, clip)
    assert result.clipped.tolist() == np.flatnonzero(raw > limit).tolist() != []
    np.testing.assert_allclose(result, np.minimum(raw, limit) / np.minimum(raw, limit).mean())
    assert result.largest == pytest.approx(raw.max())
    assert len(free.clipped) == 0
    assert result.effective_sample_size > free.effective_sample_size
    assert f", {len(result.clipped)} clipped" in str(result)


def test_the_result_is_an_array_a_text_a_sampler_and_a_figure():
    labels, metadata = confounded()
    frame = pd.DataFrame(metadata, columns=["age", "dose", "noise"])
    result = balancing_weights(labels, frame)
    assert np.asarray(result).dtype == np.float64
    assert np.array(result, dtype=np.float32).dtype == np.float32
    assert np.array(result) is not np.asarray(result)
    torch.testing.assert_close(torch.as_tensor(result), result.weights)
    assert len(result) == 400
    assert str(result) == result.summary()
    for part in ("effective sample size", "class 1", "none clipped", "age", "dcor²"):
        assert part in str(result)
    assert repr(result).startswith("BalancingWeights(method='propensity', num_samples=400")
    axes = result.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["age", "dose", "noise"]
    assert result.plot(axes) is axes
    matplotlib.pyplot.close(axes.figure)
    draws = list(result.sampler(40_000, torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(np.bincount(draws, minlength=400) / 100, result, atol=1)
    assert len(result.sampler()) == 400
    named = balancing_weights(labels, metadata, metadata_names=["a", "b", "c"])
    assert [row.name for row in named.balance] == ["a", "b", "c"]


def test_the_sampler_balances_what_it_draws():
    labels, metadata = confounded(2000)
    draws = list(balancing_weights(labels, metadata).sampler(20_000, torch.Generator().manual_seed(0)))
    assert abs(np.corrcoef(labels[draws], metadata[draws, 0])[0, 1]) < 0.1
    assert np.corrcoef(labels, metadata[:, 0])[0, 1] > 0.5


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: torch.from_numpy(y),
        lambda y: torch.from_numpy(y).to(torch.uint8)[:, None],
        lambda y: y.astype(bool),
        lambda y: y.astype(np.float32),
        lambda y: np.array(["control", "patient"])[y],
        lambda y: pd.Series(np.array(["control", "patient"])[y]).astype("category"),
        lambda y: y.tolist(),
        lambda y: np.eye(2, dtype=np.float32)[y],
    ],
)
def test_classes_in_every_form(kind):
    labels, metadata = confounded()
    expected = balancing_weights(labels, metadata)
    result = balancing_weights(kind(labels), torch.from_numpy(metadata).requires_grad_())
    assert result.method == "propensity"
    torch.testing.assert_close(result.weights, expected.weights)


def test_continuous_labels_of_several_columns():
    labels, metadata = continuous()
    two = np.stack([labels, metadata[:, 1] + np.random.default_rng(1).standard_normal(400)], 1)
    result = balancing_weights(two, metadata)
    assert result.method == "entropy"
    assert max(row.after for row in result.balance) < 1e-9
    assert min(row.before for row in result.balance) > 0.4


def test_a_constant_column_and_a_column_twice_change_nothing():
    labels, metadata = confounded()
    expected = balancing_weights(labels, metadata)
    more = np.column_stack([metadata, np.full(400, 1e6), metadata[:, 0] * 2 + 1])
    result = balancing_weights(labels, more)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-6, atol=1e-6)
    assert result.balance[3][1:] == (0, 0)


def test_weights_in_layer_and_loss_are_copies_of_samples():
    """A layer and a loss with whole-numbered weights are those of a data set with copies."""
    torch.manual_seed(0)
    features, metadata = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    labels, copies = torch.arange(40) % 2, torch.randint(1, 4, (40,))
    layer = mdnorm.MetadataNorm(4, num_metadata=1, num_labels=1, estimator="batch").double()
    head = nn.Linear(4, 2).double()

    def losses(rows, weights):
        outputs = layer(features[rows], metadata[rows], labels[rows].double(), weights=weights)
        return nn.functional.cross_entropy(head(outputs), labels[rows], reduction="none")

    weighted = (copies * losses(torch.arange(40), copies)).sum()
    repeated = losses(torch.arange(40).repeat_interleave(copies), None).sum()
    # Up to the prior, which is worth one sample of another size of batch.
    torch.testing.assert_close(weighted, repeated, rtol=2e-3, atol=0)


# -- no overlap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_site_without_a_class_is_refused(method):
    labels = np.tile(["control", "patient"], 60)
    site = np.arange(120) // 40
    labels[site == 2] = "control"
    message = r"never occur where metadata 'site C' is 1 \(40 samples\)\. .*: leave these samples out"
    with pytest.raises(ValueError, match=message) as error:
        balancing_weights(
            labels, np.eye(3)[site], method=method, metadata_names=["site A", "site B", "site C"]
        )
    assert "'patient'" in str(error.value)
    # Coded by two columns, the third site is the one at which both are 0.
    if method != "distance":
        with pytest.raises(ValueError, match="no overlap"):
            balancing_weights(labels, np.eye(3)[site][:, :2], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_column_that_separates_a_class_is_refused(method):
    labels = np.repeat([0, 1, 2], 30)
    age = np.concatenate([np.linspace(20, 40, 30), np.linspace(30, 50, 30), np.linspace(60, 80, 30)])
    message = "'column 1' separates the class 2 of labels .60 to 80. from all others .20 to 50."
    with pytest.raises(ValueError, match=message):
        balancing_weights(labels, np.stack([np.sin(age), age], 1), method=method)


@pytest.mark.parametrize("method", METHODS[:2])
def test_columns_that_separate_together_are_refused(method):
    metadata = np.random.default_rng(0).standard_normal((200, 2))
    labels = (metadata.sum(1) > 0).astype(int)
    with pytest.raises(ValueError, match=r"no overlap: .*'column [01]'"):
        balancing_weights(labels, metadata, method=method)


def test_a_few_samples_without_overlap_are_a_warning():
    """Two controls are far from everybody, where the fit expects no patients."""
    labels, metadata = confounded()
    labels[:2] = 0
    expected = balancing_weights(labels[2:], metadata[2:])
    metadata[:2, 0] -= 50
    with pytest.warns(UserWarning, match=r"row\(s\) 0, 1 \(2 of 400 samples\) the class.es. 1 of labels"):
        result = balancing_weights(labels, metadata)
    assert result.effective_sample_size == pytest.approx(expected.effective_sample_size, rel=0.1)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_label_that_metadata_determine_is_refused(method):
    metadata = np.random.default_rng(0).standard_normal((200, 2))
    with pytest.raises(ValueError, match="a linear function of the metadata"):
        balancing_weights(metadata @ [1.0, 2.0] + 5, metadata, method=method)
    labels = np.arange(200) % 2
    with pytest.raises(ValueError, match=r"class.es. 0, 1 are a linear function of the metadata"):
        balancing_weights(labels, np.stack([metadata[:, 0], labels - metadata[:, 0]], 1), method=method)


def test_continuous_labels_without_overlap_are_refused():
    rng = np.random.default_rng(0)
    age = np.linspace(-1, 1, 100)
    with pytest.raises(ValueError, match=r"overlap.*'column 0' \(1.00 correlation\)"):
        balancing_weights(age + 0.01 * rng.standard_normal(100), age)


def test_a_tiny_effective_sample_size_is_refused():
    """Most controls are old, and one patient is."""
    labels = np.repeat([0, 1], [1000, 100])
    metadata = (np.arange(1100) >= 20) & (np.arange(1100) <= 1000)
    message = r"of class 1 leave an effective sample size of 1\.3 of 100 samples; .*Clip more .clip=., leave"
    with pytest.raises(ValueError, match=message):
        balancing_weights(labels, metadata, clip=None)
    result = balancing_weights(labels, metadata, clip=6)
    assert result.clipped.tolist() == [1000]
    assert result.class_sizes[1][1] > 5


# -- wrong input ------------------------------------------------------------------------------------------

LABELS, METADATA = confounded(40)
WRONG = {
    "no labels": ({"labels": None}, TypeError, "labels must be classes or numbers"),
    "no metadata": ({"metadata": None}, TypeError, "metadata must be a tensor or an array"),
    "words as metadata": ({"metadata": ["a"] * 40}, TypeError, "metadata must be real and numeric"),
    "complex labels": ({"labels": LABELS * 1j}, TypeError, "labels must be real"),
    "mixed labels": ({"labels": [1, "a"] * 20 + [None]}, ValueError, "41 rows"),
    "unordered labels": ({"labels": np.array([1, "a"] * 20, object)}, TypeError, "mixes"),
    "NaN labels": ({"labels": np.r_[np.nan, np.arange(39.0)]}, ValueError, "labels has NaN.*row.s. 0"),
    "NaN metadata": ({"metadata": np.r_[METADATA[:39], [[np.nan] * 3]]}, ValueError, "metadata has NaN.*39"),
    "infinite": ({"metadata": np.r_[METADATA[:39], [[np.inf] * 3]]}, ValueError, "metadata has NaN or inf"),
    "rows": ({"labels": LABELS[:-1]}, ValueError, "39 rows in labels and 40 in metadata"),
    "no rows": ({"labels": LABELS[:0], "metadata": METADATA[:0]}, ValueError, "at least 4 rows, got 0"),
    "one row": ({"labels": LABELS[:1], "metadata": METADATA[:1]}, ValueError, "at least 4 rows, got 1"),
    "no columns": ({"metadata": METADATA[:, :0]}, ValueError, "metadata must have at least one column"),
    "3-D metadata": ({"metadata": METADATA[None]}, ValueError, "metadata must have shape"),
    "3-D labels": ({"labels": LABELS[:, None, None]}, ValueError, "labels must have shape"),
    "one class": ({"labels": np.zeros(40, int)}, ValueError, "one class only, 0"),
    "one value": ({"labels": np.zeros((40, 2))}, ValueError, r"constant in column.s. \[0, 1\]"),
    "constant": ({"metadata": np.ones((40, 2))}, ValueError, "metadata has only constant columns"),
    "a class of one": (
        {"labels": np.arange(40)},
        ValueError,
        "class.es. of one sample: 0, 1.*floating-point",
    ),
    "method": ({"method": "ipw"}, ValueError, "method must be \"propensity\".*'ipw'"),
    "propensity": ({"labels": METADATA[:, 1], "method": "propensity"}, ValueError, "needs classes"),
    "clip 0": ({"clip": 0}, ValueError, "clip must be a quantile"),
    "clip 1": ({"clip": 1.0}, ValueError, "clip must be a quantile"),
    "clip NaN": ({"clip": float("nan")}, ValueError, "clip must be a quantile"),
    "clip text": ({"clip": "0.9"}, TypeError, "clip must be a number"),
    "names": ({"metadata_names": ["a"]}, ValueError, "one name for each of the 3 metadata columns"),
    "base": ({"base_weights": np.arange(40)}, ValueError, "base_weights must be finite and above 0.*0 are"),
    "base rows": ({"base_weights": np.ones(39)}, ValueError, "base_weights has 39 rows"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(arguments, error, message):
    with pytest.raises(error, match=message):
        balancing_weights(**{"labels": LABELS, "metadata": METADATA} | arguments)


def test_too_many_rows_for_distances():
    labels, metadata = continuous(5001)
    with pytest.raises(ValueError, match=r"at most 5000 samples.*got 5001"):
        balancing_weights(labels, metadata, method="distance")
    assert balancing_weights(labels, metadata).dcor_sqr_before > 0.1
