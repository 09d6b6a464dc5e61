"""Effects of metadata and sites on features as a model: fitted, applied to any rows, saved."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mdnorm.arrays import check_same_order
from mdnorm.design import Design
from mdnorm.design.formula import in_order
from mdnorm.design.reader import column_names, read_columns, shown_rows
from mdnorm.design.roles import TableWarning
from mdnorm.design.table_file import TableFileError
from mdnorm.extras import requires
from mdnorm.files import atomic_path
from mdnorm.moments import Moments
from mdnorm.tables.combat import (
    LocationScale,
    SiteCodes,
    SiteMoments,
    fit_location_scale,
    site_moments,
    unknown_note,
)
from mdnorm.tables.summary import Summary, summarise
from mdnorm.tables.table_design import site_codes
from mdnorm.text import listed, warn

if TYPE_CHECKING:
    import pyarrow

FloatArray = NDArray[np.float64]

_FORMAT = "mdnorm.MetadataModel"
_VERSION = 1

# Values that become float64 at once, for the cache: 2 MiB.
_STEP_VALUES = 2**18


@dataclass(frozen=True)
class Specification:
    """What is removed from the features, how, and what is protected: see `residualize_file`."""

    formula: str | Sequence[str] | None = None  # None: only the site
    labels: tuple[str, ...] = ()
    site: str | None = None
    scale: bool = False
    empirical_bayes: bool = False
    ridge: float = 0.0
    missing: str = "error"
    unseen: str = "error"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.formula is None and self.site is None:
            raise ValueError(
                "nothing to remove: give formula=, the metadata, or site=, the column of the site."
            )
        if not (isinstance(self.ridge, int | float) and 0 <= self.ridge < math.inf):
            raise ValueError(f"ridge must be a finite number, at least 0, got {self.ridge!r}.")
        if self.site is None:
            for name in ("scale", "empirical_bayes"):
                if getattr(self, name):
                    raise ValueError(f"{name}=True needs site=, the column that names the site.")
        design = self.design()
        if self.site is not None and design is not None and self.site in design.variables():
            raise ValueError(
                f"{self.site!r} is the site and in formula or labels as well: take it out of one of them."
            )

    @property
    def variables(self) -> list[str]:
        """Columns of the table that the fit needs."""
        needed = needed_variables(self.design(), True, self.site, with_labels=True)
        return needed if self.weights is None else [*needed, self.weights]

    def columns(self, design: Design | None, table: Any) -> DesignColumns:
        """Return the columns of the fitted design, protected ones included, and the sites."""
        return design_columns(design, self.formula is not None, self.site, table, with_labels=True)

    def design(self) -> Design | None:
        """Return the design, not fitted; None where there is only a site."""
        formula = self.formula if self.formula is not None else self.labels
        if not formula:
            return None
        labels = self.labels if self.formula is not None else ()
        return Design(formula, labels, missing=self.missing, unseen=self.unseen)


@dataclass(frozen=True)
class MetadataModel:
    """Fitted effects of metadata and sites on the features of a table, to be removed from any rows.

    Attributes
    ----------
    design : Design or None
        Metadata to columns; None where there is only a site.
    removes_design : bool
        Whether the design is what is removed; False: it is all protected, only the site is removed.
    location_scale : LocationScale
        The coefficients.
    feature_names : tuple of str
    site : str or None
        Column that names the site of a row.
    unseen : str
        "error" or "mean".
    moments : dict from site to Moments, optional
        Of the rows that it was fitted to, for `summary`; None after a fit with a ridge. `save` keeps them.
    """

    design: Design | None
    removes_design: bool
    location_scale: LocationScale
    feature_names: tuple[str, ...]
    site: str | None
    unseen: str
    moments: SiteMoments | None = field(default=None, repr=False)

    @property
    def needs_labels(self) -> bool:
        """Whether `remove` needs the protected columns: it does where features are scaled."""
        return self.location_scale.has_scale

    @property
    def variables(self) -> list[str]:
        """Columns of the table that `remove` needs."""
        return needed_variables(self.design, self.removes_design, self.site, self.needs_labels)

    def with_rules(self, missing: str | None = None, unseen: str | None = None) -> MetadataModel:
        """Return the model with other rules for missing metadata and for levels and sites that it never saw.

        They are "error" or "mean", as for `mdnorm.Design`; None: as it was. Another rule is a ValueError: an
        indicator of missing values is fitted, not applied.
        """
        for name, rule in (("missing", missing), ("unseen", unseen)):
            if rule not in (None, "error", "mean"):
                raise ValueError(f"{name} must be 'error' or 'mean' for a fitted model, got {rule!r}.")
        design = copy.copy(self.design)
        if design is not None:
            design.missing, design.unseen = missing or design.missing, unseen or design.unseen
        return replace(self, design=design, unseen=unseen or self.unseen)

    def remove(self, features: Any, table: Any, *, overwrite: bool = False) -> NDArray[Any]:
        """Return features without the effects of metadata and site.

        Parameters
        ----------
        features : (n, D) array or DataFrame
            An array has its columns in the order of `feature_names`; a DataFrame may have them in any order.
        table : pyarrow.Table, DataFrame or mapping
            Metadata of the same rows.
        overwrite : bool
            Whether the memory of `features` may be used for the result.

        Returns
        -------
        (n, D) array
            Columns in the order of `features`; float32 where all of it is, otherwise float64.

        Raises
        ------
        TypeError, ValueError
            Shapes that do not fit; metadata that the design cannot use (see `Design.transform`); a site that
            is missing, or was not in training where `unseen` is "error".
        """
        check_same_order(features=features, table=table)
        if hasattr(features, "columns"):
            return self._remove_named(features, table)
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self.feature_names):
            raise ValueError(
                f"features must have shape (num_rows, {len(self.feature_names)}), got {features.shape}."
            )
        if features.dtype not in (np.float32, np.float64):
            features, overwrite = features.astype(np.float64), True
        columns = self.columns(table)
        if len(columns[0]) != len(features):
            raise ValueError(
                f"features has {len(features)} rows and the metadata {len(columns[0])}: one row each is "
                "needed."
            )
        if columns[2] is not None and (found := self.site_index(columns[2]))[1]:
            warn(unknown_note("site", *found, len(features)), TableWarning)
        return self.remove_columns(features, columns, overwrite=overwrite)

    def _remove_named(self, frame: Any, table: Any) -> NDArray[Any]:
        """Do what `remove` does to a DataFrame, whatever the order of its columns."""
        order = column_names(frame)
        if sorted(order) != sorted(self.feature_names):
            raise ValueError(
                f"features has the columns {order[:10]}, the model is of {list(self.feature_names[:10])}: "
                "give these, in any order."
            )
        values = np.column_stack([np.asarray(frame[name]) for name in self.feature_names])
        changed = self.remove(values, table)
        return changed[:, [self.feature_names.index(name) for name in order]]

    def columns(self, table: Any) -> DesignColumns:
        """Return the columns of the design for `remove_columns`."""
        return design_columns(
            self.design, self.removes_design, self.site, table, with_labels=self.needs_labels
        )

    def remove_columns(
        self, features: NDArray[Any], columns: DesignColumns, *, overwrite: bool = False
    ) -> NDArray[Any]:
        """Do what `remove` does, with columns that are there already and features of floats."""
        model, (metadata, labels, sites) = self.location_scale, columns
        index = np.zeros(len(features), np.intp) if sites is None else self.site_index(sites)[0]
        if len(model.sites) == 1 and not model.has_scale and not (index < 0).any():
            return self._subtract(features, metadata, overwrite)
        if labels is None:
            protected = model.design_mean[model.num_metadata :]
            labels = np.broadcast_to(protected, (len(features), len(protected)))
        out = features if overwrite else np.empty_like(features)
        step = max(64, _STEP_VALUES // max(features.shape[1], 1))
        for start in range(0, len(features), step):
            rows = slice(start, start + step)
            design = np.concatenate([metadata[rows], labels[rows]], axis=1)
            out[rows] = model.remove(features[rows].astype(np.float64), design, index[rows])
        return out

    def _subtract(self, features: NDArray[Any], metadata: FloatArray, overwrite: bool) -> NDArray[Any]:
        """Subtract the metadata's part in the precision of the features, in one pass over them."""
        model, width = self.location_scale, self.location_scale.num_metadata
        out = features if overwrite else features.copy(order="K")
        if width:
            # Centred and scaled in float64: float32 then rounds numbers of the size of the effects only.
            left, right = metadata - model.design_mean[:width], model.coefficients[:width]
            parts = (torch.from_numpy(np.asarray(part, features.dtype)) for part in (left, right))
            torch.from_numpy(out).addmm_(*parts, alpha=-1)
        return out

    def site_index(self, sites: SiteCodes) -> tuple[NDArray[np.intp], list[Hashable]]:
        """Return the place of each row's site, −1 where it is new, and new sites, an error if not allowed."""
        index, unknown = self.location_scale.index_of(sites)
        if unknown and self.unseen == "error":
            raise ValueError(
                f"column {self.site!r} has site(s) {unknown[:5]} that were not in training "
                f"({list(self.location_scale.sites)[:10]}): leave these rows out, or correct them as the "
                "average site with unseen='mean'."
            )
        return index, unknown

    def summary(self) -> Summary:
        """Return coefficients with standard errors, F tests, and what the sites were before and after.

        As `mdnorm.sklearn.MetadataResidualizer.summary`, but a variable is a term of the formula, and
        coefficients are for one unit of the column as the formula says it. Without `moments`, or with no more
        rows than independent columns, it is a ValueError.
        """
        if self.moments is None:
            raise ValueError(
                "this model has no moments to make a summary of: it was saved with moments=False, or fitted "
                "with a ridge, which leaves coefficients without standard errors. Fit with ridge=0."
            )
        terms = {} if self.design is None else self.design.terms
        units = np.ones(len(self.location_scale.design_mean))
        if self.design is not None:
            units[: self.design.num_metadata] = self.design.units
        return summarise(
            self.moments,
            self.location_scale,
            list(terms.items()),
            self.feature_names,
            site=self.site,
            units=units,
        )

    def save(self, path: str | Path, *, moments: bool = True) -> None:
        """Write the model as a safetensors file, complete or not at all.

        Parameters
        ----------
        path : str or Path
            With the suffix ``.safetensors``, otherwise a TableFileError; its folder must exist.
        moments : bool
            Whether to write `moments` as well, which `summary` needs: sums over the rows of each site, which
            for a site of one row are that row.
        """
        path = Path(path)
        with requires("tables"):
            from safetensors.numpy import save_file
        check_model_path(path)
        model = self.location_scale
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "design": None if self.design is None else self.design.to_json(),
            "removes_design": self.removes_design,
            "feature_names": list(self.feature_names),
            "site": self.site,
            "unseen": self.unseen,
            "sites": list(model.sites),
            **{name: getattr(model, name) for name in _NUMBERS},
        }
        tensors = {name: np.ascontiguousarray(getattr(model, name)) for name in _ARRAYS}
        if moments and self.moments is not None:
            parts = [self.moments[site].to_arrays() for site in model.sites]
            tensors |= {f"moments.{name}": np.stack([part[name] for part in parts]) for name in parts[0]}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"mdnorm": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path) -> MetadataModel:
        """Return the model that `save` wrote. Nothing in the file is run.

        Raises
        ------
        TableFileError
            A `ValueError`: the file is missing, damaged, of something else or of a later version, or
            contradicts itself.
        """
        with requires("tables"):
            from safetensors import SafetensorError, safe_open
        path = Path(path)
        check_model_path(path)
        if not path.is_file():
            raise TableFileError(f"{path} does not exist.")
        try:
            with safe_open(path, framework="numpy") as file:
                state = json.loads((file.metadata() or {}).get("mdnorm", "{}"))
                if not isinstance(state, dict) or state.get("format") != _FORMAT:
                    raise TableFileError(f"{path} has no coefficients of `mdnorm residualize`.")
                if state.get("version") != _VERSION:
                    raise TableFileError(
                        f"{path} has version {state.get('version')!r}, this mdnorm reads {_VERSION}: "
                        "update it."
                    )
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                kept = [key for key in file.keys() if key.startswith("moments.")]  # noqa: SIM118
                moments = {key.removeprefix("moments."): file.get_tensor(key) for key in kept}
            return cls._from_state(state, arrays, moments)
        except TableFileError:
            raise
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise TableFileError(f"the coefficients in {path} are damaged: {error}") from error

    @classmethod
    def _from_state(
        cls,
        state: Mapping[str, Any],
        arrays: dict[str, FloatArray],
        kept: Mapping[str, FloatArray],
    ) -> MetadataModel:
        names = [str(name) for name in state["feature_names"]]
        sites = tuple(state["sites"])
        shapes = {name: array.shape for name, array in arrays.items()}
        wide, deep = len(names), len(arrays["design_mean"])
        expected = {
            "mean": (wide,),
            "design_mean": (deep,),
            "coefficients": (deep, wide),
            "pooled_scale": (wide,),
            "location": (len(sites), wide),
            "scale": (len(sites), wide),
        }
        if shapes != expected or not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"arrays have the shapes {shapes}, expected finite ones of {expected}")
        design = None if state["design"] is None else Design.from_json(state["design"])
        removes = bool(state["removes_design"])
        numbers: dict[str, Any] = {name: kind(state[name]) for name, kind in _NUMBERS.items()}
        num_metadata = numbers["num_metadata"]
        in_design = 0 if design is None else design.num_metadata + design.num_labels
        removed = design.num_metadata if design is not None and removes else 0
        if in_design != deep or removed != num_metadata:
            raise ValueError(f"its design has {in_design} columns, its coefficients {deep}")
        if not all(len(array) == len(sites) and np.isfinite(array).all() for array in kept.values()):
            raise ValueError(f"its moments are not those of {len(sites)} sites, or not finite")
        parts = zip(*kept.values(), strict=True)
        moments = {
            site: Moments.from_arrays(dict(zip(kept, part, strict=True)))
            for site, part in zip(sites if kept else (), parts, strict=True)
        }
        for part in moments.values():
            if (part.num_metadata, *part.cross.shape) != (num_metadata, deep + 1, wide):
                raise ValueError("its moments are not of its columns")
        return cls(
            design=design,
            removes_design=removes,
            location_scale=LocationScale(sites=sites, **{**numbers, **arrays}),
            feature_names=tuple(names),
            site=state["site"],
            unseen=str(state["unseen"]),
            moments=moments or None,
        )


