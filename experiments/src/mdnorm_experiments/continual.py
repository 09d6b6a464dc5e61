"""The continual task: one network through five stages in which the confounder takes over (R-MDN, ICML 2025).

After each stage the network is tested on the held-out data of all five; see docs/results-continual.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch

from mdnorm.design import polynomial
from mdnorm_experiments import figures, synthetic
from mdnorm_experiments.data import synthetic as drawn
from mdnorm_experiments.data.confounded import ConfoundedData, Samples
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.report import ReportFigure, ReportTable, by_method, mean_with_deviation
from mdnorm_experiments.results import Row
from mdnorm_experiments.settings import Run, Setting, build
from mdnorm_experiments.synthetic import GROUPS, ResultAxis, SyntheticSetting
from mdnorm_experiments.training import fit, has_metadata_norm, prepare, recalibrate_on

# Given once: the recursion only scales its columns by it. "penalty" would diverge in columns whitened for an
# earlier stage, and "dataset" sees the stage's metadata through it.
_ONE_GRAM = ("recursive",)
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


def make_samples(stage: int, group_size: int, degree: int, **options: Any) -> Samples:
    """Return the data of a stage (see `make_stage`); metadata are the confounder's powers 1 … degree."""
    data = drawn.make_stage(stage, group_size, **options)
    low, high = drawn.CONFOUNDER_RANGE
    return synthetic.samples_of(data, polynomial(data.confounder, degree, low=low, high=high))


@dataclass(frozen=True, kw_only=True)
class ContinualSetting(SyntheticSetting):
    """The synthetic images in five stages, and the distances of a network from the limits."""

    row_names: ClassVar = {"epochs": "epochs_per_stage", "size": "group_size", "test_size": "test_group_size"}
    variants: ClassVar[tuple[str, ...]] = ("plain",)
    num_stages: ClassVar = drawn.NUM_STAGES
    seeds: ClassVar = 3
    keeps_features: ClassVar = False

    schedule = Setting.schedule
    more = Setting.more

    def stages(self, run: Run) -> list[ConfoundedData]:
        """Return training and held-out data of each stage."""
        degree, found = METHODS[run.method].degree, []
        for stage in range(drawn.NUM_STAGES):
            seed = 2 * (drawn.NUM_STAGES * run.seed + stage)
            train = make_samples(stage, run.size, degree, seed=seed)
            # Stratified: the distance from a limit should be the network's, not that of the draw.
            test = make_samples(stage, run.test_size, degree, seed=seed + 1, stratified=True)
            found.append(ConfoundedData(train, test, test, GROUPS, GROUPS, {"confounder": (0,)}))
        return found

    def train(self, run: Run, epoch_done: Callable[[], None]) -> Row:
        """Train one network stage after stage, and measure it on all stages after each.

        The network and its layers keep weights and state; optimiser and learning rate start anew. The Gram
        matrix of a training set is that of the stage, except where it only scales the columns in which a
        layer remembers the past. Returns what `measures` returns, under "recalibrated" that of copies
        recalibrated after each stage, "train_loss" of each stage (a list) and "seconds_per_epoch".
        """
        stages, method = self.stages(run), self.method(run.method)
        if method.dependence is not None:
            method = replace(method, dependence=method.dependence | {"variables": stages[0].confounders})
        network = build(self, method, stages[0], run.seed)
        corrected = has_metadata_norm(network)
        keeps_gram = (method.options or {}).get("estimator") in _ONE_GRAM
        trained, tested, recalibrated = [], [], []
        for number, stage in enumerate(stages):
            if corrected and number and not keeps_gram:
                prepare(network, stage.train)
            seed = drawn.NUM_STAGES * run.seed + number
            trained.append(
                fit(network, method, stage.train, **run.schedule, seed=seed, epoch_done=epoch_done)
            )
            tested.append([self.measure(network, each, each.train) for each in stages])
            if corrected:
                # A copy: the next stage goes on from what training has left.
                copy = deepcopy(network)
                recalibrate_on(copy, stage.train, method)
                recalibrated.append([self.measure(copy, each, each.train) for each in stages])
        row = measures(tested) | ({"recalibrated": measures(recalibrated)} if corrected else {})
        return row | {
            "train_loss": [part["train_loss"] for part in trained],
            "seconds_per_epoch": fmean(part["seconds_per_epoch"] for part in trained),
        }

    def tables(self, rows: Sequence[Row]) -> list[ReportTable]:
        """Return the tables of distances and of stages; recalibrated networks have lines of their own."""
        distances, stages = [], []
        for title, members in _lines(rows).items():
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
                    mean_with_deviation([fmean(seconds)] if seconds else [], 1),
                )
            )
            own = np.array([np.diagonal(row["bacc_matrix"]) for row in members])
            above = (100 * (own - np.array(drawn.EFFECT_LIMITS))).T.tolist()
            stages.append((title, *(mean_with_deviation(values, 1, signed=True) for values in above)))
        headings = ("Method", "Seeds", *_DISTANCES.values(), *(f"dcor² {g}" for g in GROUPS), "s / epoch")
        limits = [f"Stage {stage + 1}: {100 * limit:g} %" for stage, limit in enumerate(drawn.EFFECT_LIMITS)]
        return [
            ReportTable(headings, distances, limits_text(), _LEGEND),
            ReportTable(
                ("Method", *limits), stages, limits_text(), _STAGE_LEGEND, "Above the limit, by stage"
            ),
        ]

    def figures(self, runs: Sequence[Run], rows: Sequence[Row]) -> list[ReportFigure]:
        """Return example images, accuracy and dcor² by stage, and the matrices of a few methods."""
        stage_titles = [f"stage {stage + 1}, shift {shift:g}" for stage, shift in enumerate(drawn.SHIFTS)]
        examples = synthetic.example_images(_one_image_a_stage(), drawn.NUM_STAGES, stage_titles)
        title = "Accuracy on each stage, just after training on it"
        return [
            *synthetic.result_figures(rows, examples, stage_axis(), title),
            ReportFigure(
                "matrices",
                figures.stage_matrices(_matrices(rows), drawn.EFFECT_LIMITS),
                "All stages after each stage",
                "Accuracy minus the limit of the true effect, for each stage trained on and tested on.",
                "Accuracy minus the limit of the true effect, in percentage points, mean over seeds. On the "
                "diagonal: the stage just trained on; left of it earlier stages, right of it later ones. "
                "White is right. In the last stage there is nothing to learn without the confounder, so a "
                "network may forget there what it knew: its last row then falls to 50 %.",
            ),
        ]


