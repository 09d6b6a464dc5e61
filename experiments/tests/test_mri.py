"""The setting with brains: data, network and figure fit together; data from files are the data drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mdnorm_experiments import mri
from mdnorm_experiments.data.brains import make_brains, write_bids
from mdnorm_experiments.mri import SETTING, brain_backbone, load_brains, make_brain_data


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes the time of these tests.
        patch.setattr(mri, "_HELD_OUT", 150)
        return make_brain_data(60, 0)


def test_data(data):
    assert (data.train.inputs.shape, len(data.test)) == ((60, 1, 32, 40, 32), len(data.confound_free))
    design = data.train.metadata.double()
    with_intercept = torch.cat([torch.ones(60, 1, dtype=torch.float64), design], 1)
    assert torch.linalg.matrix_rank(with_intercept) == design.shape[1] + 1
    columns = sorted(column for found in data.confounders.values() for column in found)
    assert columns == list(range(data.train.confounders.shape[1]))
    site = data.train.confounders[:, list(data.confounders["site"])]
    assert torch.equal(site.argmax(1), data.train.groups)

    def older(samples):
        age = samples.confounders[:, 0]
        return float(age[samples.labels == 1].mean() - age[samples.labels == 0].mean())

    assert older(data.train) > 0.5
    assert older(data.test) > 0.5
    assert abs(older(data.confound_free)) < 0.25


def test_data_of_the_oracle_and_for_retraining(data):
    unconfounded, held_out = data.unconfounded(), data.held_out()
    assert (len(unconfounded), len(held_out)) == (60, 15)

    def older(samples):
        age = samples.confounders[:, 0]
        return float(age[samples.labels == 1].mean() - age[samples.labels == 0].mean())

    assert older(held_out) > 0.5 > abs(older(unconfounded))


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_backbone(norm, data):
    torch.manual_seed(0)
    first = brain_backbone(norm)
    torch.manual_seed(0)
    second = brain_backbone(norm)
    features = first(data.train.inputs[:4])
    assert features.shape == (4, first.num_features)
    assert torch.equal(features, second(data.train.inputs[:4]))
    assert features.std(0).max() > 0
    assert all(first.get_submodule(slot) is not None for slot in SETTING.slots)


def test_files_and_memory_agree(tmp_path, data):
    write_bids(tmp_path / "bids", make_brains(60, seed=0))
    loaded = load_brains(tmp_path / "bids", "error")
    assert (loaded.classes, loaded.groups, loaded.confounders) == (
        data.classes,
        data.groups,
        data.confounders,
    )
    assert loaded.problems == ""
    for field in dataclasses.fields(loaded.samples):
        if field.name != "metadata":
            assert torch.equal(getattr(loaded.samples, field.name), getattr(data.train, field.name))
    # Another range of ages scales the polynomial, but the columns span the same.
    both = torch.cat([torch.ones(60, 1), loaded.samples.metadata, data.train.metadata], 1).double()
    assert torch.linalg.matrix_rank(both, rtol=1e-5) == data.train.metadata.shape[1] + 1


def test_one_site(tmp_path):
    brains = make_brains(8, seed=0)
    write_bids(tmp_path / "bids", dataclasses.replace(brains, site=torch.zeros_like(brains.site)))
    with pytest.raises(ValueError, match="age and site must differ"):
        load_brains(tmp_path / "bids", "error")


def test_examples(data, tmp_path):
    figure = SETTING.examples(data)
    assert len([axis for axis in figure.axes if axis.images]) == 16
    figure.savefig(tmp_path / "examples.png")
    assert (tmp_path / "examples.png").stat().st_size > 10_000
