"""What one of the settings with confounded images, clips or volumes consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from mdnorm_experiments.data.confounded import ConfoundedData, LoadedData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHOD_OF_NORM", "NORMS", "Setting"]

METHOD_OF_NORM = {"none": "none", "batch": "batchnorm", "group": "groupnorm"}
"""Norm of a backbone → the method that has this norm and nothing else."""
NORMS = tuple(METHOD_OF_NORM)


@dataclass(frozen=True)
class Setting:
    """Data, network and schedule of a setting.

    Attributes
    ----------
    name : str
        As in ``mdnorm-experiments NAME``.
    title : str
        Of the report.
    introduction : tuple of str
        Paragraphs: what the samples show, what confounds them, what an honest network reaches.
    make_data : callable
        (number of training samples, seed) → `ConfoundedData`; the same arguments give the same data.
    backbone : callable
        A norm of `NORMS` → an untrained module from (N, C, *spatial) to (N, F), with F as its attribute
        ``num_features``. Its weights follow from torch's seed.
    slots : tuple of str
        Modules inside the backbone after which "every layer" corrects, by name.
    base_norm : str
        The norm on which Metadata Normalization and BR-Net build.
    batch_size, epochs : int
    learning_rate : float
        Of Adam at the start; it falls to 0 by a half cosine.
    size, quick_size : int
        Training samples of the full and the quick form.
    quick_epochs : int
    quick_methods : tuple of str
    limit : float or None
        Accuracy on confound-free data of the best rule there is, a fraction, where it is known.
    examples : callable
        Draws example samples.
    warmup_epochs : int
        During which the learning rate rises.
    tuned : mapping
        Name of a field of `Method` → options that are other ones for this setting, tuned on the seeds 100 to
        103 for the accuracy on confound-free data (``benchmarks/settings_tuning.py``).
    load : callable or None
        (folder of the real data set in its published layout, "error" or "skip") → `LoadedData`.
    granularity : str
        Of the layers in the slots; see `mdnorm.MetadataNorm`.
    """

    name: str
    title: str
    introduction: tuple[str, ...]
    make_data: Callable[[int, int], ConfoundedData]
    backbone: Callable[[str], nn.Module]
    slots: tuple[str, ...]
    base_norm: str
    batch_size: int
    epochs: int
    learning_rate: float
    size: int
    quick_size: int
    quick_epochs: int
    quick_methods: tuple[str, ...]
    limit: float | None
    examples: Callable[[ConfoundedData], Figure]
    warmup_epochs: int = 0
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    load: Callable[[Path, str], LoadedData] | None = None
    granularity: str = "element"
