"""T1 volumes of a BIDS folder with age, sex, site and diagnosis from its table of participants.

BIDS: Gorgolewski et al. (2016), The brain imaging data structure, Scientific Data 3, 160044.
"""

from __future__ import annotations

import math
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
from mdnorm_experiments.data.brains import SHAPE, SPACING
from mdnorm_experiments.data.reading import Problems, is_missing, read_rows

COLUMNS = {
    "subject": ("participant_id",),
    "age": ("age",),
    "sex": ("sex",),
    "site": ("site",),
    "label": ("diagnosis",),
}
"""What the table of participants must tell → what the column is called if no other name is given."""

_SEXES = {"f": 0, "female": 0, "m": 1, "male": 1}
_OLDEST = 120
_LARGEST = 2000.0  # millimetres from one end of a volume to the other
_ADVICE = (
    "The layout is participants.tsv (participant_id, age, sex, site, diagnosis) and one image a subject, "
    "sub-*/anat/*_T1w.nii.gz or sub-*/ses-*/anat/*_T1w.nii.gz. Such data come from ADNI (adni.loni.usc.edu, "
    "on request) or OpenNeuro (openneuro.org); for data of your own see bids.neuroimaging.io."
)


@dataclass(frozen=True)
class BidsFolder:
    """N subjects that can be used, in the order of the table, and what was left out (`problems`).

    `volumes` are (N, 1, *shape) float32 in RAS orientation, see `standardize`; `labels` (N,) int64 into
    `classes` and `site` (N,) int64 into `sites`, both sorted; `age` (N,) float32, years; `sex` (N,) int64, 0
    female and 1 male; `subjects` as in "sub-0001".
    """

    volumes: Tensor
    labels: Tensor
    age: Tensor
    sex: Tensor
    site: Tensor
    subjects: tuple[str, ...]
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    problems: Problems


def standardize(volumes: Tensor) -> Tensor:
    """Return (N, C, D, H, W) float32 volumes: voxels other than 0 get mean 0 and deviation 1.

    ValueError for another number of dimensions, MissingExtraError without MONAI.
    """
    with requires("mri", "mdnorm-experiments"):
        from monai.transforms.intensity.array import NormalizeIntensity

    if volumes.ndim != 5:
        raise ValueError(f"volumes must have shape (N, C, D, H, W), got {tuple(volumes.shape)}.")
    normalize = NormalizeIntensity(nonzero=True)
    result = torch.empty_like(volumes, dtype=torch.float32)
    for row, volume in enumerate(volumes):
        result[row] = torch.as_tensor(normalize(volume.clone()))
    return result


def load_bids(
    folder: Path,
    *,
    columns: Mapping[str, str] | None = None,
    shape: tuple[int, int, int] = SHAPE,
    spacing: float = SPACING,
    on_problem: str = "error",
) -> BidsFolder:
    """Read T1 volumes and the table of participants of a BIDS folder.

    Images should be stripped of the skull (0 outside the brain) and aligned. They are resampled to `spacing`
    millimetres, smoothed before where that is coarser than theirs, then padded with 0 or cropped about the
    middle to `shape`: voxels from left to right, back to front, bottom to top. `columns` are names for some
    of `COLUMNS`.

    DataProblemsError lists all rows and images that cannot be used, unless `on_problem` is "skip", which
    leaves them out. FileNotFoundError without folder or table says what layout is needed and where such data
    come from. ValueError: an unusable table, an argument out of range, one label only. MissingExtraError: a
    package of the extra "mri" is not installed.
    """
    folder = Path(folder)
    table = folder / "participants.tsv"
    for path, what in ((folder, "folder"), (table, "table")):
        if not path.exists():
            raise FileNotFoundError(f"there is no {what} {path}. {_ADVICE}")
    if not 0 < spacing < math.inf or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"spacing must be positive and shape three positive numbers, got {spacing} and {shape}."
        )
    cells = read_rows(table, "\t", COLUMNS, columns)
    problems = Problems()
    images = _images(folder)
    rows = [(where, row, _subject(row["subject"])) for where, row in cells]
    count = Counter(subject for *_, subject in rows)
    found = []
    for where, row, subject in rows:
        age, sex = _age(row["age"]), _SEXES.get(row["sex"].lower())
        bad = {"age": age is None, "sex": sex is None}
        bad |= {part: is_missing(row[part]) for part in ("site", "label")}
        paths = images.get(subject, [])
        if not subject:
            problems.add("no subject", where, "the cell is empty")
        elif count[subject] > 1:
            # Which of several rows of a subject is right, nobody can say.
            problems.add("duplicate row", subject, where)
        elif any(bad.values()):
            for part in (part for part, is_bad in bad.items() if is_bad):
                problems.add(f"bad {part}", subject, f"{row[part]!r} in {where}")
        elif len(paths) != 1:
            listing = ", ".join(str(path.relative_to(folder)) for path in paths)
            kind = "several images" if paths else "no image"
            lacking = f"no *_T1w.nii(.gz) in {subject}/anat or {subject}/ses-*/anat"
            problems.add(kind, subject, listing or lacking)
        elif (volume := _read(paths[0], shape, spacing, subject, problems)) is not None:
            found.append((volume, row["label"], age, sex, row["site"], subject))
    for subject in sorted(images.keys() - count.keys()):
        problems.add("no row", subject, f"not in {table.name}")
    problems.settle(on_problem)
    classes = problems.classes(
        (label for _, label, *_ in found), f"{table} must have two labels or more with images"
    )
    volumes, labels, ages, sexes, places, subjects = zip(*found, strict=True)
    sites = tuple(sorted(set(places)))
    return BidsFolder(
        standardize(torch.stack(volumes)),
        torch.tensor([classes.index(label) for label in labels]),
        torch.tensor(ages),
        torch.tensor(sexes),
        torch.tensor([sites.index(place) for place in places]),
        subjects,
        classes,
        sites,
        problems,
    )


