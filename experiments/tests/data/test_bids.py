"""BIDS folders: every problem is listed, nothing is dropped in silence, orientation and spacing are right."""

from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import torch

from mdnorm_experiments.data.bids import load_bids, standardize
from mdnorm_experiments.data.reading import DataProblemsError

SHAPE = (8, 10, 8)


def save(folder, subject, voxels=None, *, affine=None, name=None):
    anat = folder / subject / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    if voxels is None:
        voxels = np.random.default_rng(len(subject)).random(SHAPE).astype(np.float32) + 1
    affine = np.diag([6.0, 6.0, 6.0, 1.0]) if affine is None else affine
    path = anat / (name or f"{subject}_T1w.nii.gz")
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def table(folder, *rows, header="participant_id\tage\tsex\tsite\tdiagnosis"):
    (folder / "participants.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


GOOD = ("sub-a\t70\tF\tx\tcontrol", "sub-b\t71\tM\ty\tpatient")


@pytest.fixture
def folder(tmp_path):
    table(tmp_path, *GOOD)
    for subject in ("sub-a", "sub-b"):
        save(tmp_path, subject)
    return tmp_path


def test_good_folder(folder):
    found = load_bids(folder, shape=SHAPE)
    assert found.volumes.shape == (2, 1, *SHAPE)
    assert found.subjects == ("sub-a", "sub-b")
    assert (found.classes, found.sites) == (("control", "patient"), ("x", "y"))
    assert found.age.tolist() == [70, 71]
    assert found.sex.tolist() == [0, 1]
    means = found.volumes.double().mean((1, 2, 3, 4))
    torch.testing.assert_close(means, torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_every_problem_at_once(folder):
    table(
        folder,
        *GOOD,
        "sub-noimage\t70\tF\tx\tcontrol",
        "sub-twice\t70\tF\tx\tcontrol",
        "sub-twice\t71\tF\tx\tcontrol",
        "sub-age\tn/a\tF\tx\tcontrol",
        "sub-old\t700\tF\tx\tcontrol",
        "sub-sex\t70\tdog\tx\tcontrol",
        "sub-site\t70\tF\tn/a\tcontrol",
        "sub-diag\t70\tF\tx\tn/a",
        "sub-cut\t70\tF\tx\tcontrol",
        "sub-nan\t70\tF\tx\tcontrol",
        "sub-flat\t70\tF\tx\tcontrol",
        "sub-many\t70\tF\tx\tcontrol",
        "sub-four\t70\tF\tx\tcontrol",
    )
    for subject in ("twice", "age", "old", "sex", "site", "diag", "many", "unlisted"):
        save(folder, f"sub-{subject}")
    save(folder, "sub-many", name="sub-many_run-2_T1w.nii.gz")
    cut = save(folder, "sub-cut")
    cut.write_bytes(cut.read_bytes()[:300])
    save(folder, "sub-nan", np.full(SHAPE, np.nan, np.float32))
    save(folder, "sub-flat", np.zeros(SHAPE, np.float32))
    save(folder, "sub-four", np.ones((*SHAPE, 3), np.float32))
    expected = {
        ("no image", "sub-noimage"),
        ("duplicate row", "sub-twice"),
        ("bad age", "sub-age"),
        ("bad age", "sub-old"),
        ("bad sex", "sub-sex"),
        ("bad site", "sub-site"),
        ("bad label", "sub-diag"),
        ("unreadable image", "sub-cut"),
        ("not finite", "sub-nan"),
        ("empty image", "sub-flat"),
        ("several images", "sub-many"),
        ("wrong shape", "sub-four"),
        ("no row", "sub-unlisted"),
    }
    with pytest.raises(DataProblemsError) as error:
        load_bids(folder, shape=SHAPE)
    assert all(f"{kind}: {subject}" in str(error.value) for kind, subject in expected)
    found = load_bids(folder, shape=SHAPE, on_problem="skip")
    assert {(kind, subject) for kind, subject, _ in found.problems.found} == expected
    assert found.subjects == ("sub-a", "sub-b")


def changed(position, layout, *values):
    """Return the function that overwrites a field of a NIfTI header."""

    def change(content):
        new = bytearray(content)
        struct.pack_into(layout, new, position, *values)
        return bytes(new)

    return change


DAMAGES = {
    "cut in the header": lambda content: content[:200],
    "cut in the voxels": lambda content: content[:-500],
    "empty": lambda content: b"",
    "text": lambda content: b"<html>404 Not Found</html>",
    "noise": lambda content: np.random.default_rng(0).bytes(len(content)),
    "noise behind the magic": lambda content: np.random.default_rng(1).bytes(344) + content[344:],
    "wrong magic": changed(344, "4s", b"xyz"),
    "unknown type of voxel": changed(70, "<h", 999),
    "negative dimension": changed(42, "<h", -5),
    "nine dimensions": changed(40, "<h", 9),
    "enormous": changed(40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1),
    "voxels far behind the end": changed(108, "<f", 1e30),
    "quaternion of no rotation": lambda content: changed(252, "<2h", 1, 0)(
        changed(256, "<3f", 3.0, 3.0, 3.0)(content)
    ),
    "voxels as large as a house": changed(280, "<12f", 9e3, 0, 0, 0, 0, 9e3, 0, 0, 0, 0, 9e3, 0),
    "places that are not finite": changed(280, "<f", float("nan")),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("default")
def test_a_damaged_image_is_one_problem(folder, damage, suffix):
    table(folder, *GOOD, "sub-c\t70\tF\tx\tcontrol")
    path = save(folder, "sub-c", name=f"sub-c_T1w{suffix}")
    packed = suffix == ".nii.gz"
    content = DAMAGES[damage](gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataProblemsError, match=r"1 problem\(s\) in the data") as error:
        load_bids(folder, shape=SHAPE)
    assert path.name in str(error.value)
    found = load_bids(folder, shape=SHAPE, on_problem="skip")
    assert found.subjects == ("sub-a", "sub-b")
    ((kind, subject, _),) = found.problems.found
    assert subject == "sub-c"
    assert kind in ("unreadable image", "bad affine", "wrong shape")


@pytest.mark.parametrize("keep", [0, 5, 40, 300])
def test_a_packed_image_that_is_cut_is_one_problem(folder, keep):
    path = folder / "sub-b" / "anat" / "sub-b_T1w.nii.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataProblemsError, match=r"1 × unreadable image.*\n.*sub-b_T1w\.nii\.gz"):
        load_bids(folder, shape=SHAPE)


def test_a_table_as_it_is_in_a_real_folder(folder):
    """With other names, other columns between them, and subjects without the prefix."""
    header = "subj\tAge_at_scan\thandedness\tgender\tscanner\tdx"
    table(folder, "a\t70\tR\tfemale\tx\tcontrol", "b\t71\tL\tmale\ty\tpatient", header=header)
    columns = {
        "subject": "subj",
        "age": "Age_at_scan",
        "sex": "gender",
        "site": "scanner",
        "label": "dx",
    }
    found = load_bids(folder, columns=columns, shape=SHAPE)
    assert found.age.tolist() == [70, 71]
    assert (found.classes, found.sites) == (("control", "patient"), ("x", "y"))
    with pytest.raises(ValueError, match=r"no column for the site \(Scanner\); it has subj, Age_at_scan"):
        load_bids(folder, columns=columns | {"site": "Scanner"}, shape=SHAPE)


def test_images_elsewhere_are_no_images_of_the_subject(folder):
    moved = folder / "sub-b" / "derivatives"
    moved.mkdir()
    (folder / "sub-b" / "anat").rename(moved / "anat")
    with pytest.raises(DataProblemsError) as error:
        load_bids(folder, shape=SHAPE)
    assert "no image: sub-b: no *_T1w.nii(.gz) in sub-b/anat or sub-b/ses-*/anat" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("places that are not finite", "its voxels have no places in space"),
        ("voxels as large as a house", "the volume would be 90000 mm long, more than 2000"),
    ],
)
def test_what_is_wrong_with_an_affine(folder, damage, message):
    path = folder / "sub-b" / "anat" / "sub-b_T1w.nii.gz"
    path.write_bytes(gzip.compress(DAMAGES[damage](gzip.decompress(path.read_bytes()))))
    with pytest.raises(DataProblemsError) as error:
        load_bids(folder, shape=SHAPE)
    assert f"bad affine: sub-b: sub-b_T1w.nii.gz: {message}" in str(error.value)


def test_orientation(folder):
    voxels = np.random.default_rng(0).random(SHAPE).astype(np.float32) + 1
    save(folder, "sub-a", voxels)
    # The same places, stored from right to left.
    affine = np.diag([-6.0, 6.0, 6.0, 1.0])
    affine[0, 3] = 6.0 * (SHAPE[0] - 1)
    save(folder, "sub-b", voxels[::-1].copy(), affine=affine)
    first, second = load_bids(folder, shape=SHAPE).volumes
    torch.testing.assert_close(first, second)
    # And with the axes in another order.
    save(folder, "sub-b", voxels.transpose(2, 0, 1), affine=np.diag([6.0, 6.0, 6.0, 1.0])[:, [2, 0, 1, 3]])
    first, second = load_bids(folder, shape=SHAPE).volumes
    torch.testing.assert_close(first, second)


def test_resampling_keeps_places(folder):
    # A bright ball off centre, at 3 and at 6 mm.
    def ball(spacing, shape):
        places = np.stack(np.meshgrid(*[np.arange(n) * spacing for n in shape], indexing="ij"), -1)
        distance = np.linalg.norm(places - np.array([18.0, 36.0, 24.0]), axis=-1)
        return (np.exp(-0.5 * (distance / 9) ** 2) + 0.01).astype(np.float32)

    save(folder, "sub-a", ball(6.0, SHAPE))
    save(folder, "sub-b", ball(3.0, (15, 19, 15)), affine=np.diag([3.0, 3.0, 3.0, 1.0]))
    first, second = load_bids(folder, shape=SHAPE).volumes
    assert first.argmax() == second.argmax()
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1] > 0.95


