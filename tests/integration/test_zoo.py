"""Layers inserted into the models of MONAI and transformers, built from small configurations."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mdnorm
from mdnorm.integration.applied import find_features

# MONAI remembers what it failed to import, here for a warning of torch, for the tests after these.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

NUM_SAMPLES = 24


def metadata_and_labels():
    generator = torch.Generator().manual_seed(1)
    metadata = torch.randn(NUM_SAMPLES, 2, generator=generator)
    return metadata, (torch.rand(NUM_SAMPLES, generator=generator) > 0.5).long()


def images(*shape):
    """Values that depend on the metadata, so that there is something to remove."""
    generator = torch.Generator().manual_seed(2)
    metadata, labels = metadata_and_labels()
    shift = (metadata[:, 0] + labels).reshape(-1, *[1] * len(shape))
    return torch.randn(NUM_SAMPLES, *shape, generator=generator) + shift


def densenet():
    from monai.networks.nets import DenseNet

    model = DenseNet(
        spatial_dims=3, in_channels=1, out_channels=2, init_features=4, growth_rate=2, block_config=(2, 2)
    )
    return model, images(1, 16, 16, 16)


def monai_resnet():
    from monai.networks.nets import resnet10

    model = resnet10(
        spatial_dims=3,
        n_input_channels=1,
        num_classes=2,
        conv1_t_size=3,
        widen_factor=0.125,
        shortcut_type="B",
    )
    return model, images(1, 16, 16, 16)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=2,
    )
    return ViTForImageClassification(config), {"pixel_values": images(3, 16, 16)}


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return ResNetForImageClassification(config), {"pixel_values": images(3, 16, 16)}


def video_mae():
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        num_labels=2,
    )
    return VideoMAEForVideoClassification(config), {"pixel_values": images(4, 3, 16, 16)}


def text_classifier():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=16, num_labels=2
    )
    tokens = (images(8).mul(5).abs().long() + 1).clamp_max(49)
    mask = torch.ones_like(tokens)
    mask[::2, 6:] = 0
    return DistilBertForSequenceClassification(config), {"input_ids": tokens, "attention_mask": mask}


def sequential():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 14 * 14, 8),
        nn.Linear(8, 2),
    )
    return model, images(3, 16, 16)


class LSTMClassifier(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.lstm = nn.LSTM(4, 8, batch_first=batch_first)
        self.head = nn.Linear(8, 2)

    def forward(self, sequences):
        sequences = sequences if self.batch_first else sequences.transpose(0, 1)
        return self.head(self.lstm(sequences)[0].mean(1 if self.batch_first else 0))


def lstm():
    return LSTMClassifier(batch_first=True), images(5, 4)


def lstm_of_time_first():
    return LSTMClassifier(batch_first=False), images(5, 4)


CHANNELS = {"granularity": "channel"}
TOKENS = {"granularity": "channel", "channel_dim": -1}
# Which model, after what, options of the layers, how many layers.
CASES = [
    (densenet, "features", CHANNELS, 1),
    (densenet, "**.conv2", CHANNELS, 4),
    (densenet, ["features.denseblock1", "class_layers.flatten"], {}, 2),
    (monai_resnet, "layer*", CHANNELS, 4),
    (monai_resnet, "avgpool", {}, 1),
    (vit, "vit.layers.*", TOKENS, 2),
    (vit, "vit.layers.*.attention", TOKENS, 2),
    (vit, "vit", TOKENS | {"output": "last_hidden_state"}, 1),
    (resnet, "resnet.pooler", {}, 1),
    (resnet, "resnet.encoder.stages.*", CHANNELS, 2),
    (resnet, "resnet", {"output": "pooler_output"}, 1),
    (video_mae, "videomae.encoder.layer.*", TOKENS, 2),
    (video_mae, "videomae", TOKENS, 1),
    (text_classifier, "pre_classifier", {}, 1),
    (text_classifier, "distilbert.transformer.layer.*.ffn", TOKENS, 2),
    (text_classifier, "distilbert", TOKENS | {"output": 0}, 1),
    (sequential, "4", {}, 1),
    (sequential, ["0", "4"], {}, 2),
    (lstm, "lstm", TOKENS, 1),
    (lstm, "lstm", {}, 1),
    (lstm_of_time_first, "lstm", {"sample_dim": 1}, 1),
]


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def run(model, inputs):
    return logits_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def name_of(value):
    return getattr(value, "__name__", None) or ("-".join(value) if isinstance(value, list) else str(value))


@pytest.mark.parametrize(("make", "after", "options", "num_layers"), CASES, ids=name_of)
def test_train_recalibrate_evaluate_save_and_remove(make, after, options, num_layers, tmp_path):
    model, inputs = make()
    metadata, labels = metadata_and_labels()
    original = copy.deepcopy(model.state_dict())
    options = {"num_metadata": 2, "num_labels": 2, "prior": 0} | options
    report = mdnorm.insert(model, after, example=inputs, **options)
    assert len(report) == num_layers
    assert all(row.output_shape[0] == NUM_SAMPLES for row in report)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for rows in torch.arange(NUM_SAMPLES).split(12):
        part = {k: v[rows] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
        with mdnorm.metadata(model, metadata[rows], labels[rows]):
            loss = nn.functional.cross_entropy(run(model, part), labels[rows])
            loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()

    batch = inputs | {"metadata": metadata, "labels": labels} if isinstance(inputs, dict) else None
    recalibrated = mdnorm.recalibrate(model, [batch or (inputs, metadata, labels)], shrink=False)
    assert sorted(recalibrated.names) == sorted(row.layer for row in report)

    # With the labels in the regression, what is left has no slope along the metadata.
    selector, sample_dim = options.get("output"), options.get("sample_dim", 0)
    outputs, handles = {}, []
    for row in report:

        def note(_, __, output, name=row.name):
            outputs[name] = find_features(output, selector, name).movedim(sample_dim, 0).double()

        handles.append(model.get_submodule(row.name).register_forward_hook(note))
    model.eval()
    with torch.no_grad(), mdnorm.metadata(model, metadata):
        logits = run(model, inputs)
    for handle in handles:
        handle.remove()
    design = torch.cat([metadata, nn.functional.one_hot(labels)], dim=1).double()
    for name, output in outputs.items():
        channel = options.get("channel_dim", 1) if "granularity" in options else None
        values = output.flatten(1)
        if channel is not None and output.ndim > 2:
            values = output.movedim(channel, 1).flatten(2).mean(2)
        slopes = torch.linalg.lstsq(design, values).solution[:2]
        assert float(values.std(0).max()) > 1e-4, name
        assert float(slopes.abs().max()) < 1e-5 * float(values.abs().max() + values.std(0).max()), name

    # A fresh model takes the checkpoint, and one of the original model still loads.
    twin, _ = make()
    mdnorm.insert(twin, after, **options)
    twin.load_state_dict(model.state_dict())
    mdnorm.save(model, tmp_path / "model")
    for other in (twin, mdnorm.load(make()[0], tmp_path / "model")):
        with torch.no_grad(), mdnorm.metadata(other.eval(), metadata):
            assert torch.equal(run(other, inputs), logits)
    twin.load_state_dict(original)

    with pytest.raises(RuntimeError, match=r"inserted after .* got no metadata"):
        run(model, inputs)
    assert len(mdnorm.remove(model)) == num_layers
    assert list(model.state_dict()) == list(original)
    model.load_state_dict(original)
    fresh, _ = make()
    fresh.load_state_dict(original)
    with torch.no_grad():
        assert torch.equal(run(model, inputs), run(fresh.eval(), inputs))


def test_the_loss_of_transformers_and_a_saved_folder(tmp_path):
    """The wrapper hands the labels to the model as well; a saved folder loads as a plain model."""
    model, inputs = vit()
    metadata, labels = metadata_and_labels()
    mdnorm.insert(model, "vit.layernorm", num_metadata=2, num_labels=2, **TOKENS)
    output = mdnorm.WithMetadata(model, forward_labels=True)(**inputs, metadata=metadata, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    mdnorm.remove(model)
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(run(twin.eval(), inputs), run(model.eval(), inputs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant):
    metadata, labels = metadata_and_labels()
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model, inputs = vit()
        mdnorm.insert(model, "vit.layers.*", num_metadata=2, num_labels=2, **TOKENS)
        if is_checkpointed:
            # transformers renamed it.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with mdnorm.metadata(model.train(), metadata, labels):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss.detach(), gradients, dict(model.state_dict())))
    torch.testing.assert_close(results[1], results[0])


PLACES = re.findall(
    r"^\| (?:MONAI|transformers) `(\w+)`.*?\| `([\w.]+)`(.*?)\| (.*?) \|$",
    (Path(__file__).parents[2] / "docs" / "where-to-put-it.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def model_of(name):
    """A small model of a class that the page on places names, and an input."""
    import monai.networks.nets as monai
    import transformers

    volumes = torch.randn(2, 1, 32, 32, 32)
    if name == "resnet10":
        return monai_resnet()[0], volumes
    if name == "BasicUNet":
        return monai.BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 16, 4)), volumes
    if name == "DenseNet121":
        return monai.DenseNet121(3, 1, 2, init_features=4, growth_rate=2), volumes
    if name == "EfficientNetBN":
        return monai.EfficientNetBN("efficientnet-b0", False, spatial_dims=3, in_channels=1), volumes
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    sizes = {
        "DistilBert": {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        "ViT": {"image_size": 16, "patch_size": 8} | text,
        "Swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2]},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    }
    family, task = re.fullmatch(r"(\w+)For(\w+)", name).groups()
    config = getattr(transformers, f"{family}Config")(**sizes.get(family, text))
    model = getattr(transformers, name)(config)
    if task == "SequenceClassification":
        return model, {"input_ids": torch.randint(1, 49, (2, 7))}
    size = getattr(config, "image_size", 32)
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


def test_the_page_on_places_is_read():
    assert len(PLACES) == 12


@pytest.mark.parametrize(("name", "after", "more", "output"), PLACES, ids=[place[0] for place in PLACES])
def test_the_places_that_the_page_names(name, after, more, output):
    model, inputs = model_of(name)
    if "identity" in more:
        model.classifier = nn.Sequential(nn.Identity(), model.classifier)
    options = CHANNELS if "granularity" in more else {}
    (row,) = mdnorm.insert(model, after, num_metadata=2, num_labels=2, example=inputs, **options)
    if output.startswith("maps"):
        assert len(row.output_shape) == 5
    else:
        assert len(row.output_shape) == output.count(",") + 1
        assert set(row.output_shape[2:]) <= {1}
