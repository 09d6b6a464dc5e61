"""The rows that a design is fitted to, out of a stream of more than fit into memory."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design import Design
from mdnorm.design.checks import check_missing
from mdnorm.design.reader import Column, read_columns
from mdnorm.tables.model import row_weights

if TYPE_CHECKING:
    import pyarrow

# Knots, means and deviations of the design are those of at most so many rows.
MAX_DESIGN_ROWS = 2**18


class DesignSample:
    """Rows that a design is fitted to: all, or a seeded sample with every level, extreme and gap in it.

    The same rows are sampled whatever the blocks they come in.
    """

    def __init__(
        self, design: Design, seed: int | tuple[int, ...] = 0, max_rows: int = MAX_DESIGN_ROWS
    ) -> None:
        self._design = design
        self._random = np.random.default_rng(seed)
        self._max_rows = max_rows
        self._tables: list[pyarrow.Table] = []
        self._keys: list[NDArray[np.float64]] = []
        self.num_rows = 0
        # One row for each level, for a missing value, and for the ends of a range.
        self._witnesses: dict[tuple[Any, ...], pyarrow.Table] = {}
        self._ends: dict[tuple[str, str], Any] = {}

    def add(self, table: pyarrow.Table) -> None:
        """Add rows."""
        if not table.num_rows:
            return
        columns = self._find_witnesses(table)
        if self._design.missing == "error":  # Here rows are those of a block still.
            check_missing(self._design, {name: columns[name] for name in self._design.variables()})
        self.num_rows += table.num_rows
        self._tables.append(table)
        self._keys.append(self._random.random(table.num_rows))
        if sum(map(len, self._keys)) > 2 * self._max_rows:
            self._thin()

    def merged(self, *others: DesignSample) -> DesignSample:
        """Return a sample of the rows of this one and others, which stay as they are."""
        total = copy.copy(self)
        total._witnesses, total._ends = dict(self._witnesses), dict(self._ends)
        for other in others:
            total.num_rows += other.num_rows
            total._tables = total._tables + other._tables
            total._keys = total._keys + other._keys
            for table in other._witnesses.values():
                total._find_witnesses(table)
            total._thin()
        return total

    def rows(self) -> pyarrow.Table:
        """Return the rows to fit to."""
        import pyarrow

        complete = self.num_rows <= self._max_rows
        self._thin()
        return pyarrow.concat_tables(
            [*self._tables, *([] if complete else self._witnesses.values())], promote_options="permissive"
        )

    def fit(self, design: Design, weights: str | None) -> Design:
        """Fit a design to the rows; a column of them may have their weights."""
        rows = self.rows()
        return design.fit_columns(read_columns(rows, design.variables())[0], row_weights(rows, weights))

    def witnesses(self) -> pyarrow.Table:
        """Return a few rows that together have every level, extreme and gap."""
        import pyarrow

        return pyarrow.concat_tables(self._witnesses.values(), promote_options="permissive")

    def _thin(self) -> None:
        import pyarrow

        if sum(map(len, self._keys)) <= self._max_rows:
            return
        keys = np.concatenate(self._keys)
        kept = np.sort(np.argpartition(keys, self._max_rows)[: self._max_rows])
        table = pyarrow.concat_tables(self._tables, promote_options="permissive")
        self._tables, self._keys = [table.take(kept)], [keys[kept]]

    def _find_witnesses(self, table: pyarrow.Table) -> dict[str, Column]:
        columns = read_columns(table, table.column_names)[0]
        categories = self._design.declared_categories()
        for name, column in columns.items():
            if ("missing", name) not in self._witnesses and column.missing.any():
                self._keep(("missing", name), table, int(column.missing.argmax()))
            if column.distinct is None and not column.missing.all():
                present = np.flatnonzero(~column.missing)
                values = column.values[present]
                for end, row, further in (
                    ("min", values.argmin(), operator.lt),
                    ("max", values.argmax(), operator.gt),
                ):
                    known = self._ends.get((end, name))
                    if known is None or further(values[row], known):
                        self._ends[end, name] = values[row]
                        self._keep((end, name), table, int(present[row]))
            if column.distinct is not None or name in categories:
                levels = column.levels()
                for code, row in zip(*np.unique(column.codes(levels), return_index=True), strict=True):
                    if code >= 0 and ("level", name, levels[code]) not in self._witnesses:
                        self._keep(("level", name, levels[code]), table, int(row))
        return columns

    def _keep(self, key: tuple[Any, ...], table: pyarrow.Table, row: int) -> None:
        # A copy: a slice would keep the whole block in memory.
        self._witnesses[key] = table.take([row])
