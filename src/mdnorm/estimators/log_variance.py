"""The metadata's effect on the scale of the features: ``MetadataNorm(scale=True)``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.centred_design import centred_design, silent_as_torch
from mdnorm.distributed import all_reduce_sum, eager
from mdnorm.estimators.base import refuse_compiled_checkpoint
from mdnorm.estimators.batch import BatchEstimator
from mdnorm.functional import Gram

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A residual with a smaller share of the noise's variance is rounding.
_LEAST_WEIGHT = 1e-3


class LogVarianceEstimator(BatchEstimator):
    """Removes what the metadata explain of the log-variance of the features' residuals.

    With the residual `r` of the regression on metadata, labels and intercept, fits
    ``log r² = m·γ_m + y·γ_y + γ_0 + noise`` by least squares (Harvey 1976) over running moments, and returns
    ``f̄ + (f − f̄) · exp(−½ (m − m̄)·γ_m)``. For metadata that are sites this is ComBat's division by the
    site's scale (Johnson et al. 2007), for continuous metadata its smooth form. The metadata's effect on the
    mean is removed behind it, by the estimator of the layer.

    A sample that pulls the fit to itself (the first ones, the first of a site) has a residual near zero
    whatever the variance: with its leverage `h`, the residual's variance is 1 − h times that of the noise. So
    ``log r² / (1 − h)`` is what is fitted, with the weight 1 − h. Of one sample it is a noisy measure (its
    variance is π²/2): a prior on γ_m, one unit wide a standard deviation of metadata, holds the fit until
    there are clearly more than five.

    The features are scaled about their overall mean, since the label, which would give each class a mean of
    its own, is not there in evaluation. The factors are constants for the gradient.

    Attributes
    ----------
    log_mean : (*feature_shape) buffer
        Running mean of ``log r²``.
    log_cross_covariance : (K, *feature_shape) buffer
        Running covariance of design columns and ``log r²``.
    log_gram_mean, log_gram_covariance, log_gram_count : (K,), (K, K), (1,) buffers, float64
        Running Gram matrix of the design over the samples that have a residual.
    coefficients : (K_m, *feature_shape) buffer
        γ_m.
    """

    name: ClassVar[str] = "log_variance"
    default_momentum: ClassVar[float | None] = None
    default_window: ClassVar[float | None] = 2000
    precise: ClassVar[frozenset[str]] = BatchEstimator.precise | {
        "log_gram_mean",
        "log_gram_covariance",
        "log_gram_count",
    }
    noise: ClassVar[float] = math.pi**2 / 2
    """Variance of the logarithm of a squared normal residual."""

    log_mean: Tensor
    log_cross_covariance: Tensor
    log_gram_mean: Tensor
    log_gram_covariance: Tensor
    log_gram_count: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.center:
            raise ValueError(
                "LogVarianceEstimator has no intercept to remove: give center to the layer's estimator."
            )

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Add the running moments of the log-variance to the state."""
        return super().state_shapes(num_metadata, num_labels, feature_shape) | {
            "log_mean": feature_shape,
            "log_cross_covariance": (num_metadata + num_labels, *feature_shape),
            "log_gram_mean": (num_metadata + num_labels,),
            "log_gram_covariance": (num_metadata + num_labels, num_metadata + num_labels),
            "log_gram_count": (1,),
        }

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Update the running moments and remove the effect on the scale that they show.

        Raises
        ------
        RuntimeError
            Inside of an activation-checkpointed part of a compiled model.
        """
        refuse_compiled_checkpoint("scale=True")
        group = self.active_group()
        if group is not None:
            eager(self._update_scale)(features.detach(), columns, positions, group)
        else:
            self._update_scale(features.detach(), columns, positions, None)
        return self.evaluate(features, columns[:, : self.gram.num_metadata], positions)

    @torch.no_grad()
    def _update_scale(
        self, features: Tensor, columns: Tensor, positions: tuple[int, ...], group: ProcessGroup | None
    ) -> None:
        num_metadata = self.gram.num_metadata
        with silent_as_torch():
            design = centred_design(columns, num_metadata)
            batch, moments, num_samples = self._batch_moments(features, design, positions, group)
            weight_of_batch = self._update(batch, moments, num_samples)
        count = torch.as_tensor(
            weight_of_batch, dtype=self.gram_count.dtype, device=self.gram_count.device
        ).reshape(1)
        operator = functional.coefficient_operator(self.gram, self.ridge)
        slopes = operator.to(self.cross_covariance.dtype) @ self.cross_covariance.flatten(1)
        basis = functional.effect_basis(columns, self.gram_mean, True)
        fitted = torch.cat([slopes, self.feature_mean.view(1, -1)])
        residual = functional.remove_effect(features.to(fitted.dtype), basis, fitted, positions)
        squared = residual.square()
        # A residual of zero (a dead unit) has no logarithm.
        floor = 1e-6 * self._mean_square(squared, positions, num_samples, group)
        floor = floor + torch.finfo(squared.dtype).tiny
        weights = self._residual_weights(columns, operator)
        safe = weights.clamp_min(_LEAST_WEIGHT).to(squared.dtype).reshape(-1, *[1] * (squared.ndim - 1))
        log = (squared + floor).log() - safe.log()
        weight = weights.sum()
        shares = (weights / weight.clamp_min(1e-30)).unsqueeze(1)
        centre = (shares * columns).sum(0)
        centred = columns - centre
        log_rows = torch.cat([(shares * centred).mT, shares.mT])
        log_moments = functional.feature_moments(log, log_rows, positions)
        batch = Gram(centre, (shares * centred).mT @ centred, weight.reshape(1), num_metadata)
        if group is not None:
            batch, log_moments = functional.share_moments(batch, log_moments, group, self.log_gram_mean)
        usable = (count > 0) & torch.isfinite(log_moments.sum())
        log_moments = torch.where(usable, log_moments, 0.0).to(self.log_mean.dtype)
        batch = Gram(batch.mean, batch.covariance, torch.where(usable, batch.count, 0.0), num_metadata)
        past = Gram(self.log_gram_mean, self.log_gram_covariance, self.log_gram_count, num_metadata)
        merged = past.merge(batch, self.decay(torch.where(usable, count, 0.0)))
        cross, _ = functional.merge_cross_moments_(
            self.log_cross_covariance.flatten(1),
            self.log_mean.view(-1),
            log_moments,
            torch.where(usable, batch.mean - past.mean, 0.0).to(log_moments.dtype),
            (batch.count / merged.count.clamp_min(1e-30)).to(log_moments.dtype),
        )
        self.log_gram_mean.copy_(merged.mean)
        self.log_gram_covariance.copy_(merged.covariance)
        self.log_gram_count.copy_(merged.count)
        prior = self.noise / merged.count.clamp_min(_LEAST_WEIGHT)
        log_operator = functional.coefficient_operator(merged, prior)[:num_metadata]
        effect = log_operator.to(cross.dtype) @ cross
        self.coefficients[:num_metadata].flatten(1).copy_(effect)

    def _mean_square(
        self,
        squared: Tensor,
        positions: tuple[int, ...],
        num_samples: int | Tensor,
        group: ProcessGroup | None,
    ) -> Tensor:
        """Return the mean over samples and positions, (1, ...) to be spread over them."""
        # One value a channel, since the positions of another batch or process may be others.
        total = squared.mean(positions, keepdim=True) if positions else squared
        total = total.sum(0, keepdim=True)
        if group is not None:
            total = all_reduce_sum(total, group)
        if isinstance(num_samples, Tensor):
            return total / num_samples.clamp_min(1).to(total.dtype)
        return total / max(num_samples, 1)

    def _residual_weights(self, columns: Tensor, operator: Tensor) -> Tensor:
        """Return 1 − leverage in the running fit of the samples (N,), 0 where hardly anything is left."""
        centred = columns - self.gram_mean
        distance = (centred @ operator * centred).sum(1)
        weights = 1 - (1 + distance) / self.gram_count.clamp_min(1e-30)
        return torch.where(weights > _LEAST_WEIGHT, weights, 0.0)

    def evaluate(self, features: Tensor, metadata: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Remove the remembered effect of the metadata columns (N, K_m) on the scale of features (N, ...)."""
        basis = functional.effect_basis(metadata, self.gram_mean[: metadata.shape[1]], False)
        return functional.rescale(
            features, basis, self.coefficients.flatten(1), self.feature_mean.view(-1), positions
        )
