"""Accelerate: a training loop with `accelerator.backward`, around a model with an inserted layer.

Run it with ``python examples/accelerate_loop.py`` or ``accelerate launch examples/accelerate_loop.py``; it
needs ``pip install 'mdnorm[huggingface]'`` and takes a few seconds.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mdnorm
from mdnorm.metrics import distance_correlation_sqr


def make_data(num_samples: int, seed: int) -> TensorDataset:
    """Sequences of 10 visits with 8 values: the diagnosis shows in 4 of them, the scanner in the others.

    Most patients come from one scanner, most controls from the other.
    """
    generator = torch.Generator().manual_seed(seed)
    diagnosis = torch.randint(0, 2, (num_samples,), generator=generator)
    share = 0.25 + 0.5 * diagnosis
    scanner = (torch.rand(num_samples, generator=generator) < share).float()
    visits = torch.randn(num_samples, 10, 8, generator=generator)
    visits[:, :, :4] += 0.2 * diagnosis.reshape(-1, 1, 1)
    visits[:, :, 4:] += 0.8 * scanner.reshape(-1, 1, 1)
    return TensorDataset(visits, scanner, diagnosis)


class VisitClassifier(nn.Module):
    """An LSTM over the visits of a patient."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def features(self, visits: torch.Tensor) -> torch.Tensor:
        """Return the mean of the outputs over the visits."""
        return self.lstm(visits)[0].mean(1)

    def forward(self, visits: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.features(visits))


def train(model: nn.Module) -> nn.Module:
    """Train; a model without layers has no use for metadata."""
    accelerator = Accelerator(cpu=True)
    has_layers = len(mdnorm.integration.insertions(model)) > 0
    loader = DataLoader(make_data(1000, seed=0), batch_size=50, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    # The wrapper takes metadata as arguments, so that whatever Accelerate wraps around it hands them on.
    network = mdnorm.WithMetadata(model) if has_layers else model
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    network.train()
    for _ in range(12):
        for visits, scanner, diagnosis in loader:
            extra = {"metadata": scanner, "labels": diagnosis} if has_layers else {}
            logits = network(visits, **extra)
            loss = nn.functional.cross_entropy(logits, diagnosis)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    network = accelerator.unwrap_model(network)
    if has_layers:
        # Batches are (visits, scanner, diagnosis): input, metadata, labels.
        mdnorm.recalibrate(network, loader)
        network = network.model
    return network


def dependence(model: VisitClassifier) -> float:
    """Return dcor² of the features of new patients with the scanner, the mean over the two classes."""
    visits, scanner, diagnosis = make_data(600, seed=1).tensors
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        if mdnorm.integration.insertions(model):
            with mdnorm.metadata(model, scanner.to(device)):
                features = model.features(visits.to(device)).cpu()
        else:
            features = model.features(visits.to(device)).cpu()
    parts = [diagnosis == label for label in (0, 1)]
    return sum(float(distance_correlation_sqr(features[part], scanner[part])) for part in parts) / 2


def main() -> dict[str, float]:
    """Train once without and once with the layer."""
    results = {}
    for name in ("before", "after"):
        torch.manual_seed(0)
        model = VisitClassifier()
        if name == "after":
            # Outputs are (patients, visits, features): coefficients for each feature, shared by the visits.
            options = {"granularity": "channel", "channel_dim": -1}
            print(mdnorm.insert(model, after="lstm", num_metadata=1, num_labels=2, **options))
        results[name] = dependence(train(model))
        print(f"dcor² of the features with the scanner, within the classes, {name}: {results[name]:.3f}")
    return results


if __name__ == "__main__":
    main()
