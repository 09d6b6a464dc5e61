"""What the figures of the page show, as plain values: the page's own script draws them with plotly."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.auditing.columns import Column
from mdnorm.auditing.findings import comparable, number, p_text
from mdnorm.auditing.results import ColumnAudit, FeatureSet, Measure, Projection
from mdnorm.text import short

# At least 3:1 against a white and a nearly black page, and apart for colour-blind readers.
COLOURS = ("#D55E00", "#2E86C1", "#009E73", "#CC79A7", "#B8860B", "#7B61C4")
CLASS_COLOURS = (*COLOURS, "#5B8A8A", "#A0522D", "#6B8E23", "#E0529C")

_INDEPENDENT = "With intervals. Dashed: independent."
_CHANCE = "Cross-validated, with intervals. Dashed: chance."
_MODEL_NAMES = {"linear": "linear", "nonlinear": "non-linear"}
_RATES = {
    "accuracy": "Accuracy by group",
    "true_positive_rate": "True positive rate by group",
    "false_positive_rate": "False positive rate by group",
    "calibration_error": "Calibration error by group",
}


@dataclass(frozen=True)
class Plot:
    """An interactive figure: the element that holds it, its texts, and what it shows, as JSON takes it."""

    identifier: str
    title: str
    # For readers who do not see it.
    description: str
    # All texts in it are escaped for plotly.
    values: Mapping[str, Any]
    height: int
    caption: str = ""


# -- points with intervals --------------------------------------------------------------------------------

# Of each set of features the rows with what they show.
_Series = dict[str, dict[str, Measure]]


def overview_plots(
    columns: Sequence[ColumnAudit], sets: Mapping[str, FeatureSet], label: str | None
) -> list[Plot]:
    """All columns at a glance: the dependence, and the best probe."""
    audited = [column for column in columns if not column.is_label]
    if not audited:
        return []
    where = f" given {short(label)}" if label else ""
    parts = {key: {column.name: column.representations[key] for column in audited} for key in sets}
    dependence, probes = (
        {key: {name: getattr(part, shown) for name, part in found.items()} for key, found in parts.items()}
        for shown in ("shown_dependence", "shown_probe")
    )
    axis = "share of the way to perfect"
    return [
        _row_plot("overview-dependence", f"Dependence{where}", dependence, sets, "dcor²", _INDEPENDENT),
        _row_plot("overview-probes", f"Best probe{where}", probes, sets, axis, _CHANCE, as_share=True),
    ]


def gap_plots(columns: Sequence[ColumnAudit], sets: Mapping[str, FeatureSet]) -> list[Plot]:
    """The gaps in accuracy and odds of all columns at a glance."""
    plots = []
    for identifier, title, names in (
        ("overview-accuracy", "Gap in accuracy between groups", ("accuracy",)),
        ("overview-odds", "Gap in odds between groups", ("equalized_odds", "worst_recall")),
    ):
        series: _Series = {}
        for column in columns:
            found = {
                key: Measure("gap", gap.value, 0.0, part.group_gaps.num_rows, gap.low, gap.high)
                for key, part in column.representations.items()
                if part.group_gaps is not None
                for name, gap in comparable(part.group_gaps).items()
                if name in names
            }
            if not series or list(found) == list(series):
                for key, measure in found.items():
                    series.setdefault(key, {})[column.name] = measure
        if series:
            caption = "With intervals for all groups at once. Dashed: no gap."
            plots.append(_row_plot(identifier, title, series, sets, "largest sure difference", caption))
    return plots


def column_plots(
    column: ColumnAudit, position: int, sets: Mapping[str, FeatureSet], label: str | None
) -> list[Plot]:
    """The dependence, the probes and the groups of one column."""
    parts = column.representations
    series: _Series = {key: {"all samples": part.dependence} for key, part in parts.items()}
    probes: _Series = {
        key: {_MODEL_NAMES[model]: probe for model, probe in part.probes.items()}
        for key, part in parts.items()
    }
    if all(part.dependence_within is not None for part in parts.values()):
        names = set.intersection(*(set(part.dependence_by_class) for part in parts.values()))
        for key, part in parts.items():
            by_class = {
                f"{label} {name}": one for name, one in part.dependence_by_class.items() if name in names
            }
            series[key] |= {f"given {label}": part.shown_dependence} | by_class
    if all(part.probes_within for part in parts.values()):
        for key, part in parts.items():
            probes[key] |= {
                f"{_MODEL_NAMES[model]}, given {label}": probe for model, probe in part.probes_within.items()
            }
    measure = next(iter(next(iter(probes.values())).values()))
    title, probed = f"Dependence on {column.name}", f"How well {column.name} can be predicted"
    chance = measure.chance
    return [
        _row_plot(f"dependence-{position}", title, series, sets, "dcor²", _INDEPENDENT),
        _row_plot(f"probes-{position}", probed, probes, sets, measure.name, _CHANCE, reference=chance),
        *_group_plots(column, position, sets),
    ]


def _group_plots(column: ColumnAudit, position: int, sets: Mapping[str, FeatureSet]) -> list[Plot]:
    plots = []
    for rate, title in _RATES.items():
        name = title.removesuffix(" by group").lower()
        series: _Series = {}
        caption = "With intervals."
        for key, part in column.representations.items():
            groups = [] if part.group_gaps is None else part.group_gaps.groups
            found = {
                f"{group.group} ({group.num_rows} rows)" if group.is_small else str(group.group): Measure(
                    name, shown.value, 0.0, group.num_rows, shown.low, shown.high
                )
                for group in groups
                if (shown := group.rates.get(rate)) is not None and shown.value is not None
            }
            if found and (not series or list(found) == list(next(iter(series.values())))):
                series[key] = found
            if any(group.is_small for group in groups):
                caption = "With intervals. Groups with a number of rows are too small to be compared."
        if series:
            identifier, axis = f"groups-{rate.replace('_', '-')}-{position}", "fraction of the group"
            plots.append(_row_plot(identifier, title, series, sets, axis, caption, reference=None))
    return plots


def _row_plot(
    identifier: str,
    title: str,
    series: _Series,
    sets: Mapping[str, FeatureSet],
    axis: str,
    caption: str,
    *,
    reference: float | None = 0.0,
    as_share: bool = False,
) -> Plot:
    """Points with intervals: a line for each row, and a colour for each set of features."""

    def shown(measure: Measure, value: float | None) -> float | None:
        if value is None:
            return None
        return round(measure.as_share(value) if as_share else value, 5)

    places = list(sets)
    data = [
        {
            "set": places.index(key),
            "value": [shown(measure, measure.value) for measure in found.values()],
            "low": [shown(measure, measure.low) for measure in found.values()],
            "high": [shown(measure, measure.high) for measure in found.values()],
            "text": [_hover(row, sets[key].full_title, measure) for row, measure in found.items()],
        }
        for key, found in series.items()
    ]
    spoken = "; ".join(
        f"{sets[key].full_title}, {row}: {number(measure.share if as_share else measure.value, 3)}"
        for key, found in series.items()
        for row, measure in found.items()
    )
    rows = list(next(iter(series.values())))
    values = {
        "rows": ["<br>".join(map(_escaped, textwrap.wrap(short(row, 48), 24))) for row in rows],
        "series": data,
        "axis": axis,
        "reference": reference,
    }
    height = 80 + max(34, 8 + 13 * len(series)) * max(2, len(rows))
    return Plot(identifier, title, f"{title}. {spoken}.", values, height, caption)


def _hover(row: str, title: str, measure: Measure) -> str:
    text = f"<b>{_cut(row)}</b>, {_cut(title)}<br>{measure.name} {number(measure.value, 3)}"
    if measure.low is not None and measure.high is not None:
        text += f" ({number(measure.low, 3)} to {number(measure.high, 3)})"
    if measure.chance:
        text += f"<br>chance {number(measure.chance, 3)}"
    if measure.explained_by_label is not None:
        text += f"<br>the label alone: {number(measure.explained_by_label, 3)}"
    if measure.p_value is not None:
        text += f"<br>{p_text(measure.p_value)}"
    return f"{text}<br>{measure.num_rows} rows"


def _cut(text: str) -> str:
    """Return the beginning of a text, as text and nothing else."""
    return _escaped(short(text, 48))


def _escaped(text: str) -> str:
    """Return text that plotly takes neither for markup nor for a template."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")


