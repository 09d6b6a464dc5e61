"""Two groups of images with a true effect and a confounder of known size (Lu et al., section 4.1).

Each 32×32 image has three Gaussian blobs, one a quadrant. The two on the diagonal have the magnitude of the
true effect, the third that of the confounder: U(1, 4) in group A and U(3, 6) in group B each. In the overlap,
a third of the range, one can only guess: the best accuracy is 1 − ½·⅓ = 83.3 % from the true effect alone,
and 1 − ½·⅓·⅓ = 94.4 % with the confounder.

Variants change what is known of the confounder (see docs/results-synthetic.md). "sites": the third magnitude
is the sum of the offsets of 16 sites, a curve of age and an effect of sex; 27 more columns explain nothing.
"quadratic": it is a quadratic function of one metadata column, whose negative arm is rare, so that a straight
line explains much of it. "variance": there is no third blob; normal noise on the diagonal, cut at three
standard deviations, grows with the metadata by a factor of 16 in each group, and no limit is simple.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IMAGE_SIZE = 32
Ranges = tuple[tuple[float, float], tuple[float, float]]
"""Lowest and highest magnitude in group A and in group B."""
RANGES: Ranges = ((1.0, 4.0), (3.0, 6.0))
ACCURACY_WITHOUT_CONFOUNDER = 1 - 1 / 2 * 1 / 3
ACCURACY_WITH_CONFOUNDER = 1 - 1 / 2 * 1 / 3 * 1 / 3


@dataclass(frozen=True)
class SyntheticData:
    """2N images (2N, 1, 32, 32) with labels (2N,), 0 in group A, which comes first, and 1 in group B.

    `effect` (2N,) is the magnitude of the true effect, `confounder` (2N,) what the features must not depend
    on: the magnitude of the third blob or the one metadata column, −1 to 1 ("quadratic") or 0 to 1
    ("variance"). Only of the variant "sites": `site` (2N,) int64, 0 … 15, `sex` (2N,), 0 or 1, `age` (2N,),
    years, and `nuisance` (2N, 27), the first five correlated with the label.
    """

    images: Tensor
    labels: Tensor
    effect: Tensor
    confounder: Tensor
    site: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    sex: Tensor = field(default_factory=lambda: torch.empty(0))
    age: Tensor = field(default_factory=lambda: torch.empty(0))
    nuisance: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.labels)


def make_synthetic(
    group_size: int = 1000,
    *,
    seed: int = 0,
    noise: float = 0.01,
    variant: str = "plain",
    effect_ranges: Ranges = RANGES,
    confounder_ranges: Ranges = RANGES,
    stratified: bool = False,
) -> SyntheticData:
    """Generate N images a group; the same seed gives the same data.

    `noise` is the standard deviation of the pixels, where a blob's peak is its magnitude. The ranges are what
    the magnitudes are drawn from; only "plain" may have others of the confounder. `stratified` draws each
    magnitude of a group once from each of N equal parts of its range, in random order: then the share of a
    group that lies in the overlap hardly varies. ValueError for an argument out of range.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}.")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if variant != "plain" and confounder_ranges != RANGES:
        raise ValueError(
            f"the variant {variant!r} has confounder ranges of its own, got {confounder_ranges}."
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(group_size)
    low, high = torch.tensor([effect_ranges, confounder_ranges])[:, labels].unbind(2)
    uniform = torch.rand(2, len(labels), generator=generator)
    if stratified:
        # One row of parts a group and magnitude.
        parts = [torch.randperm(group_size, generator=generator) for _ in range(4)]
        uniform = (torch.cat(parts).view(2, -1) + uniform) / group_size
    effect, magnitude = low + (high - low) * uniform
    pixel_noise = noise * torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    confounder, extra = magnitude, {}
    if variant == "sites":
        extra = _sites(magnitude, labels, generator)
    elif variant == "quadratic":
        is_negative = torch.rand(len(labels), generator=generator) < 0.1
        confounder = torch.where(is_negative, -1.0, 1.0) * ((magnitude - 1) / 5).sqrt()
    shown = effect
    if variant == "variance":
        confounder = 0.3 * labels + 0.7 * uniform[1]
        spread = 0.1 * torch.exp(4 * confounder)
        shown = effect + spread * torch.randn(len(labels), generator=generator).clamp(-3, 3)
        magnitude = torch.zeros_like(magnitude)
    return SyntheticData(_draw(pixel_noise, shown, magnitude), labels.float(), effect, confounder, **extra)


VARIANTS = ("plain", "sites", "quadratic", "variance")
WITHOUT_LIMITS = frozenset({"variance"})
"""Variants for which the analytic limits do not hold."""
NUM_SITES = 16
_NUM_NUISANCE = 27


def _draw(images: Tensor, effect: Tensor, magnitude: Tensor) -> Tensor:
    half = IMAGE_SIZE // 2
    blob = _blob(half)
    images[:, 0, :half, :half] += effect[:, None, None] * blob
    images[:, 0, half:, half:] += effect[:, None, None] * blob
    images[:, 0, half:, :half] += magnitude[:, None, None] * blob
    return images


def _sites(magnitude: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw metadata that add up to the magnitudes: offset of the site + effect of sex + curve of age."""
    # The sites' offsets are the same in every data set; sites with a large one see large magnitudes.
    offsets = torch.linspace(-0.8, 0.8, NUM_SITES)[
        torch.randperm(NUM_SITES, generator=torch.Generator().manual_seed(0))
    ]
    logits = -0.5 * (magnitude.unsqueeze(1) - 3.5 - 2 * offsets) ** 2
    site = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    sex = (torch.rand(len(labels), generator=generator) < torch.sigmoid(magnitude - 3.5)).float()
    rest = (magnitude - 3.5 - offsets[site] - 0.6 * (sex - 0.5)) / 4
    # Strictly increasing, so a curve of age gives `rest` back exactly.
    age = 50 + 40 * (rest + 0.25 * torch.sin(torch.pi * rest))
    nuisance = torch.randn(len(labels), _NUM_NUISANCE, generator=generator)
    nuisance[:, :5] += labels.unsqueeze(1)
    return {"site": site, "sex": sex, "age": age, "nuisance": nuisance}


def _blob(size: int) -> Tensor:
    """A Gaussian of peak 1 whose ±5 standard deviations fill the square."""
    axis = torch.linspace(-5, 5, size)
    profile = torch.exp(-0.5 * axis**2)
    profile = profile / profile.max()
    return torch.outer(profile, profile)


# Five stages in which the true effect fades and the confounder takes over (Shah et al., R-MDN, ICML 2025). In
# the first both magnitudes are U(3, 5) in group A and U(4, 6) in group B; a shift s moves the groups' effects
# towards each other, by s each, and their confounders apart. The effects overlap on (1 + 2s)/2 of their
# range, the confounders on (1 − 2s)/2; in the overlap one can only guess.
SHIFTS = (0.0, 0.125, 0.25, 0.375, 0.5)
NUM_STAGES = len(SHIFTS)
CONFOUNDER_RANGE = (2.5, 6.5)
"""Lowest and highest confounder of all stages."""

EFFECT_LIMITS = tuple(1 - (1 + 2 * shift) / 4 for shift in SHIFTS)
"""Best accuracy from the true effect alone, by stage."""
CONFOUNDER_LIMITS = tuple(1 - (1 - 2 * shift) / 4 for shift in SHIFTS)
"""Best accuracy from the confounder alone, by stage."""
BOTH_LIMITS = tuple(1 - (1 - 4 * shift**2) / 8 for shift in SHIFTS)
"""Best accuracy from both, by stage."""


def make_stage(stage: int, group_size: int = 1000, **options: Any) -> SyntheticData:
    """Generate the data of stage 0 … 4, with options of `make_synthetic`, whose errors it raises."""
    if not 0 <= stage < NUM_STAGES:
        raise ValueError(f"stage must be 0 … {NUM_STAGES - 1}, got {stage}.")
    s = SHIFTS[stage]
    effect = ((3 + s, 5 + s), (4 - s, 6 - s))
    confounder = ((3 - s, 5 - s), (4 + s, 6 + s))
    return make_synthetic(group_size, effect_ranges=effect, confounder_ranges=confounder, **options)
