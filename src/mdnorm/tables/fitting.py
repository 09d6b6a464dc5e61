"""What an estimator of tables learns from its rows, and how it is applied to others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import NotFittedError
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted

from mdnorm.arrays import check_same_order
from mdnorm.design.leakage import LeakageWarning, leaking_features
from mdnorm.design.reader import refuse_no_table
from mdnorm.design.roles import TableWarning
from mdnorm.moments import NoSamplesError
from mdnorm.tables.combat import (
    LocationScale,
    SiteCodes,
    SiteMoments,
    add_moments,
    fit_location_scale,
    site_moments,
    unknown_note,
)
from mdnorm.tables.covariance import CovarianceModel, fit_covariance
from mdnorm.tables.model import all_skipped, checked_weights
from mdnorm.tables.subjects import RandomIntercepts, fit_random_intercepts
from mdnorm.tables.table_design import read_rows
from mdnorm.tables.table_reader import TableReader, TableRows
from mdnorm.text import warn

FloatArray = NDArray[np.float64]


class TableFitter(TableReader):
    """Estimates of an estimator of tables: from rows to `Moments` to a model, and the model on rows."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "metadata_columns": ["array-like", None],
        "ridge": [Interval(Real, 0, None, closed="left")],
        "protect_target": [StrOptions({"auto", "categorical", "continuous"}), Options(bool, {False})],
        "strength": [Interval(Real, 0, 1, closed="both")],
        "covariance": ["boolean", Interval(Real, 0, 1, closed="both")],
        "missing": [StrOptions({"error", "mean", "indicator"})],
        "unseen": [StrOptions({"error", "mean"})],
        "missing_features": [StrOptions({"error", "skip"})],
    }

    def _feature_names(self) -> list[Any]:
        names: list[Any] = _check_feature_names_in(self, None)[self._feature_index].tolist()
        return names

    def __getattr__(self, name: str) -> Any:
        # After partial_fit the model is made when it is asked for.
        if name in _ESTIMATES and "moments_" in vars(self):
            return _ESTIMATES[name](self, self._fitted_model())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_parameters(self) -> None:
        self._validate_params()
        if isinstance(self.strength, bool):
            raise ValueError(f"strength must be a number from 0 to 1, got {self.strength!r}.")
        if self.site is None:
            for name in ("scale", "empirical_bayes", "covariance", "reference_site"):
                if getattr(self, name) not in (False, None):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs site=, the column that names the site."
                    )
        if self.covariance and not self.scale:
            raise ValueError(f"covariance={self.covariance!r} needs scale=True: variances come first.")
        if self.covariance and self.missing_features == "skip":
            raise ValueError(
                f"covariance={self.covariance!r} needs all features of a row, so missing_features='skip' "
                "cannot keep single ones missing: impute them first."
            )
        if self.subject is not None and self.ridge > 0:
            raise ValueError(
                f"subject={self.subject!r} fits a mixed model, which has no penalty: set ridge=0."
            )

    def _update(
        self,
        X: Any,  # noqa: N803
        y: Any,
        metadata: Any,
        labels: Any,
        sample_weight: ArrayLike | None,
        classes: ArrayLike | None,
        reset: bool,
    ) -> tuple[TableRows, FloatArray | None]:
        """Add rows to the moments; return them, without the intercepts of subjects, and their weights."""
        check_same_order(X=X, y=y, metadata=metadata, labels=labels, sample_weight=sample_weight)
        refuse_no_table(y, "y")
        features, given = self._checked(X, reset), self._given(X, y, metadata, labels)
        weights = None
        if sample_weight is not None:
            weights = checked_weights(sample_weight, len(features), "sample_weight")
        used = np.ones(len(features), bool) if weights is None else weights > 0
        if reset and not used.any():
            raise NoSamplesError("Sample weights must contain at least one non-zero number: all are zero.")
        complete = ~np.isnan(features).any(1)
        if reset and not (used & complete).any():
            raise NoSamplesError(all_skipped(np.isnan(features[used]).all(0), self._feature_names()))
        used &= complete
        with _counting_from(used):
            if not used.all():
                given = self._used(given, used)
                features, weights = features[used], None if weights is None else weights[used]
            num_rows = len(features)
            if reset:
                self._start(given, classes, num_rows, weights)
            rows = TableRows(features, *self._design(given, num_rows, training=True))
        note = leaking_features(features, self._feature_names()) if reset and self._num_metadata else None
        if note is not None:
            warn(note, LeakageWarning)
        self._intercepts = self._fitted_intercepts(rows, weights)
        rows = rows._replace(features=self._without_intercepts(features, rows.subjects))
        moments = self._moments(rows, weights)
        self.moments_: SiteMoments = add_moments({} if reset else self.moments_, moments)
        for what, table in self._tables.items():
            table.count(given[what], num_rows)
        return rows, weights

    def _used(self, given: dict[str, Any], used: NDArray[np.bool_]) -> dict[str, Any]:
        """Return the tables with only the rows that are fitted to: levels of others are not known."""
        part = dict(given)
        for what in ("metadata", "labels"):
            if part[what] is not None:
                columns = read_rows(part[what], what, len(used))
                part[what] = {name: column.rows(used) for name, column in columns.items()}
        if part["y"] is not None:
            check_consistent_length(used, part["y"])
            part["y"] = _safe_indexing(part["y"], np.flatnonzero(used))
        return part

    def _moments(self, rows: TableRows, weights: FloatArray | None = None) -> SiteMoments:
        metadata, labels = np.split(rows.design, [self._num_metadata], axis=1)
        return site_moments(rows.features, metadata, labels, rows.sites, weights)

    def _fitted_intercepts(self, rows: TableRows, weights: FloatArray | None) -> RandomIntercepts | None:
        if rows.subjects is None:
            return None
        if weights is not None and (weights != 1).any():
            raise ValueError(
                f"subject={self.subject!r} fits a mixed model, in which rows have no weights: leave "
                "sample_weight out, or give weights of 0 and 1."
            )
        return fit_random_intercepts(rows.features, rows.design, rows.sites, rows.subjects)

    def _without_intercepts(
        self, features: NDArray[Any], subjects: SiteCodes | None, sign: float = -1.0
    ) -> NDArray[Any]:
        """Return features less what is known of their subjects, or with it again (sign 1)."""
        if self._intercepts is None or subjects is None:
            return features
        return np.asarray(features + sign * self._intercepts.of(subjects))

    def _fitted_model(self) -> LocationScale:
        if not hasattr(self, "moments_"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet: call fit first.")
        if self._model is None:
            self._solve()
        assert self._model is not None
        return self._model

    def _solve(self, rows: TableRows | None = None, weights: FloatArray | None = None) -> None:
        """Fit the model to the moments, and its covariances to the rows."""
        names = list(self.metadata_names_)
        labels = self._tables["labels"].names if "labels" in self._tables else ()
        names += [f"labels column {name!r}" for name in labels] + self.protected_names_[len(labels) :]
        reference = self.reference_site
        reference = tuple(reference) if isinstance(reference, (list, np.ndarray)) else reference
        model = fit_location_scale(
            self.moments_,
            ridge=self.ridge,
            scale=self.scale,
            empirical_bayes=self.empirical_bayes,
            reference_site=reference,
            pooled_scale=None if self._intercepts is None else self._intercepts.residual_scale,
            column_names=names,
        )
        if self.covariance and rows is not None and rows.sites is not None:
            share = _PUBLISHED_SHARE if self.covariance is True else float(self.covariance)
            model = fit_covariance(
                model,
                *(rows.features, rows.design, rows.sites),
                share=share,
                weights=weights,
                reference_site=reference,
            )
        self._model = model

    def _site_index(self, sites: SiteCodes | None, num_rows: int) -> NDArray[np.intp]:
        if sites is None:
            return np.zeros(num_rows, dtype=np.intp)
        model = self._fitted_model()
        index, unknown = model.index_of(sites)
        if unknown and self.unseen == "error":
            raise ValueError(
                f"site(s) {unknown[:5]} were not in fit ({[str(s) for s in model.sites][:10]}). Call adapt "
                "with rows of theirs, or set unseen='mean' to correct them as the average site."
            )
        if unknown:
            warn(unknown_note("site", index, unknown, num_rows), TableWarning)
        return index

    def _apply(self, X: Any, metadata: Any, labels: Any, *, inverse: bool) -> Any:  # noqa: N803
        check_is_fitted(self, "moments_")
        check_same_order(X=X, metadata=metadata, labels=labels)
        model = self._fitted_model()
        dropped: list[Any] | None = None
        if inverse and len(self._metadata_index) and not self.keep_metadata:
            features, dropped = self._read_dropped(X, metadata)
            assert self.metadata_columns is not None
            table = dict(zip(map(str, self.metadata_columns), dropped, strict=True))
            given = {"metadata": table, "labels": labels, "y": None}
            rows = TableRows(features, *self._design(given, len(features)))
        else:
            rows = self._read(X, None, metadata, labels)
        index = self._site_index(rows.sites, len(rows.features))
        plain = self._without_intercepts(rows.features, rows.subjects)
        if self._intercepts is not None and rows.subjects is not None and self.unseen == "mean":
            places, new = rows.subjects.index_in(self._intercepts.subjects)
            if new:
                warn(unknown_note("subject", places, new, len(places)), TableWarning)
        changed = (model.restore if inverse else model.remove)(plain, rows.design, index)
        if self.strength != 1:
            changed = self._in_part(plain, changed, index, inverse)
        out: NDArray[Any] = self._without_intercepts(changed, rows.subjects, 1.0).astype(rows.features.dtype)
        if dropped is None and self.keep_metadata and len(self._metadata_index):
            dropped = self._metadata_of(X)
        return out if dropped is None else self._together(out, dropped)

    def _in_part(
        self, given: NDArray[Any], changed: NDArray[Any], index: NDArray[np.intp], inverse: bool
    ) -> NDArray[Any]:
        """Return what lies between the given features and the changed ones, as `strength` says."""
        rest: Any = 1.0 - self.strength
        if inverse:
            model = self._fitted_model()
            if isinstance(model, CovarianceModel) and self.strength > 0:
                raise ValueError(
                    f"inverse_transform cannot undo a part of the covariances: strength={self.strength:g} "
                    f"with covariance={self.covariance!r}."
                )
            # x·rest + strength·(x / scale + …) is what there is: this solves it for x.
            rest = rest * model.scale_of(index)
        return np.asarray((rest * given + self.strength * changed) / (rest + self.strength))


# The share of the variance whose components are harmonised, as Chen et al. (2022) have it.
_PUBLISHED_SHARE = 0.95

_ESTIMATES: dict[str, Callable[[Any, Any], Any]] = {
    "coef_": lambda fit, model: model.coefficients[: fit._num_metadata],
    "protected_coef_": lambda fit, model: model.coefficients[fit._num_metadata :],
    "metadata_mean_": lambda fit, model: model.design_mean[: fit._num_metadata],
    "mean_": lambda fit, model: model.mean,
    "sites_": lambda fit, model: [] if fit.site is None else list(model.sites),
    "site_location_": lambda fit, model: model.location,
    "site_scale_": lambda fit, model: model.scale,
    "components_": lambda fit, model: model.directions,
    "subject_variance_": lambda fit, model: fit._intercepts.variance,
}


@contextmanager
def _counting_from(used: NDArray[np.bool_]) -> Iterator[None]:
    """Say in errors among which rows they count."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not used.all():
            error.args = (
                f"{error} (Rows are counted among the {used.sum()} of {len(used)} that are fitted to: of "
                "positive weight, with all features.)",
            )
        raise
