"""Reading real data: tables of text, and what is wrong with them and with files, told at once."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MISSING = frozenset({"", "n/a", "na", "nan", "none", "null"})


class DataProblemsError(Exception):
    """Files or rows of a data set cannot be used; the message lists every one of them."""


@dataclass
class Problems:
    """Collects problems, so that all are told at once and nothing is dropped in silence.

    Each is (kind, subject, detail), as in ("no image", "sub-07", "sub-07/anat has no *_T1w.nii.gz").
    """

    found: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, kind: str, subject: str, detail: str) -> None:
        """Note that `subject` (a file, a row, a person) has a problem of some kind."""
        self.found.append((kind, subject, detail))

    def __bool__(self) -> bool:
        return bool(self.found)

    def text(self) -> str:
        """Return one line a problem, below a line with their number by kind; "" without problems."""
        if not self.found:
            return ""
        counts = Counter(kind for kind, _, _ in self.found)
        head = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
        lines = [f"  {kind}: {subject}: {detail}" for kind, subject, detail in self.found]
        return "\n".join([f"{len(self.found)} problem(s) in the data ({head}):", *lines])

    def classes(self, labels: Iterable[str], needed: str) -> tuple[str, ...]:
        """Return the different labels of what is left, sorted.

        Raises ValueError for fewer than two: the message begins with what is `needed`, as in "labels.csv must
        have two labels or more", and lists the problems, since what was left out may be why.
        """
        names = tuple(sorted(set(labels)))
        if len(names) < 2:
            text = f"{needed}, got {', '.join(names) or 'none'}."
            raise ValueError("\n".join(filter(None, (text, self.text()))))
        return names

    def settle(self, on_problem: str) -> None:
        """Raise DataProblemsError if there are problems, or go on without what was noted ("skip").

        Raises ValueError where `on_problem` is neither "error" nor "skip".
        """
        if on_problem not in ("error", "skip"):
            raise ValueError(f"on_problem must be 'error' or 'skip', got {on_problem!r}.")
        if self.found and on_problem == "error":
            raise DataProblemsError(f"{self.text()}\nRepair the data, or leave these out (skip).")


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


def read_rows(
    path: Path, delimiter: str, wanted: Mapping[str, Sequence[str]], given: Mapping[str, str] | None = None
) -> list[tuple[str, dict[str, str]]]:
    """Return where each row of a table stands ("line 7 of labels.csv"), and its cells by what they hold.

    See `column_names` for what is looked for. Cells are stripped; blank lines are left out, and cells that a
    row lacks at its end are empty. Raises ValueError where the file is empty or not UTF-8, a quotation has no
    end, a row has more cells than the header, or a column is missing or there twice.
    """
    rows: list[tuple[str, list[str]]] = []
    separator = "tabs" if delimiter == "\t" else f"{delimiter!r}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise ValueError("there is no header")
            line = reader.line_num
            for cells in reader:
                stripped = [cell.strip() for cell in cells]
                if any(stripped[len(header) :]):
                    raise ValueError(f"line {line + 1} has {len(cells)} cells, the header {len(header)}")
                if any(stripped):
                    lacking = [""] * (len(header) - len(stripped))
                    rows.append((f"line {line + 1} of {path.name}", stripped + lacking))
                line = reader.line_num
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a table (UTF-8, a header, columns separated by {separator}): {error}."
        ) from error
    names = column_names(path, header, wanted, given)
    repeated = [name for name in names.values() if header.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has more than one column of the name {', '.join(repeated)}.")
    places = {part: header.index(name) for part, name in names.items()}
    return [(where, {part: cells[place] for part, place in places.items()}) for where, cells in rows]
