"""The callback in real fits on the CPU: logged values against the metric on the layer's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dcor
import pytest
import torch
from lightning_model import Data, Model, make_data
from torch import Tensor
from torch.utils.data import DataLoader

from mdnorm.integration.lightning import DependenceCallback
from mdnorm.metrics.reservoir import sample_keys

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    # A tiny model on a shared machine is what Lightning warns of.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    # Of Lightning's own code, with newer versions of torch.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\):FutureWarning"),
]


def _dcor(features: Tensor, metadata: Tensor) -> float:
    x, y = (part.detach().reshape(len(part), -1).double().numpy() for part in (features, metadata))
    return float(dcor.u_distance_correlation_sqr(x, y))


def _trainer(folder: Path, *callbacks: Any, module: Any = lightning, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return module.Trainer(callbacks=list(callbacks), **(defaults | settings))


class _Logged(lightning.Callback):  # type: ignore[misc, name-defined]
    """What monitors see at the end of each validation, and the layer's output there."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.features: list[Tensor] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            assert not any(name.startswith("dcor2") for name in trainer.callback_metrics)
            return
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.values.append({name: value for name, value in logged.items() if name.startswith("dcor2")})
        self.features.append(pl_module.encoder(pl_module.data["images"]).detach())


def _loader(kind: str = "dict", batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(Data(kind), batch_size=batch_size)


def test_logged_values_are_those_of_the_outputs(tmp_path: Path) -> None:
    logged, model = _Logged(), Model()
    callback = DependenceCallback("encoder", ["age", "sex"], "label")
    _trainer(tmp_path, callback, logged, num_sanity_val_steps=2).fit(model, _loader(), _loader())
    data = make_data()
    assert len(logged.values) == 2
    for values, features in zip(logged.values, logged.features, strict=True):
        expected = {}
        for label in range(2):
            mask = data["label"] == label
            columns = {
                "age": data["age"],
                "sex": data["sex"],
                "joint": torch.stack([data["age"], data["sex"]], 1),
            }
            for name, column in columns.items():
                expected[f"dcor2/{name}/label_{label}"] = _dcor(features[mask], column[mask])
        assert values == pytest.approx(expected, abs=1e-5)  # logged in float32
    assert logged.values[0] != logged.values[1]
    assert all(not module._forward_hooks for module in model.modules())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "metadata", "settings", "names"),
    [
        ("dict", "age", {}, ["age"]),
        ("dict", "both", {}, ["both_0", "both_1", "joint"]),
        ("dict", "both", {"column_names": ["a", "b"]}, ["a", "b", "joint"]),
        ("dict", "both", {"column_names": {"all": [1, 0]}}, ["all"]),
        ("dict", lambda batch: batch["both"], {}, ["column_0", "column_1", "joint"]),
        ("tuple", 2, {"prefix": "encoder"}, ["column_0", "column_1", "joint"]),
        ("tuple", 2, {"layer": "pair", "output": 1}, ["column_0", "column_1", "joint"]),
    ],
)
def test_where_metadata_are_and_what_they_are_called(
    tmp_path: Path, kind: str, metadata: Any, settings: dict[str, Any], names: list[str]
) -> None:
    model = Model()
    callback = DependenceCallback(**({"layer": "encoder", "metadata": metadata} | settings))
    trainer = _trainer(tmp_path, callback)
    trainer.validate(model, _loader(kind), verbose=False)
    prefix = settings.get("prefix", "dcor2")
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name != "val_loss"}
    data = make_data()
    features = model.encoder(data["images"])
    columns = {"age": data["age"], "both_0": data["age"], "both_1": data["sex"], "joint": data["both"]}
    columns |= {"a": data["age"], "b": data["sex"], "all": data["both"]}
    columns |= {"column_0": data["age"], "column_1": data["sex"]}
    assert values == pytest.approx(
        {f"{prefix}/{name}": _dcor(features, columns[name]) for name in names}, abs=1e-5
    )


def test_a_sample_of_the_validation_set(tmp_path: Path) -> None:
    model = Model()
    trainer = _trainer(tmp_path, DependenceCallback("encoder", "age", max_samples=20, seed=7))
    trainer.validate(model, _loader(), verbose=False)
    data = make_data()
    kept = sample_keys(0, len(data["age"]), seed=7).argsort()[:20]
    expected = _dcor(model.encoder(data["images"])[kept], data["age"][kept])
    assert trainer.callback_metrics["dcor2/age"].item() == pytest.approx(expected, abs=1e-5)


