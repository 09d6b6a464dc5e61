"""``mdnorm residualize``: a table in which metadata explain nothing of the features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from mdnorm.commands.common import BAD_INPUT, INTERRUPTED, errors, fail, make_folder
from mdnorm.design.reader import shown
from mdnorm.extras import MissingExtraError

if TYPE_CHECKING:
    from mdnorm.tables.streaming import ResidualizeSummary


def residualize(
    table: Annotated[
        Path, Argument(help="Features, one row a sample: .parquet, .csv, .tsv, .npy. May exceed the memory.")
    ],
    out: Annotated[Path, Option(help="File to write, of the same format.")],
    formula: Annotated[
        str | None, Option(help='Metadata to remove, such as "age + C(scanner) + bs(bmi, df=4)".')
    ] = None,
    metadata: Annotated[
        Path | None,
        Option(help="Table with the metadata of the same rows in the same order. (default: TABLE)"),
    ] = None,
    key: Annotated[
        str | None, Option(help="Column of TABLE and --metadata that must agree, row by row.")
    ] = None,
    label: Annotated[
        list[str] | None, Option(help="Metadata column whose effect is protected; may be repeated.")
    ] = None,
    features: Annotated[
        str | None,
        Option(help='Features: names and patterns, such as "volume,voxel_*". (default: all measures)'),
    ] = None,
    site: Annotated[str | None, Option(help="Metadata column with the site, batch or scanner.")] = None,
    scale: Annotated[bool, Option("--scale", help="Sites differ in scale, too (ComBat).")] = False,
    empirical_bayes: Annotated[
        bool, Option("--empirical-bayes", help="Shrink the effects of sites (ComBat).")
    ] = False,
    ridge: Annotated[float, Option(min=0, help="Penalty on the effects of metadata.")] = 0.0,
    missing: Annotated[
        str | None, Option(help="A missing value of the metadata: error, mean or indicator. (default: error)")
    ] = None,
    unseen: Annotated[
        str | None, Option(help="A level or site that no row of the fit has: error or mean. (default: error)")
    ] = None,
    missing_features: Annotated[
        str, Option(help="A missing value of a feature: error, or skip its row in the fit.")
    ] = "error",
    missing_values: Annotated[
        list[str] | None, Option(help='Text that stands for a missing value, such as "?"; may be repeated.')
    ] = None,
    weights: Annotated[str | None, Option(help="Metadata column with the weights of the rows.")] = None,
    fit_rows: Annotated[
        str | None,
        Option(help="Rows to fit to: a column of booleans, or a share such as 0.1. (default: all)"),
    ] = None,
    save_model: Annotated[Path | None, Option(help="Save what was fitted to this .safetensors file.")] = None,
    apply: Annotated[
        Path | None, Option(help="Apply what --save-model has saved; nothing is fitted.")
    ] = None,
    batch_rows: Annotated[int | None, Option(min=1, help="Rows in memory at once.")] = None,
    seed: Annotated[int, Option(min=0)] = 0,
    json_output: Annotated[bool, Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Write TABLE without what metadata explain of its features, however large it is.

    Columns that are no features stay as they are. The result appears when it is complete. Exit code 2: the
    inputs cannot be used, and the message says why.
    """
    try:
        from mdnorm.tables.streaming import residualize_file

        for path in (out, *([] if save_model is None else [save_model])):
            make_folder(path.parent)
        summary = residualize_file(
            table,
            out,
            formula=formula,
            labels=label or [],
            site=site,
            metadata=metadata,
            key=key,
            features=None if features is None else [name.strip() for name in features.split(",")],
            scale=scale,
            empirical_bayes=empirical_bayes,
            ridge=ridge,
            missing=missing,
            unseen=unseen,
            missing_features=missing_features,
            missing_values=missing_values or [],
            weights=weights,
            fit_rows=_share_or_column(fit_rows),
            apply=apply,
            save_model=save_model,
            batch_rows=batch_rows,
            seed=seed,
        )
    except (TypeError, ValueError, MissingExtraError) as error:
        fail(str(error), BAD_INPUT)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or out}", BAD_INPUT)
    except KeyboardInterrupt:
        fail(f"interrupted: {out} was not written.", INTERRUPTED)
    if json_output:
        typer.echo(json.dumps({**summary.to_dict(), "out": str(out)}, indent=2))
    else:
        _print_summary(summary, out)


def _share_or_column(text: str | None) -> str | float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _print_summary(summary: ResidualizeSummary, out: Path) -> None:
    for text in summary.warnings:
        errors.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)
    removed = [*summary.metadata_names, *(["site"] if summary.sites else [])]
    fitted = f"fitted to {summary.num_rows_fitted} rows" if summary.num_rows_fitted else "not fitted here"
    protected = f", {', '.join(summary.label_names)} protected" if summary.label_names else ""
    typer.echo(
        f"{out}: {summary.num_rows} rows, {summary.num_features} feature(s) without {', '.join(removed)}"
        f"{protected}; {fitted}."
    )
    typer.echo(f"features: {shown(summary.feature_names, 20)}")
    if summary.left_alone:
        reasons = [f"{name or '(no name)'} ({reason})" for name, reason in summary.left_alone.items()]
        typer.echo(f"left as they are: {shown(reasons, 20)}")
