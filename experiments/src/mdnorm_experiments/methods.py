"""The methods that experiments compare: which normalisation sits where, with which settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mdnorm_experiments.results import Row


@dataclass(frozen=True)
class Method:
    """A row of the table: its title, and which normalisation sits where. None is a training without it."""

    title: str
    layers: str = "none"  # where `MetadataNorm` sits: "none", "last" or "every"
    norm: str | None = None  # of every layer beside it: "none", "batch", "group"; None: the setting's own
    degree: int = 1  # of the polynomial as which the confounder of the synthetic images enters
    options: dict[str, Any] | None = None  # of `MetadataNorm`
    # For its estimator "penalty": the coefficients are trained by gradient descent with the rate batch size /
    # "window", at most 1.
    penalty: dict[str, Any] | None = None
    adversary: dict[str, Any] | None = None  # options of `Adversary` (BR-Net)
    dependence: dict[str, Any] | None = None  # options of `mdnorm.DependenceLoss`, on the logits
    weights: bool = False  # whether samples have those of `mdnorm.balancing_weights`, in loss and layers
    group_dro: dict[str, Any] | None = None  # options of `GroupWeights`
    head: dict[str, Any] | None = None  # options of `refit`, by which the last layer is fitted again
    oracle: bool = False  # whether it trains on unconfounded data instead: what the others could reach
    seeds: int = 3  # of a cell of the synthetic table
    in_table: bool = True  # whether it is one of "all" of the synthetic table; the others serve a variant
    least_batch_size: int = 1  # on smaller batches it cannot be trained

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
    "none": Method("No normalisation", norm="none"),
    "batchnorm": Method("BatchNorm", norm="batch", least_batch_size=2),
    "groupnorm": Method("GroupNorm", norm="group"),
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
METHOD_OF_NORM = {"none": "none", "batch": "batchnorm", "group": "groupnorm"}
"""Norm → the method that has this norm and nothing else."""


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