# Of `LocationScale`.
_ARRAYS = ("mean", "design_mean", "coefficients", "pooled_scale", "location", "scale")
_NUMBERS = {"num_metadata": int, "has_scale": bool, "empirical_bayes": bool, "tolerance": float}


def check_model_path(path: Path) -> None:
    """Raise TableFileError for another suffix than ``.safetensors``."""
    if path.suffix.lower() != ".safetensors":
        raise TableFileError(f"{path}: coefficients are kept in a .safetensors file, name it so.")


# Metadata (n, K_m); protected columns (n, K_y), None where not asked for; sites, None where there are none.
DesignColumns = tuple[FloatArray, "FloatArray | None", "SiteCodes | None"]


def needed_variables(
    design: Design | None, removes_design: bool, site: str | None, with_labels: bool
) -> list[str]:
    """Return the columns of a table that removing, or fitting (`with_labels`), needs."""
    names: list[str] = []
    if design is not None and (removes_design or with_labels):
        names += design.variables(labels=with_labels)
    if site is not None:
        names.append(site)
    return names


def row_weights(table: pyarrow.Table, column: str | None) -> FloatArray | None:
    """Return the weights of rows, those in a column; None where there is none."""
    if column is None:
        return None
    import pyarrow

    try:
        weights = table.column(column).cast(pyarrow.float64()).to_numpy()
    except pyarrow.ArrowException as error:
        raise ValueError(f"column {column!r} has the weights: it must have numbers ({error}).") from error
    return checked_weights(weights, table.num_rows, f"column {column!r}, the weights,")


