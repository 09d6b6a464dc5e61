"""Tables, figures and audit of the settings with confounded images, clips or volumes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mdnorm.plotting import MARKERS, PALETTE
from mdnorm_experiments.data.confounded import ConfoundedData, as_targets
from mdnorm_experiments.figures import BARS, LINE, WIDTH, mean_and_deviation, series_figure, series_of
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.report import ReportFigure, ReportTable, by_method, mean_with_deviation
from mdnorm_experiments.results import Row
from mdnorm_experiments.settings import Run

LEGEND = (
    "Mean ± standard deviation over seeds. “Confound-free”: balanced accuracy on held-out data in which the "
    "metadata say nothing about the label, the honest measure. “Confounded”: on held-out data like those of "
    "the training. “Shuffled”: confound-free, with the metadata of other samples. dcor², bias-corrected, is "
    "that with the metadata within the classes, averaged over classes and variables; 0 is right. That of the "
    "logits says what the outputs give away, that of the features what they hold, on new (confound-free) and "
    "on training samples; the score of the linear probe is 0 at chance and 1 at best. Networks with Metadata "
    "Normalization are recalibrated: they have exact coefficients from the training data. “Gain”: points on "
    "confound-free data above “No normalisation”, seed by seed. “Recovered”: the gain as a share of the mean "
    "gain of the oracle, the same network trained on unconfounded data."
)
_RECALIBRATED = " Networks with Metadata Normalization are recalibrated."
_COMPARED = ("none", "batchnorm", "groupnorm", "brnet")


def _final(rows: Sequence[Row]) -> list[Row]:
    """What the method leaves behind in the end: recalibrated where it can be."""
    return [row | row.get("recalibrated", {}) for row in rows]


def _percent(values: Sequence[float], *, signed: bool = False) -> str:
    return mean_with_deviation([100 * value for value in values], 1, signed=signed)


def _dependence(row: Row, measure: str, variables: Sequence[str]) -> float:
    """Return dcor² under a name of `evaluate`, averaged over variables and classes."""
    return statistics.fmean(statistics.fmean(row[measure][variable].values()) for variable in variables)


def _dependences(rows: Sequence[Row], measures: Sequence[str], variables: Sequence[str]) -> str:
    values = ([_dependence(row, measure, variables) for row in rows] for measure in measures)
    return " / ".join(mean_with_deviation(of_measure, 3) for of_measure in values)


def _probes(rows: Sequence[Row], variables: Sequence[str]) -> str:
    found = [[value for v in variables if (value := row["probe"][v]) is not None] for row in rows]
    return mean_with_deviation([statistics.fmean(values) for values in found if values], 2)


def _recalls(rows: Sequence[Row], group: str) -> list[dict[str, float]]:
    """Recall by class in a group, seed by seed; empty where the confound-free data have nobody of it."""
    return [recall for row in _final(rows) if (recall := row["recall"][group])]


def _group_accuracy(rows: Sequence[Row], group: str) -> list[float]:
    return [statistics.fmean(recall.values()) for recall in _recalls(rows, group)]


def tables(rows: Sequence[Row], limit: float | None) -> list[ReportTable]:
    """Return the tables of all methods: outcomes; each variable; as trained; dcor² by class; by group.

    There is at least one row. `limit` is the best accuracy, a fraction, on generated confound-free data.
    """
    methods = by_method(rows)
    variables, groups = list(rows[0]["dcor2"]), list(rows[0]["recall"])
    classes = list(rows[0]["dcor2"][variables[0]])
    two = len(classes) == 2
    before = {row["seed"]: row["bacc"] for row in methods.get("none", [])}
    gains = {
        name: [row["bacc"] - before[row["seed"]] for row in _final(members) if row["seed"] in before]
        for name, members in methods.items()
    }
    # A difference of few seeds' means may be nothing at all: a share of it says nothing.
    whole = statistics.fmean(gains["oracle"]) if gains.get("oracle") else 0.0
    overview, by_variable, stages, by_class, by_group = [], [], [], [], []
    for name, members in methods.items():
        title, final = METHODS[name].title, _final(members)
        recalibrated = [row["recalibrated"] for row in members if "recalibrated" in row]
        overview.append(
            [
                title,
                str(len(members)),
                _percent([row["bacc"] for row in final]),
                _percent([row["bacc_confounded"] - row["bacc"] for row in final], signed=True),
                _percent([row["bacc_shuffled"] for row in final if row["bacc_shuffled"] is not None]),
                _dependences(final, ["dcor2_logits"], variables),
                _dependences(final, ["dcor2", "dcor2_train"], variables),
                _probes(final, variables),
                _percent(gains[name], signed=True),
                mean_with_deviation([100 * value / whole for value in gains[name] if whole > 0], 0),
            ]
        )
        for variable in variables:
            pairs = (["dcor2_logits", "dcor2_logits_train"], ["dcor2", "dcor2_train"], ["dcor2_whitened"])
            cells = (_dependences(final, measures, [variable]) for measures in pairs)
            by_variable.append([title, variable, *cells, _probes(final, [variable])])
        seconds = f"{statistics.fmean(row['seconds_per_epoch'] for row in members):.1f}"
        stages.append([title, *_stage(members, variables), *_stage(recalibrated, variables), seconds])
        by_class.append(
            [title]
            + [
                mean_with_deviation([row["dcor2"][variable][label] for row in final], 3)
                for variable in variables
                for label in classes
            ]
        )
        accuracy = [_percent(_group_accuracy(members, group)) for group in groups]
        rates = [_percent([recall[classes[-1]] for recall in _recalls(members, group)]) for group in groups]
        by_group.append([title, *accuracy, *(rates if two else [])])
    stage = ["Confound-free (%)", "Confounded (%)", *(f"dcor² {v}" for v in variables), "Gap (points)"]
    return [
        ReportTable(
            [
                "Method",
                "Seeds",
                "Confound-free (%)",
                "Confounded − confound-free (points)",
                "Shuffled (%)",
                "dcor² logits",
                "dcor² features, new / training",
                "Probe",
                "Gain (points)",
                "Recovered (%)",
            ],
            overview,
            f"Best possible on confound-free data: {100 * limit:.1f} %; dcor² 0."
            if limit is not None
            else "No analytic limit of accuracy; dcor² 0 without the confounders.",
            LEGEND,
        ),
        ReportTable(
            ["Method", "Variable", "logits, new / training", "features, new / training", "whitened", "Probe"],
            by_variable,
            "dcor² within the classes; 0 is right.",
            "“Whitened”: of features with the same variance in all directions, on new samples."
            + _RECALIBRATED,
            "dcor² and probe by variable",
        ),
        ReportTable(
            ["Method", *stage, *(f"recal. {heading}" for heading in stage), "s / epoch"],
            stages,
            "dcor² of the features, within the classes of the confound-free data.",
            "“Gap”: the largest difference in the recall of a class between groups. “Recal.”: with exact "
            "coefficients from the training data.",
            "As trained, and recalibrated",
        ),
        ReportTable(
            ["Method", *(f"{variable}, {label}" for variable in variables for label in classes)],
            by_class,
            "dcor² within each class; 0 is right.",
            "On the confound-free data." + _RECALIBRATED,
            "dcor² of features and metadata by class",
        ),
        ReportTable(
            ["Method", *(f"{g} (%)" for g in groups), *(f"TPR, {g} (%)" for g in groups if two)],
            by_group,
            "The nearer to each other the groups are, the fairer the network.",
            (f"TPR: share of “{classes[-1]}” that is found. " if two else "")
            + "Balanced accuracy on the confound-free data."
            + _RECALIBRATED,
            "Accuracy by group",
        ),
    ]


def _stage(members: Sequence[Row], variables: Sequence[str]) -> list[str]:
    """Return the cells of networks as trained, or recalibrated."""
    return [
        _percent([row["bacc"] for row in members]),
        _percent([row["bacc_confounded"] for row in members]),
        *(_dependences(members, ["dcor2"], [variable]) for variable in variables),
        _percent([row["gap"] for row in members]),
    ]


def accuracy_figure(rows: Sequence[Row], limit: float | None) -> Figure:
    """Accuracy with and without confounding, and the dependence left, by method."""
    methods = by_method(rows)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))

    def draw(axis: Axes, value: Callable[[Row], float], label: str, style: int, marker: int) -> None:
        found = [[value(row) for row in _final(members)] for members in methods.values()]
        means, deviations = zip(*map(mean_and_deviation, found), strict=True)
        look = {"color": PALETTE[style], "marker": MARKERS[marker], "linestyle": "none", **BARS}
        axis.errorbar(means, range(len(found)), xerr=deviations, label=label, **look)

    draw(left, lambda row: 100 * row["bacc_confounded"], "confounded test data", 1, 1)
    draw(left, lambda row: 100 * row["bacc"], "confound-free test data", 4, 0)
    if limit is not None:
        left.axvline(100 * limit, **LINE)
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        text, style = f"limit {100 * limit:.1f} %", {"ha": "center", "fontsize": 7, "color": "0.3"}
        left.annotate(text, (100 * limit, 1), xytext=(0, 2), **style, **place)
    left.set_yticks(range(len(methods)), [METHODS[name].title for name in methods], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("balanced accuracy (%)", fontsize=8)
    for index, variable in enumerate(rows[0]["dcor2"]):
        value = partial(_dependence, measure="dcor2_logits", variables=[variable])
        label = f"dcor² with {variable} within classes"
        draw(right, value, label, (3, 6, 5)[index % 3], (0, 2, 3)[index % 3])
    right.axvline(0, **LINE)
    right.set_xlabel("dcor² of the logits", fontsize=8)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def groups_figure(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Accuracy by metadata group on confound-free data, of a few methods."""
    groups = list(rows[0]["recall"])

    def points(row: Row) -> list[tuple[int, float]]:
        found = [(number, _group_accuracy([row], group)) for number, group in enumerate(groups)]
        return [(number, 100 * values[0]) for number, values in found if values]

    shown = {name: METHODS[name].title for name in by_method(rows) if name in names}
    labels = ("group", "balanced accuracy (%)")
    return series_figure({"": series_of(rows, shown, points)}, {"": shown}, groups, labels=labels, height=2.8)


