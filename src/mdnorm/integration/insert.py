"""Put `MetadataNorm` layers into any model, by name or type of the modules behind which they go."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mdnorm.integration.dependence import Selector, described, select
from mdnorm.layer import MetadataNorm

__all__ = ["Insertion", "InsertionReport", "insert", "insertions", "remove"]

_NAME = "metadata_norm"

Target = str | type[nn.Module] | nn.Module


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
    is_new : bool
        Whether this call of `insert` put it there.
    """

    name: str
    other_names: tuple[str, ...]
    type: str
    layer: str
    output_shape: tuple[int, ...] | None
    num_features: tuple[int, ...] | None
    is_new: bool

    @property
    def num_values(self) -> int | None:
        """Values of a sample that the layer corrects; None before the first batch."""
        return None if self.output_shape is None else torch.Size(self.output_shape[1:]).numel()

    @property
    def num_coefficients(self) -> int | None:
        """Coefficients of one metadata column; None while unknown."""
        return None if self.num_features is None else torch.Size(self.num_features).numel()


@dataclasses.dataclass(frozen=True)
class InsertionReport(Sequence[Insertion]):
    """What went where: a sequence of `Insertion` that prints as a table.

    It is read off the model whenever it is asked, so shapes appear with the first batch.
    """

    model: nn.Module
    new: frozenset[int] = frozenset()

    def _rows(self) -> list[Insertion]:
        return [
            dataclasses.replace(row, is_new=id(layer) in self.new) for row, layer in _inserted(self.model)
        ]

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, index: Any) -> Any:
        return self._rows()[index]

    def __str__(self) -> str:
        rows = [("after", "type", "layer", "output", "values", "coefficients")]
        for row in self._rows():
            shape = None if row.output_shape is None else ("N", *row.output_shape[1:])
            rows.append(
                (
                    " = ".join((row.name or "the model", *row.other_names)),
                    row.type,
                    row.layer,
                    "at the first batch" if shape is None else f"({', '.join(map(str, shape))})",
                    "" if row.num_values is None else str(row.num_values),
                    "" if row.num_coefficients is None else str(row.num_coefficients),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join(lines) if len(rows) > 1 else "no MetadataNorm was inserted"

    __repr__ = __str__


def insert(
    model: nn.Module,
    after: Target | Sequence[Target],
    *,
    num_metadata: int | None = None,
    num_labels: int | None = 0,
    output: Selector | None = None,
    sample_dim: int = 0,
    example: Any = None,
    **options: Any,
) -> InsertionReport:
    """Put a `MetadataNorm` behind modules of a model, in place; nothing else about the model changes.

    Afterwards give the metadata of each batch with `mdnorm.metadata` or `mdnorm.WithMetadata`.

    Parameters
    ----------
    model : nn.Module
        Any model, not yet compiled or wrapped for several devices.
    after : str, type, nn.Module, or sequence of them
        Behind which modules: a name from ``model.named_modules()`` ("" is the model itself), a pattern, a
        class (``nn.Conv2d``: all of them), or a module. In a pattern ``*`` stands for any part of a name
        between two dots, ``**`` for any number of parts: ``"encoder.layer.*.output"``, ``"**.conv2"``.
    num_metadata : int, optional
        Number of metadata columns; by default that of the first batch.
    num_labels : int, optional
        Number of label columns, as of `MetadataNorm`: 0 by default.
    output : str, int or callable, optional
        Which part of the module's output is corrected, where it is not a tensor: a key or attribute of a dict
        or dataclass (a `ModelOutput` of transformers), an index of a tuple, or a function that returns one of
        the tensors in it. By default its first tensor; everything else passes through.
    sample_dim : int
        Which dimension of the output counts the samples: 1 for an LSTM without ``batch_first``.
    example : tensor, tuple or dict, optional
        Input for one forward pass, without gradient, in evaluation mode: the shapes are then known at once,
        and where num_metadata and num_labels are given, the layers have their state (which training with
        `torch.compile`, or an optimiser over "penalty" layers, wants).
    **options
        Of `MetadataNorm`: `estimator`, `granularity`, `channel_dim`, `window`, ….

    Returns
    -------
    InsertionReport
        What went where; print it. It has the layers inserted before, too.

    Raises
    ------
    ValueError
        A name or pattern matches nothing (the message lists names that are near); the module has a layer
        already, with other options; a container that cannot be followed, such as an `nn.ModuleList`; the
        model is compiled or wrapped; with `example`, a module that does not run, or whose output has no
        dimension `sample_dim`.
    TypeError
        `after` is something else, or the output has no tensor.

    Notes
    -----
    - **How.** The layer becomes a child of the module, named ``metadata_norm``, and a forward hook of the
      module applies it. (An `nn.Sequential` gets it as its last module, without a hook.) A container in the
      module's place would change every name below it; with a child the names in the ``state_dict`` stay, the
      module keeps its class and its attributes (transformers and `nn.MultiheadAttention` read
      ``module.weight``), and part of a model taken out, copied, pickled or replicated takes its layer along.
    - **Checkpoints.** One from before the insertion loads as it is, ``strict`` included: only if it has
      something of a layer must it have all. One from after it has ``<name>.metadata_norm.…``.
    - **Calls.** A module that is called several times in a forward pass, or has several places, has one
      layer with one state: each call is corrected, and its batch counts.
    - Inserting again with the same options changes nothing. An option that is left out is the same as its
      default.
    - A module whose ``forward`` is called directly, or whose weights alone are used, bypasses its layer; the
      report shows no output shape then.
    - An LSTM's hidden state is not corrected, only its output.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> insert(model, after="0", num_metadata=2, num_labels=1, example=torch.randn(5, 8))
    after  type    layer            output  values  coefficients
    0      Linear  0.metadata_norm  (N, 4)  4       4
    """
    _refuse_wrapped(model)
    targets = _targets(model, after)
    sample_dim = _checked_sample_dim(sample_dim)
    settings = {"num_metadata": num_metadata, "num_labels": num_labels, "output": output}
    settings |= {"sample_dim": sample_dim} | options
    fresh = []
    for name, module in targets.items():
        existing = _layer_of(module)
        if existing is None:
            _refuse_unusable(name, module, output, sample_dim)
            fresh.append((name, module))
        elif differences := _differences(existing[1].settings, _resolved(settings)):
            raise ValueError(
                f"{name!r} has a MetadataNorm already, with other options ({differences}): "
                f"mdnorm.remove(model, {name!r}) first."
            )
    _refuse_wrapped_parts(model, dict(fresh))
    shapes: dict[str, torch.Size] = {}
    if example is not None:
        shapes = _shapes_of_example(model, dict(fresh), output, sample_dim, example)
    layers = []
    # All layers first: wrong options must leave the model as it was.
    for name, module in fresh:
        layers.append(_make_layer(name, module, model, shapes.get(name), num_metadata, num_labels, options))
    for (name, module), layer in zip(fresh, layers, strict=True):
        layer.train(module.training)
        layer.inserted_after = name
        application = _Application(output, sample_dim, _resolved(settings))
        application.shape = tuple(shapes[name]) if name in shapes else None
        application.attach(module, layer)
    return InsertionReport(model, frozenset(map(id, layers)))


def insertions(model: nn.Module) -> InsertionReport:
    """Return what `insert` put into a model, now or before it was saved or copied.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> insertions(model)
    no MetadataNorm was inserted
    """
    return InsertionReport(model)


def remove(model: nn.Module, after: Target | Sequence[Target] | None = None) -> list[str]:
    """Take out what `insert` put in: the model is what it was before.

    Parameters
    ----------
    model : nn.Module
    after : str, type, nn.Module, or sequence of them, optional
        Behind which modules, as in `insert`; by default all.

    Returns
    -------
    list of str
        Names of the modules behind which a layer was.

    Raises
    ------
    ValueError
        A name or pattern matches nothing, or a named module has no inserted layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> report = insert(model, after=nn.Linear)
    >>> remove(model)
    ['0', '2']
    """
    if after is None:
        targets = {row.name: model.get_submodule(row.name) for row, _ in _inserted(model)}
    else:
        targets = _targets(model, after)
        if not any(_layer_of(module) for module in targets.values()):
            raise ValueError(f"no MetadataNorm was inserted after {', '.join(map(repr, targets))}.")
    removed = []
    for name, module in targets.items():
        found = _layer_of(module)
        if found is not None:
            found[1].detach(module)
            removed.append(name)
    return removed


# -- what is inserted ---------------------------------------------------------------------------------------


class _Application:
    """Applies the layer of a module to its output; a forward hook that can be copied and pickled.

    It finds the layer through the module it is called with: in a replica of `nn.DataParallel` that is the
    replica's.
    """

    def __init__(self, output: Selector | None, sample_dim: int, settings: dict[str, Any]) -> None:
        self.output = output
        self.sample_dim = sample_dim
        self.settings = settings
        self.shape: tuple[int, ...] | None = None
        self.handles: list[Any] = []

    def attach(self, module: nn.Module, layer: MetadataNorm) -> None:
        module.add_module(_NAME, layer)
        # The handles are pickled along: they tell a new process which ids of hooks are taken.
        if _calls_its_children(module):
            self.handles.append(layer.register_forward_pre_hook(self._note))
        else:
            self.handles.append(module.register_forward_hook(self))
        # The public method for it is younger than the oldest torch that is supported.
        register: Any = layer._register_load_state_dict_pre_hook
        self.handles.append(register(_accept_earlier_checkpoints, with_module=True))
        layer.insertion = self

    def detach(self, module: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        delattr(module, _NAME)

    def _note(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """An `nn.Sequential` hands its output over by itself."""
        if not isinstance(arguments[0], Tensor):
            name = getattr(layer, "inserted_after", "")
            raise TypeError(
                f"the output of {name!r} is {described(arguments[0])}: insert after its last module, not "
                "after the nn.Sequential, where output= can be given."
            )
        if not torch.compiler.is_compiling():
            self.shape = _shape(arguments[0])

    def __call__(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        layer = module._modules[_NAME]
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
        if isinstance(output, Tensor):
            return corrected
        return _replaced(output, self.output, corrected, name)


def _shape(features: Tensor) -> tuple[int, ...] | None:
    """Return the shape of features; sequences of several lengths (a nested tensor) have none."""
    return None if features.is_nested else tuple(features.shape)


def _accept_earlier_checkpoints(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint from before the insertion has nothing of the layer, which then stays as it is."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(layer.state_dict(prefix=prefix))


def find_features(output: Any, selector: Selector | None, name: str) -> Tensor:
    """Return the tensor of a module's output that `selector` names, by default the first.

    Raises
    ------
    TypeError
        There is none, or what is selected is no tensor.
    """
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
            f"the output of {name!r} is a PackedSequence, which has no row per sample: give the module "
            "padded sequences, or insert behind a later one."
        )
    raise TypeError(
        f"the output of {name!r} is {described(output)}: no tensor to correct. Give output= a key, an index "
        "or a function that returns one."
        if selector is None
        else f"output= selects {described(found)} from the output of {name!r}, not a tensor."
    )


def samples_first(features: Tensor, sample_dim: int, name: str) -> Tensor:
    """Return a module's output with the dimension of the samples as the first.

    Raises
    ------
    ValueError
        It has no such dimension.
    """
    if not -features.ndim <= sample_dim < features.ndim:
        raise ValueError(
            f"sample_dim={sample_dim}, but the output of {name!r} has shape {tuple(features.shape)}, "
            f"{features.ndim} dimension(s): give the one that counts the samples."
        )
    return features.movedim(sample_dim, 0)


def _entries(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, PackedSequence):
        return [(None, output)]
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return []


def _replaced(output: Any, selector: Selector | None, corrected: Tensor, name: str) -> Any:
    """A copy of the output with one entry replaced; the output itself may be shared."""
    entries = _entries(output)
    if selector is None:
        key = next(key for key, value in entries if isinstance(value, Tensor))
    elif callable(selector):
        wanted = selector(output)
        keys = [key for key, value in entries if value is wanted]
        if not keys:
            raise TypeError(
                f"output= must return one of the entries of the output of {name!r} ({described(output)}), "
                "not a new tensor or one further inside: the corrected one goes back in its place."
            )
        key = keys[0]
    elif isinstance(selector, int) and not (isinstance(output, Mapping) and selector in output):
        # The entries of a ModelOutput that are None have no index.
        present = [key for key, value in entries if value is not None or isinstance(output, (tuple, list))]
        key = present[selector]
    else:
        key = selector
    if isinstance(output, tuple):
        if not isinstance(key, int):
            return output._replace(**{key: corrected})  # type: ignore[attr-defined]
        values = [corrected if index == key % len(output) else value for index, value in entries]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{key: corrected})
    changed = copy.copy(output)
    if isinstance(output, (Mapping, list)):
        changed[key] = corrected
    else:
        setattr(changed, key, corrected)
    return changed


def _layer_of(module: nn.Module) -> tuple[MetadataNorm, _Application] | None:
    layer = module._modules.get(_NAME)
    application = getattr(layer, "insertion", None)
    if isinstance(layer, MetadataNorm) and isinstance(application, _Application):
        return layer, application
    return None


def _inserted(model: nn.Module) -> Iterator[tuple[Insertion, MetadataNorm]]:
    names = _names(model)
    for module, all_names in names.values():
        found = _layer_of(module)
        if found is None:
            continue
        layer, application = found
        name, *others = all_names
        own = f"{name}.{_NAME}" if name else _NAME
        row = Insertion(
            name, tuple(others), type(module).__name__, own, application.shape, layer.num_features, False
        )
        yield row, layer


# -- where --------------------------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Modules with all their names, in the order of the model; what is inside of our layers is left out."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    hidden: set[int] = set()
    for module in model.modules():
        if isinstance(module, MetadataNorm):
            hidden |= {id(part) for part in module.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in hidden:
            names.setdefault(id(module), (module, []))[1].append(name)
    return names


def _targets(model: nn.Module, after: Any) -> dict[str, nn.Module]:
    """The modules that are meant, by their first names, in the order of the model."""
    names = _names(model)
    wanted: set[int] = set()
    parts = list(after) if isinstance(after, (list, tuple, set, frozenset)) else [after]
    if not parts:
        raise ValueError("after is empty: give the name, pattern or type of at least one module.")
    for part in parts:
        wanted |= _matching(model, names, part)
    return {all_names[0]: module for key, (module, all_names) in names.items() if key in wanted}


def _matching(model: nn.Module, names: dict[int, tuple[nn.Module, list[str]]], part: Any) -> set[int]:
    if isinstance(part, nn.Module):
        if id(part) not in names:
            raise ValueError(
                f"after has a {type(part).__name__} that is not part of the {type(model).__name__}"
                + (": it is a MetadataNorm of its own." if isinstance(part, MetadataNorm) else ".")
            )
        return {id(part)}
    if isinstance(part, type) and issubclass(part, nn.Module):
        found = {
            key for key, (module, _) in names.items() if isinstance(module, part) and module is not model
        }
        if not found:
            types = sorted({type(module).__name__ for module, _ in names.values() if module is not model})
            raise ValueError(
                f"{type(model).__name__} has no module of type {part.__name__}: its types are "
                f"{', '.join(types) or 'none'}."
            )
        return found
    if not isinstance(part, str):
        raise TypeError(
            "after must be the name of a module, a pattern, a class of modules, a module or a list of them, "
            f"got {part!r}."
        )
    exact = {key for key, (_, all_names) in names.items() if part in all_names}
    if exact:
        return exact
    known = [name for _, all_names in names.values() for name in all_names if name]
    if "*" in part or "?" in part:
        pattern = _compiled(part)
        found = {
            key for key, (_, all_names) in names.items() if any(n and pattern.fullmatch(n) for n in all_names)
        }
        if found:
            return found
    raise ValueError(f"{type(model).__name__} has no module {part!r}: {_near(part, known)}.")


def _compiled(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within a part of a name, ``**`` stands for any number of parts."""
    text = re.escape(pattern).replace(r"\*\*\.", "(?:.+[.])?").replace(r"\.\*\*", "(?:[.].+)?")
    return re.compile(text.replace(r"\*\*", ".*").replace(r"\*", "[^.]*").replace(r"\?", "[^.]"))


def _near(part: str, known: list[str]) -> str:
    if not known:
        return "it has no modules inside"
    near = difflib.get_close_matches(part, known, n=5, cutoff=0.5)
    ending = [
        name for name in known if name.rpartition(".")[2] == part.rpartition(".")[2] and name not in near
    ]
    near += ending[: 5 - len(near)]
    if near:
        return f"did you mean {', '.join(map(repr, near))}?".rstrip("?") + f" ({len(known)} in all)"
    return f"its modules are {', '.join(known[:30])}" + (
        f", … ({len(known)} in all)" if len(known) > 30 else ""
    )


def _calls_its_children(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if _is_wrapped(model):
        raise ValueError(
            f"the model is compiled or wrapped ({type(model).__name__}), which would not see what is "
            "inserted now: insert into the plain model first, then compile or wrap it."
        )


def _is_wrapped(module: nn.Module) -> bool:
    """Whether something holds on to the module as it was: a graph that has run is not traced again."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    is_compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return is_compiled or isinstance(module, wrappers)


def _refuse_wrapped_parts(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    for around in model.modules():
        if not _is_wrapped(around):
            continue
        inside = {id(module) for module in around.modules()}
        for name, module in targets.items():
            if id(module) in inside:
                raise ValueError(
                    f"{name!r} is, or is inside, a compiled or wrapped module ({type(around).__name__}), "
                    "which would not see what is inserted now: insert first, then compile or wrap."
                )


def _refuse_unusable(name: str, module: nn.Module, output: Selector | None, sample_dim: int) -> None:
    if hasattr(module, _NAME):
        raise ValueError(f"{name!r} has something else of the name {_NAME!r}: rename it.")
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    if isinstance(module, containers):
        raise ValueError(
            f"{name!r} is an {type(module).__name__}, which has no output: name the modules in it, "
            f"'{name}.*' say."
        )
    if not isinstance(module, nn.Sequential):
        return
    last = f"{name}.{len(module) - 1}" if len(module) else name
    if not _calls_its_children(module):
        raise ValueError(
            f"{name!r} is an nn.Sequential with a forward of its own ({type(module).__name__}), which may "
            f"call all its modules: insert after one of them, {last!r} say."
        )
    if output is not None or sample_dim:
        raise ValueError(
            f"{name!r} is an nn.Sequential: with output= or sample_dim= insert after its last module, "
            f"{last!r}."
        )


def _checked_sample_dim(sample_dim: Any) -> int:
    if isinstance(sample_dim, bool) or not isinstance(sample_dim, int):
        raise TypeError(f"sample_dim must be an int, got {sample_dim!r}.")
    return sample_dim


# -- the layer ----------------------------------------------------------------------------------------------


def _make_layer(
    name: str,
    module: nn.Module,
    model: nn.Module,
    shape: torch.Size | None,
    num_metadata: int | None,
    num_labels: int | None,
    options: dict[str, Any],
) -> MetadataNorm:
    options = dict(options)
    num_features: Any = options.pop("num_features", None)
    tensor = next((t for part in (module, model) for t in _tensors(part)), None)
    if tensor is not None:
        options = {"device": tensor.device, "dtype": tensor.dtype} | options
    if shape is not None and num_features is None:
        if options.get("granularity", "element") == "channel":
            channel_dim: Any = options.get("channel_dim", 1)
            if -len(shape) <= channel_dim < len(shape):
                num_features = shape[channel_dim]
        else:
            num_features = tuple(shape[1:])
    try:
        return MetadataNorm(num_features, num_metadata, num_labels, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"after {name!r}: {error}") from error


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor


def _shapes_of_example(
    model: nn.Module, modules: dict[str, nn.Module], output: Selector | None, sample_dim: int, example: Any
) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    def noting(name: str) -> Any:
        def note(_: nn.Module, __: tuple[Any, ...], value: Any) -> None:
            shapes[name] = samples_first(find_features(value, output, name), sample_dim, name).shape

        return note

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(noting(name)) for name, module in modules.items()]
    # Layers inserted before have no metadata now, and their output has the shape of their input.
    aside = [(module, found) for module in model.modules() if (found := _layer_of(module)) is not None]
    for module, (_, application) in aside:
        application.detach(module)
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                model(**example)
            elif isinstance(example, (tuple, list)):
                model(*example)
            else:
                model(example)
    finally:
        for module, (layer, application) in aside:
            application.handles = []
            application.attach(module, layer)
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    idle = [name for name in modules if name not in shapes]
    if idle:
        raise ValueError(
            f"{', '.join(map(repr, idle))} did not run on the example: a layer there would correct nothing. "
            "Insert after a module that the forward pass calls."
        )
    return shapes


# -- options ------------------------------------------------------------------------------------------------


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with their defaults, so that a default given is the same as one left out."""
    parameters = inspect.signature(MetadataNorm.__init__).parameters.values()
    resolved = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | settings
    return {key: _comparable(value) for key, value in resolved.items() if value is not None}


def _comparable(value: Any) -> Any:
    """Return what two settings are compared by: a partial by its function and arguments."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return value


def _differences(have: dict[str, Any], want: dict[str, Any]) -> str:
    """Return for a message in what settings differ; "" where they do not."""
    return ", ".join(
        f"{key}={_shown(have.get(key))} instead of {_shown(want.get(key))}"
        for key in {**have, **want}
        if have.get(key) != want.get(key)
    )


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)
