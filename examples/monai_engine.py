"""MONAI: its engine trains a 3D network whose layer gets the metadata from the batches.

Run it with ``python examples/monai_engine.py``; it needs ``pip install 'mdnorm[monai]'`` and takes some
seconds.
"""

import logging
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.engines import PrepareBatchExtraInput, SupervisedTrainer
from monai.networks.nets import DenseNet
from torch import nn

import mdnorm
from mdnorm.metrics import distance_correlation_sqr

# Where the parts of a batch are.
KEYS = {"inputs": "image", "metadata": "scanner", "labels": "label"}


def make_data(num_samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Volumes 8×8×8: the diagnosis shows in one half, the scanner in the other.

    Most patients come from one scanner, most controls from the other.
    """
    generator = torch.Generator().manual_seed(seed)
    diagnosis = torch.randint(0, 2, (num_samples,), generator=generator)
    share = 0.25 + 0.5 * diagnosis
    scanner = (torch.rand(num_samples, generator=generator) < share).float()
    volumes = torch.randn(num_samples, 1, 8, 8, 8, generator=generator)
    volumes[:, :, :4] += 0.15 * diagnosis.reshape(-1, 1, 1, 1, 1)
    volumes[:, :, 4:, ::2] += 0.8 * scanner.reshape(-1, 1, 1, 1, 1)
    rows = zip(volumes, scanner, diagnosis, strict=True)
    return [{"image": image, "scanner": site, "label": label} for image, site, label in rows]


def make_model() -> DenseNet:
    """Return a small 3D DenseNet."""
    return DenseNet(
        spatial_dims=3, in_channels=1, out_channels=2, init_features=8, growth_rate=4, block_config=(2,)
    )


def train(model: nn.Module) -> None:
    """Train with MONAI's engine; a model without layers has no use for metadata."""
    has_layers = len(mdnorm.integration.insertions(model)) > 0
    loader = DataLoader(Dataset(make_data(600, seed=0)), batch_size=50, shuffle=True)
    options: dict[str, Any] = {}
    if has_layers:
        # The engine calls network(image, metadata=batch["scanner"], labels=batch["label"]).
        options["prepare_batch"] = PrepareBatchExtraInput({"metadata": "scanner", "labels": "label"})
    network = mdnorm.WithMetadata(model) if has_layers else model
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=6,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=5e-3),
        loss_function=nn.CrossEntropyLoss(),
        decollate=False,
        **options,
    )
    trainer.logger.setLevel(logging.WARNING)
    trainer.run()
    if has_layers:
        mdnorm.recalibrate(network, loader, keys=KEYS)


def dependence(model: DenseNet) -> float:
    """Return dcor² of the features of new volumes with the scanner, the mean over the two classes."""
    loader = DataLoader(Dataset(make_data(400, seed=1)), batch_size=400)
    batch = next(iter(loader))
    features = mdnorm.features(model, "class_layers.flatten", [batch], keys=KEYS)
    parts = [batch["label"] == label for label in (0, 1)]
    scanner = batch["scanner"]
    return sum(float(distance_correlation_sqr(features[part], scanner[part])) for part in parts) / 2


def main() -> dict[str, float]:
    """Train once without and once with the layer."""
    results = {}
    for name in ("before", "after"):
        torch.manual_seed(0)
        model = make_model()
        if name == "after":
            # Behind the first convolution, where the effect of the scanner is still one that adds up: what it
            # becomes behind non-linearities differs between the classes, and such a part is not removed.
            print(mdnorm.insert(model, after="features.conv0", num_metadata=1, num_labels=2))
        train(model)
        results[name] = dependence(model)
        print(f"dcor² of the features with the scanner, within the classes, {name}: {results[name]:.3f}")
    return results


if __name__ == "__main__":
    main()
