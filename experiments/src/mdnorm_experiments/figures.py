"""Figures of the experiments, in colours that colour-blind readers tell apart; no global matplotlib state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdnorm.plotting import MARKERS, PALETTE
from mdnorm_experiments.results import Row

WIDTH = 7.0
"""Inches; what a page shows."""

Panels = Mapping[str, Mapping[str, str]]
"""Title of a panel → identifier → title of its methods. One panel with all methods needs no title."""
Series = Mapping[str, Mapping[int, tuple[float, float]]]
"""Method → position on the axis → mean and standard deviation over seeds."""

BARS: dict[str, Any] = {"markersize": 5, "capsize": 2, "linewidth": 1}
LINE: dict[str, Any] = {"color": "0.4", "linestyle": "--", "linewidth": 1, "zorder": 0}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def picture_grid(
    lines: Sequence[tuple[str, Sequence[tuple[Any, str]]]], size: tuple[float, float], **options: Any
) -> Figure:
    """Show pictures in lines, each with a name and with (picture, title) side by side.

    A picture is what matplotlib's ``imshow`` takes, with `options`; None leaves its place empty. `size` is
    that of the figure in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lines), max(len(pictures) for _, pictures in lines), squeeze=False)
    for (name, pictures), row in zip(lines, axes, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, (picture, title) in zip(row, pictures, strict=False):
            if picture is not None:
                axis.imshow(picture, **options)
                axis.set_title(title, fontsize=7, pad=3)
        place = {"rotation": 90, "va": "center", "ha": "right", "fontsize": 8}
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, **place)
    return figure


def series_of(
    rows: Sequence[Row], names: Iterable[str], points: Callable[[Row], Iterable[tuple[int, float]]]
) -> Series:
    """Return mean and deviation over the rows of each method, of the (position, value) that each row has."""
    series: dict[str, dict[int, tuple[float, float]]] = {}
    for name in names:
        values: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == name:
                for position, value in points(row):
                    values.setdefault(position, []).append(value)
        series[name] = {position: mean_and_deviation(found) for position, found in sorted(values.items())}
    return series


def series_figure(
    parts: Mapping[str, Series],
    panels: Panels,
    ticks: Sequence[str],
    *,
    labels: tuple[str, str],
    limits: Sequence[tuple[float | Sequence[float], str]] = (),
    linestyle: str = "none",
    spread: float = 0.7,
    height: float = 3.8,
) -> Figure:
    """Draw means with deviations, the methods beside each other at each position.

    `parts` are titles of axes → what they show; each of the `panels`, stacked, has a row with all axes and a
    legend. `ticks` name the positions 0, 1, …; `labels` are those of both axes. `limits` are dashed lines
    (height, or heights by position) named at their right end. `linestyle` connects positions, the methods are
    spread over a share of the room of a position, and `height` is that of a panel in inches.
    """
    figure = Figure(figsize=(WIDTH, 0.4 + height * len(panels)), layout="constrained")
    rows = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for row, (panel, names) in zip(rows, panels.items(), strict=True):
        # A scale for each panel: what correction leaves would be flat on the scale of what it removes.
        axes = row.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axis, (title, series) in zip(axes, parts.items(), strict=True):
            for limit, text in limits:
                _draw_limit(axis, limit, text)
            _draw_series(axis, series, names, len(ticks), linestyle, spread)
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_xlabel(labels[0])
            axis.set_title(title, fontsize=10)
        axes[0].set_ylabel(labels[1])
        handles = axes[0].get_legend_handles_labels()
        style: dict[str, Any] = {"ncols": 3, "frameon": False, "fontsize": 8, "title_fontsize": 10}
        row.legend(*handles, title=panel or None, loc="outside upper center", **style)
    return figure


def _draw_limit(axis: Axes, limit: float | Sequence[float], text: str) -> None:
    if isinstance(limit, Sequence):
        axis.plot(limit, **LINE)
        limit = limit[-1]
    else:
        axis.axhline(limit, **LINE)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axis.annotate(text, (1, limit), xytext=(4, 0), va="center", fontsize=8, color="0.3", **place)


