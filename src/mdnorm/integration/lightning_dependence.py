"""Lightning callback: what a layer knows about the metadata, logged after each validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.extras import requires
from mdnorm.integration.batches import columns_at
from mdnorm.integration.dependence import LayerOutputs, Selector, select
from mdnorm.metrics.reservoir import ColumnNames, TooFewSamplesError, as_class_indices
from mdnorm.text import warn

with requires("lightning"):
    from mdnorm.metrics.streaming import DistanceCorrelation

    try:
        from lightning.pytorch import Callback as Callback
    except ModuleNotFoundError as error:
        try:
            from pytorch_lightning import Callback  # type: ignore[assignment]
        except ModuleNotFoundError:
            raise error from None

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class DependenceCallback(Callback):
    """Log, after each validation, the distance correlation of a layer's output with the metadata.

    Logs ``dcor2/<column>`` for each metadata column, and ``dcor2/joint`` for all columns together where there
    are several, with ``pl_module.log``, so that `EarlyStopping` and `ModelCheckpoint` can monitor them. The
    value is that of `mdnorm.metrics.DistanceCorrelation`, over the samples of all processes.

    Parameters
    ----------
    layer, output, max_samples, seed
        As in `mdnorm.integration.DependenceRecorder`.
    metadata : str, int, callable, or list of them
        Where the metadata are in a validation batch: a key (or the name of an attribute), an index, or a
        function of the batch, that gives (n,) or (n, K). A list of them gives one column each.
    labels : str, int or callable, optional
        Where class indices are in the batch. If given, the dependence is measured within each class, and
        logged as ``dcor2/<column>/label_<class>``.
    column_names : sequence of str, or mapping from str to sequence of int, optional
        Names of the columns; default: the key of a single column or the keys in a list, ``key_0, key_1, …``
        for the columns of one key, else ``column_0, column_1, …``. A mapping gives a name to several columns
        that belong together.
    prefix : str
        Of the logged names. Give one for each layer if you measure several.

    Raises
    ------
    TypeError, ValueError
        A wrong setting; at the start of a fit, no such layer; at the first batch, another number of rows in
        the layer's output than in the metadata.
    KeyError, IndexError
        At the first batch: it has no such key or index. The message lists the keys that there are.

    Notes
    -----
    - The sanity check before a fit is not measured, and of several validation loaders only the first is:
      pooled, differences between them would pass for dependence.
    - Too few samples (fewer than 4, in all or of a class; a ``fast_dev_run``, say): a warning, and nothing is
      logged.
    - A model compiled by `torch.compile` runs uncompiled while it is measured.

    Examples
    --------
    >>> callback = DependenceCallback("encoder", metadata=["age", "sex"], labels="diagnosis")
    >>> callback.column_names
    ['age', 'sex']

    Then ``Trainer(callbacks=[callback, EarlyStopping("dcor2/age/label_0")])``.
    """

    def __init__(
        self,
        layer: str | torch.nn.Module,
        metadata: Selector | list[Selector],
        labels: Selector | None = None,
        *,
        column_names: ColumnNames | None = None,
        output: Selector | None = None,
        max_samples: int | None = 2000,
        seed: int = 0,
        prefix: str = "dcor2",
    ) -> None:
        super().__init__()
        if isinstance(metadata, (list, tuple)):
            if not metadata:
                raise ValueError("metadata is an empty list: give at least one key of the batch.")
            if column_names is None and all(isinstance(part, str) for part in metadata):
                column_names = [str(part) for part in metadata]
        self.layer = layer
        self.metadata = metadata
        self.labels = labels
        self.column_names = column_names
        self.output = output
        self.prefix = prefix
        self._metric = DistanceCorrelation(
            labels is not None, max_samples, seed, per_column=True, column_names=column_names
        )
        # While a validation is recorded.
        self._outputs: LayerOutputs | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the layer, so that a wrong name fails before training."""
        LayerOutputs(pl_module, self.layer, self.output)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record, unless this is the sanity check."""
        if trainer.sanity_checking:
            return
        self._metric.to(pl_module.device)
        self._outputs = LayerOutputs(pl_module, self.layer, self.output)
        self._outputs.open()

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Forget what the layer did outside of the validation step."""
        if self._outputs is not None:
            self._outputs.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        if self._outputs is None:
            return
        if dataloader_idx:
            self._outputs.clear()
            return
        metadata = columns_at(batch, self.metadata)
        labels = None if self.labels is None else self._classes(select(batch, self.labels, "the batch"))
        self._metric.update(self._outputs.take(metadata.shape[0]), metadata, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values."""
        if self._outputs is None:
            return
        with warnings.catch_warnings(), closing(self):
            # A process whose loader is empty takes part with no samples of its own.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            try:
                values: Any = self._metric.compute()
            except TooFewSamplesError as error:
                # All processes have the same samples by now, and so come here together.
                if trainer.is_global_zero:
                    warn(f"{self.prefix} of {self.layer!r} is not logged: {error}")
                return
        for name, value in values.items():
            # The same value everywhere; sync_dist says so to Lightning.
            pl_module.log(self._logged(name, values), value, sync_dist=True)

    def _classes(self, labels: Any) -> Any:
        """Return the class index of each sample."""
        return labels

    def close(self, *_: Any, **__: Any) -> None:
        """Stop recording and take the hook off the layer."""
        if self._outputs is not None:
            self._outputs.close()
            self._outputs = None
        self._metric.reset()

    on_exception = teardown = close

    def _logged(self, name: str, names: Iterable[str]) -> str:
        if isinstance(self.metadata, str) and self.column_names is None:
            is_single = all(other.split("/")[0] == "column_0" for other in names)
            name = name.replace("column_0" if is_single else "column", self.metadata, 1)
        return f"{self.prefix}/{name}"


class InsertedDependence(DependenceCallback):
    """Measures within the classes of labels that need not be class indices: they are those of a layer.

    Whether they are is known when all were seen: a continuous label may well be 0 in a whole batch.
    """

    _are_classes = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record."""
        self._are_classes = True
        self._metric.sampling.within_labels = self.labels is not None
        super().on_validation_start(trainer, pl_module)

    def _classes(self, labels: Any) -> Tensor:
        labels = as_real_tensor(labels, "labels")
        classes = _class_indices(labels)
        if classes is None:
            self._are_classes = False
            return torch.zeros(len(labels), dtype=torch.int64)
        return classes

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values, within classes if the labels were some on all processes."""
        if self._outputs is not None and self.labels is not None:
            self._metric.sampling.within_labels = trainer.strategy.reduce_boolean_decision(self._are_classes)
        super().on_validation_epoch_end(trainer, pl_module)


def _class_indices(labels: Tensor) -> Tensor | None:
    """Return the classes, (n,), of class indices or one-hot columns; None for other labels."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        is_one_hot = bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all())
        return labels.to(torch.int64).argmax(1) if is_one_hot else None
    try:
        return as_class_indices(labels)
    except ValueError:
        return None
