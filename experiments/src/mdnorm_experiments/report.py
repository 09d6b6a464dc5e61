"""The table and the page that an experiment leaves behind."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mdnorm
from mdnorm.files import write_text_atomically
from mdnorm_experiments.data.synthetic import (
    ACCURACY_WITH_CONFOUNDER,
    ACCURACY_WITHOUT_CONFOUNDER,
    WITHOUT_LIMITS,
)
from mdnorm_experiments.results import Row

MARGIN = 0.015
"""Accuracy this far from the limit of the true effect is not chance."""


def listed(values: Iterable[float]) -> str:
    """Return the different values, ascending, as text."""
    texts = (str(value) if isinstance(value, int) else f"{value:g}" for value in sorted(set(values)))
    return ", ".join(texts)


def common_settings(seeds: Iterable[int]) -> dict[str, str]:
    """Return what the page of every experiment says of its runs: the versions, and their seeds."""
    return {"mdnorm": mdnorm.__version__, "torch": torch.__version__, "seeds": listed(seeds)}


def verdict(accuracy: float) -> str:
    """Say what an accuracy (a fraction) means against the limit of the true effect."""
    if accuracy > ACCURACY_WITHOUT_CONFOUNDER + MARGIN:
        return "confounded"
    if accuracy < ACCURACY_WITHOUT_CONFOUNDER - MARGIN:
        return "below the limit"
    return "at the limit"


def has_limits(rows: Sequence[Row]) -> bool:
    """Whether the analytic limits of the synthetic images hold for all rows."""
    return not any(row.get("variant") in WITHOUT_LIMITS for row in rows)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each method and batch size, ordered by batch size and first appearance.

    Returns
    -------
    list of dict
        "method", "batch_size", "seeds" (their number); means under the names of the rows ("bacc", "dcor2" by
        group, "seconds_per_epoch"), standard deviations (divisor n − 1; None for one seed) under
        "bacc_sd" and "dcor2_sd"; "recalibrated", these four of the recalibrated networks, or None where a row
        has none.
    """
    cells: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["batch_size"], row["method"]), []).append(row)
    summary = []
    for (batch_size, method), members in sorted(cells.items(), key=lambda cell: cell[0][0]):
        recalibrated = [row["recalibrated"] for row in members if "recalibrated" in row]
        summary.append(
            {"method": method, "batch_size": batch_size, "seeds": len(members)}
            | _means(members)
            | {
                "recalibrated": _means(recalibrated) if len(recalibrated) == len(members) else None,
                "seconds_per_epoch": statistics.fmean(row["seconds_per_epoch"] for row in members),
            }
        )
    return summary


def _means(members: Sequence[Row]) -> Row:
    accuracies = [row["bacc"] for row in members]
    by_group = {group: [row["dcor2"][group] for row in members] for group in members[0]["dcor2"]}
    return {
        "bacc": statistics.fmean(accuracies),
        "bacc_sd": _deviation(accuracies),
        "dcor2": {group: statistics.fmean(values) for group, values in by_group.items()},
        "dcor2_sd": {group: _deviation(values) for group, values in by_group.items()},
    }


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _with_deviation(mean: float, deviation: float | None, digits: int, *, signed: bool = False) -> str:
    # "+ 0.0" turns the −0 of a rounded small negative number into 0.
    rounded = round(mean, digits) + 0.0
    text = f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", "−")
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def mean_with_deviation(values: Sequence[float], digits: int, *, signed: bool = False) -> str:
    """Return "mean ± standard deviation" of the seeds of a cell, without the latter for one seed."""
    return _with_deviation(statistics.fmean(values), _deviation(values), digits, signed=signed)


HEADINGS = (
    "Method",
    "Batch size",
    "Seeds",
    "Accuracy (%)",
    "Verdict",
    "dcor² A",
    "dcor² B",
    "Recalibrated (%)",
    "dcor² A / B",
    "s / epoch",
)


