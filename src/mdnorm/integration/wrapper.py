"""A model whose forward pass takes the metadata as arguments, around one that knows nothing of them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mdnorm import context

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class WithMetadata(nn.Module):
    """A model that takes ``metadata=``, ``labels=``, ``weights=`` and ``mask=`` for the layers inside.

    The same as ``with mdnorm.metadata(model, …): model(...)``, where a training stack calls the model itself
    and can hand it more arguments, or where these must be split over devices (`nn.DataParallel`) or be inputs
    of an exported graph.

    Parameters
    ----------
    model : nn.Module
        With `MetadataNorm` layers (`mdnorm.insert`). It stays what it is, as the attribute ``model``: save
        ``wrapper.model.state_dict()`` to have its own keys.
    forward_labels : bool
        Hand the labels on to the model as well, as ``labels=``: models of transformers compute their loss
        from them.

    Raises
    ------
    TypeError
        `model` is not a module.

    Examples
    --------
    >>> import torch, mdnorm
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> report = mdnorm.insert(model, after="0", num_metadata=1, num_labels=1)
    >>> model = mdnorm.WithMetadata(model)
    >>> images, age, diagnosis = torch.randn(20, 8), torch.rand(20), torch.rand(20).round()
    >>> model(images, metadata=age, labels=diagnosis).shape
    torch.Size([20, 1])
    """

    def __init__(self, model: nn.Module, *, forward_labels: bool = False) -> None:
        super().__init__()
        context.check_module(model)
        self.model = model
        self.forward_labels = forward_labels
        self._ambiguous = {"weights", "mask"} & inspect.signature(model.forward).parameters.keys()

    def forward(
        self,
        *args: Any,
        metadata: Tensor | ArrayLike | Any = None,
        labels: Tensor | ArrayLike | None = None,
        weights: Tensor | ArrayLike | None = None,
        mask: Tensor | ArrayLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with these metadata.

        Parameters
        ----------
        *args, **kwargs
            Of the model.
        metadata : (N,) or (N, K_m), or a table, optional
            As in `mdnorm.metadata`. Without them the model runs in the context around it, if there is one;
            labels, weights and mask are then given to that context, not here.
        labels : (N,) or (N, K_y), optional
            Needed in training where a layer has label columns.
        weights, mask : optional
            As in `mdnorm.metadata`.

        Returns
        -------
        What the model returns.

        Raises
        ------
        RuntimeError
            There are no metadata, here or in a context.
        ValueError
            Labels without metadata, unless the model itself gets them (`forward_labels`); weights or a mask
            without metadata, or where the model's own forward has an argument of that name; in training,
            labels where no layer has label columns, or none where one has.
        """
        for name, value in (("labels", labels), ("weights", weights), ("mask", mask)):
            if value is not None and name in self._ambiguous:
                raise ValueError(
                    f"{name}= may be meant for the layers or for the model, whose forward has an argument of "
                    f"that name: give it to the model by its position, to the layers by mdnorm.metadata."
                )
            is_for_model = name == "labels" and self.forward_labels
            if value is not None and metadata is None and not is_for_model:
                raise ValueError(
                    f"{name}= was given without metadata=: give both here or to mdnorm.metadata."
                )
        if self.forward_labels and labels is not None:
            kwargs["labels"] = labels
        if metadata is None:
            return self.model(*args, **kwargs)
        with context.metadata(self.model, metadata, labels, weights, mask):
            return self.model(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the settings."""
        return "forward_labels=True" if self.forward_labels else ""
