"""Residualisation of tables as a scikit-learn transformer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import TransformerMixin
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted

from mdnorm.arrays import check_same_order
from mdnorm.tables.combat import LocationScale, SiteCodes
from mdnorm.tables.covariance import CovarianceModel
from mdnorm.tables.fitting import TableFitter
from mdnorm.tables.model import all_skipped
from mdnorm.tables.summary import Summary, summarise
from mdnorm.tables.table_reader import TableRows

FloatArray = NDArray[np.float64]


class MetadataResidualizer(TransformerMixin, TableFitter):  # type: ignore[misc]
    """Remove from the columns of a table what metadata explain.

    The table form of Metadata Normalization: features are regressed on metadata, protected columns and an
    intercept, and only the metadata part is removed, ``out = x − (m − m̄)·β_m``. Means stay. With
    ``site=`` the effects of a site are removed too, in location and, with ``scale=True``, in scale, as
    estimated or shrunk by empirical Bayes (ComBat).

    Metadata come with the data in ``fit(X, y, metadata=...)`` and ``transform(X, metadata=...)``, also by
    scikit-learn's metadata routing, or are columns of `X` (`metadata_columns`). With neither, `X` is returned
    unchanged, with a warning.

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
        continuous, anything else categories; whole numbers that can hardly be categories (more than 20
        values, or more than 5 with fewer than 5 rows each) are an error.
    strength : float
        From 0, features as they are, to 1, all is removed: what is returned is
        ``(1 − strength) · x + strength · out``.
    site : int, str or a sequence of them, optional
        The metadata column that says which site (scanner, batch) a row comes from: a column name, the
        position in `metadata`, or what `metadata_columns` calls it. Of several columns, as
        ``["site", "scanner"]``, each combination that rows have is a site, named by a tuple.
    subject : int or str, optional
        The metadata column with the subject of each row, where subjects have several rows. Each subject then
        has a random intercept in each feature, which stays: a mixed model, fitted by REML; with `site`,
        `scale` and `empirical_bayes`, longitudinal ComBat (Beer et al. 2020). Subjects that were not in `fit`
        have the intercept 0. As for sites, the number 1 and the text "1" are the same.
    scale : bool
        Remove effects of the site on the scale of the features, too.
    covariance : bool or float
        Remove effects of the site on the covariances of the features, too (CovBat, Chen et al. 2022): on
        location and scale of as many principal components as explain more than this share of the
        variance. True: 0.95, as published. Needs ``scale=True``.
    empirical_bayes : bool
        Shrink site effects towards their distribution over features (see
        `mdnorm.tables.fit_location_scale`).
    reference_site : optional
        The site that others are brought to. None: their average.
    missing : "error", "mean" or "indicator"
        What a missing value of the metadata does, as for `mdnorm.Design`. The site is never missing.
    unseen : "error" or "mean"
        What `transform` does with a level or a site that is in no row used by `fit` (of positive weight and
        with all features): raise, or correct it as the average one. Then only the effects of the other
        metadata are removed; location and scale stay. A `TableWarning` counts the rows of such sites, and
        of new subjects. For a site, the third way is to call `adapt` first.
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
    components_ : (K, D) float64 array
        With `covariance`: the principal components that are harmonised.
    subject_variance_ : (D,) float64 array
        With `subject`: the variance of the intercepts.
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

    **All rows at once.** `covariance` and `subject` need the rows themselves: with them there is no
    `partial_fit` and no `summary`.

    **Rows.** Fitting needs more rows than there are linearly independent columns, site columns and
    intercept included, or a ridge; otherwise the metadata would explain everything.

    References
    ----------
    Lu et al., Metadata Normalization, CVPR 2021 (arXiv:2104.09052). Johnson, Li & Rabinovic, Biostatistics
    8 (2007), 118–127. Beer et al., NeuroImage 220 (2020), 117129. Chen et al., Human Brain Mapping 43 (2022),
    1179–1195.

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
        strength: float = 1.0,
        site: int | str | Sequence[int | str] | None = None,
        subject: int | str | None = None,
        scale: bool = False,
        empirical_bayes: bool = False,
        covariance: bool | float = False,
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
        self.strength = strength
        self.site = site
        self.subject = subject
        self.scale = scale
        self.empirical_bayes = empirical_bayes
        self.covariance = covariance
        self.reference_site = reference_site
        self.missing = missing
        self.unseen = unseen
        self.missing_features = missing_features

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

        Raises
        ------
        TypeError, ValueError
            Tables that cannot be used (see `mdnorm.Design`), metadata given twice, too few rows, sites that
            cannot be estimated (see `mdnorm.tables.fit_location_scale`).

        Warns
        -----
        LeakageWarning
            Features are discrete or have heavy tails, so that non-linear models can read the metadata in what
            is left of them.
        """
        self._check_parameters()
        self._is_partial = False
        self._solve(*self._update(X, y, metadata, labels, sample_weight, None, reset=True))
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
        forgotten. Coefficients are computed when first needed, and errors about too few rows come then.

        Parameters
        ----------
        X, y, metadata, labels, sample_weight
            As in `fit`.
        classes : array, optional
            In the first call: all the classes of a categorical `y`. None: those in the first `y`.

        Raises
        ------
        ValueError
            As in `fit`; with `covariance` or `subject`, which need all rows at once.
        """
        for name in ("covariance", "subject"):
            if getattr(self, name) not in (False, None):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs all rows at once: use fit instead of partial_fit."
                )
        if getattr(self, "_intercepts", None) is not None:
            raise ValueError(
                "fit had subject=, which needs all rows at once: call fit again before partial_fit."
            )
        first = not hasattr(self, "moments_")
        if first:
            self._check_parameters()
            self._is_partial = True
        self._update(X, y, metadata, labels, sample_weight, classes, reset=first)
        self._model: LocationScale | None = None
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
            As in `fit`. Rows of sites that are known already, or that lack features, are left out.
        y : optional
            As in `fit`, where it is at hand: otherwise what the labels explain counts as the site's location
            wherever its mix of labels differs from the one in `fit`.

        Raises
        ------
        ValueError
            There is no `site`, or no row of a new one that has all features.
        """
        check_is_fitted(self, "moments_")
        if self.site is None:
            raise ValueError("adapt is for sites: this estimator has site=None.")
        model = self._fitted_model()
        check_same_order(X=X, y=y, metadata=metadata, labels=labels)
        rows = self._read(X, y, metadata, labels)
        assert rows.sites is not None
        new = model.index_of(rows.sites)[0] < 0
        if not new.any():
            raise ValueError(f"all rows are of sites that are known already, {list(model.sites)}.")
        complete = ~np.isnan(rows.features).any(1)
        if not (new & complete).any():
            raise ValueError(all_skipped(np.isnan(rows.features[new]).all(0), self._feature_names()))
        new &= complete
        features = self._without_intercepts(rows.features, rows.subjects)[new]
        codes, design = SiteCodes(rows.sites.codes[new], rows.sites.levels), rows.design[new]
        model = model.with_sites(self._moments(TableRows(features, design, codes, None)))
        if isinstance(model, CovarianceModel):
            model = model.with_rows(features, design, codes)
        self._model = model
        return self

    def transform(self, X: Any, *, metadata: Any = None, labels: Any = None) -> Any:  # noqa: N803
        """Return the features without the effects of the metadata.

        Parameters
        ----------
        X : (n, n_features_in_) array or DataFrame
        metadata, labels : optional
            As in `fit`, of these rows. `labels` are needed with ``scale=True`` if `fit` had them.

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
        metadata, labels : optional
            As in `transform`. With `metadata_columns` that are not kept, `metadata` are those columns, in the
            order in which `metadata_columns` has them.

        Returns
        -------
        (n, n_features_in_) array
        """
        return self._apply(X, metadata, labels, inverse=True)

    def summary(self) -> Summary:
        """Return coefficients with standard errors, F tests, and what the sites were before and after.

        The regression is that of the features on metadata, protected columns, an intercept and, with `site`,
        one for each site, as statsmodels' ``OLS`` (with `sample_weight`: ``WLS`` on the rows of positive
        weight). It is available after `partial_fit`, too. Standard errors assume independent rows of equal
        variance; where sites differ in scale they are approximate.

        Returns
        -------
        Summary
            With the tables `coefficients`, `variables` (a column of the tables with all its levels),
            `features`, `sites` and `site_effects`, each a list of records and with `to_frame` one of pandas.
            Its text is a report of the strongest of them, and `plot` draws the sites.

        Raises
        ------
        ValueError
            There is a ridge, under which coefficients are biased and have no such errors; there are no more
            rows than independent columns; `covariance`, `subject` or a `strength` below 1 is set, which
            it does not cover.

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
        for name, plain in (("covariance", False), ("subject", None), ("strength", 1)):
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: a summary is of one least-squares regression, and of "
                    f"sites whose location and scale are removed as a whole. Fit with {name}={plain!r}."
                )
        known = {what: table for what, table in self._tables.items() if what != "y"}
        return summarise(
            self.moments_,
            self._fitted_model(),
            [term for table in self._tables.values() for term in table.terms.items()],
            self._feature_names(),
            site=self._tables["metadata"].site_name if "metadata" in self._tables else None,
            num_known=sum(len(table.names) for table in known.values()),
        )

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[Any]:
        """Return the names of the columns that `transform` returns; `input_features` where `X` has none."""
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
