"""What every setting of the paper is: data, network, schedule; planned, trained and reported in one way."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from mdnorm.integration import insert
from mdnorm_experiments.baselines import refit
from mdnorm_experiments.data.confounded import ConfoundedData, Samples
from mdnorm_experiments.methods import METHODS, Method
from mdnorm_experiments.networks import BackboneNetwork
from mdnorm_experiments.report import ReportFigure, ReportTable, write_page
from mdnorm_experiments.results import Row
from mdnorm_experiments.training import fit, has_metadata_norm, outputs, prepare, recalibrate_on

SETTINGS = {
    "synthetic": ("mdnorm_experiments.synthetic", "SETTING"),
    "continual": ("mdnorm_experiments.continual", "SETTING"),
    "image": ("mdnorm_experiments.image", "SETTING"),
    "digits": ("mdnorm_experiments.image", "DIGITS"),
    "video": ("mdnorm_experiments.video", "SETTING"),
    "mri": ("mdnorm_experiments.mri", "SETTING"),
}
"""Name of a setting → its module and what it is called there."""


@dataclass(frozen=True)
class Run:
    """One training: everything that can change its row, and where to keep features, which cannot.

    `epochs` are those of each stage; the `learning_rate` is Adam's at its height, from which it falls to 0.
    `size` are training samples, of the synthetic images those of a group, of which `test_size` are held out.
    `data` is the folder of a real data set (None generates data), of which `on_problem` ("error" or "skip")
    says what to do with unusable files and rows, and `columns` what the loader looks for → the name of that
    column.
    """

    setting: str
    method: str
    batch_size: int
    seed: int
    epochs: int
    learning_rate: float
    size: int
    test_size: int = 0
    warmup_epochs: int = 0
    variant: str = "plain"
    data: str | None = None
    on_problem: str = "error"
    columns: tuple[tuple[str, str], ...] = ()
    features_file: str | None = None

    @property
    def schedule(self) -> dict[str, Any]:
        """What `mdnorm_experiments.training.fit` is to be told."""
        names = ("batch_size", "epochs", "learning_rate", "warmup_epochs")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> Row:
        """Return the settings as JSON values, those of the method included."""
        return get_setting(self.setting).row(self)


@dataclass(frozen=True, kw_only=True)
class Setting(ABC):
    """Data, network and schedule of a setting.

    `title` and `introduction` stand on the page; for sizes and epochs see `Run`. "Every layer" corrects after
    the `slots`, modules inside the backbone, and builds on `base_norm`. Without other wishes the
    `default_methods` (all of them) and `batch_sizes` (the one) are trained; the quick form has its own
    methods, seeds, size and epochs. `tuned` are options of methods, by field of `Method`, that differ here,
    tuned on the seeds 100 to 103 for accuracy on confound-free data (``benchmarks/settings_tuning.py``).
    """

    name: str
    title: str
    introduction: tuple[str, ...]
    batch_size: int
    epochs: int
    learning_rate: float
    size: int
    slots: tuple[str, ...]
    base_norm: str = "none"
    test_size: int = 0
    warmup_epochs: int = 0
    quick_methods: tuple[str, ...] | None = None
    quick_seeds: int = 1
    quick_size: int | None = None
    quick_epochs: int | None = None
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    default_methods: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = ()

    row_names: ClassVar[Mapping[str, str]]
    """Attributes of `Run` that matter here, beside those of all settings → their names in rows."""
    methods: ClassVar[tuple[str, ...]]
    """Every method that the setting has, keys of `METHODS`."""
    all_methods: ClassVar[tuple[str, ...]]
    """What ``--methods all`` stands for."""
    variants: ClassVar[tuple[str, ...]] = ("plain",)
    least_size: ClassVar[int] = 4
    least_batch_size: ClassVar[int] = 1
    num_stages: ClassVar[int] = 1
    seeds: ClassVar[int | None] = None
    """Seeds a method; None for as many as each `Method` says."""
    keeps_features: ClassVar[bool] = True
    keeps_recalibrated: ClassVar[bool] = True
    """Whether the kept features are those of the recalibrated network, where there is one."""

    def schedule(self, batch_size: int) -> tuple[int, float]:
        """Return (epochs, learning rate) for a batch size."""
        return self.epochs, self.learning_rate

    def method(self, name: str) -> Method:
        """Return the method of a name with what is tuned for the setting."""
        method = METHODS[name]
        changes = {part: old | new for part, new in self.tuned.items() if (old := getattr(method, part))}
        return replace(method, **changes)

    def row(self, run: Run) -> Row:
        """Return what tells a run apart from others, as JSON values."""
        names = {name: name for name in ("setting", "method", "batch_size", "seed", "learning_rate")}
        row: Row = {name: getattr(run, part) for part, name in (names | dict(self.row_names)).items()}
        if run.columns:
            row["columns"] = dict(run.columns)
        return row | self.method(run.method).settings()

    @abstractmethod
    def network(self, norm: str, num_classes: int) -> BackboneNetwork:
        """Return an untrained network with one of the norms; its weights follow from torch's seed."""

    @abstractmethod
    def data(self, run: Run, degree: int) -> ConfoundedData:
        """Return the data of a run, a confounder of the synthetic images as a polynomial of this degree."""

    @abstractmethod
    def measure(
        self, network: BackboneNetwork, data: ConfoundedData, trained: Samples, file: str | None = None
    ) -> Row:
        """Return the measures on held-out data, whose features go into a file, and on what was trained on."""

    @abstractmethod
    def tables(self, rows: Sequence[Row]) -> list[ReportTable]:
        """Return the tables of finished runs, for the terminal, ``table.md`` and the page."""

    @abstractmethod
    def figures(self, runs: Sequence[Run], rows: Sequence[Row]) -> list[ReportFigure]:
        """Return the figures of finished runs."""

    def more(self, out: Path, runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
        """Write what the setting has beside tables and figures; return the paragraphs of the page."""
        return list(self.introduction)

    def train(self, run: Run, epoch_done: Callable[[], None]) -> Row:
        """Train a network; return its measures, those of it recalibrated, and what `fit` returns."""
        method, data = self.method(run.method), data_of(run)
        network, samples, trained = train_network(run, method, data, epoch_done)
        if not has_metadata_norm(network):
            return self.measure(network, data, samples, run.features_file) | trained
        files = (None, run.features_file) if self.keeps_recalibrated else (run.features_file, None)
        row = self.measure(network, data, samples, files[0])
        recalibrate_on(network, samples, method)
        return row | {"recalibrated": self.measure(network, data, samples, files[1])} | trained


def get_setting(name: str) -> Setting:
    """Return the setting of a name, its module loaded only now; ValueError for an unknown one."""
    if name not in SETTINGS:
        raise ValueError(f"unknown setting {name!r}: choose from {', '.join(SETTINGS)}.")
    module, attribute = SETTINGS[name]
    setting: Setting = getattr(importlib.import_module(module), attribute)
    return setting


def plan(
    setting: Setting,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    *,
    first_seed: int = 0,
    batch_sizes: Sequence[int] | None = None,
    columns: Mapping[str, str] | None = None,
    features_dir: Path | None = None,
    **changes: Any,
) -> list[Run]:
    """Return the runs of a setting's table, seed by seed: an interrupted one is as complete as can be.

    `changes` are other attributes of `Run`; None there too takes the setting's own values. Batches smaller
    than a method can train on are left out. `features_dir` is a folder for the held-out features of the first
    seed of each cell. ValueError: an unknown method, variant or `on_problem`, a number out of range, the
    oracle on real data, or nothing left to run. TypeError: a change that there is not.
    """
    own = ("epochs", "learning_rate", "size", "test_size", "warmup_epochs")
    options = (*own, "variant", "data", "on_problem")
    if strange := sorted(changes.keys() - options):
        raise TypeError(f"plan has no option {', '.join(strange)}: of a run it changes {', '.join(options)}.")
    methods = methods if methods is not None else setting.default_methods or setting.all_methods
    batch_sizes = batch_sizes if batch_sizes is not None else setting.batch_sizes or [setting.batch_size]
    changes = {name: value for name, value in changes.items() if value is not None}
    changes["columns"] = tuple(sorted((columns or {}).items()))
    if "data" in changes:
        changes["data"] = str(changes["data"])
    common = Run(setting.name, "", 0, 0, **({name: getattr(setting, name) for name in own} | changes))
    unknown = [method for method in methods if method not in setting.methods]
    if unknown or not methods:
        names = ", ".join(unknown) or "(none given)"
        raise ValueError(f"unknown method(s) {names}: choose from {', '.join(setting.methods)}.")
    if common.data is not None and any(METHODS[method].oracle for method in methods):
        raise ValueError("the oracle needs unconfounded data, which are only generated: leave out `data`.")
    if common.on_problem not in ("error", "skip"):
        raise ValueError(f"on_problem must be 'error' or 'skip', got {common.on_problem!r}.")
    if common.variant not in setting.variants:
        raise ValueError(f"unknown variant {common.variant!r}: choose from {', '.join(setting.variants)}.")
    size_name = setting.row_names.get("size", "size").replace("_", " ")
    for name, value, least in (
        (size_name, common.size, setting.least_size),
        (f"test {size_name}", common.test_size, setting.least_size if setting.test_size else 0),
        ("seeds", 1 if seeds is None else seeds, 1),
        ("epochs", common.epochs, 1),
        *(("batch size", number, setting.least_batch_size) for number in batch_sizes),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not 0 < common.learning_rate < math.inf:
        raise ValueError(f"learning rate must be a positive number, got {common.learning_rate}.")
    runs = []
    for batch_size in dict.fromkeys(batch_sizes):
        epochs, rate = setting.schedule(batch_size)
        tuned: dict[str, Any] = {"epochs": epochs, "learning_rate": rate}
        for method in dict.fromkeys(methods):
            if batch_size < METHODS[method].least_batch_size:
                continue
            for seed in range(seeds or setting.seeds or METHODS[method].seeds):
                file = None
                if features_dir is not None and setting.keeps_features and seed == 0:
                    parts = [common.variant, f"batch{batch_size}"] if len(setting.variants) > 1 else []
                    name = "-".join([method, *parts, f"seed{first_seed}.safetensors"])
                    file = str(features_dir / name)
                cell = {"method": method, "batch_size": batch_size, "seed": first_seed + seed, **tuned}
                runs.append(replace(common, features_file=file, **(cell | changes)))
    if not runs:
        raise ValueError("nothing to run: no method can train with these batch sizes.")
    return sorted(runs, key=lambda run: run.seed)


def data_of(run: Run) -> ConfoundedData:
    """Return the data of a run; kept until another is asked for. Raises what `Setting.data` raises."""
    degree = METHODS[run.method].degree if "variant" in get_setting(run.setting).row_names else 0
    # The methods of a seed come one after the other, with the same data.
    shared = replace(run, method="", batch_size=0, epochs=0, learning_rate=0.0, features_file=None)
    return _data(shared, degree)


@lru_cache(maxsize=1)
def _data(run: Run, degree: int) -> ConfoundedData:
    return get_setting(run.setting).data(run, degree)


def build(setting: Setting, method: Method, data: ConfoundedData, seed: int) -> BackboneNetwork:
    """Return an untrained network with the method's normalisation; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    network = setting.network(method.norm or setting.base_norm, len(data.classes))
    if method.layers == "none":
        return network
    options: dict[str, Any] = {
        "num_metadata": data.train.metadata.shape[1],
        "num_labels": network.head.out_features,
        "example": data.train.inputs[:2],
    } | (method.options or {})
    if method.layers == "every":
        insert(network, after=[f"backbone.{slot}" for slot in setting.slots], **options)
    insert(network, after="hidden", **options)
    prepare(network, data.train)
    return network


def train_network(
    run: Run, method: Method, data: ConfoundedData, epoch_done: Callable[[], None]
) -> tuple[BackboneNetwork, Samples, Row]:
    """Return the trained network of a run, not recalibrated, its samples, and what `fit` returns."""
    samples = data.train
    if method.oracle:
        assert data.unconfounded is not None, "`plan` takes no oracle on real data"
        samples = data.unconfounded()
    held_out = samples
    if method.head and method.head["fit"] == "balanced":
        samples, held_out = data.for_retraining(run.seed)
    if method.dependence is not None:
        method = replace(method, dependence=method.dependence | {"variables": data.confounders})
    network = build(get_setting(run.setting), method, data, run.seed)
    measured = fit(network, method, samples, **run.schedule, seed=run.seed, epoch_done=epoch_done)
    if method.head:
        refit(
            network, lambda rows: outputs(network, rows)[0], samples, held_out, seed=run.seed, **method.head
        )
    return network, samples, measured


def train(run: Run, epoch_done: Callable[[], None]) -> Row:
    """Train and measure the network of a run; see `Setting.train`. Worker processes import this function."""
    return get_setting(run.setting).train(run, epoch_done)


def write_outputs(out: Path, runs: Sequence[Run], rows: Sequence[Row], *, command: str) -> Path:
    """Write what a setting shows of a plan and its rows into an existing folder; return the page's path."""
    setting = get_setting(runs[0].setting)
    return write_page(
        out,
        title=setting.title,
        introduction=setting.more(out, runs, rows),
        tables=setting.tables(rows),
        figures=setting.figures(runs, rows),
        rows=rows,
        row_names=setting.row_names,
        command=command,
    )
