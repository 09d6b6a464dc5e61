"""``mdnorm-experiments …``: reproduce the settings of the paper."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mdnorm.commands.common import (
    BAD_INPUT,
    INTERRUPTED,
    command_line,
    errors,
    fail,
    make_folder,
    only_writer,
)
from mdnorm.extras import MissingExtraError

if TYPE_CHECKING:
    from mdnorm_experiments.report import ReportTable
    from mdnorm_experiments.results import Row

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


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _methods(text: str, default: Sequence[str], every: Sequence[str] | None = None) -> list[str]:
    """Return the named methods; "all" are those of `every`, by default of the synthetic table."""
    from mdnorm_experiments.methods import METHODS

    if text == "default":
        return list(default)
    if text == "all":
        return list(every or (name for name, method in METHODS.items() if method.in_table))
    return _names(text)


@app.command()
def synthetic(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results, figures and the report. [default: results/synthetic, with the variant]"
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated methods, 'default' or 'all'.")] = "default",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,4,20,200,2000",
    variant: Annotated[
        str,
        typer.Option(
            help="Of the data: plain, sites (50 metadata columns), quadratic or variance (a confounder that "
            "a straight line does not see)."
        ),
    ] = "plain",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds a cell. [default: 3 or 5, by method]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="[default: tuned for the batch size]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: tuned for the batch size]")] = None,
    group_size: Annotated[int, typer.Option(min=4, help="Training images a group.")] = 1000,
    quick: Annotated[
        bool, typer.Option("--quick", help="Batch size 200, two seeds: a few minutes on two cores.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time, one thread each. [default: all cores]")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Two groups of images with a true effect and a confounder, against the analytic limits.

    A classifier that uses the true effect only is right in 83.3 % of all cases, one that cheats with the
    confounder in 94.4 %. Finished trainings are kept in OUT/results.json: interrupt with Ctrl-C and repeat
    the command to go on.
    """
    from mdnorm_experiments import synthetic as setting
    from mdnorm_experiments.methods import DEFAULT_METHODS, METHODS, titles
    from mdnorm_experiments.report import synthetic_table

    chosen = _methods(methods, DEFAULT_METHODS)
    if out is None:
        out = Path("results", "synthetic" if variant == "plain" else f"synthetic-{variant}")
    sizes, seed_count = ([200], seeds or 2) if quick else (_numbers(batch_sizes), seeds)
    if not chosen or not sizes:
        fail("at least one method and one batch size are needed.", BAD_INPUT)
    try:
        runs = setting.plan(
            chosen,
            sizes,
            seed_count,
            first_seed=seed,
            epochs=epochs,
            learning_rate=learning_rate,
            group_size=group_size,
            variant=variant,
            features_dir=out / "features",
        )
    except ValueError as error:
        fail(str(error), BAD_INPUT)
    for method, size in setting.impossible_cells(chosen, sizes):
        errors.print(
            f"left out: {METHODS[method].title} cannot train with batch size {size}.", highlight=False
        )
    rows, report = _run_all(setting, runs, out, jobs, folder=out / "features")
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(synthetic_table(rows, titles()), section=1)
        _print_paths(out, report)


