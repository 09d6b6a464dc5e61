"""Ordinary least squares within the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.centred_design import CentredDesign, centred_design, silent_as_torch
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
        group = self.active_group()
        if group is not None:
            return eager(self._forward_shared)(features, columns, positions, group)
        dtype = functional.compute_dtype(features)
        with silent_as_torch():
            design = centred_design(columns, self.num_metadata or 0)
            out, moments = functional.remove_regression(
                features,
                design.basis(self.center, dtype),
                functional.removal_operator(design.gram, ridge=self.ridge, center=self.center),
                design.moment_rows(dtype),
                positions,
            )
            self._update(design.gram, moments, features.shape[0])
        return out

    def _forward_shared(
        self, features: Tensor, columns: Tensor, positions: tuple[int, ...], group: ProcessGroup
    ) -> Tensor:
        """Remove the fit of the batch that all processes have together."""
        with silent_as_torch():
            design = centred_design(columns, self.num_metadata or 0)
            batch, moments, num_samples = self._batch_moments(features, design, positions, group)
            operator = functional.removal_operator(batch, ridge=self.ridge, center=self.center)
            design = design.about(batch.mean)
            out = functional.remove_shared_regression(
                features,
                design.basis(self.center, moments.dtype),
                operator.to(moments.dtype) @ moments,
                design.projected_rows(operator, moments.dtype, batch.count),
                positions,
                group,
            )
            self._update(batch, moments, num_samples)
        return out

    def _batch_moments(
        self, features: Tensor, design: CentredDesign, positions: tuple[int, ...], group: ProcessGroup | None
    ) -> tuple[Gram, Tensor, int | Tensor]:
        """Return Gram matrix, feature moments and number of samples of the batch of all processes."""
        rows = design.moment_rows(functional.compute_dtype(features))
        moments = functional.feature_moments(features, rows, positions)
        if group is None:
            return design.gram, moments, features.shape[0]
        batch, moments = functional.share_moments(design.gram, moments, group, self.gram_mean)
        return batch, moments, batch.count

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the running moments, too."""
        super().set_moments(gram, moments)
        self.gram_count.copy_(self.lasting(gram.count))
        _rows(self.cross_covariance).copy_(moments[:-1])
        self.feature_mean.view(-1).copy_(moments[-1])

    def _update(self, batch: Gram, moments: Tensor, num_samples: int | Tensor) -> Weight:
        """Merge a batch into the running state; return its weight."""
        with torch.no_grad():
            count, _, coefficients = self._merge(batch, moments, num_samples)
            _rows(self.coefficients).copy_(coefficients)
        return count

    def _merge(
        self, batch: Gram, moments: Tensor, num_samples: int | Tensor
    ) -> tuple[Weight, Tensor, Tensor]:
        """Merge a batch into the running moments and solve for the coefficients, without gradient.

        Returns the weight of the batch, the operator (R, K + 1) of the merged Gram matrix, and the
        coefficients (R, D).
        """
        moments, count = self.weigh(moments, num_samples)
        gram = self.gram
        step, share = gram.merge_(batch, count, self.decay(count))
        cross, mean = functional.merge_cross_moments_(
            _rows(self.cross_covariance), _values(self.feature_mean), moments, step, share
        )
        operator = functional.removal_operator(gram, ridge=self.ridge, center=self.center)
        coefficients = functional.apply_operator(operator, cross)
        if self.center:
            # The mean of the features is in the intercept alone; joining it to the rest would copy them all.
            coefficients[-1] += mean
        return count, operator, coefficients


def _rows(buffer: Tensor) -> Tensor:
    return buffer if buffer.ndim == 2 else buffer.view(buffer.shape[0], -1)


def _values(buffer: Tensor) -> Tensor:
    return buffer if buffer.ndim == 1 else buffer.view(-1)
