"""The tables, the figures and the page that an experiment leaves behind."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

import mdnorm
from mdnorm.files import write_text_atomically
from mdnorm.plotting import save_figure
from mdnorm_experiments.methods import METHODS, titles
from mdnorm_experiments.results import Row


def listed(values: Iterable[object]) -> str:
    """Return the different values, ascending where they are numbers, as text."""
    different = set(values)
    if all(isinstance(value, int | float) for value in different):
        return ", ".join(f"{value:g}" for value in sorted(different))  # type: ignore[type-var]
    return ", ".join(sorted(map(str, different)))


def mean_with_deviation(values: Sequence[float], digits: int, *, signed: bool = False) -> str:
    """Return "mean ± standard deviation" of the seeds of a cell, without the latter for one; "–" for none."""
    if not values:
        return "–"
    # "+ 0.0" turns the −0 of a rounded small negative number into 0.
    rounded = round(statistics.fmean(values), digits) + 0.0
    text = f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", "−")
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each method, in the order of `METHODS`."""
    return {
        name: [row for row in rows if row["method"] == name] for name in titles({r["method"] for r in rows})
    }


@dataclass(frozen=True)
class ReportTable:
    """A table of text: printed, in ``table.md`` and on the page.

    The first cell names the line. `limits` is the sentence below the table everywhere, `legend` what else
    must be known to read it, on the page only. Where the cell number `section` changes, a rule is printed.
    """

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    limits: str
    legend: str
    title: str = "Results"
    section: int | None = None

    def markdown(self) -> str:
        """Return the table in Markdown, the analytic limits below."""
        text = ["| " + " | ".join(self.headings) + " |", "| --- |" + " ---: |" * (len(self.headings) - 1)]
        for line in self.lines:
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
        return "\n".join([*text, "", self.limits + " Mean ± standard deviation over seeds.", ""])


@dataclass(frozen=True)
class ReportFigure:
    """A figure: its name as a file, heading, text for readers who do not see it, and what it shows."""

    name: str
    figure: Figure
    title: str
    alternative: str
    caption: str


def write_page(
    out: Path,
    *,
    tables: Sequence[ReportTable],
    figures: Sequence[ReportFigure],
    rows: Sequence[Row],
    row_names: Mapping[str, str],
    **texts: str | Sequence[str],
) -> Path:
    """Write ``table.md``, the figures and ``report.html`` (one file that stands alone); return its path.

    `out` exists; the settings of `rows` are listed at the end, by `row_names` (see `Setting`); `texts` are
    "title", "introduction" and "command", which makes the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mdnorm_experiments"), autoescape=True, undefined=StrictUndefined
    )
    text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables)
    write_text_atomically(out / "table.md", text)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    embedded = []
    for shown in figures:
        image = save_figure(shown.figure, folder / f"{shown.name}.png").read_bytes()
        source = "data:image/png;base64," + base64.b64encode(image).decode("ascii")
        embedded.append((shown, source))
    template, settings = environment.get_template("report.html"), _settings(rows, row_names)
    page = template.render(tables=tables, figures=embedded, settings=settings, **texts)
    path = out / "report.html"
    write_text_atomically(path, page)
    return path


def _settings(rows: Sequence[Row], row_names: Mapping[str, str]) -> dict[str, str]:
    """Return what the page says of the runs: versions, settings, and the options of each method."""
    epochs = row_names["epochs"]
    schedules = sorted({(row["batch_size"], row[epochs], row["learning_rate"]) for row in rows})
    found = {
        "mdnorm": mdnorm.__version__,
        "torch": torch.__version__,
        "seeds": listed(row["seed"] for row in rows),
        epochs.replace("_", " "): "; ".join(
            f"batch size {size}: {count} epochs from {rate:g}" for size, count, rate in schedules
        ),
        "optimiser": "Adam, learning rate falling to 0 by a half cosine",
    }
    for name in row_names.values():
        if name != epochs:
            found[name.replace("_", " ")] = listed(row[name] for row in rows)
    options = ("degree", "options", "penalty", "adversary", "dependence", "weights", "group_dro", "head")
    for name, members in by_method(rows).items():
        own = {key: members[0][key] for key in options if key in members[0]}
        if own:
            found[METHODS[name].title] = str(own)
    return found