def checked_weights(values: ArrayLike, num_rows: int, what: str) -> FloatArray:
    """Return weights (num_rows,), float64; ValueError where they are NaN, infinite or negative."""
    weights = np.asarray(values, dtype=np.float64)
    if weights.shape != (num_rows,):
        raise ValueError(f"{what} must have shape {(num_rows,)}, one weight a row, got {weights.shape}.")
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        raise ValueError(f"{what} must be finite and not negative, it is not in {shown_rows(bad)}.")
    return weights


def design_columns(
    design: Design | None, removes_design: bool, site: str | None, table: Any, *, with_labels: bool
) -> DesignColumns:
    """Return metadata (n, K_m), protected (n, K_y) or None where not asked for, and sites of rows."""
    columns, rows = read_columns(table, needed_variables(design, removes_design, site, with_labels))
    sites = None if site is None else site_codes(columns[site])
    empty = np.empty((rows, 0))
    if design is None:
        return empty, empty, sites
    if not removes_design and not with_labels:
        return empty, None, sites
    used = {name: columns[name] for name in design.variables(labels=with_labels)}
    metadata, labels = design.transform_columns(used, labels=with_labels or design.num_labels == 0)
    return (metadata, labels, sites) if removes_design else (empty, metadata, sites)


def fitted_model(
    specification: Specification, design: Design | None, moments: SiteMoments, feature_names: tuple[str, ...]
) -> MetadataModel:
    """Return the model of a fitted design and the moments of each site; see `fit_location_scale`."""
    sites = sorted(moments, key=lambda site: (str(type(site)), str(site)))
    moments = {site: moments[site] for site in sites if moments[site].weight > 0}
    names = () if design is None else (*design.metadata_names, *design.label_names)
    model = fit_location_scale(
        moments,
        ridge=specification.ridge,
        scale=specification.scale,
        empirical_bayes=specification.empirical_bayes,
        column_names=names,
    )
    return MetadataModel(
        design=design,
        removes_design=specification.formula is not None,
        location_scale=model,
        feature_names=feature_names,
        site=specification.site,
        unseen=specification.unseen,
        moments=None if specification.ridge else moments,
    )


