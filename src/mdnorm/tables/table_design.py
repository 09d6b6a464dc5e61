"""One table of a caller, metadata or labels, to the columns of a regression and the sites of its rows."""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design import Design
from mdnorm.design.formula import in_order
from mdnorm.design.reader import Column, read_columns, read_table, shown, shown_rows
from mdnorm.tables.combat import SiteCodes

FloatArray = NDArray[np.float64]


class TableDesign:
    """Turns the tables that the argument `what` gets into design columns, sites and subjects, always alike.

    Without a formula every column has a part but those of `keys`, which say what names the "site" and the
    "subject" of each row: a column by name or position, or a sequence of columns. In `protected` columns a
    missing value is always an error.
    """

    def __init__(
        self,
        what: str,
        formula: str | Sequence[str] | None = None,
        keys: Mapping[str, Any] | None = None,
        missing: str = "error",
        unseen: str = "error",
        protected: bool = False,
    ) -> None:
        self.what, self._is_protected = what, protected
        self._given_keys, self._keys = dict(keys or {}), dict[str, list[str]]()
        self._formula, self._missing, self._unseen = formula, missing, unseen
        self.design: Design | None = None
        self._columns: list[str] = []
        # Rows of each level, where levels were declared that the first rows need not have.
        self._counts: dict[str, dict[Any, int]] = {}

    def fit(
        self, table: Any, num_rows: int, *, declared: bool = False, weights: FloatArray | None = None
    ) -> None:
        """Learn columns, levels and means; also levels that a type has `declared`, although no row has them.

        Another number of rows than `num_rows` is a ValueError. Means are weighted by `weights` (n,).
        """
        columns = self._read(table, num_rows)
        self._columns = list(columns)
        self._keys = {what: self._key_columns(what, key) for what, key in self._given_keys.items()}
        of_keys = [name for names in self._keys.values() for name in names]
        if len(set(of_keys)) < len(of_keys):
            raise ValueError(f"site and subject must be different columns, got {self._given_keys}.")
        if num_rows == 1:  # A design is fitted to two rows at least.
            columns = {name: column.rows(np.zeros(2, np.intp)) for name, column in columns.items()}
            weights = None
        if declared:
            columns = {name: column.with_declared() for name, column in columns.items()}
        formula = self._formula
        if formula is None:
            formula = [name for name in columns if name not in of_keys]
            if not any(_has_columns(columns[name]) for name in formula):
                return
        design = Design(formula, missing=self._missing, unseen=self._unseen, standardize=False)
        for what, names in self._keys.items():
            for name in set(names) & set(design.variables()):
                raise ValueError(
                    f"{name!r} is the {what} and in formula as well: take it out of one of them."
                )
        self.design = design.fit_columns(read_columns(columns, design.variables())[0], weights)
        if declared:
            self._counts = {name: {} for name in design.variables() if columns[name].declared}

    def _key_columns(self, what: str, key: Any) -> list[str]:
        names = []
        several = isinstance(key, Iterable) and not isinstance(key, str)
        for column in in_order(what, key) if several else (key,):
            if str(column) in self._columns:
                names.append(str(column))
            elif isinstance(column, int | np.integer) and 0 <= column < len(self._columns):
                names.append(self._columns[int(column)])
            else:
                raise ValueError(f"{what}={column!r} is not a column of {self.what}; it has {self._columns}.")
        if not names:
            raise ValueError(f"{what}={key!r} names no column: name one or more, or say {what}=None.")
        return names

    @property
    def site_name(self) -> str | None:
        """Name of the column of the site, or of all of them."""
        return " × ".join(self._keys["site"]) if "site" in self._keys else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the design columns."""
        return () if self.design is None else self.design.metadata_names

    @property
    def terms(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the design columns of each term."""
        return {} if self.design is None else self.design.terms

    def count(self, table: Any, num_rows: int) -> None:
        """Note which levels the rows of a table have, of the columns whose type declares them."""
        columns = self._read(table, num_rows) if self._counts else {}
        for name, counts in self._counts.items():
            levels = columns[name].levels()
            codes = columns[name].codes(levels)
            found = np.bincount(codes[codes >= 0], minlength=len(levels))
            for level, number in zip(levels, found.tolist(), strict=True):
                counts[level] = counts.get(level, 0) + number

    def transform(
        self, table: Any, num_rows: int, *, training: bool = False
    ) -> tuple[FloatArray, dict[str, SiteCodes]]:
        """Return the design columns (n, K), float64, and what the `keys` say of the rows."""
        columns = self._read(table, num_rows)
        variables = [] if self.design is None else self.design.variables()
        needed = [*variables, *(name for names in self._keys.values() for name in names)]
        unnamed = all(name.startswith("m") and name[1:].isdigit() for name in columns)
        if any(name not in columns for name in needed) or (unnamed and list(columns) != self._columns):
            raise ValueError(
                f"{self.what} has the columns {list(columns)}, but {self._columns} were there in fit."
            )
        keys = {
            what: _combined([site_codes(columns[name], what) for name in names])
            for what, names in self._keys.items()
        }
        if self.design is None:
            return np.empty((num_rows, 0)), keys
        if self._is_protected:
            self._check_levels(columns)
        used = {name: columns[name] for name in variables}
        if not training:
            for name, counts in self._counts.items():
                used[name] = _without(used[name], counts)
        return self.design.transform_columns(used, labels=False)[0], keys

    def _check_levels(self, columns: Mapping[str, Column]) -> None:
        for name, levels in ({} if self.design is None else self.design.levels).items():
            column = columns[name.strip("`")]
            unseen = column.codes(levels) == -2
            if unseen.any():
                later = "classes=" if self.what == "y" else "a categorical dtype with all levels"
                values, where = shown(map(repr, column.examples(unseen))), shown_rows(unseen)
                raise ValueError(
                    f"{self.what} column {column.name!r} has level(s) {values} in {where}, which were "
                    f"not there in fit ({shown(map(repr, levels), 10)}): drop these rows; the first "
                    f"call of partial_fit learns of later levels by {later}."
                )

    def _read(self, table: Any, num_rows: int) -> dict[str, Column]:
        columns = read_rows(table, self.what, num_rows)
        for column in columns.values():
            if self._is_protected and column.missing.any():
                raise ValueError(
                    f"{self.what} column {column.name!r} is missing in {shown_rows(column.missing)}: drop "
                    "these rows."
                )
        return columns


