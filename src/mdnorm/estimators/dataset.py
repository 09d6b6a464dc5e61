"""The paper's estimator: Gram matrix of the training set, cross moment of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.centred_design import centred_design, silent_as_torch
from mdnorm.distributed import eager
from mdnorm.estimators.base import Estimator
from mdnorm.functional import Gram
from mdnorm.weights import ratio, read, write_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NO_GRAM = (
    "estimator='dataset' needs the Gram matrix of the training set before training: call "
    "mdnorm.fit_gram(model, metadata, labels) once with all training metadata (and labels), or choose "
    "estimator='batch'."
)


class DatasetEstimator(Estimator):
    """``β = G⁻¹ · mean over the batch of x fᵀ`` with `G` from the training set (Lu et al., section 3).

    The Gram matrix must be known before training: ``mdnorm.fit_gram(model, metadata, labels)``. Evaluation
    uses a running average of β.

    Attributes
    ----------
    weight : (1,) buffer, float64
        Decayed number of samples behind the running β.
    """

    name: ClassVar[str] = "dataset"
    uses_training_gram: ClassVar[bool] = True
    precise: ClassVar[frozenset[str]] = Estimator.precise | {"weight", "operator"}

    operator: Tensor | None
    weight: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Follows from the Gram matrix, so it is not saved but made again where that changes.
        self.register_buffer("operator", None, persistent=False)

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Add the weight of the running average to the base state."""
        return super().state_shapes(num_metadata, num_labels, feature_shape) | {"weight": (1,)}

    def set_gram(self, gram: Gram) -> None:
        """Store the Gram matrix of the training set, replacing any before."""
        super().set_gram(gram)
        self._make_operator()

    def reset(self) -> None:
        """Forget the coefficients and the Gram matrix."""
        super().reset()
        self.operator = None

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the running coefficients."""
        super().set_moments(gram, moments)
        self.weight.copy_(self.lasting(gram.count))

    def check_ready(self) -> None:
        """Raise RuntimeError before the Gram matrix of the training set is known."""
        if self.operator is None:
            raise RuntimeError(_NO_GRAM)

    def _make_operator(self) -> None:
        self.operator = functional.removal_operator(self.gram, ridge=self.ridge, center=self.center)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.operator = None
        if self.knows_design and float(self.gram_count) > 0:
            self._make_operator()

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Remove the batch's estimate of the effect and update the running coefficients."""
        operator, dtype = self.operator, functional.compute_dtype(features)
        if operator is None:
            raise RuntimeError(_NO_GRAM)
        with silent_as_torch():
            design = centred_design(columns, operator.shape[0] - self.center, self.gram_mean)
            basis = design.basis(self.center, dtype)
            rows = design.projected_rows(operator, dtype)
        group = self.active_group()
        if group is not None:
            return eager(self._remove_shared)(features, basis, rows, positions, group)
        out, coefficients = functional.remove_regression(features, basis, None, rows, positions)
        self._update(coefficients, features.shape[0])
        return out

    def _remove_shared(
        self,
        features: Tensor,
        basis: Tensor,
        rows: Tensor,
        positions: tuple[int, ...],
        group: ProcessGroup,
    ) -> Tensor:
        """Remove the estimate of the batch that all processes have together."""
        num_samples = features.shape[0]
        local = num_samples * functional.feature_moments(features, rows, positions)
        # Only the coefficients, in the dtype of the features: the Gram matrix is the same everywhere.
        buffer = torch.cat([local.reshape(-1), local.new_full((1,), num_samples)])
        torch.distributed.all_reduce(buffer, group=group)
        count = buffer[-1:].to(self.weight.dtype)
        coefficients = buffer[:-1].view_as(local) / buffer[-1:].clamp_min(1)
        share = num_samples / count.clamp_min(1)
        out = functional.remove_shared_regression(
            features, basis, coefficients, share * rows, positions, group
        )
        self._update(coefficients, count)
        return out

    def _update(self, coefficients: Tensor, num_samples: int | Tensor) -> None:
        with torch.no_grad():
            coefficients, count = self.weigh(coefficients, num_samples)
            state = self.weight
            weight = read(state) * self.decay(count) + count
            write_(state, weight)
            share = ratio(count, weight, coefficients.dtype)
            average = self.coefficients
            average.view(average.shape[0], -1).lerp_(coefficients, share)
