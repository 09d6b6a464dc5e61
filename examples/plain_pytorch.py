"""Plain PyTorch: put a layer into a model that knows nothing of metadata, train, recalibrate, measure.

Run it with ``python examples/plain_pytorch.py``; it needs mdnorm alone and takes a few seconds.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mdnorm
from mdnorm.integration import DependenceRecorder


def make_data(num_samples: int, seed: int) -> TensorDataset:
    """Images 16×16: the diagnosis shows in one corner, the age in another; patients are older."""
    generator = torch.Generator().manual_seed(seed)
    diagnosis = torch.randint(0, 2, (num_samples,), generator=generator)
    age = 50 + 10 * diagnosis + 10 * torch.randn(num_samples, generator=generator)
    images = torch.randn(num_samples, 1, 16, 16, generator=generator)
    images[:, :, :8, :8] += 0.2 * diagnosis.reshape(-1, 1, 1, 1)
    images[:, :, 8:, 8:] += 0.05 * (age - 55).reshape(-1, 1, 1, 1)
    return TensorDataset(images, age, diagnosis)


def make_model() -> nn.Module:
    """Return any classifier, here a small one."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 32),
        nn.ReLU(),
        nn.Linear(32, 2),
    )


def metadata_of(age: torch.Tensor) -> torch.Tensor:
    """Return age, age² and age³, so that no step in age passes for an effect of the diagnosis."""
    return mdnorm.design.polynomial(age, 3, low=20, high=90)


def train(model: nn.Module, with_metadata: bool) -> None:
    """Train for some epochs, and make the coefficients exact."""
    data = make_data(1000, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        for images, age, diagnosis in DataLoader(data, batch_size=50, shuffle=True):
            if with_metadata:
                with mdnorm.metadata(model, metadata_of(age), diagnosis):
                    logits = model(images)
            else:
                logits = model(images)
            loss = nn.functional.cross_entropy(logits, diagnosis)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if with_metadata:
        batches = [(images, metadata_of(age), diagnosis) for images, age, diagnosis in DataLoader(data, 200)]
        mdnorm.recalibrate(model, batches)


def dependence(model: nn.Module, with_metadata: bool) -> float:
    """Return dcor² of the features of new images with age, the mean of that in patients and in controls."""
    recorder = DependenceRecorder(model.eval(), "3", within_labels=True, column_names=["age"])
    with torch.no_grad(), recorder:
        for images, age, diagnosis in DataLoader(make_data(600, seed=1), batch_size=200):
            if with_metadata:
                with mdnorm.metadata(model, metadata_of(age)):
                    model(images)
            else:
                model(images)
            recorder.update(age, diagnosis)
    values = recorder.compute()
    return sum(values.values()) / len(values)


def main() -> dict[str, float]:
    """Train once without and once with the layer."""
    results = {}
    for name in ("before", "after"):
        torch.manual_seed(0)
        model = make_model()
        if name == "after":
            # Behind the last hidden layer, before its non-linearity.
            print(mdnorm.insert(model, after="3", num_metadata=3, num_labels=2))
        train(model, with_metadata=name == "after")
        results[name] = dependence(model, with_metadata=name == "after")
        print(f"dcor² of the features with age, within the classes, {name}: {results[name]:.3f}")
    return results


if __name__ == "__main__":
    main()
