"""What a setting with confounded images hands to training: three sets of samples with the same columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ConfoundedData", "Samples"]


@dataclass(frozen=True)
class Samples:
    """N samples in memory.

    Attributes
    ----------
    inputs : (N, C, *spatial) float32 tensor
        Images, clips (C, T, H, W) or volumes (C, D, H, W), scaled to about [0, 1] or standardised.
    labels : (N,) int64 tensor
        Classes from 0.
    metadata : (N, K) float32 tensor
        The design: a flexible basis of every metadata variable, no intercept, columns of similar size.
    confounders : (N, Q) float32 tensor
        The metadata variables themselves, against which dependence is measured and which the adversary
        predicts; categories as one-hot columns.
    groups : (N,) int64 tensor
        The metadata group of each sample, for rates by group.

    Raises
    ------
    ValueError
        Numbers of rows that differ, or a value that is not finite.
    """

    inputs: Tensor
    labels: Tensor
    metadata: Tensor
    confounders: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        rows = {name: len(tensor) for name, tensor in vars(self).items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"all tensors need the same number of rows, got {rows}.")
        for name in ("inputs", "metadata", "confounders"):
            finite = getattr(self, name).isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                bad = torch.nonzero(~finite)[:5, 0].tolist()
                raise ValueError(f"{name} must be finite: rows {bad} are not.")

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class ConfoundedData:
    """The data of one run.

    Attributes
    ----------
    train : Samples
        Confounded: the label goes with the metadata.
    test : Samples
        Held out, confounded in the same way.
    confound_free : Samples
        Held out, label and metadata independent: what a network has learned of the label itself.
    classes, groups : tuple of str
        Names by number.
    confounders : dict of str to tuple of int
        Name of a metadata variable → its columns in ``Samples.confounders``.
    """

    train: Samples
    test: Samples
    confound_free: Samples
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    confounders: dict[str, tuple[int, ...]]
