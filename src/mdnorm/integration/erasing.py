"""Put an eraser behind a module of a model, fitted in one pass over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdnorm.bars import with_bar
from mdnorm.context import columns_by_design
from mdnorm.erasure import Eraser, EraserFitter
from mdnorm.integration import places
from mdnorm.integration.applied import call_on, find_features, is_in, replaced, warn_of_output
from mdnorm.integration.batches import Keys, checked_keys, evaluating, on_device_of, parts_of
from mdnorm.integration.dependence import Selector
from mdnorm.moments import NoSamplesError

_NAME = "eraser"


def erase(
    model: nn.Module,
    after: str | nn.Module,
    loader: Iterable[Any],
    *,
    output: Selector | None = None,
    keys: Keys | None = None,
    progress: bool = True,
    **options: Any,
) -> Eraser:
    """Fit an eraser on the output of a module, and put it behind the module, in place.

    From then on the model needs no metadata: what follows reads the erased features. It was trained on other
    features, so train the head again.

    Parameters
    ----------
    model : nn.Module
        A trained one, not compiled or wrapped for several devices. Left in the mode it came in.
    after : str or nn.Module
        Behind which module, as in `mdnorm.insert`, but one: the last hidden layer as a rule. One that runs
        several times in a forward pass has one eraser, fitted on all its outputs.
    loader : iterable of batches
        Iterated once: a `DataLoader` of the training data, a generator. A batch is ``(input, metadata)``,
        ``(input, metadata, labels)``, or a mapping with "metadata" and perhaps "labels" and "weights", the
        rest of which goes to the model; MONAI's as of `mdnorm.recalibrate`. An input that is a tuple or a
        dict is given as several arguments. Metadata may be a table where the model has a design
        (`mdnorm.attach_design`).
    output : str, int or callable, optional
        Which part of the module's output is erased, as in `mdnorm.insert`; by default its first tensor.
    keys : mapping, optional
        Where the parts of a batch are, as of `mdnorm.recalibrate`; without "mask": give padding the weight 0.
    progress : bool
        As in `mdnorm.recalibrate`.
    **options
        Of `mdnorm.erasure.EraserFitter`: `num_labels`, `channel_dim` (−1 for tokens (N, T, D)),
        `within_labels`, `preserve_labels`.

    Returns
    -------
    Eraser
        The child ``eraser`` of the module; ``del module.eraser`` takes it out again.

    Raises
    ------
    TypeError
        `model` is not a module, `keys` no mapping, or the output has no tensor.
    ValueError, KeyError, IndexError
        `after` names no module or several, one that does not run, or has an eraser; `keys` has an unknown
        name or a key that a batch lacks; no samples; what `EraserFitter` refuses. The model is unchanged.

    Warns
    -----
    UserWarning
        There is nothing to erase; or the output of the module is that of the model.
    """
    parts = checked_keys(keys)
    name, module = _target(model, after, output)
    fitter = EraserFitter(**options)
    given: dict[str, Any] = {}
    outputs: list[Tensor] = []
    is_output = False

    def note(_: nn.Module, __: tuple[Any, ...], value: Any) -> None:
        outputs.append(find_features(value, output, name))
        # At once: a later module may change the output in place.
        fitter.update(outputs[-1], **given)

    handle = module.register_forward_hook(note)
    try:
        with evaluating(model), torch.no_grad():
            for batch in with_bar(loader, f"erase after {name or 'the model'}", progress):
                inputs, keywords, given = parts_of(model, on_device_of(model, batch), parts, True)
                if "mask" in given:
                    raise ValueError("an eraser takes no 'mask': give padding weight 0 in 'weights'.")
                columns = columns_by_design(model, given["metadata"], given.get("labels"))
                given |= dict(zip(("metadata", "labels"), columns, strict=True))
                result = call_on(model, inputs[0]) if len(inputs) == 1 else model(*inputs, **keywords)
                if not outputs:
                    raise ValueError(f"{name!r} did not run: give a module that the forward pass calls.")
                is_output = is_output or any(is_in(features, result) for features in outputs)
                outputs.clear()
    except ValueError as error:
        raise ValueError(f"after {name!r}: {error}") from error
    finally:
        handle.remove()
    if fitter.moments is None:
        raise NoSamplesError("no samples: the loader is empty.")
    if is_output and name:
        warn_of_output(model, name)
    return insert_eraser(model, module, fitter.eraser(), output=output)


def insert_eraser(
    model: nn.Module, after: str | nn.Module, eraser: Eraser, *, output: Selector | None = None
) -> Eraser:
    """Put an eraser behind a module, in place: a fitted one, or an empty one that a checkpoint is to fill.

    It becomes the child ``eraser`` of the module, so that the names of the model's own weights stay.

    Parameters
    ----------
    model, after, output
        As in `erase`, with the same errors.
    eraser : Eraser
        It is returned.
    """
    _, module = _target(model, after, output)
    eraser.train(module.training)
    module.add_module(_NAME, eraser)
    # An `nn.Sequential` calls it as its last module.
    if not places.calls_its_children(module):
        module.register_forward_hook(_Erasure(output))
    return eraser


class _Erasure:
    """Applies the eraser of a module to its output; a forward hook that can be copied and pickled."""

    def __init__(self, output: Selector | None) -> None:
        self.output = output

    def __call__(self, module: nn.Module, _: tuple[Any, ...], value: Any) -> Any:
        eraser = module._modules.get(_NAME)
        if eraser is None:
            return value
        name = type(module).__name__
        return replaced(value, self.output, eraser(find_features(value, self.output, name)), name)


def _target(model: nn.Module, after: str | nn.Module, output: Selector | None) -> tuple[str, nn.Module]:
    """Return the one module that is meant, without what an eraser that was taken out left there."""
    places.refuse_wrapped(model)
    found = places.targets(model, after)
    if len(found) > 1:
        raise ValueError(f"after={after!r} are {len(found)} modules, {', '.join(found)}: name one of them.")
    ((name, module),) = found.items()
    if isinstance(getattr(module, _NAME, None), Eraser):
        raise ValueError(f"{name!r} has an eraser already: del model.get_submodule({name!r}).{_NAME} first.")
    if hasattr(module, _NAME):
        raise ValueError(f"{name!r} has something else of the name {_NAME!r}: rename it.")
    places.refuse_unusable(model, name, module, output is not None)
    places.refuse_wrapped_parts(model, found)
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _Erasure):
            del module._forward_hooks[key]
    return name, module
