"""Ways to take metadata out of a table of features, side by side: what is left of it, what of the label.

Every method is fitted on training rows only and applied to rows that were held out. Measured on those: what
the features still know about the metadata, overall and among rows of one label, and about the label. And, the
honest measure where label and metadata go together: the accuracy of a logistic regression that is trained on
the transformed training rows, on held-out rows in which label and metadata are independent.

    python benchmarks/table_comparison.py --out results/table-comparison    # twelve minutes on one core
    python benchmarks/table_comparison.py --out results/table-comparison --methods splince    # one anew
    python benchmarks/table_comparison.py --out results/table-comparison --markdown    # the tables again
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mdnorm import Design, erasure
from mdnorm.files import atomic_path
from mdnorm.metrics import conditional_distance_correlation_sqr, distance_correlation_sqr, probe
from mdnorm.plotting import MARKERS, PALETTE, save_figure
from mdnorm.sklearn import MetadataResidualizer

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Features (n, D), metadata (columns of strings are categories), label (n,) of 0 and 1."""

    features: Floats
    metadata: pd.DataFrame
    label: Integers
    unaffected: Floats | None = None  # the features without the effect of the metadata, where that is known

    def rows(self, index: NDArray[Any]) -> Table:
        unaffected = None if self.unaffected is None else self.unaffected[index]
        metadata = self.metadata.iloc[index].reset_index(drop=True)
        return Table(self.features[index], metadata, self.label[index], unaffected)

    @property
    def sites(self) -> list[str]:
        """The only metadata column as sites; empty where it is not one of categories."""
        first = self.metadata.iloc[:, 0]
        return first.tolist() if self.metadata.shape[1] == 1 and not _is_number(first) else []


def _is_number(column: pd.Series[Any]) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column))


@dataclass(frozen=True)
class Split:
    """Training rows, held-out rows, and held-out rows in which label and metadata are independent."""

    train: Table
    held_out: Table
    independent: Table


def standardised(split: Split) -> Split:
    """Return features of variance 1 in the training rows: LEACE shrinks towards equal variances."""
    scaler = StandardScaler().fit(split.train.features)

    def scaled(table: Table) -> Table:
        return replace(table, features=scaler.transform(table.features))

    return Split(scaled(split.train), scaled(split.held_out), scaled(split.independent))


class Columns:
    """Metadata as standardised columns; what that takes is learned from the training rows."""

    def __init__(self, train: pd.DataFrame, *, flexible: bool = False, all_levels: bool = False) -> None:
        self.flexible, self.skip = flexible, 0 if all_levels else 1
        self.curves: dict[str, Design] = {}
        self.levels: dict[str, list[str]] = {}
        for name in train:
            if not _is_number(train[name]):
                self.levels[name] = sorted(train[name].unique())
            elif flexible:
                self.curves[name] = Design([f"bs(`{name}`, df=5)"]).fit(train[[name]])
        raw = self._raw(train)
        self.mean, self.std = raw.mean(axis=0), raw.std(axis=0)

    def _raw(self, metadata: pd.DataFrame) -> Floats:
        blocks = []
        for name in metadata:
            values = metadata[name].to_numpy()
            if name in self.levels:
                blocks.append(np.stack([values == level for level in self.levels[name][self.skip :]], 1))
            elif self.flexible:
                curve = self.curves[name].transform(metadata[[name]], dtype=torch.float64)
                blocks.append(curve.metadata.numpy())
            else:
                blocks.append(values[:, None])
        return np.concatenate(blocks, axis=1).astype(np.float64)

    def __call__(self, metadata: pd.DataFrame) -> Floats:
        scaled: Floats = (self._raw(metadata) - self.mean) / self.std
        return scaled


# --------------------------------------------------------------------------------------------------------
# Methods: fitted on a training table, each returns a function from a table to features
# --------------------------------------------------------------------------------------------------------

Transform = Callable[[Table], Floats]


