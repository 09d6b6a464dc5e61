"""Training with ``estimator="penalty"``: its loss and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdnorm.estimators import Penalty
from mdnorm.layer import MetadataNorm


def _estimators(model: nn.Module) -> list[Penalty]:
    """Return the estimators of the "penalty" layers: there must be some, and none without its sizes."""
    found = [module for module in model.modules() if isinstance(module, Penalty)]
    for layer in model.modules():
        if isinstance(layer, MetadataNorm) and layer.estimator is None:
            made = getattr(layer._make, "func", layer._make)
            if isinstance(made, type) and issubclass(made, Penalty):
                raise ValueError(
                    "a 'penalty' layer does not know its sizes yet: give num_features, num_metadata and "
                    "num_labels, or run one batch first."
                )
    if not found:
        raise ValueError(f"{type(model).__name__} has no MetadataNorm with estimator='penalty'.")
    return found


def penalty_loss(model: nn.Module) -> Tensor:
    """Return the sum of the losses that the last training forward left in the "penalty" layers.

    Add it to the loss of the task. Only the layers' coefficients receive its gradient.

    Parameters
    ----------
    model : nn.Module
        With at least one ``MetadataNorm(estimator="penalty")``. A layer that runs several times in a forward
        pass leaves the loss of its last run.

    Returns
    -------
    0-dimensional tensor

    Raises
    ------
    ValueError
        No such layer.
    RuntimeError
        A layer has seen no training forward since it was made, reset or copied, or the last one was without
        gradient.
    """
    estimators = _estimators(model)
    losses = [estimator.loss for estimator in estimators]
    ready = [loss for loss in losses if loss is not None]
    if len(ready) < len(losses):
        raise RuntimeError(
            "a 'penalty' layer has no loss yet: call penalty_loss after a forward pass in training."
        )
    for estimator, loss in zip(estimators, ready, strict=True):
        if torch.is_grad_enabled() and estimator.weight.requires_grad and not loss.requires_grad:
            raise RuntimeError(
                "the last forward pass of a 'penalty' layer was without gradient (under torch.no_grad, or in "
                "reentrant activation checkpointing): it would not learn."
            )
    return torch.stack(ready).sum()


def parameter_groups(model: nn.Module, penalty: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimiser: the network's, and the "penalty" coefficients.

    Parameters
    ----------
    model : nn.Module
        With at least one ``MetadataNorm(estimator="penalty")`` whose sizes are known.
    penalty : mapping, optional
        Options of the second group, ``{"lr": 0.1}`` say. Weight decay is off there unless given.

    Raises
    ------
    ValueError
        No such layer, or one whose sizes are not known yet.
    """
    coefficients = [estimator.weight for estimator in _estimators(model)]
    own = {id(parameter) for parameter in coefficients}
    network = [parameter for parameter in model.parameters() if id(parameter) not in own]
    return [{"params": network}, {"params": coefficients, "weight_decay": 0.0} | dict(penalty or {})]
