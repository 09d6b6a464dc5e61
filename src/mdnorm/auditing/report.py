"""The report of an audit: findings, numbers, figures, one page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdnorm.auditing.columns import Column
from mdnorm.auditing.findings import describe, p_text
from mdnorm.auditing.results import ColumnAudit, Finding, Projection, as_json
from mdnorm.extras import requires
from mdnorm.files import write_text_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What an audit found. Made by `mdnorm.audit`.

    In a notebook it shows itself; elsewhere ``print(report)`` lists the findings, `save` writes the page.

    Attributes
    ----------
    findings : tuple of Finding
        Sentences in plain words, each with a level: "strong", "weak", "none", or "note".
    columns : tuple of ColumnAudit
        The measures of every metadata column, then of the label.
    left_out : tuple of Column
        Columns that cannot be audited (constants, identifiers); their `note` says why.
    notes : tuple of str
        What was done to the rows: missing values, sampling.
    label : str or None
        Name of the label.
    titles : mapping
        "before", "after" → how the page calls these features.
    similarity : float or None
        Centred kernel alignment (linear, debiased) of the features before and after.
    facts : mapping
        Rows given and used, shapes, seed, settings, versions.
    """

    findings: tuple[Finding, ...]
    columns: tuple[ColumnAudit, ...]
    left_out: tuple[Column, ...]
    notes: tuple[str, ...]
    label: str | None
    titles: Mapping[str, str]
    similarity: float | None
    facts: Mapping[str, Any]
    projections: Mapping[str, Projection] = field(repr=False)
    values: tuple[Column, ...] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"[{finding.badge}] {finding.text}" for finding in self.findings]
        return "\n".join([*lines, *(f"[note] {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the projections as JSON values; undefined numbers are None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "facts": as_json(dict(self.facts)),
            "label": self.label,
            "titles": dict(self.titles),
            "findings": [as_json(finding) for finding in self.findings],
            "notes": list(self.notes),
            "columns": [as_json(column) for column in self.columns],
            "left_out": [
                {"name": column.name, "kind": column.kind, "note": column.note} for column in self.left_out
            ],
            "similarity_before_after": as_json(self.similarity),
            "explained_variance": {key: as_json(part.shares) for key, part in self.projections.items()},
        }

    def save(self, out: Path | str) -> Path:
        """Write ``report.html``, ``report.json`` and ``figures/`` (PNG and PDF) into a folder.

        Parameters
        ----------
        out : Path or str
            The folder; it is made if it does not exist. Files of the same names are replaced.

        Returns
        -------
        Path
            Of the page: one file with everything inside, nothing loaded from elsewhere.

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
        for name, figure in figures.all_figures(self).items():
            save_figure(figure, folder / "figures" / f"{name}.png")
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        write_text_atomically(folder / "report.json", text + "\n")
        page = folder / "report.html"
        write_text_atomically(page, self.to_html())
        return page

    def to_html(self) -> str:
        """Return the page.

        Raises
        ------
        mdnorm.extras.MissingExtraError
            jinja2 or plotly is missing.
        """
        with requires("audit"):
            from jinja2 import Environment, PackageLoader, StrictUndefined
            from plotly.offline import get_plotlyjs

            from mdnorm.auditing import plots

        environment = Environment(
            loader=PackageLoader("mdnorm.auditing"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        by_name = {column.name: column for column in self.values}
        label = by_name.get(self.label or "")
        panels: list[dict[str, Any]] = []
        for position, column in enumerate(self.columns):
            shown = by_name[column.name]
            panels.append(
                {
                    "column": column,
                    "findings": [finding for finding in self.findings if finding.column == column.name],
                    "level": self.level(column),
                    "plots": plots.column_plots(column, position, self.titles, self.label),
                    "projections": plots.projection_plots(
                        shown, None if column.is_label else label, position, self.projections, self.titles
                    ),
                }
            )
        overview = plots.overview_plots(self.columns, self.titles, self.label)
        every = list(overview)
        for panel in panels:
            every += [*panel["plots"], *panel["projections"]]
        # "<" cannot end the script element early when it is written as an escape.
        figures = ",".join(f"{json.dumps(plot.identifier)}:{plot.figure}" for plot in every)
        return environment.get_template("audit.html").render(
            report=self,
            overview=overview,
            panels=panels,
            figures=figures.replace("<", "\\u003c"),
            plotly=get_plotlyjs(),
            rows=self.summary_rows(),
            headings=self.summary_headings(),
        )

    def level(self, column: ColumnAudit) -> str:
        """Return the level of a column: of its change, or of the only set of features."""
        levels = [
            finding.level
            for finding in self.findings
            if finding.column == column.name and finding.topic in ("change", "dependence")
        ]
        return levels[0] if levels else "note"

    def summary_headings(self) -> list[str]:
        """Return the headings of `summary_rows`."""
        return [
            "Metadata column",
            "Features",
            "dcor²",
            f"dcor² within {self.label}" if self.label else "dcor² (p)",
            "Best probe",
            f"Best probe within {self.label}" if self.label else "Probe (p)",
        ]

    def summary_rows(self) -> list[list[str]]:
        """Return one line for each column and set of features, as text."""
        rows = []
        for column in self.columns:
            for key, representation in column.representations.items():
                best = representation.best_probe[1]
                within = representation.best_probe_within
                if self.label:
                    inside = representation.dependence_within
                    cells = [
                        describe(inside) if inside else "–",
                        describe(best),
                        describe(within[1]) if within else "–",
                    ]
                else:
                    cells = [p_text(representation.dependence.p_value), describe(best), p_text(best.p_value)]
                rows.append(
                    [
                        f"{column.name} (label)" if column.is_label else column.name,
                        self.titles[key],
                        describe(representation.dependence),
                        *cells,
                    ]
                )
        return rows

    def _repr_html_(self) -> str:
        """Return findings, table and the overview figure for a notebook, without scripts."""
        from mdnorm.auditing import figures

        colours = {"strong": "#b3261e", "weak": "#9a6700", "none": "#1a7f37", "note": "#57606a"}
        items = "".join(
            f'<li><b style="color:{colours[finding.level]}">{finding.badge}</b>: {escape(finding.text)}</li>'
            for finding in self.findings
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.summary_headings())
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.summary_rows()
        )
        image = ""
        overview = figures.overview(self)
        if overview is not None:
            image = (
                '<img alt="Dependence and best probe of every column" style="max-width:100%;background:white"'
                f' src="data:image/png;base64,{_png(overview)}">'
            )
        return (
            f"<div><h3>Audit of {self.facts['rows_used']} samples</h3><ul>{items}</ul>{notes}"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{image}</div>"
        )


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def titles_of(keys: Sequence[str], names: tuple[str, str] | None) -> dict[str, str]:
    """Return how sets of features are called."""
    if names is not None:
        return dict(zip(keys, names, strict=False))
    if len(keys) == 1:
        return {keys[0]: "these features"}
    return {"before": "the features before", "after": "the features after"}
