"""The methods that experiments compare: which normalisation sits where, with which settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mdnorm.layer import MetadataNorm
from mdnorm_experiments.networks import LAST_SLOT, SyntheticNetwork
from mdnorm_experiments.results import Row


@dataclass(frozen=True)
class Method:
    """A row of the table: its title, and which normalisation sits where.

    Attributes
    ----------
    title : str
        As in tables and figures.
    layers : "none", "last" or "every"
        Where `MetadataNorm` sits.
    other : callable or None
        Makes another normalisation for every layer, from its number of channels and of spatial dimensions.
    degree : int
        The confounder enters as a polynomial of this degree.
    options : dict
        Of `MetadataNorm`.
    penalty : dict
        For the estimator "penalty": the coefficients are trained by gradient descent with the rate
        batch size / "window", at most 1.
    adversary : dict
        Options of `Adversary`, for BR-Net.
    dependence : dict
        Options of `mdnorm.DependenceLoss` on the logits; None for a training without it.
    weights : bool
        Whether the samples have weights of `mdnorm.balancing_weights`, in the loss and in the layers.
    group_dro : dict
        Options of `GroupWeights`, for group-distributionally robust training.
    head : dict
        How the last layer is fitted again once the network is trained; see `refit`.
    oracle : bool
        Whether it trains on unconfounded data instead: what the others could reach.
    seeds : int
        Seeds a cell of the table.
    in_table : bool
        Whether it is one of "all": the others serve a variant of the data.
    least_batch_size : int
        Smaller batches it cannot train on.
    """

    title: str
    layers: str = "none"
    other: Callable[[int, int], nn.Module] | None = None
    degree: int = 1
    options: dict[str, Any] | None = None
    penalty: dict[str, Any] | None = None
    adversary: dict[str, Any] | None = None
    dependence: dict[str, Any] | None = None
    weights: bool = False
    group_dro: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    oracle: bool = False
    seeds: int = 3
    in_table: bool = True
    least_batch_size: int = 1

    @property
    def of_confounded_only(self) -> bool:
        """Whether only the settings with confounded images, clips or volumes have what it needs."""
        return bool(self.weights or self.group_dro or self.head or self.oracle)

    def settings(self) -> Row:
        """Return what can change a result, as JSON values."""
        names = ("penalty", "adversary", "dependence", "weights", "group_dro", "head", "oracle")
        settings: Row = {name: value for name in names if (value := getattr(self, name))}
        if self.layers != "none":
            settings |= {"degree": self.degree, "options": self.options or {}}
        return settings


def _batch_norm(channels: int, spatial_dims: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if spatial_dims else nn.BatchNorm1d(channels)


def _group_norm(channels: int, spatial_dims: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


# "dataset" and "batch" need their running averages for evaluation only and look back one epoch (2000 images);
# what is removed in training as well must follow the weights more closely.
# "dataset" and "recursive" are the published methods, whose gradient has no decay of what is removed.
_RECIPE: dict[str, Any] = {"estimator": "dataset", "window": 2000, "decay": 0}
_BATCH: dict[str, Any] = {"estimator": "batch", "window": 2000}
_RUNNING = {"estimator": "running", "window": 500}
_RECURSIVE: dict[str, Any] = {"estimator": "recursive", "window": 500, "decay": 0}
_PENALTY: dict[str, Any] = {"estimator": "penalty"}
# A rate of n / 500 moves β by that share towards the estimate of a batch of n: the same memory again.
_PENALTY_RATE = {"window": 500}
_AUTHORS: dict[str, Any] = {"estimator": "dataset", "center": True, "window": 2000, "prior": 0, "decay": 0}

_DEPENDENCE: dict[str, Any] = {"measure": "dcor2", "at_most": 0.01}
_ADVERSARY: dict[str, Any] = {"strength": 30.0, "learning_rate": 1e-2, "steps": 5, "memory": 10}


def _on(layers: str, estimator: str, options: dict[str, Any], degree: int = 3, **more: Any) -> Method:
    return Method(f"MDN, {layers} layer, {estimator}", layers, degree=degree, options=options, **more)


def _estimators(layers: str) -> dict[str, Method]:
    return {
        f"mdn-{layers}-dataset": _on(layers, "dataset", _RECIPE),
        f"mdn-{layers}-batch": _on(layers, "batch", _BATCH),
        f"mdn-{layers}-running": _on(layers, "running", _RUNNING, seeds=5),
        f"mdn-{layers}-recursive": _on(layers, "recursive", _RECURSIVE),
        f"mdn-{layers}-penalty": _on(layers, "penalty", _PENALTY, penalty=_PENALTY_RATE),
        f"mdn-{layers}-authors": _on(layers, "authors' settings", _AUTHORS, degree=1),
    }


METHODS = {
    "none": Method("No normalisation"),
    "batchnorm": Method("BatchNorm", other=_batch_norm, least_batch_size=2),
    "groupnorm": Method("GroupNorm", other=_group_norm),
    "brnet": Method("BR-Net", adversary=_ADVERSARY),
    "groupdro": Method("GroupDRO", group_dro={"step_size": 0.01}, in_table=False),
    "dfr": Method("Last layer retrained (DFR)", head={"fit": "balanced", "draws": 10}, in_table=False),
    "leace": Method("LEACE, retrained head", head={"fit": "erased"}, in_table=False),
    "weights": Method("Balancing weights", weights=True, in_table=False),
    **_estimators("last"),
    **_estimators("every"),
    "dependence-loss": Method("Dependence loss", dependence=_DEPENDENCE, in_table=False),
    "mdn-last-running+weights": _on("last", "running, weights", _RUNNING, weights=True, in_table=False),
    "mdn-last-running+loss": _on("last", "running, loss", _RUNNING, dependence=_DEPENDENCE, in_table=False),
    "mdn-last-running+weights+loss": _on(
        "last", "running, weights and loss", _RUNNING, weights=True, dependence=_DEPENDENCE, in_table=False
    ),
    "oracle": Method("Oracle: unconfounded data", oracle=True, in_table=False),
    "mdn-last-linear": _on("last", "running, plain column", _RUNNING, degree=1, in_table=False),
    "mdn-last-scale": _on("last", "running, with scale", _RUNNING | {"scale": True}, in_table=False),
}
DEFAULT_METHODS = ("none", "batchnorm", "groupnorm", "mdn-last-running", "mdn-every-running")


def titles(names: Iterable[str] | None = None) -> dict[str, str]:
    """Return identifier → title of the named methods (None: of all), in the order of `METHODS`."""
    chosen = METHODS if names is None else set(names)
    return {name: method.title for name, method in METHODS.items() if name in chosen}


def panels(names: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """Group methods (identifier to title) by where they correct, if one panel cannot tell them apart."""
    if len(names) <= 6:
        return {"": names}
    titles = {
        "none": "Without Metadata Normalization",
        "last": "Metadata Normalization on the last layer",
        "every": "Metadata Normalization on every layer",
    }
    groups = {
        title: {name: text for name, text in names.items() if METHODS[name].layers == layers}
        for layers, title in titles.items()
    }
    return {title: group for title, group in groups.items() if group}


def describe(names: Iterable[str]) -> dict[str, str]:
    """Return the settings of the methods with `MetadataNorm`, by title, for a report."""
    corrected = [METHODS[name] for name in names if METHODS[name].layers != "none"]
    return {
        method.title: f"confounder as polynomial of degree {method.degree}, {method.options}"
        for method in corrected
    }


def build(method: Method, num_metadata: int, seed: int) -> SyntheticNetwork:
    """Return an untrained network with the method's normalisation; its weights depend on the seed alone."""

    def normalization(slot: str, shape: tuple[int, ...]) -> nn.Module:
        if method.other is not None:
            return method.other(shape[0], len(shape) - 1)
        if method.layers == "every" or (method.layers == "last" and slot == LAST_SLOT):
            return MetadataNorm(shape, num_metadata, 1, **(method.options or {}))
        return nn.Identity()

    torch.manual_seed(seed)
    return SyntheticNetwork(normalization)
