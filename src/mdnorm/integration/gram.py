"""Give every layer of a model the Gram matrix of the training set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdnorm import context
from mdnorm.arrays import check_finite_columns, columns_of, label_columns, statistics_dtype
from mdnorm.distributed import gather_or_raise, group_of
from mdnorm.integration.bars import with_bar
from mdnorm.integration.batches import Keys, checked_keys, metadata_at
from mdnorm.integration.dependence import select
from mdnorm.integration.design import AttachedDesign
from mdnorm.layer import MetadataNorm
from mdnorm.moments import Moments, NoSamplesError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["fit_gram"]

_WHAT = "Gram matrix"
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
        labels)`, `(metadata, labels, weights)` or a dict with these keys.
    labels : (N,) or (N, K_y), optional
        Labels where metadata is one table; class indices become one-hot as in the layer.
    weights : (N,), optional
        Of the samples, where metadata is one table.
    keys : mapping, optional
        Where the parts of other batches are, as of `mdnorm.recalibrate`: ``{"metadata": ["age", "site"],
        "labels": "diagnosis"}``; "inputs" and "mask" are not needed, and no error.
    progress : bool
        Show a progress bar for an iterable of batches (on a terminal, where tqdm is installed).
    process_group : ProcessGroup, "world", "auto" or "local"
        The processes of which each gives its share of the training set (none of it, too); the matrix is the
        same on all. "auto": those of a `DistributedDataParallel`, where the model is one; else this process
        has the whole set.

    Returns
    -------
    Moments
        Those of the design, to look at.

    Raises
    ------
    TypeError
        `model` is not a module.
    KeyError, IndexError
        A batch has no such key or index as `keys` says.
    ValueError
        No `MetadataNorm` in the model, layers of different sizes, no samples, `keys` with another name, or
        what the layer refuses.
    RuntimeError
        Another process of the group failed.
    """
    model, group = group_of(model, process_group)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MetadataNorm)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MetadataNorm layer.")
    num_metadata = _common("num_metadata", {name: layer.num_metadata for name, layer in layers.items()})
    num_labels = _common("num_labels", {name: layer.num_labels for name, layer in layers.items()})
    has_design = any(isinstance(module, AttachedDesign) for module in model.modules())
    designed = model if has_design else None
    numbers = num_metadata, num_labels
    batches = functools.partial(_batches, metadata, labels, weights, *numbers, designed, progress)
    if (places := checked_keys(keys)) is not None:
        if labels is not None or weights is not None:
            raise ValueError("labels and weights come with each batch, where keys say what is where.")
        batches = functools.partial(_batches_at, model, metadata, places, progress)
    work = functools.partial(_moments, batches, *numbers)
    moments = work() if group is None else _shared_moments(work, group)
    for layer in layers.values():
        layer.set_gram(moments)
    return moments


def _moments(
    batches: Callable[[], Iterable[_Parts]], num_metadata: int | None, num_labels: int | None
) -> Moments:
    """Return the moments of the design of a whole training set, in one call or streamed."""
    moments: Moments | None = None
    for metadata, labels, weights in batches():
        block = columns_of(metadata, "metadata", num_columns=num_metadata)
        blocks = {"metadata": block}
        if labels is not None:
            columns = label_columns(labels, num_labels)
            blocks["labels"] = columns_of(columns, "labels", num_samples=len(block), num_columns=num_labels)
        elif num_labels:
            raise ValueError(f"labels are needed: the layers have num_labels={num_labels}.")
        design = torch.cat([part.detach().to(statistics_dtype(part.device)) for part in blocks.values()], 1)
        check_finite_columns(design, **blocks)
        if moments is None:
            moments = Moments.empty(0, block.shape[1], design.shape[1] - block.shape[1], design.device)
        width = len(moments.gram) - 1
        if design.shape[1] != width:
            raise ValueError(
                f"a batch has {design.shape[1]} design columns, the batches before it had {width}."
            )
        moments.update(design[:, :0], design, weights)
    if moments is None or moments.units is None:
        raise NoSamplesError("no samples: the Gram matrix needs the metadata of the training set.")
    return moments


def _shared_moments(work: Callable[[], Moments], group: ProcessGroup) -> Moments:
    """Merge the moments of all processes, in the order of their ranks, so that all get the same bits."""
    mine: Moments | None = None
    failure: Exception | None = None
    try:
        mine = work().to("cpu")
    except NoSamplesError:
        pass
    except Exception as error:
        failure = error
    shares = [share for share in gather_or_raise(mine, failure, group) if share is not None]
    if not shares:
        raise NoSamplesError(
            "no samples on any process: the Gram matrix needs the metadata of the training set."
        )
    widths = sorted({(share.num_metadata, share.num_protected - 1) for share in shares})
    if len(widths) > 1:
        raise ValueError(
            "the processes have different numbers of (metadata, label) columns: "
            f"{', '.join(map(str, widths))}."
        )
    return functools.reduce(Moments.merge, shares)