def what_to_remove(
    apply: MetadataModel | str | Path | None,
    rules: tuple[str | None, str | None],
    others: Mapping[str, Any],
    *,
    formula: str | Sequence[str] | None,
    labels: str | Sequence[str],
    **fits: Any,
) -> Specification | MetadataModel:
    """Return what to fit, or the model, or that in a file, to apply under the rules for its values.

    With a model everything that says what to fit, `others` included, is a ValueError.
    """
    missing, unseen = rules
    # One name, not its letters.
    labels = (labels,) if isinstance(labels, str) else in_order("labels", labels)
    formula = formula if formula is None or isinstance(formula, str) else in_order("formula", formula)
    fits = {"formula": formula, "labels": labels, **fits}
    if apply is None:
        return Specification(missing=missing or "error", unseen=unseen or "error", **fits)
    given = [
        name
        for name, value in {**fits, **others}.items()
        if (len(value) if hasattr(value, "__len__") else value)
    ]
    if given:
        raise ValueError(f"{', '.join(given)}: not with apply=, a fitted model: leave these out.")
    if isinstance(apply, str | Path):
        apply = MetadataModel.load(apply)
    if not isinstance(apply, MetadataModel):
        raise TypeError(f"apply must be a MetadataModel or the path of one, got {type(apply).__name__}.")
    return apply.with_rules(missing, unseen)


