"""The command line as a whole, and ``mdnorm info``."""

from __future__ import annotations

import json
import platform
from typing import Annotated

import typer
from typer import Option

import mdnorm
from mdnorm.commands.audit import audit
from mdnorm.commands.residualize import residualize

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(mdnorm.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Metadata Normalization: remove what metadata explain from a network's features, and measure it."""


app.command()(audit)
app.command()(residualize)


@app.command()
def info(json_output: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and estimators."""
    import torch

    facts = {
        "mdnorm": mdnorm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda devices": torch.cuda.device_count(),
        "cpu threads": torch.get_num_threads(),
        "estimators": sorted(mdnorm.estimators.ESTIMATORS),
    }
    if json_output:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        typer.echo(f"{name:14}{', '.join(value) if isinstance(value, list) else value}")
