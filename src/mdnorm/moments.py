"""Moments of a data set, additive over its rows: of tables in blocks or partitions, of a loader, of several processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdnorm.arrays import as_real_array
from mdnorm.regression import Standardisation, coefficient_operator, statistics_dtype

__all__ = ["Moments", "NoSamplesError", "Products"]

# Values of the features that are added up in one step: 1 MiB in float64, which stays in the cache.
_STEP_VALUES = 2**17


class NoSamplesError(ValueError):
    """Statistics of a data set without a sample."""


class Products(NamedTuple):
    """Means and centred sums of products of a data set, in the units of its columns `x = [m, y]`; NumPy, float64.

    Attributes
    ----------
    design_mean, feature_mean : (K,) and (D,) arrays
    gram, cross, feature_squares : (K, K), (K, D) and (D,) arrays
        ``Σ w (x − x̄)(x − x̄)ᵀ``, ``Σ w (x − x̄)(f − f̄)ᵀ`` and ``Σ w (f − f̄)²``.
    """

    design_mean: Any
    feature_mean: Any
    gram: Any
    cross: Any
    feature_squares: Any


@dataclass
class Moments:
    """Weighted sums of products of design rows and features: all that least squares needs of a data set, in float64.

    Start with `Moments.empty`, add rows with `update`, put parts together with `merge`, get coefficients with `solve`.
    The size does not depend on the number of rows.

    Attributes
    ----------
    num_metadata : int
        K_m, the number of metadata columns; the others are protected.
    units : Standardisation or None
        Origin and scale of the rows ``z = [y, 1, m]``, from the first rows; None before any came.
    feature_origin : (D,) tensor
        What the features are measured from, so that values far from zero lose no digits.
    weight : float
        Sum of the weights; the number of rows where none were given.
    num_rows : int
        Number of rows of positive weight.
    gram, cross, squares : (K + 1, K + 1), (K + 1, D), (D,) tensors
        ``Σ w z zᵀ``, ``Σ w z fᵀ`` and ``Σ w f²``.
    """

    num_metadata: int
    units: Standardisation | None
    feature_origin: Tensor
    weight: float
    num_rows: int
    gram: Tensor
    cross: Tensor
    squares: Tensor

    @classmethod
    def empty(
        cls, num_features: int, num_metadata: int, num_protected: int = 0, device: torch.device | str = "cpu"
    ) -> Moments:
        """Return the moments of no rows of D features, K_m metadata columns and K_y protected ones."""
        columns = num_metadata + num_protected + 1
        options: Any = {"dtype": statistics_dtype(torch.device(device)), "device": device}
        return cls(
            num_metadata,
            None,
            torch.zeros(num_features, **options),
            0.0,
            0,
            torch.zeros(columns, columns, **options),
            torch.zeros(columns, num_features, **options),
            torch.zeros(num_features, **options),
        )

    @property
    def num_protected(self) -> int:
        """K_y + 1: protected columns and intercept, the first ones of a row z."""
        return len(self.gram) - self.num_metadata

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
            Itself. After an error it is what it was before.

        Raises
        ------
        ValueError
            Shapes that do not fit, NaN or infinite values, negative weights, values whose squares overflow.
        """
        values, columns = _table(features, "features", self.cross), _table(design, "design", self.gram[:-1])
        if len(values) != len(columns):
            raise ValueError(f"features has {len(values)} rows and design {len(columns)}: one row each is needed.")
        weight = None if weights is None else _row_weights(weights, len(values), self.gram)
        if weight is not None and not bool((weight > 0).all()):
            used = weight > 0
            values, columns, weight = values[used], columns[used], weight[used]
        if len(values) == 0:
            return self
        columns = columns.to(self.gram)
        rows = torch.cat(
            [columns[:, self.num_metadata :], torch.ones_like(columns[:, :1]), columns[:, : self.num_metadata]], 1
        )
        units, origin = self.units, self.feature_origin
        if units is None:
            units = Standardisation.of(rows, self.num_protected - 1, weight)
            some = values[:: max(1, len(values) // 32)].to(self.gram.dtype)
            origin = some.mean(0)
        rows = (rows - units.origin) * units.scale
        weighted = rows if weight is None else rows * weight.unsqueeze(1)
        gram, cross, squares = rows.mT @ weighted, torch.zeros_like(self.cross), torch.zeros_like(self.squares)
        # Columns that are contiguous, as files of columns give them, are added up column by column.
        is_transposed = values.stride(0) < values.stride(1)
        step = max(64, _STEP_VALUES // max(values.shape[1], 1))
        buffer = cross.new_empty((values.shape[1], step) if is_transposed else (step, values.shape[1]))
        products = cross.mT.contiguous() if is_transposed else cross
        for start in range(0, len(values), step):
            part, left = values[start : start + step], weighted[start : start + step]
            if is_transposed:
                block = buffer[:, : len(part)].copy_(part.mT).sub_(origin.unsqueeze(1))
                products.addmm_(block, left)
                squares += (block.square_() if weight is None else block.square_() * left[:, self.num_protected - 1]).sum(1)
            else:
                block = buffer[: len(part)].copy_(part).sub_(origin)
                products.addmm_(left.mT, block)
                block.square_()
                squares += block.sum(0) if weight is None else left[:, self.num_protected - 1] @ block
        if is_transposed:
            cross = products.mT.contiguous()
        if not math.isfinite(float(squares.sum() + gram.sum() + cross.sum())):
            _raise_not_finite(values, columns)
        self.units, self.feature_origin = units, origin
        self.gram, self.cross, self.squares = self.gram + gram, self.cross + cross, self.squares + squares
        self.weight = float(self.gram[self.num_protected - 1, self.num_protected - 1])
        self.num_rows += len(values)
        return self

    def about(self, units: Standardisation, feature_origin: Tensor) -> Moments:
        """Return the same moments about another origin, in other units."""
        if self.units is None:
            return Moments(**{**vars(self), "units": units, "feature_origin": feature_origin})
        intercept = self.num_protected - 1
        change = (units.scale / self.units.scale).diag()
        change[:, intercept] += (self.units.origin - units.origin) * units.scale
        change[intercept] = torch.nn.functional.one_hot(torch.tensor(intercept), len(change)).to(change)
        step = self.feature_origin - feature_origin
        cross = self.cross + torch.outer(self.gram[:, intercept], step)
        squares = self.squares + step * (2 * self.cross[intercept] + step * self.weight)
        return Moments(
            self.num_metadata,
            units,
            feature_origin,
            self.weight,
            self.num_rows,
            change @ self.gram @ change.mT,
            change @ cross,
            squares,
        )

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        units = None if self.units is None else Standardisation(*(part.to(device) for part in self.units))
        return Moments(**{**vars(self), **moved, "units": units})

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows together.

        Raises
        ------
        ValueError
            The numbers of columns differ.
        """
        mine, theirs = ((part.num_metadata, *part.cross.shape) for part in (self, other))
        if mine != theirs:
            raise ValueError(
                "only moments of the same columns can be merged: (metadata columns, design columns with intercept, "
                f"features) are {mine} and {theirs}."
            )
        if self.units is None or other.units is None:
            return other if self.units is None else self
        moved = other.about(self.units, self.feature_origin)
        return Moments(
            self.num_metadata,
            self.units,
            self.feature_origin,
            self.weight + other.weight,
            self.num_rows + other.num_rows,
            self.gram + moved.gram,
            self.cross + moved.cross,
            self.squares + moved.squares,
        )

    def within(self) -> Moments:
        """Return the moments of the same rows with every column and feature centred: those within a group of rows."""
        if self.units is None:
            return self
        intercept = self.num_protected - 1
        mean = self.gram[intercept] / self.weight
        gram = self.gram - self.weight * torch.outer(mean, mean)
        gram[intercept, intercept] = self.weight
        cross = self.cross - torch.outer(mean, self.cross[intercept])
        cross[intercept] = 0
        squares = (self.squares - self.cross[intercept].square() / self.weight).clamp_min(0)
        return Moments(
            self.num_metadata, self.units, self.feature_origin, self.weight, self.num_rows, gram, cross, squares
        )

    def products(self) -> Products:
        """Return means and centred sums of products in the units of the columns [m, y]."""
        p, k = self.num_protected, self.num_metadata
        order = [*range(p, p + k), *range(p - 1)]
        within, units = self.within(), self.units
        if units is None:
            zeros = [np.zeros(shape) for shape in ((p + k - 1,), (p + k - 1, p + k - 1), within.cross[1:].shape)]
            return Products(zeros[0], np.zeros(len(self.squares)), zeros[1], zeros[2], np.zeros(len(self.squares)))
        unit = 1 / units.scale[order]
        return Products(
            (self.gram[p - 1, order] / self.weight * unit + units.origin[order]).numpy(force=True),
            (self.cross[p - 1] / self.weight + self.feature_origin).numpy(force=True),
            (within.gram[order][:, order] * torch.outer(unit, unit)).numpy(force=True),
            (within.cross[order] * unit.unsqueeze(1)).numpy(force=True),
            within.squares.numpy(force=True),
        )

    def solve(self, ridge: float = 0.0) -> Any:
        """Return the least-squares coefficients of the columns [m, y], a (K, D) float64 array.

        Parameters
        ----------
        ridge : float
            λ ≥ 0, added to the variance of each standardised metadata column. Neither the intercept nor the protected
            columns are penalised.

        Raises
        ------
        ValueError
            There are no rows, or `ridge` is negative.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {ridge}.")
        if self.units is None:
            raise ValueError("no rows: coefficients need at least one update.")
        p = self.num_protected
        within = self.within()
        # Without metadata, protected columns and intercept are all that is fitted.
        share = ridge if self.num_metadata else 0.0
        operator = coefficient_operator(within.gram / self.weight, p, share, dtype=self.gram.dtype, every=True)
        coefficients = operator @ (within.cross / self.weight) * self.units.scale.unsqueeze(1)
        return torch.cat([coefficients[p:], coefficients[: p - 1]]).numpy(force=True)

    def to_arrays(self) -> dict[str, Any]:
        """Return the state as arrays by name, for ``numpy.savez`` or JSON (``.tolist()``)."""
        units = self.units or Standardisation(self.gram[0] * math.nan, self.gram[0] * math.nan)
        tensors = {"origin": units.origin, "scale": units.scale}
        tensors |= {name: getattr(self, name) for name in ("feature_origin", "gram", "cross", "squares")}
        numbers = {name: np.asarray(getattr(self, name)) for name in ("num_metadata", "weight", "num_rows")}
        return numbers | {name: tensor.numpy(force=True) for name, tensor in tensors.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Moments:
        """Return the moments that `to_arrays` gave.

        Raises
        ------
        ValueError
            An array is missing, unknown or of the wrong shape.
        """
        names = {*cls.__dataclass_fields__, "origin", "scale"} - {"units"}
        if set(arrays) != names:
            raise ValueError(
                f"these arrays are not those of Moments: missing {sorted(names - set(arrays))}, unknown "
                f"{sorted(set(arrays) - names)}."
            )
        values = {name: torch.tensor(np.array(value, np.float64)) for name, value in arrays.items()}
        columns, features = len(values["origin"]), len(values["feature_origin"])
        shapes = {"scale": (columns,), "gram": (columns,) * 2, "cross": (columns, features), "squares": (features,)}
        for name, shape in shapes.items():
            if values[name].numel() == 0 and 0 in shape:
                values[name] = torch.zeros(shape, dtype=torch.float64)
            if tuple(values[name].shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(values[name].shape)}.")
        units = Standardisation(values.pop("origin"), values.pop("scale"))
        numbers = {name: values.pop(name).item() for name in ("num_metadata", "weight", "num_rows")}
        return cls(
            int(numbers["num_metadata"]),
            units if bool(units.scale.isfinite().all()) else None,
            weight=numbers["weight"],
            num_rows=int(numbers["num_rows"]),
            **values,
        )


def _table(values: Any, name: str, like: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values
    else:
        array = np.asarray(values)
        array = as_real_array(values, name) if array.dtype.kind not in "biuf" else array
        tensor = _shared(array)
    width = like.shape[1] if name == "features" else len(like)
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape (num_rows, num_columns), got {tuple(tensor.shape)}.")
    if tensor.shape[1] != width:
        raise ValueError(f"{name} has {tensor.shape[1]} column(s), these moments have {width} (shape {tuple(tensor.shape)}).")
    return tensor


def _row_weights(values: Any, rows: int, like: Tensor) -> Tensor:
    weights = torch.as_tensor(values).to(like)
    if weights.shape != (rows,):
        raise ValueError(f"weights must have shape ({rows},), one weight a row, got {tuple(weights.shape)}.")
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(f"weights must be finite and not negative: row(s) {bad.nonzero()[:5, 0].tolist()}.")
    return weights


def _raise_not_finite(values: Tensor, columns: Tensor) -> None:
    for name, table in (("features", values), ("design", columns)):
        bad = ~table.isfinite()
        if bool(bad.any()):
            shown = [sorted(set(index.tolist()))[:5] for index in reversed(bad.nonzero(as_tuple=True))]
            raise ValueError(
                f"{name} has NaN or infinite values in column(s) {shown[0]}, row(s) {shown[1]}: drop or impute these "
                "rows first."
            )
    raise ValueError("the squares of the values overflow float64: rescale the features or the design columns.")


def _shared(array: Any) -> Tensor:
    """Return an array as a tensor, without a copy where a tensor can have its memory."""
    is_native = array.dtype.isnative and array.flags.writeable and all(step >= 0 for step in array.strides)
    if not is_native or array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = np.array(array, array.dtype.newbyteorder("=") if array.dtype.kind != "u" else np.float64)
    return torch.from_numpy(array)
