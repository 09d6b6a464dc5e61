"""Coefficients of a whole data set for a trained network, layer after layer, without their noise."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mdnorm import context
from mdnorm.distributed import gather_or_raise, group_of
from mdnorm.integration.dependence import described
from mdnorm.integration.layer_moments import NUM_GROUPS, LayerMoments
from mdnorm.integration.recalibration import RecalibratedLayer, Recalibration, probability_below
from mdnorm.integration.uncompiled import uncompiled
from mdnorm.integration.wrapper import WithMetadata
from mdnorm.layer import MetadataNorm
from mdnorm.moments import NoSamplesError
from mdnorm.shrinkage import combine, found_again, with_change

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["recalibrate"]

Forward = Callable[[nn.Module, Any], Any]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    shrink: bool = True,
    forward: Forward | None = None,
    progress: bool = True,
    process_group: ProcessGroupSetting = "auto",
) -> Recalibration:
    """Replace the coefficients of every layer by those of a data set, without what is noise in them.

    Give training rows as `loader` and, whenever you have some, rows that were not trained on as `held_out`,
    and print what comes back.

    Running coefficients lag behind the weights and have the noise of their window; these do not. The noise of
    few rows would *write* the metadata into features that know nothing of them, so coefficients are shrunk as
    far as the features of a layer together show that they are noise. A network that memorised its training
    rows has an effect of the metadata there that new rows do not have: `held_out` shows it, and then decides.

    One pass over the data a layer, in the order in which the layers run, since a layer's input changes with
    the correction of those before it; moments are accumulated in float64, so memory does not depend on the
    size of the data set.

    Parameters
    ----------
    model : nn.Module
        With `MetadataNorm` layers; left in the mode (train or eval) it came in.
    loader : iterable of batches
        The training rows; others where there are no training rows any more. Iterated once for each layer and
        once more to find their order, so it must not be exhausted after one pass (a `DataLoader`, a list; not
        a generator). Labels must reach the layers that have label columns.
    held_out : iterable of batches, optional
        Rows that the network was not trained on, in the same form; some hundred are enough to tell whether it
        memorised. Do not measure its accuracy on the same rows afterwards.
    shrink : bool
        False: the exact least-squares fit of `loader`; `held_out` is then only compared with it.
    forward : callable, optional
        ``forward(model, batch)`` runs the model. Default: ``model(**batch)`` for a dict or another mapping,
        ``model(*batch)`` for a tuple or list, else ``model(batch)``. Where metadata come from a context
        (`mdnorm.insert`, `mdnorm.WithMetadata`, a model whose forward takes no metadata and calls its layer
        as ``norm(features)``): a tuple is ``(input, metadata)`` or ``(input, metadata, labels)``, a mapping
        has them as "metadata" and "labels", and may have "weights" and "mask"; the rest of it goes to the
        model, and so do "weights" and "mask" where its forward has an argument of that name. Metadata may be
        a table where the model has a design. Whether the forward of a model of your own takes metadata is
        read off its signature: an argument of that name, or as many arguments as the batch has. For other
        batches give a function that enters `mdnorm.metadata`.
    progress : bool
        Show a progress bar (on a terminal, where tqdm is installed).
    process_group : ProcessGroup, "world", "auto" or "local"
        The processes of which each iterates over its share of the data (none of it, too); the coefficients
        are the same on all. "auto": those of a `DistributedDataParallel`, where the model is one; else this
        process has all data. `forward` gets the model inside the wrapper.

    Returns
    -------
    Recalibration
        ``print`` shows a table: for each layer how much of its coefficients is noise, how much was kept, and
        which share of the effect in the training rows new rows show.

    Warns
    -----
    UserWarning
        New rows show clearly less of the effect than training rows do (p < 0.05 for a layer); or `loader` or
        `held_out` has fewer than five rows a column.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        No layer, none that runs, no samples, an iterator, metadata or labels missing.
    RuntimeError
        Another process of the group failed.

    Notes
    -----
    - The metadata at which nothing is removed stay the mean of `loader`.
    - A layer that runs several times in a forward pass gets the fit over all its inputs.
    - A layer with ``scale=True`` keeps its running scale, and the fit is made behind it.
    - With a mask, and where `nn.TransformerEncoder` makes a nested tensor of padded tokens, every position
      that is no padding counts the same, whatever the batches are padded to.
    - Errors take the rows to be independent, and weights to say how much a row counts, not how often it was
      observed: they are those of ``(Σ w)² / Σ w²`` rows. Several rows of one person count for too much.

    References
    ----------
    See `mdnorm.shrinkage.combine`.
    """
    model, group = group_of(model, process_group)
    for name, rows in (("loader", loader), ("held_out", held_out)):
        if isinstance(rows, Iterator):
            raise ValueError(
                f"{name} is exhausted after one pass, but one is needed for each layer: give a DataLoader or "
                "a list."
            )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MetadataNorm)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MetadataNorm layer.")
    run = forward or _call
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # A compiled graph would pass by the hooks that see a layer's input.
        with torch.no_grad(), uncompiled(), context.labels_of_tables(), _noting_order(layers) as order:
            names = _agreeing(functools.partial(_run_one_batch, model, loader, run), order, group)
            if not names:
                raise ValueError("no MetadataNorm layer ran in the forward pass.")
            done: dict[str, RecalibratedLayer] = {}
            # A layer that runs in later batches only joins the order while this goes on.
            while len(done) < len(names):
                name = next(name for name in names if name not in done)
                what = f"recalibrate {name or 'layer'} ({len(done) + 1}/{len(names)})"
                sources: list[LayerMoments] = []
                for rows in (loader, held_out):
                    if rows is None:
                        continue
                    trained = sources[0].regression() if sources else None
                    source = LayerMoments(name, layers[name], trained)
                    bar = _bar(rows, what + (", held out" if sources else ""), progress)
                    work = functools.partial(_accumulate, model, source, bar, run)
                    names = _agreeing(work, order, group)
                    source.finish(group, "held_out is empty" if sources else "the loader is empty")
                    sources.append(source)
                done[name] = _finish(sources, shrink)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Recalibration(tuple(done.values()))


def _agreeing(work: Callable[[], None], order: list[str], group: ProcessGroup | None) -> list[str]:
    """Do the work of this process; return the layers that ran on any, in an order that all have."""
    if group is None:
        work()
        return order
    failure: Exception | None = None
    has_samples = True
    try:
        work()
    except NoSamplesError:
        has_samples = False
    except Exception as error:
        failure = error
    answers = gather_or_raise((list(order), has_samples), failure, group)
    if not any(has_samples for _, has_samples in answers):
        raise NoSamplesError("no samples: the loader is empty on every process.")
    merged: list[str] = []
    for names, _ in answers:
        merged += [name for name in names if name not in merged]
    return merged


def _call(model: nn.Module, batch: Any) -> Any:
    takes_metadata = any(isinstance(module, WithMetadata) for module in model.modules())
    is_inserted = any(getattr(module, "inserted_after", None) is not None for module in model.modules())
    if takes_metadata or is_inserted or not _takes_batch(model, batch):
        return _call_with_context(model, batch, takes_metadata)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _signature(model: nn.Module) -> inspect.Signature:
    # What torch.compile returns has a forward of any arguments.
    return inspect.signature(getattr(model, "_orig_mod", model).forward)


def _takes_batch(model: nn.Module, batch: Any) -> bool:
    """Whether the forward pass takes a whole batch, metadata and labels included."""
    signature = _signature(model)
    if "metadata" in signature.parameters:
        return True
    if isinstance(batch, Mapping):
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        return takes_any or all(key in signature.parameters for key in batch)
    try:
        signature.bind(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    except TypeError:
        return False
    return True


def split_batch(batch: Any, names: Collection[str]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return what a model is called with, positional and by name, and what a batch has beside that.

    Parameters
    ----------
    batch : tuple, list or mapping
        (input, metadata) or (input, metadata, labels); or a mapping, of which everything else is input.
    names : collection of str
        Keys of a mapping that are not the model's.

    Raises
    ------
    ValueError
        A batch of another form, or without metadata.
    """
    given: dict[str, Any] = {}
    inputs: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        given = {name: batch[name] for name in names if name in batch}
        keywords = {name: value for name, value in batch.items() if name not in names}
    elif isinstance(batch, (tuple, list)) and 2 <= len(batch) <= 3:
        inputs, given = (batch[0],), dict(zip(("metadata", "labels"), batch[1:], strict=False))
    if given.get("metadata") is None:
        missing = ", without 'metadata'" if isinstance(batch, Mapping) and "metadata" not in batch else ""
        raise ValueError(
            f"a batch is {described(batch)}{missing}, but must be (input, metadata), (input, metadata, "
            "labels) or a dict with the key 'metadata'"
        )
    return inputs, keywords, given