def test_early_stopping_and_checkpoints_monitor_it(tmp_path: Path) -> None:
    callbacks = lightning.callbacks
    # Nothing can be this much lower than the value before, so the first epoch without patience is the last.
    stopping = callbacks.EarlyStopping("dcor2/age", min_delta=10.0, patience=2, mode="min")
    checkpoint = callbacks.ModelCheckpoint(tmp_path, "best", monitor="dcor2/age", mode="min")
    logged = _Logged()
    trainer = _trainer(
        tmp_path,
        DependenceCallback("encoder", "age"),
        stopping,
        checkpoint,
        logged,
        max_epochs=10,
        enable_checkpointing=True,
    )
    trainer.fit(Model(), _loader(), _loader())
    assert stopping.stopped_epoch == 2
    assert len(logged.values) == 3
    best = min(values["dcor2/age"] for values in logged.values)
    assert checkpoint.best_model_score.item() == pytest.approx(best)
    assert stopping.best_score.item() == pytest.approx(logged.values[0]["dcor2/age"])


def test_only_the_first_of_several_loaders_is_measured(tmp_path: Path) -> None:
    model, data = Model(), make_data()
    loaders = [_loader(), DataLoader(Data("dict", start=30), batch_size=16)]
    trainer = _trainer(tmp_path, DependenceCallback("encoder", "age"))
    trainer.validate(model, loaders, verbose=False)
    expected = _dcor(model.encoder(data["images"]), data["age"])
    assert trainer.callback_metrics["dcor2/age"].item() == pytest.approx(expected, abs=1e-5)


def test_too_few_samples_are_warned_of(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, DependenceCallback("encoder", "age"), limit_val_batches=1)
    with pytest.warns(UserWarning, match=r"dcor2 of 'encoder' is not logged: there are only 3 sample\(s\)"):
        trainer.validate(Model(), _loader(batch_size=3), verbose=False)
    assert set(trainer.callback_metrics) == {"val_loss"}


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (
            "dict",
            {"metadata": "aeg"},
            KeyError,
            "batch has no key 'aeg': its keys are 'images', 'age', 'sex',",
        ),
        ("dict", {"metadata": ["age", "aeg"]}, KeyError, "no key 'aeg'"),
        ("dict", {"metadata": "age", "labels": "diagnosis"}, KeyError, "no key 'diagnosis': its keys are"),
        ("tuple", {"metadata": 5}, IndexError, "the batch has no entry 5: it has 3"),
        ("tuple", {"metadata": "age"}, TypeError, "no key or attribute 'age': it is a list of Tensor"),
        ("dict", {"metadata": ["age", "both"]}, ValueError, r"'both' must be one column.* \(16, 2\)"),
        (
            "dict",
            {"metadata": lambda batch: batch["age"][:5]},
            ValueError,
            "16 rows, but the metadata have 5",
        ),
        ("dict", {"metadata": lambda batch: 3.0}, ValueError, "one row per sample, got a single number"),
        ("dict", {"metadata": "age", "layer": "unused"}, RuntimeError, "the layer 'unused' did not run"),
        (
            "dict",
            {"metadata": "age", "layer": "head.0"},
            ValueError,
            "no module 'head.0': did you mean 'head'",
        ),
        ("dict", {"metadata": "both", "column_names": ["a"]}, ValueError, r"1 name\(s\) \(a\)"),
    ],
)
def test_what_does_not_fit_is_told_at_the_first_batch(
    tmp_path: Path, kind: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    trainer = _trainer(tmp_path, DependenceCallback(**({"layer": "encoder"} | settings)))
    with pytest.raises(error, match=message):
        trainer.validate(model, _loader(kind), verbose=False)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_wrong_layer_fails_before_training(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, DependenceCallback("encodr", "age"), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="no module 'encodr': did you mean 'encoder'"):
        trainer.fit(Model(), _loader(), _loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"metadata": []}, ValueError, "metadata is an empty list"),
        ({"max_samples": 2}, ValueError, "max_samples must be at least 4"),
        ({"column_names": "age"}, TypeError, "column_names must be a sequence"),
        ({"metadata": ["age", "joint"]}, ValueError, "must not contain 'joint'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DependenceCallback(**({"layer": "encoder", "metadata": "age"} | settings))


def test_the_older_package_takes_it_too(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")
    from lightning_model import make_model_class

    model = make_model_class(older.LightningModule)()
    trainer = _trainer(tmp_path, DependenceCallback("encoder", "age"), module=older)
    trainer.validate(model, _loader(), verbose=False)
    data = make_data()
    expected = _dcor(model.encoder(data["images"]), data["age"])
    assert trainer.callback_metrics["dcor2/age"].item() == pytest.approx(expected, abs=1e-5)


def test_two_processes_log_the_value_of_one(tmp_path: Path) -> None:
    model = Model()
    # 48 samples: a DistributedSampler repeats none.
    loader = DataLoader(Data("dict", stop=48), batch_size=5)
    settings = {"devices": 2, "strategy": "ddp_spawn"}
    trainer = _trainer(tmp_path, DependenceCallback("encoder", "age", "label"), **settings)
    trainer.validate(model, loader, verbose=False)
    data = make_data()
    for label in range(2):
        mask = data["label"][:48] == label
        expected = _dcor(model.encoder(data["images"][:48][mask]), data["age"][:48][mask])
        value = trainer.callback_metrics[f"dcor2/age/label_{label}"].item()
        assert value == pytest.approx(expected, abs=1e-5)
