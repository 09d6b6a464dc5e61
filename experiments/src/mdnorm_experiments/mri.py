"""Setting 4 of the paper: diagnosis from T1 volumes with age, sex and site as metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mdnorm.design import polynomial
from mdnorm.extras import requires
from mdnorm_experiments.confounded import ConfoundedSetting
from mdnorm_experiments.data import bids, brains
from mdnorm_experiments.data.brains import Brains, make_brains
from mdnorm_experiments.data.confounded import ConfoundedData, LoadedData, Samples, drawn_data, part_seed
from mdnorm_experiments.figures import picture_grid
from mdnorm_experiments.networks import ConvolutionalBackbone

_HELD_OUT = 400
_AGE_RANGE = (40.0, 95.0)
_DECADE = 10.0


def brain_backbone(norm: str, channels: Sequence[int] = (8, 16, 32, 32)) -> ConvolutionalBackbone:
    """Return four 3D convolutions of MONAI, of stride 2 but the last, for (N, 1, D, H, W) volumes.

    These have some 32 voxels a side; `channels` are multiples of 4, `norm` is one of `NORMS`.
    MissingExtraError without MONAI.
    """
    with requires("mri", "mdnorm-experiments"):
        from monai.networks.blocks.convolutions import Convolution

    layers = zip(pairwise((1, *channels)), (2, 2, 2, 1), strict=True)
    convolutions = [Convolution(3, *widths, strides=stride, conv_only=True) for widths, stride in layers]
    pools = {"pool": nn.Identity(), "last_pool": nn.AdaptiveAvgPool3d((4, 5, 4))}
    return ConvolutionalBackbone(
        convolutions, channels, norm, spatial_dims=3, num_positions=4 * 5 * 4, **pools
    )


def _samples(
    found: Brains | bids.BidsFolder, volumes: Tensor, sites: int, low: float, high: float
) -> Samples:
    """Return standardised volumes as samples, with ages from `low` to `high`."""
    each_site = one_hot(found.site, sites).float()
    male = found.sex.float().unsqueeze(1)
    # The first site is the reference: with all of them the columns would add up to the intercept.
    design = torch.cat([polynomial(found.age, 3, low=low, high=high), male, each_site[:, 1:]], 1)
    variables = torch.cat([found.age.unsqueeze(1) / _DECADE, male, each_site], 1)
    return Samples(volumes, found.labels, design, variables, found.site)


def _confounders(sites: int) -> dict[str, tuple[int, ...]]:
    return {"age": (0,), "sex": (1,), "site": tuple(range(2, 2 + sites))}


def make_brain_data(size: int, seed: int) -> ConfoundedData:
    """Return drawn brains whose age and site go with the diagnosis, and confound-free ones."""

    def draw(count: int, part: int, correlation: float) -> Samples:
        drawn = make_brains(count, seed=part_seed(seed, part), correlation=correlation)
        return _samples(drawn, bids.standardize(drawn.volumes), len(brains.SITES), *_AGE_RANGE)

    confounders = _confounders(len(brains.SITES))
    return drawn_data(draw, size, _HELD_OUT, 0.8, brains.CLASSES, brains.SITES, confounders)


def load_brains(folder: Path, on_problem: str, columns: Mapping[str, str] | None = None) -> LoadedData:
    """Return a BIDS folder, see `bids.load_bids`; ValueError if all ages or all sites are the same."""
    found = bids.load_bids(folder, columns=columns, on_problem=on_problem)
    low, high = float(found.age.min()), float(found.age.max())
    if low == high or len(found.sites) < 2:
        raise ValueError(
            f"age and site must differ between subjects: {folder} has ages from {low:g} to {high:g} and the "
            f"site(s) {', '.join(found.sites)}."
        )
    samples = _samples(found, found.volumes, len(found.sites), low, high)
    confounders = _confounders(len(found.sites))
    return LoadedData(samples, found.classes, found.sites, confounders, found.problems.text())


def _examples(data: ConfoundedData) -> Figure:
    """Draw a coronal slice through the hippocampus of a subject of each class and site, and an axial one."""
    samples = data.train
    height, depth = samples.inputs.shape[3], samples.inputs.shape[4]
    middle = (round(height * 0.475), depth // 2 - 1)
    lines: list[tuple[str, Sequence[tuple[Any, str]]]] = []
    for label, name in enumerate(data.classes):
        pairs = []
        for group, site in enumerate(data.groups):
            members = torch.nonzero((samples.labels == label) & (samples.groups == group))[:, 0].tolist()
            if not members:
                pairs.append(((None, ""), (None, "")))
                continue
            volume = samples.inputs[members[0], 0].numpy()
            age, sex = samples.confounders[members[0], :2].tolist()
            text = f"{name}, site {site}\n{'male' if sex else 'female'}, {age * _DECADE:.0f} years"
            pairs.append(((volume[:, middle[0]].T, text), (volume[:, :, middle[1]].T, "")))
        lines += [("", line) for line in zip(*pairs, strict=True)]
    size = (0.4 + 1.7 * len(data.groups), 1.0 * len(lines) + 0.3)
    return picture_grid(lines, size, cmap="gray", origin="lower", vmin=-3, vmax=2)


SETTING = ConfoundedSetting(
    name="mri",
    title="Metadata Normalization on brain MRI of several sites",
    introduction=(
        "Drawn T1 volumes, 6 mm a voxel, made of the MNI152 template's tissues. The diagnosis thins the "
        "hippocampus, whose volume overlaps between patients and controls. Age, sex and site (its contrast, "
        "bias field and noise) tell nothing of the diagnosis. But in the training data nine of ten patients "
        "come from an old cohort, mostly at two of the four sites, and nine of ten controls from a young "
        "one, mostly at the other two.",
        f"The best rule that looks at the hippocampus is right in {100 * brains.LIMIT:.1f} % of all brains "
        "whose age and site say nothing. A network that judges by age and site is worse there.",
    ),
    make_data=make_brain_data,
    backbone=brain_backbone,
    slots=("norm1", "norm2", "norm3"),
    batch_size=50,
    epochs=10,
    learning_rate=1e-3,
    # Without it the first steps may leave no hidden unit alive.
    warmup_epochs=2,
    tuned={"adversary": {"strength": 0.003}},
    size=1200,
    quick_size=400,
    quick_epochs=12,
    quick_methods=("none", "mdn-last-running"),
    limit=brains.LIMIT,
    examples=_examples,
    load=load_brains,
)
