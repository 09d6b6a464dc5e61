"""Coefficients of a whole data set for a trained network, without their noise."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mdnorm import context
from mdnorm.arrays import plain_features, statistics_dtype
from mdnorm.bars import with_bar
from mdnorm.distributed import gather_results, group_of
from mdnorm.integration.batches import Forward, Keys, evaluating, runner
from mdnorm.integration.dependence import uncompiled
from mdnorm.integration.layer_moments import NUM_GROUPS, LayerMoments
from mdnorm.integration.recalibration import RecalibratedLayer, Recalibration, probability_below
from mdnorm.layer import MetadataNorm
from mdnorm.moments import NoSamplesError
from mdnorm.shrinkage import combine, found_again, with_change
from mdnorm.text import warn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

T = TypeVar("T")


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
    far as the features of a layer together show that they are noise (`mdnorm.shrinkage.combine`). A network
    that memorised its training rows has an effect of the metadata there that new rows do not have: `held_out`
    shows it, and then decides.

    A layer's input changes with the correction of the layers that it depends on, so those come before it: as
    many passes over the data are made as the longest chain of dependent layers has layers. Only moments are
    kept, in float64.

    Parameters
    ----------
    model : nn.Module
        With `MetadataNorm` layers; left in the mode (train or eval) it came in.
    loader : iterable of batches
        The training rows; others where there are no training rows any more. Iterated once for each pass (a
        `DataLoader`, a list; not a generator). Labels must reach the layers that have label columns.
    held_out : iterable of batches, optional
        Rows that the network was not trained on, in the same form; some hundred are enough to tell whether it
        memorised. Do not measure its accuracy on the same rows afterwards.
    shrink : bool
        False: the exact least-squares fit of `loader`; `held_out` is then only compared with it.
    forward : callable, optional
        ``forward(model, batch)`` runs the model; it enters `mdnorm.metadata` where metadata come from a
        context. By default, a model whose own forward takes the metadata (as its signature tells) gets the
        whole batch. Otherwise a batch is ``(input, metadata)``, ``(input, metadata, labels)``, or a mapping
        with "metadata" and perhaps "labels", "weights" and "mask", the rest of which goes to the
        model ("weights" and "mask" too, where its forward has an argument of that name); the page "Into any
        model" has MONAI's. Metadata may be a table where the model has a design. Tensors are moved to the
        device of the model.
    keys : mapping, optional
        Instead of `forward`, where the parts of a batch are: ``{"inputs": "image", "metadata": ["age",
        "site"], "labels": "diagnosis"}``, and "weights" and "mask". Each is a key, an index or a function of
        the batch; "inputs", "metadata" and "labels" also a list of them. With a design in the model they are
        columns of its table, by default all of them.
    progress : bool
        Show a progress bar (on a terminal, where tqdm is installed).
    process_group : ProcessGroup, "world", "auto" or "local"
        The processes of which each iterates over its share of the data (none of it, too); the coefficients
        are the same on all. "auto": those of a `DistributedDataParallel`, where the model is one (`forward`
        gets the model inside it); else this process has all data.

    Returns
    -------
    Recalibration
        ``print`` shows a table.

    Warns
    -----
    UserWarning
        New rows show clearly less of the effect than training rows do (p < 0.05 for a layer); or `loader` or
        `held_out` has fewer than five rows a column.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError, KeyError, IndexError
        No layer, none that runs, no samples, an iterator, metadata or labels missing; both `keys` and
        `forward`; `keys` with an unknown name, or with a key that a batch lacks.
    RuntimeError
        Another process of the group failed.

    Notes
    -----
    - A layer that runs several times in a forward pass gets the fit over all its inputs. One with
      ``scale=True`` keeps its running scale, and the fit is made behind it.
    - The first batch shows which layers depend on each other: a layer depends on the others if its input
      changes when their outputs change. Layers that run only in later batches get one pass each.
    - With a mask (or nested tensors), every position that is no padding counts the same, whatever the batches
      are padded to.
    - Errors take the rows to be independent: several rows of one person count for too much.
    """
    model, group = group_of(model, process_group)
    for name, rows in (("loader", loader), ("held_out", held_out)):
        if isinstance(rows, Iterator):
            raise ValueError(f"{name} is exhausted after one pass: give a DataLoader or a list.")
    layers = context.layers_of(model)
    run = runner(forward, keys)
    # The layers in the order in which they first run.
    order: list[str] = []

    def note(name: str, *_: Any) -> None:
        if name not in order:
            order.append(name)

    # A compiled graph would pass by the hooks that see a layer's input.
    with evaluating(model), torch.no_grad(), uncompiled(), context.labels_of_tables(), _hooked(layers, note):
        agreeing = functools.partial(_agree, order, group)
        loader = _Opened(loader)
        waiting = _passes(model, loader, run, layers, order, agreeing)
        if not waiting:
            raise ValueError("no MetadataNorm layer ran in the forward pass.")
        done: dict[str, RecalibratedLayer] = {}
        for names in waiting:
            what = f"recalibrate {_listing(names, len(done) + 1, len(order))}"
            found: list[list[LayerMoments]] = []
            for rows in (loader, held_out):
                if rows is None:
                    continue
                sources = [LayerMoments(name, layers[name]) for name in names]
                if found:
                    for source, training in zip(sources, found[0], strict=True):
                        source.trained = training.regression()
                bar = with_bar(rows, what + (", held out" if found else ""), progress)
                agreeing(functools.partial(_accumulate, model, sources, bar, run))
                for source in sources:
                    source.finish(group, "held_out is empty" if found else "the loader is empty")
                found.append(sources)
            done |= {each[0].name: _finish(each, shrink) for each in zip(*found, strict=True)}
            # Layers that run in later batches only join the order while this goes on.
            known = {name for each in waiting for name in each}
            waiting += [[name] for name in order if name not in known]
    return Recalibration(tuple(done.values()))


