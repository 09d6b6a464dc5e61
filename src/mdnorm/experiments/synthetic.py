"""Setting 1 of the paper: two groups of synthetic images with a known confounder (Lu et al., section 4.1)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mdnorm.design import polynomial
from mdnorm.experiments.data.synthetic import (
    NUM_SITES,
    VARIANTS,
    WITHOUT_LIMITS,
    SyntheticData,
    make_synthetic,
)
from mdnorm.experiments.methods import DEFAULT_METHODS, METHODS, build, describe, panels, titles
from mdnorm.experiments.results import Row
from mdnorm.experiments.training import GROUPS, batches, check_settings, evaluate, fit, has_metadata_norm
from mdnorm.integration import fit_gram, recalibrate

BATCH_SIZES = (1, 4, 20, 200, 2000)


# Epochs and learning rate by batch size, tuned for the network without normalisation to reach its plateau.
_SCHEDULES = {1: (3, 5e-5), 4: (5, 1e-4), 20: (10, 1e-4), 200: (15, 2e-4), 2000: (30, 5e-4)}


def schedule(batch_size: int) -> tuple[int, float]:
    """Return (epochs, learning rate) for a batch size: those of the nearest tuned one."""
    nearest = min(_SCHEDULES, key=lambda size: abs(math.log(size / batch_size)))
    return _SCHEDULES[nearest]


@dataclass(frozen=True)
class SyntheticRun:
    """Settings of one training. Everything that can change its row is here.

    Attributes
    ----------
    method : str
        A key of `METHODS`.
    batch_size, seed, epochs : int
    learning_rate : float
        Of Adam at the start; it falls to 0 by a half cosine.
    group_size, test_group_size : int
        Images a group in the training and the held-out data.
    variant : str
        Of the data; see `mdnorm.experiments.data.synthetic`.
    features_file : str or None
        Where to keep the held-out features, for the projection figure; not part of the settings.
    """

    method: str
    batch_size: int
    seed: int
    epochs: int
    learning_rate: float
    group_size: int = 1000
    test_group_size: int = 2000
    variant: str = "plain"
    features_file: str | None = None

    def settings(self) -> Row:
        """Return the settings as JSON values, those of the method included."""
        row: Row = {"setting": "synthetic"} | asdict(self)
        del row["features_file"]
        return row | METHODS[self.method].settings()


def plan(
    methods: Sequence[str] = DEFAULT_METHODS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seeds: int | None = None,
    *,
    first_seed: int = 0,
    epochs: int | None = None,
    learning_rate: float | None = None,
    group_size: int = 1000,
    test_group_size: int = 2000,
    variant: str = "plain",
    features_dir: Path | None = None,
) -> list[SyntheticRun]:
    """Return the runs of the table, seed by seed, so that an interrupted table is as complete as can be.

    Parameters
    ----------
    methods : sequence of str
        Keys of `METHODS`.
    batch_sizes : sequence of int
    seeds : int, optional
        Seeds a cell; None takes those of the method.
    first_seed : int
    epochs, learning_rate
        None takes those tuned for the batch size.
    group_size, test_group_size : int
    variant : str
        Of the data.
    features_dir : Path, optional
        Folder for the held-out features of each cell's first seed.

    Returns
    -------
    list of SyntheticRun
        Without the cells of `impossible_cells`.

    Raises
    ------
    ValueError
        An unknown method or variant, a size below 1, or nothing left to run.
    """
    check_settings(
        methods,
        batch_sizes=batch_sizes,
        seeds=seeds,
        epochs=epochs,
        learning_rate=learning_rate,
        group_sizes=(group_size, test_group_size),
    )
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}.")
    runs = []
    left_out = impossible_cells(methods, batch_sizes)
    for batch_size in dict.fromkeys(batch_sizes):
        tuned_epochs, tuned_rate = schedule(batch_size)
        for method in dict.fromkeys(methods):
            if (method, batch_size) in left_out:
                continue
            for seed in range(seeds if seeds is not None else METHODS[method].seeds):
                file = f"{method}-{variant}-batch{batch_size}-seed{first_seed}.safetensors"
                runs.append(
                    SyntheticRun(
                        method,
                        batch_size,
                        first_seed + seed,
                        epochs or tuned_epochs,
                        learning_rate or tuned_rate,
                        group_size,
                        test_group_size,
                        variant,
                        str(features_dir / file) if features_dir is not None and seed == 0 else None,
                    )
                )
    if not runs:
        raise ValueError("nothing to run: no method can train with these batch sizes.")
    return sorted(runs, key=lambda run: run.seed)


def impossible_cells(methods: Sequence[str], batch_sizes: Sequence[int]) -> list[tuple[str, int]]:
    """Return the (method, batch size) that cannot be trained: BatchNorm with one sample has no variance."""
    return [
        (method, size)
        for method in dict.fromkeys(methods)
        for size in dict.fromkeys(batch_sizes)
        if size < METHODS[method].least_batch_size
    ]


def metadata_columns(data: SyntheticData, variant: str, degree: int) -> Tensor:
    """Return the metadata columns of a data set, shape (2N, K_m).

    A flexible basis is what lets the regression see a non-linear function of the confounder (a step between
    the groups, say) as metadata; with the plain column the protected label explains it and keeps it.

    Parameters
    ----------
    data : SyntheticData
    variant : str
        Of the data. "sites" has 50 columns with a degree above 1 (16 sites, sex, 6 of a spline of age, 27
        without effect), 45 with age as a straight line.
    degree : int
        Of the polynomial of the confounder in the other variants.
    """
    if variant == "sites":
        sites = one_hot(data.site, NUM_SITES)
        age = (data.age - 50).unsqueeze(1) / 30
        if degree > 1:
            # A cubic spline with knots at fixed ages, so that held-out data get the same columns.
            pieces = [(age - knot).relu() ** 3 for knot in (-2 / 3, 0.0, 2 / 3)]
            age = torch.cat([age, age**2, age**3, *pieces], 1)
        return torch.cat([sites, data.sex.unsqueeze(1), age, data.nuisance], 1)
    low, high = {"plain": (1, 6), "quadratic": (-1, 1), "variance": (0, 1)}[variant]
    return polynomial(data.confounder, degree, low=low, high=high)


def train(run: SyntheticRun, epoch_done: Callable[[], None]) -> Row:
    """Train one network and measure it on held-out data.

    Parameters
    ----------
    run : SyntheticRun
    epoch_done : callable
        Called after each epoch.

    Returns
    -------
    dict
        "bacc" and "accuracy" (by group), fractions; "dcor2" by group, between the 84 features of the last
        layer and the confounder; "seconds_per_epoch"; "train_loss" of the last epoch; for MDN "recalibrated",
        with "bacc", "accuracy" and "dcor2" after `mdnorm.recalibrate` on the training data.
    """
    method = METHODS[run.method]
    data = make_synthetic(run.group_size, seed=2 * run.seed, variant=run.variant)
    metadata = metadata_columns(data, run.variant, method.degree)
    network = build(method, metadata.shape[1], run.seed)
    corrected = has_metadata_norm(network)
    if corrected:
        fit_gram(network, metadata, data.labels)
    trained = fit(
        network,
        method,
        data,
        metadata,
        batch_size=run.batch_size,
        epochs=run.epochs,
        learning_rate=run.learning_rate,
        seed=run.seed,
        epoch_done=epoch_done,
    )
    held_out = make_synthetic(run.test_group_size, seed=2 * run.seed + 1, variant=run.variant)
    columns = metadata_columns(held_out, run.variant, method.degree)
    measured = evaluate(network, held_out, columns, run.features_file)
    if corrected:
        recalibrate(network, batches(data, metadata), progress=False)
        measured["recalibrated"] = evaluate(network, held_out, columns)
    return measured | trained


_INTRODUCTION = (
    "Each image shows blobs whose brightness is the true effect (on the diagonal) and one whose brightness "
    "is a confounder (lower left). Both differ between the groups A and B and overlap on a third of their "
    "range.",
    "A classifier that uses the true effect alone is right in 83.3 % of all cases; with the confounder it "
    "reaches 94.4 %. Accuracy above 83.3 % is therefore not better but confounded. dcor², the squared "
    "distance correlation between the network's features and the confounder within a group, shows how much "
    "of the confounder the features still hold.",
)
_VARIANT_TEXTS = {
    "plain": _INTRODUCTION,
    "sites": (
        *_INTRODUCTION,
        "In this variant the confounder is the sum of the offsets of 16 sites, a curve of age and an effect "
        "of sex; with columns that explain nothing the layer gets 50 metadata columns.",
    ),
    "quadratic": (
        *_INTRODUCTION,
        "In this variant the confounder's brightness is a quadratic function of the metadata column, and "
        "dcor² is measured against that column.",
    ),
    "variance": (
        "Each image shows blobs whose brightness is the true effect plus noise, and one metadata column, "
        "different in the groups A and B, says how much noise, as a scanner might.",
        "dcor², the squared distance correlation between the network's features and the metadata column "
        "within a group, shows how much of it the features still hold. There is no simple limit of accuracy.",
    ),
}


def write_outputs(out: Path, runs: Sequence[SyntheticRun], rows: Sequence[Row], *, command: str) -> Path:
    """Write table.md, metadata.csv, the figures and report.html of finished runs.

    ``metadata.csv`` holds the group, the two effects and each kept network's predictions for the held-out
    images, in the order of the features: what `mdnorm.audit` needs.

    Parameters
    ----------
    out : Path
        An existing folder.
    runs, rows
        The plan and its rows.
    command : str
        Shown in the report.

    Returns
    -------
    Path
        Of the report.
    """
    from mdnorm import plotting
    from mdnorm.experiments import figures
    from mdnorm.experiments.report import (
        ReportFigure,
        common_settings,
        listed,
        synthetic_table,
        write_report,
    )
    from mdnorm.files import write_text_atomically

    names = titles({run.method for run in runs})
    table = synthetic_table(rows, names)
    write_text_atomically(out / "table.md", table.markdown())
    _write_metadata(out / "metadata.csv", runs)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    variant = runs[0].variant
    examples = figures.example_images(make_synthetic(4, seed=0, variant=variant))
    accuracy = figures.accuracy_by_batch_size(rows, panels(names))
    dependence = figures.dependence_by_group(rows, panels(names))
    shown = [
        ReportFigure(
            plotting.save_figure(examples, folder / "examples.png"),
            "The images",
            "Four example images of each group.",
            "The classifier sees the images only, never these numbers.",
        ),
        ReportFigure(
            plotting.save_figure(accuracy, folder / "accuracy.png"),
            "Accuracy",
            "Balanced accuracy of every method by batch size; the numbers are in the table.",
            "Closest to 83.3 % is best. What lies above was got from the confounder."
            if variant not in WITHOUT_LIMITS
            else "Balanced accuracy on held-out data.",
        ),
        ReportFigure(
            plotting.save_figure(dependence, folder / "dependence.png"),
            "What the features hold of the confounder",
            "Distance correlation by group, method and batch size; the numbers are in the table.",
            "Bias-corrected squared distance correlation; 0 is right.",
        ),
    ]
    projected = _projection_panels(runs, rows)
    if projected:
        shown.append(
            ReportFigure(
                plotting.save_figure(figures.projections(projected), folder / "projection.png"),
                "The features, before and after",
                "Two principal components of each model's features by group, coloured by the confounder.",
                "Each point is a held-out image. Without correction the colour runs along the main "
                "component: the features follow the confounder. With Metadata Normalization it is mixed "
                "there; what order is left sits in a component that holds next to none of the variance.",
            )
        )
    settings = common_settings(run.seed for run in runs) | {
        "training images a group": listed(run.group_size for run in runs),
        "held-out images a group": listed(run.test_group_size for run in runs),
        "epochs and learning rate": "; ".join(
            f"batch size {size}: {epochs} epochs from {rate:g}"
            for size, epochs, rate in sorted({(r.batch_size, r.epochs, r.learning_rate) for r in runs})
        ),
        "optimiser": "Adam, learning rate falling to 0 by a half cosine",
    }
    return write_report(
        out,
        title="Metadata Normalization on synthetic images",
        introduction=_VARIANT_TEXTS[variant],
        tables=[table],
        figures=shown,
        settings=settings | describe(names),
        command=command,
    )


def _write_metadata(path: Path, runs: Sequence[SyntheticRun]) -> None:
    from safetensors.torch import load_file

    from mdnorm.files import atomic_path

    columns: dict[str, list[Any]] = {}
    for run in runs:
        if run.features_file is None or not Path(run.features_file).exists():
            continue
        tensors = load_file(run.features_file)
        if "scores" not in tensors:
            continue  # kept before scores were
        if not columns:
            columns["group"] = [GROUPS[int(label)] for label in tensors["labels"].tolist()]
            columns |= {name: tensors[name].tolist() for name in ("effect", "confounder")}
        scores = tensors["scores"].tolist()
        if len(scores) != len(columns["group"]):
            continue
        name = f"{run.method}_batch{run.batch_size}"
        columns[f"prediction_{name}"] = [GROUPS[score > 0.5] for score in scores]
        columns[f"score_{name}"] = scores
    if columns:
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def _projection_panels(runs: Sequence[SyntheticRun], rows: Sequence[Row]) -> list[Any]:
    """Panels of the methods whose features were kept, at the batch size nearest to 200."""
    from safetensors.torch import load_file

    from mdnorm.experiments.figures import Projection
    from mdnorm.experiments.report import mean_with_deviation

    kept = {
        (run.batch_size, run.method): run
        for run in runs
        if run.features_file is not None and Path(run.features_file).exists()
    }
    if not kept:
        return []
    batch_size = min((size for size, _ in kept), key=lambda size: abs(math.log(size / 200)))
    shown = []
    for method in ("none", "mdn-last-running", "mdn-every-running"):
        run = kept.get((batch_size, method))
        row = next((row for row in rows if run is not None and run.settings().items() <= row.items()), None)
        if run is None or row is None:
            continue
        tensors = load_file(str(run.features_file))
        dependence = " / ".join(mean_with_deviation([row["dcor2"][group]], 3) for group in GROUPS)
        title = f"{METHODS[method].title}\ndcor² {dependence}\naccuracy {100 * row['bacc']:.1f} %"
        arrays = (tensors[name].numpy() for name in ("features", "labels", "confounder"))
        shown.append(Projection(title, *arrays))
    return shown
