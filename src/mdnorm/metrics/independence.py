"""Tests of independence, of two variables or given a third, by the bias-corrected distance correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm.metrics.checks import check_permutations, check_same_rows
from mdnorm.metrics.columns import as_categories
from mdnorm.metrics.distance_correlation import distance_correlation_sqr
from mdnorm.metrics.pairwise import Distances, centred_products, permuted_products
from mdnorm.metrics.samples import as_samples

# Permutations in memory at once, in numbers of 8 bytes.
_PERMUTATION_ELEMENTS = 2**22

# With fewer rows the chi-squared test can reject too often.
CHI_SQUARED_MIN_SAMPLES = 20

# Two orders of the samples that give the same value, as ties do, differ by rounding.
_TIE = 1e-10

# Rows in an interval of the given variable, within which rows are exchanged.
_INTERVAL_ROWS = 20
_MIN_ROWS = 40

# Knots of a spline: one for so many rows, within limits.
_KNOT_ROWS = 15
_MAX_KNOTS = 30


@dataclass(frozen=True)
class DistanceCorrelationTTest:
    """Result of the distance correlation t-test.

    The `estimate` is the bias-corrected squared distance correlation R, the `statistic`
    ``√(v − 1)·R / √(1 − R²)`` with ``v = n(n−3)/2`` (infinite for R = ±1) and v − 1 `degrees_of_freedom`, the
    `p_value` the probability of a statistic at least as large under independence (one-sided).
    """

    estimate: float
    statistic: float
    degrees_of_freedom: int
    p_value: float


@dataclass(frozen=True)
class DistanceCorrelationPermutationTest:
    """Result of a permutation test.

    The `estimate` is the bias-corrected squared distance correlation, `permuted` are its values under
    permutation, (num_permutations,) float64, and the `p_value` is ``(1 + k) / (1 + num_permutations)``, where
    k of these are at least as large.
    """

    estimate: float
    p_value: float
    num_permutations: int
    permuted: NDArray[np.float64] = field(repr=False, compare=False)


def distance_correlation_t_test(x: Tensor | ArrayLike, y: Tensor | ArrayLike) -> DistanceCorrelationTTest:
    """Test the independence of two samples of **many columns** in the time of one distance correlation.

    As the number of columns of both variables grows, the statistic under independence tends to Student's t
    with ``n(n−3)/2 − 1`` degrees of freedom [1]_. With few columns, or columns that depend
    strongly on each other, it does not, and the test rejects too often: use
    `distance_correlation_permutation_test` there.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `mdnorm.metrics.distance_correlation_sqr`.

    Returns
    -------
    DistanceCorrelationTTest
        Its fields are Python numbers. Where one variable has no distance variance (a constant), the estimate
        is 0 and the p-value 0.5.

    Raises
    ------
    TypeError, ValueError
        As for `mdnorm.metrics.distance_correlation_sqr`.
    mdnorm.extras.MissingExtraError
        SciPy is not installed.

    References
    ----------
    .. [1] Székely, G. J., & Rizzo, M. L. (2013). The distance correlation t-test of independence in high
       dimension. Journal of Multivariate Analysis, 117, 193–213.

    Examples
    --------
    >>> import numpy as np
    >>> x, noise = np.random.default_rng(0).standard_normal((2, 50, 30))
    >>> distance_correlation_t_test(x, x + noise).p_value < 1e-6
    True
    """
    with requires("metrics"):
        from scipy.special import stdtr

    estimate = float(distance_correlation_sqr(x, y))
    num_samples = len(x)  # type: ignore[arg-type]
    degrees_of_freedom = num_samples * (num_samples - 3) // 2 - 1
    rest = (1 - estimate) * (1 + estimate)
    if rest > 0:
        statistic = math.sqrt(degrees_of_freedom) * estimate / math.sqrt(rest)
    else:
        statistic = math.copysign(math.inf, estimate)
    return DistanceCorrelationTTest(
        estimate, statistic, degrees_of_freedom, float(stdtr(degrees_of_freedom, -statistic))
    )


def distance_correlation_chi_squared_p_value(estimate: float, num_samples: int) -> float:
    """Return a p-value for a distance correlation that is already known, for **any number of columns**.

    Under independence the tail of ``n·R + 1`` is no heavier than that of a chi-squared variable with one
    degree of freedom, at all levels up to 0.05. The test is nearly exact for two binary variables and
    conservative for variables of many columns, where `distance_correlation_t_test` has more power.

    Parameters
    ----------
    estimate : float
        Bias-corrected squared distance correlation R.
    num_samples : int
        Rows n it was computed from, at least 20.

    Raises
    ------
    ValueError
        `estimate` is not a number from −1 to 1, or `num_samples` is below 20.
    mdnorm.extras.MissingExtraError
        SciPy is not installed.

    References
    ----------
    .. [1] Shen, C., Panda, S., & Vogelstein, J. T. (2022). The chi-square test of distance correlation.
       Journal of Computational and Graphical Statistics, 31(1), 254–262.

    Examples
    --------
    >>> distance_correlation_chi_squared_p_value(0.1, 50) < 0.02
    True
    >>> distance_correlation_chi_squared_p_value(-0.1, 50)
    1.0
    """
    with requires("metrics"):
        from scipy.special import chdtrc

    if not -1 <= estimate <= 1:
        raise ValueError(f"estimate must be from -1 to 1, got {estimate}.")
    if num_samples < CHI_SQUARED_MIN_SAMPLES:
        raise ValueError(
            f"num_samples must be at least {CHI_SQUARED_MIN_SAMPLES}, got {num_samples}: use "
            "distance_correlation_permutation_test for few rows."
        )
    return float(chdtrc(1, max(0.0, num_samples * estimate + 1)))


def distance_correlation_permutation_test(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    *,
    num_permutations: int = 999,
    seed: int = 0,
    strata: Tensor | ArrayLike | None = None,
) -> DistanceCorrelationPermutationTest:
    """Test the independence of two samples by permuting the samples of one.

    Valid for any distribution and any number of samples and columns. With `strata` samples are permuted
    within each stratum only: a test of independence given the stratum, for example given the label.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `mdnorm.metrics.distance_correlation_sqr`.
    num_permutations : int
        At least 20. No p-value is below ``1 / (1 + num_permutations)``.
    seed : int
        Seed of the permutations, which are the same on every device.
    strata : tensor or array, (n,), optional
        Stratum of every sample: booleans, numbers or strings.

    Returns
    -------
    DistanceCorrelationPermutationTest
        Its fields are Python numbers. Where one variable is constant, all values are 0 and the p-value is 1.

    Raises
    ------
    TypeError, ValueError
        As for `mdnorm.metrics.distance_correlation_sqr`; `num_permutations` is no integer of at least 20;
        `strata` are of several kinds, or have the wrong shape, another number of rows or missing values, or
        no stratum has two samples.

    Notes
    -----
    Only one inner product depends on the permutation. The distances of the variable with more columns are
    computed once for many permutations, those of the other for each: arithmetic is O(num_permutations·n²·q)
    with q columns in the narrower variable, or O(num_permutations·n log n) for two scalars of many samples.

    References
    ----------
    .. [1] Székely, G. J., Rizzo, M. L., & Bakirov, N. K. (2007). Measuring and testing dependence by
       correlation of distances. The Annals of Statistics, 35(6), 2769–2794.
    .. [2] Phipson, B., & Smyth, G. K. (2010). Permutation p-values should never be zero. Statistical
       Applications in Genetics and Molecular Biology, 9(1), 39.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal(100)
    >>> distance_correlation_permutation_test(x, x**2, num_permutations=199).p_value
    0.005
    """
    check_permutations(num_permutations)
    samples = as_samples(x=x, y=y)
    codes = None
    if strata is not None:
        classes = as_categories(strata, "strata")
        codes = torch.from_numpy(classes.codes)
        check_same_rows(strata=len(codes), x=samples.num_samples)
        if len(classes.names) == samples.num_samples:
            raise ValueError(
                "every sample has a stratum of its own in strata=, so that nothing can be permuted: merge "
                "strata, for example by intervals of a continuous variable."
            )

    with torch.no_grad():
        # The statistic is symmetric: permute the variable whose distances cost less.
        first, second = sorted((Distances(rows) for rows in samples.rows), key=lambda m: -m.num_columns)
        products = centred_products([first, second])
        estimate = float(products.correlations()[0, 1])
        permuted = np.zeros(num_permutations)
        if not bool(products.is_zero.any()):
            generator = torch.Generator().manual_seed(seed)
            root = float(products.products.diagonal().sqrt().prod())
            chunk = max(1, _PERMUTATION_ELEMENTS // samples.num_samples)
            for start in range(0, num_permutations, chunk):
                count = min(chunk, num_permutations - start)
                orders = permutations(count, samples.num_samples, codes, generator).to(samples.device)
                values = permuted_products(first, second, products.effects, orders)
                permuted[start : start + count] = (values / root).clamp(-1, 1).cpu().numpy()
    as_large = int((permuted >= estimate - _TIE).sum())
    return DistanceCorrelationPermutationTest(
        estimate, (1 + as_large) / (1 + num_permutations), num_permutations, permuted
    )


def permutations(count: int, num_samples: int, strata: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return random permutations within strata, (count, n) int64, on the CPU."""
    if strata is None:
        return torch.stack([torch.randperm(num_samples, generator=generator) for _ in range(count)])
    orders = torch.empty(count, num_samples, dtype=torch.int64)
    grouped = strata.argsort(stable=True)
    for permutation in orders:
        shuffled = torch.randperm(num_samples, generator=generator)
        # Samples by stratum, in random order within each, go to the places of their stratum.
        permutation[grouped] = shuffled[strata[shuffled].argsort(stable=True)]
    return orders