def _agree(order: list[str], group: ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """Return what the work gave on each process with samples; all have the same order of layers then."""
    given = gather_results(lambda: (work(), list(order)), group, NoSamplesError)
    order[:] = dict.fromkeys(name for _, names in given for name in names)
    return [result for result, _ in given]


@contextmanager
def _hooked(layers: Mapping[str, MetadataNorm], before: Callable[..., None]) -> Iterator[None]:
    """Call ``before(name, layer, arguments, keywords)`` whenever a layer runs."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = functools.partial(before, name)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _Opened:
    """A loader of which the first batch is looked at before the first pass, which goes on from there.

    A stream that begins anew for no pass would else lose its first batch in silence.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self.first = loader, list[Any]()
        self.rest: Iterator[Any] | None = None

    def open(self) -> None:
        """Take the first batch, if there is one."""
        self.rest = iter(self.loader)
        self.first = list(itertools.islice(self.rest, 1))

    def __iter__(self) -> Iterator[Any]:
        if self.rest is None:
            return iter(self.loader)
        batches = itertools.chain(self.first, self.rest)
        self.first, self.rest = [], None
        return batches

    def __length_hint__(self) -> int:
        return operator.length_hint(self.loader)


def _passes(
    model: nn.Module,
    loader: _Opened,
    run: Forward,
    layers: dict[str, MetadataNorm],
    order: list[str],
    agreeing: Callable[[Callable[[], Any]], list[Any]],
) -> list[list[str]]:
    """Return the layers that run on the first batch, in groups that depend on those before them alone."""
    plain: dict[str, list[Any]] = {}

    def first_run() -> None:
        loader.open()
        plain.update(_inputs(model, loader, run, layers, changing=False))

    def depending(names: list[str]) -> set[str]:
        some = {name: layers[name] for name in names}
        try:
            changed = _inputs(model, loader, run, some, changing=True)
        except NoSamplesError:
            raise
        except Exception:  # The model refuses such values: nothing is known.
            return set(names)
        return {name for name in names if changed[name] != plain[name]}

    agreeing(first_run)
    groups: list[list[str]] = []
    waiting = list(order)
    while waiting:
        dependent: set[str] = set()
        if len(waiting) > 1:
            dependent = set().union(*agreeing(functools.partial(depending, waiting)))
        # Where each seems to depend on others, the order decides.
        groups.append([name for name in waiting if name not in dependent] or waiting[:1])
        waiting = [name for name in waiting if name not in groups[-1]]
    return groups


def _inputs(
    model: nn.Module, loader: _Opened, run: Forward, layers: Mapping[str, MetadataNorm], *, changing: bool
) -> dict[str, list[Any]]:
    """Return what tells the inputs of each layer from others, as they are or where all put out others."""
    if not loader.first:
        raise NoSamplesError("no samples: the loader is empty.")
    seen: dict[str, list[Any]] = {name: [] for name in layers}

    def note(name: str, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        features = plain_features(arguments[0] if arguments else keywords["features"])
        values = (features.values() if features.is_nested else features).to(statistics_dtype(features.device))
        seen[name].append((values.shape, values.sum().item(), values.square().sum().item()))

    def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * -2 if output.is_nested else output * -2 + 1

    with ExitStack() as stack, _hooked(layers, note):
        for layer in layers.values() if changing else ():
            stack.callback(layer.register_forward_hook(change).remove)
        # A forward of the user's may take things out of the batch, or change its tensors in place.
        run(model, tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, loader.first[0]))
    return seen


def _accumulate(
    model: nn.Module, sources: Sequence[LayerMoments], loader: Iterable[Any], run: Forward
) -> None:
    by_name = {source.name: source for source in sources}

    def add(name: str, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        by_name[name].add(*arguments, **keywords)

    with _hooked({source.name: source.layer for source in sources}, add):
        for batch in loader:
            run(model, batch)


def _listing(names: list[str], first: int, total: int) -> str:
    if len(names) > 1:
        return f"{len(names)} layers ({first}–{first + len(names) - 1}/{total})"
    return f"{names[0] or 'layer'} ({first}/{total})"


def _finish(sources: Sequence[LayerMoments], shrink: bool) -> RecalibratedLayer:
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
        warn(warning)
    return layer
