"""Setting 1 of the paper: two groups of synthetic images with a known confounder (Lu et al., section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mdnorm.design import polynomial
from mdnorm.files import write_text_atomically
from mdnorm.metrics import distance_correlation_sqr
from mdnorm_experiments import figures
from mdnorm_experiments.data import synthetic as drawn
from mdnorm_experiments.data.confounded import ConfoundedData, Samples
from mdnorm_experiments.methods import METHODS, panels, titles
from mdnorm_experiments.networks import BackboneNetwork, ConvolutionalBackbone
from mdnorm_experiments.report import ReportFigure, ReportTable, by_method, mean_with_deviation
from mdnorm_experiments.results import Row
from mdnorm_experiments.settings import Run, Setting
from mdnorm_experiments.training import outputs, predictions, save_features

GROUPS = ("A", "B")
MARGIN = 0.015
"""Accuracy this far from the limit of the true effect is not chance."""
HEADINGS = (
    "Method",
    "Batch size",
    "Seeds",
    "Accuracy (%)",
    "Verdict",
    "dcor² A",
    "dcor² B",
    "Recalibrated (%)",
    "dcor² A / B",
    "s / epoch",
)
LEGEND = (
    "Mean ± standard deviation over seeds, on held-out data. dcor² is bias-corrected, so it can be slightly "
    "negative. “Confounded”: more than 1.5 points above what the true effect allows. “Recalibrated”: the "
    "same networks with exact coefficients from the training data, and their dcor²."
)
LIMITS = (
    f"Analytic limits: {100 * drawn.ACCURACY_WITHOUT_CONFOUNDER:.1f} % from the true effect alone, "
    f"{100 * drawn.ACCURACY_WITH_CONFOUNDER:.1f} % with the confounder; dcor² 0 without it."
)
NO_LIMITS = "No simple analytic limit of accuracy; dcor² 0 without the confounder."
# Epochs and learning rate by batch size, tuned for the network without normalisation to reach its plateau.
_SCHEDULES = {1: (3, 5e-5), 4: (5, 1e-4), 20: (10, 1e-4), 200: (15, 2e-4), 2000: (30, 5e-4)}
_IMAGES = (
    "Each image shows blobs whose brightness is the true effect (on the diagonal) and one whose brightness "
    "is a confounder (lower left). Both differ between the groups A and B and overlap on a third of their "
    "range."
)
_DEPENDENCE = (
    "dcor², the squared distance correlation between the network's features and the confounder within a "
    "group, shows how much of the confounder the features still hold."
)
_HONEST = (
    "A classifier that uses the true effect alone is right in 83.3 % of all cases; with the confounder it "
    "reaches 94.4 %. Accuracy above 83.3 % is therefore not better but confounded."
)
_VARIANT_TEXTS = {
    "plain": (_IMAGES, _HONEST),
    "sites": (
        _IMAGES,
        _HONEST,
        "In this variant the confounder is the sum of the offsets of 16 sites, a curve of age and an effect "
        "of sex; with columns that explain nothing the layer gets 50 metadata columns.",
    ),
    "quadratic": (
        _IMAGES,
        _HONEST,
        "In this variant the confounder's brightness is a quadratic function of the metadata column, and "
        "dcor² is measured against that column.",
    ),
    "variance": (
        "Each image shows blobs whose brightness is the true effect plus noise. The confounder is a metadata "
        "column, different in the groups A and B, that says how much noise, as a scanner might. There is no "
        "simple limit of accuracy.",
    ),
}


def metadata_columns(data: drawn.SyntheticData, variant: str, degree: int) -> Tensor:
    """Return the metadata columns of a data set, (2N, K): a polynomial of that degree of the confounder.

    The variant "sites" has 50 columns with a degree above 1 (16 sites, sex, 6 of a spline of age, 27 without
    effect), 45 with age as a straight line.
    """
    if variant == "sites":
        sites = one_hot(data.site, drawn.NUM_SITES)
        age = (data.age - 50).unsqueeze(1) / 30
        if degree > 1:
            # A cubic spline with knots at fixed ages, so that held-out data get the same columns.
            pieces = [(age - knot).relu() ** 3 for knot in (-2 / 3, 0.0, 2 / 3)]
            age = torch.cat([age, age**2, age**3, *pieces], 1)
        return torch.cat([sites, data.sex.unsqueeze(1), age, data.nuisance], 1)
    low, high = {"plain": (1, 6), "quadratic": (-1, 1), "variance": (0, 1)}[variant]
    return polynomial(data.confounder, degree, low=low, high=high)


def samples_of(data: drawn.SyntheticData, metadata: Tensor) -> Samples:
    """Return the images as samples, with metadata columns (2N, K_m); the groups are the classes."""
    labels = data.labels.long()
    return Samples(data.images, labels, metadata, data.confounder.unsqueeze(1), labels)


def verdict(accuracy: float) -> str:
    """Say what an accuracy (a fraction) means against the limit of the true effect."""
    if accuracy > drawn.ACCURACY_WITHOUT_CONFOUNDER + MARGIN:
        return "confounded"
    if accuracy < drawn.ACCURACY_WITHOUT_CONFOUNDER - MARGIN:
        return "below the limit"
    return "at the limit"


@dataclass(frozen=True, kw_only=True)
class SyntheticSetting(Setting):
    """Synthetic images, the paper's network for them, measures by group and a table by batch size."""

    row_names: ClassVar = {
        "epochs": "epochs",
        "size": "group_size",
        "test_size": "test_group_size",
        "variant": "variant",
    }
    methods: ClassVar = tuple(name for name, each in METHODS.items() if not each.of_confounded_only)
    all_methods: ClassVar = tuple(name for name, each in METHODS.items() if each.in_table)
    variants: ClassVar[tuple[str, ...]] = drawn.VARIANTS
    keeps_recalibrated: ClassVar = False

    def schedule(self, batch_size: int) -> tuple[int, float]:
        """Return (epochs, learning rate) for a batch size: those of the nearest tuned one."""
        return _SCHEDULES[min(_SCHEDULES, key=lambda size: abs(math.log(size / max(batch_size, 1))))]

    def network(self, norm: str, num_classes: int) -> BackboneNetwork:
        """Convolution 5×5 (16), convolution 5×5 (32), linear 84, linear 1: the paper's network."""
        convolutions = [nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)]
        pools = {"pool": nn.Identity(), "last_pool": nn.Identity()}
        backbone = ConvolutionalBackbone(
            convolutions, (16, 32), norm, spatial_dims=2, num_positions=24 * 24, **pools
        )
        return BackboneNetwork(backbone, 1, 84, norm)

    def data(self, run: Run, degree: int) -> ConfoundedData:
        """Return training and held-out images; none of them are confound-free."""

        def draw(group_size: int, held_out: bool) -> Samples:
            data = drawn.make_synthetic(group_size, seed=2 * run.seed + held_out, variant=run.variant)
            return samples_of(data, metadata_columns(data, run.variant, degree))

        train, test = draw(run.size, False), draw(run.test_size, True)
        return ConfoundedData(train, test, test, GROUPS, GROUPS, {"confounder": (0,)})

    def measure(
        self, network: BackboneNetwork, data: ConfoundedData, trained: Samples, file: str | None = None
    ) -> Row:
        """Return "bacc", and by group, "accuracy" and "dcor2" (features, confounder); fractions."""
        from sklearn.metrics import balanced_accuracy_score

        test = data.test
        features, logits = outputs(network, test)
        predicted = predictions(logits)
        accuracy, dependence = {}, {}
        for index, group in enumerate(GROUPS):
            inside = test.labels == index
            accuracy[group] = float((predicted == test.labels)[inside].double().mean())
            found = distance_correlation_sqr(features[inside], test.confounders[inside, 0])
            dependence[group] = float(found)
        if file is not None:
            confounder = test.confounders[:, 0]
            save_features(file, features, logits, labels=test.labels, confounder=confounder)
        return {
            "bacc": float(balanced_accuracy_score(test.labels.numpy(), predicted.numpy())),
            "accuracy": accuracy,
            "dcor2": dependence,
        }

    def tables(self, rows: Sequence[Row]) -> list[ReportTable]:
        """Return the table of accuracy, its verdict and dcor², by batch size and method."""
        limited = _has_limits(rows)
        lines = []
        for size in sorted({row["batch_size"] for row in rows}):
            for name, members in by_method([row for row in rows if row["batch_size"] == size]).items():
                accuracy = [row["bacc"] for row in members]
                recalibrated = [row["recalibrated"] for row in members if "recalibrated" in row]
                if len(recalibrated) < len(members):  # a mean over fewer seeds than the line says
                    recalibrated = []
                means = [
                    fmean(row["dcor2"][group] for row in recalibrated) for group in GROUPS if recalibrated
                ]
                seconds = [row["seconds_per_epoch"] for row in members if "seconds_per_epoch" in row]
                lines.append(
                    (
                        METHODS[name].title,
                        str(size),
                        str(len(members)),
                        mean_with_deviation([100 * value for value in accuracy], 1),
                        verdict(fmean(accuracy)) if limited else "–",
                        *(mean_with_deviation([row["dcor2"][g] for row in members], 3) for g in GROUPS),
                        mean_with_deviation([100 * row["bacc"] for row in recalibrated], 1),
                        " / ".join(mean_with_deviation([mean], 3) for mean in means) or "–",
                        mean_with_deviation([fmean(seconds)] if seconds else [], 1),
                    )
                )
        return [ReportTable(HEADINGS, lines, LIMITS if limited else NO_LIMITS, LEGEND, section=1)]

    def figures(self, runs: Sequence[Run], rows: Sequence[Row]) -> list[ReportFigure]:
        """Return example images, accuracy and dcor² by batch size and, where features were kept, these."""
        examples = example_images(drawn.make_synthetic(4, seed=0, variant=runs[0].variant))
        shown = result_figures(rows, examples, batch_axis(rows))
        if projected := _projections(runs, rows):
            shown.append(
                ReportFigure(
                    "projection",
                    figures.projections(projected),
                    "The features, before and after",
                    "Two principal components of each model's features by group, coloured by the confounder.",
                    "Each point is a held-out image. Without correction the colour runs along the main "
                    "component: the features follow the confounder. With Metadata Normalization it is mixed "
                    "there; what order is left sits in a component that holds next to none of the variance.",
                )
            )
        return shown

    def more(self, out: Path, runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
        """Write ``metadata.csv``, a row for each held-out image in the order of the kept features.

        It holds the group, the effect, the confounder, and the prediction and score of each kept network.
        """
        columns: dict[str, list[Any]] = {}
        for run, tensors in _kept(runs):
            if not columns:
                images = drawn.make_synthetic(run.test_size, seed=2 * run.seed + 1, variant=run.variant)
                columns["group"] = [GROUPS[int(label)] for label in images.labels.tolist()]
                columns |= {"effect": images.effect.tolist(), "confounder": images.confounder.tolist()}
            scores = tensors["scores"].tolist()
            name = f"{run.method}_batch{run.batch_size}"
            columns[f"prediction_{name}"] = [GROUPS[score > 0.5] for score in scores]
            columns[f"score_{name}"] = scores
        if columns:
            lines = [columns, *zip(*columns.values(), strict=True)]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)
            write_text_atomically(out / "metadata.csv", text)
        return [*_VARIANT_TEXTS[runs[0].variant], *self.introduction]


