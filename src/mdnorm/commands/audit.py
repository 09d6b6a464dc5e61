"""``mdnorm audit``: what do these features know?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer import Argument, Option

from mdnorm.commands.common import BAD_INPUT, command_line, errors, fail, make_folder, only_writer, output
from mdnorm.extras import MissingExtraError

if TYPE_CHECKING:
    from mdnorm.auditing.columns import Column
    from mdnorm.auditing.report import Report

_COLOURS = {"strong": "red", "weak": "yellow", "open": "default", "none": "green", "note": "dim"}

# Exit codes of --fail-on.
FAILED = 3
UNDECIDED = 4


def audit(
    paths: Annotated[
        list[Path],
        Argument(
            metavar="[FEATURES] METADATA",
            help="Features, one row a sample (.npy, .npz, .safetensors, .parquet, .csv, .tsv), unless they "
            "are named by --features; and metadata of the same samples in the same order (.csv, .tsv, "
            ".parquet).",
        ),
    ],
    out: Annotated[Path, Option(help="Folder for the page, report.json and figures.")] = Path(
        "results/audit"
    ),
    treatments: Annotated[
        list[str] | None,
        Option(
            "--features",
            help="NAME=FILE of each of several treatments; the others are compared with the first.",
        ),
    ] = None,
    label: Annotated[str | None, Option(help="Metadata column that the features are meant to know.")] = None,
    after: Annotated[
        Path | None, Option(help="Features of the same samples after a treatment, to compare.")
    ] = None,
    predictions: Annotated[
        Path | None, Option(help="Table with the columns of --prediction and --score, if not METADATA.")
    ] = None,
    prediction: Annotated[
        list[str] | None,
        Option(
            help="Column with the predictions, for the gaps between groups; with several treatments, repeat "
            "it in their order."
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        Option(help="Column with the predicted probability, for the calibration; in the same way."),
    ] = None,
    positive: Annotated[str | None, Option(help="The positive class. (default: the larger)")] = None,
    missing_values: Annotated[
        list[str] | None,
        Option(help='Text that stands for a missing value in a table, such as "?"; may be repeated.'),
    ] = None,
    kind: Annotated[
        list[str] | None,
        Option(help="COLUMN=continuous or COLUMN=categorical, where the inferred kind is wrong."),
    ] = None,
    ignore: Annotated[
        list[str] | None, Option(help="Metadata column to leave out, or a pattern such as 'voxel_*'.")
    ] = None,
    keep: Annotated[str, Option(help="Metadata columns that are meant to stay: 'age,sex'.")] = "",
    intersect: Annotated[
        list[str] | None, Option(help="Columns whose combinations are audited too: 'gender,ethnicity'.")
    ] = None,
    held_out: Annotated[
        str | None, Option(help="Metadata column that says which rows no treatment was fitted on.")
    ] = None,
    subject: Annotated[
        str | None,
        Option(help="Metadata column with the subject of each row, where subjects have several rows."),
    ] = None,
    key: Annotated[
        str | None, Option(help="Name of the array in .npz and .safetensors files. (default: features)")
    ] = None,
    columns: Annotated[
        str, Option(help="Columns of a table of features, by names and patterns: 'volume,voxel_*'.")
    ] = "",
    raw: Annotated[bool, Option("--raw", help="Do not standardise the features.")] = False,
    max_rows: Annotated[int, Option(min=20, help="Of more rows, so many are sampled.")] = 2000,
    permutations: Annotated[int, Option(min=20, help="Permutations of each probe's test.")] = 200,
    min_group: Annotated[int, Option(min=1, help="Smaller groups are not compared.")] = 20,
    max_probe: Annotated[
        float, Option(help="A probe further than this from chance (0) to perfect (1) is harm.")
    ] = 0.2,
    max_dcor2: Annotated[float, Option(help="A larger dcor² is harm.")] = 0.05,
    max_gap: Annotated[float, Option(help="A larger gap between two groups is harm.")] = 0.1,
    fail_on: Annotated[
        list[str] | None,
        Option(help="Fail if one holds: 'sex: probe > 0.6, gap > 0.05'; or share, dcor2; '*': all columns."),
    ] = None,
    project: Annotated[str | None, Option(help="Name of what is audited, for the page.")] = None,
    pdf: Annotated[
        bool, Option("--pdf", help="Print the page to report.pdf, where Chromium or Chrome is installed.")
    ] = False,
    seed: Annotated[int, Option(min=0)] = 0,
    json_output: Annotated[bool, Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what features know of each metadata column, before and after a treatment.

    Writes one page (report.html, nothing loaded from elsewhere), report.json and figures. Exit code 2: the
    inputs cannot be audited, and the message says why; 3: a condition of --fail-on holds; 4: none holds, but
    one cannot be decided.
    """
    try:
        from mdnorm import auditing
        from mdnorm.auditing import conditions
        from mdnorm.auditing.columns import as_columns

        browser = _browser() if pdf else None
        demanded = [part for text in fail_on or [] for part in conditions.parse(text)]
        files, metadata = _files(paths, treatments or [], after)
        named = bool(treatments)
        missing = missing_values or []
        read_files = _read_features(files, key, _listed(columns), missing)
        table = auditing.read_table(metadata, missing)
        read = as_columns(table, _kinds(kind or []), ignore or [])
        foretold = _predicted(predictions, {"prediction": prediction, "score": score}, list(files))
        if not json_output:
            _print_kinds(read)
        make_folder(out)
        with only_writer(out):
            report = auditing.audit(
                read_files if named else read_files["before"],
                read,
                label,
                after=None if named else read_files.get("after"),
                **foretold,
                positive=positive,
                keep=_listed(keep),
                intersect=[_listed(text) for text in intersect or []],
                held_out=held_out,
                subjects=subject,
                max_rows=max_rows,
                settings=auditing.Settings(
                    num_permutations=permutations,
                    seed=seed,
                    standardize=not raw,
                    min_group_rows=min_group,
                    max_probe=max_probe,
                    max_dcor2=max_dcor2,
                    max_gap=max_gap,
                ),
                project=project,
                facts={
                    "command": command_line(),
                    "features_files": {name: str(path) for name, path in files.items()},
                    "metadata_file": str(metadata),
                },
            )
            page = report.save(out)
            if browser is not None:
                _print_to_pdf(browser, page)
        outcomes = conditions.check(report, demanded)
    except (ValueError, MissingExtraError) as error:
        fail(str(error), BAD_INPUT)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or out}", BAD_INPUT)
    if json_output:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_verdicts(report)
        typer.echo(f"\nReport: {page}\nNumbers: {out / 'report.json'}\nFigures: {out / 'figures'}")
    for outcome in outcomes:
        word = {True: "failed", False: "passed", None: "cannot be decided"}[outcome.failed]
        errors.print(f"{word}: {escape(outcome.text)}", highlight=False, soft_wrap=True)
    results = {outcome.failed for outcome in outcomes}
    if results & {True, None}:
        raise typer.Exit(FAILED if True in results else UNDECIDED)


