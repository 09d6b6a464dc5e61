"""Rows that belong together by position, and what shows that they were shuffled apart."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_same_order(**tables: Any) -> None:
    """Refuse pandas objects of which the same row labels come in another order.

    Rows belong together by position. Where two indexes hold the same labels in different orders, one of them
    was sorted or shuffled, and by position every row would get the values of another one. Indexes with other
    labels say nothing: features often come out of a model without any. What has no
    index is not looked at. The names are those of the arguments, for the message.
    """
    known: dict[str, Any] = {}
    for name, table in tables.items():
        index = getattr(table, "index", None)
        # The method of a list, or of polars' frames, is no index.
        if index is None or callable(index) or not hasattr(index, "equals"):
            continue
        for other, labels in known.items():
            if len(index) == len(labels) and not index.equals(labels):
                same = index.is_unique and labels.is_unique and not len(index.difference(labels))
                if same:
                    row = int(np.flatnonzero(np.asarray(index != labels))[0])
                    raise ValueError(
                        f"{name} has the same row labels as {other}, but in another order (row {row}: "
                        f"{index[row]!r} and {labels[row]!r}): bring them into one order, for example with "
                        f"{name}.loc[{other}.index], or drop the labels with reset_index(drop=True) where "
                        "rows do belong together by position."
                    )
        known[name] = index
