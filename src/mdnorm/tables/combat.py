"""Location and scale of each site, with empirical Bayes: ComBat, from additive statistics.

The model of Johnson, Li & Rabinovic (2007), for a row of site `i` with metadata `m`, protected columns `y`:

    f = α + m·β_m + y·β_y + σ γ_i + σ √δ_i · ε

and what is returned is the row as it were without site and metadata effects,

    out = α + m̄·β_m + y·β_y + (f − α − m·β_m − y·β_y − σ γ_i) / √δ_i.

How it is computed. Site columns in a regression are the centring of all other columns within each site, so
`β` follows from the sums of the within-site products, and the residual sum of squares of each site is
``s − 2 β·C + β·G β`` with that site's products. The empirical Bayes steps use the data only through these.
ComBat is therefore a function of one `Moments` a site, and can be fitted to data that are streamed or
partitioned. (The difference loses as many digits as the design explains nines of a feature's variance: with
all but 1e-8 of it explained, eight of sixteen are left.)

With empirical Bayes, `γ_i` has a normal and `δ_i` an inverse gamma prior over the features of a site, fitted
by moments, and the posterior means are found by iteration from the estimates.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.moments import Moments, NoSamplesError
from mdnorm.text import listed

FloatArray = NDArray[np.float64]
SiteMoments = dict[Hashable, Moments]

# The published stopping rule takes a few dozen steps; this many means that it never will.
_MAX_ITERATIONS = 10_000

# A residual deviation below this fraction of the mean, or a residual variance below this share of the
# variance within the sites, is rounding.
_FLAT_DEVIATION = 1e-12
_FLAT_SHARE = 1e-13

# Squares of deviations below this lose digits.
_SMALLEST = 1e-150

# A direction of the design with a smaller share of its columns' variance is collinear.
_COLLINEAR = 1e-11


@dataclass(frozen=True)
class SiteCodes:
    """Sites of rows: an index into the levels for each."""

    codes: NDArray[np.intp]
    levels: list[Hashable]

    def index_in(self, known: Sequence[Hashable]) -> tuple[NDArray[np.intp], list[Hashable]]:
        """Return the (n,) place of each row's level among known ones, −1 where it is not, and such levels.

        The integer 1 and the text "1" are the same level: one other cell makes texts of a column in a file.
        """
        position = {_as_text(level): index for index, level in enumerate(known)}
        of_level = np.array([position.get(_as_text(level), -1) for level in self.levels], dtype=np.intp)
        unknown = [level for level, index in zip(self.levels, of_level, strict=True) if index < 0]
        return of_level[self.codes] if len(of_level) else np.zeros(0, np.intp), unknown


def _as_text(level: Hashable) -> Hashable:
    """Return a level with integers as texts, also in a combination of several."""
    if isinstance(level, tuple):
        return tuple(map(_as_text, level))
    return str(level) if isinstance(level, int) and not isinstance(level, bool) else level


def unknown_note(what: str, index: NDArray[np.intp], unknown: Sequence[Hashable], num_rows: int) -> str:
    """Return a sentence on rows whose site or subject was not in the fit: those with the index −1."""
    return (
        f"{np.count_nonzero(index < 0)} of {num_rows} rows have a {what} that was not in the fit "
        f"({listed(unknown)}): they are taken as the average {what}."
    )


def site_moments(
    features: NDArray[Any],
    metadata: FloatArray,
    labels: FloatArray,
    sites: SiteCodes | None,
    weights: FloatArray | None = None,
) -> SiteMoments:
    """Return the moments of the rows of each site; of all rows under the key None without sites."""
    empty = Moments.empty(features.shape[1], metadata.shape[1], labels.shape[1])
    design = np.concatenate([metadata, labels], axis=1)
    if sites is None:
        return {None: empty.update(features, design, weights)}
    order = np.argsort(sites.codes, kind="stable")
    counts = np.bincount(sites.codes, minlength=len(sites.levels))
    ends = np.cumsum(counts)
    moments: SiteMoments = {}
    for level, start, end in zip(sites.levels, ends - counts, ends, strict=True):
        if end > start:
            rows = order[start:end]
            # Columns that are contiguous stay so.
            part = features.T[:, rows].T
            weight = None if weights is None else weights[rows]
            moments[level] = replace(empty).update(part, design[rows], weight)
    return moments


def add_moments(*parts: SiteMoments) -> SiteMoments:
    """Return the moments of the rows of all parts together."""
    total: SiteMoments = {}
    names: dict[Hashable, Hashable] = {}
    for part in parts:
        for site, moments in part.items():
            name = names.setdefault(_as_text(site), site)
            total[name] = total[name].merge(moments) if name in total else moments
    return total


@dataclass(frozen=True)
class LocationScale:
    """Effects of metadata and sites on features, and how to take them out.

    Attributes
    ----------
    sites : tuple
        Names of the S sites, in the order of the rows below.
    num_metadata : int
        K_m: the first rows of `coefficients` are removed, the rest is protected.
    mean : (D,) array
        Features expected at `design_mean`, averaged over the sites (or at the reference site).
    design_mean : (K,) array
    coefficients : (K, D) array
    pooled_scale : (D,) array
        σ, the residual standard deviation within sites (divisor: number of rows); 0 for a feature that has
        no residual variance.
    location, scale : (S, D) arrays
        ``σ γ_i`` in the units of the features, and ``√δ_i``.
    has_scale, empirical_bayes : bool
        How the sites were estimated, and how further ones would be.
    tolerance : float
        Of the empirical Bayes iteration.
    """

    sites: tuple[Hashable, ...]
    num_metadata: int
    mean: FloatArray
    design_mean: FloatArray
    coefficients: FloatArray
    pooled_scale: FloatArray
    location: FloatArray
    scale: FloatArray
    has_scale: bool
    empirical_bayes: bool
    tolerance: float

    def index_of(self, sites: SiteCodes) -> tuple[NDArray[np.intp], list[Hashable]]:
        """Return the (n,) place of each row's site in `sites`, −1 where it is not there, and those sites."""
        return sites.index_in(self.sites)

    def residual(self, features: NDArray[Any], design: FloatArray) -> FloatArray:
        """Return ``f − mean − (x − x̄)·β``, (n, D), of features (n, D) and a design (n, K): sites and noise.

        Where a protected column is not known, it is its `design_mean`: its effect then stays in the residual.
        """
        return np.asarray(features - self.mean - (design - self.design_mean) @ self.coefficients)

    def remove(self, features: NDArray[Any], design: FloatArray, site_index: NDArray[np.intp]) -> FloatArray:
        """Return features without metadata and site effects, (n, D), float64; see `residual`.

        `site_index` (n,) has the place of each row's site in `sites`; −1 for a site that is not there,
        corrected as the average over the sites: location 0, scale 1.
        """
        plain = features - self._metadata_part(design)
        location = self._padded(self.location, 0.0)
        if not self.has_scale:
            return plain - location[site_index] if len(self.sites) > 1 else plain
        residual = self.residual(features, design)
        corrected = (residual - location[site_index]) / self.scale_of(site_index)
        # The residual is added back as a difference: where nothing changes, the features come back exactly.
        return plain + (corrected - residual)

    def restore(self, features: NDArray[Any], design: FloatArray, site_index: NDArray[np.intp]) -> FloatArray:
        """Return features with the effects put back: the inverse of `remove`, same arguments."""
        location = self._padded(self.location, 0.0)
        corrected = self.residual(features, self.without_metadata(design))
        residual = corrected * self.scale_of(site_index) + location[site_index]
        return features + self._metadata_part(design) + (residual - corrected)

    def scale_of(self, site_index: NDArray[np.intp]) -> FloatArray:
        """Return the (n, D) scales of rows, 1 for a site that is not there (see `remove`)."""
        return np.asarray(self._padded(self.scale, 1.0)[site_index])

    def without_metadata(self, design: FloatArray) -> FloatArray:
        """Return the design of rows from which the metadata's effect is gone."""
        known: FloatArray = design.copy()
        known[:, : self.num_metadata] = self.design_mean[: self.num_metadata]
        return known

    def _metadata_part(self, design: FloatArray) -> FloatArray:
        metadata = slice(0, self.num_metadata)
        return np.asarray((design - self.design_mean)[:, metadata] @ self.coefficients[metadata])

    def with_sites(self, moments: Mapping[Hashable, Moments]) -> LocationScale:
        """Return a model that knows further sites, from the moments of their rows; the rest stays as it is.

        A site that is known already, or has too few rows, is a ValueError.
        """
        known = [site for site in moments if site in self.sites]
        if known:
            raise ValueError(f"site(s) {known} are part of the model already.")
        residuals = {
            site: site_residuals(part, self.mean, self.design_mean, self.coefficients)
            for site, part in moments.items()
        }
        location, scale = _site_effects(
            residuals, self.pooled_scale, self.has_scale, self.empirical_bayes, self.tolerance
        )
        return replace(
            self,
            sites=(*self.sites, *residuals),
            location=np.concatenate([self.location, location]),
            scale=np.concatenate([self.scale, scale]),
        )

    @staticmethod
    def _padded(values: FloatArray, unseen: float) -> FloatArray:
        # The last row is what the index −1 finds.
        return np.concatenate([values, np.full((1, values.shape[1]), unseen)])


