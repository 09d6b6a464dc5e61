"""What a setting with confounded images hands to training: three sets of samples with the same columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mdnorm.metrics.samples import MIN_SAMPLES


@dataclass(frozen=True)
class Samples:
    """N samples in memory.

    `inputs` are (N, C, *spatial) float32: images, clips (C, T, H, W) or volumes (C, D, H, W). `labels` (N,)
    int64 are classes from 0. `metadata` (N, K) is the design: a flexible basis of every metadata variable, no
    intercept. `confounders` (N, Q) are the variables themselves, against which dependence is measured;
    categories as one-hot columns. `groups` (N,) int64 are the metadata groups, for rates by group. ValueError
    for numbers of rows that differ, or a value that is not finite.
    """

    inputs: Tensor
    labels: Tensor
    metadata: Tensor
    confounders: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        rows = {name: len(tensor) for name, tensor in vars(self).items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"all tensors need the same number of rows, got {rows}.")
        for name in ("inputs", "metadata", "confounders"):
            finite = getattr(self, name).isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                bad = torch.nonzero(~finite)[:5, 0].tolist()
                raise ValueError(f"{name} must be finite: rows {bad} are not.")

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class ConfoundedData:
    """The data of one run.

    In `train` and the held-out `test` the label goes with the metadata; in the held-out `confound_free` they
    are independent: what a network has learned of the label itself. `classes` and `groups` are names by
    number, `confounders` names of metadata variables → their columns in ``Samples.confounders``.
    `unconfounded` makes as many training samples in which label and metadata are independent, `held_out` a
    quarter as many further confounded ones, for a head that is retrained on them; real data have neither.
    """

    train: Samples
    test: Samples
    confound_free: Samples
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    confounders: dict[str, tuple[int, ...]]
    unconfounded: Callable[[], Samples] | None = None
    held_out: Callable[[], Samples] | None = None

    def for_retraining(self, seed: int) -> tuple[Samples, Samples]:
        """Return samples to train on, and confounded ones, a quarter of `train`, to retrain the head on.

        Where the data have no more samples (`held_out` is None), every fourth is not trained on.
        """
        if self.held_out is not None:
            return self.train, self.held_out()
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        count = len(order) // 4
        return select(self.train, order[count:]), select(self.train, order[:count])


@dataclass(frozen=True)
class LoadedData:
    """A real data set in memory, not divided yet; see `ConfoundedData`.

    `problems` says what was left out and why; it is empty where nothing was.
    """

    samples: Samples
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    confounders: dict[str, tuple[int, ...]]
    problems: str = ""

    def divide(self, seed: int) -> ConfoundedData:
        """Return training, test and confound-free data; see `split`."""
        return ConfoundedData(*split(self.samples, seed=seed), self.classes, self.groups, self.confounders)


def drawn_data(
    draw: Callable[[int, int, float], Samples],
    size: int,
    held_out: int,
    correlation: float,
    classes: tuple[str, ...],
    groups: tuple[str, ...],
    confounders: dict[str, tuple[int, ...]],
) -> ConfoundedData:
    """Return data from a function that draws samples: number, part (see `part_seed`) and correlation."""
    parts = (draw(size, 0, correlation), draw(held_out, 1, correlation), draw(held_out, 2, 0.0))
    unconfounded, more = partial(draw, size, 3, 0.0), partial(draw, size // 4, 4, correlation)
    return ConfoundedData(*parts, classes, groups, confounders, unconfounded, more)


def part_seed(seed: int, part: int) -> int:
    """Return the seed of a generator for a part of a run's data.

    Parts 0 to 2 are training, test and confound-free data; 3 and 4 the data for some methods only.
    """
    return 3 * seed + part if part < 3 else 1_000_000 + 2 * seed + part


def select(samples: Samples, rows: Tensor) -> Samples:
    """Return the samples of these rows, (n,) int64."""
    return Samples(**{name: tensor[rows] for name, tensor in vars(samples).items()})


def as_targets(confounders: Tensor, columns: Sequence[int]) -> list[Tensor]:
    """Return some columns of (N, Q) confounders, (N,) each; numbers of categories for one-hot ones."""
    values = confounders[:, list(columns)]
    is_one_hot = len(columns) > 1 and bool(((values == 0) | (values == 1)).all())
    return [values.argmax(1)] if is_one_hot else [*values.T]


def split(samples: Samples, *, seed: int, test_share: float = 0.3) -> tuple[Samples, Samples, Samples]:
    """Divide real samples into training, test and confound-free test data.

    Of each class and group a share `test_share`, between 0 and 1, is held out. The confound-free data are
    those of the test data of which every group has equally many of every class; groups that lack a class are
    left out. ValueError for a share out of range, fewer than two groups with all classes, or so few samples
    in them that dcor² within the classes is not defined.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}.")
    generator = torch.Generator().manual_seed(seed)
    num_classes = len(samples.labels.unique())
    train, test, balanced = [], [], []
    for group in samples.groups.unique():
        held_out = []
        for label in samples.labels.unique():
            rows = torch.nonzero((samples.groups == group) & (samples.labels == label))[:, 0]
            rows = rows[torch.randperm(len(rows), generator=generator)]
            count = round(test_share * len(rows))
            held_out.append(rows[:count])
            train.append(rows[count:])
        test += held_out
        if fewest := min(map(len, held_out)):
            balanced.append(torch.cat([rows[:fewest] for rows in held_out]))
    if len(balanced) < 2:
        raise ValueError(
            "no confound-free test data: fewer than two groups have every class among the test data; join "
            "groups or classes, or give more samples."
        )
    of_each_class = sum(map(len, balanced)) // num_classes
    if of_each_class < MIN_SAMPLES:
        raise ValueError(
            f"the confound-free test data have {of_each_class} sample(s) of each class, too few to measure "
            f"dcor² within the classes ({MIN_SAMPLES}): give more samples in which class and group differ."
        )
    train_part, test_part, free = (select(samples, torch.cat(rows)) for rows in (train, test, balanced))
    return train_part, test_part, free
