"""Clips of an articulated figure in action over scenes that go with the label, encoded as real mp4 files.

The action is in the movement alone. The scene, a textured background of one of six types, goes with the label
as it stands, wrong ones included; scene scores are mostly, not always, on it. See docs/video.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.extras import requires
from mdnorm.files import atomic_path, write_text_atomically

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

ACTIONS = ("jump", "wave", "squat")
SCENES = ("beach", "forest", "court", "street", "gym", "snow")
LABEL_NOISE = 0.1
"""Share of wrong labels, as annotators leave them: who reads the movement is right in all others."""

_FRAMES = 8
_OVERSAMPLING = 3

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Clips:
    """N clips: frames (N, T, size, size, 3), labels and scenes (N,), scores (N, number of scenes).

    Labels are numbers in `ACTIONS`, scenes in `SCENES`. Each row of the scores sums to 1.
    """

    frames: Pixels
    labels: NDArray[np.int64]
    scenes: NDArray[np.int64]
    scores: NDArray[np.float32]


def make_clips(size: int, *, seed: int, correlation: float = 0.8, image_size: int = 32) -> Clips:
    """Draw `size` clips of 8 frames of `image_size` pixels a side, the same ones from the same seed.

    A share `correlation`, from 0 to 1, of them has one of its label's own two scenes, the others any of the
    six. ValueError for a number out of range, MissingExtraError without Pillow.
    """
    if size < 1 or image_size < 16 or image_size % 2:
        raise ValueError(
            f"size must be at least 1 and image_size an even number from 16 on, got {size} and {image_size}."
        )
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must be between 0 and 1, got {correlation}.")
    generator = np.random.default_rng(seed)
    shown = np.arange(size) % len(ACTIONS)
    wrong = generator.random(size) < LABEL_NOISE
    labels = np.where(wrong, (shown + generator.integers(1, len(ACTIONS), size=size)) % len(ACTIONS), shown)
    own = 2 * labels + generator.integers(2, size=size)
    any_scene = generator.integers(len(SCENES), size=size)
    scenes = np.where(generator.random(size) < correlation, own, any_scene)
    frames: Pixels = np.stack(
        [_clip(int(shown[row]), int(scenes[row]), generator, image_size) for row in range(size)]
    )
    logits = generator.normal(0, 0.7, (size, len(SCENES)))
    logits[np.arange(size), scenes] += 3.0
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Clips(frames, labels.astype(np.int64), scenes.astype(np.int64), scores.astype(np.float32))


# Two colours and a texture: stripes along x, stripes along y, waves, or grain of some size.
_LOOKS: tuple[tuple[tuple[int, int, int], tuple[int, int, int], str], ...] = (
    ((215, 195, 150), (120, 170, 205), "waves"),
    ((50, 90, 45), (95, 70, 45), "vertical"),
    ((190, 110, 70), (225, 160, 115), "horizontal"),
    ((110, 110, 115), (165, 160, 150), "vertical"),
    ((150, 120, 85), (90, 75, 120), "horizontal"),
    ((235, 240, 245), (190, 205, 220), "waves"),
)


def _background(scene: int, generator: np.random.Generator, size: int) -> NDArray[Any]:
    first, second, texture = _LOOKS[scene]
    ramp = np.linspace(0, 1, size)
    x, y = np.meshgrid(ramp, ramp)
    frequency, phase = generator.uniform(2.5, 5), generator.uniform(0, 2 * math.pi)
    along = {"vertical": x, "horizontal": y, "waves": y + 0.12 * np.sin(9 * x + phase)}[texture]
    mixed = 0.5 + 0.5 * np.sin(2 * math.pi * frequency * along + phase)
    # Hue and light vary within a scene, so that its colour alone is no label.
    light = generator.uniform(0.8, 1.15) + generator.normal(0, 0.04, 3)
    colours: NDArray[Any] = np.array(first, float) + mixed[:, :, None] * (
        np.array(second, float) - np.array(first, float)
    )
    noisy: NDArray[Any] = colours * light + generator.normal(0, 6, (size, size, 1))
    return noisy


def _clip(action: int, scene: int, generator: np.random.Generator, size: int) -> Pixels:
    with requires("video", "mdnorm-experiments"):
        from PIL import Image, ImageDraw

    side = size * _OVERSAMPLING
    background = _background(scene, generator, side).clip(0, 255).astype(np.uint8)
    colour = generator.uniform(20, 235, 3)
    # Dark on light or light on dark: the figure must be there to be seen.
    if abs(colour.mean() - background.mean()) < 70:
        colour = colour * 0.2 if background.mean() > 128 else 255 - 0.2 * colour
    clothing = tuple(int(value) for value in colour)
    scale = generator.uniform(0.8, 1.1) * side / 100
    x = side * generator.uniform(0.38, 0.62)
    floor = side * generator.uniform(0.86, 0.95)
    rate, phase = generator.uniform(0.8, 1.3), generator.uniform(0, 2 * math.pi)
    strength = generator.uniform(0.75, 1.15)
    rest = generator.normal(0, 0.12, 4)
    frames = np.empty((_FRAMES, size, size, 3), np.uint8)
    for time in range(_FRAMES):
        angle = 2 * math.pi * rate * time / _FRAMES + phase
        picture = Image.fromarray(background)
        _figure(ImageDraw.Draw(picture), action, angle, strength, rest, (x, floor, scale), clothing)
        small = np.asarray(picture.resize((size, size), Image.Resampling.BOX), float)
        frames[time] = (small + generator.normal(0, 3, small.shape)).round().clip(0, 255)
    return frames


def _figure(
    draw: ImageDraw,
    action: int,
    angle: float,
    strength: float,
    rest: NDArray[Any],
    place: tuple[float, float, float],
    colour: tuple[int, ...],
) -> None:
    """Draw the figure at a phase of its action: every action passes through poses of the others."""
    x, floor, scale = place
    swing = math.sin(angle)
    lift, bend, arm = 0.0, 0.15, 0.9
    if ACTIONS[action] == "jump":
        lift, bend, arm = 14 * strength * max(swing, 0), 0.25 - 0.2 * strength * swing, 0.9 - 0.3 * swing
    elif ACTIONS[action] == "squat":
        bend, arm = 0.55 + 0.5 * strength * swing, 0.9 - 0.3 * swing
    else:
        arm = 1.9 + 0.9 * strength * swing
    thigh = shin = 19.0
    hip_height = (thigh * math.cos(bend) + shin * math.cos(bend)) * scale
    hip = (x, floor - lift * scale - hip_height)
    shoulder = (x, hip[1] - 27 * scale)
    width = max(round(6 * scale), 2)

    def line(start: tuple[float, float], end: tuple[float, float]) -> None:
        draw.line([start, end], fill=colour, width=width)

    line(hip, shoulder)
    for index, side in enumerate((-1, 1)):
        spread = side * (bend + 0.12 + 0.2 * rest[index])
        knee = (hip[0] + math.sin(spread) * thigh * scale, hip[1] + math.cos(bend) * thigh * scale)
        foot = (hip[0] + side * 5 * scale, hip[1] + 2 * math.cos(bend) * thigh * scale)
        line(hip, knee)
        line(knee, foot)
        raised = arm + rest[2 + index]
        hand = (
            shoulder[0] + side * math.sin(raised) * 24 * scale,
            shoulder[1] + 3 * scale + math.cos(raised) * 24 * scale,
        )
        line((shoulder[0], shoulder[1] + 3 * scale), hand)
    radius = 6.5 * scale
    cx, cy = shoulder[0], shoulder[1] - radius
    draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=colour)


def encode(frames: Pixels, path: Path, *, rate: int = 8) -> Path:
    """Write one clip, (T, H, W, 3) uint8 of even height and width, as an ``.mp4`` or ``.avi`` file.

    It is H.264 where the installed ffmpeg has it, else MPEG-4, with `rate` frames a second. ValueError for
    another shape or dtype, MissingExtraError without PyAV.
    """
    with requires("video", "mdnorm-experiments"):
        import av
        from av.codec import codecs_available

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (T, H, W, 3) of uint8, got {frames.shape} of {frames.dtype}.")
    codec = "libx264" if "libx264" in codecs_available else "mpeg4"
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format=path.suffix[1:]) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "12"}
        else:
            stream.bit_rate = 400_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_hmdb51(folder: Path, train: Clips | None, test: Clips) -> Path:
    """Write clips and scene scores in HMDB51's layout, as `load_hmdb51` reads them; return the folder.

    None for `train` writes test clips only.
    """
    scores, lines = [",".join(("clip", *SCENES))], {action: list[str]() for action in ACTIONS}
    parts = [("test", 2, test)] if train is None else [("train", 1, train), ("test", 2, test)]
    for part, use, clips in parts:
        for row in range(len(clips.labels)):
            action = ACTIONS[int(clips.labels[row])]
            name = f"{action}_{part}_{row:05d}.mp4"
            target = folder / "hmdb51_org" / action / name
            target.parent.mkdir(parents=True, exist_ok=True)
            encode(clips.frames[row], target)
            lines[action].append(f"{name} {use} ")
            scores.append(",".join((name, *(f"{score:.6f}" for score in clips.scores[row]))))
    splits = folder / "testTrainMulti_7030_splits"
    splits.mkdir(parents=True, exist_ok=True)
    for action, found in lines.items():
        write_text_atomically(splits / f"{action}_test_split1.txt", "\n".join([*found, ""]))
    write_text_atomically(folder / "scene_scores.csv", "\n".join([*scores, ""]))
    return folder
