import numpy as np
import pytest
import torch

from mdnorm.metrics import distance_correlation_sqr
from mdnorm_experiments.data.synthetic import (
    ACCURACY_WITH_CONFOUNDER,
    ACCURACY_WITHOUT_CONFOUNDER,
    VARIANTS,
    make_synthetic,
)


def test_same_seed_same_data():
    first, second, other = make_synthetic(50, seed=3), make_synthetic(50, seed=3), make_synthetic(50, seed=4)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.confounder, second.confounder)
    assert not torch.equal(first.images, other.images)


def test_ranges_and_shapes():
    data = make_synthetic(5000)
    assert len(data.labels) == 10_000
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


class TestVariants:
    def test_sites_add_up_to_the_magnitude_of_the_third_blob(self):
        data = make_synthetic(300, noise=0, variant="sites")
        torch.testing.assert_close(data.images[:, 0, 16:, :16].amax((1, 2)), data.confounder)
        assert data.site.unique().tolist() == list(range(16))
        assert data.nuisance.shape == (600, 27)
        assert set(data.sex.tolist()) == {0.0, 1.0}
        assert 0 < data.age.min() < data.age.max() < 100

    def test_sites_have_offsets_that_other_data_sets_share(self):
        """Else an effect learned from the training data would not hold for the test data."""
        means = []
        for seed in (0, 1):
            data = make_synthetic(8000, seed=seed, noise=0, variant="sites")
            rest = data.confounder - 0.6 * (data.sex - 0.5)
            means.append(torch.stack([rest[data.site == site].mean() for site in range(16)]))
        torch.testing.assert_close(means[0], means[1], atol=0.15, rtol=0)
        assert means[0].std() > 0.5

    def test_groups_differ_in_sites_sex_and_age(self):
        data = make_synthetic(5000, variant="sites")
        first = data.labels == 0
        for values in (data.sex, data.age):
            difference = values[~first].mean() - values[first].mean()
            assert difference > 0.3 * values.std()
        counts = [torch.bincount(data.site[inside], minlength=16) for inside in (first, ~first)]
        assert (counts[0] - counts[1]).abs().sum() > 0.3 * len(data.labels)

    def test_quadratic(self):
        data = make_synthetic(5000, noise=0, variant="quadratic")
        third = data.images[:, 0, 16:, :16].amax((1, 2))
        torch.testing.assert_close(third, 1 + 5 * data.confounder**2, atol=1e-5, rtol=1e-5)
        assert (data.confounder < 0).float().mean() == pytest.approx(0.1, abs=0.01)

    def test_a_line_leaves_a_curve_of_the_quadratic(self):
        data = make_synthetic(3000, noise=0, variant="quadratic")
        third = data.images[:, 0, 16:, :16].amax((1, 2))
        design = torch.stack([data.confounder, data.labels, torch.ones_like(third)], 1)
        slope = torch.linalg.lstsq(design, third[:, None]).solution[0]
        left = third - slope * data.confounder
        for group in (0, 1):
            inside = data.labels == group
            assert distance_correlation_sqr(left[inside], data.confounder[inside]) > 0.2

    def test_variance(self):
        data = make_synthetic(4000, noise=0, variant="variance")
        assert not data.images[:, 0, 16:, :16].any()
        torch.testing.assert_close(data.images[:, 0, :16, :16], data.images[:, 0, 16:, 16:])
        shown = data.images[:, 0, :16, :16].flatten(1)[:, 120]
        scale = make_synthetic(1, noise=0).images[0, 0, :16, :16].flatten()[120]
        scale = scale / make_synthetic(1, noise=0).effect[0]
        error = shown / scale - data.effect
        for low in (0.1, 0.5):
            inside = (data.confounder > low) & (data.confounder < low + 0.05)
            expected = 0.1 * np.exp(4 * (low + 0.025))
            assert error[inside].std() == pytest.approx(expected, rel=0.1)
            # Four standard errors of some 280 samples.
            assert error[inside].mean() == pytest.approx(0, abs=0.25 * expected)
        for group, (low, high) in enumerate(((0, 0.7), (0.3, 1))):
            inside = data.confounder[data.labels == group]
            assert low <= inside.min() < low + 0.01
            assert high - 0.01 < inside.max() <= high

    def test_effect_does_not_depend_on_the_variant(self):
        plain = make_synthetic(100, seed=3)
        for variant in VARIANTS:
            assert torch.equal(make_synthetic(100, seed=3, variant=variant).effect, plain.effect)

    def test_an_unknown_variant(self):
        with pytest.raises(ValueError, match="variant must be one of plain, sites, quadratic, variance"):
            make_synthetic(10, variant="cubic")
