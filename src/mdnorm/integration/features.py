"""What a module puts out over a whole loader."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from mdnorm.bars import with_bar
from mdnorm.distributed import group_of
from mdnorm.integration.applied import layer_of, samples_first
from mdnorm.integration.batches import Forward, Keys, evaluating, runner
from mdnorm.integration.dependence import LayerOutputs, Selector
from mdnorm.moments import NoSamplesError
from mdnorm.text import warn


def features(
    model: nn.Module,
    layer: str | nn.Module,
    loader: Iterable[Any],
    *,
    output: Selector | None = None,
    forward: Forward | None = None,
    keys: Keys | None = None,
    progress: bool = True,
) -> Tensor:
    """Return the output of a module for all rows of a loader, in evaluation mode and in the loader's order.

    Behind a module with an inserted `MetadataNorm` they are the corrected features.

    Parameters
    ----------
    model : nn.Module
        With `MetadataNorm` or without; left in the modes (train or eval) that it came in.
    layer : str or nn.Module
        A module of the model, by its name in ``model.named_modules()`` or itself; it must run once in a
        forward pass.
    loader : iterable of batches
        As in `mdnorm.recalibrate`; a generator will do. A model without `MetadataNorm` gets the inputs only,
        so the same loader serves it, and of a tuple the first entry is the input.
    output : str, int or callable, optional
        Where the module returns no tensor: a key, an index, or a function that returns the features, (n, …).
    forward, keys, progress
        As in `mdnorm.recalibrate`.

    Returns
    -------
    (N, …) tensor
        On the CPU, in the order of the loader, the last partial batch included; float32 where the module
        computes in less.

    Warns
    -----
    UserWarning
        The loader shuffles or has a sampler, so that rows do not follow those of a table; or it leaves out
        the last samples (``drop_last=True``).

    Raises
    ------
    TypeError
        `model` is not a module, `layer` neither a name nor a module, or its output no tensor.
    ValueError
        No such module (the message has names that are near); it does not run, or several times in a forward
        pass; samples of different shapes; no samples; what `mdnorm.recalibrate` says of batches.
    """
    model, _ = group_of(model, "local")
    run = runner(forward, keys)
    collected = LayerOutputs(model, layer, output)
    name, parts = collected.name, []
    inserted_there = layer_of(collected.module)
    _warn_of_order(loader)
    collected.open()
    with closing(collected), evaluating(model), torch.no_grad():
        for batch in with_bar(loader, f"features of {name or 'the model'}", progress):
            run(model, batch)
            if len(collected.outputs) != 1:
                raise ValueError(
                    f"{name!r} ran {len(collected.outputs)} times in a forward pass, but must run once: name "
                    "a module that the forward pass calls once (as a module, not by its weights)."
                )
            rows = collected.outputs.pop()
            if inserted_there is not None:
                rows = samples_first(rows, inserted_there[1].sample_dim, name)
            if rows.is_nested:
                raise TypeError(
                    f"the output of {name!r} is a nested tensor: give output= a function that returns rows."
                )
            is_half = rows.is_floating_point() and torch.finfo(rows.dtype).bits < 32
            parts.append((rows.float() if is_half else rows).cpu())
    if not parts:
        raise NoSamplesError("no samples: the loader is empty.")
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise ValueError(
            f"{name!r} puts out samples of different shapes, {' and '.join(map(str, shapes))}: give output= "
            "a function that averages over the positions whose number varies."
        )
    return torch.cat(parts)


def _warn_of_order(loader: Iterable[Any]) -> None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    # A batch sampler of the user's own has the sampler inside, where it is made of one.
    batches: Any = loader.batch_sampler or loader
    sampler = getattr(batches, "sampler", batches)
    if not isinstance(sampler, SequentialSampler):
        warn(
            f"the loader takes its samples by a {type(sampler).__name__}: the features are not in the order "
            "of the data set or a table. Give a DataLoader without shuffle=True and without a sampler."
        )
    if getattr(batches, "drop_last", False):
        warn("the loader drops its last incomplete batch (drop_last=True): these rows have no features.")
