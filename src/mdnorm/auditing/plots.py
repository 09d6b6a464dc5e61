"""Interactive figures of the page (plotly). Text and lines get their colours in the page, light or dark."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.auditing.columns import Column
from mdnorm.auditing.findings import number, p_text
from mdnorm.auditing.results import ColumnAudit, Measure, Projection

__all__ = [
    "CLASS_COLOURS",
    "COLOURS",
    "Plot",
    "column_plots",
    "ellipse",
    "gap_plots",
    "overview_plots",
    "padded",
    "points",
    "projection_plots",
]

# At least 3:1 against a white and a nearly black page, and apart for colour-blind readers.
COLOURS = ("#D55E00", "#2E86C1", "#009E73", "#CC79A7", "#B8860B", "#7B61C4")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
_GREY = "#7a828b"
CLASS_COLOURS = (*COLOURS, "#5B8A8A", "#A0522D", "#6B8E23", "#E0529C")
_CLASS_SYMBOLS = (
    *("circle", "x", "triangle-up", "square", "diamond", "cross", "star", "triangle-down", "pentagon"),
    "hexagram",
)
_ROW_HEIGHT = 34
_LONGEST = 48
_INDEPENDENT = "With intervals. Dashed: independent."
_CHANCE = "Cross-validated, with intervals. Dashed: chance."


@dataclass(frozen=True)
class Plot:
    """An interactive figure.

    Attributes
    ----------
    identifier : str
        Of the element that holds it.
    title, description : str
        Heading, and the text for readers who do not see it.
    figure : str
        JSON of data and layout.
    height : int
        In pixels.
    caption : str
        Below the title.
    """

    identifier: str
    title: str
    description: str
    figure: str
    height: int
    caption: str = ""


def overview_plots(
    columns: Sequence[ColumnAudit], titles: Mapping[str, str], label: str | None
) -> list[Plot]:
    """All columns at a glance: the dependence, and the best probe."""
    audited = [column for column in columns if not column.is_label]
    if not audited:
        return []
    where = f" given {_shortened(label)}" if label else ""

    plots = []
    for identifier, title, axis, as_share in (
        ("overview-dependence", f"Dependence{where}", "dcor²", False),
        ("overview-probes", f"Best probe{where}", "share of the way to perfect", True),
    ):
        names = [column.name for column in audited]
        series = {
            key: [
                column.representations[key].shown_probe
                if as_share
                else column.representations[key].shown_dependence
                for column in audited
            ]
            for key in audited[0].representations
        }
        plots.append(
            _measure_plot(
                identifier,
                title,
                names,
                series,
                titles,
                axis,
                caption=_CHANCE if as_share else _INDEPENDENT,
                as_share=as_share,
            )
        )
    return plots


def column_plots(
    column: ColumnAudit, position: int, titles: Mapping[str, str], label: str | None
) -> list[Plot]:
    """The dependence, the probes and the groups of one column."""
    keys = list(column.representations)
    plots = []
    first = column.representations[keys[0]]

    rows = ["all samples"]
    series = {key: [column.representations[key].dependence] for key in keys}
    if all(part.dependence_within is not None for part in column.representations.values()):
        rows.append(f"given {label}")
        for key in keys:
            within = column.representations[key].dependence_within
            assert within is not None
            series[key].append(within)
        classes = [column.representations[key].dependence_by_class for key in keys]
        for name in first.dependence_by_class:
            if all(name in found for found in classes):
                rows.append(f"{label} {name}")
                for key, found in zip(keys, classes, strict=True):
                    series[key].append(found[name])
    plots.append(
        _measure_plot(
            f"dependence-{position}",
            f"Dependence on {column.name}",
            rows,
            series,
            titles,
            "dcor²",
            caption=_INDEPENDENT,
        )
    )

    probe_rows = [f"{_MODEL_NAMES[model]}" for model in first.probes]
    probes = {key: list(column.representations[key].probes.values()) for key in keys}
    if all(part.probes_within for part in column.representations.values()):
        probe_rows += [f"{_MODEL_NAMES[model]}, given {label}" for model in first.probes_within]
        for key in keys:
            probes[key] += column.representations[key].probes_within.values()
    measure = probes[keys[0]][0]
    plots.append(
        _measure_plot(
            f"probes-{position}",
            f"How well {column.name} can be predicted",
            probe_rows,
            probes,
            titles,
            measure.name,
            caption=_CHANCE,
            reference=measure.chance,
        )
    )
    plots += _group_plots(column, position, titles)
    return plots


_MODEL_NAMES = {"linear": "linear", "nonlinear": "non-linear"}


def _measure_plot(
    identifier: str,
    title: str,
    rows: Sequence[str],
    series: Mapping[str, Sequence[Measure]],
    titles: Mapping[str, str],
    axis: str,
    *,
    caption: str = "",
    reference: float | None = 0.0,
    as_share: bool = False,
) -> Plot:
    """Points with intervals, a line for each row and a colour for each set of features."""
    data = []
    spoken = []
    for index, (key, measures) in enumerate(series.items()):
        values = [measure.share if as_share else measure.value for measure in measures]
        shift = 0.0 if len(series) == 1 else 0.18 - 0.36 * index / (len(series) - 1)
        has_interval = [measure.low is not None and measure.high is not None for measure in measures]

        def limit(measure: Measure, side: str) -> float:
            value = measure.low if side == "low" else measure.high
            if value is None:
                return 0.0
            scale = 1 / (1 - measure.chance) if as_share else 1.0
            return float(abs(value - measure.value) * scale)

        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "name": _shortened(titles[key]),
            "x": values,
            # Rows from the top; the two sets of features side by side within a row.
            "y": [len(rows) - 1 - row + shift for row in range(len(rows))],
            "marker": {
                "color": COLOURS[index % len(COLOURS)],
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "size": 11,
            },
            "text": [_hover(row, titles[key], measure) for row, measure in zip(rows, measures, strict=True)],
            "hovertemplate": "%{text}<extra></extra>",
        }
        if any(has_interval):
            trace["error_x"] = {
                "type": "data",
                "symmetric": False,
                "array": [limit(measure, "high") for measure in measures],
                "arrayminus": [limit(measure, "low") for measure in measures],
                "color": COLOURS[index % len(COLOURS)],
                "thickness": 1.5,
                "width": 4,
            }
        data.append(trace)
        spoken += [
            f"{titles[key]}, {row}: {number(value, 3)}" for row, value in zip(rows, values, strict=True)
        ]
    layout = _layout(axis, legend=len(series) > 1)
    layout["yaxis"] |= {
        "tickvals": list(range(len(rows))),
        "ticktext": ["<br>".join(map(_escaped, textwrap.wrap(_cut(row), 24))) for row in reversed(rows)],
        "range": [-0.6, len(rows) - 0.4],
        "fixedrange": True,
    }
    if reference is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": reference,
                "x1": reference,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": _GREY, "width": 1.5, "dash": "dash"},
                "layer": "below",
            }
        ]
    height = 110 + _ROW_HEIGHT * max(2, len(rows)) + (30 if len(series) > 1 else 0)
    return Plot(identifier, title, f"{title}. {'; '.join(spoken)}.", _json(data, layout), height, caption)


def _hover(row: str, title: str, measure: Measure) -> str:
    text = f"<b>{_shortened(row)}</b>, {_shortened(title)}<br>{measure.name} {number(measure.value, 3)}"
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
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _shortened(text: str) -> str:
    """Return the beginning of a text, as text and nothing else."""
    return _escaped(_cut(text))


def _escaped(text: str) -> str:
    """Return text that plotly takes neither for markup nor for a template."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("%{", "%&#123;")


def _layout(axis: str, *, legend: bool) -> dict[str, Any]:
    return {
        "font": {"size": 13, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 10, "r": 16, "t": 34 if legend else 12, "b": 48},
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
        "xaxis": {"title": {"text": axis}, "automargin": True, "zeroline": False},
        "yaxis": {"automargin": True, "zeroline": False},
        "hoverlabel": {"align": "left"},
    }


def _json(data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    from plotly.io import to_json

    return str(to_json({"data": list(data), "layout": dict(layout)}, validate=False))


def gap_plots(columns: Sequence[ColumnAudit], titles: Mapping[str, str]) -> list[Plot]:
    """The gaps in accuracy and odds of all columns at a glance."""
    plots = []
    for identifier, title, names in (
        ("overview-accuracy", "Gap in accuracy between groups", ("accuracy",)),
        ("overview-odds", "Gap in odds between groups", ("equalized_odds", "worst_recall")),
    ):
        series: dict[str, list[Measure]] = {}
        rows: list[str] = []
        for column in columns:
            found = {
                key: gap
                for key, part in column.representations.items()
                if part.group_gaps is not None
                for name in names
                if (gap := part.group_gaps["gaps"].get(name)) is not None and gap["value"] is not None
            }
            if found and (not series or list(found) == list(series)):
                rows.append(column.name)
                for key, gap in found.items():
                    size = column.representations[key].group_gaps or {}
                    measure = Measure("gap", gap["value"], 0.0, size["num_rows"], gap["low"], gap["high"])
                    series.setdefault(key, []).append(measure)
        if rows:
            plots.append(
                _measure_plot(
                    identifier,
                    title,
                    rows,
                    series,
                    titles,
                    "largest sure difference between two groups",
                    caption="With intervals for all groups at once. Dashed: no gap.",
                )
            )
    return plots


_RATES = {
    "accuracy": "Accuracy by group",
    "true_positive_rate": "True positive rate by group",
    "false_positive_rate": "False positive rate by group",
    "calibration_error": "Calibration error by group",
}


def _group_plots(column: ColumnAudit, position: int, titles: Mapping[str, str]) -> list[Plot]:
    plots = []
    for rate, title in _RATES.items():
        series: dict[str, list[Measure]] = {}
        groups: list[str] = []
        for key, representation in column.representations.items():
            if representation.group_gaps is None:
                continue
            found = {
                str(group["group"]): group
                for group in representation.group_gaps["groups"]
                if group["rates"].get(rate, {}).get("value") is not None
            }
            groups = groups or list(found)
            if not found or list(found) != groups:
                continue
            series[key] = [
                Measure(
                    title.removesuffix(" by group").lower(),
                    group["rates"][rate]["value"],
                    0.0,
                    group["num_rows"],
                    group["rates"][rate]["low"],
                    group["rates"][rate]["high"],
                )
                for group in found.values()
            ]
        if series:
            plots.append(
                _measure_plot(
                    f"groups-{rate.replace('_', '-')}-{position}",
                    title,
                    groups,
                    series,
                    titles,
                    "fraction of the group",
                    caption="With intervals.",
                    reference=None,
                )
            )
    return plots


def projection_plots(
    column: Column,
    label: Column | None,
    position: int,
    projections: Mapping[str, Projection],
    titles: Mapping[str, str],
) -> list[Plot]:
    """Two principal components of every set of features, coloured by the column; label classes by symbol."""
    plots = []
    every = np.concatenate([projection.points for projection in projections.values()])
    for place, (key, projection) in enumerate(projections.items()):
        shown = column.rows(projection.rows)
        classes = None if label is None or label.kind != "categorical" else label.rows(projection.rows).values
        if shown.kind == "continuous":
            data = _coloured_by_number(shown, classes, label, place)
        else:
            data = _coloured_by_class(shown, projection.points, place)
        layout = _layout(
            f"1st component ({_share(projection.shares[0])} of variance)", legend=shown.kind != "continuous"
        )
        layout["yaxis"]["title"] = {"text": f"2nd component ({_share(projection.shares[1])})"}
        if projection.is_shared:
            for axis, values in (("xaxis", every[:, 0]), ("yaxis", every[:, 1])):
                layout[axis]["range"] = padded(values)
        title = f"{_cut(titles[key])}, coloured by {_cut(column.name)}"
        description = (
            f"Scatter of {len(projection.points)} samples in the first two principal components of "
            f"{titles[key]}, coloured by {column.name}."
        )
        plots.append(Plot(f"projection-{place}-{position}", title, description, _json(data, layout), 400))
    return plots


def points(projections: Mapping[str, Projection]) -> list[list[list[float]]]:
    """Return the points of every treatment, which figures refer to by "of" and "rows"."""
    return [np.round(projection.points.T, 4).tolist() for projection in projections.values()]


def padded(values: NDArray[np.float64]) -> list[float]:
    """Return the range of an axis."""
    margin = 0.06 * float(np.ptp(values)) or 1.0
    return [float(values.min()) - margin, float(values.max()) + margin]


def ellipse(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the outline (49, 2) of two standard deviations about the mean; of few points, the mean."""
    middle = points.mean(axis=0)
    if len(points) < 5:
        return np.asarray(middle[None])
    eigenvalues, vectors = np.linalg.eigh(np.cov(points.T))
    angles = np.linspace(0, 2 * np.pi, 49)
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    return np.asarray(middle + 2 * circle * np.sqrt(np.maximum(eigenvalues, 0)) @ vectors.T)


def _share(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def _coloured_by_number(
    column: Column, classes: NDArray[Any] | None, label: Column | None, place: int
) -> list[dict[str, Any]]:
    inside = column.present
    symbols: Any = "circle"
    values = column.values[inside]
    texts = [f"{_shortened(column.name)} {column.text(value)}" for value in values]
    bar: dict[str, Any] = {"title": {"text": _shortened(column.name), "side": "right"}, "thickness": 12}
    if column.is_date:
        ticks = np.linspace(values.min(), values.max(), 4)
        bar |= {"tickvals": ticks, "ticktext": [column.text(tick) for tick in ticks]}
    if classes is not None and label is not None:
        names = list(np.unique(classes))
        if len(names) <= len(_CLASS_SYMBOLS):
            symbols = [_CLASS_SYMBOLS[names.index(name)] for name in classes[inside]]
        texts = [
            f"{text}<br>{_shortened(label.name)} {_shortened(str(name))}"
            for text, name in zip(texts, classes[inside], strict=True)
        ]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "of": place,
            "rows": np.flatnonzero(inside).tolist(),
            "text": texts,
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {
                "color": values,
                "colorscale": "Viridis",
                "size": 6,
                "opacity": 0.85,
                "symbol": symbols,
                "line": {"width": 0.5, "color": "rgba(128,128,128,0.6)"},
                "colorbar": bar,
            },
        }
    ]


def _coloured_by_class(column: Column, points: NDArray[np.float64], place: int) -> list[dict[str, Any]]:
    """The points of every class, with an ellipse about their mean."""
    names, counts = np.unique(column.values[column.present], return_counts=True)
    named = list(names[np.argsort(-counts, kind="stable")][: len(CLASS_COLOURS)])
    groups = [(str(name), column.values == name) for name in named]
    others = column.present & ~np.isin(column.values, named)
    if others.any():
        groups.append(("other", others))
    data: list[dict[str, Any]] = []
    for index, (name, inside) in enumerate(groups):
        is_other = index >= len(named)
        colour = _GREY if is_other else CLASS_COLOURS[index]
        text = f"{_shortened(column.name)} {_shortened(name)}"
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _shortened(name),
                "legendgroup": str(index),
                "of": place,
                "rows": np.flatnonzero(inside).tolist(),
                "text": text,
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "color": colour,
                    "symbol": _CLASS_SYMBOLS[index % len(_CLASS_SYMBOLS)],
                    "size": 6,
                    "opacity": 0.6,
                },
            }
        )
        if not is_other:
            outline, middle = ellipse(points[inside]), points[inside].mean(axis=0)
            common = {"type": "scatter", "legendgroup": str(index), "showlegend": False, "hoverinfo": "skip"}
            line = {"color": colour, "width": 2}
            data += [
                {**common, "mode": "lines", "x": outline[:, 0], "y": outline[:, 1], "line": line},
                {
                    **common,
                    "mode": "markers",
                    "x": middle[:1],
                    "y": middle[1:],
                    "marker": {
                        "color": colour,
                        "symbol": _CLASS_SYMBOLS[index % len(_CLASS_SYMBOLS)],
                        "size": 13,
                        "line": {"width": 2, "color": "#ffffff"},
                    },
                },
            ]
    return data
