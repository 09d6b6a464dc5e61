"""Tables in files, read and written in blocks of rows: Parquet, CSV and ``.npy``.

A table is never in memory as a whole. What is read: the columns in use, block after block. What is written:
the same format with the same columns, where the features are other numbers.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.reader import read_columns
from mdnorm.extras import requires
from mdnorm.files import COMMA_ROWS, csv_block_bytes, csv_delimiter, decimal_comma_problem, repeated_names

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "ArrayFile",
    "Block",
    "CsvFile",
    "FeatureFile",
    "FeatureTable",
    "FeatureWriter",
    "ParquetFile",
    "TableFile",
    "TableFileError",
    "open_features",
    "open_table",
    "prefetched",
]

T = TypeVar("T")

# A row group is in memory as a whole before it is written, and the next one is filled meanwhile.
_MAX_ROW_GROUP_BYTES = 2**26

_READ_BUFFER_BYTES = 2**18


class TableFileError(ValueError):
    """A file cannot be used as a table; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of a table.

    Attributes
    ----------
    start : int
        Index of the first row.
    features : (n, D) float array
        float32 where all features are of at most that precision. Columns or rows are contiguous.
    batch : pyarrow.RecordBatch or None
        The other columns that were asked for; None for an array, which has none.
    """

    start: int
    features: NDArray[Any]
    batch: pyarrow.RecordBatch | None


class TableFile(Protocol):
    """Columns in a file, to be read in batches of rows."""

    path: Path
    names: tuple[str, ...]
    num_rows: int | None

    def numeric(self) -> list[str]:
        """Return the names of the columns that hold integers or floating-point numbers."""

    def batches(
        self, columns: Sequence[str], batch_rows: int, numbers: Sequence[str] = ()
    ) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order; `numbers` are those of `columns` that must be numeric."""

    def typed_batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order, every column of the type that its values have in the whole file."""

    def typed(self, batch: pyarrow.RecordBatch, columns: Sequence[str]) -> pyarrow.RecordBatch:
        """Return columns of one of the `batches` as `typed_batches` would have them."""

    def writer(
        self, path: Path, columns: Sequence[str], types: Mapping[str, pyarrow.DataType]
    ) -> BatchWriter:
        """Return a writer of a file of this format; `types` are those of the features."""


class BatchWriter(Protocol):
    """Writes batches of rows."""

    def write(self, batch: pyarrow.RecordBatch) -> None:
        """Add rows."""

    def close(self) -> None:
        """Complete the file."""


class FeatureFile(Protocol):
    """Features in a file, to be read in blocks of rows, and written anew."""

    path: Path
    num_rows: int | None
    feature_names: tuple[str, ...]
    dtype: np.dtype[Any]
    """Of the features in a block."""

    def blocks(self, batch_rows: int, columns: Sequence[str] | None) -> Iterator[Block]:
        """Yield the rows in order, with other columns; None: with all that `writer` needs."""

    def writer(self, path: Path) -> FeatureWriter:
        """Return a writer of a file of this format."""


class FeatureWriter(Protocol):
    """Writes blocks whose features were changed."""

    def write(self, block: Block, features: NDArray[Any]) -> None:
        """Add the rows of a block with other features."""

    def close(self) -> None:
        """Complete the file."""


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """Yield the items while a thread makes the next one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="mdnorm-read") as pool:
        future: Future[Any] = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


# --------------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------------


def open_table(path: Path) -> TableFile:
    """Open a table for reading.

    Parameters
    ----------
    path : Path
        ``.parquet``, ``.csv`` (separated by commas, semicolons or tabs) or ``.tsv``, with names of columns.

    Raises
    ------
    TableFileError
        The file is missing, empty, truncated, not UTF-8 or of another format, two columns have the same name,
        or a text table has numbers with decimal commas.
    """
    formats: dict[str, Callable[[Path], TableFile]] = {
        ".parquet": ParquetFile,
        ".csv": CsvFile,
        ".tsv": CsvFile,
    }
    return formats[_checked_suffix(path, tuple(formats))](path)


