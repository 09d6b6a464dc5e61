"""Exact coefficients for the length of an evaluation, and the state of the training back behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mdnorm.distributed import group_of
from mdnorm.integration.batches import evaluating
from mdnorm.integration.loader_state import unchanged_loaders
from mdnorm.integration.recalibrate import recalibrate
from mdnorm.integration.recalibration import Recalibration
from mdnorm.layer import MetadataNorm


@contextmanager
def recalibrated(
    model: nn.Module, loader: Iterable[Any], *, held_out: Iterable[Any] | None = None, **options: Any
) -> Iterator[Recalibration]:
    """Evaluate with the coefficients of a whole data set, in the midst of training.

    Inside the block every `MetadataNorm` has the coefficients that `mdnorm.recalibrate` gives it, and the
    model is in evaluation mode. Behind it everything is as it was before, bit for bit, also after an
    exception: training goes on as if nothing had been. So an accuracy by which an epoch is chosen, or
    training stopped, is that of the model as it will be used. It costs the passes of `recalibrate`.

    Parameters
    ----------
    model, loader, held_out, **options
        As of `mdnorm.recalibrate`: `shrink`, `forward`, `keys`, `progress`, `process_group`.

    Returns
    -------
    context manager
        It gives the `Recalibration`, as ``with mdnorm.recalibrated(model, loader) as report:``. Blocks nest.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        When the block is entered, as `mdnorm.recalibrate`; the model is as it was before then, too.

    Notes
    -----
    - What comes back: all of the layers, the mode of every module, buffers that the passes over `loader`
      changed, the random numbers of torch, NumPy and Python, and those that the loader, its data set and
      transforms hold. What the block itself does to the rest of the model or to random numbers stays.
    - Do not train inside the block: the layers would forget it.
    - A pass over the same loader may be under way, in the midst of an epoch: it goes on behind the block.
      Loaders that go through a stream from where they stopped (some iterable data sets) lose what was read.

    Examples
    --------
    >>> import mdnorm
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> report = mdnorm.insert(model, after="0", num_metadata=1)
    >>> images, age = torch.randn(200, 8), torch.rand(200)
    >>> with mdnorm.recalibrated(model, [(images, age)]), torch.no_grad():
    ...     with mdnorm.metadata(model, age[:10]):
    ...         logits = model(images[:10])
    >>> bool(model[0].metadata_norm.training)
    True
    """
    group_of(model, options.get("process_group", "auto"))  # Says what is wrong with the arguments.
    layers = [module for module in model.modules() if isinstance(module, MetadataNorm)]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_state_of(layer))
        # Modes come back before the layers: a change of the mode may change coefficients.
        stack.enter_context(evaluating(model))
        with unchanged_loaders(loader, held_out), _unchanged_buffers(model, layers):
            report = recalibrate(model, loader, held_out=held_out, **options)
        yield report


def _state_of(layer: MetadataNorm) -> Callable[[], None]:
    """Return what puts all that a layer and the modules in it hold back in place."""
    # Attributes, tensors and modules: those of open sizes are made later.
    kept: list[tuple[Any, dict[str, Any]]] = [
        (entries, dict(entries))
        for module in layer.modules()
        for entries in (vars(module), module._buffers, module._parameters, module._modules)
    ]
    values = [(tensor, tensor.detach().clone()) for tensor in (*layer.parameters(), *layer.buffers())]

    def put_back() -> None:
        for entries, before in kept:
            entries.clear()
            entries.update(before)
        # Tensors that an optimiser or a compiled graph knows stay themselves.
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)

    return put_back


@contextmanager
def _unchanged_buffers(model: nn.Module, layers: list[MetadataNorm]) -> Iterator[None]:
    """Put the other buffers back at once, since the evaluation may have business with them."""
    own = {id(buffer) for layer in layers for buffer in layer.buffers()}
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                # Not where nothing changed: a buffer may be part of a graph that is still needed.
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