def _has_limits(rows: Sequence[Row]) -> bool:
    return not any(row.get("variant") in drawn.WITHOUT_LIMITS for row in rows)


def _kept(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Tensor]]]:
    """Return the runs whose features are on disk, with these."""
    from safetensors.torch import load_file

    files = [(run, run.features_file) for run in runs if run.features_file is not None]
    return [(run, load_file(file)) for run, file in files if Path(file).exists()]


def example_images(data: drawn.SyntheticData, count: int = 4, titles: Sequence[str] = ()) -> Figure:
    """Show `count` images a group, the quadrants of effect and confounder outlined."""
    lines = []
    for index, group in enumerate(GROUPS):
        pictures: list[tuple[Any, str]] = count * [(None, "")]
        for column, row in enumerate((data.labels == index).nonzero()[:count, 0].tolist()):
            separator = ",\n" if titles else ", "
            text = f"effect {data.effect[row]:.1f}{separator}confounder {data.confounder[row]:.1f}"
            if titles and index == 0:
                text = f"{titles[column]}\n\n{text}"
            pictures[column] = (data.images[row, 0].numpy(), text)
        lines.append((f"Group {group}", pictures))
    figure = figures.picture_grid(lines, (figures.WIDTH, 4.1), cmap="gray", vmin=0, vmax=6)
    shown = [axis for axis in figure.axes if axis.images]
    for axis in shown:
        for x, y, colour in ((0, 0, "#56B4E9"), (16, 16, "#56B4E9"), (0, 16, "#E69F00")):
            place = (x + 0.2, y + 0.2)
            axis.add_patch(Rectangle(place, 14.6, 14.6, fill=False, edgecolor=colour, linewidth=1.5))
    figure.colorbar(shown[0].images[0], ax=figure.axes, label="pixel value", shrink=0.8)
    figure.supxlabel(
        "outlined: true effect (blue, on the diagonal), confounder (orange, lower left)", fontsize=8
    )
    return figure


