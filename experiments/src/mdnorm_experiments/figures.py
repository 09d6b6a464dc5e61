"""Figures of the experiments, in colours that colour-blind readers tell apart; no global matplotlib state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mdnorm.plotting import MARKERS, PALETTE
from mdnorm_experiments.data.synthetic import (
    ACCURACY_WITH_CONFOUNDER,
    ACCURACY_WITHOUT_CONFOUNDER,
    SyntheticData,
)
from mdnorm_experiments.report import has_limits, summarise
from mdnorm_experiments.results import Row

_WIDTH = 7.0
_EFFECT, _CONFOUNDER = "#56B4E9", "#E69F00"


def example_images(data: SyntheticData, count: int = 4, titles: Sequence[str] = ()) -> Figure:
    """Show `count` images a group, the quadrants of effect and confounder outlined.

    Parameters
    ----------
    data : SyntheticData
    count : int
    titles : sequence of str
        Of the columns, if they have any.
    """
    figure = Figure(figsize=(_WIDTH, 4.1), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    picture = None
    for index, group in enumerate("AB"):
        rows = (data.labels == index).nonzero()[:count, 0].tolist()
        for column, axis in enumerate(axes[index]):
            axis.set_axis_off()
            if column >= len(rows):
                continue
            row = rows[column]
            picture = axis.imshow(data.images[row, 0].numpy(), cmap="gray", vmin=0, vmax=6)
            for x, y, colour in ((0, 0, _EFFECT), (16, 16, _EFFECT), (0, 16, _CONFOUNDER)):
                axis.add_patch(_square(x, y, colour))
            separator = ",\n" if titles else ", "
            text = f"effect {data.effect[row]:.1f}{separator}confounder {data.confounder[row]:.1f}"
            if titles and index == 0:
                text = f"{titles[column]}\n\n{text}"
            axis.set_title(text, fontsize=7, pad=3)
        axes[index, 0].text(
            -0.08,
            0.5,
            f"Group {group}",
            rotation=90,
            va="center",
            ha="right",
            transform=axes[index, 0].transAxes,
        )
    if picture is not None:
        figure.colorbar(picture, ax=axes, label="pixel value", shrink=0.8)
    figure.supxlabel(
        "outlined: true effect (blue, on the diagonal), confounder (orange, lower left)", fontsize=8
    )
    return figure


def _square(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.2, y + 0.2), 14.6, 14.6, fill=False, edgecolor=colour, linewidth=1.5)


Panels = Mapping[str, Mapping[str, str]]
"""Title of a panel → identifier → title of its methods. One panel with all methods needs no title."""


def accuracy_by_batch_size(rows: Sequence[Row], panels: Panels) -> Figure:
    """Balanced accuracy, mean ± standard deviation over seeds, with the analytic limits; panels stacked."""
    figure = Figure(figsize=(_WIDTH, 0.4 + 3.8 * len(panels)), layout="constrained")
    for part, (title, names) in zip(_stacked(figure, panels), panels.items(), strict=True):
        axis = part.subplots()
        if has_limits(rows):
            _draw_limits(axis)
        _draw_cells(axis, rows, names, lambda cell: (100 * cell["bacc"], 100 * (cell["bacc_sd"] or 0)))
        axis.set_xlabel("batch size")
        axis.set_ylabel("balanced accuracy on held-out data (%)")
        _legend(part, axis, title)
    return figure


def _stacked(figure: Figure, panels: Panels) -> list[Any]:
    """One part a panel, so that each has a legend of its own."""
    return list(figure.subfigures(len(panels), 1, squeeze=False)[:, 0])


def _draw_limits(axis: Axes) -> None:
    for limit, text in (
        (ACCURACY_WITH_CONFOUNDER, "with the\nconfounder"),
        (ACCURACY_WITHOUT_CONFOUNDER, "true effect\nonly"),
    ):
        axis.axhline(100 * limit, color="0.4", linestyle="--", linewidth=1, zorder=0)
        _name_limit(axis, 100 * limit, f"{100 * limit:.1f} %\n{text}")


def _name_limit(axis: Axes, height: float, text: str) -> None:
    """Write `text` at the right of the axis, at the height where a limit ends."""
    axis.annotate(
        text,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color="0.3",
    )


def dependence_by_group(rows: Sequence[Row], panels: Panels) -> Figure:
    """Distance correlation of features and confounder by group, mean ± standard deviation; panels stacked."""
    figure = Figure(figsize=(_WIDTH, 0.4 + 3.6 * len(panels)), layout="constrained")
    groups = sorted({group for row in rows for group in row["dcor2"]})
    for part, (title, names) in zip(_stacked(figure, panels), panels.items(), strict=True):
        # A scale for each panel: what correction leaves would be a flat line on the scale of what it removes.
        axes = part.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axis, group in zip(axes, groups, strict=True):
            axis.axhline(0, color="0.4", linestyle="--", linewidth=1, zorder=0)

            def value(cell: Row, group: str = group) -> tuple[float, float]:
                return cell["dcor2"][group], cell["dcor2_sd"][group] or 0

            _draw_cells(axis, rows, names, value)
            axis.set_xlabel("batch size")
            axis.set_title(f"Group {group}", fontsize=10)
        axes[0].set_ylabel("dcor² (features, confounder)")
        _legend(part, axes[0], title)
    return figure


def _draw_cells(axis: Axes, rows: Sequence[Row], names: Mapping[str, str], value: Any) -> None:
    cells = summarise(rows)
    sizes = sorted({cell["batch_size"] for cell in cells})
    series = {
        method: {sizes.index(cell["batch_size"]): value(cell) for cell in cells if cell["method"] == method}
        for method in names
    }
    draw_series(axis, series, names, [str(size) for size in sizes])


def draw_series(
    axis: Axes,
    series: Mapping[str, Mapping[int, tuple[float, float]]],
    names: Mapping[str, str],
    ticks: Sequence[str],
    *,
    linestyle: str = "none",
    width: float = 0.7,
) -> None:
    """Draw means with deviations, the methods beside each other at each position.

    Parameters
    ----------
    axis : Axes
    series : mapping
        Method → position → mean and deviation; methods without positions are left out.
    names : mapping
        Method to title; their order is that of the colours.
    ticks : sequence of str
        Of the positions 0, 1, ….
    linestyle : str
        From position to position.
    width : float
        Share of the room of a position over which the methods are spread.
    """
    methods = [name for name in names if series[name]]
    for index, method in enumerate(methods):
        # Side by side, or the error bars of methods at the same limit would hide each other.
        shift = (index - (len(methods) - 1) / 2) * width / max(len(methods), 1)
        x = [position + shift for position in series[method]]
        means, deviations = zip(*series[method].values(), strict=True)
        style = list(names).index(method) % len(PALETTE)
        axis.errorbar(
            x,
            means,
            yerr=deviations,
            label=names[method],
            color=PALETTE[style],
            marker=MARKERS[style],
            markersize=5,
            linestyle=linestyle,
            capsize=2,
            linewidth=1,
        )
    for boundary in range(1, len(ticks)):
        axis.axvline(boundary - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axis.set_xlim(-0.5, max(len(ticks), 1) - 0.5)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.spines[["top", "right"]].set_visible(False)


def accuracy_by_stage(
    rows: Sequence[Row], panels: Panels, lower: Sequence[float], upper: Sequence[float]
) -> Figure:
    """Accuracy on each stage's own test data, mean ± standard deviation over seeds; panels stacked.

    Parameters
    ----------
    rows : sequence of dict
        With "method" and "bacc_matrix", see `mdnorm_experiments.continual.measures`.
    panels : mapping
    lower, upper : sequences of float
        Limits by stage, from the true effect alone and with the confounder, fractions.
    """
    figure = Figure(figsize=(_WIDTH, 0.4 + 3.8 * len(panels)), layout="constrained")
    for part, (title, names) in zip(_stacked(figure, panels), panels.items(), strict=True):
        axis = part.subplots()
        for limits, text in ((upper, "with the\nconfounder"), (lower, "true effect\nonly")):
            percent = [100 * limit for limit in limits]
            axis.plot(percent, color="0.4", linestyle="--", linewidth=1, zorder=0)
            _name_limit(axis, percent[-1], text)
        series = _own_stage(rows, names, lambda row: 100 * np.asarray(row["bacc_matrix"]))
        draw_series(axis, series, names, _stages(len(lower)), linestyle="-", width=0.3)
        axis.set_xlabel("stage")
        axis.set_ylabel("balanced accuracy on held-out data (%)")
        _legend(part, axis, title)
    return figure


def dependence_by_stage(rows: Sequence[Row], panels: Panels) -> Figure:
    """Distance correlation by group on each stage's own test data, mean ± standard deviation over seeds."""
    figure = Figure(figsize=(_WIDTH, 0.4 + 3.6 * len(panels)), layout="constrained")
    groups = sorted({group for row in rows for group in row["dcor2_matrix"]})
    for part, (title, names) in zip(_stacked(figure, panels), panels.items(), strict=True):
        axes = part.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axis, group in zip(axes, groups, strict=True):
            axis.axhline(0, color="0.4", linestyle="--", linewidth=1, zorder=0)

            def matrix(row: Row, group: str = group) -> NDArray[Any]:
                return np.asarray(row["dcor2_matrix"][group])

            series = _own_stage(rows, names, matrix)
            ticks = _stages(max(map(len, series.values()), default=0))
            draw_series(axis, series, names, ticks, linestyle="-", width=0.3)
            axis.set_xlabel("stage")
            axis.set_title(f"Group {group}", fontsize=10)
        axes[0].set_ylabel("dcor² (features, confounder)")
        _legend(part, axes[0], title)
    return figure