def open_features(
    path: Path, features: Sequence[str] | None = None, reserved: Sequence[str] = ()
) -> FeatureFile:
    """Open a file with features.

    Parameters
    ----------
    path : Path
        A table as for `open_table`, or ``.npy`` of shape (n, …), where every value of a row is a feature.
    features : sequence of str, optional
        Names of the columns that are features, or patterns such as ``"voxel_*"``. None: all that are
        numeric, but the reserved ones.
    reserved : sequence of str
        Columns that are metadata, labels or the like.

    Returns
    -------
    FeatureFile

    Raises
    ------
    TableFileError
        As for `open_table`; there are no such features; a feature is reserved or not numeric.
    """
    if path.suffix.lower() == ".npy":
        _checked_suffix(path, (".npy",))
        if features is not None:
            raise TableFileError(
                f"{path} has no names of columns that features could choose among: every column of a .npy "
                "file is a feature."
            )
        return ArrayFile(path)
    if path.suffix.lower() not in (".parquet", ".csv", ".tsv"):
        _checked_suffix(path, (".parquet", ".csv", ".tsv", ".npy"))
    table = open_table(path)
    return FeatureTable(table, _chosen_features(table, features, reserved))


def _chosen_features(
    table: TableFile, features: Sequence[str] | None, reserved: Sequence[str]
) -> tuple[str, ...]:
    numeric = set(table.numeric())
    if features is None:
        chosen = [name for name in table.names if name in numeric and name not in reserved]
        if not chosen:
            raise TableFileError(
                f"{table.path} has no numeric column that is not metadata: nothing to residualise. Its "
                f"columns are {_shown(table.names)}."
            )
        return tuple(chosen)
    wanted: set[str] = set()
    for pattern in features:
        found = {pattern} if pattern in table.names else set(fnmatch.filter(table.names, pattern))
        if not found:
            raise TableFileError(
                f"{table.path} has no column {pattern!r} for the features; it has {_shown(table.names)}."
            )
        # A pattern may also find the metadata; only who names a column means it.
        wanted |= found if pattern in table.names else found - set(reserved)
    both = sorted(wanted & set(reserved))
    if both:
        raise TableFileError(f"{both[0]!r} is both a feature and metadata: take it out of one of them.")
    wrong = [name for name in table.names if name in wanted and name not in numeric]
    if wrong:
        raise TableFileError(f"{table.path}: the feature(s) {_shown(wrong)} are not numeric.")
    return tuple(name for name in table.names if name in wanted)


