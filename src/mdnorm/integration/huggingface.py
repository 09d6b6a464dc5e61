"""The Trainer of transformers, with metadata in its batches.

Importing this module needs transformers and accelerate (``pip install 'mdnorm[huggingface]'``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

from torch import nn

from mdnorm import context
from mdnorm.extras import requires
from mdnorm.integration.dependence import select
from mdnorm.integration.recalibrate import recalibrate as _recalibrate

with requires("huggingface"):
    import accelerate  # type: ignore[import-untyped]  # noqa: F401
    from transformers import Trainer

__all__ = ["MetadataTrainer"]


class MetadataTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A `Trainer` that gives the metadata in each batch to the layers that `mdnorm.insert` put into a model.

    In training and evaluation it takes the metadata out of the batch (the model does not know them) and runs
    the model, and the backward pass, inside `mdnorm.metadata`. After training it makes the coefficients exact
    with `mdnorm.recalibrate`.

    Parameters
    ----------
    *args, **kwargs
        Of `Trainer`. The model must have its layers already.
    metadata : str
        Key of the metadata in a batch, (n,) or (n, K_m); the data set and the collator must provide it.
        `remove_unused_columns` spares it.
    protect : str or None
        Key of the labels whose effect is protected in training, the same that the model learns from as a
        rule; None for none. They stay in the batch.
    recalibrate : bool
        Whether to recalibrate at the end of `train`, on the training data, of several processes on the shares
        of all.

    Raises
    ------
    ValueError
        The model has no `MetadataNorm`.
    KeyError
        At the first batch: it has no such key.

    Notes
    -----
    - `Trainer` saves its checkpoints before the recalibration: call ``trainer.save_model()`` after `train`.
    - ``from_pretrained`` fills what the constructor of a class made: let a subclass insert there, with
      `num_metadata`, `num_labels` and `num_features`. The original class loads the folder without the layers.
    - Several GPUs in one process (`nn.DataParallel`) would split the batch and not the metadata: start one
      process for each (``torchrun``, ``accelerate launch``).
    """

    def __init__(
        self,
        *args: Any,
        metadata: str = "metadata",
        protect: str | None = "labels",
        recalibrate: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.metadata_key = metadata
        self.protected_key = protect
        self.recalibrates = recalibrate
        self._network = cast(nn.Module, self.model)
        if not context.slots_of(self._network):
            raise ValueError(
                f"{type(self._network).__name__} has no MetadataNorm: mdnorm.insert(model, after=…) before "
                "the Trainer is made."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        own = [key for key in (self.metadata_key, self.protected_key) if key is not None]
        vars(self)["_signature_columns"] = [*columns, *(key for key in own if key not in columns)]

    @contextmanager
    def _given(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inputs = dict(self._prepare_inputs(inputs))
        metadata = select(inputs, self.metadata_key, "the batch")
        del inputs[self.metadata_key]
        labels = None
        if self.protected_key is not None and (model.training or self.protected_key in inputs):
            labels = select(inputs, self.protected_key, "the batch")
        with context.metadata(model, metadata, labels):
            yield inputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run forward and backward pass inside the context of the batch's metadata."""
        model.train()
        with self._given(model, inputs) as rest:
            return super().training_step(model, rest, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass inside the context of the batch's metadata."""
        with self._given(model, inputs) as rest:
            return super().prediction_step(model, rest, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then recalibrate."""
        result = super().train(*args, **kwargs)
        if self.recalibrates:
            self.recalibrate()
        return result

    def recalibrate(self) -> list[str]:
        """Make the coefficients exact on the training data; see `mdnorm.recalibrate`.

        Returns
        -------
        list of str
            Names of the layers.
        """

        def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
            # Without gradient here, unlike the model in training, whose mode decides whether labels must be.
            inputs = dict(self._prepare_inputs(batch))
            metadata = inputs.pop(self.metadata_key)
            labels = None if self.protected_key is None else select(inputs, self.protected_key, "the batch")
            with self.compute_loss_context_manager(), context.metadata(model, metadata, labels):
                return model(**inputs)

        group: Literal["world", "local"] = "world" if self.args.world_size > 1 else "local"
        return _recalibrate(self._network, self.get_train_dataloader(), forward=forward, process_group=group)