def _columns_of(train: Table, options: dict[str, Any]) -> Columns:
    return Columns(train.metadata, flexible=options.get("flexible", False))


def nothing(train: Table, **options: Any) -> Transform:
    return lambda table: table.features


def reference(train: Table, **options: Any) -> Transform:
    def transform(table: Table) -> Floats:
        assert table.unaffected is not None
        return table.unaffected

    return transform


def correlation_remover(train: Table, **options: Any) -> Transform:
    """Fairlearn's, which knows no label: ``mdnorm`` with ``protect_target=False``, up to rounding."""
    from fairlearn.preprocessing import CorrelationRemover

    columns = _columns_of(train, options)
    width = train.features.shape[1]

    def joined(table: Table) -> Floats:
        return np.concatenate([table.features, columns(table.metadata)], axis=1)

    whole = joined(train)
    remover = CorrelationRemover(sensitive_feature_ids=range(width, whole.shape[1])).fit(whole)
    return lambda table: remover.transform(joined(table))


def leace(train: Table, *, method: str = "leace", **options: Any) -> Transform:
    """Concept erasure, the package; it shrinks the covariance of the features."""
    # The package compiles a function when it is imported, in a way that torch now warns about.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import LeaceEraser

    concept = _columns_of(train, options)(train.metadata)
    eraser = LeaceEraser.fit(torch.from_numpy(train.features), torch.from_numpy(concept), method=method)
    return lambda table: eraser(torch.from_numpy(table.features)).numpy()


def eraser_with_labels(
    train: Table, *, within_labels: bool = True, preserve_labels: bool = False, **options: Any
) -> Transform:
    """mdnorm's: LEACE within labels; with `preserve_labels` class means stay, over all rows as in SPLINCE."""
    eraser = erasure.fit(
        train.features,
        _columns_of(train, options)(train.metadata),
        train.label,
        within_labels=within_labels,
        preserve_labels=preserve_labels,
    )
    return lambda table: eraser(torch.from_numpy(table.features)).numpy()


