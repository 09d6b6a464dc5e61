"""Static figures of an audit, for papers and places without scripts (matplotlib)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mdnorm.auditing.columns import Column
from mdnorm.auditing.plots import COLOURS
from mdnorm.auditing.results import ColumnAudit, Projection
from mdnorm.extras import requires

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mdnorm.auditing.report import Report

__all__ = ["all_figures", "overview", "projections"]

_MARKERS = {"before": "o", "after": "D"}
_WIDTH = 7.0


def all_figures(report: Report) -> dict[str, Figure]:
    """Return the figures by the names of their files: the overview, and a projection for each column."""
    figures = {}
    first = overview(report)
    if first is not None:
        figures["overview"] = first
    by_name = {column.name: column for column in report.values}
    for column in report.columns:
        name = f"projection-{_file_name(column.name)}"
        while name in figures:
            name += "_"
        figures[name] = projections(by_name[column.name], report.projections, report.titles)
    return figures


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "column"


def overview(report: Report) -> Figure | None:
    """Dependence with intervals, and the best probe from chance to perfect; None without columns."""
    with requires("audit"):
        from matplotlib.figure import Figure

    columns = [column for column in report.columns if not column.is_label]
    if not columns:
        return None
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.42 * len(columns)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    within = f" within classes of {report.label}" if report.label else ""
    _draw(left, columns, report.titles, probe=False)
    _draw(right, columns, report.titles, probe=True)
    left.set_xlabel(f"dcor²{within}", fontsize=8)
    right.set_xlabel(f"best probe{within}\n(0: chance, 1: perfect)", fontsize=8)
    left.set_yticks(range(len(columns)), [column.name for column in reversed(columns)])
    handles, texts = left.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, texts, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw(axis: Axes, columns: Sequence[ColumnAudit], titles: Mapping[str, str], *, probe: bool) -> None:
    axis.axvline(0, color="0.5", linewidth=1, linestyle="--", zorder=0)
    for index, key in enumerate(columns[0].representations):
        shown = [column.representations[key] for column in columns]
        measures = [each.shown_probe if probe else each.shown_dependence for each in shown]
        count = len(columns)
        shift = 0.0 if len(columns[0].representations) == 1 else (0.13 if index == 0 else -0.13)
        heights = [count - 1 - row + shift for row in range(count)]
        values = [measure.share if probe else measure.value for measure in measures]
        axis.plot(
            values, heights, _MARKERS[key], color=COLOURS[key], markersize=5, label=titles[key], zorder=3
        )
        if not probe:
            axis.hlines(
                heights,
                [measure.low if measure.low is not None else measure.value for measure in measures],
                [measure.high if measure.high is not None else measure.value for measure in measures],
                color=COLOURS[key],
                linewidth=1.5,
            )
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def projections(column: Column, projections: Mapping[str, Projection], titles: Mapping[str, str]) -> Figure:
    """Two principal components of every set of features, coloured by a column."""
    with requires("audit"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(projections), squeeze=False)[0]
    for axis, (key, projection) in zip(axes, projections.items(), strict=True):
        shown = column.rows(projection.rows)
        inside = shown.present
        points = projection.points
        if shown.kind == "continuous":
            drawn = axis.scatter(
                *points[inside].T, c=shown.values[inside], cmap="viridis", s=8, linewidths=0, alpha=0.85
            )
            if axis is axes[-1]:
                bar = figure.colorbar(drawn, ax=list(axes), label=column.name)
                if column.is_date:
                    ticks = np.linspace(shown.values[inside].min(), shown.values[inside].max(), 4)
                    bar.set_ticks(list(ticks), labels=[column.text(tick) for tick in ticks])
        else:
            names, counts = np.unique(shown.values[inside], return_counts=True)
            for name in names[np.argsort(-counts, kind="stable")][:8]:
                chosen = shown.values == name
                axis.scatter(*points[chosen].T, s=8, linewidths=0, alpha=0.85, label=str(name))
            if axis is axes[-1]:
                axis.legend(
                    title=column.name,
                    fontsize=7,
                    title_fontsize=8,
                    loc="center left",
                    bbox_to_anchor=(1, 0.5),
                )
        axis.set_title(titles[key], fontsize=9)
        axis.set_xlabel(f"1st component ({100 * projection.shares[0]:.1f} % of variance)", fontsize=8)
        axis.set_ylabel(f"2nd component ({100 * projection.shares[1]:.1f} %)", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[["top", "right"]].set_visible(False)
    return figure
