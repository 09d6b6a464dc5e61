"""What a table in a file is, and how what is wrong with one is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdnorm.extras import requires
from mdnorm.text import listed

if TYPE_CHECKING:
    import pyarrow

    from mdnorm.design.files import TableFile


class TableFileError(ValueError):
    """A file cannot be used as a table; the message says which, why, and what to do."""


def check_columns(table: TableFile, columns: Iterable[str]) -> None:
    """Raise where a table lacks columns, or has several of one name."""
    known = set(table.names)
    for name in columns:
        if name not in known:
            raise TableFileError(f"{table.path} has no column {name!r}; it has {listed(table.header, 8)}.")
        if name in table.repeated:
            raise TableFileError(f"{table.path} has more than one column of the name {name!r}.")


def different_names(header: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return names that are all different for the columns of a file, and which of them share one in it.

    A further column of a name has another one, by which nobody asks for it.
    """
    counts = Counter(header)
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        # A control character no header has.
        names.append(f"{name}\x1f{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return tuple(names), {own: name for own, name in zip(names, header, strict=True) if counts[name] > 1}


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong below into a TableFileError that names the file."""
    with requires("tables"):
        import pyarrow
    try:
        yield
    except TableFileError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in text:
            raise TableFileError(f"{path} is not UTF-8: save it as UTF-8.") from error
        if "straddling object" in text:
            raise TableFileError(
                f'{path}: a row is longer than the block that is read at once: a quote (") is probably not '
                "closed."
            ) from error
        if "conversion error" in text:
            text += (
                ". Correct the cell, or say that it is a missing value: missing_values=[…] (--missing-values)"
            )
        raise TableFileError(f"{path} cannot be read as {kind}: {text}") from error


def is_number_type(kind: pyarrow.DataType) -> bool:
    """Whether a type is one of integers or floating-point numbers."""
    import pyarrow.types as kinds

    return bool(kinds.is_integer(kind) or kinds.is_floating(kind))


def without_missing(values: pyarrow.Array, missing: Sequence[str]) -> pyarrow.Array:
    """Return texts with those that stand for a missing value as null."""
    import pyarrow
    from pyarrow import compute

    is_missing = compute.is_in(compute.utf8_trim_whitespace(values), value_set=pyarrow.array(missing))
    # No if_else of the values themselves: pyarrow 15 to 23 at least mix up the texts of slices in it.
    rows = pyarrow.array(np.arange(len(values)))
    return values.take(compute.if_else(is_missing, pyarrow.scalar(None, rows.type), rows))