def quadratic_leace(train: Table, **options: Any) -> Transform:
    """Brings mean and covariance of every site to common ones; needs the sites of new rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import QuadraticEraser

    levels = sorted(set(train.sites))

    def codes(table: Table) -> torch.Tensor:
        return torch.tensor([levels.index(site) for site in table.sites])

    eraser = QuadraticEraser.fit(torch.from_numpy(train.features), codes(train))
    return lambda table: eraser(torch.from_numpy(table.features), codes(table)).numpy()


def neuroharmonize(train: Table, *, label: str = "none", **options: Any) -> Transform:
    """ComBat; `label`: "none", "kept" (at its mean in new rows, of unknown label) or "given"."""
    from neuroHarmonize import harmonizationApply, harmonizationLearn

    def covariates(table: Table, known: bool) -> pd.DataFrame:
        columns: dict[str, Any] = {"SITE": table.sites}
        if label != "none":
            columns["label"] = table.label.astype(float) if known else train.label.mean()
        return pd.DataFrame(columns)

    # It computes with np.matrix, which numpy warns about.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        model, _ = harmonizationLearn(train.features, covariates(train, True), seed=0)

    def transform(table: Table) -> Floats:
        known = label == "given"
        return np.asarray(harmonizationApply(table.features, covariates(table, known), model))

    return transform


def residualizer(train: Table, *, protect: bool = True, **options: Any) -> Transform:
    columns = _columns_of(train, options)
    model = MetadataResidualizer(protect_target="auto" if protect else False)
    model.fit(train.features, train.label, metadata=columns(train.metadata))
    return lambda table: model.transform(table.features, metadata=columns(table.metadata))


def site_residualizer(train: Table, **options: Any) -> Transform:
    model = MetadataResidualizer(site=str(train.metadata.columns[0]), scale=True, empirical_bayes=True)
    model.fit(train.features, train.label, metadata=train.metadata)
    return lambda table: model.transform(table.features, metadata=table.metadata)


@dataclass(frozen=True)
class Method:
    title: str
    fit: Callable[..., Transform]
    options: dict[str, Any]
    needs: str = "any"  # "sites", "numbers" (a metadata column that is continuous) or "reference"
    drawn: str | None = None  # the legend's words, for the methods that the figure has


METHODS = {
    "reference": Method("(features without the effect)", reference, {}, "reference"),
    "none": Method("nothing done", nothing, {}, drawn="nothing done"),
    "correlation-remover": Method(
        "CorrelationRemover", correlation_remover, {}, drawn="CorrelationRemover\n(= mdnorm without labels)"
    ),
    "correlation-remover-spline": Method(
        "CorrelationRemover, spline", correlation_remover, {"flexible": True}, "numbers"
    ),
    "leace": Method("LEACE", leace, {}, drawn="LEACE"),
    "leace-orth": Method("LEACE, orthogonal", leace, {"method": "orth"}),
    "leace-spline": Method("LEACE, spline", leace, {"flexible": True}, "numbers"),
    "leace-within": Method(
        "LEACE, within labels", eraser_with_labels, {}, drawn="LEACE, concept\nwithin labels"
    ),
    "leace-within-spline": Method(
        "LEACE, within labels, spline", eraser_with_labels, {"flexible": True}, "numbers"
    ),
    "leace-kept": Method(
        "LEACE, within labels, class means kept", eraser_with_labels, {"preserve_labels": True}
    ),
    "leace-kept-spline": Method(
        "LEACE, within labels, class means kept, spline",
        eraser_with_labels,
        {"preserve_labels": True, "flexible": True},
        "numbers",
    ),
    "splince": Method(
        "SPLINCE",
        eraser_with_labels,
        {"within_labels": False, "preserve_labels": True},
    ),
    "splince-spline": Method(
        "SPLINCE, spline",
        eraser_with_labels,
        {"within_labels": False, "preserve_labels": True, "flexible": True},
        "numbers",
    ),
    "leace-quadratic": Method("QLEACE", quadratic_leace, {}, "sites", drawn="QLEACE"),
    "neuroharmonize": Method(
        "neuroHarmonize, no label",
        neuroharmonize,
        {},
        "sites",
        drawn="neuroHarmonize,\nno label",
    ),
    "neuroharmonize-label": Method("neuroHarmonize", neuroharmonize, {"label": "kept"}, "sites"),
    "neuroharmonize-given": Method(
        "neuroHarmonize, held-out labels given", neuroharmonize, {"label": "given"}, "sites"
    ),
    "mdnorm": Method("mdnorm", residualizer, {}, drawn="mdnorm"),
    "mdnorm-spline": Method(
        "mdnorm, spline",
        residualizer,
        {"flexible": True},
        "numbers",
        drawn="mdnorm, spline",
    ),
    "mdnorm-scale": Method(
        "mdnorm, site scale",
        site_residualizer,
        {},
        "sites",
        drawn="mdnorm, site scale (= neuro-\nHarmonize with label)",
    ),
}


def usable(method: Method, table: Table) -> bool:
    return {
        "any": True,
        "reference": table.unaffected is not None,
        "sites": bool(table.sites),
        "numbers": any(_is_number(table.metadata[name]) for name in table.metadata),
    }[method.needs]


# --------------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------------


_MODELS: tuple[Literal["linear", "nonlinear"], ...] = ("linear", "nonlinear")


def accuracy(split: Split, transform: Transform) -> float:
    """Return the accuracy of a classifier of training rows where label and metadata are independent."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(transform(split.train), split.train.label)
    predicted = classifier.predict(transform(split.independent))
    return float(balanced_accuracy_score(split.independent.label, predicted))


def dependence(features: Floats, split: Split) -> dict[str, float]:
    """Return distance correlations of held-out features and metadata, overall and within labels."""
    encoded = Columns(split.train.metadata, all_levels=True)(split.held_out.metadata)
    within = conditional_distance_correlation_sqr(features, encoded, split.held_out.label)
    return {"dcor2": distance_correlation_sqr(features, encoded), "dcor2_within": within.mean}


