"""Tables of text: CSV and TSV, and what stands in their cells."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdnorm.design.reader import Column, read_column
from mdnorm.design.roles import FEW_NUMBERS, NUMBER, odd_cell, odd_cell_text
from mdnorm.design.table_file import TableFileError, different_names, is_number_type, reading, without_missing
from mdnorm.extras import requires

if TYPE_CHECKING:
    import pyarrow

# Rows of usual tables are much shorter; reading is fastest with blocks of some megabytes.
_CSV_BLOCK_BYTES = 2**22

# "01" is the name of something: as a number it would be the same as "1".
_ZERO_FIRST = r"^\s*[-+]?0\d+\s*$"
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+\s*")
_WHOLE = r"^\s*[-+]?\d+\s*$"


def csv_delimiter(path: Path) -> str:
    """Return what separates the columns of a text table: a tab in ``.tsv``, else as its header tells."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    # A comma in the header may also be part of a quoted name, but then no other separator is there.
    counts = {delimiter: header.count(delimiter) for delimiter in ",;\t"}
    return "," if counts[","] else max(counts, key=lambda delimiter: counts[delimiter])


class CsvFile:
    """A text file with a header.

    Columns that are not features are read as text and written as they were. Types of metadata are those that
    all of their values have; empty cells, NA, NaN, n/a, null and the like are missing. Texts that are numbers
    with a zero in front ("01") stay texts.
    """

    def __init__(self, path: Path, missing_values: Sequence[str] = ()) -> None:
        with requires("tables"):
            from pyarrow import csv
        self.path = path
        self.num_rows: int | None = None
        self.categories: set[str] = set()
        self.delimiter = csv_delimiter(path)
        self._parsing = csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)
        self._missing_values = [*csv.ConvertOptions().null_values, *missing_values]
        with reading(path, "CSV"):
            # In any of the three line ends; other rows may be longer than the first one.
            with path.open(encoding="utf-8") as file:
                header, row = file.readline(), file.readline()
                self._line_end = "\r" if file.newlines == "\r" else "\n"
            if not row:
                raise TableFileError(f"{path} has a header but no rows.")
            size = max(_CSV_BLOCK_BYTES, 4 * len(header.encode()), 4 * len(row.encode()))
            # Arrow takes no more than 2³¹ bytes.
            size = min(size, 2**31 - 1)
            with csv.open_csv(path, csv.ReadOptions(block_size=size), self._parsing) as reader:
                self.header = tuple(reader.schema.names)
            self.names, self.repeated = different_names(self.header)
            self._places = {name: place for place, name in enumerate(self.names)}
            self._reading = csv.ReadOptions(block_size=size, column_names=self.names, skip_rows_after_names=1)
            converting = csv.ConvertOptions(null_values=self._missing_values)
            with csv.open_csv(path, self._reading, self._parsing, converting) as reader:
                # Of the first block only; a later value that is no number is an error that names it.
                first = next((batch for batch in reader if batch.num_rows), None)
        if first is None:
            raise TableFileError(f"{path} has a header but no rows.")
        self._first: pyarrow.RecordBatch = first
        # pandas writes its index as a first column without a name.
        self.index_names = self.names[:1] if self.names[0] == "" else ()
        self._types: dict[str, pyarrow.DataType] = {}

    def numeric(self) -> list[str]:
        """Return the names of the columns that begin with numbers."""
        return [field.name for field in self._first.schema if is_number_type(field.type)]

    def sample(self, columns: Sequence[str]) -> dict[str, Column]:
        """Return the first rows of columns; an error where most, not all values of one are numbers."""
        import pyarrow

        found = {}
        for name in columns:
            values = self._first.column(self._places[name])
            is_text = pyarrow.types.is_string(values.type)
            values = without_missing(values, self._missing_values) if is_text else values
            column = found[name] = read_column(name, pyarrow.chunked_array([values]))
            if is_text and name not in self.categories:
                kind = _Kind()
                kind.add(values, 0)
                if self.delimiter == ",":  # Two numbers in a cell may be a list.
                    kind.num_commas = 0
                self._check(name, kind, None if odd_cell(column) is None else "")
        return found

    def batches(
        self, columns: Sequence[str], batch_rows: int, numbers: Iterable[str] = ()
    ) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows in order, `numbers` as float64, others as text; the number of rows varies."""
        import pyarrow
        from pyarrow import csv

        numbers = set(numbers)
        types = {name: pyarrow.float64() if name in numbers else pyarrow.string() for name in columns}
        with (
            reading(self.path, "CSV"),
            csv.open_csv(
                self.path,
                read_options=self._reading,
                parse_options=self._parsing,
                convert_options=csv.ConvertOptions(
                    column_types=types, include_columns=list(columns), null_values=self._missing_values
                ),
            ) as reader,
        ):
            row = 0
            for batch in reader:
                self._check_quotes(batch, row)
                row += batch.num_rows
                for start in range(0, batch.num_rows, batch_rows):
                    yield batch.slice(start, batch_rows)

    def _check_quotes(self, batch: pyarrow.RecordBatch, row: int) -> None:
        """Raise where a cell holds what looks like whole rows: a quote that is not closed swallows them."""
        import pyarrow
        from pyarrow import compute

        if len(self.names) < 2:
            return
        for name, values in zip(batch.schema.names, batch.columns, strict=True):
            if not pyarrow.types.is_string(values.type):
                continue
            several = compute.match_substring(values, self._line_end).fill_null(False)
            for place in np.flatnonzero(several.to_numpy(zero_copy_only=False)):
                lines = values[int(place)].as_py().splitlines()
                swallowed = [line for line in lines if line.count(self.delimiter) == len(self.names) - 1]
                if swallowed:
                    raise TableFileError(
                        f"{self.path}: the cell in column {name!r}, row {row + int(place)} (counted from 0), "
                        f'has whole rows in it, such as {swallowed[0][:60]!r}: a quote (") before them is '
                        "not closed."
                    )

    def typed_batches(
        self, columns: Sequence[str], batch_rows: int
    ) -> Generator[pyarrow.RecordBatch, None, None]:
        """Yield the rows in order; the types of new columns are found first, in a pass of its own."""
        self._infer([name for name in columns if name not in self._types], batch_rows)
        return (self.typed(batch, columns) for batch in self.batches(columns, batch_rows))

    def typed(self, batch: pyarrow.RecordBatch, columns: Sequence[str]) -> pyarrow.RecordBatch:
        """Return columns of a batch with the types of the whole column."""
        import pyarrow

        self._infer([name for name in columns if name not in self._types], batch.num_rows)
        texts = (without_missing(batch.column(name), self._missing_values) for name in columns)
        arrays = [values.cast(self._types[name]) for name, values in zip(columns, texts, strict=True)]
        return pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))

    def _infer(self, columns: Sequence[str], batch_rows: int) -> None:
        if not columns:
            return
        kinds = {name: _Kind() for name in columns}
        row = 0
        for batch in self.batches(columns, batch_rows):
            for name, kind in kinds.items():
                kind.add(without_missing(batch.column(name), self._missing_values), row)
            row += batch.num_rows
        for name, kind in kinds.items():
            if name not in self.categories:
                self._check(name, kind, f", or make it a category with C({name})")
            self._types[name] = kind.type

    def _check(self, name: str, kind: _Kind, otherwise: str | None) -> None:
        """Raise where most values of a column of text are numbers, with a comma, or not all of them.

        None for what else to do: odd cells are no error.
        """
        if 2 * kind.num_commas > kind.num_present:
            raise TableFileError(
                f"{self.path}: column {name!r} has numbers with a comma, such as {kind.comma}, which would "
                "be taken for categories: save the table with decimal points."
            )
        few = 2 * kind.num_odd >= kind.num_present or len(kind.numbers) <= FEW_NUMBERS
        if kind.odd is None or otherwise is None or few:
            return
        row, value = kind.odd
        problem = odd_cell_text(name, value, row, kind.num_odd, kind.num_present)
        raise TableFileError(
            f"{self.path}: {problem}: correct the cell, or say that it is a missing value with "
            f"missing_values=[{value!r}] (--missing-values {value!r}){otherwise}."
        )


class _Kind:
    """What the values of a column of texts are, seen batch after batch."""

    def __init__(self) -> None:
        import pyarrow

        self._possible = [
            pyarrow.int64(),
            pyarrow.float64(),
            pyarrow.bool_(),
            pyarrow.date32(),
            pyarrow.timestamp("us"),
        ]
        self.num_present = self.num_odd = self.num_commas = 0
        self.odd: tuple[int, str] | None = None
        self.comma = ""
        self.numbers: set[str] = set()
        self._all_whole = True

    @property
    def type(self) -> pyarrow.DataType:
        import pyarrow

        return next(iter(self._possible), pyarrow.string())

    def add(self, values: pyarrow.Array, row: int) -> None:
        """Look at further values, the first of which is in this row."""
        import pyarrow
        from pyarrow import compute

        num_present = len(values) - values.null_count
        self.num_present += num_present
        self._possible = [kind for kind in self._possible if _casts(values, kind)]
        if num_present and self.type == pyarrow.int64():
            same = compute.equal(values.cast(pyarrow.int64()).cast(pyarrow.string()), values)
            zeros = compute.match_substring_regex(values, _ZERO_FIRST)
            if not compute.all(same).as_py() and compute.any(zeros).as_py():
                self._possible = []
        elif num_present and self._all_whole and self.type == pyarrow.float64():
            self._all_whole = compute.all(compute.match_substring_regex(values, _WHOLE)).as_py()
            if self._all_whole:
                # Of more digits than an integer has: as floats they would no longer differ.
                self._possible = []
        if self.type == pyarrow.string() and num_present:
            is_number = compute.match_substring_regex(values, NUMBER.pattern).fill_null(True)
            odd = np.flatnonzero(~is_number.to_numpy(zero_copy_only=False))
            self.num_odd += len(odd)
            if self.odd is None and len(odd):
                self.odd = row + int(odd[0]), values[int(odd[0])].as_py()
            commas = [text for text in values.take(odd[:1000]).to_pylist() if _DECIMAL_COMMA.fullmatch(text)]
            self.num_commas += len(commas)
            self.comma = self.comma or next(iter(commas), "").strip()
        if len(self.numbers) <= FEW_NUMBERS and num_present:
            texts = values.slice(0, 1000).drop_null().to_pylist()
            self.numbers |= {text for text in texts if NUMBER.match(text)}


def _casts(values: pyarrow.Array, kind: pyarrow.DataType) -> bool:
    import pyarrow

    try:
        values.cast(kind)
    except pyarrow.ArrowInvalid:
        return False
    return True
