"""Training and measuring a network of the synthetic images, for every setting that uses them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mdnorm.dependence_loss import DependenceLoss
from mdnorm.files import atomic_path
from mdnorm.integration import parameter_groups, penalty_loss
from mdnorm.layer import MetadataNorm
from mdnorm.metrics import distance_correlation_sqr
from mdnorm_experiments.adversary import Adversary
from mdnorm_experiments.data.synthetic import SyntheticData
from mdnorm_experiments.methods import METHODS, Method
from mdnorm_experiments.networks import SyntheticNetwork
from mdnorm_experiments.results import Row

GROUPS = ("A", "B")

Losses = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Row numbers of a batch → the loss of the task, and the one to minimise."""


def check_settings(
    methods: Sequence[str],
    *,
    batch_sizes: Sequence[int],
    seeds: int | None,
    epochs: int | None,
    learning_rate: float | None,
    group_sizes: Sequence[int],
) -> None:
    """Raise ValueError for an unknown method or a number out of range; None stands for a default."""
    unknown = [method for method in methods if method not in METHODS or METHODS[method].of_confounded_only]
    if unknown:
        raise ValueError(f"unknown method(s) {', '.join(unknown)}: choose from {', '.join(METHODS)}.")
    for name, values in (
        ("batch size", batch_sizes),
        ("number of seeds", [1 if seeds is None else seeds]),
        ("number of epochs", [1 if epochs is None else epochs]),
    ):
        if any(value < 1 for value in values):
            raise ValueError(f"{name} must be at least 1, got {min(values)}.")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"learning rate must be a positive number, got {learning_rate}.")
    if min(group_sizes) < 4:
        raise ValueError("groups need at least 4 images: the distance correlation is not defined below.")


def has_metadata_norm(network: nn.Module) -> bool:
    """Whether the network has layers to prepare (`mdnorm.fit_gram`) and to recalibrate."""
    return any(isinstance(module, MetadataNorm) for module in network.modules())


def fit(
    network: SyntheticNetwork,
    method: Method,
    data: SyntheticData,
    metadata: Tensor,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    seed: int,
    epoch_done: Callable[[], None],
) -> Row:
    """Train a network by Adam, the learning rate falling to 0 by a half cosine.

    The coefficients of the estimator "penalty" have an optimiser of their own (see `Method`).

    Parameters
    ----------
    network : SyntheticNetwork
        From `mdnorm_experiments.methods.build`, its layers prepared; changed in place.
    method : Method
    data : SyntheticData
    metadata : (2N, K_m) tensor
    batch_size, epochs, learning_rate
    seed : int
        Of the order of the samples.
    epoch_done : callable
        Called after each epoch.

    Returns
    -------
    dict
        "train_loss" of the last epoch and "seconds_per_epoch".
    """
    steps = num_steps(len(data), batch_size, epochs)

    def make_losses() -> Losses:
        adversary = Adversary(network.num_features, steps, **method.adversary) if method.adversary else None
        dependence = None if method.dependence is None else DependenceLoss(**method.dependence)

        def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
            features = network.features(data.images[rows], metadata[rows], data.labels[rows])
            logits = network.classify(features)
            loss = task_loss = binary_cross_entropy_with_logits(logits, data.labels[rows])
            if adversary is not None:
                loss = loss + adversary.step(features, data.confounder[rows], data.labels[rows])
            if dependence is not None:
                loss = loss + dependence(logits, data.confounder[rows], data.labels[rows])
            return task_loss, loss

        return losses

    return optimise(
        network,
        method,
        make_losses,
        num_samples=len(data),
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        epoch_done=epoch_done,
    )


def num_steps(num_samples: int, batch_size: int, epochs: int, least_batch_size: int = 1) -> int:
    """Return how many batches a training has; see `optimise`."""
    full, rest = divmod(num_samples, batch_size)
    joined = full > 0 and rest < least_batch_size
    return epochs * (full if joined or rest == 0 else full + 1)


