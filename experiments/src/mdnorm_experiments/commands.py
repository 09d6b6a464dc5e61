"""``mdnorm-experiments …``: one command for each setting of the paper."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box, progress
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from mdnorm.commands.common import (
    BAD_INPUT,
    INTERRUPTED,
    command_line,
    errors,
    fail,
    make_folder,
    only_writer,
    output,
)
from mdnorm.extras import MissingExtraError

if TYPE_CHECKING:
    from mdnorm_experiments.report import ReportTable
    from mdnorm_experiments.results import Row
    from mdnorm_experiments.settings import Run, Setting

_GAP = 2
"""Columns between two columns of a printed table."""

app = typer.Typer(
    help="Reproduce the settings of the paper on Metadata Normalization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Run the command line (entry point ``mdnorm-experiments``, also ``python -m mdnorm_experiments``)."""
    app(prog_name="mdnorm-experiments")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers like 20,200.") from error


def _columns(text: str) -> dict[str, str]:
    """Return what "age=Age_at_scan,site=scanner" says."""
    pairs = [[piece.strip() for piece in part.split("=", 1)] for part in text.split(",") if part]
    if not all(len(pair) == 2 and all(pair) for pair in pairs) or len(pairs) > len(dict(pairs)):
        raise typer.BadParameter(f"{text!r} does not name each column once, like age=Age,site=scanner.")
    return dict(pairs)


def _run_setting(
    name: str,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all outputs. (default: results/SETTING)")
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated methods, 'default' or 'all'.")] = "default",
    batch_sizes: Annotated[
        str, typer.Option(help="Comma-separated batch sizes. (default: 1,4,20,200,2000)")
    ] = "",
    batch_size: Annotated[int | None, typer.Option(help="Samples a batch. (default: tuned)")] = None,
    variant: Annotated[
        str,
        typer.Option(
            help="Of the data: plain, sites (50 metadata columns), quadratic or variance (a confounder that "
            "a straight line does not see)."
        ),
    ] = "plain",
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds a method. (default: 3 or 5)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs, with continual of each stage. (default: tuned)")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Adam's learning rate at its height. (default: tuned)")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Training samples. (default: tuned)")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=4, help="Training images a group, with continual in each stage. (default: 1000)"),
    ] = None,
    test_group_size: Annotated[
        int | None, typer.Option(min=4, help="Held-out images a group (and stage). (default: 2000 or 500)")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the real data set in its published layout. (default: none)")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Names of columns of the real table: 'age=Age_at_scan,site=scanner'.")
    ] = "",
    on_problem: Annotated[
        str, typer.Option(help="Files and rows of real data that cannot be used: 'error' or 'skip'.")
    ] = "error",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trainings or less data: minutes.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Networks at a time, one thread each. (default: all cores)")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    from mdnorm_experiments.data.reading import DataProblemsError
    from mdnorm_experiments.methods import METHODS
    from mdnorm_experiments.settings import get_setting, plan

    out = out or Path("results", name if variant == "plain" else f"{name}-{variant}")
    try:
        setting = get_setting(name)
        chosen = _methods(setting, methods, quick, generated=data is None)
        sizes = _numbers(batch_sizes) or ([batch_size] if batch_size is not None else None)
        if quick and batch_size is None:
            sizes = [setting.batch_size]
        images = group_size if size is None else size
        runs = plan(
            setting,
            chosen,
            seeds or (setting.quick_seeds if quick else None),
            first_seed=seed,
            batch_sizes=sizes,
            size=setting.quick_size if quick and images is None else images,
            test_size=test_group_size,
            epochs=epochs or (setting.quick_epochs if quick else None),
            learning_rate=learning_rate,
            variant=variant,
            data=data,
            on_problem=on_problem,
            columns=_columns(columns),
            features_dir=out / "features",
        )
        if data is not None:
            _look_at_data(runs[0])
    except (ValueError, DataProblemsError, MissingExtraError, OSError) as error:
        fail(str(error), BAD_INPUT)
    for method in (METHODS[name] for name in dict.fromkeys(chosen)):
        for small in (each for each in sizes or setting.batch_sizes if each < method.least_batch_size):
            errors.print(f"left out: {method.title} cannot train with batch size {small}.", highlight=False)
    rows, report = _run_all(setting, runs, out, jobs)
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
        return
    for table in setting.tables(rows):
        typer.echo(f"\n{table.title}")
        _print_table(table)
    typer.echo(f"\nReport: {report}\nTable:  {out / 'table.md'}\nRows:   {out / 'results.json'}")


