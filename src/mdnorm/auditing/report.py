"""The report of an audit: findings, numbers, figures, one page."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdnorm.auditing.columns import Column
from mdnorm.auditing.findings import describe, number, percent, verdict_of
from mdnorm.auditing.results import ColumnAudit, FeatureSet, Finding, Projection
from mdnorm.auditing.settings import Settings
from mdnorm.extras import requires
from mdnorm.files import write_text_atomically
from mdnorm.plain import as_plain
from mdnorm.text import short

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One column in the table of verdicts."""

    column: ColumnAudit
    # The worst of its decisive findings.
    level: str
    # The decisive findings that are verdicts, and all of them.
    verdicts: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    # Of each set of features title, dcor², whitened dcor² and probe, as text.
    cells: tuple[tuple[str, str, str, str], ...]

    @property
    def words(self) -> str:
        """The verdicts in a few words."""
        return "; ".join(dict.fromkeys(finding.badge for finding in self.verdicts))


@dataclass(frozen=True)
class Report:
    """What an audit found. Made by `mdnorm.audit`.

    In a notebook it shows itself; elsewhere ``print(report)`` lists the findings, `save` writes the page.

    The `findings` are verdicts with their sentences, from harm to none, and `columns` the measures of every
    metadata column in the order of the verdicts, then of the `label`. `left_out` are columns that cannot be
    audited (constants, identifiers), each with a `note` that says why; `notes` say what was done to the rows,
    such as leaving out missing values or sampling. The `sets` of features are, by name, the treatments, on
    training and held-out rows if there are such. `settings` say how it was measured, and the limits of the
    verdicts; `similarity` is the centred kernel alignment (linear, debiased) of the features of the first and
    last treatment; `facts` are date, rows given and used, shapes, a fingerprint of the data, settings,
    versions.
    """

    findings: tuple[Finding, ...]
    columns: tuple[ColumnAudit, ...]
    left_out: tuple[Column, ...]
    notes: tuple[str, ...]
    label: str | None
    sets: Mapping[str, FeatureSet] = field(repr=False)
    settings: Settings
    similarity: float | None
    facts: Mapping[str, Any]
    projections: Mapping[str, Projection] = field(repr=False)
    values: tuple[Column, ...] = field(repr=False)

    @property
    def titles(self) -> dict[str, str]:
        """What the reader calls the sets of features."""
        return {key: part.full_title for key, part in self.sets.items()}

    @property
    def limits(self) -> str:
        """The limits of the verdicts in words."""
        settings = self.settings
        return (
            f"A column shows harm where a probe comes {percent(settings.max_probe)} of the way from chance "
            f"to a perfect score (R² {settings.max_probe:g}, {percent(0.5 + settings.max_probe / 2)} "
            f"balanced accuracy of two classes), dcor² reaches {settings.max_dcor2:g}, or a rate differs by "
            f"{100 * settings.max_gap:g} points between two groups. “Found” means above chance at the "
            f"{percent(settings.alpha)} level for all columns together; “not found” means below these limits "
            f"with {percent(settings.confidence)} confidence; otherwise it cannot be decided."
        )

    def __str__(self) -> str:
        lines = [f"[{finding.badge}] {finding.text}" for finding in self.findings]
        return "\n".join([*lines, *(f"[note] {note}" for note in self.notes)])

    def table(self) -> list[Row]:
        """Return the verdict on every column, from harm to none."""
        rows = []
        for column in self.columns:
            findings = tuple(finding for finding in self.findings if finding.column == column.name)
            cells = []
            for key, part in column.representations.items():
                whitened = "–" if part.whitened is None else number(part.whitened.value, 3)
                dependence, probe = part.shown_dependence, part.shown_probe
                cells.append((self.titles[key], describe(dependence), whitened, describe(probe)))
            verdicts = tuple(each for each in findings if each.is_decisive and each.level != "note")
            rows.append(Row(column, verdict_of(findings), verdicts, findings, tuple(cells)))
        return rows

    def markdown(self) -> str:
        """Return the verdicts as a Markdown table, for a model card."""

        def cell(text: str) -> str:
            return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)

        lines = ["| column | features | dcor² | best probe | verdict |", "| --- | --- | --- | --- | --- |"]
        for row in self.table():
            name, words = short(row.column.name), row.words
            for title, dependence, _, probe in row.cells:
                lines.append(f"| {' | '.join(map(cell, (name, title, dependence, probe, words)))} |")
                name = words = ""
        lines += ["", f"{self.facts['rows_used']} rows, {self.facts['date']}. {self.limits}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the projections as JSON values; undefined numbers are None."""
        plain: dict[str, Any] = as_plain(
            {
                "schema_version": SCHEMA_VERSION,
                "facts": self.facts,
                "label": self.label,
                "titles": self.titles,
                "verdicts": {
                    row.column.name: {"level": row.level, "words": row.words} for row in self.table()
                },
                "findings": self.findings,
                "notes": self.notes,
                "columns": self.columns,
                "left_out": [
                    {"name": column.name, "kind": column.kind, "note": column.note}
                    for column in self.left_out
                ],
                "similarity": self.similarity,
                "explained_variance": {key: part.shares for key, part in self.projections.items()},
            }
        )
        return plain

    def save(self, out: Path | str) -> Path:
        """Write ``report.html``, ``report.json``, then ``figures/`` (PNG and PDF) into a folder.

        The folder `out` is made if it does not exist, and files of the same names are replaced. Returned is
        the path of the page: one file with everything inside, nothing loaded from elsewhere.

        Raises
        ------
        OSError
            The folder cannot be written.
        mdnorm.extras.MissingExtraError
            jinja2, plotly or matplotlib is missing.
        """
        from mdnorm.auditing import figures
        from mdnorm.plotting import save_figure

        folder = Path(out)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        write_text_atomically(folder / "report.json", text + "\n")
        page = folder / "report.html"
        write_text_atomically(page, self.to_html())
        titles = self.titles_of_projections
        projected = {key: (titles[key], part) for key, part in self.projections.items()}
        drawn = figures.all_figures(self.columns, self.values, self.sets, self.label, projected)
        for name, figure in drawn.items():
            save_figure(figure, folder / "figures" / f"{name}.png")
        return page

    def to_html(self) -> str:
        """Return the page; MissingExtraError where jinja2 or plotly is missing."""
        with requires("audit"):
            from plotly.offline import get_plotlyjs

            from mdnorm.auditing import plots

        by_name = {column.name: column for column in self.values}
        rows = self.table()
        panels: list[dict[str, Any]] = [
            {
                "row": row,
                "plots": plots.column_plots(row.column, position, self.sets, self.label),
                "projections": plots.projection_plots(
                    row.column, position, self.projections, self.titles_of_projections
                ),
            }
            for position, row in enumerate(rows)
        ]
        overview = plots.overview_plots(self.columns, self.sets, self.label)
        gap_plots = plots.gap_plots(self.columns, self.sets)
        every = [*overview, *gap_plots]
        for panel in panels:
            every += [*panel["plots"], *panel["projections"]]
        figures = {
            "plots": {plot.identifier: plot.values for plot in every},
            "columns": [plots.point_values(by_name[row.column.name], self.projections) for row in rows],
            **plots.shared_values(self.projections, by_name.get(self.label or "")),
            "colours": plots.COLOURS,
            "class_colours": plots.CLASS_COLOURS,
        }
        return self._rendered(
            "audit.html",
            project=self.facts.get("project"),
            rows=rows,
            overview=overview,
            gap_plots=gap_plots,
            panels=panels,
            colours=plots.COLOURS,
            # "<" cannot end the script element early when it is written as an escape.
            figures=json.dumps(figures, separators=(",", ":")).replace("<", "\\u003c"),
            plotly=get_plotlyjs(),
        )

    @property
    def titles_of_projections(self) -> dict[str, str]:
        """What the reader calls the treatments."""
        return {part.treatment: part.title for part in self.sets.values()}

    def _repr_html_(self) -> str:
        """Return findings, table and the overview figure for a notebook, without scripts."""
        from mdnorm.auditing import figures

        picture = io.BytesIO()
        overview = figures.overview(self.columns, self.sets, self.label)
        if overview is not None:
            overview.savefig(picture, format="png", dpi=110)
        return self._rendered("notebook.html", image=base64.b64encode(picture.getvalue()).decode("ascii"))

    def _rendered(self, template: str, **values: Any) -> str:
        with requires("audit"):
            from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("mdnorm.auditing"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["short"] = short
        return environment.get_template(template).render(report=self, **values)
