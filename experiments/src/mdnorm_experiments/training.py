"""One training for all settings: a network with a method's normalisation, fitted, run and recalibrated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from mdnorm import context
from mdnorm.balance import balancing_weights
from mdnorm.dependence_loss import DependenceLoss
from mdnorm.files import atomic_path
from mdnorm.integration import fit_gram, parameter_groups, penalty_loss, recalibrate
from mdnorm.layer import MetadataNorm
from mdnorm_experiments.baselines import Adversary, GroupWeights
from mdnorm_experiments.data.confounded import Samples
from mdnorm_experiments.methods import Method
from mdnorm_experiments.networks import BackboneNetwork
from mdnorm_experiments.results import Row

# Twice as fast as 500: the feature maps stay in the cache.
_EVALUATION_BATCH = 125
_LEAST_BATCH = 2  # BatchNorm has no variance of one sample


def has_metadata_norm(network: nn.Module) -> bool:
    """Whether the network has layers to prepare (`mdnorm.fit_gram`) and to recalibrate."""
    return any(isinstance(module, MetadataNorm) for module in network.modules())


def _labels(network: BackboneNetwork, labels: Tensor) -> Tensor:
    """Return labels as the layers take them: numbers of classes, or one column beside a single logit."""
    return labels.float() if network.head.out_features == 1 else labels


def _metadata(
    network: BackboneNetwork, metadata: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
) -> AbstractContextManager[object]:
    """The context of a batch; nothing for a network without layers."""
    if not has_metadata_norm(network):
        return nullcontext()
    return context.metadata(network, metadata, None if labels is None else _labels(network, labels), weights)


def prepare(network: BackboneNetwork, samples: Samples) -> None:
    """Give layers that need it the Gram matrix of the metadata and labels of samples."""
    fit_gram(network, samples.metadata, _labels(network, samples.labels))


def sample_weights(method: Method, samples: Samples) -> Tensor | None:
    """Return the weights (N,) that balance the samples; None for a method that balances nothing."""
    if not method.weights:
        return None
    return balancing_weights(samples.labels, samples.metadata, method="propensity").weights.float()


def in_batches(rows: Tensor, batch_size: int) -> list[Tensor]:
    """Return rows in batches; a last one of a single sample joins the one before."""
    parts = list(rows.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) < min(_LEAST_BATCH, batch_size):
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def fit(
    network: BackboneNetwork,
    method: Method,
    samples: Samples,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    seed: int,
    epoch_done: Callable[[], None],
    warmup_epochs: int = 0,
) -> Row:
    """Train a network from `build` by Adam; the learning rate rises over `warmup_epochs`, then falls to 0.

    It rises by the same amount at each step and falls by a half cosine. `seed` is that of the order of the
    samples; `epoch_done` is called after each epoch. Returns "train_loss" of the last epoch and
    "seconds_per_epoch".
    """
    steps_of_epoch = len(in_batches(torch.arange(len(samples)), batch_size))
    steps, warmup_steps = epochs * steps_of_epoch, warmup_epochs * steps_of_epoch
    optimizers: list[torch.optim.Optimizer] = []
    parameters: Any = network.parameters()
    if method.penalty:
        parameters, coefficients = (group["params"] for group in parameter_groups(network))
        optimizers.append(torch.optim.SGD(coefficients, lr=min(1.0, batch_size / method.penalty["window"])))
    # Fused: three times faster at batch size 1, where the 1.5 million weights cost more than the images.
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    optimizers.append(optimizer)

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses = _losses(network, method, samples, steps)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    network.train()
    loss_sum = 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        for rows in in_batches(torch.randperm(len(samples), generator=generator), batch_size):
            for each in optimizers:
                each.zero_grad()
            task_loss, loss = losses(rows)
            loss.backward()
            for each in optimizers:
                each.step()
            scheduler.step()
            loss_sum += task_loss.item() * len(rows)
        epoch_done()
    seconds = (time.perf_counter() - start) / epochs
    return {"train_loss": loss_sum / len(samples), "seconds_per_epoch": seconds}


def _losses(
    network: BackboneNetwork, method: Method, samples: Samples, steps: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the function from the row numbers of a batch to the task's loss and the one to minimise."""
    adversaries = []
    if method.adversary:
        # One predictor for each column of the confounders, together as strong as the one of a single column.
        width = samples.confounders.shape[1]
        options = method.adversary | {"strength": method.adversary["strength"] / width}
        adversaries = [Adversary(network.num_hidden, steps, **options) for _ in range(width)]
    dependence = None if method.dependence is None else DependenceLoss(**method.dependence)
    groups = GroupWeights(samples, **method.group_dro) if method.group_dro else None
    weights = sample_weights(method, samples)

    def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = samples.labels[rows]
        batch_weights = None if weights is None else weights[rows]
        with _metadata(network, samples.metadata[rows], labels, batch_weights):
            features = network.features(samples.inputs[rows])
        logits = network.classify(features)
        if logits.ndim == 1:
            each = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        else:
            each = cross_entropy(logits, labels, reduction="none")
        if batch_weights is not None:
            each = batch_weights * each
        task_loss = each.mean()
        loss = groups.loss(each, rows) if groups else task_loss
        for column, adversary in enumerate(adversaries):
            loss = loss + adversary.step(features, samples.confounders[rows, column], labels)
        if dependence is not None:
            loss = loss + dependence(logits, samples.confounders[rows], labels)
        if method.penalty:
            loss = loss + penalty_loss(network)
        return task_loss, loss

    return losses


@torch.no_grad()
def outputs(network: BackboneNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """Return features (N, F) and logits, (N, classes) or (N,), in evaluation mode."""
    network.eval()
    features = []
    for rows in torch.arange(len(samples)).split(_EVALUATION_BATCH):
        with _metadata(network, samples.metadata[rows]):
            features.append(network.features(samples.inputs[rows]))
    joined = torch.cat(features)
    return joined, network.classify(joined)


def predictions(logits: Tensor) -> Tensor:
    """Return the number of the predicted class, (N,) int64, from logits (N, classes) or (N,)."""
    return (logits > 0).long() if logits.ndim == 1 else logits.argmax(1)


def recalibrate_on(network: BackboneNetwork, samples: Samples, method: Method) -> None:
    """Give the layers exact coefficients from samples, weighted as the method weights them."""
    weights = sample_weights(method, samples)

    def forward(model: nn.Module, rows: Tensor) -> None:
        assert isinstance(model, BackboneNetwork)
        batch_weights = None if weights is None else weights[rows]
        with _metadata(model, samples.metadata[rows], samples.labels[rows], batch_weights):
            model(samples.inputs[rows])

    parts = torch.arange(len(samples)).split(_EVALUATION_BATCH)
    recalibrate(network, parts, forward=forward, progress=False)


def save_features(file: str, features: Tensor, logits: Tensor, **tensors: Tensor) -> None:
    """Keep features (N, F), scores (the classes' probabilities) and more of the same samples in a file."""
    from safetensors.torch import save

    scores = logits.sigmoid() if logits.ndim == 1 else logits.softmax(1)
    kept = {"features": features, "scores": scores, **tensors}
    with atomic_path(Path(file)) as temporary:
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in kept.items()}))