def _best(rows: Sequence[Row]) -> str | None:
    """The method with Metadata Normalization that is most accurate on confound-free data, if there is one."""
    means = {
        name: statistics.fmean(row["bacc"] for row in _final(members))
        for name, members in by_method(rows).items()
        if METHODS[name].layers != "none"
    }
    return max(means, key=lambda name: means[name]) if means else None


def figures(examples: Figure, rows: Sequence[Row], limit: float | None) -> list[ReportFigure]:
    """Return the figures of the page: example samples, accuracy with dcor², accuracy by group."""
    best = _best(rows)
    return [
        ReportFigure(
            "examples",
            examples,
            "The data",
            "Example samples of each class and group.",
            "Examples from the training data. The network sees these, never the metadata.",
        ),
        ReportFigure(
            "accuracy",
            accuracy_figure(rows, limit),
            "Accuracy and what the outputs hold of the metadata",
            "Balanced accuracy on both test sets and dcor² of the logits; the numbers are in the table.",
            "A network that cheats is good on the confounded data (orange) and poor on the confound-free "
            "ones (blue)." + _RECALIBRATED,
        ),
        ReportFigure(
            "groups",
            groups_figure(rows, [*_COMPARED, best] if best else _COMPARED),
            "Accuracy by group",
            "Balanced accuracy by metadata group; the numbers are in the table.",
            "On the confound-free data.",
        ),
    ]


