"""Features with the metadata of the same rows, block after block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.files import TableFile
from mdnorm.design.table_file import TableFileError, check_columns
from mdnorm.tables.files import Block, FeatureFile, FeatureTable, prefetched

if TYPE_CHECKING:
    import pyarrow


class Rows:
    """Features with the metadata of the same rows, in blocks, however often they are asked for.

    Without a table of metadata they are columns of the features' table. The `key` is a column of both tables
    that says that their rows are the same; without one all columns that both have must say so.
    """

    def __init__(self, features: FeatureFile, metadata: TableFile | None, key: str | None) -> None:
        self.features, self._has_key = features, key is not None
        self._own: TableFile | None = features.table if isinstance(features, FeatureTable) else None
        if metadata is None and self._own is None:
            raise TableFileError(
                f"{features.path} has no columns for the metadata: give a table of them, metadata=."
            )
        if key is not None and (metadata is None or self._own is None):
            raise ValueError("key= compares two tables: both, features and metadata, need that column.")
        self._separate = metadata
        table = metadata if metadata is not None else self._own
        assert table is not None
        self.table: TableFile = table
        # The columns in which both tables are compared.
        self.compared: set[str] = set()
        if metadata is not None and self._own is not None:
            repeated = {*metadata.repeated, *self._own.repeated}
            self.compared = ({*metadata.names} & {*self._own.names}) - repeated if key is None else {key}
            for both in (metadata, self._own):
                check_columns(both, self.compared)
            self._own.categories |= self.compared
        if metadata is not None and metadata.num_rows is not None:
            self._check_lengths(metadata.num_rows)

    def _unequal(self, found: str) -> TableFileError:
        return TableFileError(
            f"{found}: one row of metadata for each row of features is needed, in the same order."
        )

    def _check_lengths(self, num_metadata: int) -> None:
        if self.features.num_rows not in (None, num_metadata):
            raise self._unequal(
                f"{self.features.path} has {self.features.num_rows} rows and {self.table.path} {num_metadata}"
            )

    def metadata(self, columns: Sequence[str], batch_rows: int) -> Iterator[tuple[int, pyarrow.Table]]:
        """Yield metadata alone, with the index of the first row."""
        import pyarrow

        start = 0
        for batch in prefetched(self.table.typed_batches(columns, batch_rows)):
            yield start, pyarrow.Table.from_batches([batch]).select(list(columns))
            start += batch.num_rows
        if self._separate is not None:
            self._check_lengths(start)

    def blocks(
        self, columns: Sequence[str], batch_rows: int, *, whole: bool = False
    ) -> Iterator[tuple[Block, pyarrow.Table]]:
        """Yield features and metadata; `whole`: with all columns of the features' table."""
        import pyarrow

        if self._separate is None:
            for block in prefetched(self.features.blocks(batch_rows, None if whole else columns)):
                assert block.batch is not None
                yield block, pyarrow.Table.from_batches([self.table.typed(block.batch, columns)])
            return
        compared = [name for name in self.compared if name not in self.features.feature_names]
        wanted = list(dict.fromkeys([*columns, *self.compared]))
        path, batches = self._separate.path, self._separate.typed_batches(wanted, batch_rows)
        left: list[pyarrow.RecordBatch] = []
        stop = 0
        with closing(batches):
            for block in prefetched(self.features.blocks(batch_rows, None if whole else compared)):
                rows = len(block.features)
                while (found := sum(map(len, left))) < rows:
                    batch = next(batches, None)
                    if batch is None:
                        raise self._unequal(f"{path} has {stop + found} rows, {self.features.path} has more")
                    left.append(batch)
                table = pyarrow.Table.from_batches(left)
                left, table, stop = table.slice(rows).to_batches(), table.slice(0, rows), stop + rows
                self._check_same(block, table)
                yield block, table.select(list(columns))
            if any(map(len, left)) or any(map(len, batches)):
                raise self._unequal(f"{path} has more than the {stop} rows of {self.features.path}")

    def _check_same(self, block: Block, table: pyarrow.Table) -> None:
        """Raise where a row is not the same in a column that both tables have."""
        import pyarrow

        for name in self.compared:
            there = table.column(name).combine_chunks()
            if name in self.features.feature_names:
                here = pyarrow.array(block.features[:, self.features.feature_names.index(name)])
            else:
                assert block.batch is not None
                assert self._own is not None
                here = self._own.typed(block.batch, [name]).column(name)
            rows = np.flatnonzero(_differ(here, there))
            if not len(rows):
                continue
            values = [each[int(rows[0])].as_py() for each in (here, there)]
            raise TableFileError(
                f"row {block.start + rows[0]} (counted from 0) has {name!r} {values[0]!r} in "
                f"{self.features.path} and {values[1]!r} in {self.table.path}, and so have {len(rows) - 1} "
                "rows more: bring the tables into the same order."
                + (
                    ""
                    if self._has_key
                    else f" If their rows are the same and only {name!r} is not, name a column that says so, "
                    "key= (--key), or rename one of the two."
                )
            )


def _differ(here: pyarrow.Array, there: pyarrow.Array) -> NDArray[np.bool_]:
    """Return (n,) where two columns differ, as texts or as numbers; fractions in single precision."""
    import pyarrow
    from pyarrow import compute

    texts = [compute.cast(each, pyarrow.string()) for each in (here, there)]
    differs: NDArray[np.bool_] = compute.not_equal(*(each.fill_null("") for each in texts)).to_numpy(False)
    if differs.any():
        with suppress(pyarrow.ArrowInvalid):
            a, b = (compute.cast(each, pyarrow.float64()).to_numpy(False) for each in texts)
            same = (a == b) | ((a % 1 != 0) & (a.astype(np.float32) == b.astype(np.float32)))
            differs &= ~(same | (np.isnan(a) & np.isnan(b)))
    return differs
