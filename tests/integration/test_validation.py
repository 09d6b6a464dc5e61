"""Validation in Lightning and transformers with exact coefficients; training as without."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_model import Data, make_data
from test_huggingface import Patients, arguments, make_model
from test_metadata_norm_callback import DictModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

import mdnorm
from mdnorm.integration import MetadataNormCallback, MetadataTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Recorder(pl.Callback):
    """What each validation said, what an exact one says, and the state of the training behind it."""

    def __init__(self):
        self.logged, self.exact, self.states = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if len(self.logged) > len(self.states):
            self.states.append((copy.deepcopy(module.state_dict()), torch.get_rng_state()))

    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking:
            return
        self.logged.append(float(trainer.callback_metrics["val_loss"]))
        data, twin = make_data(), copy.deepcopy(module).eval()
        with torch.random.fork_rng(), torch.no_grad():
            mdnorm.recalibrate(twin, [(data["images"], data["both"], data["label"])], progress=False)
            with mdnorm.metadata(twin, data["both"]):
                self.exact.append(float(twin.loss(data)))


def fit(tmp_path, is_recalibrated, callbacks=(), **options):
    torch.manual_seed(0)
    model, recorder = DictModel(), Recorder()
    callback = MetadataNormCallback(
        "both",
        "label",
        after="encoder",
        inputs="images",
        validate_recalibrated=is_recalibrated,
        window=100,
        log_dependence=False,
    )
    trainer = pl.Trainer(
        **{"max_epochs": 4, "enable_checkpointing": bool(callbacks)} | options,
        accelerator="cpu",
        callbacks=[callback, recorder, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    train = DataLoader(Data("dict"), batch_size=4, shuffle=True)
    trainer.fit(model, train, DataLoader(Data("dict"), batch_size=25))
    return model, recorder, trainer


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 5}])
def test_lightning_validates_exactly_and_trains_as_without_it(tmp_path, options):
    runs = [fit(tmp_path, is_recalibrated, **options) for is_recalibrated in (True, False)]
    for recorder, is_exact in ((runs[0][1], True), (runs[1][1], False)):
        assert len(recorder.logged) >= 4
        assert (recorder.logged == pytest.approx(recorder.exact, abs=1e-5)) == is_exact
    assert len(runs[0][1].states) > 2
    for (one, numbers), (other, same_numbers) in zip(runs[0][1].states, runs[1][1].states, strict=True):
        assert torch.equal(numbers, same_numbers)
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    for name, value in runs[0][0].state_dict().items():
        assert torch.equal(value, runs[1][0].state_dict()[name]), name


def test_checkpoints_and_early_stopping_of_lightning_go_by_the_exact_measure(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=1)
    # The loss gets better and better: with "max" the first epoch stays the best.
    stop = EarlyStopping("val_loss", mode="max", patience=2)
    _, recorder, _ = fit(tmp_path, True, [best, stop], max_epochs=10)
    assert len(recorder.exact) == 3 + max(range(len(recorder.exact)), key=recorder.exact.__getitem__)
    assert float(best.best_model_score) == pytest.approx(min(recorder.exact), abs=1e-5)
    epoch = min(range(len(recorder.exact)), key=recorder.exact.__getitem__)
    saved = torch.load(best.best_model_path, weights_only=False)
    assert saved["epoch"] == epoch
    # It has the state of the training, so that a fit can go on from it.
    if epoch < len(recorder.states):
        for name, value in saved["state_dict"].items():
            assert torch.equal(value, recorder.states[epoch][0][name]), name


def test_an_error_in_a_validation_leaves_the_state_of_the_training(tmp_path):
    class Failing(DictModel):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                self.coefficients = self.encoder.metadata_norm.coefficients
                raise RuntimeError("broken")

    model = Failing()
    callback = MetadataNormCallback("both", "label", after="encoder", inputs="images", window=100)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(Data("dict"), batch_size=4)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(model, loader, loader)
    assert not torch.equal(model.coefficients, model.encoder.metadata_norm.coefficients)


class Watcher(TrainerCallback):
    """As `Recorder`."""

    def __init__(self, data):
        self.data, self.exact, self.states = data, [], []

    def on_step_begin(self, args, state, control, model, **_):
        if len(self.exact) > len(self.states):
            self.states.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))

    def on_evaluate(self, args, state, control, model, **_):
        twin, data = copy.deepcopy(model), self.data
        batch = {"pixel_values": data.images, "metadata": data.metadata, "labels": data.labels}
        with torch.no_grad():
            mdnorm.recalibrate(twin, [batch], progress=False)
            with mdnorm.metadata(twin.eval(), data.metadata):
                logits = twin(pixel_values=data.images).logits
        self.exact.append(float(nn.functional.cross_entropy(logits, data.labels)))


def train(tmp_path, is_recalibrated, callbacks=(), **options):
    model, data = make_model(), Patients()
    mdnorm.insert(model, "vit.layers.0", num_labels=2, window=100)
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings = arguments(tmp_path, num_train_epochs=3, **options)
    watcher = Watcher(data)
    trainer = MetadataTrainer(
        model,
        settings,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[watcher, *callbacks],
        evaluate_recalibrated=is_recalibrated,
    )
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return model, watcher, logged, trainer


def test_the_trainer_of_transformers_evaluates_exactly_and_trains_as_without_it(tmp_path):
    runs = [train(tmp_path / str(flag), flag) for flag in (True, False)]
    for (_, watcher, logged, _), is_exact in zip(runs, (True, False), strict=True):
        assert len(logged) == 5
        assert (logged == pytest.approx(watcher.exact, abs=1e-5)) == is_exact
    for (one, numbers), (other, same_numbers) in zip(runs[0][1].states, runs[1][1].states, strict=True):
        assert torch.equal(numbers, same_numbers)
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    for name, value in runs[0][0].state_dict().items():
        assert torch.equal(value, runs[1][0].state_dict()[name]), name


def test_the_best_model_of_transformers_is_that_of_the_exact_measure(tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    options = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    _, watcher, logged, trainer = train(tmp_path, True, [stop], **options)
    assert trainer.state.best_metric == pytest.approx(min(watcher.exact), abs=1e-5)
    assert trainer.state.best_global_step == 2 * (1 + min(range(len(logged)), key=logged.__getitem__))
    # Loaded, and recalibrated: as good as it was.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(watcher.exact), abs=1e-5)


def test_several_columns_of_a_batch(tmp_path):
    """A list of keys: as the columns in one tensor."""

    class Columns(Patients):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            first, second = row.pop("metadata")
            return row | {"age": first, "site": second}

    models = [make_model() for _ in range(2)]
    for model, data, key in zip(models, (Patients(), Columns()), ("metadata", ["age", "site"]), strict=True):
        mdnorm.insert(model, "vit.layernorm", num_metadata=2, num_labels=1)
        MetadataTrainer(model, arguments(tmp_path), train_dataset=data, metadata=key).train()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, msg=name)
