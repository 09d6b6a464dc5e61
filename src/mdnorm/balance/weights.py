"""Balancing weights: sample weights under which labels and metadata are independent in the training data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.arrays import as_real_tensor, check_same_order, columns_of
from mdnorm.balance.problem import Problem, distance, entropy, propensity
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_same_rows
from mdnorm.metrics.columns import as_categories
from mdnorm.metrics.rates import effective_size
from mdnorm.metrics.samples import as_samples
from mdnorm.plotting import PALETTE
from mdnorm.text import aligned, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["propensity", "entropy", "distance"]

# As many samples as the streamed dcor² takes by default.
_MAX_ROWS_OF_DEPENDENCE = 2000


class ColumnBalance(NamedTuple):
    """How far labels and the metadata column `name` go together, `before` and `after` weighting.

    For classes, the largest standardised mean difference between two of them (by the standard deviation
    within classes before weighting); for continuous labels, the largest absolute correlation with a label
    column. 0 for a constant column.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class BalancingWeights:
    """Sample weights of `balancing_weights`, with what they achieve.

    ``np.asarray(result)`` and ``torch.as_tensor(result)`` give the `weights`, (N,) float64 on the CPU, not
    negative, of mean 1. The `effective_sample_size` is ``(Σ w)² / Σ w²``: as many samples of equal weight
    would give means that are as sure; `class_sizes` has the rows and the effective sample size of each class
    (it is empty for continuous labels), and `balance` a row for each metadata column. `dcor_sqr_before` and
    `dcor_sqr_after` are the bias-corrected squared distance correlation of labels and standardised metadata,
    the latter of the weighted population that the weights stand for, of at most 2000 samples drawn at random.
    `clipped` are the rows, int64, whose weight was above `clip`, and `largest` is the largest weight before
    clipping, in units of the mean weight.
    """

    weights: Tensor
    method: Method
    effective_sample_size: float
    class_sizes: dict[Any, tuple[int, float]]
    balance: tuple[ColumnBalance, ...]
    dcor_sqr_before: float
    dcor_sqr_after: float
    clipped: Tensor
    largest: float

    def __len__(self) -> int:
        return len(self.weights)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.weights.numpy()
        return np.array(array, dtype=dtype) if copy else array.astype(dtype or array.dtype, copy=False)

    # torch.as_tensor does not look at __array__.
    def __dlpack__(self, **options: Any) -> Any:
        return self.weights.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.weights.__dlpack_device__()

    def __repr__(self) -> str:
        return (
            f"BalancingWeights(method={self.method!r}, num_samples={len(self)}, "
            f"effective_sample_size={self.effective_sample_size:.1f})"
        )

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return what the weights achieve, as lines of text."""
        lines = [
            f"Balancing weights ({self.method}) of {len(self)} samples, effective sample size "
            f"{self.effective_sample_size:.1f} ({self.effective_sample_size / len(self):.0%})"
        ]
        for name, (rows, effective) in self.class_sizes.items():
            lines.append(f"  class {name}: {rows} samples, effective {effective:.1f}")
        lines.append(f"Largest weight {self.largest:.3g}, {len(self.clipped) or 'none'} clipped")
        what = "difference of class means (sd)" if self.class_sizes else "correlation with the labels"
        dcor_sqr = ("dcor² of labels and metadata", self.dcor_sqr_before, self.dcor_sqr_after)
        table = [(what, "before", " after")]
        table += [(name, f"{one:6.3f}", f"{two:6.3f}") for name, one, two in (*self.balance, dcor_sqr)]
        return "\n".join([*lines, *aligned(table)])

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a love plot: the balance of each metadata column, before and after.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure. The axes drawn on are returned.

        Raises
        ------
        MissingExtraError
            matplotlib is not installed.
        """
        with requires("audit"):
            import matplotlib.pyplot as plt
        if axes is None:
            axes = plt.subplots(figsize=(6, 1.2 + 0.3 * len(self.balance)), layout="constrained")[1]
        places = range(len(self.balance))
        before, after = ([getattr(row, key) for row in self.balance] for key in ("before", "after"))
        axes.hlines(places, before, after, color="0.8", zorder=0)
        axes.plot(before, places, "o", color=PALETTE[3], markerfacecolor="none", label="before")
        axes.plot(after, places, "o", color=PALETTE[4], label="with weights")
        axes.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        axes.set_yticks(list(places), [row.name for row in self.balance])
        axes.invert_yaxis()
        what = "difference of class means (sd)" if self.class_sizes else "|correlation|"
        axes.set_xlabel(f"largest {what}")
        axes.legend()
        return axes

    def sampler(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> torch.utils.data.WeightedRandomSampler:
        """Return a sampler that draws each sample with a probability proportional to its weight.

        Use it *instead of* weights in the loss and in the layer: with both, every weight would count twice.
        It is for ``DataLoader(data_set, sampler=…)``, of the data set whose rows the weights belong to, and
        draws `num_samples` in an epoch (by default as many as there are samples), with replacement.

        Parameters
        ----------
        num_samples : int, optional
            Draws in an epoch.
        generator : torch.Generator, optional
            Of the draws, on the CPU; by default the global one of torch.

        Returns
        -------
        torch.utils.data.WeightedRandomSampler
            Gives indices of rows, as int.
        """
        weights: Any = self.weights
        num_samples = len(self) if num_samples is None else num_samples
        return torch.utils.data.WeightedRandomSampler(weights, num_samples, generator=generator)


def balancing_weights(
    labels: Tensor | ArrayLike,
    metadata: Tensor | ArrayLike,
    *,
    method: Method | None = None,
    clip: float | None = 50.0,
    base_weights: Tensor | ArrayLike | None = None,
    metadata_names: Sequence[str] | None = None,
) -> BalancingWeights:
    """Return sample weights under which labels and metadata are independent in the training data.

    Where label and metadata go together in the sample, a loss rewards a network for predicting the label from
    the metadata. With these weights in the loss (and in `MetadataNorm`, if there is one) it does not.

    Parameters
    ----------
    labels : (N,) or (N, K_y)
        Classes: integers, booleans, strings, any column of two distinct values, or one-hot columns.
        Continuous: floating-point values, of one or several columns.
    metadata : (N,) or (N, K_m)
        Columns as the layer takes them, of any real dtype: a polynomial (`mdnorm.design`) for continuous
        variables, one-hot columns for categories, or those of a `mdnorm.Design`.
    method : {"propensity", "entropy", "distance"}, optional
        Default: "propensity" for classes, "entropy" for continuous labels.

        - "propensity": stabilised inverse-propensity weights ``p(y) / p(y|m)`` with an unpenalised
          multinomial logistic regression of the classes on the metadata columns [1]_. Needs scikit-learn.
        - "entropy": the weights closest to uniform (of maximal entropy) for which each label column is
          exactly uncorrelated with each metadata column, and the means of both are those of the sample
          [2]_ [3]_. Of classes the label columns are one-hot.
        - "distance": the weights that minimise the weighted distance covariance of labels and metadata plus
          the energy distances of both to their distribution in the sample [4]_: any form of dependence,
          not only that of the columns given. Memory grows with N², time with N³: at most 5000 samples.
    clip : float or None
        The largest weight: from 1 on in units of the mean weight, below 1 as a quantile of the weights; None:
        no limit. Larger weights are set to it, then all are divided by their mean, which trades balance for
        effective sample size.
    base_weights : (N,), optional
        Weights above 0 that the samples have already (of a survey, say). Labels and metadata become
        independent, each keeps its distribution under them, and the result includes them.
    metadata_names : sequence of str, optional
        Of the columns, for the table and for errors. Default: those of a DataFrame, or ``column 0``, ….

    Returns
    -------
    BalancingWeights
        Weights (N,) float64 of mean 1, and what they achieve.

    Raises
    ------
    TypeError, ValueError
        - Labels or metadata are of a wrong type, or have different numbers of rows, fewer than 4 rows, or NaN
          or infinite values; labels have one class or value only, or a class of one row; all metadata columns
          are constant (a single constant column is balanced and does no harm).
        - There is no overlap: a value of the metadata at which a class does not occur, classes that a column
          separates, labels that are a linear function of the metadata, or so few samples with nearly all
          weight that nothing can be learned from them. The message names columns, classes and rows.
        - `method` is unknown or not for such labels, `clip` is not positive, or there are too many rows for
          ``method="distance"``.
    MissingExtraError
        scikit-learn is not installed.

    Warns
    -----
    UserWarning
        Up to 2 % of the samples have metadata with which a class does not occur, by the fit of "propensity".

    Notes
    -----
    Weights do not help where there is no overlap, and they cost certainty: look at the effective sample size.
    Compute them from the training samples only; evaluation needs none.

    References
    ----------
    .. [1] Robins, J. M., Hernán, M. A., & Brumback, B. (2000). Marginal structural models and causal
       inference in epidemiology. Epidemiology, 11(5), 550–560.
    .. [2] Hainmueller, J. (2012). Entropy balancing for causal effects: A multivariate reweighting method to
       produce balanced samples in observational studies. Political Analysis, 20(1), 25–46.
    .. [3] Tübbicke, S. (2022). Entropy balancing for continuous treatments. Journal of Econometric Methods,
       11(1), 71–89.
    .. [4] Huling, J. D., Greifer, N., & Chen, G. (2024). Independence weights for causal inference with
       continuous treatments. Journal of the American Statistical Association, 119(546), 1657–1670.

    Examples
    --------
    Three of four patients (label 1) come from site 1, and one of four controls:

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).repeat(10)
    >>> site = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1]).repeat(10)
    >>> result = balancing_weights(labels, site)
    >>> [round(weight, 6) for weight in result.weights[:8].tolist()]
    [0.666667, 0.666667, 0.666667, 2.0, 2.0, 0.666667, 0.666667, 0.666667]
    >>> round(result.effective_sample_size, 6)
    60.0
    """
    check_same_order(labels=labels, metadata=metadata)
    if method not in (None, "propensity", "entropy", "distance"):
        raise ValueError(f'method must be "propensity", "entropy" or "distance", got {method!r}.')
    _check_clip(clip)
    # For its checks: constant columns are kept here, under their names.
    samples = as_samples(metadata=metadata, reason="there is nothing to balance")
    columns = columns_of(metadata, "metadata").detach().cpu().double()
    num_samples, num_columns = columns.shape
    names = _column_names(metadata, metadata_names, num_columns)
    if samples.rows[0].shape[1] == 0:
        raise ValueError("metadata has only constant columns: there is nothing to balance.")
    codes, classes, label_columns = _labels(labels, num_samples)
    if method == "propensity" and codes is None:
        raise ValueError(
            'method="propensity" needs classes, and labels are continuous: take "entropy" or "distance", or '
            "give class indices as integers."
        )
    base = _base_weights(base_weights, num_samples)
    problem = Problem(columns, label_columns, codes, tuple(classes), names, base)
    problem.refuse_no_overlap()

    method = method or ("entropy" if codes is None else "propensity")
    solve = {"propensity": propensity, "entropy": entropy, "distance": distance}[method]
    raw = solve(problem)
    raw = raw / raw.mean()
    limit = math.inf if clip is None else clip if clip > 1 else float(np.quantile(raw.numpy(), clip))
    weights = raw.clamp(max=limit)
    weights = weights / weights.mean()
    sizes = problem.class_sizes(weights)
    problem.refuse_few_effective(weights, sizes)
    some = torch.arange(num_samples)
    if num_samples > _MAX_ROWS_OF_DEPENDENCE:
        some = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
        some = some[:_MAX_ROWS_OF_DEPENDENCE]
    part = problem.part(some)
    return BalancingWeights(
        weights=weights,
        method=method,
        effective_sample_size=effective_size(weights),
        class_sizes=sizes,
        balance=tuple(map(ColumnBalance, names, problem.imbalance(base), problem.imbalance(weights))),
        dcor_sqr_before=part.dependence(part.base),
        dcor_sqr_after=part.dependence(weights[some]),
        clipped=(raw > limit).nonzero()[:, 0],
        largest=float(raw.max()),
    )


# -- arguments --------------------------------------------------------------------------------------------


def _check_clip(clip: float | None) -> None:
    if isinstance(clip, bool) or not isinstance(clip, (int, float, np.number, type(None))):
        raise TypeError(f"clip must be a number or None, got {clip!r}.")
    if clip is not None and (not clip > 0 or clip == 1):
        raise ValueError(
            f"clip must be a quantile between 0 and 1 or a largest weight above 1, got {clip}: None for no "
            "limit."
        )


def _column_names(metadata: Any, names: Sequence[str] | None, num_columns: int) -> tuple[str, ...]:
    if names is None:
        own = getattr(metadata, "columns", None)
        names = [f"column {index}" for index in range(num_columns)] if own is None else list(map(str, own))
    if isinstance(names, str) or len(names) != num_columns:
        raise ValueError(
            f"metadata_names must have one name for each of the {num_columns} metadata columns, got "
            f"{names!r}."
        )
    return tuple(names)


def _base_weights(weights: Tensor | ArrayLike | None, num_samples: int) -> Tensor:
    """Return base weights (N,) of mean 1."""
    if weights is None:
        return torch.ones(num_samples, dtype=torch.float64)
    base = columns_of(weights, "base_weights", num_samples=num_samples, num_columns=1)
    base = base.detach().cpu().double()[:, 0]
    bad = ~(base.isfinite() & (base > 0))
    if bool(bad.any()):
        where = listed(bad.nonzero()[:, 0].tolist())
        raise ValueError(
            f"base_weights must be finite and above 0, which row(s) {where} are not: leave out samples "
            "that are not to count."
        )
    return base / base.mean()


def _labels(labels: Any, num_samples: int) -> tuple[Tensor | None, list[Any], Tensor]:
    """Return codes of classes (None: continuous labels), the classes, and label columns (N, K_y) float64."""
    if labels is None:
        raise TypeError("labels must be classes or numbers, one a sample, got None.")
    values = labels.detach().cpu() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise ValueError(f"labels must have shape (N,) or (N, K_y), got {tuple(values.shape)}.")
    check_same_rows(labels=len(values), metadata=num_samples)
    is_numeric = isinstance(values, Tensor) or values.dtype.kind in "biufc"
    columns = None
    if is_numeric or values.ndim == 2:
        columns = as_real_tensor(values, "labels")
        as_samples(labels=columns, reason="there is nothing to balance")
        is_float = columns.is_floating_point()
        columns = columns.double().reshape(num_samples, -1)
        if values.ndim == 2:
            if bool(((columns == 0) | (columns == 1)).all() and (columns.sum(1) == 1).all()):
                values, columns = columns.argmax(1), None
        elif not is_float or len(columns.unique()) <= 2:
            columns = None
    if columns is not None:
        constant = [index for index in range(columns.shape[1]) if len(columns[:, index].unique()) == 1]
        if constant:
            raise ValueError(f"labels are constant in column(s) {constant}: there is nothing to balance.")
        return None, [], columns
    categories = as_categories(values, "labels")
    classes = list(categories.names)
    if len(classes) == 1:
        raise ValueError(f"labels has one class only, {classes[0]!r}: there is nothing to balance.")
    single = [name for name, count in zip(classes, categories.counts, strict=True) if count == 1]
    if single:
        raise ValueError(
            f"labels has class(es) of one sample: {listed(single)}. Merge classes, or leave these samples "
            "out; if the labels are numbers and no classes, give them as floating-point values."
        )
    codes = torch.from_numpy(categories.codes)
    return codes, classes, torch.nn.functional.one_hot(codes, len(classes)).double()
