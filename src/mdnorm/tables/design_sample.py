"""The rows that a design is fitted to, out of a stream of more than fit into memory."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design import Design
from mdnorm.tables.model import codes_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["DesignSample"]

# Knots, means and deviations of the design are those of at most so many rows.
MAX_DESIGN_ROWS = 2**18


class DesignSample:
    """Rows that a design is fitted to: all, or a seeded sample with every level, extreme and gap in it.

    Parameters
    ----------
    design : Design
        Not fitted.
    seed : int or tuple of int
        The same rows are sampled whatever the blocks they come in.
    max_rows : int
        More rows are sampled.
    """

    def __init__(
        self, design: Design, seed: int | tuple[int, ...] = 0, max_rows: int = MAX_DESIGN_ROWS
    ) -> None:
        self._categories = design.declared_categories()
        self._random = np.random.default_rng(seed)
        self._max_rows = max_rows
        self._tables: list[pyarrow.Table] = []
        self._keys: list[NDArray[np.float64]] = []
        self._kept = 0
        self.num_rows = 0
        # One row for each level, for a missing value, and for the ends of a range.
        self._witnesses: dict[tuple[Any, ...], pyarrow.Table] = {}
        self._ends: dict[tuple[str, str], Any] = {}

    def add(self, table: pyarrow.Table) -> None:
        """Add rows."""
        if not table.num_rows:
            return
        self._find_witnesses(table)
        self.num_rows += table.num_rows
        self._tables.append(table)
        self._keys.append(self._random.random(table.num_rows))
        self._kept += table.num_rows
        if self._kept > 2 * self._max_rows:
            self._thin()

    def merge(self, other: DesignSample) -> DesignSample:
        """Add the rows of another sample."""
        self.num_rows += other.num_rows
        self._tables += other._tables
        self._keys += other._keys
        self._kept += other._kept
        for table in other._witnesses.values():
            self._find_witnesses(table)
        self._thin()
        return self

    def copy(self) -> DesignSample:
        """Return a copy that can be merged with others while this one stays."""
        copied = copy.copy(self)
        copied._tables, copied._keys = list(self._tables), list(self._keys)
        copied._witnesses, copied._ends = dict(self._witnesses), dict(self._ends)
        return copied

    def rows(self) -> pyarrow.Table:
        """Return the rows to fit to."""
        import pyarrow

        complete = self.num_rows <= self._max_rows
        self._thin()
        return pyarrow.concat_tables(
            [*self._tables, *([] if complete else self._witnesses.values())], promote_options="permissive"
        )

    def witnesses(self) -> pyarrow.Table:
        """Return a few rows that together have every level, extreme and gap."""
        import pyarrow

        return pyarrow.concat_tables(self._witnesses.values(), promote_options="permissive")

    def _thin(self) -> None:
        import pyarrow

        if self._kept <= self._max_rows:
            return
        keys = np.concatenate(self._keys)
        kept = np.sort(np.argpartition(keys, self._max_rows)[: self._max_rows])
        table = pyarrow.concat_tables(self._tables, promote_options="permissive")
        self._tables, self._keys, self._kept = [table.take(kept)], [keys[kept]], len(kept)

    def _find_witnesses(self, table: pyarrow.Table) -> None:
        import pyarrow.types as kinds
        from pyarrow import compute

        for name in table.column_names:
            values, kind = table.column(name), table.column(name).type
            missing = values.is_null(nan_is_null=True)
            if ("missing", name) not in self._witnesses and compute.any(missing).as_py():
                self._keep(("missing", name), table, compute.index(missing, True).as_py())
            countable = kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_temporal(kind)
            if countable:
                self._find_ends(name, table, compute.if_else(missing, None, values))
            if not countable or name in self._categories:
                codes, levels = codes_of(values)
                for code, level in enumerate(levels):
                    # NaN differs from itself, and is missing.
                    if level is not None and level == level and ("level", name, level) not in self._witnesses:
                        found = np.flatnonzero(codes == code)
                        if len(found):
                            self._keep(("level", name, level), table, int(found[0]))

    def _find_ends(self, name: str, table: pyarrow.Table, values: pyarrow.ChunkedArray) -> None:
        from pyarrow import compute

        ends = compute.min_max(values)
        for key, further in (("min", operator.lt), ("max", operator.gt)):
            end, known = ends[key], self._ends.get((key, name))
            if end.is_valid and (known is None or further(end.as_py(), known)):
                self._ends[key, name] = end.as_py()
                self._keep((key, name), table, compute.index(compute.equal(values, end), True).as_py())

    def _keep(self, key: tuple[Any, ...], table: pyarrow.Table, row: int) -> None:
        # A copy: a slice would keep the whole block in memory.
        self._witnesses[key] = table.take([row])
