"""Products of fitted factors: which columns a term has, what they are called, and their values.

A category with L levels has L columns, or L − 1 (all but the reference) where the intercept or another term
has the rest already: the rule is that of Wilkinson formulas [1]_, and formulaic applies it. Where a product
is of categories alone, each row has at most one 1 among its columns: such a block is kept as one number a
row, so that many levels cost no more than few.

References
----------
.. [1] Wilkinson, G. N., & Rogers, C. E. (1973). Symbolic description of factorial models for analysis of
   variance. Applied Statistics, 22(3), 392–399.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.factors import Evaluated, FittedFactor
from mdnorm.design.formula import MAX_COLUMNS, Factor, FormulaError, quoted
from mdnorm.extras import requires

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Values that are computed at once: 16 MiB of float64.
_CHUNK_VALUES = 2**21
_MAX_CHUNK_ROWS = 2**15
# Columns beside those of the widest category: what is said of a design takes the cube of their number, a
# minute for so many.
_MAX_OTHERS = 2500
# A column that varies by less, relative to its size, is constant up to rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class Product:
    """Factors that are multiplied, and for each whether its category leaves out the reference."""

    term: str  # of the formula, that it is part of
    factors: tuple[tuple[FittedFactor, bool], ...]

    @cached_property
    def width(self) -> int:
        """Number of columns."""
        return math.prod(fitted.width(reduced) for fitted, reduced in self.factors)

    @property
    def variables(self) -> list[str]:
        """Columns of the table that it uses."""
        return list(dict.fromkeys(name for fitted, _ in self.factors for name in fitted.factor.variables))

    @property
    def is_one_hot(self) -> bool:
        """Whether it is of categories alone."""
        return all(fitted.kind == "category" for fitted, _ in self.factors)

    def names(self) -> list[str]:
        """Return the names of the columns: the first factor varies fastest, as in other implementations."""
        parts = [fitted.names(reduced) for fitted, reduced in self.factors]
        return [":".join(reversed(names)) for names in itertools.product(*reversed(parts))]

    def codes(self, values: Mapping[str, Evaluated]) -> NDArray[np.int64]:
        """Return the column of a product of categories that has the 1 in each row, (n,).

        It is −1 where there is none, −2 where the row cannot be used.
        """
        code, step = np.zeros((), dtype=np.int64), 1
        none, unusable = np.zeros((), dtype=bool), np.zeros((), dtype=bool)
        for fitted, reduced in self.factors:
            evaluated = values[fitted.factor.text]
            unusable = unusable | evaluated.unusable
            level = evaluated.values - reduced
            none = none | (level < 0)
            code = code + step * level
            step *= fitted.width(reduced)
        return np.where(unusable, -2, np.where(none, -1, code))

    def block(self, values: Mapping[str, Evaluated], rows: slice) -> Matrix:
        """Return the (m, width) columns of some rows, NaN where a factor is unusable."""
        num_rows = rows.stop - rows.start
        product, unusable = np.ones((num_rows, 1)), np.zeros(num_rows, dtype=bool)
        with np.errstate(over="ignore"):
            for fitted, reduced in reversed(self.factors):
                evaluated = values[fitted.factor.text]
                part = evaluated.values.reshape(len(evaluated.unusable), -1)[rows]
                if fitted.kind == "category":
                    part = part == np.arange(int(reduced), len(fitted.levels))
                product = (product[:, :, None] * part[:, None, :]).reshape(num_rows, -1)
                unusable |= evaluated.unusable[rows]
        if not np.isfinite(product).all():
            name = ":".join(fitted.factor.text for fitted, _ in self.factors)
            raise ValueError(f"the product {name!r} is too large for a number: rescale its variables.")
        product[unusable] = np.nan
        return product


class Terms:
    """The columns of a fitted design: blocks of products, then a 0/1 column for each variable with gaps.

    `indicators` are the variables with a column that says where they are missing; `what` they all are, for
    messages.
    """

    def __init__(
        self, products: Sequence[Product], indicators: Sequence[str], what: str = "the design"
    ) -> None:
        self.products = tuple(products)
        self.indicators = tuple(indicators)
        widths = [product.width for product in self.products]
        self.starts = np.cumsum([0, *widths]).tolist()
        self.width = sum(widths) + len(self.indicators)
        if self.width > MAX_COLUMNS:
            raise FormulaError(
                f"{what} would have {self.width:,} columns, and the limit is {MAX_COLUMNS:,}: merge rare "
                "levels, leave out interactions, or make numbers of what was read as text."
            )
        one_hot = max((product.width for product in self.products if product.is_one_hot), default=0)
        if self.width - one_hot > _MAX_OTHERS:
            raise FormulaError(
                f"{what} would have {self.width - one_hot:,} columns beside those of the widest category, "
                f"and the limit is {_MAX_OTHERS:,}: merge rare levels, or leave out interactions."
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return (
            *(name for product in self.products for name in product.names()),
            *(f"{quoted(variable)}[missing]" for variable in self.indicators),
        )

    def of_terms(self) -> dict[str, list[int]]:
        """Return the indices of the columns of each term."""
        return self._of([[product.term] for product in self.products], self.names[self.starts[-1] :])

    def of_variables(self, variables: Sequence[str]) -> dict[str, list[int]]:
        """Return the indices of the columns that use each variable."""
        found = self._of([product.variables for product in self.products], self.indicators)
        return {name: found.get(name, []) for name in variables}

    def _of(self, owners: Sequence[Sequence[str]], of_indicators: Sequence[str]) -> dict[str, list[int]]:
        """Return the indices of the columns of each owner, from the owners of each product and indicator."""
        columns: dict[str, list[int]] = {}
        for index, names in enumerate(owners):
            for name in names:
                columns.setdefault(name, []).extend(range(self.starts[index], self.starts[index + 1]))
        for index, name in enumerate(of_indicators, self.starts[-1]):
            columns.setdefault(name, []).append(index)
        return columns


@dataclass(frozen=True)
class TermValues:
    """The columns of a design over a table, to be computed in portions."""

    terms: Terms
    values: Mapping[str, Evaluated]  # by the text of the factor
    missing: Sequence[Mask]  # (n,), for each indicator

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.values.values())).unusable)

    def chunks(self, without: int = -1) -> Iterator[tuple[slice, Matrix]]:
        """Yield rows and their (m, K) columns, not standardised, NaN where unusable; `without` a product."""
        kept = [product for index, product in enumerate(self.terms.products) if index != without]
        width = sum(product.width for product in kept) + len(self.missing)
        step = min(max(_CHUNK_VALUES // max(width, 1), 64), _MAX_CHUNK_ROWS)
        for start in range(0, self.num_rows, step):
            rows = slice(start, min(start + step, self.num_rows))
            block, at = np.empty((rows.stop - start, width)), 0
            for product in kept:
                if product.width:
                    block[:, at : at + product.width] = product.block(self.values, rows)
                at += product.width
            block[:, at:] = np.reshape([missing[rows] for missing in self.missing], (-1, len(block))).T
            yield rows, block

    def widest_one_hot(self) -> tuple[int, NDArray[np.int64]]:
        """Return the widest product of categories alone, and its codes; −1, and codes of −1, without one.

        Some row must have no 1 in it, as those of the reference: the columns are independent then.
        """
        products = enumerate(self.terms.products)
        codes = {k: each.codes(self.values) for k, each in products if each.is_one_hot and each.width}
        fit = [index for index, of_rows in codes.items() if (of_rows == -1).any()]
        widest = max(fit, key=lambda index: self.terms.products[index].width, default=-1)
        return widest, codes.get(widest, np.full(self.num_rows, -1))

    def moments(self, weights: Matrix | None = None) -> tuple[Matrix, Matrix, Matrix]:
        """Return the weight of usable rows, the mean and the standard deviation of each column, each (K,).

        Without `weights` (n,), which are positive, each row weighs 1.

        The deviation is 0 where it is so up to rounding.
        """
        count, total, squares, largest = np.zeros((4, self.terms.width))
        for rows, block in self.chunks():
            weight = 1.0 if weights is None else weights[rows, None]
            usable = ~np.isnan(block)
            values = np.where(usable, block, 0)
            count += (weight * usable).sum(0)
            with np.errstate(over="ignore"):
                total += (weight * values).sum(0)
            largest = np.maximum(largest, np.abs(values).max(0))
        mass = np.where(count > 0, count, 1)
        mean = total / mass
        # The squares of very small numbers are 0, but not in units of the largest one (a power of 2).
        unit = np.exp2(np.floor(np.log2(np.clip(largest, np.finfo(np.float64).tiny, 1))))
        for rows, block in self.chunks():
            weight = 1.0 if weights is None else weights[rows, None]
            with np.errstate(over="ignore"):
                squares += (weight * np.where(np.isnan(block), 0.0, (block - mean) / unit) ** 2).sum(0)
        deviation = np.sqrt(squares / mass) * unit
        return count, mean, np.where(deviation <= _CONSTANT * largest, 0.0, deviation)


def label_terms(labels: Sequence[FittedFactor]) -> Terms:
    """Return the columns of labels: categories without their references."""
    products = [Product(label.factor.text, ((label, label.kind == "category"),)) for label in labels]
    return Terms(products, (), "the labels")


def scoped_products(
    written: Sequence[Sequence[Factor]], factors: Mapping[str, FittedFactor]
) -> list[Product]:
    """Return for the terms of a formula the products that add their columns to those of earlier terms."""
    terms = list(dict.fromkeys(tuple(factor.text for factor in term) for term in written))
    if all(len(texts) == 1 for texts in terms):
        return [Product(text, ((factors[text], factors[text].kind == "category"),)) for (text,) in terms]
    levels = {text: 2 if factors[text].kind == "category" else 1 for texts in terms for text in texts}
    expanded = sum(math.prod(levels[text] for text in texts) for texts in terms)
    if expanded > MAX_COLUMNS:
        raise FormulaError(
            f"the formula would have at least {expanded:,} columns, and the limit is {MAX_COLUMNS:,}: leave "
            "out interactions."
        )
    with requires("design"):
        import pandas as pd
        from formulaic import Formula
    # formulaic is asked about a table of two rows that has the same kinds of columns, under other names.
    names = {text: f"f{index}" for index, text in enumerate(levels)}
    texts_of = {name: text for text, name in names.items()}
    table = pd.DataFrame(
        {
            name: pd.Categorical(["a", "b"]) if levels[text] == 2 else [0.0, 1.0]
            for text, name in names.items()
        }
    )
    code = [":".join(names[text] for text in texts) for texts in terms]
    spec = Formula(["1", *code], _ordering="none").get_model_matrix(table).model_spec
    products = []
    for texts, structure in zip(terms, spec.structure[1:], strict=True):
        for scoped in structure.scoped_terms:
            pairs = [(texts_of[factor.factor.expr], factor.reduced) for factor in scoped.factors]
            # Factors keep the order in which they were written.
            pairs.sort(key=lambda pair: texts.index(pair[0]))
            products.append(
                Product(
                    ":".join(texts),
                    tuple((factors[text], reduced and levels[text] == 2) for text, reduced in pairs),
                )
            )
    return products
