"""A continuous column in groups of about equally many rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.metrics.checks import check_integer
from mdnorm.metrics.columns import as_column
from mdnorm.text import listed

__all__ = ["QuantileGroups", "quantile_groups"]


@dataclass(frozen=True)
class QuantileGroups:
    """A continuous column divided into groups.

    Attributes
    ----------
    codes : (n,) int64
        The group of each row, a position in `names`.
    names : tuple of str
        The range of values of each group, in ascending order.
    counts : tuple of int
        Rows of each group.
    """

    codes: NDArray[np.int64]
    names: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """The names, so that the groups keep their order where the object is passed as `groups`."""
        return self.names

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.names, dtype=dtype)[self.codes]

    def __len__(self) -> int:
        return int(self.codes.size)


def quantile_groups(values: Any, num_groups: int = 4) -> QuantileGroups:
    """Divide a continuous column into groups of about equally many rows, named by their range of values.

    Parameters
    ----------
    values : tensor, array, list or Series, (n,)
        Numbers, finite.
    num_groups : int
        The largest number of groups; there may be fewer, since equal values stay in one group.

    Returns
    -------
    QuantileGroups
        To be passed as `groups` to `group_gaps`, or as an array of names.

    Raises
    ------
    TypeError
        Values that are not numbers; `num_groups` is not an integer.
    ValueError
        A wrong shape, NaN or infinite values, no rows; `num_groups` below 1.

    Examples
    --------
    >>> quantile_groups([20, 25, 31, 44, 52, 60, 61, 80]).names
    ('20–25', '31–44', '52–60', '61–80')
    """
    check_integer("num_groups", num_groups, 1)
    column = as_column(values, "values")
    if column.dtype.kind not in "biuf":
        raise TypeError(
            f"values must be numbers, got {column.dtype} such as {listed(column.tolist(), 1)}: pass a column "
            "of categories as groups as it is."
        )
    numbers = column.astype(np.float64)
    edges = np.unique(numbers)
    if edges.size > num_groups:
        # Each group is closed above.
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, num_groups + 1)[1:]))
    _, codes, counts = np.unique(np.searchsorted(edges, numbers), return_inverse=True, return_counts=True)
    limits = [(numbers[codes == code].min(), numbers[codes == code].max()) for code in range(len(counts))]
    return QuantileGroups(codes.astype(np.int64), _range_names(limits), tuple(counts.tolist()))


def _range_names(limits: list[tuple[float, float]]) -> tuple[str, ...]:
    """Return "low–high" with as few digits as keep the limits apart; whole numbers in full."""
    distinct = sorted({limit for pair in limits for limit in pair})
    whole = all(value == round(value) and abs(value) < 1e15 for value in distinct)

    def text(value: float, digits: int) -> str:
        if whole:
            return str(round(value))
        rounded = float(f"{value:.{digits}g}")
        if rounded != 0 and not 1e-4 <= abs(rounded) < 1e15:
            return f"{value:.{digits}g}"
        return np.format_float_positional(rounded, trim="-")

    digits = 2
    while digits < 17 and len({text(value, digits) for value in distinct}) < len(distinct):
        digits += 1
    names = []
    for low, high in limits:
        # A dash next to a minus sign is hard to read.
        dash = "–" if low >= 0 else " to "
        names.append(text(low, digits) if low == high else f"{text(low, digits)}{dash}{text(high, digits)}")
    return tuple(names)
