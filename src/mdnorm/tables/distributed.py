"""Residuals of tables that are spread over a cluster: Dask arrays and DataFrames.

What is learnt of a partition is its `Moments`, a few thousand numbers, which are added up in a tree; the
transform is mapped over the partitions and computed when the result is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mdnorm.arrays import as_real_array
from mdnorm.design import Design
from mdnorm.design.reader import read_columns, shown
from mdnorm.design.roles import TableWarning, why_no_feature
from mdnorm.distributed import one_thread
from mdnorm.extras import requires
from mdnorm.moments import NoSamplesError
from mdnorm.tables.combat import SiteMoments, add_moments
from mdnorm.tables.design_sample import MAX_DESIGN_ROWS, DesignSample
from mdnorm.tables.model import (
    MetadataModel,
    Specification,
    all_skipped,
    check_finite,
    fitted_model,
    moments_of_rows,
    skips_missing_features,
    used_rows,
    what_to_remove,
)
from mdnorm.text import warn

T = TypeVar("T")

# Parts that are put together in one task.
_FAN_IN = 8

# Rows that tell what a column is by default.
_SAMPLE_ROWS = 2**16


class DaskResiduals(NamedTuple):
    """What `residualize_dask` returns.

    Attributes
    ----------
    features : dask.array.Array or dask.dataframe.DataFrame
        Not computed yet.
    model : MetadataModel
    """

    features: Any
    model: MetadataModel


def residualize_dask(
    features: Any,
    metadata: Any = None,
    *,
    formula: str | Sequence[str] | None = None,
    labels: str | Sequence[str] = (),
    site: str | None = None,
    feature_names: Sequence[str] | None = None,
    scale: bool = False,
    empirical_bayes: bool = False,
    ridge: float = 0.0,
    missing: str | None = None,
    unseen: str | None = None,
    missing_features: str = "error",
    weights: str | None = None,
    apply: MetadataModel | str | Path | None = None,
    seed: int = 0,
) -> DaskResiduals:
    """Return a Dask collection like another one, in which metadata explain nothing of the features.

    The coefficients are computed at once, by the scheduler or client in use; the result is lazy. It is that
    of `mdnorm.tables.residualize_file` and of `mdnorm.sklearn.MetadataResidualizer` on the whole table.

    Parameters
    ----------
    features : dask.array (n, D) or dask.dataframe
        Chunked by rows; chunks of an array that split the columns are put together.
    metadata : dask.dataframe or dask.array (n, K), optional
        Of the same rows in the same order. The columns of an array are called "m0", "m1", …. None: the
        metadata are columns of the DataFrame `features`.
    formula : str or sequence of str, optional
        Metadata to remove, as for `mdnorm.Design`. None: all columns of an array; otherwise only the site.
    labels : str or sequence of str
        Columns that are protected.
    site : str, optional
        Column that names the site of a row; its effect is removed.
    feature_names : sequence of str, optional
        Columns of the DataFrame that are features. None: the numbers that are not used otherwise, but
        identifiers and codes, as the first rows show them: a warning says which columns stay as they are.
    scale, empirical_bayes, ridge, missing, unseen, missing_features, weights
        As for `mdnorm.tables.residualize_file`.
    apply : MetadataModel or path, optional
        Coefficients fitted before, or the file that `MetadataModel.save` wrote; nothing is computed.
    seed : int
        Of the rows that a design is fitted to where there are more than 262 144.

    Returns
    -------
    DaskResiduals
        ``features`` and ``model``. float32 features stay float32, other numbers become float64; other
        columns of a DataFrame stay as they are.

    Raises
    ------
    TypeError
        Not Dask collections.
    ValueError
        Shapes, partitions or columns that do not fit; a partition whose two parts differ in their number of
        rows; metadata and features that cannot be used, as for `residualize_file`.

    Notes
    -----
    The features are computed twice, for the coefficients and for the result: `persist` them where they fit
    into the memory of the cluster and are expensive.
    """
    with requires("dask"):
        import dask.array as da
        import dask.dataframe as dd
        from dask.base import compute
        from dask.delayed import delayed
    if not isinstance(features, (da.Array, dd.DataFrame)):
        raise TypeError(
            f"features must be an array or DataFrame of Dask, got {type(features).__name__}: for tables in "
            "memory there is mdnorm.sklearn.MetadataResidualizer."
        )
    if metadata is not None and not isinstance(metadata, (da.Array, dd.DataFrame)):
        raise TypeError(f"metadata must be an array or DataFrame of Dask, got {type(metadata).__name__}.")
    if metadata is None and isinstance(features, da.Array):
        raise ValueError("metadata=None, but features is an array, which has no columns for them.")
    if isinstance(features, da.Array):
        features = _rows_only(features, "features")
    if isinstance(metadata, da.Array):
        metadata = _rows_only(metadata[:, None] if metadata.ndim == 1 else metadata, "metadata")
        if formula is None and site is None and apply is None:
            formula = [name for name in _array_names(metadata) if name not in (labels, *labels, weights)]
    removal = what_to_remove(
        apply,
        (missing, unseen),
        {"feature_names": feature_names},
        formula=formula,
        labels=labels,
        site=site,
        scale=scale,
        empirical_bayes=empirical_bayes,
        ridge=ridge,
        weights=weights,
    )
    variables = removal.variables
    if isinstance(removal, MetadataModel):
        feature_names = removal.feature_names
    _check_variables(metadata if metadata is not None else features, variables)
    skips = skips_missing_features(missing_features)
    names = _feature_names(features, feature_names, variables, metadata is None)
    pairs = _pairs(features, metadata)
    parts = [delayed(_read_part)(block, other, names, variables) for block, other in pairs]

    if isinstance(removal, MetadataModel):
        model = removal
    else:
        design = removal.design()
        try:
            if design is not None:
                tables = [block if other is None else other for block, other in pairs]
                # Features are looked at only where rows that lack some are left out.
                read = parts if skips else [delayed(_read_part)(each, None, (), variables) for each in tables]
                design = _fitted_design(design, read, removal, seed, skips)
            shared = delayed((removal, design, names, skips), traverse=False)
            tasks = [delayed(_moments)(part, shared) for part in parts]
            model = fitted_model(removal, design, compute(_tree(add_moments, tasks))[0], names)
        except NoSamplesError as error:
            if not skips:
                raise
            empty = compute(*(delayed(np.isnan)(part.features).all(0) for part in parts))
            raise NoSamplesError(all_skipped(np.all(empty, axis=0), names)) from error

    # Workers do not need what only the summary does.
    shared = delayed(replace(model, moments=None), traverse=False)
    changed = [
        delayed(_residuals)(part, block, shared, skips) for part, (block, _) in zip(parts, pairs, strict=True)
    ]
    if isinstance(features, dd.DataFrame):
        meta = features._meta.astype(
            {name: np.float32 if features._meta[name].dtype == np.float32 else np.float64 for name in names}
        )
        return DaskResiduals(
            dd.from_delayed(changed, meta=meta, divisions=features.divisions, verify_meta=False), model
        )
    dtype = np.dtype(np.float32 if features.dtype == np.float32 else np.float64)
    blocks = [
        da.from_delayed(block, shape=(rows, features.shape[1]), dtype=dtype)
        for block, rows in zip(changed, features.chunks[0], strict=True)
    ]
    return DaskResiduals(da.concatenate(blocks, axis=0, allow_unknown_chunksizes=True), model)


def _rows_only(array: Any, name: str) -> Any:
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (num_rows, num_columns), got {array.shape}.")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be real and numeric, got an array of dtype {array.dtype}.")
    if np.isnan(array.shape[1]):
        raise ValueError(f"{name} has an unknown number of columns: call compute_chunk_sizes() first.")
    return array.rechunk({1: -1}) if len(array.chunks[1]) > 1 else array


def _array_names(array: Any) -> list[str]:
    return [f"m{index}" for index in range(array.shape[1])]


def _check_variables(table: Any, variables: Sequence[str]) -> None:
    present = list(table.columns) if hasattr(table, "columns") else _array_names(table)
    for name in variables:
        if name not in present:
            raise ValueError(f"the metadata have no column {name!r}; they have {present[:10]}.")


def _feature_names(
    features: Any, wanted: Sequence[str] | None, variables: Sequence[str], together: bool
) -> tuple[str, ...]:
    if not hasattr(features, "columns"):
        if wanted is not None and len(wanted) != features.shape[1]:
            raise ValueError(f"feature_names= has {len(wanted)} names for {features.shape[1]} columns.")
        return tuple(wanted) if wanted is not None else tuple(map(str, range(features.shape[1])))
    numeric = [name for name, dtype in features.dtypes.items() if getattr(dtype, "kind", "O") in "iuf"]
    if wanted is None:
        candidates = [name for name in numeric if not (together and name in variables)]
        first = features[candidates].partitions[:4].map_partitions(lambda part: part.head(_SAMPLE_ROWS))
        columns = read_columns(first.compute(), candidates)[0]
        reasons = {name: why_no_feature(column) for name, column in columns.items() if len(column.missing)}
        left_alone = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
        chosen = [name for name in candidates if reasons.get(name) is None]
        if not chosen:
            raise ValueError(
                f"none of the columns {list(features.columns)[:10]} is taken as a feature (left out: "
                f"{shown(left_alone)}): name the features with feature_names=."
            )
        if left_alone:
            warn(
                f"these columns are not taken as features and stay as they are: {shown(left_alone, 20)}. "
                "If any of them is one, name the features with feature_names=.",
                TableWarning,
            )
        return tuple(chosen)
    for name in wanted:
        if name not in numeric:
            raise ValueError(f"feature {name!r} is not among the numeric columns {numeric[:10]}.")
        if together and name in variables:
            raise ValueError(f"{name!r} is both a feature and metadata: take it out of one of them.")
    return tuple(wanted)


def _pairs(features: Any, metadata: Any) -> list[tuple[Any, Any]]:
    """Return for each partition of the features itself and the metadata of the same rows, delayed."""
    if metadata is None:
        return [(block, None) for block in features.to_delayed()]
    rows = [_known_rows(part) for part in (features, metadata)]
    if rows[0] is not None and rows[1] is not None:
        if sum(rows[0]) != sum(rows[1]):
            raise ValueError(
                f"features has {sum(rows[0])} rows and metadata {sum(rows[1])}: one row each is needed."
            )
        if rows[0] != rows[1]:
            metadata = metadata.rechunk({0: rows[0]})
    blocks, others = _delayed_blocks(features), _delayed_blocks(metadata)
    if len(blocks) != len(others):
        raise ValueError(
            f"features has {len(blocks)} partitions and metadata {len(others)}, and it is not known which "
            "rows they have: partition both alike, or make both arrays with known chunks "
            "(compute_chunk_sizes)."
        )
    return list(zip(blocks, others, strict=True))


def _known_rows(collection: Any) -> tuple[int, ...] | None:
    if not hasattr(collection, "chunks") or any(np.isnan(rows) for rows in collection.chunks[0]):
        return None
    return tuple(collection.chunks[0])


def _delayed_blocks(collection: Any) -> list[Any]:
    blocks = collection.to_delayed()
    return list(blocks[:, 0]) if hasattr(collection, "numblocks") else list(blocks)


class _Part(NamedTuple):
    features: NDArray[Any]
    table: Any  # pyarrow.Table


def _read_part(block: Any, other: Any, names: tuple[str, ...], variables: list[str]) -> _Part:
    import pyarrow

    is_frame = hasattr(block, "columns")
    values = as_real_array(block[list(names)] if is_frame else block, "features")
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    holder, rows = block if other is None else other, len(values)
    if hasattr(holder, "columns"):
        table = pyarrow.Table.from_pandas(holder[variables], preserve_index=False)
    else:
        columns = dict(zip(_array_names(holder), np.asarray(holder).T, strict=True))
        table = pyarrow.table({name: columns[name] for name in variables})
    if variables and table.num_rows != rows:
        raise ValueError(
            f"a partition has {rows} rows of features and {table.num_rows} of metadata: partition both alike."
        )
    return _Part(values, table)


def _tree(combine: Callable[..., T], parts: list[Any]) -> Any:
    """Return the delayed combination of parts, a few at a time, in their order."""
    from dask.delayed import delayed

    while len(parts) > 1:
        parts = [delayed(combine)(*parts[start : start + _FAN_IN]) for start in range(0, len(parts), _FAN_IN)]
    return parts[0]


def _moments(part: _Part, shared: tuple[Specification, Design | None, Sequence[str], bool]) -> SiteMoments:
    specification, design, names, skips_missing = shared
    features, table, weights = used_rows(*part, specification.weights, skips_missing)
    columns = specification.columns(design, table)
    return moments_of_rows(features, columns, weights, names)


def _fitted_design(
    design: Design, parts: list[Any], specification: Specification, seed: int, skips_missing: bool
) -> Design:
    from dask.base import compute
    from dask.delayed import delayed

    samples = [
        delayed(_sample)(part, specification, (seed, index), skips_missing)
        for index, part in enumerate(parts)
    ]
    sample: DesignSample = compute(_tree(DesignSample.merged, samples))[0]
    if not sample.num_rows:
        raise NoSamplesError("the table has no rows to fit to.")
    return sample.fit(design, specification.weights)


def _sample(
    part: _Part, specification: Specification, seed: tuple[int, int], skips_missing: bool
) -> DesignSample:
    design = specification.design()
    assert design is not None
    sample = DesignSample(design, seed, MAX_DESIGN_ROWS)
    variables = [*design.variables(), *filter(None, [specification.weights])]
    sample.add(used_rows(*part, specification.weights, skips_missing)[1].select(variables))
    return sample


def _residuals(part: _Part, block: Any, model: MetadataModel, skips_missing: bool) -> Any:
    if not len(part.features):
        changed = part.features
    else:
        with one_thread():
            changed = model.remove(part.features, part.table)
        check_finite(changed, model.feature_names, skips_missing)
    if not hasattr(block, "columns"):
        return changed
    frame = block.copy()
    for index, name in enumerate(model.feature_names):
        dtype = np.float32 if block[name].dtype == np.float32 else np.float64
        frame[name] = changed[:, index].astype(dtype)
    return frame
