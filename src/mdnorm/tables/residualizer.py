"""Residualisation of tables as a scikit-learn transformer.

All that is learned comes from `Moments` of each site, so `fit` and any sequence of `partial_fit` over the
same rows give the same coefficients up to rounding, and `fit` on a training fold sees nothing of the other
rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import _check_feature_names_in, check_array, check_is_fitted, validate_data

from mdnorm.design.leakage import LeakageWarning, leaking_features
from mdnorm.design.reader import Column, check_same_order, read_column, shown, shown_rows
from mdnorm.tables.combat import (
    LocationScale,
    SiteCodes,
    SiteMoments,
    add_moments,
    fit_location_scale,
    site_moments,
)
from mdnorm.tables.summary import Summary, Variable, summarise
from mdnorm.tables.table_design import TableDesign

__all__ = ["MetadataResidualizer"]

FloatArray = NDArray[np.float64]


class MetadataResidualizer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Remove from the columns of a table what metadata explain.

    The table form of Metadata Normalization: features are regressed on metadata, protected columns and an
    intercept, and only the metadata part is removed, ``out = x − (m − m̄)·β_m``. Means stay. With
    ``site=`` the effects of a site are removed too, in location and, with ``scale=True``, in scale, as
    estimated or shrunk by empirical Bayes (ComBat).

    Metadata come with the data in ``fit(X, y, metadata=...)`` and ``transform(X, metadata=...)``, through
    pipelines and cross-validation by scikit-learn's metadata routing, or are columns of `X`
    (`metadata_columns`). With neither, there is nothing to remove: `X` is returned unchanged, with a warning.

    Parameters
    ----------
    formula : str or sequence of str, optional
        Which columns of the metadata are removed and how, as for `mdnorm.Design`. None: all of them but the
        site; numbers as they are, strings, booleans and categories as indicators of their levels.
    metadata_columns : sequence of int or str, optional
        Columns of `X` that are the metadata, by position or by name. An empty sequence says that there are
        none and that this is meant.
    keep_metadata : bool
        Whether the metadata columns of `X` stay in the output, unchanged, in their place.
    ridge : float
        Penalty λ ≥ 0 on the coefficients of the standardised metadata columns; not on intercept, protected
        columns and sites.
    protect_target : "auto", "categorical", "continuous" or False
        Whether and how `y` is protected: part of the regression in `fit`, never removed. "auto": floats are
        continuous, anything else categories.
    site : int or str, optional
        The metadata column that says which site (scanner, batch) a row comes from: a column name, the
        position in `metadata`, or what `metadata_columns` calls it.
    scale : bool
        Remove effects of the site on the scale of the features, too.
    empirical_bayes : bool
        Shrink site effects towards their distribution over features (see
        `mdnorm.tables.fit_location_scale`).
    reference_site : optional
        The site that others are brought to. None: their average.
    missing : "error", "mean" or "indicator"
        What a missing value of the metadata does, as for `mdnorm.Design`. The site is never missing.
    unseen : "error" or "mean"
        What `transform` does with a level or a site that no row of `fit` had: raise, or correct it as the
        average one, so that only the effects of the other metadata are removed, location and scale stay.
        For a site a third way is to call `adapt` first.
    missing_features : "error" or "skip"
        What a missing value of a feature does: raise, naming the columns; or its row is left out of the fit,
        it stays missing, and the other features of the row are corrected.

    Attributes
    ----------
    coef_ : (K_m, D) float64 array
        Effects of the encoded metadata columns on the features that are returned.
    protected_coef_ : (K_y, D) float64 array
        Effects of the protected columns, `labels` first and then `y`.
    metadata_mean_ : (K_m,) float64 array
    mean_ : (D,) float64 array
        Features expected at average metadata and protected columns.
    metadata_names_, protected_names_ : list of str
        Names of the columns, as `mdnorm.Design` has them: ``"scanner[T.B]"`` for the level B of a category.
        The columns of an array are called "m0", "m1", ….
    sites_ : list
        Sites known, those of `adapt` last.
    site_location_, site_scale_ : (S, D) float64 arrays
        What is subtracted from, and then divides, the rows of each site around the mean.
    moments_ : dict from site to Moments
        All that is kept of the data; ``{None: ...}`` without `site`.
    n_features_in_ : int
    feature_names_in_ : (n_features_in_,) array of str
        Only where `X` has names.

    Notes
    -----
    **Labels and scale.** `transform` knows no labels. What `y` explains is never removed, but where a site is
    divided by its scale, the effect of `y` in that site is divided with the rest. `labels`, which
    `transform` gets again, are held out of the scaling exactly, as in ComBat.

    **Data types.** float32 tables come back as float32; sums and coefficients are float64.

    **Rows.** Fitting needs more rows than there are linearly independent columns, site columns and
    intercept included, or a ridge; otherwise the metadata would explain everything.

    References
    ----------
    Lu et al., Metadata Normalization, CVPR 2021 (arXiv:2104.09052). Johnson, Li & Rabinovic, Biostatistics
    8 (2007), 118–127.

    Examples
    --------
    >>> import numpy as np
    >>> age = np.array([20.0, 30, 40, 50, 60, 70])
    >>> X = np.column_stack([age, 2 * age + [1, -1, 0, 0, -1, 1]])
    >>> MetadataResidualizer().fit(X, metadata=age).transform(X, metadata=age).round(6)[:3]
    array([[45., 91.],
           [45., 89.],
           [45., 90.]])
    """

    # Requested unless the user says otherwise: a pipeline that left them out would remove nothing.
    __metadata_request__fit = {"metadata": True, "labels": True}  # noqa: RUF012
    __metadata_request__partial_fit = {"metadata": True, "labels": True}  # noqa: RUF012
    __metadata_request__transform = {"metadata": True, "labels": True}  # noqa: RUF012
    __metadata_request__inverse_transform = {"metadata": True, "labels": True}  # noqa: RUF012

    def __init__(
        self,
        formula: str | Sequence[str] | None = None,
        *,
        metadata_columns: Sequence[int | str] | None = None,
        keep_metadata: bool = False,
        ridge: float = 0.0,
        protect_target: Literal["auto", "categorical", "continuous", False] = "auto",
        site: int | str | None = None,
        scale: bool = False,
        empirical_bayes: bool = False,
        reference_site: Hashable | None = None,
        missing: Literal["error", "mean", "indicator"] = "error",
        unseen: Literal["error", "mean"] = "error",
        missing_features: Literal["error", "skip"] = "error",
    ) -> None:
        self.formula = formula
        self.metadata_columns = metadata_columns
        self.keep_metadata = keep_metadata
        self.ridge = ridge
        self.protect_target = protect_target
        self.site = site
        self.scale = scale
        self.empirical_bayes = empirical_bayes
        self.reference_site = reference_site
        self.missing = missing
        self.unseen = unseen
        self.missing_features = missing_features

    # ----------------------------------------------------------------------------------------------------
    # Fitting
    # ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        labels: Any = None,
        sample_weight: ArrayLike | None = None,
    ) -> MetadataResidualizer:
        """Estimate the effects of the metadata.

        Parameters
        ----------
        X : (n, D) array or DataFrame
            Features, and the metadata where `metadata_columns` says so.
        y : (n,) or (n, K_y), optional
            Labels or targets: protected (see `protect_target`), needed here only.
        metadata : (n,) or (n, K) array, DataFrame or mapping, optional
            What is removed. Rows belong to those of `X` by position; the same row labels in another order are
            an error.
        labels : (n,) or (n, K) array or DataFrame, optional
            Further columns that are protected (the covariates of ComBat).
        sample_weight : (n,) array, optional
            A row of weight 2 counts as two rows, one of weight 0 as none.

        Returns
        -------
        MetadataResidualizer

        Raises
        ------
        TypeError, ValueError
            Tables that cannot be used (see `mdnorm.Design`), metadata given twice, too
            few rows, sites that cannot be estimated (see `mdnorm.tables.fit_location_scale`).

        Warns
        -----
        LeakageWarning
            Features are discrete or have heavy tails, so that non-linear models can read the metadata in what
            is left of them.
        """
        self._check_parameters()
        if sample_weight is not None and not np.any(np.asarray(sample_weight)):
            raise ValueError("Sample weights must contain at least one non-zero number: all are zero.")
        self._is_partial = False
        self._update(X, y, metadata, labels, sample_weight, None, reset=True)
        self._solve()
        return self

    def partial_fit(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        labels: Any = None,
        sample_weight: ArrayLike | None = None,
        classes: ArrayLike | None = None,
    ) -> MetadataResidualizer:
        """Add rows; what is estimated is what `fit` on all rows so far estimates.

        The first call fixes the columns, the levels of categories (give later levels as a categorical dtype)
        and the means that stand for missing values. Sites may appear at any time. What `adapt` has added is
        forgotten.

        Parameters
        ----------
        X, y, metadata, labels, sample_weight
            As in `fit`.
        classes : array, optional
            In the first call: all the classes of a categorical `y`. None: those in the first `y`.

        Returns
        -------
        MetadataResidualizer
            Coefficients are computed when first needed, and errors about too few rows come then.
        """
        first = not hasattr(self, "moments_")
        if first:
            self._check_parameters()
            self._is_partial = True
        self._update(X, y, metadata, labels, sample_weight, classes, reset=first)
        self._model: LocationScale | None = None
        for name in _ESTIMATES:
            self.__dict__.pop(name, None)
        return self

    def fit_transform(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        labels: Any = None,
        sample_weight: ArrayLike | None = None,
    ) -> Any:
        """Return ``fit(X, y, ...).transform(X, ...)``."""
        self.fit(X, y, metadata=metadata, labels=labels, sample_weight=sample_weight)
        return self.transform(X, metadata=metadata, labels=labels)

    def adapt(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        labels: Any = None,
    ) -> MetadataResidualizer:
        """Estimate location and scale of sites that were not in `fit`, from rows of theirs.

        Coefficients, pooled variance and the other sites stay as they are. With empirical Bayes the new
        site's own features are its prior, as they are for every site.

        Parameters
        ----------
        X, metadata, labels
            As in `fit`. Rows of sites that are known already are left out.
        y : optional
            As in `fit`, where it is at hand: otherwise what the labels explain counts as the site's location
            wherever its mix of labels differs from the one in `fit`.

        Raises
        ------
        ValueError
            There is no `site`, or no row of a new one.
        """
        check_is_fitted(self, "moments_")
        if self.site is None:
            raise ValueError("adapt is for sites: this estimator has site=None.")
        model = self._fitted_model()
        check_same_order(X=X, y=y, metadata=metadata, labels=labels)
        given = {"labels": labels, "y": None if self.protect_target is False else y}
        features, design, sites, _ = self._read(X, metadata, given)
        assert sites is not None
        new = model.index_of(sites)[0] < 0
        if not new.any():
            raise ValueError(f"all rows are of sites that are known already, {list(model.sites)}.")
        codes = SiteCodes(sites.codes[new], sites.levels)
        self._set_model(model.with_sites(self._moments(features[new], design[new], codes)))
        return self

    # ----------------------------------------------------------------------------------------------------
    # Transforming
    # ----------------------------------------------------------------------------------------------------

    def transform(self, X: Any, *, metadata: Any = None, labels: Any = None) -> Any:  # noqa: N803
        """Return the features without the effects of the metadata.

        Parameters
        ----------
        X : (n, n_features_in_) array or DataFrame
        metadata : optional
            As in `fit`, of these rows.
        labels : optional
            As in `fit`, of these rows. Needed with ``scale=True`` if `fit` had them.

        Returns
        -------
        (n, D) array, or DataFrame after ``set_output``
            float32 where `X` is, else float64; objects where metadata that are no numbers are kept.

        Raises
        ------
        NotFittedError
            `fit` was not called.
        ValueError
            Metadata are missing or not those of `fit`; an unseen site with ``unseen="error"``.
        """
        return self._apply(X, metadata, labels, inverse=False)

    def inverse_transform(self, X: Any, *, metadata: Any = None, labels: Any = None) -> Any:  # noqa: N803
        """Return the features with the effects put back.

        Parameters
        ----------
        X : (n, D) array or DataFrame
            What `transform` returns.
        metadata : optional
            The metadata of these rows, as in `fit`. With `metadata_columns` that are not kept: those columns,
            in the order in which `metadata_columns` has them.
        labels : optional
            As in `transform`.

        Returns
        -------
        (n, n_features_in_) array
        """
        return self._apply(X, metadata, labels, inverse=True)

    def summary(self) -> Summary:
        """Return coefficients with standard errors, F tests, and what the sites were before and after.

        The regression is that of the features on metadata, protected columns, an intercept and, with `site`,
        one for each site, as statsmodels' ``OLS`` (with `sample_weight`: ``WLS`` on the rows of positive
        weight). It needs `moments_` only, so it is there after `partial_fit`, too. Errors hold for rows that
        are independent and of one variance; those of sites with other scales are approximate.

        Returns
        -------
        Summary
            With `coefficients`, `variables`, `features`, `sites` and `site_effects`, each a list of records
            and with `to_frame` one of pandas; `str` of it is a report, and `plot` draws the sites. A
            variable is a column of the table with all its levels.

        Raises
        ------
        ValueError
            There is a ridge, under which coefficients are biased and have no such errors; rows are no more
            than independent columns.

        References
        ----------
        Searle, Casella & McCulloch, Variance Components (1992), chapter 3, for the intraclass correlation.
        """
        check_is_fitted(self, "moments_")
        if self.ridge > 0:
            raise ValueError(
                f"ridge={self.ridge:g}: coefficients that are shrunk have no standard errors and F tests. "
                "Fit with ridge=0 for a summary."
            )
        tables = [self._metadata_table, *self._protected.values()]
        variables = [
            Variable(name, columns)
            for table in tables
            if table is not None
            for name, columns in table.terms.items()
        ]
        labels = self._protected.get("labels")
        return summarise(
            self.moments_,
            self._fitted_model(),
            variables,
            self._feature_names(),
            site=None if self._metadata_table is None else self._metadata_table.site_name,
            num_known=self._num_metadata + (0 if labels is None else len(labels.names)),
        )

    def _feature_names(self) -> list[Any]:
        names: list[Any] = _check_feature_names_in(self, None)[self._feature_index].tolist()
        return names

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[Any]:
        """Return the names of the columns that `transform` returns.

        Parameters
        ----------
        input_features : sequence of str, optional
            Names of the columns of `X` where it has none itself.
        """
        check_is_fitted(self, "n_features_in_")
        names: NDArray[Any] = _check_feature_names_in(self, input_features)
        return names if self.keep_metadata else names[self._feature_index]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "moments_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing_features == "skip"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def __getattr__(self, name: str) -> Any:
        # After partial_fit the estimates are made when they are asked for.
        if name in _ESTIMATES and "moments_" in vars(self) and vars(self).get("_model") is None:
            self._fitted_model()
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ----------------------------------------------------------------------------------------------------
    # Reading tables
    # ----------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        if isinstance(self.metadata_columns, (str, int)):
            raise TypeError(
                f"metadata_columns must be a sequence of columns, got {self.metadata_columns!r}: write "
                f"metadata_columns=[{self.metadata_columns!r}]."
            )
        if not (isinstance(self.ridge, (int, float, np.number)) and 0 <= self.ridge < np.inf):
            raise ValueError(f"ridge must be a finite number, at least 0, got {self.ridge!r}.")
        if self.protect_target not in ("auto", "categorical", "continuous", False):
            raise ValueError(
                "protect_target must be 'auto', 'categorical', 'continuous' or False, "
                f"got {self.protect_target!r}."
            )
        for name, choices in (
            ("unseen", ("error", "mean")),
            ("missing", ("error", "mean", "indicator")),
            ("missing_features", ("error", "skip")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.site is None:
            for name in ("scale", "empirical_bayes", "reference_site"):
                if getattr(self, name) not in (False, None):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs site=, the column that names the site."
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
    ) -> None:
        check_same_order(X=X, y=y, metadata=metadata, labels=labels, sample_weight=sample_weight)
        given = {"labels": labels, "y": None if self.protect_target is False else y}
        if reset:
            self._start(X, metadata, given, classes)
        features, design, sites, num_rows = self._read(X, metadata, given, training=True)
        note = leaking_features(features, self._feature_names()) if reset and self._num_metadata else None
        if note is not None:
            warnings.warn(note, LeakageWarning, stacklevel=3)
        weights = None if sample_weight is None else _as_sample_weight(sample_weight, num_rows)
        if np.isnan(features).any():
            weights = (np.ones(num_rows) if weights is None else weights) * ~np.isnan(features).any(1)
            features = np.nan_to_num(features)
        moments = self._moments(features, design, sites, weights)
        self.moments_: SiteMoments = add_moments({} if reset else self.moments_, moments)
        counts = np.ones(num_rows, dtype=bool) if weights is None else weights > 0
        table = metadata if self.metadata_columns is None else self._metadata_part(X)
        if self._metadata_table is not None:
            self._metadata_table.count(table, counts)
        if "labels" in self._protected:
            self._protected["labels"].count(labels, counts)

    def _moments(
        self,
        features: NDArray[Any],
        design: FloatArray,
        sites: SiteCodes | None,
        weights: FloatArray | None = None,
    ) -> SiteMoments:
        k = self._num_metadata
        return site_moments(features, design[:, :k], design[:, k:], sites, weights)

    def _start(self, X: Any, metadata: Any, given: dict[str, Any], classes: Any) -> None:  # noqa: N803
        """Fix what the first rows fix: columns, levels, classes."""
        if metadata is not None and self.metadata_columns is not None:
            raise ValueError(
                "metadata= and metadata_columns= were both given: metadata come from one of them."
            )
        self._model = None
        num_rows = self._select(X)
        if metadata is None and self.metadata_columns is None:
            warnings.warn(
                "no metadata: X is returned unchanged. Pass metadata= to fit and transform (in a pipeline: "
                "by metadata routing) or name metadata_columns=; metadata_columns=() says that it is meant.",
                UserWarning,
                stacklevel=4,
            )
        table = self._metadata_part(X) if self.metadata_columns is not None else metadata
        self._metadata_table = None
        if table is not None:
            self._metadata_table = TableDesign(
                "metadata", self.formula, self.site, missing=self.missing, unseen=self.unseen
            )
            self._metadata_table.fit(table, num_rows, declared=self._is_partial)
        elif self.site is not None or self.formula is not None:
            name = "site" if self.site is not None else "formula"
            raise ValueError(f"{name}={getattr(self, name)!r} needs metadata with that column.")
        self.metadata_names_ = [] if self._metadata_table is None else list(self._metadata_table.names)
        self._num_metadata = len(self.metadata_names_)
        self._protected: dict[str, TableDesign] = {}
        if given["labels"] is not None:
            self._protected["labels"] = TableDesign("labels", protected=True)
            self._protected["labels"].fit(given["labels"], num_rows, declared=self._is_partial)
        if given["y"] is not None and (self._num_metadata or self.site is not None):
            self._protect_target(given["y"] if classes is None else classes, classes)
        self.protected_names_ = [name for table in self._protected.values() for name in table.names]
        if len(self._feature_index) == 0:
            raise ValueError(
                f"X has n_features={self.n_features_in_}, all of them metadata_columns: no feature is left."
            )

    def _protect_target(self, y: Any, classes: Any) -> None:
        self._y_is_class = self._is_class(y, classes)
        table = _target_table(y, self._y_is_class)
        target = next(iter(table.values()))
        if self._y_is_class and len(target.levels()) == 1 and not target.missing.any():
            if self._is_partial:
                raise ValueError("y has a single class in the first call of partial_fit: pass classes=.")
            return
        self._protected["y"] = TableDesign("y", protected=True)
        self._protected["y"].fit(table, len(target.missing))

    def _is_class(self, y: Any, classes: Any) -> bool:
        if self.protect_target != "auto":
            return self.protect_target == "categorical"
        values = np.asarray(y)
        # More than one column of integers is an indicator or a multi-output table already.
        several = values.ndim > 1 and values.shape[1] > 1 and values.dtype.kind in "biuf"
        return not several and (values.dtype.kind != "f" or classes is not None)

    def _select(self, X: Any) -> int:  # noqa: N803
        """Record the columns of X and which of them are features; return the number of rows."""
        num_rows = len(self._checked(X, reset=True)[0])
        chosen = [] if self.metadata_columns is None else list(self.metadata_columns)
        names = list(getattr(self, "feature_names_in_", []))
        index = []
        for column in chosen:
            if isinstance(column, str):
                if column not in names:
                    raise ValueError(
                        f"metadata_columns has {column!r}, the columns of X are {names or 'without names'}."
                    )
                index.append(names.index(column))
            else:
                if not -self.n_features_in_ <= column < self.n_features_in_:
                    raise ValueError(
                        f"metadata_columns has {column}, but X has n_features={self.n_features_in_} "
                        f"({self.n_features_in_} feature(s))."
                    )
                index.append(int(column) % self.n_features_in_)
        self._metadata_index = np.array(index, dtype=np.intp)
        self._feature_index = np.setdiff1d(np.arange(self.n_features_in_), self._metadata_index)
        return num_rows

    def _checked(self, X: Any, *, reset: bool) -> tuple[NDArray[Any], bool]:  # noqa: N803
        """Return the checked features, and whether they are all of X or what is left without metadata."""
        if self.metadata_columns is not None and hasattr(X, "columns") and hasattr(X, "dtypes"):
            # A DataFrame may hold metadata that are no numbers: only the features must be.
            validate_data(self, X, reset=reset, skip_check_array=True)
            names = [column for column in X.columns if column not in self._names_of_metadata(X)]
            if names:
                return self._finite(check_array(X[names], **_FEATURES), names), False
        checked = validate_data(self, X, reset=reset, **_FEATURES)
        return self._finite(checked, list(getattr(self, "feature_names_in_", range(checked.shape[1])))), True

    def _finite(self, features: NDArray[Any], names: list[Any]) -> NDArray[Any]:
        """Return features after a check for missing and infinite values, as scikit-learn words them."""
        if np.isfinite(features.sum()):
            return features
        bad = np.isinf(features)
        if self.missing_features == "error":
            bad |= np.isnan(features)
        if bad.any():
            columns = [names[place] for place in np.flatnonzero(bad.any(0))]
            kind = "infinity" if np.isinf(features).any() else "NaN"
            raise ValueError(
                f"Input X contains {kind}: column(s) {shown(map(repr, columns))} in "
                f"{shown_rows(bad.any(1))}. Drop or impute these rows, or keep missing values missing with "
                "missing_features='skip'."
            )
        return features

    def _names_of_metadata(self, X: Any) -> list[Any]:  # noqa: N803
        columns = list(X.columns)
        return [
            column if isinstance(column, str) else columns[column]
            for column in self.metadata_columns or ()
            if isinstance(column, str) or -len(columns) <= column < len(columns)
        ]

    def _metadata_part(self, X: Any) -> Any:  # noqa: N803
        names = list(self.metadata_columns or ())
        if not names:
            return None
        if hasattr(X, "columns") and hasattr(X, "dtypes"):
            columns = [X[name] for name in self._names_of_metadata(X)]
        else:
            columns = list(np.asarray(X)[:, self._metadata_index].T)
        return dict(zip(map(str, names), columns, strict=True))

    def _read(
        self,
        X: Any,  # noqa: N803
        metadata: Any,
        given: dict[str, Any],
        *,
        training: bool = False,
    ) -> tuple[NDArray[Any], FloatArray, SiteCodes | None, int]:
        """Return features, design columns and sites of rows; unknown protected columns at their mean."""
        checked, whole = self._checked(X, reset=False)
        if self.metadata_columns is not None and metadata is not None:
            raise ValueError("metadata= was given, but the metadata are in X (metadata_columns=).")
        table = metadata if self.metadata_columns is None else self._metadata_part(X)
        features = checked[:, self._feature_index] if whole and len(self._metadata_index) else checked
        design, sites = self._design(table, given, len(features), training)
        return features, design, sites, len(features)

    def _design(
        self, table: Any, given: dict[str, Any], num_rows: int, training: bool
    ) -> tuple[FloatArray, SiteCodes | None]:
        if table is None and self._metadata_table is not None:
            raise ValueError(
                "metadata=None, but fit had metadata: pass those of these rows. In a pipeline, "
                "set_transform_request(metadata=True) routes them here; with a scorer that passes them to no "
                "one (scores by name, and all before scikit-learn 1.8), let them be columns of X "
                "(metadata_columns=)."
            )
        if table is not None and self._metadata_table is None:
            raise ValueError("metadata= was given, but fit had none: nothing is known about their effects.")
        if given.get("labels") is not None and "labels" not in self._protected:
            raise ValueError("labels= was given, but fit had none.")
        blocks, sites = [np.empty((num_rows, 0))], None
        if self._metadata_table is not None:
            block, sites = self._metadata_table.transform(table, num_rows, training=training)
            blocks.append(block)
        for name, protected in self._protected.items():
            rows = given.get(name)
            if rows is not None:
                rows = _target_table(rows, self._y_is_class) if name == "y" else rows
                blocks.append(protected.transform(rows, num_rows, training=training)[0])
            elif training or (self.scale and name == "labels"):
                raise ValueError(f"{name}=None, but fit had {name}, needed here as well: pass {name}=.")
            else:
                start = sum(block.shape[1] for block in blocks)
                mean = self._fitted_model().design_mean[start : start + len(protected.names)]
                blocks.append(np.broadcast_to(mean, (num_rows, len(mean))))
        return np.concatenate(blocks, axis=1), sites

    # ----------------------------------------------------------------------------------------------------
    # The model
    # ----------------------------------------------------------------------------------------------------

    def _fitted_model(self) -> LocationScale:
        if not hasattr(self, "moments_"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet: call fit first.")
        if self._model is None:
            self._solve()
        assert self._model is not None
        return self._model

    def _solve(self) -> None:
        names = list(self.metadata_names_)
        for what, table in self._protected.items():
            names += [name if what == "y" else f"labels column {name!r}" for name in table.names]
        self._set_model(
            fit_location_scale(
                self.moments_,
                ridge=self.ridge,
                scale=self.scale,
                empirical_bayes=self.empirical_bayes,
                reference_site=self.reference_site,
                column_names=names,
            )
        )

    def _set_model(self, model: LocationScale) -> None:
        self._model = model
        self.coef_ = model.coefficients[: self._num_metadata]
        self.protected_coef_ = model.coefficients[self._num_metadata :]
        self.metadata_mean_ = model.design_mean[: self._num_metadata]
        self.mean_ = model.mean
        self.sites_ = list(model.sites) if self.site is not None else []
        self.site_location_, self.site_scale_ = model.location, model.scale

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
        return index

    def _apply(self, X: Any, metadata: Any, labels: Any, *, inverse: bool) -> Any:  # noqa: N803
        check_is_fitted(self, "moments_")
        check_same_order(X=X, metadata=metadata, labels=labels)
        model = self._fitted_model()
        given = {"labels": labels}
        dropped: list[Any] | None = None
        if inverse and len(self._metadata_index) and not self.keep_metadata:
            features, dropped = self._read_dropped(X, metadata)
            table = dict(zip(map(str, self.metadata_columns or ()), dropped, strict=True))
            design, sites = self._design(table, given, len(features), training=False)
        else:
            features, design, sites, _ = self._read(X, metadata, given)
        index = self._site_index(sites, len(features))
        changed = (model.restore if inverse else model.remove)(features, design, index)
        out: NDArray[Any] = changed.astype(features.dtype)
        if dropped is None and self.keep_metadata and len(self._metadata_index):
            is_frame = hasattr(X, "columns") and hasattr(X, "dtypes")
            names = self._names_of_metadata(X) if is_frame else self._metadata_index
            dropped = [X[name] if is_frame else np.asarray(X)[:, name] for name in names]
        return out if dropped is None else self._together(out, dropped)

    def _together(self, features: NDArray[Any], metadata: list[Any]) -> Any:
        """Return features and metadata in the places of their columns, every column as exact as it was."""
        columns: list[Any] = [None] * self.n_features_in_
        for place, column in zip(self._feature_index, features.T, strict=True):
            columns[place] = column
        for place, column in zip(self._metadata_index, metadata, strict=True):
            columns[place] = column
        kind = _get_output_config("transform", self)["dense"]
        if kind != "default":
            import importlib

            names = _check_feature_names_in(self, None)
            return importlib.import_module(kind).DataFrame(
                {
                    name: column.to_numpy() if hasattr(column, "to_numpy") and kind == "polars" else column
                    for name, column in zip(names, columns, strict=True)
                }
            )
        arrays = [np.asarray(column) for column in columns]
        dtype = np.result_type(*(array.dtype for array in arrays if array.dtype.kind in "biuf"))
        exact = all(
            array.dtype.kind in "biuf" and bool((array.astype(dtype) == array).all()) for array in arrays
        )
        whole: NDArray[Any] = np.empty((len(features), len(columns)), dtype if exact else object)
        for place, array in enumerate(arrays):
            whole[:, place] = array
        return whole

    def _read_dropped(self, X: Any, metadata: Any) -> tuple[NDArray[Any], list[Any]]:  # noqa: N803
        """Read what `transform` returned, with the columns that it had left out."""
        features = check_array(X, **_FEATURES)
        features = self._finite(features, list(range(features.shape[1])))
        if features.shape[1] != len(self._feature_index):
            raise ValueError(
                f"X has {features.shape[1]} features, but transform returns {len(self._feature_index)}."
            )
        names = list(self.metadata_columns or ())
        if metadata is None:
            raise ValueError(f"metadata=None, but transform left out the columns {names}: pass them.")
        if hasattr(metadata, "columns"):
            columns = [metadata[name] for name in names]
        else:
            array = np.asarray(metadata)
            columns = list((array[:, None] if array.ndim == 1 else array).T)
        if len(columns) != len(names):
            raise ValueError(f"metadata has {len(columns)} column(s), metadata_columns has {len(names)}.")
        return features, columns


_ESTIMATES = (
    "coef_",
    "protected_coef_",
    "metadata_mean_",
    "mean_",
    "sites_",
    "site_location_",
    "site_scale_",
)

_FEATURES: dict[str, Any] = {
    "dtype": [np.float64, np.float32],
    "ensure_min_samples": 1,
    "ensure_all_finite": False,
}


def _target_table(y: Any, is_class: bool) -> dict[str, Column]:
    """Return the columns of a target: "y", or "y0", "y1", … where there are several."""
    values = np.asarray(y)
    matrix = values.reshape(len(values), -1)
    if matrix.shape[1] > 1 and is_class:
        raise TypeError(
            f"y has {matrix.shape[1]} columns of dtype {values.dtype}: categories can be protected as one "
            "column, more of them as labels=."
        )
    if not is_class and values.dtype.kind not in "biuf":
        try:
            matrix = matrix.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"y must be numeric to be protected as continuous, got {values.dtype}."
            ) from error
    names = ["y"] if matrix.shape[1] == 1 else [f"y{index}" for index in range(matrix.shape[1])]
    columns = {name: read_column(name, values) for name, values in zip(names, matrix.T, strict=True)}
    return {name: column.as_category() for name, column in columns.items()} if is_class else columns


def _as_sample_weight(sample_weight: ArrayLike, num_rows: int) -> FloatArray:
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (num_rows,):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(num_rows,)}!")
    return weights
