"""The metadata of a batch for the layers deep inside a model, which no forward pass hands them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mdnorm.arrays import check_same_order, is_traced
from mdnorm.text import warn


class Given(NamedTuple):
    """What a context holds for the layers of a model."""

    metadata: Any
    labels: Any
    weights: Any = None
    mask: Any = None

    def mask_for(self, features: Tensor, dims: tuple[int, ...], layer: str) -> Any:
        """Return the mask where it belongs to the features (N, ...) of a layer, otherwise None.

        The mask is given for the model as a whole. It belongs to features with its positions, those of
        `dims`; those without positions (pooled ones), or with others (an image beside a text), have nothing
        to do with it. Where padding may count as data nevertheless, a warning names the layer.
        """
        given = tuple(np.shape(self.mask) if not hasattr(self.mask, "shape") else self.mask.shape)
        positions = tuple(features.shape[dim] for dim in dims)
        # With another number of samples it is wrong, which the layer says.
        if given[1:] == positions or given[:1] != tuple(features.shape[:1]):
            return self.mask
        if not torch.compiler.is_compiling():
            if len(given) - 1 == len(positions):
                warn(
                    f"{layer} has features with {_shown(positions)} positions and does not use the mask, "
                    f"which has {_shown(given[1:])}: padding counts as data there.",
                )
            elif not dims and given == tuple(features.shape[: len(given)]) and features.ndim > len(given):
                warn(
                    f"{layer} has coefficients of its own for each position and does not use the mask: "
                    "padding counts as data there. Build it with granularity='channel'.",
                )
        return None


def _shown(lengths: tuple[int, ...]) -> str:
    return " × ".join(map(str, lengths)) or "no"


def is_table(values: object) -> bool:
    """Whether this is a table with named columns: a mapping, a DataFrame or a table of any library."""
    if isinstance(values, Tensor):
        return False
    return isinstance(values, Mapping) or any(
        hasattr(type(values), name) for name in ("columns", "column_names")
    )


_tables = threading.local()


@contextmanager
def labels_of_tables() -> Iterator[None]:
    """Take the labels of tables in evaluation, too: `mdnorm.recalibrate` fits with them."""
    before = getattr(_tables, "with_labels", False)
    _tables.with_labels = True
    try:
        yield
    finally:
        _tables.with_labels = before


def columns_by_design(
    model: nn.Module, metadata: Any, labels: Any = None, *, with_labels: bool = True
) -> tuple[Any, Any]:
    """Return metadata and labels: those of a table as the design in the model turns it into columns.

    What is no table is returned as it is, and so are labels that are given. Labels are taken from the table,
    where it has them, with `with_labels`. A mapping without a design in the model is a TypeError, several
    designs are a ValueError.
    """
    if not is_table(metadata):
        return metadata, labels
    # The module that holds a design is built upon this one.
    designs: list[Any] = [module for module in model.modules() if hasattr(module, "columns_of_table")]
    if not designs:
        if isinstance(metadata, Mapping):
            raise TypeError(
                f"metadata is a {type(metadata).__name__} of columns, but {type(model).__name__} has no "
                "design that turns them into numbers: mdnorm.attach_design(model, design) puts one there."
            )
        return metadata, labels
    if len(designs) > 1:
        raise ValueError(
            f"the model has {len(designs)} designs: give the table to the part of the model that you mean."
        )
    wanted = labels is None and (with_labels or getattr(_tables, "with_labels", False))
    columns, own_labels = designs[0].columns_of_table(metadata, with_labels=wanted)
    return columns, labels if own_labels is None else own_labels


class MetadataSlot:
    """Where a layer finds the metadata of the batch: what this thread put there.

    A thread sees only its own, so that a model can serve several of them. The backward pass on a GPU runs in
    threads of torch, which put nothing there: where it repeats a part of the forward pass, they take what is
    there, or was last.

    A copy, or one from a file, is empty.
    """

    def __init__(self) -> None:
        # Plain attributes: torch.compile follows these into graph inputs.
        self.local = threading.local()
        self._lock = threading.Lock()
        self._open: list[Given] = []
        self._last: Given | None = None
        # Whether the layer was seen to know its units: to ask again at each batch would wait for a GPU.
        self.is_layer_known = False

    def __reduce__(self) -> tuple[type[MetadataSlot], tuple[()]]:
        return MetadataSlot, ()

    def get(self) -> Given | None:
        """Return what is given now, or None."""
        given: Given | None = getattr(self.local, "given", None)
        if given is not None or torch.compiler.is_compiling():
            return given
        # Only where activation checkpointing repeats a forward pass in the backward pass: no public name says
        # so, and torch.utils.checkpoint itself asks in this way.
        if torch._C._current_graph_task_id() == -1:
            return None
        if len(self._open) > 1:
            raise RuntimeError(
                f"{len(self._open)} threads have given metadata to this layer, and its forward pass is "
                "repeated in a thread that gave none: train in one thread at a time."
            )
        return self._open[0] if self._open else self._last

    def enter(self, given: Given) -> Given | None:
        """Put metadata there; return what was there before, for `leave`."""
        before: Given | None = getattr(self.local, "given", None)
        self.local.given = given
        if not torch.compiler.is_compiling():
            with self._lock:
                self._open = [*(other for other in self._open if other is not before), given]
        return before

    def leave(self, given: Given, before: Given | None) -> None:
        """Put back what was there before."""
        self.local.given = before
        if not torch.compiler.is_compiling():
            with self._lock:
                self._last = given
                rest = [other for other in self._open if other is not given]
                self._open = rest if before is None else [*rest, before]


def check_module(model: object) -> None:
    """Raise TypeError where a model is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")


