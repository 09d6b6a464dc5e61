"""Can label and metadata be told apart in this design? Numbers, and what they mean in plain words."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.collinearity import Collinearity
from mdnorm.design.reader import Column, shown
from mdnorm.design.terms import TermValues
from mdnorm.text import aligned

if TYPE_CHECKING:
    from mdnorm.design.matrices import Design

# 1 − R² below its square (and rounding) counts as exactly determined.
_DETERMINED = 1e-8
# Cells of a pair of categories that are listed.
_MAX_CELLS = 10_000
# Numbers with no more different values than this are counted like categories.
_FEW_VALUES = 10
# Levels of a label that are named.
_SHOWN_LEVELS = 6
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
        Maps each label column that the metadata determine to the variables that do so on their own; empty
        where only several together do.
    label_r2 : dict
        R² of the regression of each label column on the metadata.
    association : dict
        For each variable, the largest squared canonical correlation of its columns with the label columns:
        0 none, 1 one determines a label or is determined by it.
    canonical_correlations : tuple of float
        Between metadata and label columns, descending.
    sparse_cells : tuple of SparseCell
        Levels of a category and a label, or of an interaction, with fewer rows than asked for; least first,
        and no more than 10 000 for each pair.
    warnings, notes : tuple of str
        In words: what makes the correction unreliable, and what is only good to know.
    label_levels : dict
        As `mdnorm.Design.label_levels`: which level of a label is 1.

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
    label_levels: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One sentence that begins with "Fine" or "Confounded": what `warnings` come to."""
        number = len(self.warnings)
        if number:
            reasons = "reason" if number == 1 else f"{number} reasons"
            return f"Confounded: the correction cannot be relied on, for the {reasons} below."
        if not self.label_names:
            return "Fine: nothing stands against it; label columns were not looked at."
        return "Fine: label and metadata can be told apart in this table."

    def _summary(self) -> list[tuple[str, str]]:
        inflation = self.term_variance_inflation
        numbers = {"condition number": self.condition_number}
        numbers |= {f"R² of {name} on the metadata": r2 for name, r2 in self.label_r2.items()}
        numbers |= {f"association of {name} with the labels": r2 for name, r2 in self.association.items()}
        numbers |= {f"variance inflation of {name}": value for name, value in inflation.items()}
        return [
            ("rows", f"{self.num_rows}"),
            ("metadata columns", f"{len(self.metadata_names)}"),
            ("label columns", f"{len(self.label_names)}"),
            *levels_in_words(self.label_levels),
            *((name, "infinite" if math.isinf(n) else f"{n:.3g}") for name, n in numbers.items()),
        ]

    def __str__(self) -> str:
        lines = [self.verdict, *aligned(self._summary())]
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
        page = f"<p><b>{html.escape(self.verdict)}</b></p><table>{rows}</table>"
        return page + (f"<ul>{sentences}</ul>" if sentences else "")


def levels_in_words(label_levels: Mapping[str, Mapping[Any, int]]) -> list[tuple[str, str]]:
    """Return, for each label, its name and which level is which number."""
    words = []
    for name, levels in label_levels.items():
        shown = [f"{level} = {index}" for level, index in levels.items()][:_SHOWN_LEVELS]
        rest = f", … ({len(levels)} levels)" if len(levels) > _SHOWN_LEVELS else ""
        words.append((f"label {name}", ", ".join(shown) + rest))
    return words


def diagnose_columns(
    design: Design, columns: Mapping[str, Column], values: TermValues, min_rows: int
) -> DesignDiagnosis:
    """Return the diagnosis of a design that has learnt its means and deviations.

    The columns are those of the table, with or without labels, and the values those of the design over it.
    Cells with fewer rows than `min_rows` are listed.
    """
    num_rows, terms = values.num_rows, design._terms
    label_variables = {name for factor in design._label_factors for name in factor.variables}
    with_labels = bool(label_variables) and label_variables <= set(columns)
    labels = design._label_matrix(columns, num_rows) if with_labels else np.empty((num_rows, 0))
    label_names = design.label_names if with_labels else ()
    names = [*terms.names, *label_names]
    collinearity = _collinearity(design, values, labels)
    kept = set(collinearity.kept)
    of_variables, of_terms = (
        {name: inside for name, indices in each.items() if (inside := [i for i in indices if i in kept])}
        for each in (terms.of_variables(design.variables(labels=False)), terms.of_terms())
    )
    metadata = [index for index in kept if index < terms.width]
    has_labels = len(metadata) < len(kept)
    correlations, r2_of = collinearity.with_labels(metadata)
    label_r2 = {names[label]: r2 for label, r2 in r2_of.items()}
    alone = {name: collinearity.with_labels(indices) for name, indices in of_variables.items()}
    determined_labels = {
        names[label]: tuple(name for name, (_, r2s) in alone.items() if r2s[label] >= 1 - _DETERMINED)
        for label, r2 in r2_of.items()
        if r2 >= 1 - _DETERMINED
    }
    r2_on_labels = collinearity.r2_on_labels() if has_labels else {}
    determined = tuple(names[i] for i in sorted(r2_on_labels) if r2_on_labels[i] >= 1 - _DETERMINED)
    few_rows = num_rows - 1 <= len(kept)
    collinear = tuple(tuple(names[index] for index in group) for group in collinearity.groups())
    single = [text for text, levels in design.levels.items() if len(levels) == 1]
    constant = (*(names[index] for index in sorted(collinearity.constant)), *single)
    cells = _sparse_cells(design, columns, values, min_rows, with_labels) if min_rows else ()
    inflation = collinearity.inflation()
    if few_rows and has_labels:
        sentences: tuple[str, ...] = (
            f"{num_rows} rows are too few for {len(kept)} columns of metadata and labels: any label is then "
            "a combination of the metadata by chance. Take more rows, or fewer columns (a smaller df, rare "
            "levels merged).",
        )
    else:
        written = {name: [names[i] for i in indices] for name, indices in of_variables.items()}
        sentences = _warnings(label_r2, determined_labels, determined, written)
    return DesignDiagnosis(
        num_rows=num_rows,
        metadata_names=terms.names,
        label_names=label_names,
        condition_number=collinearity.condition_number(),
        variance_inflation={name: inflation.get(index, math.nan) for index, name in enumerate(names)},
        term_variance_inflation={
            name: collinearity.term_inflation(indices) for name, indices in of_terms.items()
        },
        constant=constant,
        collinear=collinear,
        determined_by_labels=determined,
        determined_labels=determined_labels,
        label_r2=label_r2,
        association={name: float(of_name[0] ** 2) for name, (of_name, _) in alone.items() if has_labels},
        canonical_correlations=tuple(correlations.tolist()),
        sparse_cells=cells,
        label_levels=design.label_levels if with_labels else {},
        warnings=sentences,
        notes=_notes(constant, () if few_rows else collinear, cells, min_rows),
    )


