"""Put `MetadataNorm` layers into any model, by name or type of the modules behind which they go."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mdnorm.design import Design
from mdnorm.integration import places
from mdnorm.integration.applied import (
    Application,
    FirstPass,
    Insertion,
    call_on,
    inserted,
    is_in,
    layer_of,
    warn_of_output,
)
from mdnorm.integration.batches import evaluating
from mdnorm.integration.dependence import Selector
from mdnorm.integration.design import DESIGN_NAME, attach_design, designs_in, remove_designs
from mdnorm.integration.places import Target
from mdnorm.layer import MetadataNorm, coefficient_shape
from mdnorm.regression import position_dims
from mdnorm.text import aligned, warn


@dataclasses.dataclass(frozen=True)
class InsertionReport(Sequence[Insertion]):
    """What went where: a sequence of `Insertion` that prints as a table.

    It is read off the model whenever it is asked, so shapes appear with the first batch.
    """

    model: nn.Module

    def __len__(self) -> int:
        return len(list(inserted(self.model)))

    def __getitem__(self, index: Any) -> Any:
        return [row for row, _ in inserted(self.model)][index]

    def __str__(self) -> str:
        rows = [("after", "type", "layer", "output", "values", "coefficients")]
        for row, _ in inserted(self.model):
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
        return "\n".join(aligned(rows)) if len(rows) > 1 else "no MetadataNorm was inserted"

    __repr__ = __str__


def insert(
    model: nn.Module,
    after: Target | Sequence[Target],
    *,
    design: Design | None = None,
    num_metadata: int | None = None,
    num_labels: int | None = 0,
    output: Selector | None = None,
    sample_dim: int = 0,
    example: Any = None,
    **options: Any,
) -> InsertionReport:
    """Put a `MetadataNorm` behind modules of a model, in place; nothing else about the model changes.

    The layer becomes a child ``metadata_norm`` of the module. Afterwards give the metadata of each batch with
    `mdnorm.metadata` or `mdnorm.WithMetadata`. Inserting again with the same options changes nothing. The
    page "Into any model" says what stays as it is (names, checkpoints, copies), and which modules bypass
    their layer.

    Parameters
    ----------
    model : nn.Module
        Any model, not yet compiled or wrapped for several devices.
    after : str, type, nn.Module, or sequence of them
        Behind which modules: a name from ``model.named_modules()`` ("" is the model itself), a pattern, a
        class (``nn.Conv2d``: all of them), or a module. In a pattern ``*`` stands for any part of a name
        between two dots, ``**`` for any number of parts: ``"encoder.layer.*.output"``, ``"**.conv2"``.
    design : Design, optional
        A fitted one, which says the numbers of columns and goes with the model (`mdnorm.attach_design`):
        `mdnorm.metadata` turns raw tables into columns by it.
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
        What went where, layers inserted before included; print it.

    Raises
    ------
    ValueError
        A name or pattern matches nothing; the module has a layer already, with other options, or no output of
        its own (an `nn.ModuleList`, the `out_proj` of an `nn.MultiheadAttention`); the model is compiled or
        wrapped, or has another design; with `example`, a module that does not run, or whose output has no
        dimension `sample_dim`.
    TypeError, RuntimeError
        `after` or `design` is something else, or the output has no tensor; the design is not fitted.

    Warns
    -----
    UserWarning
        The output of the module is that of the model; or the module did not run in the model's first forward
        pass. Both are known at once with `example`, otherwise after that pass.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> insert(model, after="0", num_metadata=2, num_labels=1, example=torch.randn(5, 8))
    after  type    layer            output  values  coefficients
    0      Linear  0.metadata_norm  (N, 4)  4       4
    """
    places.refuse_wrapped(model)
    targets = places.targets(model, after)
    if isinstance(sample_dim, bool) or not isinstance(sample_dim, int):
        raise TypeError(f"sample_dim must be an int, got {sample_dim!r}.")
    if design is not None:
        num_metadata, num_labels = _sizes_of_design(model, design, num_metadata, num_labels)
    settings = {"num_metadata": num_metadata, "num_labels": num_labels, "output": output}
    settings |= {"sample_dim": sample_dim} | options
    fresh = without_layer(model, targets, settings)
    for name, module in fresh.items() if sample_dim == 0 and not callable(output) else ():
        if not next((part.batch_first for part in module.modules() if hasattr(part, "batch_first")), True):
            warn(
                f"{name!r} is a {type(module).__name__} with batch_first=False, whose samples are in the "
                "second dimension: give sample_dim=1, or the steps of the sequences are taken for samples."
            )
    put_behind(model, fresh, settings)
    if example is not None:
        try:
            _run_example(model, fresh, example)
        except BaseException:
            if fresh:
                remove(model, list(fresh))
            raise
    if design is not None and not any(attached.json.numel() for attached in designs_in(model).values()):
        attach_design(model, design)
        next(iter(designs_in(model).values())).is_inserted = True
    if example is None and any(fresh):
        FirstPass(model)
    return InsertionReport(model)


def insertions(model: nn.Module) -> InsertionReport:
    """Return what `insert` put into a model, now or before it was saved or copied."""
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
        A name or pattern matches nothing, or none of the named modules has an inserted layer.
    """
    if after is None:
        targets = {row.name: model.get_submodule(row.name) for row, _ in inserted(model)}
    else:
        targets = places.targets(model, after)
        if not any(layer_of(module) for module in targets.values()):
            raise ValueError(f"no MetadataNorm was inserted after {', '.join(map(repr, targets))}.")
    removed = []
    for name, module in targets.items():
        if found := layer_of(module):
            found[1].detach(module)
            removed.append(name)
    if next(inserted(model), None) is None:
        FirstPass.unwatch(model)
        remove_designs(model, (name for name, design in designs_in(model).items() if design.is_inserted))
    return removed