def probes(
    features: Floats, held_out: Table, model: Literal["linear", "nonlinear"], seed: int
) -> list[float]:
    """Return how well the metadata can be predicted from features, overall and within labels.

    As shares of the way from chance (0) to perfect (1), of the column that is predicted best; R² of numbers.
    """
    results = [
        probe(
            features,
            held_out.metadata[name].to_numpy(),
            model=model,
            labels=held_out.label,
            **_settings(seed),
        )
        for name in held_out.metadata
    ]
    overall = max(_share(result.score, result.chance) for result in results)
    within = max(_share(result.pooled.value, result.pooled.chance) for result in results)
    return [overall, within]


def _share(value: float, chance: float) -> float:
    return (value - chance) / (1 - chance)


def _settings(seed: int) -> dict[str, Any]:
    return {"num_permutations": 0, "num_landmarks": 100, "seed": seed}


def measures(split: Split, transform: Transform, seed: int) -> dict[str, float]:
    """Return all that is measured of a method."""
    held_out = transform(split.held_out)
    row = dependence(held_out, split)
    for model in _MODELS:
        row[model], row[f"{model}_within"] = probes(held_out, split.held_out, model, seed)
        row[f"label_{model}"] = probe(held_out, split.held_out.label, model=model, **_settings(seed)).score
    row["accuracy"] = accuracy(split, transform)
    return {name: round(float(value), 5) for name, value in row.items()}


# --------------------------------------------------------------------------------------------------------
# Simulations
# --------------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, loadings: Floats, num_rows: int) -> Floats:
    """Return noise of variance about 1 a feature, half of it shared between features."""
    num_factors, num_features = loadings.shape
    own = rng.standard_normal((num_rows, num_features))
    noise: Floats = np.sqrt(0.5) * (own + rng.standard_normal((num_rows, num_factors)) @ loadings)
    return noise


def _label_effect(rng: np.random.Generator, loadings: Floats) -> Floats:
    """Return an effect (D,) that allows an accuracy of 87 %, whatever its direction in the noise."""
    effect = rng.standard_normal(loadings.shape[1])
    covariance = 0.5 * (np.eye(effect.size) + loadings.T @ loadings)
    distance = np.sqrt(effect @ np.linalg.solve(covariance, effect))
    scaled: Floats = effect * (2 * 1.1264 / distance)  # the normal distribution is 0.87 at 1.1264
    return scaled


def _site_split(
    seed: int, num_rows: int, num_features: int, shares: Sequence[float], *, scale: bool = False
) -> Split:
    """Simulate sites; `shares` are those of label 1 at each site in the training rows."""
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((3, num_features)) / np.sqrt(3)
    effect = _label_effect(rng, loadings)
    location = rng.standard_normal((len(shares), num_features))
    spread = np.ones_like(location)
    if scale:
        typical = np.geomspace(0.5, 2.0, len(shares))[:, None]
        spread = typical * np.exp(0.2 * rng.standard_normal(location.shape))

    def draw(count: int, site_shares: NDArray[Any]) -> Table:
        site = rng.permutation(np.arange(count) % len(shares))
        label = (rng.random(count) < site_shares[site]).astype(np.int64)
        noise = _noise(rng, loadings, count)
        fixed = label[:, None] * effect
        names = pd.DataFrame({"site": np.array([f"site {index}" for index in range(len(shares))])[site]})
        return Table(fixed + location[site] + spread[site] * noise, names, label, fixed + noise)

    confounded, even = np.asarray(shares), np.full(len(shares), 0.5)
    return Split(draw(num_rows, confounded), draw(600, confounded), draw(2000, even))


def independent_sites(seed: int) -> Split:
    return _site_split(seed, 400, 20, (0.5, 0.5, 0.5, 0.5))


