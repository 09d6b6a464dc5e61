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
from sklearn.utils.validation import _check_feature_names_in, check_array, check_is_fitted, validate_data

from mdnorm.tables.combat import (
    LocationScale,
    SiteCodes,
    SiteMoments,
    add_moments,
    fit_location_scale,
    site_moments,
)
from mdnorm.tables.encoder import ColumnEncoder, category_values
from mdnorm.tables.summary import Summary, Variable, summarise

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
    unseen_site : "error" or "mean"
        What `transform` does with a site that was not in `fit`: raise, or correct it as the average site, so
        that only the effects of the other metadata are removed, location and scale stay. A third way
        is to call `adapt` first.

    Attributes
    ----------
    coef_ : (K_m, D) float64 array
        Effects of the encoded metadata columns on the features that are returned.
    metadata_mean_ : (K_m,) float64 array
    mean_ : (D,) float64 array
        Features expected at average metadata and protected columns.
    metadata_names_ : list of str
        Names of the encoded metadata columns, ``"scanner[B]"`` for the level B of a category.
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
    divided by its scale, the effect of `y` in that site is divided with the rest. `covariates`, which
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
    __metadata_request__fit = {"metadata": True, "covariates": True}  # noqa: RUF012
    __metadata_request__partial_fit = {"metadata": True, "covariates": True}  # noqa: RUF012
    __metadata_request__transform = {"metadata": True, "covariates": True}  # noqa: RUF012
    __metadata_request__inverse_transform = {"metadata": True, "covariates": True}  # noqa: RUF012

    def __init__(
        self,
        *,
        metadata_columns: Sequence[int | str] | None = None,
        keep_metadata: bool = False,
        ridge: float = 0.0,
        protect_target: Literal["auto", "categorical", "continuous", False] = "auto",
        site: int | str | None = None,
        scale: bool = False,
        empirical_bayes: bool = False,
        reference_site: Hashable | None = None,
        unseen_site: Literal["error", "mean"] = "error",
    ) -> None:
        self.metadata_columns = metadata_columns
        self.keep_metadata = keep_metadata
        self.ridge = ridge
        self.protect_target = protect_target
        self.site = site
        self.scale = scale
        self.empirical_bayes = empirical_bayes
        self.reference_site = reference_site
        self.unseen_site = unseen_site

    # ----------------------------------------------------------------------------------------------------
    # Fitting
    # ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        covariates: Any = None,
        sample_weight: ArrayLike | None = None,
    ) -> MetadataResidualizer:
        """Estimate the effects of the metadata.

        Parameters
        ----------
        X : (n, D) array or DataFrame
            Features, and the metadata where `metadata_columns` says so.
        y : (n,) or (n, K_y), optional
            Labels or targets: protected (see `protect_target`), needed here only.
        metadata : (n,) or (n, K) array or DataFrame, optional
            What is removed. Numeric and boolean columns are used as they are; columns of strings or of a
            categorical dtype become indicators of their levels.
        covariates : (n,) or (n, K) array or DataFrame, optional
            Further columns that are protected, encoded in the same way.
        sample_weight : (n,) array, optional
            A row of weight 2 counts as two rows, one of weight 0 as none.

        Returns
        -------
        MetadataResidualizer

        Raises
        ------
        TypeError, ValueError
            Tables that cannot be used (see `mdnorm.tables.encoder.ColumnEncoder`), metadata given twice, too
            few rows, sites that cannot be estimated (see `mdnorm.tables.fit_location_scale`).
        """
        self._check_parameters()
        if sample_weight is not None and not np.any(np.asarray(sample_weight)):
            raise ValueError("Sample weights must contain at least one non-zero number: all are zero.")
        self._update(X, y, metadata, covariates, sample_weight, None, reset=True)
        self._solve()
        return self

    def partial_fit(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        covariates: Any = None,
        sample_weight: ArrayLike | None = None,
        classes: ArrayLike | None = None,
    ) -> MetadataResidualizer:
        """Add rows; what is estimated is what `fit` on all rows so far estimates.

        The first call fixes the columns and levels of categories (give later levels as a categorical dtype).
        Sites may appear at any time. What `adapt` has added is forgotten.

        Parameters
        ----------
        X, y, metadata, covariates, sample_weight
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
        self._update(X, y, metadata, covariates, sample_weight, classes, reset=first)
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
        covariates: Any = None,
        sample_weight: ArrayLike | None = None,
    ) -> Any:
        """Return ``fit(X, y, ...).transform(X, ...)``."""
        self.fit(X, y, metadata=metadata, covariates=covariates, sample_weight=sample_weight)
        return self.transform(X, metadata=metadata, covariates=covariates)

    def adapt(
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        *,
        metadata: Any = None,
        covariates: Any = None,
    ) -> MetadataResidualizer:
        """Estimate location and scale of sites that were not in `fit`, from rows of theirs.

        Coefficients, pooled variance and the other sites stay as they are. With empirical Bayes the new
        site's own features are its prior, as they are for every site.

        Parameters
        ----------
        X, metadata, covariates
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
        features, design, sites = self._read(X, metadata, covariates, y=y)[:3]
        new = self._site_index(sites, model) < 0
        if not new.any():
            raise ValueError(f"all rows are of sites that are known already, {list(model.sites)}.")
        assert sites is not None
        self._set_model(model.with_sites(self._moments(features[new], design[new], sites[new])))
        return self

    # ----------------------------------------------------------------------------------------------------
    # Transforming
    # ----------------------------------------------------------------------------------------------------

    def transform(self, X: Any, *, metadata: Any = None, covariates: Any = None) -> Any:  # noqa: N803
        """Return the features without the effects of the metadata.

        Parameters
        ----------
        X : (n, n_features_in_) array or DataFrame
        metadata : optional
            As in `fit`, of these rows.
        covariates : optional
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
            Metadata are missing or not those of `fit`; an unseen site with ``unseen_site="error"``.
        """
        return self._apply(X, metadata, covariates, inverse=False)

    def inverse_transform(self, X: Any, *, metadata: Any = None, covariates: Any = None) -> Any:  # noqa: N803
        """Return the features with the effects put back.

        Parameters
        ----------
        X : (n, D) array or DataFrame
            What `transform` returns.
        metadata : optional
            The metadata of these rows, as in `fit`. With `metadata_columns` that are not kept: those columns,
            in the order in which `metadata_columns` has them.
        covariates : optional
            As in `transform`.

        Returns
        -------
        (n, n_features_in_) array
        """
        return self._apply(X, metadata, covariates, inverse=True)

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
        encoders = [each for each in (self._metadata_encoder, self._covariate_encoder) if each is not None]
        groups = [group for encoder in encoders for group in encoder.groups]
        num_known = sum(len(columns) for _, columns in groups)
        if self._target is not None:
            groups.append(("y", self._target.names))
        return summarise(
            self.moments_,
            self._fitted_model(),
            [Variable(*group) for group in groups],
            _check_feature_names_in(self, None)[self._feature_index],
            site=None
            if self.site is None or self._metadata_encoder is None
            else str(self._metadata_encoder.site),
            num_known=num_known,
        )

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
        if self.unseen_site not in ("error", "mean"):
            raise ValueError(f"unseen_site must be 'error' or 'mean', got {self.unseen_site!r}.")
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
        covariates: Any,
        sample_weight: ArrayLike | None,
        classes: ArrayLike | None,
        reset: bool,
    ) -> None:
        if reset:
            self._start(X, y, metadata, covariates, classes)
        features, design, sites, num_rows = self._read(X, metadata, covariates, y=y, training=True)
        weights = None if sample_weight is None else _as_sample_weight(sample_weight, num_rows)
        moments = self._moments(features, design, sites, weights)
        self.moments_: SiteMoments = add_moments({} if reset else self.moments_, moments)

    def _moments(
        self,
        features: NDArray[Any],
        design: FloatArray,
        sites: NDArray[Any] | None,
        weights: FloatArray | None = None,
    ) -> SiteMoments:
        k = self._num_metadata
        return site_moments(features, design[:, :k], design[:, k:], _site_codes(sites), weights)

    def _start(self, X: Any, y: Any, metadata: Any, covariates: Any, classes: ArrayLike | None) -> None:  # noqa: N803
        """Fix what the first rows fix: columns, levels, classes."""
        if metadata is not None and self.metadata_columns is not None:
            raise ValueError(
                "metadata= and metadata_columns= were both given: metadata come from one of them."
            )
        self._model = None
        self._select(X)
        if metadata is None and self.metadata_columns is None:
            warnings.warn(
                "no metadata: X is returned unchanged. Pass metadata= to fit and transform (in a pipeline: "
                "by metadata routing) or name metadata_columns=; metadata_columns=() says that it is meant.",
                UserWarning,
                stacklevel=4,
            )
        table = self._metadata_part(X) if self.metadata_columns is not None else metadata
        self._metadata_encoder = None if table is None else ColumnEncoder("metadata", self.site).fit(table)
        if self._metadata_encoder is None and self.site is not None:
            raise ValueError(f"site={self.site!r} needs metadata with that column.")
        self._covariate_encoder = None if covariates is None else ColumnEncoder("covariates").fit(covariates)
        self.metadata_names_ = [] if self._metadata_encoder is None else list(self._metadata_encoder.names_)
        self._num_metadata = len(self.metadata_names_)
        nothing = self._num_metadata == 0 and self.site is None
        self._target = (
            None
            if y is None or nothing or self.protect_target is False
            else _Target(y, classes, self.protect_target)
        )
        if len(self._feature_index) == 0:
            raise ValueError(
                f"X has n_features={self.n_features_in_}, all of them metadata_columns: no feature is left."
            )

    def _select(self, X: Any) -> None:  # noqa: N803
        """Record the columns of X and which of them are features."""
        self._checked(X, reset=True)
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

    def _checked(self, X: Any, *, reset: bool) -> tuple[NDArray[Any], bool]:  # noqa: N803
        """Return the checked features, and whether they are all of X or what is left without metadata."""
        if self.metadata_columns is not None and hasattr(X, "columns") and hasattr(X, "dtypes"):
            # A DataFrame may hold metadata that are no numbers: only the features must be.
            validate_data(self, X, reset=reset, skip_check_array=True)
            names = [column for column in X.columns if column not in self._names_of_metadata(X)]
            if names:
                return check_array(X[names], **_FEATURES), False
        return validate_data(self, X, reset=reset, **_FEATURES), True

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
        return _Columns(dict(zip(names, columns, strict=True)))

    def _read(
        self,
        X: Any,  # noqa: N803
        metadata: Any,
        covariates: Any,
        *,
        y: Any = None,
        training: bool = False,
    ) -> tuple[NDArray[Any], FloatArray, NDArray[Any] | None, int]:
        """Return features, design columns and sites of rows; unknown protected columns at their mean."""
        checked, whole = self._checked(X, reset=False)
        if self.metadata_columns is not None and metadata is not None:
            raise ValueError("metadata= was given, but the metadata are in X (metadata_columns=).")
        table = metadata if self.metadata_columns is None else self._metadata_part(X)
        features = checked[:, self._feature_index] if whole and len(self._metadata_index) else checked
        design, sites = self._design(table, covariates, len(features), y, training)
        return features, design, sites, len(features)

    def _design(
        self, table: Any, covariates: Any, num_rows: int, y: Any, training: bool
    ) -> tuple[FloatArray, NDArray[Any] | None]:
        if (table is None) != (self._metadata_encoder is None):
            if table is None:
                raise ValueError(
                    "metadata=None, but fit had metadata: pass those of these rows. In a pipeline, "
                    "set_transform_request(metadata=True) routes them here; with a scorer that passes them "
                    "to no one (scores by name, and all before scikit-learn 1.8), let them be columns of X "
                    "(metadata_columns=)."
                )
            raise ValueError("metadata= was given, but fit had none: nothing is known about their effects.")
        if covariates is not None and self._covariate_encoder is None:
            raise ValueError("covariates= was given, but fit had none.")
        blocks = [np.empty((num_rows, 0))]
        sites = None
        if self._metadata_encoder is not None:
            block, sites = self._metadata_encoder.transform(table, num_rows)
            blocks.append(block)
        if self._covariate_encoder is not None:
            if covariates is not None:
                blocks.append(self._covariate_encoder.transform(covariates, num_rows)[0])
            elif training or self.scale:
                raise ValueError(
                    "covariates=None, but fit had covariates, and they are needed here: pass them."
                )
            else:
                blocks.append(
                    self._mean_rows(self._num_metadata, len(self._covariate_encoder.names_), num_rows)
                )
        if self._target is not None:
            width = self._target.num_columns
            if y is not None:
                blocks.append(self._target.transform(y, num_rows))
            elif training:
                raise ValueError("y=None, but the first call of partial_fit had y.")
            else:
                start = sum(block.shape[1] for block in blocks)
                blocks.append(self._mean_rows(start, width, num_rows))
        return np.concatenate(blocks, axis=1), sites

    def _mean_rows(self, start: int, width: int, num_rows: int) -> FloatArray:
        mean = self._fitted_model().design_mean[start : start + width]
        return np.broadcast_to(mean, (num_rows, width))

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
        if self._covariate_encoder is not None:
            names += [f"covariates column {name!r}" for name in self._covariate_encoder.names_]
        if self._target is not None:
            names += ["y"] * self._target.num_columns
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
        self.metadata_mean_ = model.design_mean[: self._num_metadata]
        self.mean_ = model.mean
        self.sites_ = list(model.sites) if self.site is not None else []
        self.site_location_, self.site_scale_ = model.location, model.scale

    def _site_index(self, sites: NDArray[Any] | None, model: LocationScale) -> NDArray[np.intp]:
        if sites is None:
            raise ValueError("site is None: the rows have no site.")
        position = {site: index for index, site in enumerate(model.sites)}
        return np.array([position.get(site, -1) for site in sites.tolist()], dtype=np.intp)

    def _apply(self, X: Any, metadata: Any, covariates: Any, *, inverse: bool) -> NDArray[Any]:  # noqa: N803
        check_is_fitted(self, "moments_")
        model = self._fitted_model()
        inserted = inverse and len(self._metadata_index) > 0 and not self.keep_metadata
        if inserted:
            features, design, sites, table = self._read_dropped(X, metadata, covariates)
        else:
            features, design, sites, _ = self._read(X, metadata, covariates)
        if sites is None:
            index = np.zeros(len(features), dtype=np.intp)
        else:
            index = self._site_index(sites, model)
            if self.unseen_site == "error" and (index < 0).any():
                unseen = sorted({str(site) for site in sites[index < 0]})
                raise ValueError(
                    f"site(s) {unseen[:5]} were not in fit ({[str(s) for s in model.sites][:10]}). Call "
                    "adapt with rows of theirs, or set unseen_site='mean' to correct them as the average "
                    "site."
                )
        changed = (model.restore if inverse else model.remove)(features, design, index)
        out: NDArray[Any] = changed.astype(features.dtype)
        if inserted:
            dtype = out.dtype if table.dtype.kind in "biuf" else np.dtype(object)
            whole: NDArray[Any] = np.empty((len(out), self.n_features_in_), dtype=dtype)
            whole[:, self._feature_index], whole[:, self._metadata_index] = out, table
            return whole
        if self.keep_metadata and len(self._metadata_index):
            kept = np.array(X)
            if kept.dtype.kind != "O":
                kept = kept.astype(out.dtype)
            kept[:, self._feature_index] = out
            return kept
        return out

    def _read_dropped(
        self,
        X: Any,  # noqa: N803
        metadata: Any,
        covariates: Any,
    ) -> tuple[NDArray[Any], FloatArray, NDArray[Any] | None, NDArray[Any]]:
        """Read what `transform` returned, with the columns that it had left out."""
        features = check_array(X, **_FEATURES)
        if features.shape[1] != len(self._feature_index):
            raise ValueError(
                f"X has {features.shape[1]} features, but transform returns {len(self._feature_index)}."
            )
        if metadata is None:
            raise ValueError(
                f"metadata=None, but transform left out the columns {list(self.metadata_columns or ())}: "
                "pass them."
            )
        names = list(self.metadata_columns or ())
        if hasattr(metadata, "columns"):
            columns = [metadata[name] for name in self.metadata_columns or ()]
        else:
            array = np.asarray(metadata)
            columns = list((array[:, None] if array.ndim == 1 else array).T)
        if len(columns) != len(names):
            raise ValueError(f"metadata has {len(columns)} column(s), metadata_columns has {len(names)}.")
        table = _Columns(dict(zip(names, columns, strict=True)))
        design, sites = self._design(table, covariates, len(features), None, training=False)
        return features, design, sites, np.column_stack([np.asarray(column) for column in columns])