def audit(
    out: Path, data: ConfoundedData, runs: Sequence[Run], rows: Sequence[Row], plain: Sequence[str]
) -> list[str]:
    """Audit the best corrected network and one without correction on the confound-free data.

    The page is written into ``out/audit``. `data` are those of the first run, `plain` the methods without
    correction, the first of which there is taken. Returns the paragraph of the report that says where the
    audit is, or why there is none.
    """
    from safetensors.torch import load_file

    from mdnorm import auditing

    kept = {run.method: Path(run.features_file) for run in runs if run.features_file}
    best, before = _best(rows), next((name for name in plain if name in kept), None)
    if best is None or before is None or not all(kept[name].exists() for name in (before, best)):
        return []
    tensors, others = load_file(kept[before]), load_file(kept[best])
    metadata: dict[str, Any] = {}
    for variable, columns in data.confounders.items():
        values = as_targets(tensors["confounders"], columns)
        for index, found in enumerate(values):
            name = variable if len(values) == 1 else f"{variable} {index + 1}"
            metadata[name] = found.tolist()
        if len(columns) > len(values):
            names = data.groups if len(columns) == len(data.groups) else [*map(str, range(len(columns)))]
            metadata[variable] = [names[code] for code in metadata[variable]]
    networks = {"the uncorrected network": tensors, METHODS[best].title: others}

    def named(numbers: Tensor) -> list[str]:
        return [data.classes[number] for number in numbers.tolist()]

    try:
        report = auditing.audit(
            {title: kept["features"] for title, kept in networks.items()},
            metadata,
            named(tensors["labels"]),
            predictions={title: named(kept["scores"].argmax(1)) for title, kept in networks.items()},
            positive=data.classes[-1] if len(data.classes) == 2 else None,
            settings=auditing.Settings(num_permutations=100),
        )
    except auditing.InputError as error:
        return [f"There is no audit of what the networks still know: {error}"]
    report.save(out / "audit")
    return [
        f"What the uncorrected network and the best with Metadata Normalization ({METHODS[best].title}) "
        "still know of each metadata variable is in audit/report.html beside this page."
    ]
