"""Exact coefficients for the length of an evaluation, and the state of the training back behind it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdnorm.integration.batches import Forward, Keys
from mdnorm.integration.loader_state import unchanged_loaders
from mdnorm.integration.recalibrate import recalibrate
from mdnorm.integration.recalibration import Recalibration
from mdnorm.layer import MetadataNorm

if TYPE_CHECKING:
    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["recalibrated"]


def recalibrated(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    shrink: bool = True,
    forward: Forward | None = None,
    keys: Keys | None = None,
    progress: bool = True,
    process_group: ProcessGroupSetting = "auto",
) -> AbstractContextManager[Recalibration]:
    """Evaluate with the coefficients of a whole data set, in the midst of training.

    Inside the block every `MetadataNorm` has the coefficients that `mdnorm.recalibrate` gives it, and the
    model is in evaluation mode. Behind it everything is as it was before, bit for bit, also after an
    exception: training goes on as if nothing had been. So an accuracy by which an epoch is chosen, or
    training stopped, is that of the model as it will be used, without the lag and the noise of running
    coefficients.

    It costs what `recalibrate` costs: a forward pass over `loader`, or as many as there are layers of which
    each depends on the one before it.

    Parameters
    ----------
    model, loader, held_out, shrink, forward, keys, progress, process_group
        As of `mdnorm.recalibrate`.

    Returns
    -------
    context manager
        It gives the `Recalibration`, as ``with mdnorm.recalibrated(model, loader) as report:``. It can be
        entered many times, and recalibrates each time; blocks nest.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        When the block is entered, as `mdnorm.recalibrate`; the model is as it was before then, too.

    Notes
    -----
    - What comes back: parameters, buffers, sizes and attributes of the layers, the mode of every module,
      buffers that the passes over `loader` changed, the random numbers of torch, NumPy and Python, and those
      that the loader, its data set and transforms hold. What the block itself does to the rest of the model
      or to random numbers stays.
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
    options: dict[str, Any] = {"held_out": held_out, "shrink": shrink, "forward": forward, "keys": keys}
    return _Recalibrated(model, loader, options | {"progress": progress, "process_group": process_group})


class _Recalibrated(AbstractContextManager[Recalibration]):
    def __init__(self, model: nn.Module, loader: Iterable[Any], options: dict[str, Any]) -> None:
        self._model, self._loader, self._options = model, loader, options
        # One for each block that is open.
        self._open: list[ExitStack] = []

    def __enter__(self) -> Recalibration:
        model, loader = self._model, self._loader
        if not isinstance(model, nn.Module):
            # Says what is wrong.
            return recalibrate(model, loader, **self._options)
        with ExitStack() as stack:
            layers = [module for module in model.modules() if isinstance(module, MetadataNorm)]
            # Modes come back before the layers: a change of the mode may change coefficients.
            for layer in layers:
                stack.callback(_LayerState(layer).put_back)
            stack.callback(_put_modes_back, {module: module.training for module in model.modules()})
            with unchanged_loaders(loader, self._options["held_out"]), _Buffers(model, layers):
                report = recalibrate(model, loader, **self._options)
            model.eval()
            self._open.append(stack.pop_all())
        return report

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.pop().close()


def _put_modes_back(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


class _LayerState:
    """All that a `MetadataNorm` and the modules in it hold, to be put back in place."""

    def __init__(self, layer: MetadataNorm) -> None:
        self._attributes = [(module, dict(vars(module))) for module in layer.modules()]
        # By module the tensors and the modules that it has, since those of open sizes are made later.
        self._entries: list[tuple[Any, dict[str, Any]]] = [
            (entries, dict(entries))
            for module in layer.modules()
            for entries in (module._buffers, module._parameters, module._modules)
        ]
        tensors = [*layer.parameters(), *layer.buffers()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Make everything as it was; tensors that an optimiser or a compiled graph knows stay themselves."""
        for module, attributes in self._attributes:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for entries, before in self._entries:
            entries.clear()
            entries.update(before)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


class _Buffers:
    """Buffers of the rest of a model: put back at once, since the evaluation may have business with them."""

    def __init__(self, model: nn.Module, layers: list[MetadataNorm]) -> None:
        own = {id(buffer) for layer in layers for buffer in layer.buffers()}
        self._values: list[tuple[Tensor, Tensor]] = [
            (buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in own
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for buffer, value in self._values:
                # Not where nothing changed: a buffer may be part of a graph that is still needed.
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
