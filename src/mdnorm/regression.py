"""Regression of features on metadata: the maths of Metadata Normalization, once, for layers and for tables.

Notation (Lu et al., CVPR 2021, section 3). A sample has metadata `m` (K_m columns), labels `y` (K_y) and
features `f` (D values). The model is ``f = m·β_m + y·β_y + β_0 + r``; only the metadata part is removed::

    out = f − (m − m̄)·β_m                       (the mean of the features stays)
    out = f − m·β_m − β_0                        (``center=True``, the authors' form)

The labels are in the regression so that what they share with the metadata is not removed with these.

**Moments.** A row of the design is ``z = [y, 1, m]``, labels and metadata about a fixed origin in units of a
fixed scale (`Standardisation`). So the moments that least squares needs are plain weighted averages of
``z zᵀ`` and ``z fᵀ``: batches and processes add up by one sum, and a sample weight is one factor.

**Coefficients.** β_m is a matrix of the design alone (`coefficient_operator`), times ``E[z fᵀ]``.

**Gradient.** The map from features to output is linear, ``out = (I − B P) f`` with B and P made of the design
alone, so the backward pass needs no features: `regress` saves N numbers a column. To it comes the decay of
what is removed, see `regress`.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from mdnorm.arrays import is_traced
from mdnorm.distributed import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Granularity",
    "Memory",
    "Standardisation",
    "coefficient_operator",
    "position_dims",
    "regress",
    "remove",
]

Granularity = Literal["element", "channel"]

# A column is constant when its standard deviation is below this fraction of its mean.
_CONSTANT = 1e-12
# A direction of the design is collinear, or determined by the labels, when less than this share of its
# columns' variance is left. It is far above the rounding of the moments, which is what an inverse would
# magnify. A column is constant when its variance is less than this share of one unit or, where that is less,
# of its second moment about the origin, or less than 1 / 100 of the share of that.
_COLLINEAR = {torch.float64: 1e-10, torch.float32: 1e-6}
_FAR = 0.01
# The same for directions of the labels in float64: about the square root of rounding, so that neither what
# they magnify nor what they then leave of the metadata is rounding.
_COLLINEAR_LABELS = 1e-9
# Beside a prior, this part of that share is added to the variance of a label: too little to be seen where
# labels are not collinear, enough that what nearly collinear ones magnify stays small beside the prior.
_LABEL_RIDGE = 0.01
# Added where nothing may be divided by zero; its inverse leaves a constant column no coefficient.
_TINY = 1e-30


# -- precision -----------------------------------------------------------------------------------------------


def compute_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype in which features are regressed: their own, but never below float32."""
    return torch.promote_types(features.dtype, torch.float32)


_AS_IT_IS = contextlib.nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast does not compute below float32."""
    # Entering torch.autocast costs as much as a small product: only where there is something to switch off.
    if torch.is_autocast_enabled(device.type):
        return cast("AbstractContextManager[None]", torch.autocast(device.type, enabled=False))
    return _AS_IT_IS


# -- features as a matrix ------------------------------------------------------------------------------------


def position_dims(features: Tensor, granularity: Granularity, channel_dim: int = 1) -> tuple[int, ...]:
    """Return the dimensions of features (N, ...) over which one coefficient is shared.

    An empty tuple for "element", all position dimensions for "channel"; see `mdnorm.MetadataNorm`. ValueError
    for fewer than 2 dimensions, another granularity, or a channel_dim that is not a feature dimension.
    """
    if features.ndim < 2:
        raise ValueError(
            f"features must have at least 2 dimensions, (num_samples, ...), got {tuple(features.shape)}."
        )
    if granularity == "element":
        return ()
    if granularity != "channel":
        raise ValueError(f"granularity must be 'element' or 'channel', got {granularity!r}.")
    channel = channel_dim + features.ndim if channel_dim < 0 else channel_dim
    if not 1 <= channel < features.ndim:
        raise ValueError(
            f"channel_dim={channel_dim} is not a feature dimension of shape {tuple(features.shape)} "
            "(dimension 0 holds the samples)."
        )
    return tuple(dim for dim in range(1, features.ndim) if dim != channel)


def as_matrix(tensor: Tensor, dims: tuple[int, ...], mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return features (N, ...) as the (N, D) matrix that is regressed: flat, or means over the positions.

    Averaging is exact, since all positions of a sample have the same row of the design. `mask` (N, 1, ...) is
    true at the positions that count.
    """
    if not dims:
        matrix = tensor if tensor.ndim == 2 else tensor.flatten(1)
        return matrix if matrix.dtype == dtype else matrix.to(dtype)
    if mask is None:
        return tensor.to(dtype).mean(dims)
    return torch.where(mask, tensor, 0).to(dtype).sum(dims) / _num_positions(tensor, dims, mask)


