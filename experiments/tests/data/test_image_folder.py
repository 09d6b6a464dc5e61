"""Folders of images in PPB's layout: what is read, and that every problem is told."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mdnorm_experiments.data.image_folder import load_image_folder
from mdnorm_experiments.data.reading import DataProblemsError

PPB = ("filename", "bi.gender", "bi.fitz")
ROWS = (("a.png", "Female", "I"), ("b.png", "Male", "VI"), ("c.jpg", "Male", "III"))


def write(folder: Path, rows=ROWS, header=PPB, images=("a.png", "b.png", "c.jpg"), delimiter=",") -> Path:
    (folder / "photos").mkdir(parents=True)
    for number, name in enumerate(images):
        Image.new("RGB", (20, 30), (20 * number, 100, 200)).save(folder / "photos" / name)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return folder


def test_ppb(tmp_path):
    read = load_image_folder(write(tmp_path / "ppb"), image_size=16)
    assert read.files == ("a.png", "b.png", "c.jpg")
    assert read.classes == ("female", "male")
    assert read.labels.tolist() == [0, 1, 1]
    assert read.labels.dtype == torch.int64
    assert read.shade.tolist() == [1, 6, 3]
    assert read.shade.dtype == torch.float32
    assert read.images.shape == (3, 3, 16, 16)
    assert read.images.dtype == torch.uint8
    assert read.images[1].flatten(1).unique(dim=1).T.tolist() == [[20, 100, 200]]
    assert not read.problems


def test_other_names_separators_and_ways_to_write_a_shade(tmp_path):
    header = ("photo", "sex", "skin")
    rows = (("photos/a.png", "f", "2"), ("b.png", "M", " iv "), ("c.jpg", "m", "6"))
    folder = write(tmp_path / "own", rows, header, delimiter=";")
    columns = {"file": "photo", "label": "sex", "shade": "skin"}
    read = load_image_folder(folder, columns=columns)
    assert read.classes == ("female", "male")
    assert read.labels.tolist() == [0, 1, 1]
    assert read.shade.tolist() == [2, 4, 6]
    table = (folder / "labels.csv").rename(tmp_path / "elsewhere.csv")
    assert load_image_folder(folder, table, columns=columns).files == read.files


def test_grey_transparent_and_turned_images(tmp_path):
    folder = write(tmp_path / "modes")
    Image.new("L", (16, 16), 90).save(folder / "photos" / "a.png")
    Image.new("RGBA", (16, 16), (1, 2, 3, 255)).save(folder / "photos" / "b.png")
    # Upright the left half is dark; the file has it turned by 90°, and says so.
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(folder / "photos" / "c.jpg", exif=exif, quality=95)
    read = load_image_folder(folder, image_size=16)
    assert read.images[0].unique().tolist() == [90]
    assert read.images[1, :, 0, 0].tolist() == [1, 2, 3]
    assert int(read.images[2, :, :, :6].max()) < 30
    assert int(read.images[2, :, :, 10:].min()) > 225


def test_the_middle_of_a_portrait_is_kept(tmp_path):
    folder = write(tmp_path / "crop")
    pixels = np.zeros((48, 16, 3), np.uint8)
    pixels[16:32] = 255
    Image.fromarray(pixels).save(folder / "photos" / "a.png")
    assert load_image_folder(folder, image_size=16).images[0].unique().tolist() == [255]


@pytest.fixture
def broken(tmp_path) -> Path:
    """Two good images of each class, and one problem of every kind."""
    good = [(f"{name}.png", label, "II") for name, label in zip("pqrs", ("Male", "Female") * 2, strict=True)]
    bad = [
        ("gone.png", "Male", "I"),
        ("p.png", "Male", "II"),
        ("torn.png", "Male", "V"),
        ("text.png", "Male", "V"),
        ("pale.png", "Male", "VII"),
        ("blank.png", "Male", ""),
        ("unknown.png", "n/a", "IV"),
        ("twice.png", "Female", "IV"),
        ("", "Female", "IV"),
    ]
    names = [*"pqrs", "torn", "text", "pale", "blank", "unknown", "twice", "stray"]
    folder = write(tmp_path / "broken", [*good, *bad], images=[f"{name}.png" for name in names])
    photos = folder / "photos"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "torn.png")
    (photos / "torn.png").write_bytes((photos / "torn.png").read_bytes()[:2000])
    (photos / "text.png").write_text("not an image")
    (folder / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "more" / "twice.png")
    return folder


EXPECTED = {
    ("no image", "gone.png"),
    ("duplicate row", "p.png"),
    ("unreadable image", "torn.png"),
    ("unreadable image", "text.png"),
    ("bad shade", "pale.png"),
    ("bad shade", "blank.png"),
    ("bad label", "unknown.png"),
    ("duplicate image", "twice.png"),
    ("no file name", "line 14 of labels.csv"),
    ("no row", "stray.png"),
}


def test_all_problems_are_told_at_once(broken):
    with pytest.raises(DataProblemsError) as error:
        load_image_folder(broken)
    text = str(error.value)
    assert text.startswith(f"{len(EXPECTED)} problem(s)")
    for kind, subject in EXPECTED:
        assert f"{kind}: {subject}:" in text


def test_skip_leaves_out_what_has_a_problem_and_says_so(broken):
    read = load_image_folder(broken, on_problem="skip")
    assert read.files == ("p.png", "q.png", "r.png", "s.png")
    assert {(kind, subject) for kind, subject, _ in read.problems.found} == EXPECTED
    with pytest.raises(ValueError, match="on_problem must be 'error' or 'skip', got 'ignore'"):
        load_image_folder(broken, on_problem="ignore")


def test_without_the_data_set_the_error_says_what_to_get(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*absent.*bi\.fitz.*on request: gendershades\.org"
    ):
        load_image_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no table .*labels\.csv.*gendershades\.org"):
        load_image_folder(tmp_path)


def test_tables_that_cannot_be_used(tmp_path):
    folder = write(tmp_path / "tables")
    table = folder / "labels.csv"
    with pytest.raises(ValueError, match=r"no column for the shade \(tone\); it has filename, bi\.gender"):
        load_image_folder(folder, columns={"shade": "tone"})
    with pytest.raises(ValueError, match="columns may name file, label, shade, got tone"):
        load_image_folder(folder, columns={"tone": "bi.fitz"})
    table.write_text("filename,bi.fitz\na.png,I\n")
    with pytest.raises(ValueError, match=r"no column for the label \(bi\.gender or gender or label\)"):
        load_image_folder(folder)
    for content in (b"", b"filename,bi.gender,bi.fitz\na.png,M\xe4nnlich,I\n", b"a,b\n1,2,3\n1,2,3,4,5\n"):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=r"labels\.csv cannot be read as a table \(UTF-8, a header"):
            load_image_folder(folder)
    (folder / "other.csv").write_text("")
    with pytest.raises(ValueError, match=r"several tables \(labels\.csv, other\.csv\): name one"):
        load_image_folder(folder)


def test_one_class_is_too_few(tmp_path):
    rows = [(name, "Male", shade) for name, _, shade in ROWS]
    with pytest.raises(ValueError, match="two labels or more with images, got male"):
        load_image_folder(write(tmp_path / "one", rows))
    with pytest.raises(ValueError, match="two labels or more with images, got none"):
        load_image_folder(write(tmp_path / "none", [], images=[]))


@given(st.lists(st.tuples(st.sampled_from(["male", "female"]), st.integers(1, 6)), min_size=2, max_size=8))
def test_rows_stay_together_in_the_order_of_the_table(tmp_path_factory, rows):
    rows = [*rows, ("male", 1), ("female", 1)]
    # The table's order is not that of the names.
    names = [f"{len(rows) - row:03d}.png" for row in range(len(rows))]
    folder = tmp_path_factory.mktemp("rows") / "data"
    table = [(name, label, str(shade)) for name, (label, shade) in zip(names, rows, strict=True)]
    read = load_image_folder(write(folder, table, images=names), image_size=8)
    assert read.files == tuple(names)
    assert [
        (read.classes[label], int(shade)) for label, shade in zip(read.labels, read.shade, strict=True)
    ] == rows
    assert read.images[:, 0, 0, 0].tolist() == [20 * row for row in range(len(rows))]
