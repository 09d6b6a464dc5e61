"""What an audit found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mdnorm.metrics import GroupGaps


@dataclass(frozen=True)
class FeatureSet:
    """Features of the rows of an audit: one treatment, on all rows or on those of one part."""

    treatment: str
    # "", "training rows" or "held-out rows".
    part: str
    # What the reader calls the treatment.
    title: str
    # (n, p), standardised unless the raw ones were asked for.
    values: NDArray[np.float64] = field(repr=False)
    # Uncorrelated components of equal variance; None where there are too few rows for them.
    whitened: NDArray[np.float64] | None = field(repr=False)
    # Which of the n rows count.
    rows: NDArray[np.bool_] = field(repr=False)
    # The set to compare with: the first treatment, on the same rows.
    reference: str | None = None
    # Whether its verdict counts: not that of features before a treatment, nor of rows a treatment was fitted
    # on where there are others.
    is_decisive: bool = True

    @property
    def full_title(self) -> str:
        """The title with the part: for a table."""
        return f"{self.title}, {self.part}" if self.part else self.title

    @property
    def in_a_sentence(self) -> str:
        """The same within a sentence: a title that does not say that it is a name stands in quotes."""
        title = self.title if self.title.startswith(("the ", "these ")) else f"“{self.title}”"
        return f"{title} ({self.part})" if self.part else title


@dataclass(frozen=True)
class Measure:
    """A number, and what is needed to judge it."""

    # "dcor²", "R²", "balanced accuracy".
    name: str
    value: float
    # The expected value where the features know nothing: 0, or 1 / number of classes.
    chance: float
    num_rows: int
    # Limits of the interval, where there is one.
    low: float | None = None
    high: float | None = None
    # Of the test against chance; with `explained_by_label`, of the test whether the features know more than
    # the label tells.
    p_value: float | None = None
    # The value of features that know of the column only what the label tells.
    explained_by_label: float | None = None
    notes: tuple[str, ...] = ()
    # See `mdnorm.metrics.probes.ProbeScore`.
    tail_p_value: float | None = None

    @property
    def share(self) -> float:
        """How far the value is from chance (0) to the best possible (1)."""
        return self.as_share(self.value)

    def as_share(self, value: float) -> float:
        """Return how far a value of this measure is from chance (0) to the best possible (1)."""
        return (value - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class Representation:
    """What one set of features knows about one metadata column."""

    # dcor² over all rows.
    dependence: Measure
    # Given the label: mean of dcor² over the label classes, weighted by their rows; of a continuous label,
    # dcor² of what smooth functions of the label leave of features and column.
    dependence_within: Measure | None
    dependence_by_class: Mapping[str, Measure]
    # `shown_dependence`, but of whitened features, in which all directions count equally.
    whitened: Measure | None
    # The cross-validated score of the "linear" and the "nonlinear" model, over all rows, and given the label
    # (empty where that cannot be probed).
    probes: Mapping[str, Measure]
    probes_within: Mapping[str, Measure]
    # Logarithm of the linear association of features and column, in standard deviations from its mean under
    # permutation. Far below 0 it is smaller than chance makes it: the column was removed from these rows.
    association_z: float
    # Rates by group of the predictions that belong to the features.
    group_gaps: GroupGaps | None = None
    # Why there are none where there are predictions.
    why_no_gaps: str = ""
    # For predicted numbers: dcor² of prediction and column given the target.
    prediction_test: Measure | None = None

    @property
    def shown_dependence(self) -> Measure:
        """The dependence that an overview shows: given the label where there is one."""
        return self.dependence_within or self.dependence

    @property
    def shown_probes(self) -> Mapping[str, Measure]:
        """The probes that an overview shows: given the label where there are such."""
        return self.probes_within or self.probes

    @property
    def shown_probe(self) -> Measure:
        """The best of `shown_probes`."""
        return max(self.shown_probes.values(), key=lambda measure: measure.value)


@dataclass(frozen=True)
class ColumnAudit:
    """One metadata column against every set of features; name, kind and note are those of the `Column`."""

    name: str
    kind: str
    description: str
    note: str
    # Rows used, and rows without a value, among the rows of the audit.
    num_rows: int
    num_missing: int
    # See `Column`.
    num_codes: int
    # What is meant to happen to it: "remove", "keep" or "label".
    role: str
    # dcor² of the column and the label: how strongly the data themselves are confounded.
    association_with_label: float | None
    # By the names of the sets of features.
    representations: Mapping[str, Representation]

    @property
    def is_label(self) -> bool:
        """Whether it is the label."""
        return self.role == "label"


@dataclass(frozen=True)
class Finding:
    """A verdict with its sentence, a `text` in plain words.

    The `topic` is what features know ("dependence"), predictions by group ("gap") or given the label
    ("prediction"), a label and a column that are associated in the data ("confounding"), or what kind of
    column it was taken for ("kind"). The `level` is harm ("strong"), little ("weak"), undecided ("open"),
    "none", or "note", something the reader should know; the `badge` says it in words. `column` and `key` are
    the names of the column and of the set of features. What `is_decisive` is part of the verdict on the
    column.
    """

    topic: str
    level: str
    badge: str
    text: str
    column: str
    key: str = ""
    is_decisive: bool = True


@dataclass(frozen=True)
class Projection:
    """Two principal components of a set of features."""

    # (m, 2), and the shares of the features' variance.
    points: NDArray[np.float64]
    shares: Sequence[float]
    # (m,), which rows of the audit they are.
    rows: NDArray[np.int64] = field(repr=False)
    # Whether the axes are those of all treatments together.
    is_shared: bool = False
