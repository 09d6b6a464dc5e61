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

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# A block of this many elements is about as fast pair by pair as through another level.
_BLOCK_SIZE = 32

# Up to here the four quadrants go through the levels together, padded to the size of the largest: operations
# take longer to start than to do.
_MAX_SAMPLES_AT_ONCE = 2**14

# Blocks that are compared at once. Their 2^15 values are as many as PyTorch leaves to one thread: in so short
# an operation threads wait for each other longer than they work.
_CHUNK_SIZE = 2**10


@dataclass(frozen=True)
class SortedScalar:
    """A scalar variable (n,) float64, centred at its median, and its order."""

    values: Tensor
    # The samples with negative and with positive values, each by ascending absolute value.
    halves: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, values: Tensor) -> SortedScalar:
        """Sort ``(n,)`` float64 values."""
        order = _argsort(values)
        centred = values - values[order[values.shape[0] // 2]]
        num_negative, num_positive = int((centred < 0).sum()), int((centred > 0).sum())
        return cls(centred, (order[:num_negative].flip(0), order[len(order) - num_positive :]))

    def row_sums(self) -> Tensor:
        """Return ``Σ_{j≠i} m_ij`` of shape (n,)."""
        sums = torch.zeros_like(self.values)
        for half in self.halves:
            size = self.values[half].abs_()
            sums[half] = pad(size, (1, 0))[:-1].cumsum(0).addcmul_(size, _countdown(len(size), size))
        return sums

    def sum_of_squares(self) -> Tensor:
        """Return ``Σ_{i<j} m_ij²``."""
        total = self.values.new_zeros(())
        for half in self.halves:
            total += torch.dot(self.values[half].square_(), _countdown(len(half), total))
        return total


def sum_of_products(x: SortedScalar, y: Tensor) -> Tensor:
    """Return ``Σ_{i<j} m_ij(x)·m_ij(y)``, () float64, of x and the centred values (n,) of another scalar."""
    quadrants: list[tuple[Tensor, Tensor, Tensor]] = []
    for half in x.halves:
        of_half = y.index_select(0, half)
        for inside in (_nonzero(of_half < 0), _nonzero(of_half > 0)):
            v = of_half.index_select(0, inside).abs_()
            ranks = _argsort(v)
            u = x.values.index_select(0, half[inside[ranks]]).abs_()
            quadrants.append((u, v.index_select(0, ranks), ranks))
    if len(y) <= _MAX_SAMPLES_AT_ONCE:
        return _sum_of_minimum_products(quadrants)
    return torch.stack([_sum_of_minimum_products([quadrant]) for quadrant in quadrants]).sum()


def _argsort(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        # NumPy sorts with vector instructions, several times faster than PyTorch.
        return torch.from_numpy(values.numpy().argsort())
    return values.argsort()


def _countdown(length: int, like: Tensor) -> Tensor:
    """Return ``length − 1, …, 1, 0`` in the dtype and on the device of `like`."""
    return torch.arange(length - 1, -1, -1, dtype=like.dtype, device=like.device)


def _sum_of_minimum_products(quadrants: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return ``Σ_{i<j} min(u_i, u_j)·min(v_i, v_j)`` over the pairs within each quadrant.

    A quadrant has u, v and the ranks of u, by ascending v.
    """
    largest = max(1, *(len(ranks) for _, _, ranks in quadrants))
    num_levels = ((largest - 1) // _BLOCK_SIZE).bit_length()
    num_blocks = 2**num_levels
    block_size = -(-largest // num_blocks)
    padded = []
    for u, v, ranks in quadrants:
        # Blocks of equal size: zeros in front change no sum.
        front = torch.arange(num_blocks * block_size - len(ranks), device=ranks.device)
        zeros = (len(front), 0)
        padded.append((pad(u, zeros), pad(v, zeros), torch.cat([front, ranks + len(front)])))
    u, v, blocks = map(torch.cat, zip(*padded, strict=True))
    blocks = blocks.to(torch.int32).floor_divide_(block_size)

    total = u.new_zeros(())
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
