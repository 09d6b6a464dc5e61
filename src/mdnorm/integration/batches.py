"""What the batches of a loader are made of, and how a model is run on one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mdnorm import context
from mdnorm.arrays import as_real_tensor, statistics_dtype
from mdnorm.integration.applied import call_on
from mdnorm.integration.dependence import Selector, described, select
from mdnorm.integration.design import designs_in
from mdnorm.integration.wrapper import WithMetadata
from mdnorm.text import listed

Forward = Callable[[nn.Module, Any], Any]
Keys = Mapping[str, Selector | list[Selector] | None]

_GIVEN = ("metadata", "labels", "weights", "mask")
_NAMES = ("inputs", *_GIVEN)
_BATCH = "the batch"


def checked_keys(keys: Keys | None) -> dict[str, Any] | None:
    """Return keys without those that are None; raise where they are no mapping, or have an unknown name."""
    if keys is None:
        return None
    if not isinstance(keys, Mapping):
        raise TypeError(
            f"keys must be a dict as {{'inputs': 0, 'metadata': ['age', 'site']}}, got {described(keys)}."
        )
    unknown = [name for name in keys if name not in _NAMES]
    if unknown:
        raise ValueError(f"keys has {unknown[0]!r}, but its names are {', '.join(map(repr, _NAMES))}.")
    return {name: key for name, key in keys.items() if key is not None}


def runner(forward: Forward | None, keys: Keys | None) -> Forward:
    """Return what runs a model on a batch: the function of the user, or the one that looks for keys."""
    if forward is not None and keys is not None:
        raise ValueError("keys and forward both say how to run the model: give one of them.")
    return forward or functools.partial(run_on, keys=checked_keys(keys))


def run_on(model: nn.Module, batch: Any, *, keys: Mapping[str, Any] | None = None) -> Any:
    """Run a model on a batch, on its device; its layers get the metadata where it has any.

    `keys` are what `checked_keys` returned.
    """
    batch = on_device_of(model, batch)
    wraps = any(isinstance(module, WithMetadata) for module in model.modules())
    is_inserted = any(getattr(module, "inserted_after", None) is not None for module in model.modules())
    is_whole = keys is None and not (wraps or is_inserted or _has_image(model, batch))
    if is_whole and _takes_batch(model, batch):
        return call_on(model, batch)
    inputs, keywords, given = parts_of(model, batch, keys, bool(context.slots_of(model)))
    if wraps:
        return model(*inputs, **given, **keywords)
    parameters = _signature(model).parameters
    if not is_inserted and "metadata" in parameters:
        # A forward of one's own that hands the metadata on.
        columns = context.columns_by_design(model, given.get("metadata"), given.get("labels"))
        given |= dict(zip(("metadata", "labels"), columns, strict=True))
        handed = {name: value for name, value in given.items() if name in parameters}
        return model(*inputs, **handed, **keywords)
    if not context.slots_of(model):
        return model(*inputs, **keywords)
    with context.metadata(model, **given):
        return model(*inputs, **keywords)


def parts_of(
    model: nn.Module, batch: Any, keys: Mapping[str, Any] | None, has_metadata: bool
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return what a model is called with, positional and by name, and "metadata" and more for its layers.

    `keys` are what `checked_keys` returned; None: the usual ones. Without `has_metadata` there are none for
    layers. Raises KeyError or IndexError where a key or index is not in the batch, and what `metadata_at`
    raises.
    """
    keys = _usual_keys(model, batch, has_metadata) if keys is None else keys
    wanted = keys.get("inputs", ("image" if "image" in batch else None) if isinstance(batch, Mapping) else 0)
    inputs, keywords = (), {}
    if wanted is None:
        lists = (key if isinstance(key, (list, tuple)) else [key] for key in keys.values())
        named = {key for part in lists for key in part if not callable(key)}
        keywords = {name: value for name, value in batch.items() if name not in named}
        if unknown := _not_taken(model.model if isinstance(model, WithMetadata) else model, keywords):
            raise TypeError(
                f"the batch has {listed(unknown)}, which the forward of the model does not take: give keys= "
                "to say where the parts are that it needs."
            )
    else:
        several = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        inputs = tuple(select(batch, key, _BATCH) for key in several)
    if not has_metadata:
        return inputs, keywords, {}
    metadata, labels = metadata_at(model, batch, keys.get("metadata"), keys.get("labels"))
    given = {"metadata": metadata} | ({} if labels is None else {"labels": labels})
    given |= {key: select(batch, keys[key], _BATCH) for key in ("weights", "mask") if key in keys}
    return inputs, keywords, given


def _has_image(model: nn.Module, batch: Any) -> bool:
    """Whether a batch is a dictionary of MONAI's that the model does not take as it is."""
    if not isinstance(batch, Mapping) or "image" not in batch:
        return False
    return bool(_not_taken(model.model if isinstance(model, WithMetadata) else model, ["image"]))