def _stages(count: int) -> list[str]:
    return [str(stage + 1) for stage in range(count)]


def _own_stage(
    rows: Sequence[Row], names: Mapping[str, str], matrix: Callable[[Row], NDArray[Any]]
) -> dict[str, dict[int, tuple[float, float]]]:
    """Mean and standard deviation of the diagonals, by method and stage."""
    series: dict[str, dict[int, tuple[float, float]]] = {}
    for method in names:
        diagonals = [np.diagonal(matrix(row)) for row in rows if row["method"] == method]
        if not diagonals:
            series[method] = {}
            continue
        means = np.mean(diagonals, axis=0)
        deviations = np.std(diagonals, axis=0, ddof=1) if len(diagonals) > 1 else np.zeros_like(means)
        series[method] = dict(enumerate(zip(means.tolist(), deviations.tolist(), strict=True)))
    return series


def stage_matrices(
    matrices: Mapping[str, Sequence[Sequence[Sequence[float]]]], limits: Sequence[float], columns: int = 3
) -> Figure:
    """Accuracy minus the limit for each stage trained on (rows) and tested on (columns), a panel a method.

    Parameters
    ----------
    matrices : mapping
        Title → (seeds, T, T) accuracies, fractions; the mean over seeds is shown.
    limits : (T,) sequence of float
        Of the true effect alone, by stage tested on.
    columns : int
        Panels side by side.
    """
    columns = min(columns, max(len(matrices), 1))
    lines = max(-(-len(matrices) // columns), 1)
    # The map is as large for one panel as for many.
    figure = Figure(figsize=(_WIDTH * (columns + 0.4) / 3.4, 0.3 + 2.45 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    most = 50.0
    ticks = range(len(limits))
    picture = None
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, matrices.items(), strict=False):
        axis.set_axis_on()
        difference = 100 * (np.mean(values, axis=0) - np.asarray(limits))
        picture = axis.imshow(difference, cmap="PuOr_r", vmin=-most, vmax=most)
        for trained, tested in np.ndindex(difference.shape):
            value = difference[trained, tested]
            axis.text(
                tested,
                trained,
                f"{round(value) + 0:+d}".replace("-", "−") if round(value) else "0",
                ha="center",
                va="center",
                fontsize=7,
                fontweight="bold" if trained == tested else "normal",
                color="white" if abs(value) > 0.7 * most else "black",
            )
        axis.set_xticks(ticks, _stages(len(limits)), fontsize=8)
        axis.set_yticks(ticks, _stages(len(limits)), fontsize=8)
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


def _legend(part: Any, axis: Axes, title: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    part.legend(
        handles,
        labels,
        title=title or None,
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=8,
        title_fontsize=10,
    )


@dataclass(frozen=True)
class Projection:
    """What a panel of `projections` shows.

    Attributes
    ----------
    title : str
    features : (N, D) array
    labels : (N,) array
        0 in group A, 1 in group B.
    confounder : (N,) array
    """

    title: str
    features: NDArray[Any]
    labels: NDArray[Any]
    confounder: NDArray[Any]


def projections(panels: Sequence[Projection], most: int = 400) -> Figure:
    """First two principal components within each group, coloured by the confounder, a column for each panel.

    Within a group the label is constant, so what colour shows there is the confounder's own effect. The axes
    say which share of the features' variance a component has, since each fills its axis.

    Parameters
    ----------
    panels : sequence of Projection
    most : int
        Points drawn a group: the first ones.
    """
    from sklearn.decomposition import PCA

    figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for index, group in enumerate("AB"):
        points = None
        for axis, panel in zip(axes[index], panels, strict=True):
            rows = np.flatnonzero(panel.labels == index)
            # The full solver: exact, and the same on every call.
            projection = PCA(2, svd_solver="full").fit(np.asarray(panel.features[rows], float))
            components = projection.transform(np.asarray(panel.features[rows[:most]], float))
            points = axis.scatter(
                *components.T, c=panel.confounder[rows[:most]], cmap="viridis", s=10, linewidths=0, alpha=0.85
            )
            shares = 100 * projection.explained_variance_ratio_
            axis.set_xlabel(f"1st component ({shares[0]:.2f} % of variance)", fontsize=7.5)
            axis.set_ylabel(f"2nd component ({shares[1]:.2f} %)", fontsize=7.5)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[["top", "right"]].set_visible(False)
            if index == 0:
                axis.set_title(panel.title, fontsize=8)
        if points is not None:
            figure.colorbar(points, ax=list(axes[index]), label=f"confounder, group {group}")
    return figure