def _collinearity(design: Design, values: TermValues, labels: NDArray[np.float64]) -> Collinearity:
    """Return what the columns of a design and of labels (n, K_y) say of each other."""
    terms = design._terms
    widest, codes = values.widest_one_hot()
    block = np.arange(*terms.starts[widest : widest + 2]) if widest >= 0 else np.empty(0, np.intp)
    others = np.setdiff1d(np.arange(terms.width + labels.shape[1]), block)
    mean, scale = (np.delete(each, block) for each in (design._mean, design._scale))
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)

    def chunks() -> Iterable[tuple[slice, NDArray[np.float64]]]:
        for rows, part in values.chunks(without=widest):
            centred = np.where(np.isnan(part), 0.0, part - mean)
            yield rows, np.column_stack([centred * inverse, labels[rows]])

    return Collinearity(chunks, others, codes, block, terms.width)


def _sparse_cells(
    design: Design, columns: Mapping[str, Column], values: TermValues, min_rows: int, with_labels: bool
) -> tuple[SparseCell, ...]:
    """Return the cells of a category and a label, and of categories that interact, with too few rows."""
    # For each category the index of the level in each row, negative where there is none, and the levels.
    categories: dict[str, tuple[NDArray[Any], Sequence[Any]]] = {
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
    cells = []
    for first, second in dict.fromkeys(pairs):
        (rows, row_levels), (others, other_levels) = categories[first], categories[second]
        usable = (rows >= 0) & (others >= 0)
        found, counts = np.unique(rows[usable] * len(other_levels) + others[usable], return_counts=True)
        taken, number = set(found.tolist()), len(row_levels) * len(other_levels)
        first_cells = range(min(number, len(taken) + _MAX_CELLS))
        few = [(0, cell) for cell in first_cells if cell not in taken]
        few += sorted(zip(counts[counts < min_rows].tolist(), found[counts < min_rows].tolist(), strict=True))
        for count, cell in few[:_MAX_CELLS]:
            i, j = divmod(cell, len(other_levels))
            cells.append(SparseCell({first: str(row_levels[i]), second: str(other_levels[j])}, count))
    return tuple(sorted(cells, key=lambda cell: cell.num_rows))


def _warnings(
    label_r2: Mapping[str, float],
    determined_labels: Mapping[str, tuple[str, ...]],
    determined: Sequence[str],
    variables: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    sentences = []
    for label, alone in determined_labels.items():
        if alone:
            sentences.append(
                f"{shown(alone)} determine{'s' if len(alone) == 1 else ''} {label} exactly: each value comes "
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
            f"the label determines {shown([*whole, *parts])} exactly: such columns do not vary within a "
            "label, and no effect of theirs can be told from that of the label. It is kept, not removed."
        )
    sentences += [
        f"the metadata nearly determine {name} (R² {r2:.3f}, variance inflation {1 / (1 - r2):.3g}): their "
        "effects are told apart by few rows, and what is removed depends on chance. Add rows in which label "
        "and metadata disagree, or balance them."
        for name, r2 in label_r2.items()
        if r2 > _NEARLY_DETERMINED and name not in determined_labels
    ]
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
            f"{shown(constant)} {'is' if len(constant) == 1 else 'are'} constant: there is nothing to "
            "correct for, take it out."
        )
    sentences += [
        f"{shown(group)} are collinear, each a combination of the others: what is removed is the same with "
        "one column less, only single coefficients mean nothing."
        for group in collinear
    ]
    if sparse_cells:
        cells = "; ".join(map(str, sparse_cells[:5]))
        more = f" and {len(sparse_cells) - 5} more" if len(sparse_cells) > 5 else ""
        sentences.append(f"cells with fewer than {min_rows} rows: {cells}{more}.")
    return tuple(sentences)
