"""The settings with images: their data, their network, and a real folder in place of drawn faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mdnorm_experiments import image
from mdnorm_experiments.data.digits import COUNT
from mdnorm_experiments.data.faces import make_faces, write_image_folder
from mdnorm_experiments.data.reading import DataProblemsError
from mdnorm_experiments.image import (
    DIGITS,
    SETTING,
    image_backbone,
    load_faces,
    make_digit_data,
    make_face_data,
)
from mdnorm_experiments.networks import NORMS
from mdnorm_experiments.settings import get_setting


@pytest.fixture(scope="module")
def faces():
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes the time of these tests.
        patch.setattr(image, "_HELD_OUT", 300)
        return make_face_data(300, 0)


@pytest.fixture(scope="module")
def digits():
    return make_digit_data(1000, 0)


def agreement(samples):
    """Share of samples whose confounder is on the side that goes with the label."""
    middle = (samples.confounders.max() + samples.confounders.min()) / 2
    return float(((samples.confounders[:, 0] > middle).long() == samples.labels).double().mean())


@pytest.mark.parametrize("name", ["faces", "digits"])
def test_the_confounder_goes_with_the_label_except_where_it_must_not(name, request):
    data = request.getfixturevalue(name)
    for part in (data.train, data.test):
        assert 0.7 < agreement(part) < 0.95
    assert agreement(data.confound_free) == pytest.approx(0.5, abs=4 * 0.5 / len(data.confound_free) ** 0.5)
    for part in (data.train, data.test, data.confound_free):
        # Each group holds each class: otherwise nothing could tell the two apart.
        assert len(torch.stack([part.groups, part.labels], 1).unique(dim=0)) == 2 * len(data.groups)
        assert len(data.classes) == 2


def test_metadata_are_the_powers_of_the_confounder(faces, digits):
    for data, low, high in ((faces, 1, 6), (digits, 0, 1)):
        values = data.train.confounders[:, 0].double().numpy()
        scaled = (2 * values - low - high) / (high - low)
        expected = np.stack([scaled, scaled**2, scaled**3], 1)
        np.testing.assert_allclose(data.train.metadata.numpy(), expected, atol=1e-5)
        assert data.confounders in ({"shade": (0,)}, {"colour": (0,)})


def test_groups_are_pairs_of_fitzpatrick_types(faces):
    types = faces.train.confounders[:, 0].round()
    for number, (first, second) in enumerate([(1, 2), (3, 4), (5, 6)]):
        assert set(types[faces.train.groups == number].tolist()) == {first, second}


def test_no_digit_is_trained_on_and_held_out(monkeypatch):
    asked = []
    original = image.digits.colour_digits

    def noted(rows, **options):
        asked.append(set(rows.tolist()))
        return original(rows, **options)

    monkeypatch.setattr(image.digits, "colour_digits", noted)
    make_digit_data(1200, 3)
    train, test, confound_free = asked
    assert not train & (test | confound_free)
    assert len(train) == 1200
    assert train | test == set(range(COUNT))


@pytest.mark.parametrize("make_data", [lambda size, seed: make_face_data(40, seed), make_digit_data])
def test_the_seed_decides(make_data, monkeypatch):
    monkeypatch.setattr(image, "_HELD_OUT", 40)
    first, again, other = make_data(200, 1), make_data(200, 1), make_data(200, 2)
    for part in ("train", "test", "confound_free"):
        for name, tensor in vars(getattr(first, part)).items():
            assert torch.equal(tensor, getattr(getattr(again, part), name))
        inputs = getattr(first, part).inputs
        assert not torch.equal(inputs, getattr(other, part).inputs)
    assert not torch.equal(first.test.inputs, first.confound_free.inputs)


@pytest.mark.parametrize("make_data", [lambda size, seed: make_face_data(400, seed), make_digit_data])
def test_data_of_the_oracle_and_for_retraining(make_data, monkeypatch):
    monkeypatch.setattr(image, "_HELD_OUT", 40)
    data, again = make_data(1200, 1), make_data(1200, 1)

    def agreement(samples):
        middle = data.train.confounders.mean()
        return float(((samples.confounders[:, 0] > middle) == samples.labels.bool()).double().mean())

    unconfounded = data.unconfounded()
    assert len(unconfounded) == len(data.train)
    assert agreement(unconfounded) == pytest.approx(0.5, abs=0.08)
    assert agreement(data.train) == pytest.approx(0.8, abs=0.06)
    assert torch.equal(unconfounded.inputs, again.unconfounded().inputs)
    trained, held_out = data.for_retraining(1)
    assert len(held_out) == len(data.train) // 4
    assert agreement(held_out) == pytest.approx(0.8, abs=0.1)
    # All digits are taken: there the quarter is one of the training samples.
    assert len(trained) == len(data.train) - (0 if data.held_out else len(held_out))
    others = {tuple(row) for row in trained.inputs.flatten(1).tolist()}
    assert not any(tuple(row) in others for row in held_out.inputs.flatten(1).tolist())


def test_too_many_digits():
    with pytest.raises(ValueError, match="size must be at most 1597, since there are 1797 digits"):
        make_digit_data(1598, 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("side", [16, 32, 40])
def test_backbone(norm, side):
    torch.manual_seed(7)
    backbone = image_backbone(norm)
    torch.manual_seed(7)
    again = image_backbone(norm)
    images = torch.rand(4, 3, side, side)
    features = backbone(images)
    assert features.shape == (4, backbone.num_features)
    assert torch.equal(features, again(images))
    # The weights of the convolutions do not depend on the norm.
    torch.manual_seed(7)
    plain = image_backbone("none")
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, backbone.get_parameter(name))
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("setting", [SETTING, DIGITS], ids=lambda setting: setting.name)
def test_settings(setting, request):
    assert get_setting(setting.name) is setting
    assert setting.base_norm in NORMS
    backbone = setting.backbone(setting.base_norm)
    before_relu = []
    for slot in setting.slots:
        backbone.get_submodule(slot).register_forward_hook(
            lambda _, __, out: before_relu.append(out.detach())
        )
    data = request.getfixturevalue("faces" if setting is SETTING else "digits")
    backbone(data.train.inputs[:8])
    assert len(before_relu) == len(setting.slots)
    assert all(float(out.min()) < 0 for out in before_relu)


def test_examples_show_both_classes(faces, digits):
    for setting, data in ((SETTING, faces), (DIGITS, digits)):
        figure = setting.examples(data)
        assert isinstance(figure, Figure)
        shown = [axis for axis in figure.axes if axis.images]
        assert len(shown) >= 2 * len(data.classes)
        texts = {text.get_text() for axis in figure.axes for text in axis.texts}
        assert set(data.classes) <= texts
        for axis in shown:
            pixels = np.asarray(axis.images[0].get_array())
            assert pixels.shape[2] == 3
            assert pixels.max() - pixels.min() > 0.2


def test_a_folder_of_images_instead_of_drawn_faces(tmp_path):
    drawn = make_faces(120, seed=8, correlation=0.4)
    write_image_folder(tmp_path, drawn)
    (tmp_path / "images" / "face-00003.png").unlink()
    with pytest.raises(DataProblemsError, match=r"no image: face-00003\.png"):
        load_faces(tmp_path, "error")
    loaded = load_faces(Path(tmp_path), "skip")
    kept = torch.arange(120) != 3
    assert "face-00003.png" in loaded.problems
    assert loaded.classes == ("female", "male")
    assert torch.equal(loaded.samples.labels, drawn.labels[kept])
    assert torch.equal(loaded.samples.confounders[:, 0], drawn.shade[kept].round())
    torch.testing.assert_close(loaded.samples.inputs, drawn.images[kept].float() / 255 - 0.5)
    data = loaded.divide(0)
    assert len(data.train) + len(data.test) == 119
    for group in data.confound_free.groups.unique():
        labels = data.confound_free.labels[data.confound_free.groups == group]
        assert int((labels == 0).sum()) == int((labels == 1).sum())
