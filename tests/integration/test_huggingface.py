"""`MetadataTrainer`: the same as a loop by hand."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import mdnorm
from mdnorm.integration import MetadataTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


class Patients(Dataset):
    """Forty images, a key that the model knows nothing of, and metadata."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.metadata = torch.randn(40, 2, generator=generator)
        self.labels = torch.randint(0, 2, (40,), generator=generator)
        self.images = torch.randn(40, 1, 8, 8, generator=generator)
        self.images += (self.metadata[:, 0] + self.labels).reshape(-1, 1, 1, 1)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {
            "pixel_values": self.images[index],
            "labels": int(self.labels[index]),
            "metadata": self.metadata[index],
            "age": 3.0,
        }


def make_model():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    return ViTForImageClassification(config)


def arguments(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(**defaults | options)


class InOrder(MetadataTrainer):
    """Does not shuffle."""

    def _get_train_sampler(self, *_):
        return None


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_same_as_a_loop_by_hand(tmp_path, is_checkpointed):
    model, twin, data = make_model(), make_model(), Patients()
    for one in (model, twin):
        mdnorm.insert(one, "vit.layers.0", num_labels=None)
    if is_checkpointed:
        # transformers renamed it.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    trainer = InOrder(model, arguments(tmp_path), train_dataset=data)
    trainer.train()

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.train()
    for _ in range(2):
        for rows in torch.arange(40).split(16):
            with mdnorm.metadata(twin, data.metadata[rows], data.labels[rows]):
                loss = twin(pixel_values=data.images[rows], labels=data.labels[rows]).loss
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    batches = [
        {"pixel_values": data.images[rows], "metadata": data.metadata[rows], "labels": data.labels[rows]}
        for rows in torch.arange(40).split(16)
    ]
    mdnorm.recalibrate(twin, batches, progress=False)
    assert list(model.state_dict()) == list(twin.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


def test_evaluation_has_the_metadata(tmp_path):
    model, data = make_model(), Patients()
    mdnorm.insert(model, "vit.layernorm", num_labels=2)
    trainer = MetadataTrainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data)
    trainer.train()
    logits = torch.as_tensor(trainer.predict(data).predictions)
    with torch.no_grad(), mdnorm.metadata(model.eval(), data.metadata):
        torch.testing.assert_close(model(data.images).logits, logits)
    loss = nn.functional.cross_entropy(logits, data.labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    with pytest.raises(RuntimeError, match="got no metadata"):
        model(data.images)


def make_text(**options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    options = {"granularity": "channel", "channel_dim": -1, "num_labels": 1, **options}
    mdnorm.insert(model, ["bert.embeddings", "bert.encoder.layer.1"], **options)
    mdnorm.insert(model, "bert.pooler", num_labels=1)
    return model


class Sentences(Dataset):
    """Of several lengths, which the collator pads to the longest of the batch."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.metadata = torch.randn(40, 2, generator=generator)
        self.labels = torch.randint(0, 2, (40,), generator=generator)
        self.lengths = torch.randint(2, 11, (40,), generator=generator)
        self.tokens = torch.randint(3, 20, (40, 10), generator=generator)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        row = {"input_ids": self.tokens[index, : self.lengths[index]], "labels": self.labels[index]}
        return row | {"metadata": self.metadata[index], "weight": 1.0 + index % 3}

    @staticmethod
    def collate(rows):
        tokens = [row["input_ids"] for row in rows]
        mask = [torch.ones(len(row), dtype=torch.int64) for row in tokens]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("labels", "metadata")}
        batch["weight"] = torch.tensor([row["weight"] for row in rows])
        pad = nn.utils.rnn.pad_sequence
        return batch | {"input_ids": pad(tokens, True), "attention_mask": pad(mask, True)}


@pytest.mark.parametrize("mask", ["attention_mask", None])
@pytest.mark.parametrize("weights", ["weight", None])
def test_padding_does_not_count_and_weights_do(tmp_path, mask, weights):
    """The layer behind the pooler has nothing to do with the mask; the model itself gets it as ever."""
    model, twin, data = make_text(), make_text(), Sentences()
    options = {"data_collator": data.collate, "mask": mask, "weights": weights}
    trainer = InOrder(
        model,
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=data,
        eval_dataset=data,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "MetadataNorm")
        trainer.train()
        logits = torch.as_tensor(trainer.predict(data).predictions)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    batches = [data.collate([data[int(i)] for i in rows]) for rows in torch.arange(40).split(16)]

    def given(net, batch, with_labels=True):
        rest = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        extra = {"mask": batch.get(mask), "weights": batch.get(weights)}
        labels = batch["labels"] if with_labels else None
        return rest, mdnorm.metadata(net, batch["metadata"], labels, **extra)

    twin.train()
    for _ in range(2):
        for batch in batches:
            rest, block = given(twin, batch)
            with block:
                loss = twin(**rest).loss
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()

    def forward(net, batch):
        rest, block = given(net, batch)
        with block:
            return net(**rest)

    mdnorm.recalibrate(twin, batches, forward=forward, progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)
    with torch.no_grad():
        rest, block = given(twin.eval(), data.collate([data[i] for i in range(8)]), False)
        with block:
            torch.testing.assert_close(twin(**rest).logits, logits[:8])


def test_a_raw_table_in_the_batch(tmp_path):
    """With a design in the model: what its columns give."""
    data, models = Patients(), [make_model() for _ in range(2)]
    table = {"age": data.metadata[:, 0].tolist(), "site": ["ab"[i % 3 % 2] for i in range(40)]}
    design = mdnorm.Design("age + site").fit(table)
    columns = design.transform(table, dtype=torch.float64).metadata

    def collate(rows, is_raw):
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        indices = [int((data.images == row["pixel_values"]).all((1, 2, 3)).nonzero()) for row in rows]
        raw = {name: [values[index] for index in indices] for name, values in table.items()}
        return batch | {"metadata": raw if is_raw else columns[indices]}

    for model, is_raw in zip(models, (True, False), strict=True):
        # The labels of the batch are protected, which the design knows nothing of.
        mdnorm.insert(model, "vit.layernorm", num_metadata=2, num_labels=1)
        mdnorm.attach_design(model, design)
        options = {"data_collator": functools.partial(collate, is_raw=is_raw), "train_dataset": data}
        InOrder(model, arguments(tmp_path, remove_unused_columns=False), **options).train()
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name], value, msg=name)


class LayeredViTForImageClassification(ViTForImageClassification):
    """Inserts in its constructor, with all sizes; transformers choose the loss by the end of its name."""

    def __init__(self, config):
        super().__init__(config)
        mdnorm.insert(self, "vit.layernorm", num_metadata=2, num_labels=1, num_features=(5, 8))


def test_a_saved_folder_takes_the_layers_along(tmp_path):
    data = Patients()
    model = LayeredViTForImageClassification(make_model().config)
    trainer = MetadataTrainer(model, arguments(tmp_path), train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path))
    twin = LayeredViTForImageClassification.from_pretrained(tmp_path)
    state = dict(twin.state_dict())
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)
    assert bool(state["vit.layernorm.metadata_norm.estimator.coefficients"].any())
    # And the original class takes the folder without the layer.
    plain = ViTForImageClassification.from_pretrained(tmp_path)
    mdnorm.remove(twin)
    torch.testing.assert_close(dict(plain.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)


def test_without_protection_and_recalibration(tmp_path):
    model, data = make_model(), Patients()
    mdnorm.insert(model, "vit.layernorm", num_labels=0)
    options = {"train_dataset": data, "labels": None, "recalibrate": False}
    trainer = MetadataTrainer(model, arguments(tmp_path), **options)
    trainer.train()
    before = model.vit.layernorm.metadata_norm.estimator.coefficients.clone()
    assert trainer.recalibrate().names == ["vit.layernorm.metadata_norm"]
    assert not torch.equal(model.vit.layernorm.metadata_norm.estimator.coefficients, before)


def test_the_evaluation_data_as_held_out_rows(tmp_path):
    model, data = make_model(), Patients()
    mdnorm.insert(model, "vit.layernorm", num_labels=2)
    options = {"train_dataset": data, "held_out": True, "recalibrate": False}
    with pytest.raises(ValueError, match="held_out=True takes the rows of eval_dataset"):
        MetadataTrainer(model, arguments(tmp_path), **options)
    trainer = MetadataTrainer(model, arguments(tmp_path), eval_dataset=data, **options)
    trainer.train()
    layer = trainer.recalibrate().layers[0]
    assert layer.rows == layer.new_rows == 40


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="ViTForImageClassification has no MetadataNorm"):
        MetadataTrainer(make_model(), arguments(tmp_path), train_dataset=Patients())
    model = make_model()
    mdnorm.insert(model, "vit.layernorm", num_labels=1)
    trainer = MetadataTrainer(model, arguments(tmp_path), train_dataset=Patients(), metadata="height")
    with pytest.raises(KeyError, match="no key 'height'"):
        trainer.train()
    mdnorm.remove(model)
    mdnorm.insert(model, "vit.layernorm")
    with pytest.raises(ValueError, match=r"labels='labels', but every MetadataNorm .* num_labels=0"):
        MetadataTrainer(model, arguments(tmp_path), train_dataset=Patients())


class Weighted(InOrder):
    """The loss weighed by the weights of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        losses = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        loss = (self.batch_weights * losses).mean()
        return (loss, outputs) if return_outputs else loss


def test_weights_of_the_batch_are_there_for_the_loss(tmp_path):
    model, twin, data = make_text(), make_text(), Sentences()
    settings = arguments(tmp_path, remove_unused_columns=False)
    trainer = Weighted(model, settings, train_dataset=data, data_collator=data.collate, weights="weight")
    trainer.train()
    assert trainer.batch_weights is None
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    batches = [data.collate([data[int(i)] for i in rows]) for rows in torch.arange(40).split(16)]
    for batch in 2 * batches:
        rest = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with mdnorm.metadata(
            twin.train(), batch["metadata"], batch["labels"], batch["weight"], batch["attention_mask"]
        ):
            losses = nn.functional.cross_entropy(twin(**rest).logits, batch["labels"], reduction="none")
            optimizer.zero_grad()
            (batch["weight"] * losses).mean().backward()
        optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)