def skips_missing_features(rule: str) -> bool:
    """Return whether rows with missing features are left out; ValueError where there is no such rule."""
    if rule not in ("error", "skip"):
        raise ValueError(f"missing_features must be 'error' or 'skip', got {rule!r}.")
    return rule == "skip"


def all_skipped(is_empty: NDArray[np.bool_], names: Sequence[Any]) -> str:
    """Return for a message why missing_features="skip" leaves no row: which (D,) features have no value."""
    empty = [name for name, gone in zip(names, is_empty, strict=True) if gone]
    why = f"feature(s) {listed(empty)} have no value at all" if empty else "every row lacks some"
    return (
        "no row to fit to: missing_features='skip' leaves all of them out, since "
        f"{why}. Leave such features out, or impute them."
    )


def used_rows(
    features: NDArray[Any],
    table: pyarrow.Table,
    weights: str | None,
    skips_missing: bool,
    chosen: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[Any], pyarrow.Table, FloatArray | None]:
    """Return the rows that are fitted to, with weights: chosen, of positive weight, with all features."""
    used = np.ones(len(features), bool) if chosen is None else chosen
    if (weight := row_weights(table, weights)) is not None:
        used &= weight > 0
    if skips_missing:
        used &= ~np.isnan(features).any(1)
    # Columns that are contiguous stay so.
    if used.all():
        return features, table, weight
    return features.T[:, used].T, table.filter(used), None if weight is None else weight[used]


def moments_of_rows(
    features: NDArray[Any], columns: DesignColumns, weights: FloatArray | None, names: Sequence[str]
) -> SiteMoments:
    """Return the moments of the rows of each site, from their design; errors name the features."""
    metadata, labels, sites = columns
    assert labels is not None
    try:
        return site_moments(features, metadata, labels, sites, weights)
    except ValueError:
        check_finite(features, names)
        raise


def check_finite(values: NDArray[Any], names: Sequence[Any], skips_missing: bool = False) -> None:
    """Raise where features have missing (unless these are skipped) or infinite values, with their names."""
    if np.isfinite(values.sum()):
        return
    bad = np.isinf(values) if skips_missing else ~np.isfinite(values)
    if bad.any():
        columns = [names[column] for column in np.flatnonzero(bad.any(0)).tolist()]
        keep = (
            ", or keep missing values missing with missing_features='skip'" if np.isnan(values).any() else ""
        )
        raise ValueError(
            f"feature(s) {listed(columns)} ({len(columns)} of {len(names)}) are missing, infinite or "
            f"too large in {shown_rows(bad.any(1))}: drop or impute such rows{keep}."
        )