_ESTIMATES = ("coef_", "metadata_mean_", "mean_", "sites_", "site_location_", "site_scale_")

_FEATURES: dict[str, Any] = {"dtype": [np.float64, np.float32], "ensure_min_samples": 1}


class _Columns(dict[Hashable, Any]):
    """Columns by name, in the form `named_columns` reads."""

    @property
    def columns(self) -> list[Hashable]:
        return list(self)


class _Target:
    """How `y` becomes protected columns."""

    def __init__(self, y: Any, classes: ArrayLike | None, kind: str) -> None:
        values = np.asarray(y)
        self._continuous = kind == "continuous" or (
            kind == "auto" and values.dtype.kind == "f" and classes is None
        )
        single = values.ndim == 1 or values.shape[1] == 1
        # More than one column of integers is an indicator or a multi-output table already.
        self._continuous = self._continuous or (not single and values.dtype.kind in "biuf")
        self._levels: list[Any] | None = None
        if self._continuous:
            self.num_columns = 1 if values.ndim == 1 else values.shape[1]
        else:
            if not single:
                raise TypeError(
                    f"y has {values.shape[1]} columns of dtype {values.dtype}: categories can be protected "
                    "as one column, more of them as covariates=."
                )
            column = category_values(values.reshape(-1) if classes is None else np.asarray(classes), "y")
            self._levels = sorted(set(column.tolist()), key=lambda level: (str(type(level)), level))
            self.num_columns = len(self._levels) - 1

    @property
    def names(self) -> list[str]:
        if self._levels is not None:
            return [f"y[{level}]" for level in self._levels[1:]]
        return ["y"] if self.num_columns == 1 else [f"y[{index}]" for index in range(self.num_columns)]

    def transform(self, y: Any, num_rows: int) -> FloatArray:
        values = np.asarray(y)
        if len(values) != num_rows:
            raise ValueError(f"y has {len(values)} rows but X has {num_rows}: one row a sample is needed.")
        if self._levels is None:
            try:
                columns = values.astype(np.float64).reshape(num_rows, -1)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"y must be numeric to be protected as continuous, got {values.dtype}."
                ) from error
            bad = np.flatnonzero(~np.isfinite(columns).all(1))
            if len(bad):
                raise ValueError(f"y has NaN or infinite values in row(s) {bad[:5].tolist()}.")
            if columns.shape[1] != self.num_columns:
                raise ValueError(f"y has {columns.shape[1]} column(s), before it had {self.num_columns}.")
            return columns
        column = category_values(values.reshape(num_rows, -1)[:, 0], "y")
        position = {level: index for index, level in enumerate(self._levels)}
        codes = np.array([position.get(value, -1) for value in column.tolist()], dtype=np.intp)
        if (codes < 0).any():
            unknown = sorted({str(value) for value in column[codes < 0]})
            raise ValueError(
                f"y has class(es) {unknown[:5]} that the first call of partial_fit did not have: pass "
                "classes= there."
            )
        indicators: FloatArray = (codes[:, None] == np.arange(1, len(self._levels))).astype(np.float64)
        return indicators


def _as_sample_weight(sample_weight: ArrayLike, num_rows: int) -> FloatArray:
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (num_rows,):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(num_rows,)}!")
    return weights


def _site_codes(sites: NDArray[Any] | None) -> SiteCodes | None:
    """Return the index of each row's site, sites sorted."""
    if sites is None:
        return None
    values = sites.tolist()
    levels = sorted(set(values), key=lambda site: (str(type(site)), site))
    position = {site: index for index, site in enumerate(levels)}
    return SiteCodes(np.array([position[site] for site in values], dtype=np.intp), levels)