def _num_positions(tensor: Tensor, dims: tuple[int, ...], mask: Tensor | None) -> int | Tensor:
    """Return how many positions share the coefficients: a number, or (N, 1) with a mask; at least 1."""
    if mask is None:
        return max(math.prod([tensor.shape[dim] for dim in dims]), 1)
    return mask.sum(dims).clamp_min(1)


def _subtract(
    tensor: Tensor,
    matrix: Tensor | None,
    left: Tensor,
    right: Tensor,
    dims: tuple[int, ...],
    mask: Tensor | None,
) -> Tensor:
    """Return ``tensor − left @ right``, the product spread over the positions that count."""
    if dims:
        product = left @ right
        for dim in dims:
            product = product.unsqueeze(dim)
        return (tensor - (product if mask is None else torch.where(mask, product, 0))).to(tensor.dtype)
    out = torch.addmm(
        as_matrix(tensor, (), None, left.dtype) if matrix is None else matrix, left, right, alpha=-1
    )
    if tensor.ndim == 2 and tensor.dtype == out.dtype:
        return out
    return out.to(tensor.dtype).reshape(tensor.shape)


def remove(
    features: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    dims: tuple[int, ...] = (),
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``features − basis @ coefficients``, the coefficients taken as given (evaluation).

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    basis, coefficients : (N, R), (R, D) tensors
        The gradient reaches the basis, and with it the metadata.
    dims : tuple of int
        From `position_dims`.
    mask : (N, 1, ...) bool tensor, optional
        Positions that are corrected; the others stay as they are.

    Returns
    -------
    (N, ...) tensor, dtype of the features
    """
    dtype = compute_dtype(features)
    with full_precision(features.device):
        return _subtract(features, None, basis.to(dtype), coefficients.to(dtype), dims, mask)


# -- design --------------------------------------------------------------------------------------------------


class Standardisation(NamedTuple):
    """Origin and unit of the design columns ``[y, 1, m]``, fixed once: ``z = (x − origin) · scale``."""

    origin: Tensor  # (K,), 0 for the intercept
    scale: Tensor  # (K,), 1 for the intercept

    @classmethod
    def of(
        cls, columns: Tensor, intercept: int, weights: Tensor | None = None, group: ProcessGroup | None = None
    ) -> Standardisation:
        """Return mean and inverse standard deviation of columns (N, K) over all processes of the group.

        Without weight, or with a value that is not finite, there are none: the scale is then 0.
        """
        share = torch.ones_like(columns[:, :1]) if weights is None else weights.unsqueeze(1)
        # With the column of ones, each sum has the total weight in the place of the intercept.
        total = _over(group, (share * columns).sum(0))
        weight = total[intercept]
        origin = total / weight
        variance = _over(group, (share * (columns - origin).square()).sum(0)) / weight
        return cls.of_moments(origin, variance, intercept)

    @classmethod
    def of_moments(cls, mean: Tensor, variance: Tensor, intercept: int) -> Standardisation:
        """Return the same for given means and variances; a constant column has its size as its unit."""
        origin, deviation = mean.clone(), variance.sqrt()
        varies = deviation > _CONSTANT * origin.abs() + torch.finfo(deviation.dtype).tiny ** 0.5
        unit = torch.where(varies, deviation, torch.where(origin == 0, 1.0, origin.abs()))
        origin[intercept], unit[intercept] = 0, 1
        known = torch.isfinite(origin + deviation).all()
        return cls(torch.where(known, origin, 0), torch.where(known, 1 / unit, 0))


def _over(group: ProcessGroup | None, tensor: Tensor) -> Tensor:
    return tensor if group is None else all_reduce_sum(tensor, group)


# -- coefficients --------------------------------------------------------------------------------------------


def coefficient_operator(
    gram: Tensor,
    num_protected: int,
    share: float | Tensor = 0.0,
    *,
    dtype: torch.dtype = torch.float64,
    every: bool = False,
) -> Tensor:
    """Return the matrix that takes ``E[z fᵀ]`` to the coefficients of ridge regression, by the design alone.

    Labels and intercept are partialled out of the metadata (Frisch–Waugh–Lovell theorem), so with
    ``S = E[z zᵀ]`` in blocks p (labels and intercept) and m it is

        β_m = (S_mm − S_mp S_pp⁺ S_pm + share · V)⁻¹ (C_m − S_mp S_pp⁺ C_p),

    V the variances of the metadata columns. What labels and other columns leave of a column is judged against
    all of its variance: rounding is never inverted.

    Parameters
    ----------
    gram : (K, K) tensor
        ``E[z zᵀ]`` of rows ``z = [y, 1, m]``; without `share` a prior on all of them may be in it.
    num_protected : int
        K_y + 1, number of labels and intercept. Their coefficients are not shrunk.
    share : float or (1,) tensor
        Shrinkage of the metadata coefficients in shares of each column's variance: a prior worth `p` samples
        beside a weight of `w` samples is ``p / (p + w)``. 0: the least-squares solution of least norm in
        units of the columns.
    dtype : torch.dtype
        Of the cross moments, whose rounding decides from where on a direction counts as collinear.
    every : bool
        Whether to return the rows of labels and intercept, too.

    Returns
    -------
    (K_m, K) tensor, or (K, K) with `every`
        A constant column has a row and a column of zeros.
    """
    p, intercept = num_protected, num_protected - 1
    has_share = isinstance(share, Tensor) or share > 0
    rounding = 100 * torch.finfo(gram.dtype).eps
    smallest = max(_COLLINEAR.get(dtype, _COLLINEAR[torch.float32]), rounding)
    squares, mean = gram.diagonal(), gram[intercept]
    if not has_share:
        mean = mean / (squares[intercept] + _TINY)
    # About the means the intercept, which is put back at the end, leaves zeros, as all constant columns do.
    centred = torch.addr(gram, mean, gram[intercept], alpha=-1)
    variance = centred.diagonal()
    least = smallest * torch.add(squares.clamp(_CONSTANT**2 / smallest, 1), squares, alpha=_FAR)
    varies = variance > least
    if has_share:
        least = torch.add(least, variance, alpha=smallest)
        ridge = torch.maximum(share * variance, least)
        ridge[:p] = _LABEL_RIDGE * least[:p]
        variance.add_(torch.where(varies, ridge, 1 / _TINY))
        rows = torch.cholesky_inverse(torch.linalg.cholesky_ex(centred)[0])[0 if every else p :]
    else:
        unit = torch.where(varies, variance, torch.inf).rsqrt()
        units = unit.unsqueeze(1) * unit
        far = (squares * unit.square()).max()
        rows = _pseudo_inverse(centred * units, p, smallest * far.sqrt(), rounding * far, every)
        rows = rows * units[0 if every else p :]
    rows[:, intercept] = -(rows @ mean)
    if every:
        rows[intercept] = -(mean @ rows)
        rows[intercept, intercept] += 1 / (squares[intercept] + _TINY)
    return rows


def _pseudo_inverse(
    correlation: Tensor, num_protected: int, smallest: Tensor, rounding: Tensor, every: bool
) -> Tensor:
    """Return the inverse (all rows or those of the metadata) of correlations, without what hardly varies.

    Directions of the labels are left out first, then those of the metadata that the labels hardly leave.
    `rounding` is what may be wrong in the matrix.
    """
    p = num_protected
    variance, vectors = torch.linalg.eigh(correlation[:p, :p])
    variance = torch.where(variance > smallest.clamp_min(_COLLINEAR_LABELS) + rounding, variance, torch.inf)
    protected = (vectors / variance) @ vectors.mT
    through = correlation[p:, :p] @ protected
    # Refined once: `left` would magnify what the inverse of nearly collinear labels leaves of rounding.
    through = through + (correlation[p:, :p] - through @ correlation[:p, :p]) @ protected
    unit = torch.eye(len(through), dtype=through.dtype, device=through.device)
    beside = torch.cat([-through, unit], 1)
    # Nearly collinear labels magnify all rounding, that of the cross moments by the square root.
    least = variance.min().clamp_max(1)
    smallest = smallest / least.sqrt() + rounding / least
    variance, vectors = torch.linalg.eigh(beside @ correlation @ beside.mT)
    left = (vectors / torch.where(variance > smallest, variance, torch.inf)) @ vectors.mT
    across = -left @ through
    rows = torch.cat([across, left], 1)
    if every:
        rows = torch.cat([torch.cat([protected - through.mT @ across, across.mT], 1), rows])
    return rows


def apply_operator(operator: Tensor, moments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``operator @ moments`` in a dtype.

    Multiplied in the operator's dtype: where columns are collinear, it is as large as the prior is small.
    """
    return (operator @ moments.to(operator.dtype)).to(dtype)


def prior_share(prior: float, weight: Any) -> Any:
    """Return what a prior weighs beside the weight of samples, of both together; 0.0 without a prior."""
    return prior / (prior + weight) if prior else 0.0


# -- the step of a network -----------------------------------------------------------------------------------


class Memory(NamedTuple):
    """The running mean of what losses say about the coefficients, kept by the backward pass of `regress`."""

    adjoint: Tensor  # (R, D), changed in place
    weight: Tensor  # (1,), the number of samples behind it, changed in place
    added: float | Tensor  # what this batch weighs; tensors are (1,)
    kept: float | Tensor  # the share of its weight that the batch leaves the past
    samples: float | Tensor = 1  # divides the gradient of a batch to be that of a mean over its samples
    eager: bool = False  # see `is_eager`


def regress(
    features: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    rows: Tensor | None,
    dims: tuple[int, ...] = (),
    mask: Tensor | None = None,
    *,
    memory: Memory | None = None,
    group: ProcessGroup | None = None,
    held: Tensor | None = None,
    decay: float | Tensor = 0.0,
) -> Tensor:
    """Return ``features − basis @ coefficients``, the gradient flowing through the coefficients as well.

    Where the coefficients are ``rows @ features``, the gradient of the features is ``g − rowsᵀ (basisᵀ g)``.
    What stands in the brackets, the *adjoint* of the coefficients, is a sum over all samples behind them: of
    this batch, of all processes (`group`), or of many batches (`memory`), whose gradient then tends to that
    of least squares over the whole data set as the window grows.

    That gradient leaves the effect of the metadata free: whatever it is, it is removed, and the loss stays
    the same. A network that memorises its samples lets it grow, in the direction whose removal helps; new
    samples do not have it, and there the layer would *add* it. So the gradient of ``‖held @ coefficients‖``
    is added, `decay` times as large as g.

    Parameters
    ----------
    features : (N, ...) tensor, any floating dtype
    basis : (N, R) tensor
        What multiplies the coefficients. A constant, as all that follows.
    coefficients : (R, D) tensor
    rows : (R, N) tensor or None
        Operator times the weighted rows of the design, as if the batch were the whole data set. None: the
        coefficients are constants.
    dims, mask
        As in `remove`.
    memory : Memory, optional
        With it, the backward pass can run only once, and not inside torch.func.
    group : ProcessGroup, optional
        The processes whose samples are one batch; one collective in the backward pass.
    held : (N, R) tensor, optional
        The part of the basis that `decay` acts on, with the weights of the samples. None: all of it.
    decay : float or (1,) tensor
        Size of that part of the gradient, in shares of the size of g (mean over the positions).

    Returns
    -------
    (N, ...) tensor, dtype of the features
    """
    dtype = compute_dtype(features)
    parts = [
        part if part is None or part.dtype == dtype else part.to(dtype)
        for part in (basis, coefficients, rows, held)
    ]
    apply = _Regress.apply if is_traced() else _apply_regress
    return cast(Tensor, apply(features, *parts, mask, dims, group, decay, *(memory or _NO_MEMORY)))


class _Regress(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        basis: Tensor,
        coefficients: Tensor,
        rows: Tensor | None,
        held: Tensor | None,
        mask: Tensor | None,
        dims: tuple[int, ...],
        group: ProcessGroup | None,
        decay: Any,
        adjoint: Tensor | None,
        weight: Tensor | None,
        count: Any,
        kept: Any,
        samples: Any,
        eager: Any,
    ) -> Tensor:
        # torch.compile counts the parameters, so those of the memory have names here. Detached, the output is
        # no view: an in-place ReLU may follow.
        return _subtract(features, None, basis, coefficients, dims, mask).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, basis, coefficients, rows, held, mask, ctx.dims, ctx.group, ctx.decay, *memory = inputs
        # What is state is changed in the backward pass, and the version of a saved tensor is guarded.
        ctx.memory = tuple(memory)
        decays = isinstance(ctx.decay, Tensor) or ctx.decay
        ctx.save_for_backward(basis, coefficients if decays else None, rows, held, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, coefficients, rows, held, mask = ctx.saved_tensors
        dims, group, decay = ctx.dims, ctx.group, ctx.decay
        adjoint, weight, count, kept, samples, eager = ctx.memory
        with full_precision(grad.device):
            matrix = as_matrix(grad, dims, mask, basis.dtype)
            terms: list[tuple[Tensor, Tensor]] = []
            sizes = None
            if coefficients is not None:
                held = basis if held is None else held
                with torch.no_grad():
                    removed = (held.mT @ held @ coefficients).mul_(coefficients).sum()
                size = torch.linalg.vector_norm(matrix)
                if isinstance(decay, float) and group is None and not torch.is_grad_enabled():
                    # Numbers take a fraction of the time of tensors.
                    strength = decay * size.item() / math.sqrt(max(removed.item(), _TINY))
                    terms.append((held * -strength, coefficients))
                else:
                    sizes = torch.stack([size.square(), removed])
            if rows is not None:
                total, left = matrix, rows.mT
                if dims:
                    sharing = _num_positions(grad, dims, mask)
                    total, left = matrix * sharing, left / sharing
                batch = basis.mT @ total
                if adjoint is not None:
                    if torch.is_grad_enabled():
                        raise RuntimeError(
                            "estimator='running' keeps state in the backward pass, which can be "
                            "differentiated only once: take 'batch', 'dataset' or 'recursive'."
                        )
                    # Of several processes, or of weights, the number is a tensor in float64.
                    samples = samples.to(batch.dtype) if isinstance(samples, Tensor) else samples
                    scaled = isinstance(samples, Tensor) or samples != 1
                    batch = batch / samples if scaled else batch
                if group is not None:
                    # By one collective.
                    parts = [batch.flatten()] if sizes is None else [batch.flatten(), sizes]
                    sums = all_reduce_sum(torch.cat(parts), group)
                    sizes = None if sizes is None else sums[-2:].detach()
                    batch = sums[: batch.numel()].view_as(batch)
                if adjoint is not None:
                    advance(weight, kept, count, (adjoint, batch), eager=eager)
                    batch = adjoint if adjoint.dtype == batch.dtype else adjoint.to(batch.dtype)
                    batch = batch * samples if scaled else batch
                terms.append((left, batch))
            if sizes is not None:
                if group is not None and rows is None:
                    sizes = all_reduce_sum(sizes, group)
                strength = decay * sizes[0].sqrt() / sizes[1].clamp_min(_TINY).sqrt()
                terms.append((held * -strength.to(held.dtype), coefficients))
            if terms:
                left, right = terms[0]
                if len(terms) > 1:
                    left, right = torch.cat([left, terms[1][0]], 1), torch.cat([right, terms[1][1]])
                grad = _subtract(grad, matrix, left, right, dims, mask)
            return (grad, *(None,) * 14)


# What `Function.apply` itself calls in the end. Before that it binds the arguments to the signature of
# `forward`, which takes as long as all the rest of a small step.
_apply_regress: Any = super(torch.autograd.Function, _Regress).apply
_NO_MEMORY = (None,) * 6


def is_eager(tensor: Tensor) -> bool:
    """Whether to look at a value costs nothing: on the CPU, outside of graphs and transforms."""
    return tensor.is_cpu and not is_traced()


def advance(
    weight: Tensor, kept: float | Tensor, count: float | Tensor, *averages: tuple[Tensor, Tensor], eager: bool
) -> bool | Tensor:
    """Move weighted averages towards those of a batch, in place; return whether the batch was used.

    A batch with a value that is not finite (an overflow of mixed precision) is left out: it would never
    leave. The share `kept` of the weight (1,) of the past stays, and `count` is that of the batch. A pair is
    an average and its value in the batch; the last one tells whether the batch is finite. As numbers
    (`eager`, see `is_eager`) the weights take a fraction of the time that they take as tensors.
    """
    # What is not finite in the design is not finite in its products with the features, which come last.
    total = averages[-1][1].sum()
    if eager:
        if not math.isfinite(total.item()):
            return False
        count = float(count)
        past = weight.item() * float(kept) + count
        if past > 0:
            weight.fill_(past)
            for average, batch in averages:
                average.lerp_(
                    batch if batch.dtype == average.dtype else batch.to(average.dtype), count / past
                )
        return True
    finite = torch.isfinite(total)
    # Without the batch, all of the past is kept.
    weight.mul_(torch.where(finite, torch.as_tensor(kept, dtype=weight.dtype, device=weight.device), 1.0))
    used = finite.to(weight.dtype) * count
    weight.add_(used)
    share = used / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    for average, batch in averages:
        average.lerp_(torch.where(finite, batch, 0).to(average.dtype), share.to(average.dtype))
    return finite
