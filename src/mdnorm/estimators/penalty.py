"""Coefficients that are learned by a loss of their own (PMDN)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mdnorm.distributed import all_reduce_sum, eager, world_size
from mdnorm.estimators.base import Batch, Estimator
from mdnorm.moments import Moments
from mdnorm.regression import as_matrix, compute_dtype, full_precision, prior_share, remove
from mdnorm.text import warn


class Penalty(Estimator):
    """β is a parameter, learned by the loss ``½ mean ‖f − x β‖²`` beside the network (PMDN).

    The loss sees the features as constants, the network sees β as a constant (Vento et al., MICCAI 2022,
    arXiv:2207.04607). Add it to the task's loss, and give the coefficients a learning rate of their own::

        optimizer = torch.optim.SGD(mdnorm.parameter_groups(model, penalty={"lr": 0.1}), lr=1e-3)
        loss = criterion(logits, labels) + mdnorm.penalty_loss(model)

    The parameter belongs to whitened columns, so that one learning rate suits all of them: with plain
    gradient descent a rate of η moves β by the share η towards the batch's estimate. Whitening takes the
    moments of the training set: call ``mdnorm.fit_gram`` first.

    Attributes
    ----------
    weight : (K, D) parameter
        Coefficients of the whitened columns ``[y, 1, m]``.
    loss : tensor or None
        The loss of the last training forward: a scalar, summed over features.
    gram, gram_weight : (K, K), (1,) buffers
        ``E[z zᵀ]`` of the training set and the number of its samples.
    """

    gram: Tensor
    gram_weight: Tensor

    def __init__(
        self,
        num_metadata: int,
        num_labels: int,
        num_features: tuple[int, ...],
        *,
        prior: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(num_metadata, num_labels, num_features, **options)
        self.prior = float(prior)
        columns = num_labels + 1 + num_metadata
        self.add_state("gram", columns, columns, precise=True)
        self.add_state("gram_weight", 1, precise=True)
        self.weight = nn.Parameter(torch.zeros(columns, self.num_values, **self._placement))
        self.loss: Tensor | None = None
        self._is_trained = False  # beyond a first batch, which may be there for the sizes alone

    def _whitening(self) -> Tensor:
        """Return the (K, K) matrix that takes rows z to whitened columns, the intercept in its place."""
        intercept = self.num_labels
        mean = self.gram[intercept]
        # The symmetric root: others depend on the signs of the eigenvectors, and a saved parameter would too.
        covariance = self.gram - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        unit = torch.where(deviation > 1e-12, deviation, torch.inf).reciprocal()
        values, vectors = torch.linalg.eigh(covariance * torch.outer(unit, unit))
        kept = values > 1e-10 * values[-1:].clamp_min(1e-30)
        root = (vectors * torch.where(kept, values, torch.inf).rsqrt()) @ vectors.mT * unit.unsqueeze(1)
        root[intercept] = -mean @ root
        root[:, intercept] = 0
        root[intercept, intercept] = 1
        return cast(Tensor, root)

    def _learned(self) -> Tensor:
        """Return the coefficients that the parameter stands for."""
        # What the parameter fits, as moments: the labels are protected as by every other estimator.
        operator = self._operator(self.gram, prior_share(self.prior, self.gram_weight))
        through = operator @ (self.gram @ self._whitening())
        learned: Tensor = through.to(self.weight.dtype) @ self.weight.detach()
        return learned

    def set_gram(self, moments: Moments) -> None:
        """Take the moments of the training set; what is learned already is put in its columns."""
        gram, _, weight = self._averages(moments)
        self._store(gram, weight)

    def _store(self, gram: Tensor, weight: float) -> None:
        with torch.no_grad():
            slopes = self._whitening() @ self.weight.to(gram.dtype) if self.gram_weight.item() else None
            self.gram.copy_(gram)
            self.gram_weight.fill_(weight)
            self.mean.copy_(gram[self.num_labels, self.num_protected :])
            if slopes is not None:
                self.weight.copy_(torch.linalg.pinv(self._whitening(), hermitian=False) @ slopes)
                self.coefficients.flatten(1).copy_(self._learned())

    def set_moments(self, moments: Moments) -> None:
        """Replace the learned coefficients by the exact fit."""
        gram, cross, weight = self._averages(moments)
        self._store(gram, weight)
        with torch.no_grad():
            self.weight.copy_(self._whitening().mT @ cross)
            self.coefficients.flatten(1).copy_(self._learned())

    def reset_parameters(self) -> None:
        """Forget the coefficients and the moments of the training set."""
        super().reset_parameters()
        self.loss, self._is_trained = None, False
        nn.init.zeros_(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        # The last loss hangs on a graph, which can be neither copied nor saved.
        return super().__getstate__() | {"loss": None}

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Leave the loss of the coefficients in `loss` and remove the effect that they show now."""
        self.require_gram(self.gram_weight, "penalty")
        dims, mask, dtype = batch.dims, batch.mask, compute_dtype(features)
        rows = self.rows(batch.columns)
        # In half precision the sum of squares would overflow.
        whitened = (rows @ self._whitening()).to(dtype)
        error = remove(features.detach().to(dtype), whitened, self.weight, dims, mask).square()
        # The mean over positions carries the whole gradient of shared coefficients.
        weights = torch.ones_like(rows[:, 0]) if batch.weights is None else batch.weights
        total = as_matrix(error, dims, mask, dtype).sum(1) @ weights.to(dtype)
        count = weights.sum()
        if batch.group is not None:
            count = eager(all_reduce_sum)(count, batch.group) / world_size(batch.group)
        if not torch.compiler.is_compiling():
            self._is_trained = self.loss is not None
        self.loss = 0.5 * total / count.clamp_min(1e-30).to(dtype)
        with torch.no_grad():
            self.coefficients.flatten(1).copy_(self._learned())
        return self.evaluate(features, batch.columns[:, self.num_protected :], dims, mask)

    def train(self, mode: bool = True) -> Penalty:
        """Set the mode; before evaluation `coefficients` becomes what the parameter says.

        A UserWarning says that the parameter learned nothing in training.
        """
        super().train(mode)
        if not mode and not self.weight.is_meta:
            with torch.no_grad(), full_precision(self.weight.device):
                self.coefficients.flatten(1).copy_(self._learned())
            if self._is_trained and not self.weight.any():
                warn(
                    "a layer with estimator='penalty' has been in training, and all of its coefficients are "
                    "still 0, so that it removes nothing: add mdnorm.penalty_loss(model) to the loss, and "
                    "give mdnorm.parameter_groups(model) to the optimizer."
                )
        return self
