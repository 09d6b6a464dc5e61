"""Covariances of features that differ between sites: CovBat, on top of ComBat.

What ComBat leaves of the features, without the effects of metadata and protected columns, is standardised and
turned into principal components. Each of the first K scores is brought to one mean and one variance over the
sites, as ComBat without empirical Bayes does to a feature, and the rows are put together again.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.tables.combat import LocationScale, SiteCodes, fit_location_scale, site_moments

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CovarianceModel(LocationScale):
    """ComBat, and what takes the sites out of the principal components of what it leaves."""

    center: FloatArray  # (D,), mean of the residuals
    unit: FloatArray  # (D,), their standard deviation; 0 for a feature without residual variance
    directions: FloatArray  # (K, D), components of the standardised residuals, the largest first, of length 1
    scores: LocationScale  # location and scale of the sites in the K scores

    def remove(self, features: NDArray[Any], design: FloatArray, site_index: NDArray[np.intp]) -> FloatArray:
        """Return features without metadata and site effects, covariances too: see `LocationScale.remove`."""
        corrected = super().remove(features, design, site_index)
        return self._changed(corrected, design, site_index, inverse=False)

    def restore(self, features: NDArray[Any], design: FloatArray, site_index: NDArray[np.intp]) -> FloatArray:
        """Return features with the effects put back: the inverse of `remove`, same arguments."""
        return super().restore(self._changed(features, design, site_index, inverse=True), design, site_index)

    def with_rows(self, features: NDArray[Any], design: FloatArray, sites: SiteCodes) -> CovarianceModel:
        """Return a model that knows the scores of the sites that `with_sites` added last, from their rows."""
        corrected = super().remove(features, design, self.index_of(sites)[0])
        scores = self._scores(corrected, design)
        empty = np.empty((len(scores), 0))
        return replace(self, scores=self.scores.with_sites(site_moments(scores, empty, empty, sites)))

    def _scores(self, corrected: FloatArray, design: FloatArray) -> FloatArray:
        """Return the scores (n, K) of rows that ComBat has corrected."""
        inverse_unit = np.divide(1, self.unit, out=np.zeros_like(self.unit), where=self.unit > 0)
        residual = self.residual(corrected, self.without_metadata(design)) - self.center
        return np.asarray(residual @ (self.directions * inverse_unit).T)

    def _changed(
        self, corrected: FloatArray, design: FloatArray, site_index: NDArray[np.intp], inverse: bool
    ) -> FloatArray:
        scores = self._scores(corrected, design)
        change = self.scores.restore if inverse else self.scores.remove
        moved = change(scores, np.empty((len(scores), 0)), site_index) - scores
        return np.asarray(corrected + moved @ (self.directions * self.unit))


def fit_covariance(
    model: LocationScale,
    features: NDArray[Any],
    design: FloatArray,
    sites: SiteCodes,
    *,
    share: float,
    weights: FloatArray | None = None,
    reference_site: Hashable | None = None,
) -> CovarianceModel:
    """Estimate what the sites do to the covariances of the features, beyond a model of the same rows.

    As many components are harmonised as are needed for more than a `share` of the variance, in (0, 1].

    References
    ----------
    Chen et al., Mitigating site effects in covariance for machine learning in neuroimaging data, Human Brain
    Mapping 43 (2022), 1179–1195. As the authors' code in R (package CovBat) with its defaults: standardised
    residuals, scores without empirical Bayes.
    """
    weights = np.ones(len(features)) if weights is None else weights
    corrected = model.remove(features, design, model.index_of(sites)[0])
    residual = model.residual(corrected, model.without_metadata(design))
    center = weights @ residual / weights.sum()
    deviations = np.sqrt(weights)[:, None] * (residual - center)
    unit = np.sqrt(np.square(deviations).sum(0) / weights.sum()) * (model.pooled_scale > 0)
    deviations /= np.where(unit > 0, unit, np.inf)
    # The triangle of a QR decomposition has the same singular values in few rows.
    values, directions = np.linalg.svd(np.linalg.qr(deviations, mode="r"), full_matrices=False)[1:]
    variance = np.square(values)
    rank = np.count_nonzero(values > max(deviations.shape) * np.finfo(np.float64).eps * values[:1].sum())
    explained = np.cumsum(variance) / max(variance.sum(), np.finfo(np.float64).tiny)
    number = min(np.searchsorted(explained, share, side="right") + 1, rank)
    # Components of the rows of all sites together; then the sites in each of them.
    fitted = CovarianceModel(
        **vars(model), center=center, unit=unit, directions=directions[:number], scores=model
    )
    scores, empty = fitted._scores(corrected, design), np.empty((len(features), 0))
    return replace(
        fitted,
        scores=fit_location_scale(
            site_moments(scores, empty, empty, sites, weights), scale=True, reference_site=reference_site
        ),
    )
