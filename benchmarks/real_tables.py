"""Real tables of several sites: what is left of the site, and what of the task, after each way to remove it.

    python benchmarks/real_tables.py --data DIR --out results/real-tables.json
    python benchmarks/real_tables.py --data DIR --cases heart --schemes within --repeats 2    # a part
    python benchmarks/real_tables.py --out results/real-tables.json --stored    # the tables again

The tables are not part of mdnorm. DIR has what there is of these; a case whose file is missing is left out,
and that is said:

`abide_freesurfer.csv`
    ABIDE I, FreeSurfer's measures from the Preprocessed Connectomes Project
    (http://preprocessed-connectomes-project.org/abide/; CC BY-NC-SA): a row for each person, SITE_ID,
    DX_GROUP (1 autism, 2 control), AGE_AT_SCAN, SEX, FIQ (-9999 for missing), a few more columns of the
    phenotypes, and measures in mm (`lh_..._thickness`) and mm³ (all others).
`heart_all.csv`
    UCI Heart Disease (https://archive.ics.uci.edu/dataset/45/heart+disease; CC BY 4.0): the 13 processed
    columns and `num` of four hospitals, `hospital`, "?" for missing.
`captk_radiomics.csv`, `captk_clinical.csv`
    the radiomics example of nested ComBat (https://github.com/hannah-horng/generalized-combat; MIT): CapTk's
    measures of two sets of lung CT, and what is known of the people.

Three schemes. **within**: five folds, stratified by site (and class), repeated; every method is fitted on
four and applied to the fifth. **left-out**: all rows of one site are held out, and no method knows it.
**networks**: halves instead of fifths, since probes inside a held-out part need rows. Two readers predict the
task, the same for all methods: ridge regression, its penalty chosen by leaving one training row out, and a
support vector machine (`svm`) with a Gaussian kernel, C = 1, its width chosen by cross-validation of the
training rows. The age is predicted, and protected, as its logarithm: errors grow with it.

The task is measured by the mean absolute error in years, or balanced accuracy in %; the difference to
"nothing done" has a 95 % bootstrap interval over rows (models fixed). What is left of the site: balanced
accuracy of a linear and a non-linear probe that are trained and tested on held-out rows, by cross-validation,
in %, and dcor² within labels (within quarters of the age). Methods with a * are given the labels of held-out
rows, which nobody has where they are to be predicted; with a +, the features of the held-out site, together.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

import mdnorm
from mdnorm import erasure
from mdnorm.balance import balancing_weights
from mdnorm.design.files import read_table_file
from mdnorm.files import write_text_atomically
from mdnorm.metrics import (
    conditional_distance_correlation_sqr,
    distance_correlation_sqr,
    probe,
    quantile_groups,
)
from mdnorm.sklearn import MetadataResidualizer

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SCHEMES = ("within", "left-out", "networks")


class DataError(Exception):
    """A file is not what it should be."""


# --------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Features (n, D), with NaN where a value is missing, the site of each row, and what is predicted."""

    features: Floats
    site: NDArray[np.str_]
    target: NDArray[Any]  # floats: the logarithm of a number; integers 0 and 1: a class
    age: Floats | None = None  # where it is known of all rows and no feature
    notes: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        return self.target.dtype.kind == "f"

    def rows(self, index: NDArray[Any]) -> Table:
        age = None if self.age is None else self.age[index]
        return Table(self.features[index], self.site[index], self.target[index], age)


def read_frame(path: Path, columns: Sequence[str], missing_values: Sequence[str] = ()) -> pd.DataFrame:
    """Return a CSV file as a frame, numbers as numbers.

    Raises
    ------
    DataError
        It is no such table, or lacks columns.
    """
    try:
        frame = read_table_file(path, missing_values=missing_values).to_pandas()
    except ValueError as error:
        raise DataError(str(error)) from error
    lacking = [name for name in columns if name not in frame]
    if lacking:
        raise DataError(f"{path} lacks the columns {', '.join(lacking)}.")
    return frame


