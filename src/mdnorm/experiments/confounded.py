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
from mdnorm.balance import balancing_weights
from mdnorm.dependence_loss import DependenceLoss
from mdnorm.experiments.adversary import Adversary
from mdnorm.experiments.baselines import GroupWeights, refit
from mdnorm.experiments.data.confounded import ConfoundedData, LoadedData, Samples, select
from mdnorm.experiments.methods import METHODS, Method
from mdnorm.experiments.networks import BackboneNetwork
from mdnorm.experiments.results import Row
from mdnorm.experiments.settings import METHOD_OF_NORM, Setting
from mdnorm.experiments.training import Losses, has_metadata_norm, num_steps, optimise
from mdnorm.files import atomic_path
from mdnorm.integration import fit_gram, insert, recalibrate
from mdnorm.metrics import distance_correlation_sqr, probe
from mdnorm.metrics.distance_correlation import MIN_SAMPLES

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
    "sample_weights",
    "train",
    "train_network",
    "write_outputs",
]

SEEDS = 5
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
    "groupdro",
    "dfr",
    "leace",
    "weights",
    "mdn-last-dataset",
    "mdn-last-batch",
    "mdn-last-running",
    "mdn-last-recursive",
    "mdn-last-penalty",
    "mdn-every-running",
    "mdn-last-running+weights",
    "dependence-loss",
    "mdn-last-running+loss",
    "mdn-last-running+weights+loss",
    "oracle",
)
_NORM_OF_METHOD = {method: norm for norm, method in METHOD_OF_NORM.items()}
_EVALUATION_BATCH = 100
_LEAST_BATCH = 2  # BatchNorm has no variance of one sample
_MEASURED_ROWS = 1000  # of the training data: dcor² takes time with their square
_SHUFFLES = 3
# Of what `evaluate` returns. Rows on disk with another number, or none, count as not there.
_MEASURES = 2


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
        return row | {"norm": _norm(setting, self.method), "measures": _MEASURES}


