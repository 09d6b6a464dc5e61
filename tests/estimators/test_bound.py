"""No step moves features beyond reason: not beyond what least squares in float64 does with the same prior.

The reference sees all samples so far with their weights and solves by an SVD of their rows. Whatever the
columns are, nothing may move by more than 10 standard deviations of the features beyond what the reference
does, of which a tenth is granted to rounding where the reference itself moves hundreds.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnorm import MetadataNorm, fit_gram, metadata_norm
from reference import Replay, SpreadReplay, design_matrix, weighted_least_squares

PRESETS = ["batch", "dataset", "running", "recursive"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUM_FEATURES = 4
NUM_FRESH = 8


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    """A hundred thousand steps of which no gradient is asked: a fifth of their time."""
    with torch.inference_mode():
        yield


# -- streams of samples --------------------------------------------------------------------------------------


def continuous(rng, n):
    metadata = rng.normal(size=(n, rng.integers(1, 5)))
    return metadata, rng.normal(size=(n, rng.integers(0, 4))) + 0.5 * metadata[:, :1]


def all_levels(rng, n):
    """Site and sex with one column for every level, and age; the label with one or both."""
    site, sex = rng.integers(0, rng.integers(2, 5), n), rng.integers(0, 2, n)
    label = (rng.random(n) < 0.2 + 0.15 * site).astype(int)
    metadata = np.column_stack([np.eye(4)[site], np.eye(2)[sex], rng.normal(size=n) + site])
    return metadata, np.eye(2)[label] if rng.random() < 0.5 else label[:, None].astype(float)


def determined(rng, n):
    """Labels that determine the metadata, or all but one of them."""
    labels = np.eye(3)[rng.integers(0, 3, n)]
    metadata = labels @ rng.normal(size=(3, rng.integers(1, 4)))
    return np.column_stack([metadata, rng.normal(size=(n, rng.integers(0, 2)))]), labels


def nearly_determined(rng, n):
    k = rng.integers(1, 4)
    labels = rng.normal(size=(n, k)) if rng.random() < 0.5 else np.eye(k + 1)[rng.integers(0, k + 1, n)]
    metadata = labels @ rng.normal(size=(labels.shape[1], rng.integers(1, 4)))
    return metadata + 10 ** rng.uniform(-9, 0) * rng.normal(size=metadata.shape), labels


def nearly_collinear_labels(rng, n):
    """Two labels whose small difference is a metadata column."""
    metadata, label = rng.normal(size=(n, 2)), rng.normal(size=n)
    other = label + 10 ** rng.uniform(-9, 0) * metadata[:, 0]
    return metadata, np.column_stack([label, other + rng.integers(0, 2) * 1e-6 * rng.normal(size=n)])


def polynomial(rng, n):
    age = rng.uniform(2, 9, n)
    label = (rng.normal(size=n) + (age - 5) / 2 > 0).astype(float)
    return np.column_stack([age, age**2, age**3]), label[:, None]


def rare(rng, n):
    columns = np.column_stack([rng.random(n) < 0.02, rng.random(n) < 0.1, rng.normal(size=n)])
    return columns.astype(float), (rng.random((n, 2)) < 0.1).astype(float)


def every_rank(rng, n):
    """Columns of any rank, exactly or nearly."""
    k = rng.integers(2, 7)
    rank, k_m = rng.integers(1, k + 1), rng.integers(1, k + 1)
    columns = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, k))
    columns += rng.integers(0, 2) * 10 ** rng.uniform(-9, 0) * rng.normal(size=(n, k))
    return columns[:, :k_m], columns[:, k_m:]


def drifting(rng, n):
    """A time stamp that grows by up to thousands of its deviations."""
    time = np.arange(n) * rng.choice([1e-3, 0.1, 1, 10, 1000])
    metadata = np.column_stack([time + rng.integers(0, 2) * rng.normal(size=n), rng.normal(size=n)])
    return metadata, rng.normal(size=(n, 1)) + metadata[:, 1:] / 2


def stopping(rng, n):
    """A column, or a label, that no longer varies after the first samples."""
    columns = rng.normal(size=(n, 4)).round(rng.integers(0, 3))
    columns[n // 5 :, [0, 2]] = columns[0, [0, 2]]
    return columns[:, :2], columns[:, 2:]


LAYOUTS = [
    continuous,
    all_levels,
    determined,
    nearly_determined,
    nearly_collinear_labels,
    polynomial,
    rare,
    every_rank,
    drifting,
    stopping,
]


def standardised(columns):
    deviation = columns.std(0)
    return (columns - columns.mean(0)) / np.where(deviation > 0, deviation, 1)


def placed(rng, columns):
    """Columns in units of 1e-8 to 1e8, half of them up to a million deviations from zero."""
    deviation = np.where(columns.std(0) > 0, columns.std(0), 1)
    offset = rng.choice([-1, 0, 0, 1], len(deviation)) * 10 ** rng.uniform(0, 6, len(deviation))
    return (columns + offset * deviation) * 10 ** rng.uniform(-8, 8, len(deviation))


def stream(rng, layout, n):
    """Metadata, labels and features of deviation 1, which follow them, one of them the label alone."""
    metadata, labels = layout(rng, n)
    columns = standardised(np.column_stack([metadata, labels]))
    effect = columns @ rng.normal(size=(columns.shape[1], NUM_FEATURES)) * rng.integers(0, 2, NUM_FEATURES)
    features = effect + rng.choice([0.01, 1, 3], NUM_FEATURES) * rng.normal(size=(n, NUM_FEATURES))
    if labels.shape[1]:
        features[:, 0] = standardised(labels)[:, 0]
    if rng.random() < 0.7:
        metadata, labels = placed(rng, metadata), placed(rng, labels)
    return metadata, labels, standardised(features)


def feature_range(rng, dtype, exact, preset, prior):
    """Scale and offset of the features, as far as their dtype shows them and the prior holds rounding."""
    is_held = prior == 1 and preset != "recursive"
    largest = (6 if exact else 1.5) if is_held else (3 if exact else 1)
    offset = rng.choice([0, 1, 10 ** rng.uniform(0, largest)])
    if dtype == torch.float16:
        return 10 ** rng.uniform(-2, 2), offset
    return 10 ** rng.uniform(-8, 8), offset


# -- one stream through a layer ------------------------------------------------------------------------------


def excess(layer, features, metadata, labels, sizes, fresh, training=None, weights=None):
    """Return by how many deviations of the features each step and evaluation moves too far, and all moves.

    Samples come in batches of these sizes; after each, the rows of `fresh` are evaluated.
    """
    m, y, w = (None if part is None else torch.from_numpy(part) for part in (metadata, labels, weights))
    y = y if labels.shape[1] else None
    if training is not None:
        fit_gram(layer, m[:training], None if y is None else y[:training])
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    given = [None if part is None else part[: sum(sizes)].split(list(sizes)) for part in (features, m, y, w)]
    trained, evaluated = [], []
    for step, others in enumerate(zip(features[fresh], m[fresh], strict=True)):
        layer.training = True
        trained.append(layer(*(part and part[step] for part in given)))
        layer.training = False
        evaluated.append(layer(*others))
    exact = features.double().numpy()
    deviation = exact.std(0)
    order = [np.concatenate(parts), fresh.ravel()]
    moved = [
        np.abs(exact[rows] - torch.cat(outs).double().numpy()) / deviation
        for rows, outs in zip(order, (trained, evaluated), strict=True)
    ]
    starts = np.cumsum(sizes) - sizes, np.arange(len(sizes)) * fresh.shape[1]
    largest = np.stack(
        [np.maximum.reduceat(part.max(1), start) for part, start in zip(moved, starts, strict=True)], 1
    )
    if largest.max() <= 10:
        return largest - 10, largest
    # The reference is needed only where a step moves far.
    estimator = layer.estimator
    rows = np.column_stack([labels, np.ones(len(labels)), metadata])
    rows = (rows - estimator.origin.numpy()) * estimator.scale.numpy()
    tolerance = 1e-10 if estimator.coefficients.dtype == torch.float64 else 1e-6
    replay = Replay(estimator, tolerance, None if training is None else rows[:training])
    spread = None if layer.spread is None else SpreadReplay(layer.spread)
    beyond = np.full_like(largest, -math.inf)
    for step, (now, others) in enumerate(zip(parts, fresh, strict=True)):
        before = scaled = exact[now], exact[others]
        if spread is not None:
            spread.step(rows[now], before[0])
            scaled = spread.evaluate(rows[now], before[0]), spread.evaluate(rows[others], before[1])
        removed = (
            replay.step(rows[now], scaled[0], None if weights is None else weights[now]),
            replay.evaluate(rows[others]),
        )
        for i in range(2):
            reference = np.abs(before[i] - scaled[i] + removed[i])
            # What the reference itself moves to values that the dtype does not have may be infinite.
            if reference.max() < 0.5 * torch.finfo(features.dtype).max:
                beyond[step, i] = largest[step, i] - 10 - 1.1 * (reference / deviation).max()
    return beyond, largest


def run(
    seed,
    preset,
    dtype,
    num_steps,
    layout=None,
    sizes=None,
    window=None,
    prior=None,
    weighted=False,
    **options,
):
    """A random stream, with random settings where none are given: excess, moves, and what repeats it."""
    rng = np.random.default_rng(seed)
    layout = layout or LAYOUTS[rng.integers(len(LAYOUTS))]
    if window is None:
        window = float(rng.choice([1, 500, 1e6, math.inf])) if rng.random() < 0.2 else 10 ** rng.uniform(0, 6)
    if prior is None:
        prior = float(rng.choice([1, 1, 0, 10 ** rng.uniform(-4, 0)]))
    metadata, labels, features = stream(rng, layout, num_steps * 20)
    if sizes is None:
        largest = metadata.shape[1] + labels.shape[1] + 6
        sizes = rng.integers(1, largest + 1, num_steps if rng.random() < 0.5 else 1)
        sizes = np.broadcast_to(sizes, num_steps)
    # In evaluation as well the samples of a drifting stream are those of the time.
    fresh = rng.integers(0, sum(sizes), (num_steps, NUM_FRESH))
    if layout is drifting:
        fresh = np.cumsum(sizes)[:, None] + np.arange(NUM_FRESH)
    # The state is in float32 unless told otherwise, whatever the features are.
    exact = dtype == torch.float64 and rng.random() < 0.7
    scale, offset = feature_range(rng, dtype, exact, preset, prior)
    values = torch.from_numpy((features + offset) * scale).to(dtype)
    weights = None
    if weighted:
        weights = rng.choice([0, 0.3, 1, 5], len(features))
        weights[np.cumsum(sizes) - sizes] = 1
    shape = NUM_FEATURES, metadata.shape[1], labels.shape[1]
    options = options | {"estimator": preset, "window": window, "prior": prior}
    layer = MetadataNorm(*shape, dtype=torch.float64 if exact else None, **options)
    training = int(rng.integers(1, 200)) if preset == "dataset" else None
    beyond, moved = excess(layer, values, metadata, labels, sizes, fresh, training, weights)
    return beyond, moved, f"{seed=} {layout.__name__} {window=:.3g} {prior=:.3g} {offset=:.3g} {sizes[:3]=}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_hundred_thousand_steps_and_their_evaluations(preset, dtype):
    """Batches of 1 to K + 5, every rank, unit and offset, windows of 1 to 10⁶, with and without a prior."""
    num_far = 0
    for seed in range(125):
        seed = 16 * seed + 4 * DTYPES.index(dtype) + PRESETS.index(preset)
        beyond, moved, setting = run(seed, preset, dtype, 50)
        assert beyond.max() <= 0, setting
        num_far += (moved > 10).sum()
    # Least squares itself moves some of them far: the streams are what they should be.
    assert num_far > 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["batch", "dataset", "running"])
def test_scaled_features(preset, dtype):
    """Behind a fit without a prior, small differences of the scaled features would be large ones."""
    for seed in range(12):
        beyond, _, setting = run(seed, preset, dtype, 50, prior=1.0, scale=True)
        assert beyond.max() <= 0, setting


@given(
    preset=st.sampled_from(PRESETS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    window=st.sampled_from([1.0, 3.0, 20.0, 500.0, 1e6, math.inf]),
    prior=st.sampled_from([1.0, 0.0, 1e-3]),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=200)
def test_over_settings(preset, dtype, layout, sizes, window, prior, weighted, seed):
    sizes = np.array(sizes)
    options = {"layout": layout, "sizes": sizes, "window": window, "prior": prior, "weighted": weighted}
    beyond, _, _ = run(seed, preset, dtype, len(sizes), **options)
    assert beyond.max() <= 0


# -- exactness -----------------------------------------------------------------------------------------------


@given(
    k_m=st.integers(1, 5),
    k_y=st.integers(0, 3),
    scale=st.integers(-8, 8),
    offset=st.sampled_from([0.0, 10.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_without_a_prior_a_well_posed_batch_is_least_squares(k_m, k_y, scale, offset, seed):
    rng = np.random.default_rng(seed)
    metadata, labels = rng.normal(size=(60, k_m)), rng.normal(size=(60, k_y))
    features = rng.normal(size=(60, 5)) + metadata @ rng.normal(size=(k_m, 5))
    centred = metadata - metadata.mean(0)
    coefficients, *_ = scipy.linalg.lstsq(design_matrix(centred, labels), features)
    expected = features - centred @ coefficients[:k_m]
    m, y = torch.from_numpy((metadata + offset) * 10.0**scale), torch.from_numpy(labels) if k_y else None
    f = torch.from_numpy(features)
    for preset in PRESETS:
        layer = MetadataNorm(5, k_m, k_y, estimator=preset, prior=0, dtype=torch.float64)
        if preset == "dataset":
            fit_gram(layer, m, y)
        np.testing.assert_allclose(layer(f, m, y), expected, atol=1e-10)
    np.testing.assert_allclose(metadata_norm(f, m, y), expected, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("preset", ["batch", "running", "recursive"])
def test_an_endless_window_stays_exact_over_three_thousand_steps(preset, dtype, tolerance):
    """A running mean is rounded 3 000 times, to 6 · 10⁻⁸ in float32."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 3000)
    n = sizes.sum()
    metadata, labels = rng.normal(size=(n, 3)) + 5, rng.integers(0, 2, (n, 1)).astype(float)
    metadata += 0.5 * labels
    features = rng.normal(size=(n, 4)) + metadata @ rng.normal(size=(3, 4)) + labels
    options = {"estimator": preset, "window": math.inf, "prior": 0, "dtype": dtype}
    layer = MetadataNorm(4, 3, 1, **options)
    f, m, y = torch.from_numpy(features).to(dtype), torch.from_numpy(metadata), torch.from_numpy(labels)
    for rows in np.split(np.arange(n), np.cumsum(sizes))[:-1]:
        layer(f[rows], m[rows], y[rows])
    expected = weighted_least_squares(f.numpy(), metadata, labels, np.ones(n))[:3]
    np.testing.assert_allclose(layer.coefficients, expected, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 0.15)])
