"""Drawn brains: reproducible, what metadata do and do not change, a BIDS folder that reads back equal."""

from __future__ import annotations

import math

import pytest
import torch

from mdnorm_experiments.data import brains
from mdnorm_experiments.data.bids import load_bids, standardize
from mdnorm_experiments.data.brains import LIMIT, SEPARATION, SHAPE, SITES, make_brains, write_bids


@pytest.fixture(scope="module")
def drawn():
    return make_brains(120, seed=0)


def test_the_seed_decides(drawn):
    again, other = make_brains(120, seed=0), make_brains(120, seed=1)
    assert torch.equal(drawn.volumes, again.volumes)
    assert torch.equal(drawn.age, again.age)
    assert not torch.equal(drawn.volumes, other.volumes)


def test_shapes_and_values(drawn):
    assert drawn.volumes.shape == (120, 1, *SHAPE)
    assert drawn.volumes.dtype == torch.float32
    assert bool(drawn.volumes.isfinite().all())
    assert drawn.labels.bincount().tolist() == [60, 60]
    inside = (drawn.volumes > 0).double().mean((1, 2, 3, 4))
    # Litres of the 8.8 of the volume; voxels of 6 mm that are brain in part widen it by their rim.
    assert 1.2 / 8.8 < inside.min() < inside.max() < 3.2 / 8.8


def test_men_have_larger_heads(drawn):
    inside = (drawn.volumes > 0).double().sum((1, 2, 3, 4))
    assert inside[drawn.sex == 1].mean() > 1.1 * inside[drawn.sex == 0].mean()


def test_hippocampus_is_darker_in_atrophy(drawn):
    # The voxels about (±27, −20, −16) mm.
    volumes = standardize(drawn.volumes)[:, 0]
    local = torch.cat([volumes[:, 10:13, 18:21, 8:11], volumes[:, 19:22, 18:21, 8:11]], 1).mean((1, 2, 3))
    correlation = torch.corrcoef(torch.stack([local.double(), drawn.hippocampus.double()]))[0, 1]
    assert correlation > 0.3


@pytest.fixture
def without_volumes(monkeypatch):
    """Labels, metadata and hippocampus only: they are drawn before the volumes, which take all the time."""
    monkeypatch.setattr(brains, "_draw", lambda age, *_: torch.zeros(len(age), 1, *SHAPE))


def test_what_is_drawn_without_volumes_is_the_same(drawn, without_volumes):
    again = make_brains(120, seed=0)
    for name in ("labels", "age", "sex", "site", "hippocampus"):
        assert torch.equal(getattr(drawn, name), getattr(again, name))


@pytest.mark.usefixtures("without_volumes")
def test_correlation_and_independence():
    with_label = make_brains(400, seed=3, correlation=0.8)
    without = make_brains(400, seed=3, correlation=0.0)

    def difference(found):
        return float(found.age[found.labels == 1].mean() - found.age[found.labels == 0].mean())

    # 0.8 × 12 years; the standard error is below 0.9 years.
    assert abs(difference(with_label) - 9.6) < 3
    assert abs(difference(without)) < 3
    shares = [float((with_label.site[with_label.labels == k] >= 2).double().mean()) for k in (0, 1)]
    assert shares[1] - shares[0] > 0.25


@pytest.mark.usefixtures("without_volumes")
def test_limit_is_reached_by_the_hippocampus():
    assert math.isclose(LIMIT, 0.9, abs_tol=1e-3)
    found = make_brains(400, seed=5, correlation=0.0)
    right = ((found.hippocampus < 0).long() == found.labels).double().mean()
    assert abs(float(right) - LIMIT) < 4 * math.sqrt(LIMIT * (1 - LIMIT) / 400)
    assert SEPARATION > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "size must be at least 2"),
        ({"size": 4, "correlation": 1.5}, "correlation must be between 0 and 1, got 1.5"),
        ({"size": 4, "correlation": math.nan}, "correlation must be between 0 and 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_brains(seed=0, **arguments)


def test_bids_reads_back_equal(tmp_path):
    written = make_brains(20, seed=2, correlation=0.5)
    write_bids(tmp_path / "data", written)
    found = load_bids(tmp_path / "data")
    assert not found.problems
    assert torch.equal(found.volumes, standardize(written.volumes))
    for name in ("labels", "age", "sex"):
        assert torch.equal(getattr(found, name), getattr(written, name))
    assert [found.sites[k] for k in found.site] == [SITES[k] for k in written.site]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    with pytest.raises(FileExistsError, match="name a folder that does not"):
        write_bids(tmp_path / "data", written)
