"""A tiny model and data for the tests of the Lightning callback: light to import in a second process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


def make_data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    age, noise = torch.randn(50, generator=generator), torch.randn(50, 8, generator=generator)
    sex = (torch.rand(50, generator=generator) > 0.5).float()
    label = torch.arange(50) % 2
    images = noise + age[:, None] + label[:, None]
    return {"images": images, "age": age, "sex": sex, "label": label, "both": torch.stack([age, sex], dim=1)}


class Data(Dataset[Any]):
    """Samples ``start … stop − 1``, as dicts or as tuples."""

    def __init__(self, kind: str, start: int = 0, stop: int = 50) -> None:
        self.kind = kind
        self.data = {name: values[start:stop] for name, values in make_data().items()}

    def __len__(self) -> int:
        return len(self.data["age"])

    def __getitem__(self, index: int) -> Any:
        sample = {name: values[index] for name, values in self.data.items()}
        return sample if self.kind == "dict" else (sample["images"], sample["label"], sample["both"])


class _Pair(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, :1], features * 1.0


def make_model_class(base: Any) -> Any:
    class LinearModel(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 4)
            self.pair = _Pair()
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Linear(4, 1)
            self.unused = nn.Linear(4, 1)
            self.data = make_data()
            with torch.no_grad():
                weights = torch.linspace(-0.4, 0.6, 32).reshape(4, 8)
                self.encoder.weight.copy_(weights)
                self.encoder.bias.zero_()

        def loss(self, batch: Any) -> Tensor:
            images, label = (batch["images"], batch["label"]) if isinstance(batch, dict) else batch[:2]
            logits = self.head(self.relu(self.pair(self.encoder(images))[1])).squeeze(1)
            return nn.functional.binary_cross_entropy_with_logits(logits, label.float())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            name = f"val_loss_{dataloader_idx}" if dataloader_idx else "val_loss"
            size = len(batch["images"] if isinstance(batch, dict) else batch[0])
            self.log(name, self.loss(batch), sync_dist=True, add_dataloader_idx=False, batch_size=size)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return LinearModel


class Model(make_model_class(lightning.pytorch.LightningModule)):  # type: ignore[misc]
    """At the top of the module, so that a second process finds it."""
