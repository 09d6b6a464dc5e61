"""HMDB51 in its published layout (Kuehne et al. 2011), with scene scores as metadata: see docs/video.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm_experiments.data.reading import Problems, column_names

COLUMNS = {"clip": ("clip",)}
"""What the table has beside a column for each scene → how that is called if no other name is given."""


@dataclass(frozen=True)
class VideoFolder:
    """N clips that can be used, ordered by class and name, and what was left out (`problems`).

    `clips` are (N, 3, T, size, size) uint8, `labels` (N,) int64 into `classes`, `scores` (N, S) float32, by
    scene, and `is_test` (N,) bool.
    """

    clips: Tensor
    labels: Tensor
    scores: Tensor
    is_test: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    scenes: tuple[str, ...]
    problems: Problems


def load_hmdb51(
    folder: Path,
    scores: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    split: int = 1,
    num_frames: int = 8,
    image_size: int = 32,
    on_problem: str = "error",
) -> VideoFolder:
    """Read the clips of split 1, 2 or 3 and their scene scores, from a folder in the published layout.

    `num_frames` are taken from each clip at equal distances; the centre square is resized to `image_size`.
    The scores are a CSV or Parquet table with a column "clip", or as `columns` name it, and one column a
    scene; by default ``scene_scores.csv`` or ``.parquet`` in the folder.

    DataProblemsError lists all clips, lines and scores that cannot be used, unless `on_problem` is "skip",
    which leaves them out. FileNotFoundError says which part of the layout is not there and where to get it.
    ValueError: another split, an unusable table, fewer than two classes. MissingExtraError: PyAV, pandas or
    pyarrow is not installed.
    """
    if split not in (1, 2, 3):
        raise ValueError(f"split must be 1, 2 or 3, got {split!r}.")
    files, splits = folder / "hmdb51_org", folder / "testTrainMulti_7030_splits"
    for part in (files, splits):
        if not part.is_dir():
            raise FileNotFoundError(
                f"there is no folder {part}. Get hmdb51_org.rar and test_train_splits.rar from the Serre Lab "
                "(HMDB51, Brown University) and unpack both, each class's archive into hmdb51_org/<class>."
            )
    table = _read_scores(folder, scores, columns)
    counts = Counter[str](table.index)
    problems = Problems()
    for name in sorted(name for name, count in counts.items() if count > 1):
        problems.add("duplicate scores", name, f"{counts[name]} rows")
    available = {(path.parent.name, path.name): path for path in files.glob("*/*") if path.is_file()}
    named: dict[str, tuple[str, int]] = {}
    for path in sorted(splits.glob(f"*_test_split{split}.txt")):
        action = path.name[: -len(f"_test_split{split}.txt")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if not words:
                continue
            where = f"line {number} of {path.name}"
            if len(words) != 2 or words[1] not in ("0", "1", "2"):
                problems.add("bad split line", where, f"{line!r} is not a clip and 0, 1 or 2")
            elif words[0] in named:
                problems.add("duplicate clip", words[0], where)
            else:
                named[words[0]] = (action, int(words[1]))
    found = []
    for name, (action, use) in sorted(named.items(), key=lambda item: (item[1][0], item[0])):
        if use == 0:
            continue
        if (action, name) not in available:
            problems.add("no clip", name, f"not in {files / action}")
        elif counts[name] == 1 and np.isfinite(row := table.loc[name].to_numpy()).all():
            try:
                frames = decode(available[action, name], num_frames, image_size)
            except ValueError as error:
                problems.add("unreadable clip", name, str(error))
            else:
                found.append((frames, action, row, use == 2, name))
        elif counts[name] < 2:
            problems.add("bad scores" if counts[name] else "no scores", name, "in the table of scene scores")
    in_split = {(action, name) for name, (action, _) in named.items()}
    for action, name in sorted(available.keys() - in_split):
        problems.add("clip in no split", name, str(available[action, name]))
    problems.settle(on_problem)
    classes = problems.classes(
        (action for _, action, *_ in found), f"{folder} must have clips of two classes or more"
    )
    clips, actions, of_scenes, is_test, names = zip(*found, strict=True)
    return VideoFolder(
        torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous(),
        torch.tensor([classes.index(action) for action in actions]),
        torch.from_numpy(np.stack(of_scenes)),
        torch.tensor(is_test),
        names,
        classes,
        tuple(table.columns),
        problems,
    )


def _read_scores(folder: Path, path: Path | None, columns: Mapping[str, str] | None) -> Any:
    """Return a DataFrame of float32 scores: clips × scenes, NaN where a cell is no number."""
    with requires("video", "mdnorm-experiments"):
        import pandas as pd

    if path is None:
        candidates = [folder / f"scene_scores{suffix}" for suffix in (".parquet", ".csv")]
        path = next((each for each in candidates if each.is_file()), candidates[-1])
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no table of scene scores {path}: a column 'clip' (the file's name) and one for each "
            "scene, from a Places365 classifier on frames of the clip, say."
        )
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a table of scene scores: {error}") from error
    table.columns = available = list(map(str, table.columns))
    clip = column_names(path, available, COLUMNS, columns)["clip"]
    if len(available) < 3:
        raise ValueError(f"{path} must have two scenes or more beside {clip!r}, got {', '.join(available)}.")
    values = table.set_index(table[clip].astype(str)).drop(columns=clip)
    return values.apply(pd.to_numeric, errors="coerce").astype(np.float32)


def decode(path: Path, num_frames: int, image_size: int) -> NDArray[np.uint8]:
    """Return frames of a clip at equal distances, (T, size, size, 3).

    ValueError for a file that is truncated, empty or no video, MissingExtraError without PyAV.
    """
    with requires("video", "mdnorm-experiments"):
        import av
        from PIL import Image

    frames: list[Any] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("the file has no video stream")
            container.streams.video[0].thread_type = "NONE"
            for frame in container.decode(video=0):
                side = min(frame.width, frame.height)
                pixels = frame.to_ndarray(format="rgb24")
                top, left = (frame.height - side) // 2, (frame.width - side) // 2
                frames.append(pixels[top : top + side, left : left + side])
            expected = container.streams.video[0].frames
    except av.FFmpegError as error:
        raise ValueError(f"cannot be decoded: {error.strerror}") from error
    if not frames:
        raise ValueError("there are no frames in it")
    if len(frames) < expected:
        raise ValueError(f"{len(frames)} of its {expected} frames can be decoded")
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, num_frames).round().astype(int)]
    size, box = (image_size, image_size), Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, box)) for frame in chosen])