@pytest.mark.parametrize(("preset", "size"), [("running", 250), ("recursive", 250), ("batch", 1000)])
def test_a_time_stamp_over_a_million_samples(preset, size, dtype, tolerance):
    """It ends thousands of deviations of the window away from where it began, and is still removed.

    In float32, whose rounding grows with the distance, the prior grows as well.
    """
    rng = np.random.default_rng(0)
    n, window, prior = 1_000_000, 500.0, 1.0
    time = np.arange(n) + rng.normal(size=n)
    other, labels = rng.normal(size=n), rng.integers(0, 2, (n, 1)).astype(float)
    metadata = np.column_stack([1.6e9 + time, other])
    features = rng.normal(size=(n, 3)) + other[:, None] + labels + np.sin(time / 300)[:, None]
    layer = MetadataNorm(3, 2, 1, estimator=preset, window=window, prior=prior, dtype=dtype)
    f, m, y = torch.from_numpy(features).to(dtype), torch.from_numpy(metadata), torch.from_numpy(labels)
    largest = 0.0
    for start in range(0, n, size):
        part = slice(start, start + size)
        layer.training = True
        out = layer(f[part], m[part], y[part])
        layer.training = False
        largest = max(
            largest,
            float((f[part] - out).abs().max()),
            float((f[part] - layer(f[part], m[part])).abs().max()),
        )
    assert largest < 10 * features.std()
    # What is older than 60 batches weighs 2⁻⁶⁰. The prior of the recursion has faded as well.
    past = size if preset == "batch" else 60 * size
    weights = np.repeat((1 - min(size / window, 1)) ** np.arange(past // size)[::-1], size)
    share = 0.0 if preset == "recursive" else prior / (prior + weights.sum())
    centre = np.average(metadata[-past:], 0, weights)
    columns = metadata[-past:] - centre
    slopes = weighted_least_squares(features[-past:], columns, labels[-past:], weights, share)[:2]
    removed = columns[-size:] @ slopes
    error = np.abs(features[-size:] - out.double().numpy() - removed).max()
    assert np.abs(removed).max() > 1
    assert error < tolerance * np.abs(removed).max()


@pytest.mark.parametrize("preset", PRESETS)
def test_metadata_whose_squares_overflow_are_an_error(preset):
    layer = MetadataNorm(3, 1, estimator=preset)
    metadata = torch.tensor([1.0, 2.0, 1e160, 3.0], dtype=torch.float64)
    if preset == "dataset":
        fit_gram(layer, torch.arange(4.0))
    with pytest.raises(ValueError, match="metadata has values up to 1e\\+160 in column 0"):
        layer(torch.randn(4, 3), metadata)