def fit_location_scale(
    moments: Mapping[Hashable, Moments],
    *,
    ridge: float = 0.0,
    scale: bool = False,
    empirical_bayes: bool = False,
    reference_site: Hashable | None = None,
    pooled_scale: FloatArray | None = None,
    tolerance: float = 1e-4,
    column_names: Sequence[str] | None = None,
) -> LocationScale:
    """Estimate the effects of metadata and sites from the statistics of each site.

    Parameters
    ----------
    moments : mapping from site to Moments
        The rows of each site, all with the same columns. One entry: there is no site effect.
    ridge : float
        See `Moments.solve`. Site effects are not penalised by it: `empirical_bayes` is what shrinks them.
    scale : bool
        Whether sites differ in scale. Then each needs two rows.
    empirical_bayes : bool
        Shrink the effects of a site towards their distribution over features (Johnson et al. 2007, the
        parametric form). Without `scale`, only locations, with the weight that the published code gives them
        (a variance and a number of rows of 1).
    reference_site : optional
        Site that all others are brought to; its rows keep their location and scale. None: the average over
        rows.
    pooled_scale : (D,) array, optional
        σ, where it is known better than from the residuals: see `mdnorm.tables.subjects`.
    tolerance : float
        The iteration stops when no relative change is above this. The default is that of the published code
        and its ports; a smaller number is closer to the posterior mode and further from them (by about
        the tolerance).
    column_names : sequence of str, optional
        Names of the design columns, for messages.

    Raises
    ------
    ValueError
        No rows, or, without a ridge, no more of them than linearly independent columns (sites included); an
        unknown reference site; protected columns that the sites determine (nothing says then
        which is the site effect and which is to be kept); a site of one row with `scale`; fewer than two
        features that vary, with `empirical_bayes`.

    Notes
    -----
    A metadata column that the sites determine gets coefficient 0: its effect is in the sites' locations.
    A feature without residual variance has no scale; its location is removed as estimated, and it takes no
    part in the priors. Where a feature that varies elsewhere is constant within one site, its scale there
    is left alone.

    References
    ----------
    Johnson, Li & Rabinovic, Adjusting batch effects in microarray expression data using empirical Bayes
    methods, Biostatistics 8 (2007), 118–127. Fortin et al., NeuroImage 167 (2018), 104–120.
    """
    moments = {site: part for site, part in moments.items() if part.weight > 0}
    if not moments:
        raise NoSamplesError("no rows: the effects of metadata and sites need at least one row.")
    if reference_site is not None and reference_site not in moments:
        raise ValueError(f"reference_site={reference_site!r} has no rows; the sites are {list(moments)}.")
    total, within = total_and_within(moments)
    _check_sizes(total, column_names, with_features=scale or empirical_bayes or pooled_scale is not None)
    _check_design(total, within, len(moments), ridge, column_names)
    coefficients = within.solve(ridge, total.units)

    design_mean, mean = total.products()[:2]
    if reference_site is not None:
        reference = moments[reference_site].products()
        mean = reference.feature_mean + (design_mean - reference.design_mean) @ coefficients
    residuals = {
        site: site_residuals(part, mean, design_mean, coefficients) for site, part in moments.items()
    }
    pooled = list(residuals.values()) if reference_site is None else [residuals[reference_site]]
    squares, flat = (np.sum([getattr(part, name) for part in pooled], axis=0) for name in ("squares", "flat"))
    if pooled_scale is None:
        pooled_scale = np.sqrt(np.where(squares > flat, squares, 0) / sum(part.weight for part in pooled))
    location, site_scale = np.zeros((len(moments), len(mean))), np.ones((len(moments), len(mean)))
    if len(moments) > 1:
        location, site_scale = _site_effects(residuals, pooled_scale, scale, empirical_bayes, tolerance)
    if reference_site is not None:
        row = list(moments).index(reference_site)
        location[row], site_scale[row] = 0, 1
    return LocationScale(
        sites=tuple(moments),
        num_metadata=total.num_metadata,
        mean=mean,
        design_mean=design_mean,
        coefficients=coefficients,
        pooled_scale=pooled_scale,
        location=location,
        scale=site_scale,
        has_scale=scale,
        empirical_bayes=empirical_bayes,
        tolerance=tolerance,
    )


