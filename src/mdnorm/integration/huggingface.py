"""The Trainer of transformers, with metadata in its batches.

Importing this module needs transformers and accelerate (``pip install 'mdnorm[huggingface]'``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from mdnorm import context
from mdnorm.extras import requires
from mdnorm.integration.batches import metadata_at
from mdnorm.integration.dependence import select
from mdnorm.integration.recalibrate import recalibrate as _recalibrate
from mdnorm.integration.recalibrated import recalibrated, unchanged_loaders
from mdnorm.integration.recalibration import Recalibration

with requires("huggingface"):
    import accelerate  # type: ignore[import-untyped]  # noqa: F401
    from transformers import Trainer


class MetadataTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A `Trainer` that gives the metadata in each batch to the layers that `mdnorm.insert` put into a model.

    In training and evaluation it takes the metadata out of the batch (the model does not know them) and runs
    the model, and the backward pass, inside `mdnorm.metadata`.

    Parameters
    ----------
    *args, **kwargs
        Of `Trainer`. The model must have its layers already.
    metadata : str or list of str
        Key of the metadata in a batch, (n,) or (n, K_m) or a table. A list of keys gives one column each, or
        the table of the model's design. `remove_unused_columns` spares them.
    labels : str or None
        Key of the labels whose effect is protected in training, the same that the model learns from as a
        rule; None for none. They stay in the batch.
    weights : str or None
        Key of the weights of the samples in the fit (see `mdnorm.balancing_weights`); None: all count the
        same. The model does not get them; the attribute `batch_weights` has those of the batch, for a
        `compute_loss` of your own.
    mask : str or None
        Key of the mask of the tokens that count, in batches that have it; it stays in the batch. See
        `mdnorm.metadata` for the layers that use it. None: padding counts as data.
    recalibrate : bool
        Whether to `mdnorm.recalibrate` at the end of `train`, on the training data of all processes.
    evaluate_recalibrated : bool, optional
        Whether an evaluation during `train` is made inside `mdnorm.recalibrated`, so that early stopping and
        the best checkpoint go by the model as it will be used. By default as `recalibrate`.
    held_out : bool
        Whether the recalibration after training also uses the evaluation data set, which decides where the
        network memorised. The accuracy on these rows is then no longer that on new ones.

    Raises
    ------
    ValueError
        The model has no `MetadataNorm`, or none with label columns for `labels`; `held_out` without an
        `eval_dataset`.
    KeyError
        At the first batch: it has no such key.

    Notes
    -----
    - `Trainer` saves its checkpoints before the recalibration: call ``trainer.save_model()`` after `train`.
      With ``load_best_model_at_end=True`` it is the best model that is recalibrated.
    - ``from_pretrained`` loads weights into what the constructor made: insert in that of a subclass, with
      `num_metadata`, `num_labels` and `num_features`. The original class loads the folder without the layers.
    - Several GPUs in one process (`nn.DataParallel`) would split the batch and not the metadata: start one
      process for each (``torchrun``, ``accelerate launch``).
    """

    def __init__(
        self,
        *args: Any,
        metadata: str | list[str] = "metadata",
        labels: str | None = "labels",
        weights: str | None = None,
        mask: str | None = "attention_mask",
        recalibrate: bool = True,
        evaluate_recalibrated: bool | None = None,
        held_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.metadata_key = metadata
        self._metadata_keys = [metadata] if isinstance(metadata, str) else list(metadata)
        self.labels_key = labels
        self.weights_key = weights
        self.mask_key = mask
        self.batch_weights: Any = None
        self.recalibrates = recalibrate
        self.evaluates_recalibrated = recalibrate if evaluate_recalibrated is None else evaluate_recalibrated
        # The loader of these passes, and whether one is under way.
        self._pass_loader: tuple[Any, Any] = (None, None)
        self._is_recalibrated = False
        self.held_out = held_out
        if held_out and self.eval_dataset is None:
            raise ValueError("held_out=True takes the rows of eval_dataset: give one.")
        self._network = cast(nn.Module, self.model)
        layers = context.layers_of(self._network)
        if labels is not None and all(layer.num_labels == 0 for layer in layers.values()):
            raise ValueError(
                f"labels={labels!r}, but every MetadataNorm of the model has num_labels=0: give "
                "mdnorm.insert the number of label columns, or labels=None for none."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        own = (*self._metadata_keys, self.labels_key, self.weights_key)
        wanted = [key for key in own if key is not None and key not in columns]
        vars(self)["_signature_columns"] = [*columns, *wanted]

    @contextmanager
    def _given(self, model: nn.Module, inputs: dict[str, Any], with_labels: bool) -> Iterator[dict[str, Any]]:
        """Give the layers what is theirs in a batch; yield the model's part of it."""
        inputs = dict(self._prepare_inputs(inputs))
        labels_key = self.labels_key if with_labels or self.labels_key in inputs else None
        metadata, labels = metadata_at(self._network, inputs, self.metadata_key, labels_key)
        for key in self._metadata_keys:
            del inputs[key]
        weights = None
        if self.weights_key is not None and (with_labels or self.weights_key in inputs):
            weights = select(inputs, self.weights_key, "the batch")
            del inputs[self.weights_key]
        mask = None if self.mask_key is None else inputs.get(self.mask_key)
        # Models also take masks between pairs of tokens, which are none of positions.
        mask = None if mask is None or mask.ndim != 2 else mask
        self.batch_weights = weights
        try:
            with context.metadata(model, metadata, labels, weights, mask):
                yield inputs
        finally:
            self.batch_weights = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run forward and backward pass inside the context of the batch's metadata."""
        model.train()
        with self._given(model, inputs, True) as rest:
            return super().training_step(model, rest, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass inside the context of the batch's metadata."""
        with self._given(model, inputs, False) as rest:
            return super().prediction_step(model, rest, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then recalibrate."""
        result = super().train(*args, **kwargs)
        if self.recalibrates:
            self.recalibrate()
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, during training with the coefficients of the whole training data."""
        # Of several data sets it calls itself for each.
        if not (self.evaluates_recalibrated and self.is_in_train) or self._is_recalibrated:
            return super().evaluate(*args, **kwargs)
        with unchanged_loaders():
            # Made once: accelerate remembers every loader that it prepares.
            if self._pass_loader[0] is not self.train_dataset or self._pass_loader[1] is None:
                self._pass_loader = (self.train_dataset, self.get_train_dataloader())
        loader = self._pass_loader[1]
        try:
            with recalibrated(self._network, loader, **self._recalibration_options()):
                self._is_recalibrated = True
                return super().evaluate(*args, **kwargs)
        finally:
            self._is_recalibrated = False

    def recalibrate(self) -> Recalibration:
        """Take the coefficients of the whole training data, as `mdnorm.recalibrate`."""
        # accelerate would think that a loader which was left in between is still gone through.
        with unchanged_loaders():
            return _recalibrate(
                self._network,
                self.get_train_dataloader(),
                held_out=self.get_eval_dataloader() if self.held_out else None,
                **self._recalibration_options(),
            )

    def _recalibration_options(self) -> dict[str, Any]:
        def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
            with self.compute_loss_context_manager(), self._given(model, batch, True) as inputs:
                return model(**inputs)

        group = "world" if self.args.world_size > 1 else "local"
        return {"forward": forward, "process_group": group, "progress": not self.args.disable_tqdm}