class ResultAxis(NamedTuple):
    """Where results stand in a figure: `values` leads from a row and "bacc" or a group to (position, value).

    `limits` and `options` are those of `series_figure`.
    """

    label: str
    ticks: list[str]
    values: Callable[[Row, str], Iterable[tuple[int, float]]]
    limits: Sequence[tuple[float | Sequence[float], str]]
    options: dict[str, Any]


def batch_axis(rows: Sequence[Row]) -> ResultAxis:
    """Return the axis of batch sizes, with the analytic limits."""
    sizes = sorted({row["batch_size"] for row in rows})

    def values(row: Row, key: str) -> Iterable[tuple[int, float]]:
        value = 100 * row["bacc"] if key == "bacc" else row["dcor2"][key]
        return [(sizes.index(row["batch_size"]), value)]

    limits = [
        (100 * limit, f"{100 * limit:.1f} %\n{text}")
        for limit, text in (
            (drawn.ACCURACY_WITH_CONFOUNDER, "with the\nconfounder"),
            (drawn.ACCURACY_WITHOUT_CONFOUNDER, "true effect\nonly"),
        )
        if _has_limits(rows)
    ]
    return ResultAxis("batch size", list(map(str, sizes)), values, limits, {})


def _result_figure(
    rows: Sequence[Row],
    panels: figures.Panels,
    axis: ResultAxis,
    parts: Mapping[str, str],
    label: str,
    **options: Any,
) -> Figure:
    """Draw what rows have under the keys of `parts` (title → key), mean ± standard deviation over seeds."""
    names = [name for group in panels.values() for name in group]

    def series(key: str) -> figures.Series:
        return figures.series_of(rows, names, lambda row: axis.values(row, key))

    labels, lines = (axis.label, label), {title: series(key) for title, key in parts.items()}
    return figures.series_figure(lines, panels, axis.ticks, labels=labels, **options, **axis.options)