def _call_with_context(model: nn.Module, batch: Any, takes_metadata: bool) -> Any:
    names = {"metadata", "labels"} | ({"weights", "mask"} - _signature(model).parameters.keys())
    names |= {"weights", "mask"} if takes_metadata else set()
    try:
        inputs, keywords, given = split_batch(batch, names)
    except ValueError as error:
        raise ValueError(
            f"{error} for a model whose layers take metadata from a context: give forward= a function of "
            "model and batch that enters mdnorm.metadata."
        ) from error
    if takes_metadata:
        return model(*inputs, **given, **keywords)
    with context.metadata(model, **given):
        return model(*inputs, **keywords)


def _bar(loader: Iterable[Any], description: str, progress: bool) -> Iterable[Any]:
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    return _counted(loader, tqdm(total=_length(loader), desc=description, disable=None, leave=False))


def _counted(loader: Iterable[Any], bar: Any) -> Iterable[Any]:
    # Not tqdm(loader): that calls iter() twice, which starts the workers of a DataLoader twice.
    with bar:
        for batch in loader:
            yield batch
            bar.update()


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


@contextmanager
def _noting_order(layers: dict[str, MetadataNorm]) -> Iterator[list[str]]:
    """Names of the layers in the order in which they first run; it grows as they do."""
    order: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if name not in order:
                order.append(name)

        return note

    handles = [layer.register_forward_pre_hook(noting(name)) for name, layer in layers.items()]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _run_one_batch(model: nn.Module, loader: Iterable[Any], run: Forward) -> None:
    for batch in loader:
        run(model, batch)
        return
    raise NoSamplesError("no samples: the loader is empty.")


