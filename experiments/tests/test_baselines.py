"""GroupDRO's weights, and heads that are fitted again on balanced groups or behind an eraser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from mdnorm_experiments.baselines import GroupWeights, balanced_draw, class_and_group, refit, refit_head
from mdnorm_experiments.data.confounded import Samples
from mdnorm_experiments.networks import BackboneNetwork


def samples_of(labels, groups):
    rows = len(labels)
    column = groups.float()[:, None]
    return Samples(torch.randn(rows, 1, 2, 2), labels, column, column, groups)


@pytest.fixture
def samples():
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    groups = torch.where(torch.rand(400) < 0.9, labels, 1 - labels)
    return samples_of(labels, groups)


def test_groups_are_pairs_that_occur():
    samples = samples_of(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 2, 2, 2, 0]))
    assert class_and_group(samples).tolist() == [0, 1, 2, 2, 0]


class TestGroupWeights:
    def test_the_worst_group_gains_weight(self, samples):
        groups = GroupWeights(samples, step_size=0.1)
        losses = torch.where(groups.groups == 2, 2.0, 0.5)
        rows = torch.arange(len(samples))
        for _ in range(30):
            groups.loss(losses, rows)
        assert groups.weights.argmax() == 2
        assert groups.weights[2] > 0.9
        torch.testing.assert_close(groups.weights.sum(), torch.tensor(1.0))

    def test_a_step_is_the_one_of_the_paper(self, samples):
        groups = GroupWeights(samples, step_size=0.3)
        rows = torch.randperm(len(samples))[:60]
        losses = torch.rand(60, requires_grad=True)
        means = [losses[groups.groups[rows] == number].detach().mean() for number in range(4)]
        grown = 0.25 * np.exp(0.3 * np.array(means))
        loss = groups.loss(losses, rows)
        np.testing.assert_allclose(groups.weights, grown / grown.sum(), rtol=1e-5)
        assert float(loss.detach()) == pytest.approx(float(grown @ np.array(means) / grown.sum()), rel=1e-5)
        loss.backward()
        of_last = groups.groups[rows] == 3
        torch.testing.assert_close(losses.grad[of_last].sum(), groups.weights[3])

    def test_a_group_that_a_batch_lacks(self, samples):
        groups = GroupWeights(samples, step_size=1.0)
        rows = torch.nonzero(groups.groups < 2)[:, 0]
        loss = groups.loss(torch.ones(len(rows)), rows)
        assert groups.weights[0] == groups.weights[1] > groups.weights[2] == groups.weights[3] > 0
        torch.testing.assert_close(loss, groups.weights[:2].sum())


class TestBalancedDraw:
    def test_equally_many_of_each_group(self, samples):
        groups = class_and_group(samples)
        rows, weights = balanced_draw(groups, torch.Generator().manual_seed(0))
        counts = groups[rows].bincount()
        assert set(counts.tolist()) == {int(groups.bincount().min())}
        assert len(rows.unique()) == len(rows)
        assert torch.equal(weights, torch.ones(len(rows)))
        other, _ = balanced_draw(groups, torch.Generator().manual_seed(1))
        assert not torch.equal(rows, other)

    def test_a_group_that_is_too_small_weighs_as_much(self):
        groups = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
        rows, weights = balanced_draw(groups, torch.Generator().manual_seed(0))
        assert groups[rows].bincount().tolist() == [10, 3, 10]
        for group in range(3):
            assert float(weights[groups[rows] == group].sum()) == pytest.approx(10)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_head_is_a_logistic_regression(num_classes):
    generator = torch.Generator().manual_seed(0)
    # One unit is dead.
    inputs = torch.randn(300, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0])
    noise = torch.rand(300, generator=generator)
    labels = ((inputs[:, 0] + inputs[:, 1] / 10 + noise > 0).long() + (inputs[:, 2] > 0.1).long()).clamp(
        max=num_classes - 1
    )
    head = nn.Linear(5, num_classes)
    refit_head(head, inputs, labels, [(torch.arange(300), torch.ones(300))])
    scaled = (inputs / inputs.std(0).where(inputs.std(0) > 0, 1.0)).double().numpy()
    found = head(inputs).softmax(1).detach().numpy()
    closest = min(
        np.abs(
            LogisticRegression(C=10.0**power, max_iter=1000).fit(scaled, labels).predict_proba(scaled) - found
        ).max()
        for power in range(-4, 3)
    )
    assert closest < 1e-3


class Pixels(nn.Flatten):
    num_features = 4


class TestRefit:
    def network(self):
        torch.manual_seed(1)
        return BackboneNetwork(Pixels(), 2)

    def refit(self, network, samples, held_out, **options):
        refit(
            network,
            lambda rows: network.features(rows.inputs).detach(),
            samples,
            held_out,
            seed=0,
            **options,
        )

    def test_balanced_leaves_all_but_the_head(self, samples):
        network = self.network()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        held_out = samples_of(samples.labels, samples.groups)
        self.refit(network, samples, held_out, fit="balanced", draws=2)
        after = network.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"head.weight", "head.bias"}

    def test_erased_features_do_not_covary_with_the_metadata_in_the_classes(self, samples):
        inputs = samples.inputs + samples.confounders[:, :, None, None]
        samples = Samples(inputs, samples.labels, samples.metadata, samples.confounders, samples.groups)
        network = self.network()
        self.refit(network, samples, samples, fit="erased")
        with torch.no_grad():
            features = network.features(inputs)
            logits = network.classify(features)
        torch.testing.assert_close(network(inputs), logits)
        # Within the classes together: as residuals of features and site given the label.
        site = samples.groups.double()
        within = site - torch.stack([site[samples.labels == c].mean() for c in (0, 1)])[samples.labels]
        for values in (features, logits):
            assert (values.double() * within[:, None]).mean(0).abs().max() < 1e-5