def measures(tested: Sequence[Sequence[Row]]) -> Row:
    """Return what is reported of a network, from 5 × 5 results.

    ``tested[i][j]`` has "bacc" and "dcor2" (by group) on stage j after training on stage i: these are
    "bacc_matrix" and "dcor2_matrix", and "bacc" and "dcor2" their means over the diagonal. See also
    `transfer`.
    """
    accuracy = [[float(result["bacc"]) for result in results] for results in tested]
    dependence = {
        group: [[float(result["dcor2"][group]) for result in results] for results in tested]
        for group in GROUPS
    }
    return {
        "bacc": fmean(np.diagonal(accuracy).tolist()),
        "dcor2": {group: fmean(np.diagonal(matrix).tolist()) for group, matrix in dependence.items()},
        **transfer(accuracy),
        "bacc_matrix": accuracy,
        "dcor2_matrix": dependence,
    }


def transfer(
    accuracy: Sequence[Sequence[float]], limits: Sequence[float] = drawn.EFFECT_LIMITS
) -> dict[str, float]:
    """Return the distances from the limits (Shah et al. 2025), and the classical transfer.

    With R_ij the accuracy on stage j after training on stage i and L_j the limit: "accuracy_distance",
    "backward_distance" and "forward_distance" are the mean |R_ij − L_j| over i = j, j < i and j > i.
    "backward_transfer" is the mean of R_Tj − R_jj over j < T, "forward_transfer" of R_ij − L_j over i = j − 1
    (Lopez-Paz and Ranzato 2017, with an untrained network in place of L).
    """
    last = len(limits) - 1
    distances = [
        [abs(value - limit) for value, limit in zip(values, limits, strict=True)] for values in accuracy
    ]
    return {
        "accuracy_distance": fmean(distances[j][j] for j in range(last + 1)),
        "backward_distance": fmean(distances[i][j] for i in range(last + 1) for j in range(i)),
        "forward_distance": fmean(distances[i][j] for i in range(last + 1) for j in range(i + 1, last + 1)),
        "backward_transfer": fmean(accuracy[last][j] - accuracy[j][j] for j in range(last)),
        "forward_transfer": fmean(accuracy[j - 1][j] - limits[j] for j in range(1, last + 1)),
    }


