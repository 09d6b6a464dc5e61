"""Metadata as people have it, a table with a formula, to the matrices that `MetadataNorm` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.design.checks import check_fits, check_kinds, check_missing
from mdnorm.design.diagnosis import (
    ConfoundedDesignWarning,
    DesignDiagnosis,
    diagnose_columns,
    levels_in_words,
)
from mdnorm.design.factors import FittedFactor, fit_factor
from mdnorm.design.formula import (
    Factor,
    column_or_factor,
    in_order,
    parse_formula,
)
from mdnorm.design.reader import Column, column_names, read_columns
from mdnorm.design.roles import TableWarning, code_warning, level_warning, stand_in_warning
from mdnorm.design.serialized import design_from_json, design_to_json
from mdnorm.design.terms import Terms, TermValues, label_terms, scoped_products
from mdnorm.text import warn

Matrix = NDArray[np.float64]


class _Matrices(NamedTuple):
    metadata: Tensor
    labels: Tensor | None


class DesignMatrices(_Matrices):
    """What `Design.transform` returns; it unpacks as ``metadata, labels``.

    Attributes
    ----------
    metadata : (n, K_m) Tensor
    labels : (n, K_y) Tensor or None
        None where the design has no labels or the table lacks them.
    metadata_names, label_names : tuple of str
        Of the columns.
    """

    metadata_names: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()


class Design:
    """Turns tables of metadata into the columns that `MetadataNorm` takes, and says if they are confounded.

    Parameters
    ----------
    formula : str or sequence of str
        A Wilkinson formula such as ``"age + C(site) + bs(age, df=4)"``; or a list of columns (each a name, or
        a factor such as ``"C(site)"``). Numbers are numeric, strings, booleans and categories categorical;
        ``C(x)`` makes numbers a category. Dates count as days. ``a:b`` is an interaction, ``a*b`` stands for
        ``a + b + a:b``. Functions: ``bs``, ``cr`` (``cs``), ``poly``; ``center``, ``scale``; ``log``,
        ``log1p``, ``log2``, ``log10``, ``exp``, ``expm1``, ``sqrt``, ``abs``, and ``I(…)`` or ``{…}`` around
        arithmetic. Nothing else is possible, so that a design from a file cannot run code.
    labels : str or sequence of str, optional
        Columns (or factors) of the label, protected in the regression. Numbers are taken as they are;
        categories get one 0/1 column for each level but the first, in alphabetical order or in that of a
        categorical type: of "AD" and "CN", CN is 1. ``"C(dx, reference='CN')"`` or ``"C(dx, levels=['CN',
        'AD'])"`` says it otherwise; `label_levels` and ``print(design)`` say what is what.
    missing : {"error", "mean", "indicator"}
        What a missing value of the metadata does. "error" names rows and columns. "mean": every column
        derived from that variable, interactions included, is at its training mean in that row: no correction
        beyond the average for it, while the other variables are corrected for. "indicator": as "mean", and a
        0/1 column for each variable that had missing values in training. Missing labels are always an error.
    unseen : {"error", "mean"}
        The same for a level that was not in the training data.
    standardize : bool
        Give metadata columns mean 0 and standard deviation 1 over the training data.

    Raises
    ------
    FormulaError
        The formula cannot be read, or has something in it that is not allowed.
    ValueError
        `missing` or `unseen` is none of these, or there are no metadata columns.
    TypeError
        `formula` or `labels` is neither a string nor a sequence of strings. A set is none: it has no order,
        and columns in another order at inference would be other metadata.

    Notes
    -----
    The intercept is `MetadataNorm`'s own and never among the columns. Knots, levels, means and deviations are
    those of the table given to `fit`. Values outside of the training range move to its ends in ``bs``, ``cr``
    and ``poly`` (the effect is constant there); other columns extrapolate as a line does.

    ``cr(x, df)`` has the constraint that its columns have mean 0 over the training data, as a smooth term of
    a regression with intercept has [1]_: formulaic's ``cr(x, df=df, constraints="center")``.

    A fitted design is saved by `to_json`, or within a model by `mdnorm.integration.design.attach_design`.

    References
    ----------
    .. [1] Wood, S. N. (2006). Generalized Additive Models: An Introduction with R, section 4.1. Chapman &
       Hall/CRC.

    Examples
    --------
    >>> table = {
    ...     "age": [60, 70, 65, 75, 62, 58],
    ...     "site": ["a", "a", "b", "b", "b", "a"],
    ...     "sick": [0, 1, 1, 0, 0, 1],
    ... }
    >>> design = Design(["age", "site"], labels="sick").fit(table)
    >>> design.metadata_names
    ('age', 'site[T.b]')
    >>> metadata, labels = design.transform(table)
    >>> metadata.shape, labels.shape
    (torch.Size([6, 2]), torch.Size([6, 1]))
    >>> design.transform({"age": 66, "site": "b"}).metadata.shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        formula: str | Sequence[str],
        labels: str | Sequence[str] | None = None,
        *,
        missing: str = "error",
        unseen: str = "error",
        standardize: bool = True,
    ) -> None:
        self.formula: str | tuple[str, ...] = (
            formula if isinstance(formula, str) else in_order("formula", formula)
        )
        labels = () if labels is None else labels
        self.labels = (labels,) if isinstance(labels, str) else in_order("labels", labels)
        self.missing = missing
        self.unseen = unseen
        self._check_choices()
        self.standardize = bool(standardize)
        self._written_terms = (
            parse_formula(self.formula)
            if isinstance(self.formula, str)
            else tuple((column_or_factor(entry),) for entry in dict.fromkeys(self.formula))
        )
        if not self._written_terms:
            raise ValueError(f"formula must have at least one metadata column, got {formula!r}.")
        self._label_factors = tuple(column_or_factor(label) for label in dict.fromkeys(self.labels))
        self._check_overlap()
        self._factors: dict[str, FittedFactor] = {}
        self._kinds: dict[str, str] = {}
        self._terms = self._label_terms = Terms((), ())
        self._mean = np.empty(0)
        self._scale = np.empty(0)
        self._is_fitted = False

    def _check_choices(self) -> None:
        for name, choices in (("missing", ("error", "mean", "indicator")), ("unseen", ("error", "mean"))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")

    def _check_overlap(self) -> None:
        metadata = {name for term in self._written_terms for factor in term for name in factor.variables}
        for factor in self._label_factors:
            both = sorted(metadata & set(factor.variables))
            if both:
                raise ValueError(
                    f"{both[0]!r} is both label and metadata: its effect can only be kept or removed, "
                    "take it out of one of them."
                )

    def __repr__(self) -> str:
        formula = self.formula if isinstance(self.formula, str) else list(self.formula)
        state = f"{self.num_metadata} columns" if self._is_fitted else "not fitted"
        labels = f", labels={list(self.labels)}" if self.labels else ""
        words = levels_in_words(self.label_levels) if self._is_fitted else []
        coded = "".join(f"; {name}: {levels}" for name, levels in words)
        return (
            f"Design({formula!r}{labels}, missing={self.missing!r}, unseen={self.unseen!r}, "
            f"standardize={self.standardize}): {state}{coded}"
        )

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """Names of the metadata columns: factor, basis column or level, as in ``age:C(site)[T.b]``."""
        self._check_fitted()
        return self._terms.names

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the label columns."""
        self._check_fitted()
        return self._label_terms.names

    @property
    def terms(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each term of the formula, and of each label after them."""
        names = self.metadata_names
        terms = {term: tuple(names[i] for i in at) for term, at in self._terms.of_terms().items()}
        return terms | {label.factor.text: tuple(label.names(True)) for label in self._fitted_labels()}

    @property
    def units(self) -> Matrix:
        """What each metadata column was divided by, (K_m,) float64; 1 where it was not."""
        self._check_fitted()
        return np.where(self.standardize & (self._scale > 0), self._scale, 1.0)

    @property
    def num_metadata(self) -> int:
        """Number of metadata columns, for ``MetadataNorm(…, num_metadata=…)``."""
        self._check_fitted()
        return self._terms.width

    @property
    def num_labels(self) -> int:
        """Number of label columns, for ``MetadataNorm(…, num_labels=…)``."""
        return len(self.label_names)

    @property
    def levels(self) -> dict[str, tuple[Any, ...]]:
        """Levels of each category, the reference first."""
        self._check_fitted()
        return {text: fitted.levels for text, fitted in self._factors.items() if fitted.kind == "category"}

    @property
    def label_levels(self) -> dict[str, dict[Any, int]]:
        """For each label that is a category its levels, and the class index that each stands for.

        Index 0 is the reference, which has no column. So of two levels this is the number in the label's
        column: ``{"dx": {"CN": 0, "AD": 1}}``; of more, the index k is a 1 in its k-th column.
        """
        self._check_fitted()
        return {
            label.factor.text: {level: index for index, level in enumerate(label.levels)}
            for label in self._fitted_labels()
            if label.kind == "category"
        }

    def variables(self, *, labels: bool = True) -> list[str]:
        """Return the columns of a table that the design, fitted or not, uses, also for its `labels`."""
        factors = self._factors_as_written(labels)
        return list(dict.fromkeys(name for factor in factors for name in factor.variables))

    def declared_categories(self) -> set[str]:
        """Return the columns that are a category whatever they hold: those in ``C(…)``."""
        factors = self._factors_as_written(True)
        return {name for factor in factors if factor.kind == "category" for name in factor.variables}

    def _fitted_labels(self) -> list[FittedFactor]:
        return [self._factors[factor.text] for factor in self._label_factors]

    def _factors_as_written(self, labels: bool) -> list[Factor]:
        factors = [factor for term in self._written_terms for factor in term]
        return [*factors, *(self._label_factors if labels else ())]

    def fit(self, table: Any) -> Design:
        """Learn levels, knots, means and standard deviations from the training data.

        Parameters
        ----------
        table : table
            A DataFrame of pandas or polars, a table of pyarrow, or a mapping from names to columns, with one
            row a sample, labels included.

        Raises
        ------
        TypeError
            Not a table, or a column of a type that is neither numbers, categories nor dates.
        ValueError
            A column is not there; fewer than 2 rows; missing values where `missing` is "error", or in a
            label; infinite values; a basis with more columns than its variable has values; no column at all.

        Warns
        -----
        ConfoundedDesignWarning
            Label and metadata can hardly be told apart: see `diagnose`.
        TableWarning
            Numbers such as −9999 seem to stand for missing values, few different integers for codes of a
            category, or nearly every row has a text of its own.
        """
        self._is_fitted = False
        return self.fit_columns(read_columns(table, self.variables())[0])

    def fit_columns(self, columns: Mapping[str, Column], weights: Matrix | None = None) -> Design:
        """Do what `fit` does, with columns that were read before, all of `variables`.

        With `weights` (n,), all positive, means and deviations are weighted; knots are not.
        """
        self._is_fitted = False
        num_rows = len(next(iter(columns.values())).missing)
        if num_rows < 2:
            raise ValueError(
                f"the table has {num_rows} row(s): fit needs at least 2, and many more to be of use."
            )
        for column in columns.values():
            if column.kind == "empty":
                raise ValueError(f"column {column.name!r} has no values: take it out of the design.")
        self._kinds = {name: column.kind for name, column in columns.items()}
        check_missing(self, columns)
        self._factors = {each.text: fit_factor(each, columns) for each in self._factors_as_written(True)}
        for label in self._fitted_labels():
            if not label.width(True):
                raise ValueError(
                    f"label {label.factor.text!r} has the single level {label.levels[0]!r}: leave labels "
                    "out, or give rows of other labels."
                )
        indicators = [
            name
            for name in self.variables(labels=False)
            if self.missing == "indicator" and columns[name].missing.any()
        ]
        self._terms = Terms(scoped_products(self._written_terms, self._factors), indicators)
        self._label_terms = label_terms(self._fitted_labels())
        values = self._evaluate(columns)
        self._fit_moments(values, weights)
        self._is_fitted = True
        diagnosis = diagnose_columns(self, columns, values, min_rows=0)
        notes = [find(column) for find in (stand_in_warning, level_warning) for column in columns.values()]
        labels = {factor.text for factor in self._label_factors}
        for text in [text for text in self._factors if text in columns]:  # Neither C(…) nor a function.
            notes.append(code_warning(columns[text], "label" if text in labels else "column"))
        for note in filter(None, notes):
            warn(note, TableWarning)
        if diagnosis.warnings:
            warn(
                " ".join(["The design is confounded:", *diagnosis.warnings, "See Design.diagnose."]),
                ConfoundedDesignWarning,
            )
        return self

    def transform(
        self, table: Any, *, labels: bool | None = None, dtype: torch.dtype | None = None
    ) -> DesignMatrices:
        """Return the matrices of a table.

        Parameters
        ----------
        table : table
            As for `fit`; or a mapping from names to single values, which is one row.
        labels : bool, optional
            Whether to return label columns. By default, if the table has them.
        dtype : torch.dtype, optional
            Of the result, a floating-point one; the default is torch's default. Everything is computed in
            float64.

        Returns
        -------
        DesignMatrices
            ``metadata`` (n, K_m) and ``labels`` (n, K_y) or None, on the CPU, to unpack as a pair.

        Raises
        ------
        RuntimeError
            The design is not fitted.
        TypeError, ValueError
            As for `fit`; and a column that is of another kind than in training, a level that was not in the
            training data where `unseen` is "error" (in a label: always), or, where `missing` is "indicator",
            a missing value of a variable that had none in training.
        """
        self._check_fitted()
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point one, got {dtype}.")
        with_labels = self._with_labels(table, labels)
        columns, num_rows = read_columns(table, self.variables(labels=with_labels))
        metadata = torch.empty(num_rows, self.num_metadata, dtype=dtype)
        for rows, block in self._evaluate(columns).chunks():
            metadata[rows] = torch.from_numpy(self._finished(block)).to(dtype)
        check_fits(metadata, self.metadata_names)
        label_matrix = None
        if with_labels:
            label_matrix = torch.from_numpy(self._label_matrix(columns, num_rows)).to(dtype)
            check_fits(label_matrix, self.label_names)
        matrices = DesignMatrices(metadata, label_matrix)
        matrices.metadata_names, matrices.label_names = self.metadata_names, self.label_names
        return matrices

    def transform_columns(
        self, columns: Mapping[str, Column], *, labels: bool
    ) -> tuple[Matrix, Matrix | None]:
        """Return the matrices of columns that were read before, all of `variables`, in float64.

        They are (n, K_m), each of its columns contiguous, and (n, K_y) or None without `labels`. Errors are
        those of `transform`.
        """
        self._check_fitted()
        num_rows = len(next(iter(columns.values())).missing)
        # By columns: what is done to a column later runs along it, not over the few columns of each row.
        metadata: Matrix = np.empty((self.num_metadata, num_rows)).T
        for rows, block in self._evaluate(columns).chunks():
            part = metadata[rows]
            part[:] = block
            self._finished(part)
        return metadata, self._label_matrix(columns, num_rows) if labels else None

    def fit_transform(self, table: Any, *, dtype: torch.dtype | None = None) -> DesignMatrices:
        """Fit the design to a table and return its matrices: `fit`, then `transform`."""
        return self.fit(table).transform(table, dtype=dtype)

    def diagnose(self, table: Any, *, min_rows: int = 5) -> DesignDiagnosis:
        """Say whether label and metadata can be told apart in a table, in numbers and in words.

        Parameters
        ----------
        table : table
            As for `fit`, usually the same. Without label columns only the metadata are looked at.
        min_rows : int
            Combinations of levels with fewer rows are listed.

        Raises
        ------
        RuntimeError
            The design is not fitted.
        TypeError, ValueError
            As for `transform`; and a table of fewer than 2 rows.
        """
        self._check_fitted()
        columns, num_rows = read_columns(table, self.variables(labels=self._with_labels(table, None)))
        if num_rows < 2:
            raise ValueError(f"the table has {num_rows} row(s): a diagnosis needs at least 2.")
        return diagnose_columns(self, columns, self._evaluate(columns), min_rows)

    def to_json(self) -> str:
        """Return the fitted design as JSON, to be read by `from_json`: what it transforms stays the same.

        RuntimeError where the design is not fitted.
        """
        self._check_fitted()
        return design_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Design:
        """Return the design that `to_json` saved. Nothing in the text is run, whoever wrote it.

        Raises
        ------
        ValueError
            The text is truncated, not JSON, of something else or of a later version, or contradicts itself.
        FormulaError
            A factor in it has something that is not allowed.
        """
        return design_from_json(cls.__new__(cls), text)

    def _check_fitted(self) -> None:
        if not self._is_fitted:
            raise RuntimeError("the design is not fitted: call fit(table) with the training data first.")

    def _with_labels(self, table: Any, wanted: bool | None) -> bool:
        needed = [name for factor in self._label_factors for name in factor.variables]
        if wanted is False or not needed:
            if wanted:
                raise ValueError("labels=True, but the design has no labels: give Design(…, labels=…).")
            return False
        absent = [name for name in needed if name not in set(column_names(table))]
        if absent and (wanted or len(absent) < len(set(needed))):
            raise ValueError(f"the table has no label column {absent[0]!r}: add it, or pass labels=False.")
        return not absent

    def _fit_moments(self, values: TermValues, weights: Matrix | None) -> None:
        names = self._terms.names
        if not self._terms.width - len(self._terms.indicators):
            raise ValueError(
                "the design has no columns: every variable of it is a category with a single level. There is "
                "nothing to correct for."
            )
        count, mean, deviation = values.moments(weights)
        if (count == 0).any():
            name = names[(count == 0).argmax()]
            raise ValueError(f"column {name!r} has no row in which all of its variables are there: drop it.")
        too_large = ~(np.isfinite(mean) & np.isfinite(deviation))
        too_small = (deviation > 0) & (deviation < np.finfo(np.float64).tiny)  # Their inverse overflows.
        for bad, what in ((too_large, "large to be squared"), (too_small, "small to be divided by")):
            if bad.any():
                raise ValueError(
                    f"column {names[bad.argmax()]!r} has values too {what}: rescale its variables."
                )
        # Nothing was learnt about a constant column, one of deviation 0: it stays 0 whatever comes.
        self._mean, self._scale = mean, deviation

    def _evaluate(self, columns: Mapping[str, Column]) -> TermValues:
        check_kinds(columns, self._kinds)
        check_missing(self, columns)
        texts = dict.fromkeys(factor.text for factor in self._factors_as_written(False))
        values = {text: self._factors[text].evaluate(columns, unseen=self.unseen) for text in texts}
        missing = [columns[name].missing for name in self._terms.indicators]
        return TermValues(self._terms, values, missing)

    def _finished(self, block: Matrix) -> Matrix:
        """Change the columns in place to what goes out: standardised, the training mean where unusable."""
        unusable = np.isnan(block)
        if self.standardize:
            block -= self._mean
            block /= np.where(self._scale > 0, self._scale, math.inf)
        if unusable.any():
            block[unusable] = 0 if self.standardize else np.broadcast_to(self._mean, block.shape)[unusable]
        return block

    def _label_matrix(self, columns: Mapping[str, Column], num_rows: int) -> Matrix:
        labels = self._fitted_labels()
        values = {each.factor.text: each.evaluate(columns, label=True) for each in labels}
        matrix: Matrix = np.empty((num_rows, self._label_terms.width))
        for rows, block in TermValues(self._label_terms, values, ()).chunks() if labels else ():
            matrix[rows] = block
        return matrix
