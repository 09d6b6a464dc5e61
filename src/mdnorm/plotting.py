"""What all static figures share: colours that colour-blind readers tell apart, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdnorm.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008), in an order that keeps neighbours apart, then two of Tol's muted colours.
PALETTE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
    "#009E73",
    "#882255",
    "#999933",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG (150 dots an inch) to `path`, and as PDF beside it."""
    for target, options in (
        (path, {"dpi": 150}),
        (path.with_suffix(".pdf"), {"metadata": {"CreationDate": None}}),
    ):
        with atomic_path(target) as temporary:
            figure.savefig(temporary, **options)
    return path
