"""How far the columns of a design determine each other, in numbers.

Everything follows from the inner products of the centred columns. They are kept as a matrix of few rows with
the same inner products, which has more digits than the products themselves.

The widest block of 0/1 columns of which each row has at most one 1, such as those of a category, is not
written out: its columns span the means over its groups of rows. Each other column is split into what these
means say of it (`between`) and the rest (`within`), and any regression on the block and others is one of the
rest on the rest. So the cost grows linearly with the number of levels, and with the cube of the number of
other columns only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]

# A column whose part outside of the others is smaller than this, relative to it, is a combination of them.
_DEPENDENT = 1e-7
# Combinations count the columns with a larger weight than this, all columns having norm 1.
_WEIGHT = 1e-6
# A column that varies by less, relative to its size, is constant up to rounding.
_CONSTANT = 1e-10
# Of more columns than this, the largest and the smallest singular value are searched in steps.
_WIDE = 512
_MAX_STEPS = 1000


class Collinearity:
    """What the columns of a table that comes in portions say of each other."""

    # All columns are centred and of norm 1; constant ones are left out.
    names: NDArray[np.intp]  # (p,), which columns the others are, ascending
    # The part of the others that the block explains, (L + 1, p), a row for each group and the last for the
    # rows without a 1, and the part that it does not, (r, p).
    between: Matrix
    within: Matrix
    block: NDArray[np.intp]  # (L,), which columns the block has
    share: Vector  # (L,), rows in each of its groups, relative to all
    odds: Vector  # (L,), and relative to those without a 1
    # (L, p), of the block's columns in the regression of each other column on them
    effects: Matrix
    constant: list[int]  # columns

    def __init__(
        self,
        chunks: Callable[[], Iterable[tuple[slice, Matrix]]],
        others: NDArray[np.intp],
        codes: NDArray[np.int64],
        block: NDArray[np.intp],
        num_metadata: int,
    ) -> None:
        """Read the columns; the first `num_metadata` are metadata, the later ones labels.

        Each call of `chunks` yields rows and their (m, p) columns, the `others` without those of the `block`.
        The `codes` (n,) say which column of the block has the 1: −1 none, −2 the row cannot be used and is at
        the mean.
        """
        num_rows, num_groups = len(codes), len(block) + 1
        # Rows without a 1 are the last group, and unusable rows are one more for now.
        group = np.where(codes < 0, num_groups - 2 - codes, codes)
        sizes, sums = np.bincount(group, minlength=num_groups + 1), np.zeros((num_groups + 1, len(others)))
        for rows, values in chunks():
            for index, column in enumerate(values.T):
                sums[:, index] += np.bincount(group[rows], column, num_groups + 1)
        mean, sizes = sums.sum(0) / num_rows, sizes[:-1]
        steps = sums / np.maximum(np.append(sizes, 1), 1)[:, None] - sums[:-1].sum(0) / max(sizes.sum(), 1)
        steps[-1] = 0
        within = np.empty((0, len(others)))
        for rows, values in chunks():
            left = np.concatenate([within, values - mean - steps[group[rows]]])
            within = np.asarray(np.linalg.qr(left, mode="r"))
        between = np.sqrt(sizes)[:, None] * steps[:-1]
        norms = np.sqrt((between**2).sum(0) + (within**2).sum(0))
        kept = norms > _CONSTANT * np.maximum(np.sqrt(norms**2 + num_rows * mean**2), 1.0)
        present, unit = sizes[:-1] > 0, norms[kept]
        inside = sizes[:-1][present]
        share = inside / max(sizes.sum(), 1)
        of_block = (steps[:-2] - steps[-2])[present]
        self.names, self.block, self.share = others[kept], block[present], share
        self.between, self.within = between[sizes > 0][:, kept] / unit, within[:, kept] / unit
        self.odds = inside / max(sizes[-1], 1)
        self.effects = of_block[:, kept] / unit * np.sqrt(inside * (1 - share))[:, None]
        self.constant = [*others[~kept].tolist(), *block[~present].tolist()]
        self._width = len(self.names) + len(self.block)
        self._is_label = self.names >= num_metadata
        self._whole = np.concatenate([self.between, self.within])
        _, singular, right = np.linalg.svd(self.within, full_matrices=True)
        self._singular = singular = np.append(singular, np.zeros(len(right) - len(singular)))
        free = singular > _DEPENDENT
        # Rows with the inner products of the inverse of the correlations, as far as it exists.
        self._inverse: Matrix = right[free] / singular[free, None]
        null = right[~free].T
        null = np.linalg.qr(np.concatenate([null, -self.effects @ null]))[0] if null.size else null
        takes_part = (null**2).sum(1) > _DEPENDENT if null.size else np.zeros(self._width, dtype=bool)
        self.dependent = set(np.append(self.names, self.block)[takes_part].tolist())
        labels = _span(self._whole[:, self._is_label])
        self._label_between, self._label_within = np.split(labels, [len(self.between)])

    @property
    def kept(self) -> list[int]:
        """The columns that are not constant."""
        return sorted([*self.names.tolist(), *self.block.tolist()])

    def _at(self, columns: Iterable[int]) -> tuple[Mask, bool]:
        """Return which of the other columns are given, and whether the block is among them."""
        given = set(columns)
        return np.isin(self.names, list(given)), bool(len(self.block)) and int(self.block[0]) in given

    def with_labels(self, columns: Sequence[int]) -> tuple[Vector, dict[int, float]]:
        """Return the canonical correlations of kept columns and labels, descending, and the labels' R²."""
        at, with_block = self._at(columns)
        span = self._label_between, self._label_within
        labels = self.between[:, self._is_label], self.within[:, self._is_label]
        if with_block:
            basis = _span(self.within[:, at])
            of_span, of_labels = (
                np.concatenate([first, basis.T @ second]) for first, second in (span, labels)
            )
        else:
            basis = _span(self._whole[:, at])
            of_span, of_labels = (basis.T @ np.concatenate(each) for each in (span, labels))
        values = np.clip(np.linalg.svd(of_span, compute_uv=False), 0, 1) if of_span.size else np.empty(0)
        r2 = np.clip((of_labels**2).sum(0), 0, 1).tolist()
        names = self.names[self._is_label].tolist()
        return values[: min(len(columns), of_span.shape[1])], dict(zip(names, r2, strict=True))

    def r2_on_labels(self) -> dict[int, float]:
        """Return the R² of the regression of each metadata column on the labels."""
        num_groups = len(self.block)
        labels = np.concatenate([self._label_between, self._label_within])
        others = ((labels.T @ self._whole[:, ~self._is_label]) ** 2).sum(0)
        block = (self._label_between[:num_groups] ** 2).sum(1) / (1 - self.share)
        names = [*self.names[~self._is_label].tolist(), *self.block.tolist()]
        return dict(zip(names, np.clip([*others, *block], 0, 1).tolist(), strict=True))

    def inflation(self) -> dict[int, float]:
        """Return the variance inflation of each column; infinite where the others determine it."""
        others = (self._inverse**2).sum(0)
        # The variance of a difference of two means, and what the other columns add.
        block = (1 - self.share) * (1 + self.odds)
        block = block + ((self._inverse @ self.effects.T) ** 2).sum(0)
        values = zip([*self.names.tolist(), *self.block.tolist()], [*others, *block], strict=True)
        return {name: math.inf if name in self.dependent else max(float(v), 1.0) for name, v in values}

    def term_inflation(self, columns: Sequence[int]) -> float:
        """Return the generalised variance inflation of columns to the power 1 / (number of columns)."""
        at, with_block = self._at(columns)
        number = int(at.sum()) + with_block * len(self.block)
        if self.dependent & set(columns):
            return math.inf
        if with_block:
            # That of the rest beside these columns, which is the same number.
            basis = _span(self._whole[:, ~at])
            left = basis[len(self.between) :]
            inside = _span(self.within[:, at])
            left = left - inside @ (inside.T @ left)
            logarithm = -_log_volume(left)
        else:
            logarithm = _log_volume(self._whole[:, at]) + _log_volume(self._inverse[:, at])
        return max(1.0, math.exp(2 * logarithm / number))

    def condition_number(self) -> float:
        """Return the largest over the smallest singular value; infinite where columns are collinear."""
        if self.dependent:
            return math.inf
        if not len(self.block):
            return float(self._singular[0] / self._singular[-1]) if len(self._singular) else 1.0
        if self._width <= _WIDE:
            values = np.linalg.eigvalsh(self._times_correlations(np.eye(self._width)))
            return math.sqrt(values[-1] / values[0])
        return math.sqrt(
            _largest(self._times_correlations, self._width) * _largest(self._solved, self._width)
        )

    def _times_correlations(self, vectors: Matrix) -> Matrix:
        """Return the correlations of all columns, those of the block first, times (K, m) vectors."""
        num_groups = len(self.block)
        block, others = vectors[:num_groups], vectors[num_groups:]
        diagonal = 1 / (1 - self.share)[:, None]
        root = np.sqrt(diagonal * self.share[:, None])
        cross = np.sqrt(diagonal) * self.between[:num_groups]
        whole = self._whole
        return np.concatenate(
            [
                diagonal * block - root * (root.T @ block) + cross @ others,
                cross.T @ block + whole.T @ (whole @ others),
            ]
        )

    def _solved(self, vectors: Matrix) -> Matrix:
        """Return the inverse of the correlations times (K, m) vectors."""
        num_groups = len(self.block)
        block, others = vectors[:num_groups], vectors[num_groups:]
        share = self.share[:, None]
        others = self._inverse.T @ (self._inverse @ (others - self.effects.T @ block))
        root = np.sqrt(share * (1 - share))
        alone = (1 - share) * block + root * (root.T @ block) / (1 - share.sum())
        return np.concatenate([alone - self.effects @ others, others])

    def groups(self) -> list[list[int]]:
        """Return groups of columns in which each is a combination of the others."""
        independent: list[int] = []
        groups: list[set[int]] = []
        basis = np.empty((len(self.within), 0))
        for index in np.flatnonzero(np.isin(self.names, list(self.dependent))):
            column = self.within[:, index]
            left = column - basis @ (basis.T @ column)
            left -= basis @ (basis.T @ left)
            norm = np.linalg.norm(left)
            if norm > _DEPENDENT:
                basis = np.column_stack([basis, left / norm])
                independent.append(int(index))
                continue
            weights = np.linalg.lstsq(self.within[:, independent], column, rcond=None)[0]
            of_block = self.effects[:, index] - self.effects[:, independent] @ weights
            group = {
                int(self.names[index]),
                *self.names[independent][np.abs(weights) > _WEIGHT].tolist(),
                *self.block[np.abs(of_block) > _WEIGHT].tolist(),
            }
            for other in [known for known in groups if known & group]:
                groups.remove(other)
                group |= other
            groups.append(group)
        return sorted(sorted(group) for group in groups)


def _largest(times: Callable[[Matrix], Matrix], width: int) -> float:
    """Return the largest eigenvalue of a matrix that is given by its products, to three digits or so."""
    vector = np.random.default_rng(0).normal(size=(width, 1))
    value = 0.0
    for _ in range(_MAX_STEPS):
        vector = times(vector / np.linalg.norm(vector))
        before, value = value, float(np.linalg.norm(vector))
        if abs(value - before) < 1e-6 * value:
            break
    return value


def _log_volume(columns: Matrix) -> float:
    """Return the logarithm of the product of the singular values of independent columns."""
    return float(np.log(np.abs(np.diag(np.linalg.qr(columns, mode="r")))).sum())


def _span(columns: Matrix) -> Matrix:
    """Return an orthonormal basis of the space of columns of norm 1."""
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(left[:, singular > _DEPENDENT])
