"""Tables, figures, report and audit of the settings with confounded images, clips or volumes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdnorm.experiments.data.confounded import ConfoundedData
from mdnorm.experiments.figures import draw_series
from mdnorm.experiments.methods import METHODS, titles
from mdnorm.experiments.report import (
    ReportFigure,
    ReportTable,
    common_settings,
    listed,
    mean_with_deviation,
    write_report,
)
from mdnorm.experiments.results import Row
from mdnorm.experiments.settings import METHOD_OF_NORM, Setting
from mdnorm.files import write_text_atomically
from mdnorm.plotting import MARKERS, PALETTE, save_figure

if TYPE_CHECKING:
    from mdnorm.experiments.confounded import ConfoundedRun

__all__ = ["accuracy_figure", "audit_networks", "groups_figure", "tables", "write"]

LEGEND = (
    "Mean ± standard deviation over seeds. “Confound-free”: balanced accuracy on held-out data in which the "
    "metadata say nothing about the label, the honest measure. “Confounded”: on held-out data like those of "
    "the training. “Shuffled”: confound-free, with the metadata of other samples for the networks that take "
    "metadata; the same where they are used for nothing but to be removed. dcor², bias-corrected, is that "
    "with the metadata within the classes, averaged over classes and variables; 0 is right. That of the "
    "logits says what the outputs give away, that of the features what they hold, on new (confound-free) and "
    "on training samples; the probe is linear, its score in the classes of the confound-free data is 0 at "
    "chance and 1 at best. Networks with Metadata Normalization are recalibrated: they have exact "
    "coefficients from the training data. "
    "“Gain”: points on confound-free data above “No normalisation”, seed by seed. “Recovered”: the gain as a "
    "share of the oracle's mean gain, of the same network trained on unconfounded data."
)


def _final(row: Row) -> Row:
    """What the method leaves behind in the end: recalibrated where it can be."""
    final: Row = row.get("recalibrated", row)
    return final


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for name in titles({row["method"] for row in rows}):
        found[name] = [row for row in rows if row["method"] == name]
    return found


def _dependence(row: Row, variable: str, measure: str = "dcor2") -> float:
    return statistics.fmean(row[measure][variable].values())


def _percent(values: Sequence[float]) -> str:
    return mean_with_deviation([100 * value for value in values], 1) if values else "–"


def _group_recalls(rows: Sequence[Row], group: str) -> list[dict[str, float]]:
    """Recall by class in a group, seed by seed; empty where the confound-free data have nobody of it."""
    return [recall for row in rows if (recall := _final(row)["recall"][group])]


def _group_accuracy(rows: Sequence[Row], group: str) -> list[float]:
    return [statistics.fmean(recall.values()) for recall in _group_recalls(rows, group)]


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _dependences(rows: Sequence[Row], measures: Sequence[str], variables: Sequence[str]) -> str:
    """Return the cell of dcor², averaged over variables and classes, under one or two of its names."""
    return " / ".join(
        mean_with_deviation(
            [statistics.fmean(_dependence(row, v, name) for v in variables) for row in rows], 3
        )
        for name in measures
    )


def _probes(rows: Sequence[Row], variables: Sequence[str]) -> str:
    found = [[value for v in variables if (value := row["probe"][v]) is not None] for row in rows]
    means = [statistics.fmean(values) for values in found if values]
    return mean_with_deviation(means, 2) if means else "–"


def _outcomes(members: Sequence[Row]) -> list[str]:
    """Return the cells of what a method reaches, from "confound-free" to "probe"."""
    final = [_final(row) for row in members]
    variables = list(final[0]["dcor2"])
    return [
        _percent([row["bacc"] for row in final]),
        mean_with_deviation([100 * (row["bacc_confounded"] - row["bacc"]) for row in final], 1, signed=True),
        _percent([row["bacc_shuffled"] for row in final if row["bacc_shuffled"] is not None]),
        _dependences(final, ["dcor2_logits"], variables),
        _dependences(final, ["dcor2", "dcor2_train"], variables),
        _probes(final, variables),
    ]


def _gains(members: Sequence[Row], plain: Sequence[Row]) -> list[float]:
    """Return confound-free accuracy above that of the network without a norm, seed by seed."""
    before = {row["seed"]: row["bacc"] for row in plain}
    return [_final(row)["bacc"] - before[row["seed"]] for row in members if row["seed"] in before]


def _gained(gains: Sequence[float], of_oracle: Sequence[float] | None) -> list[str]:
    if not gains:
        return ["–", "–"]
    gain = mean_with_deviation([100 * value for value in gains], 1, signed=True)
    # A difference of few seeds' means may be nothing at all: a share of it says nothing.
    whole = statistics.fmean(of_oracle) if of_oracle else 0.0
    return [gain, mean_with_deviation([100 * value / whole for value in gains], 0) if whole > 0 else "–"]


def _stage(members: Sequence[Row], variables: Sequence[str]) -> list[str]:
    """Return the cells of networks as trained, or recalibrated; dashes where there are none."""
    if not members:
        return ["–"] * (3 + len(variables))
    return [
        _percent([row["bacc"] for row in members]),
        _percent([row["bacc_confounded"] for row in members]),
        *(mean_with_deviation([_dependence(row, v) for row in members], 3) for v in variables),
        _percent([row["gap"] for row in members]),
    ]


def tables(rows: Sequence[Row], setting: Setting) -> list[ReportTable]:
    """Return the tables of all methods: outcomes; each variable; as trained; dcor² by class; by group.

    Parameters
    ----------
    rows : sequence of dict
        As from `mdnorm.experiments.confounded.train`, at least one.
    setting : Setting
    """
    variables = list(rows[0]["dcor2"])
    on_generated = not any(row.get("data") for row in rows)
    limit = (
        f"Best possible on confound-free data: {100 * setting.limit:.1f} %; dcor² 0."
        if setting.limit is not None and on_generated
        else "No analytic limit of accuracy; dcor² 0 without the confounders."
    )
    methods = _by_method(rows)
    gains = {name: _gains(members, methods.get("none", [])) for name, members in methods.items()}
    overview = [
        [
            METHODS[name].title,
            str(len(members)),
            *_outcomes(members),
            *_gained(gains[name], gains.get("oracle")),
        ]
        for name, members in methods.items()
    ]
    headings = [
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
    ]
    by_variable = [
        [
            METHODS[name].title,
            variable,
            _dependences(final, ["dcor2_logits", "dcor2_logits_train"], [variable]),
            _dependences(final, ["dcor2", "dcor2_train"], [variable]),
            _dependences(final, ["dcor2_whitened"], [variable]),
            _probes(final, [variable]),
        ]
        for name, members in methods.items()
        for variable in variables
        if (final := [_final(row) for row in members])
    ]
    stages = [
        [
            METHODS[name].title,
            *_stage(members, variables),
            *_stage([row["recalibrated"] for row in members if "recalibrated" in row], variables),
            f"{statistics.fmean(row['seconds_per_epoch'] for row in members):.1f}",
        ]
        for name, members in methods.items()
    ]
    stage_headings = [
        "Confound-free (%)",
        "Confounded (%)",
        *(f"dcor² {v}" for v in variables),
        "Gap (points)",
    ]
    classes = list(rows[0]["dcor2"][variables[0]])
    by_class = [
        [
            METHODS[name].title,
            *(
                mean_with_deviation([_final(row)["dcor2"][v][c] for row in members], 3)
                for v in variables
                for c in classes
            ),
        ]
        for name, members in methods.items()
    ]
    groups = list(rows[0]["recall"])
    by_group = [
        [
            METHODS[name].title,
            *(_percent(_group_accuracy(members, group)) for group in groups),
            *(
                _percent([recall[classes[-1]] for recall in _group_recalls(members, group)])
                for group in groups
                if len(classes) == 2
            ),
        ]
        for name, members in methods.items()
    ]
    rates = [f"TPR, {group} (%)" for group in groups if len(classes) == 2]
    recalibrated = " Networks with Metadata Normalization are recalibrated."
    return [
        ReportTable(headings, overview, limit, LEGEND),
        ReportTable(
            ["Method", "Variable", "logits, new / training", "features, new / training", "whitened", "Probe"],
            by_variable,
            "dcor² within the classes; 0 is right.",
            "“Whitened”: of features with the same variance in all directions, on new samples."
            + recalibrated,
            "dcor² and probe by variable",
        ),
        ReportTable(
            ["Method", *stage_headings, *(f"recal. {heading}" for heading in stage_headings), "s / epoch"],
            stages,
            "dcor² of the features, within the classes of the confound-free data.",
            "“Gap”: the largest difference in the recall of a class between groups. “Recal.”: with exact "
            "coefficients from the training data.",
            "As trained, and recalibrated",
        ),
        ReportTable(
            ["Method", *(f"{v}, {c}" for v in variables for c in classes)],
            by_class,
            "dcor² within each class; 0 is right.",
            "On the confound-free data." + recalibrated,
            "dcor² of features and metadata by class",
        ),
        ReportTable(
            ["Method", *(f"{group} (%)" for group in groups), *rates],
            by_group,
            "The nearer to each other the groups are, the fairer the network.",
            (f"TPR: share of “{classes[-1]}” that is found. " if len(classes) == 2 else "")
            + "Balanced accuracy on the confound-free data."
            + recalibrated,
            "Accuracy by group",
        ),
    ]


def accuracy_figure(rows: Sequence[Row], setting: Setting) -> Figure:
    """Accuracy with and without confounding, and the dependence left, by method."""
    methods = _by_method(rows)
    figure = Figure(figsize=(7.0, 1.2 + 0.32 * len(methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    series = (
        ("confounded test data", "bacc_confounded", PALETTE[1], MARKERS[1]),
        ("confound-free test data", "bacc", PALETTE[4], MARKERS[0]),
    )
    for label, key, colour, marker in series:
        _draw(
            left,
            [[100 * _final(row)[key] for row in members] for members in methods.values()],
            label,
            colour,
            marker,
        )
    if setting.limit is not None and not any(row.get("data") for row in rows):
        left.axvline(100 * setting.limit, color="0.4", linestyle="--", linewidth=1, zorder=0)
        left.annotate(
            f"limit {100 * setting.limit:.1f} %",
            (100 * setting.limit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color="0.3",
        )
    left.set_yticks(range(len(methods)), [METHODS[name].title for name in methods], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("balanced accuracy (%)", fontsize=8)
    variables = list(rows[0]["dcor2"])
    for index, variable in enumerate(variables):
        _draw(
            right,
            [
                [_dependence(_final(row), variable, "dcor2_logits") for row in members]
                for members in methods.values()
            ],
            variable,
            PALETTE[(3, 6, 5)[index % 3]],
            MARKERS[(0, 2, 3)[index % 3]],
        )
    right.axvline(0, color="0.4", linestyle="--", linewidth=1, zorder=0)
    right.set_xlabel("dcor² of the logits", fontsize=8)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    labels = [
        *left.get_legend_handles_labels()[1],
        *(f"dcor² with {name} within classes" for name in variables),
    ]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw(axis: Axes, values: Sequence[Sequence[float]], label: str, colour: str, marker: str) -> None:
    means, deviations = zip(*map(_mean_and_deviation, values), strict=True)
    axis.errorbar(
        means,
        range(len(means)),
        xerr=deviations,
        label=label,
        color=colour,
        marker=marker,
        markersize=5,
        linestyle="none",
        capsize=2,
        linewidth=1,
    )


def groups_figure(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Accuracy by metadata group on confound-free data, of a few methods."""
    methods = {name: members for name, members in _by_method(rows).items() if name in names}
    groups = list(rows[0]["recall"])
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axis = figure.subplots()
    series = {
        name: {
            position: _mean_and_deviation([100 * value for value in values])
            for position, group in enumerate(groups)
            if (values := _group_accuracy(members, group))
        }
        for name, members in methods.items()
    }
    draw_series(axis, series, {name: METHODS[name].title for name in methods}, groups)
    axis.set_ylabel("balanced accuracy (%)", fontsize=8)
    axis.tick_params(labelsize=8)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _best(rows: Sequence[Row]) -> str | None:
    """The method with Metadata Normalization that is most accurate on confound-free data, if there is one."""
    means = {
        name: statistics.fmean(_final(row)["bacc"] for row in members)
        for name, members in _by_method(rows).items()
        if METHODS[name].layers != "none"
    }
    return max(means, key=lambda name: means[name]) if means else None


