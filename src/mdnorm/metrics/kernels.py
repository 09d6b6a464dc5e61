"""The Hilbert–Schmidt independence criterion and centred kernel alignment, without bias.

With a kernel in place of a distance, the inner product of U-centred matrices is the unbiased estimate of the
criterion, see `mdnorm.metrics.pairwise`.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mdnorm.metrics.distance_correlation import with_exponent
from mdnorm.metrics.pairwise import CentredProducts, GaussianKernel, LinearKernel, centred_products, expansion
from mdnorm.metrics.samples import Samples, as_samples, measure

Kernel = Literal["linear", "rbf"]
Bandwidth: TypeAlias = float | tuple[float | None, float | None] | None

# Samples of which the median distance is taken.
_NUM_FOR_MEDIAN = 2000

# Inner products of columns may lose this factor of the float64 precision before pairs are summed instead.
_MAX_LOSS = 1e5


@measure
def hsic(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, kernel: Kernel = "rbf", bandwidth: Bandwidth = None
) -> Tensor | float:
    """Return the unbiased Hilbert–Schmidt independence criterion of two samples.

    With the Gaussian kernel it estimates a population value that is 0 if and only if the two random vectors
    are independent; with the linear kernel, if and only if they are uncorrelated. Where that value is 0, the
    estimate is **negative** about half of the time.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `mdnorm.metrics.distance_correlation_sqr`.
    kernel : {"rbf", "linear"}
        ``exp(−|x_i − x_j|² / (2σ²))`` or ``x_i·x_j``, for both variables.
    bandwidth : float or pair of float, optional
        σ > 0 of the Gaussian kernel: one for both variables, or one each. None, also in a pair, stands for
        the median of the distances between samples (of 2000 of them, drawn with a fixed seed, if there are
        more; of the distances above 0 if the median is 0).

    Returns
    -------
    Tensor, () float64, or float
        A tensor on the device of the inputs where `x` or `y` is a tensor, a Python float otherwise. It is 0
        where `x` or `y` is constant.

    Raises
    ------
    TypeError, ValueError
        As for `mdnorm.metrics.distance_correlation_sqr`; `kernel` is unknown; `bandwidth` is not positive, or
        given for the linear kernel.
    OverflowError
        The result is larger than any float64 number (linear kernel).

    Notes
    -----
    Memory is O(n·(p + q)), arithmetic O(n²·(p + q)), for the linear kernel O(n·p·q) where this is less.

    References
    ----------
    .. [1] Song, L., Smola, A., Gretton, A., Bedo, J., & Borgwardt, K. (2012). Feature selection via
       dependence maximization. Journal of Machine Learning Research, 13, 1393–1434.
    .. [2] Gretton, A., Bousquet, O., Smola, A., & Schölkopf, B. (2005). Measuring statistical dependence with
       Hilbert–Schmidt norms. Algorithmic Learning Theory, 63–77.

    Examples
    --------
    >>> import numpy as np
    >>> x, noise = np.random.default_rng(0).standard_normal((2, 200))
    >>> hsic(x, x**2) > 10 * abs(hsic(x, noise))
    True
    """
    samples = as_samples(x=x, y=y)
    products = _kernel_products(samples, kernel, bandwidth)
    # A constant has no covariance, though rounding of its kernel may have left some.
    value = products.products[0, 1] * ~products.is_zero.any()
    exponent = 2 * sum(samples.exponents) if kernel == "linear" else 0
    return samples.result(with_exponent(value, exponent))


@measure
def cka(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, kernel: Kernel = "linear", bandwidth: Bandwidth = None
) -> Tensor | float:
    """Return the debiased centred kernel alignment of two samples.

    How similar two representations of the same samples are: 1 where the kernel matrices agree up to scale,
    for the linear kernel where one is a rotation and scaling of the other. The biased estimate tends to 1
    with the number of columns even for independent variables; this one is about 0 there, and **negative**
    half of the time.

    Parameters
    ----------
    x, y : tensor or array, (n,) or (n, number of columns)
        As in `mdnorm.metrics.distance_correlation_sqr`.
    kernel, bandwidth
        As in `hsic`, but the kernel is linear by default.

    Returns
    -------
    Tensor, () float64, or float
        ``HSIC(x, y) / √(HSIC(x, x)·HSIC(y, y))`` of unbiased estimates, between −1 and 1: a tensor on the
        device of the inputs where `x` or `y` is a tensor, a Python float otherwise. It is 0 where `x` or `y`
        is constant.

    Raises
    ------
    TypeError, ValueError
        As for `hsic`.

    References
    ----------
    .. [1] Kornblith, S., Norouzi, M., Lee, H., & Hinton, G. (2019). Similarity of neural network
       representations revisited. International Conference on Machine Learning, 3519–3529.
    .. [2] Nguyen, T., Raghu, M., & Kornblith, S. (2021). Do wide and deep networks learn the same things?
       International Conference on Learning Representations. (The unbiased estimate in its place.)

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((50, 3))
    >>> round(cka(x, 2 * x[:, ::-1] + 5), 12)
    1.0
    """
    samples = as_samples(x=x, y=y)
    products = _kernel_products(samples, kernel, bandwidth)
    return samples.result(products.correlations()[0, 1])


def _kernel_products(samples: Samples, kernel: Kernel, bandwidth: Bandwidth) -> CentredProducts:
    if kernel not in ("rbf", "linear"):
        raise ValueError(f"kernel must be 'rbf' or 'linear', got {kernel!r}.")
    if kernel == "linear" and bandwidth is not None:
        raise ValueError(f"the linear kernel has no bandwidth, got bandwidth={bandwidth!r}: leave it out.")
    bandwidths = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    if len(bandwidths) != 2 or any(
        sigma is not None and not (sigma > 0 and math.isfinite(sigma)) for sigma in bandwidths
    ):
        raise ValueError(
            f"bandwidth must be None, a positive number or a pair of them, got {bandwidth!r}: in units of "
            "the distances between samples."
        )
    with torch.no_grad():
        if kernel == "linear":
            matrices = [LinearKernel(rows) for rows in samples.rows]
            return _column_products(matrices) or centred_products(matrices)
        # Bandwidths in units of the rescaled rows.
        return centred_products(
            [
                GaussianKernel(rows, median_distance(rows) if sigma is None else math.ldexp(sigma, -exponent))
                for rows, exponent, sigma in zip(samples.rows, samples.exponents, bandwidths, strict=True)
            ]
        )


def median_distance(rows: Tensor) -> float:
    """Return the median distance between different samples, 1 where they are all equal."""
    if len(rows) > _NUM_FOR_MEDIAN:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[order[:_NUM_FOR_MEDIAN].to(rows.device)]
    pairs = torch.pdist(rows)
    # Not `median`, which is the lower of the two middle values of an even number.
    median = float(pairs.quantile(0.5))
    if median == 0 and bool((pairs > 0).any()):
        median = float(pairs[pairs > 0].quantile(0.5))
    return median or 1.0


def _column_products(matrices: list[LinearKernel]) -> CentredProducts | None:
    """Return the inner products of linear kernels from inner products of columns.

    With centred rows, ``Σ_ij K_ij L_ij = |XᵀY|²`` and ``Σ_{j≠i} K_ij = −K_ii``. Nothing is returned where
    pairs of samples cost less, or where the differences of these sums lose digits, as with a far outlier.
    """
    num_samples = matrices[0].num_samples
    widths = [matrix.num_columns for matrix in matrices]
    if 0 in widths or widths[0] ** 2 + widths[0] * widths[1] + widths[1] ** 2 > num_samples * sum(widths) / 2:
        return None
    centred_rows = [matrix.rows - matrix.rows.mean(dim=0) for matrix in matrices]
    squares = torch.stack([rows.square().sum(dim=1) for rows in centred_rows])
    all_pairs = torch.stack(
        [torch.stack([(a.T @ b).square().sum() for b in centred_rows]) for a in centred_rows]
    )
    same = squares @ squares.T
    centred = expansion((all_pairs - same) / 2, squares, squares)
    # The terms of the expansion, none of them subtracted.
    size = centred + (3 + 2 / (num_samples - 2)) * same
    if bool((size.diagonal() > _MAX_LOSS * centred.diagonal()).any()):
        return None
    is_zero = torch.zeros(2, dtype=torch.bool, device=squares.device)
    return CentredProducts(centred / (num_samples * (num_samples - 3)), is_zero, torch.zeros_like(squares))
