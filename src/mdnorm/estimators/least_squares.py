"""Least squares on weighted moments of past and present batches, in four presets."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mdnorm.distributed import eager, world_size
from mdnorm.estimators.base import Batch, Estimator, batch_moments
from mdnorm.moments import Moments
from mdnorm.regression import Memory, advance, apply_operator, prior_share, regress

# Decay of vectors of features, chosen on seeds 100 to 107 of four settings and of a toy (docs/maths.md).
_DECAY = 0.5
# Samples of a batch that count for the rise of the decay.
_COUNTED = 50.0


class LeastSquares(Estimator):
    """Least squares on weighted moments of past and present batches; the presets are `ESTIMATORS`.

    A batch of weight n leaves the past the share ``1 − n / window`` of its weight.

    Parameters
    ----------
    num_metadata, num_labels, num_features, center, device, dtype
        See `Estimator`.
    window : float
        Samples that the running state looks back; infinity: all of them.
    prior : float
        Shrinkage of the coefficients: a prior on every column in units of its deviation that weighs as much
        as this many samples. It bounds the estimate from a few samples whose labels nearly determine their
        metadata. 0: exact least squares.
    gram : "batch", "dataset" or "window"
        Where ``E[z zᵀ]`` comes from in training. With "batch" and "dataset", ``E[z fᵀ]`` is that of the
        batch; with "window" both are running means.
    adjoint : "batch", "window" or "none"
        Whose gradient flows through the coefficients: this batch's, a running mean of it (two-sided), none.
    averaging : float
        Evaluation removes the mean of the coefficients over so many windows; 0: the latest.
    prior_on_all : bool
        Put the prior on labels and intercept as well and let it fade with the past, as R-MDN does.
    reduction : "mean" or "sum"
        How the loss adds up the samples of a batch, a fixed factor apart; for `adjoint="window"`.
    decay : float, optional
        Size of the gradient that keeps the removed effect from growing, in shares of the loss's own
        gradient; see `mdnorm.regression.regress`. It rises from 0 to this value while the layer sees `rise`
        samples, and is smaller as long as the features tell less of the labels than of the metadata, since a
        network that has learned nothing yet would be held where it is. 0: the published gradient. By default
        0.5 for vectors of features, (N, D) or pooled maps as (N, D, 1, 1), and 0 for maps and tokens, in
        which the metadata show everywhere: to hold that down would leave the network nothing.
    rise : float
        In samples; of a batch no more than 50 count, since it takes steps for a network to learn anything.
        In a compiled model the decay is ahead by one batch.

    Attributes
    ----------
    gram, cross, weight : (K, K), (K, D), (1,) buffers
        Running ``E[z zᵀ]`` (with "dataset" that of the training set), ``E[z fᵀ]``, and the weight behind
        them.
    coefficients_weight : (1,) buffer
        Weight behind the averaged coefficients.
    seen : (1,) buffer
        Samples on the way to `rise`.
    adjoint, adjoint_weight : (R, D), (1,) buffers
        Running mean of the gradient that reaches the coefficients, and its weight; with `adjoint="window"`.

    References
    ----------
    "batch" and "dataset": Lu et al., CVPR 2021, section 3. "recursive": Shah et al., R-MDN, ICML 2025;
    recursive least squares with a forgetting factor is least squares on exponentially weighted moments.
    """

    gram: Tensor
    cross: Tensor
    weight: Tensor
    coefficients_weight: Tensor
    seen: Tensor
    adjoint: Tensor
    adjoint_weight: Tensor
    prior_weight: Tensor

    def __init__(
        self,
        num_metadata: int,
        num_labels: int,
        num_features: tuple[int, ...],
        *,
        window: float = 500.0,
        prior: float = 1.0,
        gram: Literal["batch", "dataset", "window"] = "window",
        adjoint: Literal["batch", "window", "none"] = "window",
        averaging: float = 1.5,
        prior_on_all: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        decay: float | None = None,
        rise: float = 10_000.0,
        **options: Any,
    ) -> None:
        super().__init__(num_metadata, num_labels, num_features, **options)
        given = {"window": window, "averaging": averaging, "prior": prior, "rise": rise}
        for name, value in (given | ({} if decay is None else {"decay": decay})).items():
            # A bool is a number to Python, and never meant as one here.
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}.")
            if name in ("prior", "rise", "decay") and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number, at least 0, got {value}.")
        if not window > 0:
            raise ValueError(f"window must be a positive number of samples, got {window}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.window, self.prior, self.averaging = float(window), float(prior), float(averaging)
        self.gram_source, self.adjoint_source = gram, adjoint
        self.prior_on_all, self.reduction = prior_on_all, reduction
        self.decay, self.rise = decay, float(rise)
        columns = num_labels + 1 + num_metadata
        self.add_state("gram", columns, columns, precise=True)
        self.add_state("weight", 1, precise=True)
        self.add_state("coefficients_weight", 1, precise=True)
        self.add_state("seen", 1, precise=True)
        if gram != "dataset":
            self.add_state("cross", columns, self.num_values)
        if adjoint == "window":
            self.add_state("adjoint", num_metadata + self.center, self.num_values)
            self.add_state("adjoint_weight", 1, precise=True)
        if prior_on_all:
            self.add_state("prior_weight", 1, precise=True)
            self.prior_weight.fill_(prior)

    def reset_parameters(self) -> None:
        """Forget everything learned."""
        super().reset_parameters()
        if self.prior_on_all:
            self.prior_weight.fill_(self.prior)

    def set_gram(self, moments: Moments) -> None:
        """Take the units of the training set's columns and, with `gram="dataset"`, its moments."""
        super().set_gram(moments)
        if self.gram_source == "dataset":
            gram, _, weight = self._averages(moments)
            with torch.no_grad():
                self.gram.copy_(gram)
                self.weight.fill_(weight)

    def set_moments(self, moments: Moments) -> None:
        """Replace the running state by given moments, which weigh no more than the window."""
        gram, cross, weight = self._averages(moments)
        self._fit(gram, cross, weight)
        with torch.no_grad():
            self.gram.copy_(gram)
            self.weight.fill_(weight if self.gram_source == "dataset" else min(weight, self.window))
            self.coefficients_weight.fill_(min(weight, self.window))
            if self.gram_source != "dataset":
                self.cross.copy_(cross)
            if self.prior_on_all:
                self.prior_weight.zero_()

    def kept(self, count: float | Tensor) -> Any:
        """Return the share of its weight that a batch of weight `count` leaves the past."""
        if isinstance(count, Tensor):
            return (1 - count / self.window).clamp_min(0)
        return max(1 - count / self.window, 0.0)

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Update the moments by this batch and remove the effect that they show.

        Raises
        ------
        RuntimeError
            The moments of the training set are missing; with `gram="window"`, inside of an
            activation-checkpointed part of a compiled model; with `adjoint="window"`, inside of a transform
            of torch.func.
        ValueError
            Columns that overflow in the units of their first batch.
        """
        if self.gram_source == "dataset":
            self.require_gram(self.weight, "dataset")
        if not batch.eager and self.gram_source == "window" and torch.compiler.is_compiling():
            _refuse_traced_checkpoint()
        if not batch.eager and self.adjoint_source == "window":
            _refuse_transforms(features)
        return self._step(features, batch) if batch.group is None else eager(self._step)(features, batch)

    def _step(self, features: Tensor, batch: Batch) -> Tensor:
        state: Any = self._buffers
        p, source = self.num_labels + 1, self.gram_source
        with torch.no_grad():
            self.standardise(batch)
            rows = self.rows(batch.columns)
            count, left, gram, cross = batch_moments(features, rows, batch)
            kept = self.kept(count)
            running, moments = state["gram"], cross
            used: bool | Tensor = True
            if source != "dataset":
                moments = state["cross"]
                if not batch.repeated:
                    pairs = (running, gram), (moments, cross)
                    used = advance(state["weight"], kept, count, *pairs, eager=batch.eager)
                    if used is False and batch.checked:
                        _refuse_far_columns(batch.columns, left)
                    if self.prior_on_all:
                        faded = self.prior_weight * kept
                        self.prior_weight.copy_(torch.where(torch.as_tensor(used), faded, self.prior_weight))
            if source == "batch":
                running, moments = gram, cross
                operator = self._operator(gram, prior_share(self.prior, count))
            else:
                operator = self._running_operator(batch.eager)
            coefficients = apply_operator(operator, moments, left.dtype)
            mean = running[p - 1, p:]
            if not batch.repeated and used is not False:
                used = self._remember(kept, count, coefficients, mean, used, batch.eager)
            basis = self._basis(rows[:, p:], mean)
            projector = None if self.adjoint_source == "none" else apply_operator(operator, left, left.dtype)
            # A batch that did not enter the moments stays out of what follows as well.
            entered = count
            if used is False:
                entered, kept = 0.0, 1.0
            elif isinstance(used, Tensor):
                share = used.to(self.weight.dtype)
                entered, kept = share * count, 1 - share * (1 - kept)
            decay = self.decay
            if decay is None:
                # Of vectors only one dimension beside that of the samples has more than one value.
                is_vector = features.ndim == 2 or sum(size > 1 for size in features.shape[1:]) <= 1
                decay = _DECAY if is_vector else 0.0
            held, strength = cast("Tensor | None", None), cast("float | Tensor", 0.0)
            if decay:
                if batch.weights is not None:
                    held = basis * batch.weights.unsqueeze(1)
                if self.center:
                    # The mean, which is removed as well, is nothing that metadata do.
                    held = torch.cat(
                        [(basis if held is None else held)[:, :-1], basis.new_zeros(len(basis), 1)], 1
                    )
                strength = self._strength(decay, (running, moments), coefficients, entered, batch)
        memory = None
        if self.adjoint_source == "window":
            # Each of several processes has a mean of its own, and their gradients are averaged later.
            processes = 1 if batch.group is None else world_size(batch.group)
            samples = count if self.reduction == "sum" else processes
            memory = Memory(self.adjoint, self.adjoint_weight, entered, kept, samples, batch.eager)
        return regress(
            features,
            basis,
            coefficients,
            projector,
            batch.dims,
            batch.mask,
            memory=memory,
            group=batch.group,
            held=held,
            decay=strength,
        )

    def _strength(
        self,
        decay: float,
        moments: tuple[Tensor, Tensor],
        coefficients: Tensor,
        count: float | Tensor,
        batch: Batch,
    ) -> float | Tensor:
        """Count the batch and return how strong the decay is by now."""
        (gram, cross), p = moments, self.num_labels + 1
        if self.rise and not batch.repeated:
            self.seen += count.clamp_max(_COUNTED) if isinstance(count, Tensor) else min(count, _COUNTED)
        risen: Any = 1.0
        if self.rise and batch.eager:
            # As numbers, where looking at values costs nothing.
            risen = min(self.seen.item() / self.rise, 1.0)
        elif self.rise:
            risen = (self.seen / self.rise).clamp_max(1)
        if self.num_labels:
            # What the features tell of the labels, beside what is removed.
            beta = coefficients[: self.num_metadata]
            centred = torch.addr(gram, gram[p - 1], gram[p - 1], alpha=-1).to(beta.dtype)
            told = torch.addr(cross[: p - 1], gram[p - 1, : p - 1].to(cross.dtype), cross[p - 1], alpha=-1)
            told = torch.linalg.vector_norm(told.to(beta.dtype).addmm(centred[: p - 1, p:], beta, alpha=-1))
            removed = (centred[p:, p:] @ beta).mul_(beta).sum()
            if batch.eager:
                risen *= min(told.item() / math.sqrt(max(removed.item(), 1e-30)), 1.0)
            else:
                risen = risen * (told / removed.clamp_min(1e-30).sqrt()).clamp_max(1)
        return cast("float | Tensor", decay * risen)

    def _remember(
        self, kept: Any, count: Any, coefficients: Tensor, mean: Tensor, used: bool | Tensor, eager: bool
    ) -> bool | Tensor:
        """Move what evaluation removes to the coefficients of this step; return whether the batch
        was used.
        """
        if self.gram_source == "batch":
            coefficients = apply_operator(self._running_operator(eager), self.cross, self.cross.dtype)
            mean = self.gram[self.num_labels, self.num_labels + 1 :]
        # Coefficients of all samples so far have no noise that a mean would not have; but "dataset" has those
        # of a batch.
        is_latest = not self.averaging or (self.window == math.inf and self.gram_source != "dataset")
        faded = 0.0 if is_latest else kept ** (1 / self.averaging)
        if isinstance(used, Tensor):
            coefficients = torch.where(used, coefficients, torch.nan)
        remembered = self.coefficients if self.coefficients.ndim == 2 else self.coefficients.flatten(1)
        pairs = (self.mean, mean), (remembered, coefficients)
        return advance(self.coefficients_weight, faded, count, *pairs, eager=eager)

    def _running_operator(self, eager: bool) -> Tensor:
        if not self.prior_on_all:
            weight = self.weight.item() if eager else self.weight
            return self._operator(self.gram, prior_share(self.prior, weight))
        prior = self.prior_weight / self.weight.clamp_min(1e-30)
        return self._operator(self.gram + prior * torch.eye(len(self.gram)).to(self.gram), 0.0)

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        text = f"gram={self.gram_source!r}, adjoint={self.adjoint_source!r}, window={self.window:g}"
        text += f", prior={self.prior:g}, center={self.center}"
        return text if self.reduction == "mean" else f"{text}, reduction={self.reduction!r}"


def _refuse_far_columns(columns: Tensor, left: Tensor) -> None:
    """Raise ValueError where finite columns are not finite in the units and the dtype of the regression."""
    if bool(columns.isfinite().all()) and not bool(left.isfinite().all()):
        raise ValueError(
            f"metadata or labels overflow {left.dtype} in the units of their first batch: look for wrong "
            "values, or give larger units."
        )


def _refuse_transforms(features: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(features):
        return
    raise RuntimeError(
        "estimator='running' cannot train inside torch.func: it updates state in the backward pass. Train by "
        "loss.backward(), or take 'batch', 'dataset', 'recursive' or 'penalty'. Evaluation works."
    )


def _refuse_traced_checkpoint() -> bool:
    """Raise where `torch.compile` traces an activation-checkpointed part.

    Compiled code repeats the part with the state that the batch has already entered, and nothing in it can
    tell the two runs apart.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:  # torch.export(strict=False) runs this code itself
        return False
    while tracer is not None:
        if "activation_checkpoint" in str(getattr(tracer, "source_target", "")):
            raise RuntimeError(
                "'running', 'recursive' and scale=True cannot train inside of an activation-checkpointed "
                "part of a compiled model, which is repeated with the state that the batch has entered. "
                "Keep the layer out of it, or take estimator 'batch' or 'dataset' without scale."
            )
        tracer = tracer.parent
    return False


# What torch.compiler.assume_constant_result does, without its import of the compiler: the function is run
# while tracing, where the part that is being traced is known.
_refuse_traced_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]