def _subject(text: str) -> str:
    return text if not text or text.startswith("sub-") else f"sub-{text}"


def _age(text: str) -> float | None:
    try:
        age = float(text)
    except ValueError:
        return None
    return age if 0 < age <= _OLDEST else None


def _images(folder: Path) -> dict[str, list[Path]]:
    """Return the T1 images of every subject; a subject's folder without any has an empty list."""
    found = {}
    for subject in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        images = [*subject.glob("anat/*_T1w.nii*"), *subject.glob("ses-*/anat/*_T1w.nii*")]
        found[subject.name] = sorted(path for path in images if path.name.endswith((".nii", ".nii.gz")))
    return found


def _read(
    path: Path, shape: tuple[int, int, int], spacing: float, subject: str, problems: Problems
) -> Tensor | None:
    """Return a volume (1, *shape), or None with its problem noted."""
    with requires("mri", "mdnorm-experiments"):
        import nibabel as nib

    try:
        image: Any = nib.load(path)
        voxels = np.asarray(image.get_fdata(dtype=np.float32))
        affine = np.asarray(image.affine, np.float64)
    except Exception as error:  # what a damaged file leads to depends on which of its bytes are wrong
        problems.add("unreadable image", subject, f"{path.name}: {error or type(error).__name__}")
        return None
    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or 0 in voxels.shape:
        problem = "wrong shape", f"{voxels.shape}, not three-dimensional"
    elif not np.isfinite(voxels).all():
        problem = "not finite", f"{int((~np.isfinite(voxels)).sum())} voxels are NaN or infinite"
    elif not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        problem = "bad affine", "its voxels have no places in space"
    elif (length := (np.linalg.norm(affine[:3, :3], axis=0) * voxels.shape).max()) > _LARGEST:
        problem = "bad affine", f"the volume would be {length:g} mm long, more than {_LARGEST:g}"
    elif len((volume := _resample(voxels, affine, shape, spacing)).unique()) == 1:
        problem = "empty image", "all voxels are the same"
    else:
        return volume
    problems.add(problem[0], subject, f"{path.name}: {problem[1]}")
    return None


def _resample(
    voxels: NDArray[np.float32], affine: NDArray[np.float64], shape: tuple[int, int, int], spacing: float
) -> Tensor:
    """Return a volume (1, *shape) whose voxels go from left to right, back to front, bottom to top."""
    with requires("mri", "mdnorm-experiments"):
        import nibabel as nib
        from monai.transforms.croppad.array import ResizeWithPadOrCrop
        from nibabel import processing

    nibabel: Any = nib
    tools: Any = processing
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    # Without smoothing, structures finer than the new voxels would turn into noise.
    width = np.sqrt(np.maximum(spacing**2 - steps**2, 0))
    smooth = tools.smooth_image(nibabel.Nifti1Image(voxels, affine), width)
    found = tools.resample_to_output(smooth, [spacing] * 3, order=1).get_fdata(dtype=np.float32)
    resized: Any = ResizeWithPadOrCrop(spatial_size=shape)(torch.from_numpy(found)[None])
    return torch.as_tensor(resized.as_tensor())
