"""What is wrong with the files of a data set, gathered before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


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
