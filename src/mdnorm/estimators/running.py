"""The two-sided running estimator: least squares over the last window, forward and backward."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mdnorm import functional
from mdnorm.estimators.batch import BatchEstimator
from mdnorm.functional import Gram


class RunningEstimator(BatchEstimator):
    """Least squares over the last `window` samples, in the forward and in the backward pass; any batch size.

    Forward: running means and covariances of design and features, this batch included, give β. Backward: the
    gradient through β needs the sum of ``(m − m̄)ᵀ g`` over all samples, as β needs the sum of ``xᵀ f``; it is
    kept as a running mean in the same way (see `mdnorm.functional.remove_running_regression`). A remembered β
    without this second half removes the effect of the past and leaves the incentive to drift along the
    metadata; the gradient of the current batch alone has the noise of the batch.

    A batch as large as the window forgets the past, and the estimator is `BatchEstimator`.

    The state is updated in the backward pass too: one backward pass for each training forward, with a loss
    that is a mean over the batch.

    Attributes
    ----------
    adjoint : (R, *feature_shape) buffer
        Running mean of the gradient that reaches the coefficients.
    adjoint_weight : (1,) buffer, float64
        Decayed number of samples behind it.
    """

    name: ClassVar[str] = "running"
    default_momentum: ClassVar[float | None] = None
    default_window: ClassVar[float | None] = 1000
    precise: ClassVar[frozenset[str]] = BatchEstimator.precise | {"adjoint_weight"}

    adjoint: Tensor
    adjoint_weight: Tensor

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Add the running adjoint to the state."""
        return super().state_shapes(num_metadata, num_labels, feature_shape) | {
            "adjoint": (num_metadata + self.center, *feature_shape),
            "adjoint_weight": (1,),
        }

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Update the running moments and remove the effect that they show."""
        num_metadata = self.gram.num_metadata
        batch = Gram.from_columns(columns, num_metadata)
        rows = functional.moment_rows(columns, batch.mean)
        moments = functional.feature_moments(features.detach(), rows, positions)
        count, operator = self._update(batch, moments, features.shape[0])
        return functional.remove_running_regression(
            features,
            functional.effect_basis(columns[:, :num_metadata], self.gram_mean[:num_metadata], self.center),
            # A copy: the buffer may change again before the backward pass.
            self.coefficients.flatten(1).clone(),
            operator @ functional.moment_rows(columns, self.gram_mean),
            self.adjoint.flatten(1),
            self.adjoint_weight,
            count=count,
            decay=self.decay(count),
            positions=positions,
        )
