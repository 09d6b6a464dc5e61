"""Erasers: maps of features after which no linear reader finds the metadata, without metadata at inference.

LEACE (Belrose et al., 2023) is, of all affine maps after which the features do not covary with a concept, the
one that changes the features least. Here the concept is the part of the metadata that the labels leave
(`within labels`), so that what label and metadata share is not erased with the metadata. With ``Σ`` the
covariance of the features, ``C`` their covariance with that part and ``W`` a whitening of ``Σ``::

    out = x − W⁺ P W (x − x̄)        P the orthogonal projection onto the columns of W C

The columns of ``C`` span what `mdnorm.MetadataNorm` subtracts along: the layer moves a row along them by its
metadata, an eraser brings all rows to the mean there.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mdnorm.arrays import (
    as_real_tensor,
    check_finite_columns,
    design_blocks,
    plain_features,
    statistics_dtype,
)
from mdnorm.moments import Moments, NoSamplesError
from mdnorm.regression import compute_dtype, full_precision, position_dims
from mdnorm.text import warn

__all__ = ["Eraser", "EraserFitter", "fit"]

# Added to the variance of each feature, in its own units: rounding would be magnified otherwise. A network
# may run in half precision after a fit in float32.
_NOISE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
# A direction in which whitened features and a metadata column (both of variance 1) covary less is rounding.
_NEGLIGIBLE = 1e-8
# The sine of the smallest angle between what is erased and what is kept: rows move by its inverse.
_PARALLEL = 1e-3
# Directions of the labels with less than this share of variance are collinear.
_COLLINEAR_LABELS = 1e-9


class Eraser(nn.Module):
    """A fixed affine map that takes a few directions out of features; it needs no metadata.

    Fitted ones come from `fit`, `EraserFitter` or `mdnorm.erase`. One made by its sizes changes nothing until
    ``load_state_dict`` fills it. It costs two products with D × R matrices.

    Parameters
    ----------
    num_features : int
        D.
    rank : int
        R, number of directions that are erased: at most the number of metadata columns.
    channel_dim : int
        Which dimension of the features has the D values: 1 for (N, D) and (N, C, H, W), −1 for (N, D) and
        tokens (N, T, D).

    Attributes
    ----------
    mean, left, right : (D,), (D, R), (D, R) buffers, float64
        ``out = x − ((x − mean) @ right) @ leftᵀ``.
    """

    mean: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, num_features: int, rank: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        for name, shape in (("mean", ()), ("left", (rank,)), ("right", (rank,))):
            self.register_buffer(name, torch.zeros(num_features, *shape, dtype=torch.float64))

    @property
    def rank(self) -> int:
        """R, the number of directions that are erased."""
        return self.left.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Return the features without the erased directions, in the same shape and dtype.

        Parameters
        ----------
        features : (N, ...) tensor, any floating dtype
            D values in the dimension `channel_dim`; all others are rows. Computed in float32 or float64.

        Raises
        ------
        TypeError, ValueError
            The features are no floating-point tensor, or have not D values in that dimension.
        """
        features = plain_features(features)
        rows = _channels_last(features, self.channel_dim)
        if rows.shape[-1] != len(self.mean):
            raise ValueError(
                f"features have {rows.shape[-1]} values in dimension {self.channel_dim} (shape "
                f"{tuple(features.shape)}), but the eraser was fitted on {len(self.mean)}."
            )
        dtype = compute_dtype(features)
        with full_precision(features.device):
            erased = (rows.to(dtype) - self.mean.to(dtype)) @ self.right.to(dtype) @ self.left.mT.to(dtype)
            # The features come first: their layout in memory is that of the output.
            return (features - erased.movedim(-1, self.channel_dim)).to(features.dtype)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{len(self.mean)}, rank={self.rank}, channel_dim={self.channel_dim}"


