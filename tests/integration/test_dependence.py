"""The recorder against the metric on what the layer put out, outputs of all kinds, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import dcor
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mdnorm.integration.dependence import DependenceRecorder, select
from mdnorm.metrics.reservoir import TooFewSamplesError, sample_keys

TOLERANCE = 1e-9


def _dcor(features: Tensor, metadata: Tensor) -> float:
    x, y = (part.detach().reshape(len(part), -1).double().numpy() for part in (features, metadata))
    return float(dcor.u_distance_correlation_sqr(x, y))


def _data(n: int) -> tuple[Tensor, Tensor, Tensor]:
    metadata = torch.randn(n, 2)
    return torch.randn(n, 4) + metadata[:, :1], metadata, torch.arange(n) % 2


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 1))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from([None, 7, 12, 100]))
def test_the_values_are_those_of_the_outputs(sizes: list[int], max_samples: int | None) -> None:
    inputs, metadata, _ = _data(sum(sizes) + 12)
    model = _model()
    recorder = DependenceRecorder(model, "0", column_names=["age", "sex"], max_samples=max_samples, seed=4)
    with recorder:
        for rows in torch.arange(len(inputs)).split([*sizes, 12]):
            model(inputs[rows])
            recorder.update(metadata[rows])
    kept = sample_keys(0, len(inputs), seed=4).argsort()[:max_samples]
    features = model[0](inputs)[kept]  # before the ReLU, which works in place on it
    assert (features < 0).any()
    values = recorder.compute()
    assert all(isinstance(value, float) for value in values.values())
    expected = {
        "age": _dcor(features, metadata[kept, 0]),
        "sex": _dcor(features, metadata[kept, 1]),
        "joint": _dcor(features, metadata[kept]),
    }
    assert values == pytest.approx(expected, abs=1e-6)  # features of batches differ in float32 rounding
    assert recorder.num_samples == len(inputs)


def test_within_labels() -> None:
    inputs, metadata, labels = _data(40)
    model = _model()
    recorder = DependenceRecorder(model, model[2], within_labels=True)
    with recorder:
        model(inputs)
        recorder.update(metadata[:, 0].numpy(), labels.tolist())
    features = model(inputs)
    expected = {
        f"column_0/label_{label}": _dcor(features[labels == label], metadata[labels == label, 0])
        for label in range(2)
    }
    assert recorder.compute() == pytest.approx(expected, abs=TOLERANCE)


def test_every_block_begins_anew_and_leaves_the_model_alone() -> None:
    inputs, metadata, _ = _data(30)
    model = _model()
    recorder = DependenceRecorder(model, "2")
    values = []
    for epoch in range(2):
        with recorder:
            model(inputs[epoch * 10 : epoch * 10 + 10])
            recorder.update(metadata[epoch * 10 : epoch * 10 + 10])
        values.append(recorder.compute())
        # Not recorded:
        model(inputs)
        assert recorder.compute() == values[-1]
        assert recorder.num_samples == 10
    assert values[0] != values[1]
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training
    recorder.reset()
    with pytest.raises(TooFewSamplesError, match=r"only 0 sample\(s\)"):
        recorder.compute()


def test_rows_of_several_runs_belong_to_one_update() -> None:
    inputs, metadata, _ = _data(30)
    model = _model()
    with DependenceRecorder(model, "0") as recorder:
        for rows in torch.arange(30).split(7):
            model(inputs[rows])
        recorder.update(metadata)
    features = torch.cat([model[0](part) for part in inputs.split(7)])
    assert recorder.compute()["joint"] == pytest.approx(_dcor(features, metadata), abs=TOLERANCE)


@dataclass
class _Output:
    logits: Tensor
    hidden: Tensor


class _ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a mapping that also has attributes and a tuple."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class _Wrapper(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.kind = kind

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.inner(inputs)
        logits = hidden.sum(dim=1)
        outputs: dict[str, Any] = {
            "dict": {"logits": logits, "hidden": hidden},
            "tuple": (logits, [hidden]),
            "dataclass": _Output(logits, hidden),
            "model output": _ModelOutput(logits=logits, hidden=hidden),
            "number": logits.sum(),
        }
        return outputs[self.kind]


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("dict", "hidden"),
        ("dict", lambda outputs: outputs["hidden"]),
        ("tuple", lambda outputs: outputs[1][0]),
        ("dataclass", "hidden"),
        ("model output", "hidden"),
        ("model output", 1),
        ("model output", -1),
    ],
)
def test_outputs_of_all_kinds(kind: str, output: Any) -> None:
    inputs, metadata, _ = _data(20)
    model = _Wrapper(kind)
    with DependenceRecorder(model, "", output=output) as recorder:
        model(inputs)
        recorder.update(metadata)
    assert recorder.compute()["joint"] == pytest.approx(_dcor(model.inner(inputs), metadata), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "output", "error", "message"),
    [
        ("dict", None, TypeError, "output of the layer '' is a dict with the keys 'logits', 'hidden', not a"),
        ("tuple", None, TypeError, "is a tuple of Tensor, list, not a tensor: give output="),
        ("dataclass", None, TypeError, "is a _Output with .*, not a tensor"),
        ("dict", "hiden", KeyError, "has no key 'hiden': its keys are 'logits', 'hidden'"),
        ("dict", 0, TypeError, "has no entry 0: it is a dict with the keys 'logits', 'hidden'"),
        ("tuple", 2, IndexError, "has no entry 2: it has 2"),
        ("tuple", 1, TypeError, "what output= selects from .* is a list of Tensor, not a tensor"),
        ("tuple", "hidden", TypeError, "no key or attribute 'hidden': it is a tuple of Tensor, list"),
        ("dataclass", "hiden", TypeError, "with the attributes 'logits', 'hidden'"),
        ("number", None, ValueError, "is a single number, it must have one row per sample"),
    ],
)
def test_outputs_that_are_no_features(kind: str, output: Any, error: type[Exception], message: str) -> None:
    model = _Wrapper(kind)
    recorder = DependenceRecorder(model, "", output=output)
    with pytest.raises(error, match=message), recorder:
        model(torch.randn(5, 4))
    assert not model._forward_hooks  # an error does not leave the hook behind


def test_select_from_a_tensor() -> None:
    batch = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"no key or attribute 'age': it is a tensor of shape \(3, 2\)"):
        select(batch, "age", "the batch")
    with pytest.raises(TypeError, match=r"the batch has no entry 0: it is a tensor of shape \(3, 2\)"):
        select(batch, 0, "the batch")
    assert select({0: "zero"}, 0, "the batch") == "zero"


# --------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_there() -> None:
    model = _model()
    with pytest.raises(ValueError, match="Sequential has no module 'head': its modules are 0, 1, 2"):
        DependenceRecorder(model, "head")
    with pytest.raises(ValueError, match="layer is a Linear that is not part of the Sequential"):
        DependenceRecorder(model, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be the name of a module or a module, got 0"):
        DependenceRecorder(model, 0)  # type: ignore[arg-type]


def test_updates_at_the_wrong_time() -> None:
    inputs, metadata, _ = _data(8)
    model = _model()
    recorder = DependenceRecorder(model, "0")
    with pytest.raises(RuntimeError, match="outside of the recorder's block"):
        recorder.update(metadata)
    with recorder:
        with pytest.raises(RuntimeError, match="'0' did not run since the last update"):
            recorder.update(metadata)
        with pytest.raises(RuntimeError, match="recording already"):
            recorder.__enter__()
    recorder.__enter__()
    model(inputs)
    recorder.update(metadata)
    model(inputs)
    model(inputs)
    with pytest.raises(RuntimeError, match=r"'0' ran 2 time\(s\) after the last update"):
        recorder.__exit__(None, None, None)
    recorder.__enter__()
    model(inputs)
    error = ZeroDivisionError()
    recorder.__exit__(type(error), error, None)  # an error of the user's comes through
    with recorder:
        model(inputs[:3])
        recorder.update(metadata[:3])
    with pytest.raises(TooFewSamplesError, match=r"only 3 sample\(s\)"):
        recorder.compute()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(7, 2),), ValueError, r"'0' ran 1 time\(s\) .* 8 rows, but the metadata have 7"),
        ((torch.zeros(()),), ValueError, "one row per sample, got a single number"),
        ((torch.zeros(8, 3),), ValueError, r"metadata have 3 value\(s\) a sample, but 2 in other batches"),
        ((torch.full((8, 2), torch.nan),), ValueError, "metadata has NaN"),
        ((["a"] * 8,), TypeError, "metadata must be real and numeric"),
    ],
)
def test_metadata_that_do_not_fit(batch: tuple[Any, ...], error: Any, message: str) -> None:
    inputs, metadata, _ = _data(8)
    model = _model()
    recorder = DependenceRecorder(model, "0")
    with recorder:
        model(inputs)
        recorder.update(metadata)
        model(inputs)
        with pytest.raises(error, match=message):
            recorder.update(*batch)
        model[0](inputs)
        recorder._outputs.clear()
    assert recorder.num_samples == 8


def test_labels_are_needed_and_widths_must_agree() -> None:
    inputs, metadata, _ = _data(8)
    model = nn.Identity()
    with DependenceRecorder(model, "", within_labels=True) as recorder:
        model(inputs)
        with pytest.raises(ValueError, match=r"labels are needed with within_labels=True"):
            recorder.update(metadata)
        recorder._outputs.clear()
    with DependenceRecorder(model, "") as recorder:
        model(inputs)
        model(inputs[:, :2])
        with pytest.raises(ValueError, match=r"with 2 and 4 values a sample.*averages over positions"):
            recorder.update(torch.zeros(16))
        model(inputs)
        recorder.update(metadata)
        model(inputs[:, :2])
        with pytest.raises(ValueError, match=r"features have 2 value\(s\) a sample, but 4"):
            recorder.update(metadata)


def test_a_compiled_model_shows_its_layers() -> None:
    inputs, metadata, _ = _data(20)
    model = _model()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(inputs)
    with DependenceRecorder(model, "0") as recorder:
        compiled(inputs)
        recorder.update(metadata)
    assert recorder.compute()["joint"] == pytest.approx(_dcor(model[0](inputs), metadata), abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype: torch.dtype) -> None:
    inputs, metadata, _ = _data(20)
    model = nn.Identity()
    with DependenceRecorder(model, "") as recorder:
        model(inputs.to(dtype))
        recorder.update(metadata)
    assert recorder.compute()["joint"] == pytest.approx(_dcor(inputs.to(dtype), metadata), abs=TOLERANCE)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    inputs, metadata, labels = _data(50)
    model = nn.Identity()
    values = []
    for device in ("cpu", "cuda"):
        with DependenceRecorder(model, "", within_labels=True, max_samples=30) as recorder:
            for rows in torch.arange(50).split(8):
                model(inputs[rows].to(device))
                recorder.update(metadata[rows], labels[rows].to(device))
        values.append(recorder.compute())
    assert values[1] == pytest.approx(values[0], abs=TOLERANCE)
