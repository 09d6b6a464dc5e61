"""``mdnorm audit``: what do these features know?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mdnorm.commands.common import BAD_INPUT, command_line, errors, fail, make_folder, only_writer
from mdnorm.extras import MissingExtraError

if TYPE_CHECKING:
    from mdnorm.auditing.columns import Column
    from mdnorm.auditing.report import Report

_COLOURS = {"strong": "red", "weak": "yellow", "none": "green", "note": "dim"}


def audit(
    features: Annotated[
        Path,
        typer.Argument(help="Features, one row a sample: .npy, .npz, .safetensors, .parquet, .csv, .tsv."),
    ],
    metadata: Annotated[
        Path, typer.Argument(help="Metadata of the same samples in the same order: .csv, .tsv, .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, report.json and figures.")] = Path(
        "results/audit"
    ),
    label: Annotated[
        str | None, typer.Option(help="Metadata column that the features are meant to know.")
    ] = None,
    after: Annotated[
        Path | None, typer.Option(help="Features of the same samples after a treatment, to compare.")
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(help="Metadata column with the predicted labels, for the gaps between groups."),
    ] = None,
    prediction_after: Annotated[
        str | None, typer.Option(help="The same of the model after the treatment.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Metadata column with the predicted probability, for the calibration.")
    ] = None,
    score_after: Annotated[str | None, typer.Option(help="The same after the treatment.")] = None,
    positive: Annotated[str | None, typer.Option(help="The positive class. [default: the larger]")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=continuous or COLUMN=categorical, where the inferred kind is wrong."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Metadata column to leave out, or a pattern such as 'voxel_*'.")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(help="Metadata column that says whose sample it is, where subjects have several."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="What to call the features; twice where there are features after."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Name of the array in .npz and .safetensors files. [default: features]")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Of a table of features: names and patterns, such as 'volume,voxel_*'.")
    ] = "",
    max_rows: Annotated[int, typer.Option(min=20, help="More rows than this are sampled.")] = 2000,
    permutations: Annotated[int, typer.Option(min=19, help="Of each probe.")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what features know of each metadata column, before and after a treatment.

    Writes one page (report.html, nothing loaded from elsewhere), report.json and figures. Exit code 2: the
    inputs cannot be audited, and the message says why.
    """
    try:
        from mdnorm import auditing
        from mdnorm.auditing.audit import number_of_steps
        from mdnorm.auditing.columns import as_columns

        chosen = [part.strip() for part in columns.split(",") if part.strip()]
        values, values_after = _read_features(features, after, key, chosen)
        table = auditing.read_table(metadata)
        names = _names(name or [], 1 if after is None else 2)
        read = as_columns(table, _kinds(kind or []), ignore or [])
        if not json_output:
            _print_kinds(read)
        make_folder(out)
        used = [part for part in (prediction, prediction_after, score, score_after, subject) if part]
        count = sum(column.is_auditable and column.name not in used for column in read)
        with only_writer(out):
            total = number_of_steps(count, 1 if after is None else 2)
            with _progress_bar() as progress:
                task = progress.add_task("", total=total)

                def step(text: str) -> None:
                    progress.update(task, advance=1, description=text)

                report = auditing.audit(
                    values,
                    read,
                    label,
                    after=values_after,
                    predictions=prediction,
                    predictions_after=prediction_after,
                    scores=score,
                    scores_after=score_after,
                    positive=positive,
                    subjects=subject,
                    names=names,
                    max_rows=max_rows,
                    settings=auditing.Settings(num_permutations=permutations, seed=seed),
                    facts={
                        "command": command_line(),
                        "features_file": str(features),
                        "metadata_file": str(metadata),
                    },
                    progress=step,
                )
                progress.update(task, completed=total, description="done")
            page = report.save(out)
    except (ValueError, MissingExtraError) as error:
        fail(str(error), BAD_INPUT)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or out}", BAD_INPUT)
    if json_output:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_findings(report)
        typer.echo(f"\nReport: {page}\nNumbers: {out / 'report.json'}\nFigures: {out / 'figures'}")


def _read_features(before: Path, after: Path | None, key: str | None, columns: list[str]) -> tuple[Any, Any]:
    """Return both sets of features; an option is for whichever files it can be meant for."""
    from mdnorm.auditing.reading import ARCHIVE_FORMATS, TABLE_FORMATS, read_features

    paths = [before] if after is None else [before, after]

    def is_for(path: Path, formats: tuple[str, ...]) -> bool:
        # Where it is for none of the files, the reader says so.
        return path.suffix.lower() in formats or not any(p.suffix.lower() in formats for p in paths)

    read = [
        read_features(
            path,
            key if is_for(path, ARCHIVE_FORMATS) else None,
            columns if is_for(path, TABLE_FORMATS) else (),
        )
        for path in paths
    ]
    return read[0], None if after is None else read[1]


def _kinds(texts: Sequence[str]) -> dict[str, str]:
    kinds = {}
    for text in texts:
        column, separator, kind = text.rpartition("=")
        if not separator:
            fail(f"--kind {text!r}: give COLUMN=continuous or COLUMN=categorical.", BAD_INPUT)
        kinds[column] = kind
    return kinds


def _names(texts: Sequence[str], count: int) -> tuple[str, str] | None:
    if not texts:
        return None
    if len(texts) != count:
        fail(f"--name was given {len(texts)} time(s), but there are {count} set(s) of features.", BAD_INPUT)
    return (texts[0], texts[-1])


def _progress_bar() -> Progress:
    bar: Any = BarColumn()
    return Progress(
        bar,
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=errors,
        disable=not errors.is_terminal,
    )


def _print_kinds(columns: Sequence[Column]) -> None:
    for column in columns:
        text = column.describe() if column.is_auditable else column.note
        errors.print(f"{escape(column.name)}: {column.kind} ({escape(text)})", highlight=False)


def _print_findings(report: Report) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    for finding in report.findings:
        colour = _COLOURS[finding.level]
        console.print(f"[{colour}]•[/] {escape(finding.text)}", highlight=False)
    for note in report.notes:
        console.print(f"[dim]• {escape(note)}[/]", highlight=False)