def _accumulate(model: nn.Module, accumulator: LayerMoments, loader: Iterable[Any], run: Forward) -> None:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        accumulator.add(*arguments, **keywords)

    handle = accumulator.layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in loader:
            run(model, batch)
    finally:
        handle.remove()


def _finish(sources: list[LayerMoments], shrink: bool) -> RecalibratedLayer:
    """Give a layer its coefficients, and return what there is to say about them."""
    source, estimator = sources[0], sources[0].layer.estimator
    assert estimator is not None
    moments = source.moments[0].to("cpu")
    trained, new, found = source.regression(), None, None
    if len(sources) > 1:
        new = sources[1].regression(trained.units)
        found = found_again(trained, [part.to("cpu") for part in sources[1].moments[2:]])
    combined = combine(trained, new, found)
    if shrink:
        moments = with_change(moments, combined.coefficients - trained.coefficients, trained.units)
    if (share := float(source.sums[0]) / moments.weight) != 1:
        # Positions were counted; the prior and the window count samples.
        sums = {name: getattr(moments, name) * share for name in ("weight", "gram", "cross", "squares")}
        moments = dataclasses.replace(moments, **sums)
    estimator.set_moments(moments.to(estimator.origin.device))
    layer = RecalibratedLayer(
        name=source.name,
        rows=source.moments[0].num_rows,
        new_rows=0 if new is None else sources[1].moments[0].num_rows,
        columns=trained.columns,
        standard_errors=trained.errors.reshape(-1, *estimator.num_features).numpy(),
        noise=trained.noise,
        kept=combined.kept if shrink else 1.0,
        found_again=None if found is None else found.share,
        found_again_error=None if found is None else found.error,
        p_value=None if found is None else probability_below(found.share, 1, found.error, NUM_GROUPS - 1),
    )
    for warning in layer.warnings:
        warnings.warn(warning, stacklevel=3)
    return layer
