"""Lightning callbacks: layers inserted, fed and recalibrated; what a layer knows about the metadata, logged.

Importing this module needs Lightning (``pip install 'mdnorm[lightning]'``); the older package
``pytorch_lightning`` does as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mdnorm import context
from mdnorm.arrays import as_real_tensor, statistics_dtype
from mdnorm.extras import requires
from mdnorm.integration.applied import find_features, samples_first
from mdnorm.integration.dependence import LayerOutputs, Selector, described, select
from mdnorm.integration.design import AttachedDesign, design_of
from mdnorm.integration.insert import InsertionReport, insert, insertions
from mdnorm.integration.places import Target
from mdnorm.integration.recalibrate import recalibrate as _recalibrate
from mdnorm.integration.recalibration import Recalibration
from mdnorm.metrics import reservoir
from mdnorm.metrics.reservoir import ColumnNames

with requires("lightning"):
    from mdnorm.metrics.streaming import DistanceCorrelation

    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError as error:
        try:
            from pytorch_lightning import Callback  # type: ignore[assignment]
        except ModuleNotFoundError:
            raise error from None

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["DependenceCallback", "MetadataNormCallback"]


class DependenceCallback(Callback):
    """Log, after each validation, the distance correlation of a layer's output with the metadata.

    Logs ``dcor2/<column>`` for each metadata column, and ``dcor2/joint`` for all columns together where there
    are several, with ``pl_module.log``: loggers and the progress bar show them, and `EarlyStopping` and
    `ModelCheckpoint` can monitor them. The value is the bias-corrected squared distance correlation of
    `mdnorm.metrics.DistanceCorrelation`, over the samples of all processes.

    Parameters
    ----------
    layer : str or nn.Module
        A module of the LightningModule, by its name in ``named_modules()`` or itself.
    metadata : str, int, callable, or list of them
        Where the metadata are in a validation batch: a key (or the name of an attribute), an index, or a
        function of the batch, that gives (n,) or (n, K). A list of them gives one column each, named by its
        keys.
    labels : str, int or callable, optional
        Where class indices are in the batch. If given, the dependence is measured within each class, and
        logged as ``dcor2/<column>/label_<class>``.
    column_names : sequence of str, or mapping from str to sequence of int, optional
        Names of the columns; default: the key of a single column or the keys in a list, ``key_0, key_1, …``
        for the columns of one key, else ``column_0, column_1, …``. A mapping gives a name to several columns
        that belong together.
    output : str, int or callable, optional
        Where the layer does not return a tensor; see `mdnorm.integration.DependenceRecorder`.
    every_n_epochs : int
        Measure in epochs 0, n, 2n, … of a fit. Monitoring callbacks see the last value in between.
        ``trainer.validate`` always measures.
    max_samples : int or None
        Size of the sample that is measured, drawn uniformly from all; None for all. Time for each value grows
        with its square.
    seed : int
        Of the sample.
    dataloader_idx : int
        Which validation loader, where there are several: pooled, differences between the loaders would pass
        for dependence.
    prefix : str
        Of the logged names. Give one for each layer if you measure several.
    prog_bar : bool
        Show the values in the progress bar.

    Raises
    ------
    TypeError, ValueError
        A wrong setting; at the start of a fit, no such layer; at the first batch, another number of rows in
        the layer's output than in the metadata.
    KeyError, IndexError
        At the first batch: it has no such key or index. The message lists the keys that there are.

    Notes
    -----
    - The sanity check before a fit is not measured.
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
        every_n_epochs: int = 1,
        max_samples: int | None = 2000,
        seed: int = 0,
        dataloader_idx: int = 0,
        prefix: str = "dcor2",
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        reservoir.check_settings(max_samples, seed)
        if type(every_n_epochs) is not int or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be an integer of at least 1, got {every_n_epochs!r}.")
        if isinstance(metadata, (list, tuple)):
            if not metadata:
                raise ValueError("metadata is an empty list: give at least one key of the batch.")
            if column_names is None and all(isinstance(part, str) for part in metadata):
                column_names = [str(part) for part in metadata]
        reservoir.check_column_names(column_names)
        self.layer = layer
        self.metadata = metadata
        self.labels = labels
        self.column_names = column_names
        self.output = output
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.seed = seed
        self.dataloader_idx = dataloader_idx
        self.prefix = prefix
        self.prog_bar = prog_bar
        self._outputs: LayerOutputs | None = None
        self._metric: DistanceCorrelation | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the layer, so that a wrong name fails before training."""
        LayerOutputs(pl_module, self.layer, self.output)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record, unless this is the sanity check or an epoch in between."""
        is_due = trainer.state.fn != "fit" or pl_module.current_epoch % self.every_n_epochs == 0
        if trainer.sanity_checking or not is_due:
            return
        self._metric = DistanceCorrelation(
            within_labels=self.labels is not None,
            max_samples=self.max_samples,
            seed=self.seed,
            per_column=True,
            column_names=self.column_names,
        ).to(pl_module.device)
        self._outputs = LayerOutputs(pl_module, self.layer, self.output)
        self._outputs.open()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
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
        if self._outputs is None or self._metric is None:
            return
        if dataloader_idx != self.dataloader_idx:
            self._outputs.clear()
            return
        metadata = _metadata_of(batch, self.metadata)
        labels = None if self.labels is None else self._classes(select(batch, self.labels, "the batch"))
        self._metric.update(self._outputs.take(metadata.shape[0]), metadata, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values."""
        if self._metric is None:
            return
        metric, self._metric = self._metric, None
        self.close()
        with warnings.catch_warnings():
            # A process whose loader is empty takes part with no samples of its own.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            try:
                values: Any = metric.compute()
            except reservoir.TooFewSamplesError as error:
                # All processes have the same samples by now, and so come here together.
                too_few: str | None = str(error)
            else:
                too_few = None
        if too_few is not None:
            if trainer.is_global_zero:
                warnings.warn(f"{self.prefix} of {self.layer!r} is not logged: {too_few}", stacklevel=2)
            return
        for name, value in values.items():
            # The same value everywhere; sync_dist says so to Lightning.
            pl_module.log(self._logged(name, values), value, prog_bar=self.prog_bar, sync_dist=True)

    def _classes(self, labels: Any) -> Any:
        """Return the class index of each sample."""
        return labels

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hook off the layer."""
        self.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hook off the layer."""
        self.close()

    def close(self) -> None:
        """Stop recording and take the hook off the layer."""
        if self._outputs is not None:
            self._outputs.close()
            self._outputs = None

    def _logged(self, name: str, names: Iterable[str]) -> str:
        if isinstance(self.metadata, str) and self.column_names is None:
            is_single = all(other.split("/")[0] == "column_0" for other in names)
            name = name.replace("column_0" if is_single else "column", self.metadata, 1)
        return f"{self.prefix}/{name}"


def _metadata_of(batch: Any, selector: Selector | list[Selector]) -> Tensor:
    if not isinstance(selector, (list, tuple)):
        metadata = as_real_tensor(select(batch, selector, "the batch"), "metadata")
        if metadata.ndim == 0:
            raise ValueError("metadata must have one row per sample, got a single number.")
        return metadata
    columns = []
    for part in selector:
        column = as_real_tensor(select(batch, part, "the batch"), f"metadata {part!r}")
        if column.ndim not in (1, 2) or column.shape[1:].numel() != 1:
            raise ValueError(
                f"metadata {part!r} must be one column, of shape (n,) or (n, 1), got "
                f"{tuple(column.shape)}: give a function of the batch that concatenates the columns."
            )
        # Columns of a batch may be tensors and lists, of different types.
        columns.append(column.flatten().cpu().double())
    lengths = {str(part): len(column) for part, column in zip(selector, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the metadata differ in their number of rows: {lengths}.")
    return torch.stack(columns, dim=1)


class _InsertedDependence(DependenceCallback):
    """Measures within the classes of labels that need not be class indices: they are those of a layer.

    Whether they are is known when all were seen: a continuous label may well be 0 in a whole batch.
    """

    _are_classes = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._are_classes = True
        super().on_validation_start(trainer, pl_module)

    def _classes(self, labels: Any) -> Tensor:
        labels = as_real_tensor(labels, "labels")
        classes = _class_indices(labels)
        if classes is None:
            self._are_classes = False
            return torch.zeros(len(labels), dtype=torch.int64)
        return classes

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._metric is not None and self.labels is not None:
            self._metric.within_labels = trainer.strategy.reduce_boolean_decision(self._are_classes)
        super().on_validation_epoch_end(trainer, pl_module)


def _class_indices(labels: Tensor) -> Tensor | None:
    """Return the classes, (n,), of class indices or one-hot columns; None for other labels."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        is_one_hot = bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all())
        return labels.to(torch.int64).argmax(1) if is_one_hot else None
    if labels.ndim not in (1, 2):
        return None
    labels = labels.reshape(-1)
    indices = labels.to(torch.int64)
    return indices if bool((indices == labels).all()) else None


class MetadataNormCallback(Callback):
    """Insert `MetadataNorm` into a LightningModule, feed it, recalibrate it, and log what is left.

    Nothing in the LightningModule changes: during each step (training with its backward pass, validation,
    test, prediction) the metadata of the batch are there for its layers, as inside `mdnorm.metadata`.

    Parameters
    ----------
    metadata : str, int, callable, or list of them
        Where the metadata are in a batch: a key (or the name of an attribute), an index, or a function of the
        batch, that gives (n,) or (n, K). A list of them gives one column each. With a design (``design=``
        among the options) a key of a table, or the keys of its columns.
    labels : str, int or callable, optional
        Where the labels are that are to be protected in training. With a design, by default those of the
        table.
    weights, mask : str, int or callable, optional
        Where weights of the samples in the fit and a mask of the positions that count are; see
        `mdnorm.metadata`.
    after : str, type, or list of them, optional
        Behind which modules, as in `mdnorm.insert`. Without it, the layers are those that the module has (a
        model that is built in ``configure_model`` inserts them there).
    output, sample_dim
        As in `mdnorm.insert`.
    inputs : str, int or callable, optional
        Where the model's input is in a batch, for the recalibration, which calls
        ``pl_module(input)``. By default the first entry of a tuple.
    forward : callable, optional
        Instead, ``forward(pl_module, batch)`` runs the model.
    recalibrate : bool
        Take the coefficients of the whole training loader at the end of a fit (`mdnorm.recalibrate`), of
        several processes on the shares of all. Not after a ``fast_dev_run``.
    held_out : bool
        Let the recalibration compare with the (first) validation loader, and take its word where the network
        memorised. An accuracy on the same rows is then no longer that on new ones.
    log_dependence : bool
        Log ``dcor2/<column>`` of the outputs after each validation, as `DependenceCallback` does. Within each
        class (``dcor2/<column>/label_<class>``), if `labels` gives class indices or one-hot columns in all
        of the validation data; over all samples for other labels (continuous, several columns). With several
        layers ``dcor2/<name>/<column>``.
    column_names : sequence of str, or mapping from str to sequence of int, optional
        Of `DependenceCallback`.
    **options
        `design` and options of `MetadataNorm`, for `mdnorm.insert`. With `labels` and without a design,
        `num_labels` is by default that of the first batch.

    Attributes
    ----------
    report : InsertionReport or None
        What went where, from the start of a fit on.
    recalibration : Recalibration or None
        What the recalibration found, after a fit; ``print`` shows it.

    Raises
    ------
    ValueError
        What `mdnorm.insert` refuses; at the start, a module without layers, or `held_out` without a
        validation loader.
    TypeError
        At the first batch: it is no tuple, and neither `inputs` nor `forward` says what to recalibrate with.
    KeyError, IndexError
        At the first batch: it has no such key or index.

    Notes
    -----
    - Checkpoints that were saved during the fit have the running coefficients:
      ``trainer.save_checkpoint(path)`` after it has those of the recalibration.
    - Strategies that start their processes within `fit` ("ddp_spawn") bring back the state of the model only:
      `mdnorm.insert` the layers before, with the same options.

    Examples
    --------
    >>> callback = MetadataNormCallback("age", "diagnosis", after="encoder", inputs="image", window=300)

    Then ``Trainer(callbacks=[callback])``.
    """

    def __init__(
        self,
        metadata: Selector | list[Selector],
        labels: Selector | None = None,
        *,
        weights: Selector | None = None,
        mask: Selector | None = None,
        after: Target | Sequence[Target] | None = None,
        output: Selector | None = None,
        sample_dim: int = 0,
        inputs: Selector | None = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
        recalibrate: bool = True,
        held_out: bool = False,
        log_dependence: bool = True,
        column_names: ColumnNames | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if after is None and options:
            raise ValueError(
                f"{', '.join(options)} would be ignored: they are options of layers behind after=."
            )
        if inputs is not None and forward is not None:
            raise ValueError("inputs and forward both say how to run the model: give one of them.")
        self.metadata = metadata
        self.labels = labels
        self.weights = weights
        self.mask = mask
        self.after = after
        self.output = output
        self.sample_dim = sample_dim
        self.inputs = inputs
        self.forward = forward
        self.recalibrate = recalibrate
        self.held_out = held_out
        self.log_dependence = log_dependence
        self.column_names = column_names
        if labels is not None and options.get("design") is None:
            options = {"num_labels": None} | options
        self.options = options
        self.report: InsertionReport | None = None
        self.recalibration: Recalibration | None = None
        self._open = ExitStack()
        self._measures: list[DependenceCallback] = []

    # -- start and end ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert the layers: before the optimiser is made and the model is wrapped."""
        if self.after is not None:
            insert(pl_module, self.after, output=self.output, sample_dim=self.sample_dim, **self.options)
        self.report = insertions(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for layers, so that a model without any fails before training."""
        if not context.slots_of(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no MetadataNorm: give after=, or build the model with "
                "layers."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the validation loader, if it is needed at the end."""
        if self.recalibrate and self.held_out and not trainer.val_dataloaders:
            raise ValueError("held_out=True takes the rows of the validation loader: give the trainer one.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate."""
        self._close()
        if not self.recalibrate or getattr(trainer, "fast_dev_run", False):
            return

        def forward(_: torch.nn.Module, batch: Any) -> None:
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            with trainer.precision_plugin.forward_context():
                self._enter(pl_module, batch, with_labels=True)
                try:
                    if self.forward is not None:
                        self.forward(pl_module, batch)
                    else:
                        pl_module(self._input_of(batch))
                finally:
                    self._close()

        loader: Any = trainer.train_dataloader
        held_out: Any = trainer.val_dataloaders if self.held_out else None
        group: Literal["world", "local"] = "world" if trainer.world_size > 1 else "local"
        self.recalibration = _recalibrate(
            pl_module,
            loader,
            held_out=held_out[0] if isinstance(held_out, list) else held_out,
            forward=forward,
            progress=trainer.is_global_zero,
            process_group=group,
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take metadata and hooks away."""
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take metadata and hooks away; the layers stay."""
        self._close()
        for measure in self._measures:
            measure.close()

    # -- steps ------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the layers the metadata and labels of the batch."""
        if self.recalibrate and self.forward is None and batch_idx == 0:
            # Before training, not after it.
            self._input_of(batch)
        self._enter(pl_module, batch, with_labels=True)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Take them away: the backward pass is over."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the dependence."""
        if not self.log_dependence:
            return
        if not self._measures:
            self._measures = self._make_measures(pl_module)
        for measure in self._measures:
            measure.on_validation_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Give the layers the metadata of the batch."""
        for measure in self._measures:
            measure.on_validation_batch_start(trainer, pl_module, batch, *args, **kwargs)
        self._enter(pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take them away, and measure."""
        self._close()
        for measure in self._measures:
            measure.on_validation_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the dependence."""
        for measure in self._measures:
            measure.on_validation_epoch_end(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Give the layers the metadata of the batch."""
        self._enter(pl_module, batch)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Take them away."""
        self._close()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Give the layers the metadata of the batch."""
        self._enter(pl_module, batch)

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        """Take them away."""
        self._close()

    # -- parts ------------------------------------------------------------------------------------------

    def _enter(self, pl_module: LightningModule, batch: Any, with_labels: bool = False) -> None:
        self._close()
        metadata = self._metadata_of(pl_module, batch)
        selectors = (self.labels if with_labels else None, self.weights if with_labels else None, self.mask)
        rest = [part if part is None else select(batch, part, "the batch") for part in selectors]
        self._open.enter_context(context.metadata(pl_module, metadata, *rest))

    def _metadata_of(self, pl_module: LightningModule, batch: Any) -> Any:
        """Return the metadata of a batch on the device of the module: columns, or a table for its design."""
        has_design = any(isinstance(module, AttachedDesign) for module in pl_module.modules())
        if has_design and isinstance(self.metadata, (list, tuple)):
            return {str(key): select(batch, key, "the batch") for key in self.metadata}
        if has_design and context.is_table(table := select(batch, self.metadata, "the batch")):  # type: ignore[arg-type]
            return table
        metadata = _metadata_of(batch, self.metadata)
        if isinstance(self.metadata, (list, tuple)):
            # Columns that were put together in float64, which not every device has.
            metadata = metadata.to(statistics_dtype(pl_module.device))
        return metadata.to(pl_module.device)

    def _close(self) -> None:
        self._open.close()

    def _input_of(self, batch: Any) -> Any:
        if self.inputs is not None:
            return select(batch, self.inputs, "the batch")
        if isinstance(batch, (tuple, list)) and not isinstance(batch, Mapping) and len(batch) > 0:
            return batch[0]
        raise TypeError(
            f"the batch is {described(batch)}: give inputs= the key of the model's input, or forward= a "
            "function of the module and the batch, for the recalibration at the end (or recalibrate=False)."
        )

    def _make_measures(self, pl_module: LightningModule) -> list[DependenceCallback]:
        names = [row.name for row in insertions(pl_module)]
        metadata, column_names = self.metadata, self.column_names
        if any(isinstance(module, AttachedDesign) for module in pl_module.modules()):
            column_names = column_names or design_of(pl_module).metadata_names

            def metadata(batch: Any) -> Any:
                return context.columns_by_design(
                    pl_module, self._metadata_of(pl_module, batch), with_labels=False
                )[0]

        def features(name: str) -> Callable[[Any], Tensor]:
            return lambda output: samples_first(
                find_features(output, self.output, name), self.sample_dim, name
            )

        return [
            _InsertedDependence(
                name,
                metadata,
                self.labels,
                column_names=column_names,
                output=features(name),
                prefix="dcor2" if len(names) == 1 else f"dcor2/{name}",
            )
            for name in names
        ]
