"""Draw what confounding is, and the results on synthetic images: python docs/site/pictures.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from mdnorm import metadata_norm
from mdnorm.plotting import PALETTE
from mdnorm_experiments.methods import panels, titles
from mdnorm_experiments.synthetic import accuracy_figure, batch_axis, dependence_figure

FIGURES = Path(__file__).parents[1] / "figures"
ROWS = Path(__file__).parents[1] / "results" / "synthetic.json"
BLUE, ORANGE, GREY = PALETTE[4], PALETTE[1], "#555555"


def _node(axis: Any, place: tuple[float, float], text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
    axis.text(*place, text, ha="center", va="center", fontsize=9, bbox=box, zorder=3)


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    options = {"arrowstyle": "-|>", "mutation_scale": 12, "linewidth": 1.4, "color": GREY}
    options |= {"shrinkA": 20, "shrinkB": 20}
    axis.add_patch(FancyArrowPatch(start, end, **(options | style)))


def causes() -> Figure:
    """Return confounder, mediator and collider as diagrams."""
    figure = Figure(figsize=(8.6, 2.6), layout="constrained")
    left, right, top = (0.15, 0.25), (0.85, 0.25), (0.5, 0.85)
    for axis, title in zip(
        figure.subplots(1, 3),
        ("Confounder: remove it", "Mediator: leave it", "Collider: leave it"),
        strict=True,
    ):
        axis.set(xlim=(-0.1, 1.1), ylim=(0, 1.05), title=title)
        axis.title.set_fontsize(10)
        axis.set_axis_off()
        if title.startswith("Confounder"):
            _node(axis, left, "label", BLUE)
            _node(axis, right, "features", GREY)
            _node(axis, top, "metadata", ORANGE)
            _arrow(axis, left, right, shrinkB=32)
            _arrow(axis, top, right, color=PALETTE[3])
            _arrow(axis, left, top, arrowstyle="<|-|>", linestyle=(0, (3, 2)))
        elif title.startswith("Mediator"):
            _node(axis, left, "label", BLUE)
            _node(axis, top, "metadata", ORANGE)
            _node(axis, right, "features", GREY)
            _arrow(axis, left, top, color=BLUE)
            _arrow(axis, top, right, color=BLUE)
        else:
            _node(axis, left, "label", BLUE)
            _node(axis, (0.85, 0.85), "hidden cause", GREY)
            _node(axis, right, "features", GREY)
            _node(axis, (0.15, 0.85), "metadata", ORANGE)
            _arrow(axis, left, (0.15, 0.85))
            _arrow(axis, (0.85, 0.85), (0.15, 0.85), shrinkA=34, shrinkB=28)
            _arrow(axis, (0.85, 0.85), right)
    return figure


def confounding() -> Figure:
    """Return a feature against age, as it is and corrected without and with the labels."""
    generator = torch.Generator().manual_seed(3)
    ill = torch.arange(240) % 2
    age = 58 + 9 * ill + 7 * torch.randn(240, generator=generator)
    feature = ill + 0.08 * (age - 62) + 0.5 * torch.randn(240, generator=generator)
    panels = (
        ("As it is", feature),
        ("Corrected, labels not given", metadata_norm(feature[:, None], age)[:, 0]),
        ("Corrected, labels protected", metadata_norm(feature[:, None], age, ill)[:, 0]),
    )
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, values) in zip(axes, panels, strict=True):
        gap = float(values[ill == 1].mean() - values[ill == 0].mean())
        for label, name, colour, marker in ((0, "healthy", BLUE, "o"), (1, "ill", ORANGE, "s")):
            inside = ill == label
            axis.scatter(
                age[inside], values[inside], s=9, color=colour, marker=marker, alpha=0.75, label=name
            )
            slope = torch.stack([age[inside], torch.ones(int(inside.sum()))], 1)
            line = torch.linalg.lstsq(slope, values[inside, None]).solution[:, 0]
            ends = torch.tensor([float(age[inside].min()), float(age[inside].max())])
            axis.plot(ends, line[0] * ends + line[1], color=colour, linewidth=2)
        axis.set_title(f"{title}\nclasses differ by {gap:.1f}", fontsize=9)
        axis.set_xlabel("age (years)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("feature (standard units)", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left", handletextpad=0.1)
    return figure


def results() -> dict[str, Figure]:
    """Return the stored results by batch size: of a few methods for the first page, and of all of them."""
    rows = [
        r for r in json.loads(ROWS.read_text(encoding="utf-8")) if r["batch_size"] in (1, 4, 20, 200, 2000)
    ]
    few = ("none", "batchnorm", "groupnorm", "mdn-last-running", "mdn-every-running")
    axis, names = batch_axis(rows), titles({row["method"] for row in rows})
    return {
        "overview": accuracy_figure(rows, panels({name: names[name] for name in few}), axis),
        "accuracy": accuracy_figure(rows, panels(names), axis),
        "dependence": dependence_figure(rows, panels(names), axis),
    }


def main() -> None:
    mpl.rcParams["font.family"] = "DejaVu Sans"
    figures = {"causes": causes(), "confounding": confounding(), **results()}
    for name, figure in figures.items():
        figure.savefig(FIGURES / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
