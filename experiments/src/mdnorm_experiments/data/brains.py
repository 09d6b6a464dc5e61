"""Drawn T1 brains of several sites: hippocampal atrophy tells the diagnosis, age and site go with it.

Every volume is the MNI152 template's grey and white matter (nilearn ships them), deformed, thinned and lit
anew. The best rule reads the volume of the hippocampus alone, a normal variable whose means differ by
`SEPARATION`, and is right in Φ(`SEPARATION` / 2) of all cases. See docs/mri.md.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from mdnorm.extras import requires

CLASSES = ("control", "patient")
SITES = ("A", "B", "C", "D")
SHAPE = (32, 40, 32)
"""Voxels from left to right, back to front, bottom to top."""
SPACING = 6.0
"""Millimetres from voxel to voxel."""
SEPARATION = 2.563
"""Distance between the classes' mean hippocampal volumes, in standard deviations."""
LIMIT = 0.5 * (1 + math.erf(SEPARATION / 2 / math.sqrt(2)))
"""Share of brains that the best rule gets right, where the metadata say nothing of the diagnosis."""

# Millimetres in MNI space of the voxel (0, 0, 0).
_ORIGIN = (-93.0, -134.0, -70.0)
_AGE_MEANS, _AGE_SD, _AGE_RANGE = (62.0, 74.0), 6.0, (40.0, 95.0)
# Shares of the sites among subjects of the young and of the old cohort.
_SITE_SHARES = ((0.40, 0.35, 0.15, 0.10), (0.10, 0.15, 0.35, 0.40))
# Of each site: intensity of grey matter, CSF (white matter has 1), noise, and the bias field's slopes.
_SITE_GREY = (0.80, 0.75, 0.70, 0.65)
_SITE_CSF = (0.30, 0.22, 0.30, 0.22)
_SITE_NOISE = (0.03, 0.04, 0.03, 0.05)
_SITE_BIAS = ((0.10, 0.00, 0.05), (-0.05, 0.10, 0.00), (0.00, -0.10, 0.05), (-0.10, 0.05, -0.05))
_HIPPOCAMPUS = ((-27.0, -20.0, -16.0), (27.0, -20.0, -16.0))
_HIPPOCAMPUS_RADII = (8.0, 14.0, 8.0)
_VENTRICLES = ((-13.0, -8.0, 20.0), (13.0, -8.0, 20.0))
_VENTRICLE_RADII = (10.0, 26.0, 11.0)
_CHUNK = 50


@dataclass(frozen=True)
class Brains:
    """N brains: volumes (N, 1, 32, 40, 32) as a scanner gives them, 0 outside the brain, and their metadata.

    Labels and sites (N,) int64 are numbers in `CLASSES` and `SITES`; age (N,) years, 40 to 95; sex (N,)
    int64, 0 female and 1 male; `hippocampus` (N,) its volume, standardised, which tells the label.
    """

    volumes: Tensor
    labels: Tensor
    age: Tensor
    sex: Tensor
    site: Tensor
    hippocampus: Tensor


def make_brains(size: int, *, seed: int, correlation: float = 0.8) -> Brains:
    """Draw `size` brains, half of each class; the same seed gives the same ones.

    A share `correlation`, from 0 to 1, of the patients comes from the old cohort (age 74 ± 6, mostly sites C
    and D) and of the controls from the young one (62 ± 6, mostly A and B), the others from either. ValueError
    for a number out of range, MissingExtraError without nilearn.
    """
    if size < 2:
        raise ValueError(f"size must be at least 2, one of each class, got {size}.")
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must be between 0 and 1, got {correlation}.")
    generator = np.random.default_rng(seed)
    labels = np.arange(size) % 2
    old = np.where(generator.random(size) < correlation, labels, generator.integers(0, 2, size))
    age = np.take(_AGE_MEANS, old) + _AGE_SD * generator.standard_normal(size)
    age = age.clip(*_AGE_RANGE).round(1)
    # Thresholds of the cumulative shares, so that rounding cannot lead outside the sites.
    ends = np.cumsum(_SITE_SHARES, 1)[old, :-1]
    site = (generator.random((size, 1)) > ends).sum(1)
    sex = generator.integers(0, 2, size)
    hippocampus = generator.standard_normal(size) - (labels - 0.5) * SEPARATION
    volumes = torch.empty(size, 1, *SHAPE)
    for start in range(0, size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        volumes[rows] = _draw(age[rows], sex[rows], site[rows], hippocampus[rows], generator)
    values = (labels, age.astype(np.float32), sex, site, hippocampus.astype(np.float32))
    return Brains(volumes, *map(torch.from_numpy, values))


@lru_cache(maxsize=1)
def _template() -> tuple[Tensor, Tensor]:
    """Return grey and white matter, (2, *SHAPE), and the voxels' places in mm, (3, *SHAPE)."""
    with requires("mri", "mdnorm-experiments"):
        from nilearn import datasets  # type: ignore[import-untyped]
        from nilearn.image import resample_img  # type: ignore[import-untyped]

    maps = []
    for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template):
        image = load(resolution=3)
        image = resample_img(image, _affine(), SHAPE, "linear", force_resample=True, copy_header=True)
        maps.append(torch.from_numpy(np.asarray(image.get_fdata(), np.float32)))
    axes = [torch.arange(n) * SPACING + low for n, low in zip(SHAPE, _ORIGIN, strict=True)]
    return torch.stack(maps).clamp(0, 1), torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _affine() -> NDArray[np.float64]:
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = _ORIGIN
    return affine


