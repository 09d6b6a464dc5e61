"""Progress bars, on a terminal and where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["with_bar"]


def with_bar(loader: Iterable[Any], description: str, progress: bool) -> Iterable[Any]:
    """Return the batches of a loader, with a progress bar where there is a terminal to show it."""
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    return _counted(loader, tqdm(total=_length(loader), desc=description, disable=None, leave=False))


def _counted(loader: Iterable[Any], bar: Any) -> Iterable[Any]:
    # Not tqdm(loader): that calls iter() twice, which starts the workers of a DataLoader twice.
    with bar:
        for batch in loader:
            yield batch
            bar.update()


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
