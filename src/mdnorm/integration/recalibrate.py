"""Exact coefficients for a trained network, layer after layer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdnorm import context
from mdnorm.arrays import design_columns, plain_features, position_mask, row_weights
from mdnorm.distributed import gather_objects, gather_or_raise, group_of
from mdnorm.integration.dependence import described
from mdnorm.integration.uncompiled import uncompiled
from mdnorm.integration.wrapper import WithMetadata
from mdnorm.layer import MetadataNorm, coefficient_shape
from mdnorm.moments import Moments, NoSamplesError
from mdnorm.regression import as_matrix, position_dims

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["recalibrate"]

Forward = Callable[[nn.Module, Any], Any]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: bool = True,
    process_group: ProcessGroupSetting = "auto",
) -> list[str]:
    """Replace the coefficients of every layer by the exact least-squares fit over a data set.

    Running coefficients lag behind the weights and have the noise of their window; these have neither. One
    pass over the data a layer, in the order in which the layers run, since a layer's input changes with the
    correction of those before it; moments are accumulated in float64, so memory does not depend on the size
    of the data set.

    Parameters
    ----------
    model : nn.Module
        With `MetadataNorm` layers; left in the mode (train or eval) it came in.
    loader : iterable of batches
        Iterated once for each layer and once more to find their order, so it must not be exhausted after one
        pass (a `DataLoader`, a list; not a generator). The training data, as a rule. Labels must reach the
        layers that have label columns.
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
    list of str
        Names of the recalibrated layers, in the order in which they run.

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
    - A layer that runs several times in a forward pass gets the fit over all its inputs.
    - A layer with ``scale=True`` keeps its running scale, and the fit is made behind it.
    - With a mask, and where `nn.TransformerEncoder` makes a nested tensor of padded tokens, every position
      that is no padding counts the same, whatever the batches are padded to.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            "loader is exhausted after one pass, but one is needed for each layer: give a DataLoader or "
            "a list."
        )
    model, group = group_of(model, process_group)
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
            done: list[str] = []
            # A layer that runs in later batches only joins the order while this goes on.
            while len(done) < len(names):
                name = next(name for name in names if name not in done)
                bar = _bar(loader, f"recalibrate {name or 'layer'} ({len(done) + 1}/{len(names)})", progress)
                accumulator = _Accumulator(name, layers[name])
                names = _agreeing(functools.partial(_accumulate, model, accumulator, bar, run), order, group)
                accumulator.finish(group)
                done.append(name)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return done


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


class _Accumulator:
    """Float64 moments of the design and the input of one layer."""

    def __init__(self, name: str, layer: MetadataNorm) -> None:
        self.name = name
        self.layer = layer
        self.moments: Moments | None = None
        self.num_samples = 0.0

    def add(
        self,
        features: Tensor,
        metadata: Any = None,
        labels: Any = None,
        weights: Any = None,
        mask: Any = None,
    ) -> None:
        layer = self.layer
        given = None
        if metadata is None:
            given = layer.given_metadata()
            metadata, weights, mask = given.metadata, given.weights, None
            labels = given.labels if labels is None else labels
        if labels is None and layer.num_labels:
            raise ValueError(
                f"the layer {self.name!r} has num_labels={layer.num_labels} but got no labels: the forward "
                "pass of recalibrate must hand them on, as in training."
            )
        features = plain_features(features)
        if features.is_nested:
            if layer.granularity != "channel":
                return  # The layer says next that it cannot take them.
            features, mask = _padded(features, layer.channel_dim)
        elif given is not None and given.mask is not None:
            dims = position_dims(features, layer.granularity, layer.channel_dim)
            mask = given.mask_for(features, dims, f"the layer {self.name!r}")
        try:
            self._add(features, metadata, labels, weights, mask)
        except ValueError as error:
            raise ValueError(f"at the layer {self.name!r}: {error}") from error

    def _add(self, features: Tensor, metadata: Any, labels: Any, weights: Any, mask: Any) -> None:
        layer = self.layer
        dims = position_dims(features, layer.granularity, layer.channel_dim)
        layer.check_features(features, dims)
        where = None if mask is None else position_mask(mask, features, dims)
        labels = None if layer.num_labels == 0 else labels
        columns, num_metadata = design_columns(
            metadata, labels, features, layer.num_metadata, layer.num_labels, True
        )
        num_labels = columns.shape[1] - 1 - num_metadata
        layer.set_sizes(coefficient_shape(features, dims, layer.granularity), num_metadata, num_labels)
        if layer.spread is not None:
            features = layer.spread.evaluate(features, columns[:, num_labels + 1 :], dims, where)
        matrix = as_matrix(features, dims, where, columns.dtype)
        if self.moments is None:
            self.moments = Moments.empty(matrix.shape[1], num_metadata, num_labels, matrix.device)
        design = torch.cat([columns[:, num_labels + 1 :], columns[:, :num_labels]], 1)
        each = of_samples = row_weights(weights, columns, None, dims, True)
        if where is not None:
            # A sample counts as its positions in all, since another batch may be padded to another length.
            positions = where.sum(dims)[:, 0].to(columns.dtype)
            each = positions if of_samples is None else of_samples * positions
            of_samples = (each > 0).to(each) if of_samples is None else of_samples * (each > 0)
        self.num_samples += float(len(columns) if of_samples is None else of_samples.sum())
        self.moments.update(matrix, design, each)

    def share(self, group: ProcessGroup) -> None:
        """Merge the moments of all processes, in the order of their ranks, so that all get the same bits."""
        mine = None
        if self.moments is not None:
            mine = (self.moments.to("cpu"), self.layer.num_features, self.num_samples)
        parts = [part for part in gather_objects(mine, group) if part is not None]
        sizes = sorted({(m.num_metadata, m.num_protected - 1, shape) for m, shape, _ in parts})
        if len(sizes) > 1:
            raise ValueError(
                f"the layer {self.name!r} has different (num_metadata, num_labels, features) on the "
                f"processes: {', '.join(map(str, sizes))}."
            )
        if not parts:
            return
        num_metadata, num_labels, shape = sizes[0]
        assert shape is not None
        self.layer.set_sizes(shape, num_metadata, num_labels)
        self.moments = functools.reduce(Moments.merge, (moments for moments, _, _ in parts))
        self.num_samples = math.fsum(number for _, _, number in parts)

    def finish(self, group: ProcessGroup | None) -> None:
        if group is not None:
            self.share(group)
        estimator = self.layer.estimator
        if self.moments is None or self.moments.weight == 0 or estimator is None:
            raise NoSamplesError("no samples: the loader is empty.")
        moments, share = self.moments, self.num_samples / self.moments.weight
        if share != 1:
            # Positions were counted; the prior and the window count samples.
            sums = {name: getattr(moments, name) * share for name in ("weight", "gram", "cross", "squares")}
            moments = dataclasses.replace(moments, **sums)
        estimator.set_moments(moments.to(estimator.origin.device))


def _padded(features: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Return sequences of several lengths (a nested tensor) with zeros behind their ends, and their mask."""
    ones = torch.nested.as_nested_tensor([torch.ones_like(part) for part in features.unbind()])
    padded, mask = (torch.nested.to_padded_tensor(nested, 0.0) for nested in (features, ones))
    return padded, mask.select(channel_dim, 0) != 0


def _accumulate(model: nn.Module, accumulator: _Accumulator, loader: Iterable[Any], run: Forward) -> None:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        accumulator.add(*arguments, **keywords)

    handle = accumulator.layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in loader:
            run(model, batch)
    finally:
        handle.remove()