# -- principal components ---------------------------------------------------------------------------------


def projection_plots(
    column: ColumnAudit, position: int, projections: Mapping[str, Projection], titles: Mapping[str, str]
) -> list[Plot]:
    """Two principal components of every treatment, coloured by the column; label classes by symbol."""
    return [
        Plot(
            f"projection-{place}-{position}",
            f"{short(titles[key], 48)}, coloured by {short(column.name, 48)}",
            f"Scatter of {len(projection.points)} samples in the first two principal components of "
            f"{titles[key]}, coloured by {column.name}.",
            {"treatment": place, "column": position},
            400,
        )
        for place, (key, projection) in enumerate(projections.items())
    ]


def shared_values(projections: Mapping[str, Projection], label: Column | None) -> dict[str, Any]:
    """Return what all scatters share: the points of every treatment, and the classes of the label."""
    every = np.concatenate([projection.points for projection in projections.values()])
    treatments = []
    for projection in projections.values():
        x, y = np.round(projection.points, 3).T.tolist()
        first, second = map(_percent, projection.shares)
        axes = [f"1st component ({first} of variance)", f"2nd component ({second})"]
        ranges = [padded(axis) for axis in every.T] if projection.is_shared else None
        treatments.append({"x": x, "y": y, "axes": axes, "ranges": ranges})
    shown = None
    if label is not None and label.kind == "categorical":
        of_points = label.values[next(iter(projections.values())).rows]
        names, codes = np.unique(of_points, return_inverse=True)
        shown = {"name": _cut(label.name), "names": list(map(_cut, names)), "codes": codes.tolist()}
    return {"treatments": treatments, "label": shown}


