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

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SortedScalar", "sum_of_products"]

# A block of this many elements is about as fast pair by pair as through another level.
_BLOCK_SIZE = 16


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

    def row_sums(self) -> Tensor:
        """Return ``Σ_{j≠i} m_ij`` of shape (n,)."""
        sums = torch.zeros_like(self.values)
        for half in self.halves():
            size = self.values[half].abs()
            before = size.cumsum(0) - size
            sums[half] = before + size * _countdown(size)
        return sums

    def sum_of_squares(self) -> Tensor:
        """Return ``Σ_{i<j} m_ij²``."""
        total = torch.zeros((), dtype=self.values.dtype, device=self.values.device)
        for half in self.halves():
            size = self.values[half]
            total += torch.dot(size * size, _countdown(size))
        return total


def sum_of_products(x: SortedScalar, y: SortedScalar) -> Tensor:
    """Return ``Σ_{i<j} m_ij(x)·m_ij(y)``.

    Parameters
    ----------
    x, y : SortedScalar
        Of the same n samples.

    Returns
    -------
    Tensor, () float64
    """
    total = torch.zeros((), dtype=x.values.dtype, device=x.values.device)
    rank = torch.empty_like(x.order)
    for x_half in x.halves():
        rank.fill_(-1)
        rank[x_half] = torch.arange(x_half.shape[0], device=rank.device)
        for y_half in y.halves():
            x_ranks = rank[y_half]
            inside = x_ranks >= 0
            # Ranks within the quadrant instead of within the half.
            x_ranks = x_ranks[inside]
            quadrant = y_half[inside]
            present = torch.zeros(x_half.shape[0], dtype=torch.int64, device=rank.device)
            present[x_ranks] = 1
            local_ranks = (present.cumsum(0) - 1)[x_ranks]
            u, v = x.values[quadrant].abs(), y.values[quadrant].abs()
            total += _sum_of_minimum_products(u, v, local_ranks)
    return total


def _argsort(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        # NumPy sorts with vector instructions, several times faster than PyTorch.
        return torch.from_numpy(values.numpy().argsort())
    return values.argsort()


def _countdown(values: Tensor) -> Tensor:
    """Return ``n − 1, …, 1, 0`` in the dtype of `values`."""
    return torch.arange(values.shape[0] - 1, -1, -1, dtype=values.dtype, device=values.device)


def _sum_of_minimum_products(u: Tensor, v: Tensor, u_ranks: Tensor) -> Tensor:
    """Return ``Σ_{i<j} min(u_i, u_j)·min(v_i, v_j)`` for values ≥ 0 in ascending order of `v`."""
    num_values = v.shape[0]
    total = torch.zeros((), dtype=v.dtype, device=v.device)
    num_levels = max(0, (max(num_values, 1) - 1) // _BLOCK_SIZE).bit_length()
    num_blocks = 2**num_levels
    block_size = -(-num_values // num_blocks)
    # Blocks of equal size: zeros in front change no sum.
    padding = num_blocks * block_size - num_values
    u, v = (torch.nn.functional.pad(values, (padding, 0)) for values in (u, v))
    u_ranks = torch.nn.functional.pad(u_ranks + padding, (padding, 0))
    u_ranks[:padding] = torch.arange(padding, device=v.device)
    blocks = torch.div(u_ranks, max(block_size, 1), rounding_mode="floor").to(torch.int32)

    for level in range(num_levels):
        half = block_size * 2 ** (num_levels - level - 1)
        is_right = blocks.bitwise_and(1 << (num_levels - level - 1)).bool()
        left, right = is_right.logical_not().nonzero().view(-1), is_right.nonzero().view(-1)
        u_left, v_left = u[left].view(-1, half), v[left].view(-1, half)
        v_right = v[right].view(-1, half)
        first = torch.arange(left.shape[0] // half, device=v.device).unsqueeze(1)
        # Position in the block, less the elements of the same half before it.
        num_before = left.view(-1, half) - torch.arange(half, device=v.device) - first * (2 * half)
        cumulative = v.new_zeros(v_right.shape[0], half + 1)
        torch.cumsum(v_right, dim=1, out=cumulative[:, 1:])
        sum_before = cumulative.view(-1)[num_before + first * (half + 1)]
        v_left_after = (half - num_before).to(v.dtype).mul_(v_left)
        total += torch.dot(u_left.reshape(-1), sum_before.add_(v_left_after).view(-1))
        u = torch.cat([u_left.view(-1), u[right]])
        v = torch.cat([v_left.view(-1), v_right.view(-1)])
        blocks = torch.cat([blocks[left], blocks[right]])

    u, v = (values.view(num_blocks, block_size).T.contiguous() for values in (u, v))
    for shift in range(1, block_size):
        total += torch.dot(torch.minimum(u[:-shift], u[shift:]).view(-1), v[:-shift].reshape(-1))
    return total
