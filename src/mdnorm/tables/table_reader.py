"""The tables of the scikit-learn estimator: features and metadata of X, metadata, labels and y, by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import _check_feature_names_in, check_array, validate_data

from mdnorm.design.reader import Column, read_column, refuse_no_table
from mdnorm.tables.combat import LocationScale, SiteCodes
from mdnorm.tables.model import check_finite
from mdnorm.tables.table_design import TableDesign
from mdnorm.text import warn

FloatArray = NDArray[np.float64]

_FEATURES: dict[str, Any] = {
    "dtype": [np.float64, np.float32],
    "ensure_min_samples": 1,
    "ensure_all_finite": False,
}

# Whole numbers are classes up to _MOST_CLASSES of them with so many rows each on average; up to _FEW_CLASSES
# whatever the rows.
_FEW_CLASSES, _MOST_CLASSES, _ROWS_OF_A_CLASS = 5, 20, 5


class TableRows(NamedTuple):
    """Rows of a table: features (n, D), design columns (n, K), and whose they are where that is asked for."""

    features: NDArray[Any]
    design: FloatArray
    sites: SiteCodes | None
    subjects: SiteCodes | None


class TableReader(BaseEstimator):  # type: ignore[misc]
    """What an estimator of tables reads, and what it learns of their columns in the first call of fit."""

    _model: LocationScale | None

    def _start(self, given: dict[str, Any], classes: Any, num_rows: int, weights: FloatArray | None) -> None:
        """Fix what the first rows that are fitted to fix: columns, levels, means, classes."""
        self._model, self._tables = None, dict[str, TableDesign]()
        if given["metadata"] is None and self.metadata_columns is None:
            warn(
                "no metadata: X is returned unchanged. Pass metadata= to fit and transform (in a pipeline: "
                "by metadata routing) or set metadata_columns=; if this is meant, metadata_columns=().",
                UserWarning,
            )
        if given["metadata"] is not None:
            keys = {"site": self.site, "subject": self.subject}
            keys = {what: key for what, key in keys.items() if key is not None}
            self._tables["metadata"] = TableDesign(
                "metadata", self.formula, keys, missing=self.missing, unseen=self.unseen
            )
        else:
            for name in ("site", "subject", "formula"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} needs metadata with that column.")
        if given["labels"] is not None:
            self._tables["labels"] = TableDesign("labels", protected=True)
        for what, table in self._tables.items():
            table.fit(given[what], num_rows, declared=self._is_partial, weights=weights)
        self.metadata_names_ = list(self._tables["metadata"].names) if "metadata" in self._tables else []
        self._num_metadata = len(self.metadata_names_)
        if given["y"] is not None and (self._num_metadata or self.site is not None):
            self._protect_target(given["y"] if classes is None else classes, classes)
        names = [name for table in self._tables.values() for name in table.names]
        self.protected_names_ = names[self._num_metadata :]
        if len(self._feature_index) == 0:
            raise ValueError(
                f"X has n_features={self.n_features_in_}, all of them metadata_columns: no feature is left."
            )

    def _protect_target(self, y: Any, classes: Any) -> None:
        self._y_is_class = self._is_class(y, classes)
        table = _target_table(y, self._y_is_class)
        target = next(iter(table.values()))
        if self._y_is_class and len(target.levels()) == 1 and not target.missing.any():
            if self._is_partial:
                raise ValueError("y has a single class in the first call of partial_fit: pass classes=.")
            return
        self._tables["y"] = TableDesign("y", protected=True)
        self._tables["y"].fit(table, len(target.missing))

    def _is_class(self, y: Any, classes: Any) -> bool:
        if self.protect_target != "auto":
            return bool(self.protect_target == "categorical")
        values = np.asarray(y)
        if values.dtype.kind == "O":  # Numbers among Python's objects are numbers.
            values = np.array(values.tolist())
        # More than one column of integers is an indicator or a multi-output table already.
        several = values.ndim > 1 and values.shape[1] > 1 and values.dtype.kind in "biuf"
        if several or (values.dtype.kind == "f" and classes is None):
            return False
        if values.dtype.kind in "iu" and classes is None:
            number = len(np.unique(values))
            if number > max(_FEW_CLASSES, min(_MOST_CLASSES, len(values) / _ROWS_OF_A_CLASS)):
                raise ValueError(
                    f"y has {number} different whole numbers in {len(values)} rows, and "
                    "protect_target='auto' would make a category of each: say protect_target='continuous' "
                    "for a quantity, or 'categorical' for classes."
                )
        return True

    def _select(self) -> None:
        """Record which of the columns of X are features."""
        chosen = [] if self.metadata_columns is None else list(self.metadata_columns)
        names = list(getattr(self, "feature_names_in_", []))
        index = []
        for column in chosen:
            if isinstance(column, str):
                if column not in names:
                    raise ValueError(
                        f"metadata_columns has {column!r}, the columns of X are {names or 'without names'}."
                    )
                index.append(names.index(column))
            else:
                if not -self.n_features_in_ <= column < self.n_features_in_:
                    raise ValueError(
                        f"metadata_columns has {column}, but X has n_features={self.n_features_in_} "
                        f"({self.n_features_in_} feature(s))."
                    )
                index.append(int(column) % self.n_features_in_)
        self._metadata_index = np.array(index, dtype=np.intp)
        self._feature_index = np.setdiff1d(np.arange(self.n_features_in_), self._metadata_index)

    def _is_mixed(self, X: Any) -> bool:  # noqa: N803
        """Whether X is a DataFrame that may hold metadata that are no numbers: only the features must be."""
        return bool(self.metadata_columns is not None and hasattr(X, "columns") and hasattr(X, "dtypes"))

    def _validated(self, X: Any, *, reset: bool) -> Any:  # noqa: N803
        """Return X as a checked array; as it is where it is a DataFrame with metadata."""
        refuse_no_table(X, "X")
        if isinstance(X, Mapping) and not hasattr(X, "shape"):  # not the sparse matrices that are one
            raise TypeError("X is a mapping from names to columns: make a table of it, pandas.DataFrame(X).")
        if isinstance(X, np.ma.MaskedArray):  # What lies under the mask is no value.
            X = np.ma.filled(X if X.dtype.kind == "f" else X.astype(np.float64), np.nan)  # noqa: N806
        if self._is_mixed(X):
            validate_data(self, X, reset=reset, skip_check_array=True)
            return X
        checked = validate_data(self, X, reset=reset, **_FEATURES)
        return self._finite(checked, np.arange(self.n_features_in_))

    def _checked(self, X: Any, reset: bool = False) -> NDArray[Any]:  # noqa: N803
        """Return the features, checked; `reset`: the columns of X are new."""
        X = self._validated(X, reset=reset)  # noqa: N806
        if reset:
            self._select()
        if self._is_mixed(X):
            columns = X[[X.columns[place] for place in self._feature_index]]
            return self._finite(check_array(columns, **_FEATURES), self._feature_index)
        features: NDArray[Any] = X[:, self._feature_index] if len(self._metadata_index) else X
        return features

    def _finite(self, features: NDArray[Any], places: NDArray[np.intp]) -> NDArray[Any]:
        """Return features after a check for missing and infinite values."""
        names = getattr(self, "feature_names_in_", range(self.n_features_in_))
        skips = self.missing_features == "skip"
        try:
            check_finite(features, [names[place] for place in places], skips)
        except ValueError as error:
            kinds = [] if skips or not np.isnan(features).any() else ["missing (NaN)"]
            kinds += ["infinite"] if np.isinf(features).any() else []
            raise ValueError(f"X has {' and '.join(kinds)} values: {error}") from None
        return features

    def _metadata_of(self, X: Any) -> list[Any]:  # noqa: N803
        """Return the columns of X that are metadata."""
        if self._is_mixed(X):
            return [X[X.columns[place]] for place in self._metadata_index]
        return list(np.asarray(X)[:, self._metadata_index].T)

    def _given(self, X: Any, y: Any, metadata: Any, labels: Any) -> dict[str, Any]:  # noqa: N803
        """Return the tables of a call by what they are, whichever argument the metadata are in."""
        if self.metadata_columns is not None:
            if metadata is not None:
                raise ValueError("metadata= was given, but the metadata are in X (metadata_columns=).")
            names = list(map(str, self.metadata_columns))
            metadata = dict(zip(names, self._metadata_of(X), strict=True)) if names else None
        y = None if self.protect_target is False else y
        return {"metadata": metadata, "labels": labels, "y": y}

    def _read(self, X: Any, y: Any, metadata: Any, labels: Any) -> TableRows:  # noqa: N803
        """Return rows as they are in the regression; unknown protected columns at their mean."""
        features = self._checked(X)
        return TableRows(features, *self._design(self._given(X, y, metadata, labels), len(features)))

    def _design(
        self, given: dict[str, Any], num_rows: int, training: bool = False
    ) -> tuple[FloatArray, SiteCodes | None, SiteCodes | None]:
        for what in ("metadata", "labels"):
            if given[what] is not None and what not in self._tables:
                raise ValueError(f"{what}= was given, but fit had none: nothing is known of its effects.")
        blocks, keys = [np.empty((num_rows, 0))], dict[str, SiteCodes]()
        for what, table in self._tables.items():
            rows = given[what]
            if rows is not None:
                rows = _target_table(rows, self._y_is_class) if what == "y" else rows
                block, found = table.transform(rows, num_rows, training=training)
                blocks.append(block)
                keys |= found
            elif what == "metadata":
                raise ValueError(
                    "metadata=None, but fit had metadata: pass those of these rows. In a pipeline, "
                    "set_transform_request(metadata=True) routes them here; where a scorer does not pass "
                    "them on (scorers given by name, and all before scikit-learn 1.8), make them columns of "
                    "X (metadata_columns=)."
                )
            elif training or (self.scale and what == "labels"):
                raise ValueError(f"{what}=None, but fit had {what}, needed here as well: pass {what}=.")
            else:
                start = sum(block.shape[1] for block in blocks)
                mean = self._fitted_model().design_mean[start : start + len(table.names)]
                blocks.append(np.broadcast_to(mean, (num_rows, len(mean))))
        return np.concatenate(blocks, axis=1), keys.get("site"), keys.get("subject")

    def _together(self, features: NDArray[Any], metadata: list[Any]) -> Any:
        """Return features and metadata in the places of their columns, every column as exact as it was."""
        columns: list[Any] = [None] * self.n_features_in_
        for place, column in zip(self._feature_index, features.T, strict=True):
            columns[place] = column
        for place, column in zip(self._metadata_index, metadata, strict=True):
            columns[place] = column
        kind = _get_output_config("transform", self)["dense"]
        if kind != "default":
            names = _check_feature_names_in(self, None)
            return importlib.import_module(kind).DataFrame(
                {
                    name: column.to_numpy() if hasattr(column, "to_numpy") and kind == "polars" else column
                    for name, column in zip(names, columns, strict=True)
                }
            )
        arrays = [np.asarray(column) for column in columns]
        dtype = np.result_type(*(array.dtype for array in arrays if array.dtype.kind in "biuf"))
        exact = all(
            array.dtype.kind in "biuf" and bool((array.astype(dtype) == array).all()) for array in arrays
        )
        whole: NDArray[Any] = np.empty((len(features), len(columns)), dtype if exact else object)
        for place, array in enumerate(arrays):
            whole[:, place] = array
        return whole

    def _read_dropped(self, X: Any, metadata: Any) -> tuple[NDArray[Any], list[Any]]:  # noqa: N803
        """Read what `transform` returned, with the columns that it had left out."""
        features = check_array(X, **_FEATURES)
        if features.shape[1] != len(self._feature_index):
            raise ValueError(
                f"X has {features.shape[1]} features, but transform returns {len(self._feature_index)}."
            )
        features = self._finite(features, self._feature_index)
        assert self.metadata_columns is not None
        names = list(self.metadata_columns)
        if metadata is None:
            raise ValueError(f"metadata=None, but transform left out the columns {names}: pass them.")
        if hasattr(metadata, "columns"):
            columns = [metadata[name] for name in names]
        else:
            array = np.asarray(metadata)
            columns = list((array[:, None] if array.ndim == 1 else array).T)
        if len(columns) != len(names):
            raise ValueError(f"metadata has {len(columns)} column(s), metadata_columns has {len(names)}.")
        return features, columns


def _target_table(y: Any, is_class: bool) -> dict[str, Column]:
    """Return the columns of a target: "y", or "y0", "y1", … where there are several."""
    values = np.asarray(y)
    matrix = values.reshape(len(values), math.prod(values.shape[1:]))
    if matrix.shape[1] > 1 and is_class:
        raise TypeError(
            f"y has {matrix.shape[1]} columns of dtype {values.dtype}: categories can be protected as one "
            "column, more of them as labels=."
        )
    if not is_class and values.dtype.kind not in "bf":
        try:
            matrix = matrix.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"y must be numeric to be protected as continuous, got {values.dtype}."
            ) from error
    names = ["y"] if matrix.shape[1] == 1 else [f"y{index}" for index in range(matrix.shape[1])]
    columns = {name: read_column(name, values) for name, values in zip(names, matrix.T, strict=True)}
    return {name: column.as_category() for name, column in columns.items()} if is_class else columns
