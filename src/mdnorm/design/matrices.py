"""Metadata as people have it, a table with a formula, to the matrices that `MetadataNorm` takes.

How a formula becomes columns. Each factor of a term is a column of numbers, a category or a basis; a term is
the product of its factors. A category with L levels has L columns, or L − 1 (all but the reference) where
the intercept or another term has the rest already: the rule is that of Wilkinson formulas [1]_. The intercept
is `MetadataNorm`'s own and never among the columns.

References
----------
.. [1] Wilkinson, G. N., & Rogers, C. E. (1973). Symbolic description of factorial models for analysis of
   variance. Applied Statistics, 22(3), 392–399.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.design.bases import BASES, Basis, basis_from_state
from mdnorm.design.diagnosis import (
    ConfoundedDesignWarning,
    DesignDiagnosis,
    SparseCell,
    diagnosis_of_factor,
    triangular_factor,
)
from mdnorm.design.formula import Factor, FormulaError, parse_factor, parse_formula, quoted
from mdnorm.design.reader import KINDS, Column, column_names, read_columns, shown, shown_rows
from mdnorm.design.saved import numbers_in, read

__all__ = [
    "ConfoundedDesignWarning",
    "Design",
    "DesignDiagnosis",
    "DesignMatrices",
    "FormulaError",
    "SparseCell",
]

_FORMAT = "mdnorm.Design"
_VERSION = 1

# Rows that are computed at once: a few MiB of float64 for the columns of a usual design.
_CHUNK_ROWS = 2**15

# A column that varies by less, relative to its size, is constant up to rounding.
_CONSTANT = 1e-12

# Numbers with no more different values than this are counted like categories in the diagnosis of a label.
_FEW_VALUES = 10

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


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

    metadata_names: tuple[str, ...]
    label_names: tuple[str, ...]

    def __new__(
        cls,
        metadata: Tensor,
        labels: Tensor | None,
        metadata_names: tuple[str, ...] = (),
        label_names: tuple[str, ...] = (),
    ) -> DesignMatrices:
        """Pair the matrices with the names of their columns."""
        matrices = super().__new__(cls, metadata, labels)
        matrices.metadata_names, matrices.label_names = metadata_names, label_names
        return matrices

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.metadata, self.labels, self.metadata_names, self.label_names


@dataclass
class _Fitted:
    """A factor and what it learnt: a category its levels, a basis its knots, an expression its moments."""

    factor: Factor
    kind: str  # "category", "numeric" or "basis"
    levels: tuple[Any, ...] = ()  # the reference first
    basis: Basis | None = None
    moments: dict[str, list[float]] = field(default_factory=dict)

    def names(self, reduced: bool) -> list[str]:
        if self.kind == "category" and reduced:
            return [f"{self.factor.text}[T.{level}]" for level in self.levels[1:]]
        if self.kind == "category":
            return [f"{self.factor.text}[{level}]" for level in self.levels]
        if self.basis is not None:
            return [f"{self.factor.text}[{index + 1}]" for index in range(self.basis.num_columns)]
        return [self.factor.text]


# A term with, for each factor, whether its category leaves out the reference.
_Term = tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class _Evaluated:
    """Values of a factor over a table: codes of a category, or (n,) or (n, k) numbers."""

    values: NDArray[Any]
    unusable: Mask
    fitted: _Fitted

    def block(self, rows: slice, reduced: bool) -> Matrix:
        if self.fitted.kind == "category":
            levels = np.arange(1 if reduced else 0, len(self.fitted.levels))
            one_hot: Matrix = (self.values[rows, None] == levels).astype(np.float64)
            return one_hot
        values: Matrix = self.values.reshape(len(self.values), -1)[rows]
        return values


@dataclass(frozen=True)
class _EvaluatedTable:
    factors: Mapping[str, _Evaluated]
    indicators: Sequence[Mask]

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.factors.values())).unusable)


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
        categories get one 0/1 column for each level but the first.
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
    Knots, levels, means and deviations are those of the table given to `fit`. Values outside of the training
    range move to its ends in ``bs``, ``cr`` and ``poly`` (the effect is constant there); other columns
    extrapolate as a line does.

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
        _check_choice("missing", missing, ("error", "mean", "indicator"))
        _check_choice("unseen", unseen, ("error", "mean"))
        self.formula: str | tuple[str, ...] = (
            formula if isinstance(formula, str) else _in_order("formula", formula)
        )
        labels = () if labels is None else labels
        self.labels = (labels,) if isinstance(labels, str) else _in_order("labels", labels)
        self.missing = missing
        self.unseen = unseen
        self.standardize = bool(standardize)
        self._written_terms = (
            parse_formula(self.formula)
            if isinstance(self.formula, str)
            else tuple((_column_or_factor(entry),) for entry in dict.fromkeys(self.formula))
        )
        if not self._written_terms:
            raise ValueError(f"formula must have at least one metadata column, got {formula!r}.")
        self._label_factors = tuple(_column_or_factor(label) for label in dict.fromkeys(self.labels))
        self._check_overlap()
        self._factors: dict[str, _Fitted] = {}
        self._kinds: dict[str, str] = {}
        self._terms: dict[str, list[_Term]] = {}
        self._indicators: tuple[str, ...] = ()
        self._mean = np.empty(0)
        self._scale = np.empty(0)
        self._is_fitted = False

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
        return (
            f"Design({formula!r}{labels}, missing={self.missing!r}, unseen={self.unseen!r}, "
            f"standardize={self.standardize}): {state}"
        )

    # ----------------------------------------------------------------------------------------------------
    # What it gives
    # ----------------------------------------------------------------------------------------------------

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """Names of the metadata columns: factor, basis column or level, as in ``age:C(site)[T.b]``."""
        self._check_fitted()
        names = [name for terms in self._terms.values() for term in terms for name in self._names(term)]
        return (*names, *(f"{quoted(variable)}[missing]" for variable in self._indicators))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the label columns."""
        self._check_fitted()
        return tuple(
            name for factor in self._label_factors for name in self._factors[factor.text].names(True)
        )

    @property
    def terms(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each term of the formula, and of each label after them."""
        names = self.metadata_names
        terms = {term: tuple(names[i] for i in at) for term, at in self._column_indices()[0].items()}
        labels = {f.text: tuple(self._factors[f.text].names(True)) for f in self._label_factors}
        return terms | labels

    @property
    def units(self) -> Matrix:
        """What each metadata column was divided by, (K_m,) float64; 1 where it was not."""
        self._check_fitted()
        return np.where(self.standardize & (self._scale > 0), self._scale, 1.0)

    @property
    def num_metadata(self) -> int:
        """Number of metadata columns, for ``MetadataNorm(…, num_metadata=…)``."""
        return len(self.metadata_names)

    @property
    def num_labels(self) -> int:
        """Number of label columns, for ``MetadataNorm(…, num_labels=…)``."""
        return len(self.label_names)

    @property
    def levels(self) -> dict[str, tuple[Any, ...]]:
        """Levels of each category, the reference first."""
        self._check_fitted()
        return {text: fitted.levels for text, fitted in self._factors.items() if fitted.kind == "category"}

    def variables(self, *, labels: bool = True) -> list[str]:
        """Return the columns of a table that the design, fitted or not, uses.

        Parameters
        ----------
        labels : bool
            Whether those of the labels are among them.
        """
        factors = self._factors_as_written(labels)
        return list(dict.fromkeys(name for factor in factors for name in factor.variables))

    def declared_categories(self) -> set[str]:
        """Return the columns that are a category whatever they hold: those in ``C(…)``."""
        factors = self._factors_as_written(True)
        return {name for factor in factors if factor.kind == "category" for name in factor.variables}

    def _factors_as_written(self, labels: bool) -> list[Factor]:
        factors = [factor for term in self._written_terms for factor in term]
        return [*factors, *(self._label_factors if labels else ())]

    # ----------------------------------------------------------------------------------------------------
    # Fit and transform
    # ----------------------------------------------------------------------------------------------------

    def fit(self, table: Any) -> Design:
        """Learn levels, knots, means and standard deviations from the training data.

        Parameters
        ----------
        table : table
            A DataFrame of pandas or polars, a table of pyarrow, or a mapping from names to columns, with one
            row a sample, labels included.

        Returns
        -------
        Design
            Itself.

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
        """
        self._is_fitted = False
        columns, num_rows = read_columns(table, self.variables())
        if num_rows < 2:
            raise ValueError(
                f"the table has {num_rows} row(s): fit needs at least 2, and many more to be of use."
            )
        for column in columns.values():
            if column.kind == "empty":
                raise ValueError(f"column {column.name!r} has no values: take it out of the design.")
        self._kinds = {name: column.kind for name, column in columns.items()}
        self._check_missing(columns)
        factors = [factor for term in self._written_terms for factor in term] + list(self._label_factors)
        self._factors = {factor.text: self._fit_factor(factor, columns) for factor in factors}
        for factor in self._label_factors:
            if not self._factors[factor.text].names(True):
                level = self._factors[factor.text].levels[0]
                raise ValueError(
                    f"label {factor.text!r} has the single level {level!r}: leave labels out, or give "
                    "rows of other labels."
                )
        self._terms = self._scoped_terms()
        self._indicators = (
            tuple(name for name in self.variables(labels=False) if columns[name].missing.any())
            if self.missing == "indicator"
            else ()
        )
        self._is_fitted = True
        try:
            evaluated = self._evaluate_all(columns)
            self._fit_moments(evaluated)
            diagnosis = self._diagnosis(columns, evaluated, min_rows=0)
        except BaseException:
            self._is_fitted = False
            raise
        if diagnosis.warnings:
            warnings.warn(
                " ".join(["The design is confounded:", *diagnosis.warnings, "See Design.diagnose."]),
                ConfoundedDesignWarning,
                stacklevel=2,
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
        self._check_kinds(columns)
        self._check_missing(columns)
        metadata = torch.empty(num_rows, self.num_metadata, dtype=dtype)
        for rows, block in self._chunks(self._evaluate_all(columns)):
            metadata[rows] = torch.from_numpy(self._finished(block)).to(dtype)
        _check_fits(metadata, self.metadata_names)
        label_matrix = None
        if with_labels:
            label_matrix = torch.from_numpy(self._label_matrix(columns, num_rows)).to(dtype)
            _check_fits(label_matrix, self.label_names)
        return DesignMatrices(metadata, label_matrix, self.metadata_names, self.label_names)

    def transform_columns(
        self, columns: Mapping[str, Column], *, labels: bool
    ) -> tuple[Matrix, Matrix | None]:
        """Return the matrices of columns that were read before, in float64.

        Parameters
        ----------
        columns : mapping from str to Column
            All of `variables`.
        labels : bool
            Whether to return label columns.

        Returns
        -------
        metadata : (n, K_m) array
            Each of its columns is contiguous.
        labels : (n, K_y) array or None

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As `transform`.
        """
        self._check_fitted()
        self._check_kinds(columns)
        self._check_missing(columns)
        num_rows = len(next(iter(columns.values())).missing)
        # By columns: what is done to a column later runs along it, not over the few columns of each row.
        metadata: Matrix = np.empty((self.num_metadata, num_rows)).T
        for rows, block in self._chunks(self._evaluate_all(columns)):
            part = metadata[rows]
            part[:] = block
            part[:] = self._finished(part)
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

        Returns
        -------
        DesignDiagnosis
            Print it.

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
        self._check_kinds(columns)
        self._check_missing(columns)
        return self._diagnosis(columns, self._evaluate_all(columns), min_rows)

    # ----------------------------------------------------------------------------------------------------
    # Saving
    # ----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the fitted design as JSON, to be read by `from_json`: what it transforms stays the same.

        Raises
        ------
        RuntimeError
            The design is not fitted.
        """
        self._check_fitted()
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "formula": self.formula if isinstance(self.formula, str) else list(self.formula),
            "labels": list(self.labels),
            "missing": self.missing,
            "unseen": self.unseen,
            "standardize": self.standardize,
            "variables": self._kinds,
            "written_terms": [[factor.text for factor in term] for term in self._written_terms],
            "label_factors": [factor.text for factor in self._label_factors],
            "factors": {text: _factor_state(fitted) for text, fitted in self._factors.items()},
            "terms": [
                {"name": name, "products": [[list(scoped) for scoped in term] for term in terms]}
                for name, terms in self._terms.items()
            ],
            "indicators": list(self._indicators),
            "mean": self._mean.tolist(),
            "scale": self._scale.tolist(),
        }
        return json.dumps(state, allow_nan=False, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Design:
        """Return the design that `to_json` saved. Nothing in the text is run, whoever wrote it.

        Parameters
        ----------
        text : str

        Raises
        ------
        ValueError
            The text is truncated, not JSON, of something else or of a later version, or contradicts itself.
        FormulaError
            A factor in it has something that is not allowed.
        """
        try:
            state = json.loads(text)
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(f"this is not a saved design but truncated or no JSON: {error}") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"this is not a saved design: it is JSON, but its format is not {_FORMAT!r}.")
        if state.get("version") != _VERSION:
            raise ValueError(
                f"the saved design has version {state.get('version')!r}, this mdnorm reads {_VERSION}: "
                "update it."
            )
        try:
            return cls._from_state(state)
        except FormulaError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"the saved design is damaged: {error}.") from error

    @classmethod
    def _from_state(cls, state: Mapping[str, Any]) -> Design:
        # Not through __init__: a saved formula is never parsed as one, its factors are.
        design = cls.__new__(cls)
        formula = state["formula"]
        design.formula = formula if isinstance(formula, str) else _strings(state, "formula")
        design.labels = _strings(state, "labels")
        design.missing, design.unseen = read(state, "missing", str), read(state, "unseen", str)
        _check_choice("missing", design.missing, ("error", "mean", "indicator"))
        _check_choice("unseen", design.unseen, ("error", "mean"))
        design.standardize = read(state, "standardize", bool)
        design._written_terms = tuple(
            tuple(parse_factor(text) for text in _strings({"term": term}, "term"))
            for term in read(state, "written_terms", list)
        )
        design._label_factors = tuple(parse_factor(text) for text in _strings(state, "label_factors"))
        design._check_overlap()
        factors = [*itertools.chain(*design._written_terms), *design._label_factors]
        states = read(state, "factors", dict)
        design._factors = {
            factor.text: _factor_from_state(factor, read(states, factor.text, dict)) for factor in factors
        }
        kinds = read(state, "variables", dict)
        design._kinds = {name: read(kinds, name, str) for name in design.variables()}
        if not set(design._kinds.values()) <= set(KINDS):
            raise ValueError("it has a variable of an unknown kind")
        design._terms = {}
        for term in read(state, "terms", list):
            products = [
                tuple((str(text), bool(reduced)) for text, reduced in product)
                for product in read(term, "products", list)
            ]
            if not all(product and {text for text, _ in product} <= set(states) for product in products):
                raise ValueError("it has a term of unknown factors")
            design._terms[read(term, "name", str)] = products
        design._indicators = _strings(state, "indicators")
        if not set(design._indicators) <= set(design.variables(labels=False)):
            raise ValueError("it has an indicator of an unknown variable")
        design._is_fitted = True
        design._mean = np.array(numbers_in(state, "mean"))
        design._scale = np.array(numbers_in(state, "scale"))
        # Counted before any name is written out: a file may ask for a product of very many.
        width = sum(design._width(term) for terms in design._terms.values() for term in terms)
        width += len(design._indicators)
        if not width == len(design._mean) == len(design._scale) > 0:
            raise ValueError(
                f"it has {width} columns, {len(design._mean)} means and {len(design._scale)} scales"
            )
        if bool((design._scale < 0).any()):
            raise ValueError("it has a negative scale")
        return design

    # ----------------------------------------------------------------------------------------------------
    # Checks
    # ----------------------------------------------------------------------------------------------------

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

    def _check_kinds(self, columns: Mapping[str, Column]) -> None:
        for name, column in columns.items():
            trained = self._kinds[name]
            # A category of numbers is compared by value whatever the numeric type; 0/1 stand for booleans.
            same = {trained, column.kind} <= {"number", "boolean"} or trained == column.kind
            if not same and column.kind != "empty":
                example = column.examples(~column.missing)[0]
                raise TypeError(
                    f"column {name!r} had values of kind {trained} in training and now has {column.kind}s, "
                    f"{example!r} for example: convert it."
                )

    def _check_missing(self, columns: Mapping[str, Column]) -> None:
        label_variables = {name for factor in self._label_factors for name in factor.variables}
        incomplete = {name: column for name, column in columns.items() if column.missing.any()}
        for name, column in incomplete.items():
            if name in label_variables:
                otherwise = ", or pass labels=False" if self._is_fitted else ""
                raise ValueError(
                    f"label {name!r} is missing in {shown_rows(column.missing)}: drop these rows (and their "
                    f"samples){otherwise}."
                )
        if self.missing == "error" and incomplete:
            where = "; ".join(
                f"{name!r} in {shown_rows(column.missing)}" for name, column in incomplete.items()
            )
            raise ValueError(
                f"metadata are missing: {where}. Drop or fill these rows, or build the design with "
                'missing="mean" (no correction beyond the average) or missing="indicator".'
            )
        if self.missing == "indicator" and self._is_fitted:
            for name, column in incomplete.items():
                if name not in self._indicators:
                    raise ValueError(
                        f"metadata are missing: {name!r} in {shown_rows(column.missing)}. It had no missing "
                        'values in training, so that there is no indicator for it; missing="mean" needs none.'
                    )
        for name, column in columns.items():
            if column.values.dtype.kind == "f":
                infinite = np.isinf(column.values) & ~column.missing
                if infinite.any():
                    raise ValueError(
                        f"column {name!r} has infinite values in {shown_rows(infinite)}: correct them, or "
                        "make them missing."
                    )

    # ----------------------------------------------------------------------------------------------------
    # Fitting
    # ----------------------------------------------------------------------------------------------------

    def _fit_factor(self, factor: Factor, columns: Mapping[str, Column]) -> _Fitted:
        missing = _any_missing(factor, columns)
        if missing.all():
            raise ValueError(
                f"{factor.text!r}: no row has all of {', '.join(map(repr, factor.variables))}: take it out."
            )
        kind = factor.kind
        if kind == "column":
            kind = "category" if columns[factor.variables[0]].categorical else "numeric"
        if kind == "category":
            return _Fitted(factor, kind, levels=_fitted_levels(factor, columns[factor.variables[0]]))
        moments: dict[str, list[float]] = {}
        values = factor.evaluate(_numeric(factor, columns), moments, fit=True)
        _check_finite(factor, values, missing, columns)
        if kind == "numeric":
            return _Fitted(factor, kind, moments=moments)
        basis = BASES[factor.function].fit(values[~missing], factor.options, repr(factor.text))
        return _Fitted(factor, kind, basis=basis, moments=moments)

    def _scoped_terms(self) -> dict[str, list[_Term]]:
        """Return for each term of the formula the products of factors that add its columns to the others'.

        A category spans the intercept: ``c`` is ``1 + c⁻`` with ``c⁻`` all levels but the reference.
        Expanding each term in this way, leaving out what earlier terms span, and merging ``x + x:c⁻`` to
        ``x:c`` gives columns that span the same with none too many.
        """
        spanned: set[frozenset[str]] = {frozenset()}  # the intercept
        result: dict[str, list[_Term]] = {}
        for written in self._written_terms:
            texts = [factor.text for factor in written]
            categories = [text for text in texts if self._factors[text].kind == "category"]
            others = [text for text in texts if text not in categories]
            expanded: list[frozenset[str]] = [
                frozenset([*others, *chosen])
                for size in range(len(categories) + 1)
                for chosen in itertools.combinations(categories, size)
            ]
            new = [subset for subset in expanded if subset not in spanned]
            spanned.update(new)
            products: list[dict[str, bool]] = []
            for subset in new:
                product = {text: text in categories for text in texts if text in subset}
                products = _merged(products, product)
            result[":".join(texts)] = [tuple(product.items()) for product in products]
        return result

    def _width(self, term: _Term) -> int:
        return math.prod(len(self._factors[text].names(reduced)) for text, reduced in term)

    def _names(self, term: _Term) -> list[str]:
        parts = [self._factors[text].names(reduced) for text, reduced in term]
        # The first factor varies fastest, as in other implementations.
        return [":".join(reversed(names)) for names in itertools.product(*reversed(parts))]

    def _fit_moments(self, evaluated: _EvaluatedTable) -> None:
        if not any(self._names(term) for terms in self._terms.values() for term in terms):
            raise ValueError(
                "the design has no columns: every variable of it is a category with a single level. There is "
                "nothing to correct for."
            )
        width = self.num_metadata
        count, total, largest = np.zeros(width), np.zeros(width), np.zeros(width)
        for _, block in self._chunks(evaluated):
            usable = ~np.isnan(block)
            count += usable.sum(0)
            with np.errstate(over="ignore"):
                total += np.where(usable, block, 0).sum(0)
            largest = np.maximum(largest, np.where(usable, np.abs(block), 0).max(0))
        names = self.metadata_names
        if (count == 0).any():
            name = names[int(np.flatnonzero(count == 0)[0])]
            raise ValueError(
                f"column {name!r} has no row in which all of its variables are there: take it out."
            )
        mean, squares = total / count, np.zeros(width)
        for _, block in self._chunks(evaluated):
            with np.errstate(over="ignore"):
                squares += (np.where(np.isnan(block), 0.0, block - mean) ** 2).sum(0)
        deviation = np.sqrt(squares / count)
        if not (np.isfinite(mean) & np.isfinite(deviation)).all():
            name = names[int(np.flatnonzero(~(np.isfinite(mean) & np.isfinite(deviation)))[0])]
            raise ValueError(f"column {name!r} has values too large to be squared: rescale its variables.")
        self._mean = mean
        # Nothing was learnt about a constant column: it stays 0 whatever comes.
        self._scale = np.where(deviation > _CONSTANT * largest, deviation, 0.0)

    # ----------------------------------------------------------------------------------------------------
    # Computing
    # ----------------------------------------------------------------------------------------------------

    def _evaluate(self, factor: Factor, columns: Mapping[str, Column], *, label: bool = False) -> _Evaluated:
        fitted = self._factors[factor.text]
        missing = _any_missing(factor, columns)
        if fitted.kind == "category":
            column = columns[factor.variables[0]]
            codes = column.codes(fitted.levels)
            unseen = codes == -2
            if unseen.any() and (label or self.unseen == "error"):
                raise ValueError(_unseen_message(factor, fitted, column, unseen, label))
            return _Evaluated(codes, codes < 0, fitted)
        values = factor.evaluate(_numeric(factor, columns), fitted.moments)
        _check_finite(factor, values, missing, columns)
        if fitted.basis is None:
            return _Evaluated(np.where(missing, 0.0, values), missing, fitted)
        return _Evaluated(fitted.basis.columns(np.where(missing, fitted.basis.low, values)), missing, fitted)

    def _evaluate_all(self, columns: Mapping[str, Column]) -> _EvaluatedTable:
        factors = {factor.text: factor for term in self._written_terms for factor in term}
        return _EvaluatedTable(
            {text: self._evaluate(factor, columns) for text, factor in factors.items()},
            [columns[variable].missing for variable in self._indicators],
        )

    def _chunks(self, table: _EvaluatedTable) -> Iterator[tuple[slice, Matrix]]:
        """Yield rows and their (m, K_m) metadata columns, not yet standardised, NaN where unusable."""
        evaluated, num_rows = table.factors, table.num_rows
        width = self.num_metadata
        for start in range(0, num_rows, _CHUNK_ROWS):
            rows = slice(start, min(start + _CHUNK_ROWS, num_rows))
            block = np.empty((rows.stop - start, width))
            at = 0
            for term in itertools.chain(*self._terms.values()):
                product = np.ones((len(block), 1))
                unusable = np.zeros(len(block), dtype=bool)
                with np.errstate(over="ignore"):
                    for text, reduced in reversed(term):
                        part = evaluated[text].block(rows, reduced)
                        product = (product[:, :, None] * part[:, None, :]).reshape(len(block), -1)
                        unusable |= evaluated[text].unusable[rows]
                if not np.isfinite(product).all():
                    name = ":".join(text for text, _ in term)
                    raise ValueError(
                        f"the product {name!r} is too large for a number: rescale its variables."
                    )
                product[unusable] = np.nan
                block[:, at : at + product.shape[1]] = product
                at += product.shape[1]
            for missing in table.indicators:
                block[:, at] = missing[rows]
                at += 1
            yield rows, block

    def _finished(self, block: Matrix) -> Matrix:
        """Return the columns as they go out: standardised, and at the training mean where unusable."""
        if not self.standardize:
            return np.where(np.isnan(block), self._mean, block)
        scale = np.where(self._scale > 0, self._scale, math.inf)
        return np.nan_to_num((block - self._mean) / scale, nan=0.0, posinf=math.inf, neginf=-math.inf)

    def _label_matrix(self, columns: Mapping[str, Column], num_rows: int) -> Matrix:
        blocks = [
            self._evaluate(factor, columns, label=True).block(slice(0, num_rows), True)
            for factor in self._label_factors
        ]
        return np.ascontiguousarray(np.concatenate(blocks, axis=1))

    # ----------------------------------------------------------------------------------------------------
    # Diagnosis
    # ----------------------------------------------------------------------------------------------------

    def _diagnosis(
        self, columns: Mapping[str, Column], evaluated: _EvaluatedTable, min_rows: int
    ) -> DesignDiagnosis:
        num_rows = evaluated.num_rows
        with_labels = all(name in columns for factor in self._label_factors for name in factor.variables)
        labels = (
            self._label_matrix(columns, num_rows) if with_labels and self.labels else np.empty((num_rows, 0))
        )
        label_names = self.label_names if labels.shape[1] else ()
        names = (*self.metadata_names, *label_names)

        def blocks() -> Iterator[Matrix]:
            for rows, block in self._chunks(evaluated):
                centred = np.where(np.isnan(block), 0.0, block - self._mean)
                scaled = centred / np.where(self._scale > 0, self._scale, 1.0)
                yield np.column_stack([np.ones(len(block)), scaled, labels[rows]])

        factor = triangular_factor(blocks(), 1 + len(names))
        sizes, centred = np.linalg.norm(factor[:, 1:], axis=0), factor[1:, 1:]
        varying = np.linalg.norm(centred, axis=0) > 1e-10 * np.maximum(sizes, 1.0)
        varying[: len(self._scale)] &= self._scale > 0
        constant = [name for name, varies in zip(names, varying, strict=True) if not varies]
        constant += [
            text
            for text, fitted in self._factors.items()
            if fitted.kind == "category" and len(fitted.levels) == 1
        ]
        terms, variables = self._column_indices()
        return diagnosis_of_factor(
            centred,
            num_rows=num_rows,
            metadata_names=self.metadata_names,
            label_names=label_names,
            terms=terms,
            variables=variables,
            constant=constant,
            sparse_cells=self._sparse_cells(columns, min_rows, with_labels) if min_rows else (),
            min_rows=min_rows,
        )

    def _column_indices(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Return the indices of the metadata columns of each term, and of each variable."""
        terms: dict[str, list[int]] = {}
        variables: dict[str, list[int]] = {name: [] for name in self.variables(labels=False)}
        at = 0
        for name, products in self._terms.items():
            for term in products:
                indices = list(range(at, at + len(self._names(term))))
                at += len(indices)
                terms.setdefault(name, []).extend(indices)
                for variable in dict.fromkeys(
                    v for text, _ in term for v in self._factors[text].factor.variables
                ):
                    variables[variable].extend(indices)
        for variable in self._indicators:
            terms[f"{quoted(variable)}[missing]"] = [at]
            variables[variable].append(at)
            at += 1
        return terms, variables

    def _sparse_cells(
        self, columns: Mapping[str, Column], min_rows: int, with_labels: bool
    ) -> tuple[SparseCell, ...]:
        """Return the cells of a category and a label, and of categories that interact, with too few rows."""
        categories = {
            text: (self._evaluate(fitted.factor, columns).values, fitted.levels)
            for text, fitted in self._factors.items()
            if fitted.kind == "category" and fitted.factor not in self._label_factors
        }
        pairs = [
            pair
            for written in self._written_terms
            for pair in itertools.combinations([f.text for f in written if f.text in categories], 2)
        ]
        if with_labels:
            for factor in self._label_factors:
                fitted = self._factors[factor.text]
                values = self._evaluate(factor, columns, label=True).values
                levels = fitted.levels
                if fitted.kind != "category":
                    distinct, values = np.unique(values, return_inverse=True)
                    levels = tuple(f"{value:g}" for value in distinct.tolist())
                if values.ndim > 1 or (len(levels) > _FEW_VALUES and fitted.kind != "category"):
                    continue
                pairs += [(text, factor.text) for text in categories]
                categories = {**categories, factor.text: (values, levels)}
        cells = []
        for first, second in dict.fromkeys(pairs):
            (rows, row_levels), (others, other_levels) = categories[first], categories[second]
            usable = (rows >= 0) & (others >= 0)
            index = rows[usable] * len(other_levels) + others[usable]
            counts = np.bincount(index, minlength=len(row_levels) * len(other_levels))
            for cell in np.flatnonzero(counts < min_rows):
                i, j = divmod(int(cell), len(other_levels))
                levels_of = {first: str(row_levels[i]), second: str(other_levels[j])}
                cells.append(SparseCell(levels_of, int(counts[cell])))
        return tuple(sorted(cells, key=lambda cell: cell.num_rows))


# --------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")


def _in_order(name: str, entries: Any) -> tuple[str, ...]:
    if isinstance(entries, (Set, Mapping)):
        raise TypeError(
            f"{name} is a {type(entries).__name__}, whose order is not part of its meaning, but columns need "
            "one: give a list."
        )
    if not isinstance(entries, Iterable):
        raise TypeError(f"{name} must be a string or a list of column names, got {entries!r}.")
    return tuple(entries)


def _column_or_factor(entry: str) -> Factor:
    """Return what an entry of a list means: a call such as ``C(site)``, otherwise the name of a column."""
    if not isinstance(entry, str):
        raise TypeError(f"columns must be given by name, got {entry!r} of type {type(entry).__name__}.")
    is_call = re.fullmatch(r"\w+\(.*\)", entry.strip(), re.DOTALL)
    return parse_factor(entry.strip() if is_call else quoted(entry))


def _strings(state: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = read(state, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"its {key!r} has something that is no text")
    return tuple(values)


def _any_missing(factor: Factor, columns: Mapping[str, Column]) -> Mask:
    result: Mask = np.logical_or.reduce([columns[name].missing for name in factor.variables])
    return result


def _numeric(factor: Factor, columns: Mapping[str, Column]) -> dict[str, Matrix]:
    for name in factor.variables:
        if columns[name].kind == "string":
            raise TypeError(
                f"{factor.text!r} needs numbers, but column {name!r} has strings: use "
                f"C({quoted(name)}), or convert it."
            )
    return {name: columns[name].as_float() for name in factor.variables}


def _check_finite(factor: Factor, values: Matrix, missing: Mask, columns: Mapping[str, Column]) -> None:
    bad = ~np.isfinite(values) & ~missing
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        at = ", ".join(f"{name} = {columns[name].as_float()[row]:g}" for name in factor.variables)
        raise ValueError(
            f"{factor.text!r} is not a finite number in {shown_rows(bad)}, where {at}: correct the values, "
            "or use another function."
        )


def _check_fits(matrix: Tensor, names: Sequence[str]) -> None:
    bad = ~torch.isfinite(matrix)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"column {names[column]!r} is too large for {matrix.dtype} in row {row}: correct the value, or "
            "pass dtype=torch.float64."
        )


def _fitted_levels(factor: Factor, column: Column) -> tuple[Any, ...]:
    """Return the levels in the training data, the reference first."""
    levels = column.levels()
    if column.kind == "date":
        raise TypeError(f"{factor.text!r}: dates count as days; make a string column of them for a category.")
    if "levels" in factor.options:
        given = tuple(factor.options["levels"])
        extra = [level for level in levels if level not in given]
        if extra:
            raise ValueError(
                f"{factor.text!r}: column {column.name!r} has level(s) {shown(map(repr, extra))}, which "
                "levels= does not list."
            )
        levels = tuple(level for level in given if level in levels)
    reference = factor.options.get("reference", levels[0])
    if reference not in levels:
        raise ValueError(
            f"{factor.text!r}: the reference {reference!r} is not a level in the training data, which has "
            f"{shown(map(repr, levels), 10)}."
        )
    return (
        next(level for level in levels if level == reference),
        *(level for level in levels if level != reference),
    )


def _unseen_message(factor: Factor, fitted: _Fitted, column: Column, unseen: Mask, label: bool) -> str:
    values = column.examples(unseen)
    hint = "" if label else ', or build the design with unseen="mean" (no correction beyond the average)'
    return (
        f"{'label' if label else 'column'} {column.name!r} has level(s) {shown(map(repr, values))} in "
        f"{shown_rows(unseen)}, not in the training data, which has {shown(map(repr, fitted.levels), 10)}: "
        f"correct or drop these rows{hint}."
    )


def _merged(products: list[dict[str, bool]], new: dict[str, bool]) -> list[dict[str, bool]]:
    """Return products with one more, after merging ``x + x:c⁻`` to ``x:c`` wherever possible."""
    for index, known in enumerate(products):
        extra = [text for text in new if text not in known]
        rest = {text: reduced for text, reduced in new.items() if text in known}
        if len(extra) == 1 and rest == known and new[extra[0]]:
            merged = {text: False if text == extra[0] else reduced for text, reduced in new.items()}
            return _merged(products[:index] + products[index + 1 :], merged)
    return [*products, new]


def _factor_state(fitted: _Fitted) -> dict[str, Any]:
    state: dict[str, Any] = {"kind": fitted.kind}
    if fitted.kind == "category":
        state["levels"] = list(fitted.levels)
    if fitted.basis is not None:
        state["basis"] = fitted.basis.state()
    if fitted.moments:
        state["moments"] = fitted.moments
    return state


def _factor_from_state(factor: Factor, state: Mapping[str, Any]) -> _Fitted:
    kind = read(state, "kind", str)
    if kind not in ({"column": ("category", "numeric")}.get(factor.kind, (factor.kind,))):
        raise ValueError(f"its factor {factor.text!r} cannot be of kind {kind!r}")
    if kind == "category":
        levels = tuple(read(state, "levels", list))
        if any(type(level) not in (str, int, float, bool) for level in levels) or not levels:
            raise ValueError(f"its factor {factor.text!r} has levels that are no levels")
        if len(set(levels)) < len(levels):
            raise ValueError(f"its factor {factor.text!r} has a level twice")
        return _Fitted(factor, kind, levels=levels)
    saved = read(state, "moments", dict) if "moments" in state else {}
    moments = {key: numbers_in(saved, key) for key in factor.moment_keys()}
    if any(len(pair) != 2 for pair in moments.values()):
        raise ValueError(f"its factor {factor.text!r} has no mean and deviation")
    basis = basis_from_state(read(state, "basis", dict)) if kind == "basis" else None
    return _Fitted(factor, kind, basis=basis, moments=moments)
