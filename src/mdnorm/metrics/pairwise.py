"""Inner products of U-centred matrices of distances or kernels, in memory linear in the number of samples.

Notation. `a_ij` are the distances of the n samples (or the values of a kernel) for one variable, `b_ij` those
for another; the diagonal does not count. A matrix is U-centred (Székely & Rizzo 2014, definition 2) by taking
row and column effects away outside the diagonal, ``A_ij = a_ij − e_i − e_j`` with ``e_i = a_i./(n−2) −
a../(2(n−1)(n−2))``. The inner product is ``(A·B) = Σ_{i≠j} A_ij B_ij / (n(n−3))``: of distances the
bias-corrected squared distance covariance, of kernels the unbiased Hilbert–Schmidt independence criterion.

How it is computed. The inner product expands into sums that one pass over tiles of the upper triangle
collects,

    n(n−3)·(A·B) = Σ_{i≠j} a_ij b_ij − 2/(n−2)·Σ_i a_i. b_i. + a.. b.. / ((n−1)(n−2)),

but its three terms may be far larger than their difference. U-centring does not see a term ``r_i + r_j``
added outside the diagonal, so before they are summed the entries are reduced by row effects estimated
from a few anchor samples. What remains is of the size of `A` itself: with m anchors the expansion loses at
most a factor of the order of n/m of the float64 precision, whatever the data.

Distances come from matrix products of the centred rows, ``|x_i|² + |x_j|² − 2 x_i·x_j``, which cancels where
two samples are much closer to each other than to the centre. These pairs are found and computed again from
their differences.

Scalars of many samples need no tiles at all (`mdnorm.metrics.scalars`).

Leaving a sample out. The rows of `A` sum to 0. So the inner product without sample k, U-centred anew among
the others, needs only ``P_k = Σ_j A_kj B_kj``: it is ``(Σ_{i≠j} A_ij B_ij − 2·(n−2)/(n−3)·P_k) /
((n−1)(n−4))``. A second pass collects `P`.

Weights. With weights w of sum 1 the inner product is the mean of ``a_ij b_ij − 2 a_ij b_ik + a_ij b_kl`` over
all i, j, k, l that are distinct, of weight ``w_i w_j w_k w_l``. With equal weights it is (A·B). It does not
see ``r_i + r_j`` either, and of a matrix with itself it is a mean of squares, of ``(a_ij + a_kl − a_ik −
a_jl)/2``. (Were each of the three terms divided by a weight of its own, neither would be true.) With
``α_i = Σ_{j≠i} w_j a_ij``, ``α'_i = Σ_{j≠i} w_j² a_ij``, β and β' those of b, and ``s_k = Σ w_i^k``, the sum
over the quadruples is

    Σ_{i≠j} w_i w_j (1 − s_2 − w_i − w_j + 2 w_i w_j) a_ij b_ij + (Σ w_i α_i)(Σ w_i β_i)
    − 2 Σ_i w_i (1 + w_i) α_i β_i + 2 Σ_i w_i (α'_i β_i + α_i β'_i)

and that of their weights ``1 − 6 s_2 + 3 s_2² + 8 s_3 − 6 s_4``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mdnorm.metrics.scalars import SortedScalar, sum_of_products

# More anchors estimate the row effects better, which nothing needs, and each costs n distances.
_NUM_ANCHORS = 16

# Rows and columns of a tile. On a CPU a few tiles should stay in the cache, for each thread its share;
# elsewhere a tile should be large enough to hide the cost of a kernel launch.
_TILE_CPU = (128, 1024)
_TILE_ACCELERATOR = (4096, 4096)

# Fewer columns than this cost less as differences than as a matrix product.
_MIN_COLUMNS_FOR_PRODUCT = 6

# Below this ratio of |x_i − x_j|² to |x_i|² + |x_j|² a distance is computed from differences. Above, the
# matrix product has it to a relative precision of about 2^-53 / ratio.
_CLOSE = 2.0**-10

# More than this share of close pairs, and the whole tile is computed from differences.
_MANY_CLOSE = 1 / 16

# U-centred values below this multiple of √p times the values are nothing but rounding.
_ROUNDING = 32 * torch.finfo(torch.float64).eps

# From this number of samples on, sorting two scalars is faster than going through their pairs.
_MIN_SAMPLES_FOR_SORTING = 600

Index: TypeAlias = slice | Tensor


# -- matrices ---------------------------------------------------------------------------------------------


class PairwiseMatrix(ABC):
    """A symmetric matrix of a value for every pair of samples, which is never in memory as a whole.

    The samples are `rows` (n, p) float64, without columns where the variable is constant.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_samples, self.num_columns = rows.shape

    @abstractmethod
    def block(self, first: Index, second: Index, out: Tensor | None = None) -> Tensor:
        """Return the entries of samples `first` with samples `second`, in `out` where that saves memory.

        Where the two overlap, entries of a sample with itself have any finite value.
        """

    def rounding(self, effects: Tensor) -> Tensor:
        """Return what rounding of the entries may leave of ``Σ_{i≠j} A_ij²``."""
        num_samples = effects.shape[0]
        values = 2 * (num_samples - 2) * effects.square().sum() + 2 * effects.sum().square()
        return _ROUNDING**2 * self.num_columns * values


