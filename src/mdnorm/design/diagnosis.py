"""Can label and metadata be told apart in this design? Numbers, and what they mean in plain words."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ConfoundedDesignWarning",
    "DesignDiagnosis",
    "SparseCell",
    "diagnosis_of_factor",
    "triangular_factor",
]

Matrix = NDArray[np.float64]

# A column whose part outside of the others is smaller than this, relative to it, is a combination of them.
_DEPENDENT = 1e-7
# 1 − R² below its square (and rounding) counts as exactly determined.
_DETERMINED = 1e-8
# A label that the metadata explain to this part has a variance inflation of 10.
_NEARLY_DETERMINED = 0.9


class ConfoundedDesignWarning(UserWarning):
    """Label and metadata can hardly be told apart in the training data."""


@dataclass(frozen=True)
class SparseCell:
    """A combination of levels with few rows or none.

    Attributes
    ----------
    levels : dict
        From the name of the factor to the level.
    num_rows : int
    """

    levels: Mapping[str, str]
    num_rows: int

    def __str__(self) -> str:
        where = ", ".join(f"{name} = {level}" for name, level in self.levels.items())
        return f"{where}: {self.num_rows or 'no'} row{'' if self.num_rows == 1 else 's'}"


@dataclass(frozen=True)
class DesignDiagnosis:
    """What `mdnorm.Design.diagnose` found.

    Attributes
    ----------
    num_rows : int
    metadata_names, label_names : tuple of str
    condition_number : float
        Largest over smallest singular value of metadata and label columns, each centred and of norm 1;
        infinite where columns are collinear. Constant columns are left out.
    variance_inflation : dict
        For each column, labels included, 1 / (1 − R²) of the regression of it on all others; infinite where
        they determine it, NaN where it is constant. For a label: how much worse its effect is estimated
        beside the metadata.
    term_variance_inflation : dict
        For each term, the generalised variance inflation [1]_ to the power 1 / (number of its columns),
        comparable with that of one column. The columns of a spline always inflate each other; this does not
        count it.
    constant : tuple of str
        Columns with a single value.
    collinear : tuple of tuples of str
        Groups of columns in which each is a combination of the others.
    determined_by_labels : tuple of str
        Metadata columns that are a function (a combination) of the label columns.
    determined_labels : dict
        From each label column that the metadata determine, to the variables each of which does so alone;
        empty where it takes several together.
    label_r2 : dict
        R² of the regression of each label column on the metadata.
    association : dict
        For each variable, the largest squared canonical correlation of its columns with the label columns:
        0 none, 1 one determines a label or is determined by it.
    canonical_correlations : tuple of float
        Between metadata and label columns, descending.
    sparse_cells : tuple of SparseCell
        Levels of a category and a label, or of an interaction, with fewer rows than asked for; least first.
    warnings, notes : tuple of str
        In words: what makes the correction unreliable, and what is only good to know.

    References
    ----------
    .. [1] Fox, J., & Monette, G. (1992). Generalized collinearity diagnostics. Journal of the American
       Statistical Association, 87(417), 178–183.
    """

    num_rows: int
    metadata_names: tuple[str, ...]
    label_names: tuple[str, ...]
    condition_number: float
    variance_inflation: Mapping[str, float]
    term_variance_inflation: Mapping[str, float]
    constant: tuple[str, ...]
    collinear: tuple[tuple[str, ...], ...]
    determined_by_labels: tuple[str, ...]
    determined_labels: Mapping[str, tuple[str, ...]]
    label_r2: Mapping[str, float]
    association: Mapping[str, float]
    canonical_correlations: tuple[float, ...]
    sparse_cells: tuple[SparseCell, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def _summary(self) -> list[tuple[str, str]]:
        rows = [
            ("rows", f"{self.num_rows}"),
            ("metadata columns", f"{len(self.metadata_names)}"),
            ("label columns", f"{len(self.label_names)}"),
            ("condition number", _number(self.condition_number)),
        ]
        rows += [(f"R² of {name} on the metadata", _number(r2)) for name, r2 in self.label_r2.items()]
        rows += [
            (f"association of {name} with the labels", _number(r2)) for name, r2 in self.association.items()
        ]
        rows += [
            (f"variance inflation of {name}", _number(value))
            for name, value in self.term_variance_inflation.items()
        ]
        return rows

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self._summary())
        lines = [f"{name:<{width}}  {value}" for name, value in self._summary()]
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        lines += [f"note: {sentence}" for sentence in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row' style='text-align:left'>{html.escape(name)}</th><td>{value}</td></tr>"
            for name, value in self._summary()
        )
        sentences = "".join(f"<li><b>Warning:</b> {html.escape(text)}</li>" for text in self.warnings)
        sentences += "".join(f"<li>{html.escape(text)}</li>" for text in self.notes)
        return f"<table>{rows}</table>" + (f"<ul>{sentences}</ul>" if sentences else "")


def triangular_factor(blocks: Iterable[Matrix], num_columns: int) -> Matrix:
    """Return R of the QR decomposition of a tall matrix that comes in blocks of rows.

    Parameters
    ----------
    blocks : iterable of (n_i, num_columns) arrays
    num_columns : int

    Returns
    -------
    (at most num_columns, num_columns) array
        RᵀR is the Gram matrix, but R keeps the digits that it loses.
    """
    factor = np.empty((0, num_columns))
    for block in blocks:
        factor = np.asarray(np.linalg.qr(np.concatenate([factor, block]), mode="r"))
    return factor


def diagnosis_of_factor(
    factor: Matrix,
    *,
    num_rows: int,
    metadata_names: Sequence[str],
    label_names: Sequence[str],
    terms: Mapping[str, Sequence[int]],
    variables: Mapping[str, Sequence[int]],
    constant: Sequence[str],
    sparse_cells: Sequence[SparseCell],
    min_rows: int,
) -> DesignDiagnosis:
    """Return the diagnosis of the columns of a triangular factor.

    Parameters
    ----------
    factor : (r, K_m + K_y) array
        Of the centred columns, metadata first; all regressions among them follow from it.
    num_rows : int
    metadata_names, label_names : sequences of str
    terms, variables : dict from names to indices of metadata columns
    constant : sequence of str
        Columns to leave out.
    sparse_cells : sequence of SparseCell
    min_rows : int
        What the cells were compared with, for the sentences.
    """
    names = [*metadata_names, *label_names]
    kept = [index for index, name in enumerate(names) if name not in set(constant)]
    norms = np.linalg.norm(factor, axis=0)
    unit = factor / np.where(norms > 0, norms, 1)
    num_metadata = len(metadata_names)

    def columns(indices: Iterable[int]) -> Matrix:
        return unit[:, [index for index in indices if index in kept_set]]

    kept_set = set(kept)
    labels = range(num_metadata, len(names))
    inflation = dict.fromkeys(names, math.nan)
    condition, column_inflation = _condition_and_inflation(unit[:, kept])
    inflation.update({names[index]: value for index, value in zip(kept, column_inflation, strict=True)})
    groups = _collinear_groups(unit[:, kept])
    label_basis, metadata_basis = _span(columns(labels)), _span(columns(range(num_metadata)))

    label_r2 = {names[i]: _r2(unit[:, i], metadata_basis) for i in labels if i in kept_set}
    has_labels = label_basis.shape[1] > 0
    canonical = np.linalg.svd(metadata_basis.T @ label_basis, compute_uv=False) if has_labels else np.empty(0)
    spans = {name: _span(columns(indices)) for name, indices in variables.items()}
    association = {
        name: _largest_canonical(span, label_basis)
        for name, span in spans.items()
        if has_labels and span.size
    }
    determined_labels = {
        name: tuple(
            variable
            for variable, span in spans.items()
            if span.size and _r2(unit[:, names.index(name)], span) >= 1 - _DETERMINED
        )
        for name, r2 in label_r2.items()
        if r2 >= 1 - _DETERMINED
    }
    determined = tuple(
        names[i]
        for i in range(num_metadata)
        if has_labels and i in kept_set and _r2(unit[:, i], label_basis) >= 1 - _DETERMINED
    )
    few_rows = num_rows - 1 <= len(kept)
    warnings = _warnings(
        num_rows=num_rows,
        num_columns=len(kept),
        few_rows=few_rows and has_labels,
        label_r2=label_r2,
        determined_labels=determined_labels,
        determined=determined,
        variables={name: [names[i] for i in indices if i in kept_set] for name, indices in variables.items()},
    )
    collinear = tuple(tuple(names[kept[index]] for index in group) for group in groups)
    return DesignDiagnosis(
        num_rows=num_rows,
        metadata_names=tuple(metadata_names),
        label_names=tuple(label_names),
        condition_number=condition,
        variance_inflation=inflation,
        term_variance_inflation={
            name: _term_inflation(
                columns(indices), columns(i for i in range(len(names)) if i not in set(indices))
            )
            for name, indices in terms.items()
            if columns(indices).size
        },
        constant=tuple(constant),
        collinear=collinear,
        determined_by_labels=determined,
        determined_labels=determined_labels,
        label_r2=label_r2,
        association=association,
        canonical_correlations=tuple(np.clip(canonical, 0, 1).tolist()),
        sparse_cells=tuple(sparse_cells),
        warnings=warnings,
        notes=_notes(constant, [] if few_rows else collinear, sparse_cells, min_rows),
    )


# --------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------


def _span(columns: Matrix) -> Matrix:
    """Return an orthonormal basis of the space of columns of norm 1."""
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    basis: Matrix = left[:, singular > _DEPENDENT]
    return basis


def _r2(column: NDArray[np.float64], basis: Matrix) -> float:
    """Return the R² of a column of norm 1 on an orthonormal basis."""
    residual = column - basis @ (basis.T @ column)
    residual -= basis @ (basis.T @ residual)
    return float(min(1.0, max(0.0, 1 - residual @ residual)))


def _largest_canonical(first: Matrix, second: Matrix) -> float:
    return float(min(1.0, np.linalg.norm(first.T @ second, 2) ** 2))


def _condition_and_inflation(columns: Matrix) -> tuple[float, list[float]]:
    """Return the condition number of columns of norm 1, and the variance inflation of each."""
    num_columns = columns.shape[1]
    if num_columns == 0:
        return 1.0, []
    _, singular, right = np.linalg.svd(columns, full_matrices=True)
    singular = np.concatenate([singular, np.zeros(num_columns - len(singular))])
    independent = singular > _DEPENDENT
    # The diagonal of the inverse of the Gram matrix; a column that takes part in a dependence has none.
    inverse = (right[independent] ** 2 / singular[independent, None] ** 2).sum(0)
    dependent = (right[~independent] ** 2).sum(0) > _DEPENDENT
    inflation = np.where(dependent, math.inf, np.maximum(inverse, 1.0))
    condition = float(singular[0] / singular[-1]) if independent.all() else math.inf
    return condition, inflation.tolist()


def _collinear_groups(columns: Matrix) -> list[list[int]]:
    """Return groups of columns of norm 1 in which each is a combination of the others."""
    independent: list[int] = []
    groups: list[set[int]] = []
    basis = np.empty((columns.shape[0], 0))
    for index in range(columns.shape[1]):
        column = columns[:, index]
        residual = column - basis @ (basis.T @ column)
        residual -= basis @ (basis.T @ residual)
        norm = np.linalg.norm(residual)
        if norm > _DEPENDENT:
            basis = np.column_stack([basis, residual / norm])
            independent.append(index)
            continue
        weights = np.linalg.lstsq(columns[:, independent], column, rcond=None)[0]
        group = {index, *(other for other, w in zip(independent, weights, strict=True) if abs(w) > 1e-6)}
        for other in [known for known in groups if known & group]:
            groups.remove(other)
            group |= other
        groups.append(group)
    return sorted(sorted(group) for group in groups)


def _term_inflation(term: Matrix, others: Matrix) -> float:
    basis = _span(others)
    residual = term - basis @ (basis.T @ term)
    residual -= basis @ (basis.T @ residual)
    before, after = (np.linalg.svd(part, compute_uv=False) for part in (term, residual))
    if min(before) <= _DEPENDENT or min(after) <= _DEPENDENT or len(before) < term.shape[1]:
        return math.inf
    log_ratio = 2 * float(np.log(before).sum() - np.log(after).sum())
    return max(1.0, math.exp(log_ratio / term.shape[1]))


# --------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.3g}"


def _list(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _warnings(
    *,
    num_rows: int,
    num_columns: int,
    few_rows: bool,
    label_r2: Mapping[str, float],
    determined_labels: Mapping[str, tuple[str, ...]],
    determined: Sequence[str],
    variables: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    if few_rows:
        return (
            f"{num_rows} rows are too few for {num_columns} columns of metadata and labels: any label is "
            "then a combination of the metadata by chance. Take more rows, or fewer columns (a smaller df, "
            "rare levels merged).",
        )
    sentences = []
    for label, alone in determined_labels.items():
        if alone:
            sentences.append(
                f"{_list(alone)} determine{'s' if len(alone) == 1 else ''} {label} exactly: each value comes "
                "with one label only, so that nothing tells their effects apart. What they share is kept as "
                "label effect, confounder included. Add rows that differ in one and not in the other, or do "
                "not expect a correction for it."
            )
        else:
            sentences.append(
                f"the metadata together determine {label} exactly: nothing tells their effects apart. Take "
                "columns out of the metadata, or add rows in which they vary within a label."
            )
    whole = [name for name, columns in variables.items() if columns and set(columns) <= set(determined)]
    parts = [name for name in determined if not any(name in variables[variable] for variable in whole)]
    if (whole or parts) and not determined_labels:
        sentences.append(
            f"the label determines {_list([*whole, *parts])} exactly: such columns do not vary within a "
            "label, and no effect of theirs can be told from that of the label. It is kept, not removed."
        )
    near = [
        name for name, r2 in label_r2.items() if r2 > _NEARLY_DETERMINED and name not in determined_labels
    ]
    for name in near:
        r2 = label_r2[name]
        sentences.append(
            f"the metadata nearly determine {name} (R² {r2:.3f}, variance inflation {1 / (1 - r2):.3g}): "
            "their effects are told apart by few rows, and what is removed depends on chance. Add rows in "
            "which label and metadata disagree, or balance them."
        )
    return tuple(sentences)


def _notes(
    constant: Sequence[str],
    collinear: Sequence[Sequence[str]],
    sparse_cells: Sequence[SparseCell],
    min_rows: int,
) -> tuple[str, ...]:
    sentences = []
    if constant:
        sentences.append(
            f"{_list(constant)} {'is' if len(constant) == 1 else 'are'} constant: there is nothing to "
            "correct for, take it out."
        )
    sentences += [
        f"{_list(group)} are collinear, each a combination of the others: what is removed is the same with "
        "one column less, only single coefficients mean nothing."
        for group in collinear
    ]
    if sparse_cells:
        cells = "; ".join(map(str, sparse_cells[:5]))
        more = f" and {len(sparse_cells) - 5} more" if len(sparse_cells) > 5 else ""
        sentences.append(f"cells with fewer than {min_rows} rows: {cells}{more}.")
    return tuple(sentences)
