"""Record what a layer puts out in an evaluation pass, and measure what it knows about the metadata."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdnorm.arrays import as_real_tensor, plain_tensor
from mdnorm.integration.places import near_names
from mdnorm.metrics.reservoir import ColumnNames, Rows, Sampling, add_rows

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Selector = str | int | Callable[[Any], Any]


def select(value: Any, selector: Selector, what: str) -> Any:
    """Return a part of a batch or of an output: at a key or an attribute, an index, or what a function gives.

    `what` says what it is a part of, for the KeyError, IndexError or TypeError where there is no such part.
    """
    if callable(selector):
        return selector(value)
    if isinstance(value, Mapping) and selector in value:
        return value[selector]
    if isinstance(value, Mapping) and isinstance(selector, str):
        keys = ", ".join(map(repr, value)) or "none"
        raise _MissingKeyError(f"{what} has no key {selector!r}: its keys are {keys}.")
    if isinstance(selector, str):
        if hasattr(value, selector):
            return getattr(value, selector)
        raise TypeError(
            f"{what} has no key or attribute {selector!r}: it is {described(value)}. Give an index, or a "
            "function that takes it apart."
        )
    # ModelOutput of transformers is a mapping that has indices as well.
    if isinstance(value, Sequence) or hasattr(value, "to_tuple"):
        entries = value if isinstance(value, Sequence) else value.to_tuple()
        if -len(entries) <= selector < len(entries):
            return entries[selector]
        raise IndexError(f"{what} has no entry {selector}: it has {len(entries)}.")
    raise TypeError(f"{what} has no entry {selector}: it is {described(value)}. Give a key or a function.")


class _MissingKeyError(KeyError):
    def __str__(self) -> str:
        # KeyError shows the repr of its message, with quotes around it.
        return str(self.args[0])


def described(value: Any) -> str:
    """Return what a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value)) or 'none'}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        kinds = ", ".join(type(entry).__name__ for entry in value) or "nothing"
        return f"a {type(value).__name__} of {kinds}"
    fields = ", ".join(repr(name) for name in getattr(value, "__dict__", ()) if name[0] != "_")
    return f"a {type(value).__name__}" + (f" with the attributes {fields}" if fields else "")


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of a layer of a model; a ValueError lists the names that are near."""
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer in modules:
            return layer, modules[layer]
        raise ValueError(f"{type(model).__name__} has no module {layer!r}: {near_names(layer, modules)}.")
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be the name of a module or a module, got {layer!r}.")
    for name, module in modules.items():
        if module is layer:
            return name, module
    raise ValueError(f"layer is a {type(layer).__name__} that is not part of the {type(model).__name__}.")


_lock = threading.Lock()
_open = 0
_stance = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly inside the block.

    Blocks may overlap in any order: compiled graphs are used again when the last one ends. PyTorch's own
    ``torch.compiler.set_stance`` gives back what was there when a block began, so that two blocks which are
    not nested would leave compilation off for good.
    """
    global _open
    with _lock:
        if _open == 0:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                _stance.close()


class LayerOutputs:
    """Collects what a module puts out, or the part `output` of it, between `open` and `close`."""

    def __init__(self, model: nn.Module, layer: str | nn.Module, output: Selector | None = None) -> None:
        self.name, self.module = find_layer(model, layer)
        self._output = output
        self._hooks = ExitStack()
        self.is_open = False
        self.outputs: list[Tensor] = []

    def open(self) -> None:
        """Begin to collect."""
        self.close()
        self.clear()
        # A compiled graph would pass by the hook. What was not imported has compiled nothing.
        if "torch._dynamo" in sys.modules:
            self._hooks.enter_context(uncompiled())
        self._hooks.callback(self.module.register_forward_hook(self._collect).remove)
        self.is_open = True

    def close(self) -> None:
        """Stop collecting; what was collected stays."""
        self._hooks.close()
        self.is_open = False

    def clear(self) -> None:
        """Forget what was collected."""
        self.outputs.clear()

    def _collect(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        what = f"the output of the layer {self.name!r}"
        if self._output is not None:
            output = select(output, self._output, what)
            what = f"what output= selects from {what}"
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{what} is {described(output)}, not a tensor: give output= a key, an index or a function."
            )
        if output.ndim == 0:
            raise ValueError(f"{what} is a single number, it must have one row per sample.")
        # A copy, since the layer behind may work in place (a ReLU often does); and a plain tensor: those of
        # MONAI carry the history of their image.
        self.outputs.append(plain_tensor(output.detach()).clone())

    def take(self, num_rows: int) -> Tensor:
        """Return what was collected since the last call, as (num_rows, D) float32."""
        outputs = [_as_rows(output) for output in self.outputs]
        self.clear()
        if not outputs:
            raise RuntimeError(
                f"the layer {self.name!r} did not run since the last update: record one that "
                "the forward pass calls (as a module, not by its weights)."
            )
        runs = f"the layer {self.name!r} ran {len(outputs)} time(s) since the last update"
        counts = [output.shape[0] for output in outputs]
        if sum(counts) != num_rows:
            raise ValueError(
                f"{runs}, with {' + '.join(map(str, counts))} rows, but the metadata have {num_rows}: update "
                "after each forward pass, and record a layer that runs once in it on one row per sample."
            )
        widths = {output.shape[1] for output in outputs}
        if len(widths) > 1:
            raise ValueError(
                f"{runs}, with {' and '.join(map(str, sorted(widths)))} values a sample: all must have the "
                "same. Give output= a function that averages over positions whose number varies."
            )
        return torch.cat(outputs)


