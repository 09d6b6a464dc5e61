"""`MetadataNorm`: the layer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mdnorm import functional
from mdnorm.context import MetadataSlot
from mdnorm.estimators import Estimator, LogVarianceEstimator, make_estimator
from mdnorm.functional import Gram, Granularity

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mdnorm.distributed import ProcessGroupSetting

__all__ = ["MetadataNorm"]


class MetadataNorm(nn.Module):
    """Remove from the features what the metadata explain (Lu et al., CVPR 2021, arXiv:2104.09052).

    For features `f` with metadata `m` and labels `y`, fits ``f = m·β_m + y·β_y + β_0 + r`` by least squares
    and returns ``f − (m − m̄)·β_m``. In training the gradient flows through the coefficients as well;
    in evaluation remembered coefficients are used and labels are not needed. There are no parameters
    (except with "penalty").

    Parameters
    ----------
    num_features : int, tuple of int, or None
        Shape of a sample's features ("element"; an int is a 1-tuple) or number of channels ("channel").
        None takes it from the first batch or from a loaded state_dict.
    num_metadata : int or None
        Number of metadata columns, K_m ≥ 1. None takes it from the first batch, `fit_gram` or a state_dict.
    num_labels : int or None
        Number of label columns, K_y. 0 (default): labels are not used, and an effect that label and
        metadata share is removed. C for C classes given as indices or one-hot; 1 for a binary or continuous
        label. None takes it from the first batch in the same way (where no labels come with it: 0).
    estimator : str or Estimator
        Where the coefficients come from: "running" (least squares over the last `window` samples, forward
        and backward: any batch size), "batch" (least squares in the batch), "dataset" (the paper: Gram matrix
        of the training set, given once by `mdnorm.fit_gram`), "recursive" (R-MDN), "penalty" (PMDN), or an
        instance of `mdnorm.estimators.Estimator`, which brings its own settings.
    granularity : "element" or "channel"
        "element" (the paper): every value of a sample has its own coefficients. "channel": one set of
        coefficients a channel, shared by all positions, of which there may be any number.
    momentum : float, None or "auto"
        Share of a new batch in the running state; None for a cumulative average; "auto": 0.1 with "batch" and
        "dataset", a window of 500 samples with "running" and "recursive". See `Estimator`.
    window : float or None
        Instead of `momentum`: how many samples the running state looks back, whatever the batch size.
        Prefer it where batches are large against the data set: at one batch an epoch, momentum 0.1 would
        average coefficients over ten epochs of moving weights. With "running" and "recursive", at least ten
        times the number of columns.
    ridge : float
        Shrinkage of the metadata coefficients; see `mdnorm.functional.coefficient_operator`.
    center : bool
        Remove the intercept as well, as the authors' code does. The default keeps the mean of the features,
        so that the layers behind need not follow its moving estimate.
    scale : bool
        Remove the metadata's effect on the features' log-variance as well, before that on their mean; see
        `mdnorm.estimators.LogVarianceEstimator`.
    channel_dim : int
        With "channel", where the channels are: 1 for (N, C, H, W), −1 for tokens (N, T, D).
    check_finite : bool
        Look for NaN and infinite metadata in every batch; on a GPU this waits for the device.
    process_group : ProcessGroup, "auto", "world" or "local"
        With which processes moments are shared in training. "auto": those of `DistributedDataParallel`
        inside its forward passes, else none. See `mdnorm.distributed.synchronize`.
    device, dtype
        Where and in what precision the state is kept. Statistics are never below float32: `model.half()`
        leaves them in float32.

    Shape
    -----
    features (N, ...), N ≥ 0, in float64, float32, bfloat16 or float16 → the same shape and dtype.

    Notes
    -----
    - A batch of any size works, the last partial one included; 1 sample has no variation within the batch,
      so "batch" returns it unchanged in training.
    - "running" keeps state of the backward pass, too. It takes the loss to be a mean over the batch; for a
      sum give ``RunningEstimator(reduction="sum")``, or the gradient of a partial last batch is wrong by the
      ratio of the batch sizes. It takes the gradients that reach it to be those of one loss: give all losses
      to one backward pass a training forward, and take another estimator where losses alternate (a GAN) or a
      second derivative is needed.
    - Before the first training batch (or a loaded state) evaluation returns the features unchanged.
    - A batch whose features overflow to infinity or NaN passes them on but does not enter the state.

    Raises
    ------
    ValueError, TypeError
        Wrong sizes, devices or values; the message names the argument and what was expected.
    RuntimeError
        Training with "dataset" before `mdnorm.fit_gram`.

    Examples
    --------
    >>> layer = MetadataNorm(84, num_metadata=1, num_labels=1, estimator="batch")
    >>> features, age, diagnosis = torch.randn(20, 84), torch.rand(20, 1), torch.rand(20, 1).round()
    >>> layer(features, age, diagnosis).shape
    torch.Size([20, 84])
    >>> layer.eval()(features, age).shape
    torch.Size([20, 84])
    """

    estimator: Estimator
    scale_estimator: LogVarianceEstimator | None
    inserted_after: str | None = None
    """Name of the module behind which `mdnorm.insert` put the layer."""
    insertion: object | None = None
    """What `mdnorm.insert` knows about the layer."""

    def __init__(
        self,
        num_features: int | Sequence[int] | None,
        num_metadata: int | None,
        num_labels: int | None = 0,
        *,
        estimator: str | Estimator = "running",
        granularity: Granularity = "element",
        momentum: float | Literal["auto"] | None = "auto",
        ridge: float = 0.0,
        center: bool = False,
        window: float | None = None,
        scale: bool = False,
        channel_dim: int = 1,
        check_finite: bool = True,
        process_group: ProcessGroupSetting = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if granularity not in ("element", "channel"):
            raise ValueError(f"granularity must be 'element' or 'channel', got {granularity!r}.")
        shape = _feature_shape(num_features, granularity)
        num_metadata = _number_of_columns("num_metadata", num_metadata, 1)
        num_labels = _number_of_columns("num_labels", num_labels, 0)
        if _as_int(channel_dim) is None:
            raise ValueError(f"channel_dim must be an int, got {channel_dim!r}.")
        self.granularity: Granularity = granularity
        self.channel_dim = operator.index(channel_dim)
        self.check_finite = check_finite
        self.metadata_slot = MetadataSlot()
        self.estimator = make_estimator(
            estimator,
            momentum=momentum,
            ridge=ridge,
            center=center,
            window=window,
            device=device,
            dtype=dtype,
        )
        self.scale_estimator = None
        if scale:
            self.scale_estimator = LogVarianceEstimator(
                momentum=momentum, window=window, device=device, dtype=dtype
            )
        # An estimator given as an instance may bring a group of its own.
        self.process_group = self.estimator.process_group if process_group == "auto" else process_group
        self.estimator.claim()
        # What was asked for; what is, is read off the estimator's state once that exists.
        self._requested = (shape, num_metadata, num_labels)
        if shape is not None and num_metadata is not None and num_labels is not None:
            for part in self._parts:
                part.allocate(num_metadata, num_labels, shape)

    @property
    def _parts(self) -> list[Estimator]:
        return [self.estimator] if self.scale_estimator is None else [self.scale_estimator, self.estimator]

    @property
    def _sizes(self) -> tuple[tuple[int, ...] | None, int | None, int | None]:
        """`num_features`, `num_metadata` and `num_labels`: those of the state, or else those asked for."""
        num_metadata, num_labels, shape = self.estimator.sizes
        if num_metadata is not None and shape is not None:
            return shape, num_metadata, num_labels
        requested = self._requested
        if num_metadata is None:
            return requested
        return requested[0], num_metadata, num_labels

    @property
    def num_metadata(self) -> int | None:
        """Number of metadata columns K_m, or None while unknown."""
        return self._sizes[1]

    @property
    def num_labels(self) -> int | None:
        """Number of label columns K_y, or None while unknown."""
        return self._sizes[2]

    @property
    def num_features(self) -> tuple[int, ...] | None:
        """Shape of a sample's features ("element") or (channels,) ("channel"); None while unknown."""
        return self._sizes[0]

    @property
    def process_group(self) -> ProcessGroupSetting:
        """With which processes moments are shared in training."""
        return self.estimator.process_group

    @process_group.setter
    def process_group(self, value: ProcessGroupSetting) -> None:
        for part in self._parts:
            part.process_group = value

    # -- sizes ------------------------------------------------------------------------------------------

    def set_gram(self, gram: Gram) -> None:
        """Give the layer the Gram matrix of the training set; see `mdnorm.fit_gram`.

        Raises
        ------
        ValueError
            Its numbers of metadata or label columns are not the layer's.
        """
        num_labels = gram.mean.shape[0] - gram.num_metadata
        if not self.estimator.knows_design:
            for name, have, want in (
                ("metadata", gram.num_metadata, self._requested[1]),
                ("labels", num_labels, self._requested[2]),
            ):
                if want is not None and have != want:
                    raise ValueError(
                        f"the Gram matrix has {have} {name} column(s), the layer num_{name}={want}."
                    )
            for part in self._parts:
                part.allocate(gram.num_metadata, num_labels, self._requested[0])
        self.estimator.set_gram(gram)

    def _shape_of_coefficients(self, features: Tensor, positions: tuple[int, ...]) -> tuple[int, ...]:
        if not positions and self.granularity == "element":
            return tuple(features.shape[1:])
        return tuple(length for dim, length in enumerate(features.shape) if dim > 0 and dim not in positions)

    def _check_features(
        self, features: Tensor, positions: tuple[int, ...], expected: tuple[int, ...] | None
    ) -> None:
        shape = self._shape_of_coefficients(features, positions)
        if expected is None or shape == expected:
            return
        if self.granularity == "channel":
            raise ValueError(
                f"features have {shape[0]} channels in dimension {self.channel_dim} "
                f"(shape {tuple(features.shape)}), the layer was built for {expected[0]}."
            )
        raise ValueError(
            f"features of a sample have shape {shape}, the layer was built for {expected}; "
            "granularity='channel' accepts any spatial size."
        )

    def allocate_for(
        self, features: Tensor, positions: tuple[int, ...], columns: Tensor, num_metadata: int
    ) -> None:
        """Create the state for these features and design columns, where sizes were left open."""
        shape = self._shape_of_coefficients(features, positions)
        if 0 in shape:
            raise ValueError(f"features have no values: shape {tuple(features.shape)}.")
        num_labels = self.num_labels
        if num_labels is None:
            num_labels = columns.shape[1] - num_metadata
        for part in self._parts:
            part.allocate(num_metadata, num_labels, shape)

    def reset_parameters(self) -> None:
        """Forget everything learned, as after construction; a Gram matrix of the training set, too.

        Needed after `torch.nn.Module.to_empty`, which leaves whatever was in the memory.
        """
        for part in self._parts:
            part.reset_parameters()

    # -- forward ----------------------------------------------------------------------------------------

    def forward(
        self,
        features: Tensor,
        metadata: Tensor | ArrayLike | None = None,
        labels: Tensor | ArrayLike | None = None,
    ) -> Tensor:
        """Return the features without the effect of the metadata.

        Parameters
        ----------
        features : (N, ...) tensor
        metadata : (N,) or (N, K_m)
            Tensor on the features' device, or an array. Without it, metadata and labels are those of
            `mdnorm.metadata` or `mdnorm.WithMetadata`.
        labels : (N,) or (N, K_y), optional
            Needed in training where the layer has label columns, ignored in evaluation.

        Returns
        -------
        (N, ...) tensor, dtype of the features
        """
        functional.check_floating(features)
        if metadata is None:
            metadata, labels = self.given_metadata(labels)
        positions = functional.position_dims(features, self.granularity, self.channel_dim)
        expected, num_metadata, num_labels = self._sizes
        self._check_features(features, positions, expected)
        if not self.training:
            return self._evaluate(features, metadata, positions)
        if labels is None and num_labels:
            raise ValueError(
                f"labels are needed in training: the layer has num_labels={num_labels}. "
                "In evaluation (model.eval()) they are not."
            )
        if labels is not None and num_labels == 0:
            raise ValueError(
                "labels were given but the layer has num_labels=0: build it with the number of label columns "
                "to protect them, or leave the labels out."
            )
        if labels is not None and num_labels == 1 and self._requested[2] is None:
            # Found from the labels, and binary ones were all there were: indices of more classes are an error
            # in a later batch, too.
            labels = functional.label_columns(labels, None)
        columns, num_metadata = functional.design_columns(
            metadata,
            labels,
            num_samples=features.shape[0],
            num_metadata=num_metadata,
            num_labels=num_labels,
            device=features.device,
            check_finite=self.check_finite,
        )
        estimator = self.estimator
        estimator.check_ready()
        if not estimator.is_allocated:
            self.allocate_for(features, positions, columns, num_metadata)
        # Autocast would compute what goes into the state below float32.
        with functional.full_precision(features.device):
            for part in self._parts:
                features = part(features, columns, positions)
        return features

    def given_metadata(
        self, labels: Tensor | ArrayLike | None = None
    ) -> tuple[Tensor | ArrayLike, Tensor | ArrayLike | None]:
        """Return the metadata of `mdnorm.metadata`, and its labels where the layer uses them.

        Parameters
        ----------
        labels : (N,) or (N, K_y), optional
            Come before those of the context.

        Raises
        ------
        RuntimeError
            No context is open; the message names the layer where `mdnorm.insert` put it.
        """
        given = self.metadata_slot.get()
        if given is None:
            raise RuntimeError(
                f"{self._described()} got no metadata: run the model inside "
                "`with mdnorm.metadata(model, metadata, labels):`, wrap it as mdnorm.WithMetadata(model), or "
                "give the layer its metadata as an argument."
            )
        if labels is None and self.num_labels != 0:
            labels = given.labels
        return given.metadata, labels

    def _described(self) -> str:
        if self.inserted_after is not None:
            return f"the MetadataNorm inserted after {self.inserted_after!r}"
        return f"this MetadataNorm({self.extra_repr()})"

    def _evaluate(self, features: Tensor, metadata: Tensor | ArrayLike, positions: tuple[int, ...]) -> Tensor:
        columns, _ = functional.design_columns(
            metadata,
            num_samples=features.shape[0],
            num_metadata=self.num_metadata,
            device=features.device,
            check_finite=self.check_finite,
        )
        if not self.estimator.is_allocated:
            return features
        with functional.full_precision(features.device):
            for part in self._parts:
                features = part.evaluate(features, columns, positions)
        return features

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        shape = self.num_features
        text = f"{shape[0] if shape is not None and len(shape) == 1 else shape}"
        text += f", num_metadata={self.num_metadata}, num_labels={self.num_labels}"
        text += f", granularity={self.granularity!r}"
        return text if self.channel_dim == 1 else text + f", channel_dim={self.channel_dim}"


def _as_int(value: object) -> int | None:
    """Return an integer of any kind (numpy's, too) as an int, None where it is something else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _number_of_columns(name: str, value: object, least: int) -> int | None:
    if value is None:
        return None
    number = _as_int(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be an int ≥ {least} or None, got {value!r}.")
    return number


def _feature_shape(
    num_features: int | Sequence[int] | None, granularity: Granularity
) -> tuple[int, ...] | None:
    if num_features is None:
        return None
    single = _as_int(num_features)
    lengths: tuple[object, ...] = ()
    if single is not None:
        lengths = (single,)
    elif isinstance(num_features, Iterable):
        lengths = tuple(num_features)
    shape = tuple(length for length in map(_as_int, lengths) if length is not None and length > 0)
    if not shape or len(shape) < len(lengths) or (granularity == "channel" and len(shape) != 1):
        wanted = (
            "a positive int or a tuple of them" if granularity == "element" else "a positive int (channels)"
        )
        raise ValueError(f"num_features must be {wanted}, or None, got {num_features!r}.")
    return shape
