"""Lightning: one callback inserts the layer, feeds it from the batches, recalibrates it and logs dcor².

Run it with ``python examples/lightning_example.py``; it needs ``pip install 'mdnorm[lightning]'`` and takes a
few seconds.
"""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mdnorm
from mdnorm.integration import DependenceCallback, MetadataNormCallback


class Patients(Dataset[dict[str, Tensor]]):
    """Images 16×16: the diagnosis shows in one corner, the age in another; patients are older."""

    def __init__(self, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.diagnosis = torch.randint(0, 2, (num_samples,), generator=generator)
        self.age = 50 + 10 * self.diagnosis + 10 * torch.randn(num_samples, generator=generator)
        self.images = torch.randn(num_samples, 1, 16, 16, generator=generator)
        self.images[:, :, :8, :8] += 0.2 * self.diagnosis.reshape(-1, 1, 1, 1)
        self.images[:, :, 8:, 8:] += 0.05 * (self.age - 55).reshape(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "age": self.age[index], "diagnosis": self.diagnosis[index]}


class Classifier(pl.LightningModule):
    """Any LightningModule: it does not know of metadata."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 32)
        )
        self.head = nn.Linear(32, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.encoder(images).relu())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch["image"]), batch["diagnosis"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        is_right = self(batch["image"]).argmax(1) == batch["diagnosis"]
        self.log("accuracy", is_right.float().mean(), batch_size=len(is_right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def age_basis(batch: dict[str, Tensor]) -> Tensor:
    """Return age, age² and age³, so that no step in age passes for an effect of the diagnosis."""
    return mdnorm.design.polynomial(batch["age"], 3, low=20, high=90)


def dependence(logged: Any) -> float:
    """Return the mean of dcor² with age within patients and within controls."""
    values = [float(value) for name, value in logged.items() if name.startswith("dcor2/age/")]
    return sum(values) / len(values)


def main() -> dict[str, float]:
    """Train once without and once with the layer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    training = DataLoader(Patients(1000, seed=0), batch_size=50, shuffle=True)
    validation = DataLoader(Patients(600, seed=1), batch_size=200)
    callbacks = {
        "before": DependenceCallback("encoder", metadata="age", labels="diagnosis"),
        "after": MetadataNormCallback(
            age_basis, labels="diagnosis", after="encoder", inputs="image", column_names={"age": [0, 1, 2]}
        ),
    }
    results = {}
    for name, callback in callbacks.items():
        pl.seed_everything(0, verbose=False)
        model = Classifier()
        trainer = pl.Trainer(
            max_epochs=12,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, training, validation)
        # Once more, since the fit ends with the recalibration.
        trainer.validate(model, validation, verbose=False)
        results[name] = dependence(trainer.callback_metrics)
        print(f"dcor² of the features with age, within the classes, {name}: {results[name]:.3f}")
    print(callback.report)
    return results


if __name__ == "__main__":
    main()