def _blob(places: Tensor, centre: tuple[float, ...], radii: tuple[float, ...]) -> Tensor:
    """Return a Gaussian bump of height 1, (N, 1, *SHAPE), over places (N, 3, *SHAPE)."""
    # Axis by axis: sums over three neighbours in memory take longer.
    x, y, z = (((places[:, axis] - centre[axis]) / radii[axis]).square() for axis in range(3))
    return (-0.5 * (x + y + z)).exp_().unsqueeze(1)


def _point(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(3, 1, 1, 1)


def _draw(
    age: NDArray[Any],
    sex: NDArray[Any],
    site: NDArray[Any],
    hippocampus: NDArray[Any],
    generator: np.random.Generator,
) -> Tensor:
    """Draw (N, 1, *SHAPE) volumes."""
    tissues, places = _template()
    count = len(age)

    def column(values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float32).reshape(count, 1, 1, 1, 1)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal((count, *shape), dtype=np.float32))

    # Where in the template each voxel comes from: magnification shrinks the distance to the centre.
    years = column((age - 68) / 10)
    head = 1 + 0.035 * column(2 * sex - 1) + 0.015 * normal(1, 1, 1, 1)
    source = places / head
    widening = (0.10 + 0.13 * years + 0.05 * normal(1, 1, 1, 1)).clamp(-0.4, 0.6)
    for centre in _VENTRICLES:
        pull = widening * _blob(source, centre, _VENTRICLE_RADII)
        source = source - pull * (source - _point(centre))
    source = source + interpolate(2.0 * normal(3, 4, 5, 4), SHAPE, mode="trilinear", align_corners=True)

    extent = SPACING * (_point(SHAPE) - 1)
    # grid_sample counts the axes from the last one.
    grid = ((source - _point(_ORIGIN)) / extent * 2 - 1).flip(1).permute(0, 2, 3, 4, 1)
    warped = grid_sample(
        tissues.expand(count, *tissues.shape), grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    grey, white = warped.split(1, 1)

    # Lost tissue leaves fluid. The hippocampus is thinned where the template has it.
    bump = torch.stack([_blob(source, centre, _HIPPOCAMPUS_RADII) for centre in _HIPPOCAMPUS]).sum(0)
    loss = (0.30 - 0.08 * column(hippocampus)).clamp(0, 0.9) * bump
    cortex = (0.15 + 0.05 * years + 0.03 * normal(1, 1, 1, 1)).clamp(0, 0.5)
    inside = (grey + white).clamp(0, 1)
    grey, white = grey * (1 - cortex) * (1 - loss), white * (1 - loss)

    # Fluid fills the ventricles and what was lost; the skull is stripped, so that the outside is 0.
    ventricle = torch.stack([_blob(source, centre, _VENTRICLE_RADII) for centre in _VENTRICLES]).sum(0)
    brain = torch.maximum(inside, ventricle.clamp(0, 1))
    fluid = (brain - grey - white).clamp(min=0)
    image = white + column(np.take(_SITE_GREY, site)) * grey + column(np.take(_SITE_CSF, site)) * fluid

    slopes = torch.from_numpy(np.asarray(_SITE_BIAS, np.float32)[site]) + 0.03 * normal(3)
    bias = (slopes[:, :, None, None, None] * (places / 80)).sum(1, keepdim=True).exp()
    noise = column(np.take(_SITE_NOISE, site)) * normal(1, *SHAPE)
    gain = 800 * (0.1 * normal(1, 1, 1, 1)).exp()
    return gain * torch.where(brain > 0.1, (image * bias + noise).clamp(min=0.01), 0.0)


def write_bids(folder: Path, brains: Brains) -> None:
    """Write brains as a new BIDS folder, which appears only when complete, as `load_bids` reads it.

    FileExistsError if there is such a folder, MissingExtraError without nibabel.
    """
    with requires("mri", "mdnorm-experiments"):
        import nibabel as nib

    make_image: Any = nib.nifti1.Nifti1Image
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a folder that does not.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same disk, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        description = {"Name": "Brains drawn from the MNI152 template", "BIDSVersion": "1.9.0"}
        (partial / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
        lines = ["participant_id\tage\tsex\tsite\tdiagnosis"]
        for row in range(len(brains.labels)):
            subject = f"sub-{row + 1:04d}"
            lines.append(
                f"{subject}\t{float(brains.age[row]):.1f}\t{'FM'[int(brains.sex[row])]}\t"
                f"{SITES[int(brains.site[row])]}\t{CLASSES[int(brains.labels[row])]}"
            )
            anat = partial / subject / "anat"
            anat.mkdir(parents=True)
            image = make_image(brains.volumes[row, 0].numpy(), _affine())
            image.header.set_xyzt_units("mm")
            nib.save(image, anat / f"{subject}_T1w.nii.gz")
        (partial / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(folder)