class Distances(PairwiseMatrix):
    """Euclidean distances."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        if self.num_columns >= _MIN_COLUMNS_FOR_PRODUCT:
            # The further from the origin, the more digits the product form loses.
            self._centred = rows - rows.mean(dim=0)
            self._norms = torch.linalg.vector_norm(self._centred, dim=1).square_()

    def block(self, first: Index, second: Index, out: Tensor | None = None) -> Tensor:
        """Return distances."""
        if self.num_columns == 1:
            values = self.rows[:, 0]
            return torch.sub(values[first, None], values[second], out=out).abs_()
        if self.num_columns < _MIN_COLUMNS_FOR_PRODUCT:
            return _exact_distances(self.rows[first], self.rows[second])
        return self._squared_distances(first, second, out).sqrt_()

    def _squared_distances(self, first: Index, second: Index, out: Tensor | None) -> Tensor:
        """Return squared distances from the matrix product, and from differences for close pairs."""
        left_norms, right_norms = self._norms[first], self._norms[second]
        out = torch.mm(self._centred[first] * -2, self._centred[second].T, out=out)
        out += left_norms[:, None]
        out += right_norms
        if isinstance(first, slice) and isinstance(second, slice) and second.start < first.stop:
            # A sample is not close to itself: larger than any limit.
            out.diagonal(first.start - second.start).fill_(8 * self.num_columns)
        # A limit for the whole row costs one pass. It is exceeded for no reason where norms differ much.
        limits = (left_norms + right_norms.max()) * _CLOSE
        if bool((out.amin(dim=1) >= limits).all()):
            return out
        is_close = out < (left_norms[:, None] + right_norms).mul_(_CLOSE)
        num_close = int(is_close.sum())
        if num_close > _MANY_CLOSE * out.numel():
            return out.copy_(_exact_distances(self.rows[first], self.rows[second]).square_())
        left, right = self.rows[first], self.rows[second]
        pairs = is_close.nonzero()
        # As many pairs at once as have their differences in the memory of a tile.
        for some in pairs.split(max(1, out.numel() // self.num_columns)):
            i, j = some[:, 0], some[:, 1]
            out[i, j] = (left[i] - right[j]).square_().sum(dim=1)
        return out


class GaussianKernel(Distances):
    """The kernel ``exp(−|x_i − x_j|² / (2σ²))`` with the bandwidth σ > 0, in the units of the rows."""

    def __init__(self, rows: Tensor, bandwidth: float) -> None:
        super().__init__(rows)
        self._factor = -0.5 / bandwidth**2

    def block(self, first: Index, second: Index, out: Tensor | None = None) -> Tensor:
        """Return values of the kernel."""
        if self.num_columns < _MIN_COLUMNS_FOR_PRODUCT:
            squared = super().block(first, second, out).square_()
        else:
            squared = self._squared_distances(first, second, out)
        return squared.mul_(self._factor).exp_()


class LinearKernel(PairwiseMatrix):
    """The kernel ``x_i·x_j``; U-centring takes a common offset of the samples away."""

    def __init__(self, rows: Tensor) -> None:
        # The median, unlike the mean, is close to most samples where another is far away.
        super().__init__(rows - rows.median(dim=0).values)

    def block(self, first: Index, second: Index, out: Tensor | None = None) -> Tensor:
        """Return inner products."""
        return torch.mm(self.rows[first], self.rows[second].T, out=out)

    def rounding(self, effects: Tensor) -> Tensor:
        """Return what rounding of the inner products may leave: they may be far smaller than the norms."""
        return _ROUNDING**2 * self.rows.square().sum().square()


def _exact_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distances between (s, p) and (t, p) from differences, in shape (s, t)."""
    # The other form of `cdist` is a matrix product, in which a duplicate would not be at 0.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


