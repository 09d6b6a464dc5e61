"""Give every layer of a model the Gram matrix of the training set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mdnorm.distributed import gather_or_raise, group_of
from mdnorm.functional import Gram, NoSamplesError
from mdnorm.layer import MetadataNorm

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["fit_gram"]


def fit_gram(
    model: nn.Module,
    metadata: Tensor | ArrayLike | Iterable[Any],
    labels: Tensor | ArrayLike | None = None,
    *,
    process_group: ProcessGroupSetting = "auto",
) -> Gram:
    """Compute the Gram matrix of the training metadata and store it in every layer that needs it.

    Needed once before training with ``estimator="dataset"`` (Lu et al., section 3: `G` is a property of the
    training set). Layers whose estimator does not use it are left as they are.

    Parameters
    ----------
    model : nn.Module
        A `MetadataNorm` or a model with such layers inside, all fed with the same metadata.
    metadata : (N, K_m) tensor or array, or an iterable of batches
        The metadata of the whole training set. An iterable (a `DataLoader`, a generator) is streamed: each
        batch is `metadata`, `(metadata, labels)` or a dict with these keys.
    labels : (N,) or (N, K_y), optional
        Labels where metadata is one table; class indices become one-hot as in the layer.
    process_group : ProcessGroup, "world", "auto" or "local"
        The processes of which each gives its share of the training set (none of it, too); the matrix is the
        same on all. "auto": those of a `DistributedDataParallel`, where the model is one; else this process
        has the whole set.

    Returns
    -------
    Gram
        The matrix, to look at or to pass on.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        No `MetadataNorm` in the model, layers of different sizes, no samples, or what
        `mdnorm.functional.design_columns` refuses.
    RuntimeError
        Another process of the group failed.
    """
    model, group = group_of(model, process_group)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MetadataNorm)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MetadataNorm layer.")
    num_metadata = _common("num_metadata", {name: layer.num_metadata for name, layer in layers.items()})
    num_labels = _common("num_labels", {name: layer.num_labels for name, layer in layers.items()})
    if group is None:
        gram = _gram(metadata, labels, num_metadata, num_labels)
    else:
        gram = _shared_gram(metadata, labels, num_metadata, num_labels, group)
    for layer in layers.values():
        if layer.estimator.uses_training_gram:
            layer.set_gram(gram)
    return gram


def _gram(metadata: Any, labels: Any, num_metadata: int | None, num_labels: int | None) -> Gram:
    gram = Gram.from_data(metadata, labels, num_metadata=num_metadata, num_labels=num_labels)
    if num_labels and gram.mean.shape[0] == gram.num_metadata:
        raise ValueError(f"labels are needed: the layers have num_labels={num_labels}.")
    return gram


def _shared_gram(
    metadata: Any, labels: Any, num_metadata: int | None, num_labels: int | None, group: ProcessGroup
) -> Gram:
    """Merge the matrices of all processes, in the order of their ranks, so that all get the same bits."""
    gram: Gram | None = None
    failure: Exception | None = None
    try:
        gram = _gram(metadata, labels, num_metadata, num_labels)
    except NoSamplesError:
        pass
    except Exception as error:
        failure = error
    shares = [share for share in gather_or_raise(_on_cpu(gram), failure, group) if share is not None]
    if not shares:
        raise NoSamplesError(
            "no samples on any process: the Gram matrix needs the metadata of the training set."
        )
    widths = sorted({(share.num_metadata, share.mean.shape[0] - share.num_metadata) for share in shares})
    if len(widths) > 1:
        raise ValueError(
            "the processes have different numbers of (metadata, label) columns: "
            f"{', '.join(map(str, widths))}."
        )
    merged = shares[0]
    for share in shares[1:]:
        merged = merged.merge(share)
    return merged


def _on_cpu(gram: Gram | None) -> Gram | None:
    if gram is None:
        return None
    return Gram(gram.mean.cpu(), gram.covariance.cpu(), gram.count.cpu(), gram.num_metadata)


def _common(argument: str, values: dict[str, int | None]) -> int | None:
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        listing = ", ".join(f"{name or 'the layer'}: {value}" for name, value in known.items())
        raise ValueError(
            f"the layers have different {argument} ({listing}): call fit_gram on each with its own metadata."
        )
    return next(iter(known.values()), None)