def _methods(setting: Setting, text: str, quick: bool, *, generated: bool) -> list[str]:
    """Return the methods that an option names; real data have no unconfounded ones to be the oracle's."""
    from mdnorm_experiments.methods import METHODS

    if text not in ("default", "all"):
        return [part.strip() for part in text.split(",") if part.strip()]
    names = setting.all_methods
    if text == "default":
        names = (setting.quick_methods if quick else None) or setting.default_methods or names
    return [name for name in names if generated or not METHODS[name].oracle]


def _look_at_data(run: Run) -> None:
    """Tell what is wrong with real data before training starts, not by a worker in the middle of it."""
    from mdnorm_experiments.confounded import load
    from mdnorm_experiments.settings import data_of

    problems = load(run).problems
    if problems:
        errors.print(f"left out: {problems}", highlight=False, markup=False, soft_wrap=True)
    data_of(run)


_SYNTHETIC = ("batch_sizes", "variant", "group_size", "test_group_size")
_CONTINUAL = ("batch_size", "group_size", "test_group_size")
_LOADED = ("batch_size", "size", "data", "columns", "on_problem")
_OF_SOME = {*_SYNTHETIC, *_CONTINUAL, *_LOADED}
_GO_ON = (
    "Finished trainings are kept in OUT/results.json: interrupt with Ctrl-C and repeat the command to go on."
)
_COMMANDS: dict[str, tuple[Any, ...]] = {
    "synthetic": (
        _SYNTHETIC,
        "Two groups of images with a true effect (it allows 83.3 %) and a confounder (both allow 94.4 %).",
    ),
    "continual": (
        _CONTINUAL,
        "One network through five stages in which the true effect fades and the confounder takes over.",
        "An honest network is right in 75 % of all cases in the first stage and in 50 % in the last.",
    ),
    "image": (
        _LOADED,
        "Drawn faces: the label is in their geometry, the skin's shade goes with the label.",
        "An honest network is as good on faces whose shade says nothing about the label.",
    ),
    "digits": (
        _LOADED[:2],
        "Real digits, coloured: the colour goes with the label.",
        "An honest network is as good on digits whose colour says nothing about the label.",
    ),
    "video": (
        _LOADED,
        "Clips of a figure in action: the scene behind it goes with the action.",
        "An honest network is as good on clips whose scenes were shuffled.",
    ),
    "mri": (
        _LOADED,
        "Brains in 3D: diagnosis goes with site and age.",
        "An honest network is as good on subjects whose site, age and sex say nothing about the diagnosis.",
    ),
}


def _add_command(name: str, options: Sequence[str], *text: str) -> None:
    """Add ``mdnorm-experiments NAME``: `_run_setting` with the options of this setting."""
    command: Any = partial(_run_setting, name)
    signature = inspect.signature(_run_setting, eval_str=True)
    kept = [p for key, p in signature.parameters.items() if key not in {"name", *_OF_SOME} or key in options]
    command.__signature__ = signature.replace(parameters=kept)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}
    app.command(name, help="\n\n".join([*text, _GO_ON]))(command)


for _name, (_options, *_text) in _COMMANDS.items():
    _add_command(_name, _options, *_text)