# -- tiles ------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """Some rows and columns of the upper triangle."""

    rows: slice
    columns: slice

    def add_sums(self, sums: Tensor, values: Tensor, weights: Tensor) -> None:
        """Add weighted `values` to the `sums` (n,) of the row of i and, by symmetry, of the row of j."""
        sums[self.rows] += torch.mv(values, weights[self.columns])
        sums[self.columns] += torch.mv(values.T, weights[self.rows])


class _Tiling:
    """The tiles of the upper triangle, and memory that they share."""

    def __init__(self, num_samples: int, device: torch.device) -> None:
        rows, columns = _TILE_ACCELERATOR
        if device.type == "cpu":
            rows, columns = _TILE_CPU[0], _TILE_CPU[1] * torch.get_num_threads()
        self._num_samples = num_samples
        self._tile_rows, self._tile_columns = min(rows, num_samples), min(columns, num_samples)
        self._buffers: dict[int, Tensor] = {}
        self._device = device

    def __iter__(self) -> Iterator[_Tile]:
        for start in range(0, self._num_samples, self._tile_rows):
            stop = min(start + self._tile_rows, self._num_samples)
            for first in range(start, self._num_samples, self._tile_columns):
                last = min(first + self._tile_columns, self._num_samples)
                yield _Tile(slice(start, stop), slice(first, last))

    def buffer(self, key: int, tile: _Tile) -> Tensor:
        """Return memory for the values of `tile`."""
        if key not in self._buffers:
            size = self._tile_rows * self._tile_columns
            self._buffers[key] = torch.empty(size, dtype=torch.float64, device=self._device)
        rows, columns = (part.stop - part.start for part in tile)
        return self._buffers[key][: rows * columns].view(rows, columns)


def _reduced_tile(
    matrix: PairwiseMatrix, effects: Tensor, tile: _Tile, out: Tensor, order: Tensor | None = None
) -> Tensor:
    """Return ``a_ij − r_i − r_j`` in a tile, 0 unless j > i, for the samples in another order if given."""
    first, second = tile if order is None else (order[tile.rows], order[tile.columns])
    values = matrix.block(first, second, out).sub_(effects[first, None]).sub_(effects[second])
    overlap = tile.columns.start < tile.rows.stop
    return values.triu_(1 + tile.rows.start - tile.columns.start) if overlap else values


def _anchored_effects(matrix: PairwiseMatrix) -> Tensor:
    """Return `r` of shape (n,) such that ``r_i + r_j`` is close to the entry of sample i and sample j.

    Where the entries have this form exactly, so does the estimate: their U-centred form is 0, and only
    rounding may remain of them.
    """
    num_samples = matrix.num_samples
    num_anchors = min(_NUM_ANCHORS, num_samples)
    anchors = torch.arange(num_anchors, device=matrix.rows.device) * num_samples // num_anchors
    # An anchor has no entry with itself.
    entries = matrix.block(slice(None), anchors)
    entries[anchors, torch.arange(num_anchors, device=anchors.device)] = 0
    sums = entries.sum(dim=1)
    # Σ_k (r_i + r_k) over the anchors is m·r_i + R, or (m − 2)·r_i + R where i, with no entry for itself,
    # is one of them, with R = Σ_k r_k.
    anchor_sums = sums[anchors]
    total = anchor_sums.sum() / (2 * (num_anchors - 1))
    effects = (sums - total) / num_anchors
    effects[anchors] = (anchor_sums - total) / (num_anchors - 2)
    return effects


# -- inner products ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CentredProducts:
    """Inner products of k U-centred matrices of n samples."""

    # ``(A_u·A_v)``, (k, k) float64.
    products: Tensor
    # Whether ``(A_u·A_u)`` is 0 up to rounding, (k,) bool.
    is_zero: Tensor
    # ``e_i`` such that ``A_ij = a_ij − e_i − e_j``, (k, n) float64; 0 of weighted products.
    effects: Tensor

    def correlations(self) -> Tensor:
        """Return ``(A_u·A_v) / √((A_u·A_u)(A_v·A_v))`` of shape (k, k), 0 where a product is 0."""
        # Two roots, since the product of two small variances could vanish.
        roots = self.products.diagonal().clamp(min=0).sqrt()
        scaled = self.products / roots[:, None] / roots
        undefined = self.is_zero[:, None] | self.is_zero
        return torch.where(undefined, torch.zeros_like(scaled), scaled.clamp(-1, 1))