def slots_of(model: nn.Module) -> list[tuple[nn.Module, MetadataSlot]]:
    """Return the layers of a model that take metadata from a context, with their slots."""
    slots = ((module, getattr(module, "metadata_slot", None)) for module in model.modules())
    return [(module, slot) for module, slot in slots if isinstance(slot, MetadataSlot)]


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return the `MetadataNorm` layers of a model by name; raise ValueError where there are none."""
    # Told by their slot: their module is built upon this one.
    slots = ((name, module, getattr(module, "metadata_slot", None)) for name, module in model.named_modules())
    layers = {name: module for name, module, slot in slots if isinstance(slot, MetadataSlot)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MetadataNorm layer: mdnorm.insert puts them there.")
    return layers


def _warn_of_idle(layers: list[tuple[nn.Module, MetadataSlot]]) -> None:
    """Warn where a model seems to be trained while a layer of it, in evaluation mode, does nothing."""
    for layer, slot in layers:
        if layer.training or slot.is_layer_known:
            continue
        parts: Any = getattr(layer, "parts", ())
        slot.is_layer_known = any(bool(part.is_standardised) for part in parts)
        if not slot.is_layer_known:
            name = getattr(layer, "inserted_after", None)
            where = "of the model" if name is None else f"after {name!r}"
            warn(
                f"the MetadataNorm {where} is in evaluation mode and has seen no data: it does nothing, and "
                "learns nothing. Call model.train() before training; if a part of the model must stay in "
                "evaluation mode, call train() on the layer in it. To evaluate, use torch.no_grad()."
            )


@contextmanager
def metadata(
    model: nn.Module,
    metadata: Tensor | ArrayLike | Any,
    labels: Tensor | ArrayLike | None = None,
    weights: Tensor | ArrayLike | None = None,
    mask: Tensor | ArrayLike | None = None,
) -> Iterator[None]:
    """Give the metadata of a batch to every `MetadataNorm` in a model, for the length of a ``with`` block.

    They reach the layers that get no metadata in the forward pass itself: those that `mdnorm.insert` put
    there, and your own if called as ``norm(features)``.

    Parameters
    ----------
    model : nn.Module
        The model itself, or one that contains it (``DistributedDataParallel``, ``torch.compile``).
    metadata : (N,) or (N, K_m), or a table
        One row per sample: a tensor on the features' device, or an array. Where the model has a design
        (`mdnorm.insert` with ``design=``, `mdnorm.attach_design`), a table (a dict, a DataFrame of pandas or
        polars, …) is turned into columns by it.
    labels : (N,) or (N, K_y), optional
        For the layers that have label columns, in training. The others do not get them. By default those of
        the table, where it has them.
    weights : (N,), optional
        Of the samples in the fit, in training; see `MetadataNorm.forward`.
    mask : (N, positions) bool, optional
        Positions that count, for the model as a whole (an attention mask). The layers whose features have
        these positions use it. Behind a pooling there are none; a layer with another number of them, or with
        coefficients of its own for each (``granularity="element"``), does not use it either, and warns.

    Raises
    ------
    ValueError
        The model has no `MetadataNorm`, or labels are given in training and no layer has label columns.
    TypeError
        `model` is not a module, or `metadata` is None, or a dict and the model has no design.

    Notes
    -----
    - Blocks nest, and each model has its own. What one thread gives, it alone sees: with `nn.DataParallel`
      use `mdnorm.WithMetadata`.
    - Activation checkpointing runs layers again in the backward pass. Outside of the block they then see the
      metadata of the last block. Where several forward passes come first, have the backward pass inside it.
    - `torch.compile` takes tensors (not arrays) as inputs of the graph: new metadata do not compile anew.

    Examples
    --------
    >>> import mdnorm
    >>> model = nn.Sequential(nn.Linear(8, 4), mdnorm.MetadataNorm(4, num_metadata=1), nn.Linear(4, 1))
    >>> images, age = torch.randn(20, 8), torch.rand(20)
    >>> with mdnorm.metadata(model, age):
    ...     logits = model(images)
    >>> logits.shape
    torch.Size([20, 1])
    """
    check_module(model)
    if metadata is None:
        raise TypeError("metadata must be a tensor or an array with one row per sample, got None.")
    layers = slots_of(model)
    if not layers:
        layers_of(model)  # Says that there are none.
    is_training = any(layer.training for layer, _ in layers)
    if (labels is not None or model.training) and torch.is_grad_enabled() and not is_traced():
        _warn_of_idle(layers)
    if not is_traced():
        check_same_order(metadata=metadata, labels=labels, weights=weights)
    metadata, labels = columns_by_design(model, metadata, labels, with_labels=is_training)
    if labels is not None and is_training and all(layer.num_labels == 0 for layer, _ in layers):
        raise ValueError(
            "labels were given but every MetadataNorm of the model has num_labels=0: build them with the "
            "number of label columns to protect the labels, or leave the labels out."
        )
    given = Given(metadata, labels, weights, mask)
    entered: list[tuple[MetadataSlot, Given | None]] = []
    try:
        for _, slot in layers:
            entered.append((slot, slot.enter(given)))
        yield
    finally:
        for slot, before in reversed(entered):
            slot.leave(given, before)