def without_layer(
    model: nn.Module, modules: dict[str, nn.Module], settings: dict[str, Any]
) -> dict[str, nn.Module]:
    """Return those of the modules that have no layer yet; raise ValueError where one cannot have this."""
    fresh = {}
    takes_apart = settings["output"] is not None or settings["sample_dim"] != 0
    for name, module in modules.items():
        existing = layer_of(module)
        if existing is None:
            places.refuse_unusable(model, name, module, takes_apart)
            fresh[name] = module
        elif differences := _differences(existing[1].settings, settings):
            raise ValueError(
                f"{name!r} has a MetadataNorm already, with other options ({differences}): remove it first."
            )
    places.refuse_wrapped_parts(model, fresh)
    return fresh


def put_behind(model: nn.Module, modules: dict[str, nn.Module], settings: dict[str, Any]) -> None:
    """Put a layer behind each of the modules; wrong settings leave the model as it was."""
    layers = [_make_layer(name, module, model, settings) for name, module in modules.items()]
    for (name, module), layer in zip(modules.items(), layers, strict=True):
        layer.train(module.training)
        layer.inserted_after = name
        Application(settings).attach(module, layer)


def _make_layer(name: str, module: nn.Module, model: nn.Module, settings: dict[str, Any]) -> MetadataNorm:
    options = {key: value for key, value in settings.items() if key not in ("output", "sample_dim")}
    sizes = [options.pop(key, None) for key in ("num_features", "num_metadata", "num_labels")]
    tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in (module, model)))
    tensor = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if tensor is not None:
        options = {"device": tensor.device, "dtype": tensor.dtype} | options
    try:
        return MetadataNorm(*sizes, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"after {name!r}: {error}") from error


def _run_example(model: nn.Module, modules: dict[str, nn.Module], example: Any) -> None:
    """Run a model in which no layer corrects anything, for the shapes and for what the output is made of."""
    given: dict[str, Tensor] = {}

    def note(name: str, features: Tensor) -> Tensor:
        given[name] = features
        return features

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        if FirstPass.unwatch(model):  # This is not the first pass that it waits for.
            stack.callback(FirstPass, model)
        for row, layer in inserted(model):
            layer.forward = functools.partial(note, row.name)  # type: ignore[method-assign]
            stack.callback(delattr, layer, "forward")
        result = call_on(model, example)
    idle = [name for name in modules if name not in given]
    if idle:
        raise ValueError(
            f"{', '.join(map(repr, idle))} did not run on the example: insert after a module that runs."
        )
    for row, layer in inserted(model):
        if row.name not in modules:
            continue
        features = given[row.name]
        try:
            dims = position_dims(features, layer.granularity, layer.channel_dim)
            layer.check_features(features, dims)
            shape = coefficient_shape(features, dims, layer.granularity)
            layer.set_sizes(shape, layer.num_metadata, layer.num_labels)
        except (TypeError, ValueError) as error:
            raise type(error)(f"after {row.name!r}: {error}") from error
        if row.name and is_in(features, result):
            warn_of_output(model, row.name)


def _sizes_of_design(
    model: nn.Module, design: Design, num_metadata: int | None, num_labels: int | None
) -> tuple[int, int]:
    """Return the design's numbers of columns, checked against what was given and what the model has."""
    if not isinstance(design, Design):
        raise TypeError(f"design must be a fitted mdnorm.Design, got {type(design).__name__}.")
    for name, given, own in (
        ("num_metadata", num_metadata, design.num_metadata),
        ("num_labels", num_labels or None, design.num_labels),
    ):
        if given is not None and given != own:
            raise ValueError(f"{name}={given}, but the design has {own} column(s): leave {name} out.")
    for attached in designs_in(model).values():
        if attached.json.numel() and attached.design().to_json() != design.to_json():
            raise ValueError(
                "the model has another design already: give that one, or mdnorm.remove(model) first."
            )
    if hasattr(model, DESIGN_NAME) and not designs_in(model):
        raise ValueError(f"the model has something else of the name {DESIGN_NAME!r}: rename it.")
    return design.num_metadata, design.num_labels


def _differences(have: dict[str, Any], want: dict[str, Any]) -> str:
    """Return for a message in what settings differ; "" where they do not."""
    return ", ".join(
        f"{key}={have.get(key)!r} instead of {want.get(key)!r}"
        for key in {**have, **want}
        if have.get(key) != want.get(key)
    )
