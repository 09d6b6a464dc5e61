"""Setting 4 of the paper: diagnosis from T1 volumes with age, sex and site as metadata."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mdnorm.design import polynomial
from mdnorm.experiments.data import brains
from mdnorm.experiments.data.bids import load_bids, standardize
from mdnorm.experiments.data.brains import make_brains
from mdnorm.experiments.data.confounded import ConfoundedData, LoadedData, Samples, part_seed
from mdnorm.experiments.networks import ConvolutionalBackbone
from mdnorm.experiments.settings import Setting
from mdnorm.extras import requires

__all__ = ["SETTING", "BrainBackbone", "load_brains", "make_brain_data"]

_HELD_OUT = 400
_AGE_RANGE = (40.0, 95.0)
_DECADE = 10.0


class BrainBackbone(ConvolutionalBackbone):
    """Four 3D convolutions of MONAI, of stride 2 but the last, for (N, 1, D, H, W) volumes of some 32 voxels.

    Parameters
    ----------
    norm : "none", "batch" or "group"
    channels : tuple of int
        Of the convolutions; multiples of 4. There are 80 features for each channel of the last.

    Raises
    ------
    MissingExtraError
        MONAI is not installed.
    """

    def __init__(self, norm: str, channels: tuple[int, int, int, int] = (8, 16, 32, 32)) -> None:
        with requires("mri"):
            from monai.networks.blocks.convolutions import Convolution

        layers = zip(pairwise((1, *channels)), (2, 2, 2, 1), strict=True)
        convolutions = [
            Convolution(3, before, after, strides=stride, conv_only=True)
            for (before, after), stride in layers
        ]
        super().__init__(
            convolutions,
            channels,
            norm,
            spatial_dims=3,
            pool=nn.Identity(),
            last_pool=nn.AdaptiveAvgPool3d((4, 5, 4)),
            num_positions=4 * 5 * 4,
        )


def _samples(
    volumes: Tensor,
    labels: Tensor,
    age: Tensor,
    sex: Tensor,
    site: Tensor,
    sites: int,
    age_range: tuple[float, float],
) -> Samples:
    low, high = age_range
    each_site = one_hot(site, sites).float()
    male = sex.float().unsqueeze(1)
    # The first site is the reference: with all of them the columns would add up to the intercept.
    design = torch.cat([polynomial(age, 3, low=low, high=high), male, each_site[:, 1:]], 1)
    variables = torch.cat([age.unsqueeze(1) / _DECADE, male, each_site], 1)
    return Samples(volumes, labels, design, variables, site)


def _confounders(sites: int) -> dict[str, tuple[int, ...]]:
    return {"age": (0,), "sex": (1,), "site": tuple(range(2, 2 + sites))}


def make_brain_data(size: int, seed: int) -> ConfoundedData:
    """Return drawn brains whose age and site go with the diagnosis, and confound-free ones."""

    def draw(count: int, part: int, correlation: float) -> Samples:
        drawn = make_brains(count, seed=part_seed(seed, part), correlation=correlation)
        volumes = standardize(drawn.volumes)
        return _samples(
            volumes, drawn.labels, drawn.age, drawn.sex, drawn.site, len(brains.SITES), _AGE_RANGE
        )

    parts = (draw(size, 0, 0.8), draw(_HELD_OUT, 1, 0.8), draw(_HELD_OUT, 2, 0.0))
    return ConfoundedData(
        *parts,
        brains.CLASSES,
        brains.SITES,
        _confounders(len(brains.SITES)),
        unconfounded=partial(draw, size, 3, 0.0),
        held_out=partial(draw, size // 4, 4, 0.8),
    )


def load_brains(folder: Path, on_problem: str) -> LoadedData:
    """Return a BIDS folder, see `load_bids`, for ``mdnorm experiment mri``.

    Raises
    ------
    ValueError
        All subjects have the same age or come from one site.
    """
    found = load_bids(folder, on_problem=on_problem)
    low, high = float(found.age.min()), float(found.age.max())
    if low == high or len(found.sites) < 2:
        raise ValueError(
            f"age and site must differ between subjects: {folder} has ages from {low:g} to {high:g} and the "
            f"site(s) {', '.join(found.sites)}."
        )
    samples = _samples(
        found.volumes, found.labels, found.age, found.sex, found.site, len(found.sites), (low, high)
    )
    confounders = _confounders(len(found.sites))
    return LoadedData(samples, found.classes, found.sites, confounders, found.problems.text())


def _examples(data: ConfoundedData) -> Figure:
    """Draw a coronal slice through the hippocampus of a subject of each class and site, and an axial one."""
    samples = data.train
    height, depth = samples.inputs.shape[3], samples.inputs.shape[4]
    middle = (round(height * 0.475), depth // 2 - 1)
    rows, columns = len(data.classes), len(data.groups)
    figure = Figure(figsize=(0.4 + 1.7 * columns, 1.0 * rows * 2 + 0.3), layout="constrained")
    axes = figure.subplots(rows * 2, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for label, name in enumerate(data.classes):
        for group, site in enumerate(data.groups):
            members = torch.nonzero((samples.labels == label) & (samples.groups == group))[:, 0]
            if not len(members):
                continue
            row = int(members[0])
            volume = samples.inputs[row, 0]
            for number, cut in enumerate((volume[:, middle[0]], volume[:, :, middle[1]])):
                axis = axes[label * 2 + number, group]
                axis.imshow(cut.numpy().T, cmap="gray", origin="lower", vmin=-3, vmax=2)
            age, sex = float(samples.confounders[row, 0]) * _DECADE, float(samples.confounders[row, 1])
            title = f"{name}, site {site}\n{'male' if sex else 'female'}, {age:.0f} years"
            axes[label * 2, group].set_title(title, fontsize=7, pad=2)
    return figure


SETTING = Setting(
    name="mri",
    title="Metadata Normalization on brain MRI of several sites",
    introduction=(
        "Drawn T1 volumes, 6 mm a voxel, made of the MNI152 template's tissues. The diagnosis thins the "
        "hippocampus, whose volume overlaps between patients and controls. Age widens the ventricles and "
        "thins the cortex, sex changes the size of the head, and every site has its own contrast, bias field "
        "and noise; none of these tells anything of the diagnosis. But in the training data nine of ten "
        "patients come from an old cohort (74 ± 6 years, mostly at two of the four sites) and nine of ten "
        "controls from a young one (62 ± 6 years, mostly at the other two).",
        f"The best rule that looks at the hippocampus is right in {100 * brains.LIMIT:.1f} % of all brains "
        "whose age and site say nothing. A network that judges by age and site is better on data like those "
        "of its training and worse there.",
    ),
    make_data=make_brain_data,
    backbone=BrainBackbone,
    slots=("norm1", "norm2", "norm3"),
    base_norm="none",
    batch_size=50,
    epochs=10,
    learning_rate=1e-3,
    # Without it the first steps may leave no hidden unit alive.
    warmup_epochs=2,
    tuned={"adversary": {"strength": 0.1}},
    size=1200,
    quick_size=600,
    quick_epochs=15,
    quick_methods=("none", "mdn-last-running"),
    limit=brains.LIMIT,
    examples=_examples,
    load=load_brains,
)