def method_of(setting: Setting, name: str) -> Method:
    """Return the method of a name with what is tuned for the setting."""
    method = METHODS[name]
    changes = {
        field: options | tuned
        for field, tuned in setting.tuned.items()
        if (options := getattr(method, field))
    }
    return replace(method, **changes)


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
        An unknown method, no method, the oracle on real data, an unknown `on_problem`, or a number out of
        range.
    """
    unknown = [method for method in methods if method not in METHOD_NAMES]
    if unknown or not methods:
        names = ", ".join(unknown) or "(none given)"
        raise ValueError(f"unknown method(s) {names}: choose from {', '.join(METHOD_NAMES)}.")
    if data is not None and any(METHODS[method].oracle for method in methods):
        raise ValueError("the oracle needs unconfounded data, which are only generated: leave out `data`.")
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
    network: nn.Module, metadata: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
) -> AbstractContextManager[object]:
    """The context of a batch; nothing for a network without layers."""
    if not has_metadata_norm(network):
        return nullcontext()
    return context.metadata(network, metadata, labels, weights)


def sample_weights(method: Method, samples: Samples) -> Tensor:
    """Return the weights (N,) that the method gives the samples: 1 where it balances nothing."""
    if not method.weights:
        return torch.ones(len(samples))
    return balancing_weights(samples.labels, samples.metadata, method="propensity").weights.float()


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
        groups = GroupWeights(samples, **method.group_dro) if method.group_dro else None
        weights = sample_weights(method, samples)

        def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
            labels = samples.labels[rows]
            with _metadata(
                network, samples.metadata[rows], labels, weights[rows] if method.weights else None
            ):
                features = network.features(samples.inputs[rows])
            logits = network.classify(features)
            each = weights[rows] * cross_entropy(logits, labels, reduction="none")
            task_loss = each.mean()
            loss = groups.loss(each, rows) if groups else task_loss
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


def _by_class(values: Tensor, samples: Samples, data: ConfoundedData) -> dict[str, dict[str, float]]:
    """Return variable → class → dcor² of values (N, D) and the variable."""
    return {
        variable: {
            name: float(
                distance_correlation_sqr(values[inside], samples.confounders[inside][:, list(columns)])
            )
            for label, name in enumerate(data.classes)
            if int((inside := samples.labels == label).sum()) >= MIN_SAMPLES
        }
        for variable, columns in data.confounders.items()
    }


def _whitened(features: Tensor, labels: Tensor) -> Tensor:
    """Return features of which every direction within the classes has the same variance."""
    centred = features.double()
    for label in labels.unique():
        centred[labels == label] -= centred[labels == label].mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    whitened: Tensor = left[:, singular >= 1e-5 * singular[0]] * len(left) ** 0.5
    return whitened


def _probed(features: Tensor, samples: Samples, data: ConfoundedData) -> dict[str, float | None]:
    """Return variable → score of a linear probe within the classes, from 0 for chance (or worse) to 1."""

    def score(target: Tensor) -> float | None:
        try:
            pooled = probe(features, target, labels=samples.labels, num_permutations=0).pooled
        except ValueError:  # too few samples, or a variable that does not vary
            return None
        return (pooled.value - pooled.chance) / (1 - pooled.chance) if pooled else None

    found: dict[str, float | None] = {}
    for variable, columns in data.confounders.items():
        values = samples.confounders[:, list(columns)].double()
        one_hot = values.shape[1] > 1 and bool(((values == 0) | (values == 1)).all())
        scores = [score(target) for target in ([values.argmax(1)] if one_hot else values.T)]
        known = [value for value in scores if value is not None]
        found[variable] = max(0.0, sum(known) / len(known)) if known else None
    return found


def evaluate(
    network: BackboneNetwork,
    data: ConfoundedData,
    features_file: str | None = None,
    trained: Samples | None = None,
) -> Row:
    """Measure a network on both held-out sets and on what it was trained on.

    Parameters
    ----------
    network : BackboneNetwork
    data : ConfoundedData
    features_file : str, optional
        Where to keep features, labels, scores and predictions of the confound-free data.
    trained : Samples, optional
        What it was trained on, if not ``data.train``.

    Returns
    -------
    dict
        "bacc" and "bacc_confounded": balanced accuracy, a fraction, on the confound-free and on the test
        data. On the confound-free data:

        - "bacc_shuffled" and "bacc_mean": the accuracy with the metadata of other samples, and with the mean
          of those trained on; None for a network that takes none.
        - "dcor2_logits": variable → class → bias-corrected dcor² of the variable and the logits less their
          mean over the classes, which changes no output.
        - "dcor2": the same of the features; "dcor2_whitened": of the features with the same variance in all
          directions.
        - "probe": variable → score of a linear probe of the features within the classes, from 0 for chance
          (or worse) to 1: R², or balanced accuracy above chance; None where samples are too few.
        - "recall": group → class → share found; "gap": the largest difference of a class's recall between
          groups.

        On at most 1000 rows that were trained on: "dcor2_logits_train" and "dcor2_train".
    """
    from safetensors.torch import save
    from sklearn.metrics import balanced_accuracy_score

    def accuracy(samples: Samples, metadata: Tensor | None = None) -> float:
        if metadata is not None:
            samples = replace(samples, metadata=metadata)
        predicted = _outputs(network, samples)[1].argmax(1)
        return float(balanced_accuracy_score(samples.labels.numpy(), predicted.numpy()))

    trained, free = trained or data.train, data.confound_free
    generator = torch.Generator().manual_seed(0)
    features, logits = _outputs(network, free)
    predicted = logits.argmax(1)
    seen = select(trained, torch.randperm(len(trained), generator=generator)[:_MEASURED_ROWS])
    features_seen, logits_seen = _outputs(network, seen)
    shuffled = mean = None
    if has_metadata_norm(network):
        orders = [torch.randperm(len(free), generator=generator) for _ in range(_SHUFFLES)]
        shuffled = sum(accuracy(free, free.metadata[order]) for order in orders) / _SHUFFLES
        mean = accuracy(free, trained.metadata.mean(0).expand_as(free.metadata))
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
        "bacc_confounded": accuracy(data.test),
        "bacc_shuffled": shuffled,
        "bacc_mean": mean,
        "dcor2": _by_class(features, free, data),
        "dcor2_train": _by_class(features_seen, seen, data),
        "dcor2_whitened": _by_class(_whitened(features, free.labels), free, data),
        "dcor2_logits": _by_class(logits - logits.mean(1, keepdim=True), free, data),
        "dcor2_logits_train": _by_class(logits_seen - logits_seen.mean(1, keepdim=True), seen, data),
        "probe": _probed(features, free, data),
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


def train_network(
    run: ConfoundedRun, method: Method, data: ConfoundedData, epoch_done: Callable[[], None]
) -> tuple[BackboneNetwork, Samples, Row]:
    """Train the network of a run, its head retrained where the method does that, but not recalibrated.

    Returns
    -------
    network : BackboneNetwork
    samples : Samples
        What it was trained on.
    measured : dict
        See `fit`.
    """
    samples = data.train
    if method.oracle:
        assert data.unconfounded is not None, "`plan` takes no oracle on real data"
        samples = data.unconfounded()
    held_out = samples
    if method.head and method.head["fit"] == "balanced":
        samples, held_out = data.for_retraining(run.seed)
    network = build(get_setting(run.setting), run.method, data, run.seed)
    measured = fit(
        network,
        method,
        samples,
        batch_size=run.batch_size,
        epochs=run.epochs,
        learning_rate=run.learning_rate,
        warmup_epochs=run.warmup_epochs,
        seed=run.seed,
        epoch_done=epoch_done,
    )
    if method.head:
        refit(
            network, lambda rows: _outputs(network, rows)[0], samples, held_out, seed=run.seed, **method.head
        )
    return network, samples, measured


def train(run: ConfoundedRun, epoch_done: Callable[[], None]) -> Row:
    """Train one network and measure it on held-out data.

    Returns
    -------
    dict
        What `evaluate` and `fit` measure; with Metadata Normalization "recalibrated", what `evaluate`
        measures after `mdnorm.recalibrate` on the training data (its features are the ones kept).
    """
    method = method_of(get_setting(run.setting), run.method)
    data = data_of(run)
    if method.dependence is not None:
        method = replace(method, dependence=method.dependence | {"variables": data.confounders})
    network, samples, trained = train_network(run, method, data, epoch_done)
    if method.layers == "none":
        return evaluate(network, data, run.features_file, samples) | trained
    measured = evaluate(network, data, trained=samples)
    weights = sample_weights(method, samples)

    def forward(model: nn.Module, rows: Tensor) -> None:
        with _metadata(model, samples.metadata[rows], samples.labels[rows], weights[rows]):
            model(samples.inputs[rows])

    recalibrate(network, torch.arange(len(samples)).split(_EVALUATION_BATCH), forward=forward, progress=False)
    return measured | {"recalibrated": evaluate(network, data, run.features_file, samples)} | trained


def write_outputs(out: Path, runs: Sequence[ConfoundedRun], rows: Sequence[Row], *, command: str) -> Path:
    """Write the tables, the figures, the report and the audit of finished runs; see `confounded_report`."""
    from mdnorm.experiments.confounded_report import write

    setting = get_setting(runs[0].setting)
    return write(out, setting, partial(data_of, runs[0]), runs, rows, command=command)
