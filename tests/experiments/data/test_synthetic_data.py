import pytest
import torch

from mdnorm.experiments.data.synthetic import (
    ACCURACY_WITH_CONFOUNDER,
    ACCURACY_WITHOUT_CONFOUNDER,
    make_synthetic,
)


def test_same_seed_same_data():
    first, second, other = make_synthetic(50, seed=3), make_synthetic(50, seed=3), make_synthetic(50, seed=4)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.confounder, second.confounder)
    assert not torch.equal(first.images, other.images)


def test_ranges_and_shapes():
    data = make_synthetic(5000)
    assert len(data) == 10_000
    assert data.images.shape == (10_000, 1, 32, 32)
    for values in (data.effect, data.confounder):
        for group, (low, high) in enumerate(((1, 4), (3, 6))):
            inside = values[data.labels == group]
            assert low <= inside.min() < low + 0.01
            assert high - 0.01 < inside.max() <= high
            assert inside.mean() == pytest.approx((low + high) / 2, abs=0.05)


def test_effect_and_confounder_are_independent_within_a_group():
    data = make_synthetic(5000)
    for group in (0, 1):
        inside = data.labels == group
        pair = torch.stack([data.effect[inside], data.confounder[inside]])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.05


def test_each_quadrant_holds_its_magnitude():
    data = make_synthetic(20, noise=0)
    quadrants = {
        "effect, upper left": data.images[:, 0, :16, :16],
        "effect, lower right": data.images[:, 0, 16:, 16:],
        "confounder, lower left": data.images[:, 0, 16:, :16],
    }
    for name, quadrant in quadrants.items():
        expected = data.confounder if name.startswith("confounder") else data.effect
        torch.testing.assert_close(quadrant.amax((1, 2)), expected)
    assert not data.images[:, 0, :16, 16:].any()


def test_noise_has_its_standard_deviation():
    quiet, noisy = make_synthetic(50, noise=0), make_synthetic(50, noise=0.01)
    assert (noisy.images - quiet.images).std() == pytest.approx(0.01, rel=0.02)


def test_analytic_limits_are_reached_by_the_ideal_rules():
    data = make_synthetic(100_000, noise=0)
    by_effect = (data.effect > 3.5) == data.labels.bool()
    assert by_effect.double().mean() == pytest.approx(ACCURACY_WITHOUT_CONFOUNDER, abs=0.003)
    surely_b = (data.effect > 4) | (data.confounder > 4)
    surely_a = (data.effect < 3) | (data.confounder < 3)
    assert not (surely_a & surely_b).any()
    known = (surely_a | surely_b).double().mean()
    assert known + (1 - known) / 2 == pytest.approx(ACCURACY_WITH_CONFOUNDER, abs=0.003)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"group_size": 0}, "group_size"), ({"noise": -1}, "noise")]
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(**arguments)
