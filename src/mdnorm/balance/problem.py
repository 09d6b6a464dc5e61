"""Samples to balance, what stands in the way, and the three ways to weigh them."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdnorm.extras import requires
from mdnorm.metrics.distance_correlation import distance_correlation_sqr
from mdnorm.metrics.pairwise import Distances
from mdnorm.metrics.rates import effective_size
from mdnorm.text import listed, warn

# A class that a fitted model gives less than this probability does not occur for such metadata. The fit stops
# at 1e-12, and a probability that tends to 0 is then below 1e-8 unless very few rows have it.
_NEVER = 1e-8

# More samples than this without overlap are an error, fewer (the ends of a spline, say) a warning.
_MAX_SHARE_WITHOUT_OVERLAP = 0.02

# R² from which on labels or metadata count as a function of the other.
_DETERMINED = 1 - 1e-9

# Weights with which fewer samples than this decide are refused, or half of the samples where there are few.
_MIN_EFFECTIVE = 10.0
_MIN_EFFECTIVE_OF_CLASS = 3.0

# Three matrices of 5000 × 5000 take 600 MB.
_MAX_ROWS_OF_DISTANCES = 5000

_WHAT_TO_DO = (
    "leave these samples out, merge levels or classes, take fewer or coarser metadata columns, or collect "
    "the samples that are missing."
)
_NO_OVERLAP = f"No weights can make labels and metadata independent there: {_WHAT_TO_DO}"


def _mean(columns: Tensor, weights: Tensor) -> Tensor:
    mean: Tensor = weights @ columns / weights.sum()
    return mean


def _standardised(columns: Tensor, weights: Tensor) -> Tensor:
    """Return columns of weighted mean 0 and standard deviation 1; constant ones are 0."""
    tiny = torch.finfo(torch.float64).tiny
    scaled = columns / columns.abs().amax(0).clamp(min=tiny)
    centred = scaled - _mean(scaled, weights)
    # Of a constant column only rounding is left.
    centred[:, columns.amin(0) == columns.amax(0)] = 0
    return centred / _mean(centred.square(), weights).sqrt().clamp(min=tiny)


def _span(columns: Tensor) -> Tensor:
    """Return a basis of the space of columns, orthogonal and of mean square 1: (N, rank)."""
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = left[:, singular > 1e-10 * singular[0]] * len(columns) ** 0.5
    return basis


class Problem(NamedTuple):
    """Samples to balance: label columns are one-hot where there are classes (`codes`)."""

    metadata: Tensor
    labels: Tensor
    codes: Tensor | None
    classes: tuple[Any, ...]
    names: tuple[str, ...]
    base: Tensor

    def part(self, rows: Tensor) -> Problem:
        """Return the problem of some of the samples, for its `dependence`."""
        return self._replace(metadata=self.metadata[rows], labels=self.labels[rows], base=self.base[rows])

    def class_sizes(self, weights: Tensor) -> dict[Any, tuple[int, float]]:
        """Return rows and effective sample size of each class."""
        inside = {name: weights[self.codes == code] for code, name in enumerate(self.classes)}
        return {name: (len(values), effective_size(values)) for name, values in inside.items()}

    def imbalance(self, weights: Tensor) -> list[float]:
        """Return how far labels and each metadata column go together."""
        columns = _standardised(self.metadata, self.base)
        if self.codes is None:
            labels = _standardised(self.labels, weights) * weights[:, None]
            products = _standardised(columns, weights).T @ labels
            return (products.abs().amax(1) / weights.sum()).tolist()
        # The unit is that before weighting, so that the differences can be compared.
        variances, means = [], []
        for code in range(len(self.classes)):
            inside = self.codes == code
            of_class, base = columns[inside], self.base[inside]
            variances.append(_mean((of_class - _mean(of_class, base)).square(), base))
            means.append(_mean(of_class, weights[inside]))
        spread = torch.stack(variances).mean(0).sqrt().clamp(min=1e-12)
        stacked = torch.stack(means)
        return ((stacked.amax(0) - stacked.amin(0)) / spread).tolist()

    def dependence(self, weights: Tensor) -> float:
        """Return the bias-corrected dcor² of labels and standardised metadata in the weighted population."""
        metadata = _standardised(self.metadata, self.base)
        return float(distance_correlation_sqr(metadata, self.labels, weights=weights))

    def refuse_no_overlap(self) -> None:
        """Raise ValueError where single columns show that labels cannot be independent of the metadata."""
        columns = _standardised(self.metadata, self.base)
        for index, name in enumerate(self.names if self.codes is not None else ()):
            column = self.metadata[:, index]
            low, high = column.amin(), column.amax()
            if low == high:
                continue
            inside = [column[self.codes == code] for code in range(len(self.classes))]
            if bool(((column == low) | (column == high)).all()):
                for value in (low, high):
                    absent = [not bool((values == value).any()) for values in inside]
                    missing = list(itertools.compress(self.classes, absent))
                    if missing:
                        count = int((column == value).sum())
                        raise ValueError(
                            f"no overlap: class(es) {listed(missing)} of labels never occur where metadata "
                            f"{name!r} is {float(value):g} ({count} samples). {_NO_OVERLAP}"
                        )
            for code, values in enumerate(inside):
                others = column[self.codes != code]
                if values.amax() < others.amin() or values.amin() > others.amax():
                    raise ValueError(
                        f"no overlap: metadata {name!r} separates the class {self.classes[code]!r} of labels "
                        f"({values.amin():g} to {values.amax():g}) from all others ({others.amin():g} to "
                        f"{others.amax():g}). {_NO_OVERLAP}"
                    )
        root = self.base.sqrt()[:, None]
        basis = _span(root * columns)
        targets = root * _standardised(self.labels, self.base)
        left_over = targets - basis @ (basis.T @ targets) / len(basis)
        determined = left_over.square().sum(0) < (1 - _DETERMINED) * targets.square().sum(0)
        if bool(determined.any()):
            which = determined.nonzero()[:, 0].tolist()
            what = f"label column(s) {which}"
            if self.codes is not None:
                what = f"class(es) {listed(self.classes[i] for i in which)}"
            names = listed(self.names)
            raise ValueError(
                f"no overlap: {what} are a linear function of the metadata columns {names}. {_NO_OVERLAP}"
            )

    def refuse_few_effective(self, weights: Tensor, sizes: dict[Any, tuple[int, float]]) -> None:
        """Raise ValueError where hardly any sample counts, in all or in a class."""
        groups = [("", len(weights), effective_size(weights), _MIN_EFFECTIVE)]
        groups += [(f" of class {name!r}", *size, _MIN_EFFECTIVE_OF_CLASS) for name, size in sizes.items()]
        for of_what, count, effective, least in groups:
            if effective < min(least, count / 2):
                raise ValueError(
                    f"hardly any overlap: the weights{of_what} leave an effective sample size of "
                    f"{effective:.1f} of {count} samples; {self.worst()}. Clip more (clip=), "
                    f"{_WHAT_TO_DO}"
                )

    def worst(self) -> str:
        """Return the columns that go with the labels the most, for an error."""
        before = self.imbalance(self.base)
        order = sorted(range(len(before)), key=before.__getitem__, reverse=True)
        unit = "sd between classes" if self.codes is not None else "correlation"
        shown = ", ".join(f"{self.names[i]!r} ({before[i]:.2f} {unit})" for i in order[:3])
        return f"the metadata column(s) that go with the labels the most: {shown}"


# -- methods ----------------------------------------------------------------------------------------------


def propensity(problem: Problem) -> Tensor:
    """Return ``p(y) / p(y|m)`` times the base weights."""
    with requires("metrics"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    assert problem.codes is not None
    # Orthogonal columns give the same probabilities, and a Hessian that can be inverted.
    columns = _span(_standardised(problem.metadata, problem.base))
    # Unpenalised: a penalty would leave imbalance.
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, max_iter=200)
    with warnings.catch_warnings():
        # Without overlap there is no optimum, which is said below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        model.fit(columns.numpy(), problem.codes.numpy(), sample_weight=problem.base.numpy())
    probabilities = torch.from_numpy(model.predict_proba(columns.numpy()))
    never = ~(probabilities >= _NEVER)
    if bool(never.any()):
        where = never.any(1).nonzero()[:, 0].tolist()
        absent = [problem.classes[index] for index in never.any(0).nonzero()[:, 0].tolist()]
        what = (
            f"no overlap: with metadata as in row(s) {listed(where)} ({len(where)} of {len(never)} samples) "
            f"the class(es) {listed(absent)} of labels never occur; {problem.worst()}. "
        )
        if len(where) > _MAX_SHARE_WITHOUT_OVERLAP * len(never):
            raise ValueError(what + _NO_OVERLAP)
        warn(f"{what}So few samples hardly matter, but it is better to {_WHAT_TO_DO}")
    shares = _mean(problem.labels, problem.base)
    own = probabilities.gather(1, problem.codes[:, None])[:, 0]
    return problem.base * shares[problem.codes] / own


def entropy(problem: Problem) -> Tensor:
    """Return the weights closest to the base weights that satisfy the constraints, by Newton in the dual."""
    metadata = _standardised(problem.metadata, problem.base)
    labels = _standardised(problem.labels, problem.base)
    products = (labels[:, :, None] * metadata[:, None, :]).flatten(1)
    constraints = _span(torch.cat([labels, metadata, products], 1))
    log_base = problem.base.log()
    multipliers = constraints.new_zeros(constraints.shape[1])

    def value(multipliers: Tensor) -> Tensor:
        return torch.logsumexp(log_base + constraints @ multipliers, 0)

    current = value(multipliers)
    for _ in range(200):
        shares = torch.softmax(log_base + constraints @ multipliers, 0)
        gradient = shares @ constraints
        if float(gradient.abs().max()) < 1e-12:
            break
        hessian = (constraints * shares[:, None]).T @ constraints - gradient[:, None] * gradient
        hessian.diagonal().add_(1e-14 * hessian.diagonal().max())
        step = -torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        slope = float(step @ gradient)
        length = 1.0
        while length > 1e-6 and not value(multipliers + length * step) <= current + 0.1 * length * slope:
            length /= 2
        if length <= 1e-6:
            break
        multipliers = multipliers + length * step
        current = value(multipliers)
    shares = torch.softmax(log_base + constraints @ multipliers, 0)
    # Rounding alone is far below this; without a solution the multipliers grow without end.
    if not float((shares @ constraints).abs().max()) < 1e-9:
        raise ValueError(
            "no overlap: no positive weights make each label column uncorrelated with each metadata column "
            f"while they keep the means of both; {problem.worst()}. {_NO_OVERLAP}"
        )
    return shares


def distance(problem: Problem) -> Tensor:
    """Return the weights that minimise weighted distance covariance plus energy distances."""
    num_samples = len(problem.base)
    if num_samples > _MAX_ROWS_OF_DISTANCES:
        raise ValueError(
            f'method="distance" takes at most {_MAX_ROWS_OF_DISTANCES} samples (memory grows with N², time '
            f'with N³), got {num_samples}: take "entropy" or "propensity".'
        )
    share, everything = problem.base / num_samples, slice(0, num_samples)
    # With C and D the doubly centred distances of labels and metadata, negative semi-definite and 0 times the
    # base weights, the objective is wᵀ(C∘D − C − D)w / N², and C∘D − C − D = (1 − C)∘(1 − D) − 1.
    quadratic = torch.ones((), dtype=torch.float64)
    for columns in (problem.labels, _standardised(problem.metadata, problem.base)):
        # A product of matrices may leave a value on the diagonal.
        centred = Distances(columns).block(everything, everything).fill_diagonal_(0)
        means = centred @ share
        mean = means @ share
        # In units of its mean, so that neither unit nor number of columns decides.
        centred.sub_(means[:, None]).sub_(means).add_(mean).div_(-mean).add_(1)
        quadratic = centred.mul_(quadratic)
    quadratic -= 1
    scale = quadratic.diagonal().mean()
    # The sum of the weights is fixed, so that a constant changes nothing; with it 1 is no null vector. The
    # ridge shares the weight of samples that are alike.
    quadratic += scale
    quadratic.diagonal().add_(1e-8 * scale / problem.base)
    return _smallest_on_simplex(quadratic)


def _smallest_on_simplex(quadratic: Tensor) -> Tensor:
    """Return the direction of the w ≥ 0 of a given sum with the smallest ``wᵀ Q w``, Q positive definite.

    It is that of the w ≥ 0 with the smallest ``wᵀQw/2 − Σw``, found by block principal pivoting (Kim & Park
    2011, SIAM Journal on Scientific Computing 33, 3261–3281).
    """
    num_samples = len(quadratic)
    free = torch.ones(num_samples, dtype=torch.bool)
    fewest, chances = num_samples + 1, 3
    weights = quadratic.new_zeros(num_samples)
    for _ in range(10 * num_samples):
        index = free.nonzero()[:, 0]
        weights.zero_()
        # No copy of the whole matrix while all are free.
        part = quadratic if len(index) == num_samples else quadratic[index[:, None], index]
        factor = torch.linalg.cholesky(part)
        weights[index] = torch.cholesky_solve(quadratic.new_ones(len(index), 1), factor)[:, 0]
        gradient = quadratic @ weights - 1
        wrong = torch.where(free, weights < -1e-12 * weights.abs().max(), gradient < -1e-9)
        count = int(wrong.sum())
        if count == 0:
            break
        if count < fewest:
            fewest, chances = count, 3
        elif chances > 0:
            chances -= 1
        else:
            # One at a time cannot go in a circle.
            wrong = torch.arange(num_samples) == wrong.nonzero().max()
        free = free ^ wrong
    return weights.clamp(min=0)
