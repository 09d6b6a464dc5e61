"""Give every layer of a model the Gram matrix of the training set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdnorm import context
from mdnorm.arrays import check_finite_columns, design_blocks, statistics_dtype
from mdnorm.bars import with_bar
from mdnorm.distributed import gather_results, group_of
from mdnorm.integration.batches import Keys, checked_keys, metadata_at
from mdnorm.integration.dependence import described, select
from mdnorm.integration.design import designs_in
from mdnorm.moments import Moments, NoSamplesError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mdnorm.distributed import ProcessGroupSetting

_Parts = tuple[Any, Any, Any]


def fit_gram(
    model: nn.Module,
    metadata: Tensor | ArrayLike | Iterable[Any],
    labels: Tensor | ArrayLike | None = None,
    weights: Tensor | ArrayLike | None = None,
    *,
    keys: Keys | None = None,
    progress: bool = True,
    process_group: ProcessGroupSetting = "auto",
) -> Moments:
    """Compute the Gram matrix of the training metadata and store it in every layer that needs it.

    Needed once before training with ``estimator="dataset"`` (Lu et al., section 3: `G` is a property of the
    training set). The other estimators take from it the origin and the units of the columns, if no batch has
    given them any.

    Parameters
    ----------
    model : nn.Module
        A `MetadataNorm` or a model with such layers inside, all fed with the same metadata.
    metadata : (N, K_m) tensor or array, a table, or an iterable of batches
        The metadata of the whole training set; a table (a dict of columns, a DataFrame) where the model has a
        design. An iterable (a `DataLoader`, a generator) is streamed: each batch is `metadata`, `(metadata,
        labels)`, `(metadata, labels, weights)` or a dict with these keys. In a list or a tuple, write
        `(metadata,)` for `metadata`, which might be a row.
    labels : (N,) or (N, K_y), optional
        Labels where metadata is one table; class indices become one-hot as in the layer.
    weights : (N,), optional
        Of the samples, where metadata is one table.
    keys : mapping, optional
        Where the parts of other batches are, as of `mdnorm.recalibrate`: ``{"metadata": ["age", "site"],
        "labels": "diagnosis"}``; "inputs" and "mask" are not needed, and no error.
    progress, process_group
        As in `mdnorm.recalibrate`.

    Returns
    -------
    Moments
        Those of the design.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError, KeyError, IndexError
        No `MetadataNorm` in the model, layers of different sizes, no samples, `keys` with an unknown name or
        with a key that a batch lacks, or what the layer refuses.
    RuntimeError
        Another process of the group failed.
    """
    model, group = group_of(model, process_group)
    layers = context.layers_of(model)
    num_metadata = _common("num_metadata", {name: layer.num_metadata for name, layer in layers.items()})
    num_labels = _common("num_labels", {name: layer.num_labels for name, layer in layers.items()})
    batches = functools.partial(_batches, model, metadata, labels, weights, checked_keys(keys), progress)
    work = functools.partial(_moments, batches, num_metadata, num_labels)
    # In the order of the ranks, so that all processes get the same bits.
    shares = gather_results(lambda: work() if group is None else work().to("cpu"), group, NoSamplesError)
    moments = functools.reduce(Moments.merge, shares)
    for layer in layers.values():
        layer.set_gram(moments)
    return moments


def _moments(
    batches: Callable[[], Iterable[_Parts]], num_metadata: int | None, num_labels: int | None
) -> Moments:
    """Return the moments of the design of a whole training set, in one call or streamed."""
    moments: Moments | None = None
    for metadata, labels, weights in batches():
        if labels is None and num_labels:
            raise ValueError(f"labels are needed: the layers have num_labels={num_labels}.")
        blocks = design_blocks(metadata, labels, num_metadata, num_labels)
        design = torch.cat([part.detach().to(statistics_dtype(part.device)) for part in blocks.values()], 1)
        check_finite_columns(design, **blocks)
        columns = (blocks["metadata"].shape[1], design.shape[1] - blocks["metadata"].shape[1])
        if moments is None:
            moments = Moments.empty(0, *columns, design.device)
        before = (moments.num_metadata, moments.num_protected - 1)
        if columns != before:
            raise ValueError(
                f"a batch has {columns[0]} metadata column(s) and {columns[1]} of labels, the batches before "
                f"it had {before[0]} and {before[1]}."
            )
        moments.update(design[:, :0], design, weights)
    if moments is None or moments.units is None:
        raise NoSamplesError("no samples: the Gram matrix needs the metadata of the training set.")
    return moments


def _common(argument: str, values: dict[str, int | None]) -> int | None:
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        listing = ", ".join(f"{name or 'the layer'}: {value}" for name, value in known.items())
        raise ValueError(f"the layers have different {argument} ({listing}): call fit_gram on each.")
    return next(iter(known.values()), None)


def _batches(
    model: nn.Module, metadata: Any, labels: Any, weights: Any, keys: dict[str, Any] | None, progress: bool
) -> Iterable[_Parts]:
    """Yield metadata, labels and weights (None without) of the whole training set, or of each batch."""
    is_batch = isinstance(metadata, Mapping) and (keys is not None or "metadata" in metadata)
    is_whole = context.is_table(metadata) or hasattr(metadata, "__array__")
    if is_whole and keys is None and not is_batch:
        yield *context.columns_by_design(model, metadata, labels), weights
        return
    if labels is not None or weights is not None:
        raise ValueError(
            "labels= and weights= are for one table: where metadata is an iterable of batches they come in "
            "it, as (metadata, labels, weights) or by keys=."
        )
    if keys is None and isinstance(metadata, (list, tuple)):
        bare = [part for part in metadata if not (isinstance(part, (tuple, list)) or context.is_table(part))]
        if bare:
            raise ValueError(
                f"metadata is a {type(metadata).__name__} with {described(bare[0])}, which may be rows, "
                "metadata and labels, or batches: join rows to one table (numpy.stack, torch.stack), give "
                "labels as the argument labels, and batches as tuples, (metadata,) or (metadata, labels)."
            )
    for batch in with_bar([metadata] if is_batch else metadata, "Gram matrix", progress):
        yield _parts_of(model, batch, keys)


def _parts_of(model: nn.Module, batch: Any, keys: dict[str, Any] | None) -> _Parts:
    weights = None
    if keys is not None:
        metadata, labels = metadata_at(model, batch, keys.get("metadata"), keys.get("labels"))
        weights = select(batch, keys["weights"], "the batch") if "weights" in keys else None
    elif isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 3:
            raise ValueError(
                "a batch must be metadata, (metadata, labels) or (metadata, labels, weights), got "
                f"{len(batch)} items: select the two from your loader, e.g. ((b[1], b[2]) for b in loader)."
            )
        metadata, labels, weights = [*batch, None, None][:3]
    elif isinstance(batch, Mapping) and ("metadata" in batch or not designs_in(model)):
        metadata = select(batch, "metadata", "the batch (keys= says where its parts are)")
        labels, weights = batch.get("labels"), batch.get("weights")
    else:
        metadata, labels = batch, None
    return *context.columns_by_design(model, metadata, labels), weights
