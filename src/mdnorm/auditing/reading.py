"""Features and metadata from files, with errors that say what is wrong with which file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.design.feature_columns import chosen_features
from mdnorm.design.files import TABLE_FORMATS, ArrayFile, checked_suffix, open_table, read_table_file
from mdnorm.design.reader import shown
from mdnorm.design.roles import TableWarning
from mdnorm.extras import requires
from mdnorm.text import warn

if TYPE_CHECKING:
    import pyarrow

ARCHIVE_FORMATS = (".npz", ".safetensors")
FEATURE_FORMATS = (".npy", *ARCHIVE_FORMATS, *TABLE_FORMATS)


class InputError(ValueError):
    """What was given to audit cannot be audited; the message says what is wrong and what to do."""


def read_features(
    path: str | Path, key: str | None = None, columns: Sequence[str] = (), missing_values: Sequence[str] = ()
) -> NDArray[Any]:
    """Return the features in a file, one row for each sample.

    Parameters
    ----------
    path : str or Path
        ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.csv`` or ``.tsv``. Nothing is unpickled.
    key : str, optional
        Name of the array in an ``.npz`` or ``.safetensors`` file. It may be left out where there is only one
        array, or one of the name "features".
    columns : sequence of str
        Of a table: names and patterns such as "voxel_*" of the columns that are features. By default all
        numbers but the index of a DataFrame, identifiers and codes; a warning says which are left out.
    missing_values : sequence of str
        Of a table: further texts that stand for a missing value, such as ``"?"``.

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
    with as_input_error():
        suffix = checked_suffix(path, FEATURE_FORMATS, "features")
    if key is not None and suffix not in ARCHIVE_FORMATS:
        raise InputError(f"{path} has no named arrays, so a key ({key!r}) says nothing: leave it out.")
    if columns and suffix not in TABLE_FORMATS:
        names = ", ".join(map(repr, columns))
        raise InputError(f"{path} has no named columns, so columns ({names}) say nothing: leave them out.")
    with as_input_error():
        if suffix == ".npy":
            values = _read_npy(path)
        elif suffix == ".npz":
            values = _read_npz(path, key)
        elif suffix == ".safetensors":
            values = _read_safetensors(path, key)
        else:
            values = _read_columns(path, columns, missing_values)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{path} holds values of dtype {values.dtype}: features must be real numbers.")
    return values


def read_table(path: str | Path, missing_values: Sequence[str] = ()) -> pyarrow.Table:
    """Return a table of metadata without the index of a DataFrame, its types found from all values.

    The file is ``.csv`` with a header (separated by commas, semicolons or tabs), ``.tsv`` or ``.parquet``.
    Empty cells and NA, NaN, n/a, null are missing, and so are the texts `missing_values`.

    Raises
    ------
    InputError
        The file is missing, empty, truncated or of another format, two columns have the same name, or a
        column of numbers has an odd cell or decimal commas, which would make it a category.
    """
    with as_input_error():
        return read_table_file(Path(path), missing_values)


@contextmanager
def as_input_error(prefix: str = "") -> Iterator[None]:
    """Turn what a part of mdnorm says about arguments into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{prefix}{error}") from error


def _read_npy(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            raise InputError(f"{path} is an archive, not an array: name it .npz.")
    ArrayFile(path)  # Says what is wrong with a damaged file.
    values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
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
        why = str(error)
        if "pickle" in why or "Python objects" in why:
            why = "it is damaged, or holds Python objects, which are never loaded since they could run code."
        raise InputError(f"{path} cannot be read as an archive of arrays: {why}") from error


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
    if key is None:
        key = names[0] if len(names) == 1 else "features"
        if key not in names:
            raise InputError(
                f"{path} holds several arrays or none ({shown}): say which with the key of the features."
            )
    if key not in names:
        raise InputError(f"{path} has no array {key!r}; it has {shown}.")
    return key


def matching(names: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """Return the names that agree with any of the patterns ("age", "voxel_*"), each of which has some."""
    found: set[str] = set()
    for pattern in patterns:
        agreeing = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not agreeing:
            raise InputError(f"no {where} {pattern!r}; there are {', '.join(map(repr, names))}.")
        found |= {*agreeing}
    return [name for name in names if name in found]


def _read_columns(path: Path, columns: Sequence[str], missing_values: Sequence[str]) -> NDArray[Any]:
    table = open_table(path, missing_values)
    names, left_alone = chosen_features(table, columns or None)
    if left_alone:
        reasons = [f"{name or '(no name)'} ({reason})" for name, reason in left_alone.items()]
        warn(
            f"{path}: these columns are not taken as features: {shown(reasons, 20)}. If any is one, "
            "name the features (columns=, --columns).",
            TableWarning,
        )
    batches = [
        np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
        for batch in table.batches(names, 2**16, names)
    ]
    values: NDArray[Any] = np.concatenate(batches).astype(np.float64, copy=False)
    return values
