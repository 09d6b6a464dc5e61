"""T1 volumes of a BIDS folder with age, sex, site and diagnosis from its table of participants.

BIDS: Gorgolewski et al. (2016), The brain imaging data structure, Scientific Data 3, 160044.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.extras import requires
from mdnorm_experiments.data.brains import SHAPE, SPACING
from mdnorm_experiments.data.problems import Problems
from mdnorm_experiments.data.tables import is_missing, read_rows

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


@dataclass(frozen=True)
class _Participant:
    subject: str
    age: float
    sex: int
    site: str
    label: str


def standardize(volumes: Tensor) -> Tensor:
    """Return (N, C, D, H, W) float32 volumes whose voxels inside the brain have mean 0 and deviation 1.

    The brain is where a volume is not 0, by MONAI's ``NormalizeIntensity(nonzero=True)``; the rest stays 0.
    Raises ValueError for another number of dimensions and MissingExtraError without MONAI.
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

    Images should be stripped of the skull (0 outside the brain) and aligned; neither is done here. They are
    resampled to `spacing` millimetres, smoothed before where that is coarser than theirs, then padded with 0
    or cropped about the middle to `shape`: voxels from left to right, back to front, bottom to top. `columns`
    are names for some of `COLUMNS`.

    DataProblemsError lists all at once, unless `on_problem` is "skip", which leaves them out: rows without
    image, images without row, several rows or images of a subject, a missing or invalid age, sex, site or
    label, images that are truncated or damaged, not finite, empty or not three-dimensional. FileNotFoundError
    without folder or table says what layout is needed and where such data come from. ValueError: the table
    cannot be parsed, a column is missing or there twice, an argument is out of range, there is one label
    only. MissingExtraError: a package of the extra "mri" is not installed.
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
    rows = [(where, _subject(row["subject"]), row) for where, row in read_rows(table, "\t", COLUMNS, columns)]
    problems = Problems()
    participants = _participants(rows, problems)
    images = _images(folder)
    for subject in sorted(images.keys() - {subject for _, subject, _ in rows}):
        problems.add("no row", subject, f"not in {table.name}")
    found: list[tuple[_Participant, Tensor]] = []
    for participant in participants:
        paths = images.get(participant.subject, [])
        if len(paths) > 1:
            listing = ", ".join(str(path.relative_to(folder)) for path in paths)
            problems.add("several images", participant.subject, listing)
        elif not paths:
            problems.add("no image", participant.subject, f"no *_T1w.nii.gz in {participant.subject}/**/anat")
        else:
            volume = _read(paths[0], shape, spacing, participant.subject, problems)
            if volume is not None:
                found.append((participant, volume))
    problems.settle(on_problem)
    needed = f"{table} must have two labels or more with images"
    classes = problems.classes((participant.label for participant, _ in found), needed)
    sites = tuple(sorted({participant.site for participant, _ in found}))
    return BidsFolder(
        standardize(torch.stack([volume for _, volume in found])),
        torch.tensor([classes.index(participant.label) for participant, _ in found]),
        torch.tensor([participant.age for participant, _ in found]),
        torch.tensor([participant.sex for participant, _ in found]),
        torch.tensor([sites.index(participant.site) for participant, _ in found]),
        tuple(participant.subject for participant, _ in found),
        classes,
        sites,
        problems,
    )


def _subject(text: str) -> str:
    return text if text.startswith("sub-") or not text else f"sub-{text}"


def _participants(
    rows: Sequence[tuple[str, str, Mapping[str, str]]], problems: Problems
) -> list[_Participant]:
    """Return those of the rows (place, subject, cells) that can be used."""
    found = []
    count = Counter(subject for _, subject, _ in rows)
    for where, subject, row in rows:
        if not subject:
            problems.add("no subject", where, "the cell is empty")
            continue
        if count[subject] > 1:
            # Which of several rows of a subject is right, nobody can say.
            problems.add("duplicate row", subject, where)
            continue
        age, sex = _age(row["age"]), _SEXES.get(row["sex"].lower())
        bad = {"age": age is None, "sex": sex is None}
        bad |= {part: is_missing(row[part]) for part in ("site", "label")}
        for part in (part for part, is_bad in bad.items() if is_bad):
            problems.add(f"bad {part}", subject, f"{row[part]!r} in {where}")
        if age is not None and sex is not None and not any(bad.values()):
            found.append(_Participant(subject, age, sex, row["site"], row["label"]))
    return found


def _age(text: str) -> float | None:
    try:
        age = float(text)
    except ValueError:
        return None
    return age if 0 < age <= _OLDEST else None


def _images(folder: Path) -> dict[str, list[Path]]:
    """Return the T1 images of every subject; a subject's folder without any has an empty list."""
    return {
        subject.name: sorted(
            path
            for pattern in ("anat/*_T1w.nii*", "ses-*/anat/*_T1w.nii*")
            for path in subject.glob(pattern)
            if path.name.endswith((".nii", ".nii.gz"))
        )
        for subject in sorted(folder.glob("sub-*"))
        if subject.is_dir()
    }


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
        problems.add("wrong shape", subject, f"{path.name}: {voxels.shape}, not three-dimensional")
        return None
    if not np.isfinite(voxels).all():
        count = int((~np.isfinite(voxels)).sum())
        problems.add("not finite", subject, f"{path.name}: {count} voxels are NaN or infinite")
        return None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        problems.add("bad affine", subject, f"{path.name}: the voxels have no places in space")
        return None
    extent = float((np.linalg.norm(affine[:3, :3], axis=0) * voxels.shape).max())
    if extent > _LARGEST:
        problems.add("bad affine", subject, f"{path.name}: the volume would be {extent:g} mm long")
        return None
    volume = _resample(voxels, affine, shape, spacing)
    if not bool((volume != volume.flatten()[0]).any()):
        problems.add("empty image", subject, f"{path.name}: all voxels are the same")
        return None
    return volume


def _resample(
    voxels: NDArray[np.float32], affine: NDArray[np.float64], shape: tuple[int, int, int], spacing: float
) -> Tensor:
    with requires("mri", "mdnorm-experiments"):
        from monai.data.meta_tensor import MetaTensor
        from monai.transforms.croppad.array import ResizeWithPadOrCrop
        from monai.transforms.intensity.array import GaussianSmooth
        from monai.transforms.spatial.array import Orientation, Spacing

    volume: Any = MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine))
    # MONAI 1.6 warns unless it is told how the axes are called.
    volume = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(volume)
    steps = np.linalg.norm(np.asarray(volume.affine)[:3, :3], axis=0)
    if not np.allclose(steps, spacing, rtol=1e-4):
        # Without smoothing, structures finer than the new voxels would turn into noise.
        ratios = np.maximum(spacing / steps, 1)
        sigma = np.sqrt(ratios**2 - 1) / (2 * math.sqrt(2 * math.log(2)))
        if sigma.max() > 0:
            smooth = GaussianSmooth(sigma=[max(float(value), 1e-3) for value in sigma])
            volume = smooth(volume)
        volume = Spacing(pixdim=(spacing,) * 3, mode="bilinear", padding_mode="zeros")(volume)
    volume = ResizeWithPadOrCrop(spatial_size=shape)(volume)
    result: Tensor = volume.as_tensor().float()
    return result