class EraserFitter:
    """Adds up, batch by batch, what an `Eraser` needs; memory depends on the numbers of columns only.

    Parameters
    ----------
    num_labels : int, optional
        Number of label columns, as of `mdnorm.MetadataNorm`: class indices become that many one-hot columns.
    channel_dim : int
        As in `Eraser`.
    within_labels : bool
        Whether to erase only what the labels leave of the metadata. False erases all of the metadata, and
        with it what the label shares with them.
    preserve_labels : bool
        Whether the covariance of features and labels must stay exactly as it is: with one-hot labels the mean
        of every class does not move. ``within_labels=False`` with it is SPLINCE.

    Attributes
    ----------
    moments : Moments or None
        Of the columns [features, metadata, labels]; those of several processes can be merged.

    Notes
    -----
    **What is promised**, for the rows of the fit: the erased features have no covariance with what the labels
    leave of the metadata. So among all readers that add a linear function of the features to an intercept for
    each class, none is better than the intercepts alone: by squared error, and where metadata and labels are
    one-hot columns by the log-loss; without labels then by every convex loss. The page "Where metadata will
    not be known" (docs/erasure.md) says what is not promised, and what happens to the label.

    **Why the whitening is by the covariance of all rows**, not within labels. What is erased is the same, and
    so is what an unpenalised linear head fitted afterwards predicts. By the covariance of all rows the
    features as a whole change least (in mean square, in whatever units, and in any quadratic norm), which is
    what the layers behind were trained on.

    **Collinear features.** The covariance is taken as if each feature had noise of 1e-12 of its variance
    (1e-6 where they are not float64), so that rounding is not magnified. The change is least up to that;
    what is erased does not depend on it. What the labels determine of the metadata stays.

    References
    ----------
    Belrose et al., LEACE: Perfect linear concept erasure in closed form, NeurIPS 2023 (arXiv:2306.03819).
    Holstege, Ravfogel & Wouters, Preserving task-relevant information under linear concept removal,
    NeurIPS 2025 (arXiv:2506.10703).
    """

    def __init__(
        self,
        *,
        num_labels: int | None = None,
        channel_dim: int = 1,
        within_labels: bool = True,
        preserve_labels: bool = False,
    ) -> None:
        self.num_labels = num_labels
        self.channel_dim = channel_dim
        self.within_labels = within_labels
        self.preserve_labels = preserve_labels
        self.moments: Moments | None = None
        self._sizes: tuple[int, ...] = ()
        self._noise = 0.0

    @torch.no_grad()
    def update(
        self,
        features: Tensor | ArrayLike,
        metadata: Tensor | ArrayLike,
        labels: Tensor | ArrayLike | None = None,
        weights: Tensor | ArrayLike | None = None,
    ) -> EraserFitter:
        """Add rows.

        Parameters
        ----------
        features : (N, ...) tensor or array, any real dtype
            N may be 0 or 1. Each position of a sample is a row with the sample's metadata.
        metadata : (N,) or (N, K_m) tensor or array
        labels : (N,) or (N, K_y), optional
            One-hot columns, numbers, two classes, or class indices where `num_labels` is given.
        weights : (N,), or (N, positions), optional
            A row of weight 2 counts as two, one of weight 0 (padding) as none.

        Returns
        -------
        EraserFitter
            Itself; after an error as it was before.

        Raises
        ------
        TypeError
            Something is no array of real numbers.
        ValueError
            Numbers of rows or columns that do not fit each other or the batches before, NaN or infinite
            values, negative weights, labels missing for `preserve_labels` or given without a use.
        """
        values = as_real_tensor(features, "features")
        rows = _channels_last(values, self.channel_dim)
        positions = rows.shape[:-1]
        if labels is not None and not (self.within_labels or self.preserve_labels):
            raise ValueError(
                "labels were given, but nothing uses them: give within_labels=True or preserve_labels=True."
            )
        if labels is None and self.preserve_labels:
            raise ValueError("preserve_labels=True needs labels=.")
        blocks = design_blocks(metadata, labels, num_labels=self.num_labels, num_samples=len(rows))
        sizes = (rows.shape[-1], *(block.shape[1] for block in blocks.values()))
        if sizes != (self._sizes or sizes) or sizes[0] == 0:
            got, before = (", ".join(map(str, numbers)) for numbers in (sizes, self._sizes))
            problem = f"those before had {before}" if all(sizes) else "none is no use"
            raise ValueError(f"this batch has {got} columns of features, {', '.join(blocks)}: {problem}.")
        dtype = statistics_dtype(values.device)
        parts = [rows.reshape(-1, sizes[0]).to(dtype)]
        parts += [
            block.to(values.device, dtype).repeat_interleave(positions[1:].numel(), 0)
            for block in blocks.values()
        ]
        design = torch.cat(parts, 1)
        each = None
        if weights is not None:
            each = as_real_tensor(weights, "weights").to(values.device, dtype)
            if each.shape not in (positions, positions[:1]):
                raise ValueError(
                    f"weights must have shape ({positions[0]},), one a sample"
                    + (f", or {tuple(positions)}, one a position" if len(positions) > 1 else "")
                    + f", got {tuple(each.shape)}."
                )
            each = each.reshape(len(rows), -1).expand(-1, positions[1:].numel()).reshape(-1)
            # Padding may hold anything.
            design = torch.where(each.unsqueeze(1) == 0, 0, design)
        names = ("features", *blocks)
        check_finite_columns(design, **dict(zip(names, design.split(list(sizes), 1), strict=True)))
        if self.moments is None:
            moments = Moments.empty(0, sum(sizes[:2]), sum(sizes[2:]), design.device)
            self.moments = moments.update(design[:, :0], design, each)
            self._sizes, self._noise = sizes, _NOISE.get(values.dtype, _NOISE[torch.float64])
        else:
            self.moments.update(design[:, :0], design, each)
        return self

    def eraser(self) -> Eraser:
        """Return the eraser for all rows so far, on the device of the features; more can be added afterwards.

        Raises
        ------
        ValueError
            There are no rows; or, with `preserve_labels`, features covary with labels and metadata along
            nearly the same directions (an angle with a sine below 0.001).

        Warns
        -----
        UserWarning
            There is nothing to erase: the metadata are constant or determined by the labels, or the features
            do not covary with them. The eraser changes nothing then.
        """
        if self.moments is None or self.moments.units is None:
            raise NoSamplesError("no rows: an eraser needs at least one update.")
        moments, num_features = self.moments.to("cpu"), self._sizes[0]
        units = moments.units
        assert units is not None
        # Moments have the order [labels, intercept, features, metadata]; those of the intercept are zero.
        p, x, m = moments.num_protected, slice(moments.num_protected, -self._sizes[1]), -self._sizes[1]
        covariance = moments.gram / moments.weight * (units.scale.unsqueeze(1) * units.scale)
        of_labels, cross = covariance[x, :p], covariance[x, m:]
        if self.within_labels:
            inverse = torch.linalg.pinv(covariance[:p, :p], rtol=_COLLINEAR_LABELS, hermitian=True)
            cross = cross - of_labels @ (inverse @ covariance[:p, m:])
        variance, vectors = torch.linalg.eigh(covariance[x, x])
        whitening = vectors * (variance.clamp_min(0) + self._noise).rsqrt()
        directions, sizes, combinations = torch.linalg.svd(whitening.mT @ cross, full_matrices=False)
        used = sizes > _NEGLIGIBLE
        # Not unwhitened: so the covariance that is left is zero whatever the whitening is.
        left, right = cross @ (combinations[used].mT / sizes[used]), directions[:, used]
        if not used.any():
            warn(
                "there is nothing to erase: the metadata are constant or determined by the labels, or the "
                "features do not covary with what the labels leave of them. The eraser changes nothing."
            )
        elif self.preserve_labels:
            right = _without(right, whitening.mT @ of_labels)
        eraser = Eraser(num_features, int(used.sum()), self.channel_dim)
        eraser.mean.copy_(moments.mean.sum(0)[x])
        eraser.left.copy_(left / units.scale[x].unsqueeze(1))
        eraser.right.copy_(whitening @ right * units.scale[x].unsqueeze(1))
        device = self.moments.gram.device
        return eraser.to(device, statistics_dtype(device))


