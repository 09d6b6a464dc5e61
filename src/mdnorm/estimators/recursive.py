"""Recursive least squares with a forgetting factor (R-MDN), in K×K arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mdnorm import functional
from mdnorm.distributed import eager
from mdnorm.estimators.base import Estimator, refuse_compiled_checkpoint
from mdnorm.functional import Gram

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RecursiveEstimator(Estimator):
    """Recursive least squares over all batches so far, the past fading by a forgetting factor.

    Each batch corrects the coefficients by their own prediction error:
    ``P ← (λ P⁻¹ + XᵀX)⁻¹``, ``β ← β + P Xᵀ (F − X β)`` with `X = [m, y, 1]` and λ = 1 − momentum, or
    1 − n / window for a batch of n (Shah et al., R-MDN, ICML 2025, arXiv:2507.09031, there with an N×N
    inverse). The coefficients are constants for the gradient, as they are there.

    Works from batches of one on, in streams and in continual learning. The columns are standardised with the
    Gram matrix of the training set where `mdnorm.fit_gram` gave it; without it, standardise them yourself if
    they are far from zero or differ much in scale.

    Attributes
    ----------
    factor : (K + 1, K + 1) buffer, float64
        Square root of `P`. The prior, also the most that `P` can grow to, is 10⁴ · identity.
    all_coefficients : (K + 1, *feature_shape) buffer
        β of the standardised columns and the intercept.
    column_mean, column_scale : (K,) buffers, float64
        What columns are standardised by; a scale of 0 stands for 1.
    """

    name: ClassVar[str] = "recursive"
    uses_training_gram: ClassVar[bool] = True
    default_momentum: ClassVar[float | None] = None
    default_window: ClassVar[float | None] = 500
    precise: ClassVar[frozenset[str]] = Estimator.precise | {"factor", "column_mean", "column_scale"}
    prior: ClassVar[float] = 1e4

    factor: Tensor
    all_coefficients: Tensor
    column_mean: Tensor
    column_scale: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.ridge:
            raise ValueError(
                f"estimator='recursive' has a prior of its own and takes no ridge, got {self.ridge}."
            )

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Add the recursion's state to the base state."""
        columns = num_metadata + num_labels
        return super().state_shapes(num_metadata, num_labels, feature_shape) | {
            "factor": (columns + 1, columns + 1),
            "all_coefficients": (columns + 1, *feature_shape),
            "column_mean": (columns,),
            "column_scale": (columns,),
        }

    @torch.no_grad()
    def _store_gram(self, gram: Gram) -> None:
        super()._store_gram(gram)
        scale = functional.column_scale(gram)
        before = torch.where(self.column_scale > 0, self.column_scale, 1.0)
        # A new training set (continual learning): what the recursion knows is put in the new units.
        known = scale.isfinite() & before.isfinite()
        change = torch.cat([torch.where(known, scale / before, 1.0), scale.new_ones(1)]).diag()
        change[-1, :-1] = (gram.mean - self.column_mean) / before
        coefficients = change @ self.all_coefficients.flatten(1).to(change.dtype)
        self.all_coefficients.copy_(coefficients.reshape(self.all_coefficients.shape))
        self.factor.copy_(change @ self.factor)
        self.column_mean.copy_(gram.mean)
        self.column_scale.copy_(scale)

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the recursion's coefficients and start it again from the prior's trust of `window`."""
        super().set_moments(gram, moments)
        self.gram_count.copy_(self.lasting(gram.count))
        operator = functional.coefficient_operator(gram)
        slopes = (operator @ moments[:-1].to(operator.dtype)) * torch.where(
            self.column_scale.isfinite(), self.column_scale, 0.0
        ).unsqueeze(1)
        everything = torch.cat([slopes, moments[-1:].to(operator.dtype)])
        self.all_coefficients.flatten(1).copy_(everything)
        rows = self._standardised_root(gram) * self.lasting(gram.count) ** 0.5
        self.factor.copy_(functional.recursive_update(self._prior(), rows, 1.0, self.prior))

    def _standardised_root(self, gram: Gram) -> Tensor:
        """Rows whose second moments are those of the standardised columns and the intercept."""
        correlation = gram.covariance / torch.outer(self.column_scale, self.column_scale)
        full = torch.block_diag(correlation, correlation.new_ones(1, 1))
        values, vectors = torch.linalg.eigh(full)
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root.mT

    def _prior(self) -> Tensor:
        root = torch.full_like(self.factor[0], self.prior**0.5)
        return root.diag()

    def _rows_like(self, batch: Gram, scale: Tensor) -> Tensor:
        """Rows (K + 1, K + 1) with the XᵀX of the standardised columns and intercept of all processes."""
        covariance = batch.covariance / torch.outer(scale, scale)
        values, vectors = torch.linalg.eigh(covariance)
        # Root of the covariance, and a row for the mean: with far-away columns their sum would lose digits.
        root = torch.nn.functional.pad((vectors * values.clamp_min(0).sqrt()).mT, (0, 1))
        mean = torch.cat([(batch.mean - self.column_mean) / scale, batch.mean.new_ones(1)])
        rows: Tensor = torch.cat([root, mean.unsqueeze(0)]) * batch.count.sqrt()
        return rows

    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Correct the coefficients by this batch and remove the effect that they show.

        Raises
        ------
        RuntimeError
            Inside of an activation-checkpointed part of a compiled model.
        """
        refuse_compiled_checkpoint(f"estimator={self.name!r}")
        # The prediction error of half-precision features is not rounded to their precision.
        constant = features.detach().to(functional.compute_dtype(features))
        group = self.active_group()
        if group is not None:
            eager(self._update)(constant, columns, positions, group)
        else:
            self._update(constant, columns, positions, None)
        return self.evaluate(features, columns[:, : self.gram.num_metadata], positions)

    @torch.no_grad()
    def _update(
        self, features: Tensor, columns: Tensor, positions: tuple[int, ...], group: ProcessGroup | None
    ) -> None:
        num_metadata = self.gram.num_metadata
        scale = torch.where(self.column_scale > 0, self.column_scale, 1.0)
        standardised = (columns - self.column_mean) / scale
        rows = torch.cat([standardised, standardised.new_ones(columns.shape[0], 1)], dim=1)
        coefficients = self.all_coefficients.flatten(1)
        predicted = functional.remove_effect(features, rows, coefficients, positions)
        innovation = functional.feature_moments(predicted, rows.mT, positions)
        batch = Gram.from_columns(columns, num_metadata)
        num_samples: int | Tensor = columns.shape[0]
        if group is not None:
            batch, innovation = functional.share_gram(batch, innovation, group)
            num_samples = batch.count
            rows = self._rows_like(batch, scale)
        innovation, count = self.usable(innovation, num_samples)
        # An unusable batch may be NaN.
        rows = torch.where(count > 0, rows, 0.0)
        # A batch beyond the window forgets the past: `P` divided by almost nothing is the prior.
        decay = self.decay(count).clamp_min(1e-12)
        # A zero factor is one that no batch has reached.
        factor = torch.where(self.factor.any(), self.factor, self._prior())
        factor = functional.recursive_update(factor, rows, decay, self.prior)
        # An unused batch must not even rotate the root.
        self.factor.copy_(torch.where(count > 0, factor, self.factor))
        gain = (factor @ factor.mT).to(innovation.dtype)
        coefficients.add_(gain @ innovation)
        # The running mean of the columns centres what is removed; a given Gram matrix weighs as its samples.
        merged = self.gram.merge(Gram(batch.mean, batch.covariance, count, num_metadata), decay)
        super()._store_gram(merged)
        slopes = coefficients[:num_metadata] / scale[:num_metadata, None].to(coefficients.dtype)
        removed = [slopes]
        if self.center:
            # The intercept at the mean metadata and at label 0: the label part always stays.
            origin = torch.cat([merged.mean[:num_metadata], torch.zeros_like(merged.mean[num_metadata:])])
            shift = ((origin - self.column_mean) / scale).to(coefficients.dtype)
            removed.append((coefficients[-1] + shift @ coefficients[:-1]).unsqueeze(0))
        self.coefficients.flatten(1).copy_(torch.cat(removed))
