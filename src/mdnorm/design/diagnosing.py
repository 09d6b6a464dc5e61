"""The diagnosis of a design over a table: its columns and cells in, numbers and sentences out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.collinearity import Collinearity, read_relations
from mdnorm.design.diagnosis import DesignDiagnosis, SparseCell, diagnosis_of, sparse_cells
from mdnorm.design.reader import Column
from mdnorm.design.terms import TermValues

if TYPE_CHECKING:
    from mdnorm.design.matrices import Design

__all__ = ["diagnose_columns"]

# Numbers with no more different values than this are counted like categories in the diagnosis of a label.
_FEW_VALUES = 10


def diagnose_columns(
    design: Design, columns: Mapping[str, Column], values: TermValues, min_rows: int
) -> DesignDiagnosis:
    """Return the diagnosis of a design that has learnt its means and deviations.

    Parameters
    ----------
    design : Design
    columns : dict of Column
        Of the table, with or without those of the labels.
    values : TermValues
        Of the design over the table.
    min_rows : int
        Cells with fewer rows are listed; 0: none are looked for.
    """
    num_rows, terms = values.num_rows, design._terms
    with_labels = bool(design._label_factors) and all(
        name in columns for factor in design._label_factors for name in factor.variables
    )
    labels = design._label_matrix(columns, num_rows) if with_labels else np.empty((num_rows, 0))
    label_names = design._label_names() if with_labels else ()
    widest, codes = values.widest_one_hot()
    block = np.arange(terms.width)[terms.slice(widest)] if codes is not None else np.empty(0, np.intp)
    others = np.setdiff1d(np.arange(terms.width + len(label_names)), block)
    mean, scale = (np.delete(each, block) for each in (design._mean, design._scale))
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)

    def chunks() -> Iterable[tuple[slice, NDArray[np.float64]]]:
        for rows, part in values.chunks([widest] if codes is not None else []):
            centred = np.where(np.isnan(part), 0.0, part - mean)
            yield rows, np.column_stack([centred * inverse, labels[rows]])

    relations, constant = read_relations(chunks, others, codes, block)
    names = (*terms.names, *label_names)
    single = [
        text
        for text, fitted in design._factors.items()
        if fitted.kind == "category" and len(fitted.levels) == 1
    ]
    return diagnosis_of(
        Collinearity(relations, terms.width),
        num_rows=num_rows,
        metadata_names=terms.names,
        label_names=label_names,
        terms=terms.of_terms(),
        variables=terms.of_variables(design.variables(labels=False)),
        constant=[*(names[index] for index in sorted(constant)), *single],
        sparse_cells=_cells(design, columns, values, min_rows, with_labels) if min_rows else (),
        min_rows=min_rows,
        label_levels=design._label_levels() if with_labels else {},
    )


def _cells(
    design: Design, columns: Mapping[str, Column], values: TermValues, min_rows: int, with_labels: bool
) -> tuple[SparseCell, ...]:
    """Return the cells of a category and a label, and of categories that interact, with too few rows."""
    categories = {
        text: (evaluated.values, design._factors[text].levels)
        for text, evaluated in values.values.items()
        if design._factors[text].kind == "category"
    }
    metadata = list(categories)
    pairs = [
        pair
        for written in design._written_terms
        for pair in itertools.combinations([f.text for f in written if f.text in categories], 2)
    ]
    for factor in design._label_factors if with_labels else ():
        fitted = design._factors[factor.text]
        label, levels = fitted.evaluate(columns, label=True).values, fitted.levels
        if fitted.kind != "category":
            distinct, label = np.unique(label, return_inverse=True)
            levels = tuple(f"{value:g}" for value in distinct.tolist())
            if label.ndim > 1 or len(levels) > _FEW_VALUES:
                continue
        pairs += [(text, factor.text) for text in metadata]
        categories[factor.text] = (label, levels)
    return sparse_cells(categories, list(dict.fromkeys(pairs)), min_rows)