def _browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        fail("--pdf needs Chromium or Chrome: install it, or print report.html from any browser.", BAD_INPUT)
    return path


def _print_to_pdf(browser: str, page: Path) -> None:
    pdf = page.with_suffix(".pdf").resolve()
    command = [browser, "--headless", "--disable-gpu", "--no-pdf-header-footer", f"--print-to-pdf={pdf}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Its sandbox does not run as root.
        command.append("--no-sandbox")
    done = subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not pdf.exists():
        fail(f"{browser} could not print the page: {done.stderr.strip()[-300:]}", BAD_INPUT)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _files(
    paths: Sequence[Path], treatments: Sequence[str], after: Path | None
) -> tuple[dict[str, Path], Path]:
    """Return the files of features by name, and that of the metadata."""
    if treatments:
        files = {}
        for text in treatments:
            name, separator, path = text.partition("=")
            if not separator or not name or not path:
                fail(f"--features {text!r}: give NAME=FILE, such as raw=a.npy.", BAD_INPUT)
            if name in files:
                fail(f"--features {name!r} was given twice: give each treatment its own name.", BAD_INPUT)
            files[name] = Path(path)
        if len(paths) != 1 or after is not None:
            fail("with --features give METADATA only, and no --after.", BAD_INPUT)
        return files, paths[0]
    if len(paths) != 2:
        fail(f"give FEATURES and METADATA, got {len(paths)} file(s).", BAD_INPUT)
    files = {"before": paths[0]}
    if after is not None:
        files["after"] = after
    return files, paths[1]


def _predicted(
    path: Path | None, names: dict[str, list[str] | None], treatments: list[str]
) -> dict[str, Any]:
    """Return by treatment what is predicted: names of metadata columns, or columns of another table."""
    for option, given in names.items():
        count = len(given or [])
        if count > len(treatments):
            sets = f"{len(treatments)} set(s) of features"
            fail(f"--{option} was given {count} times, but there are {sets}.", BAD_INPUT)
    found = {f"{key}s": dict(zip(treatments, given, strict=False)) for key, given in names.items() if given}
    if path is None:
        return found
    from mdnorm.auditing.reading import InputError, matching, read_table

    if not found:
        raise InputError(f"{path} has predictions, but --prediction does not say which column.")
    table = read_table(path)

    def column(name: str) -> Any:
        return table.column(matching(table.column_names, [name], f"column in {path}")[0]).to_numpy()

    return {key: {name: column(part) for name, part in given.items()} for key, given in found.items()}


def _read_features(
    files: dict[str, Path], key: str | None, columns: list[str], missing_values: list[str]
) -> dict[str, Any]:
    """Return all sets of features; an option is for whichever files it can be meant for."""
    from mdnorm.auditing.reading import ARCHIVE_FORMATS, read_features
    from mdnorm.design.files import TABLE_FORMATS
    from mdnorm.design.roles import TableWarning

    paths = list(files.values())

    def is_for(path: Path, formats: tuple[str, ...]) -> bool:
        # Where it is for none of the files, the reader says so.
        return path.suffix.lower() in formats or not any(p.suffix.lower() in formats for p in paths)

    read = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TableWarning)
        for name, path in files.items():
            key_of = key if is_for(path, ARCHIVE_FORMATS) else None
            columns_of = columns if is_for(path, TABLE_FORMATS) else ()
            read[name] = read_features(path, key_of, columns_of, missing_values)
    for entry in caught:
        errors.print(f"[yellow]warning:[/] {escape(str(entry.message))}", highlight=False, soft_wrap=True)
    return read


