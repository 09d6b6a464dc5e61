"""Give every layer of a model the Gram matrix of the training set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mdnorm.functional import Gram
from mdnorm.layer import MetadataNorm

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["fit_gram"]


def fit_gram(
    model: nn.Module,
    metadata: Tensor | ArrayLike | Iterable[Any],
    labels: Tensor | ArrayLike | None = None,
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

    Returns
    -------
    Gram
        The matrix, to look at or to pass on.

    Raises
    ------
    ValueError
        No `MetadataNorm` in the model, layers of different sizes, no samples, or what
        `mdnorm.functional.design_columns` refuses.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MetadataNorm)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MetadataNorm layer.")
    num_metadata = _common("num_metadata", {name: layer.num_metadata for name, layer in layers.items()})
    num_labels = _common("num_labels", {name: layer.num_labels for name, layer in layers.items()})
    gram = Gram.from_data(metadata, labels, num_metadata=num_metadata, num_labels=num_labels)
    if num_labels and gram.mean.shape[0] == gram.num_metadata:
        raise ValueError(f"labels are needed: the layers have num_labels={num_labels}.")
    for layer in layers.values():
        if layer.estimator.uses_training_gram:
            layer.set_gram(gram)
    return gram


def _common(argument: str, values: dict[str, int | None]) -> int | None:
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        listing = ", ".join(f"{name or 'the layer'}: {value}" for name, value in known.items())
        raise ValueError(
            f"the layers have different {argument} ({listing}): call fit_gram on each with its own metadata."
        )
    return next(iter(known.values()), None)
