"""What `mdnorm.recalibrate` adds up at the input of a layer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdnorm.arrays import design_columns, plain_features, position_mask, row_weights
from mdnorm.distributed import gather_objects
from mdnorm.layer import MetadataNorm, coefficient_shape
from mdnorm.moments import Moments, NoSamplesError
from mdnorm.regression import Standardisation, as_matrix, position_dims
from mdnorm.shrinkage import Regression, effect, independent_features

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Groups of rows whose differences tell the error of what is found again.
NUM_GROUPS = 20
# Features whose correlations are looked at.
_SOME_FEATURES = 256


class LayerMoments:
    """Float64 moments of the design and the input of one layer, and what the errors take beside them."""

    def __init__(self, name: str, layer: MetadataNorm, trained: Regression | None = None) -> None:
        self.name = name
        self.layer = layer
        self.trained = trained
        # Of all features; of some of them in the place of metadata; of their projections in groups of rows.
        self.moments: list[Moments] = []
        # Number of samples, of rows so far, sum of the weights and of their squares.
        self.sums = torch.zeros(4, dtype=torch.float64)
        self._some = torch.zeros(0, dtype=torch.int64)
        self._projection = torch.zeros(0, 0)

    def add(
        self,
        features: Tensor,
        metadata: Any = None,
        labels: Any = None,
        weights: Any = None,
        mask: Any = None,
    ) -> None:
        """Add a batch as the layer is called with it."""
        layer = self.layer
        given = None
        if metadata is None:
            given = layer.given_metadata()
            metadata, weights, mask = given.metadata, given.weights, None
            labels = given.labels if labels is None else labels
        if labels is None and layer.num_labels:
            raise ValueError(
                f"the layer {self.name!r} has num_labels={layer.num_labels} but got no labels: the forward "
                "pass of recalibrate must hand them on, as in training."
            )
        features = plain_features(features)
        if features.is_nested:
            if layer.granularity != "channel":
                return  # The layer says next that it cannot take them.
            features, mask = _padded(features, layer.channel_dim)
        elif given is not None and given.mask is not None:
            dims = position_dims(features, layer.granularity, layer.channel_dim)
            mask = given.mask_for(features, dims, f"the layer {self.name!r}")
        try:
            self._add(features, metadata, labels, weights, mask)
        except ValueError as error:
            raise ValueError(f"at the layer {self.name!r}: {error}") from error

    def _add(self, features: Tensor, metadata: Any, labels: Any, weights: Any, mask: Any) -> None:
        layer = self.layer
        dims = position_dims(features, layer.granularity, layer.channel_dim)
        layer.check_features(features, dims)
        where = None if mask is None else position_mask(mask, features, dims)
        labels = None if layer.num_labels == 0 else labels
        columns, num_metadata = design_columns(
            metadata, labels, features, layer.num_metadata, layer.num_labels, True
        )
        num_labels = columns.shape[1] - 1 - num_metadata
        layer.set_sizes(coefficient_shape(features, dims, layer.granularity), num_metadata, num_labels)
        if layer.spread is not None:
            features = layer.spread.evaluate(features, columns[:, num_labels + 1 :], dims, where)
        matrix = as_matrix(features, dims, where, columns.dtype)
        design = torch.cat([columns[:, num_labels + 1 :], columns[:, :num_labels]], 1)
        if not self.moments:
            self._start(matrix, num_metadata, num_labels)
        each = of_samples = row_weights(weights, columns, None, dims, True)
        if where is not None:
            # A sample counts as its positions in all, since another batch may be padded to another length.
            positions = where.sum(dims)[:, 0].to(columns.dtype)
            each = positions if of_samples is None else of_samples * positions
            of_samples = (each > 0).to(each) if of_samples is None else of_samples * (each > 0)
        self.moments[0].update(matrix, design, each)
        self.moments[1].update(matrix[:, :0], torch.cat([matrix[:, self._some], design], 1), each)
        if self.trained is not None:
            projected = matrix @ self._projection
            of_group = (torch.arange(len(matrix), device=matrix.device) + int(self.sums[1])) % NUM_GROUPS
            for number in of_group.unique().tolist():
                rows = of_group == number
                self.moments[2 + number].update(
                    projected[rows], design[rows], None if each is None else each[rows]
                )
        ones = torch.ones(len(columns)) if each is None else each
        samples = ones if of_samples is None else of_samples
        count = torch.tensor(len(columns), dtype=torch.float64)
        sums = samples.sum(), count, ones.sum(), ones.square().sum()
        self.sums += torch.stack([value.to(count) for value in sums])

    def _start(self, matrix: Tensor, num_metadata: int, num_labels: int) -> None:
        total, device = matrix.shape[1], matrix.device
        # Any would do: the same on all processes.
        some = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:_SOME_FEATURES]
        self._some = some.to(device)
        sizes = [(total, num_metadata, num_labels), (0, len(some), num_metadata + num_labels)]
        if self.trained is not None:
            values = effect(self.trained)[1]
            weights = torch.where(self.trained.deviation > 0, 1 / self.trained.deviation, 0) * values
            self._projection = weights.mT.to(matrix)
            sizes += [(len(values), num_metadata, num_labels)] * NUM_GROUPS
        self.moments = [Moments.empty(*numbers, device) for numbers in sizes]

    def finish(self, group: ProcessGroup | None, missing: str) -> None:
        """Merge the moments of all processes, in the order of their ranks, so that all get the same bits.

        Without any samples it raises NoSamplesError.
        """
        if group is not None:
            mine = [part.to("cpu") for part in self.moments], self.layer.num_features, self.sums
            self._merge([parts for parts in gather_objects(mine, group) if parts[0]])
        if not self.moments or self.moments[0].weight == 0 or self.layer.estimator is None:
            raise NoSamplesError(f"no samples: {missing}.")

    def _merge(self, parts: list[Any]) -> None:
        sizes = sorted({(m[0].num_metadata, m[0].num_protected - 1, shape) for m, shape, _ in parts})
        if len(sizes) > 1:
            raise ValueError(
                f"the layer {self.name!r} has different (num_metadata, num_labels, features) on the "
                f"processes: {', '.join(map(str, sizes))}."
            )
        for num_metadata, num_labels, shape in sizes:
            self.layer.set_sizes(shape, num_metadata, num_labels)
            of_processes = zip(*(moments for moments, _, _ in parts), strict=True)
            self.moments = [functools.reduce(Moments.merge, same) for same in of_processes]
            self.sums = functools.reduce(torch.add, (sums for _, _, sums in parts))

    def regression(self, units: Standardisation | None = None) -> Regression:
        """Return the fit with its errors, on the CPU, in given units or those of its own rows."""
        assert self.layer.estimator is not None
        whole, some = (part.to("cpu") for part in self.moments[:2])
        rows = float(self.sums[2].square() / self.sums[3])
        features = independent_features(some, whole.cross.shape[1])
        return Regression.of(whole, rows, features, units, self.layer.estimator.coefficients.dtype)


def _padded(features: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Return sequences of several lengths (a nested tensor) with zeros behind their ends, and their mask."""
    ones = torch.nested.as_nested_tensor([torch.ones_like(part) for part in features.unbind()])
    padded, mask = (torch.nested.to_padded_tensor(nested, 0.0) for nested in (features, ones))
    return padded, mask.select(channel_dim, 0) != 0
