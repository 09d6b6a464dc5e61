"""Which columns of a table in a file are features: those that are named, or all that measure something."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from mdnorm.design.files import TableFile
from mdnorm.design.roles import why_no_feature
from mdnorm.design.table_file import TableFileError, check_columns
from mdnorm.text import listed


def chosen_features(
    table: TableFile, features: Sequence[str] | None, reserved: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the names of the features, in the order of the table, and why other columns are none.

    `features` are names, or patterns such as ``"voxel_*"``; then no reasons are given. None: all numbers but
    the reserved ones (metadata, labels or the like), the index of a DataFrame, identifiers (whole numbers
    that nearly all differ) and codes (few different whole numbers), as the first rows show them. There must
    be such features, and those that are named must be numeric and not reserved.
    """
    if features is None:
        return _default_features(table, reserved)
    return _named_features(table, features, reserved), {}


def _default_features(table: TableFile, reserved: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the columns that are features, and why others are not."""
    left_alone = dict.fromkeys(table.index_names, "the index of a DataFrame")
    taken = {*reserved, *left_alone}
    others = [name for name in table.names if name not in taken and name not in table.repeated]
    left_alone |= {
        name: "more than one column of this name" for name in table.repeated.values() if name not in taken
    }
    columns = table.sample(others)
    numeric = set(table.numeric())
    for name in others:
        reason = why_no_feature(columns[name]) if name in columns else "no numbers"
        if reason is not None or name not in numeric:
            left_alone[name] = reason or "no numbers"
    chosen = tuple(name for name in others if name not in left_alone)
    if not chosen:
        reasons = "; ".join(f"{name!r} ({reason})" for name, reason in list(left_alone.items())[:8])
        raise TableFileError(
            f"{table.path} has no measurements except metadata: nothing to residualise. Left alone: "
            f"{reasons or 'none'}. If some of these are features, name them (features=, --features)."
        )
    return chosen, left_alone


def _named_features(table: TableFile, features: Sequence[str], reserved: Sequence[str]) -> tuple[str, ...]:
    numeric = set(table.numeric())
    names, wanted = set(table.header), set()
    for pattern in features:
        found = {pattern} if pattern in names else set(fnmatch.filter(table.header, pattern))
        if not found:
            raise TableFileError(
                f"{table.path} has no column {pattern!r} for the features; it has {listed(table.header, 8)}."
            )
        # A pattern may also find the metadata; only who names a column means it.
        wanted |= found if pattern in names else found - set(reserved)
    both = sorted(wanted & set(reserved))
    if both:
        raise TableFileError(f"{both[0]!r} is both a feature and metadata: take it out of one of them.")
    check_columns(table, sorted(wanted))
    wrong = [name for name in table.names if name in wanted and name not in numeric]
    if wrong:
        table.sample(wrong)  # Says which cell it is, where most of them are numbers.
        raise TableFileError(f"{table.path}: the feature(s) {listed(wrong, 8)} are not numeric.")
    return tuple(name for name in table.names if name in wanted)