def accuracy_figure(rows: Sequence[Row], panels: figures.Panels, axis: ResultAxis) -> Figure:
    """Balanced accuracy with the analytic limits."""
    label = "balanced accuracy on held-out data (%)"
    return _result_figure(rows, panels, axis, {"": "bacc"}, label, limits=axis.limits)


def dependence_figure(rows: Sequence[Row], panels: figures.Panels, axis: ResultAxis) -> Figure:
    """Distance correlation of features and confounder by group."""
    parts, label = {f"Group {group}": group for group in GROUPS}, "dcor² (features, confounder)"
    return _result_figure(rows, panels, axis, parts, label, limits=[(0.0, "")], height=3.6)


def result_figures(
    rows: Sequence[Row], examples: Figure, axis: ResultAxis, title: str = "Accuracy"
) -> list[ReportFigure]:
    """Return the figures of example images, accuracy (with a title) and dcor² along an axis."""
    shown = panels(titles({row["method"] for row in rows}))
    return [
        ReportFigure(
            "examples",
            examples,
            "The images",
            "Example images of each group.",
            "The classifier sees the images only, never these numbers.",
        ),
        ReportFigure(
            "accuracy",
            accuracy_figure(rows, shown, axis),
            title,
            f"Balanced accuracy of every method by {axis.label}; the table has numbers.",
            "Closest to the lower line is best. What lies above was got from the confounder."
            if axis.limits
            else "Balanced accuracy on held-out data.",
        ),
        ReportFigure(
            "dependence",
            dependence_figure(rows, shown, axis),
            "What the features hold of the confounder",
            f"Distance correlation by group, method and {axis.label}; the table has numbers.",
            "Bias-corrected squared distance correlation on held-out data; 0 is right.",
        ),
    ]


def _projections(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, dict[str, Tensor]]:
    """Kept features of a few methods by title, at the batch size nearest to 200."""
    kept = _kept(runs)
    batch_sizes = (run.batch_size for run, _ in kept)
    batch_size = min(batch_sizes, key=lambda size: abs(math.log(size / 200)), default=None)
    shown = {}
    for method in ("none", "mdn-last-running", "mdn-every-running"):
        for run, tensors in kept:
            row = next((row for row in rows if run.settings().items() <= row.items()), None)
            if (run.method, run.batch_size) == (method, batch_size) and row is not None:
                dependence = " / ".join(mean_with_deviation([row["dcor2"][group]], 3) for group in GROUPS)
                title = f"{METHODS[method].title}\ndcor² {dependence}\naccuracy {100 * row['bacc']:.1f} %"
                shown[title] = tensors
    return shown


SETTING = SyntheticSetting(
    name="synthetic",
    title="Metadata Normalization on synthetic images",
    introduction=(_DEPENDENCE,),
    batch_size=200,
    epochs=15,
    learning_rate=2e-4,
    size=1000,
    test_size=2000,
    slots=("norm1", "norm2"),
    quick_seeds=2,
    default_methods=("none", "batchnorm", "groupnorm", "mdn-last-running", "mdn-every-running"),
    batch_sizes=tuple(_SCHEDULES),
)
