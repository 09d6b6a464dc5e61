"""Features in files, with their metadata, read and written in blocks of rows: Parquet, CSV and ``.npy``.

A table is never in memory as a whole. What is read: the columns in use, block after block. What is written:
the same format with the same columns, where the features are other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.feature_columns import chosen_features
from mdnorm.design.files import TABLE_FORMATS, ArrayFile, ParquetFile, TableFile, checked_suffix, open_table
from mdnorm.design.leakage import leaking_features
from mdnorm.design.roles import stand_in_warning
from mdnorm.design.table_file import TableFileError, check_columns

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

# A row group is in memory as a whole before it is written, and the next one is filled meanwhile.
_MAX_ROW_GROUP_BYTES = 2**26


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of a table."""

    start: int  # index of the first row
    # (n, D), float32 where all features are of at most that precision. Columns or rows are contiguous.
    features: NDArray[Any]
    batch: pyarrow.RecordBatch | None  # the other columns that were asked for; None for an array


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """Yield the items while a thread makes the next one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="mdnorm-read") as pool:
        future: Future[Any] = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def open_features(
    path: Path,
    features: Sequence[str] | None = None,
    reserved: Sequence[str] = (),
    missing_values: Sequence[str] = (),
) -> FeatureFile:
    """Open a table with features (see `open_table` and `chosen_features`), or a ``.npy`` file of them."""
    if path.suffix.lower() == ".npy":
        checked_suffix(path, (".npy",))
        if features is not None:
            raise TableFileError(
                f"{path} has no column names for features= (--features) to choose from: every column of a "
                ".npy file is a feature."
            )
        return FeatureArray(ArrayFile(path))
    checked_suffix(path, (*TABLE_FORMATS, ".npy"))
    table = open_table(path, missing_values)
    return FeatureTable(table, *chosen_features(table, features, reserved))


class FeatureTable:
    """A table of which some columns are features.

    Features of float32 or float16 become float32, other numbers float64; what is computed from them is
    written in the same type.
    """

    def __init__(self, table: TableFile, feature_names: tuple[str, ...], left_alone: dict[str, str]) -> None:
        import pyarrow

        self.table = table
        self.path = table.path
        self.num_rows = table.num_rows
        self.feature_names, self.left_alone = feature_names, left_alone
        self._types = {name: pyarrow.float64() for name in feature_names}
        if isinstance(table, ParquetFile):
            single = (pyarrow.float16(), pyarrow.float32())
            self._types = {
                name: pyarrow.float32() if table.schema.field(name).type in single else pyarrow.float64()
                for name in feature_names
            }
        self.dtype = np.result_type(*{kind.to_pandas_dtype() for kind in self._types.values()})

    def warnings(self) -> list[str]:
        """Return sentences on what the first rows show: stand-ins for missing values, features that leak."""
        columns = list(self.table.sample(self.feature_names).values())
        notes = [stand_in_warning(column) for column in columns]
        notes.append(
            leaking_features(np.stack([column.as_float() for column in columns], 1), self.feature_names)
        )
        return [note for note in notes if note is not None]

    def blocks(self, batch_rows: int, columns: Sequence[str] | None) -> Iterator[Block]:
        """Yield the rows in order."""
        if columns is None:
            others = [name for name in self.table.names if name not in self._types]
        else:
            others = list(columns)
        wanted = {*self._types, *others}
        names = [name for name in self.table.names if name in wanted]
        start = 0
        for batch in self.table.batches(names, batch_rows, self.feature_names):
            features = np.empty((len(self.feature_names), batch.num_rows), self.dtype)
            for row, name in zip(features, self.feature_names, strict=True):
                row[:] = batch.column(name).to_numpy(zero_copy_only=False)
            yield Block(start, features.T, batch.select(others))
            start += batch.num_rows

    def writer(self, path: Path) -> Any:
        """Return a writer of the same format; columns keep their places."""
        return batch_writer(self.table, path, self._types)

    def changed(self, block: Block, features: NDArray[Any]) -> pyarrow.RecordBatch:
        """Return what `writer` writes: the rows of a block with other features."""
        import pyarrow

        assert block.batch is not None
        columns = dict(zip(self._types, features.T, strict=True))
        arrays = [
            pyarrow.array(np.ascontiguousarray(columns[name], self._types[name].to_pandas_dtype()))
            if name in columns
            else block.batch.column(name)
            for name in self.table.names
        ]
        return pyarrow.RecordBatch.from_arrays(arrays, names=list(self.table.header))


class FeatureArray:
    """A ``.npy`` file of which every value of a row is a feature."""

    def __init__(self, file: ArrayFile) -> None:
        self._file = file
        self.path = file.path
        self.num_rows: int | None = file.shape[0]
        self.feature_names = tuple(map(str, range(file.num_features)))
        self.left_alone: dict[str, str] = {}
        is_single = file.stored.kind == "f" and file.stored.itemsize <= 4
        self.dtype: np.dtype[Any] = np.dtype(np.float32 if is_single else np.float64)

    def warnings(self) -> list[str]:
        """Return nothing: an array has no columns to name."""
        return []

    def blocks(self, batch_rows: int, columns: Sequence[str] | None) -> Iterator[Block]:
        """Yield the rows in order; there are no other columns."""
        for start in range(0, self._file.shape[0], batch_rows):
            rows = min(batch_rows, self._file.shape[0] - start)
            yield Block(start, self._file.read(start, rows).astype(self.dtype, copy=False), None)

    def writer(self, path: Path) -> _ArrayWriter:
        """Return a writer of the same shape and order."""
        return _ArrayWriter(path, self._file, self.dtype)

    def changed(self, block: Block, features: NDArray[Any]) -> Block:
        """Return what `writer` writes: the rows of a block with other features."""
        return replace(block, features=features)


FeatureFile = FeatureTable | FeatureArray


class _ArrayWriter:
    def __init__(self, path: Path, source: ArrayFile, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self.close = self._file.close
        self._source, self._dtype = source, dtype
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": source.fortran_order,
            "shape": source.shape,
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        self._offset = self._file.tell()

    def write(self, block: Block) -> None:
        values = block.features.astype(self._dtype, copy=False)
        if not self._source.fortran_order:
            self._file.write(np.ascontiguousarray(values).data.cast("B"))
            return
        for index, column in enumerate(values.T):
            place = index * self._source.shape[0] + block.start
            self._file.seek(self._offset + place * self._dtype.itemsize)
            self._file.write(np.ascontiguousarray(column).data.cast("B"))


def batch_writer(table: TableFile, path: Path, types: Mapping[str, pyarrow.DataType]) -> Any:
    """Return a writer of a file of the same format and columns; `types` are those of the features."""
    import pyarrow
    from pyarrow import csv

    if isinstance(table, ParquetFile):
        named = zip(table.names, table.schema, strict=True)
        fields = [field.with_type(types.get(name, field.type)) for name, field in named]
        return _ParquetWriter(path, table, pyarrow.schema(fields, table.schema.metadata), set(types))
    kinds = [types.get(name, pyarrow.string()) for name in table.names]
    schema = pyarrow.schema(list(zip(table.header, kinds, strict=True)))
    return csv.CSVWriter(path, schema, write_options=csv.WriteOptions(delimiter=table.delimiter))


class _ParquetWriter:
    """Writes the columns, types, schema metadata, codecs and row groups of the file that they come from.

    Row groups of more than 64 MiB are split, since they are in memory before they are written.
    """

    def __init__(self, path: Path, source: ParquetFile, schema: pyarrow.Schema, features: set[str]) -> None:
        import pyarrow.parquet

        metadata = source.file.metadata
        chunks = [metadata.row_group(0).column(index) for index in range(metadata.num_columns)]
        codecs = {chunk.path_in_schema: chunk.compression for chunk in chunks}
        self._schema = schema
        self._file = pyarrow.parquet.ParquetWriter(
            path,
            schema,
            compression={
                path: "none" if codec == "UNCOMPRESSED" else codec.lower() for path, codec in codecs.items()
            },
            # Residuals hardly ever repeat: a dictionary of them would be built only to be thrown away.
            use_dictionary=[path for path in codecs if path not in features] or False,
        )
        self.close = self._file.close
        self._sizes = self._row_group_sizes(source, schema)
        self._missing_rows = next(self._sizes)  # of the row group that is being filled
        self._pending: list[pyarrow.RecordBatch] = []

    @staticmethod
    def _row_group_sizes(source: ParquetFile, schema: pyarrow.Schema) -> Iterator[int]:
        metadata = source.file.metadata
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            size = max(group.total_byte_size, group.num_rows * 4 * len(schema))
            step = math.ceil(group.num_rows / max(1, math.ceil(size / _MAX_ROW_GROUP_BYTES)))
            yield from (min(step, group.num_rows - at) for at in range(0, group.num_rows, step))

    def write(self, batch: pyarrow.RecordBatch) -> None:
        import pyarrow

        while batch.num_rows:
            part, batch = batch.slice(0, self._missing_rows), batch.slice(self._missing_rows)
            self._pending.append(part)
            self._missing_rows -= part.num_rows
            if not self._missing_rows:
                table = pyarrow.Table.from_batches(self._pending, self._schema)
                self._file.write_table(table, row_group_size=len(table))
                self._pending, self._missing_rows = [], next(self._sizes, 0)


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
            raise ValueError("key= compares two tables: give metadata=, and no .npy file of features.")
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
                f"{self.features.path} and {values[1]!r} in {self.table.path}, and {len(rows) - 1} "
                "rows more differ: bring the tables into the same order."
                + (
                    ""
                    if self._has_key
                    else f" If the rows match and only {name!r} differs, name a column that identifies the "
                    "rows, key= (--key), or rename one of the two columns."
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