@app.command()
def continual(
    out: Annotated[Path, typer.Option(help="Folder for results, figures and the report.")] = Path(
        "results/continual"
    ),
    methods: Annotated[str, typer.Option(help="Comma-separated methods, 'default' or 'all'.")] = "default",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds a method. [default: 3]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each stage. [default: tuned]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: tuned]")] = None,
    group_size: Annotated[int, typer.Option(min=4, help="Training images a group and stage.")] = 1000,
    test_group_size: Annotated[int, typer.Option(min=4, help="Held-out images a group and stage.")] = 500,
    quick: Annotated[bool, typer.Option("--quick", help="One seed: a few minutes on two cores.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Networks at a time, one thread each. [default: all cores]")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """One network through five stages in which the true effect fades and the confounder takes over.

    After each stage it is tested on all five. A confounder-free network is right in 75 % of all cases in the
    first stage and in 50 % in the last; the table shows how far a network is from that. Finished networks are
    kept in OUT/results.json: interrupt with Ctrl-C and repeat the command to go on.
    """
    from mdnorm_experiments import continual as setting
    from mdnorm_experiments.methods import titles

    chosen = _methods(methods, setting.DEFAULT_METHODS)
    if not chosen:
        fail("at least one method is needed.", BAD_INPUT)
    try:
        runs = setting.plan(
            chosen,
            batch_size,
            seeds or (1 if quick else setting.SEEDS),
            first_seed=seed,
            epochs=epochs,
            learning_rate=learning_rate,
            group_size=group_size,
            test_group_size=test_group_size,
        )
    except ValueError as error:
        fail(str(error), BAD_INPUT)
    rows, report = _run_all(setting, runs, out, jobs)
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
    else:
        for table in setting.tables(rows, titles()):
            typer.echo(f"\n{table.title}")
            _print_table(table)
        _print_paths(out, report)


def _confounded_command(name: str, text: str) -> None:
    """Add ``mdnorm-experiments NAME`` for a setting with confounded images, clips or volumes."""

    def command(
        out: Annotated[
            Path | None,
            typer.Option(help="Folder for results, figures and the report. [default: results/SETTING]"),
        ] = None,
        methods: Annotated[
            str, typer.Option(help="Comma-separated methods or 'all'. [default: all; with --quick a few]")
        ] = "default",
        seeds: Annotated[
            int | None, typer.Option(min=1, help="Seeds a method. [default: 5; with --quick 1]")
        ] = None,
        seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
        size: Annotated[int | None, typer.Option(help="Training samples. [default: tuned]")] = None,
        batch_size: Annotated[int | None, typer.Option(help="[default: tuned]")] = None,
        epochs: Annotated[int | None, typer.Option(min=1, help="[default: tuned]")] = None,
        learning_rate: Annotated[float | None, typer.Option(help="[default: tuned]")] = None,
        data: Annotated[
            Path | None,
            typer.Option(help="Folder of the real data set in its published layout. [default: none]"),
        ] = None,
        on_problem: Annotated[
            str, typer.Option(help="Files and rows of real data that cannot be used: 'error' or 'skip'.")
        ] = "error",
        quick: Annotated[
            bool, typer.Option("--quick", help="Few methods, one seed, less data: minutes on two cores.")
        ] = False,
        jobs: Annotated[
            int | None, typer.Option(min=1, help="Networks at a time, one thread each. [default: all cores]")
        ] = None,
        json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    ) -> None:
        from mdnorm_experiments import confounded
        from mdnorm_experiments.data.problems import DataProblemsError

        target = out or Path("results", name)
        try:
            setting = confounded.get_setting(name)
            # Real data have no unconfounded training data to be the oracle's.
            every = [name for name in confounded.METHOD_NAMES if data is None or name != "oracle"]
            chosen = setting.quick_methods if quick else every
            runs = confounded.plan(
                setting,
                _methods(methods, chosen, every=every),
                seeds or (1 if quick else confounded.SEEDS),
                first_seed=seed,
                size=setting.quick_size if quick and size is None else size,
                batch_size=batch_size,
                epochs=epochs or (setting.quick_epochs if quick else None),
                learning_rate=learning_rate,
                data=data,
                on_problem=on_problem,
                features_dir=target / "features",
            )
            if data is not None:
                # Told before training starts, not by a worker in the middle of it.
                problems = confounded.load(name, str(data), on_problem).problems
                if problems:
                    errors.print(f"left out: {problems}", highlight=False, markup=False, soft_wrap=True)
                confounded.data_of(runs[0])
        except (ValueError, DataProblemsError, MissingExtraError, OSError) as error:
            fail(str(error), BAD_INPUT)
        rows, report = _run_all(confounded, runs, target, jobs, folder=target / "features")
        if json_output:
            typer.echo(json.dumps(rows, indent=2))
            return
        from mdnorm_experiments.confounded_report import tables

        for table in tables(rows, setting):
            typer.echo(f"\n{table.title}")
            _print_table(table)
        _print_paths(target, report)

    command.__doc__ = text
    app.command(name)(command)


_GO_ON = "\n\nFinished networks are kept: interrupt with Ctrl-C and repeat the command to go on."
_confounded_command(
    "image",
    "Drawn faces: the label is in their geometry, the skin's shade goes with the label.\n\n"
    "An honest network is as good on faces whose shade says nothing about the label; the table shows how far "
    "each method is from that." + _GO_ON,
)
_confounded_command(
    "digits",
    "Real digits, coloured: the colour goes with the label.\n\n"
    "An honest network is as good on digits whose colour says nothing about the label." + _GO_ON,
)
_confounded_command(
    "video",
    "Clips of a figure in action: the scene behind it goes with the action.\n\n"
    "An honest network is as good on clips whose scenes were shuffled." + _GO_ON,
)
_confounded_command(
    "mri",
    "Brains in 3D: diagnosis goes with site and age.\n\n"
    "An honest network is as good on subjects whose site, age and sex say nothing about the diagnosis."
    + _GO_ON,
)


def _print_paths(out: Path, report: Path) -> None:
    typer.echo(f"\nReport: {report}\nTable:  {out / 'table.md'}\nRows:   {out / 'results.json'}")


def _run_all(
    setting: Any, runs: Sequence[Any], out: Path, jobs: int | None, folder: Path | None = None
) -> tuple[list[Row], Path]:
    """Train what is missing, write the outputs, and return the rows and the path of the report.

    `setting` is the experiment's module, with `train` and `write_outputs`; `folder` one to make inside `out`.
    """
    from mdnorm_experiments.results import ResultsError, ResultStore, SharedResultStore
    from mdnorm_experiments.runner import RunFailedError, Runner

    make_folder(folder or out)
    rank, world_size = _place_in_torchrun()
    if world_size > 1 and jobs not in (None, 1):
        fail(f"--jobs {jobs} under torchrun: say --nproc-per-node {jobs} instead.", BAD_INPUT)
    try:
        with _sigterm_as_ctrl_c(), only_writer(out) if rank == 0 else nullcontext():
            runner: Runner[Any]
            if world_size > 1:
                runner = Runner(SharedResultStore(out / "results.json"), setting.train)
            else:
                runner = Runner(ResultStore(out / "results.json"), setting.train, jobs or os.cpu_count() or 1)
            pending = runner.pending(runs)
            if len(pending) < len(runs) and rank == 0:
                errors.print(f"{len(runs) - len(pending)} of {len(runs)} trainings are already finished.")
            epochs = sum(run.epochs for run in pending)
            with _progress_bar(epochs, len(pending), several=world_size > 1) as progress:
                rows = runner.run(runs, progress)
            if rank > 0:
                raise typer.Exit
            if isinstance(runner.store, SharedResultStore):
                runner.store.clear_claims()
    except ResultsError as error:
        fail(str(error), BAD_INPUT)
    except RunFailedError as error:
        fail(f"some trainings failed, the others are stored:\n{error}", 1)
    except KeyboardInterrupt:
        fail("interrupted; finished trainings are stored, repeat the command to go on.", INTERRUPTED)
    return rows, setting.write_outputs(out, runs, rows, command=command_line("mdnorm-experiments"))


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


class _Bar:
    def __init__(self, progress: Progress, epochs: int, runs: int, moves: bool) -> None:
        self._progress = progress
        self._moves = moves
        self._epochs = progress.add_task("epochs", total=epochs)
        self._runs = progress.add_task("trainings", total=runs)

    def epoch_done(self) -> None:
        self._progress.advance(self._epochs)

    def run_done(self, row: Row) -> None:
        self._progress.advance(self._runs)
        if not self._moves:
            # Without a terminal (CI, a log file) bars cannot move: one line a training instead.
            self._progress.console.print(
                f"{row['method']}, batch size {row['batch_size']}, seed {row['seed']}: "
                f"accuracy {100 * row['bacc']:.1f} %",
                highlight=False,
            )


@contextmanager
def _progress_bar(epochs: int, runs: int, several: bool) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Bars of several processes would overwrite each other: lines from all instead.
    with Progress(*columns, console=errors, disable=not runs or several) as progress:
        yield _Bar(progress, epochs, runs, moves=errors.is_terminal and not several)


def _print_table(report_table: ReportTable, section: int | None = None) -> None:
    """Print a table, a rule where the cell number `section` changes."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for index, heading in enumerate(report_table.headings):
        # Headings in two lines, or they and not the numbers would say how wide the table is.
        text = heading.replace(" ", "\n", 1)
        table.add_column(
            text, justify="right" if index else "left", no_wrap=index > 0, min_width=None if index else 16
        )
    previous = None
    for line in report_table.lines:
        if section is not None:
            if previous is not None and previous != line[section]:
                table.add_section()
            previous = line[section]
        table.add_row(*map(escape, line))
    console = Console()
    if not console.is_terminal:
        # In a file or a pipe there is no edge to keep to.
        console.width = 160
    console.print(table)
    typer.echo(report_table.limits)