def read_rows(table: Any, what: str, num_rows: int) -> dict[str, Column]:
    """Return the columns of a table (see `read_table`), after a check of its number of rows."""
    columns = read_table(table, what)
    for column in columns.values():
        if len(column.missing) != num_rows:
            raise ValueError(
                f"{what} has {len(column.missing)} rows but X has {num_rows}: one row a sample is needed."
            )
    return columns


def _has_columns(column: Column) -> bool:
    return not column.categorical or len(column.levels()) > 1 or bool(column.missing.any())


@dataclass(frozen=True, eq=False)
class _NoTrainingRow:
    """Stands for a level that no training row has, so that no design knows it."""

    level: Any

    def __repr__(self) -> str:
        return repr(self.level)


def _without(column: Column, counts: Mapping[Any, int]) -> Column:
    """Return a column in which a level that no row of the fit had is not known."""
    distinct = [value if counts.get(value) else _NoTrainingRow(value) for value in column.distinct or ()]
    return replace(column, distinct=tuple(distinct))


def _combined(parts: Sequence[SiteCodes]) -> SiteCodes:
    """Return the combinations of several columns that rows have: tuples where there is more than one."""
    if len(parts) == 1:
        return parts[0]
    found, codes = np.unique(np.stack([part.codes for part in parts], 1), axis=0, return_inverse=True)
    levels = [tuple(part.levels[i] for part, i in zip(parts, row, strict=True)) for row in found.tolist()]
    return SiteCodes(codes.reshape(-1).astype(np.intp), list[Hashable](levels))


def site_codes(column: Column, what: str = "site") -> SiteCodes:
    """Return the sites that a column names: texts, numbers and booleans as they are, dates as ISO texts."""
    if column.missing.any():
        raise ValueError(
            f"column {column.name!r}, the {what}, is missing in {shown_rows(column.missing)}: drop or fill "
            "these rows."
        )
    levels = sorted(column.levels(), key=lambda level: (str(type(level)), level))
    codes = column.codes(levels).astype(np.intp)
    if column.kind == "date":
        start = datetime.datetime(1970, 1, 1)
        times = {days: start + datetime.timedelta(days=days) for days in levels}
        levels = [(time.date() if days % 1 == 0 else time).isoformat() for days, time in times.items()]
    return SiteCodes(codes, list(levels))
