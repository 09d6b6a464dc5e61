"""What `mdnorm.insert` puts behind a module: a layer, its hook, and a look at the first forward pass."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mdnorm.integration import places
from mdnorm.integration.dependence import Selector, described, select
from mdnorm.integration.places import LAYER_NAME
from mdnorm.layer import MetadataNorm
from mdnorm.text import warn


@dataclasses.dataclass(frozen=True)
class Insertion:
    """One inserted layer.

    Attributes
    ----------
    name : str
        Of the module behind which the layer is; "" for the model itself.
    other_names : tuple of str
        Further names of the same module, where several places of the model share it. All their calls go
        through the one layer.
    type : str
        Class of the module.
    layer : str
        Name of the layer in ``model.named_modules()``.
    output_shape : tuple of int, or None
        What the layer was given last: its input is the module's output, or the part of it that `output`
        selects. None before the first batch.
    num_features : tuple of int, or None
        Shape of the coefficients of one metadata column; None while unknown.
    """

    name: str
    other_names: tuple[str, ...]
    type: str
    layer: str
    output_shape: tuple[int, ...] | None
    num_features: tuple[int, ...] | None

    @property
    def num_values(self) -> int | None:
        """Values of a sample that the layer corrects; None before the first batch."""
        return None if self.output_shape is None else torch.Size(self.output_shape[1:]).numel()

    @property
    def num_coefficients(self) -> int | None:
        """Coefficients of one metadata column; None while unknown."""
        return None if self.num_features is None else torch.Size(self.num_features).numel()


class Application:
    """Applies the layer of a module to its output; a forward hook that can be copied and pickled.

    It finds the layer through the module it is called with: in a replica of `nn.DataParallel` that is the
    replica's.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.output: Selector | None = settings["output"]
        self.sample_dim: int = settings["sample_dim"]
        self.shape: tuple[int, ...] | None = None
        self.handles: list[Any] = []

    def attach(self, module: nn.Module, layer: MetadataNorm) -> None:
        """Put a layer behind a module."""
        module.add_module(LAYER_NAME, layer)
        # The handles are pickled along: they tell a new process which ids of hooks are taken.
        if places.calls_its_children(module):
            self.handles.append(layer.register_forward_pre_hook(self._note))
        else:
            self.handles.append(module.register_forward_hook(self))
        register: Any = layer.register_load_state_dict_pre_hook
        self.handles.append(register(_accept_earlier_checkpoints))
        layer.insertion = self

    def detach(self, module: nn.Module) -> None:
        """Take the layer out again."""
        for handle in self.handles:
            handle.remove()
        delattr(module, LAYER_NAME)

    def _note(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """An `nn.Sequential` hands its output over by itself."""
        if not isinstance(arguments[0], Tensor):
            name = getattr(layer, "inserted_after", "")
            raise TypeError(
                f"the output of {name!r} is {described(arguments[0])}: insert after its last module."
            )
        if not torch.compiler.is_compiling():
            self.shape = _shape(arguments[0])

    def __call__(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        """Return the output of the module, corrected."""
        layer = module._modules[LAYER_NAME]
        assert layer is not None
        name: str = layer.inserted_after  # type: ignore[assignment]
        features = find_features(output, self.output, name)
        features = samples_first(features, self.sample_dim, name) if self.sample_dim else features
        if not torch.compiler.is_compiling():
            self.shape = _shape(features)
        try:
            corrected = layer(features)
        except ValueError as error:
            raise ValueError(f"after {name!r}: {error}") from error
        if self.sample_dim:
            corrected = corrected.movedim(0, self.sample_dim)
        return replaced(output, self.output, corrected, name)


def _shape(features: Tensor) -> tuple[int, ...] | None:
    """Return the shape of features; sequences of several lengths (a nested tensor) have none."""
    return None if features.is_nested else tuple(features.shape)


def _accept_earlier_checkpoints(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint from before the insertion has nothing of the layer, which then stays as it is."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(layer.state_dict(prefix=prefix))


def find_features(output: Any, selector: Selector | None, name: str) -> Tensor:
    """Return the tensor of a module's output that `selector` names, by default the first."""
    found = output
    if selector is not None:
        found = select(output, selector, f"the output of {name!r}")
    elif not isinstance(output, Tensor):
        # No next(…, None): torch.compile cannot trace it before torch 2.8.
        tensors = [value for _, value in _entries(output) if isinstance(value, (Tensor, PackedSequence))]
        found = tensors[0] if tensors else None
    if isinstance(found, Tensor) and not isinstance(found, PackedSequence):
        return found
    if isinstance(found, PackedSequence):
        raise TypeError(
            f"the output of {name!r} is a PackedSequence, without a row per sample: insert after a later one."
        )
    raise TypeError(
        f"the output of {name!r} is {described(output)}: no tensor to correct. Give output= a key, an index "
        "or a function that returns one."
        if selector is None
        else f"output= selects {described(found)} from the output of {name!r}, not a tensor."
    )


def samples_first(features: Tensor, sample_dim: int, name: str) -> Tensor:
    """Return a module's output with the dimension of the samples as the first."""
    if not -features.ndim <= sample_dim < features.ndim:
        raise ValueError(
            f"sample_dim={sample_dim}, but the output of {name!r} has shape {tuple(features.shape)}."
        )
    return features.movedim(sample_dim, 0)


def _entries(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, (Tensor, PackedSequence)):
        return [(None, output)]
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    return list(vars(output).items()) if hasattr(output, "__dict__") else []


def replaced(output: Any, selector: Selector | None, corrected: Tensor, name: str) -> Any:
    """Return a copy of the output with another tensor in the place of the selected one."""
    if isinstance(output, Tensor):
        return corrected
    found = find_features(output, selector, name)
    entries = _entries(output)
    new = {key: corrected for key, value in entries if value is found}
    if not new:
        raise TypeError(
            f"output= must return an entry of the output of {name!r} ({described(output)}), not a new tensor."
        )
    if isinstance(output, tuple):
        values = [new.get(key, value) for key, value in entries]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **new)
    changed = copy.copy(output)
    for key in new:
        if isinstance(output, (Mapping, list)):
            changed[key] = corrected
        else:
            setattr(changed, key, corrected)
    return changed


def call_on(model: nn.Module, example: Any) -> Any:
    """Return the model's output for an input; a dict or a tuple is given as several arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def is_in(features: Tensor, output: Any) -> bool:
    """Whether a tensor, or a view of it, is (a part of) an output."""
    own = features if features._base is None else features._base
    return any(
        isinstance(tensor, Tensor) and (tensor is features or tensor is own or tensor._base is own)
        for _, tensor in _entries(output)
    )


def warn_of_output(model: nn.Module, name: str) -> None:
    """Warn that the output of a module is that of the model."""
    warn(
        f"the output of {name!r} is that of the {type(model).__name__}: logits would be corrected, and lose "
        "what the metadata rightly say about the label. Insert after the last hidden layer; or after '' if "
        "the model is an encoder, whose output is features. If the model returns these features alongside "
        "its logits, ignore this warning."
    )


class FirstPass:
    """Looks at the first forward pass of a model for layers that do not run, or correct what it puts out."""

    def __init__(self, model: nn.Module) -> None:
        self.unwatch(model)
        self.handles = [model.register_forward_pre_hook(self.begin), model.register_forward_hook(self.end)]
        self.of_layers: list[Any] = []
        self.outputs: dict[str, list[Tensor]] = {}

    @staticmethod
    def unwatch(model: nn.Module) -> bool:
        """Take the hooks away; say whether there were some."""
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
        found = [watching for watching in hooks if isinstance(watching, FirstPass)]
        for watching in found:
            for handle in (*watching.handles, *watching.of_layers):
                handle.remove()
        return bool(found)

    def begin(self, model: nn.Module, _: tuple[Any, ...]) -> None:
        """Note from now on what the layers put out."""
        if torch.compiler.is_compiling():
            return
        for handle in self.of_layers:
            handle.remove()
        self.outputs = {row.name: [] for row, _ in inserted(model)}
        self.of_layers = [
            layer.register_forward_hook(functools.partial(self.note, row.name))
            for row, layer in inserted(model)
        ]

    def note(self, name: str, *call: Any) -> None:
        """Note the output of a layer."""
        self.outputs[name].append(call[-1])

    def end(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        """Warn of what was found, and go."""
        if torch.compiler.is_compiling():
            return
        self.unwatch(model)
        for name, outputs in self.outputs.items():
            if not outputs:
                warn(
                    f"{name!r} did not run in the first forward pass of the {type(model).__name__}: if only "
                    "its weights are used, or its forward is called directly, nothing is corrected there."
                )
            if name and any(is_in(features, output) for features in outputs):
                warn_of_output(model, name)


def layer_of(module: nn.Module) -> tuple[MetadataNorm, Application] | None:
    """Return the layer that was inserted behind a module, and what applies it; None without."""
    layer = module._modules.get(LAYER_NAME)
    application = getattr(layer, "insertion", None)
    if isinstance(layer, MetadataNorm) and isinstance(application, Application):
        return layer, application
    return None


def inserted(model: nn.Module) -> Iterator[tuple[Insertion, MetadataNorm]]:
    """Yield what was inserted, in the order of the model."""
    for module, all_names in places.named(model).values():
        found = layer_of(module)
        if found is None:
            continue
        layer, application = found
        name, *others = all_names
        own = f"{name}.{LAYER_NAME}" if name else LAYER_NAME
        kind = type(module).__name__
        yield Insertion(name, tuple(others), kind, own, application.shape, layer.num_features), layer
