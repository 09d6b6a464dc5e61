import pytest
import torch
from torch import nn

from mdnorm import MetadataNorm, fit_gram, parameter_groups, penalty_loss
from mdnorm.estimators import Penalty


class Net(nn.Module):
    def __init__(self, estimator="penalty"):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 1)
        self.norms = nn.ModuleList(
            [MetadataNorm(5, 2, 1, estimator=estimator), MetadataNorm(1, 2, 1, estimator="batch")]
        )
        self.norms.append(MetadataNorm(1, 2, 1, estimator=estimator))

    def forward(self, images, metadata, labels=None):
        x = torch.relu(self.norms[0](self.first(images), metadata, labels))
        return self.norms[2](self.norms[1](self.last(x), metadata, labels), metadata, labels)


def batch(n=40):
    return torch.randn(n, 4), torch.randn(n, 2), torch.randint(0, 2, (n,)).float()


def test_the_loss_is_the_sum_over_the_layers():
    net, data = Net(), batch()
    fit_gram(net, *data[1:])
    net(*data)
    first, second = (net.norms[i].estimator.loss for i in (0, 2))
    assert torch.equal(penalty_loss(net), first + second)
    assert penalty_loss(net).ndim == 0
    penalty_loss(net).backward()
    reached = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert reached == {"norms.0.estimator.weight", "norms.2.estimator.weight"}


def test_parameter_groups():
    net = Net()
    network, coefficients = parameter_groups(net)
    assert [id(p) for p in network["params"]] == [
        id(p) for part in (net.first, net.last) for p in part.parameters()
    ]
    assert [id(p) for p in coefficients["params"]] == [id(net.norms[i].estimator.weight) for i in (0, 2)]
    assert set(network) == {"params"}
    assert coefficients["weight_decay"] == 0
    _, coefficients = parameter_groups(net, {"lr": 0.3, "weight_decay": 0.1})
    assert (coefficients["lr"], coefficients["weight_decay"]) == (0.3, 0.1)
    optimizer = torch.optim.AdamW(parameter_groups(net, {"lr": 0.3}), lr=0.01, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.2), (0.3, 0)]


def test_training_in_one_loop():
    """The network learns the label, the coefficients the metadata's effect on the moving features."""
    torch.manual_seed(0)
    images, metadata, labels = batch(400)
    images = images + 2 * labels[:, None] + metadata[:, :1]
    net = Net()
    fit_gram(net, metadata, labels)
    optimizer = torch.optim.SGD(parameter_groups(net, {"lr": 0.5}), lr=0.05)
    losses = []
    for _ in range(60):
        for part in torch.randperm(400).split(50):
            logits = net(images[part], metadata[part], labels[part])[:, 0]
            task = nn.functional.binary_cross_entropy_with_logits(logits, labels[part])
            optimizer.zero_grad()
            (task + penalty_loss(net)).backward()
            optimizer.step()
            losses.append(float(task.detach()))
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    net.eval()
    features = net.norms[0](net.first(images), metadata).detach()
    design = torch.cat([metadata, labels[:, None], torch.ones(400, 1)], 1)
    before = torch.linalg.lstsq(design, net.first(images).detach()).solution[:2].abs().max()
    after = torch.linalg.lstsq(design, features).solution[:2].abs().max()
    # What is left is the noise of batches of 50 at a rate of one half.
    assert after < 0.2 * before


def test_errors():
    net, data = Net(), batch()
    fit_gram(net, *data[1:])
    with pytest.raises(RuntimeError, match="has no loss yet: call penalty_loss after a forward pass"):
        penalty_loss(net)
    net.eval()(*data[:2])
    with pytest.raises(RuntimeError, match="has no loss yet"):
        penalty_loss(net)
    plain = nn.Sequential(nn.Linear(2, 2), MetadataNorm(2, 1, estimator="batch"))
    for function in (penalty_loss, parameter_groups):
        with pytest.raises(ValueError, match="Sequential has no MetadataNorm with estimator='penalty'"):
            function(plain)
    lazy = MetadataNorm(None, 2, 1, estimator="penalty")
    for model in (lazy, nn.ModuleList([lazy, net])):
        with pytest.raises(ValueError, match="does not know its sizes yet"):
            parameter_groups(model)


def test_a_forward_pass_without_gradient_is_an_error_and_not_a_silent_zero():
    net = Net()
    images, metadata, labels = batch()
    fit_gram(net, metadata, labels)
    with torch.no_grad():
        net(images, metadata, labels)
        assert float(penalty_loss(net)) > 0
    with pytest.raises(RuntimeError, match="without gradient"):
        penalty_loss(net)
    for estimator in net.modules():
        if isinstance(estimator, Penalty):
            estimator.weight.requires_grad_(False)
    net(images, metadata, labels)
    assert not penalty_loss(net).requires_grad
