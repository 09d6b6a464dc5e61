"""Five stages in which the true effect fades and the confounder takes over (Shah et al., R-MDN, ICML 2025).

The images are those of `mdnorm_experiments.data.synthetic` with other magnitudes: in the first stage U(3, 5)
in group A and U(4, 6) in group B. A growing shift s moves the groups' true effects towards each other, by s
each, and their confounders apart. The effects overlap on (1 + 2s)/2 of their range, the confounders on (1 −
2s)/2; in the overlap one can only guess, which gives the limits below.
"""

from __future__ import annotations

from mdnorm_experiments.data.synthetic import SyntheticData, make_synthetic

SHIFTS = (0.0, 0.125, 0.25, 0.375, 0.5)
"""s of each stage."""
NUM_STAGES = len(SHIFTS)
CONFOUNDER_RANGE = (2.5, 6.5)
"""Lowest and highest confounder of all stages."""

EFFECT_LIMITS = tuple(1 - (1 + 2 * shift) / 4 for shift in SHIFTS)
"""Best accuracy from the true effect alone, by stage."""
CONFOUNDER_LIMITS = tuple(1 - (1 - 2 * shift) / 4 for shift in SHIFTS)
"""Best accuracy from the confounder alone, by stage."""
BOTH_LIMITS = tuple(1 - (1 - 4 * shift**2) / 8 for shift in SHIFTS)
"""Best accuracy from both, by stage."""


def make_stage(
    stage: int, group_size: int = 1000, *, seed: int = 0, noise: float = 0.01, stratified: bool = False
) -> SyntheticData:
    """Generate the data of stage 0 … 4; for the arguments see `make_synthetic`, whose errors it raises."""
    if not 0 <= stage < NUM_STAGES:
        raise ValueError(f"stage must be 0 … {NUM_STAGES - 1}, got {stage}.")
    shift = SHIFTS[stage]
    return make_synthetic(
        group_size,
        seed=seed,
        noise=noise,
        effect_ranges=((3 + shift, 5 + shift), (4 - shift, 6 - shift)),
        confounder_ranges=((3 - shift, 5 - shift), (4 + shift, 6 + shift)),
        stratified=stratified,
    )
