"""Drawn faces: the label is in their geometry, the skin's shade goes with the label.

The label shifts five measures of a face (width of the jaw, thickness and height of the brows, size of the
mouth, length of the hair), each a normal variable of standard deviation 1 in both classes, by known amounts
δ. The best rule is therefore linear in them and right in Φ(‖δ‖ / 2) of all cases. Shade, pose, light and
background say nothing about the label beyond the correlation that is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm.files import atomic_path, write_text_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = ("female", "male")
SHADES = ("I", "II", "III", "IV", "V", "VI")
"""Fitzpatrick skin types."""

# The ten tones of the Monk Skin Tone scale (E. Monk, 2019), light to dark, in sRGB.
_MONK = ("f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420")
_SKIN = np.array([[int(tone[k : k + 2], 16) for k in (0, 2, 4)] for tone in _MONK], float)
_SHIFTS = np.array([1.4, 1.1, 0.9, 1.1, 0.9])
"""δ: what the label adds to each measure, in standard deviations."""

LIMIT = 0.5 * (1 + math.erf(float(np.linalg.norm(_SHIFTS)) / 2 / math.sqrt(2)))
"""Share of faces that the best rule gets right, where shade and label are independent."""

# Pillow draws to whole pixels: fewer would leave a few thicknesses of the brows only.
_OVERSAMPLING = 8


@dataclass(frozen=True)
class Faces:
    """N faces: images (N, 3, size, size) uint8, labels (N,), numbers in `CLASSES`, and their metadata.

    `shade` (N,) goes from 1 (lightest) to 6; rounded it is the Fitzpatrick type. `geometry` (N, 5) are the
    standardised measures that hold the label.
    """

    images: Tensor
    labels: Tensor
    shade: Tensor
    geometry: Tensor


def make_faces(size: int, *, seed: int, correlation: float = 0.8, image_size: int = 32) -> Faces:
    """Draw `size` faces of `image_size` pixels a side, half of each class, the same ones from the same seed.

    Of a share |correlation|, from −1 to 1, the shade is from the darker half of the scale for one class
    ("male" where it is positive) and from the lighter half for the other; of the rest from the whole scale.
    ValueError for a number out of range, MissingExtraError without Pillow.
    """
    if size < 2 or image_size < 8:
        raise ValueError(f"size must be at least 2 and image_size at least 8, got {size} and {image_size}.")
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation must be between -1 and 1, got {correlation}.")
    generator = np.random.default_rng(seed)
    labels = np.arange(size) % 2
    geometry = generator.standard_normal((size, len(_SHIFTS))) + np.outer(labels - 0.5, _SHIFTS)
    # Where the label decides, it decides between the two halves of the scale.
    dark = labels if correlation >= 0 else 1 - labels
    decided = generator.random(size) < abs(correlation)
    shade = np.where(decided, 1 + 2.5 * dark + 2.5 * generator.random(size), 1 + 5 * generator.random(size))
    images = np.empty((size, 3, image_size, image_size), np.uint8)
    for row in range(size):
        picture = _draw(geometry[row], shade[row], generator, image_size)
        images[row] = np.asarray(picture).transpose(2, 0, 1)
    values = (images, labels, shade.astype(np.float32), geometry.astype(np.float32))
    return Faces(*map(torch.from_numpy, values))


def _skin(shade: float) -> NDArray[Any]:
    """The sRGB colour of a continuous shade."""
    tone = (shade - 1) / 5 * (len(_SKIN) - 1)
    return np.array([np.interp(tone, np.arange(len(_SKIN)), _SKIN[:, channel]) for channel in range(3)])


def _draw(geometry: NDArray[Any], shade: float, generator: np.random.Generator, size: int) -> Image:
    with requires("image", "mdnorm-experiments"):
        from PIL import Image, ImageDraw

    jaw, brow_thickness, brow_height, mouth, hair_length = geometry
    side = size * _OVERSAMPLING
    unit = side / 100
    skin = _skin(shade) * generator.uniform(0.93, 1.07)
    hair = np.array([(35, 25, 20), (90, 60, 35), (150, 110, 60), (60, 55, 55)][generator.integers(4)], float)
    background = generator.uniform(60, 200, 3)
    canvas = Image.new("RGB", (side, side), _colour(background))
    draw = ImageDraw.Draw(canvas)
    x, y = 50 + generator.normal(0, 2.5), 52 + generator.normal(0, 2.0)
    width, height = 24 + generator.normal(0, 1.0), 31 + generator.normal(0, 1.2)

    def ellipse(cx: float, cy: float, rx: float, ry: float, colour: NDArray[Any]) -> None:
        draw.ellipse(
            ((cx - rx) * unit, (cy - ry) * unit, (cx + rx) * unit, (cy + ry) * unit), _colour(colour)
        )

    def polygon(points: list[tuple[float, float]], colour: NDArray[Any]) -> None:
        draw.polygon([value * unit for point in points for value in point], _colour(colour))

    # Hair behind the head: the longer, the further down it comes. Long hair is the first class's.
    length = 6.0 - 4.0 * hair_length
    ellipse(x, y - 6, width + 5, height, hair)
    draw.rectangle(
        ((x - width - 5) * unit, (y - 6) * unit, (x + width + 5) * unit, (y + 12 + length) * unit),
        _colour(hair),
    )
    ellipse(x, y + 38, 15, 16, skin * 0.85)
    ellipse(x, y - 5, width, height - 5, skin)
    # Jaw: a trapezoid with round corners whose lower width is the measure.
    lower = 15.0 + 2.6 * jaw
    chin = y + height - 2
    right = [(width, y), (width - 2, y + 12), (lower, chin - 4), (lower * 0.6, chin)]
    polygon([(x + dx, py) for dx, py in right] + [(x - dx, py) for dx, py in reversed(right)], skin)
    ellipse(x, y - height + 4, width * 0.95, 9, hair)
    thickness = max(2.2 + 0.7 * brow_thickness, 0.4)
    # Both ends rounded for themselves would change the thickness by two pixels at a time.
    top = round((y - 10.5 + 1.1 * brow_height - thickness / 2) * unit)
    bottom = top + round(thickness * unit) - 1
    for direction in (-1, 1):
        cx = x + direction * 10.5
        draw.rectangle(((cx - 6.5) * unit, top, (cx + 6.5) * unit, max(bottom, top)), _colour(hair * 0.6))
        ellipse(cx, y - 3, 4.6, 2.6, np.array([240.0, 240.0, 240.0]))
        ellipse(cx + generator.normal(0, 0.5), y - 3, 2.1, 2.3, np.array([40.0, 30.0, 25.0]))
    polygon([(x, y - 2), (x + 4, y + 9), (x - 4, y + 9)], skin * 0.82)
    half = max(8.5 - 1.4 * mouth, 2.0)
    ellipse(x, y + 17, half, max(2.8 - 0.5 * mouth, 0.8), skin * 0.5 + np.array([90.0, 25.0, 30.0]) * 0.6)
    picture = canvas.rotate(
        generator.normal(0, 4), Image.Resampling.BILINEAR, fillcolor=_colour(background)
    ).resize((size, size), Image.Resampling.BOX)
    # Light from one side, and the camera's noise.
    ramp = np.linspace(-1, 1, size)
    angle = generator.uniform(0, 2 * math.pi)
    light = 1 + 0.12 * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    pixels = np.asarray(picture, float) * light[:, :, None] + generator.normal(0, 4, (size, size, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _colour(values: NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = values.round().clip(0, 255).astype(int).tolist()
    return red, green, blue


def write_image_folder(folder: Path, faces: Faces) -> Path:
    """Write PNG files and a table ``labels.csv``, as `load_image_folder` reads them; return the table."""
    with requires("image", "mdnorm-experiments"):
        from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = ["filename,gender,shade"]
    for row in range(len(faces.labels)):
        name = f"face-{row:05d}.png"
        with atomic_path(folder / "images" / name) as temporary:
            Image.fromarray(faces.images[row].permute(1, 2, 0).numpy()).save(temporary, format="PNG")
        shade = SHADES[min(max(round(float(faces.shade[row])), 1), 6) - 1]
        lines.append(f"{name},{CLASSES[int(faces.labels[row])]},{shade}")
    table = folder / "labels.csv"
    write_text_atomically(table, "\n".join([*lines, ""]))
    return table
