"""A test of independence of two variables given a third."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm.metrics.independence import (
    DistanceCorrelationPermutationTest,
    distance_correlation_permutation_test,
)
from mdnorm.metrics.samples import as_samples

# Rows in an interval of the given variable, within which rows are exchanged.
_INTERVAL_ROWS = 20
_MIN_ROWS = 40

# Knots of a spline: one for so many rows, within limits.
_KNOT_ROWS = 15
_MAX_KNOTS = 30


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
        As of `mdnorm.metrics.distance_correlation_sqr`, but n ≥ 40.
    given : tensor or array, (n,)
        The variable that may explain both. Of classes use `distance_correlation_permutation_test` with them
        as `strata`.
    num_permutations, seed : int
        As of `distance_correlation_permutation_test`.

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
