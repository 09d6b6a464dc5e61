"""Progress bars, on a terminal and where tqdm is installed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


def with_bar(loader: Iterable[Any], description: str, progress: bool) -> Iterator[Any]:
    """Yield the batches of a loader, with a progress bar where there is a terminal to show it."""
    bar = _bar(operator.length_hint(loader) or None, description) if progress else None
    if bar is None:
        yield from loader
        return
    # Not tqdm(loader): that calls iter() twice, which starts the workers of a DataLoader twice.
    with bar:
        for batch in loader:
            yield batch
            bar.update()


@contextmanager
def step_bar(
    total: int, description: str, progress: bool | Callable[[str, int, int], None]
) -> Iterator[Callable[[str], None]]:
    """Give what is called with the name of each step: it tells the function of the user, or moves a bar."""
    if callable(progress):
        done = itertools.count()
        yield lambda text: progress(text, next(done), total)
        return
    bar = _bar(total, description) if progress else None
    if bar is None:
        yield lambda text: None
        return
    with bar:

        def step(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield step


@contextmanager
def stage_bars(
    progress: bool | Callable[[str, int, int | None], None],
) -> Iterator[Callable[[str, int, int | None], None]]:
    """Give what is called with a stage, how much of it is done, and of how much: as `step_bar` does."""
    if callable(progress):
        yield progress
        return
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in bars:
                stack.close()  # That of the stage before.
                bars[stage] = _bar(total, stage) if progress else None
                if bars[stage] is not None:
                    stack.enter_context(bars[stage])
            if bars[stage] is not None:
                bars[stage].update(done - bars[stage].n)

        yield show


def _bar(total: int | None, description: str) -> Any:
    """Return a bar that shows itself on a terminal only; None where tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=description, disable=None, leave=False)
