"""`MetadataNorm`: the layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mdnorm.arrays import (
    check_finite_columns,
    columns_of,
    design_columns,
    label_columns,
    plain_features,
    position_mask,
    row_weights,
    statistics_dtype,
)
from mdnorm.context import Given, MetadataSlot
from mdnorm.distributed import GroupSetting, active_group, world_size
from mdnorm.distributed import eager as uncompiled_function
from mdnorm.estimators import ESTIMATORS, Batch, Estimator, Spread
from mdnorm.estimators.base import batch_moments
from mdnorm.moments import Moments
from mdnorm.regression import (
    Granularity,
    Standardisation,
    apply_operator,
    coefficient_operator,
    full_precision,
    is_eager,
    position_dims,
    prior_share,
    regress,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch.distributed import ProcessGroup

    from mdnorm.distributed import ProcessGroupSetting


class MetadataNorm(nn.Module):
    """Remove from the features what the metadata explain (Lu et al., CVPR 2021, arXiv:2104.09052).

    For features `f` with metadata `m` and labels `y`, fits ``f = m·β_m + y·β_y + β_0 + r`` by least squares
    and returns ``f − (m − m̄)·β_m``. In training the gradient flows through the coefficients as well; in
    evaluation remembered coefficients are used and labels are not needed. There are no parameters (except
    with "penalty").

    Parameters
    ----------
    num_features : int, tuple of int, or None
        Shape of a sample's features ("element"; an int is a 1-tuple) or number of channels ("channel"). None
        takes it from the first batch or from a loaded state_dict.
    num_metadata : int or None
        Number of metadata columns, K_m ≥ 1. None as above, or by `mdnorm.fit_gram`.
    num_labels : int or None
        Number of label columns, K_y. 0 (default): labels are not used, and an effect that label and metadata
        share is removed. C for C classes given as indices or one-hot; 1 for a binary or continuous label.
        None as above (where no labels come with the first batch: 0).
    estimator : str or callable
        Where the coefficients come from: "running" (least squares over the last `window` samples, forward and
        backward: any batch size), "batch" (least squares in the batch), "dataset" (the paper: Gram matrix of
        the training set, given once by `mdnorm.fit_gram`), "recursive" (R-MDN), "penalty" (PMDN); or a
        subclass of `mdnorm.estimators.Estimator`, or a `functools.partial` of one with settings of your own.
    granularity : "element" or "channel"
        "element" (the paper): every value of a sample has its own coefficients. "channel": one set of
        coefficients a channel, shared by all positions, of which there may be any number.
    window : float, optional
        How many samples the running state looks back, whatever the batch size; infinity: all. By default 500.
        At least ten times the number of columns with "running" and "recursive".
    prior : float, optional
        Shrinkage of the coefficients, worth so many samples (default 1): a batch of N samples alone shrinks
        by 1 / N, a full window hardly. 0: exact least squares, which moves features without bound where the
        labels of a few samples nearly determine their metadata.
    decay : float, optional
        Size of an added gradient that shrinks the removed effect, relative to the gradient of the loss (by
        default 0.5 for feature vectors, after a slow rise; 0 for maps and tokens). 0: the published gradient,
        with which a network that memorises its training samples uses the metadata as an input on new ones.
        See `mdnorm.estimators.LeastSquares`.
    center : bool
        Remove the intercept as well, as the authors' code does. The default keeps the mean of the features,
        so that the layers behind need not follow its moving estimate.
    scale : bool
        Remove the metadata's effect on the features' log-variance as well, before that on their mean; see
        `mdnorm.estimators.Spread`.
    channel_dim : int
        With "channel", where the channels are: 1 for (N, C, H, W), −1 for tokens (N, T, D).
    check_finite : bool
        Look for NaN and infinite metadata in every batch; on a GPU this waits for the device.
    process_group : ProcessGroup, "auto", "world" or "local"
        With which processes moments are shared in training. "auto": those of `DistributedDataParallel` inside
        its forward passes, else none. See `mdnorm.distributed.synchronize`.
    device, dtype
        Where and in what precision the state is kept. Statistics are never below float32: `model.half()`
        leaves them.
    **options
        Further settings of the estimator, such as ``reduction="sum"`` of `mdnorm.estimators.LeastSquares`.

    Shape
    -----
    features (N, ...), N ≥ 0, in float64, float32, bfloat16 or float16 → the same shape and dtype, a plain
    tensor.

    Notes
    -----
    - A batch of any size works; "batch" returns 1 sample unchanged in training.
    - "running" keeps state of the backward pass, too. It takes the loss to be a mean over the batch (for a
      sum give ``reduction="sum"``), with one backward pass a training forward. Take another estimator where
      losses alternate (a GAN) or a second derivative is needed.
    - Metadata are constants in training. In evaluation the gradient reaches them.
    - Before the first training batch (or a loaded state) evaluation returns the features unchanged.
    - A batch whose features overflow to infinity or NaN passes them on but does not enter the state.

    Raises
    ------
    ValueError, TypeError
        Wrong sizes, devices or values; the message names the argument and what was expected.
    RuntimeError
        Training with "dataset" or "penalty" before `mdnorm.fit_gram`.

    Examples
    --------
    >>> layer = MetadataNorm(84, num_metadata=1, num_labels=1, estimator="batch")
    >>> features, age, diagnosis = torch.randn(20, 84), torch.rand(20, 1), torch.rand(20, 1).round()
    >>> layer(features, age, diagnosis).shape
    torch.Size([20, 84])
    >>> layer.eval()(features, age).shape
    torch.Size([20, 84])
    """

    estimator: Estimator | None
    """Owner of the state; None until all sizes are known."""
    spread: Spread | None
    """What ``scale=True`` removes; None without it."""
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
        estimator: str | Callable[..., Estimator] = "running",
        granularity: Granularity = "element",
        window: float | None = None,
        prior: float | None = None,
        decay: float | None = None,
        center: bool = False,
        scale: bool = False,
        channel_dim: int = 1,
        check_finite: bool = True,
        process_group: ProcessGroupSetting = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if granularity not in ("element", "channel"):
            raise ValueError(f"granularity must be 'element' or 'channel', got {granularity!r}.")
        self.num_features = _feature_shape(num_features, granularity)
        self.num_metadata = _number_of_columns("num_metadata", num_metadata, 1)
        self.num_labels = _number_of_columns("num_labels", num_labels, 0)
        if _as_int(channel_dim) is None:
            raise ValueError(f"channel_dim must be an int, got {channel_dim!r}.")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}.")
        self.granularity: Granularity = granularity
        self.channel_dim = operator.index(channel_dim)
        self.check_finite = check_finite
        self.metadata_slot = MetadataSlot()
        self._group_setting = GroupSetting(process_group)
        self._last_group: GroupSetting | None = None
        self._finds_labels = num_labels is None
        self._gram: Moments | None = None
        self._make = _maker(estimator)
        memory: dict[str, Any] = {} if window is None else {"window": window}
        given = {name: value for name, value in (("prior", prior), ("decay", decay)) if value is not None}
        self._options = {"center": center} | memory | given | options
        self._spread_options = memory if scale else None
        # Remembers device and dtype until the sizes are known; moved by `.to()` like any buffer.
        self.register_buffer("_placement", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.register_module("estimator", None)
        self.register_module("spread", None)
        try:
            # Wrong settings are an error now, not at the first batch.
            self._make(1, 0, (1,), device="meta", **self._options)
        except TypeError as error:
            raise TypeError(f"estimator={estimator!r}: {error}") from error
        self._build()

    def _build(self) -> None:
        """Make the estimator as soon as all sizes are known, and hand it the training set's moments."""
        sizes: Any = (self.num_metadata, self.num_labels, self.num_features)
        if self.estimator is None and None not in sizes:
            placement: Any = {"device": self._placement.device, "dtype": self._placement.dtype}
            make: Any = Spread
            # A state made under inference mode could never be trained on.
            with torch.inference_mode(False):
                self.estimator = self._make(*sizes, **placement, **self._options).train(self.training)
                if self._spread_options is not None:
                    self.spread = make(*sizes, **placement, **self._spread_options).train(self.training)
        if self.estimator is not None and self._gram is not None:
            for part in self.parts:
                part.set_gram(self._gram.to(part.origin.device))
            self._gram = None

    @property
    def parts(self) -> list[Estimator]:
        """What corrects the features, in this order."""
        return [part for part in (self.spread, self.estimator) if part is not None]

    @property
    def coefficients(self) -> Tensor:
        """What evaluation removes for one unit of each metadata column: (K_m, *num_features), a copy.

        RuntimeError where the sizes are not known yet.
        """
        if self.estimator is None:
            raise RuntimeError(f"{self._described()} has no coefficients before its first batch.")
        part = self.estimator
        scale = part.scale[part.num_protected :].to(part.coefficients)
        return part.coefficients[: part.num_metadata] * scale.reshape(-1, *[1] * len(part.num_features))

    @property
    def process_group(self) -> ProcessGroupSetting:
        """With which processes moments are shared in training."""
        return cast("ProcessGroupSetting", self._group_setting.value)

    @process_group.setter
    def process_group(self, value: ProcessGroupSetting) -> None:
        self._group_setting = GroupSetting(value)

    def _active_group(self, repeated: bool) -> ProcessGroup | None:
        """Return the group to share moments in during this forward pass, None for this process alone."""
        if repeated:
            return cast("ProcessGroup | None", self._last_group.value if self._last_group else None)
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        group = active_group(self._group_setting.value)
        if group is not None or self._last_group is not None:
            self._last_group = None if group is None else GroupSetting(group)
        return group

    def set_sizes(
        self, num_features: tuple[int, ...], num_metadata: int | None, num_labels: int | None
    ) -> None:
        """Give a layer of open sizes its sizes."""
        self.num_features, self.num_metadata, self.num_labels = num_features, num_metadata, num_labels
        self._build()

    def set_gram(self, moments: Moments) -> None:
        """Give the layer the moments of the design over the training set; see `mdnorm.fit_gram`.

        ValueError where their numbers of metadata or label columns are not the layer's.
        """
        have = {"metadata": moments.num_metadata, "labels": moments.num_protected - 1}
        for name, number in have.items():
            expected = getattr(self, f"num_{name}")
            if expected is not None and number != expected:
                raise ValueError(f"the Gram matrix has {number} {name} column(s), not num_{name}={expected}.")
        self.num_metadata, self.num_labels = have["metadata"], have["labels"]
        self._gram = moments
        self._build()

    def reset_parameters(self) -> None:
        """Forget everything learned, as after construction; needed after `torch.nn.Module.to_empty`."""
        for part in self.parts:
            part.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        shapes = [state_dict.get(f"{prefix}estimator.{name}") for name in ("coefficients", "mean", "origin")]
        if self.estimator is None and all(isinstance(tensor, Tensor) for tensor in shapes):
            coefficients, mean, origin = (tuple(cast(Tensor, tensor).shape) for tensor in shapes)
            self.set_sizes(coefficients[1:], mean[0], origin[0] - 1 - mean[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- forward ------------------------------------------------------------------------------------------

    def forward(
        self,
        features: Tensor,
        metadata: Tensor | ArrayLike | None = None,
        labels: Tensor | ArrayLike | None = None,
        weights: Tensor | ArrayLike | None = None,
        mask: Tensor | ArrayLike | None = None,
    ) -> Tensor:
        """Return the features without the effect of the metadata.

        Parameters
        ----------
        features : (N, ...) tensor
        metadata : (N,) or (N, K_m)
            Tensor on the features' device, or an array. If omitted, it and the arguments below are taken
            from `mdnorm.metadata` or `mdnorm.WithMetadata`.
        labels : (N,) or (N, K_y), optional
            Needed in training where the layer has label columns, ignored in evaluation.
        weights : (N,), optional
            Of the samples in the fit: one of weight 2 counts as two, one of weight 0 as none (its features
            are corrected all the same).
        mask : (N, ...) bool, optional
            With "channel", the positions that count (tokens that are no padding), in the order of the
            features' dimensions without that of the channels. Only they enter the fit, and only they are
            corrected.

        Returns
        -------
        (N, ...) tensor, dtype of the features
        """
        features = plain_features(features)
        given = None
        if metadata is None:
            given = self.given_metadata()
            metadata, weights, mask = given.metadata, given.weights, None
            labels = given.labels if labels is None and self.num_labels != 0 else labels
        if features.is_nested:
            if self.training or features.layout == torch.strided:
                return self._forward_nested(features, metadata)
            # A jagged tensor computes like a padded one, and has no padding.
            given = mask = None
        dims = position_dims(features, self.granularity, self.channel_dim)
        if given is not None and given.mask is not None:
            mask = given.mask_for(features, dims, self._described())
        self.check_features(features, dims)
        where = None if mask is None else position_mask(mask, features, dims)
        if not self.training:
            columns = columns_of(
                metadata,
                "metadata",
                num_samples=features.shape[0],
                num_columns=self.num_metadata,
                device=features.device,
            )
            columns = columns.to(statistics_dtype(features.device))
            if self.check_finite:
                check_finite_columns(columns, metadata=columns)
            with full_precision(features.device):
                for part in self.parts:
                    features = part.evaluate(features, columns, dims, where)
            return features
        if labels is None and self.num_labels:
            raise ValueError(
                f"labels are needed in training: the layer has num_labels={self.num_labels}. In evaluation "
                "(model.eval()) they are not."
            )
        if labels is not None and self.num_labels == 0:
            raise ValueError(
                "labels were given but the layer has num_labels=0: build it with their number of columns."
            )
        if labels is not None and self.num_labels == 1 and self._finds_labels:
            # Found from the labels, and binary ones were all there were: indices of more classes are an error
            # in a later batch, too.
            labels = label_columns(labels, None)
        columns, num_metadata = design_columns(
            metadata, labels, features, self.num_metadata, self.num_labels, check_finite=self.check_finite
        )
        if self.estimator is None:
            self.set_sizes(
                coefficient_shape(features, dims, self.granularity),
                num_metadata,
                columns.shape[1] - 1 - num_metadata,
            )
        weights = row_weights(weights, columns, where, dims, self.check_finite)
        # As in `MetadataSlot.get`: activation checkpointing repeats a forward pass in the backward pass.
        repeated = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        group, eager = self._active_group(repeated), is_eager(columns)
        batch = Batch(columns, weights, dims, where, group, eager, repeated, self.check_finite)
        # Autocast would compute what goes into the state below float32.
        with full_precision(features.device):
            for part in self.parts:
                features = part(features, batch)
        return features

    def _forward_nested(self, features: Tensor, metadata: Tensor | ArrayLike) -> Tensor:
        """Evaluate sequences of several lengths, the nested tensor that `nn.TransformerEncoder` makes."""
        if self.training or self.granularity != "channel":
            raise ValueError(
                "nested features need model.eval() and granularity='channel'; else pad them and give mask=."
            )
        rows = columns_of(metadata, "metadata", num_samples=features.size(0))
        parts = [
            self.forward(part.unsqueeze(0), row.unsqueeze(0))[0]
            for part, row in zip(features.unbind(), rows, strict=True)
        ]
        return torch.nested.as_nested_tensor(parts)

    def given_metadata(self) -> Given:
        """Return what `mdnorm.metadata` gave for this batch; RuntimeError where no context is open."""
        given = self.metadata_slot.get()
        if given is None:
            raise RuntimeError(
                f"{self._described()} got no metadata: run the model inside `with mdnorm.metadata(model, "
                "metadata, labels):`, or as mdnorm.WithMetadata(model), or give the layer its metadata."
            )
        return given

    def _described(self) -> str:
        if self.inserted_after is not None:
            return f"the MetadataNorm inserted after {self.inserted_after!r}"
        return f"this MetadataNorm({self.extra_repr()})"

    def check_features(self, features: Tensor, dims: tuple[int, ...]) -> None:
        """Raise ValueError where features are not of the shape that the layer was built for."""
        shape, expected = coefficient_shape(features, dims, self.granularity), self.num_features
        if 0 in shape:
            raise ValueError(f"features have no values: shape {tuple(features.shape)}.")
        if expected is None or shape == expected:
            return
        if self.granularity == "channel":
            raise ValueError(
                f"features have {shape[0]} channels in dimension {self.channel_dim} (shape "
                f"{tuple(features.shape)}), the layer was built for {expected[0]}."
            )
        raise ValueError(
            f"features of a sample have shape {shape}, the layer was built for {expected} "
            "(granularity='channel': for any number of positions)."
        )

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        shape = self.num_features
        text = f"{shape[0] if shape is not None and len(shape) == 1 else shape}"
        text += f", num_metadata={self.num_metadata}, num_labels={self.num_labels}"
        text += f", granularity={self.granularity!r}"
        return text if self.channel_dim == 1 else text + f", channel_dim={self.channel_dim}"


def metadata_norm(
    features: Tensor,
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None = None,
    *,
    weights: Tensor | ArrayLike | None = None,
    mask: Tensor | ArrayLike | None = None,
    prior: float = 0.0,
    granularity: Granularity = "element",
    channel_dim: int = 1,
    check_finite: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Remove from features what the metadata explain in this batch: the layer without a state.

    Parameters
    ----------
    features : (N, ...) tensor
        Floating dtype; (N, D), (N, C, L), (N, C, H, W), (N, C, T, H, W), (N, T, D), …
    metadata : (N,) or (N, K_m)
        What is removed. Constants: no gradient flows to them.
    labels : (N,) or (N, K_y), optional
        What is protected: in the regression, never removed.
    weights, mask
        As in `MetadataNorm.forward`.
    prior, granularity, channel_dim, check_finite
        As in `MetadataNorm`; a prior of 0, exact least squares, is the default here.
    process_group : ProcessGroup, optional
        The batch is that of all its processes together. None: of this process alone.

    Returns
    -------
    (N, ...) tensor, dtype of the features
        With fewer samples than columns the directions that vary within the batch are removed; with none (one
        sample, constant metadata, an empty batch) the features come back unchanged.

    Raises
    ------
    TypeError, ValueError
        As of the layer.

    References
    ----------
    Lu et al., Metadata Normalization, CVPR 2021 (arXiv:2104.09052), section 3.
    """
    features = plain_features(features)
    dims = position_dims(features, granularity, channel_dim)
    where = None if mask is None else position_mask(mask, features, dims)
    columns, num_metadata = design_columns(metadata, labels, features, None, None, check_finite)
    protected = columns.shape[1] - num_metadata
    row_weight = row_weights(weights, columns, where, dims, check_finite)
    group = None if world_size(process_group) == 1 else process_group

    def step(features: Tensor) -> Tensor:
        batch = Batch(columns, row_weight, dims, where, group, is_eager(columns), False)
        units = Standardisation.of(columns, protected - 1, row_weight, group)
        rows = (columns - units.origin) * units.scale
        count, left, gram, cross = batch_moments(features, rows, batch)
        operator = coefficient_operator(gram, protected, prior_share(prior, count), dtype=cross.dtype)
        basis = rows[:, protected:] - gram[protected - 1, protected:]
        coefficients, projector = (apply_operator(operator, part, cross.dtype) for part in (cross, left))
        return regress(features, basis, coefficients, projector, dims, where, group=group)

    with full_precision(features.device):
        return step(features) if group is None else uncompiled_function(step)(features)


def coefficient_shape(features: Tensor, dims: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of the coefficients of one metadata column: that of a sample, or (channels,)."""
    if granularity == "element":
        return tuple(features.shape[1:])
    return tuple(length for dim, length in enumerate(features.shape) if dim > 0 and dim not in dims)


def _maker(estimator: str | Callable[..., Estimator]) -> Callable[..., Estimator]:
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {estimator!r}.")
        return ESTIMATORS[estimator]
    if isinstance(estimator, nn.Module) or not callable(estimator):
        raise TypeError(
            "estimator must be a name, a subclass of mdnorm.estimators.Estimator or a functools.partial of "
            f"one (each layer makes its own), got {estimator!r}."
        )
    return estimator


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
    is_shape = _as_int(num_features) is None and isinstance(num_features, Iterable)
    lengths: Any = num_features if is_shape else (num_features,)
    shape = tuple(_as_int(length) or 0 for length in lengths)
    if not shape or min(shape) < 1 or (granularity == "channel" and len(shape) != 1):
        wanted = "a positive int" + (" (channels)" if granularity == "channel" else " or a tuple of them")
        raise ValueError(f"num_features must be {wanted}, or None, got {num_features!r}.")
    return shape
