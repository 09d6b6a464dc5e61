"""Tables in files, for reading in batches of rows: Parquet, CSV and ``.npy``.

What stands in a cell is decided here, once for all who read files: which texts are missing values, which
columns are numbers, and what is an error rather than a category.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.csv_file import CsvFile
from mdnorm.design.reader import Column, read_column, read_columns
from mdnorm.design.table_file import (
    TableFileError,
    check_columns,
    different_names,
    is_number_type,
    reading,
    without_missing,
)
from mdnorm.extras import requires

if TYPE_CHECKING:
    import pyarrow

TABLE_FORMATS = (".parquet", ".csv", ".tsv")

# Rows that tell what a column is by default.
_SAMPLE_ROWS = 2**16
_SAMPLE_VALUES = 2**24

_READ_BUFFER_BYTES = 2**18

# What pandas calls a level of an index that has no name.
_LEVEL = re.compile(r"__index_level_\d+__")


def open_table(path: Path, missing_values: Sequence[str] = ()) -> TableFile:
    """Open a ``.parquet``, ``.csv`` (commas, semicolons or tabs) or ``.tsv`` file that has names of columns.

    `missing_values` are further texts that stand for a missing value, such as ``"?"``; empty cells, NA, NaN,
    n/a, null and the like always do. A file that is missing, empty, truncated, not UTF-8 or of another format
    is a TableFileError.
    """
    is_parquet = checked_suffix(path, TABLE_FORMATS) == ".parquet"
    return ParquetFile(path, missing_values) if is_parquet else CsvFile(path, missing_values)


def read_table_file(path: Path, missing_values: Sequence[str] = ()) -> pyarrow.Table:
    """Return the whole table in a file, as `open_table`; without the index of a DataFrame that has no name.

    Two columns of the same name are a TableFileError.
    """
    table = open_table(path, missing_values)
    check_columns(table, table.repeated)
    nameless = {name for name in table.index_names if not name or _LEVEL.fullmatch(name)}
    names = [name for name in table.names if name not in nameless]
    import pyarrow

    with reading(path, path.suffix[1:].upper()):
        return pyarrow.Table.from_batches(list(table.typed_batches(names, _SAMPLE_ROWS)))


def checked_suffix(path: Path, formats: tuple[str, ...], what: str = "tables") -> str:
    """Return the suffix of a file that is there and not empty, in lower case; TableFileError otherwise."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise TableFileError(f"{path} is not a file but a folder.")
    if suffix not in formats:
        raise TableFileError(
            f"{path}: {what} can be read from {', '.join(formats)}, not from {suffix or 'this'}."
        )
    if not path.exists():
        raise TableFileError(f"{path} does not exist.")
    if not path.is_file():
        raise TableFileError(f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise TableFileError(f"{path} is empty (0 bytes).")
    return suffix


def check_metadata(table: TableFile, columns: Sequence[str]) -> None:
    """Raise where a table lacks columns, or they are of a type that no metadata have."""
    check_columns(table, columns)
    if isinstance(table, ParquetFile):
        try:
            read_columns(table.schema.empty_table(), columns)
        except TypeError as error:
            raise TableFileError(f"{table.path}: {error}") from error


class ParquetFile:
    """A Parquet file."""

    def __init__(self, path: Path, missing_values: Sequence[str] = ()) -> None:
        with requires("tables"):
            import pyarrow.parquet
        self.path = path
        self.categories: set[str] = set()
        self._missing_values = list(missing_values)
        self._sampled: dict[str, Column] = {}
        with reading(path, "Parquet"):
            # Without pre-buffering and with small buffers: whole row groups would be read ahead.
            self.file = pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
        self.schema = self.file.schema_arrow
        self.header = tuple(self.schema.names)
        self.names, self.repeated = different_names(self.header)
        self.num_rows: int | None = self.file.metadata.num_rows
        if self.num_rows == 0:
            raise TableFileError(f"{path} has no rows.")
        index = (self.schema.pandas_metadata or {}).get("index_columns", [])
        self.index_names = tuple(name for name in self.names if name in index or _LEVEL.fullmatch(name))

    def numeric(self) -> list[str]:
        """Return the names of the columns that hold integers or floating-point numbers."""
        fields = zip(self.names, self.schema, strict=True)
        return [name for name, field in fields if is_number_type(field.type)]

    def sample(self, columns: Sequence[str]) -> dict[str, Column]:
        """Return the first rows of columns of types that metadata may have."""
        types = dict(zip(self.names, self.schema.types, strict=True))
        readable = {each: _is_readable(each) for each in set(types.values())}
        usable = [name for name in columns if readable[types[name]]]
        if unread := [name for name in usable if name not in self._sampled]:
            rows = max(1000, min(_SAMPLE_ROWS, _SAMPLE_VALUES // len(unread)))
            first = next(self.batches(unread, rows))
            self._sampled |= read_columns(self.typed(first, unread), unread)[0]
        return {name: self._sampled[name] for name in usable}

    def batches(
        self, columns: Sequence[str], batch_rows: int, numbers: Sequence[str] = ()
    ) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order; no batch has rows of two row groups."""
        import pyarrow

        # Among columns of one name only their places tell which is which.
        wanted = list(columns) if not self.repeated else None
        with reading(self.path, "Parquet"):
            for index in range(self.file.metadata.num_row_groups):
                for batch in self.file.iter_batches(batch_rows, row_groups=[index], columns=wanted):
                    if self.repeated:
                        batch = pyarrow.RecordBatch.from_arrays(batch.columns, names=list(self.names))
                    yield batch.select(list(columns))

    def typed_batches(
        self, columns: Sequence[str], batch_rows: int
    ) -> Generator[pyarrow.RecordBatch, None, None]:
        """Yield the rows in order."""
        return (self.typed(batch, columns) for batch in self.batches(columns, batch_rows))

    def typed(self, batch: pyarrow.RecordBatch, columns: Sequence[str]) -> pyarrow.RecordBatch:
        """Return columns of a batch, texts that stand for missing values as such."""
        import pyarrow

        batch = batch.select(list(columns))
        if not self._missing_values:
            return batch
        arrays = [
            without_missing(array, self._missing_values) if pyarrow.types.is_string(array.type) else array
            for array in batch.columns
        ]
        return pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))


TableFile = ParquetFile | CsvFile


def _is_readable(type_: pyarrow.DataType) -> bool:
    import pyarrow

    try:
        read_column("", pyarrow.chunked_array([], type_))
    except TypeError:
        return False
    return True


class ArrayFile:
    """A ``.npy`` file of shape (n, …), every value of a row a feature; in the order of C or of Fortran.

    Only its header is mapped: pages of a mapped file would count as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:
            # NumPy reads the header as Python: a damaged one fails in any part of its parser.
            reason = str(error) if isinstance(error, ValueError | OSError) else "its header is damaged"
            if "mmap length" in reason:
                raise TableFileError(f"{path} is truncated: its shape needs more bytes.") from error
            if "Python objects" in reason:
                reason = "it holds Python objects, which are never loaded: they could run code."
            raise TableFileError(f"{path} cannot be read as an array: {reason}") from error
        self.shape, self.stored, self._offset = mapped.shape, mapped.dtype, mapped.offset
        self.fortran_order = not mapped.flags.c_contiguous
        if self.stored.kind not in "biuf":
            raise TableFileError(
                f"{path} holds values of dtype {self.stored}: features must be real numbers."
            )
        if not self.shape or 0 in self.shape:
            raise TableFileError(f"{path} has the shape {self.shape}: there must be rows and features.")
        self.num_features = math.prod(self.shape[1:])

    def read(self, start: int, rows: int) -> NDArray[Any]:
        """Return some rows, (rows, number of features), as they are stored."""
        if not self.fortran_order:
            return self._values(start * self.num_features, rows * self.num_features).reshape(rows, -1)
        starts = range(start, self.shape[0] * self.num_features, self.shape[0])
        return np.asarray(np.stack([self._values(at, rows) for at in starts]).T)

    def _values(self, start: int, count: int) -> NDArray[Any]:
        offset = self._offset + start * self.stored.itemsize
        values = np.fromfile(self.path, self.stored, count, offset=offset)
        if len(values) < count:
            raise TableFileError(f"{self.path} became shorter while it was read.")
        return values
