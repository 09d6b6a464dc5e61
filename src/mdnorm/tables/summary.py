"""What a regression of features on metadata found, with its errors: coefficients, F tests, sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.extras import requires
from mdnorm.plotting import PALETTE
from mdnorm.tables.combat import LocationScale, SiteMoments, site_residuals, total_and_within
from mdnorm.text import aligned, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]
Table = dict[str, NDArray[Any]]

# A column whose coefficient other columns change by more than this has no direction of its own.
_OWN = 1e-6

# Features in the text for each variable; one for each where there are more variables than that.
_SHOWN_FEATURES, _MANY = 5, 20


@dataclass(frozen=True, eq=False)
class Summary:
    """A fitted regression of features on metadata as statisticians read it; its text is a report.

    Every table is a list of records (dicts). A number that does not exist is None there and NaN in frames,
    and `notes` say why. Residuals are differences of sums of squares: where the columns explain all but 1e-12
    of a feature's variance, four digits of its errors are left.

    Attributes
    ----------
    num_rows : int
        Rows of positive weight.
    rank : int
        Number of linearly independent columns, intercept and sites included.
    df_residual : int
        ``num_rows − rank``. It counts rows, whatever they weigh: errors are those of weighted least squares,
        in which a weight is an inverse variance and a common factor has no influence. A weight of 2 makes a
        row more certain, but not two observations; for that, give the row twice.
    notes : tuple of str
        Sentences on what could not be estimated.
    """

    num_rows: int
    rank: int
    df_residual: int
    notes: tuple[str, ...]
    _tables: Mapping[str, Table] = field(repr=False)

    @property
    def coefficients(self) -> list[dict[str, Any]]:
        """One record a column of the design and feature, as after ``OLS(...).fit()``.

        column, variable, role ("removed" or "protected"), feature, estimate, standard_error, t, p.
        """
        return self._records("coefficients")

    @property
    def variables(self) -> list[dict[str, Any]]:
        """One record a variable and feature: what it explains beside all other variables (type III).

        variable, role, feature, df, F, p, partial_eta_squared (its sum of squares over the sum of that and
        the residual one).
        """
        return self._records("variables")

    @property
    def features(self) -> list[dict[str, Any]]:
        """One record a feature: feature, residual_deviation, r_squared; icc_before and icc_after with sites.

        The deviation is that of a row of weight 1; r_squared is that of all columns, sites included.

        The intraclass correlation is the share of the variance that lies between sites, ``σ²_b / (σ²_b +
        σ²_w)``, from the mean squares of a one-way analysis of variance of the features as they are and as
        `transform` returns them, at the average weight. It is below 0 where sites differ less than chance
        makes them differ, and stays above 0 where what is protected differs among the sites. It is None for
        a feature that is constant.
        """
        return self._records("features")

    @property
    def sites(self) -> list[dict[str, Any]]:
        """One record a site: site, rows, weight. Empty without sites; without those of `adapt`."""
        return self._records("sites")

    @property
    def site_effects(self) -> list[dict[str, Any]]:
        """One record a site and feature: site, feature, and mean and deviation, each _before and _after.

        A site of one row has no deviation.
        """
        return self._records("site_effects")

    def to_frame(self, table: str = "coefficients") -> Any:
        """Return one of the tables as a pandas DataFrame.

        Parameters
        ----------
        table : "coefficients", "variables", "features", "sites" or "site_effects"

        Raises
        ------
        ValueError
            There is no such table.
        MissingExtraError
            pandas is not installed.
        """
        if table not in self._tables:
            raise ValueError(f"table must be one of {list(self._tables)}, got {table!r}.")
        with requires("tables"):
            import pandas
        return pandas.DataFrame(dict(self._tables[table]))

    def _records(self, table: str) -> list[dict[str, Any]]:
        columns = self._tables[table]
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [dict(zip(columns, (None if v != v else v for v in row), strict=True)) for row in rows]

    def __str__(self) -> str:
        features, sites = self._tables["features"], self.sites
        lines = [
            f"{len(features['feature'])} feature(s), {self.num_rows} rows, {self.rank} independent columns "
            f"(intercept and sites included), {self.df_residual} residual degrees of freedom"
        ]
        lines += self._strongest("variables", "F", "F tests of each variable beside all others")
        lines += self._strongest("coefficients", "t", "Coefficients")
        if sites:
            rows = [(str(each["site"]), str(each["rows"]), f"{each['weight']:g}") for each in sites]
            lines += ["", "Sites", *aligned([("site", "rows", "weight"), *rows])]
        shown = []
        for when in ("before", "after"):
            known = [value for value in features.get(f"icc_{when}", ()) if value == value]
            if known:
                shown.append(f"{np.median(known):.3f} (largest {max(known):.3f}) {when}")
        if shown:
            lines += ["", f"Intraclass correlation of the sites, median over features: {', '.join(shown)}"]
        return "\n".join([*lines, *(["", "Notes"] if self.notes else []), *self.notes])

    def _strongest(self, name: str, by: str, title: str) -> list[str]:
        """Return the lines of a table with the few strongest features of each group."""
        table, num_features = self._tables[name], len(self._tables["features"]["feature"])
        groups = len(table[by]) // num_features
        if not groups:
            return []
        shown = min(num_features, _SHOWN_FEATURES if groups <= _MANY else 1)
        size = np.nan_to_num(np.abs(table[by]), nan=-1.0).reshape(groups, num_features)
        chosen = np.arange(size.size)
        if shown < num_features:
            largest = {"F": "F", "t": "|t|"}[by]
            title += f", the {shown} of {num_features} features with the largest {largest}"
            title += f" (the other {num_features - shown} are in .{name})"
            order = np.argsort(-size, axis=1, kind="stable")[:, :shown]
            chosen = (order + np.arange(0, size.size, num_features)[:, None]).ravel()
        columns = [[key.replace("_", " "), *map(_cell, table[key][chosen].tolist())] for key in table]
        return ["", title, *aligned(list(zip(*columns, strict=True)))]

    def plot(self) -> Figure:
        """Draw location and scale of each site, before and after: a box over the features for each site.

        Location: mean of the site, less that of all rows, over the standard deviation (SD) within sites.
        Scale: SD of the site over the SD within sites. Without site effects they are about 0 and 1.

        Returns
        -------
        matplotlib.figure.Figure
            Of pyplot, with the axes location before, after; scale before, after.

        Raises
        ------
        ValueError
            There are fewer than two sites.
        MissingExtraError
            matplotlib is not installed.
        """
        names, weight = (self._tables["sites"].get(key, np.zeros(0)) for key in ("site", "weight"))
        if len(names) < 2:
            raise ValueError(
                f"a plot of site effects needs at least two sites, got {len(names)}: give site=."
            )
        with requires("audit"):
            import matplotlib.pyplot as plt
        figure, axes = plt.subplots(
            2, 2, figsize=(min(3 + 0.8 * len(names), 20), 6), sharex=True, sharey="row", layout="constrained"
        )
        effects, middles = self._tables["site_effects"], {"location": 0, "scale": 1}
        for when, pair, colour in zip(("before", "after"), axes.T, (PALETTE[3], PALETTE[4]), strict=True):
            mean, deviation = (
                effects[f"{what}_{when}"].reshape(len(names), -1) for what in ("mean", "deviation")
            )
            within = np.sqrt(weight @ np.nan_to_num(deviation) ** 2 / weight.sum())
            varies = within > 0
            drawn = (mean - weight @ mean / weight.sum(), deviation)
            for axis, values, (what, middle) in zip(pair, drawn, middles.items(), strict=True):
                boxes = [site[~np.isnan(site)] for site in values[:, varies] / within[varies]]
                axis.boxplot(boxes, boxprops={"color": colour}, flierprops={"markersize": 3})
                axis.axhline(middle, color="0.5", linewidth=0.8, zorder=0)
                axis.set_xticks(range(1, len(names) + 1), map(str, names), rotation=90, parse_math=False)
                axis.set_title(f"{what} {when}", fontsize=10)
        figure.supylabel("in deviations within sites", fontsize=9)
        return figure


def _cell(value: Any) -> str:
    return "–" if value != value else f"{value:.4g}" if isinstance(value, float) else str(value)


def summarise(
    moments: SiteMoments,
    model: LocationScale,
    variables: Sequence[tuple[str, Sequence[str]]],
    feature_names: Sequence[Any],
    *,
    site: str | None = None,
    units: FloatArray | None = None,
    num_known: int | None = None,
) -> Summary:
    """Return the summary of a regression without a ridge, from the moments of all rows it was fitted to.

    The variables are names and the columns that are tested together, such as the levels of a category. All
    have together the K columns of the design, those that are removed first; `units` (K,) are
    what these were divided by: coefficients are for one unit of what they were before. The first `num_known`
    columns are known where effects are removed; the others are at their mean there.
    """
    moments = {name: part for name, part in moments.items() if part.weight > 0}
    names = np.fromiter(map(str, feature_names), object)
    total, within = total_and_within(moments)
    everything, part, beta = total.products(), within.products(), model.coefficients
    inverse, size = within.inverse(total.units), np.sqrt(np.diagonal(everything.gram))
    size = np.where(size > 0, size, 1)
    # How much of each column is its own: a row of the identity for a column that no other can replace.
    own = (inverse @ part.gram) * size[:, None] / size
    rank, rank_without = round(np.trace(own)), round(np.trace(total.inverse() @ everything.gram))
    rows, num_sites = total.num_rows, len(moments)
    freedom = rows - rank - num_sites
    if freedom <= 0:
        raise ValueError(
            f"too few rows for a summary (n_samples={rows}): {rows} row(s) for {rank + num_sites} linearly "
            "independent columns (intercept and sites included) leave nothing to estimate errors from. Fit "
            "with more rows, or fewer columns."
        )
    left = [site_residuals(each, model.mean, model.design_mean, beta) for each in moments.values()]
    residual, flat = (sum(getattr(each, name) for each in left) for name in ("squares", "flat"))
    noisy = residual > flat
    residual = np.where(noisy, residual, np.nan)
    variance = residual / freedom

    lost = own - np.eye(len(own))
    identified = np.abs(lost).max(axis=1, initial=0.0) < _OWN
    errors = np.sqrt(np.where(identified, np.diagonal(inverse), np.nan)[:, None] * variance)
    unit = np.ones((len(own), 1)) if units is None else units[:, None]
    columns = [column for _, together in variables for column in together]
    roles = ["removed"] * model.num_metadata + ["protected"] * (len(own) - model.num_metadata)
    owners = [name for name, together in variables for _ in together]
    t = beta / errors
    tables = {
        "coefficients": _table(
            names,
            {"column": columns, "variable": owners, "role": roles},
            {
                "estimate": beta / unit,
                "standard_error": errors / unit,
                "t": t,
                "p": _p_value(t**2, 1, freedom),
            },
        )
    }

    tests: list[tuple[str, str, int, FloatArray]] = []
    if num_sites > 1:
        without = site_residuals(total, everything.feature_mean, model.design_mean, total.solve()).squares
        tests.append((str(site), "removed", rank + num_sites - 1 - rank_without, without - residual))
    covariance, start = inverse * size * size[:, None], 0
    for name, together in variables:
        at = slice(start, start := start + len(together))
        # Only combinations of its coefficients that no other column can change are tested.
        directions, sizes, _ = np.linalg.svd(lost[at], full_matrices=False)
        chosen = directions[:, sizes < _OWN]
        effect = chosen.T @ (beta[at] * size[at, None])
        explained = effect * np.linalg.solve(chosen.T @ covariance[at, at] @ chosen, effect)
        role = "removed" if at.start < model.num_metadata else "protected"
        tests.append((name, role, chosen.shape[1], explained.sum(0)))
    named, tested, counts, sums = zip(*tests, strict=True) if tests else ((), (), (), ())
    free, squares = np.array(counts, int).reshape(-1, 1), np.reshape(sums, (-1, len(names)))
    f = np.where(free > 0, squares / np.maximum(free, 1), np.nan) / variance
    tables["variables"] = _table(
        names,
        {"variable": named, "role": tested},
        {
            "df": np.broadcast_to(free, f.shape),
            "F": f,
            "p": _p_value(f, free, freedom),
            "partial_eta_squared": np.where(free > 0, squares / (squares + residual), np.nan),
        },
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = 1 - residual / everything.squares
    tables["features"] = {
        "feature": names,
        "residual_deviation": np.sqrt(variance),
        "r_squared": explained,
    }
    tables["sites"] = tables["site_effects"] = {}
    if site is not None:
        _add_sites(tables, moments, model, num_known)

    notes = []
    alone = [column for column, is_own in zip(columns, identified, strict=True) if not is_own]
    if alone:
        notes.append(
            f"No standard error: {listed(alone, 10)} (constant, or a combination of other columns or of the "
            "sites). What such columns explain together is shared among them."
        )
    if untested := [name for name, _, count, _ in tests if count == 0]:
        notes.append(f"No F test: {listed(untested, 10)} (no direction that other columns do not have).")
    if not noisy.all():
        notes.append(
            f"No tests: feature(s) {listed(names[~noisy], 10)} have no variance beyond what the columns "
            "explain."
        )
    return Summary(rows, rank + num_sites, freedom, tuple(notes), tables)


def _table(
    names: NDArray[Any], keys: Mapping[str, Iterable[Any]], values: Mapping[str, NDArray[Any]]
) -> Table:
    """Return the columns of a table that has a row for each key and feature."""
    count = len(next(iter(values.values())))
    repeated = {name: np.repeat(np.fromiter(key, object), len(names)) for name, key in keys.items()}
    return repeated | {"feature": np.tile(names, count)} | {name: v.ravel() for name, v in values.items()}


def _p_value(f: FloatArray, free: Any, freedom: int) -> FloatArray:
    with requires("tables"):
        from scipy.special import fdtrc
    return np.asarray(fdtrc(np.maximum(free, 1), freedom, f), dtype=np.float64)


def _add_sites(
    tables: dict[str, Table], moments: SiteMoments, model: LocationScale, num_known: int | None
) -> None:
    """Add rows, means and deviations of each site, and intraclass correlations, before and after."""
    names, design_mean, k = tables["features"]["feature"], model.design_mean, model.num_metadata
    known = np.arange(len(design_mean)) < (len(design_mean) if num_known is None else num_known)
    rows, weights = (
        np.array([getattr(m, name) for m in moments.values()]) for name in ("num_rows", "weight")
    )
    means, squares = np.empty((2, 2, len(moments), len(names)))
    for index, (name, each) in enumerate(moments.items()):
        place, part = model.sites.index(name), each.products()
        means[0, index], squares[0, index] = part.feature_mean, part.squares
        design = np.where(known, part.design_mean, design_mean)[None]
        means[1, index] = model.remove(part.feature_mean[None], design, np.array([place]))[0]
        # What is returned is f / scale + x·effect and a constant.
        scale = model.scale[place]
        effect = known[:, None] * model.coefficients * (1 - 1 / scale)
        effect[:k] -= model.coefficients[:k]
        changed = np.einsum("kd,kd->d", effect, 2 * part.cross / scale + part.gram @ effect)
        squares[1, index] = np.maximum(part.squares / scale**2 + changed, 0)
    tables["sites"] = {"site": np.fromiter(moments, object), "rows": rows, "weight": weights}
    degrees = np.where(rows > 1, weights * (rows - 1) / rows, np.nan)[:, None]
    deviations = np.sqrt(squares / degrees)
    effects = {"mean_before": means[0], "mean_after": means[1]}
    effects |= {"deviation_before": deviations[0], "deviation_after": deviations[1]}
    tables["site_effects"] = _table(names, {"site": moments}, effects)
    if len(moments) < 2:
        return
    # Weights of mean 1: the correlation is then that of rows of the average weight.
    count, one = rows.sum(), rows.sum() / weights.sum()
    share, between_freedom = weights * one, len(moments) - 1
    size = (count - (share**2).sum() / count) / between_freedom
    for when, mean, square in zip(("before", "after"), means, squares, strict=True):
        between = share @ (mean - share @ mean / count) ** 2 / between_freedom
        inside = square.sum(0) * one / (count - len(moments))
        whole = between + (size - 1) * inside
        tables["features"][f"icc_{when}"] = np.where(whole > 0, between - inside, np.nan) / np.where(
            whole > 0, whole, 1
        )
