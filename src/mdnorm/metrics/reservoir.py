"""Rows of a stream: checked, sampled in bounded memory, and turned into distance correlations.

A uniform sample of a stream without replacement: every row gets a random key, and the rows with the smallest
keys are kept. Samples of several streams merge by the same rule, since the smallest keys of a union are among
the smallest of its parts (Vitter 1985 calls such a sample a reservoir; random keys are due to Fan, Muller &
Rezucha 1962).

Vitter, J. S. (1985). Random sampling with a reservoir. ACM Transactions on Mathematical Software, 11(1).
Fan, C. T., Muller, M. E., & Rezucha, I. (1962). Development of sampling plans by using sequential (item by
item) selection techniques and digital computers. Journal of the American Statistical Association, 57(298).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mdnorm.arrays import as_real_tensor, statistics_dtype
from mdnorm.metrics import samples
from mdnorm.metrics.checks import check_same_rows
from mdnorm.metrics.distance_correlation import distance_correlation_sqr
from mdnorm.metrics.samples import MIN_SAMPLES, check_finite

ColumnNames = Sequence[str] | Mapping[str, Sequence[int]]

# The value of all columns together; no column may have this name.
JOINT = "joint"


class TooFewSamplesError(ValueError):
    """A distance correlation is asked for of fewer samples than it is defined for."""


@dataclass(frozen=True)
class Rows:
    """Rows of one or several batches."""

    # (n, D) float32, and (n, K) float64 (float32 on a device without it).
    features: Tensor
    metadata: Tensor
    # (n,) int64, 0 where they do not matter.
    labels: Tensor
    # (n,) int64, random, distinct and not negative; 0 where all rows are kept.
    keys: Tensor

    def __len__(self) -> int:
        return self.features.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Return the rows with each part changed."""
        return Rows(*map(change, vars(self).values()))

    def take(self, chosen: Tensor) -> Rows:
        """Return the rows that a mask selects."""
        return self.map(lambda part: part[chosen])

    @staticmethod
    def cat(pieces: Sequence[Rows]) -> Rows:
        """Return the rows of all pieces; at least one."""
        _check_widths(pieces)
        parts = zip(*(vars(piece).values() for piece in pieces), strict=True)
        return pieces[0] if len(pieces) == 1 else Rows(*map(torch.cat, parts))


def _check_widths(pieces: Sequence[Rows]) -> None:
    for name in ("features", "metadata"):
        *others, last = (getattr(piece, name).shape[1] for piece in pieces)
        for width in set(others) - {last}:
            raise ValueError(
                f"{name} have {last} value(s) a sample, but {width} in other batches (of all processes): all "
                "must have the same, after flattening."
                + (" Average over positions whose number varies." if name == "features" else "")
            )


# -- columns of metadata ----------------------------------------------------------------------------------


