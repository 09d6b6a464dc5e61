"""The metadata's effect on the spread of the features: ``MetadataNorm(scale=True)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mdnorm.estimators.base import Batch, batch_moments
from mdnorm.estimators.least_squares import LeastSquares
from mdnorm.regression import advance, coefficient_operator, compute_dtype, remove

# A residual with a smaller share of the noise's variance is rounding.
_LEAST_SHARE = 1e-3
# Variance of the logarithm of a squared normal residual.
_LOG_NOISE = math.pi**2 / 2
# Twice the logarithm of the largest factor, 10: what asks for more is an extrapolation.
_LARGEST_EFFECT = 2 * math.log(10)


class Spread(LeastSquares):
    """Removes what the metadata explain of the log-variance of the features' residuals.

    With the residual `r` of the regression on metadata, labels and intercept, fits
    ``log r² = m·γ_m + y·γ_y + γ_0 + noise`` (Harvey 1976) on running moments, and returns
    ``f̄ + (f − f̄) · exp(−½ (m − m̄)·γ_m)``, the factor kept within 1/10 and 10. For metadata that are sites
    this is ComBat's division by the site's scale (Johnson et al. 2007), for continuous metadata its smooth
    form.

    With the leverage `h` of a sample, its residual's variance is 1 − h times that of the noise: so
    ``log(r² / (1 − h))`` is fitted, with the weight 1 − h. One sample of it is noisy (variance π²/2), so
    a prior on γ_m, one unit wide per standard deviation of the metadata, dominates the fit until there are
    clearly more than five. The features are scaled about their overall mean, since there are no labels in
    evaluation. The factors are constants for the gradient.

    Attributes
    ----------
    log_gram, log_cross, log_weight : (K, K), (K, D), (1,) buffers
        Running moments of the design and ``log r²``.
    squares : (D,) buffer, float64
        Running mean of the squared features. `cross` is in float64, too.
    coefficients : (K_m, *num_features) buffer
        γ_m.
    """

    log_gram: Tensor
    log_cross: Tensor
    log_weight: Tensor
    squares: Tensor

    def __init__(
        self,
        num_metadata: int,
        num_labels: int,
        num_features: tuple[int, ...],
        *,
        window: float = 2000,
        **options: Any,
    ) -> None:
        fixed: dict[str, Any] = {"adjoint": "none", "prior": 0.0, "decay": 0.0}
        super().__init__(num_metadata, num_labels, num_features, window=window, **fixed, **options)
        sizes = {"cross": self.cross.shape, "squares": (self.num_values,), "log_gram": self.gram.shape}
        sizes |= {"log_cross": self.cross.shape, "log_weight": (1,)}
        for name, shape in sizes.items():
            self.add_state(name, *shape, precise=True)

    def _step(self, features: Tensor, batch: Batch) -> Tensor:
        p = self.num_protected
        with torch.no_grad():
            self.standardise(batch)
            rows = self.rows(batch.columns)
            if not batch.repeated:
                self._update(features.detach(), rows, batch)
        return self.evaluate(features, batch.columns[:, p:], batch.dims, batch.mask)

    def _update(self, features: Tensor, rows: Tensor, batch: Batch) -> None:
        p = self.num_protected
        # In float64, as logarithms magnify the rounding of small residuals.
        values = features.to(rows.dtype)
        count, _, gram, cross = batch_moments(values, rows, batch)
        squares = batch_moments(values.square(), rows, batch)[3][p - 1]
        kept = self.kept(count)
        pairs = (self.gram, gram), (self.squares, squares), (self.cross, cross)
        used = advance(self.weight, kept, count, *pairs, eager=batch.eager)
        inverse = coefficient_operator(self.gram, p, every=True)
        squared = remove(values, rows, inverse @ self.cross, batch.dims).square()
        # A residual of zero (a dead unit) has no logarithm, and the rounding of a feature that the labels
        # determine none that means anything: the floor is a share of the feature's variance, as far from
        # zero as it is.
        variance = self.squares - 0.99 * self.cross[p - 1].square()
        floor = 1e-8 * variance.clamp_min(0) + torch.finfo(squared.dtype).tiny
        shape = [1 if dim in batch.dims else size for dim, size in enumerate(squared.shape)]
        floor = floor.reshape(1, *shape[1:])
        left = 1 - (rows @ inverse * rows).sum(1) / self.weight.clamp_min(1e-30)
        left = torch.where(left > _LEAST_SHARE, left, 0.0)
        safe = left.clamp_min(_LEAST_SHARE).reshape(-1, *[1] * (squared.ndim - 1))
        log = (squared + floor).log() - safe.log()
        weighted = batch._replace(weights=left if batch.weights is None else left * batch.weights)
        total, _, gram, cross = batch_moments(log, rows, weighted)
        # A batch that the first moments left out is left out here as well.
        cross = torch.where(torch.as_tensor(used), cross, torch.nan)
        advance(
            self.log_weight, kept, total, (self.log_gram, gram), (self.log_cross, cross), eager=batch.eager
        )
        share = _LOG_NOISE / self.log_weight.clamp_min(_LEAST_SHARE)
        # What a column that hardly varies here would say about those that are far away is an extrapolation.
        least = _LEAST_SHARE * self.log_gram.diagonal().clamp_max(1)
        least[p - 1] = 0
        effect = coefficient_operator(self.log_gram + least.diag(), p, share)
        self.coefficients.flatten(1).copy_(effect @ self.log_cross)
        self.mean.copy_(self.gram[p - 1, p:])

    def evaluate(
        self, features: Tensor, metadata: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Tensor:
        """Remove the remembered effect of metadata columns (N, K_m) on the spread of features (N, ...)."""
        p, dtype = self.num_protected, compute_dtype(features)
        basis = (self._metadata_rows(metadata) - self.mean).to(dtype)
        effect = basis @ self.coefficients.flatten(1).to(dtype)
        change = torch.expm1(-0.5 * effect.clamp(-_LARGEST_EFFECT, _LARGEST_EFFECT))
        centre = self.cross[p - 1].to(dtype).unsqueeze(0)
        for dim in dims:
            change, centre = change.unsqueeze(dim), centre.unsqueeze(dim)
        if not dims:
            change, centre = change.reshape(features.shape), centre.reshape(1, *features.shape[1:])
        out = (features + (features.to(dtype) - centre) * change).to(features.dtype)
        return out if mask is None else torch.where(mask, out, features)
