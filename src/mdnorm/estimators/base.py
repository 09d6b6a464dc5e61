"""The contract of an estimator: state, evaluation, and what a subclass has to say."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from mdnorm import functional
from mdnorm.context import is_recomputing
from mdnorm.distributed import GroupSetting, active_group
from mdnorm.functional import Gram
from mdnorm.weights import all_finite, at_least, positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting
    from mdnorm.weights import Weight

_UNKNOWN = (0,)  # feature shape of the empty buffers that stand in until the first features come


class Estimator(nn.Module, ABC):
    """Base class of the strategies that estimate the metadata's effect on the features.

    An estimator owns the state of its layer. A subclass implements `forward`, the training step: it returns
    the corrected features and updates `coefficients`. Evaluation is the same for all: the remembered
    coefficients times the metadata, no label needed.

    Parameters
    ----------
    momentum : float, None or "auto"
        Share of a new batch in the running state, 0 < momentum ≤ 1, as in `torch.nn.BatchNorm1d`; None
        keeps a cumulative average. The average is weighted by samples: a partial last batch counts for what
        it has, and the first batch counts in full (no bias towards the initial value). "auto" is the
        estimator's own choice: `default_momentum`, or `default_window` where it has one.
    window : float or None
        Instead of `momentum`, how many samples the running state looks back: a batch of n samples then
        has ``momentum = min(1, n / window)``, whatever the batch size. One to a few epochs is a good start.
    ridge : float
        See `mdnorm.functional.coefficient_operator`.
    center : bool
        Remove the intercept as well, as the authors' code does.
    device, dtype
        Where and in what precision the coefficients are kept (float32 at least), as for any torch layer.

    Raises
    ------
    TypeError
        `momentum`, `window` or `ridge` is not a number, or `dtype` not a floating-point one.
    ValueError
        One of them is out of its range.

    Attributes
    ----------
    coefficients : (R, *feature_shape) buffer
        What evaluation removes: β_m, and with `center` one more row, the intercept at the mean metadata.
        float32 at least.
    num_columns : (2,) buffer, float64
        K_m and K_y: a saved state describes itself, whatever `center` is.
    gram_mean, gram_covariance, gram_count : (K,), (K, K), (1,) buffers, float64
        The Gram matrix of the design (see `mdnorm.functional.Gram`), from the training set or running.
    """

    name: ClassVar[str]
    """How the estimator is called in ``MetadataNorm(estimator=…)``."""
    uses_training_gram: ClassVar[bool] = False
    """Whether `fit_gram` gives it the Gram matrix of the training set."""
    default_momentum: ClassVar[float | None] = 0.1
    default_window: ClassVar[float | None] = None

    precise: ClassVar[frozenset[str]] = frozenset(
        {"num_columns", "gram_mean", "gram_covariance", "gram_count"}
    )
    """Buffers of design statistics, which are small and kept in float64."""

    coefficients: Tensor
    placement: Tensor
    num_columns: Tensor
    gram_mean: Tensor
    gram_covariance: Tensor
    gram_count: Tensor

    def __init__(
        self,
        momentum: float | Literal["auto"] | None = "auto",
        ridge: float = 0.0,
        center: bool = False,
        *,
        window: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("momentum", momentum), ("window", window), ("ridge", ridge)):
            _check_number(argument, value)
        if momentum == "auto":
            momentum = self.default_momentum
            window = self.default_window if window is None else window
        elif window is not None:
            raise ValueError(
                f"momentum={momentum} and window={window} both say how long the running state looks back: "
                "give one of them."
            )
        if isinstance(momentum, str) or (momentum is not None and not 0 < momentum <= 1):
            raise ValueError(f"momentum must be in (0, 1], None or 'auto', got {momentum!r}.")
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge must be a finite number ≥ 0, got {ridge}.")
        if window is not None and not 0 < window < float("inf"):
            raise ValueError(f"window must be a positive number of samples or None, got {window}.")
        self.momentum = momentum
        self.window = window
        self.ridge = float(ridge)
        self.center = bool(center)
        self._is_claimed = False
        self._process_group = GroupSetting("auto")
        self._last_group: GroupSetting | None = None
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}.")
        for buffer in self.state_shapes(0, 0, ()):
            self.register_buffer(buffer, None)
        # Remembers device and dtype until the sizes are known; moved by `.to()` like any buffer.
        self.register_buffer("placement", torch.empty(0, device=device, dtype=dtype), persistent=False)

    # -- several processes ------------------------------------------------------------------------------

    @property
    def process_group(self) -> ProcessGroupSetting:
        """With which processes moments are shared in training; see `mdnorm.distributed.synchronize`."""
        value: ProcessGroupSetting = self._process_group.value
        return value

    @process_group.setter
    def process_group(self, value: ProcessGroupSetting) -> None:
        self._process_group = GroupSetting(value)

    def active_group(self) -> ProcessGroup | None:
        """Return the group to share moments in during this forward pass, None for this process alone."""
        if is_recomputing():
            # Activation checkpointing repeats the forward pass outside that of DistributedDataParallel.
            return cast("ProcessGroup | None", self._last_group.value if self._last_group else None)
        group = active_group(self._process_group.value)
        # Setting an attribute of a module takes a while: only where there is something to say.
        if group is not None or self._last_group is not None:
            self._last_group = None if group is None else GroupSetting(group)
        return group

    # -- state ------------------------------------------------------------------------------------------

    def state_shapes(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each buffer. A subclass with more state extends the dict.

        Buffers named in `precise` are kept in float64, the others in the layer's dtype.
        """
        columns = num_metadata + num_labels
        return {
            "num_columns": (2,),
            "gram_mean": (columns,),
            "gram_covariance": (columns, columns),
            "gram_count": (1,),
            "coefficients": (num_metadata + self.center, *feature_shape),
        }

    @property
    def is_claimed(self) -> bool:
        """Whether a layer has this instance: one state cannot serve the features of two."""
        return self._is_claimed

    def claim(self) -> None:
        """Make the instance the one of a layer."""
        self._is_claimed = True

    @property
    def knows_design(self) -> bool:
        """Whether the numbers of metadata and label columns are known (the Gram buffers exist)."""
        return self._buffers["gram_mean"] is not None

    @property
    def is_allocated(self) -> bool:
        """Whether all sizes are known and all buffers have their final shape."""
        return self.feature_shape is not None

    @property
    def num_metadata(self) -> int | None:
        """K_m, or None while unknown."""
        return self.sizes[0]

    @property
    def num_labels(self) -> int | None:
        """K_y, or None while unknown."""
        return self.sizes[1]

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """Shape of a sample's coefficients, or None while unknown."""
        return self.sizes[2]

    @property
    def sizes(self) -> tuple[int | None, int | None, tuple[int, ...] | None]:
        """`num_metadata`, `num_labels` and `feature_shape` in one."""
        coefficients, mean = self._buffers["coefficients"], self._buffers["gram_mean"]
        if coefficients is None or mean is None:
            return None, None, None
        num_metadata = coefficients.shape[0] - self.center
        shape = tuple(coefficients.shape[1:])
        return num_metadata, mean.shape[0] - num_metadata, None if shape == _UNKNOWN else shape

    def allocate(
        self, num_metadata: int, num_labels: int, feature_shape: tuple[int, ...] | None = None
    ) -> None:
        """Create the buffers, all zero, except those which exist in their final shape. Called by the layer.

        While `feature_shape` is unknown (None) the feature buffers are empty, and only the Gram matrix of
        the design can be stored.
        """
        device = self.placement.device
        dtype = torch.promote_types(self.placement.dtype, torch.float32)
        shape = _UNKNOWN if feature_shape is None else feature_shape
        for name, size in self.state_shapes(num_metadata, num_labels, shape).items():
            old = self._buffers[name]
            if old is not None and old.shape == size:
                continue
            precision = functional.statistics_dtype(device) if name in self.precise else dtype
            # A state made under inference mode could never be trained on.
            with torch.inference_mode(False):
                self._buffers[name] = torch.zeros(size, device=device, dtype=precision)
        with torch.inference_mode(False), torch.no_grad():
            self.num_columns[0], self.num_columns[1] = num_metadata, num_labels

    @property
    def gram(self) -> Gram:
        """The Gram matrix in the buffers."""
        return Gram(self.gram_mean, self.gram_covariance, self.gram_count, self.num_metadata or 0)

    def set_gram(self, gram: Gram) -> None:
        """Store a Gram matrix (of the training set)."""
        expected = self.gram_mean.shape[0]
        if gram.num_metadata != self.num_metadata or gram.mean.shape[0] != expected:
            raise ValueError(
                f"the Gram matrix has {gram.num_metadata} metadata and "
                f"{gram.mean.shape[0] - gram.num_metadata} label columns, the layer has "
                f"num_metadata={self.num_metadata} and num_labels={self.num_labels}."
            )
        if self.center and self.is_allocated:
            # The removed intercept is the one at the mean metadata: the same line, seen from the new mean.
            columns = self.coefficients.shape[0] - 1
            step = (gram.mean - self.gram_mean)[:columns].to(self.coefficients.dtype)
            with torch.no_grad():
                self.coefficients[-1] += torch.tensordot(step, self.coefficients[:-1], 1)
        self._store_gram(gram)

    @torch.no_grad()
    def _store_gram(self, gram: Gram) -> None:
        self.gram_mean.copy_(gram.mean)
        self.gram_covariance.copy_(gram.covariance)
        self.gram_count.copy_(gram.count)

    @torch.no_grad()
    def set_moments(self, gram: Gram, moments: Tensor) -> None:
        """Replace the state by the exact least-squares fit of given moments (`mdnorm.recalibrate`).

        Parameters
        ----------
        gram : Gram
            Of the design columns.
        moments : (K + 1, D) tensor
            ``[E[(x − μ) fᵀ]; E[fᵀ]]`` over the same samples, μ the mean of `gram`.
        """
        self.set_gram(gram)
        operator = functional.removal_operator(gram, ridge=self.ridge, center=self.center)
        self.coefficients.flatten(1).copy_(operator.to(moments.dtype) @ moments)

    def lasting(self, count: Tensor) -> Tensor:
        """Return what a state from `count` samples weighs against those to come: no more than the window."""
        return count if self.window is None else count.clamp_max(self.window)

    def check_ready(self) -> None:
        """Raise RuntimeError where something must be given before training. Nothing by default."""

    def reset(self) -> None:
        """Forget everything learned: all statistics back to zero; the sizes stay."""
        num_metadata, num_labels, _ = self.sizes
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.zero_()
            # Written again, since `to_empty` leaves anything there.
            if num_metadata is not None and num_labels is not None:
                self.num_columns[0], self.num_columns[1] = num_metadata, num_labels

    def reset_parameters(self) -> None:
        """`reset`, under the name that torch calls after `torch.nn.Module.to_empty`."""
        self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Estimator:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            # model.half() and model.bfloat16() move the state to the new device but never below float32, and
            # model.float() leaves the statistics of the design in float64.
            if torch.finfo(new.dtype).bits < 32 or (name in self.precise and new.dtype != old.dtype):
                # There is nothing to copy from meta: this is `to_empty`.
                new = torch.empty_like(old, device=new.device) if old.is_meta else old.to(new.device)
            # model.to(memory_format=...) restrides 4-d buffers; the updates need the plain layout.
            self._buffers[name] = new.contiguous()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        if version is not None and version > self._version:
            raise RuntimeError(
                f"this checkpoint of {type(self).__name__} has version {version}; this mdnorm reads up to "
                f"version {self._version}: update mdnorm."
            )
        self._upgrade(state_dict, prefix)
        coefficients, widths = state_dict.get(prefix + "coefficients"), state_dict.get(prefix + "num_columns")
        if not self.is_allocated and coefficients is not None and widths is not None:
            # Averages of checkpoints (EMA, soups) may have them a rounding off.
            num_metadata, num_labels = (round(float(width)) for width in widths)
            self.allocate(num_metadata, num_labels, tuple(coefficients.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        # load_state_dict(assign=True) takes tensors as they are, and a checkpoint may be in half precision.
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._non_persistent_buffers_set:
                self._buffers[name] = buffer.to(self._least_dtype(name, buffer))

    def _least_dtype(self, name: str, buffer: Tensor) -> torch.dtype:
        """Return the dtype that a buffer may have: its own, if not below what its statistics need."""
        precise = name in self.precise
        least = functional.statistics_dtype(buffer.device) if precise else torch.float32
        return torch.promote_types(buffer.dtype, least)

    def _upgrade(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Add what states saved by earlier layouts lack, where it follows from the rest."""
        coefficients, mean = state_dict.get(prefix + "coefficients"), state_dict.get(prefix + "gram_mean")
        if prefix + "num_columns" in state_dict or coefficients is None or mean is None:
            return
        num_metadata = coefficients.shape[0] - self.center
        widths = [num_metadata, mean.shape[0] - num_metadata]
        state_dict[prefix + "num_columns"] = torch.tensor(widths, dtype=mean.dtype)

    _version = 1

    # -- running averages -------------------------------------------------------------------------------

    def usable(self, moments: Tensor, num_samples: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch's moments, in the dtype of the state, and the number of samples they count for.

        An overflowed step of mixed-precision training must not enter the state, since it would never leave:
        where a moment is not finite, all of them come back as zero and count for nothing. (No branch, so
        nothing waits for a GPU.)

        A batch that activation checkpointing runs again is in the state already, and counts for nothing.
        """
        moments, count = self.weigh(moments, num_samples)
        if isinstance(count, Tensor):
            return moments, count
        return moments, torch.full((1,), count, dtype=self.gram_count.dtype, device=moments.device)

    def weigh(self, moments: Tensor, num_samples: int | Tensor) -> tuple[Tensor, Weight]:
        """Return what `usable` does, the number of samples as a plain number where that costs nothing."""
        finite = all_finite(moments)
        dtype = self.coefficients.dtype
        if not isinstance(finite, Tensor):
            if finite and not is_recomputing():
                return (moments if moments.dtype == dtype else moments.to(dtype)), float(num_samples)
            return torch.zeros_like(moments, dtype=dtype), 0.0
        if is_recomputing():
            finite = torch.zeros_like(finite)
        if isinstance(num_samples, Tensor):
            count = num_samples.to(self.gram_count.dtype)
        else:
            count = torch.full((1,), num_samples, dtype=self.gram_count.dtype, device=moments.device)
        return torch.where(finite, moments, 0.0).to(dtype), torch.where(finite, count, 0.0)

    @overload
    def decay(self, count: Tensor) -> Tensor: ...

    @overload
    def decay(self, count: Weight) -> Weight: ...

    def decay(self, count: Weight) -> Weight:
        """Return what a batch of `count` samples leaves of the weight of the past: an empty one, all."""
        if self.window is not None:
            return at_least(1 - count / self.window, 0.0)
        return positive(count, 1.0 if self.momentum is None else 1.0 - self.momentum, 1.0)

    # -- forward ----------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, features: Tensor, columns: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Training step: update the state and return the corrected features.

        Parameters
        ----------
        features : (N, ...) tensor
        columns : (N, K) tensor, float64
            Checked design columns [m, y].
        positions : tuple of int
            Dimensions that share a coefficient.
        """

    def evaluate(self, features: Tensor, metadata: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Remove the remembered effect of the metadata columns (N, K_m) from features (N, ...)."""
        basis = functional.effect_basis(metadata, self.gram_mean[: metadata.shape[1]], self.center)
        return functional.remove_effect(features, basis, self.coefficients.flatten(1), positions)

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        memory = f"momentum={self.momentum}" if self.window is None else f"window={self.window}"
        return f"{memory}, ridge={self.ridge}, center={self.center}"


def _check_number(argument: str, value: object) -> None:
    if value is None and argument != "ridge":
        return
    if isinstance(value, str) and argument == "momentum":
        return
    # A bool is a number to Python, and never meant as one here.
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        wanted = {"momentum": "a number, None or 'auto'", "window": "a number or None", "ridge": "a number"}
        raise TypeError(f"{argument} must be {wanted[argument]}, got {value!r}.")


def refuse_compiled_checkpoint(setting: str) -> None:
    """Raise where `torch.compile` traces an estimator inside of an activation-checkpointed part.

    Compiled code repeats the part with the state that the batch has already entered, and nothing in it can
    tell the two runs apart. An estimator that takes its coefficients from the state calls this in training.

    Parameters
    ----------
    setting : str
        What asks for the estimator, for the message: ``estimator='running'``.

    Raises
    ------
    RuntimeError
        While tracing (as a subclass of it, torch's own, with this message in it).
    """
    if torch.compiler.is_compiling():
        _refuse_traced_checkpoint(setting)


def _refuse_traced_checkpoint(setting: str) -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:  # torch.export(strict=False) runs this code itself
        return False
    while tracer is not None:
        if "activation_checkpoint" in str(getattr(tracer, "source_target", "")):
            raise RuntimeError(
                f"{setting} cannot train inside of an activation-checkpointed part of a compiled model: "
                "the part is repeated with the state that the batch has already entered, and the gradient "
                "would be wrong. Keep the layer out of the checkpointed part (it saves only the design for "
                "its backward pass), or take estimator 'batch' or 'dataset' without scale."
            )
        tracer = tracer.parent
    return False


# What torch.compiler.assume_constant_result does, without its import of the compiler: the function is run
# while tracing, where the part that is being traced is known.
_refuse_traced_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]
