"""A folder of images and a table with a label and a skin shade for each: the layout of the PPB data set.

The Pilot Parliaments Benchmark (Buolamwini and Gebru, 2018; gendershades.org) has 1270 portraits and a CSV
table with ``filename``, ``bi.gender`` and ``bi.fitz``; the data set is given out on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdnorm.design.csv_file import csv_delimiter
from mdnorm.extras import requires
from mdnorm_experiments.data.faces import SHADES
from mdnorm_experiments.data.reading import Problems, is_missing, read_rows

COLUMNS = {
    "file": ("filename", "file", "image"),
    "label": ("bi.gender", "gender", "label"),
    "shade": ("bi.fitz", "fitzpatrick", "shade"),
}
"""What each column may be called, in order of preference; PPB's names come first."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_LABELS = {"f": "female", "m": "male"}


@dataclass(frozen=True)
class ImageFolder:
    """N images that can be used, in the order of the table, and what was left out (`problems`).

    `images` are (N, 3, size, size) uint8, `labels` (N,) int64 into the sorted `classes`, and `shade` (N,)
    float32, the Fitzpatrick type from 1 to 6.
    """

    images: Tensor
    labels: Tensor
    shade: Tensor
    files: tuple[str, ...]
    classes: tuple[str, ...]
    problems: Problems


def load_image_folder(
    folder: Path,
    table: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    image_size: int = 32,
    on_problem: str = "error",
) -> ImageFolder:
    """Read images, anywhere below a folder, and their CSV table, by default the only one in it.

    The larger side of an image is cropped about the centre, then it is resized. `columns` are names for some
    of `COLUMNS`. DataProblemsError lists all files and rows that cannot be used, unless `on_problem` is
    "skip", which leaves them out. FileNotFoundError without folder or table says what to get. ValueError: an
    unusable table, several tables, or one label only. MissingExtraError: Pillow is not installed.
    """
    table = _table(folder, table)
    rows = read_rows(table, csv_delimiter(table), COLUMNS, columns)
    available: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES:
            available.setdefault(path.name, []).append(path)
    problems = Problems()
    for name, paths in available.items():
        if len(paths) > 1:
            problems.add("duplicate image", name, f"in {', '.join(str(p.parent) for p in paths)}")
    found = []
    seen: set[str] = set()
    for where, row in rows:
        name = Path(row["file"]).name
        label, shade, paths = row["label"].lower(), _fitzpatrick(row["shade"]), available.get(name, [])
        if not name:
            problems.add("no file name", where, "the cell is empty")
        elif name in seen:
            problems.add("duplicate row", name, where)
        elif not paths:
            problems.add("no image", name, f"named in {where}, not below {folder}")
        elif len(paths) == 1 and (is_missing(label) or shade is None):
            kind = "bad shade" if shade is None else "bad label"
            problems.add(kind, name, f"{row['label']!r}, {row['shade']!r} in {where}")
        elif len(paths) == 1 and (pixels := _read(paths[0], image_size, problems)) is not None:
            found.append((pixels, _LABELS.get(label, label), float(shade or 0), name))
        seen.add(name)
    for name in available.keys() - seen:
        problems.add("no row", name, f"not in {table.name}")
    problems.found.sort()
    problems.settle(on_problem)
    classes = problems.classes(
        (label for _, label, *_ in found), f"{table} must have two labels or more with images"
    )
    images, labels, shades, files = zip(*found, strict=True)
    return ImageFolder(
        torch.from_numpy(np.stack(images)),
        torch.tensor([classes.index(label) for label in labels]),
        torch.tensor(shades),
        files,
        classes,
        problems,
    )


def _table(folder: Path, table: Path | None) -> Path:
    advice = (
        "The layout is a folder of images with one CSV table: filename, bi.gender (or gender), bi.fitz (or "
        "shade: I to VI). The Pilot Parliaments Benchmark is given out on request: gendershades.org."
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}. {advice}")
    if table is None:
        tables = sorted(folder.glob("*.csv"))
        if len(tables) > 1:
            raise ValueError(f"{folder} has several tables ({', '.join(t.name for t in tables)}): name one.")
        table = tables[0] if tables else folder / "labels.csv"
    if not table.is_file():
        raise FileNotFoundError(f"there is no table {table}. {advice}")
    return table


def _fitzpatrick(text: str) -> int | None:
    text = text.upper()
    if text in SHADES:
        return SHADES.index(text) + 1
    return int(text) if text in {"1", "2", "3", "4", "5", "6"} else None


def _read(path: Path, size: int, problems: Problems) -> np.ndarray[Any, Any] | None:
    with requires("image", "mdnorm-experiments"):
        from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Cameras note how they were held and leave the pixels as they are.
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problems.add("unreadable image", path.name, str(error))
        return None
    pixels: np.ndarray[Any, Any] = np.asarray(fitted).transpose(2, 0, 1).copy()
    return pixels
