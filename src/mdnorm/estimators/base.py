"""The contract of an estimator: state, evaluation, and what a subclass has to say."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mdnorm.arrays import is_traced, statistics_dtype
from mdnorm.distributed import all_reduce_sum
from mdnorm.moments import Moments
from mdnorm.regression import (
    Standardisation,
    as_matrix,
    coefficient_operator,
    compute_dtype,
    is_eager,
    prior_share,
    remove,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Batch(NamedTuple):
    """What an estimator learns from beside the features."""

    columns: Tensor  # (N, K) checked design columns ``[y, 1, m]``, float64
    weights: Tensor | None  # (N,) of the samples, in the dtype of the columns
    dims: tuple[int, ...]  # of the features that share a coefficient: `mdnorm.regression.position_dims`
    mask: Tensor | None  # (N, 1, ...) bool: the positions that count
    group: ProcessGroup | None  # processes whose samples are one batch
    eager: bool  # see `mdnorm.regression.is_eager`
    repeated: bool  # activation checkpointing runs the batch again: it is in the state already
    checked: bool = True  # whether values that are not finite are errors


class Estimator(nn.Module, ABC):
    """Base class of the strategies that estimate the metadata's effect, and owner of a layer's state.

    A subclass implements `forward`, the training step, which updates `coefficients` and `mean`.

    Parameters
    ----------
    num_metadata, num_labels, num_features, center, device, dtype
        As in `mdnorm.MetadataNorm`, with all sizes known: K_m, K_y, and a shape of D values.

    Attributes
    ----------
    origin, scale : (K,) buffers, float64
        What the columns ``[y, 1, m]`` are measured from and in, fixed by the first batch or the training set;
        a scale of 0 before.
    coefficients : (R, *num_features) buffer
        What evaluation removes: β_m in these units and, with `center`, the intercept at `mean`.
    mean : (K_m,) buffer, float64
        Metadata at which nothing is removed, in these units.
    """

    origin: Tensor
    scale: Tensor
    coefficients: Tensor
    mean: Tensor
    prior: float = 0.0

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
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self._placement: Any = {"device": device, "dtype": dtype}
        columns = num_labels + 1 + num_metadata
        self.add_state("origin", columns, precise=True)
        self.add_state("scale", columns, precise=True)
        self.add_state("mean", num_metadata, precise=True)
        self.add_state("coefficients", num_metadata + self.center, *self.num_features)

    def add_state(self, name: str, *shape: int, precise: bool = False) -> None:
        """Register a buffer of zeros; a precise one is kept in float64."""
        zeros = torch.zeros(shape, **self._placement)
        if precise:
            self._precise.add(name)
            zeros = zeros.to(statistics_dtype(zeros.device))
        self.register_buffer(name, zeros)

    @property
    def num_protected(self) -> int:
        """K_y + 1, number of labels and intercept."""
        return self.num_labels + 1

    @property
    def is_standardised(self) -> Tensor:
        """Whether origin and scale of the columns are known."""
        return self.scale[self.num_labels] > 0

    def standardise(self, batch: Batch) -> None:
        """Fix origin and scale by this batch where nothing has before."""
        # Looked for in the state only until it is there. `functional_call` has another state each time, and
        # of what a process did alone the others of a group know nothing.
        known = self.__dict__.get("_standardised")
        if known is not None and known.get(batch.group) is self.scale:
            return
        units = Standardisation.of(batch.columns, self.num_labels, batch.weights, batch.group)
        # A batch without samples, or with NaN that nobody looked for, has none to give.
        is_kept = self.is_standardised | ~units.origin.isfinite().all()
        self.origin.copy_(torch.where(is_kept, self.origin, units.origin))
        self.scale.copy_(torch.where(is_kept, self.scale, units.scale))
        if not is_traced() and self.is_standardised:
            # Not by setattr, which looks for parameters, buffers and modules first.
            self.__dict__.setdefault("_standardised", {})[batch.group] = self.scale

    def set_units(self, units: Standardisation) -> None:
        """Fix origin and scale of the columns."""
        with torch.no_grad():
            self.origin.copy_(units.origin)
            self.scale.copy_(units.scale)

    def rows(self, columns: Tensor) -> Tensor:
        """Return design columns about the origin, in units of the scale."""
        # By their dict: looked up as attributes, buffers take as long as the arithmetic of a small batch.
        return (columns - self._buffers["origin"]) * self._buffers["scale"]  # type: ignore[operator]

    def require_gram(self, weight: Tensor, name: str) -> None:
        """Raise RuntimeError where the moments of the training set, whose weight this is, are missing."""
        if is_eager(weight) and not weight.item():
            raise RuntimeError(
                f"estimator={name!r} needs the Gram matrix of the training set: call mdnorm.fit_gram(model, "
                "metadata, labels) first."
            )

    @abstractmethod
    def forward(self, features: Tensor, batch: Batch) -> Tensor:
        """Training step: update the state and return the corrected features (N, ...)."""

    def evaluate(
        self, features: Tensor, metadata: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Tensor:
        """Remove the remembered effect of metadata columns (N, K_m) from features (N, ...)."""
        basis = self._basis(self._metadata_rows(metadata), self.mean)
        return remove(features, basis, self.coefficients.flatten(1), dims, mask)

    def _metadata_rows(self, metadata: Tensor) -> Tensor:
        p = self.num_protected
        return (metadata - self.origin[p:]) * self.scale[p:]

    def _basis(self, metadata: Tensor, mean: Tensor) -> Tensor:
        basis = metadata - mean
        return torch.cat([basis, torch.ones_like(basis[:, :1])], 1) if self.center else basis

    def set_moments(self, moments: Moments) -> None:
        """Replace the coefficients by the least-squares fit of given moments (`mdnorm.recalibrate`)."""
        self._fit(*self._averages(moments))

    def _fit(self, gram: Tensor, cross: Tensor, weight: float) -> None:
        with torch.no_grad():
            operator = self._operator(gram, prior_share(self.prior, weight))
            self.coefficients.flatten(1).copy_(operator @ cross)
            self.mean.copy_(gram[self.num_labels, self.num_protected :])

    def set_gram(self, moments: Moments) -> None:
        """Take from the moments of the training set (`mdnorm.fit_gram`) what is of use: here, the units."""
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
        gram, cross = moments.averages(units)
        return gram.to(self.origin), cross.to(self.origin), moments.weight

    def _operator(self, gram: Tensor, share: float | Tensor) -> Tensor:
        """Return what takes ``E[z fᵀ]`` to the coefficients that are removed, (R, K)."""
        p = self.num_labels + 1
        rows = coefficient_operator(gram, p, share, dtype=self.coefficients.dtype, every=self.center)
        if not self.center:
            return rows
        # The intercept at the mean metadata and at label 0: the label part always stays.
        at = torch.cat([-(self.origin * self.scale)[: p - 1], gram[p - 1, p - 1 :]])
        at[p - 1] = 1
        return torch.cat([rows[p:], (at @ rows).unsqueeze(0)])

    def reset_parameters(self) -> None:
        """Forget everything learned: all state back to zero, the sizes stay."""
        self.__dict__.pop("_standardised", None)
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Estimator:
        precise = {id(self._buffers[name]) for name in self._precise}

        def apply(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            # model.half() moves the state but leaves it at float32 and above, model.float() the statistics
            # at float64.
            if torch.finfo(new.dtype).bits < 32 or (id(tensor) in precise and new.dtype != tensor.dtype):
                # There is nothing to copy from meta: this is `to_empty`.
                new = torch.empty_like(tensor, device=new.device) if tensor.is_meta else tensor.to(new.device)
            # model.to(memory_format=...) restrides 4-d buffers; the updates need the plain layout.
            return new.contiguous()

        return cast(Estimator, super()._apply(apply, recurse))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__.pop("_standardised", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        # load_state_dict(assign=True) takes tensors as they are, and a checkpoint may be in half precision.
        for name, tensor in [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]:
            least = statistics_dtype(tensor.device) if name in self._precise else torch.float32
            exact = tensor.detach().to(torch.promote_types(tensor.dtype, least))
            if exact.dtype != tensor.dtype:
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(self, name, nn.Parameter(exact, tensor.requires_grad) if is_parameter else exact)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_standardised"}


def batch_moments(
    features: Tensor, rows: Tensor, batch: Batch
) -> tuple[float | Tensor, Tensor, Tensor, Tensor]:
    """Return weight, weighted rows (K, N), ``E[z zᵀ]`` and ``E[z fᵀ]`` of a batch, of its whole group."""
    dtype, weights = compute_dtype(features), batch.weights
    weighted = (rows if weights is None else rows * weights.unsqueeze(1)).mT
    count: float | Tensor = float(rows.shape[0]) if weights is None else weights.sum().reshape(1)
    if isinstance(count, Tensor) and batch.group is None and batch.eager:
        count = count.item()
    matrix = as_matrix(features.detach(), batch.dims, batch.mask, dtype)
    if batch.group is None:
        scaled = weighted / (count.clamp_min(1e-30) if isinstance(count, Tensor) else count or 1.0)
        left = scaled.to(dtype)
        return count, left, scaled @ rows, left @ matrix
    # In float64: in float32, a direction of exactly collinear columns would seem to vary.
    sums = [
        (weighted @ rows).flatten(),
        (weighted.to(dtype) @ matrix).flatten().to(rows.dtype),
        rows.new_full((1,), 1.0) * count,
    ]
    gram, cross, total = all_reduce_sum(torch.cat(sums), batch.group).split([part.numel() for part in sums])
    divisor = total.clamp_min(1e-30)
    gram, cross = gram.view(len(weighted), -1) / divisor, (cross.view(len(weighted), -1) / divisor).to(dtype)
    return total, (weighted / divisor).to(dtype), gram, cross
