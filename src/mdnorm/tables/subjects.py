"""Repeated measures: a random intercept for each subject, by restricted maximum likelihood (REML).

The model of each feature, with the design ``X`` (metadata, protected columns, sites) and a subject `k`,

    f = X·β + u_k + ε,    u_k ~ N(0, λσ²),  ε ~ N(0, σ²).

Given λ, all else follows from sums over the rows within subjects and from the means of subjects. λ is where
the derivative of the restricted likelihood is 0, found for all features together. Least squares on
``f − u_k``, with u_k at its best linear unbiased prediction, then give the coefficients of the mixed model:
its equations for β are those of least squares on just that. So nothing else changes where subjects come in
but σ.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.tables.combat import SiteCodes

FloatArray = NDArray[np.float64]

# Variance ratios among which the best one is looked for first. Below is none, above nothing but subjects.
_RATIOS = np.concatenate([[0.0], np.geomspace(1e-6, 1e8, 57)])
_HALVINGS = 55

# A direction of the design is collinear below this share of its column, a sum of squares is rounding below
# this share of all, or where deviations are this fraction of the mean: as in `mdnorm.tables.combat`.
_COLLINEAR = 1e-6
_FLAT_SHARE = 1e-13
_FLAT_DEVIATION = 1e-12

# Numbers in the matrices of the features that are fitted together: 32 MiB.
_STEP_VALUES = 2**22


@dataclass(frozen=True)
class RandomIntercepts:
    """What subjects have of their own in each feature."""

    subjects: tuple[Hashable, ...]
    effects: FloatArray  # (N, D), best linear unbiased predictions of the intercepts of the subjects
    variance: FloatArray  # (D,), of the intercepts between subjects
    residual_scale: FloatArray  # (D,), σ, the deviation within subjects; 0 for a feature without one

    def of(self, subjects: SiteCodes) -> FloatArray:
        """Return the (n, D) intercepts of rows: 0, the mean of all, for a subject that is not known."""
        padded = np.concatenate([self.effects, np.zeros((1, self.effects.shape[1]))])
        return np.asarray(padded[subjects.index_in(self.subjects)[0]])


def fit_random_intercepts(
    features: NDArray[Any], design: FloatArray, sites: SiteCodes | None, subjects: SiteCodes
) -> RandomIntercepts:
    """Fit the mixed model of each feature (n, D) on metadata and protected columns (n, K), and the sites.

    Too few rows, no subject with two, or a design that determines the subjects are ValueErrors.

    References
    ----------
    Patterson & Thompson, Recovery of inter-block information when block sizes are unequal, Biometrika 58
    (1971), 545–554. Beer et al., Longitudinal ComBat, NeuroImage 220 (2020), 117129.
    """
    levels, codes = np.unique(subjects.codes, return_inverse=True)
    problem = _Problem(features, _basis(design, sites), codes)
    number = features.shape[1]
    ratio, squares = np.zeros(number), np.zeros(number)
    means = np.zeros((len(levels), number))
    step = max(1, _STEP_VALUES // problem.num_columns**2)
    chosen = np.flatnonzero(problem.varies)
    for part in np.split(chosen, range(step, len(chosen), step)):
        ratio[part], squares[part], means[:, part] = problem.solve(part)
    variance = squares / (len(features) - problem.num_columns)
    size = ratio * np.bincount(codes)[:, None]
    return RandomIntercepts(
        subjects=tuple(subjects.levels[level] for level in levels),
        effects=size / (1 + size) * means,
        variance=ratio * variance,
        residual_scale=np.sqrt(np.where(problem.varies_within, variance, 0)),
    )


def _basis(design: FloatArray, sites: SiteCodes | None) -> FloatArray:
    """Return an orthonormal basis (n, P) of the columns of the design, the sites and an intercept."""
    rows = len(design)
    columns = [np.ones((rows, 1)), design - design.mean(0)]
    if sites is not None:
        columns.append(sites.codes[:, None] == np.unique(sites.codes))
    together = np.concatenate(columns, axis=1)
    size = np.linalg.norm(together, axis=0)
    basis, values, _ = np.linalg.svd(together[:, size > 0] / size[size > 0], full_matrices=False)
    return np.asarray(basis[:, values > _COLLINEAR * values[0]])


class _Problem:
    """The sums from which the restricted likelihood of any variance ratio follows.

    Subjects with the same number of rows have the same weight, so that their sums are taken together: `sizes`
    (G,) are the numbers of rows that occur, `counts` (G,) the subjects that have so many.
    """

    def __init__(self, features: NDArray[Any], basis: FloatArray, codes: NDArray[np.intp]) -> None:
        # The likelihood does not see what the design explains: less of it, fewer digits are lost.
        center = features.mean(0, dtype=np.float64)
        deviations = features - center
        residual = deviations - basis @ (basis.T @ deviations)
        rows = np.bincount(codes)
        self.sizes, group, self.counts = np.unique(rows, return_inverse=True, return_counts=True)
        self.num_rows, self.num_columns = basis.shape
        self._columns, self._means = (
            np.stack([np.bincount(codes, column) for column in part.T], 1) / rows[:, None]
            for part in (basis, residual)
        )
        left, right = basis - self._columns[codes], residual - self._means[codes]
        self._gram, self._cross = left.T @ left, left.T @ right
        self._squares = np.square(right).sum(0)
        groups = [group == index for index in range(len(self.sizes))]
        self._grams = np.stack([self._columns[at].T @ self._columns[at] for at in groups])
        self._crosses = np.stack([self._columns[at].T @ self._means[at] for at in groups])
        self._between = np.stack([np.square(self._means[at]).sum(0) for at in groups])
        flat = len(codes) * (_FLAT_DEVIATION * center) ** 2 + _FLAT_SHARE * np.square(deviations).sum(0)
        beyond = right - left @ np.linalg.lstsq(left, right, rcond=_COLLINEAR)[0]
        self.varies_within = np.square(beyond).sum(0) > flat
        self.varies = np.square(residual).sum(0) > flat
        self._check(len(rows))

    def _check(self, num_subjects: int) -> None:
        """Raise where the two variances cannot be told apart."""
        within = np.linalg.matrix_rank(self._gram, tol=_COLLINEAR**2, hermitian=True)
        together = num_subjects + int(within)
        found = (
            f"{self.num_rows} rows of {num_subjects} subjects, {self.num_columns} independent columns, "
            "intercept and sites included"
        )
        if num_subjects == self.num_rows:
            raise ValueError(f"no subject has more than one row ({found}): leave subject= out.")
        if together >= self.num_rows:
            raise ValueError(
                f"too few rows for subject= ({found}): subjects and columns together explain every feature. "
                "Use more rows of the same subjects, or fewer columns."
            )
        if together <= self.num_columns:
            raise ValueError(
                f"metadata, labels and sites determine the subjects ({found}): leave subject= out, or use "
                "sites with several subjects."
            )

    def solve(self, part: NDArray[np.intp]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return variance ratios (d,), residual squares (d,) and mean residuals of subjects, of features."""
        objectives = [self._at(np.full(len(part), ratio), part)[0] for ratio in _RATIOS]
        best = np.argmin(objectives, axis=0)
        low, high = (_RATIOS[np.clip(best + step, 0, len(_RATIOS) - 1)] for step in (-1, 1))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            falls = self._at(middle, part)[1] < 0
            low, high = np.where(falls, middle, low), np.where(falls, high, middle)
        # At the boundary: no variance between the subjects beyond that within them.
        ratio = np.where((best == 0) & (self._at(np.zeros(len(part)), part)[1] >= 0), 0.0, (low + high) / 2)
        _, _, squares, coefficients = self._at(ratio, part)
        return ratio, squares, self._means[:, part] - self._columns @ coefficients.T

    def _at(
        self, ratio: FloatArray, part: NDArray[np.intp]
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Return −2 log restricted likelihood, its derivative, residual squares and coefficients (d, P)."""
        weight = self.sizes / (1 + ratio[:, None] * self.sizes)
        crosses, between = self._crosses[:, :, part], self._between[:, part].T
        gram = self._gram + np.einsum("dg,gij->dij", weight, self._grams)
        cross = self._cross[:, part].T + np.einsum("dg,gid->di", weight, crosses)
        inverse = np.linalg.inv(gram)
        coefficients = np.einsum("dij,dj->di", inverse, cross)
        squares = self._squares[part] + (weight * between).sum(1) - (coefficients * cross).sum(1)
        squares = np.maximum(squares, np.finfo(np.float64).tiny)
        left = (
            between
            - 2 * np.einsum("di,gid->dg", coefficients, crosses)
            + np.einsum("di,gij,dj->dg", coefficients, self._grams, coefficients, optimize=True)
        )
        freedom = self.num_rows - self.num_columns
        objective = (
            np.log1p(ratio[:, None] * self.sizes) @ self.counts
            + freedom * np.log(squares)
            + np.linalg.slogdet(gram)[1]
        )
        derivative = (
            weight @ self.counts
            - freedom * (weight**2 * left).sum(1) / squares
            - np.einsum("dij,gji,dg->d", inverse, self._grams, weight**2, optimize=True)
        )
        return objective, derivative, squares, coefficients
