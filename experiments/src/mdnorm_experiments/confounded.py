"""Settings 2 to 4 of the paper: measures on confounded and on confound-free images, clips or volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mdnorm.metrics import distance_correlation_sqr, probe
from mdnorm.metrics.samples import MIN_SAMPLES
from mdnorm_experiments import confounded_report
from mdnorm_experiments.data.confounded import ConfoundedData, LoadedData, Samples, as_targets, select
from mdnorm_experiments.methods import METHOD_OF_NORM, METHODS
from mdnorm_experiments.networks import BackboneNetwork
from mdnorm_experiments.report import ReportFigure, ReportTable
from mdnorm_experiments.results import Row
from mdnorm_experiments.settings import Run, Setting, data_of, get_setting
from mdnorm_experiments.training import has_metadata_norm, outputs, predictions, save_features

# Of the methods on every layer one, and none that is for a variant of the synthetic images.
METHOD_NAMES = tuple(
    name
    for name, method in METHODS.items()
    if (method.layers != "every" or name == "mdn-every-running")
    and name not in ("mdn-last-authors", "mdn-last-linear", "mdn-last-scale")
)
_MEASURED_ROWS = 1000  # of the training data: dcor² takes time with their square
_SHUFFLES = 3
# Of what `evaluate` returns. Rows on disk with another number, or none, count as not there.
_MEASURES = 2


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
        scores = [score(target) for target in as_targets(samples.confounders.double(), columns)]
        known = [value for value in scores if value is not None]
        found[variable] = max(0.0, sum(known) / len(known)) if known else None
    return found


def evaluate(
    network: BackboneNetwork, data: ConfoundedData, trained: Samples, file: str | None = None
) -> Row:
    """Measure a network on both held-out sets and on what it was trained on.

    Returns "bacc" and "bacc_confounded", balanced accuracy (a fraction) on the confound-free and the test
    data; and on the confound-free data, of which features, labels and scores go into a `file`:

    - "bacc_shuffled", "bacc_mean": accuracy with the metadata of other samples, and with their mean; None for
      a network that takes none.
    - "dcor2", "dcor2_logits", "dcor2_whitened": variable → class → bias-corrected dcor² of the variable with
      the features, with the logits less their mean over the classes, and with features of equal variance in
      all directions. "dcor2_train", "dcor2_logits_train": on at most 1000 rows that were trained on.
    - "probe": variable → score of a linear probe of the features within the classes, from 0 for chance (or
      worse) to 1: R², or balanced accuracy above chance; None where samples are too few.
    - "recall": group → class → share found; "gap": its largest difference between groups.
    """
    from sklearn.metrics import balanced_accuracy_score

    def accuracy(samples: Samples, metadata: Tensor | None = None) -> float:
        if metadata is not None:
            samples = replace(samples, metadata=metadata)
        predicted = predictions(outputs(network, samples)[1])
        return float(balanced_accuracy_score(samples.labels.numpy(), predicted.numpy()))

    free = data.confound_free
    generator = torch.Generator().manual_seed(0)
    features, logits = outputs(network, free)
    predicted = predictions(logits)
    seen = select(trained, torch.randperm(len(trained), generator=generator)[:_MEASURED_ROWS])
    features_seen, logits_seen = outputs(network, seen)
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
    if file is not None:
        more = {"labels": free.labels, "groups": free.groups, "confounders": free.confounders}
        save_features(file, features, logits, **more)
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


@dataclass(frozen=True, kw_only=True)
class ConfoundedSetting(Setting):
    """Labels that go with the metadata in training and test data, and confound-free test data.

    `make_data` leads from the number of training samples and a seed to the same data each time, `backbone`
    from one of `NORMS` to an untrained module as `BackboneNetwork` takes it. `limit` is the accuracy, a
    fraction, of the best rule on confound-free data, where it is known. `examples` draws samples. `load`
    reads real data from a folder, given "error" or "skip" and names of columns of its table.
    """

    make_data: Callable[[int, int], ConfoundedData]
    backbone: Callable[[str], nn.Module]
    examples: Callable[[ConfoundedData], Figure]
    limit: float | None = None
    load: Callable[[Path, str, Mapping[str, str]], LoadedData] | None = None

    row_names: ClassVar = {
        "epochs": "epochs",
        "size": "size",
        "warmup_epochs": "warmup_epochs",
        "data": "data",
        "on_problem": "on_problem",
    }
    methods: ClassVar = METHOD_NAMES
    all_methods: ClassVar = METHOD_NAMES
    least_size: ClassVar = 40
    least_batch_size: ClassVar = 2  # BatchNorm has no variance of one sample
    seeds: ClassVar = 5

    def row(self, run: Run) -> Row:
        """Return what tells a run apart from others, as JSON values."""
        row = super().row(run)
        # The degree is the synthetic images': here the design comes with the data.
        row.pop("degree", None)
        return row | {"norm": self.method(run.method).norm or self.base_norm, "measures": _MEASURES}

    def network(self, norm: str, num_classes: int) -> BackboneNetwork:
        """Return the backbone with a hidden layer of 64 behind it."""
        return BackboneNetwork(self.backbone(norm), num_classes)

    def data(self, run: Run, degree: int) -> ConfoundedData:
        """Return generated data, or the real ones divided; raises what `load` and `divide` raise."""
        if run.data is not None:
            return load(run).divide(run.seed)
        return self.make_data(run.size, run.seed)

    measure = staticmethod(evaluate)

    def _limit(self, rows: Sequence[Row]) -> float | None:
        return None if any(row.get("data") for row in rows) else self.limit

    def tables(self, rows: Sequence[Row]) -> list[ReportTable]:
        """Return the tables of outcomes; by variable; as trained; by class; by group."""
        return confounded_report.tables(rows, self._limit(rows))

    def figures(self, runs: Sequence[Run], rows: Sequence[Row]) -> list[ReportFigure]:
        """Return example samples, accuracy with dcor², and accuracy by group."""
        return confounded_report.figures(self.examples(data_of(runs[0])), rows, self._limit(rows))

    def more(self, out: Path, runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
        """Audit the best network and its like without correction; say where, or why not."""
        # The same network without Metadata Normalization, or what else there is without it.
        plain = (METHOD_OF_NORM[self.base_norm], *METHOD_OF_NORM.values())
        text = confounded_report.audit(out, data_of(runs[0]), runs, rows, plain)
        return [*self.introduction, *text]


def load(run: Run) -> LoadedData:
    """Return the real data set of a run; kept until another is asked for.

    Raises what the loader raises, and ValueError for a setting without a loader.
    """
    assert run.data is not None
    return _loaded(run.setting, run.data, run.on_problem, run.columns)


@lru_cache(maxsize=1)
def _loaded(setting: str, folder: str, on_problem: str, columns: tuple[tuple[str, str], ...]) -> LoadedData:
    found = get_setting(setting)
    if not isinstance(found, ConfoundedSetting) or found.load is None:
        raise ValueError(f"the setting {setting!r} has no real data to load: leave `data` out.")
    return found.load(Path(folder), on_problem, dict(columns))
