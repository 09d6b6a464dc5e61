"""BR-Net: an adversary predicts the confounder from the features, and the encoder makes it fail.

Adeli et al., arXiv:1910.03676 (WACV 2021). Trained and punished on the samples of one class only, so that the
confounder's link with the label is not taken for an effect on the features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def squared_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the squared Pearson correlation of two vectors (N,); 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    # The sum keeps the gradient finite where a variance is zero.
    product = first.square().sum() * second.square().sum() + 1e-12
    return (first * second).sum().square() / product


class Adversary:
    """The confounder's predictor of (N, num_features) features, and its term in the encoder's loss.

    Over `total_steps` the learning rate of the predictor's Adam falls to 0 by a half cosine, as the network's
    does. It makes `steps` steps for each of the network; `strength` is the weight of the squared correlation
    in the encoder's loss. Where a batch has fewer than `memory` samples of the class, the last ones before it
    fill it up, so that a small batch too has a correlation; those of the batch carry the gradient.
    """

    def __init__(
        self,
        num_features: int,
        total_steps: int,
        *,
        strength: float,
        learning_rate: float,
        steps: int,
        memory: int = 0,
    ) -> None:
        self.strength = strength
        self.steps = steps
        self.memory = memory
        self.predictor = nn.Sequential(nn.Linear(num_features, 32), nn.Tanh(), nn.Linear(32, 1))
        self._optimizer = torch.optim.Adam(self.predictor.parameters(), lr=learning_rate)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, total_steps)
        self._features = torch.empty(0, num_features)
        self._confounder = torch.empty(0)

    def step(self, features: Tensor, confounder: Tensor, labels: Tensor) -> Tensor:
        """Train the predictor on a batch and return the encoder's term, without dimensions.

        Features are (N, D), with gradient, confounder and labels (N,). Only the samples with label 0 are
        used; with fewer than three (memory included) there is no correlation, and the term is zero.
        """
        inside = labels == 0
        current, target = features[inside], confounder[inside]
        past = slice(max(len(self._features) + len(current) - self.memory, 0), None)
        remembered = self._features[past]
        seen, known = torch.cat([remembered, current.detach()]), torch.cat([self._confounder[past], target])
        last = slice(max(len(known) - self.memory, 0), None)
        self._features, self._confounder = seen[last], known[last]
        if len(known) < 3 or len(current) == 0:
            return features.new_zeros(())
        for _ in range(self.steps):
            self._optimizer.zero_grad()
            loss: Tensor = -squared_correlation(self.predictor(seen)[:, 0], known)
            loss.backward()
            self._optimizer.step()
        self._scheduler.step()
        for parameter in self.predictor.parameters():
            parameter.requires_grad_(False)
        predicted = self.predictor(torch.cat([remembered, current]))[:, 0]
        # Only the batch carries the gradient: its share in the correlation must not weaken the term.
        term = self.strength * squared_correlation(predicted, known) * (len(known) / len(current))
        for parameter in self.predictor.parameters():
            parameter.requires_grad_(True)
        return term