def _as_rows(output: Tensor) -> Tensor:
    if output.is_nested:
        # Sequences of several lengths, as nn.TransformerEncoder makes of padded tokens.
        output = torch.stack([part.mean(0) for part in output.float().unbind()])
    return output.float().reshape(output.shape[0], output.shape[1:].numel())


class DependenceRecorder:
    """Measure, in an evaluation pass, what the output of a layer knows about the metadata.

    Inside a ``with`` block, which begins anew, it collects what the layer puts out; after each forward pass
    hand it the metadata of the batch with `update`. `compute` then gives the bias-corrected squared distance
    correlation (`mdnorm.metrics.distance_correlation_sqr`) with each metadata column.

    Parameters
    ----------
    model : nn.Module
    layer : str or nn.Module
        A module of the model, by its name in ``model.named_modules()`` or itself.
    output : str, int or callable, optional
        Where the layer does not return a tensor: the key or attribute of a dict, a dataclass or a
        `ModelOutput`, the index in a tuple, or a function that returns the features, (n, ...).
    within_labels, column_names, max_samples, seed
        As in `mdnorm.metrics.DistanceCorrelation`.

    Raises
    ------
    TypeError, ValueError
        A wrong setting, or no such layer.

    Notes
    -----
    - Put the model into evaluation mode yourself; the recorder changes neither mode nor gradients.
    - Where the layer runs several times between two updates, its rows are those of all runs, in order.
    - Sequences of several lengths (nested tensors) are measured by their means over the positions.
    - A model compiled by `torch.compile` runs uncompiled inside the block: its graph bypasses hooks.
    - Of several processes each measures its own samples; `mdnorm.metrics.DistanceCorrelation` measures those
      of all, and `mdnorm.integration.DependenceCallback` does so in Lightning.
    - Rows are kept on the device of the outputs, in float32.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> recorder = DependenceRecorder(model, "1", column_names=["age"])
    >>> for epoch in range(2):
    ...     with torch.no_grad(), recorder:
    ...         for images, age in [(torch.randn(20, 3), torch.rand(20)) for _ in range(5)]:
    ...             predictions = model(images)
    ...             recorder.update(age)
    ...     print(sorted(recorder.compute()), recorder.num_samples)
    ['age'] 100
    ['age'] 100
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module,
        *,
        output: Selector | None = None,
        within_labels: bool = False,
        column_names: ColumnNames | None = None,
        max_samples: int | None = 2000,
        seed: int = 0,
    ) -> None:
        self._sampling = Sampling(within_labels, max_samples, seed, column_names)
        self._outputs = LayerOutputs(model, layer, output)
        self._pieces: list[Rows] = []
        self._num_seen = 0

    @property
    def num_samples(self) -> int:
        """Number of samples seen in this pass, of which at most `max_samples` are measured."""
        return self._num_seen

    def __enter__(self) -> DependenceRecorder:
        if self._outputs.is_open:
            raise RuntimeError("the recorder is recording already: leave its block before you enter another.")
        self.reset()
        self._outputs.open()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self._outputs.close()
        pending = len(self._outputs.outputs)
        self._outputs.clear()
        if pending and exception_type is None:
            raise RuntimeError(
                f"the layer {self._outputs.name!r} ran {pending} time(s) after the last update: call "
                "update(metadata) after each forward pass."
            )

    def reset(self) -> None:
        """Forget the samples."""
        self._pieces = []
        self._num_seen = 0
        self._outputs.clear()

    def update(self, metadata: Tensor | ArrayLike, labels: Tensor | ArrayLike | None = None) -> None:
        """Add the samples of the forward pass that just ran.

        Parameters
        ----------
        metadata : (n,) or (n, K) tensor or array
            A row for each that the layer put out since the last update, n ≥ 0.
        labels : (n,) or (n, 1), optional
            Class indices; needed with ``within_labels=True``, ignored otherwise.

        Raises
        ------
        TypeError, ValueError
            An input is not real and numeric; wrong shapes, different numbers of rows or columns, NaN or
            infinite values, labels missing.
        RuntimeError
            Outside the ``with`` block, or the layer did not run.
        """
        if not self._outputs.is_open:
            raise RuntimeError("update outside of the recorder's block: call it inside `with recorder:`.")
        metadata = as_real_tensor(metadata, "metadata")
        if metadata.ndim == 0:
            raise ValueError("metadata must have one row per sample, got a single number.")
        features = self._outputs.take(metadata.shape[0])
        rows = self._sampling.rows(features, metadata, labels, features.device, start=self._num_seen)
        self._pieces = add_rows(self._pieces, rows, self._sampling.max_samples)
        self._num_seen += len(rows)

    def compute(self) -> dict[str, float]:
        """Return the dependence over all samples, by column name, and ``joint`` for several columns.

        With `within_labels` there is one value for each class: ``age/label_0``, ….

        Raises
        ------
        TooFewSamplesError
            A `ValueError`: fewer than 4 samples, in all or of a class.
        """
        values = self._sampling.dependence(self._pieces)
        assert isinstance(values, dict)
        return {name: float(value) for name, value in values.items()}