def _draw_series(
    axis: Axes, series: Series, names: Mapping[str, str], count: int, linestyle: str, spread: float
) -> None:
    methods = [name for name in names if series.get(name)]
    for index, method in enumerate(methods):
        # Side by side, or the error bars of methods at the same limit would hide each other.
        shift = (index - (len(methods) - 1) / 2) * spread / len(methods)
        style = list(names).index(method) % len(PALETTE)
        means, deviations = zip(*series[method].values(), strict=True)
        axis.errorbar(
            [position + shift for position in series[method]],
            means,
            yerr=deviations,
            label=names[method],
            color=PALETTE[style],
            marker=MARKERS[style],
            linestyle=linestyle,
            **BARS,
        )
    for boundary in range(1, count):
        axis.axvline(boundary - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axis.set_xlim(-0.5, max(count, 1) - 0.5)
    axis.spines[["top", "right"]].set_visible(False)


def stage_matrices(matrices: Mapping[str, Any], limits: Sequence[float]) -> Figure:
    """Accuracy minus the limit for each stage trained on (rows) and tested on (columns), a panel a method.

    `matrices` are title → (seeds, T, T) accuracies, fractions, whose mean is shown; `limits` (T,) those of
    the true effect alone, by stage tested on.
    """
    columns, lines = min(max(len(matrices), 1), 3), max(-(-len(matrices) // 3), 1)
    # The map is as large for one panel as for many.
    figure = Figure(figsize=(WIDTH * (columns + 0.4) / 3.4, 0.3 + 2.45 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    most, picture = 50.0, None
    stages = [str(stage + 1) for stage in range(len(limits))]
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, matrices.items(), strict=False):
        axis.set_axis_on()
        difference = 100 * (np.mean(values, axis=0) - np.asarray(limits))
        picture = axis.imshow(difference, cmap="PuOr_r", vmin=-most, vmax=most)
        for (trained, tested), value in np.ndenumerate(difference):
            text = f"{round(value):+d}".replace("-", "−") if round(value) else "0"
            weight = "bold" if trained == tested else "normal"
            colour = "white" if abs(value) > 0.7 * most else "black"
            style = {"ha": "center", "va": "center", "fontsize": 7, "fontweight": weight, "color": colour}
            axis.text(tested, trained, text, **style)
        axis.set_xticks(range(len(limits)), stages, fontsize=8)
        axis.set_yticks(range(len(limits)), stages, fontsize=8)
        axis.tick_params(length=0)
        axis.set_title(title.replace(", recalibrated", ",\nrecalibrated"), fontsize=8)
        axis.set_xlabel("tested on stage", fontsize=8)
        if axis in axes[:, 0]:
            axis.set_ylabel("trained up to stage", fontsize=8)
    if picture is not None:
        bar = figure.colorbar(picture, ax=axes, shrink=0.8)
        bar.set_label("accuracy − limit (points)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return figure


def projections(panels: Mapping[str, Mapping[str, Any]], most: int = 400) -> Figure:
    """First two principal components within each group, coloured by the confounder.

    Each of the panels, columns by title, has "features" (N, D), "labels" (N,) 0 or 1, and "confounder" (N,).
    The axes say which share of the features' variance a component has; the first `most` points are drawn.
    """
    from sklearn.decomposition import PCA

    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for index, group in enumerate("AB"):
        points = None
        for axis, (title, kept) in zip(axes[index], panels.items(), strict=True):
            inside = np.asarray(kept["labels"]) == index
            features = np.asarray(kept["features"], float)[inside]
            # The full solver: exact, and the same on every call.
            projection = PCA(2, svd_solver="full").fit(features)
            colours = np.asarray(kept["confounder"])[inside][:most]
            components = projection.transform(features[:most]).T
            points = axis.scatter(*components, c=colours, cmap="viridis", s=10, linewidths=0, alpha=0.85)
            shares = 100 * projection.explained_variance_ratio_
            axis.set_xlabel(f"1st component ({shares[0]:.2f} % of variance)", fontsize=7.5)
            axis.set_ylabel(f"2nd component ({shares[1]:.2f} %)", fontsize=7.5)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[["top", "right"]].set_visible(False)
            if index == 0:
                axis.set_title(title, fontsize=8)
        if points is not None:
            figure.colorbar(points, ax=list(axes[index]), label=f"confounder, group {group}")
    return figure