def _usual_keys(model: nn.Module, batch: Any, has_metadata: bool) -> dict[str, Any]:
    """Return the keys of (input, metadata), (input, metadata, labels), and of a mapping with usual names."""
    if isinstance(batch, Mapping):
        if _has_image(model, batch):
            label = next((name for name in ("labels", "label") if name in batch), None)
            keys = {name: name for name in ("metadata", "weights", "mask") if name in batch}
            return keys | {"inputs": "image"} | ({} if label is None else {"labels": label})
        # What the forward of the model itself takes is its own.
        wraps = any(isinstance(module, WithMetadata) for module in model.modules())
        own = set() if wraps else _signature(model).parameters.keys() & {"weights", "mask"}
        if batch.get("metadata") is not None or not has_metadata:
            return {name: name for name in _GIVEN if name in batch and name not in own} | {"inputs": None}
    elif not has_metadata:
        return {"inputs": 0 if isinstance(batch, (tuple, list)) else lambda batch: batch}
    elif isinstance(batch, (tuple, list)) and 2 <= len(batch) <= 3:
        return dict(zip(("inputs", "metadata", "labels"), range(len(batch)), strict=False))
    missing = ", without 'metadata'" if isinstance(batch, Mapping) and "metadata" not in batch else ""
    raise ValueError(
        f"a batch is {described(batch)}{missing}, but must be (input, metadata), (input, metadata, labels) "
        "or a dict with the key 'metadata': give keys= to say where its parts are."
    )


def metadata_at(
    model: nn.Module, batch: Any, metadata: Any, labels: Selector | list[Selector] | None = None
) -> tuple[Any, Any]:
    """Return metadata and labels of a batch: columns, or a table where the model has a design.

    Without `metadata` they are the columns of the design. Where `labels` are the names of all labels of the
    design, they are columns of the table, of any kind.
    """
    attached = list(designs_in(model).values())
    design = attached[0].parsed() if len(attached) == 1 else None
    columns: list[str] = [] if design is None else design.variables(labels=False)
    if metadata is None:
        if design is None:
            raise ValueError(
                "nothing says where the metadata are: give keys={'metadata': …}, or attach a design."
            )
        metadata = columns
    if not isinstance(metadata, (list, tuple)):
        found = select(batch, metadata, _BATCH)
        # A table has its own labels, unless others are named.
        if not context.is_table(found):
            is_column = metadata in columns
            found = {metadata: found} if is_column else _columns_on(model, batch, metadata)
    elif not attached:
        found = _columns_on(model, batch, metadata)
    else:
        found = {str(key): select(batch, key, _BATCH) for key in metadata}
        own = [] if design is None else [name for name in design.variables() if name not in columns]
        if labels is None:
            are_columns = isinstance(batch, Mapping) and all(name in batch for name in own)
        else:
            named = labels if isinstance(labels, (list, tuple)) else [labels]
            are_columns = bool(own) and set(named) == set(own)
        if are_columns:
            return found | {name: select(batch, name, _BATCH) for name in own}, None
    if isinstance(labels, (list, tuple)):
        return found, _columns_on(model, batch, labels)
    return found, None if labels is None else select(batch, labels, _BATCH)


def _columns_on(model: nn.Module, batch: Any, selector: Any) -> Any:
    metadata = columns_at(batch, selector)
    return _moved(metadata, _device_of(model) or getattr(model, "device", None) or metadata.device)


def columns_at(batch: Any, selector: Selector | list[Selector]) -> Tensor:
    """Return the metadata columns of a batch: (n,) or (n, K) at one selector, (n, K) float64 of a list."""
    if not isinstance(selector, (list, tuple)):
        metadata = as_real_tensor(select(batch, selector, _BATCH), "metadata")
        if metadata.ndim == 0:
            raise ValueError("metadata must have one row per sample, got a single number.")
        return metadata
    columns = []
    for part in selector:
        column = as_real_tensor(select(batch, part, _BATCH), f"metadata {part!r}")
        if column.ndim not in (1, 2) or column.shape[1:].numel() != 1:
            raise ValueError(
                f"metadata {part!r} must be one column, (n,) or (n, 1), got {tuple(column.shape)}: give a "
                "function of the batch that concatenates the columns."
            )
        # Columns of a batch may be tensors and lists, of different types.
        columns.append(column.flatten().cpu().double())
    lengths = {str(part): len(column) for part, column in zip(selector, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the metadata differ in their number of rows: {lengths}.")
    return torch.stack(columns, dim=1)


def _device_of(model: nn.Module) -> torch.device | None:
    """Return the device that all of a model is on; None where it is on several, or has no tensors."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside the block, and all its modules in their own mode behind it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """Return a batch with its tensors on the device of the model; itself where they are there already."""
    device = _device_of(model)
    return batch if device is None or device.type == "meta" else _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        is_double = value.dtype == torch.float64
        return value.to(device, statistics_dtype(device) if is_double else value.dtype)
    if isinstance(value, Mapping):
        moved = {key: _moved(entry, device) for key, entry in value.items()}
        return moved if any(moved[key] is not entry for key, entry in value.items()) else value
    if type(value) in (tuple, list):
        entries = [_moved(entry, device) for entry in value]
        changed = any(new is not entry for new, entry in zip(entries, value, strict=True))
        return type(value)(entries) if changed else value
    return value


def _signature(model: nn.Module) -> inspect.Signature:
    # What torch.compile returns has a forward of any arguments.
    return inspect.signature(getattr(model, "_orig_mod", model).forward)


def _not_taken(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return which of the names are no arguments of the forward of a model."""
    parameters = _signature(model).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return [] if takes_any else [name for name in names if name not in parameters]


def _takes_batch(model: nn.Module, batch: Any) -> bool:
    """Whether the forward pass takes a whole batch, metadata and labels included."""
    signature = _signature(model)
    if "metadata" in signature.parameters:
        return True
    if not context.slots_of(model):
        # Further arguments are no metadata then, and what comes behind the input is for others.
        return False
    if isinstance(batch, Mapping):
        return not _not_taken(model, batch)
    try:
        signature.bind(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    except TypeError:
        return False
    return True