def centred_products(matrices: Sequence[PairwiseMatrix], weights: Tensor | None = None) -> CentredProducts:
    """Return the inner products of U-centred matrices, all of the same n ≥ 4 samples.

    Weights (n,), for distances only, are above 0; see `quadruple_weight`.
    """
    rows, num_samples, count = matrices[0].rows, matrices[0].num_samples, len(matrices)
    # A constant, which has no columns, is 0 after U-centring.
    found = CentredProducts(
        rows.new_zeros(count, count),
        rows.new_ones(count, dtype=torch.bool),
        rows.new_zeros(count, num_samples),
    )
    varying = [k for k, matrix in enumerate(matrices) if matrix.num_columns > 0]
    if not varying:
        return found
    index, matrices = torch.tensor(varying, device=rows.device), [matrices[k] for k in varying]
    if weights is not None:
        products, found.is_zero[index] = _weighted_products(matrices, weights / weights.sum())
        found.products[index[:, None], index] = products
        return found
    reduced, row_sums, pair_sums = _sorted_sums(matrices) if _sorts(matrices) else _tiled_sums(matrices)
    row_sums = row_sums[:, 0]
    centred = expansion(pair_sums, row_sums, row_sums)
    rounding = torch.stack([matrix.rounding(r) for matrix, r in zip(matrices, reduced, strict=True)])
    means = row_sums.sum(dim=1, keepdim=True) / (2 * (num_samples - 1) * (num_samples - 2))
    found.effects[index] = reduced + row_sums / (num_samples - 2) - means
    found.products[index[:, None], index] = centred / (num_samples * (num_samples - 3))
    found.is_zero[index] = centred.diagonal() <= rounding
    return found


def expansion(pair_sums: Tensor, x_sums: Tensor, y_sums: Tensor) -> Tensor:
    """Return ``Σ_{i≠j} A_ij B_ij`` from ``Σ_{i<j} a_ij b_ij`` and sums of rows (k, n) and (m, n)."""
    num_samples = x_sums.shape[1]
    totals = x_sums.sum(dim=1)[:, None] * y_sums.sum(dim=1) / ((num_samples - 1) * (num_samples - 2))
    return 2 * pair_sums - 2 / (num_samples - 2) * (x_sums @ y_sums.T) + totals


