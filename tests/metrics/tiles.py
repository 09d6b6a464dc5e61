"""Tiles of other sizes than the device's own, so that few samples go through several; the largest tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdnorm.metrics import pairwise


def tiles_of(rows: int | None) -> AbstractContextManager[Any]:
    """Set the rows of a tile inside the block; None: the device's own."""
    return patch.object(pairwise, "_TILE_CPU", (rows, 1024)) if rows else nullcontext()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result