def _checked_suffix(path: Path, formats: tuple[str, ...]) -> str:
    suffix = path.suffix.lower()
    if suffix not in formats:
        raise TableFileError(
            f"{path}: tables can be read from {', '.join(formats)}, not from {suffix or 'this'}."
        )
    if not path.exists():
        raise TableFileError(f"{path} does not exist.")
    if not path.is_file():
        raise TableFileError(f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise TableFileError(f"{path} is empty (0 bytes).")
    return suffix


def _shown(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(map(repr, names[:limit])) + (", …" if len(names) > limit else "")


def _check_names(path: Path, names: Sequence[str]) -> None:
    repeated = repeated_names(names)
    if repeated:
        raise TableFileError(f"{path} has more than one column of the name(s) {_shown(repeated)}.")


def check_metadata(table: TableFile, columns: Sequence[str]) -> None:
    """Raise where a table lacks columns, or they are of a type that no metadata have."""
    check_columns(table, columns)
    if isinstance(table, ParquetFile):
        try:
            read_columns(table.schema.empty_table(), columns)
        except TypeError as error:
            raise TableFileError(f"{table.path}: {error}") from error


def check_columns(table: TableFile, columns: Sequence[str]) -> None:
    """Raise where a table lacks columns."""
    for name in columns:
        if name not in table.names:
            raise TableFileError(f"{table.path} has no column {name!r}; it has {_shown(table.names)}.")


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    with requires("tables"):
        import pyarrow
    try:
        yield
    except TableFileError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error):
            raise TableFileError(f"{path} is not UTF-8: save it as UTF-8.") from error
        raise TableFileError(f"{path} cannot be read as {kind}: {error}") from error


def _is_number(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_integer(kind) or kinds.is_floating(kind))


# --------------------------------------------------------------------------------------------------------
# Parquet
# --------------------------------------------------------------------------------------------------------


class ParquetFile:
    """A Parquet file.

    Written files have the columns, types, schema metadata, codecs and row groups of the one they come from.
    Row groups of more than 64 MiB are split, since they are in memory before they are written.
    """

    def __init__(self, path: Path) -> None:
        with requires("tables"):
            import pyarrow.parquet
        self.path = path
        with _reading(path, "Parquet"):
            # Without pre-buffering and with small buffers: whole row groups would be read ahead.
            self._file = pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.names = tuple(self.schema.names)
        _check_names(path, self.names)
        self.num_rows: int | None = self._file.metadata.num_rows
        if self.num_rows == 0:
            raise TableFileError(f"{path} has no rows.")

    @property
    def row_group_rows(self) -> list[int]:
        """Number of rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]

    def numeric(self) -> list[str]:
        """Return the names of the columns that hold integers or floating-point numbers."""
        return [field.name for field in self.schema if _is_number(field.type)]

    def batches(
        self, columns: Sequence[str], batch_rows: int, numbers: Sequence[str] = ()
    ) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order; no batch has rows of two row groups."""
        check_columns(self, columns)
        with _reading(self.path, "Parquet"):
            for index in range(self._file.metadata.num_row_groups):
                yield from self._file.iter_batches(batch_rows, row_groups=[index], columns=list(columns))

    def typed_batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order."""
        return self.batches(columns, batch_rows)

    def typed(self, batch: pyarrow.RecordBatch, columns: Sequence[str]) -> pyarrow.RecordBatch:
        """Return columns of a batch."""
        return batch.select(list(columns))

    def writer(
        self, path: Path, columns: Sequence[str], types: Mapping[str, pyarrow.DataType]
    ) -> BatchWriter:
        """Return a writer."""
        import pyarrow

        fields = [self.schema.field(name) for name in columns]
        fields = [field.with_type(types.get(field.name, field.type)) for field in fields]
        return _ParquetWriter(path, self, pyarrow.schema(fields, self.schema.metadata), set(types))


class _ParquetWriter:
    def __init__(self, path: Path, source: ParquetFile, schema: pyarrow.Schema, features: set[str]) -> None:
        import pyarrow.parquet

        metadata = source._file.metadata
        chunks = [metadata.row_group(0).column(index) for index in range(metadata.num_columns)]
        encodings = {chunk.path_in_schema: set(chunk.encodings) for chunk in chunks}
        # Residuals hardly ever repeat: a dictionary of them would be built only to be thrown away.
        dictionary = [
            path
            for path, used in encodings.items()
            if used & {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} and path not in features
        ]
        split = [path for path, used in encodings.items() if "BYTE_STREAM_SPLIT" in used]
        codecs = {chunk.path_in_schema: chunk.compression for chunk in chunks}
        version = metadata.format_version
        self._schema = schema
        self._writer = pyarrow.parquet.ParquetWriter(
            path,
            schema,
            compression={
                path: "none" if codec == "UNCOMPRESSED" else codec.lower() for path, codec in codecs.items()
            },
            use_dictionary=dictionary or False,
            use_byte_stream_split=split or False,
            version=version if version in ("1.0", "2.4", "2.6") else "2.6",
        )
        self._ends = self._row_group_ends(source, schema)
        self._pending: list[pyarrow.RecordBatch] = []
        self._num_rows = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mdnorm-write")
        self._writing: Future[None] | None = None

    @staticmethod
    def _row_group_ends(source: ParquetFile, schema: pyarrow.Schema) -> Iterator[int]:
        metadata = source._file.metadata
        start = 0
        for index, rows in enumerate(source.row_group_rows):
            size = max(metadata.row_group(index).total_byte_size, rows * 4 * len(schema))
            parts = max(1, math.ceil(size / _MAX_ROW_GROUP_BYTES))
            step = math.ceil(rows / parts)
            for at in range(step, rows + step, step):
                yield start + min(at, rows)
            start += rows

    def write(self, batch: pyarrow.RecordBatch) -> None:
        if not hasattr(self, "_end"):
            self._end = next(self._ends)
        while batch.num_rows:
            rows = min(batch.num_rows, self._end - self._num_rows)
            self._pending.append(batch.slice(0, rows))
            self._num_rows += rows
            batch = batch.slice(rows)
            if self._num_rows == self._end:
                self._flush()
                self._end = next(self._ends, self._end)

    def _flush(self) -> None:
        import pyarrow

        table = pyarrow.Table.from_batches(self._pending, self._schema)
        self._pending = []
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self._writer.write_table, table, row_group_size=len(table))

    def close(self) -> None:
        try:
            if self._pending:
                self._flush()
            if self._writing is not None:
                self._writing.result()
        finally:
            self._pool.shutdown()
            self._writer.close()


# --------------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------------


class CsvFile:
    """A text file with a header.

    Columns that are not features are read as text and written as they were. Types of metadata are those that
    all of their values have; empty cells, NA, NaN, n/a, null and the like are missing.
    """

    def __init__(self, path: Path) -> None:
        with requires("tables"):
            import pyarrow.types
            from pyarrow import csv
        self.path = path
        self.num_rows: int | None = None
        self._delimiter = csv_delimiter(path)
        with _reading(path, "CSV"):
            self._reading = csv.ReadOptions(block_size=csv_block_bytes(path))
            self._check_rows()
            with csv.open_csv(path, self._reading, self._parsing()) as reader:
                # Of the first block only; a later value that is no number is an error that names it.
                self._first = reader.schema
                first = next(iter(reader), None)
            if first is None or first.num_rows == 0:
                raise TableFileError(f"{path} has a header but no rows.")
            self.names = tuple(self._first.names)
        _check_names(path, self.names)
        for field in self._first:
            if pyarrow.types.is_binary(field.type):
                raise TableFileError(f"{path} is not UTF-8 (column {field.name!r}): save it as UTF-8.")
        if self._delimiter != ",":
            # Also columns that are not asked for: features are by default all those of numbers.
            for name, kind in zip(self.names, self._first.types, strict=True):
                if pyarrow.types.is_string(kind):
                    self._check_decimal_commas(name, first.column(name))
        self._types: dict[str, pyarrow.DataType] = {}

    def _check_rows(self) -> None:
        # Arrow calls a header without a line behind it an empty file.
        with self.path.open("rb") as file:
            file.readline()
            if not file.readline():
                raise TableFileError(f"{self.path} has a header but no rows.")

    def _check_decimal_commas(self, name: str, values: pyarrow.Array) -> None:
        first = _without_missing(values.slice(0, COMMA_ROWS))
        problem = decimal_comma_problem(self.path, name, first.to_pylist())
        if problem is not None:
            raise TableFileError(problem)

    def _parsing(self) -> Any:
        from pyarrow import csv

        return csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True)

    def numeric(self) -> list[str]:
        """Return the names of the columns that begin with numbers."""
        return [field.name for field in self._first if _is_number(field.type)]

    def batches(
        self, columns: Sequence[str], batch_rows: int, numbers: Sequence[str] = ()
    ) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order, `numbers` as float64, others as text; the number of rows varies."""
        import pyarrow
        from pyarrow import csv

        check_columns(self, columns)
        types = {name: pyarrow.float64() if name in numbers else pyarrow.string() for name in columns}
        with (
            _reading(self.path, "CSV"),
            csv.open_csv(
                self.path,
                read_options=self._reading,
                parse_options=self._parsing(),
                convert_options=csv.ConvertOptions(column_types=types, include_columns=list(columns)),
            ) as reader,
        ):
            for batch in reader:
                for start in range(0, batch.num_rows, batch_rows):
                    yield batch.slice(start, batch_rows)

    def typed_batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order; the types of new columns are found first, in a pass of its own."""
        self._infer([name for name in columns if name not in self._types], batch_rows)
        return (self.typed(batch, columns) for batch in self.batches(columns, batch_rows))

    def typed(self, batch: pyarrow.RecordBatch, columns: Sequence[str]) -> pyarrow.RecordBatch:
        """Return columns of a batch with the types of the whole column."""
        import pyarrow

        self._infer([name for name in columns if name not in self._types], batch.num_rows)
        arrays = [_without_missing(batch.column(name)).cast(self._types[name]) for name in columns]
        return pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))

    def _infer(self, columns: Sequence[str], batch_rows: int) -> None:
        import pyarrow

        if not columns:
            return
        possible = {
            name: [
                pyarrow.int64(),
                pyarrow.float64(),
                pyarrow.bool_(),
                pyarrow.date32(),
                pyarrow.timestamp("us"),
            ]
            for name in columns
        }
        for index, batch in enumerate(self.batches(columns, batch_rows)):
            for name, kinds in possible.items():
                if not index:
                    self._check_decimal_commas(name, batch.column(name))
                if kinds:
                    values = _without_missing(batch.column(name))
                    possible[name] = [kind for kind in kinds if _casts(values, kind)]
        self._types.update({name: next(iter(kinds), pyarrow.string()) for name, kinds in possible.items()})

    def writer(
        self, path: Path, columns: Sequence[str], types: Mapping[str, pyarrow.DataType]
    ) -> BatchWriter:
        """Return a writer."""
        import pyarrow

        schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in columns])
        return _CsvWriter(path, schema, self._delimiter)


class _CsvWriter:
    def __init__(self, path: Path, schema: pyarrow.Schema, delimiter: str) -> None:
        from pyarrow import csv

        self._writer = csv.CSVWriter(path, schema, write_options=csv.WriteOptions(delimiter=delimiter))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mdnorm-write")
        self._writing: Future[None] | None = None

    def write(self, batch: pyarrow.RecordBatch) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self._writer.write_batch, batch)

    def close(self) -> None:
        try:
            if self._writing is not None:
                self._writing.result()
        finally:
            self._pool.shutdown()
            self._writer.close()


def _without_missing(values: pyarrow.Array) -> pyarrow.Array:
    import pyarrow
    from pyarrow import compute, csv

    missing = compute.is_in(values, value_set=pyarrow.array(csv.ConvertOptions().null_values))
    # No if_else of the values themselves: pyarrow 15 to 23 at least mix up the texts of slices in it.
    rows = pyarrow.array(np.arange(len(values)))
    return values.take(compute.if_else(missing, pyarrow.scalar(None, rows.type), rows))


def _casts(values: pyarrow.Array, kind: pyarrow.DataType) -> bool:
    import pyarrow

    try:
        values.cast(kind)
    except pyarrow.ArrowInvalid:
        return False
    return True


# --------------------------------------------------------------------------------------------------------
# Columns of a table as features
# --------------------------------------------------------------------------------------------------------


class FeatureTable:
    """A table of which some columns are features.

    Features of float32 or float16 become float32, other numbers float64; what is computed from them is
    written in the same type.
    """

    def __init__(self, table: TableFile, feature_names: tuple[str, ...]) -> None:
        import pyarrow

        self.table = table
        self.path = table.path
        self.num_rows = table.num_rows
        self.feature_names = feature_names
        self._types = {name: pyarrow.float64() for name in feature_names}
        if isinstance(table, ParquetFile):
            single = (pyarrow.float16(), pyarrow.float32())
            self._types = {
                name: pyarrow.float32() if table.schema.field(name).type in single else pyarrow.float64()
                for name in feature_names
            }
        self.dtype = np.result_type(*{kind.to_pandas_dtype() for kind in self._types.values()})

    def blocks(self, batch_rows: int, columns: Sequence[str] | None) -> Iterator[Block]:
        """Yield the rows in order."""
        if columns is None:
            others = [name for name in self.table.names if name not in self._types]
        else:
            others = list(columns)
        names = [name for name in self.table.names if name in self._types or name in others]
        start = 0
        for batch in self.table.batches(names, batch_rows, self.feature_names):
            features = np.empty((len(self.feature_names), batch.num_rows), self.dtype)
            for row, name in zip(features, self.feature_names, strict=True):
                row[:] = batch.column(name).to_numpy(zero_copy_only=False)
            yield Block(start, features.T, batch.select(others))
            start += batch.num_rows

    def writer(self, path: Path) -> FeatureWriter:
        """Return a writer; columns keep their places."""
        return _FeatureTableWriter(self.table.writer(path, self.table.names, self._types), self)


class _FeatureTableWriter:
    def __init__(self, writer: BatchWriter, source: FeatureTable) -> None:
        self._writer = writer
        self._source = source

    def write(self, block: Block, features: NDArray[Any]) -> None:
        import pyarrow

        types = self._source._types
        position = {name: index for index, name in enumerate(types)}
        assert block.batch is not None
        arrays = [
            pyarrow.array(np.ascontiguousarray(features[:, position[name]], types[name].to_pandas_dtype()))
            if name in types
            else block.batch.column(name)
            for name in self._source.table.names
        ]
        self._writer.write(pyarrow.RecordBatch.from_arrays(arrays, names=list(self._source.table.names)))

    def close(self) -> None:
        self._writer.close()


# --------------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------------


class ArrayFile:
    """A ``.npy`` file of shape (n, …), every value of a row a feature; in the order of C or of Fortran.

    It is read and written in pieces, not mapped: pages of a mapped file would count as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read is None:
                    raise ValueError(f"version {version} of the format is not supported")
                self.shape, self.fortran_order, self._stored = read(file)
                self._offset = file.tell()
        except ValueError as error:
            raise TableFileError(f"{path} cannot be read as an array: {error}") from error
        if self._stored.kind not in "biuf":
            raise TableFileError(
                f"{path} holds values of dtype {self._stored}: features must be real numbers."
            )
        if not self.shape or 0 in self.shape:
            raise TableFileError(f"{path} has the shape {self.shape}: there must be rows and features.")
        expected = self._offset + self._stored.itemsize * math.prod(self.shape)
        size = path.stat().st_size
        if size < expected:
            raise TableFileError(
                f"{path} is truncated: it has {size} bytes, shape {self.shape} and dtype {self._stored} need "
                f"{expected}."
            )
        self.num_rows: int | None = self.shape[0]
        self.num_features = math.prod(self.shape[1:])
        self.feature_names = tuple(map(str, range(self.num_features)))
        self.dtype = np.dtype(
            np.float32 if self._stored.kind == "f" and self._stored.itemsize <= 4 else np.float64
        )

    def blocks(self, batch_rows: int, columns: Sequence[str] | None) -> Iterator[Block]:
        """Yield the rows in order; there are no other columns."""
        with self.path.open("rb") as file:
            for start in range(0, self.shape[0], batch_rows):
                rows = min(batch_rows, self.shape[0] - start)
                yield Block(start, self._read(file, start, rows).astype(self.dtype, copy=False), None)

    def _read(self, file: BinaryIO, start: int, rows: int) -> NDArray[Any]:
        if not self.fortran_order:
            values = np.empty((rows, self.num_features), self._stored)
            self._read_into(file, start * self.num_features, values)
            return values
        columns = np.empty((self.num_features, rows), self._stored)
        for index, column in enumerate(columns):
            self._read_into(file, index * self.shape[0] + start, column)
        transposed: NDArray[Any] = columns.T
        return transposed

    def _read_into(self, file: BinaryIO, start: int, values: NDArray[Any]) -> None:
        file.seek(self._offset + start * self._stored.itemsize)
        if file.readinto(values.data.cast("B")) < values.nbytes:  # type: ignore[attr-defined]
            raise TableFileError(f"{self.path} became shorter while it was read.")

    def writer(self, path: Path) -> FeatureWriter:
        """Return a writer of the same shape and order."""
        return _ArrayWriter(path, self)


class _ArrayWriter:
    def __init__(self, path: Path, source: ArrayFile) -> None:
        self._source = source
        self._file = path.open("wb")
        header = {
            "descr": np.lib.format.dtype_to_descr(source.dtype),
            "fortran_order": source.fortran_order,
            "shape": source.shape,
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        self._offset = self._file.tell()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mdnorm-write")
        self._writing: Future[None] | None = None

    def write(self, block: Block, features: NDArray[Any]) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self._write, block.start, features)

    def _write(self, start: int, features: NDArray[Any]) -> None:
        values = features.astype(self._source.dtype, copy=False)
        size = self._source.dtype.itemsize
        if not self._source.fortran_order:
            self._file.seek(self._offset + start * self._source.num_features * size)
            self._file.write(np.ascontiguousarray(values).data.cast("B"))
            return
        for index, column in enumerate(values.T):
            self._file.seek(self._offset + (index * self._source.shape[0] + start) * size)
            self._file.write(np.ascontiguousarray(column).data.cast("B"))

    def close(self) -> None:
        try:
            if self._writing is not None:
                self._writing.result()
        finally:
            self._pool.shutdown()
            self._file.close()