def point_values(column: Column, projections: Mapping[str, Projection]) -> dict[str, Any]:
    """Return what a column says of the points: numbers, or classes with an ellipse in every treatment."""
    shown = column.rows(next(iter(projections.values())).rows)
    name = _cut(column.name)
    if shown.kind == "continuous":
        numbers = [
            value if there else None
            for value, there in zip(shown.values.tolist(), shown.present, strict=True)
        ]
        if not column.is_date:
            rounded = [None if part is None else float(f"{part:.4g}") for part in numbers]
            return {"name": name, "numbers": rounded}
        there = shown.values[shown.present]
        ticks = np.linspace(there.min(), there.max(), 4).tolist()
        texts = ["" if value is None else shown.text(value) for value in numbers]
        of_ticks = [ticks, [shown.text(tick) for tick in ticks]]
        return {"name": name, "numbers": numbers, "texts": texts, "ticks": of_ticks}
    groups = class_groups(shown)
    codes = np.full(len(shown.values), -1)
    for code, (_, inside) in enumerate(groups):
        codes[inside] = code
    others = shown.present & (codes < 0)
    codes[others] = len(groups)
    outlines = [
        [np.round(ellipse(projection.points[inside]), 3).T.tolist() for _, inside in groups]
        for projection in projections.values()
    ]
    names = [_cut(text) for text, _ in groups] + ["other"] * bool(others.any())
    return {"name": name, "names": names, "codes": codes.tolist(), "outlines": outlines}


def class_groups(column: Column) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return the classes that have a colour of their own, the largest first, and their rows."""
    names, counts = np.unique(column.values[column.present], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")][: len(CLASS_COLOURS)]
    return [(str(name), column.present & (column.values == name)) for name in largest]


def padded(values: NDArray[np.float64]) -> list[float]:
    """Return the range of an axis."""
    margin = 0.06 * float(np.ptp(values)) or 1.0
    return [float(values.min()) - margin, float(values.max()) + margin]


def ellipse(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean, then (unless there are few points) the outline of two standard deviations about it."""
    middle = points.mean(axis=0)
    if len(points) < 5:
        return np.asarray(middle[None])
    eigenvalues, vectors = np.linalg.eigh(np.cov(points.T))
    angles = np.linspace(0, 2 * np.pi, 37)
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    outline = middle + 2 * circle * np.sqrt(np.maximum(eigenvalues, 0)) @ vectors.T
    return np.concatenate([middle[None], outline])


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"
