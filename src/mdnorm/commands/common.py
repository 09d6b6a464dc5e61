"""What all commands share: exit codes, messages, the folder of the outputs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True)

BAD_INPUT = 2
INTERRUPTED = 130


def output() -> Console:
    """Return what results are printed on: as wide as the terminal, or 160 columns in a file or a pipe."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


def fail(message: str, code: int) -> NoReturn:
    """Print an error and leave with this exit code."""
    # Paths must survive: no line is broken within them.
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def command_line(program: str = "mdnorm") -> str:
    """Return the command as it can be pasted into a shell."""
    return shlex.join([program, *sys.argv[1:]])


def make_folder(folder: Path) -> None:
    """Make the folder of the outputs, or fail with what prevents it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}.", BAD_INPUT)


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold the lock of a folder, or fail where another process writes to it."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        fail(f"another process is writing to {out}: wait for it, or choose another --out.", BAD_INPUT)
