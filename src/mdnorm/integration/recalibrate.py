"""Coefficients of a whole data set for a trained network, layer after layer, without what is noise in them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdnorm import context
from mdnorm.arrays import design_columns, plain_features, position_mask, row_weights
from mdnorm.distributed import gather_objects, gather_or_raise, group_of
from mdnorm.integration.dependence import described
from mdnorm.integration.recalibration import RecalibratedLayer, Recalibration, probability_below
from mdnorm.integration.uncompiled import uncompiled
from mdnorm.integration.wrapper import WithMetadata
from mdnorm.layer import MetadataNorm, coefficient_shape
from mdnorm.moments import Moments, NoSamplesError
from mdnorm.regression import Standardisation, as_matrix, position_dims
from mdnorm.shrinkage import Regression, combine, effect, found_again, independent_features, with_change

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["recalibrate"]

Forward = Callable[[nn.Module, Any], Any]

# Groups of rows whose differences tell the error of what is found again.
_GROUPS = 20
# Features whose correlations are looked at.
_SOME_FEATURES = 256


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
                sources = []
                for rows in (loader, held_out):
                    if rows is None:
                        continue
                    trained = sources[0].regression() if sources else None
                    source = _Accumulator(name, layers[name], trained)
                    bar = _bar(rows, what + (", held out" if sources else ""), progress)
                    work = functools.partial(_accumulate, model, source, bar, run)
                    names = _agreeing(work, order, group)
                    source.finish(group, "held_out" if sources else "loader")
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


class _Accumulator:
    """Float64 moments of the design and the input of one layer, and what the errors take beside them."""

    def __init__(self, name: str, layer: MetadataNorm, trained: Regression | None = None) -> None:
        self.name = name
        self.layer = layer
        self.trained = trained
        # Of all features; of some of them in the place of metadata; of their projections in groups of rows.
        self.moments: list[Moments] = []
        # Number of samples, of rows so far, sum of the weights and of their squares.
        self.sums = torch.zeros(4, dtype=torch.float64)
        self._some = torch.zeros(0, dtype=torch.int64)
        self._projection = torch.zeros(0, 0)

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
        design = torch.cat([columns[:, num_labels + 1 :], columns[:, :num_labels]], 1)
        if not self.moments:
            self._start(matrix, num_metadata, num_labels)
        each = of_samples = row_weights(weights, columns, None, dims, True)
        if where is not None:
            # A sample counts as its positions in all, since another batch may be padded to another length.
            positions = where.sum(dims)[:, 0].to(columns.dtype)
            each = positions if of_samples is None else of_samples * positions
            of_samples = (each > 0).to(each) if of_samples is None else of_samples * (each > 0)
        self.moments[0].update(matrix, design, each)
        self.moments[1].update(matrix[:, :0], torch.cat([matrix[:, self._some], design], 1), each)
        if self.trained is not None:
            projected = matrix @ self._projection
            of_group = (torch.arange(len(matrix), device=matrix.device) + int(self.sums[1])) % _GROUPS
            for number in of_group.unique().tolist():
                rows = of_group == number
                self.moments[2 + number].update(
                    projected[rows], design[rows], None if each is None else each[rows]
                )
        ones = torch.ones(len(columns)) if each is None else each
        samples = ones if of_samples is None else of_samples
        sums = [samples.sum(), len(columns), ones.sum(), ones.square().sum()]
        self.sums += torch.tensor([float(value) for value in sums], dtype=torch.float64)

    def _start(self, matrix: Tensor, num_metadata: int, num_labels: int) -> None:
        total, device = matrix.shape[1], matrix.device
        # Any would do: the same on all processes.
        some = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:_SOME_FEATURES]
        self._some = some.to(device)
        sizes = [(total, num_metadata, num_labels), (0, len(some), num_metadata + num_labels)]
        if self.trained is not None:
            values = effect(self.trained)[1]
            weights = torch.where(self.trained.deviation > 0, 1 / self.trained.deviation, 0) * values
            self._projection = weights.mT.to(matrix)
            sizes += [(len(values), num_metadata, num_labels)] * _GROUPS
        self.moments = [Moments.empty(*numbers, device) for numbers in sizes]

    def share(self, group: ProcessGroup) -> None:
        """Merge the moments of all processes, in the order of their ranks, so that all get the same bits."""
        mine = None
        if self.moments:
            mine = ([part.to("cpu") for part in self.moments], self.layer.num_features, self.sums)
        parts = [part for part in gather_objects(mine, group) if part is not None]
        sizes = sorted({(m[0].num_metadata, m[0].num_protected - 1, shape) for m, shape, _ in parts})
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
        of_processes = zip(*(moments for moments, _, _ in parts), strict=True)
        self.moments = [functools.reduce(Moments.merge, same) for same in of_processes]
        self.sums = functools.reduce(torch.add, (sums for _, _, sums in parts))

    def finish(self, group: ProcessGroup | None, called: str) -> None:
        if group is not None:
            self.share(group)
        if not self.moments or self.moments[0].weight == 0 or self.layer.estimator is None:
            raise NoSamplesError(f"no samples: the {called} is empty.")

    def regression(self, units: Standardisation | None = None) -> Regression:
        """Return the fit with its errors, on the CPU."""
        assert self.layer.estimator is not None
        whole, some = (part.to("cpu") for part in self.moments[:2])
        units = units or whole.units
        assert units is not None
        rows = float(self.sums[2].square() / self.sums[3])
        features = independent_features(some, whole.cross.shape[1])
        return Regression.of(whole, units, rows, features, self.layer.estimator.coefficients.dtype)


def _finish(sources: list[_Accumulator], shrink: bool) -> RecalibratedLayer:
    """Give a layer its coefficients, and return what there is to say about them."""
    source, estimator = sources[0], sources[0].layer.estimator
    assert estimator is not None
    moments = source.moments[0].to("cpu")
    units = moments.units
    assert units is not None
    trained, new, found = source.regression(), None, None
    if len(sources) > 1:
        new = sources[1].regression(units)
        found = found_again(trained, [part.to("cpu") for part in sources[1].moments[2:]], units)
    combined = combine(trained, new, found)
    if shrink:
        moments = with_change(moments, combined.coefficients - trained.coefficients, units)
    if (share := float(source.sums[0]) / moments.weight) != 1:
        # Positions were counted; the prior and the window count samples.
        sums = {name: getattr(moments, name) * share for name in ("weight", "gram", "cross", "squares")}
        moments = dataclasses.replace(moments, **sums)
    estimator.set_moments(moments.to(estimator.origin.device))
    squares = trained.standardised(trained.coefficients).square()
    scale = units.scale[-len(trained.coefficients) :].unsqueeze(1)
    layer = RecalibratedLayer(
        name=source.name,
        rows=source.moments[0].num_rows,
        new_rows=sources[1].moments[0].num_rows if new is not None else 0,
        columns=round(trained.columns),
        standard_errors=(trained.errors * scale).reshape(-1, *estimator.num_features).numpy(),
        noise=min(1 / max(float(squares.mean()), 1.0), 1.0) if squares.numel() else 1.0,
        kept=combined.kept if shrink else 1.0,
        found_again=None if found is None else found.share,
        found_again_error=None if found is None else found.error,
        p_value=None if found is None else probability_below(found.share, 1, found.error, _GROUPS - 1),
    )
    called = f"the layer {layer.name!r}" if layer.name else "the layer"
    if layer.memorised:
        warnings.warn(f"{called}: {layer.verdict} (p = {layer.p_value:.2g}).", stacklevel=3)
    if layer.has_few_rows:
        shown = f"{layer.rows} row(s)" + (f" and {layer.new_rows} new one(s)" if layer.new_rows else "")
        warnings.warn(
            f"{called} was recalibrated on {shown} for {layer.columns} column(s) of metadata and labels: with "
            "fewer than five a column the correction is mostly noise, or nothing. Give more rows, or fewer "
            "columns.",
            stacklevel=3,
        )
    return layer


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