def _run_all(setting: Setting, runs: Sequence[Run], out: Path, jobs: int | None) -> tuple[list[Row], Path]:
    """Train what is missing, write the outputs, and return the rows and the path of the report."""
    from mdnorm_experiments.results import ResultsError, ResultStore
    from mdnorm_experiments.runner import RunFailedError, Runner
    from mdnorm_experiments.settings import train, write_outputs

    make_folder(out / "features" if setting.keeps_features else out)
    rank, world_size = _place_in_torchrun()
    if world_size > 1 and jobs not in (None, 1):
        fail(f"--jobs {jobs} under torchrun: say --nproc-per-node {jobs} instead.", BAD_INPUT)
    try:
        with _sigterm_as_ctrl_c(), only_writer(out) if rank == 0 else nullcontext(), ExitStack() as at_end:
            store = ResultStore(out / "results.json")
            if world_size == 1:
                at_end.callback(store.clear_claims)
            runner = Runner(store, train, 1 if world_size > 1 else jobs or os.cpu_count() or 1)
            pending = runner.pending(runs)
            if len(pending) < len(runs) and rank == 0:
                errors.print(f"{len(runs) - len(pending)} of {len(runs)} trainings are already finished.")
            epochs = setting.num_stages * sum(run.epochs for run in pending)
            with _progress_bars(epochs, len(pending), several=world_size > 1) as told:
                rows = runner.run(runs, *told)
            if rank > 0:
                raise typer.Exit
            store.clear_claims()
    except ResultsError as error:
        fail(str(error), BAD_INPUT)
    except RunFailedError as error:
        fail(f"some trainings failed, the others are stored:\n{error}", 1)
    except KeyboardInterrupt:
        fail("interrupted; finished trainings are stored, repeat the command to go on.", INTERRUPTED)
    return rows, write_outputs(out, runs, rows, command=command_line("mdnorm-experiments"))


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the work like Ctrl-C: workers stopped, finished rows kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _place_in_torchrun() -> tuple[int, int]:
    """Return this process's rank and how many torchrun started; (0, 1) without it."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def _progress_bars(
    epochs: int, runs: int, several: bool
) -> Iterator[tuple[Callable[[], None], Callable[[Row], None]]]:
    """Yield what is to be called after each epoch and after each training."""
    columns = (
        progress.TextColumn("{task.description:>9}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # Bars of several processes would overwrite each other: lines from all instead.
    with progress.Progress(*columns, console=errors, disable=not runs or several) as bars:
        of_epochs, of_runs = (
            bars.add_task("epochs", total=epochs),
            bars.add_task("trainings", total=runs),
        )

        def run_done(row: Row) -> None:
            bars.advance(of_runs)
            if several or not errors.is_terminal:
                # Without a terminal (CI, a log file) bars cannot move: one line a training instead.
                text = f"{row['method']}, batch size {row['batch_size']}, seed {row['seed']}"
                bars.console.print(f"{text}: accuracy {100 * row['bacc']:.1f} %", highlight=False)

        yield partial(bars.advance, of_epochs), run_done


def _print_table(report_table: ReportTable) -> None:
    """Print all columns; those that do not fit beside the others stand below, with the line's name again."""
    console = output()
    headings, lines, section = report_table.headings, report_table.lines, report_table.section
    # The cells that tell the lines apart: a method, or a method and its batch size or a variable.
    num_keys = next((n for n in (1, 2) if len({tuple(line[:n]) for line in lines}) == len(lines)), 1)
    # Headings are broken at spaces, or they and not the numbers would say how wide the table is.
    words = [[*heading.split(), *cells] for heading, *cells in zip(headings, *lines, strict=True)]
    widths = [max(map(cell_len, column)) for column in words]
    widths[0] = min(widths[0], console.width // 3)
    keys = list(range(num_keys))
    parts = [keys]
    for index in range(num_keys, len(headings)):
        if len(parts[-1]) > num_keys and sum(widths[i] + _GAP for i in (*parts[-1], index)) > console.width:
            parts.append(keys)
        parts[-1] = [*parts[-1], index]
    for part in parts:
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for index in part:
            table.add_column(headings[index], justify="right" if index else "left", width=widths[index])
        for line, after in zip_longest(lines, lines[1:]):
            ends = section is not None and after is not None and after[section] != line[section]
            table.add_row(*(escape(line[index]) for index in part), end_section=ends)
        console.print(table)
    console.print(report_table.limits, highlight=False, markup=False)