def residuals_given(values: NDArray[np.float64], given: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a cubic spline of `given` (n,), knots at its quantiles, leaves of `values` (n, p)."""
    with requires("metrics"):
        from sklearn.preprocessing import SplineTransformer

    number = int(np.clip(len(given) // _KNOT_ROWS, 3, _MAX_KNOTS))
    knots = np.unique(np.quantile(given, np.linspace(0, 1, number)))
    basis = np.ones((len(given), 1))
    if len(knots) > 1:
        basis = SplineTransformer(degree=3, knots=knots[:, None]).fit_transform(given[:, None])
    fitted: NDArray[np.float64] = basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
    return values - fitted


def conditional_independence_test(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    given: Tensor | ArrayLike,
    *,
    num_permutations: int = 999,
    seed: int = 0,
) -> DistanceCorrelationPermutationTest:
    """Test whether two variables are independent given a **continuous** third one.

    The means of `x` and `y` as smooth functions of `given` are taken away, and the distance correlation of
    what is left is compared with its values when rows of similar `given` are exchanged. Partial distance
    correlation does not answer this question: it is not 0 for two variables that share nothing but a function
    of the third.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `mdnorm.metrics.distance_correlation_sqr`, but n ≥ 40.
    given : tensor or array, (n,)
        The variable that may explain both. Of classes use `distance_correlation_permutation_test` with them
        as `strata`.
    num_permutations : int
        At least 20. No p-value is below ``1 / (1 + num_permutations)``.
    seed : int
        Seed of the permutations.

    Returns
    -------
    DistanceCorrelationPermutationTest
        Its estimate is the bias-corrected squared distance correlation of the residuals.

    Raises
    ------
    TypeError, ValueError
        As for `distance_correlation_permutation_test`; fewer than 40 rows; `given` is not of shape (n,).
    mdnorm.extras.MissingExtraError
        scikit-learn is not installed.

    Notes
    -----
    The means are cubic splines with a knot for every 15 rows, 30 at most, at quantiles of `given`. Rows are
    exchanged within intervals of about 20 rows, so that a spread that depends on `given` stays where it is.
    The test is approximate: where such a spline cannot follow the mean, the rest of it stays in both
    variables and makes them dependent.

    References
    ----------
    .. [1] Shah, R. D., & Peters, J. (2020). The hardness of conditional independence testing and the
       generalised covariance measure. The Annals of Statistics, 48(3), 1514–1538.
    .. [2] Kim, I., Neykov, M., Balakrishnan, S., & Wasserman, L. (2022). Local permutation tests for
       conditional independence. The Annals of Statistics, 50(6), 3388–3414.

    Examples
    --------
    >>> import numpy as np
    >>> given, x, y = np.random.default_rng(0).standard_normal((3, 300))
    >>> conditional_independence_test(given**2 + x, given**2 + y, given).p_value > 0.05
    True
    >>> conditional_independence_test(given**2 + x, given**2 + x, given).p_value
    0.001
    """
    samples = as_samples(
        x=x, y=y, given=given, min_samples=_MIN_ROWS, reason="so few rows do not tell the means given a third"
    )
    shape = np.shape(given)
    if len(shape) != 1:
        raise ValueError(f"given must have shape (n,), one value for each row, got {shape}.")
    first, second, third = (rows.cpu().numpy() for rows in samples.rows)
    position = third[:, 0] if third.shape[1] else np.zeros(samples.num_samples)
    num_intervals = max(1, samples.num_samples // _INTERVAL_ROWS)
    # Rows of equal values are in the order they come in, which exchanges them all the same.
    intervals = np.argsort(np.argsort(position, kind="stable")) * num_intervals // samples.num_samples
    return distance_correlation_permutation_test(
        residuals_given(first, position),
        residuals_given(second, position),
        num_permutations=num_permutations,
        seed=seed,
        strata=intervals,
    )