def _common(argument: str, values: dict[str, int | None]) -> int | None:
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        listing = ", ".join(f"{name or 'the layer'}: {value}" for name, value in known.items())
        raise ValueError(
            f"the layers have different {argument} ({listing}): call fit_gram on each with its own metadata."
        )
    return next(iter(known.values()), None)


def _batches(
    metadata: Any,
    labels: Any,
    weights: Any,
    num_metadata: int | None,
    num_labels: int | None,
    model: nn.Module | None,
    progress: bool,
) -> Iterable[_Parts]:
    """Yield the batches; `model` is one with a design, which turns tables into columns."""
    if model is not None and _is_table(metadata):
        yield *context.columns_by_design(model, metadata, labels), weights
        return
    if _is_array(metadata) or (
        isinstance(metadata, (list, tuple)) and metadata and _is_number_table(metadata)
    ):
        yield metadata, labels, weights
        return
    if labels is not None or weights is not None:
        raise ValueError(
            "labels and weights come with each batch, as (metadata, labels, weights), "
            "when metadata is an iterable."
        )
    if _names_its_parts(metadata) or _is_pair(metadata, num_labels):
        yield _parts_of(metadata, model)
        return
    _refuse_rows(metadata, num_metadata)
    for batch in with_bar(metadata, _WHAT, progress):
        yield _parts_of(batch, model)


def _batches_at(model: nn.Module, metadata: Any, keys: dict[str, Any], progress: bool) -> Iterable[_Parts]:
    """Yield the batches whose parts are at these keys."""
    loader = [metadata] if isinstance(metadata, Mapping) else metadata
    for batch in with_bar(loader, _WHAT, progress):
        found = metadata_at(model, batch, keys.get("metadata"), keys.get("labels"))
        weights = select(batch, keys["weights"], "the batch") if "weights" in keys else None
        yield *context.columns_by_design(model, *found), weights


def _is_table(values: Any) -> bool:
    # What has the key is a batch.
    return context.is_table(values) and not (isinstance(values, Mapping) and "metadata" in values)


def _parts_of(batch: Any, model: nn.Module | None) -> _Parts:
    """Return metadata, labels and weights (None without) of what stands for a batch."""
    parts = (batch, None, None) if model is not None and _is_table(batch) else _named_parts(batch)
    return parts if model is None else (*context.columns_by_design(model, *parts[:2]), parts[2])


def _named_parts(batch: Any) -> _Parts:
    if isinstance(batch, Mapping):
        if "metadata" not in batch:
            raise ValueError(
                f"a batch has the keys {sorted(map(str, batch))}: metadata must be under 'metadata', labels "
                "under 'labels'. Select them from your loader, e.g. ((b['age'], b['y']) for b in loader)."
            )
        return batch["metadata"], batch.get("labels"), batch.get("weights")
    if not isinstance(batch, (tuple, list)):
        return batch, None, None
    if not 2 <= len(batch) <= 3:
        raise ValueError(
            "a batch must be metadata, (metadata, labels) or (metadata, labels, weights), got "
            f"{len(batch)} items: select the two from your loader, e.g. ((b[1], b[2]) for b in loader)."
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def _names_its_parts(values: Any) -> bool:
    """Whether this is a mapping or a named pair (`mdnorm.design.DesignMatrices`): no sequence of batches."""
    return isinstance(values, Mapping) or getattr(values, "_fields", None) == ("metadata", "labels")


def _is_pair(values: Any, num_labels: int | None) -> bool:
    """Whether two arrays are metadata and labels, no batches of metadata; raise where that is open."""
    if not isinstance(values, (list, tuple)) or len(values) != 2 or not all(map(_is_array, values)):
        return False
    if num_labels is not None:
        return num_labels > 0
    if len(values[0]) != len(values[1]):
        return False
    raise ValueError(
        "metadata is a sequence of two arrays with the same number of rows, which may be metadata and labels "
        "or two batches: give the labels as the argument labels, or the batches joined to one table."
    )


def _refuse_rows(values: Any, num_metadata: int | None) -> None:
    """Raise where a list of 1-dimensional arrays may be the rows of a table."""
    if not isinstance(values, (list, tuple)) or not values or num_metadata == 1:
        return
    if not all(_is_array(row) and row.ndim == 1 for row in values):
        return
    lengths = {len(row) for row in values}
    if len(lengths) == 1 and lengths != {1}:
        raise ValueError(
            f"metadata is a sequence of {len(values)} 1-dimensional arrays of {lengths.pop()} values, which "
            "may be the rows of a table or batches of one column: join rows to one table (numpy.stack, "
            "torch.stack), or give batches as columns, (n, 1)."
        )


def _is_array(values: Any) -> bool:
    return isinstance(values, Tensor) or hasattr(values, "__array__")


def _is_number_table(values: list[Any] | tuple[Any, ...]) -> bool:
    first = values[0]
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, (bool, int, float))
