"""Two groups of images with a true effect and a confounder of known size (Lu et al., section 4.1).

Each 32×32 image has three Gaussian blobs, one a quadrant. The two on the diagonal have the magnitude of the
true effect, the third, off the diagonal, has the magnitude of the confounder. Both magnitudes are drawn from
U(1, 4) in group A and U(3, 6) in group B, so they overlap on a third of their range, and that overlap is all
a classifier can get wrong:

- from the true effect alone the best accuracy is 1 − ½·⅓ = 83.3 %: in the overlap one can only guess;
- from the confounder too it is 1 − ½·⅓·⅓ = 94.4 %: both must fall into the overlap.

A classifier that does not use the confounder is therefore at 83.3 %, and what lies above was got from the
confounder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32
RANGES = ((1.0, 4.0), (3.0, 6.0))
ACCURACY_WITHOUT_CONFOUNDER = 1 - 1 / 2 * 1 / 3
ACCURACY_WITH_CONFOUNDER = 1 - 1 / 2 * 1 / 3 * 1 / 3


@dataclass(frozen=True)
class SyntheticData:
    """Images with their labels and the two effects, group A first.

    Attributes
    ----------
    images : (2N, 1, 32, 32) tensor, float32
    labels : (2N,) tensor, float32
        0 in group A, 1 in group B.
    effect : (2N,) tensor, float32
        Magnitude of the true effect.
    confounder : (2N,) tensor, float32
        Magnitude of the confounder.
    """

    images: Tensor
    labels: Tensor
    effect: Tensor
    confounder: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]


def make_synthetic(group_size: int = 1000, *, seed: int = 0, noise: float = 0.01) -> SyntheticData:
    """Generate the data set.

    Parameters
    ----------
    group_size : int
        N, images a group.
    seed : int
        The same seed gives the same data.
    noise : float
        Standard deviation of the pixel noise; a blob's peak is its magnitude.

    Raises
    ------
    ValueError
        group_size below 1 or a negative noise.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}.")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(group_size)
    low, high = torch.tensor(RANGES)[labels].unbind(1)
    effect, confounder = low + (high - low) * torch.rand(2, len(labels), generator=generator)
    images = noise * torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    half = IMAGE_SIZE // 2
    blob = _blob(half)
    images[:, 0, :half, :half] += effect[:, None, None] * blob
    images[:, 0, half:, half:] += effect[:, None, None] * blob
    images[:, 0, half:, :half] += confounder[:, None, None] * blob
    return SyntheticData(images, labels.float(), effect, confounder)


def _blob(size: int) -> Tensor:
    """A Gaussian of peak 1 whose ±5 standard deviations fill the square."""
    axis = torch.linspace(-5, 5, size)
    profile = torch.exp(-0.5 * axis**2)
    profile = profile / profile.max()
    return torch.outer(profile, profile)
