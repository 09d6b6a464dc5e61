"""Drawn faces: what tells the label, what goes with it, and that files hold what was drawn."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm, spearmanr
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mdnorm.extras import MissingExtraError
from mdnorm_experiments.data import faces
from mdnorm_experiments.data.faces import CLASSES, LIMIT, Faces, make_faces, write_image_folder
from mdnorm_experiments.data.image_folder import load_image_folder

SIZE = 2000


@pytest.fixture(scope="module")
def independent() -> Faces:
    return make_faces(SIZE, seed=1, correlation=0.0, image_size=12)


@pytest.fixture(scope="module")
def confounded() -> Faces:
    return make_faces(SIZE, seed=2, correlation=0.8, image_size=12)


def test_shapes_types_and_the_seed():
    drawn = make_faces(6, seed=3)
    assert drawn.images.shape == (6, 3, 32, 32)
    assert drawn.images.dtype == torch.uint8
    assert drawn.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert drawn.labels.dtype == torch.int64
    assert drawn.shade.dtype == drawn.geometry.dtype == torch.float32
    again, other = make_faces(6, seed=3), make_faces(6, seed=4)
    for name, tensor in vars(drawn).items():
        assert torch.equal(tensor, getattr(again, name))
        assert name == "labels" or not torch.equal(tensor, getattr(other, name))


def test_limit_is_that_of_the_linear_discriminant(independent, confounded):
    means = [independent.geometry[independent.labels == label].double().mean(0).numpy() for label in (0, 1)]
    separation = np.linalg.norm(means[1] - means[0])
    assert norm.cdf(separation / 2) == pytest.approx(LIMIT, abs=0.02)
    rule = LinearDiscriminantAnalysis().fit(confounded.geometry.numpy(), confounded.labels.numpy())
    found = rule.score(independent.geometry.numpy(), independent.labels.numpy())
    # Three standard errors of a share of 2000, and what the discriminant loses by being estimated.
    assert found == pytest.approx(LIMIT, abs=3 * (LIMIT * (1 - LIMIT) / SIZE) ** 0.5 + 0.002)


@pytest.mark.parametrize("label", [0, 1])
def test_geometry_is_standard_and_knows_nothing_of_the_shade_within_a_class(confounded, label):
    inside = confounded.labels == label
    geometry, shade = confounded.geometry[inside].double().numpy(), confounded.shade[inside].double().numpy()
    four_errors = 4 / len(shade) ** 0.5
    assert geometry.std(0) == pytest.approx(1, abs=four_errors)
    columns = np.column_stack([geometry, shade])
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert np.abs(correlations).max() < four_errors


@pytest.mark.parametrize(("correlation", "share"), [(0.8, 0.9), (0.0, 0.5), (-0.6, 0.2), (1.0, 1.0)])
def test_correlation_sets_the_share_of_darker_faces_in_each_class(correlation, share):
    drawn = make_faces(600, seed=5, correlation=correlation, image_size=8)
    assert 1 <= float(drawn.shade.min()) <= float(drawn.shade.max()) <= 6
    for label, expected in ((1, share), (0, 1 - share)):
        dark = float((drawn.shade[drawn.labels == label] > 3.5).double().mean())
        assert dark == pytest.approx(expected, abs=4 * (share * (1 - share) / 300) ** 0.5)


def test_the_skin_gets_darker_with_the_shade(independent):
    # Between the eyes and the mouth there is skin, whatever the pose.
    cheeks = independent.images[:, :, 6:8, 4:8].double().mean((1, 2, 3))
    assert spearmanr(cheeks.numpy(), independent.shade.numpy()).statistic < -0.9


@pytest.mark.parametrize("measure", range(5))
def test_every_measure_is_seen(measure):
    def draw(value: float) -> np.ndarray:
        geometry = np.zeros(5)
        geometry[measure] = value
        # The same generator: pose, light, colours and noise are those of the other picture.
        return np.asarray(faces._draw(geometry, 3.0, np.random.default_rng(0), 32), float)

    low, high = draw(-1.5), draw(1.5)
    assert (np.abs(high - low).max(2) > 15).sum() >= 6
    # The measure is not drawn in a few coarse steps.
    levels = [draw(value) for value in (-1.5, -0.75, 0.0, 0.75, 1.5)]
    assert all((a != b).any() for a, b in itertools.pairwise(levels))


def test_files_hold_what_was_drawn(tmp_path):
    drawn = make_faces(30, seed=6, correlation=0.0)
    table = write_image_folder(tmp_path / "faces", drawn)
    read = load_image_folder(tmp_path / "faces")
    assert torch.equal(read.images, drawn.images)
    assert read.classes == CLASSES
    assert torch.equal(read.labels, drawn.labels)
    assert torch.equal(read.shade, drawn.shade.round())
    assert read.files == tuple(f"face-{row:05d}.png" for row in range(30))
    assert not read.problems
    written = sorted(path.name for path in table.parent.rglob("*") if path.is_file())
    assert written == sorted([*read.files, "labels.csv"])


def test_an_interruption_leaves_no_part_of_a_picture(tmp_path, monkeypatch):
    whole, calls = Image.Image.save, []

    def save(picture, path, *args, **kwargs):
        whole(picture, path, *args, **kwargs)
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:50])
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write_image_folder(tmp_path, make_faces(4, seed=0))
    assert len(calls) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["face-00000.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "size must be at least 2"),
        ({"size": 4, "image_size": 7}, "image_size at least 8, got 4 and 7"),
        ({"size": 4, "correlation": 1.1}, "correlation must be between -1 and 1, got 1.1"),
        ({"size": 4, "correlation": float("nan")}, "correlation must be between -1 and 1, got nan"),
    ],
)
def test_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_faces(seed=0, **arguments)


def test_without_pillow_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"mdnorm-experiments\[image\]"):
        make_faces(2, seed=0)