def correlated_sites(seed: int) -> Split:
    return _site_split(seed, 400, 20, (0.2, 0.8))


def scaled_sites(seed: int) -> Split:
    return _site_split(seed, 180, 40, (0.5, 0.5, 0.5), scale=True)


def curved_age(seed: int) -> Split:
    """Simulate features that are curves of the age, and a label that grows likely with it."""
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((3, 20)) / np.sqrt(3)
    effect = _label_effect(rng, loadings)
    weights = 0.7 * rng.standard_normal((3, 20))

    def draw(count: int, slope: float) -> Table:
        age = rng.uniform(20, 80, count)
        scaled = (age - 50) / 30
        label = (rng.random(count) < 1 / (1 + np.exp(-slope * scaled))).astype(np.int64)
        curves = np.stack([scaled, 1.5 * (scaled**2 - 1 / 3), np.sin(np.pi * scaled)], 1)
        fixed = label[:, None] * effect + _noise(rng, loadings, count)
        return Table(fixed + curves @ weights, pd.DataFrame({"age": age}), label, fixed)

    return Split(draw(400, 4.0), draw(600, 4.0), draw(2000, 0.0))


# --------------------------------------------------------------------------------------------------------
# Real data: values as they are, only the choice of training rows makes label and metadata go together
# --------------------------------------------------------------------------------------------------------


def thinned(strata: Integers, label: Integers, shares: Floats, rng: np.random.Generator) -> Integers:
    """Return rows, as many as possible, of which a share `shares[s]` in stratum s has label 1."""
    chosen = []
    for stratum, share in enumerate(shares):
        ones = rng.permutation(((strata == stratum) & (label == 1)).nonzero()[0])
        zeros = rng.permutation(((strata == stratum) & (label == 0)).nonzero()[0])
        total = min(ones.size / share, zeros.size / (1 - share))
        chosen += [ones[: round(total * share)], zeros[: round(total * (1 - share))]]
    return np.sort(np.concatenate(chosen))