def audit_networks(
    out: Path, data: ConfoundedData, before: Path, after: Path, names: tuple[str, str]
) -> Path:
    """Audit two networks on the confound-free data and write the page into ``out/audit``.

    Parameters
    ----------
    out : Path
    data : ConfoundedData
        Names of classes, groups and variables.
    before, after : Path
        Kept features of the two.
    names : pair of str

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    InputError
        There are too few samples for an audit, or nothing varies among them.
    """
    from safetensors.torch import load_file

    from mdnorm.auditing import Settings, audit

    tensors, others = load_file(before), load_file(after)
    metadata: dict[str, Any] = {}
    for variable, columns in data.confounders.items():
        values = tensors["confounders"][:, list(columns)]
        if len(columns) == 1:
            metadata[variable] = values[:, 0].tolist()
        elif bool(((values == 0) | (values == 1)).all()):
            # One-hot: a category again.
            codes = values.argmax(1).tolist()
            known = len(columns) == len(data.groups)
            metadata[variable] = [data.groups[code] if known else str(code) for code in codes]
        else:
            for index, column in enumerate(values.T):
                metadata[f"{variable} {index + 1}"] = column.tolist()
    classes = data.classes
    report = audit(
        tensors["features"],
        metadata,
        [classes[label] for label in tensors["labels"].tolist()],
        after=others["features"],
        predictions=[classes[label] for label in tensors["scores"].argmax(1).tolist()],
        predictions_after=[classes[label] for label in others["scores"].argmax(1).tolist()],
        positive=classes[-1] if len(classes) == 2 else None,
        names=names,
        settings=Settings(num_permutations=100),
    )
    return report.save(out / "audit")