def fit(
    features: Tensor | ArrayLike,
    metadata: Tensor | ArrayLike,
    labels: Tensor | ArrayLike | None = None,
    weights: Tensor | ArrayLike | None = None,
    **options: Any,
) -> Eraser:
    """Return the eraser of metadata for these features: `EraserFitter` in one call.

    Parameters
    ----------
    features, metadata, labels, weights
        As in `EraserFitter.update`, with the same errors and those of `EraserFitter.eraser`.
    **options
        Of `EraserFitter`, which says what is promised: `num_labels`, `channel_dim`, `within_labels`,
        `preserve_labels`.

    Returns
    -------
    Eraser
        A module that takes features without metadata; see its `forward`.

    Warns
    -----
    UserWarning
        There is nothing to erase.
    """
    return EraserFitter(**options).update(features, metadata, labels, weights).eraser()


def _channels_last(features: Tensor, channel_dim: int) -> Tensor:
    position_dims(features, "channel", channel_dim)
    return features.movedim(channel_dim, -1)


def _without(directions: Tensor, kept: Tensor) -> Tensor:
    """Return what reads off directions (orthonormal columns) where `kept` columns must not be touched."""
    basis, sizes, _ = torch.linalg.svd(kept, full_matrices=False)
    basis = basis[:, sizes > _NEGLIGIBLE]
    left, sizes, right = torch.linalg.svd(directions - basis @ (basis.mT @ directions), full_matrices=False)
    if len(sizes) < directions.shape[1] or bool((sizes < _PARALLEL).any()):
        raise ValueError(
            "preserve_labels=True cannot be had: features covary with labels and metadata along nearly the "
            "same directions (of few features, say). Leave it out, or give fewer metadata columns."
        )
    unit: Tensor = left / sizes @ right
    return unit
