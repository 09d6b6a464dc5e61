import numpy as np
import pytest
import torch

from mdnorm_experiments.baselines import Adversary, squared_correlation


def adversary(memory=0, **options):
    settings = {"strength": 2.0, "learning_rate": 0.05, "steps": 1, "memory": memory} | options
    return Adversary(5, 100, **settings)


def batch(n=30):
    features = torch.randn(n, 5)
    return features, features[:, 0] + 0.1 * torch.randn(n), torch.arange(n) % 2


def test_squared_correlation_is_pearsons():
    first, second = torch.randn(50).double(), torch.randn(50).double()
    expected = np.corrcoef(first, second)[0, 1] ** 2
    assert float(squared_correlation(first, second)) == pytest.approx(expected, abs=1e-9)
    assert float(squared_correlation(3 - 2 * first, second)) == pytest.approx(expected, abs=1e-9)


def test_a_constant_has_no_correlation_and_a_finite_gradient():
    constant = torch.ones(10, requires_grad=True)
    squared_correlation(constant, torch.randn(10)).backward()
    assert torch.isfinite(constant.grad).all()


def test_predictor_learns_the_confounder():
    model = adversary(learning_rate=0.01, steps=5)
    terms = [float(model.step(*batch(200))) for _ in range(40)]
    assert terms[-1] > 2 * 0.9
    assert terms[0] < terms[-1]


def test_only_one_class_is_seen():
    """The confounder's link with the label must not be taken for an effect on the features."""
    features, confounder, labels = batch()
    features.requires_grad_()
    adversary().step(features, confounder, labels).backward()
    assert features.grad[labels == 0].any()
    assert not features.grad[labels == 1].any()


def test_the_encoders_term_leaves_the_predictor_alone():
    model = adversary()
    features, confounder, labels = batch()
    term = model.step(features.requires_grad_(), confounder, labels)
    before = [parameter.grad.clone() for parameter in model.predictor.parameters()]
    term.backward()
    for parameter, gradient in zip(model.predictor.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.requires_grad


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_too_few_samples_give_a_term_of_zero(n):
    features, confounder, labels = batch(n)
    assert float(adversary().step(features, confounder, labels)) == 0


def test_memory_gives_batches_of_one_a_correlation():
    model = adversary(memory=20)
    terms = []
    for _ in range(60):
        features, confounder, _ = batch(1)
        features.requires_grad_()
        term = model.step(features, confounder, torch.zeros(1))
        terms.append(float(term.detach()))
        if term.requires_grad:
            term.backward()
            assert features.grad.any()
    assert terms[:2] == [0, 0]
    assert min(terms[2:]) > 0
    assert model._features.shape == (20, 5)
    assert not model._features.requires_grad


def test_a_large_batch_needs_no_memory():
    """Features of older weights would only blur the correlation."""
    features, confounder, labels = batch(60)
    models = [adversary(memory=memory, learning_rate=0.0) for memory in (0, 20)]
    models[1].predictor = models[0].predictor
    models[1].step(*batch(60))
    terms = [float(model.step(features, confounder, labels)) for model in models]
    assert terms[0] == pytest.approx(terms[1])


def test_the_gradient_does_not_shrink_with_the_share_of_the_batch():
    """With memory, the batches of an epoch add up to the gradient of one batch with all samples."""
    torch.manual_seed(1)
    features, confounder, labels = torch.randn(40, 5), torch.randn(40), torch.zeros(40)
    model = adversary(learning_rate=0.0)
    whole = features.clone().requires_grad_()
    model.step(whole, confounder, labels).backward()
    parts = torch.zeros_like(features)
    for rows in torch.arange(40).split(10):
        rest = torch.tensor([i for i in range(40) if i not in rows])
        part = adversary(memory=40, learning_rate=0.0)
        part.predictor = model.predictor
        part._features, part._confounder = features[rest], confounder[rest]
        current = features[rows].clone().requires_grad_()
        part.step(current, confounder[rows], labels[rows]).backward()
        # A mean over four batches.
        parts[rows] = current.grad / 4
    torch.testing.assert_close(parts, whole.grad, rtol=1e-3, atol=1e-6)


def test_the_rate_falls_by_steps_of_the_network():
    model = adversary(steps=3)
    for _ in range(100):
        model.step(*batch())
    assert model._optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)
