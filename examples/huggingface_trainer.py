"""The Trainer of transformers: a vision transformer whose layers get the metadata from the batches.

Run it with ``python examples/huggingface_trainer.py``; it needs ``pip install 'mdnorm[huggingface]'`` and
takes a few seconds. Nothing is downloaded: the model is a small one with random weights.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import mdnorm
from mdnorm.integration import DependenceRecorder, MetadataTrainer


class Patients(Dataset[dict[str, Any]]):
    """Images 16×16: the diagnosis shows in one corner, the site in another; most patients are of one site."""

    def __init__(self, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.diagnosis = torch.randint(0, 2, (num_samples,), generator=generator)
        share = 0.25 + 0.5 * self.diagnosis
        self.site = (torch.rand(num_samples, generator=generator) < share).float()
        self.images = torch.randn(num_samples, 1, 16, 16, generator=generator)
        self.images[:, :, :8, :8] += 0.3 * self.diagnosis.reshape(-1, 1, 1, 1)
        self.images[:, :, 8:, 8:] += 0.8 * self.site.reshape(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # The keys of the model, and "metadata", which the Trainer gives to the layers.
        return {
            "pixel_values": self.images[index],
            "labels": int(self.diagnosis[index]),
            "metadata": self.site[index],
        }


def make_model() -> ViTForImageClassification:
    """Return a vision transformer."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
    )
    return ViTForImageClassification(config)


def train(model: ViTForImageClassification, with_metadata: bool, folder: str) -> None:
    """Train with the Trainer of transformers, or with the one that knows of metadata."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=6,
        per_device_train_batch_size=50,
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )
    if with_metadata:
        trainer: Trainer = MetadataTrainer(model, arguments, train_dataset=Patients(1000, seed=0))
    else:
        trainer = Trainer(model, arguments, train_dataset=Patients(1000, seed=0))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def dependence(model: ViTForImageClassification, with_metadata: bool) -> float:
    """Return dcor² of the class token of new images with the site, the mean over the two classes."""

    def class_token(output: Tensor) -> Tensor:
        return output[:, 0]

    recorder = DependenceRecorder(model.eval(), "vit.layernorm", output=class_token, within_labels=True)
    with torch.no_grad(), recorder:
        for batch in DataLoader(Patients(600, seed=1), batch_size=200):
            if with_metadata:
                with mdnorm.metadata(model, batch["metadata"]):
                    model(batch["pixel_values"])
            else:
                model(batch["pixel_values"])
            recorder.update(batch["metadata"], batch["labels"])
    values = recorder.compute()
    return sum(values.values()) / len(values)


def main() -> dict[str, float]:
    """Train once without and once with the layers."""
    results = {}
    for name in ("before", "after"):
        torch.manual_seed(0)
        model = make_model()
        if name == "after":
            # Each token has its own coefficients (granularity "element", the default). Behind the embeddings,
            # where the effect of the site is still one that adds up, and behind each block and the last
            # normalisation, which bend it.
            places = ["vit.embeddings", "vit.layers.*", "vit.layernorm"]
            print(mdnorm.insert(model, after=places, num_metadata=1, num_labels=2))
        with tempfile.TemporaryDirectory() as folder:
            train(model, with_metadata=name == "after", folder=folder)
        results[name] = dependence(model, with_metadata=name == "after")
        print(f"dcor² of the features with the site, within the classes, {name}: {results[name]:.3f}")
    return results


if __name__ == "__main__":
    main()
