"""Networks of the experiments, each with a slot for a normalisation after every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mdnorm.layer import MetadataNorm
from mdnorm_experiments.settings import NORMS

SLOTS = {"conv1": (16, 28, 28), "conv2": (32, 24, 24), "fc1": (84,)}
"""Where a normalisation can sit in `SyntheticNetwork`, before the ReLU, and the features' shape there."""

LAST_SLOT = "fc1"


class SyntheticNetwork(nn.Module):
    """Convolution 5×5 (16), convolution 5×5 (32), linear 84, linear 1: the paper's network for 32×32 images.

    Parameters
    ----------
    normalization : callable
        Called with a slot's name and feature shape, returns the module that sits there (`nn.Identity()` for
        none).
    """

    num_features = SLOTS[LAST_SLOT][0]

    def __init__(self, normalization: Callable[[str, tuple[int, ...]], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 24 * 24, 84)
        self.fc2 = nn.Linear(84, 1)
        self.normalization = nn.ModuleDict(
            {name: normalization(name, shape) for name, shape in SLOTS.items()}
        )

    def features(self, images: Tensor, metadata: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the (N, 84) features behind the last normalisation, before the ReLU."""
        hidden = images
        for name in SLOTS:
            hidden = getattr(self, name)(hidden if name != LAST_SLOT else hidden.flatten(1))
            module = self.normalization[name]
            inputs = (hidden, metadata, labels) if isinstance(module, MetadataNorm) else (hidden,)
            hidden = module(*inputs)
            if name != LAST_SLOT:
                hidden = hidden.relu()
        return hidden

    def classify(self, features: Tensor) -> Tensor:
        """Return the (N,) logits of group B from the features."""
        logits: Tensor = self.fc2(features.relu())
        return logits.squeeze(1)

    def forward(self, images: Tensor, metadata: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the (N,) logits. Labels are needed in training only, and by `MetadataNorm` only."""
        return self.classify(self.features(images, metadata, labels))


def check_norm(norm: str) -> None:
    """Raise ValueError for a norm that is none of `mdnorm_experiments.settings.NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


def norm_layer(norm: str, channels: int, spatial_dims: int) -> nn.Module:
    """Return a backbone's norm for maps of 2 or 3 spatial dimensions.

    Parameters
    ----------
    norm : "none", "batch" or "group"
    channels : int
        A multiple of 4 for "group".
    spatial_dims : 2 or 3

    Raises
    ------
    ValueError
        Another norm.
    """
    check_norm(norm)
    if norm == "batch":
        return nn.BatchNorm3d(channels) if spatial_dims == 3 else nn.BatchNorm2d(channels)
    return nn.GroupNorm(4, channels) if norm == "group" else nn.Identity()


class ConvolutionalBackbone(nn.Module):
    """Convolutions, each with a norm, ReLU and pooling behind it, then flattened.

    The convolutions are the submodules ``conv1``, ``conv2``, …, the norms ``norm1``, ``norm2``, ….

    Parameters
    ----------
    convolutions : sequence of nn.Module
    channels : sequence of int
        Of each convolution's result.
    norm : "none", "batch" or "group"
    spatial_dims : 2 or 3
    pool : nn.Module
        Behind each convolution but the last.
    last_pool : nn.Module
        Behind the last convolution; leaves `num_positions` positions, whatever the size of the input.
    num_positions : int
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
        super().__init__()
        self.depth = len(convolutions)
        for index, (convolution, width) in enumerate(zip(convolutions, channels, strict=True), 1):
            self.add_module(f"conv{index}", convolution)
            self.add_module(f"norm{index}", norm_layer(norm, width, spatial_dims))
        self.pool = pool
        self.last_pool = last_pool
        self.num_features = num_positions * channels[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the (N, num_features) features of (N, C, *spatial) inputs."""
        hidden = inputs
        for index in range(1, self.depth + 1):
            hidden = self.get_submodule(f"norm{index}")(self.get_submodule(f"conv{index}")(hidden)).relu()
            hidden = self.pool(hidden) if index < self.depth else self.last_pool(hidden)
        return hidden.flatten(1)


class BackboneNetwork(nn.Module):
    """Any backbone, a hidden layer whose values are "the features", ReLU and a linear classifier.

    Parameters
    ----------
    backbone : nn.Module
        From (N, C, *spatial) to (N, F), with F as its attribute ``num_features``.
    num_classes : int
    """

    num_hidden = 64

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        num_features = backbone.num_features
        if not isinstance(num_features, int):
            raise TypeError(f"num_features of the backbone must be an int, got {num_features!r}.")
        self.hidden: nn.Module = nn.Linear(num_features, self.num_hidden)
        self.activation: nn.Module = nn.ReLU()
        self.head = nn.Linear(self.num_hidden, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        """Return the (N, 64) features before the ReLU, behind what was inserted after ``hidden``."""
        features: Tensor = self.hidden(self.backbone(inputs))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Return the (N, number of classes) logits from the features."""
        logits: Tensor = self.head(self.activation(features))
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the (N, number of classes) logits."""
        return self.classify(self.features(inputs))
