"""No step moves features beyond reason: what training and evaluation remove is what least squares in float64 does.

The reference sees all samples so far with their weights and solves by an SVD of their rows. Whatever the columns
are, nothing may move by more than 10 standard deviations of the features beyond what the reference does, with a
tenth of it as rounding where the reference itself moves hundreds.
"""

import math

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


def excess(layer, features, metadata, labels, sizes, fresh, training=None):
    """Return by how many deviations of the features each step and evaluation moves too much, and all moves.

    Samples come in batches of these sizes; after each, the rows of `fresh` are evaluated.
    """
    m, y = torch.from_numpy(metadata), torch.from_numpy(labels) if labels.shape[1] else None
    if training is not None:
        fit_gram(layer, m[:training], None if y is None else y[:training])
    parts = np.split(np.arange(len(features)), np.cumsum(sizes))[:-1]
    trained, evaluated = [], []
    for rows, others in zip(parts, fresh, strict=True):
        batch = slice(rows[0], rows[-1] + 1)
        layer.training = True
        trained.append(layer(features[batch], m[batch], None if y is None else y[batch]))
        layer.training = False
        evaluated.append(layer(features[others], m[others]))
    exact = features.double().numpy()
    deviation = exact[: parts[-1][-1] + 1].std(0)
    deviation = np.where(deviation > 0, deviation, 1)
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
    spread = SpreadReplay(layer.spread, tolerance) if layer.spread is not None else None
    allowed = np.empty_like(largest)
    for step, (now, others) in enumerate(zip(parts, fresh, strict=True)):
        before = scaled = exact[now], exact[others]
        if spread is not None:
            spread.step(rows[now], before[0])
            scaled = spread.evaluate(rows[now], before[0]), spread.evaluate(rows[others], before[1])
        removed = replay.step(rows[now], scaled[0]), replay.evaluate(rows[others])
        for i in range(2):
            reference = np.abs(before[i] - scaled[i] + removed[i])
            allowed[step, i] = 10 + 1.1 * (reference / deviation).max()
            if reference.max() > 0.5 * torch.finfo(features.dtype).max:
                allowed[step, i] = math.inf
    return np.where(allowed < math.inf, largest - allowed, -math.inf), largest


def run(seed, preset, dtype, num_steps, **options):
    """A random stream with random settings: the worst excess, and what says how to repeat it."""
    rng = np.random.default_rng(seed)
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    window = float(rng.choice([1, 500, 1e6, math.inf])) if rng.random() < 0.2 else 10 ** rng.uniform(0, 6)
    # A small difference between the scaled features may be large behind a fit without a prior.
    prior = 1.0 if options else float(rng.choice([1, 1, 0, 10 ** rng.uniform(-6, 0)]))
    metadata, labels, features = stream(rng, layout, num_steps * 20)
    k = metadata.shape[1] + labels.shape[1] + 1
    largest = k + 5
    sizes = (
        rng.integers(1, largest + 1, num_steps)
        if rng.random() < 0.5
        else np.full(num_steps, rng.integers(1, largest + 1))
    )
    # The state is in float32 unless told otherwise, whatever the features are.
    exact = dtype == torch.float64 and rng.random() < 0.7
    scale, offset = feature_range(rng, dtype, exact, preset, prior)
    values = torch.from_numpy((features + offset) * scale).to(dtype)
    # In evaluation as well the samples of a drifting stream are those of the time.
    fresh = rng.integers(0, sizes.sum(), (num_steps, NUM_FRESH))
    if layout is drifting:
        fresh = np.cumsum(sizes)[:, None] + np.arange(NUM_FRESH)
    layer = MetadataNorm(
        NUM_FEATURES,
        metadata.shape[1],
        labels.shape[1],
        estimator=preset,
        window=window,
        prior=prior,
        dtype=torch.float64 if exact else None,
        **options,
    )
    training = int(rng.integers(1, 200)) if preset == "dataset" else None
    worst, moved = excess(layer, values, metadata, labels, sizes, fresh, training)
    return worst, moved, f"{seed=} {layout.__name__} {window=:.3g} {prior=:.3g} {offset=:.3g} {sizes[:3]=}"
