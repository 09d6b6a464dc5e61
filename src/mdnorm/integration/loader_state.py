"""Go through a loader in between without a trace: random numbers, epochs and workers stay as they were."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