def _kinds(texts: Sequence[str]) -> dict[str, str]:
    kinds = {}
    for text in texts:
        column, separator, kind = text.rpartition("=")
        if not separator:
            fail(f"--kind {text!r}: give COLUMN=continuous or COLUMN=categorical.", BAD_INPUT)
        kinds[column] = kind
    return kinds


def _print_kinds(columns: Sequence[Column]) -> None:
    for column in columns:
        text = column.describe() if column.is_auditable else column.note
        errors.print(f"{escape(column.name)}: {column.kind} ({escape(text)})", highlight=False)


def _print_verdicts(report: Report) -> None:
    from rich.table import Table

    console = output()
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "verdict", "features", "dcor²", "best probe"):
        table.add_column(heading, overflow="fold")
    for row in report.table():
        name, words = escape(row.column.name), f"[{_COLOURS[row.level]}]{escape(row.words)}[/]"
        for title, dependence, _, probe in row.cells:
            table.add_row(name, words, *map(escape, (title, dependence.removeprefix("dcor² "), probe)))
            name = words = ""
    console.print(table)
    console.print()
    for finding in report.findings:
        badge = f"[{_COLOURS[finding.level]}]{escape(finding.badge)}:[/]"
        console.print(f"{badge} {escape(finding.text)}", highlight=False)
    for note in report.notes:
        console.print(f"[dim]note: {escape(note)}[/]", highlight=False)
    console.print(f"[dim]{escape(report.limits)}[/]", highlight=False)
