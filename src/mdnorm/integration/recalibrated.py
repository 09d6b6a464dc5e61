"""Exact coefficients for the length of an evaluation, and the state of the training back behind it."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdnorm.distributed import group_of
from mdnorm.integration.batches import evaluating
from mdnorm.integration.recalibrate import recalibrate
from mdnorm.integration.recalibration import Recalibration
from mdnorm.layer import MetadataNorm

# Objects that are looked at, and how long a list may be to be one of objects with a state: not all samples.
_MOST_OBJECTS = 20_000
_LONGEST = 256
# Numbers that loaders and samplers of accelerate count up whenever they are gone through.
_COUNTERS = ("epoch", "iteration", "end_of_dataloader", "remainder")
_PLAIN = (
    *(str, bytes, bool, int, float, complex, type(None), type),
    *(Tensor, np.ndarray, np.generic, nn.Module, types.ModuleType),
)


@contextmanager
def recalibrated(
    model: nn.Module, loader: Iterable[Any], *, held_out: Iterable[Any] | None = None, **options: Any
) -> Iterator[Recalibration]:
    """Evaluate with the coefficients of a whole data set, in the midst of training.

    Inside the block every `MetadataNorm` has the coefficients that `mdnorm.recalibrate` gives it, and the
    model is in evaluation mode. After it everything is as it was before, bit for bit, even after an
    exception: training goes on as if nothing had happened. So the accuracy by which an epoch is chosen, or
    training stopped, is that of the model as it will be used. It costs the passes of `recalibrate`.

    Parameters
    ----------
    model, loader, held_out, **options
        As in `mdnorm.recalibrate`: `shrink`, `forward`, `keys`, `progress`, `process_group`.

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


@contextmanager
def unchanged_loaders(*loaders: Any) -> Iterator[None]:
    """Put back, behind the block, what going through loaders changes.

    That is: the global random numbers of torch (on all devices), NumPy and Python; every generator that a
    loader, its samplers, its data set and the transforms in it hold; the epochs that samplers of accelerate
    count; and the workers that a `DataLoader` keeps (``persistent_workers=True``), which another pass over it
    may be using at that time: the passes inside the block have workers of their own.
    """
    with ExitStack() as stack:
        for put_back in _global_states():
            stack.callback(put_back)
        for value in _reachable(loaders):
            for put_back in _states_of(value):
                stack.callback(put_back)
        yield


def _global_states() -> Iterator[Callable[[], Any]]:
    yield functools.partial(torch.set_rng_state, torch.get_rng_state())
    yield functools.partial(random.setstate, random.getstate())
    yield functools.partial(np.random.set_state, np.random.get_state())  # noqa: NPY002
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    if torch.backends.mps.is_available():
        yield functools.partial(torch.mps.set_rng_state, torch.mps.get_rng_state())
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.GradientState._shared_state:
        state = accelerate.GradientState()
        yield functools.partial(
            lambda found: setattr(state, "dataloader_references", found), state.dataloader_references
        )


def _states_of(value: Any) -> Iterator[Callable[[], Any]]:
    """Yield what puts back the state of an object, where it has one that counts."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        generator: Any = value
        yield functools.partial(generator.set_state, generator.get_state())
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator
        yield functools.partial(lambda state: setattr(bits, "state", state), bits.state)
    elif isinstance(value, random.Random):
        yield functools.partial(value.setstate, value.getstate())
    elif isinstance(value, (torch.utils.data.DataLoader, torch.utils.data.Sampler)):
        own = vars(value)
        counters = {name: own[name] for name in _COUNTERS if isinstance(own.get(name), int)}
        yield lambda: own.update(counters)
        if own.get("persistent_workers") and (iterator := own.get("_iterator")) is not None:
            own["_iterator"] = None
            yield lambda: own.update(_iterator=iterator)


def _reachable(roots: tuple[Any, ...]) -> list[Any]:
    """Return the objects that loaders are made of, and generators that their classes hold."""
    found: list[Any] = []
    seen: set[int] = set()
    queue = deque(roots)
    while queue and len(found) < _MOST_OBJECTS:
        value = queue.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)
        if isinstance(value, dict):
            queue.extend(list(value.values()) if len(value) <= _LONGEST else [])
        elif isinstance(value, (list, tuple, set, frozenset)):
            queue.extend(value if len(value) <= _LONGEST else [])
        else:
            own = getattr(value, "__dict__", {})
            # The iterator of running workers has locks and queues, and no random numbers of this process.
            queue.extend(entry for name, entry in own.items() if name != "_iterator")
            # MONAI's transforms share one generator, until they are given their own.
            queue.extend(
                entry
                for kind in type(value).__mro__
                for entry in vars(kind).values()
                if isinstance(entry, (np.random.RandomState, np.random.Generator, random.Random))
            )
    return found
