"""Networks of the experiments: a backbone, a hidden layer whose values are "the features", a classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

NORMS = ("none", "batch", "group")


def check_norm(norm: str) -> None:
    """Raise ValueError for a norm that is none of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


def norm_layer(norm: str, channels: int, spatial_dims: int) -> nn.Module:
    """Return one of `NORMS` for maps of 0, 2 or 3 spatial dimensions; "group" needs a multiple of 4 channels.

    Raises ValueError for another norm.
    """
    check_norm(norm)
    if norm == "batch":
        kinds = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        layer: nn.Module = kinds[spatial_dims](channels)
        return layer
    return nn.GroupNorm(4, channels) if norm == "group" else nn.Identity()


class ConvolutionalBackbone(nn.Sequential):
    """Convolutions, each with a norm, ReLU and pooling behind it, then flattened: (N, num_features).

    The convolutions, with results of `channels`, are the submodules ``conv1``, ``conv2``, …, the norms (one
    of `NORMS`) ``norm1``, ``norm2``, …. Behind the last one `last_pool` leaves `num_positions` positions,
    whatever the size of the (N, C, *spatial) input.
    """

    def __init__(
        self,
        convolutions: Sequence[nn.Module],
        channels: Sequence[int],
        norm: str,
        *,
        spatial_dims: int,
        pool: nn.Module,
        last_pool: nn.Module,
        num_positions: int,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (convolution, width) in enumerate(zip(convolutions, channels, strict=True), 1):
            layers[f"conv{index}"] = convolution
            layers[f"norm{index}"] = norm_layer(norm, width, spatial_dims)
            layers[f"relu{index}"] = nn.ReLU()
            layers[f"pool{index}"] = pool if index < len(channels) else last_pool
        layers["flatten"] = nn.Flatten()
        super().__init__(layers)
        self.num_features = num_positions * channels[-1]


class BackboneNetwork(nn.Module):
    """Any backbone, a hidden layer with a norm (one of `NORMS`), ReLU and a linear classifier.

    The backbone leads from (N, C, *spatial) to (N, F), F as its attribute ``num_features``. `num_outputs` is
    the number of classes, or 1 for two classes with a single logit, that of the second.
    """

    def __init__(
        self, backbone: nn.Module, num_outputs: int, num_hidden: int = 64, norm: str = "none"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        num_features: Any = backbone.num_features
        self.num_hidden = num_hidden
        self.hidden: nn.Module = nn.Linear(num_features, num_hidden)
        self.hidden_norm = norm_layer(norm, num_hidden, 0)
        self.activation: nn.Module = nn.ReLU()
        self.head = nn.Linear(num_hidden, num_outputs)

    def features(self, inputs: Tensor) -> Tensor:
        """Return the (N, num_hidden) features before the ReLU, behind what was inserted after ``hidden``."""
        features: Tensor = self.hidden_norm(self.hidden(self.backbone(inputs)))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Return the (N, num_outputs) logits from the features; (N,) of a single one."""
        logits: Tensor = self.head(self.activation(features))
        return logits.squeeze(1) if self.head.out_features == 1 else logits

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.classify(self.features(inputs))
