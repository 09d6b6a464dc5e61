"""How much of a regression's coefficients is noise: shrinkage over many features, from one source or two.

A layer has the same few metadata columns in front of many features, so the features together tell how much of
their coefficients is noise, which no coefficient can tell alone (empirical Bayes).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mdnorm.moments import Moments, NoSamplesError
from mdnorm.regression import Standardisation, coefficient_operator

# A residual with a smaller share of a feature's variance is rounding: the feature is exactly determined.
_EXACT = 1e-12
# Chance that noise moves any feature further than the limit of `_limit`.
_BEYOND = 0.05


@dataclass(frozen=True)
class Regression:
    """Least-squares coefficients of the metadata in directions in which their errors are independent.

    ``coefficients = root @ z · deviation`` where, without any effect, each value of `z` has mean 0 and
    variance 1, whatever the metadata columns are and however they are coded. All tensors are float64.
    """

    units: Standardisation  # of the design columns ``[y, 1, m]``
    coefficients: Tensor  # (K_m, D), for one unit of the columns
    # (K_m, R) and (R, K_m), with R directions of the metadata that labels and other columns do not determine.
    root: Tensor
    inverse: Tensor
    # (D,), of the residual, a little enlarged since it is estimated from few rows; 0 where a feature is
    # constant or exactly determined.
    deviation: Tensor
    rows: float  # behind the errors
    columns: int  # directions that were fitted, without the intercept
    features: float  # how many independent features the D are worth: see `independent_features`

    @classmethod
    def of(
        cls,
        moments: Moments,
        rows: float,
        features: float,
        units: Standardisation | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Regression:
        """Return the regression of a data set; with weights the rows are ``(Σ w)² / Σ w²`` (Kish 1965).

        The units may be those of another regression that this one is compared with, and the dtype is that of
        the features, see `mdnorm.regression.coefficient_operator`.
        """
        units = units or moments.units
        if units is None:
            raise NoSamplesError("no rows: a regression needs at least one.")
        p, scale = moments.num_protected, units.scale
        gram = moments.gram / moments.weight * (scale.unsqueeze(1) * scale)
        cross = moments.cross / moments.weight * scale.unsqueeze(1)
        gram[p - 1, p - 1] = 1
        operator = coefficient_operator(gram, p, dtype=dtype, every=True)
        every = operator @ cross
        columns = round(float((operator * gram).sum())) - 1
        squares = moments.squares / moments.weight
        left = squares - (cross * every).sum(0)
        left = torch.where(left > _EXACT * squares, left, 0)
        # The square of a t-distributed value has a mean of df / (df − 2). Too few rows tell nothing of noise.
        freedom = rows - 1 - columns
        noise = rows / (freedom - 2) if freedom > 2 else math.inf
        left = left if freedom > 2 else squares
        variance, vectors = torch.linalg.eigh(operator[p:, p:] / rows)
        kept = variance > 1e-12 * variance.max() if len(variance) else variance > 0
        variance, vectors = variance[kept], vectors[:, kept]
        inverse = vectors.mT * variance.rsqrt().unsqueeze(1)
        root = vectors * variance.sqrt()
        deviation = torch.where(left > 0, (left * noise).sqrt(), 0)
        return cls(units, every[p:], root, inverse, deviation, rows, columns, features)

    def standardised(self, coefficients: Tensor) -> Tensor:
        """Return coefficients (K_m, D) in directions and units of their errors, (R, D); 0 without error."""
        return self.inverse @ coefficients / torch.where(self.deviation > 0, self.deviation, torch.inf)

    @property
    def errors(self) -> Tensor:
        """Standard errors of the coefficients of raw columns, (K_m, D); infinite where rows are too few."""
        root = (self.root.square().sum(1) * self.units.scale[-len(self.root) :].square()).sqrt().unsqueeze(1)
        freedom = self.rows - 1 - self.columns
        honest = math.sqrt((freedom - 2) / freedom) if freedom > 2 else 1.0
        return torch.where(root > 0, root * self.deviation * honest, 0)

    @property
    def noise(self) -> float:
        """The mean square of noise over that of the coefficients, at most 1."""
        squares = self.standardised(self.coefficients)[:, self.deviation > 0].square()
        return 1 / max(float(squares.mean()), 1.0) if squares.numel() else 0.0


def independent_features(moments: Moments, total: int) -> float:
    """Return how many independent features `total` (D) correlated ones are worth.

    The mean of their squared noise has the variance of that of so many independent values:
    ``D² / Σ r²`` over all pairs, here with the mean of `r²` over some of the features, whose moments stand in
    the place of metadata, the design's columns protected beside them.
    """
    gram, rows = _beside(moments)[1], moments.num_rows - moments.num_protected
    used = gram.diagonal() > _EXACT * moments.gram.diagonal()[moments.num_protected :]
    gram, some = gram[used][:, used], int(used.sum())
    if some < 2 or rows < 2:
        return 1.0
    unit = gram.diagonal().rsqrt()
    squares = (gram * unit.unsqueeze(1) * unit).square().sum()
    by_chance = 1 / rows
    mean = float((squares - some) / (some * (some - 1)))
    mean = min(max((mean - by_chance) / (1 - by_chance), 0.0), 1.0)
    return total / (1 + (total - 1) * mean)


def _filter(z: Tensor, features: float) -> Tensor:
    """Return the symmetric matrix (R, R) that takes noisy z (R, D) of unit noise to what is no noise in it.

    The singular values of z are shrunk as is best for the mean squared error where a signal of few directions
    lies in noise (Gavish & Donoho 2017); those that noise alone has become 0. With one direction this is
    James & Stein's factor with a threshold; it does not depend on how the metadata are coded.
    """
    used = z[:, (z != 0).any(0) & ~_alone(z)]
    if used.numel() == 0:
        return z.new_zeros(len(z), len(z))
    ratio = len(z) / min(features, used.shape[1])
    values, vectors = torch.linalg.eigh(used @ used.mT / used.shape[1])
    edge = (1 + math.sqrt(ratio)) ** 2
    above = ((values - ratio - 1).square() - 4 * ratio).clamp_min(0).sqrt()
    share = torch.where(values > edge, above / values.clamp_min(edge), 0)
    filtered: Tensor = (vectors * share) @ vectors.mT
    return filtered


def _alone(z: Tensor) -> Tensor:
    """Return which features, (D,), have an effect so much larger than the others that each is judged alone.

    One that is nearly determined by the metadata says nothing about the noise of the others.
    """
    length = z.norm(dim=0)
    usual = length[length > 0].median() if bool((length > 0).any()) else length.new_zeros(())
    alone: Tensor = length > (10 * usual).clamp_min(_limit(*z.shape))
    return alone


def _shrunk(z: Tensor, pooled: Tensor) -> Tensor:
    """Return the pooled estimate of z, (R, D), and James–Stein's of each feature that is judged alone."""
    alone = _alone(z)
    pooled[:, alone] = z[:, alone] * (1 - len(z) / z[:, alone].square().sum(0))
    return pooled