def limits_text() -> str:
    """Return the sentence on the analytic limits."""
    effect, both = (
        ", ".join(f"{100 * limit:.4g}" for limit in limits)
        for limits in (drawn.EFFECT_LIMITS, drawn.BOTH_LIMITS)
    )
    return (
        f"Analytic limits by stage: {effect} % from the true effect alone, {both} % with the confounder; "
        "dcor² 0 without it."
    )


def stage_axis() -> ResultAxis:
    """Return the axis of stages, each on its own test data, with both limits."""

    def values(row: Row, key: str) -> Iterable[tuple[int, float]]:
        matrix = 100 * np.array(row["bacc_matrix"]) if key == "bacc" else row["dcor2_matrix"][key]
        return enumerate(np.diagonal(matrix).tolist())

    limits = [
        ([100 * limit for limit in drawn.BOTH_LIMITS], "with the\nconfounder"),
        ([100 * limit for limit in drawn.EFFECT_LIMITS], "true effect\nonly"),
    ]
    stages = [str(stage + 1) for stage in range(drawn.NUM_STAGES)]
    return ResultAxis("stage", stages, values, limits, {"linestyle": "-", "spread": 0.3})


def _lines(rows: Sequence[Row], names: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Rows by title, those of recalibrated networks behind those they were made from."""
    lines = {}
    for name, members in by_method(rows).items():
        if names is not None and name not in names:
            continue
        title = METHODS[name].title
        lines[title] = members
        recalibrated = [row["recalibrated"] for row in members if "recalibrated" in row]
        if len(recalibrated) == len(members):
            lines[f"{title}, recalibrated"] = recalibrated
    return lines


def _one_image_a_stage() -> drawn.SyntheticData:
    """Each stage's first image of each group."""
    stages = [drawn.make_stage(stage, 1, seed=stage) for stage in range(drawn.NUM_STAGES)]
    names = ("images", "labels", "effect", "confounder")
    return drawn.SyntheticData(*(torch.cat([getattr(data, name) for data in stages]) for name in names))


_IN_MATRICES = ("none", "mdn-last-dataset", "mdn-last-running", "mdn-last-recursive")
_MOST_MATRICES = 6


def _matrices(rows: Sequence[Row]) -> Mapping[str, list[list[list[float]]]]:
    """Accuracy matrices of each seed by title: of a few methods, and of recalibrated networks if they fit."""
    names = {row["method"] for row in rows}
    lines = _lines(rows, [name for name in names if name in _IN_MATRICES] or list(names))
    others = [title for title in lines if title.endswith(", recalibrated")]
    plain = [title for title in lines if title not in others]
    left_out = [*others, *reversed(plain)][: max(len(lines) - _MOST_MATRICES, 0)]
    return {
        title: [row["bacc_matrix"] for row in members]
        for title, members in lines.items()
        if title not in left_out
    }


SETTING = ContinualSetting(
    name="continual",
    title="Metadata Normalization in continual learning",
    introduction=(
        "One network is trained on five data sets in turn. Each image shows blobs whose brightness is the "
        "true effect (on the diagonal) and one whose brightness is a confounder (lower left). From stage to "
        "stage the groups A and B come closer in the true effect and move apart in the confounder: in the "
        "last stage the true effect says nothing, and the confounder everything.",
        "A confounder-free network is right in 75 % of all cases in the first stage and in 50 % in the last. "
        "What lies above was got from the confounder.",
    ),
    batch_size=128,
    # The network without normalisation reaches its plateau in the first stage: 86 to 87 % of at most 87.5 %.
    epochs=5,
    learning_rate=3e-4,
    size=1000,
    test_size=500,
    slots=("norm1", "norm2"),
    default_methods=(
        "none",
        "batchnorm",
        "mdn-last-dataset",
        "mdn-last-running",
        "mdn-last-recursive",
        "mdn-every-running",
    ),
)
