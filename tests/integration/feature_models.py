"""The small convolutional model, and its data, on which the features of PyTorch are tested."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mdnorm

ESTIMATORS = ["batch", "dataset", "running", "recursive", "penalty"]


def make_data(num_samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images on which both metadata and label have an effect."""
    generator = torch.Generator().manual_seed(seed)
    metadata = torch.randn(num_samples, 2, generator=generator)
    labels = torch.rand(num_samples, 1, generator=generator).round()
    noise = torch.randn(num_samples, 1, 6, 6, generator=generator)
    return noise + metadata[:, :1, None, None] + labels[:, :, None, None], metadata, labels


def make_model(estimator: str, **options: object) -> nn.Sequential:
    """A network with a layer behind its convolution (by channel) and one behind its hidden layer."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4), nn.Tanh(), nn.Linear(4, 1)
    )
    images, metadata, labels = make_data(200, seed=100)
    sizes = {"num_metadata": 2, "num_labels": 1, "example": images[:2], "estimator": estimator}
    mdnorm.insert(model, "0", granularity="channel", **sizes, **options)
    mdnorm.insert(model, "3", **sizes, **options)
    mdnorm.fit_gram(model, metadata, labels)
    return model


def make_optimizer(model: nn.Module, learning_rate: float = 0.05) -> torch.optim.Optimizer:
    """Adam, which has a state of its own; the learned coefficients of "penalty" have their learning rate."""
    if any("estimator.weight" in name for name, _ in model.named_parameters()):
        return torch.optim.Adam(mdnorm.parameter_groups(model, penalty={"lr": 0.1}), lr=learning_rate)
    return torch.optim.Adam(model.parameters(), lr=learning_rate)


def loss_of(model: nn.Module, images: Tensor, metadata: Tensor, labels: Tensor) -> Tensor:
    """The loss of a training forward, that of the learned coefficients included."""
    with mdnorm.metadata(model, metadata, labels):
        logits = model(images)
    loss = nn.functional.binary_cross_entropy_with_logits(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels
    )
    if any("estimator.weight" in name for name, _ in model.named_parameters()):
        loss = loss + mdnorm.penalty_loss(model)
    return loss


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
