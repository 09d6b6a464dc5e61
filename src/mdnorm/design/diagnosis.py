"""Can label and metadata be told apart in this design? Numbers, and what they mean in plain words."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.collinearity import Collinearity

__all__ = [
    "ConfoundedDesignWarning",
    "DesignDiagnosis",
    "SparseCell",
    "diagnosis_of",
    "levels_in_words",
    "sparse_cells",
]

# 1 − R² below its square (and rounding) counts as exactly determined.
_DETERMINED = 1e-8
# Cells of a pair of categories that are listed.
_MAX_CELLS = 10_000
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
            return (
                "Confounded: the correction cannot be relied on, for the reason below."
                if number == 1
                else f"Confounded: the correction cannot be relied on, for the {number} reasons below."
            )
        if not self.label_names:
            return "Fine: nothing stands against it; label columns were not looked at."
        return "Fine: label and metadata can be told apart in this table."

    def _summary(self) -> list[tuple[str, str]]:
        rows = [
            ("rows", f"{self.num_rows}"),
            ("metadata columns", f"{len(self.metadata_names)}"),
            ("label columns", f"{len(self.label_names)}"),
            *levels_in_words(self.label_levels),
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
        lines = [self.verdict, *(f"{name:<{width}}  {value}" for name, value in self._summary())]
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


def sparse_cells(
    categories: Mapping[str, tuple[NDArray[Any], Sequence[Any]]],
    pairs: Sequence[tuple[str, str]],
    min_rows: int,
) -> tuple[SparseCell, ...]:
    """Return the combinations of two categories' levels that have too few rows, least first.

    Parameters
    ----------
    categories : dict from str to ((n,) array, sequence)
        Index of the level in each row, negative where there is none; and the levels.
    pairs : sequence of (str, str)
    min_rows : int
    """
    cells = []
    for first, second in pairs:
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


def diagnosis_of(
    collinearity: Collinearity,
    *,
    num_rows: int,
    metadata_names: Sequence[str],
    label_names: Sequence[str],
    terms: Mapping[str, Sequence[int]],
    variables: Mapping[str, Sequence[int]],
    constant: Sequence[str],
    sparse_cells: Sequence[SparseCell],
    min_rows: int,
    label_levels: Mapping[str, Mapping[Any, int]],
) -> DesignDiagnosis:
    """Return the diagnosis of columns, metadata first.

    Parameters
    ----------
    collinearity : Collinearity
    num_rows : int
    metadata_names, label_names : sequences of str
    terms, variables : dict from names to indices of metadata columns
    constant : sequence of str
        Columns that were left out.
    sparse_cells : sequence of SparseCell
    min_rows : int
        What the cells were compared with, for the sentences.
    label_levels : dict
    """
    names, kept = [*metadata_names, *label_names], set(collinearity.kept)
    variables = {name: [index for index in indices if index in kept] for name, indices in variables.items()}
    variables = {name: indices for name, indices in variables.items() if indices}
    terms = {name: [index for index in indices if index in kept] for name, indices in terms.items()}
    metadata = [index for index in kept if index < len(metadata_names)]
    has_labels = len(metadata) < len(kept)
    r2_of = collinearity.label_r2(metadata)
    alone = {name: collinearity.label_r2(indices) for name, indices in variables.items()}
    determined_labels = {
        names[label]: tuple(name for name, r2s in alone.items() if r2s[label] >= 1 - _DETERMINED)
        for label, r2 in r2_of.items()
        if r2 >= 1 - _DETERMINED
    }
    r2_on_labels = collinearity.r2_on_labels() if has_labels else {}
    determined = tuple(names[i] for i in sorted(r2_on_labels) if r2_on_labels[i] >= 1 - _DETERMINED)
    label_r2 = {names[label]: r2 for label, r2 in r2_of.items()}
    few_rows = num_rows - 1 <= len(kept)
    collinear = tuple(tuple(names[index] for index in group) for group in collinearity.groups())
    inflation = collinearity.inflation()
    return DesignDiagnosis(
        num_rows=num_rows,
        metadata_names=tuple(metadata_names),
        label_names=tuple(label_names),
        condition_number=collinearity.condition_number(),
        variance_inflation={name: inflation.get(index, math.nan) for index, name in enumerate(names)},
        term_variance_inflation={
            name: collinearity.term_inflation(indices) for name, indices in terms.items() if indices
        },
        constant=tuple(constant),
        collinear=collinear,
        determined_by_labels=determined,
        determined_labels=determined_labels,
        label_r2=label_r2,
        association={
            name: float(collinearity.correlations(indices)[0] ** 2)
            for name, indices in variables.items()
            if has_labels
        },
        canonical_correlations=tuple(collinearity.correlations(metadata).tolist()),
        sparse_cells=tuple(sparse_cells),
        label_levels=label_levels,
        warnings=_warnings(
            num_rows=num_rows,
            num_columns=len(kept),
            few_rows=few_rows and has_labels,
            label_r2=label_r2,
            determined_labels=determined_labels,
            determined=determined,
            variables={name: [names[i] for i in indices] for name, indices in variables.items()},
        ),
        notes=_notes(constant, [] if few_rows else collinear, sparse_cells, min_rows),
    )


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
