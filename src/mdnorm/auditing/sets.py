"""Sets of features: every treatment, on fitted and on held-out rows, and its two principal components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.auditing.results import FeatureSet, Projection
from mdnorm.extras import requires
from mdnorm.metrics.probe_folds import LEAST_VARIATION

# Whitening needs this many rows for each feature.
_ROWS_PER_WHITENED = 5


def feature_sets(
    features: Mapping[str, NDArray[np.float64]],
    titles: Mapping[str, str],
    held_out: NDArray[np.bool_] | None,
    *,
    standardize: bool,
) -> dict[str, FeatureSet]:
    """Return sets of features by name: of each treatment, on fitted and on held-out rows if there are such.

    The first of `features`, (n, p) and finite, is what the others are compared with.
    """
    first = next(iter(features))
    parts = {"": np.ones(len(features[first]), dtype=bool)}
    if held_out is not None:
        parts = {"training rows": ~held_out, "held-out rows": held_out}
    sets = {}
    for name, given in features.items():
        values = given - given.mean(axis=0)
        if standardize:
            spread = values.std(axis=0)
            # What is left of a constant is rounding.
            constant = np.ptp(given, axis=0) <= LEAST_VARIATION * np.abs(given).max()
            values = values / np.where(constant, np.inf, spread)
        whitened = _whitened(values)
        for part, rows in parts.items():
            suffix = f", {part}" if part else ""
            sets[name + suffix] = FeatureSet(
                name,
                part,
                titles[name],
                values,
                whitened,
                rows,
                reference=None if name == first else first + suffix,
                is_decisive=(name != first or len(features) == 1) and part != "training rows",
            )
    return sets


def _whitened(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return uncorrelated components of equal variance; None where there are too few rows for them."""
    if len(values) < _ROWS_PER_WHITENED * values.shape[1]:
        return None
    left, singular, _ = np.linalg.svd(values, full_matrices=False)
    whitened: NDArray[np.float64] = left[:, singular > 1e-9 * singular[0]] * np.sqrt(len(values))
    return whitened


def projections_of(
    treatments: Mapping[str, NDArray[np.float64]], num_points: int, seed: int
) -> dict[str, Projection]:
    """Return two principal components of standardised features, for at most `num_points` rows.

    Treatments of as many features are drawn on the same axes: those of all of them together.
    """
    with requires("audit"):
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

    def fitted(rows: NDArray[np.float64]) -> tuple[Any, Any]:
        scaler = StandardScaler().fit(rows)
        scaled = scaler.transform(rows)
        solver = "full" if min(scaled.shape) <= 500 else "randomized"
        return scaler, PCA(min(2, *scaled.shape), svd_solver=solver, random_state=seed).fit(scaled)

    count = len(next(iter(treatments.values())))
    rows = np.arange(count)
    if count > num_points:
        rows = np.sort(np.random.default_rng(seed).choice(count, num_points, replace=False))
    shared = None
    if len({values.shape[1] for values in treatments.values()}) == 1:
        shared = fitted(np.concatenate(list(treatments.values())))
    projections = {}
    for key, values in treatments.items():
        scaler, pca = shared or fitted(values)
        scaled = scaler.transform(values)
        points = pca.transform(scaled)
        total = float(np.square(scaled - scaled.mean(axis=0)).sum()) or 1.0
        shares = [float(share) for share in np.square(points - points.mean(axis=0)).sum(axis=0) / total]
        if points.shape[1] < 2:
            points = np.column_stack([points, np.zeros(count)])
            shares.append(0.0)
        projections[key] = Projection(points[rows], shares, rows, shared is not None)
    return projections