def write(
    out: Path,
    setting: Setting,
    data: Callable[[], ConfoundedData],
    runs: Sequence[ConfoundedRun],
    rows: Sequence[Row],
    *,
    command: str,
) -> Path:
    """Write table.md, figures, report.html and, of the best network and its like without it, an audit.

    Parameters
    ----------
    out : Path
        An existing folder.
    setting : Setting
    data : callable
        Returns the data of the first run.
    runs, rows
        The plan and its rows.
    command : str
        Shown in the report.

    Returns
    -------
    Path
        Of the report.
    """
    from mdnorm.auditing import InputError

    shown_tables = tables(rows, setting)
    write_text_atomically(
        out / "table.md", "\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in shown_tables)
    )
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    best = _best(rows)
    compared = [name for name in ("none", "batchnorm", "groupnorm", "brnet", best) if name is not None]
    samples = data()
    figures = [
        ReportFigure(
            save_figure(setting.examples(samples), folder / "examples.png"),
            "The data",
            "Example samples of each class and group.",
            "Examples from the training data. The network sees these, never the metadata.",
        ),
        ReportFigure(
            save_figure(accuracy_figure(rows, setting), folder / "accuracy.png"),
            "Accuracy and what the outputs hold of the metadata",
            "Balanced accuracy on both test sets and dcor² of the logits; the numbers are in the table.",
            "A network that cheats is good on the confounded data (orange) and poor on the confound-free "
            "ones (blue). Networks with Metadata Normalization are recalibrated.",
        ),
        ReportFigure(
            save_figure(groups_figure(rows, compared), folder / "groups.png"),
            "Accuracy by group",
            "Balanced accuracy by metadata group; the numbers are in the table.",
            "On the confound-free data.",
        ),
    ]
    introduction = list(setting.introduction)
    kept = {run.method: Path(run.features_file) for run in runs if run.features_file}
    # The same network without Metadata Normalization, or what else there is without it.
    wanted = (METHOD_OF_NORM[setting.base_norm], *METHOD_OF_NORM.values())
    plain = next((name for name in wanted if name in kept), None)
    if best is not None and plain is not None and all(kept[name].exists() for name in (plain, best)):
        names = ("the uncorrected network", METHODS[best].title)
        try:
            audit_networks(out, samples, kept[plain], kept[best], names)
        except InputError as error:
            introduction.append(f"There is no audit of what the networks still know: {error}")
        else:
            introduction.append(
                "What the uncorrected network and the best with Metadata Normalization "
                f"({METHODS[best].title}) still know of each metadata variable is in audit/report.html "
                "beside this page."
            )
    first = runs[0]
    settings = common_settings(run.seed for run in runs) | {
        "data": first.data or "generated",
        "training samples": str(len(samples.train)),
        "held-out samples": f"{len(samples.test)} confounded, {len(samples.confound_free)} confound-free",
        "batch size, epochs": f"{first.batch_size}, {first.epochs}",
        "learning rate": listed(run.learning_rate for run in runs),
        "optimiser": "Adam, learning rate falling to 0 by a half cosine",
        "Metadata Normalization and BR-Net build on": f"norm “{setting.base_norm}”",
    }
    return write_report(
        out,
        title=setting.title,
        introduction=introduction,
        tables=shown_tables,
        figures=figures,
        settings=settings | _options(rows),
        command=command,
    )


def _options(rows: Sequence[Row]) -> dict[str, str]:
    """Return what the methods have of their own, by title."""
    names = ("options", "adversary", "weights", "group_dro", "head", "penalty")
    own = {
        METHODS[name].title: {key: members[0][key] for key in names if key in members[0]}
        for name, members in _by_method(rows).items()
    }
    return {title: str(options) for title, options in own.items() if options}