def optimise(
    network: nn.Module,
    method: Method,
    make_losses: Callable[[], Losses],
    *,
    num_samples: int,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    seed: int,
    epoch_done: Callable[[], None],
    least_batch_size: int = 1,
    warmup_epochs: int = 0,
) -> Row:
    """Train any network as `fit` does.

    Parameters
    ----------
    network : nn.Module
        Its layers prepared; changed in place.
    method : Method
        Its `penalty` is added here, with an optimiser of its own.
    make_losses : callable
        Returns the function that runs the network on a batch; called once the optimisers are made.
    num_samples, batch_size, epochs, learning_rate, seed, epoch_done
        See `fit`.
    least_batch_size : int
        A smaller last batch joins the one before.
    warmup_epochs : int
        During these first epochs the learning rate rises to its value, by the same amount at each step.

    Returns
    -------
    dict
        "train_loss" of the last epoch and "seconds_per_epoch".
    """
    optimizers: list[torch.optim.Optimizer] = []
    parameters: Any = network.parameters()
    if method.penalty:
        (parameters, coefficients) = (group["params"] for group in parameter_groups(network))
        optimizers.append(torch.optim.SGD(coefficients, lr=min(1.0, batch_size / method.penalty["window"])))
    # Fused: three times faster at batch size 1, where the 1.5 million weights cost more than the images.
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    optimizers.append(optimizer)
    steps, warmup_steps = (
        num_steps(num_samples, batch_size, count, least_batch_size) for count in (epochs, warmup_epochs)
    )
    scheduler = _schedule(optimizer, steps, warmup_steps)
    losses = make_losses()
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    network.train()
    loss_sum = 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        parts = list(torch.randperm(num_samples, generator=generator).split(batch_size))
        if len(parts) > 1 and len(parts[-1]) < least_batch_size:
            parts[-2:] = [torch.cat(parts[-2:])]
        for rows in parts:
            for each in optimizers:
                each.zero_grad()
            task_loss, loss = losses(rows)
            if method.penalty:
                loss = loss + penalty_loss(network)
            loss.backward()
            for each in optimizers:
                each.step()
            scheduler.step()
            loss_sum += task_loss.item() * len(rows)
        epoch_done()
    seconds = (time.perf_counter() - start) / epochs
    return {"train_loss": loss_sum / num_samples, "seconds_per_epoch": seconds}


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if warmup_steps == 0:
        return schedulers.CosineAnnealingLR(optimizer, steps)
    rise = schedulers.LinearLR(optimizer, 1 / (warmup_steps + 1), 1.0, warmup_steps)
    fall = schedulers.CosineAnnealingLR(optimizer, max(steps - warmup_steps, 1))
    return schedulers.SequentialLR(optimizer, [rise, fall], [warmup_steps])


def batches(data: SyntheticData, metadata: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (images, metadata, labels) in batches of 125: for evaluation and `mdnorm.recalibrate`."""
    # Twice as fast as 500: the feature maps stay in the cache.
    parts = (data.images.split(125), metadata.split(125), data.labels.split(125))
    return list(zip(*parts, strict=True))


@torch.no_grad()
def evaluate(
    network: SyntheticNetwork, data: SyntheticData, metadata: Tensor, features_file: str | None = None
) -> Row:
    """Return accuracy and dependence on the confounder, by group; keep the features in a file if asked to."""
    from safetensors.torch import save
    from sklearn.metrics import balanced_accuracy_score

    network.eval()
    features = torch.cat([network.features(images, m) for images, m, _ in batches(data, metadata)])
    logits = network.classify(features)
    predicted = logits > 0
    correct = predicted == data.labels.bool()
    accuracy, dependence = {}, {}
    for index, group in enumerate(GROUPS):
        inside = data.labels == index
        accuracy[group] = float(correct[inside].double().mean())
        dependence[group] = float(distance_correlation_sqr(features[inside], data.confounder[inside]))
    if features_file is not None:
        tensors = {
            "features": features,
            "labels": data.labels,
            "effect": data.effect,
            "confounder": data.confounder,
            "scores": logits.sigmoid(),
        }
        with atomic_path(Path(features_file)) as temporary:
            temporary.write_bytes(save(tensors))
    return {
        "bacc": float(balanced_accuracy_score(data.labels.numpy(), predicted.numpy())),
        "accuracy": accuracy,
        "dcor2": dependence,
    }