def _limit(directions: int, features: int) -> float:
    """Return what the length of R values of noise exceeds in none of D features, with 95 % certainty.

    Laurent & Massart, Annals of Statistics 28 (2000), lemma 1.
    """
    x = math.log(features / _BEYOND)
    return math.sqrt(directions + 2 * math.sqrt(directions * x) + 2 * x)


def _limited(z: Tensor, shrunk: Tensor) -> Tensor:
    """Return shrunk values (R, D) that are no further from z than noise reaches, feature by feature."""
    change = shrunk - z
    length = change.norm(dim=0)
    return z + change * (_limit(*z.shape) / length.clamp_min(1e-30)).clamp_max(1) if z.numel() else shrunk


class FoundAgain(NamedTuple):
    """How much of the effect in the training rows also shows in new rows."""

    share: float  # 1: all of it, 0: nothing
    error: float  # its standard error (jackknife over groups of rows)
    shares: Tensor  # (Q,), of each direction of the effect, the strongest first
    errors: Tensor  # (Q,)


class Combined(NamedTuple):
    """What `combine` returns."""

    coefficients: Tensor  # (K_m, D), shrunk
    kept: float  # their length beside that of the least-squares coefficients, both in standard errors


def effect(trained: Regression) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clear part of an effect: directions, its values and the shares that are no noise.

    The directions (K_m, Q) multiply the standardised values (Q, D), which are as estimated; the shares (Q,)
    are what is left of them without noise, all positive, the largest first.
    """
    z = trained.standardised(trained.coefficients)
    shares, vectors = torch.linalg.eigh(_filter(z, trained.features))
    kept = (shares > 1e-6).nonzero()[:, 0].flip(0)
    vectors = vectors[:, kept]
    return trained.root @ vectors, vectors.mT @ z, shares[kept]


def found_again(trained: Regression, groups: Sequence[Moments]) -> FoundAgain | None:
    """Return the share of a trained effect that new rows show; its error needs no model of the noise.

    The features of a new row are projected on each direction of the trained effect, ``h = F · values / σ``,
    and regressed on what the effect predicts from the row's metadata. Each group of rows has the moments of
    the design and of ``h`` (n, Q). The result is None without a trained effect, or where the metadata of the
    new rows, given their labels, do not differ or differ in a single group only.

    References
    ----------
    Efron & Stein, The jackknife estimate of variance, Annals of Statistics 9 (1981).
    """
    directions, values, shares = effect(trained)
    groups = [group for group in groups if group.weight > 0]
    if not len(shares) or len(groups) < 3:
        return None
    strength = values.square().sum(1) * shares
    # Of one unit of a raw metadata column.
    slopes = directions * strength * trained.units.scale[-len(directions) :].unsqueeze(1)
    others = [functools.reduce(Moments.merge, groups[:i] + groups[i + 1 :]) for i in range(len(groups))]
    parts, together = [_explained(other, slopes) for other in others], functools.reduce(Moments.merge, groups)
    whole = torch.stack(_explained(together, slopes))
    without = torch.stack([torch.stack(part) for part in parts])
    n = len(groups)
    total, totals = whole.sum(1), without.sum(2)
    share, each = total[0] / total[1], whole[0] / whole[1]
    left_out, left_out_each = totals[:, 0] / totals[:, 1], without[:, 0] / without[:, 1]
    # The trained effect has a noise of its own, which counts as new rows are more than training rows.
    wider = (n - 1) * (1 + together.num_rows / trained.rows)
    error = (wider * (left_out - left_out.mean()).square().mean()).sqrt()
    errors = (wider * (left_out_each - left_out_each.mean(0)).square().mean(0)).sqrt()
    if not (share + error).isfinite():
        return None
    # Of a direction in which new rows do not differ, or a single group, nothing is known beyond the whole.
    is_known = (each + errors).isfinite()
    each, errors = torch.where(is_known, each, share), torch.where(is_known, errors, 0)
    return FoundAgain(float(share), float(error), each, errors)


def _explained(moments: Moments, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ q h`` and ``Σ q²``, (Q,) each, of predictions q without what labels explain."""
    labels = moments.num_protected - 1
    through, beside = _beside(moments)
    products = moments.cross[labels + 1 :] - through.mT @ moments.cross[:labels]
    explained, predicted = (slopes * products).sum(0), (slopes * (beside @ slopes)).sum(0)
    rounding = 1e-8 * (slopes * (moments.gram[labels + 1 :, labels + 1 :] @ slopes)).sum(0)
    return explained, torch.where(predicted > rounding, predicted, 0)