def total_and_within(moments: Mapping[Hashable, Moments]) -> tuple[Moments, Moments]:
    """Return the moments of all rows, about the mean of all and about the means of their sites."""
    parts = list(moments.values())
    total = functools.reduce(Moments.merge, parts)
    # Sums about the means of the sites are what columns of sites in the regression would leave.
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("gram", "cross", "squares")}
    return total, replace(total, **sums)


def _check_sizes(total: Moments, names: Sequence[str] | None, with_features: bool) -> None:
    """Raise where the values of a column are so small that their squares are no longer numbers."""
    part = total.products()
    columns = names or range(len(part.design_mean))
    checked = [("design column", columns, part.design_mean, part.gram.diagonal())]
    if with_features:
        checked.append(("feature", range(len(part.squares)), part.feature_mean, part.squares))
    for what, which, mean, squares in checked:
        small = (squares < total.weight * _SMALLEST**2) & (np.abs(mean) < _SMALLEST)
        small &= (squares > 0) | (mean != 0)
        if small.any():
            raise ValueError(
                f"{what}(s) {listed(np.array(which)[small].tolist())} have values below {_SMALLEST:g}, whose "
                "squares are too small for a number: give them in a smaller unit."
            )


def _check_design(
    total: Moments, within: Moments, num_sites: int, ridge: float, names: Sequence[str] | None
) -> None:
    """Raise where rows are too few, or where the sites determine a direction of the protected columns."""
    p, k = total.num_protected, total.num_metadata
    assert total.units is not None
    scale = total.units.scale / total.weight**0.5

    def rank(gram: Tensor, first: int = 0, last: int | None = None) -> int:
        scaled = (gram * scale * scale.unsqueeze(1))[first:last, first:last]
        return int(torch.linalg.matrix_rank(scaled, atol=_COLLINEAR, hermitian=True))

    rows, kept, needed = total.num_rows, rank(within.gram, 0, p) + num_sites, rank(within.gram) + num_sites
    # A ridge holds the metadata back, but not what is protected.
    if (k or num_sites > 1) and (rows <= kept or (rows <= needed and ridge == 0)):
        alone = rows <= kept and p > 1
        raise ValueError(
            f"too few rows (n_samples={rows}): {rows} row(s) for {kept if alone else needed} linearly "
            f"independent columns of {'' if alone else 'metadata, '}protected columns and intercept (sites "
            "included), which would explain every feature. Use more rows, or fewer "
            f"{'protected columns' if alone else 'columns, or set ridge='}."
        )
    if num_sites == 1 or rank(within.gram) - rank(within.gram, p) == rank(total.gram) - rank(total.gram, p):
        return
    left, all_squares = within.gram.diagonal()[: p - 1], total.gram.diagonal()[: p - 1]
    constant = torch.nonzero((left < _COLLINEAR * all_squares) & (all_squares > 0)).flatten().tolist()
    shown = [names[k + i] if names else f"protected column {i}" for i in constant or range(p - 1)]
    raise ValueError(
        f"the sites determine what is to be protected, {', '.join(shown)}"
        f"{' (constant within each site)' if constant else ' (together with the metadata)'}: the two effects "
        "are confounded. Leave the column(s) unprotected, or use more sites in which they vary."
    )


