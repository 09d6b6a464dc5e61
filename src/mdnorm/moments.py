"""Moments of a data set, additive over its rows: of blocks or partitions of tables, of loaders, of processes.

Sums about the mean lose no digits where values are far from zero (a year, a count of photons), whatever rows
came first. Two sets of rows add up once both sums are taken about the joint mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdnorm.arrays import as_real_array, checked_weights, raise_not_finite, statistics_dtype
from mdnorm.regression import Standardisation, coefficient_operator

# Values of the features that are added up in one step: 1 MiB in float64, which stays in the cache.
_STEP_VALUES = 2**17
# Rows whose mean is near enough to that of all rows to sum about it.
_NEAR_ROWS = 32


class NoSamplesError(ValueError):
    """Statistics of a data set without a sample."""


class Products(NamedTuple):
    """What `Moments` hold in the order ``x = [m, y]`` of the design, without an intercept; NumPy, float64."""

    design_mean: Any  # (K,)
    feature_mean: Any  # (D,)
    gram: Any  # (K, K)
    cross: Any  # (K, D)
    squares: Any  # (D,)


@dataclass
class Moments:
    """Weighted means and sums of products about them: all that least squares needs of a data set, in float64.

    Start with `Moments.empty`, add rows with `update`, put parts together with `merge`, get coefficients with
    `solve`.

    Attributes
    ----------
    num_metadata : int
        K_m, the number of metadata columns; the others are protected.
    weight : float
        Sum of the weights; the number of rows where none were given.
    num_rows : int
        Number of rows of positive weight.
    mean, feature_mean : (2, K + 1), (2, D) tensors
        Of the rows ``x = [y, 1, m]`` (protected columns, intercept, metadata) and of the features, each the
        sum of two numbers: differences of means far from zero would lose digits otherwise.
    gram, cross, squares : (K + 1, K + 1), (K + 1, D), (D,) tensors
        ``Σ w (x − x̄)(x − x̄)ᵀ``, ``Σ w (x − x̄)(f − f̄)ᵀ`` and ``Σ w (f − f̄)²``. No tensor is changed in place.

    References
    ----------
    Chan, Golub & LeVeque, Algorithms for computing the sample variance, The American Statistician 37 (1983).
    """

    num_metadata: int
    weight: float
    num_rows: int
    mean: Tensor
    feature_mean: Tensor
    gram: Tensor
    cross: Tensor
    squares: Tensor
    # Names of the columns of "features" and "design" where `update` got tables that have them; not saved.
    _names: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False, kw_only=True)

    @classmethod
    def empty(
        cls, num_features: int, num_metadata: int, num_protected: int = 0, device: torch.device | str = "cpu"
    ) -> Moments:
        """Return the moments of no rows of D features, K_m metadata columns and K_y protected ones."""
        columns = num_metadata + num_protected + 1
        shapes = (2, columns), (2, num_features), (columns, columns), (columns, num_features), (num_features,)
        dtype = statistics_dtype(torch.device(device))
        sums = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        return cls(num_metadata, 0.0, 0, *sums)

    @property
    def num_protected(self) -> int:
        """K_y + 1: protected columns and intercept, the first ones of a row."""
        return len(self.gram) - self.num_metadata

    @property
    def units(self) -> Standardisation | None:
        """Mean and inverse standard deviation of the columns; None without rows."""
        if self.weight == 0:
            return None
        variance = self.gram.diagonal() / self.weight
        return Standardisation.of_moments(self.mean.sum(0), variance, self.num_protected - 1)

    def update(self, features: Any, design: Any, weights: Any = None) -> Moments:
        """Add rows, in place.

        Parameters
        ----------
        features : (n, D) tensor or array
            Of any real dtype; n may be 0.
        design : (n, K) tensor or array
            Columns [m, y]: metadata, then protected ones.
        weights : (n,) tensor or array, optional
            Not negative; a row of weight 2 counts as two rows, one of weight 0 as none.

        Returns
        -------
        Moments
            Itself; after an error as it was before.

        Raises
        ------
        ValueError
            Shapes that do not fit, NaN or infinite values, negative weights, values whose squares overflow,
            a DataFrame with other columns, or in another order, than one before.
        """
        names = self._checked_names(
            {
                what: tuple(table.columns)
                for what, table in (("features", features), ("design", design))
                if hasattr(table, "columns")
            }
        )
        values, columns = _table(features, "features", self.cross), _table(design, "design", self.gram[1:])
        if len(values) != len(columns):
            raise ValueError(f"features has {len(values)} rows and design {len(columns)}: give one row each.")
        weight = None if weights is None else checked_weights(weights, len(values), self.gram)
        if weight is not None and not bool((weight > 0).all()):
            used = weight > 0
            values, columns, weight = values[used], columns[used], weight[used]
        if len(values):
            vars(self).update(vars(self.merge(self._of(values, columns.to(self.gram), weight))))
        self._names = names
        return self

    def _checked_names(self, names: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for what, columns in names.items():
            known = self._names.get(what, columns)
            if known != columns:
                raise ValueError(
                    f"{what} has the columns {list(columns[:10])}, before it had {list(known[:10])}: give "
                    "the same ones in the same order."
                )
        return {**self._names, **names}

    def _of(self, values: Tensor, columns: Tensor, weight: Tensor | None) -> Moments:
        """Return the moments of rows, at least one, of positive weight."""
        total, k, one = len(values), self.num_metadata, self.num_protected - 1
        # The products are fastest with a row of memory for each design column, and features as they lie.
        left = torch.cat([columns[:, k:].mT, columns.new_ones(1, total), columns[:, :k].mT])
        near = left.mean(1) if weight is None else left @ weight / weight.sum()
        near[one] = 0
        left -= near.unsqueeze(1)
        right = left if weight is None else left * weight
        gram = left @ right.mT
        # Of rows that stand for equal weights. What the sums leave of the mean is taken out below.
        some = min(_NEAR_ROWS, total)
        at = (torch.arange(some, dtype=gram.dtype, device=gram.device) + 0.5) * (gram[one, one] / some)
        chosen = torch.searchsorted(right[one].cumsum(0), at).clamp_max(total - 1)
        feature_near = values[chosen].to(gram.dtype).mean(0)
        by_columns = values.stride(0) < values.stride(1)
        step = max(64, _STEP_VALUES // max(values.shape[1], 1))
        buffer = gram.new_empty((values.shape[1], step) if by_columns else (step, values.shape[1]))
        cross, squares = torch.zeros_like(self.cross), torch.zeros_like(self.squares)
        cross = cross.mT.contiguous() if by_columns else cross
        for start in range(0, total, step):
            part, rows = values[start : start + step], right[:, start : start + step]
            if by_columns:
                block = buffer[:, : len(part)].copy_(part.mT).sub_(feature_near.unsqueeze(1))
                cross.addmm_(block, rows.mT)
                squares += block.square_() @ rows[one]
            else:
                block = buffer[: len(part)].copy_(part).sub_(feature_near)
                cross.addmm_(rows, block)
                squares += rows[one] @ block.square_()
        cross = cross.mT.contiguous() if by_columns else cross
        if not math.isfinite(float(squares.sum() + gram.sum() + cross.sum())):
            raise_not_finite(gram.dtype, features=values, design=columns)
        mass = float(gram[one, one])
        rest, feature_rest = gram[one] / mass, cross[one] / mass
        gram, cross = gram.addr(rest, rest, alpha=-mass), cross.addr(rest, feature_rest, alpha=-mass)
        gram[one], gram[:, one], cross[one] = 0, 0, 0
        squares = (squares - mass * feature_rest.square()).clamp_min(0)
        mean, feature_mean = torch.stack([near, rest]), torch.stack([feature_near, feature_rest])
        return Moments(k, mass, total, mean, feature_mean, gram, cross, squares)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows; ValueError where numbers or names of columns differ."""
        mine, theirs = ((part.num_metadata, *part.cross.shape) for part in (self, other))
        if mine != theirs:
            raise ValueError(
                "only moments of the same columns can be merged: (metadata columns, design columns with "
                f"intercept, features) are {mine} and {theirs}."
            )
        names = self._checked_names(other._names)
        if self.weight == 0 or other.weight == 0:
            return replace(self if other.weight == 0 else other, _names=names)
        share = other.weight / (self.weight + other.weight)
        step, feature_step = (other.mean - self.mean).sum(0), (other.feature_mean - self.feature_mean).sum(0)
        # What both sums have about the joint mean beyond those about their own.
        between = self.weight * share
        return Moments(
            self.num_metadata,
            self.weight + other.weight,
            self.num_rows + other.num_rows,
            torch.stack([self.mean[0], self.mean[1] + share * step]),
            torch.stack([self.feature_mean[0], self.feature_mean[1] + share * feature_step]),
            (self.gram + other.gram).addr_(step, step, alpha=between),
            (self.cross + other.cross).addr_(step, feature_step, alpha=between),
            (self.squares + other.squares).addcmul_(feature_step, feature_step, value=between),
            _names=names,
        )

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device."""
        moved: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, **moved)

    def averages(self, units: Standardisation) -> tuple[Tensor, Tensor]:
        """Return ``E[z zᵀ]`` and ``E[z fᵀ]`` of rows ``z = (x − origin) · scale``."""
        mean = (self.mean[0] - units.origin + self.mean[1]) * units.scale
        gram = self.gram / self.weight * (units.scale.unsqueeze(1) * units.scale)
        cross = self.cross / self.weight * units.scale.unsqueeze(1)
        return gram.addr_(mean, mean), cross.addr_(mean, self.feature_mean.sum(0))

    def products(self) -> Products:
        """Return means and sums of products in the order [m, y] of the design."""
        order = self._order
        means, gram = (self.mean.sum(0)[order], self.feature_mean.sum(0)), self.gram[order][:, order]
        return Products(*(part.numpy(force=True) for part in (*means, gram, self.cross[order], self.squares)))

    def solve(self, ridge: float = 0.0, units: Standardisation | None = None) -> Any:
        """Return the least-squares coefficients of the columns [m, y], a (K, D) float64 array.

        Parameters
        ----------
        ridge : float
            λ ≥ 0, added to the variance of each standardised metadata column. Neither the intercept nor the
            protected columns are penalised.
        units : Standardisation, optional
            A column whose deviation is nothing beside this scale is constant. None: the units of these rows.

        Raises
        ------
        ValueError
            There are no rows, or `ridge` is negative.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {ridge}.")
        return (self._inverse(ridge, units) @ self.cross).numpy(force=True)

    def inverse(self, units: Standardisation | None = None) -> Any:
        """Return the generalised inverse of the Gram matrix of the columns [m, y], (K, K), float64.

        Times the residual variance it is the covariance of the coefficients that `solve` returns without a
        ridge. `units` are as for `solve`; ValueError where there are no rows.
        """
        return self._inverse(0.0, units)[:, self._order].numpy(force=True)

    @property
    def _order(self) -> list[int]:
        # From [y, 1, m] to [m, y].
        return [*range(self.num_protected, len(self.gram)), *range(self.num_protected - 1)]

    def _inverse(self, ridge: float, units: Standardisation | None) -> Tensor:
        units, p = units or self.units, self.num_protected
        if units is None:
            raise NoSamplesError("no rows: coefficients need at least one update.")
        scale = units.scale.unsqueeze(1) * units.scale / self.weight
        gram = self.gram * scale
        gram[p - 1, p - 1] = 1
        # Without metadata, protected columns and intercept are all that is fitted.
        share = ridge if self.num_metadata else 0.0
        operator = coefficient_operator(gram, p, share, dtype=gram.dtype, every=True)
        return (operator * scale)[self._order]

    def to_arrays(self) -> dict[str, Any]:
        """Return the state as arrays by name, for ``numpy.savez`` or JSON (``.tolist()``)."""
        return {
            name: value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
            for name, value in vars(self).items()
            if name != "_names"
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Moments:
        """Return the moments that `to_arrays` gave; ValueError for missing, unknown or misshapen arrays."""
        names = {part.name for part in fields(cls)} - {"_names"}
        if set(arrays) != names:
            raise ValueError(
                f"these are not the arrays of Moments: missing {sorted(names - set(arrays))}, unknown "
                f"{sorted(set(arrays) - names)}."
            )
        values: dict[str, Any] = {
            name: torch.tensor(np.array(value, np.float64)) for name, value in arrays.items()
        }
        numbers = [values.pop(name).item() for name in ("num_metadata", "weight", "num_rows")]
        like = cls.empty(values["squares"].numel(), values["mean"].numel() // 2 - 1)
        for name, value in values.items():
            if value.shape != getattr(like, name).shape:
                shape = tuple(getattr(like, name).shape)
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
        return cls(int(numbers[0]), numbers[1], int(numbers[2]), **values)


def _table(values: Any, name: str, like: Tensor) -> Tensor:
    width = like.shape[1] if name == "features" else len(like)
    tensor = values.detach() if isinstance(values, Tensor) else _shared(as_real_array(values, name))
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape (num_rows, num_columns), got {tuple(tensor.shape)}.")
    if tensor.shape[1] != width:
        raise ValueError(f"{name} has {tensor.shape[1]} column(s), these moments have {width}.")
    return tensor


def _shared(array: Any) -> Tensor:
    """Return an array as a tensor, without a copy where a tensor can have its memory."""
    dtype = array.dtype.newbyteorder("=")
    if dtype.itemsize > 8 or (dtype.kind == "u" and dtype.itemsize > 1):
        dtype = np.dtype(np.float64)
    is_shared = array.dtype == dtype and array.flags.writeable and all(step >= 0 for step in array.strides)
    return torch.from_numpy(array if is_shared else np.array(array, dtype))
