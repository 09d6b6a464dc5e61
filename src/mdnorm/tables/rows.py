"""Features with the metadata of the same rows, block after block, and the design matrices of all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.table_file import TableFile, TableFileError, check_columns
from mdnorm.tables.combat import SiteCodes
from mdnorm.tables.files import Block, FeatureFile, FeatureTable, prefetched
from mdnorm.tables.model import DesignColumns

if TYPE_CHECKING:
    import pyarrow


class Rows:
    """Features with the metadata of the same rows, in blocks, however often they are asked for.

    Parameters
    ----------
    features : FeatureFile
    metadata : TableFile, optional
        None: the metadata are columns of the features' table.
    key : str, optional
        Column of both tables that says that their rows are the same.
    """

    def __init__(self, features: FeatureFile, metadata: TableFile | None, key: str | None) -> None:
        self.features, self.key = features, key
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
        if key is not None and self._own is not None:
            check_columns(self.table, [key])
            check_columns(self._own, [key])
        if metadata is not None and metadata.num_rows is not None and features.num_rows is not None:
            self._check_lengths(features.num_rows, metadata.num_rows)

    def _check_lengths(self, num_features: int, num_metadata: int) -> None:
        if num_features != num_metadata:
            raise TableFileError(
                f"{self.features.path} has {num_features} rows and {self.table.path} {num_metadata}: one row "
                "of metadata for each row of features is needed, in the same order."
            )

    def metadata(self, columns: Sequence[str], batch_rows: int) -> Iterator[tuple[int, pyarrow.Table]]:
        """Yield metadata alone, with the index of the first row."""
        import pyarrow

        start = 0
        for batch in prefetched(self.table.typed_batches(columns, batch_rows)):
            yield start, pyarrow.Table.from_batches([batch]).select(list(columns))
            start += batch.num_rows
        if self._separate is not None and self.features.num_rows is not None:
            self._check_lengths(self.features.num_rows, start)

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
        key = [] if self.key is None else [self.key]
        wanted = list(dict.fromkeys([*columns, *key]))
        with closing(_Taker(self._separate, wanted, batch_rows)) as metadata:
            for block in prefetched(self.features.blocks(batch_rows, None if whole else key)):
                table = metadata.take(len(block.features), self.features.path)
                if self.key is not None:
                    self._check_key(block, table)
                yield block, table.select(list(columns))
            metadata.check_end(self.features.path)

    def _check_key(self, block: Block, table: pyarrow.Table) -> None:
        import pyarrow
        from pyarrow import compute

        assert block.batch is not None
        here = compute.cast(block.batch.column(self.key), pyarrow.string()).fill_null("")
        there = compute.cast(table.column(self.key), pyarrow.string()).fill_null("")
        differs = compute.not_equal(pyarrow.chunked_array([here]), there)
        if compute.any(differs).as_py():
            row = compute.index(differs, True).as_py()
            raise TableFileError(
                f"row {block.start + row} (counted from 0) has {self.key!r} {here[row].as_py()!r} in "
                f"{self.features.path} and {there[row].as_py()!r} in {self.table.path}: bring the tables "
                "into the same order."
            )


class _Taker:
    """Rows of a table in portions of any size."""

    def __init__(self, table: TableFile, columns: Sequence[str], batch_rows: int) -> None:
        self._path, self._columns = table.path, list(columns)
        self._batches = table.typed_batches(columns, batch_rows)
        self._left: list[pyarrow.RecordBatch] = []
        self._num_taken = 0

    def take(self, rows: int, path: Path) -> pyarrow.Table:
        import pyarrow

        parts = []
        while rows:
            batch = self._left.pop() if self._left else next(self._batches, None)
            if batch is None:
                raise TableFileError(
                    f"{self._path} has {self._num_taken} rows, {path} has more: one row of metadata for each "
                    "row of features is needed, in the same order."
                )
            if batch.num_rows > rows:
                self._left.append(batch.slice(rows))
                batch = batch.slice(0, rows)
            if batch.num_rows:
                parts.append(batch)
            rows -= batch.num_rows
            self._num_taken += batch.num_rows
        return pyarrow.Table.from_batches(parts)

    def check_end(self, path: Path) -> None:
        if self._left or any(batch.num_rows for batch in self._batches):
            raise TableFileError(
                f"{self._path} has more than the {self._num_taken} rows of {path}: one row of metadata for "
                "each row of features is needed, in the same order."
            )

    def close(self) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class KeptDesign:
    """Design matrices of all rows, kept on disk from one pass to the next.

    The file has no name: it is gone when it is closed or when the process ends, however it ends. A design of
    more columns than features is not kept: the file would be larger than the result.

    Parameters
    ----------
    folder : Path
        Where the file is.
    features : FeatureFile
        Numbers are kept in the precision of its features, as deviations from near their mean: float32 then
        rounds numbers of the size of the effects, as does the subtraction.
    with_labels : bool
        Whether protected columns are kept too.
    """

    def __init__(self, folder: Path, features: FeatureFile, with_labels: bool) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        # Metadata are standardised, labels have whatever size they have.
        self._dtype = np.dtype(np.float64) if with_labels else features.dtype
        self._with_labels = with_labels
        self._max_columns = len(features.feature_names)
        self.is_kept = True
        self._centre: NDArray[np.float64] | None = None
        self._num_metadata = 0
        self._lengths: list[int] = []
        self._levels: dict[Hashable, int] = {}
        self._has_sites = False
        self._next = 0
        self._left: tuple[NDArray[Any], NDArray[np.int32]] | None = None

    def add(self, columns: DesignColumns) -> None:
        """Append rows."""
        metadata, labels, sites = columns
        parts = [metadata.T, labels.T] if self._with_labels and labels is not None else [metadata.T]
        self.is_kept = sum(map(len, parts)) <= self._max_columns
        if not self.is_kept:
            return
        values = np.concatenate(parts)
        if self._centre is None:
            self._centre, self._num_metadata = values.mean(1), len(metadata.T)
            self._has_sites = sites is not None
        self._file.write((values - self._centre[:, None]).astype(self._dtype, order="C").tobytes())
        if sites is not None:
            places = [self._levels.setdefault(level, len(self._levels)) for level in sites.levels]
            codes = np.array(places, dtype=np.int32)[sites.codes]
            self._file.write(codes.tobytes())
        self._lengths.append(len(metadata))

    def rewind(self) -> None:
        """Go back to the first row, to take them."""
        self._file.seek(0)

    def take(self, rows: int) -> DesignColumns:
        """Return the next rows."""
        assert self._centre is not None
        values, codes = self._read() if self._left is None else self._left
        while values.shape[1] < rows:
            more_values, more_codes = self._read()
            values = np.concatenate([values, more_values], axis=1)
            codes = np.concatenate([codes, more_codes])
        self._left = (values[:, rows:], codes[rows:]) if values.shape[1] > rows else None
        restored = values[:, :rows] + self._centre[:, None]
        metadata, labels = restored[: self._num_metadata].T, restored[self._num_metadata :].T
        sites = SiteCodes(codes[:rows].astype(np.intp), list(self._levels)) if self._has_sites else None
        return metadata, labels if self._with_labels else None, sites

    def _read(self) -> tuple[NDArray[Any], NDArray[np.int32]]:
        assert self._centre is not None
        rows = self._lengths[self._next]
        self._next += 1
        size = len(self._centre) * rows * self._dtype.itemsize
        values = np.frombuffer(self._file.read(size), self._dtype).reshape(len(self._centre), rows)
        codes = np.frombuffer(self._file.read(4 * rows if self._has_sites else 0), np.int32)
        return values, codes

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
