"""Lightning callbacks: layers inserted, fed and recalibrated; what a layer knows about the metadata, logged.

Importing this module needs Lightning (``pip install 'mdnorm[lightning]'``); the older package
``pytorch_lightning`` does as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mdnorm import context
from mdnorm.integration.applied import find_features, samples_first
from mdnorm.integration.batches import metadata_at
from mdnorm.integration.dependence import Selector, described, select
from mdnorm.integration.design import design_of, designs_in
from mdnorm.integration.insert import InsertionReport, insert, insertions
from mdnorm.integration.lightning_dependence import Callback, DependenceCallback, InsertedDependence
from mdnorm.integration.places import Target
from mdnorm.integration.recalibrate import recalibrate as _recalibrate
from mdnorm.integration.recalibrated import recalibrated
from mdnorm.integration.recalibration import Recalibration
from mdnorm.metrics.reservoir import ColumnNames

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


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
        As in `mdnorm.insert`. Without it, the layers are those that the module has (a model that is built in
        ``configure_model`` inserts them there).
    output : str, int or callable, optional
        Where the features are in the output of the module, as of `mdnorm.insert`.
    sample_dim : int
        The dimension of the samples in that output, as of `mdnorm.insert`.
    **options
        Of `MetadataNorm`, or ``design=``, as of `mdnorm.insert`. With `labels` and without a design,
        `num_labels` is by default that of the first batch.
    inputs : str, int or callable, optional
        Where the model's input is in a batch, for the recalibration, which calls ``pl_module(input)``. By
        default the first entry of a tuple.
    forward : callable, optional
        Instead, ``forward(pl_module, batch)`` runs the model.
    recalibrate : bool
        Take the coefficients of the whole training loader at the end of a fit (`mdnorm.recalibrate`), of
        several processes on the shares of all. Not after a ``fast_dev_run``.
    validate_recalibrated : bool, optional
        Validate during a fit inside `mdnorm.recalibrated`, so that what is logged, early stopping and best
        checkpoints go by the model as it will be used. By default as `recalibrate`. Not in the sanity check,
        and not in a ``fast_dev_run``.
    held_out : bool
        Let the recalibration at the end also use the (first) validation loader, which decides where the
        network memorised. The accuracy on these rows is then no longer that on new ones.
    log_dependence : bool
        Log ``dcor2/<column>`` of the outputs after each validation, as `DependenceCallback` does; with
        several layers ``dcor2/<name>/<column>``. Within each class (``…/label_<class>``), if `labels` gives
        class indices or one-hot columns in all of the validation data; over all samples for other labels.
    column_names : sequence of str, or mapping from str to sequence of int, optional
        As in `DependenceCallback`.

    Attributes
    ----------
    report : InsertionReport or None
        What went where, from the start of a fit on.
    recalibration : Recalibration or None
        What was found, after a fit; ``print`` shows it.

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
    - Checkpoints of the fit have the running coefficients, so that it can go on from them: recalibrate the
      best one once it is loaded. ``trainer.save_checkpoint(path)`` after the fit has those of the
      recalibration.
    - A training loader without an end, or one that cannot be gone through again, needs ``recalibrate=False``.
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
        validate_recalibrated: bool | None = None,
        held_out: bool = False,
        log_dependence: bool = True,
        column_names: ColumnNames | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if after is None and options:
            raise ValueError(f"{', '.join(options)} would be ignored without after=: give it as well.")
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
        self.validate_recalibrated = recalibrate if validate_recalibrated is None else validate_recalibrated
        self.held_out = held_out
        self.log_dependence = log_dependence
        self.column_names = column_names
        if labels is not None and options.get("design") is None:
            options = {"num_labels": None} | options
        self.options = options
        self.report: InsertionReport | None = None
        self.recalibration: Recalibration | None = None
        self._open = ExitStack()
        # What is open for the length of a validation.
        self._validation = ExitStack()
        self._measures: list[DependenceCallback] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert the layers: before the optimiser is made and the model is wrapped."""
        if self.after is not None:
            insert(pl_module, self.after, output=self.output, sample_dim=self.sample_dim, **self.options)
        self.report = insertions(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for layers, so that a model without any fails before training."""
        if not context.slots_of(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no MetadataNorm layer: give after=, or build it with layers."
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
        held_out: Any = trainer.val_dataloaders if self.held_out else None
        self.recalibration = _recalibrate(
            pl_module,
            cast("Any", trainer.train_dataloader),
            held_out=held_out[0] if isinstance(held_out, list) else held_out,
            **self._recalibration_options(trainer, pl_module),
        )

    def _recalibration_options(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        def forward(_: torch.nn.Module, batch: Any) -> None:
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            with trainer.precision_plugin.forward_context(), self._given(pl_module, batch, True):
                if self.forward is not None:
                    self.forward(pl_module, batch)
                else:
                    pl_module(self._input_of(batch))

        return {
            "forward": forward,
            "progress": trainer.is_global_zero and trainer.progress_bar_callback is not None,
            "process_group": "world" if trainer.world_size > 1 else "local",
        }

    def teardown(self, *_: Any, **__: Any) -> None:
        """Take metadata and hooks away; the layers stay."""
        self._close()
        self._validation.close()
        for measure in self._measures:
            measure.close()

    on_exception = teardown

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the layers the metadata and labels of the batch."""
        if (self.recalibrate or self.validate_recalibrated) and self.forward is None and batch_idx == 0:
            # Before training, not after it.
            self._input_of(batch)
        self._enter(pl_module, batch, with_labels=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the coefficients of the training data for this validation, and begin to measure."""
        self._validation.close()
        loader: Any = trainer.train_dataloader
        is_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        is_wanted = self.validate_recalibrated and not getattr(trainer, "fast_dev_run", False)
        if is_wanted and is_training and loader is not None:
            options = self._recalibration_options(trainer, pl_module)
            self._validation.enter_context(recalibrated(pl_module, loader, **options))
        if not self.log_dependence:
            return
        if not self._measures:
            self._measures = self._make_measures(pl_module)
        for measure in self._measures:
            measure.on_validation_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Give the layers the metadata of the batch."""
        for measure in self._measures:
            measure.on_validation_batch_start()
        self._enter(pl_module, batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take them away, and measure."""
        self._close()
        for measure in self._measures:
            measure.on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the dependence."""
        for measure in self._measures:
            measure.on_validation_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the state of the training back, before a checkpoint is saved."""
        self._validation.close()

    def _given(
        self, pl_module: LightningModule, batch: Any, with_labels: bool
    ) -> AbstractContextManager[None]:
        metadata, labels = metadata_at(pl_module, batch, self.metadata, self.labels if with_labels else None)
        selectors = (self.weights if with_labels else None, self.mask)
        rest = [part if part is None else select(batch, part, "the batch") for part in selectors]
        return context.metadata(pl_module, metadata, labels, *rest)

    def _enter(self, pl_module: LightningModule, batch: Any, with_labels: bool = False) -> None:
        self._close()
        self._open.enter_context(self._given(pl_module, batch, with_labels))

    def _close(self, *_: Any, **__: Any) -> None:
        self._open.close()

    # The backward pass is over then.
    on_train_batch_end = on_test_batch_end = on_predict_batch_end = _close

    def _input_of(self, batch: Any) -> Any:
        if self.inputs is not None:
            return select(batch, self.inputs, "the batch")
        if isinstance(batch, (tuple, list)) and not isinstance(batch, Mapping) and len(batch) > 0:
            return batch[0]
        raise TypeError(
            f"the batch is {described(batch)}: give inputs= the key of the model's input, or forward= a "
            "function of the module and the batch, for the recalibration (or recalibrate=False)."
        )

    def _make_measures(self, pl_module: LightningModule) -> list[DependenceCallback]:
        names = [row.name for row in insertions(pl_module)]
        metadata, column_names = self.metadata, self.column_names
        if designs_in(pl_module):
            column_names = column_names or design_of(pl_module).metadata_names

            def metadata(batch: Any) -> Any:
                own = metadata_at(pl_module, batch, self.metadata)[0]
                return context.columns_by_design(pl_module, own, with_labels=False)[0]

        def features(name: str) -> Callable[[Any], Tensor]:
            return lambda output: samples_first(
                find_features(output, self.output, name), self.sample_dim, name
            )

        return [
            InsertedDependence(
                name,
                metadata,
                self.labels,
                column_names=column_names,
                output=features(name),
                prefix="dcor2" if len(names) == 1 else f"dcor2/{name}",
            )
            for name in names
        ]
