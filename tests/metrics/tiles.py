"""Tiles of other sizes than the device's own, so that few samples go through several of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

from mdnorm.metrics import pairwise


def tiles_of(rows: int | None) -> AbstractContextManager[Any]:
    """Set the rows of a tile inside the block; None: the device's own."""
    return patch.object(pairwise, "_TILE_CPU", (rows, 1024)) if rows else nullcontext()
