"""Static figures of an audit, for papers and places without scripts (matplotlib)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mdnorm.auditing.columns import Column
from mdnorm.auditing.plots import CLASS_COLOURS, COLOURS, class_groups, ellipse, overview_plots, padded
from mdnorm.auditing.results import ColumnAudit, FeatureSet, Projection
from mdnorm.extras import requires
from mdnorm.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "oDs^v*"
_WIDTH = 7.0


def all_figures(
    columns: Sequence[ColumnAudit],
    values: Sequence[Column],
    sets: Mapping[str, FeatureSet],
    label: str | None,
    projected: Mapping[str, tuple[str, Projection]],
) -> dict[str, Figure]:
    """Return the figures by the names of their files: the overview, and a projection for each column.

    `values` are the same columns as they were read, `projected` the title and projection of each treatment.
    """
    figures = {}
    first = overview(columns, sets, label)
    if first is not None:
        figures["overview"] = first
    by_name = {column.name: column for column in values}
    for column in columns:
        name = f"projection-{_file_name(column.name)}"
        while name in figures:
            name += "_"
        figures[name] = projections(by_name[column.name], projected)
    return figures


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:40].strip("._") or "column"


def _text(name: str) -> str:
    """Return a name as matplotlib draws it in a legend: what begins with "_" would be left out."""
    text = short(name)
    return f"\u2009{text}" if text.startswith("_") else text


def _legend(where: Axes | Figure, handles: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    legend = where.legend(handles, [_text(name) for name in names], fontsize=8, frameon=False, **options)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)


def overview(
    columns: Sequence[ColumnAudit], sets: Mapping[str, FeatureSet], label: str | None
) -> Figure | None:
    """Dependence with intervals, and the best probe from chance to perfect; None without columns."""
    with requires("audit"):
        from matplotlib.figure import Figure

    plots = overview_plots(columns, sets, label)
    if not plots:
        return None
    names = [_text(column.name) for column in columns if not column.is_label]
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    within = f" given {_text(label)}" if label else ""
    axes[0].set_xlabel(f"dcor²{within}", fontsize=8, parse_math=False)
    axes[1].set_xlabel(f"best probe{within}\n(0: chance, 1: perfect)", fontsize=8, parse_math=False)
    for axis, plot in zip(axes, plots, strict=True):
        _draw(axis, plot.values["series"])
    axes[0].set_yticks(range(len(names)), names[::-1], parse_math=False)
    if len(sets) > 1:
        titles = [part.full_title for part in sets.values()]
        _legend(figure, axes[0].get_lines()[1:], titles, loc="outside upper center", ncols=2)
    return figure


def _draw(axis: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    """Points with intervals, rows from the top: the series of a `mdnorm.auditing.plots.Plot`."""
    axis.axvline(0, color="0.5", linewidth=1, linestyle="--", zorder=0)
    for index, part in enumerate(series):
        values = np.array(part["value"])
        shift = 0.0 if len(series) == 1 else 0.13 - 0.26 * index / (len(series) - 1)
        heights = np.arange(len(values))[::-1] + shift
        colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
        axis.plot(values, heights, marker, color=colour, markersize=5, zorder=3)
        low, high = (
            [value if limit is None else limit for value, limit in zip(values, part[side], strict=True)]
            for side in ("low", "high")
        )
        axis.hlines(heights, low, high, color=colour, linewidth=1.5)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def projections(column: Column, projected: Mapping[str, tuple[str, Projection]]) -> Figure:
    """Two principal components of every set of features, coloured by a column."""
    with requires("audit"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(projected), squeeze=False)[0]
    for axis, (title, projection) in zip(axes, projected.values(), strict=True):
        shown = column.rows(projection.rows)
        inside = shown.present
        points = projection.points
        if shown.kind == "continuous":
            drawn = axis.scatter(
                *points[inside].T, c=shown.values[inside], cmap="viridis", s=8, linewidths=0, alpha=0.85
            )
            if axis is axes[-1]:
                bar = figure.colorbar(drawn, ax=list(axes))
                bar.set_label(_text(column.name), parse_math=False)
                if column.is_date:
                    ticks = np.linspace(shown.values[inside].min(), shown.values[inside].max(), 4)
                    bar.set_ticks(list(ticks), labels=[column.text(tick) for tick in ticks])
        else:
            groups = class_groups(shown)
            handles = []
            for (_, chosen), colour in zip(groups, CLASS_COLOURS, strict=False):
                handles.append(axis.scatter(*points[chosen].T, s=8, linewidths=0, alpha=0.7, color=colour))
                axis.plot(*ellipse(points[chosen])[1:].T, color=colour, linewidth=1)
            if axis is axes[-1]:
                _legend(
                    axis,
                    handles,
                    [name for name, _ in groups],
                    title=_text(column.name),
                    loc="center left",
                    bbox_to_anchor=(1, 0.5),
                )
        if projection.is_shared:
            every = np.concatenate([other.points for _, other in projected.values()])
            for limits, values in ((axis.set_xlim, every[:, 0]), (axis.set_ylim, every[:, 1])):
                limits(*padded(values))
        axis.set_title(_text(title), fontsize=9, parse_math=False)
        axis.set_xlabel(f"1st component ({100 * projection.shares[0]:.1f} % of variance)", fontsize=8)
        axis.set_ylabel(f"2nd component ({100 * projection.shares[1]:.1f} %)", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[["top", "right"]].set_visible(False)
    return figure