class Residuals(NamedTuple):
    """What the design leaves of the features of one site."""

    weight: float
    num_rows: int
    mean: FloatArray  # (D,), of the residuals
    squares: FloatArray  # (D,), about their mean
    flat: FloatArray  # (D,), the squares that rounding alone would leave


def site_residuals(
    moments: Moments, mean: FloatArray, design_mean: FloatArray, coefficients: FloatArray
) -> Residuals:
    """Return what coefficients leave of the features about `mean`, where the design is `design_mean`."""
    part = moments.products()
    shift = (part.design_mean - design_mean) @ coefficients
    explained = np.einsum("kd,kd->d", coefficients, 2 * part.cross - part.gram @ coefficients)
    deviation = _FLAT_DEVIATION * np.maximum(np.abs(part.feature_mean), np.abs(mean))
    return Residuals(
        moments.weight,
        moments.num_rows,
        part.feature_mean - mean - shift,
        np.maximum(part.squares - explained, 0),
        moments.weight * deviation**2 + _FLAT_SHARE * part.squares,
    )


def _site_effects(
    residuals: Mapping[Hashable, Residuals],
    pooled_scale: FloatArray,
    has_scale: bool,
    empirical_bayes: bool,
    tolerance: float,
) -> tuple[FloatArray, FloatArray]:
    """Return location and scale of sites."""
    varies = pooled_scale > 0
    if empirical_bayes and np.count_nonzero(varies) < 2:
        raise ValueError(
            f"empirical_bayes pools over features, got n_features={np.count_nonzero(varies)} with residual "
            "variance: it needs at least 2. Set empirical_bayes=False."
        )
    unit = np.where(varies, pooled_scale, 1.0)
    locations, scales = [], []
    for site, (count, num_rows, mean, squares, flat) in residuals.items():
        location, variance = mean / unit, np.ones_like(mean)
        standardised = squares / unit**2
        if has_scale:
            if num_rows < 2 or count <= 1:
                raise ValueError(
                    f"site {site!r} has {num_rows} row(s) (weight {count:g}): a scale needs at least 2. Use "
                    "scale=False (location only), merge the site with another or leave it out."
                )
            # As neuroCombat: a variance of zero, which nothing could be divided by, becomes 1.
            usable = varies & (squares > flat)
            variance = np.where(usable, standardised / (count - 1), 1.0)
        if empirical_bayes:
            chosen = (location[varies], variance[varies])
            if has_scale:
                chosen = _posterior(*chosen, standardised[varies], count, tolerance, site)
            else:
                chosen = (_posterior_mean(*chosen, 1.0, *_location_prior(location[varies])), chosen[1])
            location[varies], variance[varies] = chosen
        locations.append(location * unit)
        scales.append(np.sqrt(variance))
    shape = (len(residuals), len(pooled_scale))
    return np.reshape(locations, shape), np.reshape(scales, shape)


