"""Coefficients that are learned by a loss of their own (PMDN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mdnorm import functional
from mdnorm.distributed import eager, world_size
from mdnorm.estimators.base import Estimator
from mdnorm.functional import Gram

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PenaltyEstimator(Estimator):
    """β is a parameter, learned by the loss ``½ mean ‖f − x β‖²`` beside the network (PMDN).

    The loss sees the features as constants, the network sees β as a constant (Vento et al., MICCAI 2022,
    arXiv:2207.04607; there with two forward passes a step, here with one). Add it to the task's loss, and
    give the coefficients a learning rate of their own::

        optimizer = torch.optim.SGD(mdnorm.parameter_groups(model, penalty={"lr": 0.1}), lr=1e-3)
        loss = criterion(logits, labels) + mdnorm.penalty_loss(model)

    The parameter belongs to whitened columns, so that one learning rate suits all of them: with plain
    gradient descent a rate of η moves β by the share η towards the batch's estimate. Whitening takes the Gram
    matrix of the training set: call ``mdnorm.fit_gram`` first.

    Attributes
    ----------
    weight : (K + 1, *feature_shape) parameter
        Coefficients of the whitened columns and the intercept. It exists as soon as all sizes are known; make
        the optimiser after that (with lazy sizes, after one batch).
    loss : tensor or None
        The loss of the last training forward: a scalar, summed over features.
    """

    name: ClassVar[str] = "penalty"
    uses_training_gram: ClassVar[bool] = True
    default_momentum: ClassVar[float | None] = None
    precise: ClassVar[frozenset[str]] = Estimator.precise | {"operator", "whitening"}

    weight: nn.Parameter | None
    operator: Tensor | None
    whitening: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.window is not None or self.momentum is not None:
            raise ValueError(
                "estimator='penalty' has no running state and takes no momentum or window: the learning rate "
                "of its parameter says how fast it follows."
            )
        self.register_parameter("weight", None)
        # Both follow from the Gram matrix, so they are not saved but made again where that changes.
        self.register_buffer("operator", None, persistent=False)
        self.register_buffer("whitening", None, persistent=False)
        self.loss: Tensor | None = None

    def allocate(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...] | None = None
    ) -> None:
        """Create the parameter as well, as soon as the shape of the features is known."""
        super().allocate(num_metadata, num_labels, feature_shape)
        # A state saved between fit_gram and the first batch has no feature shape either.
        if not self.is_allocated or self.weight is not None:
            return
        assert feature_shape is not None
        with torch.inference_mode(False):
            zeros = torch.zeros(
                (num_metadata + num_labels + 1, *feature_shape),
                device=self.coefficients.device,
                dtype=self.coefficients.dtype,
            )
            self.weight = nn.Parameter(zeros)

    def set_gram(self, gram: Gram) -> None:
        """Store the Gram matrix of the training set; what is learned already is put in its columns."""
        whitening, mean = self.whitening, self.gram_mean.clone()
        super().set_gram(gram)
        self._make_operators()
        if whitening is None or self.weight is None:
            return
        assert self.whitening is not None
        with torch.no_grad():
            weight = self.weight.flatten(1).to(whitening.dtype)
            slopes = whitening @ weight[:-1]
            # Wᵀ S is the inverse of the whitening W.
            whitened = self.whitening.mT @ self.gram.covariance @ slopes
            intercept = weight[-1:] + (self.gram_mean - mean) @ slopes
            self.weight.copy_(torch.cat([whitened, intercept]).reshape(self.weight.shape))

    def _make_operators(self) -> None:
        scale = functional.column_scale(self.gram)
        correlation = self.gram.covariance / torch.outer(scale, scale)
        values, vectors = torch.linalg.eigh(correlation)
        kept = values > 1e-10 * values[-1:].clamp_min(1e-30)
        # The symmetric root: others depend on the signs of the eigenvectors, and a saved parameter would too.
        root = (vectors * torch.where(kept, values, torch.inf).rsqrt()) @ vectors.mT
        self.whitening = root / scale.unsqueeze(1)
        # The fitted cross covariance, S W γ, through the operator that protects the labels.
        fitted = self.gram.covariance @ self.whitening
        self.operator = functional.removal_operator(
            self.gram, ridge=self.ridge, center=self.center
        ) @ torch.block_diag(fitted, fitted.new_ones(1, 1))

    def check_ready(self) -> None:
        """Raise RuntimeError before the Gram matrix of the training set is known."""
        if self.operator is None:
            raise RuntimeError(
                "estimator='penalty' needs the Gram matrix of the training set before training: call "
                "mdnorm.fit_gram(model, metadata, labels) once with all training metadata (and labels)."
            )

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the learned coefficients by the exact fit."""
        super().set_moments(gram, moments)
        assert self.whitening is not None
        assert self.weight is not None
        weight = torch.cat([self.whitening.mT.to(moments.dtype) @ moments[:-1], moments[-1:]])
        self.weight.copy_(weight.reshape(self.weight.shape))

    def reset(self) -> None:
        """Forget the coefficients and the Gram matrix."""
        super().reset()
        self.operator = self.whitening = self.loss = None
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.weight is not None:
            dtype = self._least_dtype("weight", self.weight)
            if self.weight.dtype != dtype:
                self.weight = nn.Parameter(self.weight.detach().to(dtype), self.weight.requires_grad)
        self.operator = self.whitening = None
        if self.knows_design and float(self.gram_count) > 0:
            self._make_operators()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Estimator:
        before = None if self.weight is None else self.weight.data
        super()._apply(fn, recurse)
        if self.weight is not None and before is not None and torch.finfo(self.weight.dtype).bits < 32:
            self.weight.data = before.to(self.weight.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The last loss hangs on a graph, which can be neither copied nor saved.
        return self.__dict__ | {"loss": None}

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Leave the loss of the coefficients in `loss` and remove the effect that they show now."""
        self.check_ready()
        assert self.weight is not None
        assert self.whitening is not None
        assert self.operator is not None
        num_metadata = self.gram.num_metadata
        rows = functional.effect_basis(columns @ self.whitening, self.gram_mean @ self.whitening, True)
        weight = self.weight.flatten(1)
        # In half precision the sum of squares would overflow.
        constant = features.detach().to(functional.compute_dtype(features))
        error = functional.remove_effect(constant, rows, weight, positions)
        # The mean over positions carries the whole gradient of shared coefficients.
        self.loss = 0.5 * error.square().sum() / self._divisor(columns)
        if positions:
            sharing = 1
            for dim in positions:
                sharing *= features.shape[dim]
            self.loss = self.loss / max(sharing, 1)
        self._refresh()
        return self.evaluate(features, columns[:, :num_metadata], positions)

    def _divisor(self, columns: Tensor) -> float | Tensor:
        """Return what makes the sum over samples a mean, also where gradients are averaged over processes."""
        group = self.active_group()
        if group is None:
            return max(columns.shape[0], 1)
        return eager(_samples_a_process)(columns, group)

    def train(self, mode: bool = True) -> PenaltyEstimator:
        """Set the mode; before evaluation `coefficients` becomes what the parameter says."""
        super().train(mode)
        if not mode:
            self._refresh()
        return self

    @torch.no_grad()
    def _refresh(self) -> None:
        coefficients = self._learned()
        if coefficients is not None:
            self.coefficients.copy_(coefficients)

    def _learned(self) -> Tensor | None:
        """Return the coefficients that the parameter stands for; None before the Gram matrix is known."""
        if self.operator is None or self.weight is None:
            return None
        # The optimiser moved the parameter since the last forward pass.
        weight = self.weight.detach().flatten(1).to(self.operator.dtype)
        learned = (self.operator @ weight).reshape(self.coefficients.shape)
        return learned.to(self.coefficients.dtype)

    def evaluate(self, features: Tensor, metadata: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Remove the learned effect of the metadata columns (N, K_m) from features (N, ...)."""
        coefficients = self._learned()
        if coefficients is None:
            return super().evaluate(features, metadata, positions)
        # Evaluation writes nothing: it can be exported, run by threads, and transformed by torch.func.
        basis = functional.effect_basis(metadata, self.gram_mean[: metadata.shape[1]], self.center)
        return functional.remove_effect(features, basis, coefficients.flatten(1), positions)

    def extra_repr(self) -> str:
        """Return the settings; the optimiser's learning rate stands for momentum and window."""
        return f"ridge={self.ridge}, center={self.center}"


def _samples_a_process(columns: Tensor, group: ProcessGroup) -> Tensor:
    count = torch.full((), columns.shape[0], dtype=torch.float32, device=columns.device)
    torch.distributed.all_reduce(count, group=group)
    return count.clamp_min(1) / world_size(group)