def _weighted_products(matrices: Sequence[PairwiseMatrix], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted inner products (k, k), and whether that of a matrix with itself is 0 up to rounding."""
    reduced, row_sums, pair_sums = _tiled_sums(matrices, weights)
    sums, sums_of_squares = row_sums.unbind(1)
    totals, crossed = sums @ weights, (weights * sums_of_squares) @ sums.T
    of_rows = crossed + crossed.T - (weights * (1 + weights) * sums) @ sums.T
    centred = 2 * pair_sums + 2 * of_rows + totals[:, None] * totals
    columns = weights.new_tensor([matrix.num_columns for matrix in matrices])
    # As in `PairwiseMatrix.rounding`: at most the mean of (r_i + r_j)².
    values = 2 * (reduced.square() @ weights + (reduced @ weights).square())
    return centred / quadruple_weight(weights), centred.diagonal() <= _ROUNDING**2 * columns * values


def quadruple_weight(weights: Tensor) -> float:
    """Return ``Σ w_i w_j w_k w_l / (Σ w)^4`` over distinct rows; the smaller, the more digits are lost."""
    shares = weights / weights.sum()
    second, third, fourth = (float((shares**power).sum()) for power in (2, 3, 4))
    return 1 - 6 * second + 3 * second**2 + 8 * third - 6 * fourth


def row_products(first: PairwiseMatrix, second: PairwiseMatrix, effects: Tensor) -> Tensor:
    """Return ``Σ_j A_ij²``, ``Σ_j A_ij B_ij`` and ``Σ_j B_ij²`` for every sample i, (3, n).

    The matrices are of the same n samples, and their `effects` (2, n) come from `centred_products`.
    """
    num_samples, device = first.num_samples, first.rows.device
    sums, ones = first.rows.new_zeros(3, num_samples), first.rows.new_ones(num_samples)
    tiling = _Tiling(num_samples, device)
    for tile in tiling:
        a = _reduced_tile(first, effects[0], tile, tiling.buffer(0, tile))
        b = _reduced_tile(second, effects[1], tile, tiling.buffer(1, tile))
        products = torch.mul(a, b, out=tiling.buffer(2, tile))
        for sums_of, values in zip(sums, (a.square_(), products, b.square_()), strict=True):
            tile.add_sums(sums_of, values, ones)
    return sums


def permuted_products(
    first: PairwiseMatrix, second: PairwiseMatrix, effects: Tensor, permutations: Tensor
) -> Tensor:
    """Return ``(A·B)``, (m,), with the samples of `second` in m other orders, (m, n) int64.

    The matrices and `effects` are those of `row_products`.
    """
    num_samples, device = first.num_samples, first.rows.device
    sums = first.rows.new_zeros(permutations.shape[0])
    if _sorts([first, second]):
        x, y = (SortedScalar.of(matrix.rows[:, 0]) for matrix in (first, second))
        x_sums, y_sums = x.row_sums()[None], y.row_sums()[None]
        for k, order in enumerate(permutations):
            sums[k] = 4 * expansion(sum_of_products(x, y.values[order]), x_sums, y_sums[:, order]).sum()
        return sums / (num_samples * (num_samples - 3))
    tiling = _Tiling(num_samples, device)
    for tile in tiling:
        a = _reduced_tile(first, effects[0], tile, tiling.buffer(0, tile)).reshape(-1)
        for k, permutation in enumerate(permutations):
            b = _reduced_tile(second, effects[1], tile, tiling.buffer(1, tile), permutation)
            sums[k] += torch.dot(a, b.reshape(-1))
    return 2 * sums / (num_samples * (num_samples - 3))


_Sums: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _tiled_sums(matrices: Sequence[PairwiseMatrix], weights: Tensor | None = None) -> _Sums:
    """Return effects r (k, n) and sums of the reduced matrices ``a'_ij = a_ij − r_i − r_j``.

    The sums are ``Σ_{j≠i} a'_ij``, (k, 1, n), and ``Σ_{i<j} a'_ij b'_ij``, (k, k). With weights they are
    weighted as the docstring of this module says, and those of rows come with those of squared weights,
    (k, 2, n).
    """
    num_samples, num_matrices = matrices[0].num_samples, len(matrices)
    effects = torch.stack([_anchored_effects(matrix) for matrix in matrices])
    powers, pair_factors = effects.new_ones(1, num_samples), None
    if weights is not None:
        powers = torch.stack([weights, weights.square()])
        # The weight of a pair is (w_i, w_i²) · these coefficients · (w_j, w_j²).
        pair_factors = powers.T @ powers.new_tensor([[1 - float(powers[1].sum()), -1], [-1, 2]])
    row_sums = effects.new_zeros(num_matrices, len(powers), num_samples)
    pair_sums = effects.new_zeros(num_matrices, num_matrices)
    tiling = _Tiling(num_samples, effects.device)
    for tile in tiling:
        flat: list[Tensor] = []
        for k, matrix in enumerate(matrices):
            values = _reduced_tile(matrix, effects[k], tile, tiling.buffer(k, tile))
            for sums, power in zip(row_sums[k], powers, strict=True):
                tile.add_sums(sums, values, power)
            flat.append(values.reshape(-1))
            weighted = flat[k]
            if pair_factors is not None:
                pair = tiling.buffer(num_matrices, tile)
                torch.mm(pair_factors[tile.rows], powers[:, tile.columns], out=pair)
                weighted = pair.mul_(values).reshape(-1)
            for other, other_flat in enumerate(flat):
                pair_sums[k, other] += torch.dot(weighted, other_flat)
    return effects, row_sums, pair_sums.tril() + pair_sums.tril(-1).T


# -- scalars ----------------------------------------------------------------------------------------------


def _sorts(matrices: Sequence[PairwiseMatrix]) -> bool:
    """Tell whether all are distances of scalars, and of enough of them."""
    return matrices[0].num_samples >= _MIN_SAMPLES_FOR_SORTING and all(
        type(matrix) is Distances and matrix.num_columns == 1 for matrix in matrices
    )


def _sorted_sums(matrices: Sequence[PairwiseMatrix]) -> _Sums:
    """Return the sums for distances of scalars, which are ``|z_i| + |z_j| − 2·m_ij``."""
    scalars = [SortedScalar.of(matrix.rows[:, 0]) for matrix in matrices]
    pair_sums = matrices[0].rows.new_zeros(len(scalars), len(scalars))
    for k, scalar in enumerate(scalars):
        pair_sums[k, k] = 4 * scalar.sum_of_squares()
        for other in range(k):
            pair_sums[k, other] = pair_sums[other, k] = 4 * sum_of_products(scalars[other], scalar.values)
    effects = torch.stack([scalar.values.abs() for scalar in scalars])
    return effects, torch.stack([-2 * scalar.row_sums() for scalar in scalars])[:, None], pair_sums
