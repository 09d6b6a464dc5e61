"""A model with its layers and its design in one file, and back into the plain model."""

from __future__ import annotations

import json
import math
import numbers
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mdnorm.arrays import plain_tensor
from mdnorm.context import check_module
from mdnorm.design import Design
from mdnorm.estimators import ESTIMATORS
from mdnorm.extras import requires
from mdnorm.files import atomic_path
from mdnorm.integration.applied import inserted
from mdnorm.integration.design import AttachedDesign, designs_in, device_for_design, remove_designs
from mdnorm.integration.insert import put_behind, remove, without_layer
from mdnorm.integration.places import refuse_wrapped, targets
from mdnorm.integration.wrapper import WithMetadata
from mdnorm.layer import MetadataNorm
from mdnorm.text import listed

_FORMAT = "mdnorm.model"
_VERSION = 1

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model with the layers that `mdnorm.insert` put into it, and its design, as one file.

    Parameters
    ----------
    model : nn.Module
        The model, also inside of `mdnorm.WithMetadata`, `DistributedDataParallel` or ``torch.compile``.
    path : str or Path
        A safetensors file; its folder must exist. It is complete or not there, also after a crash.

    Raises
    ------
    TypeError
        The state has something that is no tensor, or a part of one (a sharded model).
    ValueError
        A layer has an option that no file can hold: a function as `output`, a class as `estimator`.

    Notes
    -----
    - The file has the ``state_dict`` as its tensors, so that other programs read the weights as well. Its
      header has, as JSON, behind which modules the layers are, with which options, and the design.
    - The plain model itself, its class and its sizes, is not in the file: `load` takes it.
    """
    model = _inside(model)
    with requires("tables"):
        from safetensors.torch import save_file
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}.")
    designs = designs_in(model)
    layers = []
    for row, layer in inserted(model):
        settings = layer.insertion.settings  # type: ignore[attr-defined]
        options = {
            key: _as_json(row.name, key, value)
            for key, value in settings.items()
            # Where the layers are is asked of the model that they go into.
            if value is not None and key != "device"
        }
        layers.append({"after": row.name, "options": options})
    tensors, same_as = _tensors(model, {f"{name}.json" for name in designs})
    state = {
        "format": _FORMAT,
        "version": _VERSION,
        "layers": layers,
        "designs": {
            name: {"design": json.loads(module.design().to_json()) if module.json.numel() else None}
            | {"is_inserted": module.is_inserted}
            for name, module in designs.items()
        },
        "same_as": same_as,
    }
    text = json.dumps(state, allow_nan=False)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"mdnorm": text, "crc32": _checksum(text, tensors)})


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Put into a plain model what `save` wrote: the layers, the design, and all weights.

    Parameters
    ----------
    model : nn.Module
        As it was before `mdnorm.insert`: the same modules with the same sizes, with any weights. Changed in
        place; its mode, device and dtype stay. `mdnorm.WithMetadata` may be around it.
    path : str or Path

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is damaged, was not written by `save`, or is of another model. The message names it, and the
        model is as it was. Nothing in the file is run or unpickled, whoever wrote it.
    """
    plain = model.model if isinstance(model, WithMetadata) else model
    refuse_wrapped(plain)
    path = Path(path)
    state, tensors = _read(path)
    layers_before = {row.name for row, _ in inserted(plain)}
    designs_before = designs_in(plain).keys()
    try:
        tensors |= {name: tensors[other] for name, other in state["same_as"].items()}
        if any(tensor.is_meta for tensor in (*plain.parameters(), *plain.buffers())):
            raise ValueError("the model has no memory (device meta): model.to_empty(device=…) first")
        for layer in state["layers"]:
            settings = {"output": None, "sample_dim": 0, "num_metadata": None, "num_labels": None}
            settings |= {key: _from_json(value) for key, value in layer["options"].items()}
            put_behind(plain, without_layer(plain, targets(plain, layer["after"]), settings), settings)
        for name, entry in state["designs"].items():
            _attach(plain, name, entry)
            tensors[f"{name}.json"] = designs_in(plain)[name].json
        _check_weights(plain, tensors)
        plain.load_state_dict(tensors, strict=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        added = [row.name for row, _ in inserted(plain) if row.name not in layers_before]
        if added:
            remove(plain, added)
        remove_designs(plain, designs_in(plain).keys() - designs_before)
        raise ValueError(f"{path} does not fit the {type(plain).__name__}: {error}") from error
    return model


def _check_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the file has other weights than the model, before any of them is loaded."""
    # A layer may get its sizes from the file.
    parts = model.named_modules(remove_duplicate=False)
    ours = tuple(
        f"{name}.".lstrip(".") for name, part in parts if isinstance(part, (MetadataNorm, AttachedDesign))
    )
    own, given = (
        {name: tensor for name, tensor in each.items() if not name.startswith(ours)}
        for each in (model.state_dict(), tensors)
    )
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    faults = [f"it has no {listed(missing)}"] if missing else []
    faults += [f"the model has no {listed(unknown)}"] if unknown else []
    faults += [
        f"{name} is {tuple(given[name].shape)} and not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        # What takes its size from the first batch has none yet.
        if not nn.parameter.is_lazy(own[name]) and given[name].shape != own[name].shape
    ]
    if faults:
        raise ValueError("; ".join(faults[:6]) + ". Build the model as the one that was saved")


def _inside(model: nn.Module) -> nn.Module:
    """Return a model without what is around it."""
    check_module(model)
    while True:
        if isinstance(model, WithMetadata):
            model = model.model
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _tensors(model: nn.Module, left_out: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state by name, and for tensors with several names (tied weights) that of the one."""
    tensors: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if name in left_out:
            continue
        is_dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not is_dense or hasattr(value, "full_tensor"):
            raise TypeError(
                f"the state has {name!r}, a {type(value).__name__} and not a dense tensor: gather it first."
            )
        value = plain_tensor(value.detach())
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and key in names:
            same_as[name] = names[key]
            continue
        names[key] = name
        tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, same_as


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the header and all values, which safetensors itself does not have."""
    number = zlib.crc32(text.encode())
    for name in sorted(tensors):
        number = zlib.crc32(name.encode(), number)
        number = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, number)
    return f"{number:08x}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file, checked for damage."""
    with requires("tables"):
        from safetensors import SafetensorError, safe_open
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged or truncated: {error}.") from error
    text = header.get("mdnorm", "")
    try:
        state = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error}).") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by mdnorm.save: load it by safetensors.torch.load_file.")
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {state.get('version')!r}, this mdnorm reads {_VERSION}: update mdnorm."
        )
    if header.get("crc32") != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged: it has not the values that mdnorm.save wrote.")
    return state, tensors


