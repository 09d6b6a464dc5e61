"""Files that are complete or absent, never half written; and how a text table is written."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` when the block ends without an error.

    Parameters
    ----------
    path : Path
        The file to make; its folder must exist. Its suffix is kept, since writers choose formats by it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; results are as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text: readers see the old file or the new one, also after a crash."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def csv_delimiter(path: Path) -> str:
    """Return what separates the columns of a text table: a tab in ``.tsv``, else as its header tells."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    # A comma in the header may also be part of a quoted name, but then no other separator is there.
    counts = {delimiter: header.count(delimiter) for delimiter in ",;\t"}
    return "," if counts[","] else max(counts, key=lambda delimiter: counts[delimiter])


# Rows of usual tables are much shorter; reading is fastest with blocks of some megabytes.
_CSV_BLOCK_BYTES = 2**22

COMMA_ROWS = 1000
"""How many values of a column are looked at for decimal commas."""
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d+,\d+\s*")


def csv_block_bytes(path: Path) -> int:
    """Return how many bytes to read at once of a text table: no row, nor the header, may be longer.

    Raises
    ------
    UnicodeDecodeError
        The header is not UTF-8.
    """
    with path.open("rb") as file:
        header, row = file.readline(), file.readline()
    header.decode("utf-8")
    # Other rows may be longer than the first one. Arrow takes no more than 2³¹ bytes.
    return min(max(_CSV_BLOCK_BYTES, 4 * len(header), 4 * len(row)), 2**31 - 1)


def repeated_names(names: Iterable[str]) -> list[str]:
    """Return the names of columns that a table has more than once, in their order in the alphabet."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def decimal_comma_problem(path: Path, column: str, values: Iterable[str | None]) -> str | None:
    """Return what is wrong with a column of text if most are numbers with a decimal comma, otherwise None.

    Such numbers (26,4) would be taken for categories. Callers give the first `COMMA_ROWS` values.
    """
    present = [value for value in values if value]
    found = [value for value in present if _DECIMAL_COMMA.fullmatch(value)]
    if 2 * len(found) <= len(present):
        return None
    return (
        f"{path}: column {column!r} has numbers with a comma, such as {found[0].strip()}, which would be "
        "taken for categories: save the table with decimal points."
    )