def test_sessions_other_columns_and_padding(folder):
    (folder / "sub-a" / "ses-1").mkdir()
    (folder / "sub-a" / "anat").rename(folder / "sub-a" / "ses-1" / "anat")
    table(folder, *GOOD, header="participant_id\tage\tsex\tcentre\tdx")
    names = {"site": "centre", "label": "dx"}
    found = load_bids(folder, columns=names, shape=(10, 10, 8))
    assert found.volumes.shape == (2, 1, 10, 10, 8)
    assert bool((found.volumes[:, :, [0, -1]] == 0).all())
    with pytest.raises(
        ValueError, match=r"no column for the site \(site\); it has participant_id, age, sex, centre, dx"
    ):
        load_bids(folder)
    with pytest.raises(ValueError, match="columns may name subject, age, sex, site, label, got gender"):
        load_bids(folder, columns={"gender": "sex"})


def test_absent_and_unusable(tmp_path):
    with pytest.raises(FileNotFoundError, match="OpenNeuro"):
        load_bids(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"participants\.tsv"):
        load_bids(tmp_path)
    (tmp_path / "participants.tsv").write_text("")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        load_bids(tmp_path)
    table(tmp_path, GOOD[0])
    save(tmp_path, "sub-a")
    with pytest.raises(ValueError, match="two labels or more"):
        load_bids(tmp_path, shape=SHAPE)
    with pytest.raises(ValueError, match="spacing must be positive"):
        load_bids(tmp_path, spacing=0)
    with pytest.raises(ValueError, match="on_problem must be"):
        load_bids(tmp_path, shape=SHAPE, on_problem="ignore")


def test_standardize():
    volumes = torch.rand(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 900
    volumes[:, :, 0] = 0
    result = standardize(volumes)
    for before, after in zip(volumes.double(), result.double(), strict=True):
        inside = before != 0
        values = before[inside]
        expected = (values - values.mean()) / values.std(correction=0)
        torch.testing.assert_close(after[inside], expected, atol=1e-5, rtol=1e-5)
        assert bool((after[~inside] == 0).all())
    with pytest.raises(ValueError, match="must have shape"):
        standardize(volumes[0])