def _beside(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the regression of the metadata on the labels, (K_y, K_m), and the products of what it leaves."""
    p, gram = moments.num_protected, moments.gram
    unit = gram.diagonal()[: p - 1].clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    correlation = gram[: p - 1, : p - 1] * unit.unsqueeze(1) * unit
    across = gram[: p - 1, p:] * unit.unsqueeze(1)
    through = torch.linalg.pinv(correlation, rtol=1e-10, hermitian=True) @ across
    return through * unit.unsqueeze(1), gram[p:, p:] - across.mT @ through


def combine(trained: Regression, new: Regression | None = None, found: FoundAgain | None = None) -> Combined:
    """Return coefficients without what is noise in them, from one regression or from two in the same units.

    One: directions of the metadata in which the features together show no more than noise are left out, and
    the others shrunk. Two: what training rows say, times the share of it that new rows found again, is a
    first guess. Where new rows contradict it by more than noise, they decide, and else both are averaged by
    their precision.

    No feature's coefficients are further than noise reaches (3.2 standard errors for one feature and one
    column, 5.2 for 1000 features) from the least-squares ones, of the new rows where there are two: the
    limited translation of Efron & Morris, here with the length over all directions.

    References
    ----------
    - James & Stein, Estimation with quadratic loss, Berkeley Symposium 4 (1961).
    - Efron & Morris, Limiting the risk of Bayes and empirical Bayes estimators, part II, JASA 67 (1972);
      Stein's estimation rule and its competitors, JASA 68 (1973).
    - Gavish & Donoho, Optimal shrinkage of singular values, IEEE Trans. Information Theory 63 (2017).
    """
    if new is None or math.isinf(float(new.deviation.max())):
        return _from_one(trained)
    directions, values, shares = effect(trained)
    common, slopes = _slopes(found, shares)
    known = trained.deviation.isfinite()
    deviation = torch.where(known, trained.deviation, 0)
    z = trained.standardised(trained.coefficients)
    alone = trained.root @ _shrunk(z, torch.zeros_like(z)) * common
    guess = ((directions * slopes) @ torch.where(_alone(z), 0, values) + alone) * deviation
    guess = torch.where(trained.deviation > 0, guess, trained.coefficients)
    both = (deviation > 0) & (new.deviation > 0)
    ratio = float((deviation[both] / new.deviation[both]).square().mean()) if both.any() else 0.0
    through = new.inverse @ (directions * slopes)
    noise, vectors = torch.linalg.eigh(through @ through.mT * ratio)
    noise = noise.clamp_min(0).unsqueeze(1)
    # Of unit noise: that of the new rows and that of the guess.
    change = vectors.mT @ new.standardised(new.coefficients - guess) / (1 + noise).sqrt()
    clear = _shrunk(change, _filter(change, new.features) @ change)
    step = clear + noise / (1 + noise) * (change - clear)
    size = vectors * (1 + noise.squeeze(1)).sqrt()
    step = _limited(size @ change, size @ step)
    combined = guess + new.root @ step * new.deviation
    return Combined(combined, _kept(new, combined))


def _from_one(fit: Regression) -> Combined:
    z = fit.standardised(fit.coefficients)
    shrunk = _limited(z, _shrunk(z, _filter(z, fit.features) @ z))
    if math.isinf(float(fit.deviation.max())):
        return Combined(torch.where(fit.deviation > 0, 0, fit.coefficients), 0.0)
    combined = torch.where(fit.deviation > 0, fit.root @ shrunk * fit.deviation, fit.coefficients)
    return Combined(combined, _kept(fit, combined))


def _kept(fit: Regression, coefficients: Tensor) -> float:
    before, after = (fit.standardised(part).norm() for part in (fit.coefficients, coefficients))
    return float(after / before) if before > 0 else 1.0


def _slopes(found: FoundAgain | None, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return which share of an effect is taken over, (1,), and what of each direction, (Q,).

    It is the share found again; a noisy one is drawn to 1 (nothing was memorised) or to 0 (all was), by how
    well it fits either.
    """
    if found is None:
        return torch.ones(1, dtype=shares.dtype), shares
    share, error = (torch.tensor([value], dtype=shares.dtype) for value in found[:2])
    weight = torch.sigmoid((share - 0.5) / error.square())
    common = weight * (1 + _clear(share - 1, error)) + (1 - weight) * _clear(share, error)
    each = common + _clear(found.shares - common, found.errors)
    return common.clamp(0, 2), shares * each.clamp(0, 2)


def _clear(value: Tensor, error: Tensor) -> Tensor:
    """Return values without what is noise in them, each alone (James–Stein's factor)."""
    return value * (1 - (error / torch.where(value != 0, value, torch.inf)).square()).clamp_min(0)


def with_change(moments: Moments, change: Tensor, units: Standardisation) -> Moments:
    """Return the moments of features whose metadata coefficients differ by `change`, (K_m, D), in `units`.

    What labels and intercept explain beside them is fitted anew by whoever solves these moments, so every
    estimator takes them as they are.
    """
    p = moments.num_protected
    cross = moments.cross.clone()
    cross[p:] += _beside(moments)[1] @ (change * units.scale[p:].unsqueeze(1))
    return replace(moments, cross=cross)
