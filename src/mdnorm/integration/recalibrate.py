"""Coefficients of a whole data set for a trained network, layer after layer, without their noise."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mdnorm import context
from mdnorm.distributed import gather_or_raise, group_of
from mdnorm.integration.bars import with_bar
from mdnorm.integration.batches import Forward, Keys, runner
from mdnorm.integration.layer_moments import NUM_GROUPS, LayerMoments
from mdnorm.integration.recalibration import RecalibratedLayer, Recalibration, probability_below
from mdnorm.integration.uncompiled import uncompiled
from mdnorm.layer import MetadataNorm
from mdnorm.moments import NoSamplesError
from mdnorm.shrinkage import combine, found_again, with_change

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["recalibrate"]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    shrink: bool = True,
    forward: Forward | None = None,
    keys: Keys | None = None,
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
        read off its signature: an argument of that name, or as many arguments as the batch has. Of a mapping
        with "image", as MONAI has them, and a model that knows no such argument, "image" is the input,
        "label" (or "labels") the labels, and "metadata", or else the columns of the model's design, the
        metadata. Tensors are moved to the device of the model. For other batches give `keys`, or a function
        that enters `mdnorm.metadata`.
    keys : mapping, optional
        Instead of `forward`, where the parts of a batch are: ``{"inputs": "image", "metadata": ["age",
        "site"], "labels": "diagnosis"}``, and "weights" and "mask". Each is a key, an index or a function of
        the batch; "inputs", "metadata" and "labels" also a list of them. With a design in the model,
        "metadata" are columns of its table, by default all of them, and "labels" may be its labels as they
        stand in the table.
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
    KeyError, IndexError
        A batch has no such key or index as `keys` says.
    ValueError
        No layer, none that runs, no samples, an iterator, metadata or labels missing; `keys` with another
        name, or beside `forward`.
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
    run = runner(forward, keys)
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
                    bar = with_bar(rows, what + (", held out" if sources else ""), progress)
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
