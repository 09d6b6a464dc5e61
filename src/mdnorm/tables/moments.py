"""Sufficient statistics of the regression of many features on a few columns, additive over rows.

Notation. A row has design columns `x = [m, y]` (metadata, then what is protected) and features `f`. Least
squares of `f` on `[x, 1]` needs the means and the centred sums of products

    G = Σ w (x − x̄)(x − x̄)ᵀ,   C = Σ w (x − x̄)(f − f̄)ᵀ,   s = Σ w (f − f̄)²,

and nothing else of the table, so a table of any length, in blocks or partitions, is read once. Two sets of
rows are put together by the pairwise update of Chan, Golub & LeVeque (1983): everything stays centred, so
values far from zero (a year, a count of photons) cost no digits, which sums of raw products would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mdnorm.arrays import as_real_array
from mdnorm.functional import Gram, coefficient_operator

__all__ = ["Moments"]

FloatArray = NDArray[np.float64]

# Values of the features in one step: 1 MiB in float64, so that centring, product and squares find them in the
# cache. Fewer rows than the second number would make the merge of each step, K·D operations, count.
_STEP_ELEMENTS = 2**17
_MIN_STEP_ROWS = 64


@dataclass
class Moments:
    """Counts, means and centred sums of products of design columns and features.

    Start with `Moments.empty`, add rows with `update`, put parts together with `merge`, get the coefficients
    with `solve`. The state is K·(K + D) + O(D) numbers whatever the number of rows; `to_arrays` gives it as
    plain arrays for ``numpy.savez``.

    Attributes
    ----------
    num_metadata : int
        K_m: the first design columns are metadata, the rest is protected.
    count : float
        Sum of the weights; the number of rows where none were given.
    num_rows : int
        Number of rows of positive weight.
    design_mean : (K,) float64 array
    feature_mean : (D,) float64 array
    gram : (K, K) float64 array
        Centred sums of products of the design columns.
    cross : (K, D) float64 array
        Centred sums of products of design columns and features.
    feature_squares : (D,) float64 array
        Centred sums of squares of the features.

    References
    ----------
    Chan, Golub & LeVeque, Algorithms for computing the sample variance, The American Statistician 37 (1983).
    """

    num_metadata: int
    count: float
    num_rows: int
    design_mean: FloatArray
    feature_mean: FloatArray
    gram: FloatArray
    cross: FloatArray
    feature_squares: FloatArray

    @classmethod
    def empty(cls, num_features: int, num_metadata: int, num_protected: int = 0) -> Moments:
        """Return the statistics of no rows.

        Parameters
        ----------
        num_features : int
            D.
        num_metadata, num_protected : int
            Number of design columns that are removed, and that are protected.
        """
        columns = num_metadata + num_protected
        return cls(
            num_metadata=num_metadata,
            count=0.0,
            num_rows=0,
            design_mean=np.zeros(columns),
            feature_mean=np.zeros(num_features),
            gram=np.zeros((columns, columns)),
            cross=np.zeros((columns, num_features)),
            feature_squares=np.zeros(num_features),
        )

    def update(self, features: ArrayLike, design: ArrayLike, weights: ArrayLike | None = None) -> Moments:
        """Add rows, in place.

        Parameters
        ----------
        features : (n, D) array
            Of any real dtype; summed in float64. n may be 0.
        design : (n, K) array
            Metadata columns, then protected columns.
        weights : (n,) array, optional
            Non-negative; a row of weight 2 counts as two rows, one of weight 0 as none.

        Returns
        -------
        Moments
            Itself. After an error it is what it was before.

        Raises
        ------
        ValueError
            Shapes that do not fit, NaN or infinite values, negative weights, values whose squares overflow.
        """
        block, columns = _as_table(features, "features"), _as_table(design, "design")
        for name, table, width in (
            ("features", block, self.feature_mean.shape[0]),
            ("design", columns, self.design_mean.shape[0]),
        ):
            if table.shape[1] != width:
                raise ValueError(
                    f"{name} has {table.shape[1]} column(s), these statistics have {width} "
                    f"(shape {table.shape})."
                )
        if len(block) != len(columns):
            raise ValueError(
                f"features has {len(block)} rows and design {len(columns)}: one row each is needed."
            )
        weight = None if weights is None else _as_weights(weights, len(block))
        if weight is not None and not np.all(weight > 0):
            kept = weight > 0
            block, columns, weight = block[kept], columns[kept], weight[kept]
        added = Moments.empty(
            block.shape[1], self.num_metadata, columns.shape[1] - self.num_metadata
        )  # first on their own, so that a bad row changes nothing
        rows = max(_MIN_STEP_ROWS, _STEP_ELEMENTS // max(block.shape[1], 1))
        for start in range(0, len(block), rows):
            part = slice(start, start + rows)
            step = _step(
                block[part], columns[part], None if weight is None else weight[part], self.num_metadata
            )
            if step is None:
                _raise_not_finite(block, columns)
            else:
                added._add(step)
        self._add(added)
        return self

    def merge(self, other: Moments) -> Moments:
        """Return the statistics of both sets of rows together.

        Raises
        ------
        ValueError
            The numbers of columns differ.
        """
        mine = (self.num_metadata, *self.cross.shape)
        theirs = (other.num_metadata, *other.cross.shape)
        if mine != theirs:
            raise ValueError(
                "only statistics of the same columns can be merged: (metadata columns, design columns, "
                f"features) are {mine} and {theirs}."
            )
        return self.copy()._add(other)

    def copy(self) -> Moments:
        """Return a copy that shares no memory."""
        return Moments.from_arrays({name: np.array(value) for name, value in self.to_arrays().items()})

    def solve(self, ridge: float = 0.0) -> FloatArray:
        """Return the least-squares coefficients of the design columns.

        Parameters
        ----------
        ridge : float
            λ ≥ 0, added to the variance of each standardised metadata column. Neither the intercept nor the
            protected columns are penalised.

        Returns
        -------
        (K, D) float64 array
            Rows in the order of the design columns. The intercept is ``feature_mean − design_mean @
            coefficients``. Constant columns get zero; collinear columns share the effect (see
            `mdnorm.functional.coefficient_operator`).

        Raises
        ------
        ValueError
            There are no rows, or `ridge` is negative.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {ridge}.")
        if self.count == 0:
            raise ValueError("no rows: coefficients need at least one update.")
        if len(self.gram) == 0:
            return np.zeros_like(self.cross)
        # The operator is for something that is removed; all columns as metadata give the same coefficients.
        num_metadata, ridge = (self.num_metadata, ridge) if self.num_metadata else (len(self.gram), 0.0)
        gram = Gram(
            torch.from_numpy(self.design_mean),
            torch.from_numpy(self.gram / self.count),
            torch.tensor([self.count], dtype=torch.float64),
            num_metadata,
        )
        operator: FloatArray = coefficient_operator(gram, ridge).numpy()
        return operator @ (self.cross / self.count)

    def residual_squares(self, coefficients: FloatArray) -> FloatArray:
        """Return ``Σ w (f − f̄ − (x − x̄) β)²`` for coefficients (K, D), shape (D,), not below 0."""
        explained = 2 * self.cross - self.gram @ coefficients
        squares: FloatArray = self.feature_squares - np.einsum("kd,kd->d", coefficients, explained)
        return np.maximum(squares, 0)

    def design_rank(self) -> int:
        """Return the number of linearly independent design columns, the intercept included."""
        return 1 + rank(self.gram, np.diagonal(self.gram), self.design_mean, self.count)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state as arrays by name, for ``numpy.savez`` or JSON (``.tolist()``)."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> Moments:
        """Return the statistics that `to_arrays` gave.

        Raises
        ------
        ValueError
            An array is missing, unknown or of the wrong shape.
        """
        names = set(cls.__dataclass_fields__)
        if set(arrays) != names:
            raise ValueError(
                f"these arrays are not those of Moments: missing {sorted(names - set(arrays))}, "
                f"unknown {sorted(set(arrays) - names)}."
            )
        values = {name: np.array(value, dtype=np.float64) for name, value in arrays.items()}
        columns, features = values["design_mean"].shape[0], values["feature_mean"].shape[0]
        shapes = {
            "gram": (columns, columns),
            "cross": (columns, features),
            "feature_squares": (features,),
        }
        for name, shape in shapes.items():
            # JSON has no way to write the second dimension of an array without rows.
            if values[name].size == 0 and 0 in shape:
                values[name] = np.zeros(shape)
            if values[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {values[name].shape}.")
        return cls(
            num_metadata=int(values.pop("num_metadata")),
            count=float(values.pop("count")),
            num_rows=int(values.pop("num_rows")),
            **values,
        )

    def _add(self, other: Moments) -> Moments:
        if other.count == 0:
            return self
        total = self.count + other.count
        share = other.count / total
        design_step = other.design_mean - self.design_mean
        feature_step = other.feature_mean - self.feature_mean
        # The product of the counts over their sum, without overflow or underflow of the product.
        between = self.count * share * design_step
        self.gram += other.gram
        self.gram += np.outer(between, design_step)
        self.cross += other.cross
        self.cross += np.outer(between, feature_step)
        self.feature_squares += other.feature_squares
        self.feature_squares += (self.count * share) * feature_step * feature_step
        self.design_mean += share * design_step
        self.feature_mean += share * feature_step
        self.count = total
        self.num_rows += other.num_rows
        return self


def rank(gram: FloatArray, squares: FloatArray, mean: FloatArray, count: float) -> int:
    """Return the rank of centred sums of products `gram`, columns measured by their `squares`.

    Parameters
    ----------
    gram : (K, K) array
    squares : (K,) array
        Centred sums of squares that count as 1: those of `gram`, or of a larger set of rows.
    mean : (K,) array
        A column whose deviation is nothing beside its mean is constant.
    count : float
        Sum of the weights.
    """
    deviation = np.sqrt(np.maximum(squares, 0) / count) if count else np.zeros(len(mean))
    scale = np.where(deviation > 1e-12 * np.abs(mean), deviation, np.inf)
    values = np.linalg.eigvalsh(gram / count / np.outer(scale, scale)) if count and len(gram) else np.zeros(0)
    return int(np.count_nonzero(values > 1e-11 * max(float(values.max(initial=0.0)), 1.0)))


def _as_table(values: ArrayLike, name: str) -> NDArray[Any]:
    table = np.asarray(values)
    if table.ndim != 2:
        raise ValueError(f"{name} must have shape (num_rows, num_columns), got {table.shape}.")
    return as_real_array(values, name) if table.dtype.kind not in "biuf" else table


def _as_weights(values: ArrayLike, rows: int) -> FloatArray:
    weights = np.asarray(values, dtype=np.float64)
    if weights.shape != (rows,):
        raise ValueError(f"weights must have shape ({rows},), one weight a row, got {weights.shape}.")
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        raise ValueError(
            f"weights must be finite and not negative: row(s) {np.flatnonzero(bad)[:5].tolist()}."
        )
    return weights


def _step(
    block: NDArray[Any], columns: NDArray[Any], weights: FloatArray | None, num_metadata: int
) -> Moments | None:
    """Return the statistics of a few rows, or None where they are not finite."""
    features = block.astype(np.float64)
    design = columns.astype(np.float64)
    total = float(len(block)) if weights is None else float(weights.sum())
    with np.errstate(invalid="ignore", over="ignore"):
        feature_mean = (features.sum(0) if weights is None else weights @ features) / total
        design_mean = (design.sum(0) if weights is None else weights @ design) / total
        features -= feature_mean
        design -= design_mean
        left = np.empty((design.shape[1] + 1, len(block)))
        left[:-1] = design.T
        left[-1] = 1
        if weights is not None:
            left *= weights
        gram = left @ design
        products = left @ features
        np.square(features, out=features)
        squares = features.sum(0) if weights is None else weights @ features
    # What rounding left in the centred sums, taken out again (the corrected two-pass algorithm).
    design_rest, feature_rest = gram[-1], products[-1]
    if not (np.isfinite(squares).all() and np.isfinite(gram).all()):
        return None
    return Moments(
        num_metadata=num_metadata,
        count=total,
        num_rows=len(block),
        design_mean=design_mean + design_rest / total,
        feature_mean=feature_mean + feature_rest / total,
        gram=gram[:-1] - np.outer(design_rest, design_rest) / total,
        cross=products[:-1] - np.outer(design_rest, feature_rest) / total,
        feature_squares=np.maximum(squares - feature_rest**2 / total, 0),
    )


def _raise_not_finite(block: NDArray[Any], columns: NDArray[Any]) -> None:
    for name, table in (("features", block), ("design", columns)):
        bad = ~np.isfinite(table)
        if bad.any():
            raise ValueError(
                f"{name} has NaN or infinite values in column(s) {np.flatnonzero(bad.any(0))[:5].tolist()}, "
                f"row(s) {np.flatnonzero(bad.any(1))[:5].tolist()}: drop or impute these rows first."
            )
    raise ValueError(
        "the squares of the values overflow float64: rescale the features or the design columns."
    )
