"""Features and metadata from files, with errors that say what is wrong with which file."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.extras import requires
from mdnorm.files import COMMA_ROWS, csv_block_bytes, csv_delimiter, decimal_comma_problem, repeated_names

if TYPE_CHECKING:
    import pyarrow

__all__ = ["InputError", "matching", "read_features", "read_table"]

ARCHIVE_FORMATS = (".npz", ".safetensors")
TABLE_FORMATS = (".csv", ".tsv", ".parquet")
FEATURE_FORMATS = (".npy", *ARCHIVE_FORMATS, *TABLE_FORMATS)


class InputError(ValueError):
    """What was given to audit cannot be audited; the message says what is wrong and what to do."""


def read_features(path: str | Path, key: str | None = None, columns: Sequence[str] = ()) -> NDArray[Any]:
    """Return the features in a file, one row for each sample.

    Parameters
    ----------
    path : str or Path
        ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.csv`` or ``.tsv``. Nothing is unpickled.
    key : str, optional
        Name of the array in an ``.npz`` or ``.safetensors`` file. It may be left out where there is only one
        array, or one of the name "features".
    columns : sequence of str
        Of a table: names and patterns such as "voxel_*" of the columns that are features. All by default.

    Returns
    -------
    (n, …) array
        An ``.npy`` file is memory-mapped: only the rows in use are read.

    Raises
    ------
    InputError
        The file is missing, empty, truncated, of another format, or holds no numbers; a key for a file with
        one array, or columns for one without names.
    """
    path = Path(path)
    suffix = _checked_suffix(path, FEATURE_FORMATS, "features")
    if key is not None and suffix not in ARCHIVE_FORMATS:
        raise InputError(f"{path} has no named arrays, so a key ({key!r}) says nothing: leave it out.")
    if columns and suffix not in TABLE_FORMATS:
        raise InputError(
            f"{path} has no named columns, so columns ({', '.join(map(repr, columns))}) say nothing: leave "
            "them out."
        )
    if suffix == ".npy":
        values = _read_npy(path)
    elif suffix == ".npz":
        values = _read_npz(path, key)
    elif suffix == ".safetensors":
        values = _read_safetensors(path, key)
    else:
        values = _table_as_array(read_table(path), path, columns)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{path} holds values of dtype {values.dtype}: features must be real numbers.")
    return values


def read_table(path: str | Path) -> pyarrow.Table:
    """Return a table of metadata, its types inferred, empty cells and NA, NaN, n/a, null as missing.

    Parameters
    ----------
    path : str or Path
        ``.csv`` with a header (separated by commas, semicolons or tabs), ``.tsv`` or ``.parquet``.

    Raises
    ------
    InputError
        The file is missing, empty, truncated or of another format, two columns have the same name, or a
        column has numbers with decimal commas, which would be taken for categories.
    """
    path = Path(path)
    suffix = _checked_suffix(path, TABLE_FORMATS, "a table")
    with requires("audit"):
        import pyarrow
        import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(path) if suffix == ".parquet" else _read_csv(path)
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error):
            raise InputError(f"{path} is not UTF-8: save the table as UTF-8.") from error
        raise InputError(f"{path} cannot be read as {suffix[1:].upper()}: {error}") from error
    if table.num_rows == 0:
        raise InputError(f"{path} has a header but no rows.")
    names = table.column_names
    repeated = repeated_names(names)
    if repeated:
        raise InputError(f"{path} has more than one column of the name(s) {', '.join(map(repr, repeated))}.")
    return table


def _checked_suffix(path: Path, formats: tuple[str, ...], what: str) -> str:
    suffix = path.suffix.lower()
    if suffix not in formats:
        raise InputError(
            f"{path}: {what} can be read from {', '.join(formats)}, not from {suffix or 'this'}."
        )
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if not path.is_file():
        raise InputError(f"{path} is not a file.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes).")
    return suffix


def _read_csv(path: Path) -> pyarrow.Table:
    import pyarrow.types
    from pyarrow import csv

    delimiter = csv_delimiter(path)
    table = csv.read_csv(
        path,
        csv.ReadOptions(block_size=csv_block_bytes(path)),
        csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        csv.ConvertOptions(strings_can_be_null=True),
    )
    for field in table.schema:
        if pyarrow.types.is_binary(field.type):
            raise InputError(f"{path}: column {field.name!r} is not UTF-8 text: save the table as UTF-8.")
        if delimiter != "," and pyarrow.types.is_string(field.type):
            first = table.column(field.name).slice(0, COMMA_ROWS).to_pylist()
            problem = decimal_comma_problem(path, field.name, first)
            if problem is not None:
                raise InputError(problem)
    return table


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        # A damaged file can fail in any of the parsers below numpy's.
        raise InputError(f"{path} cannot be read as an array: {_no_pickle(error)}") from error
    if not isinstance(values, np.ndarray):
        raise InputError(f"{path} is an archive, not an array: name it .npz.")
    return values


def _read_npz(path: Path, key: str | None) -> NDArray[Any]:
    try:
        # Opened here: numpy leaves the file open where the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            name = _chosen_key(list(archive.files), key, path)
            values: NDArray[Any] = archive[name]
            if not isinstance(values, np.ndarray):
                raise InputError(f"{path} holds a file {name!r} that is no array.")
            return values
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read as an archive of arrays: {_no_pickle(error)}") from error


def _no_pickle(error: Exception) -> str:
    if "pickle" in str(error) or "Python objects" in str(error):
        return "it is damaged, or holds Python objects, which are never loaded since they could run code."
    return f"{error}"


def _read_safetensors(path: Path, key: str | None) -> NDArray[Any]:
    with requires("audit"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(_chosen_key(list(file.keys()), key, path))
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    # numpy has no bfloat16.
    values: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return values


def _chosen_key(names: list[str], key: str | None, path: Path) -> str:
    shown = ", ".join(map(repr, sorted(names))) or "none"
    if key is not None:
        if key not in names:
            raise InputError(f"{path} has no array {key!r}; it has {shown}.")
        return key
    if len(names) == 1:
        return names[0]
    if "features" in names:
        return "features"
    raise InputError(
        f"{path} holds several arrays or none ({shown}): say which with the key of the features."
    )


def matching(names: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """Return the names that agree with any of the patterns ("age", "voxel_*").

    Raises
    ------
    InputError
        A pattern agrees with none.
    """
    for pattern in patterns:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise InputError(f"no {where} {pattern!r}; there are {', '.join(map(repr, names))}.")
    return [
        name for name in names if any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _table_as_array(table: pyarrow.Table, path: Path, columns: Sequence[str]) -> NDArray[Any]:
    import pyarrow.types as kinds

    if columns:
        table = table.select(matching(table.column_names, columns, f"column in {path}"))

    def is_number(kind: pyarrow.DataType) -> bool:
        return bool(
            kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind) or kinds.is_null(kind)
        )

    wrong = [field.name for field in table.schema if not is_number(field.type)]
    if wrong:
        raise InputError(
            f"{path} has columns that are not numbers: {', '.join(map(repr, wrong[:5]))}"
            f"{', …' if len(wrong) > 5 else ''}. Choose the columns that are features."
        )
    return np.stack([column.to_numpy().astype(np.float64) for column in table.columns], axis=1)
