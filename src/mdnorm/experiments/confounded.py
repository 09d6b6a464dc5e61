"""Settings 2 to 4 of the paper: every method trained and measured on confounded images, clips or volumes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mdnorm import context
from mdnorm.dependence_loss import DependenceLoss
from mdnorm.experiments.adversary import Adversary
from mdnorm.experiments.data.confounded import ConfoundedData, LoadedData, Samples
from mdnorm.experiments.methods import METHODS, Method
from mdnorm.experiments.networks import BackboneNetwork
from mdnorm.experiments.results import Row
from mdnorm.experiments.settings import METHOD_OF_NORM, Setting
from mdnorm.experiments.training import Losses, has_metadata_norm, num_steps, optimise
from mdnorm.files import atomic_path
from mdnorm.integration import fit_gram, insert, recalibrate
from mdnorm.metrics import distance_correlation_sqr

__all__ = [
    "METHOD_NAMES",
    "SEEDS",
    "SETTINGS",
    "ConfoundedRun",
    "build",
    "data_of",
    "evaluate",
    "fit",
    "get_setting",
    "load",
    "method_of",
    "plan",
    "train",
    "write_outputs",
]

SEEDS = 3
SETTINGS = {
    "image": ("mdnorm.experiments.image", "SETTING"),
    "digits": ("mdnorm.experiments.image", "DIGITS"),
    "video": ("mdnorm.experiments.video", "SETTING"),
    "mri": ("mdnorm.experiments.mri", "SETTING"),
}
METHOD_NAMES = (
    "none",
    "batchnorm",
    "groupnorm",
    "brnet",
    "mdn-last-dataset",
    "mdn-last-batch",
    "mdn-last-running",
    "mdn-last-recursive",
    "mdn-last-penalty",
    "mdn-every-running",
    "dependence-loss",
    "mdn-last-running-loss",
)
_NORM_OF_METHOD = {method: norm for norm, method in METHOD_OF_NORM.items()}
_EVALUATION_BATCH = 100
_LEAST_BATCH = 2  # BatchNorm has no variance of one sample


def get_setting(name: str) -> Setting:
    """Return the setting of a name, its module loaded only now.

    Raises
    ------
    ValueError
        An unknown name.
    """
    if name not in SETTINGS:
        raise ValueError(f"unknown setting {name!r}: choose from {', '.join(SETTINGS)}.")
    module, attribute = SETTINGS[name]
    setting: Setting = getattr(importlib.import_module(module), attribute)
    return setting


@dataclass(frozen=True)
class ConfoundedRun:
    """Settings of one training. Everything that can change its row is here.

    Attributes
    ----------
    setting : str
        A key of `SETTINGS`.
    method : str
        One of `METHOD_NAMES`.
    seed, size, batch_size, epochs : int
        `size` is the number of training samples; real data have as many as they have.
    learning_rate : float
    warmup_epochs : int
    data : str or None
        Folder of a real data set; None generates data.
    on_problem : "error" or "skip"
        What to do with files and rows of the real data set that cannot be used.
    features_file : str or None
        Where to keep the features of the confound-free data; not part of the settings.
    """

    setting: str
    method: str
    seed: int
    size: int
    batch_size: int
    epochs: int
    learning_rate: float
    warmup_epochs: int = 0
    data: str | None = None
    on_problem: str = "error"
    features_file: str | None = None

    def settings(self) -> Row:
        """Return the settings as JSON values, those of the method included."""
        setting = get_setting(self.setting)
        row: Row = asdict(self) | method_of(setting, self.method).settings()
        for name in ("features_file", "degree"):
            # The degree is the synthetic images': here the design comes with the data.
            row.pop(name, None)
        return row | {"norm": _norm(setting, self.method)}


def method_of(setting: Setting, name: str) -> Method:
    """Return the method of a name with what is tuned for the setting."""
    method = METHODS[name]
    if method.adversary is None:
        return method
    return replace(method, adversary=method.adversary | {"strength": setting.brnet_strength})


def _norm(setting: Setting, method: str) -> str:
    return _NORM_OF_METHOD.get(method, setting.base_norm)


def plan(
    setting: Setting,
    methods: Sequence[str] = METHOD_NAMES,
    seeds: int = SEEDS,
    *,
    first_seed: int = 0,
    size: int | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    data: Path | None = None,
    on_problem: str = "error",
    features_dir: Path | None = None,
) -> list[ConfoundedRun]:
    """Return the runs of a setting's table, seed by seed; None takes the setting's own numbers.

    Raises
    ------
    ValueError
        An unknown method, no method, an unknown `on_problem`, or a number out of range.
    """
    unknown = [method for method in methods if method not in METHOD_NAMES]
    if unknown or not methods:
        names = ", ".join(unknown) or "(none given)"
        raise ValueError(f"unknown method(s) {names}: choose from {', '.join(METHOD_NAMES)}.")
    if on_problem not in ("error", "skip"):
        raise ValueError(f"on_problem must be 'error' or 'skip', got {on_problem!r}.")
    numbers = {
        "seeds": seeds,
        "size": setting.size if size is None else size,
        "batch size": setting.batch_size if batch_size is None else batch_size,
        "epochs": setting.epochs if epochs is None else epochs,
    }
    least = {"seeds": 1, "size": 40, "batch size": _LEAST_BATCH, "epochs": 1}
    for name, value in numbers.items():
        if value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}.")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"learning rate must be a positive number, got {learning_rate}.")
    return [
        ConfoundedRun(
            setting.name,
            method,
            seed,
            numbers["size"],
            numbers["batch size"],
            numbers["epochs"],
            learning_rate or setting.learning_rate,
            setting.warmup_epochs,
            None if data is None else str(data),
            on_problem,
            str(features_dir / f"{method}-seed{seed}.safetensors")
            if features_dir is not None and seed == first_seed
            else None,
        )
        for seed in range(first_seed, first_seed + seeds)
        for method in dict.fromkeys(methods)
    ]


def build(setting: Setting, method: str, data: ConfoundedData, seed: int) -> BackboneNetwork:
    """Return an untrained network with the method's normalisation; its weights depend on the seed alone.

    Layers with the estimator "dataset" have the Gram matrix of the training data.
    """
    torch.manual_seed(seed)
    network = BackboneNetwork(setting.backbone(_norm(setting, method)), len(data.classes))
    layers = METHODS[method].layers
    if layers == "none":
        return network
    options: dict[str, Any] = {
        "num_metadata": data.train.metadata.shape[1],
        "num_labels": len(data.classes),
        "example": data.train.inputs[:2],
    } | (METHODS[method].options or {})
    if layers == "every":
        slots = [f"backbone.{slot}" for slot in setting.slots]
        insert(network, after=slots, granularity=setting.granularity, **options)
    insert(network, after="hidden", **options)
    fit_gram(network, data.train.metadata, data.train.labels)
    return network


def _metadata(
    network: nn.Module, metadata: Tensor, labels: Tensor | None = None
) -> AbstractContextManager[object]:
    """The context of a batch; nothing for a network without layers."""
    return context.metadata(network, metadata, labels) if has_metadata_norm(network) else nullcontext()


def fit(
    network: BackboneNetwork,
    method: Method,
    samples: Samples,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    warmup_epochs: int,
    seed: int,
    epoch_done: Callable[[], None],
) -> Row:
    """Train a network by Adam, the learning rate falling to 0 by a half cosine after it has risen.

    Parameters
    ----------
    network : BackboneNetwork
        From `build`; changed in place.
    method : Method
    samples : Samples
    batch_size, epochs, learning_rate, warmup_epochs
    seed : int
        Of the order of the samples.
    epoch_done : callable
        Called after each epoch.

    Returns
    -------
    dict
        "train_loss" of the last epoch and "seconds_per_epoch".
    """
    steps = num_steps(len(samples), batch_size, epochs, _LEAST_BATCH)

    def make_losses() -> Losses:
        # One predictor for each column of the confounders, together as strong as the one of a single column.
        width = samples.confounders.shape[1]
        adversaries = (
            [
                Adversary(network.num_hidden, steps, **(method.adversary | {"strength": strength}))
                for strength in width * [method.adversary["strength"] / width]
            ]
            if method.adversary
            else []
        )
        dependence = None if method.dependence is None else DependenceLoss(**method.dependence)

        def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
            labels = samples.labels[rows]
            with _metadata(network, samples.metadata[rows], labels):
                features = network.features(samples.inputs[rows])
            logits = network.classify(features)
            loss = task_loss = cross_entropy(logits, labels)
            for column, adversary in enumerate(adversaries):
                loss = loss + adversary.step(features, samples.confounders[rows, column], labels)
            if dependence is not None:
                loss = loss + dependence(logits, samples.confounders[rows], labels)
            return task_loss, loss

        return losses

    return optimise(
        network,
        method,
        make_losses,
        num_samples=len(samples),
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        epoch_done=epoch_done,
        warmup_epochs=warmup_epochs,
        least_batch_size=_LEAST_BATCH,
    )


@torch.no_grad()
def _outputs(network: BackboneNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """Return features (N, 64) and logits (N, classes) in evaluation mode."""
    network.eval()
    features = []
    for rows in torch.arange(len(samples)).split(_EVALUATION_BATCH):
        with _metadata(network, samples.metadata[rows]):
            features.append(network.features(samples.inputs[rows]))
    joined = torch.cat(features)
    return joined, network.classify(joined)


def evaluate(network: BackboneNetwork, data: ConfoundedData, features_file: str | None = None) -> Row:
    """Measure a network on both held-out sets.

    Parameters
    ----------
    network : BackboneNetwork
    data : ConfoundedData
    features_file : str, optional
        Where to keep features, labels, scores and predictions of the confound-free data.

    Returns
    -------
    dict
        "bacc" and "bacc_confounded": balanced accuracy, a fraction, on the confound-free and on the test
        data. On the confound-free data: "dcor2", variable → class → bias-corrected dcor² of the features with
        the variable; "recall", group → class → share found; "gap", the largest difference of a class's recall
        between groups.
    """
    from safetensors.torch import save
    from sklearn.metrics import balanced_accuracy_score

    _, logits = _outputs(network, data.test)
    confounded = balanced_accuracy_score(data.test.labels.numpy(), logits.argmax(1).numpy())
    free = data.confound_free
    features, logits = _outputs(network, free)
    predicted = logits.argmax(1)
    dependence: dict[str, dict[str, float]] = {}
    for variable, columns in data.confounders.items():
        values = free.confounders[:, list(columns)]
        dependence[variable] = {
            name: float(distance_correlation_sqr(features[inside], values[inside]))
            for label, name in enumerate(data.classes)
            if (inside := free.labels == label).any()
        }
    recall = {
        group: {
            name: float((predicted[inside] == label).double().mean())
            for label, name in enumerate(data.classes)
            if (inside := (free.labels == label) & (free.groups == number)).any()
        }
        for number, group in enumerate(data.groups)
    }
    by_class = [[found[name] for found in recall.values() if name in found] for name in data.classes]
    if features_file is not None:
        tensors = {
            "features": features,
            "labels": free.labels,
            "groups": free.groups,
            "confounders": free.confounders,
            "scores": logits.softmax(1),
        }
        with atomic_path(Path(features_file)) as temporary:
            temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return {
        "bacc": float(balanced_accuracy_score(free.labels.numpy(), predicted.numpy())),
        "bacc_confounded": float(confounded),
        "dcor2": dependence,
        "recall": recall,
        "gap": max(max(shares) - min(shares) for shares in by_class if shares),
    }


@lru_cache(maxsize=1)
def load(setting: str, folder: str, on_problem: str) -> LoadedData:
    """Return a real data set.

    Raises
    ------
    ValueError
        The setting is unknown or has no loader, or the data cannot be used.
    DataProblemsError
        Files or rows that cannot be used, all of them listed, with `on_problem` "error".
    FileNotFoundError
        No such data; the message says what to get.
    """
    loader = get_setting(setting).load
    if loader is None:
        raise ValueError(f"the setting {setting!r} has no real data to load: leave `data` out.")
    return loader(Path(folder), on_problem)


@lru_cache(maxsize=1)
def _data(setting: str, size: int, seed: int, folder: str | None, on_problem: str) -> ConfoundedData:
    # The methods of a seed come one after the other, with the same data.
    if folder is not None:
        return load(setting, folder, on_problem).divide(seed)
    return get_setting(setting).make_data(size, seed)


def data_of(run: ConfoundedRun) -> ConfoundedData:
    """Return the data of a run; kept until another is asked for.

    Raises
    ------
    ValueError, DataProblemsError, FileNotFoundError
        Those of `load`, and of `LoadedData.divide` for real data.
    """
    return _data(run.setting, run.size, run.seed, run.data, run.on_problem)


def train(run: ConfoundedRun, epoch_done: Callable[[], None]) -> Row:
    """Train one network and measure it on held-out data.

    Returns
    -------
    dict
        What `evaluate` and `fit` measure; with Metadata Normalization "recalibrated", what `evaluate`
        measures after `mdnorm.recalibrate` on the training data (its features are the ones kept).
    """
    setting = get_setting(run.setting)
    method = method_of(setting, run.method)
    data = data_of(run)
    if method.dependence is not None:
        method = replace(method, dependence=method.dependence | {"variables": data.confounders})
    network = build(setting, run.method, data, run.seed)
    trained = fit(
        network,
        method,
        data.train,
        batch_size=run.batch_size,
        epochs=run.epochs,
        learning_rate=run.learning_rate,
        warmup_epochs=run.warmup_epochs,
        seed=run.seed,
        epoch_done=epoch_done,
    )
    if method.layers == "none":
        return evaluate(network, data, run.features_file) | trained
    measured = evaluate(network, data)
    samples = data.train
    parts = (samples.inputs, samples.metadata, samples.labels)
    loader = list(zip(*(part.split(_EVALUATION_BATCH) for part in parts), strict=True))
    recalibrate(network, loader, progress=False)
    return measured | {"recalibrated": evaluate(network, data, run.features_file)} | trained


def write_outputs(out: Path, runs: Sequence[ConfoundedRun], rows: Sequence[Row], *, command: str) -> Path:
    """Write the tables, the figures, the report and the audit of finished runs; see `confounded_report`."""
    from mdnorm.experiments.confounded_report import write

    setting = get_setting(runs[0].setting)
    return write(out, setting, partial(data_of, runs[0]), runs, rows, command=command)
