"""Bias-corrected distance covariance and correlation: of two variables, given others, with an interval.

All are made of inner products of U-centred distance matrices, see `mdnorm.metrics.pairwise`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.design.reader import shown
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_confidence, check_same_rows
from mdnorm.metrics.columns import as_categories
from mdnorm.metrics.pairwise import (
    CentredProducts,
    Distances,
    centred_products,
    quadruple_weight,
    row_products,
)
from mdnorm.metrics.samples import MIN_SAMPLES, UNDEFINED, Weights, as_samples, measure, rescaled

# 1 − R² of two variables of which one is a function of the other's distances is 0 up to this.
_ROUNDING_OF_ONE = 1e-12

# Share of the quadruples that are of four different rows: below, weights would leave fewer than nine digits.
_LEAST_QUADRUPLES = 1e-6


@measure
def distance_correlation_sqr(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, weights: Weights = None
) -> Tensor | float:
    """Return the bias-corrected squared distance correlation of two samples.

    It estimates a population value that is 0 if and only if the two random vectors are independent, whatever
    the form of the dependence. The estimate is 0 on average under independence, and therefore **slightly
    negative** about half of the time there: do not take its square root.

    Parameters
    ----------
    x : tensor or array, (n,) or (n, p)
        One row per sample, of any real dtype; n ≥ 4, p ≥ 1, finite values.
    y : tensor or array, (n,) or (n, q)
        The other variable, rows in the order of `x`. Two tensors must be on the same device; an array beside
        a tensor is taken to the tensor's device.
    weights : tensor or array, (n,), optional
        Of the rows, such as those of `mdnorm.balancing_weights`: finite, not negative, above 0 in at least 4
        rows. Only their ratios matter. The estimate is that of the weighted population; equal weights change
        nothing, and a row of weight 0 is ignored.

    Returns
    -------
    Tensor, () float64, or float
        A value between −1 and 1: a tensor on the device of the inputs where `x` or `y` is a tensor, a Python
        float otherwise. It is 0 where the distance variance of either variable is 0 up to rounding: a
        constant, a variable in which only one sample differs from the others, samples that are all equally
        far apart (each of a category of its own, one-hot coded).

    Raises
    ------
    TypeError, ValueError
        An input is complex or not numeric, or has the wrong shape, no columns, or NaN or infinite values; the
        inputs differ in their number of rows or in their device; there are fewer than 4 rows. Weights have
        the wrong shape, are negative, NaN or infinite, or nearly all of the weight is on fewer than 4 rows.

    Notes
    -----
    With weights w the covariance and both variances are the means of ``a_ij b_ij − 2 a_ij b_ik + a_ij b_kl``
    over distinct i, j, k, l with weight ``w_i w_j w_k w_l``, where a and b are the distances: a weighted
    U-statistic. Where x and y are independent in the weighted population its mean is 0 up to terms of 1/n².

    Everything is computed in float64, whatever the dtype of the inputs; a large common offset costs no
    digits. The distances are never in memory as a whole: memory is O(n·(p + q)), arithmetic O(n²·(p + q)).
    For two scalars, (n,) or (n, 1), of more than a few hundred samples without weights it is O(n log n).

    The metric is not differentiable: inputs that require a gradient are detached. On a device without float64
    (MPS) the result is computed, and returned, on the CPU.

    References
    ----------
    .. [1] Székely, G. J., & Rizzo, M. L. (2013). The distance correlation t-test of independence in high
       dimension. Journal of Multivariate Analysis, 117, 193–213.
    .. [2] Székely, G. J., & Rizzo, M. L. (2014). Partial distance correlation with methods for
       dissimilarities. The Annals of Statistics, 42(6), 2382–2412.
    .. [3] Huo, X., & Székely, G. J. (2016). Fast computing for distance covariance. Technometrics, 58(4),
       435–447.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(8.0)
    >>> round(distance_correlation_sqr(x, x), 12)
    1.0
    """
    samples = as_samples(x=x, y=y, weights=weights)
    return samples.result(_products(samples.rows, samples.weights).correlations()[0, 1])


@measure
def distance_covariance_sqr(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, weights: Weights = None
) -> Tensor | float:
    """Return the bias-corrected squared distance covariance of two samples.

    An unbiased estimate of a population value that is 0 if and only if the two random vectors are
    independent. Under independence it is **negative** about half of the time. Notes and sources are those of
    `distance_correlation_sqr`.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `distance_correlation_sqr`.
    weights : tensor or array, (n,), optional
        As in `distance_correlation_sqr`.

    Returns
    -------
    Tensor, () float64, or float
        In units of `x` times units of `y`: a tensor on the device of the inputs where `x` or `y` is a tensor,
        a Python float otherwise. Of a variable with itself it is the squared distance variance.

    Raises
    ------
    TypeError, ValueError
        As for `distance_correlation_sqr`.
    OverflowError
        The result is larger than any float64 number.

    Examples
    --------
    >>> import numpy as np
    >>> round(distance_covariance_sqr(np.arange(4.0), np.arange(4.0) ** 2), 12)
    2.0
    """
    samples = as_samples(x=x, y=y, weights=weights)
    product = _products(samples.rows, samples.weights).products[0, 1]
    return samples.result(with_exponent(product, sum(samples.exponents)))


def partial_distance_correlation(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, z: Tensor | ArrayLike, *, weights: Weights = None
) -> Tensor | float:
    """Return the bias-corrected partial distance correlation of two samples given a third.

    The correlation of the U-centred distances of `x` and of `y` after those of `z` were projected out of
    both. That it is 0 does not mean that `x` and `y` are independent given `z`, nor the reverse: to test this
    use `conditional_independence_test`, or for classes `conditional_distance_correlation_sqr`.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `distance_correlation_sqr`.
    z : tensor or array, (n,) or (n, number of columns)
        The variables to take account of, rows in the order of `x`.
    weights : tensor or array, (n,), optional
        As in `distance_correlation_sqr`.

    Returns
    -------
    Tensor, () float64, or float
        ``(R_xy − R_xz R_yz) / √((1 − R_xz²)(1 − R_yz²))`` with the bias-corrected squared distance
        correlations R, between −1 and 1: a tensor on the device of the inputs where one is a tensor, a Python
        float otherwise. It is 0 where the projection leaves nothing of `x` or `y`, up to rounding.

    Raises
    ------
    TypeError, ValueError
        As for `distance_correlation_sqr`.

    References
    ----------
    .. [1] Székely, G. J., & Rizzo, M. L. (2014). Partial distance correlation with methods for
       dissimilarities. The Annals of Statistics, 42(6), 2382–2412.

    Examples
    --------
    >>> import numpy as np
    >>> x, z = np.random.default_rng(0).standard_normal((2, 200))
    >>> y = x + z
    >>> bool(partial_distance_correlation(x, y, z) > distance_correlation_sqr(x, y) > 0.1)
    True
    """
    samples = as_samples(x=x, y=y, z=z, weights=weights)
    products = _products(samples.rows, samples.weights)
    correlations = products.correlations()
    xy, xz, yz = correlations[0, 1], correlations[0, 2], correlations[1, 2]
    x_left, y_left = (1 - xz) * (1 + xz), (1 - yz) * (1 + yz)
    nothing_left = (x_left < _ROUNDING_OF_ONE) | (y_left < _ROUNDING_OF_ONE)
    value = (xy - xz * yz) / (x_left * y_left).sqrt()
    # Also 0 where x or y has no distance variance: all three R are 0 there, or two of them.
    return samples.result(torch.where(nothing_left, torch.zeros_like(value), value.clamp(-1, 1)))


@dataclass(frozen=True)
class ConditionalDistanceCorrelation:
    """Bias-corrected squared distance correlations within the classes of a label.

    The `values` by label, in order; the `counts` of samples of each class, without those of weight 0; and the
    `mean` of the values, weighted by the counts, or by the weight of each class.
    """

    values: Mapping[Hashable, float]
    counts: Mapping[Hashable, int]
    mean: float


def conditional_distance_correlation_sqr(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, weights: Weights = None
) -> ConditionalDistanceCorrelation:
    """Return the bias-corrected squared distance correlation of two samples within every class of a label.

    Features that predict a label depend on everything that the label depends on. Whether they know more of
    the metadata than the label does can be seen among samples of one class.

    Parameters
    ----------
    x, y, weights
        As in `distance_correlation_sqr`; with weights above 0 in at least 4 samples of each class.
    labels : tensor or array, (n,)
        Class of every sample: booleans, numbers or strings; at least 4 samples of each class.

    Returns
    -------
    ConditionalDistanceCorrelation
        Each value is 0 on average where `x` and `y` are independent within the class.

    Raises
    ------
    TypeError, ValueError
        As for `distance_correlation_sqr`; `labels` are of several kinds, or have the wrong shape, another
        number of rows or missing values; a class has fewer than 4 samples, or nearly all of its weight on
        fewer.

    Examples
    --------
    >>> import numpy as np
    >>> label = np.arange(400) % 2
    >>> x, y = np.random.default_rng(0).standard_normal((2, 400)) + 3 * label
    >>> within = conditional_distance_correlation_sqr(x, y, label)
    >>> bool(distance_correlation_sqr(x, y) > 0.4), bool(abs(within.mean) < 0.05), within.counts
    (True, True, {0: 200, 1: 200})
    """
    samples = as_samples(x=x, y=y, weights=weights)
    classes = as_categories(labels, "labels")
    check_same_rows(labels=len(classes.codes), x=len(samples.kept))
    classes = classes.of_rows(samples.kept.cpu().numpy())
    counts = dict(zip(classes.names, classes.counts.tolist(), strict=True))
    small = [f"{label!r} ({count})" for label, count in counts.items() if count < MIN_SAMPLES]
    if small:
        raise ValueError(
            f"each class of labels must have at least {MIN_SAMPLES} samples, got fewer of {shown(small)}: "
            f"{UNDEFINED}, merge classes or leave these samples out."
        )
    values, sizes = {}, []
    for code, label in enumerate(classes.names):
        inside = torch.from_numpy(classes.codes == code).to(samples.device)
        part = None if samples.weights is None else samples.weights[inside]
        # Scaled anew: what is large in one class must not cost digits in another.
        scaled = [rescaled(rows[inside])[0] for rows in samples.rows]
        values[label] = float(_products(scaled, part, f" of label {label!r}").correlations()[0, 1])
        sizes.append(counts[label] if part is None else float(part.sum()))
    mean = math.fsum(map(math.prod, zip(values.values(), sizes, strict=True))) / math.fsum(sizes)
    return ConditionalDistanceCorrelation(values, counts, mean)


@dataclass(frozen=True)
class DistanceCorrelationInterval:
    """A bias-corrected squared distance correlation with a confidence interval.

    The `estimate` from all samples; its `standard_error` by the jackknife; the bounds `lower` and `upper`,
    between −1 and 1; the `confidence` with which such intervals contain the population value, approximately.
    `leave_one_out`, (n,) float64, has the estimates without each sample.
    """

    estimate: float
    standard_error: float
    lower: float
    upper: float
    confidence: float
    leave_one_out: NDArray[np.float64] = field(repr=False, compare=False)


def distance_correlation_interval(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, confidence: float = 0.95
) -> DistanceCorrelationInterval:
    """Return the bias-corrected squared distance correlation with a confidence interval.

    It is the interval of the jackknife, widened for the case near independence, where the estimate is far
    from normal. A nominal 95 % interval covers the population value at least 90 % of the time, from 10 rows
    on. It is not a test: use `distance_correlation_permutation_test` for that.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `distance_correlation_sqr`, but n ≥ 5.
    confidence : float
        Between 0 and 1.

    Returns
    -------
    DistanceCorrelationInterval
        Its fields are Python floats, and an array of the estimates without each sample.

    Raises
    ------
    TypeError, ValueError
        As for `distance_correlation_sqr`; there are fewer than 5 rows; `confidence` is not between 0 and 1;
        the distance variance of `x` or `y` is 0 (a constant, or only one sample differs).

    Notes
    -----
    With the jackknife's standard error s, the quantile t of Student's distribution of n − 1 degrees of
    freedom and the quantile q of a chi-squared variable of one degree of freedom at `confidence`, the limits
    of the estimate R are ``R − √((t·s)² + ((q − 1)/n)²)`` and ``R + t·s + 2/n``. The terms of order 1/n
    account for the degenerate part of the estimate, which is all of it under independence; its quantile is at
    most ``(q − 1)/n`` [2]_.

    Memory is linear in n, arithmetic O(n²·(p + q)), for scalars too.

    References
    ----------
    .. [1] Efron, B., & Stein, C. (1981). The jackknife estimate of variance. The Annals of Statistics, 9(3),
       586–596.
    .. [2] Shen, C., Panda, S., & Vogelstein, J. T. (2022). The chi-square test of distance correlation.
       Journal of Computational and Graphical Statistics, 31(1), 254–262.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal(200)
    >>> interval = distance_correlation_interval(x, x**2)
    >>> 0 < interval.lower < interval.estimate < interval.upper < 1
    True
    """
    with requires("metrics"):
        from scipy.special import ndtri, stdtrit
    check_confidence(confidence)
    samples = as_samples(
        x=x,
        y=y,
        min_samples=MIN_SAMPLES + 1,
        reason="the jackknife leaves one out, and the bias-corrected estimate needs 4",
    )
    num_samples = samples.num_samples
    with torch.no_grad():
        matrices = [Distances(rows) for rows in samples.rows]
        products = centred_products(matrices)
        for name, is_zero in zip("xy", products.is_zero.tolist(), strict=True):
            if is_zero:
                raise ValueError(
                    f"{name} has no distance variance (it is constant, only one sample differs, or all are "
                    "equally far apart), so that the estimate has no error: check how it was selected."
                )
        correlation = products.correlations()[0, 1]
        of_rows = row_products(matrices[0], matrices[1], products.effects)
        # The inner products without each sample, as the docstring of `mdnorm.metrics.pairwise` derives them.
        left = of_rows.sum(dim=1, keepdim=True) - 2 * (num_samples - 2) / (num_samples - 3) * of_rows
        xx, xy, yy = left / ((num_samples - 1) * (num_samples - 4))
        is_positive = (xx > _ROUNDING_OF_ONE * xx.mean()) & (yy > _ROUNDING_OF_ONE * yy.mean())
        values = xy / (xx.clamp(min=0).sqrt() * yy.clamp(min=0).sqrt())
        # Without the sample that is the only one to differ from the others, a variable is constant.
        values = torch.where(is_positive, values.clamp(-1, 1), torch.zeros_like(values))
        deviations = values - values.mean()
        error = math.sqrt((num_samples - 1) / num_samples * float(deviations.square().sum()))
    estimate = float(correlation)
    half = error * float(stdtrit(num_samples - 1, (1 + confidence) / 2))
    degenerate = max(0.0, float(ndtri((1 + confidence) / 2)) ** 2 - 1) / num_samples
    lower = max(estimate - math.hypot(half, degenerate), -1.0)
    upper = min(estimate + half + 2 / num_samples, 1.0)
    return DistanceCorrelationInterval(estimate, error, lower, upper, confidence, values.cpu().numpy())


def _products(variables: Sequence[Tensor], weights: Tensor | None, where: str = "") -> CentredProducts:
    if weights is not None and quadruple_weight(weights) < _LEAST_QUADRUPLES:
        raise ValueError(
            f"weights{where} are nearly all on fewer than {MIN_SAMPLES} rows: {UNDEFINED}, pool more samples "
            "or limit the largest weights."
        )
    with torch.no_grad():
        return centred_products(list(map(Distances, variables)), weights)


def with_exponent(value: Tensor, exponent: int) -> Tensor:
    """Return ``value · 2^exponent``; OverflowError where it is larger than any float64 number."""
    try:
        return value.new_tensor(math.ldexp(float(value), exponent))
    except OverflowError as error:
        raise OverflowError(
            "the result is larger than any float64 number: divide the variables by their standard deviation."
        ) from error
