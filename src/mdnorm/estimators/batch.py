"""Ordinary least squares within the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.distributed import eager
from mdnorm.estimators.base import Estimator
from mdnorm.functional import Gram

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.weights import Weight


class BatchEstimator(Estimator):
    """Gram matrix and cross moment of the batch; evaluation by least squares on running moments.

    In training the residuals are orthogonal to the metadata within every batch. That needs batches clearly
    larger than the number of design columns: with fewer samples than columns the fit takes the features'
    own variation away.

    For evaluation, means and (co)variances of design and features are kept as running averages, weighted by
    samples, and solved together: the least-squares fit over the last ``1 / momentum`` batches or so.

    Attributes
    ----------
    feature_mean : (*feature_shape) buffer
        Running mean of the features.
    cross_covariance : (K, *feature_shape) buffer
        Running covariance of design columns and features.
    """

    name: ClassVar[str] = "batch"

    feature_mean: Tensor
    cross_covariance: Tensor

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Add the running feature moments to the base state."""
        return super().state_shapes(num_metadata, num_labels, feature_shape) | {
            "feature_mean": feature_shape,
            "cross_covariance": (num_metadata + num_labels, *feature_shape),
        }

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Remove the least-squares fit of this batch and update the running moments."""
        num_metadata = self.gram.num_metadata
        group = self.active_group()
        if group is not None:
            return eager(self._forward_shared)(features, columns, positions, group)
        batch = Gram.from_columns(columns, num_metadata)
        out, moments = functional.remove_regression(
            features,
            functional.effect_basis(columns[:, :num_metadata], batch.mean[:num_metadata], self.center),
            functional.removal_operator(batch, ridge=self.ridge, center=self.center),
            functional.moment_rows(columns, batch.mean),
            positions,
        )
        self._update(batch, moments, features.shape[0])
        return out

    def _forward_shared(
        self, features: Tensor, columns: Tensor, positions: tuple[int, ...], group: ProcessGroup
    ) -> Tensor:
        """Remove the fit of the batch that all processes have together."""
        num_metadata = self.gram.num_metadata
        batch, moments, num_samples = self._batch_moments(features, columns, positions, group)
        operator = functional.removal_operator(batch, ridge=self.ridge, center=self.center)
        out = functional.remove_shared_regression(
            features,
            functional.effect_basis(columns[:, :num_metadata], batch.mean[:num_metadata], self.center),
            operator.to(moments.dtype) @ moments,
            functional.projected_rows(operator, columns, batch.mean, batch.count),
            positions,
            group,
        )
        self._update(batch, moments, num_samples)
        return out

    def _batch_moments(
        self, features: Tensor, columns: Tensor, positions: tuple[int, ...], group: ProcessGroup | None
    ) -> tuple[Gram, Tensor, int | Tensor]:
        """Return Gram matrix, feature moments and number of samples of the batch of all processes."""
        batch = Gram.from_columns(columns, self.gram.num_metadata)
        rows = functional.moment_rows(columns, batch.mean)
        moments = functional.feature_moments(features.detach(), rows, positions)
        if group is None:
            return batch, moments, columns.shape[0]
        batch, moments = functional.share_moments(batch, moments, group, self.gram_mean)
        return batch, moments, batch.count

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the running moments, too."""
        super().set_moments(gram, moments)
        self.gram_count.copy_(self.lasting(gram.count))
        _rows(self.cross_covariance).copy_(moments[:-1])
        self.feature_mean.view(-1).copy_(moments[-1])

    @torch.no_grad()
    def _update(self, batch: Gram, moments: Tensor, num_samples: int | Tensor) -> Weight:
        """Merge a batch into the running state; return its weight."""
        count, _, coefficients = self._merge(batch, moments, num_samples)
        _rows(self.coefficients).copy_(coefficients)
        return count

    @torch.no_grad()
    def _merge(
        self, batch: Gram, moments: Tensor, num_samples: int | Tensor
    ) -> tuple[Weight, Tensor, Tensor]:
        """Merge a batch into the running moments and solve for the coefficients.

        Returns the weight of the batch, the operator (R, K + 1) of the merged Gram matrix, and the
        coefficients (R, D).
        """
        moments, count = self.weigh(moments, num_samples)
        gram = self.gram
        step, share = gram.merge_(batch, count, self.decay(count))
        cross, mean = functional.merge_cross_moments_(
            _rows(self.cross_covariance),
            self.feature_mean.view(-1),
            moments,
            step.to(moments.dtype),
            share.to(moments.dtype) if isinstance(share, Tensor) else share,
        )
        operator = functional.removal_operator(gram, ridge=self.ridge, center=self.center)
        coefficients = operator[:, :-1].to(cross.dtype) @ cross
        if self.center:
            # The mean of the features is in the intercept alone; joining it to the rest would copy them all.
            coefficients[-1] += mean
        return count, operator, coefficients


def _rows(buffer: Tensor) -> Tensor:
    return buffer.view(buffer.shape[0], -1)
