"""What the paper's later readers ask for: BR-Net, GroupDRO, DFR, and LEACE with a retrained head.

Groups are pairs of class and metadata group, as in the literature on spurious correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mdnorm import erasure
from mdnorm_experiments.data.confounded import Samples
from mdnorm_experiments.networks import BackboneNetwork

_STRENGTHS = [10.0**exponent for exponent in range(-4, 3)]
_LEAST_OF_GROUP = 10
Draw = tuple[Tensor, Tensor]
"""Row numbers of some samples and their weights."""


def class_and_group(samples: Samples) -> Tensor:
    """Return the number of each sample's pair of class and metadata group, (N,), of those that occur."""
    codes: Tensor = torch.stack([samples.labels, samples.groups], 1).unique(dim=0, return_inverse=True)[1]
    return codes


class GroupWeights:
    """The loss of group-distributionally robust training: the groups that are worst weigh most.

    Sagawa et al., Distributionally robust neural networks, ICLR 2020 (arXiv:1911.08731), algorithm 1 with the
    groups' mean losses in a batch; those that a batch lacks have the loss 0. A weight grows by the factor
    ``exp(step_size * loss)`` at each step, before all, ``weights`` (G,), are divided by their sum.
    """

    def __init__(self, samples: Samples, *, step_size: float) -> None:
        self.groups = class_and_group(samples)
        self.step_size = step_size
        number = int(self.groups.max()) + 1
        self.weights = torch.full((number,), 1 / number)

    def loss(self, losses: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted loss of a batch from those of its samples, (n,), and move the weights."""
        inside = nn.functional.one_hot(self.groups[rows], len(self.weights)).to(losses.dtype)
        of_group = losses @ inside / inside.sum(0).clamp(min=1)
        self.weights = (self.weights.log() + self.step_size * of_group.detach()).softmax(0)
        return self.weights @ of_group


def balanced_draw(groups: Tensor, generator: torch.Generator) -> Draw:
    """Draw as many samples of each group as the smallest has, and not fewer than 10.

    A smaller group comes as a whole, with weights above 1 that make up for what it lacks. Groups (N,) int64
    are numbers from 0, each of which occurs. Returns row numbers and weights, (n,) each; the weights have the
    same sum in each group.
    """
    members = [torch.nonzero(groups == group)[:, 0] for group in range(int(groups.max()) + 1)]
    size = max(min(map(len, members)), _LEAST_OF_GROUP)
    drawn = [rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in members]
    return torch.cat(drawn), torch.cat([torch.full((len(rows),), size / len(rows)) for rows in drawn])


def refit_head(head: nn.Linear, inputs: Tensor, labels: Tensor, draws: Sequence[Draw]) -> None:
    """Replace the weights of a classifier by the mean of those of logistic regressions, one a draw.

    The strength of each L2 penalty on standardised inputs is chosen by the log-loss in cross-validation.
    Inputs are (N, F), labels (N,) int64; every class occurs in every draw.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    values = inputs.double()
    mean, scale = values.mean(0), values.std(0)
    # Hidden units that are dead would be divided by 0.
    scale[scale == 0] = 1
    values, fits = (values - mean) / scale, []
    for rows, weights in draws:
        search = GridSearchCV(
            LogisticRegression(max_iter=1000), {"C": _STRENGTHS}, scoring="neg_log_loss", cv=5
        )
        search.fit(values[rows].numpy(), labels[rows].numpy(), sample_weight=weights.numpy())
        fits.append(search.best_estimator_)
    weight = torch.stack([torch.from_numpy(fitted.coef_) for fitted in fits]).mean(0)
    bias = torch.stack([torch.from_numpy(fitted.intercept_) for fitted in fits]).mean(0)
    if len(weight) == 1:  # of two classes there is one logit, the difference of both
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - weight @ (mean / scale))


def refit(
    network: BackboneNetwork,
    features_of: Callable[[Samples], Tensor],
    trained: Samples,
    held_out: Samples,
    *,
    fit: str,
    draws: int = 1,
    seed: int,
) -> None:
    """Fit the head of a trained network again, all before it frozen; the network is changed in place.

    "balanced": on `draws` draws, balanced by class and group, from samples that are confounded and held out,
    averaged (DFR: Kirichenko et al., Last layer re-training is sufficient for robustness to spurious
    correlations, ICLR 2023). "erased": on the training samples, with a LEACE eraser of the metadata within
    labels before the head, which stays. `features_of` returns the features (N, D) of samples.
    """
    if fit == "balanced":
        generator = torch.Generator().manual_seed(seed)
        groups = class_and_group(held_out)
        chosen = [balanced_draw(groups, generator) for _ in range(draws)]
        refit_head(network.head, network.activation(features_of(held_out)), held_out.labels, chosen)
        return
    inputs = network.activation(features_of(trained))
    eraser = erasure.fit(inputs, trained.metadata, trained.labels, num_labels=network.head.out_features)
    # Behind the activation: there nothing non-linear follows that could bring back what was erased.
    network.hidden = nn.Sequential(network.hidden, network.activation, eraser)
    network.activation = nn.Identity()
    everything = (torch.arange(len(trained)), torch.ones(len(trained)))
    refit_head(network.head, eraser(inputs), trained.labels, [everything])


def squared_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the squared Pearson correlation of two vectors (N,); 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    # The sum keeps the gradient finite where a variance is zero.
    product = first.square().sum() * second.square().sum() + 1e-12
    return (first * second).sum().square() / product


class Adversary:
    """BR-Net's predictor of the confounder from features, and its term in the encoder's loss.

    Adeli et al., WACV 2021 (arXiv:1910.03676); Zhao et al., Nature Communications 2020. It sees features (N,
    `num_features`) of one class only, so that the confounder's link with the label is not taken for an effect
    on the features. Over `total_steps` the learning rate of its Adam falls to 0 by a half cosine. It makes
    `steps` steps for each of the network; `strength` is the weight of the squared correlation. `memory` is a
    number of samples: where a batch has fewer of the class, the last ones before it, without gradient, fill
    it up to that number, so that a small batch too has a correlation.
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
