"""`MetadataNormCallback` in small Lightning fits."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning_model import Data, Model, make_data
from torch import nn
from torch.utils.data import DataLoader

import mdnorm
from mdnorm.integration import DependenceRecorder, MetadataNormCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
]


class DictModel(Model):
    """Its forward takes images, for the recalibration."""

    def forward(self, images):
        return self.head(self.relu(self.pair(self.encoder(images))[1])).squeeze(1)

    def predict_step(self, batch, batch_idx):
        return self(batch["images"] if isinstance(batch, dict) else batch[0])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))


def trainer(callbacks, tmp_path, **options):
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def loaders(kind="dict"):
    return DataLoader(Data(kind), batch_size=16), DataLoader(Data(kind), batch_size=25)


def test_the_same_as_a_loop_by_hand(tmp_path):
    torch.manual_seed(0)
    model, twin = DictModel(), DictModel()
    twin.load_state_dict(model.state_dict())
    callback = MetadataNormCallback("both", "label", after="encoder", inputs="images", window=100)
    trainer([callback], tmp_path).fit(model, *loaders())

    mdnorm.insert(twin, "encoder", num_labels=None, window=100)
    optimizer = twin.configure_optimizers()
    for _ in range(2):
        for batch in loaders()[0]:
            with mdnorm.metadata(twin, batch["both"], batch["label"]):
                loss = twin.training_step(batch, 0)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    batches = [(batch["images"], batch["both"], batch["label"]) for batch in loaders()[0]]
    mdnorm.recalibrate(twin, batches, progress=False)
    assert list(model.state_dict()) == list(twin.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)
    assert [row.output_shape for row in callback.report] == [(2, 4)]


def test_what_is_logged_is_what_the_layer_puts_out(tmp_path):
    model = DictModel()
    callback = MetadataNormCallback("both", "label", after=["encoder"], inputs="images", num_metadata=2)
    fit = trainer([callback], tmp_path)
    fit.fit(model, *loaders())
    fit.validate(model, loaders()[1], verbose=False)
    recorder, data = DependenceRecorder(model.eval(), "encoder", within_labels=True), make_data()
    with torch.no_grad(), recorder, mdnorm.metadata(model, data["both"]):
        model(data["images"])
        recorder.update(data["both"], data["label"])
    expected = recorder.compute()
    logged = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("dcor2/")}
    for column in (0, 1):
        for label in (0, 1):
            value = expected[f"column_{column}/label_{label}"]
            assert logged[f"dcor2/both_{column}/label_{label}"] == pytest.approx(value, abs=1e-5)


def one_hot(batch):
    return nn.functional.one_hot(batch["label"], 2)


def continuous(batch):
    # A label that is often 0: whole batches may look like classes.
    return (batch["age"] - 1).relu()


@pytest.mark.parametrize("labels", [one_hot, continuous, lambda batch: batch["both"]])
def test_dependence_with_labels_that_are_no_class_indices(tmp_path, labels):
    """One-hot columns are classes; with other labels all samples are measured together."""
    model, is_classes = DictModel(), labels is one_hot
    callback = MetadataNormCallback("age", labels, after=["encoder"], inputs="images", recalibrate=False)
    fit = trainer([callback], tmp_path)
    fit.fit(model, *loaders())
    recorder = DependenceRecorder(
        model.eval(), "encoder", within_labels=is_classes, column_names=["age"], max_samples=2000
    )
    data = make_data()
    with torch.no_grad(), recorder, mdnorm.metadata(model, data["age"]):
        model(data["images"])
        recorder.update(data["age"], data["label"])
    logged = {
        name.removeprefix("dcor2/"): float(value)
        for name, value in fit.callback_metrics.items()
        if name.startswith("dcor2/")
    }
    assert logged == pytest.approx(recorder.compute(), abs=1e-5)
    assert ("age/label_1" in logged) == is_classes


def test_several_layers_have_prefixes_and_tuples_are_taken_apart(tmp_path):
    model = DictModel()
    callback = MetadataNormCallback(
        2, 1, after=["encoder", "pair"], output=lambda o: o[1] if isinstance(o, tuple) else o, prior=0
    )
    fit = trainer([callback], tmp_path)
    fit.fit(model, *loaders("tuple"))
    names = set(fit.callback_metrics)
    assert {"dcor2/encoder/column_0/label_0", "dcor2/pair/column_1/label_1"} <= names
    data = make_data()
    twin = copy.deepcopy(model)
    assert len(mdnorm.recalibrate(twin, [(data["images"], data["both"], data["label"])]).names) == 2
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)


def test_every_stage_has_the_metadata_and_none_are_left(tmp_path):
    model = DictModel()
    callback = MetadataNormCallback(["age", "sex"], "label", after="encoder", inputs="images")
    fit = trainer([callback], tmp_path)
    fit.fit(model, *loaders())
    fit.test(model, loaders()[1], verbose=False)
    predictions = torch.cat(fit.predict(model, loaders()[1]))
    data = make_data()
    with torch.no_grad(), mdnorm.metadata(model.eval(), data["both"]):
        torch.testing.assert_close(predictions, model(data["images"]))
    with pytest.raises(RuntimeError, match="got no metadata"):
        model(data["images"])


def test_an_error_in_a_step_leaves_no_metadata(tmp_path):
    class Failing(DictModel):
        def training_step(self, batch, batch_idx):
            self.loss(batch)
            raise KeyError("in the step")

    model = Failing()
    with pytest.raises(KeyError, match="in the step"):
        trainer([MetadataNormCallback("both", after="encoder", inputs="images")], tmp_path).fit(
            model, *loaders()
        )
    with pytest.raises(RuntimeError, match="got no metadata"):
        model(make_data()["images"])


def test_a_model_with_layers_of_its_own_and_a_function_that_runs_it(tmp_path):
    model = DictModel()
    model.encoder = nn.Sequential(model.encoder, mdnorm.MetadataNorm(4, 2, 1))
    seen = []

    def forward(module, batch):
        seen.append(len(batch["images"]))
        module(batch["images"])

    callback = MetadataNormCallback("both", "label", forward=forward, log_dependence=False)
    fit = trainer([callback], tmp_path)
    fit.fit(model, *loaders())
    # Once for the order of the layers, then the whole loader; before two validations, and at the end.
    assert seen == 3 * [16, 16, 16, 16, 2]
    assert not any(name.startswith("dcor2") for name in fit.callback_metrics)


def test_recalibration_can_be_left_out(tmp_path):
    models = []
    for recalibrate in (True, False):
        torch.manual_seed(0)
        models.append(DictModel())
        callback = MetadataNormCallback(
            "both", "label", after="encoder", inputs="images", recalibrate=recalibrate, estimator="batch"
        )
        trainer([callback], tmp_path).fit(models[-1], *loaders())
    exact, running = (model.encoder.metadata_norm.estimator.coefficients for model in models)
    assert torch.equal(models[0].encoder.weight, models[1].encoder.weight)
    assert not torch.allclose(exact, running)


@pytest.mark.parametrize("metadata", [["age", "sex"], lambda batch: {k: batch[k] for k in ("age", "sex")}])
def test_raw_columns_with_a_design(tmp_path, metadata):
    """The same as by hand; dependence is logged with the names of the design's columns."""
    torch.manual_seed(0)
    model, twin = DictModel(), DictModel()
    twin.load_state_dict(model.state_dict())
    table = {key: make_data()[key] for key in ("age", "sex", "label")}
    design = mdnorm.Design("poly(age, 2) + sex", labels="label").fit(table)
    callback = MetadataNormCallback(metadata, "label", after="encoder", inputs="images", design=design)
    fit = trainer([callback], tmp_path)
    fit.fit(model, *loaders())

    mdnorm.insert(twin, "encoder", design=design)
    optimizer = twin.configure_optimizers()
    for _ in range(2):
        for batch in loaders()[0]:
            with mdnorm.metadata(twin, *design.transform(batch, dtype=torch.float64)):
                loss = twin.training_step(batch, 0)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    columns, labels = design.transform(table, dtype=torch.float64)
    mdnorm.recalibrate(twin, [(make_data()["images"], columns, labels)], progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    columns = [name.split("/")[1] for name in fit.callback_metrics if name.startswith("dcor2/")]
    assert set(columns) == {*design.metadata_names, "joint"}


def test_weights_and_a_mask(tmp_path):
    class Tokens(DictModel):
        """Eight positions with one value each."""

        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(1, 4)

        def forward(self, images):
            return self.head(self.pair(self.encoder(images[..., None]))[1].mean(1)).squeeze(1)

        def loss(self, batch):
            return nn.functional.binary_cross_entropy_with_logits(
                self(batch["images"]), batch["label"].float()
            )

    model, data = Tokens(), make_data()
    options = {"granularity": "channel", "channel_dim": -1, "prior": 0, "estimator": "batch"}
    callback = MetadataNormCallback(
        "both",
        weights=lambda batch: batch["label"] + 1,
        mask=lambda batch: batch["images"] > -1,
        after="encoder",
        inputs="images",
        log_dependence=False,
        **options,
    )
    trainer([callback], tmp_path).fit(model, *loaders())
    twin = copy.deepcopy(model)
    batch = {"images": data["images"], "metadata": data["both"], "weights": data["label"] + 1}
    mdnorm.recalibrate(twin, [batch | {"mask": data["images"] > -1}], progress=False)
    actual, expected = (net.encoder.metadata_norm.coefficients for net in (model, twin))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    mdnorm.recalibrate(twin, [batch], progress=False)
    assert not torch.allclose(actual, twin.encoder.metadata_norm.coefficients)


def test_two_processes_recalibrate_on_the_data_of_both(tmp_path):
    model = DictModel()
    del model.unused
    # What is spawned brings back the state only: the layer must be there before.
    mdnorm.insert(model, "encoder", num_metadata=2, num_labels=1, num_features=4, prior=0)
    callback = MetadataNormCallback("both", "label", inputs="images", log_dependence=False)
    # 48 samples: a DistributedSampler repeats none.
    loader = DataLoader(Data("dict", stop=48), batch_size=8)
    fit = trainer([callback], tmp_path, devices=2, strategy="ddp_spawn", num_sanity_val_steps=0)
    # Validation recalibrates on the data of both, too, and leaves no trace.
    fit.fit(model, loader, loader)
    twin = copy.deepcopy(model)
    data = make_data()
    rows = (data[name][:48] for name in ("images", "both", "label"))
    mdnorm.recalibrate(twin, [tuple(rows)], progress=False)
    actual, expected = (net.encoder.metadata_norm.coefficients for net in (model, twin))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual.any()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_validation_loader_as_held_out_rows(tmp_path):
    model = DictModel()
    callback = MetadataNormCallback(
        "both", "label", after="encoder", inputs="images", log_dependence=False, held_out=True
    )
    trainer([callback], tmp_path).fit(model, *loaders())
    layer = callback.recalibration.layers[0]
    assert layer.new_rows == sum(len(batch["label"]) for batch in loaders()[1])
    callback = MetadataNormCallback("both", "label", after="encoder", inputs="images", held_out=True)
    with pytest.raises(ValueError, match="held_out=True takes the rows of the validation loader"):
        trainer([callback], tmp_path).fit(DictModel(), loaders()[0])


class TestErrors:
    def test_settings(self):
        with pytest.raises(ValueError, match="window would be ignored without after="):
            MetadataNormCallback("age", window=100)
        with pytest.raises(ValueError, match="give one of them"):
            MetadataNormCallback("age", inputs="images", forward=lambda *_: None)

    def test_a_model_without_layers(self, tmp_path):
        with pytest.raises(ValueError, match="DictModel has no MetadataNorm layer: give after="):
            trainer([MetadataNormCallback("age")], tmp_path).fit(DictModel(), *loaders())

    def test_a_name_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="did you mean 'encoder'"):
            trainer([MetadataNormCallback("age", after="encodre")], tmp_path).fit(DictModel(), *loaders())

    def test_batches_are_looked_at_before_training(self, tmp_path):
        fit = trainer([MetadataNormCallback("age", after="encoder")], tmp_path)
        with pytest.raises(TypeError, match="give inputs= the key of the model's input"):
            fit.fit(DictModel(), *loaders())
        fit = trainer([MetadataNormCallback("height", after="encoder", inputs="images")], tmp_path)
        with pytest.raises(KeyError, match="no key 'height': its keys are 'images', 'age'"):
            fit.fit(DictModel(), *loaders())
