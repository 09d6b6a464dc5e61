"""Sums over all pairs of samples of two scalar variables in O(n log n) arithmetic.

Let `z = x − c` with the median `c`. Then ``|x_i − x_j| = |z_i| + |z_j| − 2·m_ij`` with ``m_ij = min(|z_i|,
|z_j|)`` where z_i and z_j have the same sign, and 0 elsewhere. U-centring takes ``|z_i| + |z_j|`` away, so
that `m` stands for the distances. It has no negative value and no far outlier: its sums lose no digits.

The products of the `m` of x and of y are different from 0 only for pairs within one of the four quadrants of
(z_x, z_y). With u = |z_x| and v = |z_y| there, elements are sorted by v and then split, level by level, by
the bits of the rank of u (a wavelet matrix). Each level adds the pairs that it separates: for i in the half
of the smaller u and j in the other, ``min(u_i, u_j)·min(v_i, v_j)`` is ``u_i·v_j`` where j comes before i in
the order of v, and ``u_i·v_i`` where it comes after. So it takes the number and the cumulative sum of the v
before i. Blocks of a few elements are summed pair by pair. Ties need no attention: either order is right.

References
----------
.. [1] Huo, X., & Székely, G. J. (2016). Fast computing for distance covariance. Technometrics, 58(4),
   435–447.
.. [2] Chaudhuri, A., & Hu, W. (2019). A fast algorithm for computing distance correlation. Computational
   Statistics & Data Analysis, 135, 15–24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

# A block of this many elements is about as fast pair by pair as through another level.
_BLOCK_SIZE = 32

# Up to here the four quadrants go through the levels together, padded to the size of the largest: operations
# take longer to start than to do.
_MAX_SAMPLES_AT_ONCE = 2**14

# Blocks that are compared at once. Their 2^15 values are as many as PyTorch leaves to one thread: in so short
# an operation threads wait for each other longer than they work.
_CHUNK_SIZE = 2**10


# Of the samples in one quadrant, by ascending v: u, v and the ranks of u.
_Quadrant: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SortedScalar:
    """A scalar variable, centred at its median, and its order.

    Attributes
    ----------
    values : Tensor, (n,) float64
        ``z = x − c``.
    order : Tensor, (n,) int64
        Indices of ascending values.
    num_negative : int
        Values below 0: the first in `order`.
    num_positive : int
        Values above 0: the last in `order`.
    """

    values: Tensor
    order: Tensor
    num_negative: int
    num_positive: int

    @classmethod
    def of(cls, values: Tensor) -> SortedScalar:
        """Sort ``(n,)`` float64 values."""
        order = _argsort(values)
        centred = values - values[order[values.shape[0] // 2]]
        return cls(centred, order, int((centred < 0).sum()), int((centred > 0).sum()))

    def permuted(self, permutation: Tensor) -> SortedScalar:
        """Return the variable with value ``values[permutation[i]]`` at sample i."""
        inverse = torch.empty_like(permutation)
        inverse[permutation] = torch.arange(permutation.shape[0], device=permutation.device)
        return SortedScalar(
            self.values[permutation], inverse[self.order], self.num_negative, self.num_positive
        )

    def halves(self) -> list[Tensor]:
        """Return the samples with negative and with positive values, each by ascending absolute value."""
        num_samples = self.values.shape[0]
        return [self.order[: self.num_negative].flip(0), self.order[num_samples - self.num_positive :]]

    def _sizes(self) -> list[Tensor]:
        """Return the absolute values of the halves, ascending."""
        return [self.values.index_select(0, half).abs_() for half in self.halves()]

    def row_sums(self) -> Tensor:
        """Return ``Σ_{j≠i} m_ij`` of shape (n,)."""
        sums = torch.zeros_like(self.values)
        for half, size in zip(self.halves(), self._sizes(), strict=True):
            sums[half] = size.cumsum(0).addcmul_(size, _countdown(size) - 1)
        return sums

    def sum_of_squares(self) -> Tensor:
        """Return ``Σ_{i<j} m_ij²``."""
        total = torch.zeros((), dtype=self.values.dtype, device=self.values.device)
        for size in self._sizes():
            total += torch.dot(size * size, _countdown(size))
        return total


def sum_of_products(x: SortedScalar, y: SortedScalar) -> Tensor:
    """Return ``Σ_{i<j} m_ij(x)·m_ij(y)``, () float64, of two scalars of the same n samples."""
    rank = torch.empty_like(x.order)
    quadrants: list[_Quadrant] = []
    for x_half in x.halves():
        rank.fill_(-1)
        rank[x_half] = torch.arange(x_half.shape[0], device=rank.device)
        for y_half in y.halves():
            x_ranks = rank.index_select(0, y_half)
            inside = _nonzero(x_ranks >= 0)
            x_ranks, samples = x_ranks.index_select(0, inside), y_half.index_select(0, inside)
            # Ranks within the quadrant instead of within the half.
            present = torch.zeros(x_half.shape[0], dtype=torch.int64, device=rank.device)
            present[x_ranks] = 1
            u, v = (scalar.values.index_select(0, samples).abs_() for scalar in (x, y))
            quadrants.append((u, v, (present.cumsum(0) - 1).index_select(0, x_ranks)))
    if x.values.shape[0] <= _MAX_SAMPLES_AT_ONCE:
        return _sum_of_minimum_products(quadrants)
    return torch.stack([_sum_of_minimum_products([quadrant]) for quadrant in quadrants]).sum()


def _argsort(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        # NumPy sorts with vector instructions, several times faster than PyTorch.
        return torch.from_numpy(values.numpy().argsort())
    return values.argsort()


def _countdown(values: Tensor) -> Tensor:
    """Return ``n − 1, …, 1, 0`` in the dtype of `values`."""
    return torch.arange(values.shape[0] - 1, -1, -1, dtype=values.dtype, device=values.device)


def _sum_of_minimum_products(quadrants: Sequence[_Quadrant]) -> Tensor:
    """Return ``Σ_{i<j} min(u_i, u_j)·min(v_i, v_j)`` over the pairs within each quadrant."""
    device = quadrants[0][0].device
    largest = max(1, *(len(u_part) for u_part, _, _ in quadrants))
    num_levels = ((largest - 1) // _BLOCK_SIZE).bit_length()
    num_blocks = 2**num_levels
    block_size = -(-largest // num_blocks)
    # Blocks of equal size: zeros in front change no sum.
    shape = (len(quadrants), num_blocks * block_size)
    u, v = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    blocks = torch.empty(shape, dtype=torch.int32, device=device)
    for index, (u_part, v_part, u_ranks) in enumerate(quadrants):
        padding = shape[1] - len(u_part)
        u[index, padding:], v[index, padding:] = u_part, v_part
        blocks[index, :padding] = torch.arange(padding, dtype=torch.int32, device=device)
        blocks[index, padding:] = u_ranks + padding
    u, v, blocks = u.view(-1), v.view(-1), blocks.floor_divide_(block_size).view(-1)

    total = torch.zeros((), dtype=torch.float64, device=device)
    elements = torch.arange(v.shape[0] // 2, device=v.device)
    for level in range(num_levels):
        half = block_size * 2 ** (num_levels - level - 1)
        num_parents = len(quadrants) * 2**level
        is_right = blocks.bitwise_and(1 << (num_levels - level - 1)).bool()
        left, right = _nonzero(is_right.logical_not()), _nonzero(is_right)
        u, u_right = u.index_select(0, left), u.index_select(0, right)
        v, v_right = v.index_select(0, left), v.index_select(0, right)
        # Position less the left elements before it: the right ones before it, of which `half` for every
        # parent before its own.
        num_before = (left - elements).view(num_parents, half)
        parents = torch.arange(num_parents, device=v.device).unsqueeze(1)
        cumulative = v.new_zeros(num_parents, half + 1)
        torch.cumsum(v_right.view(num_parents, half), dim=1, out=cumulative[:, 1:])
        minima = cumulative.view(-1).index_select(0, (num_before + parents).view(-1))
        num_after = ((parents + 1) * half - num_before).to(v.dtype)
        total += torch.dot(u, minima.addcmul_(num_after.view(-1), v))
        u, v = torch.cat([u, u_right]), torch.cat([v, v_right])
        blocks = torch.cat([blocks.index_select(0, left), blocks.index_select(0, right)])

    u, v = u.view(-1, block_size), v.view(-1, block_size)
    # Blocks whose values stay in the cache while they are compared.
    for u_part, v_part in zip(u.split(_CHUNK_SIZE), v.split(_CHUNK_SIZE), strict=True):
        u_part, v_part = u_part.T.contiguous(), v_part.T.contiguous()
        for shift in range(1, block_size):
            minima = torch.minimum(u_part[:-shift], u_part[shift:])
            total += torch.dot(minima.view(-1), v_part[:-shift].reshape(-1))
    return total


def _nonzero(flags: Tensor) -> Tensor:
    """Return the indices of (n,) flags that are set."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))  # 20 times faster than PyTorch
    return flags.nonzero().view(-1)
