"""What an audit found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ColumnAudit", "Finding", "Measure", "Projection", "Representation"]


@dataclass(frozen=True)
class Measure:
    """A number with what is needed to judge it.

    Attributes
    ----------
    name : str
        "dcor²", "R²", "balanced accuracy".
    value : float
    chance : float
        The value where the features know nothing: 0, or 1 / number of classes.
    num_rows : int
    low, high : float or None
        Limits of the interval, where there is one.
    p_value : float or None
        With `explained_by_label`: whether the features know more than the label tells.
    explained_by_label : float or None
        The value that features reach which know of the column only what the label tells.
    notes : tuple of str
    """

    name: str
    value: float
    chance: float
    num_rows: int
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    explained_by_label: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """How far the value is from chance (0) to the best possible (1)."""
        return (self.value - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class Representation:
    """What one set of features knows about one metadata column.

    Attributes
    ----------
    dependence : Measure
        dcor² over all rows.
    dependence_within : Measure or None
        Mean of dcor² over the label classes, weighted by their rows.
    dependence_by_class : mapping
        Of label classes.
    probes, probes_within : mapping
        "linear", "nonlinear" → the cross-validated score, over all rows and within the label classes (empty
        where no class can be probed).
    group_gaps : mapping or None
        Of the predictions that belong to the features, as of `mdnorm.metrics.GroupGaps.to_dict`.
    """

    dependence: Measure
    dependence_within: Measure | None
    dependence_by_class: Mapping[str, Measure]
    probes: Mapping[str, Measure]
    probes_within: Mapping[str, Measure]
    group_gaps: Mapping[str, Any] | None = None

    @property
    def best_probe(self) -> tuple[str, Measure]:
        """The model and score of the probe that finds most."""
        return max(self.probes.items(), key=lambda item: item[1].value)

    @property
    def best_probe_within(self) -> tuple[str, Measure] | None:
        """As `best_probe`, within label classes."""
        if not self.probes_within:
            return None
        return max(self.probes_within.items(), key=lambda item: item[1].value)

    @property
    def shown_dependence(self) -> Measure:
        """The dependence that an overview shows: within label classes where there is one."""
        return self.dependence_within or self.dependence

    @property
    def shown_probe(self) -> Measure:
        """The score that an overview shows: the best one, within label classes where there is one."""
        return (self.best_probe_within or self.best_probe)[1]


@dataclass(frozen=True)
class ColumnAudit:
    """One metadata column against every set of features.

    Attributes
    ----------
    name, kind, description, note : str
        As read (see `mdnorm.auditing.columns.Column`).
    num_rows, num_missing : int
        Rows used, and rows without a value, among the rows of the audit.
    is_label : bool
        Whether it is the label: what the features *should* know.
    association_with_label : float or None
        dcor² of the column and the label: how far the data themselves are confounded.
    representations : mapping
        "before" and, if given, "after".
    """

    name: str
    kind: str
    description: str
    note: str
    num_rows: int
    num_missing: int
    is_label: bool
    association_with_label: float | None
    representations: Mapping[str, Representation]


@dataclass(frozen=True)
class Finding:
    """A sentence in plain words.

    Attributes
    ----------
    topic : {"change", "dependence", "gap", "label", "confounding"}
        What it is about: before against after, one set of features, predictions by group, the label, or label
        and column that go together in the data.
    level : {"strong", "weak", "none", "note"}
        How much was found; "note" for what the reader should know.
    text : str
    column : str
    """

    topic: str
    level: str
    text: str
    column: str

    @property
    def badge(self) -> str:
        """One or two words for the level."""
        return _BADGES.get((self.topic, self.level), "note")


_BADGES = {
    ("change", "strong"): "still there",
    ("change", "weak"): "partly gone",
    ("change", "none"): "not found",
    ("dependence", "strong"): "clearly found",
    ("dependence", "weak"): "found",
    ("dependence", "none"): "not found",
    ("gap", "weak"): "gap",
    ("gap", "none"): "no clear gap",
}


@dataclass(frozen=True)
class Projection:
    """Two principal components of a set of features.

    Attributes
    ----------
    points : (m, 2) array
    shares : (2,) sequence of float
        Of the features' variance.
    rows : (m,) array of int
        Which rows of the audit they are.
    """

    points: NDArray[np.float64]
    shares: Sequence[float]
    rows: NDArray[np.int64] = field(repr=False)


def as_json(value: Any) -> Any:
    """Return dataclasses as dictionaries, recursively, and NaN as None."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_json(part) for name, part in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