def _attach(model: nn.Module, name: str, entry: Mapping[str, Any]) -> None:
    owner, _, own = name.rpartition(".")
    design = None if entry["design"] is None else Design.from_json(json.dumps(entry["design"]))
    attached = AttachedDesign(design)
    attached.is_inserted = bool(entry["is_inserted"])
    place = model.get_submodule(owner)
    if not isinstance(getattr(place, own, attached), AttachedDesign):
        raise ValueError(f"it has a design as {name!r}, where the model has something else")
    place.add_module(own, attached.to(device_for_design(model)))


def _as_json(after: str, key: str, value: Any) -> Any:
    if key == "process_group" and not isinstance(value, str):
        return "auto"  # A group means nothing in another process.
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_as_json(after, key, entry) for entry in value]
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    for name, preset in ESTIMATORS.items():
        if preset is value:
            return name
    raise ValueError(
        f"the layer after {after!r} has {key}={value!r}, which no file can hold: give insert a name, a key "
        "or an index, or save the state_dict and insert the layers again before it is loaded."
    )


def _from_json(value: Any) -> Any:
    """Return an option as `insert` takes it."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dtype":
        dtype = getattr(torch, str(content), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"it has an unknown dtype {content!r}")
        return dtype
    if kind == "float":
        return float(content)
    raise ValueError(f"it has an option of an unknown kind {kind!r}")