def _location_prior(location: FloatArray) -> tuple[float, float]:
    return float(location.mean()), float(location.var(ddof=1))


def _posterior_mean(
    location: FloatArray, variance: FloatArray, count: float, prior_mean: float, prior_variance: float
) -> FloatArray:
    return (prior_variance * count * location + variance * prior_mean) / (prior_variance * count + variance)


def _posterior(
    location: FloatArray,
    variance: FloatArray,
    squares: FloatArray,
    count: float,
    tolerance: float,
    site: Hashable,
) -> tuple[FloatArray, FloatArray]:
    """Return the posterior means of location and variance of one site's features, by iteration."""
    prior = _location_prior(location)
    # The inverse gamma prior of mean m and variance v has shape (2v + m²)/v and rate (mv + m³)/v. Multiplied
    # through by v nothing is divided by it: features that all agree give v = 0, a prior that is a point.
    m, v = float(variance.mean()), float(variance.var(ddof=1))
    old_location, old_variance = location, variance
    for _ in range(_MAX_ITERATIONS):
        new_location = _posterior_mean(location, old_variance, count, *prior)
        deviations = squares + count * (location - new_location) ** 2
        new_variance = (v * (0.5 * deviations + m) + m**3) / (v * (0.5 * count + 1) + m**2)
        # The ratio keeps the sign of the location, as in the published code: otherwise the iteration would
        # stop later than there, and the results agree only to the tolerance.
        moved = np.abs(new_location - old_location)
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.where(moved == 0, 0.0, moved / old_location)
        step = max(float(change.max()), float((np.abs(new_variance - old_variance) / old_variance).max()))
        old_location, old_variance = new_location, new_variance
        if step <= tolerance:
            return new_location, new_variance
    raise ValueError(
        f"the empirical Bayes estimates of site {site!r} did not settle to a relative change of "
        f"{tolerance:g} in {_MAX_ITERATIONS} steps: use a larger tolerance."
    )
