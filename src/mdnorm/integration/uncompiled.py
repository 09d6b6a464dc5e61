"""Run compiled models without their graphs, which pass by hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_open = 0
_stance = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly inside the block.

    Blocks may overlap in any order: compiled graphs are used again when the last one ends. PyTorch's own
    ``torch.compiler.set_stance`` gives back what was there when a block began, so that two blocks which are
    not nested would leave compilation off for good.
    """
    global _open
    with _lock:
        if _open == 0:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                _stance.close()
