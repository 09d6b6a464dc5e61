"""Where the coefficients of a layer come from: least squares in four presets, or a parameter with a loss of its own."""

from __future__ import annotations

import functools
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mdnorm.context import is_recomputing
from mdnorm.distributed import all_reduce_sum, eager, world_size
from mdnorm.moments import Moments
from mdnorm.regression import (
    Memory,
    Standardisation,
    advance,
    as_matrix,
    coefficient_operator,
    compute_dtype,
    is_readable,
    regress,
    remove,
    statistics_dtype,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ESTIMATORS", "Batch", "Estimator", "LeastSquares", "Penalty", "Spread"]


class Batch(NamedTuple):
    """What an estimator learns from beside the features.

    Attributes
    ----------
    columns : (N, K) tensor, float64
        Checked design columns ``[y, 1, m]``.
    weights : (N,) tensor or None
        Of the samples, in the dtype of `columns`.
    dims : tuple of int
        Dimensions of the features that share a coefficient, see `mdnorm.regression.position_dims`.
    mask : (N, 1, ...) bool tensor or None
        Positions that count.
    group : ProcessGroup or None
        Processes whose samples are one batch.
    """

    columns: Tensor
    weights: Tensor | None
    dims: tuple[int, ...]
    mask: Tensor | None
    group: ProcessGroup | None


class Estimator(nn.Module, ABC):
    """Base class of the strategies that estimate the effect of metadata on features, and owner of a layer's state.

    A subclass implements `forward`, the training step: it returns the corrected features and updates `coefficients` and
    `mean`. Evaluation is the same for all and needs no labels.

    Parameters
    ----------
    num_metadata, num_labels : int
        K_m and K_y.
    num_features : tuple of int
        Shape of a sample's features, or (channels,); D is the product.
    center : bool
        Remove the intercept as well, as the authors' code does.
    device, dtype
        Where and in what precision the state is kept: float32 at least, statistics of the design in float64.

    Attributes
    ----------
    origin, scale : (K,) buffers, float64
        What the columns ``[y, 1, m]`` are measured from and in, fixed by the first batch or the training set; a scale of
        0 before.
    coefficients : (R, *num_features) buffer
        What evaluation removes: β_m in these units and, with `center`, the intercept at `mean`.
    mean : (K_m,) buffer, float64
        Metadata at which nothing is removed, in these units.
    """

    origin: Tensor
    scale: Tensor
    coefficients: Tensor
    mean: Tensor

    _version = 2
    uses_training_gram: ClassVar[bool] = False
    """Whether it cannot train before `mdnorm.fit_gram` gave it the moments of the training set."""

    def __init__(
        self,
        num_metadata: int,
        num_labels: int,
        num_features: tuple[int, ...],
        *,
        center: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_metadata, self.num_labels, self.num_features = num_metadata, num_labels, tuple(num_features)
        self.num_values = math.prod(self.num_features)
        self.center = bool(center)
        self._precise: set[str] = set()
        self._placement = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        columns = num_labels + 1 + num_metadata
        self.add_state("origin", columns, precise=True)
        self.add_state("scale", columns, precise=True)
        self.add_state("mean", num_metadata, precise=True)
        self.add_state("coefficients", num_metadata + self.center, *self.num_features)

    def add_state(self, name: str, *shape: int, precise: bool = False) -> None:
        """Register a buffer of zeros; a precise one is kept in float64."""
        placement = dict(self._placement)
        if precise:
            self._precise.add(name)
            placement["dtype"] = statistics_dtype(torch.empty(0, device=placement["device"]).device)
        self.register_buffer(name, torch.zeros(shape, **placement))

    @property
    def num_protected(self) -> int:
        """K_y + 1, number of labels and intercept."""
        return self.num_labels + 1

    @property
    def is_standardised(self) -> bool | Tensor:
        """Whether origin and scale of the columns are known."""
        return self.scale[self.num_labels] > 0

    def standardise(self, batch: Batch) -> None:
        """Fix origin and scale by this batch where nothing has before."""
        # Looked up in the state only until it is there: on a GPU that waits.
        if not self.__dict__.get("_is_standardised"):
            known = self.is_standardised
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                units = Standardisation.of(batch.columns, self.num_labels, batch.weights, batch.group)
                self.origin.copy_(torch.where(known, self.origin, units.origin))
                self.scale.copy_(torch.where(known, self.scale, units.scale))
                return
            if not known:
                self.set_units(Standardisation.of(batch.columns, self.num_labels, batch.weights, batch.group))
            self.__dict__["_is_standardised"] = True

    def set_units(self, units: Standardisation) -> None:
        """Fix origin and scale of the columns."""
        with torch.no_grad():
            self.origin.copy_(units.origin)
            self.scale.copy_(units.scale)

    def rows(self, columns: Tensor) -> Tensor:
        """Return design columns about the origin, in units of the scale."""
        return (columns - self.origin) * self.scale

    @abstractmethod
    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Training step: update the state and return the corrected features (N, ...)."""

    def evaluate(self, features: Tensor, metadata: Tensor, dims: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
        """Remove the remembered effect of metadata columns (N, K_m) from features (N, ...)."""
        p = self.num_protected
        rows = (metadata - self.origin[p:]) * self.scale[p:]
        return remove(features, self._basis(rows, self.mean), self.coefficients.flatten(1), dims, mask)

    def _basis(self, metadata: Tensor, mean: Tensor) -> Tensor:
        basis = metadata - mean
        return torch.cat([basis, torch.ones_like(basis[:, :1])], 1) if self.center else basis

    def set_moments(self, moments: Moments) -> None:
        """Replace the coefficients by the least-squares fit of given moments (`mdnorm.recalibrate`)."""
        gram, cross, _ = self._averages(moments)
        with torch.no_grad():
            operator = self._operator(gram, self._share(moments.weight))
            self.coefficients.flatten(1).copy_(operator @ cross)
            self.mean.copy_(gram[self.num_labels, self.num_protected :])

    def set_gram(self, moments: Moments) -> None:
        """Take the moments of the design over the training set (`mdnorm.fit_gram`): here, the units of its columns."""
        if not self.is_standardised and moments.units is not None:
            self.set_units(moments.units)

    def _averages(self, moments: Moments) -> tuple[Tensor, Tensor, float]:
        """Return ``E[z zᵀ]`` and ``E[z fᵀ]`` in the units of the state, and the weight behind them."""
        expected = (self.num_metadata, self.num_labels)
        have = (moments.num_metadata, moments.num_protected - 1)
        if have != expected or moments.units is None:
            raise ValueError(
                f"the moments have {have[0]} metadata and {have[1]} label columns, the layer has "
                f"num_metadata={expected[0]} and num_labels={expected[1]}."
            )
        if not self.is_standardised:
            self.set_units(moments.units)
        units = Standardisation(self.origin.to(moments.gram), self.scale.to(moments.gram))
        moved = moments.about(units, torch.zeros_like(moments.feature_origin))
        return (moved.gram / moved.weight).to(self.origin), (moved.cross / moved.weight).to(self.origin), moved.weight

    prior: float = 0.0

    def _share(self, weight: Any) -> Any:
        """Return what the prior weighs beside a weight, of both together."""
        if not self.prior:
            return 0.0
        return self.prior / (self.prior + (weight.item() if isinstance(weight, Tensor) and is_readable(weight) else weight))

    def _operator(self, gram: Tensor, share: float | Tensor) -> Tensor:
        """Return what takes ``E[z fᵀ]`` to the coefficients that are removed, (R, K)."""
        p = self.num_protected
        options: Any = {"dtype": self.coefficients.dtype, "every": self.center}
        rows = coefficient_operator(gram, p, share, **options)
        if not self.center:
            return rows
        # The intercept at the mean metadata and at label 0: the label part always stays.
        at = torch.cat([-(self.origin * self.scale)[: p - 1], gram[p - 1, p - 1 :]])
        at[p - 1] = 1
        return torch.cat([rows[p:], (at @ rows).unsqueeze(0)])

    # -- state ----------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Forget everything learned: all state back to zero, the sizes stay."""
        self.__dict__.pop("_is_standardised", None)
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.zero_()

    def _least_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        least = statistics_dtype(tensor.device) if name in self._precise else torch.float32
        return torch.promote_types(tensor.dtype, least)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Estimator:
        before = {name: tensor for name, tensor in (*self._buffers.items(), *self._parameters.items()) if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name, self._parameters.get(name))
            assert new is not None
            # model.half() moves the state but leaves it at float32 and above, model.float() the statistics at float64.
            if new.dtype != self._least_dtype(name, new) or (name in self._precise and new.dtype != old.dtype):
                # There is nothing to copy from meta: this is `to_empty`.
                kept = torch.empty_like(old, device=new.device) if old.is_meta else old.detach().to(new.device)
                if name in self._buffers:
                    self._buffers[name] = kept
                else:
                    new.data = kept
        # model.to(memory_format=...) restrides 4-d buffers; the updates need the plain layout.
        self.coefficients = self.coefficients.contiguous()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__.pop("_is_standardised", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        # load_state_dict(assign=True) takes tensors as they are, and a checkpoint may be in half precision.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(self._least_dtype(name, buffer))
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.dtype != self._least_dtype(name, parameter):
                dtype = self._least_dtype(name, parameter)
                self._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_is_standardised"}


# -- least squares --------------------------------------------------------------------------------------------


class LeastSquares(Estimator):
    """Least squares on weighted moments of past and present batches; the presets are `ESTIMATORS`.

    A batch of weight n leaves the past the share ``1 − n / window`` of its weight, so the running moments look `window`
    samples back whatever the batch size.

    Parameters
    ----------
    num_metadata, num_labels, num_features, center, device, dtype
        See `Estimator`.
    window : float
        Samples that the running state looks back; infinity: all of them.
    prior : float
        Shrinkage of the coefficients, in samples: a prior on every column in units of its deviation that weighs as much
        as so many samples. It fades as samples come, and keeps a few of them, whose labels nearly determine their
        metadata, from an estimate of any size. 0: exact least squares.
    gram : "batch", "dataset" or "window"
        Where ``E[z zᵀ]`` comes from in training. With "batch" and "dataset", ``E[z fᵀ]`` is that of the batch; with
        "window" both are running means.
    adjoint : "batch", "window" or "none"
        Whose gradient flows through the coefficients: this batch's, a running mean of it (two-sided), none.
    averaging : float
        Evaluation removes the mean of the coefficients over so many windows; 0: the latest.
    prior_on_all : bool
        Put the prior on labels and intercept as well and let it fade with the past, as R-MDN does.
    reduction : "mean" or "sum"
        How the loss adds up the samples of a batch, a fixed factor apart; for `adjoint="window"`.

    Attributes
    ----------
    gram, cross, weight : (K, K), (K, D), (1,) buffers
        Running ``E[z zᵀ]`` (with "dataset" that of the training set), ``E[z fᵀ]``, and the weight behind them.
    coefficients_weight : (1,) buffer
        Weight behind the averaged coefficients.
    adjoint, adjoint_weight : (R, D), (1,) buffers
        Running mean of the gradient that reaches the coefficients, and its weight; with `adjoint="window"`.

    References
    ----------
    "batch" and "dataset": Lu et al., CVPR 2021, section 3. "recursive": Shah et al., R-MDN, ICML 2025; recursive least
    squares with a forgetting factor is least squares on exponentially weighted moments.
    """

    gram: Tensor
    cross: Tensor
    weight: Tensor
    coefficients_weight: Tensor
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
        averaging: float = 3.0,
        prior_on_all: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        **options: Any,
    ) -> None:
        super().__init__(num_metadata, num_labels, num_features, **options)
        for name, value in (("window", window), ("prior", prior), ("averaging", averaging)):
            # A bool is a number to Python, and never meant as one here.
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}.")
        if not window > 0:
            raise ValueError(f"window must be a positive number of samples, got {window}.")
        if not 0 <= prior < math.inf:
            raise ValueError(f"prior must be a finite number of samples, at least 0, got {prior}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.window, self.prior, self.averaging = float(window), float(prior), float(averaging)
        self.gram_source, self.adjoint_source = gram, adjoint
        self.prior_on_all, self.reduction = prior_on_all, reduction
        columns = num_labels + 1 + num_metadata
        self.add_state("gram", columns, columns, precise=True)
        self.add_state("weight", 1, precise=True)
        self.add_state("coefficients_weight", 1, precise=True)
        if gram != "dataset":
            self.add_state("cross", columns, self.num_values)
        if adjoint == "window":
            self.add_state("adjoint", num_metadata + self.center, self.num_values)
            self.add_state("adjoint_weight", 1, precise=True)
        if prior_on_all:
            self.add_state("prior_weight", 1, precise=True)
            self.prior_weight.fill_(prior)

    @property
    def uses_training_gram(self) -> bool:  # type: ignore[override]
        """Whether it cannot train before `mdnorm.fit_gram`."""
        return self.gram_source == "dataset"

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
        super().set_moments(moments)
        gram, cross, weight = self._averages(moments)
        with torch.no_grad():
            self.gram.copy_(gram)
            self.weight.fill_(weight if self.gram_source == "dataset" else min(weight, self.window))
            self.coefficients_weight.fill_(min(weight, self.window))
            if self.gram_source != "dataset":
                self.cross.copy_(cross)
            if self.prior_on_all:
                self.prior_weight.zero_()

    def check_ready(self) -> None:
        """Raise RuntimeError where the moments of the training set are missing."""
        if self.gram_source == "dataset" and is_readable(self.weight) and not self.weight.item():
            raise RuntimeError(
                "estimator='dataset' needs the Gram matrix of the training set before training: call "
                "mdnorm.fit_gram(model, metadata, labels) once with all training metadata (and labels), or choose "
                "estimator='batch'."
            )

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
            The moments of the training set are missing; with `gram="window"`, inside of an activation-checkpointed part of
            a compiled model; with `adjoint="window"`, inside of a transform of torch.func.
        """
        self.check_ready()
        if self.gram_source == "window":
            _refuse_compiled_checkpoint()
        if self.adjoint_source == "window":
            _refuse_transforms(features)
        step = self._step if batch.group is None else eager(self._step)
        return step(features, batch)

    def _step(self, features: Tensor, batch: Batch) -> Tensor:
        dtype, p = compute_dtype(features), self.num_protected
        with torch.no_grad():
            self.standardise(batch)
            rows = self.rows(batch.columns)
            count, left, gram, cross = batch_moments(features, rows, batch)
            operator, coefficients, mean = self._solve(count, gram, cross)
            basis = self._basis(rows[:, p:], mean).to(dtype)
            projector = operator.to(dtype) @ left
        if self.adjoint_source == "none":
            return remove(features, basis, coefficients, batch.dims, batch.mask)
        memory = None
        if self.adjoint_source == "window":
            # Each of several processes has a mean of its own, and their gradients are averaged behind the backward pass.
            samples = world_size(batch.group) if self.reduction == "mean" else count
            memory = Memory(self.adjoint, self.adjoint_weight, count, self.kept(count), samples)
        return regress(features, basis, coefficients, projector, batch.dims, batch.mask, memory=memory, group=batch.group)

    def _solve(self, count: float | Tensor, gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update the state; return operator and coefficients that training removes, and the mean they belong to."""
        p, kept = self.num_protected, self.kept(count)
        is_new = not is_recomputing()
        source = self.gram_source
        if source != "dataset" and is_new:
            advance(self.weight, kept, count, (self.gram, gram), (self.cross, cross))
            if self.prior_on_all:
                self.prior_weight.mul_(kept)
        if source == "batch":
            operator = self._operator(gram, self._share(count))
        else:
            operator = self._running_operator()
        coefficients = operator.to(cross.dtype) @ (self.cross if source == "window" else cross).to(cross.dtype)
        mean = (gram if source == "batch" else self.gram)[p - 1, p:]
        if is_new:
            evaluated, at = coefficients, mean
            if source == "batch":
                evaluated, at = self._running_operator().to(self.cross.dtype) @ self.cross, self.gram[p - 1, p:]
            # The latest coefficients of all samples have no noise that an average would not have.
            faded = kept ** (1 / self.averaging) if self.averaging and math.isfinite(self.window) else 0.0
            if source == "dataset" and not math.isfinite(self.window):
                faded = 1.0
            advance(self.coefficients_weight, faded, count, (self.coefficients.flatten(1), evaluated), (self.mean, at))
        return operator, coefficients, mean

    def _running_operator(self) -> Tensor:
        if not self.prior_on_all:
            return self._operator(self.gram, self._share(self.weight))
        prior = self.prior_weight / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        return self._operator(self.gram + prior * torch.eye(len(self.gram)).to(self.gram), 0.0)

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        text = f"gram={self.gram_source!r}, adjoint={self.adjoint_source!r}, window={self.window:g}, prior={self.prior:g}"
        text += f", center={self.center}"
        return text if self.reduction == "mean" else f"{text}, reduction={self.reduction!r}"


def batch_moments(features: Tensor, rows: Tensor, batch: Batch) -> tuple[float | Tensor, Tensor, Tensor, Tensor]:
    """Return weight, weighted rows (K, N), ``E[z zᵀ]`` and ``E[z fᵀ]`` of a batch, over all processes of its group."""
    dtype, group = compute_dtype(features), batch.group
    weighted = rows if batch.weights is None else rows * batch.weights.unsqueeze(1)
    count: float | Tensor = float(len(rows)) if batch.weights is None else batch.weights.sum().reshape(1)
    if group is not None:
        count = all_reduce_sum(rows.new_full((1,), count) if isinstance(count, float) else count, group)
    elif isinstance(count, Tensor) and is_readable(count):
        count = count.item()
    divisor = count.clamp_min(1e-30) if isinstance(count, Tensor) else (count or 1.0)
    scaled = (weighted / divisor).mT
    left = scaled.to(dtype)
    gram, cross = scaled @ rows, left @ as_matrix(features.detach(), batch.dims, batch.mask, dtype)
    if group is not None:
        both = all_reduce_sum(torch.cat([gram, cross.to(gram.dtype)], 1), group)
        gram, cross = both[:, : len(gram)], both[:, len(gram) :].to(dtype)
    return count, left, gram, cross


def _refuse_transforms(features: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(features):
        return
    raise RuntimeError(
        "estimator='running' cannot train inside torch.func (vmap, grad, vjp, ...): it updates state in the backward "
        "pass, which those transforms do not allow. Train each model by loss.backward(), or take 'batch', 'dataset', "
        "'recursive' or 'penalty'. Evaluation (model.eval()) works."
    )


def _refuse_compiled_checkpoint() -> None:
    """Raise where `torch.compile` traces an activation-checkpointed part.

    Compiled code repeats the part with the state that the batch has already entered, and nothing in it can tell the two
    runs apart.
    """
    if torch.compiler.is_compiling():
        _refuse_traced_checkpoint()


def _refuse_traced_checkpoint() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:  # torch.export(strict=False) runs this code itself
        return False
    while tracer is not None:
        if "activation_checkpoint" in str(getattr(tracer, "source_target", "")):
            raise RuntimeError(
                "estimators that take their coefficients from running moments ('running', 'recursive', scale=True) "
                "cannot train inside of an activation-checkpointed part of a compiled model: the part is repeated with "
                "the state that the batch has already entered, and the gradient would be wrong. Keep the layer out of "
                "the checkpointed part (it saves only the design for its backward pass), or take estimator 'batch' or "
                "'dataset' without scale."
            )
        tracer = tracer.parent
    return False


# What torch.compiler.assume_constant_result does, without its import of the compiler: the function is run while
# tracing, where the part that is being traced is known.
_refuse_traced_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]


# -- spread ---------------------------------------------------------------------------------------------------

# A residual with a smaller share of the noise's variance is rounding.
_LEAST_SHARE = 1e-3
# Variance of the logarithm of a squared normal residual.
_LOG_NOISE = math.pi**2 / 2
# Twice the logarithm of the largest factor, 10: what asks for more is an extrapolation.
_LARGEST_EFFECT = 2 * math.log(10)


class Spread(LeastSquares):
    """Removes what the metadata explain of the log-variance of the features' residuals: ``MetadataNorm(scale=True)``.

    With the residual `r` of the regression on metadata, labels and intercept, fits
    ``log r² = m·γ_m + y·γ_y + γ_0 + noise`` (Harvey 1976) on running moments, and returns
    ``f̄ + (f − f̄) · exp(−½ (m − m̄)·γ_m)``, the factor kept within 1/10 and 10. For metadata that are sites this is
    ComBat's division by the site's scale (Johnson et al. 2007), for continuous metadata its smooth form.

    A sample that pulls the fit to itself has a residual near zero whatever the variance: with its leverage `h`, the
    residual's variance is 1 − h times that of the noise. So ``log r² / (1 − h)`` is fitted, with the weight 1 − h. Of one
    sample it is a noisy measure (its variance is π²/2): a prior on γ_m, one unit wide a standard deviation of metadata,
    holds the fit until there are clearly more than five.

    The features are scaled about their overall mean, since the label, which would give each class a mean of its own, is
    not there in evaluation. The factors are constants for the gradient.

    Attributes
    ----------
    log_gram, log_cross, log_weight : (K, K), (K, D), (1,) buffers
        Running moments of the design and ``log r²``.
    coefficients : (K_m, *num_features) buffer
        γ_m.
    """

    log_gram: Tensor
    log_cross: Tensor
    log_weight: Tensor

    def __init__(self, num_metadata: int, num_labels: int, num_features: tuple[int, ...], *, window: float = 2000, **options: Any) -> None:
        super().__init__(num_metadata, num_labels, num_features, window=window, adjoint="none", prior=0.0, **options)
        self.add_state("log_gram", *self.gram.shape, precise=True)
        self.add_state("log_cross", *self.cross.shape)
        self.add_state("log_weight", 1, precise=True)

    def _step(self, features: Tensor, batch: Batch) -> Tensor:
        p = self.num_protected
        with torch.no_grad():
            self.standardise(batch)
            rows = self.rows(batch.columns)
            if not is_recomputing():
                self._update(features.detach(), rows, batch)
        return self.evaluate(features, batch.columns[:, p:], batch.dims, batch.mask)

    def _update(self, features: Tensor, rows: Tensor, batch: Batch) -> None:
        p = self.num_protected
        count, _, gram, cross = batch_moments(features, rows, batch)
        kept = self.kept(count)
        used = advance(self.weight, kept, count, (self.gram, gram), (self.cross, cross))
        inverse = coefficient_operator(self.gram, p, dtype=self.cross.dtype, every=True)
        fitted = inverse.to(self.cross.dtype) @ self.cross
        squared = remove(features.to(fitted.dtype), rows, fitted, batch.dims).square()
        # A residual of zero (a dead unit) has no logarithm: the floor is a share of the mean over samples and positions.
        shares = batch_moments(squared, rows, batch)[3][p - 1]
        floor = 1e-6 * shares + torch.finfo(squared.dtype).tiny
        floor = floor.reshape(1, *[-1 if dim not in batch.dims else 1 for dim in range(1, squared.ndim)]) if batch.dims else floor.reshape(squared.shape[1:])
        left = 1 - (rows @ inverse * rows).sum(1) / self.weight.clamp_min(1e-30)
        left = torch.where(left > _LEAST_SHARE, left, 0.0)
        safe = left.clamp_min(_LEAST_SHARE).to(squared.dtype).reshape(-1, *[1] * (squared.ndim - 1))
        log = (squared + floor).log() - safe.log()
        weighted = batch._replace(weights=left if batch.weights is None else left * batch.weights)
        total, _, gram, cross = batch_moments(log, rows, weighted)
        # A batch that the first moments left out is left out here as well.
        cross = torch.where(torch.as_tensor(used), cross, torch.nan)
        advance(self.log_weight, kept, total, (self.log_gram, gram), (self.log_cross, cross))
        share = _LOG_NOISE / self.log_weight.clamp_min(_LEAST_SHARE)
        effect = coefficient_operator(self.log_gram, p, share) 
        self.coefficients.flatten(1).copy_(effect.to(self.log_cross.dtype) @ self.log_cross)
        self.mean.copy_(self.gram[p - 1, p:])

    def evaluate(self, features: Tensor, metadata: Tensor, dims: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
        """Remove the remembered effect of metadata columns (N, K_m) on the spread of features (N, ...)."""
        p, dtype = self.num_protected, compute_dtype(features)
        basis = ((metadata - self.origin[p:]) * self.scale[p:] - self.mean).to(dtype)
        effect = basis @ self.coefficients.flatten(1).to(dtype)
        factor = torch.exp(-0.5 * effect.clamp(-_LARGEST_EFFECT, _LARGEST_EFFECT))
        centre = self.cross[p - 1].to(dtype).unsqueeze(0)
        for dim in dims:
            factor, centre = factor.unsqueeze(dim), centre.unsqueeze(dim)
        if not dims:
            factor, centre = factor.reshape(features.shape), centre.reshape(1, *features.shape[1:])
        out = torch.lerp(centre.expand_as(features), features.to(dtype), factor).to(features.dtype)
        return out if mask is None else torch.where(mask, out, features)


# -- penalty --------------------------------------------------------------------------------------------------


class Penalty(Estimator):
    """β is a parameter, learned by the loss ``½ mean ‖f − x β‖²`` beside the network (PMDN).

    The loss sees the features as constants, the network sees β as a constant (Vento et al., MICCAI 2022, arXiv:2207.04607;
    there with two forward passes a step, here with one). Add it to the task's loss, and give the coefficients a learning
    rate of their own::

        optimizer = torch.optim.SGD(mdnorm.parameter_groups(model, penalty={"lr": 0.1}), lr=1e-3)
        loss = criterion(logits, labels) + mdnorm.penalty_loss(model)

    The parameter belongs to whitened columns, so that one learning rate suits all of them: with plain gradient descent a
    rate of η moves β by the share η towards the batch's estimate. Whitening takes the moments of the training set: call
    ``mdnorm.fit_gram`` first.

    Attributes
    ----------
    weight : (K, D) parameter
        Coefficients of the whitened columns, the last row the intercept.
    loss : tensor or None
        The loss of the last training forward: a scalar, summed over features.
    gram, gram_weight : (K, K), (1,) buffers
        ``E[z zᵀ]`` of the training set and the number of its samples.
    """

    gram: Tensor
    gram_weight: Tensor
    uses_training_gram: ClassVar[bool] = True

    def __init__(self, num_metadata: int, num_labels: int, num_features: tuple[int, ...], *, prior: float = 0.0, **options: Any) -> None:
        super().__init__(num_metadata, num_labels, num_features, **options)
        self.prior = float(prior)
        columns = num_labels + 1 + num_metadata
        self.add_state("gram", columns, columns, precise=True)
        self.add_state("gram_weight", 1, precise=True)
        self.weight = nn.Parameter(torch.zeros(columns, self.num_values, **self._placement))
        self.loss: Tensor | None = None

    def check_ready(self) -> None:
        """Raise RuntimeError where the moments of the training set are missing."""
        if is_readable(self.gram_weight) and not self.gram_weight.item():
            raise RuntimeError(
                "estimator='penalty' needs the Gram matrix of the training set before training: call "
                "mdnorm.fit_gram(model, metadata, labels) once with all training metadata (and labels)."
            )

    def _whitening(self) -> Tensor:
        """Return the (K, K) matrix that takes rows z to whitened columns and the intercept, in the order of z."""
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
        return root

    def _learned(self) -> Tensor:
        """Return the coefficients that the parameter stands for."""
        # What the parameter fits, as moments: the labels are protected as by every other estimator.
        through = self._operator(self.gram, self._share(self.gram_weight)) @ (self.gram @ self._whitening())
        return through.to(self.weight.dtype) @ self.weight.detach()

    def set_gram(self, moments: Moments) -> None:
        """Take the moments of the training set; what is learned already is put in its columns."""
        gram, _, weight = self._averages(moments)
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
        self.set_gram(moments)
        _, cross, _ = self._averages(moments)
        with torch.no_grad():
            self.weight.copy_(self._whitening().mT @ cross)
            self.coefficients.flatten(1).copy_(self._learned())

    def reset_parameters(self) -> None:
        """Forget the coefficients and the moments of the training set."""
        super().reset_parameters()
        self.loss = None
        nn.init.zeros_(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        # The last loss hangs on a graph, which can be neither copied nor saved.
        return super().__getstate__() | {"loss": None}

    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Leave the loss of the coefficients in `loss` and remove the effect that they show now."""
        self.check_ready()
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
        self.loss = 0.5 * total / count.clamp_min(1e-30).to(dtype)
        with torch.no_grad():
            self.coefficients.flatten(1).copy_(self._learned())
        return self.evaluate(features, batch.columns[:, self.num_protected :], dims, mask)

    def train(self, mode: bool = True) -> Penalty:
        """Set the mode; before evaluation `coefficients` becomes what the parameter says."""
        super().train(mode)
        if not mode and not self.weight.is_meta:
            with torch.no_grad():
                self.coefficients.flatten(1).copy_(self._learned())
        return self


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "batch": functools.partial(LeastSquares, gram="batch", adjoint="batch", averaging=0),
    "dataset": functools.partial(LeastSquares, gram="dataset", adjoint="batch", averaging=1),
    "running": LeastSquares,
    "recursive": functools.partial(LeastSquares, adjoint="none", averaging=0, prior_on_all=True),
    "penalty": Penalty,
}
"""The estimators of ``MetadataNorm(estimator=…)`` by name."""