def _numbers(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return columns as float64; an error names those that are no numbers."""
    wrong = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong[:5])} should be numbers.")
    return frame.astype(np.float64)


def _varying(features: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    varies = features.nunique() > 1
    if not varies.all():
        notes.append(f"{int((~varies).sum())} features that never vary left out")
    return features.loc[:, varies]


_ABIDE = ("FILE_ID", "SITE_ID", "DX_GROUP", "AGE_AT_SCAN", "SEX", "FIQ")
_ABIDE_OTHER = ("HANDEDNESS_CATEGORY", "EYE_STATUS_AT_SCAN", "BMI")


def abide(folder: Path, target: str) -> Table:
    """ABIDE I; thickness in mm and volumes in mm³, which the standardisation brings together."""
    path = folder / "abide_freesurfer.csv"
    # -9999 is a missing IQ, of people whose other values are good.
    frame = read_frame(path, _ABIDE, missing_values=["-9999", "-9999.0"])
    frame = frame[frame[["SITE_ID", "DX_GROUP", "AGE_AT_SCAN"]].notna().all(axis=1)]
    groups = set(frame["DX_GROUP"])
    if not groups <= {1, 2}:
        raise DataError(f"{path}: DX_GROUP is 1 or 2, not {sorted(groups)}.")
    measures = [name for name in frame if name not in (*_ABIDE, *_ABIDE_OTHER)]
    notes: list[str] = []
    features = _varying(_numbers(frame[measures], path), notes)
    age = frame["AGE_AT_SCAN"].to_numpy(np.float64)
    autism = (frame["DX_GROUP"] == 1).to_numpy(np.int64)
    thick = sum(name.endswith("_thickness") for name in features)
    notes.append(f"{thick} features in mm, {features.shape[1] - thick} in mm³ and counts")
    chosen = np.log(age) if target == "age" else autism
    return Table(features.to_numpy(), frame["SITE_ID"].to_numpy(str), chosen, age, tuple(notes))


# Codes of a widespread copy of the Cleveland table, and what they are in the original.
_COPY = {"cp": {0: 4, 1: 2, 2: 3, 3: 1}, "restecg": {0: 2, 1: 0, 2: 1}}
_HEART = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope")
_HEART_CLASSES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)}


def heart(folder: Path) -> Table:
    """UCI Heart Disease; what is missing for half of a hospital would tell the hospital, and is left out.

    Cleveland's rows are often passed on from a copy with other codes, in which chest pain is 0 to 3 rather
    than 1 to 4 and 1 means *healthy*. Where a hospital has a `cp` of 0, its rows are brought back.
    """
    path = folder / "heart_all.csv"
    frame = read_frame(path, (*_HEART, "num", "hospital"), missing_values=["?"])
    values = _numbers(frame[[*_HEART, "num"]], path)
    hospital = frame["hospital"].to_numpy(str)
    notes = []
    ill = (values["num"] > 0).to_numpy(copy=True)
    for name in np.unique(hospital):
        rows = hospital == name
        if (values.loc[rows, "cp"] == 0).any():
            for column, codes in _COPY.items():
                values.loc[rows, column] = values.loc[rows, column].map(codes)
            ill[rows] = ~ill[rows]
            notes.append(f"{name} is a copy with other codes and 1 for healthy: brought back")
    for column in ("chol", "trestbps"):
        zero = values[column] == 0
        values.loc[zero, column] = np.nan
        notes.append(f"{column} of 0 taken as missing: {int(zero.sum())} rows")
    missing = values[list(_HEART)].isna().groupby(hospital).mean().max()
    rare = [name for name in _HEART if missing[name] > 0.5]
    if rare:
        notes.append(f"missing for more than half of a hospital, left out: {', '.join(rare)}")
    notes.append("ca and thal, which three of four hospitals hardly have, left out")
    columns: dict[str, pd.Series[Any]] = {}
    for name in _HEART:
        if name in rare:
            continue
        if name in _HEART_CLASSES:
            for code in _HEART_CLASSES[name][1:]:
                known = (values[name] == code).astype(np.float64)
                columns[f"{name}={code}"] = known.where(values[name].notna())
        else:
            columns[name] = values[name]
    features = _varying(pd.DataFrame(columns), notes)
    return Table(features.to_numpy(), hospital, ill.astype(np.int64), None, tuple(notes))


# Larger values than this are sums over voxels, with long tails.
_LONG_TAIL = 1000.0


def captk(folder: Path) -> Table:
    """Radiomics; the set that has no ages is one site, the other one the other. Task: EGFR mutation."""
    path, clinical_path = folder / "captk_radiomics.csv", folder / "captk_clinical.csv"
    frame = read_frame(path, ["SubjectID"], missing_values=["#NAME?"])
    people = read_frame(clinical_path, ["age", "egfr-mut"], missing_values=["no data"])
    # The column of the people has no name, as that of an index of a DataFrame, which is none of the data.
    people["SubjectID"] = pd.read_csv(clinical_path, usecols=[0], dtype=str).iloc[:, 0].to_numpy()
    for name, table in (("radiomics", frame), ("clinical", people)):
        if table["SubjectID"].duplicated().any():
            raise DataError(f"captk_{name}.csv has the same person twice.")
    measures = [name for name in frame if name != "SubjectID"]
    notes = []
    joined = frame.merge(people[["SubjectID", "age", "egfr-mut"]], on="SubjectID")
    without = len(people) - len(joined)
    if without:
        notes.append(f"{without} people without radiomics left out")
    known = joined["egfr-mut"].notna()
    notes.append(f"{int((~known).sum())} people of unknown mutation left out")
    joined = joined[known].reset_index(drop=True)
    values = _numbers(joined[measures], path)
    notes.append(f"{int(values.isna().sum().sum())} cells missing (#NAME?)")
    features = _varying(values, notes)
    long = (features.abs() > _LONG_TAIL).any()
    notes.append(f"{int(long.sum())} features with values above {_LONG_TAIL:g} as signed logarithms")
    features = features.where(~long, np.sign(features) * np.log1p(features.abs()))
    site = np.where(joined["age"].isna(), "set without ages", "set with ages")
    mutation = (joined["egfr-mut"] == 1).to_numpy(np.int64)
    return Table(features.to_numpy(), site, mutation, None, tuple(notes))


@dataclass(frozen=True)
class Case:
    title: str
    files: tuple[str, ...]
    read: Callable[[Path], Table]


CASES = {
    "abide-age": Case("ABIDE I: age", ("abide_freesurfer.csv",), lambda folder: abide(folder, "age")),
    "abide-diagnosis": Case(
        "ABIDE I: diagnosis", ("abide_freesurfer.csv",), lambda folder: abide(folder, "diagnosis")
    ),
    "heart": Case("Heart disease: ill or not", ("heart_all.csv",), heart),
    "captk": Case("Lung radiomics: EGFR mutation", ("captk_radiomics.csv", "captk_clinical.csv"), captk),
}


# --------------------------------------------------------------------------------------------------------
# Methods: fitted on training rows, each returns a function from rows to features
# --------------------------------------------------------------------------------------------------------

Transform = Callable[[Table], Floats]


class CannotError(Exception):
    """A method cannot be used here; the message says why."""


# They raise where a row is of a site that was not in the fit.
_KNOWN_SITES_ONLY = ("neuroHarmonize", "neuroCombat", "combatlearn")


def one_hot(site: NDArray[np.str_], levels: Sequence[str], first: int = 0) -> Floats:
    if len(levels) <= first:
        raise CannotError("the training rows are of one site")
    return np.stack([site == level for level in levels[first:]], axis=1).astype(np.float64)


def _sites(table: Table) -> pd.DataFrame:
    return pd.DataFrame({"site": table.site})


def nothing(train: Table) -> Transform:
    return lambda table: table.features


def residualizer(
    train: Table,
    *,
    scale: bool = True,
    protect: bool = True,
    adapt: bool = False,
    covariance: bool = False,
) -> Transform:
    """`adapt`: location and scale of a site that training rows do not have are taken from its own rows."""
    model = MetadataResidualizer(
        site="site",
        scale=scale,
        empirical_bayes=scale,
        covariance=covariance,
        unseen="mean",
        protect_target="auto" if protect else False,
    ).fit(train.features, train.target, metadata=_sites(train))

    def transform(table: Table) -> Floats:
        if adapt and not set(table.site) & set(train.site):
            model.adapt(table.features, metadata=_sites(table))
        result: Floats = model.transform(table.features, metadata=_sites(table))
        return result

    return transform


def _label(train: Table, table: Table, label: str) -> Floats:
    """Return the label as a covariate of rows to harmonise: as it is where given, or at its mean.

    The mean stands in the training rows, too, once the model is fitted: a reader that is trained on rows that
    were harmonised with their labels does worse on rows that were not.
    """
    if label in ("fit", "given"):
        return table.target.astype(np.float64)
    return np.full(len(table.target), train.target.mean())


def _fitting(label: str) -> str:
    return "none" if label == "none" else "fit"


def neuroharmonize(train: Table, *, label: str = "none") -> Transform:
    from neuroHarmonize import harmonizationApply, harmonizationLearn

    def covariates(table: Table, label: str = label) -> pd.DataFrame:
        columns: dict[str, Any] = {"SITE": table.site}
        if label != "none":
            columns["label"] = _label(train, table, label)
        return pd.DataFrame(columns)

    model, _ = harmonizationLearn(train.features, covariates(train, _fitting(label)), seed=0)

    def transform(table: Table) -> Floats:
        return np.asarray(harmonizationApply(table.features, covariates(table), model))

    return transform


def neurocombat(train: Table) -> Transform:
    """New rows are put at the mean of the training rows' covariates: its own way to apply a model."""
    from neuroCombat import neuroCombat

    people = pd.DataFrame({"site": train.site, "label": train.target.astype(np.float64)})
    fitted = neuroCombat(train.features.T.copy(), people, "site", continuous_cols=["label"])

    def transform(table: Table) -> Floats:
        # The arithmetic of neuroCombatFromTraining, which itself fails with NumPy 2.4.
        estimates = fitted["estimates"]
        sites = [list(np.asarray(estimates["batches"], dtype=str)).index(site) for site in table.site]
        mean = estimates["stand.mean"][:, 0] + estimates["mod.mean"].mean(axis=1)
        spread = np.sqrt(np.asarray(estimates["var.pooled"])[:, 0])
        standard = (table.features - mean) / spread
        harmonised = (standard - estimates["gamma.star"][sites]) / np.sqrt(estimates["delta.star"][sites])
        return np.asarray(harmonised * spread + mean)

    return transform


def combatlearn(
    train: Table, *, method: str = "johnson", label: str = "none", smooth_age: bool = False
) -> Transform:
    from combatlearn.core import ComBatModel

    kind: Any = method
    model = ComBatModel(method=kind)

    def covariates(table: Table, label: str = label) -> dict[str, Any]:
        known = {"batch": pd.Series(table.site)}
        if smooth_age:
            known["continuous_covariates"] = pd.DataFrame({"age": table.age})
        elif label != "none":
            known["continuous_covariates"] = pd.DataFrame({"label": _label(train, table, label)})
        return known

    if smooth_age and train.age is None:
        raise CannotError("the ages are not known, or are a feature")
    model.fit(pd.DataFrame(train.features), **covariates(train, _fitting(label)))

    def transform(table: Table) -> Floats:
        return np.asarray(model.transform(pd.DataFrame(table.features), **covariates(table)))

    return transform


def leace(train: Table) -> Transform:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import LeaceEraser

    concept = one_hot(train.site, sorted(set(train.site)), 1)
    eraser = LeaceEraser.fit(torch.from_numpy(train.features), torch.from_numpy(concept))
    return lambda table: eraser(torch.from_numpy(table.features)).numpy()


def eraser(train: Table, **options: bool) -> Transform:
    concept = one_hot(train.site, sorted(set(train.site)), 1)
    fitted = erasure.fit(train.features, concept, train.target, **options)
    return lambda table: fitted(torch.from_numpy(table.features)).numpy()


@dataclass(frozen=True)
class Method:
    title: str
    fit: Callable[..., Transform]
    options: dict[str, Any] = field(default_factory=dict)
    package: str = "mdnorm"
    given_labels: bool = False
    given_age: bool = False
    given_site: bool = False  # features of all rows of the held-out site, together
    weighted: bool = False

    def title_for(self, table_is_age: bool) -> str:
        """Return the title, with a star where the labels of held-out rows are given to the method."""
        given = self.given_labels or (self.given_age and table_is_age)
        return self.title + (" *" if given else " +" if self.given_site else "")


def _combatlearn(title: str, **options: Any) -> Method:
    given = options.get("label") == "given"
    return Method(
        title,
        combatlearn,
        options,
        "combatlearn",
        given_labels=given,
        given_age=options.get("smooth_age", False),
    )


METHODS = {
    "raw": Method("nothing done", nothing),
    "mdnorm": Method("mdnorm, shifts", residualizer, {"scale": False}),
    "mdnorm-scale": Method("mdnorm, shifts and scale", residualizer),
    "mdnorm-covbat": Method("mdnorm, CovBat", residualizer, {"covariance": True}),
    "mdnorm-unprotected": Method("mdnorm, label not protected", residualizer, {"protect": False}),
    "mdnorm-adapt": Method("mdnorm, site adapted", residualizer, {"adapt": True}, given_site=True),
    "neuroharmonize": Method("neuroHarmonize, no label", neuroharmonize, {}, "neuroHarmonize"),
    "neuroharmonize-mean": Method(
        "neuroHarmonize, label at mean", neuroharmonize, {"label": "mean"}, "neuroHarmonize"
    ),
    "neuroharmonize-given": Method(
        "neuroHarmonize, label", neuroharmonize, {"label": "given"}, "neuroHarmonize", given_labels=True
    ),
    "neurocombat": Method("neuroCombat, label at mean", neurocombat, {}, "neuroCombat"),
    "combatlearn": _combatlearn("combatlearn, no label"),
    "combatlearn-mean": _combatlearn("combatlearn, label at mean", method="fortin", label="mean"),
    "combatlearn-given": _combatlearn("combatlearn, label", method="fortin", label="given"),
    "covbat": _combatlearn("CovBat, no label", method="chen"),
    "covbat-mean": _combatlearn("CovBat, label at mean", method="chen", label="mean"),
    "covbat-given": _combatlearn("CovBat, label", method="chen", label="given"),
    "gam": _combatlearn("ComBat-GAM, age kept", method="gam", smooth_age=True),
    "leace": Method("LEACE", leace, {}, "concept-erasure"),
    "leace-within": Method("LEACE within labels", eraser),
    "splince": Method("SPLINCE", eraser, {"within_labels": False, "preserve_labels": True}),
    "weights": Method("balancing weights", nothing, weighted=True),
}

NETWORKS = {
    "network": "network, nothing done",
    "network-layer": "network with mdnorm's layer",
    "network-leace": "network, LEACE within labels",
}


def installed(package: str) -> str | None:
    """Return the version of a package that is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --------------------------------------------------------------------------------------------------------
# One fold
# --------------------------------------------------------------------------------------------------------


def prepared(train: Table, held_out: Table) -> tuple[Table, Table]:
    """Return both with medians for missing values and of variance 1, as of the training rows."""
    medians = np.nanmedian(train.features, axis=0)

    def filled(table: Table) -> Floats:
        return np.where(np.isnan(table.features), medians, table.features)

    scaler = StandardScaler().fit(filled(train))
    varies = scaler.var_ > 0

    def scaled(table: Table) -> Table:
        features: Floats = scaler.transform(filled(table))[:, varies]
        return Table(features, table.site, table.target, table.age)

    return scaled(train), scaled(held_out)


def class_weights(target: NDArray[Any]) -> Floats:
    """Return weights under which both classes count the same; ones for numbers."""
    if target.dtype.kind == "f":
        return np.ones(len(target))
    share = target.mean()
    weights: Floats = np.where(target == 1, 0.5 / share, 0.5 / (1 - share))
    return weights


_WIDTHS = (0.1, 0.3, 1.0)


def _machine(features: Floats, train: Table, weights: Floats) -> Any:
    """Return a support vector machine, its width of three the best in three folds of the training rows."""
    kind: Any = SVR(epsilon=0.05) if train.is_regression else SVC()
    target = train.target if train.is_regression else 2.0 * train.target - 1
    scores = dict.fromkeys(_WIDTHS, 0.0)
    split: Any = KFold if train.is_regression else StratifiedKFold
    for used, kept in split(3, shuffle=True, random_state=0).split(features, train.target):
        for width in _WIDTHS:
            model = clone(kind).set_params(gamma=width / features.shape[1])
            model.fit(features[used], target[used], sample_weight=weights[used])
            if train.is_regression:
                scores[width] -= np.abs(model.predict(features[kept]) - target[kept]).sum()
            else:
                scores[width] += roc_auc_score(target[kept], model.decision_function(features[kept]))
    best = max(scores, key=lambda width: scores[width])
    return kind.set_params(gamma=best / features.shape[1])


_PENALTIES = np.geomspace(0.1, 1e5, 25)


def read_task(train: Table, features: Floats, held_out: Floats, weights: Floats | None = None) -> Floats:
    """Return what both readers predict of held-out rows (2, n): numbers, or scores whose sign counts."""
    scaler = StandardScaler().fit(features)
    used = scaler.var_ > 0
    total = class_weights(train.target) * (1 if weights is None else weights)
    target = train.target if train.is_regression else 2.0 * train.target - 1
    model = RidgeCV(alphas=_PENALTIES)
    known, asked = (scaler.transform(rows)[:, used] for rows in (features, held_out))
    model.fit(known, target, sample_weight=total)
    machine = _machine(known, train, total).fit(known, target, sample_weight=total)
    scores = machine.predict(asked) if train.is_regression else machine.decision_function(asked)
    return np.stack([model.predict(asked), scores])


def losses(predicted: Floats, target: NDArray[Any]) -> Floats:
    """Return for each row the error in years, or 1 where the class is right and 0 where it is not."""
    if target.dtype.kind == "f":
        error: Floats = np.abs(np.exp(predicted) - np.exp(target))
        return error
    right: Floats = ((predicted > 0) == (target == 1)).astype(np.float64)
    return right


def site_weights(train: Table) -> Floats:
    columns = one_hot(train.site, sorted(set(train.site)), 1)
    return balancing_weights(train.target, columns).weights.numpy()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence packages that print their progress or warn about their own code."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def apply(method: Method, train: Table, held_out: Table) -> tuple[Floats, Floats]:
    """Return the features of the held-out rows, and the losses of the task there.

    Raises
    ------
    CannotError
        The method cannot do this: what it raised is in the message.
    """
    if method.package in _KNOWN_SITES_ONLY and set(held_out.site) - set(train.site):
        raise CannotError("takes no rows of a site that it was not fitted on")
    try:
        with quiet():
            weights = site_weights(train) if method.weighted else None
            transform = method.fit(train, **method.options)
            before, after = transform(train), transform(held_out)
    except CannotError:
        raise
    except Exception as error:  # whatever another package raises is its result
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CannotError(f"{type(error).__name__}: {reason}") from error
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise CannotError("its output has values that are not finite")
    return after, losses(read_task(train, before, after, weights), held_out.target)


# --------------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------------


def label_groups(target: NDArray[Any]) -> Integers:
    """Return classes, or quarters of a number."""
    if target.dtype.kind == "f":
        return np.unique(np.asarray(quantile_groups(target, 4)), return_inverse=True)[1].astype(np.int64)
    return target.astype(np.int64)


def left_of_site(features: Floats, table: Table, seed: int) -> dict[str, float]:
    """Return what held-out features tell of the site."""
    found: dict[str, float] = {}
    columns = one_hot(table.site, sorted(set(table.site)))
    found["dcor2"] = distance_correlation_sqr(features, columns)
    found["dcor2_within"] = conditional_distance_correlation_sqr(
        features, columns, label_groups(table.target)
    ).mean
    for model in ("linear", "nonlinear"):
        result = probe(features, table.site, model=model, num_permutations=0, num_landmarks=100, seed=seed)
        found[model] = result.score
    return {name: round(float(value), 5) for name, value in found.items()}


def task_groups(table: Table, scheme: str) -> Integers:
    """Return groups of rows that count the same, however many rows they have: classes, sites or both."""
    parts = [np.zeros(len(table.target), dtype=str)] if table.is_regression else [table.target.astype(str)]
    if scheme == "left-out":
        parts.append(table.site)
    names = ["|".join(row) for row in zip(*parts, strict=True)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def grouped_mean(values: Floats, groups: Integers) -> float:
    """Return the mean of the means of groups."""
    return float((np.bincount(groups, values) / np.bincount(groups)).mean())


def bootstrap_interval(values: Floats, groups: Integers, seed: int, draws: int = 2000) -> list[float]:
    """Return the mean and its 95 % percentile interval, rows drawn again within groups."""
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for group in range(int(groups.max()) + 1):
        chosen = values[groups == group]
        means += chosen[rng.integers(len(chosen), size=(draws, len(chosen)))].mean(axis=1)
    low, high = np.quantile(means / (groups.max() + 1), [0.025, 0.975])
    return [round(value, 5) for value in (grouped_mean(values, groups), float(low), float(high))]


# --------------------------------------------------------------------------------------------------------
# Schemes
# --------------------------------------------------------------------------------------------------------


def folds(table: Table, scheme: str, repeat: int, seed: int) -> Iterator[tuple[Integers, Integers]]:
    """Yield training and held-out rows."""
    everything = np.arange(len(table.site))
    if scheme == "left-out":
        for site in sorted(set(table.site)):
            yield everything[table.site != site], everything[table.site == site]
        return
    parts = [table.site] if table.is_regression else [table.site, table.target.astype(str)]
    strata = ["|".join(row) for row in zip(*parts, strict=True)]
    number = 5 if scheme == "within" else 2
    split = StratifiedKFold(number, shuffle=True, random_state=1000 * seed + repeat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a stratum of fewer rows than folds
        yield from split.split(everything, strata)


def run_tables(
    name: str, table: Table, scheme: str, methods: Sequence[str], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Return rows of results: a repeat of a method, its difference to nothing done, or why it cannot."""
    rows: list[dict[str, Any]] = []
    groups = task_groups(table, scheme)
    repeats = 1 if scheme == "left-out" else repeats
    raw: Floats | None = None
    for key in methods:
        method, total = METHODS[key], np.zeros((2, len(table.site)))
        if method.given_site and scheme != "left-out":
            continue
        row: dict[str, Any] = {"case": name, "scheme": scheme, "method": key, "package": _version(method)}
        print(f"{name}, {scheme}, {method.title}", file=sys.stderr, flush=True)
        try:
            found = [_repeat(table, scheme, method, repeat, seed) for repeat in range(repeats)]
        except CannotError as error:
            rows.append(row | {"cannot": str(error)})
            continue
        for repeat, (loss, measured) in enumerate(found):
            total += loss / repeats
            rows.append(row | {"repeat": repeat} | _task(loss, groups) | measured)
            if scheme == "left-out":
                sites = {site: _site_score(loss[0], table, site) for site in sorted(set(table.site))}
                rows[-1]["sites"] = sites
        raw = total if key == "raw" else raw
        if raw is not None and key != "raw":
            rows.append(row | _differences(total - raw, groups, seed))
    return rows


def _task(loss: Floats, groups: Integers) -> dict[str, float]:
    return {
        name: round(grouped_mean(part, groups), 5)
        for name, part in zip(("task", "task_svm"), loss, strict=False)
    }


def _differences(difference: Floats, groups: Integers, seed: int) -> dict[str, list[float]]:
    names = ("difference", "difference_svm")
    return {
        name: bootstrap_interval(part, groups, seed) for name, part in zip(names, difference, strict=False)
    }


def _version(method: Method) -> str:
    return "mdnorm" if method.package == "mdnorm" else f"{method.package} {installed(method.package)}"


def _site_score(loss: Floats, table: Table, site: str) -> float:
    here = table.site == site
    return round(grouped_mean(loss[here], task_groups(table.rows(here), "within")), 5)


def _repeat(
    table: Table, scheme: str, method: Method, repeat: int, seed: int
) -> tuple[Floats, dict[str, float]]:
    """Return the loss of every row, each held out once, and what the held-out features tell of the site."""
    loss, parts = np.zeros((2, len(table.site))), []
    for train_rows, rows in folds(table, scheme, repeat, seed):
        train, held_out = prepared(table.rows(train_rows), table.rows(rows))
        features, loss[:, rows] = apply(method, train, held_out)
        parts.append((rows, features))
    if scheme == "left-out" or min(part.shape[1] for _, part in parts) < max(p.shape[1] for _, p in parts):
        return loss, {}
    joined = np.zeros((len(table.site), parts[0][1].shape[1]))
    for rows, features in parts:
        joined[rows] = features
    return loss, left_of_site(joined, table, seed)


# --------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------

_WIDTH, _BATCH, _EPOCHS, _PATIENCE = 64, 64, 60, 10


def train_network(train: Table, layer: bool, seed: int) -> tuple[torch.nn.Sequential, Callable[..., Any]]:
    """Return a network of one hidden layer, stopped where rows kept for that have the smallest loss."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    levels = sorted(set(train.site))
    width = train.features.shape[1]
    model = torch.nn.Sequential(
        torch.nn.Linear(width, _WIDTH), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(_WIDTH, 1)
    )
    center, scale = (train.target.mean(), train.target.std()) if train.is_regression else (0.0, 1.0)
    x = torch.from_numpy(train.features).float()
    y = torch.from_numpy((train.target - center) / scale).float()[:, None]
    weights = torch.from_numpy(class_weights(train.target)).float()[:, None]

    def columns(table: Table) -> torch.Tensor:
        return torch.from_numpy(one_hot(table.site, levels, 1)).float()

    metadata = columns(train)
    if layer:
        example = x[:2]
        mdnorm.insert(model, after="0", num_metadata=len(levels) - 1, num_labels=1, example=example)

    def with_metadata(rows: Any, known: bool) -> Any:
        if not layer:
            return contextlib.nullcontext()
        return mdnorm.metadata(model, metadata[rows], y[rows] if known else None)

    def loss_of(rows: Any) -> torch.Tensor:
        out = model(x[rows])
        if train.is_regression:
            squares: torch.Tensor = (weights[rows] * (out - y[rows]) ** 2).mean()
            return squares
        return torch.nn.functional.binary_cross_entropy_with_logits(out, y[rows], weights[rows])

    order = rng.permutation(len(x))
    kept, used = order[: len(x) // 5], order[len(x) // 5 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    best, best_state, since = np.inf, {}, 0
    for _ in range(_EPOCHS):
        model.train()
        shuffled = rng.permutation(used)
        for rows in np.array_split(shuffled, max(1, len(used) // _BATCH)):
            with with_metadata(rows, known=True):
                loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad(), with_metadata(kept, known=False):
            current = float(loss_of(kept))
        if current < best:
            best, since = current, 0
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            since += 1
            if since == _PATIENCE:
                break
    model.load_state_dict(best_state)
    if layer:
        mdnorm.recalibrate(model, [(x, metadata, y)], progress=False)
    model.eval()

    def outputs(table: Table) -> tuple[Floats, Floats]:
        """Return hidden features and predictions."""
        features = torch.from_numpy(table.features).float()
        with torch.no_grad(), mdnorm.metadata(model, columns(table)) if layer else contextlib.nullcontext():
            hidden = model[:2](features)
            predicted = model[2:](hidden)[:, 0]
        values = predicted.double().numpy()
        return hidden.double().numpy(), values * scale + center

    return model, outputs


def run_networks(name: str, table: Table, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Return rows as `run_tables`; the site is measured in each held-out half."""
    groups = task_groups(table, "networks")
    keys = ["raw", *NETWORKS]
    total = {key: np.zeros(len(table.site)) for key in keys}
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        print(f"{name}, networks, repeat {repeat}", file=sys.stderr, flush=True)
        loss = {key: np.zeros(len(table.site)) for key in keys}
        measured: dict[str, list[dict[str, float]]] = {key: [] for key in keys}
        for part, (train_rows, held_rows) in enumerate(folds(table, "networks", repeat, seed)):
            train, held_out = prepared(table.rows(train_rows), table.rows(held_rows))
            features: dict[str, Floats] = {}
            features["raw"], found = apply(METHODS["raw"], train, held_out)
            loss["raw"][held_rows] = found[0]
            with quiet():
                fitted = {
                    key: train_network(train, layer, 1000 * seed + 2 * repeat + part)[1]
                    for key, layer in (("network", False), ("network-layer", True))
                }
                for key, outputs in fitted.items():
                    features[key], predicted = outputs(held_out)
                    loss[key][held_rows] = losses(predicted, held_out.target)
                hidden = Table(fitted["network"](train)[0], train.site, train.target)
                transform = eraser(hidden)
                before = transform(hidden)
                after = transform(Table(features["network"], held_out.site, held_out.target))
            features["network-leace"] = after
            predicted = read_task(train, before, after)[0]
            loss["network-leace"][held_rows] = losses(predicted, held_out.target)
            for key in keys:
                measured[key].append(left_of_site(features[key], held_out, seed))
        for key in keys:
            total[key] += loss[key] / repeats
            mean = {
                what: round(float(np.mean([part[what] for part in measured[key]])), 5)
                for what in measured[key][0]
            }
            row = {"case": name, "scheme": "networks", "method": key, "package": "mdnorm", "repeat": repeat}
            rows.append(row | _task(loss[key][None], groups) | mean)
    for key in keys[1:]:
        interval = bootstrap_interval(total[key] - total["raw"], groups, seed)
        rows.append({"case": name, "scheme": "networks", "method": key, "difference": interval})
    return rows


# --------------------------------------------------------------------------------------------------------
# Printing
# --------------------------------------------------------------------------------------------------------

_ALL = [*METHODS, *NETWORKS]


def _mean_and_deviation(values: Sequence[float], factor: float, digits: int) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{factor * np.mean(values):.{digits}f} ± {factor * deviation:.{digits}f}"


def printed(rows: list[dict[str, Any]], case: str, scheme: str) -> str:
    """Return a table of at most 100 columns: means and deviations over repeats (left-out: over sites)."""
    is_age = case == "abide-age"
    factor, digits = (1.0, 2) if is_age else (100.0, 1)
    sizes = (29, 11, 20, 4, 3, 3, 6)
    names = ("method", "error" if is_age else "right", "against nothing done", "svm", "lin", "non", "within")
    rule = [("-" * (size - 1) + ":") if place else "-" * size for place, size in enumerate(sizes)]
    lines = [_line(names, sizes), _line(rule, sizes)]
    for key in _ALL:
        mine = [
            row for row in rows if (row["case"], row.get("scheme"), row.get("method")) == (case, scheme, key)
        ]
        title = METHODS[key].title_for(is_age) if key in METHODS else NETWORKS[key]
        repeats = [row for row in mine if "task" in row]
        if not mine or not repeats:
            continue
        over = list(repeats[0]["sites"].values()) if scheme == "left-out" else [r["task"] for r in repeats]
        difference = next((row["difference"] for row in mine if "difference" in row), None)
        against = ""
        if difference:
            mean, low, high = (factor * value for value in difference)
            against = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        cells = [title, _mean_and_deviation(over, factor, digits), against]
        for name, times, places in (
            ("task_svm", factor, digits), ("linear", 100, 0), ("nonlinear", 100, 0), ("dcor2_within", 1, 3)
        ):  # fmt: skip
            found = [row[name] for row in repeats if name in row]
            cells.append(f"{times * np.mean(found):.{places}f}" if found else "")
        lines.append(_line([cells[0], *(cell.replace("-", "−") for cell in cells[1:])], sizes))
    return "\n".join(lines)


def _line(cells: Sequence[str], sizes: Sequence[int]) -> str:
    padded = [
        f"{cell:<{size}}" if not place else f"{cell:>{size}}"
        for place, (cell, size) in enumerate(zip(cells, sizes, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"


def reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Return why methods could not be used, a line for each reason."""
    methods: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "cannot" in row:
            reason = row["cannot"].split(":")[0 if "Error" not in row["cannot"] else 1].strip()
            methods.setdefault((row["case"], row["scheme"], reason), []).append(METHODS[row["method"]].title)
    return [
        f"{case}, {scheme}: cannot be used ({reason}): {'; '.join(titles)}"
        for (case, scheme, reason), titles in methods.items()
    ]


def as_json(rows: list[dict[str, Any]]) -> str:
    """Return the rows as JSON, a line each, in the order of cases, schemes and methods."""
    place = {name: index for index, name in enumerate([*CASES, *SCHEMES, *_ALL])}
    rows.sort(
        key=lambda row: [
            place[row["case"]],
            place.get(row.get("scheme", ""), -1),
            place.get(row.get("method", ""), -1),
            row.get("repeat", np.inf),
        ]
    )
    text = ",\n".join(json.dumps(row) for row in rows)
    return f"[\n{text}\n]\n"


def show(rows: list[dict[str, Any]]) -> None:
    for case in CASES:
        for scheme in SCHEMES:
            if any((row["case"], row["scheme"]) == (case, scheme) for row in rows if "scheme" in row):
                print(f"{CASES[case].title} ({scheme})\n\n{printed(rows, case, scheme)}\n")
    for line in [*(row["about"] for row in rows if "about" in row), *reasons(rows)]:
        print(line)


# --------------------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of the tables")
    parser.add_argument("--out", type=Path, help="JSON file; results of other cases and schemes stay in it")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--network-repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stored", action="store_true", help="print the tables of --out again")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))
    if options.stored:
        if not rows:
            parser.error("--stored needs --out with results")
        show(rows)
        return 0
    if options.data is None:
        parser.error("--data names the folder of the tables (see --help)")
    if not options.data.is_dir():
        print(f"error: {options.data} is not a folder.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    methods = [key for key in METHODS if key in (*options.methods, "raw")]
    for package in dict.fromkeys(METHODS[key].package for key in methods):
        if package != "mdnorm" and installed(package) is None:
            print(f"{package} is not installed: its methods are skipped", file=sys.stderr)
            methods = [key for key in methods if METHODS[key].package != package]
    done = 0
    for case in options.cases:
        lacking = [name for name in CASES[case].files if not (options.data / name).is_file()]
        if lacking:
            print(f"{case} is skipped: {', '.join(lacking)} not in the folder", file=sys.stderr)
            continue
        try:
            table = CASES[case].read(options.data)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        done += 1
        size = f"{len(table.site)} rows, {table.features.shape[1]} features, {len(set(table.site))} sites"
        rows = [row for row in rows if (row["case"], row.get("about") is not None) != (case, True)]
        rows.append({"case": case, "about": f"{CASES[case].title}: {size}; " + "; ".join(table.notes)})
        for scheme in options.schemes:
            replaced = {*NETWORKS, "raw"} if scheme == "networks" else set(methods)
            rows = [
                row
                for row in rows
                if (row["case"], row.get("scheme")) != (case, scheme) or row["method"] not in replaced
            ]
            if scheme == "networks":
                rows += run_networks(case, table, options.network_repeats, options.seed)
            else:
                rows += run_tables(case, table, scheme, methods, options.repeats, options.seed)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomically(options.out, as_json(rows))
    if not done:
        print("error: no table of any case is in the folder (see --help).", file=sys.stderr)
        return 2
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
