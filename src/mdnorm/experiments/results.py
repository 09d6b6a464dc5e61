"""The rows of an experiment on disk: one a finished run, never lost and never computed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdnorm.files import write_text_atomically

Row = dict[str, Any]


class ResultsError(Exception):
    """The results file cannot be used; the message says which and what to do."""


class ResultStore:
    """The list of rows in ``results.json``.

    Each row holds the settings of its run and what was measured. A run counts as finished when a row agrees
    with all of its settings, so a changed setting is a new run and old rows stay.

    Parameters
    ----------
    path : Path
        The file; its folder must exist. A file that cannot be read is never overwritten.

    Raises
    ------
    ResultsError
        The file is truncated or holds something else than a list of rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = _read(path)

    def find(self, settings: Mapping[str, Any]) -> Row | None:
        """Return the row of the run with these settings, or None."""
        wanted = settings.items()
        return next((row for row in self.rows if all(k in row and row[k] == v for k, v in wanted)), None)

    def add(self, row: Row) -> None:
        """Append a row and write the file: complete in its old or its new form at any moment.

        Raises
        ------
        ValueError
            A value is not finite, or no JSON value; nothing is written then.
        """
        rows = [*self.rows, row]
        # One row a line: a file of thousands of rows stays readable and diffs well.
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        write_text_atomically(self.path, f"[\n{lines}\n]\n")
        self.rows = rows


def _read(path: Path) -> list[Row]:
    advice = "move it away to start anew, or repair it; it was not touched."
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not complete JSON ({error}): {advice}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ResultsError(f"{path} does not hold a list of rows: {advice}")
    return rows