def halved(table: Table, strata: Integers, shares: Floats | None, seed: int) -> Split:
    """Halve a table; thin the training half to `shares` of label 1 a stratum, or leave it as it is.

    The held-out half is left as it is, and thinned to equally many of both labels in each stratum.
    """
    rng = np.random.default_rng(seed)
    half = np.zeros(len(strata), dtype=bool)
    for stratum in np.unique(strata):
        for value in (0, 1):
            rows = rng.permutation(((strata == stratum) & (table.label == value)).nonzero()[0])
            # An odd one goes to either half.
            half[rows[: (rows.size + int(rng.integers(2))) // 2]] = True
    train, held_out = half.nonzero()[0], (~half).nonzero()[0]
    even = np.full(int(strata.max()) + 1, 0.5)
    independent = held_out[thinned(strata[held_out], table.label[held_out], even, rng)]
    if shares is not None:
        train = train[thinned(strata[train], table.label[train], shares, rng)]
    return Split(table.rows(train), table.rows(held_out), table.rows(independent))


def _quantile_bins(values: Floats, count: int) -> Integers:
    edges = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def penguins(seed: int) -> Split:
    from palmerpenguins import load_penguins

    data = load_penguins().dropna()
    features = data[["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]].to_numpy(float)
    species = data["species"].to_numpy(str)
    table = Table(
        features, pd.DataFrame({"species": species}), (data["sex"] == "male").to_numpy().astype(np.int64)
    )
    strata = np.unique(species, return_inverse=True)[1].astype(np.int64)
    return halved(table, strata, np.array([0.5, 0.2, 0.8]), seed)


def diabetes(seed: int) -> Split:
    from sklearn.datasets import load_diabetes

    data = load_diabetes(as_frame=True, scaled=False)
    sex = np.where(data.data["sex"] == 1, "1", "2")
    metadata = pd.DataFrame({"age": data.data["age"].to_numpy(float), "sex": sex})
    label = (data.target > data.target.median()).to_numpy().astype(np.int64)
    table = Table(data.data.drop(columns=["age", "sex"]).to_numpy(float), metadata, label)
    strata = 2 * (sex == "2").astype(np.int64) + _quantile_bins(metadata["age"].to_numpy(), 2)
    return halved(table, strata, np.array([0.2, 0.2, 0.8, 0.8]), seed)


def breast_cancer(seed: int) -> Split:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer(as_frame=True)
    size = data.data["mean radius"].to_numpy(float)
    shape = [name for name in data.data if not any(word in name for word in ("radius", "perimeter", "area"))]
    table = Table(
        data.data[shape].to_numpy(float),
        pd.DataFrame({"radius": size}),
        (data.target == 0).to_numpy().astype(np.int64),
    )
    return halved(table, _quantile_bins(size, 12), None, seed)


def digits(seed: int) -> Split:
    from sklearn.datasets import load_digits

    data = load_digits()
    # Pixels at the edge are blank in nearly every image.
    pixels = data.data[:, (data.data > 0).mean(axis=0) >= 0.1].astype(float)
    ink = pixels.mean(axis=1)
    table = Table(pixels, pd.DataFrame({"ink": ink}), (data.target % 2).astype(np.int64))
    return halved(table, _quantile_bins(ink, 8), np.linspace(0.2, 0.8, 8), seed)


@dataclass(frozen=True)
class Case:
    title: str
    split: Callable[[int], Split]
    seeds: int


CASES = {
    "independent": Case("Four sites, label independent", independent_sites, 5),
    "correlated": Case("Two sites, label correlated", correlated_sites, 5),
    "scale": Case("Three sites, different spread", scaled_sites, 5),
    "age": Case("Curved effect of age", curved_age, 5),
    "penguins": Case("Penguins: sex, across species", penguins, 10),
    "diabetes": Case("Diabetes: progress, age and sex", diabetes, 10),
    "breast-cancer": Case("Breast cancer: size of nuclei", breast_cancer, 10),
    "digits": Case("Digits: parity, amount of ink", digits, 5),
}


def run(
    case: str, seed: int, split: Split | None = None, methods: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each method, of all or of `methods`, that the case's metadata allow."""
    split = standardised(CASES[case].split(seed) if split is None else split)
    rows = []
    for name in methods or METHODS:
        method = METHODS[name]
        if usable(method, split.train):
            transform = method.fit(split.train, **method.options)
            rows.append({"case": case, "method": name, "seed": seed} | measures(split, transform, seed))
    return rows


# --------------------------------------------------------------------------------------------------------
# Table and figure
# --------------------------------------------------------------------------------------------------------

_HEADINGS = {
    "dcor2": "dcor²",
    "dcor2_within": "dcor², within",
    "linear": "Linear probe",
    "linear_within": "Linear, within",
    "nonlinear_within": "Non-linear, within",
    "label_linear": "Label, linear",
    "label_nonlinear": "Label, non-linear",
    "accuracy": "Accuracy",
}


def summary(rows: list[dict[str, Any]], case: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return method -> measure -> mean and standard deviation over seeds."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for method in METHODS:
        chosen = [row for row in rows if row["case"] == case and row["method"] == method]
        if chosen:
            found[method] = {}
            for name in [*_HEADINGS, "nonlinear"]:
                values = np.array([row[name] for row in chosen])
                spread = values.std(ddof=1) if values.size > 1 else 0.0
                found[method][name] = float(values.mean()), float(spread)
    return found


def markdown(rows: list[dict[str, Any]], case: str) -> str:
    """Return the table of a case: means over seeds, the accuracy with its standard deviation."""
    lines = [
        "| Method | " + " | ".join(_HEADINGS.values()) + " |",
        "| --- |" + " ---: |" * len(_HEADINGS),
    ]
    for method, values in summary(rows, case).items():
        cells = []
        for name in _HEADINGS:
            mean, spread = values[name]
            if name.startswith("dcor2"):
                cells.append(_signed(f"{mean:.3f}"))
            elif name == "accuracy":
                cells.append(f"{100 * mean:.1f} ± {100 * spread:.1f}")
            else:
                cells.append(_signed(f"{100 * mean:.0f}"))
        lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _signed(number: str) -> str:
    return number.lstrip("-") if float(number) == 0 else number.replace("-", "−")


_POSSIBLE = "features without\nthe effect"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw, for each case, what is left of the metadata against what is kept of the label."""
    import matplotlib.pyplot as plt

    drawn = [name for name, method in METHODS.items() if method.drawn]
    cases = [name for name in CASES if any(row["case"] == name for row in rows)]
    num_columns = min(4, len(cases))
    num_lines = -(-len(cases) // num_columns)
    size = (3.4 * num_columns, 3.1 * num_lines + 1.3)
    canvas, axes = plt.subplots(num_lines, num_columns, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, case in zip(axes.flat, cases, strict=False):
        found = summary(rows, case)
        if "reference" in found:
            possible = 100 * found["reference"]["accuracy"][0]
            handles[_POSSIBLE] = axis.axhline(possible, color="0.5", linestyle="--", linewidth=1)
        for index, name in enumerate(drawn):
            if name not in found:
                continue
            left = max(found[name]["linear_within"], found[name]["nonlinear_within"])
            kept = found[name]["accuracy"]
            handles[METHODS[name].drawn or ""] = axis.errorbar(
                100 * left[0],
                100 * kept[0],
                xerr=100 * left[1],
                yerr=100 * kept[1],
                fmt=MARKERS[index],
                color=PALETTE[index],
                markersize=11 if MARKERS[index] == "*" else 8,
                markeredgecolor="white",
                markeredgewidth=0.5,
                elinewidth=0.9,
                zorder=3,
            )
        axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        axis.set_xlim(-8, 108)
        axis.set_title(CASES[case].title, fontsize=10)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    canvas.supxlabel(
        "left of the metadata: best probe among rows of one label (%, from chance to perfect)", fontsize=10
    )
    canvas.supylabel("kept of the label: accuracy where metadata do not help (%)", fontsize=10)
    # In the order of the methods, whichever panel each was first in.
    order = [METHODS[name].drawn for name in drawn] + [_POSSIBLE]
    shown = [name for name in order if name in handles]
    lines = [handles[name] for name in shown]
    canvas.legend(lines, shown, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    save_figure(canvas, path)
    plt.close(canvas)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/table-comparison"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), help="the rows of others stay as stored"
    )
    parser.add_argument("--seeds", type=int, help="seeds of every case; default: 5 or 10")
    parser.add_argument("--markdown", action="store_true", help="print the tables of rows that are there")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "table-comparison.json"
    replaced = {(case, method) for case in options.cases for method in options.methods or METHODS}
    if not options.markdown:
        torch.set_num_threads(1)
        rows = []
        if options.methods:
            stored = json.loads(store.read_text(encoding="utf-8"))
            rows = [row for row in stored if (row["case"], row["method"]) not in replaced]
        for case in options.cases:
            for seed in range(options.seeds or CASES[case].seeds):
                print(f"{CASES[case].title}, seed {seed}", file=sys.stderr, flush=True)
                rows += run(case, seed, methods=options.methods)
        order = {name: index for index, name in enumerate([*CASES, *METHODS])}
        rows.sort(key=lambda row: (order[row["case"]], row["seed"], order[row["method"]]))
        with atomic_path(store) as temporary:
            temporary.write_text(
                "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8"
            )
    rows = json.loads(store.read_text(encoding="utf-8"))
    for case in CASES:
        if any(row["case"] == case for row in rows):
            print(f"{CASES[case].title}\n\n{markdown(rows, case)}")
    figure(rows, options.out / "table_comparison.png")


if __name__ == "__main__":
    main()
