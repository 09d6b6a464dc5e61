"""The continual task: one network through five stages in which the confounder takes over (R-MDN, ICML 2025).

After each stage the network is tested on the held-out data of all five, so a run yields matrices R, R[i][j]
measured on stage j after training on stage i. What counts is the distance from the limit L_j of the true
effect alone: a confounder-free network is at 0 everywhere, on the stages it has left behind and on those to
come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from mdnorm.design import polynomial
from mdnorm.experiments.data.continual import (
    BOTH_LIMITS,
    CONFOUNDER_RANGE,
    EFFECT_LIMITS,
    NUM_STAGES,
    SHIFTS,
    make_stage,
)
from mdnorm.experiments.data.synthetic import SyntheticData
from mdnorm.experiments.methods import METHODS, build, describe, panels, titles
from mdnorm.experiments.report import (
    ReportFigure,
    ReportTable,
    common_settings,
    listed,
    mean_with_deviation,
    write_report,
)
from mdnorm.experiments.results import Row
from mdnorm.experiments.training import (
    GROUPS,
    batches,
    check_settings,
    evaluate,
    fit,
    has_metadata_norm,
)
from mdnorm.integration import fit_gram, recalibrate

DEFAULT_METHODS = (
    "none",
    "batchnorm",
    "mdn-last-dataset",
    "mdn-last-running",
    "mdn-last-recursive",
    "mdn-every-running",
)
BATCH_SIZE = 128
SEEDS = 3
# The network without normalisation reaches its plateau in the first stage: 86 to 87 % of at most 87.5 %.
EPOCHS = 5
LEARNING_RATE = 3e-4

# Given once: the recursion only scales its columns by it. "penalty" would diverge in columns whitened for an
# earlier stage, and "dataset" sees the stage's metadata through it.
_ONE_GRAM = ("recursive",)


@dataclass(frozen=True)
class ContinualRun:
    """Settings of one network's way through the stages. Everything that can change its row is here.

    Attributes
    ----------
    method : str
        A key of `METHODS`.
    batch_size, seed : int
    epochs_per_stage : int
    learning_rate : float
        Of Adam at the start of each stage; it falls to 0 by a half cosine until its end.
    group_size, test_group_size : int
        Images a group and stage in the training and the held-out data.
    """

    method: str
    batch_size: int
    seed: int
    epochs_per_stage: int
    learning_rate: float
    group_size: int = 1000
    test_group_size: int = 500

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return NUM_STAGES * self.epochs_per_stage

    def settings(self) -> Row:
        """Return the settings as JSON values, those of the method included."""
        return {"setting": "continual"} | asdict(self) | METHODS[self.method].settings()


def plan(
    methods: Sequence[str] = DEFAULT_METHODS,
    batch_size: int = BATCH_SIZE,
    seeds: int = SEEDS,
    *,
    first_seed: int = 0,
    epochs: int | None = None,
    learning_rate: float | None = None,
    group_size: int = 1000,
    test_group_size: int = 500,
) -> list[ContinualRun]:
    """Return the runs of the table, seed by seed, so that an interrupted table is as complete as can be.

    Parameters
    ----------
    methods : sequence of str
        Keys of `METHODS`.
    batch_size, seeds, first_seed : int
    epochs, learning_rate
        Of a stage; None takes the tuned ones.
    group_size, test_group_size : int

    Raises
    ------
    ValueError
        An unknown method, a size below 1, or a method that cannot train with the batch size.
    """
    check_settings(
        methods,
        batch_sizes=[batch_size],
        seeds=seeds,
        epochs=epochs,
        learning_rate=learning_rate,
        group_sizes=(group_size, test_group_size),
    )
    for method in methods:
        if batch_size < METHODS[method].least_batch_size:
            raise ValueError(f"{METHODS[method].title} cannot train with batch size {batch_size}.")
    return [
        ContinualRun(
            method,
            batch_size,
            first_seed + seed,
            epochs or EPOCHS,
            learning_rate or LEARNING_RATE,
            group_size,
            test_group_size,
        )
        for seed in range(seeds)
        for method in dict.fromkeys(methods)
    ]


def metadata_columns(data: SyntheticData, degree: int) -> Tensor:
    """Return the powers 1 … degree of the confounder, shape (2N, degree); the same basis in all stages."""
    low, high = CONFOUNDER_RANGE
    return polynomial(data.confounder, degree, low=low, high=high)


def _data_seed(run: ContinualRun, stage: int, held_out: bool) -> int:
    return 2 * (NUM_STAGES * run.seed + stage) + held_out


def train(run: ContinualRun, epoch_done: Callable[[], None]) -> Row:
    """Train one network stage after stage, and measure it on all stages after each.

    The network and its layers keep their weights and state from stage to stage; optimiser and learning rate
    start anew. Estimators that take the Gram matrix of the training set get that of the stage, except where
    it only scales the columns in which they remember the past: these keep the first.

    Parameters
    ----------
    run : ContinualRun
    epoch_done : callable
        Called after each epoch.

    Returns
    -------
    dict
        Those of `measures`; for MDN the same under "recalibrated", of copies of the network after
        `mdnorm.recalibrate` on the stage's training data; "train_loss" of each stage's last epoch (a list)
        and "seconds_per_epoch".
    """
    method = METHODS[run.method]
    tests = []
    for stage in range(NUM_STAGES):
        seed = _data_seed(run, stage, True)
        # Stratified: the distance from a limit should be the network's, not that of the draw.
        held_out = make_stage(stage, run.test_group_size, seed=seed, stratified=True)
        tests.append((held_out, metadata_columns(held_out, method.degree)))
    network = build(method, tests[0][1].shape[1], run.seed)
    corrected = has_metadata_norm(network)
    keeps_gram = (method.options or {}).get("estimator") in _ONE_GRAM
    trained, tested, recalibrated = [], [], []
    for stage in range(NUM_STAGES):
        data = make_stage(stage, run.group_size, seed=_data_seed(run, stage, False))
        metadata = metadata_columns(data, method.degree)
        if corrected and not (keeps_gram and stage):
            fit_gram(network, metadata, data.labels)
        trained.append(
            fit(
                network,
                method,
                data,
                metadata,
                batch_size=run.batch_size,
                epochs=run.epochs_per_stage,
                learning_rate=run.learning_rate,
                seed=NUM_STAGES * run.seed + stage,
                epoch_done=epoch_done,
            )
        )
        tested.append([evaluate(network, *test) for test in tests])
        if corrected:
            # A copy: the next stage goes on from what training has left.
            copy = deepcopy(network)
            recalibrate(copy, batches(data, metadata), progress=False)
            recalibrated.append([evaluate(copy, *test) for test in tests])
    row = measures(tested)
    if corrected:
        row["recalibrated"] = measures(recalibrated)
    return row | {
        "train_loss": [part["train_loss"] for part in trained],
        "seconds_per_epoch": fmean(part["seconds_per_epoch"] for part in trained),
    }


def measures(tested: Sequence[Sequence[Row]]) -> Row:
    """Return what is reported of a network.

    Parameters
    ----------
    tested : 5 × 5 dicts
        ``tested[i][j]`` has "bacc" and "dcor2" (by group) on stage j after training on stage i.

    Returns
    -------
    dict
        "bacc_matrix" and "dcor2_matrix" (by group), as given; "bacc" and "dcor2", the means over each stage's
        own test data; and those of `transfer`.
    """
    accuracy = [[float(result["bacc"]) for result in results] for results in tested]
    dependence = {
        group: [[float(result["dcor2"][group]) for result in results] for results in tested]
        for group in GROUPS
    }
    return {
        "bacc": fmean(_diagonal(accuracy)),
        "dcor2": {group: fmean(_diagonal(matrix)) for group, matrix in dependence.items()},
        **transfer(accuracy),
        "bacc_matrix": accuracy,
        "dcor2_matrix": dependence,
    }


def _diagonal(matrix: Sequence[Sequence[float]]) -> list[float]:
    return [values[index] for index, values in enumerate(matrix)]


def transfer(
    accuracy: Sequence[Sequence[float]], limits: Sequence[float] = EFFECT_LIMITS
) -> dict[str, float]:
    """Return the distances from the limits, and the classical transfer.

    Parameters
    ----------
    accuracy : T × T floats
        R: accuracy on stage j after training on stage i.
    limits : T floats
        L: best accuracy of a confounder-free network on each stage.

    Returns
    -------
    dict
        "accuracy_distance", "backward_distance" and "forward_distance": mean distance of R_ij from L_j over
        i = j, j < i and j > i (Shah et al. 2025); 0 is right. "backward_transfer", the mean of R_Tj − R_jj
        over j < T, and "forward_transfer", the mean of R_ij − L_j over i = j − 1, have signs (Lopez-Paz and
        Ranzato 2017, there with an untrained network in place of L).
    """
    last = len(limits) - 1
    distances = [
        [abs(value - limit) for value, limit in zip(values, limits, strict=True)] for values in accuracy
    ]
    return {
        "accuracy_distance": fmean(_diagonal(distances)),
        "backward_distance": fmean(distances[i][j] for i in range(last + 1) for j in range(i)),
        "forward_distance": fmean(distances[i][j] for i in range(last + 1) for j in range(i + 1, last + 1)),
        "backward_transfer": fmean(accuracy[last][j] - accuracy[j][j] for j in range(last)),
        "forward_transfer": fmean(accuracy[j - 1][j] - limits[j] for j in range(1, last + 1)),
    }


def limits_text() -> str:
    """Return the sentence on the analytic limits."""

    def percent(limits: Sequence[float]) -> str:
        return ", ".join(f"{100 * limit:.4g}" for limit in limits)

    return (
        f"Analytic limits by stage: {percent(EFFECT_LIMITS)} % from the true effect alone, "
        f"{percent(BOTH_LIMITS)} % with the confounder; dcor² 0 without it."
    )


_DISTANCES = {
    "accuracy_distance": "ACCd",
    "backward_distance": "BWTd",
    "forward_distance": "FWTd",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
}
_SIGNED = ("backward_transfer", "forward_transfer")
_LEGEND = (
    "Mean ± standard deviation over seeds, on held-out data, in percentage points. ACCd, BWTd and FWTd: mean "
    "distance of the accuracy from the limit of the true effect, on the stage just trained on, on earlier "
    "ones and on later ones; 0 is right. BWT: what the accuracy on a stage gains from training on it to the "
    "end of training; FWT: accuracy minus limit on the stage that comes next. dcor²: between the features "
    "and the confounder, mean over the stages' own test data; bias-corrected, so it can be slightly negative."
)
_STAGE_LEGEND = (
    "Accuracy on each stage's own test data minus the limit of the true effect (in the heading), in "
    "percentage points. Above 0: got from the confounder."
)


def tables(rows: Sequence[Row], names: Mapping[str, str]) -> list[ReportTable]:
    """Return the table of distances and that of the stages.

    Parameters
    ----------
    rows : sequence of dict
        Of one batch size.
    names : mapping
        Identifier to title of methods; their order is that of the lines. A recalibrated network has a line of
        its own.
    """
    distances, stages = [], []
    for title, members in _lines(rows, names):
        seconds = [row["seconds_per_epoch"] for row in members if "seconds_per_epoch" in row]
        distances.append(
            (
                title,
                str(len(members)),
                *(
                    mean_with_deviation([100 * row[key] for row in members], 1, signed=key in _SIGNED)
                    for key in _DISTANCES
                ),
                *(mean_with_deviation([row["dcor2"][group] for row in members], 3) for group in GROUPS),
                f"{fmean(seconds):.1f}" if seconds else "–",
            )
        )
        own = [_diagonal(row["bacc_matrix"]) for row in members]
        stages.append(
            (
                title,
                *(
                    mean_with_deviation([100 * (values[stage] - limit) for values in own], 1, signed=True)
                    for stage, limit in enumerate(EFFECT_LIMITS)
                ),
            )
        )
    headings = ("Method", "Seeds", *_DISTANCES.values(), *(f"dcor² {group}" for group in GROUPS), "s / epoch")
    stage_headings = (
        "Method",
        *(f"Stage {stage + 1}: {100 * limit:g} %" for stage, limit in enumerate(EFFECT_LIMITS)),
    )
    return [
        ReportTable(headings, distances, limits_text(), _LEGEND),
        ReportTable(stage_headings, stages, limits_text(), _STAGE_LEGEND, title="Above the limit, by stage"),
    ]


def _lines(rows: Sequence[Row], names: Mapping[str, str]) -> list[tuple[str, list[Row]]]:
    """Titles with their rows, the recalibrated networks behind those they were made from."""
    lines = []
    for name, title in names.items():
        members = [row for row in rows if row["method"] == name]
        if not members:
            continue
        lines.append((title, members))
        recalibrated = [row["recalibrated"] for row in members if "recalibrated" in row]
        if len(recalibrated) == len(members):
            lines.append((f"{title}, recalibrated", recalibrated))
    return lines


_INTRODUCTION = (
    "One network is trained on five data sets in turn. Each image shows blobs whose brightness is the true "
    "effect (on the diagonal) and one whose brightness is a confounder (lower left). From stage to stage the "
    "groups A and B come closer in the true effect and move apart in the confounder: in the last stage the "
    "true effect says nothing, and the confounder everything.",
    "A confounder-free network is right in 75 % of all cases in the first stage and in 50 % in the last. "
    "What lies above was got from the confounder.",
)


def write_outputs(out: Path, runs: Sequence[ContinualRun], rows: Sequence[Row], *, command: str) -> Path:
    """Write table.md, the figures and report.html of finished runs.

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
    from mdnorm.files import write_text_atomically

    names = titles({run.method for run in runs})
    shown_tables = tables(rows, names)
    text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in shown_tables)
    write_text_atomically(out / "table.md", text)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    stage_titles = [f"stage {stage + 1}, shift {shift:g}" for stage, shift in enumerate(SHIFTS)]
    examples = figures.example_images(_one_image_a_stage(), NUM_STAGES, stage_titles)
    accuracy = figures.accuracy_by_stage(rows, panels(names), EFFECT_LIMITS, BOTH_LIMITS)
    dependence = figures.dependence_by_stage(rows, panels(names))
    matrices = figures.stage_matrices(_matrices(rows, names), EFFECT_LIMITS)
    shown = [
        ReportFigure(
            plotting.save_figure(examples, folder / "examples.png"),
            "The images",
            "An example image of each group and stage.",
            "The classifier sees the images only, never these numbers.",
        ),
        ReportFigure(
            plotting.save_figure(accuracy, folder / "accuracy.png"),
            "Accuracy on each stage, just after training on it",
            "Balanced accuracy of every method by stage; the differences from the limit are in the table.",
            "Closest to the lower line is best. What lies above was got from the confounder.",
        ),
        ReportFigure(
            plotting.save_figure(dependence, folder / "dependence.png"),
            "What the features hold of the confounder",
            "Distance correlation by group, method and stage; the means are in the table.",
            "Bias-corrected squared distance correlation, on each stage's own test data; 0 is right.",
        ),
        ReportFigure(
            plotting.save_figure(matrices, folder / "matrices.png"),
            "All stages after each stage",
            "Accuracy minus the limit of the true effect, for each stage trained on and tested on.",
            "Accuracy minus the limit of the true effect, in percentage points, mean over seeds. On the "
            "diagonal: the stage just trained on; left of it earlier stages, right of it later ones. White "
            "is right. In the last stage there is nothing to learn without the confounder, so a network may "
            "forget there what it knew: its last row then falls to 50 %.",
        ),
    ]
    settings = common_settings(run.seed for run in runs) | {
        "training images a group and stage": listed(run.group_size for run in runs),
        "held-out images a group and stage": listed(run.test_group_size for run in runs),
        "batch size": listed(run.batch_size for run in runs),
        "epochs a stage": listed(run.epochs_per_stage for run in runs),
        "learning rate": listed(run.learning_rate for run in runs),
        "optimiser": "Adam, anew in each stage, learning rate falling to 0 by a half cosine",
    }
    return write_report(
        out,
        title="Metadata Normalization in continual learning",
        introduction=_INTRODUCTION,
        tables=shown_tables,
        figures=shown,
        settings=settings | describe(names),
        command=command,
    )


def _one_image_a_stage() -> SyntheticData:
    """Each stage's first image of each group, group A first."""
    stages = [make_stage(stage, 1, seed=stage) for stage in range(NUM_STAGES)]

    def joined(name: str) -> Tensor:
        pairs = torch.stack([getattr(data, name) for data in stages], 1)
        return pairs.flatten(0, 1)

    return SyntheticData(*map(joined, ("images", "labels", "effect", "confounder")))


_IN_MATRICES = ("none", "mdn-last-dataset", "mdn-last-running", "mdn-last-recursive")
_MOST_MATRICES = 6


def _matrices(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[list[list[float]]]]:
    """Accuracy matrices of each seed by title: of a few methods, and of recalibrated networks if they fit."""
    chosen = {name: title for name, title in names.items() if name in _IN_MATRICES} or names
    lines = _lines(rows, chosen)
    plain = [title for title, _ in lines if title in chosen.values()][:_MOST_MATRICES]
    others = [title for title, _ in lines if title not in chosen.values()]
    kept = {*plain, *others[max(len(others) + len(plain) - _MOST_MATRICES, 0) :]}
    return {title: [row["bacc_matrix"] for row in members] for title, members in lines if title in kept}
