"""The video setting: its data, its network, and real data in HMDB51's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mdnorm.layer import MetadataNorm
from mdnorm_experiments import video
from mdnorm_experiments.data.actions import ACTIONS, make_clips, write_hmdb51
from mdnorm_experiments.data.reading import DataProblemsError
from mdnorm_experiments.networks import NORMS
from mdnorm_experiments.settings import build, get_setting
from mdnorm_experiments.video import SETTING, load_videos, make_video_data, scene_components, video_backbone


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "_HELD_OUT", 60)
        return make_video_data(90, 3)


def test_the_data_are_confounded_only_where_they_should_be(data):
    def own(samples):
        # The scenes are two for each action of `ACTIONS`; classes are in alphabetical order.
        action = torch.tensor([ACTIONS.index(name) for name in data.classes])[samples.labels]
        return float((samples.groups // 2 == action).double().mean())

    assert own(data.train) > 0.55
    assert own(data.test) > 0.5
    assert own(data.confound_free) < 0.5
    assert [len(part) for part in (data.train, data.test, data.confound_free)] == [90, 60, 60]
    assert data.train.metadata.shape == (90, 2 * video.NUM_COMPONENTS)
    assert torch.equal(data.train.confounders.argmax(1), data.train.groups)


def test_data_of_the_oracle_and_for_retraining(data):
    unconfounded, held_out = data.unconfounded(), data.held_out()
    assert (len(unconfounded), len(held_out)) == (90, 22)
    assert unconfounded.metadata.shape[1] == held_out.metadata.shape[1] == data.train.metadata.shape[1]
    action = torch.tensor([ACTIONS.index(name) for name in data.classes])
    own = [
        float((part.groups // 2 == action[part.labels]).double().mean()) for part in (unconfounded, held_out)
    ]
    assert own[0] < 0.5 < own[1]


def test_the_same_seed_gives_the_same_data(data, monkeypatch):
    monkeypatch.setattr(video, "_HELD_OUT", 60)
    again = make_video_data(90, 3)
    for part in ("train", "test", "confound_free"):
        for name, tensor in vars(getattr(data, part)).items():
            assert torch.equal(tensor, getattr(getattr(again, part), name)), (part, name)


@pytest.mark.parametrize("norm", NORMS)
def test_the_network(norm):
    torch.manual_seed(0)
    backbone = video_backbone(norm, width=4)
    kinds = {"none": nn.Identity, "batch": nn.BatchNorm3d, "group": nn.GroupNorm}
    assert any(isinstance(module, kinds[norm]) for module in backbone.modules())
    if norm == "none":
        assert not any(isinstance(module, nn.BatchNorm3d) for module in backbone.modules())
    features = backbone(torch.randn(2, 3, 8, 32, 32))
    assert features.shape == (2, backbone.num_features) == (2, 32)


def test_slots_exist(data):
    network = build(SETTING, SETTING.method("mdn-every-running"), data, 0)
    layers = [module for module in network.modules() if isinstance(module, MetadataNorm)]
    assert len(layers) == len(SETTING.slots) + 1


def test_the_setting_is_registered(data):
    assert get_setting("video") is SETTING
    figure = SETTING.examples(data)
    assert len(figure.axes) == 2 * 3 * 8


def test_real_data(tmp_path):
    folder = write_hmdb51(tmp_path / "hmdb51", make_clips(60, seed=0), make_clips(30, seed=1))
    loaded = load_videos(folder, "error", num_scenes=3)
    assert len(loaded.samples) == 90
    assert len(loaded.groups) == 4
    assert loaded.groups[-1] == "other"
    assert int(loaded.samples.groups.max()) == 3
    assert loaded.problems == ""
    counts = np.bincount(loaded.samples.groups.numpy(), minlength=4)
    assert counts[0] >= counts[1] >= counts[2]
    next((folder / "hmdb51_org" / "jump").iterdir()).unlink()
    with pytest.raises(DataProblemsError, match="no clip"):
        load_videos(folder, "error")
    assert "no clip" in load_videos(folder, "skip").problems


def test_another_name_of_the_column_with_the_clips(tmp_path):
    folder = write_hmdb51(tmp_path / "hmdb51", make_clips(30, seed=0), make_clips(15, seed=1))
    table = folder / "scene_scores.csv"
    table.write_text(table.read_text().replace("clip,", "file,", 1))
    assert len(load_videos(folder, "error", {"clip": "file"}).samples) == 45
    with pytest.raises(ValueError, match=r"no column for the clip \(clip\); it has file, beach, forest"):
        load_videos(folder, "error")


def test_components_are_those_of_the_training_clips_and_have_variance_one():
    train, test = (torch.rand(50, 7) @ torch.rand(7, 7), torch.rand(9, 7))
    components = scene_components(train, 3)
    torch.testing.assert_close(components(train).std(0), torch.ones(3), atol=1e-4, rtol=0)
    centred = train - train.mean(0)
    directions = torch.linalg.svd(centred.double())[2][:3]
    expected = ((test - train.mean(0)).double() @ directions.T).abs()
    found = components(test).double().abs()
    torch.testing.assert_close(found / found[0], expected / expected[0], atol=1e-3, rtol=1e-3)


def test_more_components_than_there_are():
    scores = torch.rand(20, 1) @ torch.ones(1, 4)
    with pytest.raises(ValueError, match="must have 2 components or more, got 1"):
        scene_components(scores, 2)
