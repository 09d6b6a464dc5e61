"""A design inside a model: in its checkpoint, so that at inference raw metadata go in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdnorm.arrays import statistics_dtype
from mdnorm.design import Design

DESIGN_NAME = "metadata_design"
"""Of the child that `attach_design` gives a model."""


class AttachedDesign(nn.Module):
    """A module without parameters that holds a design as JSON in a buffer of bytes, or waits for one.

    A checkpoint has only tensors then (``torch.load(weights_only=True)``, safetensors). Bytes are left alone
    by ``.half()`` and ``.to(dtype)``, and loading takes those of the checkpoint whatever their number.
    """

    json: Tensor
    is_inserted: bool = False
    """Whether `mdnorm.insert` put it there, and `mdnorm.remove` takes it out with the last layer."""

    def __init__(self, design: Design | None = None) -> None:
        super().__init__()
        self._parsed: tuple[Tensor, int, Design] | None = None
        text = b"" if design is None else design.to_json().encode("ascii")
        # With a checksum: what averages the buffers of a model makes other bytes of these. As a bytearray,
        # since a tensor cannot share memory that is read-only.
        encoded = bytearray(b"%08x" % zlib.crc32(text) + text if text else b"")
        self.register_buffer(
            "json", torch.frombuffer(encoded, dtype=torch.uint8).clone() if encoded else torch.empty(0).byte()
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the input: in an `nn.Sequential` every module is called."""
        return features

    def design(self) -> Design:
        """Return the design; RuntimeError where there is none yet, ValueError where the bytes are none."""
        if self.json.is_meta or self.json.numel() == 0:
            raise RuntimeError(
                "the model has no design yet: load a checkpoint, or attach_design(model, design)."
            )
        encoded = bytes(self.json.cpu().tolist())
        if encoded[:8] != b"%08x" % zlib.crc32(encoded[8:]):
            raise ValueError(
                "the design in this model is damaged, probably because its buffers were averaged (EMA): "
                "average the parameters only, and call attach_design(model, design) again."
            )
        return Design.from_json(encoded[8:].decode("ascii"))

    def parsed(self) -> Design:
        """Return the design as `design` does, read only once: not to be changed."""
        parsed = self._parsed
        version = 0 if self.json.is_inference() else self.json._version
        # Read again where a checkpoint brought another one, in place or as another tensor.
        if parsed is None or parsed[0] is not self.json or parsed[1] != version:
            parsed = self._parsed = (self.json, version, self.design())
        return parsed[2]

    def columns_of_table(self, table: Any, *, with_labels: bool) -> tuple[Tensor, Tensor | None]:
        """Return the metadata columns of a table and, if wanted and there, its labels, on the device."""
        device = self.json.device
        matrices = self.parsed().transform(
            table, labels=None if with_labels else False, dtype=statistics_dtype(device)
        )
        labels = matrices.labels
        return matrices.metadata.to(device), None if labels is None else labels.to(device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parsed": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttachedDesign:
        # Moved only: `torch.nn.Module.to_empty` would make other bytes of it.
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.json.device)).device
        self.json = self.json.new_empty(0, device=device) if self.json.is_meta else self.json.to(device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(prefix + "json")
        if isinstance(loaded, Tensor) and loaded.dtype == torch.uint8 and loaded.ndim == 1:
            device = loaded.device if self.json.is_meta else self.json.device
            self.json = torch.empty_like(loaded, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the number of bytes."""
        return f"{self.json.numel()} bytes"


def attach_design(model: nn.Module, design: Design | None = None) -> None:
    """Put a fitted design into a model, so that the model's checkpoint has it.

    Parameters
    ----------
    model : Module
        Gets a submodule ``metadata_design``, without parameters; a design that it has already is replaced.
    design : Design, optional
        Leave it out in a new model, into which a checkpoint is loaded next: the design comes with it.

    Raises
    ------
    RuntimeError
        The design is not fitted.
    ValueError
        The model has something else of the name ``metadata_design``.
    """
    if present := _only_design(model):
        name, attached = present
        model.set_submodule(name, AttachedDesign(design).to(attached.json.device))
        return
    if hasattr(model, DESIGN_NAME):
        raise ValueError(f"the model has something else of the name {DESIGN_NAME!r}: rename it.")
    model.add_module(DESIGN_NAME, AttachedDesign(design).to(device_for_design(model)))


def device_for_design(model: nn.Module) -> torch.device:
    """Return the device of a model's first tensor with memory, the default one without any."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.get_default_device())


def design_of(model: nn.Module) -> Design:
    """Return the design that `attach_design` put into a model, or that came with its checkpoint.

    Parameters
    ----------
    model : Module
        The model itself, or one that contains it (``DistributedDataParallel``, ``torch.compile``).

    Raises
    ------
    RuntimeError
        The model has no design.
    ValueError
        It has several, or what it has is damaged.
    """
    attached = _only_design(model)
    if attached is None:
        raise RuntimeError(
            "the model has no design: attach_design(model, design) adds one before you save it, "
            "attach_design(model) prepares it for loading a checkpoint with one."
        )
    return attached[1].design()


def designs_in(model: nn.Module) -> dict[str, AttachedDesign]:
    """Return the designs that a model holds, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AttachedDesign)}


def _only_design(model: nn.Module) -> tuple[str, AttachedDesign] | None:
    attached = designs_in(model)
    if len(attached) > 1:
        raise ValueError(f"the model has {len(attached)} designs: give the part of it that you mean.")
    return next(iter(attached.items()), None)


def remove_designs(model: nn.Module, names: Iterable[str]) -> None:
    """Take designs out of a model."""
    for name in list(names):
        owner, _, own = name.rpartition(".")
        delattr(model.get_submodule(owner), own)