def check_column_names(column_names: ColumnNames | None) -> None:
    """Check names of metadata columns, as far as that goes without knowing how many columns there are."""
    if column_names is None:
        return
    if isinstance(column_names, str) or not isinstance(column_names, (Sequence, Mapping)):
        raise TypeError(
            "column_names must be a sequence of strings, one for each metadata column, or a mapping from "
            f"names to lists of column indices, got {column_names!r}."
        )
    names = list(column_names)
    if not names:
        raise ValueError("column_names is empty: give one name for each metadata column, or None.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"column_names must be strings, got {name!r}.")
        if name == JOINT:
            raise ValueError(
                f"column_names must not contain {JOINT!r}: that is the name of the value of all columns "
                "together, choose another name."
            )
        if names.count(name) > 1:
            raise ValueError(f"column_names has {name!r} {names.count(name)} times: names must differ.")
    if not isinstance(column_names, Mapping):
        return
    for name, columns in column_names.items():
        if isinstance(columns, (str, int)) or any(type(column) is not int for column in columns):
            raise TypeError(
                f"column_names[{name!r}] must be a list of column indices, got {columns!r}: "
                "{'age': [0], 'site': [1, 2, 3]}, for example."
            )
        if len(columns) == 0:
            raise ValueError(f"column_names[{name!r}] is empty: give at least one column index.")


def column_groups(
    column_names: ColumnNames | None, num_columns: int, argument: str = "column_names"
) -> dict[str, list[int]]:
    """Return the column indices of each name; without names, columns are ``column_0, column_1, …``."""
    if column_names is None:
        return {f"column_{index}": [index] for index in range(num_columns)}
    if not isinstance(column_names, Mapping):
        if len(column_names) != num_columns:
            raise ValueError(
                f"{argument} has {len(column_names)} name(s) ({', '.join(column_names)}) but the metadata "
                f"have {num_columns} column(s): give one name for each, or a mapping from names to lists of "
                "column indices."
            )
        return {name: [index] for index, name in enumerate(column_names)}
    for name, columns in column_names.items():
        bad = [column for column in columns if not 0 <= column < num_columns]
        if bad:
            raise ValueError(
                f"{argument}[{name!r}] has column {bad[0]}, but the metadata have {num_columns} column(s), "
                f"0 to {num_columns - 1}."
            )
    return {name: list(columns) for name, columns in column_names.items()}


# -- batches ----------------------------------------------------------------------------------------------


def as_rows(
    features: Tensor | ArrayLike,
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None,
    device: torch.device,
) -> Rows:
    """Check a batch, as of `DistanceCorrelation.update`, and return a copy of it as rows of key 0."""
    features = as_real_tensor(features, "features").detach()
    if features.ndim == 0:
        raise ValueError("features must have one row per sample, shape (n, ...), got a single number.")
    num_samples = features.shape[0]
    features = features.reshape(num_samples, features.shape[1:].numel())
    if features.shape[1] == 0:
        raise ValueError("features have no values in a sample: check how they were selected.")
    metadata = samples.as_rows(metadata, "metadata")
    check_same_rows(features=num_samples, metadata=len(metadata))
    if labels is not None:
        labels = as_class_indices(labels)
        check_same_rows(features=num_samples, labels=len(labels))
    # A copy: the layer behind may work in place on what it was given.
    features = features.to(device, torch.float32, copy=True)
    metadata = metadata.to("cpu" if device.type == "mps" else device)
    metadata = metadata.to(statistics_dtype(device), copy=True).to(device)
    every = "features and metadata"
    check_finite(features, "features", every, "in float32, in which they are kept, ")
    check_finite(metadata, "metadata", every)
    zeros = torch.zeros(num_samples, dtype=torch.int64, device=device)
    return Rows(features, metadata, zeros if labels is None else labels.to(device), zeros)


def as_class_indices(labels: Tensor | ArrayLike, name: str = "labels") -> Tensor:
    """Return labels (n,) or (n, 1) as a copy of int64; ValueError where they are no whole numbers."""
    labels = as_real_tensor(labels, name).detach()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != 1:
        raise ValueError(
            f"{name} must be class indices of shape (n,) or (n, 1), got {tuple(labels.shape)}; one-hot "
            f"columns become class indices by {name}.argmax(1)."
        )
    indices = labels.to(torch.int64, copy=True)
    if labels.is_floating_point() and not bool((indices == labels).all()):
        row = int((indices != labels).nonzero()[0])
        raise ValueError(
            f"{name} must be class indices, got {labels[row].item()} in row {row}: a continuous label has no "
            "classes within which to measure."
        )
    return indices


# -- samples ----------------------------------------------------------------------------------------------


def sample_keys(start: int, count: int, *, seed: int, rank: int = 0) -> Tensor:
    """Return the random keys of rows ``start … start + count − 1`` of the stream of a process.

    A key depends on the row's place in the stream only, not on the batches in which the stream comes: they
    are the numbers of Philox, a generator that counts (Salmon, Moraes, Dror & Shaw 2011, Parallel random
    numbers: as easy as 1, 2, 3. SC '11). int64 on the CPU, in [0, 2^63).
    """
    generator = np.random.Philox(key=np.array([seed % 2**64, rank], np.uint64))
    # One step gives four numbers.
    generator.advance(start // 4)
    numbers = generator.random_raw(start % 4 + count)[start % 4 :]
    return torch.from_numpy((numbers >> np.uint64(1)).astype(np.int64))


def add_rows(pieces: Sequence[Rows], new: Rows, max_samples: int | None) -> list[Rows]:
    """Return the pieces with new rows added, at most ``2·max_samples`` rows.

    To drop every row at once would copy the sample for every batch.
    """
    _check_widths([*pieces[:1], new])
    if len(new) == 0:
        return list(pieces)
    device = pieces[0].features.device if pieces else new.features.device
    pieces = [*pieces, new.map(lambda part: part.to(device))]
    is_full = max_samples is not None and sum(map(len, pieces)) > 2 * max_samples
    return [sample(pieces, max_samples)] if is_full else pieces


def sample(pieces: Sequence[Rows], max_samples: int | None) -> Rows:
    """Return the rows of the sample; at least one piece."""
    rows = Rows.cat(pieces)
    if max_samples is None or len(rows) <= max_samples:
        return rows
    return rows.take(rows.keys <= rows.keys.kthvalue(max_samples).values)


@dataclass
class Sampling:
    """How a stream is sampled, and what of it is measured; for the settings see `DistanceCorrelation`."""

    within_labels: bool
    max_samples: int | None
    seed: int
    column_names: ColumnNames | None
    per_column: bool = True

    def __post_init__(self) -> None:
        for name, value in (("max_samples", self.max_samples), ("seed", self.seed)):
            if type(value) is not int and not (value is None and name == "max_samples"):
                raise TypeError(f"{name} must be an integer{' or None' * (name != 'seed')}, got {value!r}.")
        if self.max_samples is not None and self.max_samples < MIN_SAMPLES:
            raise ValueError(
                f"max_samples must be at least {MIN_SAMPLES}, got {self.max_samples}: the bias-corrected "
                "distance correlation is not defined for fewer samples. None keeps them all."
            )
        check_column_names(self.column_names)

    def rows(
        self, features: Any, metadata: Any, labels: Any, device: torch.device, *, start: int, rank: int = 0
    ) -> Rows:
        """Check a batch, the first row of which is number `start` of the stream, and return a copy of it."""
        if self.within_labels and labels is None:
            raise ValueError("labels are needed with within_labels=True: the last argument of update.")
        rows = as_rows(features, metadata, labels if self.within_labels else None, device)
        self._groups(rows)
        if self.max_samples is None:
            return rows
        return replace(rows, keys=sample_keys(start, len(rows), seed=self.seed, rank=rank).to(device))

    def _groups(self, rows: Rows) -> dict[str, list[int]]:
        """Return the columns of each value, by its name."""
        columns = range(rows.metadata.shape[1])
        if not self.per_column:
            return {"": list(columns)}
        groups = column_groups(self.column_names, len(columns))
        together = {column for group in groups.values() for column in group}
        return groups | ({JOINT: sorted(together)} if len(groups) > 1 else {})

    def dependence(self, pieces: Sequence[Rows]) -> Tensor | dict[str, Tensor]:
        """Return the bias-corrected dcor² of features and metadata, as `DistanceCorrelation.compute` does."""
        if sum(map(len, pieces)) < MIN_SAMPLES:
            raise TooFewSamplesError(
                f"there are only {sum(map(len, pieces))} sample(s): the bias-corrected distance correlation "
                f"needs at least {MIN_SAMPLES}, call update with more of them first."
            )
        rows = sample(pieces, self.max_samples)
        members = {"": rows}
        if self.within_labels:
            classes = rows.labels.unique().tolist()
            members = {f"label_{label}": rows.take(rows.labels == label) for label in classes}
        too_small = [f"{name[6:]} ({len(part)})" for name, part in members.items() if len(part) < MIN_SAMPLES]
        if too_small:
            raise TooFewSamplesError(
                f"label class(es) {', '.join(too_small)} have fewer than {MIN_SAMPLES} samples of "
                f"{len(rows)}: within these classes the bias-corrected distance correlation is not defined. "
                "Update with more samples, raise max_samples, or measure without within_labels."
            )
        values: dict[str, Tensor] = {
            "/".join(filter(None, (name, of_class))): distance_correlation_sqr(
                part.features, part.metadata[:, group]
            )
            for name, group in self._groups(rows).items()
            for of_class, part in members.items()
        }
        return values.get("", values)