def table_lines(rows: Sequence[Row], names: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the table as text, cells in the order of `HEADINGS`.

    Lines are ordered by batch size, and within each by the order of `names` (identifier to title of methods).
    """
    order = list(names)
    limited = has_limits(rows)
    cells = sorted(
        summarise(rows),
        key=lambda cell: (
            cell["batch_size"],
            order.index(cell["method"]) if cell["method"] in names else len(order),
        ),
    )
    return [
        (
            names.get(cell["method"], cell["method"]),
            str(cell["batch_size"]),
            str(cell["seeds"]),
            _percent(cell),
            verdict(cell["bacc"]) if limited else "–",
            *(_with_deviation(cell["dcor2"][group], cell["dcor2_sd"][group], 3) for group in ("A", "B")),
            *_recalibrated(cell["recalibrated"]),
            f"{cell['seconds_per_epoch']:.1f}",
        )
        for cell in cells
    ]


def _percent(cell: Row) -> str:
    deviation = None if cell["bacc_sd"] is None else 100 * cell["bacc_sd"]
    return _with_deviation(100 * cell["bacc"], deviation, 1)


def _recalibrated(cell: Row | None) -> tuple[str, str]:
    if cell is None:
        return "–", "–"
    return _percent(cell), " / ".join(_with_deviation(cell["dcor2"][group], None, 3) for group in ("A", "B"))


def limits_text() -> str:
    """Return the sentence on the analytic limits."""
    return (
        f"Analytic limits: {100 * ACCURACY_WITHOUT_CONFOUNDER:.1f} % from the true effect alone, "
        f"{100 * ACCURACY_WITH_CONFOUNDER:.1f} % with the confounder; dcor² 0 without it."
    )


NO_LIMITS = "No simple analytic limit of accuracy; dcor² 0 without the confounder."

LEGEND = (
    "Mean ± standard deviation over seeds, on held-out data. dcor² is bias-corrected, so it can be slightly "
    "negative. “Confounded”: more than 1.5 points above what the true effect allows. “Recalibrated”: the "
    "same networks with exact coefficients from the training data, and their dcor²."
)


@dataclass(frozen=True)
class ReportTable:
    """A table of text: printed, in ``table.md`` and on the page.

    Attributes
    ----------
    headings : sequence of str
    lines : sequence of sequences of str
        Cells in the order of `headings`; the first names the line.
    limits : str
        The sentence on the analytic limits, below the table everywhere.
    legend : str
        What else must be known to read it; on the page only.
    title : str
        Heading above the table on the page.
    """

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    limits: str
    legend: str = LEGEND
    title: str = "Results"

    def markdown(self) -> str:
        """Return the table in Markdown, the analytic limits below."""
        text = ["| " + " | ".join(self.headings) + " |", "| --- |" + " ---: |" * (len(self.headings) - 1)]
        for line in self.lines:
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
        return "\n".join([*text, "", self.limits + " Mean ± standard deviation over seeds.", ""])


def synthetic_table(rows: Sequence[Row], names: Mapping[str, str]) -> ReportTable:
    """Return the table of `table_lines` with the limits of the synthetic images."""
    limits = limits_text() if has_limits(rows) else NO_LIMITS
    return ReportTable(HEADINGS, table_lines(rows, names), limits)


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the page.

    Attributes
    ----------
    path : Path
        PNG file; it is embedded.
    title, alternative, caption : str
        Heading, text for readers who do not see it, and what it shows.
    """

    path: Path
    title: str
    alternative: str
    caption: str

    @property
    def data(self) -> str:
        """The image as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode("ascii")


def write_report(
    out: Path,
    *,
    title: str,
    introduction: Sequence[str],
    tables: Sequence[ReportTable],
    figures: Sequence[ReportFigure],
    settings: Mapping[str, Any],
    command: str,
) -> Path:
    """Write ``report.html`` into `out`: one file, images inside, nothing loaded from elsewhere.

    Parameters
    ----------
    out : Path
        An existing folder.
    title, introduction
        Heading and paragraphs above the tables.
    tables : sequence of ReportTable
    figures : sequence of ReportFigure
    settings : mapping
        Shown as a list at the end.
    command : str
        The command that makes the page.

    Returns
    -------
    Path
        Of the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mdnorm_experiments"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=title,
        introduction=introduction,
        tables=tables,
        figures=figures,
        settings=settings,
        command=command,
    )
    path = out / "report.html"
    write_text_atomically(path, page)
    return path
