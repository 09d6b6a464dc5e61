"""A continuous column in groups of about equally many rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mdnorm.extras import requires
from mdnorm.metrics.checks import check_integer
from mdnorm.metrics.columns import as_column
from mdnorm.text import listed

if TYPE_CHECKING:
    import pandas as pd


def quantile_groups(values: Any, num_groups: int = 4) -> pd.Categorical:
    """Divide a continuous column into groups of about equally many rows, named by their range of values.

    Parameters
    ----------
    values : tensor, array, list or Series, (n,)
        Numbers, finite.
    num_groups : int
        The largest number of groups; there may be fewer, since equal values stay in one group.

    Returns
    -------
    pandas.Categorical, (n,)
        Ordered, with the ranges of values as categories; to be passed as `groups` to `group_gaps`.

    Raises
    ------
    TypeError, ValueError
        Values that are not finite numbers of shape (n,), no rows; `num_groups` is no integer of at least 1.
    MissingExtraError
        pandas is not installed.

    Examples
    --------
    >>> list(quantile_groups([20, 25, 31, 44, 52, 60, 61, 80]).categories)
    ['20–25', '31–44', '52–60', '61–80']
    """
    with requires("metrics"):
        import pandas as pd
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
    found, codes = np.unique(np.searchsorted(edges, numbers), return_inverse=True)
    limits = [(numbers[codes == code].min(), numbers[codes == code].max()) for code in range(len(found))]
    return pd.Categorical.from_codes(codes, _range_names(limits), ordered=True)


def _range_names(limits: list[tuple[float, float]]) -> list[str]:
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
    return names
