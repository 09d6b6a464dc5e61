"""Metrics of the torchmetrics kind: batch after batch, over processes, in a `MetricCollection`.

Importing this module needs torchmetrics (``pip install 'mdnorm[metrics]'``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mdnorm.arrays import as_real_tensor, statistics_dtype
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_same_rows
from mdnorm.metrics.reservoir import ColumnNames, Rows, Sampling, add_rows, as_class_indices

with requires("metrics"):
    from torchmetrics import Metric


_PARTS = tuple(part.name for part in fields(Rows))


def _fingerprint(*settings: object) -> Tensor:
    """Return a state that differs where settings differ.

    A `MetricCollection` shares one state among metrics whose states are equal after the first batch.
    """
    digest = hashlib.sha256(repr(settings).encode()).digest()[:16]
    return torch.tensor(list(digest), dtype=torch.uint8)


class DistanceCorrelation(Metric):
    """Bias-corrected squared distance correlation of features and metadata over a stream of batches.

    The value is that of `mdnorm.metrics.distance_correlation_sqr` for all samples, or for a uniform sample of
    them, of all processes. A wrong setting is a TypeError or ValueError.

    Parameters
    ----------
    within_labels : bool
        Measure within each class of the labels: what features know of the metadata beyond the label.
    max_samples : int, optional
        Keep at most this many samples, at least 4, drawn uniformly without replacement from the stream (of
        all processes). This bounds memory, by twice as many rows in each process, and the time of `compute`,
        which grows with the square of their number. 2000 are plenty for one value. None keeps all.
    seed : int
        Of the sample, which depends on the order of the stream, not on the batches it comes in.
    per_column : bool
        A value for each metadata column, ``column_0, column_1, …``, and ``joint`` for all together where
        there are several.
    column_names : sequence of str, or mapping from str to sequence of int, optional
        Names of the columns; a mapping gives a name to several columns that belong together, a one-hot coded
        site or the powers of an age: ``{"age": [0, 1, 2], "site": [3, 4]}``. Implies `per_column`.
    **kwargs
        Those of `torchmetrics.Metric`: ``compute_on_cpu=True``, say.

    Notes
    -----
    - Rows are kept on the device of the metric, features in float32, metadata in float64. A half precision
      input loses nothing; in a float64 input, differences below 1e-7 of the values are lost.
    - With `max_samples`, several processes draw a different sample than one would, of the same distribution.
    - A `DistributedSampler` repeats a few samples to give each process the same number; they count twice.
    - ``forward`` also computes the value for its batch, which must then have at least 4 samples (in each
      class). Use `update` to only accumulate.

    Examples
    --------
    >>> metric = DistanceCorrelation(column_names=["age", "sex"], max_samples=1000)
    >>> features, age = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
    >>> for rows in torch.arange(6).split(2):
    ...     metric.update(features[rows], torch.stack([age, age % 2], dim=1)[rows])
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'age': 1.0, 'sex': -0.282, 'joint': 0.989}
    """

    is_differentiable = False
    higher_is_better = False
    # The state is more than a reduction of states of batches: the sample has a size.
    full_state_update = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    features: list[Tensor]
    num_seen: Tensor

    def __init__(
        self,
        within_labels: bool = False,
        max_samples: int | None = None,
        seed: int = 0,
        *,
        per_column: bool = False,
        column_names: ColumnNames | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        per_column = per_column or column_names is not None
        self.sampling = Sampling(within_labels, max_samples, seed, column_names, per_column)
        for name in _PARTS:
            self.add_state(name, [], dist_reduce_fx=None)
        self.add_state("num_seen", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("settings", _fingerprint(within_labels, max_samples, seed), dist_reduce_fx="max")

    def update(
        self,
        features: Tensor | ArrayLike,
        metadata: Tensor | ArrayLike,
        labels: Tensor | ArrayLike | None = None,
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        features : (n, ...) tensor or array
            n ≥ 0; flattened to (n, D), with the same D in every batch.
        metadata : (n,) or (n, K)
            The same K in every batch.
        labels : (n,) or (n, 1), optional
            Class indices; needed with ``within_labels=True``, ignored otherwise.

        Raises
        ------
        TypeError, ValueError
            An input that is not real and numeric, wrong shapes, different numbers of rows or columns, NaN or
            infinite values, labels missing or not whole numbers.
        """
        available = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if available else 0
        start = int(self.num_seen)
        rows = self.sampling.rows(features, metadata, labels, self.device, start=start, rank=rank)
        self._add(rows)
        self.num_seen = self.num_seen + len(rows)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the dependence in all that was added, by all processes.

        Returns
        -------
        Tensor, () float64, or dict of them
            A tensor by default. With `per_column` the keys are the names of columns; with `within_labels`
            ``label_0, label_1, …``; with both ``age/label_0, …``.

        Raises
        ------
        ValueError
            Fewer than 4 samples, in all or of a class (`TooFewSamplesError`); the processes differ in their
            number of columns.
        """
        try:
            return self.sampling.dependence(self._pieces(self.metric_state))
        except ValueError:
            # torchmetrics leaves the state of all processes in place when its compute fails.
            if self._is_synced and self._should_unsync:
                self.unsync()
            raise

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric, or its state, has collected.

        Raises
        ------
        TypeError, ValueError
            It is neither a metric of this class nor a dict of its states; they differ in their number of
            columns, in `within_labels` or in `max_samples`, or, with `max_samples`, have the same seed: their
            samples are then not independent.
        """
        if isinstance(incoming_state, DistanceCorrelation):
            for name in ("within_labels", "max_samples"):
                mine, other = (getattr(each.sampling, name) for each in (self, incoming_state))
                if mine != other:
                    raise ValueError(
                        f"the metrics differ in {name} ({mine} and {other}): build both with the same."
                    )
            incoming_state = incoming_state.metric_state
        if not isinstance(incoming_state, dict) or not set(self._defaults) <= set(incoming_state):
            raise TypeError(
                "incoming_state must be a DistanceCorrelation or a dict of its states "
                f"({', '.join(self._defaults)}), got {type(incoming_state).__name__}."
            )
        incoming = self._pieces(incoming_state)
        if not incoming:
            return
        rows = Rows.cat(incoming).map(lambda part: part.to(self.device))
        own = [piece.keys.to(self.device) for piece in self._pieces(self.metric_state)]
        if self.sampling.max_samples is not None and any(torch.isin(rows.keys, keys).any() for keys in own):
            raise ValueError(
                f"both metrics drew their samples with seed={self.sampling.seed} in the same process, so the "
                "samples are not independent: give each its own seed."
            )
        self._add(rows)
        self.num_seen = self.num_seen + incoming_state["num_seen"].to(self.num_seen.device)
        self._computed = None
        self._update_count += 1

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; see `torchmetrics.Metric.sync`."""
        # Each process gives one piece; one without samples does not know how many columns there are.
        pieces = self._pieces(self.metric_state)
        empty, keys = torch.empty(0, 0, device=self.device), torch.empty(0, device=self.device).long()
        none = Rows(empty, empty.to(statistics_dtype(self.device)), keys, keys)
        self._set([Rows.cat(pieces) if pieces else none])
        super().sync(*args, **kwargs)

    @staticmethod
    def _pieces(state: Mapping[str, Any]) -> list[Rows]:
        """Return the state as rows; after a synchronisation, that of all processes."""
        pieces = [Rows(*parts) for parts in zip(*(state[name] for name in _PARTS), strict=True)]
        return [piece for piece in pieces if len(piece)]

    def _add(self, rows: Rows) -> None:
        self._set(add_rows(self._pieces(self.metric_state), rows, self.sampling.max_samples))

    def _set(self, pieces: Sequence[Rows]) -> None:
        for name in _PARTS:
            setattr(self, name, [getattr(piece, name) for piece in pieces])


class GroupRates(Metric):
    """Accuracy and true and false positive rates of each group, and the largest gaps between groups.

    For several classes and groups with names, over batches and processes; for intervals and calibration over
    data in memory see `mdnorm.metrics.group_gaps`. A wrong setting is a TypeError or ValueError.

    Parameters
    ----------
    groups : int or sequence
        Number of groups, which are then 0, 1, …; or their names (strings, integers), in the order of report.
    num_classes : int
        At least 2. With 2, rates are those of class 1. With more they are one-versus-rest for each class.
    threshold : float
        With 2 classes and one score a sample: class 1 is predicted where the score is above. 0.5 is for
        probabilities; for logits give 0.
    **kwargs
        Those of `torchmetrics.Metric`.

    Examples
    --------
    >>> metric = GroupRates(["f", "m"])
    >>> metric.update(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 1, 0]), ["f", "f", "m", "m"])
    >>> {name: value.item() for name, value in metric.compute().items() if name.startswith("accuracy")}
    {'accuracy/f': 1.0, 'accuracy/m': 0.5, 'accuracy/gap': 0.5}
    """

    is_differentiable = False
    full_state_update = False

    confusion: Tensor

    def __init__(
        self, groups: int | Iterable[Hashable], num_classes: int = 2, threshold: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if type(num_classes) is not int or num_classes < 2:
            raise ValueError(f"num_classes must be an integer of at least 2, got {num_classes!r}.")
        if isinstance(groups, str) or not (type(groups) is int or isinstance(groups, Iterable)):
            raise TypeError(f"groups must be the number of groups or their names, got {groups!r}.")
        self.names: list[Hashable] = list(range(groups)) if isinstance(groups, int) else list(groups)
        if len(self.names) < 2 or len({str(name) for name in self.names}) < len(self.names):
            raise ValueError(f"groups must be at least two and have different names, got {groups!r}.")
        if "gap" in {str(name) for name in self.names}:
            raise ValueError("groups must not contain 'gap': this is the key of the largest difference.")
        self.num_classes = num_classes
        self.threshold = threshold
        shape = (len(self.names), num_classes, num_classes)
        self.add_state("confusion", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        settings = _fingerprint(self.names, num_classes, threshold)
        self.add_state("settings", settings, dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor, groups: Tensor | Sequence[Hashable]) -> None:
        """Add a batch.

        Parameters
        ----------
        preds : (n,) or (n, C) tensor
            Class indices (integers), scores of class 1 (floats, two classes only), or scores of all classes.
        target : (n,) tensor
            Class indices.
        groups : (n,)
            A tensor or array of integers, or a sequence with the name of each sample's group.

        Raises
        ------
        TypeError, ValueError
            Inputs are not numeric, where they must be; wrong shapes, different numbers of rows, NaN scores,
            class indices out of range, unknown groups.
        """
        preds = self._classes(as_real_tensor(preds, "preds").detach().to(self.device), "preds")
        target = self._classes(as_real_tensor(target, "target").detach().to(self.device), "target")
        members = self._groups(groups).to(self.device)
        check_same_rows(preds=len(preds), target=len(target), groups=len(members))
        cells = (members * self.num_classes + target) * self.num_classes + preds
        counts = torch.bincount(cells, minlength=self.confusion.numel())
        self.confusion = self.confusion + counts.reshape(self.confusion.shape)

    def compute(self) -> dict[str, Tensor]:
        """Return the rates.

        Returns
        -------
        dict from str to Tensor, () float32
            ``accuracy/g``, ``true_positive_rate/g`` and ``false_positive_rate/g`` for each group `g`, and
            ``accuracy/gap``, … for the largest difference between two groups. With more than two classes the
            rates are ``true_positive_rate/class_c/g``, …, and the gap is the largest of all classes. **A rate
            that has no samples to be taken from is left out** (the true positive rate of a group without
            positives), and a gap that has fewer than two groups as well.
        """
        total = self.confusion.sum(dim=(1, 2))
        positives, predicted = self.confusion.sum(dim=2).T, self.confusion.sum(dim=1).T
        hits = self.confusion.diagonal(dim1=1, dim2=2).T
        classes = {"": 1} if self.num_classes == 2 else {f"class_{c}/": c for c in range(self.num_classes)}
        counted = {
            "accuracy": {"": (hits.sum(dim=0), total)},
            "true_positive_rate": {label: (hits[c], positives[c]) for label, c in classes.items()},
            "false_positive_rate": {
                label: (predicted[c] - hits[c], total - positives[c]) for label, c in classes.items()
            },
        }
        result: dict[str, Tensor] = {}
        for rate, parts in counted.items():
            gaps = []
            for label, (numerator, denominator) in parts.items():
                values = {
                    f"{rate}/{label}{name}": count / among
                    for name, count, among in zip(self.names, numerator, denominator, strict=True)
                    if among > 0
                }
                result |= values
                if len(values) > 1:
                    defined = torch.stack(list(values.values()))
                    gaps.append(defined.max() - defined.min())
            if gaps:
                result[f"{rate}/gap"] = torch.stack(gaps).max()
        return result

    def _classes(self, values: Tensor, name: str) -> Tensor:
        if values.is_floating_point() and name == "preds":
            if not bool(torch.isfinite(values).all()):
                raise ValueError("preds have NaN or infinite scores: see what the network does first.")
            if values.ndim == 2 and values.shape[1] == self.num_classes:
                values = values.argmax(dim=1)
            elif self.num_classes == 2 and values.shape[1:].numel() == 1 and values.ndim in (1, 2):
                values = values.flatten() > self.threshold
            else:
                shapes = "(n,) or (n, 2)" if self.num_classes == 2 else f"(n, {self.num_classes})"
                raise ValueError(f"scores in preds must have shape {shapes}, got {tuple(values.shape)}.")
        indices = as_class_indices(values, name)
        bad = (indices < 0) | (indices >= self.num_classes)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} must be class indices from 0 to {self.num_classes - 1}, got {int(indices[row])} in "
                f"row {row}: num_classes={self.num_classes}."
            )
        return indices

    def _groups(self, groups: Tensor | Sequence[Hashable]) -> Tensor:
        members = groups.flatten().tolist() if isinstance(groups, Tensor) else list(groups)
        index = {name: position for position, name in enumerate(self.names)}
        unknown = [member for member in members if member not in index]
        if unknown:
            raise ValueError(
                f"groups has {unknown[0]!r} ({len(unknown)} of {len(members)} rows), which is none of "
                f"{', '.join(map(repr, self.names))}: name every group at construction."
            )
        return torch.tensor([index[member] for member in members], dtype=torch.int64)
