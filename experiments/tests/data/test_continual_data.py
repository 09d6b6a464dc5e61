import pytest
import torch

from mdnorm_experiments.data.synthetic import (
    BOTH_LIMITS,
    CONFOUNDER_LIMITS,
    CONFOUNDER_RANGE,
    EFFECT_LIMITS,
    NUM_STAGES,
    SHIFTS,
    make_stage,
    make_synthetic,
)


@pytest.mark.parametrize("stage", range(NUM_STAGES))
def test_ranges(stage):
    data, shift = make_stage(stage, 3000), SHIFTS[stage]
    for values, direction in ((data.effect, 1), (data.confounder, -1)):
        for group, (low, sign) in enumerate(((3, 1), (4, -1))):
            inside = values[data.labels == group]
            start = low + sign * direction * shift
            assert start <= inside.min() < start + 0.01
            assert start + 1.99 < inside.max() <= start + 2
            assert inside.mean() == pytest.approx(start + 1, abs=0.05)
    assert CONFOUNDER_RANGE[0] <= data.confounder.min()
    assert data.confounder.max() <= CONFOUNDER_RANGE[1]


def test_the_first_and_last_limits():
    assert (EFFECT_LIMITS[0], EFFECT_LIMITS[-1]) == (0.75, 0.5)
    assert (CONFOUNDER_LIMITS[0], CONFOUNDER_LIMITS[-1]) == (0.75, 1)
    assert (BOTH_LIMITS[0], BOTH_LIMITS[-1]) == (0.875, 1)


@pytest.mark.parametrize("stage", range(NUM_STAGES))
def test_analytic_limits_are_reached_by_the_ideal_rules(stage):
    """A magnitude that only one group has decides; elsewhere half of the guesses are right."""
    data, shift = make_stage(stage, 30_000, noise=0), SHIFTS[stage]
    in_b = data.labels.bool()

    def certain(values, low_b, high_a):
        return (values < low_b) | (values > high_a)

    by_effect = certain(data.effect, 4 - shift, 5 + shift)
    by_confounder = certain(data.confounder, 4 + shift, 5 - shift)
    # What counts as certain is: a value below the range of group B is in A, one above that of A is in B.
    assert not (in_b & ((data.effect < 4 - shift) | (data.confounder < 4 + shift))).any()
    assert not (~in_b & ((data.effect > 5 + shift) | (data.confounder > 5 - shift))).any()
    for known, limit in (
        (by_effect, EFFECT_LIMITS[stage]),
        (by_confounder, CONFOUNDER_LIMITS[stage]),
        (by_effect | by_confounder, BOTH_LIMITS[stage]),
    ):
        share = known.double().mean()
        assert share + (1 - share) / 2 == pytest.approx(limit, abs=0.004)


@pytest.mark.parametrize("stage", range(NUM_STAGES))
def test_effect_and_confounder_are_independent_within_a_group(stage):
    data = make_stage(stage, 5000, stratified=True)
    for group in (0, 1):
        inside = data.labels == group
        pair = torch.stack([data.effect[inside], data.confounder[inside]])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.05


def test_stratified_data_have_one_value_in_each_part():
    data = make_stage(1, 200, seed=3, stratified=True)
    for values, start in ((data.effect, (3.125, 3.875)), (data.confounder, (2.875, 4.125))):
        for group in (0, 1):
            parts = ((values[data.labels == group] - start[group]) / 2 * 200).floor()
            assert parts.sort().values.tolist() == list(range(200))
    assert (data.effect[:200].diff() < 0).any()


@pytest.mark.parametrize("stage", range(NUM_STAGES))
def test_stratified_data_measure_the_limit_with_hardly_any_noise(stage):
    accuracies = []
    for seed in range(5):
        data = make_stage(stage, 500, seed=seed, stratified=True)
        accuracies.append(((data.effect > 4.5) == data.labels.bool()).double().mean())
    torch.testing.assert_close(
        torch.stack(accuracies), torch.full((5,), EFFECT_LIMITS[stage]).double(), atol=0.002, rtol=0
    )


def test_the_same_images_as_in_the_synthetic_setting():
    first = make_stage(0, 20, seed=4)
    ranges = ((3.0, 5.0), (4.0, 6.0))
    second = make_synthetic(20, seed=4, effect_ranges=ranges, confounder_ranges=ranges)
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize("stage", [-1, 5])
def test_errors(stage):
    with pytest.raises(ValueError, match=r"stage must be 0 … 4"):
        make_stage(stage)


def test_variants_keep_their_ranges():
    with pytest.raises(ValueError, match="ranges of its own"):
        make_synthetic(5, variant="sites", confounder_ranges=((3.0, 5.0), (4.0, 6.0)))
