"""The two-sided running estimator: least squares over the last window, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.centred_design import centred_design, silent_as_torch
from mdnorm.context import is_recomputing
from mdnorm.distributed import eager
from mdnorm.estimators.base import refuse_compiled_checkpoint
from mdnorm.estimators.batch import BatchEstimator
from mdnorm.functional import Gram
from mdnorm.weights import positive, ratio, read, write_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.weights import Weight


class RunningEstimator(BatchEstimator):
    """Least squares over the last `window` samples, in the forward and in the backward pass; any batch size.

    Forward: running means and covariances of design and features, this batch included, give β. Backward: the
    gradient through β needs the sum of ``(m − m̄)ᵀ g`` over all samples, as β needs the sum of ``xᵀ f``; it is
    kept as a running mean in the same way (see `mdnorm.functional.remove_running_regression`). A remembered β
    without this second half removes the effect of the past and leaves the incentive to drift along the
    metadata; the gradient of the current batch alone has the noise of the batch.

    A batch as large as the window forgets the past, and the estimator is `BatchEstimator`.

    Evaluation removes an average of β over `averaging` times the window: in training the window must be short
    enough to follow the weights, and its β then has a noise that an average does not have.

    The state is updated in the backward pass too: one backward pass for each training forward, of one loss.

    Parameters
    ----------
    reduction : "mean" or "sum"
        How the loss adds up the samples of a batch, a fixed factor apart.
    *args, **kwargs
        Of `Estimator`.

    Attributes
    ----------
    adjoint : (R, *feature_shape) buffer
        Running mean of the gradient that reaches the coefficients.
    adjoint_weight, coefficients_weight : (1,) buffers, float64
        Decayed number of samples behind it, and behind `coefficients`.
    """

    name: ClassVar[str] = "running"
    default_momentum: ClassVar[float | None] = None
    default_window: ClassVar[float | None] = 500
    precise: ClassVar[frozenset[str]] = BatchEstimator.precise | {"adjoint_weight", "coefficients_weight"}
    averaging: ClassVar[float] = 3.0
    """How many windows (or batches of ``1 / momentum``) evaluation averages over."""

    adjoint: Tensor
    adjoint_weight: Tensor
    coefficients_weight: Tensor

    def __init__(self, *args: Any, reduction: Literal["mean", "sum"] = "mean", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.reduction: Literal["mean", "sum"] = reduction

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Add the running adjoint and the weights of the averages to the state."""
        return super().state_shapes(num_metadata, num_labels, feature_shape) | {
            "adjoint": (num_metadata + self.center, *feature_shape),
            "adjoint_weight": (1,),
            "coefficients_weight": (1,),
        }

    def _upgrade(self, state_dict: dict[str, Any], prefix: str) -> None:
        super()._upgrade(state_dict, prefix)
        count = state_dict.get(prefix + "gram_count")
        # Before evaluation averaged the coefficients, they were those of the running moments.
        if count is not None and prefix + "adjoint" in state_dict:
            state_dict.setdefault(prefix + "coefficients_weight", self.lasting(count).clone())

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the running moments and the average of the coefficients."""
        super().set_moments(gram, moments)
        self.coefficients_weight.copy_(self.lasting(gram.count))

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Update the running moments and remove the effect that they show.

        Raises
        ------
        RuntimeError
            Inside a transform of `torch.func`, which knows no state of the backward pass, or inside of an
            activation-checkpointed part of a compiled model, which is repeated with another state.
        """
        refuse_compiled_checkpoint(f"estimator={self.name!r}")
        _refuse_transforms(features)
        group = self.active_group()
        if group is not None:
            return eager(self._remove)(features, columns, positions, group)
        return self._remove(features, columns, positions, None)

    def _remove(
        self, features: Tensor, columns: Tensor, positions: tuple[int, ...], group: ProcessGroup | None
    ) -> Tensor:
        dtype = functional.compute_dtype(features)
        with torch.no_grad(), silent_as_torch():
            design = centred_design(columns, self.num_metadata or 0)
            batch, moments, num_samples = self._batch_moments(features, design, positions, group)
            total = None if group is None else batch.count
            mean = self.gram_mean.clone() if self.center else None
            count, operator, coefficients = self._merge(batch, moments, num_samples)
            self._average(coefficients, count, mean)
            design = design.about(self.gram_mean)
            basis = design.basis(self.center, dtype)
            projector = design.projected_rows(operator, dtype, total)
        if is_recomputing():
            # The moments have this batch already; the backward pass, now under way, has not.
            count = read(batch.count)
        return functional.remove_running_regression(
            features,
            basis,
            coefficients,
            projector,
            self.adjoint.flatten(1),
            self.adjoint_weight,
            count=count,
            decay=self.decay(count),
            positions=positions,
            reduction=self.reduction,
            group=group,
            num_samples=total,
        )

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        text = super().extra_repr()
        return text if self.reduction == "mean" else f"{text}, reduction={self.reduction!r}"

    def _average(self, coefficients: Tensor, count: Weight, mean: Tensor | None) -> None:
        """Move the average towards a batch's coefficients (R, D).

        `mean` (K,) is what that of the columns was; only `center` needs it.
        """
        average = self.coefficients.flatten(1)
        if mean is not None:
            # The intercept is the one at the mean metadata: the same line, seen from the new mean.
            step = (self.gram_mean - mean)[: average.shape[0] - 1]
            average[-1] += step.to(average.dtype) @ average[:-1]
        weight = read(self.coefficients_weight) * self._average_decay(count) + count
        write_(self.coefficients_weight, weight)
        average.lerp_(coefficients, ratio(count, weight, average.dtype))

    def _average_decay(self, count: Weight) -> Weight:
        if self.window is None and self.momentum is None:
            # The cumulative fit has no noise of a window: its latest value is the best.
            return positive(count, 0.0, 1.0)
        return self.decay(count) ** (1 / self.averaging)


def _refuse_transforms(features: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(features):
        return
    raise RuntimeError(
        "estimator='running' cannot train inside torch.func (vmap, grad, vjp, ...): it updates state in the "
        "backward pass, which those transforms do not allow. Train each model by loss.backward(), or take "
        "'batch', 'dataset', 'recursive' or 'penalty'. Evaluation (model.eval()) works."
    )
