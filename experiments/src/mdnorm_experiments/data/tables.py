"""Tables of text beside the files of a data set: every cell as it is written, every row with its place."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MISSING = frozenset({"", "n/a", "na", "nan", "none", "null"})


def is_missing(text: str) -> bool:
    """Whether a cell says that there is no value."""
    return text.strip().lower() in _MISSING


def column_names(
    path: Path,
    available: Sequence[str],
    wanted: Mapping[str, Sequence[str]],
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return which column of the table at a path holds what, of those that are `available`.

    `wanted` is what is looked for → what its column may be called, in order of preference, and `given` the
    name that it has here instead. ValueError where a name is given for something else, or there is no such
    column: the message lists those of the table.
    """
    given = given or {}
    unknown = sorted(given.keys() - wanted.keys())
    if unknown:
        raise ValueError(f"columns may name {', '.join(wanted)}, got {', '.join(unknown)}.")
    found = {}
    for part, usual in wanted.items():
        names = [given[part]] if part in given else usual
        present = [name for name in names if name in available]
        if not present:
            raise ValueError(
                f"{path} has no column for the {part} ({' or '.join(names)}); it has {', '.join(available)}. "
                f"Name another by columns: {part}=NAME."
            )
        found[part] = present[0]
    return found


@dataclass(frozen=True)
class TextTable:
    """A table as it was read: the header, and of each row its line and a stripped cell for each column."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    def walk(self, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield where each row stands ("line 7 of labels.csv") and its cells, by what they are to be called.

        `names` maps that to the column. Raises ValueError where several columns have one of the names.
        """
        repeated = [name for name in names.values() if self.columns.count(name) > 1]
        if repeated:
            raise ValueError(f"{self.path} has more than one column of the name {', '.join(repeated)}.")
        positions = {part: self.columns.index(name) for part, name in names.items()}
        for line, cells in self.rows:
            yield (
                f"line {line} of {self.path.name}",
                {part: cells[position] for part, position in positions.items()},
            )


def read_text_table(path: Path, delimiter: str) -> TextTable:
    """Read a table with a header; blank lines are left out, cells that a row lacks at its end are empty.

    Raises ValueError where the file is empty or not UTF-8, a quotation has no end, or a row has more cells
    than the header.
    """
    rows: list[tuple[int, tuple[str, ...]]] = []
    separator = "tabs" if delimiter == "\t" else f"{delimiter!r}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            columns = tuple(name.strip() for name in next(reader, []))
            if not any(columns):
                raise ValueError("there is no header")
            line = reader.line_num
            for cells in reader:
                stripped = [cell.strip() for cell in cells]
                if any(stripped[len(columns) :]):
                    raise ValueError(f"line {line + 1} has {len(cells)} cells, the header {len(columns)}")
                if any(stripped):
                    lacking = [""] * (len(columns) - len(stripped))
                    rows.append((line + 1, tuple([*stripped, *lacking][: len(columns)])))
                line = reader.line_num
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a table (UTF-8, a header, columns separated by {separator}): {error}."
        ) from error
    return TextTable(path, columns, tuple(rows))
