"""Folds of a probe, and the permutations that keep them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.metrics.columns import Categories
from mdnorm.text import listed

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# A column that varies less than this share of the largest absolute value is a constant up to rounding.
LEAST_VARIATION = 1e-12

# Values of all targets that are in memory at once, in one temporary.
CHUNK_ELEMENTS = 2**20

# Fewer subjects than this are noted, since there are few ways to exchange them.
_FEW_GROUPS = 7


class UnusableError(ValueError):
    """These rows cannot be probed: an error, or for a label class the reason to leave it out."""


@dataclass(frozen=True)
class Settings:
    """The options of a probe."""

    model: str
    num_folds: int
    num_permutations: int
    num_landmarks: int
    confidence: float
    seed: int


def _check_classes(codes: Integers, classes: Categories, subjects: Integers | None) -> int:
    """Return the number of rows, or of subjects, of the smallest class, which must be at least two."""
    counts = np.bincount(codes, minlength=len(classes.names))
    present = counts.nonzero()[0]
    if present.size < 2:
        raise UnusableError(
            f"target is constant: all of its {codes.size} rows are {classes.names[present[0]]!r}, there is "
            "nothing to predict."
        )
    if present.size == codes.size:
        raise UnusableError(
            f"target has a different value in each of its {codes.size} rows, such as "
            f"{listed([classes.names[code] for code in present], 2)}: an identifier cannot be predicted; if "
            "it is a number, pass task='regression'."
        )
    unit = "row"
    if subjects is not None:
        unit = "subject"
        pairs = np.unique(np.column_stack([codes, subjects]), axis=0)
        counts = np.bincount(pairs[:, 0], minlength=len(classes.names))
    single = [classes.names[code] for code in present if counts[code] < 2]
    if single:
        raise UnusableError(
            f"target has {len(single)} class(es) with one {unit} only: {listed(single)}. Merge them with "
            "others or drop their rows; a class must be in two folds at least."
        )
    return int(counts[present].min())


def folds(
    values: Floats | Integers,
    classes: Categories | None,
    labels: Integers | None,
    subjects: Integers | None,
    settings: Settings,
    notes: list[str],
) -> Integers:
    """Return the fold of each row, (n,): stratified by classes and labels, each subject in one fold."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    num_rows = values.size
    most = num_rows // 2
    strata = np.zeros(num_rows, dtype=np.int64)
    if classes is None:
        if np.ptp(values) == 0:
            raise UnusableError(
                f"target is constant: all of its {num_rows} rows are equal, there is nothing to predict."
            )
    else:
        strata = values.astype(np.int64)
        most = min(most, _check_classes(strata, classes, subjects))
    if subjects is not None:
        num_subjects = np.unique(subjects).size
        if num_subjects < 2:
            raise UnusableError("groups has one subject only: rows of one subject cannot be in two folds.")
        most = min(most, num_subjects)
        if num_subjects < _FEW_GROUPS:
            notes.append(
                f"groups has {num_subjects} subjects only, which can be exchanged in few ways: the p-value "
                "cannot become small."
            )
    num_folds = min(settings.num_folds, most)
    if num_folds < settings.num_folds:
        what = "subjects" if subjects is not None else "rows"
        notes.append(f"{num_folds} folds instead of {settings.num_folds}: the smallest class has few {what}.")
    if labels is not None:
        both = np.unique(np.column_stack([strata, labels]), axis=0, return_inverse=True)[1].reshape(-1)
        # Where a combination is too rare to be in every fold, the classes of the target come first.
        if classes is None or np.bincount(both).min() >= num_folds:
            strata = both.astype(np.int64)
    if np.bincount(strata)[np.unique(strata)].min() < num_folds and classes is None:
        strata = np.zeros(num_rows, dtype=np.int64)
    if subjects is None:
        splits = StratifiedKFold(num_folds, shuffle=True, random_state=settings.seed).split(strata, strata)
        return _fold_codes(splits, num_rows)
    for folds in range(num_folds, 1, -1):
        for attempt in range(10):
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=settings.seed + attempt)
            fold = _fold_codes(splitter.split(strata, strata, subjects), num_rows)
            if _is_complete(fold, folds, values if classes is not None else None):
                if folds < num_folds:
                    notes.append(f"{folds} folds instead of {num_folds}: subjects could not be divided so.")
                return fold
    raise UnusableError(
        "groups cannot be divided into two folds that both have every class of the target: merge rare "
        "classes."
    )


def _fold_codes(splits: Iterator[tuple[Integers, Integers]], num_rows: int) -> Integers:
    fold = np.full(num_rows, -1, dtype=np.int64)
    for index, (_, test) in enumerate(splits):
        fold[test] = index
    return fold


def _is_complete(fold: Integers, num_folds: int, codes: NDArray[Any] | None) -> bool:
    """Tell whether every fold has rows, and its training rows all classes."""
    if np.bincount(fold, minlength=num_folds).min() == 0:
        return False
    if codes is None:
        return True
    num_classes = np.unique(codes).size
    return all(np.unique(codes[fold != index]).size == num_classes for index in range(num_folds))


def permutations(
    fold: Integers, labels: Integers | None, subjects: Integers | None, settings: Settings
) -> Integers:
    """Return row numbers (n, 1 + num_permutations) whose first column is the order itself."""
    rng = np.random.default_rng(settings.seed)
    num_rows, num = fold.size, settings.num_permutations
    orders = np.repeat(np.arange(num_rows)[:, None], 1 + num, axis=1)
    strata = np.zeros_like(fold) if labels is None else labels
    if subjects is None:
        strata = strata * (fold.max() + 1) + fold
    for stratum in np.unique(strata):
        rows = (strata == stratum).nonzero()[0]
        if subjects is None:
            orders[rows, 1:] = rng.permuted(np.tile(rows, (num, 1)), axis=1).T
            continue
        _, blocks, sizes = np.unique(subjects[rows], return_inverse=True, return_counts=True)
        order = np.argsort(blocks, kind="stable")
        starts = np.cumsum(sizes) - sizes
        blocks = blocks.reshape(-1)[order]
        position = np.arange(rows.size) - starts[blocks]
        for index in range(1, 1 + num):
            donor = rng.permutation(sizes.size)[blocks]
            orders[rows[order], index] = rows[order[starts[donor] + position % sizes[donor]]]
    return orders
