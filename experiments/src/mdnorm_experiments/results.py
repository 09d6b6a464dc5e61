"""The rows of an experiment on disk: one a finished run, never lost and never computed twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from mdnorm.files import write_text_atomically

Row = dict[str, Any]


class ResultsError(Exception):
    """The results file cannot be used; the message says which and what to do."""


class ResultStore:
    """The list of rows in ``results.json``, in a folder that exists, to which several processes may add.

    A run counts as finished when a row agrees with all of its settings, so a changed setting is a new run and
    old rows stay. ResultsError for a file that is truncated or holds something else; it is never overwritten.

    Each run is claimed by one process. Claims are files in the folder ``.claims`` beside the rows; what a
    process holds is free again however it dies: the operating system gives up its locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.claims = path.parent / ".claims"
        self.rows: list[Row] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the rows that all processes have added so far."""
        if self.path.exists():
            self.rows = _read(self.path)

    def find(self, settings: Mapping[str, Any]) -> Row | None:
        """Return the row of the run with these settings, or None."""
        wanted = settings.items()
        return next((row for row in self.rows if all(k in row and row[k] == v for k, v in wanted)), None)

    def add(self, settings: Row, measured: Row) -> Row:
        """Append the row of a run and write the file: complete in its old or its new form at any moment.

        Returns the row; where another process has added one with these settings, that one, and adds none.
        Raises ValueError, and writes nothing, where a value is not finite or no JSON value.
        """
        with self._lock("results"):
            self.refresh()
            if (found := self.find(settings)) is not None:
                return found
            row = settings | measured
            rows = [*self.rows, row]
            # One row a line: a file of thousands of rows stays readable and diffs well.
            lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
            write_text_atomically(self.path, f"[\n{lines}\n]\n")
            self.rows = rows
        return row

    @contextmanager
    def claim(self, settings: Mapping[str, Any]) -> Iterator[bool]:
        """Hold the run with these settings; False where another process does."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock(self, name: str) -> BaseFileLock:
        self.claims.mkdir(exist_ok=True)
        return FileLock(self.claims / f"{name}.lock")

    def clear_claims(self) -> None:
        """Remove the files of the claims, once every run has its row or no other process is at work."""
        shutil.rmtree(self.claims, ignore_errors=True)


def _read(path: Path) -> list[Row]:
    advice = "move it away to start anew, or repair it; it was not touched."
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not complete JSON ({error}): {advice}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ResultsError(f"{path} does not hold a list of rows: {advice}")
    return rows
