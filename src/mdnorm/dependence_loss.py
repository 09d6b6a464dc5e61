"""A penalty on what the outputs of a network say about the metadata beyond the label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mdnorm.arrays import as_real_tensor, check_finite_columns, columns_of, plain_features, statistics_dtype
from mdnorm.distributed import GroupSetting, active_group, all_reduce_sum, eager, world_size
from mdnorm.metrics.checks import check_integer
from mdnorm.metrics.kernels import median_distance
from mdnorm.metrics.pairwise import Distances, GaussianKernel, PairwiseMatrix, centred_products
from mdnorm.metrics.reservoir import check_column_names, column_groups
from mdnorm.metrics.samples import MIN_SAMPLES, UNDEFINED, as_samples

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mdnorm.distributed import ProcessGroupSetting

# Of √HSIC of the outputs, which is below 0.5: a smaller one makes the penalty too steep close to a constant.
_LEAST_KERNEL_SCALE = 0.5
# Of the mean of outputs and metadata as a function of a continuous label.
_DEGREE = 3


class DependenceLoss(nn.Module):
    """Keep the outputs of a network from depending on the metadata among samples of the same label.

    Added to the loss of the task, in training only: the network itself needs no metadata, neither in training
    nor at inference. Each metadata variable has a multiplier of its own, which rises slowly while the
    dependence is above `at_most` and falls while it is below, and all together are bounded by `strength`. A
    setting of a wrong type or out of range is a TypeError or ValueError.

    Parameters
    ----------
    measure : {"dcor2", "hsic"}
        Bias-corrected squared distance correlation, or HSIC with Gaussian kernels, normalised (the debiased
        kernel alignment, `mdnorm.metrics.cka`): the outputs' bandwidth is `unit`, the metadata's the median.
    at_most : float or None
        Dependence that is tolerated for each variable, above 0. None: the multipliers rise to their bound, in
        equal shares, whatever the dependence.
    strength : float
        Bound on the sum of the multipliers, above 0.
    warm_up : int
        Samples after which a multiplier that only rises has reached `strength`.
    variables : sequence of str, or mapping from str to sequence of int, optional
        Metadata columns that belong together, ``{"age": [0, 1, 2], "site": [3, 4]}``: one multiplier each.
        Columns that no variable has do not count. By default each column is a variable of its own.
    labels : {"classes", "continuous"}
        How the label enters. "classes": the dependence within each class, averaged with the number of samples
        of each. "continuous": that of what a cubic polynomial of the label leaves of outputs and metadata.
    window : int
        Samples that the dependence is estimated from, at least 20: those of the batch and the last ones
        before it, whose outputs are remembered. More are less noise, but come from older weights.
    unit : float
        What counts as a small difference of outputs. Below it the penalty fades, so that it cannot hold
        outputs at a constant. 1 suits logits; for other outputs take about their standard deviation. 0 gives
        the plain distance correlation, which has no such safeguard ("dcor2" only).
    softmax : bool
        The outputs are logits of a softmax, which does not see what is common to all classes: that is taken
        away. False for features, and for one logit a class.
    process_group : ProcessGroup, "world", "auto" or "local"
        Whose samples count in training, see `mdnorm.distributed.synchronize`. "world": all processes; each
        must then call the loss in each step, and gradients are averaged, as `DistributedDataParallel` does.
        "local": this one.

    Attributes
    ----------
    dependence : Tensor, (V,) float64
        Of each variable in the last batch and the memory: without bias, so about 0 where there is none, and
        sometimes negative.
    multipliers : Tensor, (V,) float64
        For the next batch.

    Notes
    -----
    - The gradient is that of ``Σ λ_v dCov²(outputs, variable v) / scale``, the scale a constant. The
      distances d of the outputs are replaced by ``√(d² + unit²)``, of negative type as well, so that the
      population value is 0 if and only if outputs and metadata are independent; the scale takes the spread
      of the outputs to be at least `unit`. With a plain ratio of d itself, the gradient would not shrink with
      the outputs, and would keep the network from learning anything.
    - Only the samples of the batch have a gradient; it is scaled so that its expectation is that of the
      window as a whole. A class with fewer than 4 samples in the window contributes nothing.
    - In evaluation mode the value is that of the given samples alone, and nothing is remembered.
    - The state (memory and multipliers) is in the `state_dict`: training that is resumed goes on the same.
    - Everything is computed in float64 (float32 on a device without it), autocast or not: O(window²) a step.
    - `torch.compile` leaves the loss uncompiled. The gradient is not meant to be differentiated again.
    - Samples with NaN or infinite outputs are left out: the loss of the task shows them.

    References
    ----------
    .. [1] Székely, G. J., & Rizzo, M. L. (2014). Partial distance correlation with methods for
       dissimilarities. The Annals of Statistics, 42(6), 2382–2412.
    .. [2] Zhen, X., Meng, Z., Chakraborty, R., & Singh, V. (2022). On the versatile uses of partial distance
       correlation in deep learning. European Conference on Computer Vision.
    .. [3] Lyons, R. (2013). Distance covariance in metric spaces. The Annals of Probability, 41(5),
       3284–3305. (Distances of negative type.)

    Examples
    --------
    >>> import mdnorm
    >>> network, penalty = nn.Linear(5, 2), mdnorm.DependenceLoss(at_most=0.01)
    >>> images, age, label = torch.randn(8, 5), torch.rand(8), torch.arange(8) % 2
    >>> logits = network(images)
    >>> loss = nn.functional.cross_entropy(logits, label) + penalty(logits, age, label)
    >>> loss.backward()
    """

    memory: Tensor
    multipliers: Tensor
    dependence: Tensor

    def __init__(
        self,
        measure: Literal["dcor2", "hsic"] = "dcor2",
        *,
        at_most: float | None = 0.01,
        strength: float = 3.0,
        warm_up: int = 15_000,
        variables: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
        labels: Literal["classes", "continuous"] = "classes",
        window: int = 200,
        unit: float = 1.0,
        softmax: bool = True,
        process_group: ProcessGroupSetting = "world",
    ) -> None:
        super().__init__()
        if measure not in ("dcor2", "hsic"):
            raise ValueError(f"measure must be 'dcor2' or 'hsic', got {measure!r}.")
        if labels not in ("classes", "continuous"):
            raise ValueError(f"labels must be 'classes' or 'continuous', got {labels!r}.")
        check_integer("window", window, 20)
        check_integer("warm_up", warm_up, 1)
        if at_most is not None and not 0 < at_most < 1:
            raise ValueError(
                f"at_most must be between 0 and 1, or None for a fixed strength, got {at_most!r}: even of "
                "independent variables an estimate is often as large as 0.005."
            )
        if not 0 < strength < math.inf:
            raise ValueError(f"strength must be a positive number, got {strength!r}.")
        if not 0 <= unit < math.inf or (measure == "hsic" and unit == 0):
            raise ValueError(f"unit must be a positive number (or 0, with measure='dcor2'), got {unit!r}.")
        check_column_names(variables)
        self.measure, self.at_most, self.strength, self.warm_up = measure, at_most, strength, warm_up
        self.variables, self.labels, self.window = variables, labels, window
        self.unit, self.softmax = unit, softmax
        self._group_setting = GroupSetting(process_group)
        for name in ("memory", "multipliers", "dependence"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.measure}, at_most={self.at_most}, strength={self.strength}, window={self.window}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in list(self.named_buffers(recurse=False)):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor):
                setattr(self, name, own.new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, outputs: Tensor, metadata: Tensor | ArrayLike, labels: Tensor | ArrayLike | None
    ) -> Tensor:
        """Return the penalty of a batch, to be added to a loss that is a mean over the samples.

        Parameters
        ----------
        outputs : (N,) or (N, D) tensor
            Of the network, of any floating-point dtype. N may be 1, and 0.
        metadata : (N,) or (N, K) tensor or array
            The variables themselves (age, and not a spline of it), of any real dtype; categories one-hot.
        labels : (N,) or (N, 1) tensor or array, or None
            Of any real dtype, one number for each class. None: the dependence as such, that which the label
            explains included.

        Returns
        -------
        0-dimensional tensor
            In the dtype of the outputs, at least float32; 0 without enough samples. Negative where the
            estimate is.

        Raises
        ------
        TypeError, ValueError
            Outputs are no floating-point tensor; metadata or labels are complex, not numeric, NaN or
            infinite; a wrong shape, number of rows or device; outputs or metadata with other columns than
            before; classes so many that none has 4 samples in a full window.
        """
        value: Tensor = eager(self._penalty)(outputs, metadata, labels)
        return value

    def _penalty(self, outputs: Tensor, metadata: Any, labels: Any) -> Tensor:
        outputs = plain_features(outputs)
        if outputs.ndim not in (1, 2) or outputs.shape[1:] == (0,):
            raise ValueError(
                f"outputs must have shape (N,) or (N, D), got {tuple(outputs.shape)}: give the flattened "
                "outputs or their mean over positions."
            )
        dtype = statistics_dtype(outputs.device)
        own = (outputs.unsqueeze(1) if outputs.ndim == 1 else outputs).to(dtype)
        known = self._known(metadata, labels, outputs)
        finite = own.detach().isfinite().all(1)
        own, known = own[finite], known[finite]
        if self.softmax and own.shape[1] > 1:
            own = own - own.mean(1, keepdim=True)
        width = own.shape[1]
        rows = torch.cat([own.detach(), known], 1)
        groups = list(column_groups(self.variables, known.shape[1] - 1, "variables").values())
        self._prepare(rows, len(groups))

        group = active_group(self._group_setting.value) if self.training else None
        start = 0
        if group is not None:
            rows, start = _gathered(rows, group)
        num_new = len(rows)
        if self.training:
            rows = torch.cat([rows, self.memory])[: max(self.window, num_new)]
        x = torch.cat([rows[:start, :width], own, rows[start + len(own) :, :width]])
        multipliers = self.multipliers
        value, dependence = self._of(x, rows[:, width:-1], rows[:, -1], multipliers, groups)
        if self.training and dependence is None and len(rows) >= self.window and self.labels == "classes":
            raise ValueError(
                f"no class of labels has {MIN_SAMPLES} of the last {len(rows)} samples, so nothing can be "
                "estimated: DependenceLoss(labels='continuous') takes labels that are not classes, a larger "
                "window more classes."
            )
        if dependence is not None:
            self.dependence = dependence
            if self.training and num_new:
                self.multipliers = self._next(multipliers, dependence, num_new)
        if self.training:
            self.memory = rows[: self.window]
            # What the samples of the batch stand for: those of the window, and in the mean over processes.
            share = len(rows) / max(num_new, 1) * world_size(group)
            value = value.detach() + share * (value - value.detach())
        return value.to(torch.promote_types(outputs.dtype, torch.float32))

    def _known(self, metadata: Any, labels: Any, outputs: Tensor) -> Tensor:
        """Return metadata and label (N, K + 1), checked, constants."""
        if labels is None:
            labels = torch.zeros(len(outputs), device=outputs.device)
        blocks = {
            name: columns_of(values, name, num_samples=len(outputs), device=outputs.device)
            for name, values in (("metadata", metadata), ("labels", as_real_tensor(labels, "labels")))
        }
        if blocks["labels"].shape[1] != 1:
            raise ValueError(
                f"labels must have shape (N,) or (N, 1), got {tuple(blocks['labels'].shape)}: of one-hot "
                "columns give labels.argmax(1)."
            )
        dtype = statistics_dtype(outputs.device)
        known = torch.cat([block.detach().to(dtype) for block in blocks.values()], 1)
        check_finite_columns(known, **blocks)
        return known

    def _prepare(self, rows: Tensor, num_variables: int) -> None:
        """Move the state to the device of the batch; make it where this is the first one."""
        if self.multipliers.numel() == 0:
            self.multipliers = rows.new_zeros(num_variables)
            self.dependence = rows.new_zeros(num_variables)
            self.memory = rows[:0]
        if self.memory.shape[1:] != rows.shape[1:] or len(self.multipliers) != num_variables:
            raise ValueError(
                f"outputs, metadata and label have {rows.shape[1]} columns together, but before they had "
                f"{self.memory.shape[1]}: each output needs a DependenceLoss of its own."
            )
        # Also where the module was moved, or brought to half precision.
        for name in ("memory", "multipliers", "dependence"):
            setattr(self, name, getattr(self, name).to(rows))

    def _next(self, multipliers: Tensor, dependence: Tensor, num_new: int) -> Tensor:
        """Return the multipliers after a batch."""
        violation = torch.full_like(multipliers, 1 / len(multipliers))
        if self.at_most is not None:
            # Relative, so that it falls from too small a dependence as it rises to too large a one.
            found = dependence.clamp(min=0)
            violation = (found - self.at_most) / (found + self.at_most)
        raised = (multipliers + self.strength * num_new / self.warm_up * violation).clamp(min=0)
        return raised * (self.strength / raised.sum().clamp(min=self.strength))

    def _of(
        self, x: Tensor, metadata: Tensor, labels: Tensor, multipliers: Tensor, groups: list[list[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the penalty and the dependence (V,), None of too few samples."""
        parts = []
        if self.labels == "continuous":
            if len(x) > _DEGREE + MIN_SAMPLES:
                scaled = (labels - labels.mean()) / labels.std().clamp(min=torch.finfo(labels.dtype).tiny)
                basis = torch.linalg.vander(scaled, N=_DEGREE + 1)
                inverse = torch.linalg.pinv(basis)
                parts.append((x - basis @ (inverse @ x), metadata - basis @ (inverse @ metadata)))
        else:
            parts = [(x[inside], metadata[inside]) for inside in map(labels.eq, labels.unique())]
        # Without samples as well it has a gradient, which is 0.
        penalty, total, dependence = x[:0].sum(), 0, torch.zeros_like(multipliers)
        for part, known in parts:
            if len(part) < MIN_SAMPLES:
                continue
            weights, found = self._weights(part.detach(), known, multipliers, groups)
            distances = torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist")
            if self.measure == "hsic":
                values = (distances / self.unit).square().mul(-0.5).exp()
            else:
                # The distance itself has no derivative at 0, where torch takes 0 for it.
                values = (
                    torch.hypot(distances, torch.full_like(distances, self.unit)) if self.unit else distances
                )
            penalty = penalty + len(part) * (weights * values).sum()
            dependence += len(part) * found
            total += len(part)
        return (penalty / total, dependence / total) if total else (penalty, None)

    @torch.no_grad()
    def _weights(
        self, x: Tensor, metadata: Tensor, multipliers: Tensor, groups: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Return the weight of each pair of samples in the penalty (n, n), and the dependence (V,)."""
        blocks = {f"variable {index}": metadata[:, columns] for index, columns in enumerate(groups)}
        samples = as_samples(outputs=x, **blocks, min_samples=MIN_SAMPLES, reason=UNDEFINED)
        matrices: list[PairwiseMatrix] = [Distances(rows) for rows in samples.rows]
        if self.measure == "hsic":
            # Its square must be a number; so large or small, it is a constant all the same.
            unit = math.ldexp(self.unit, min(max(-samples.exponents[0], -400), 400))
            widths = [unit, *map(median_distance, samples.rows[1:])]
            matrices = [GaussianKernel(*pair) for pair in zip(samples.rows, widths, strict=True)]
        products = centred_products(matrices)
        roots = products.products.diagonal().clamp(min=0).sqrt()
        exact = products.correlations()[0, 1:]
        num_samples = len(x)
        weights = torch.zeros(num_samples, num_samples, dtype=roots.dtype, device=roots.device)
        for index, multiplier in enumerate(multipliers.tolist(), 1):
            if multiplier == 0 or bool(products.is_zero[index]):
                continue
            everything, effects = slice(0, num_samples), products.effects[index]
            values = matrices[index].block(everything, everything)
            weights += multiplier / roots[index] * (values - effects[:, None] - effects)
        # The scale of the outputs in their own units: distances have units, kernels none.
        scale, least = roots[0], _LEAST_KERNEL_SCALE
        if self.measure == "dcor2":
            scale, least = torch.ldexp(scale, roots.new_tensor(samples.exponents[0])), self.unit
        scale = scale.clamp(min=least) * (num_samples * (num_samples - 3))
        weights.fill_diagonal_(0)
        if bool(scale == 0):
            return weights.zero_().to(x), exact.to(x)
        return (weights / scale).to(x), exact.to(x)


def _gathered(rows: Tensor, group: Any) -> tuple[Tensor, int]:
    """Return the rows of all processes, in the order of their ranks, and where those of this one begin."""
    rank = torch.distributed.get_rank(group)
    counts = rows.new_zeros(world_size(group))
    counts[rank] = len(rows)
    ends = all_reduce_sum(counts, group).cumsum(0).long().tolist()
    start = ends[rank] - len(rows)
    everything = rows.new_zeros(ends[-1], rows.shape[1])
    everything[start : ends[rank]] = rows
    return all_reduce_sum(everything, group), start
