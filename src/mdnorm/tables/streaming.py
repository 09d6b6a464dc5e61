"""Residuals of tables that do not fit into memory: fit and transform in blocks of rows.

What is learnt is additive over rows. Three passes: the metadata alone, for levels, knots and means of the
design; features and metadata, for the `Moments` of each site; and features once more, to write the residuals.
The design matrix of the second pass is kept in a file for the third.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdnorm.design import ConfoundedDesignWarning, Design
from mdnorm.files import atomic_path
from mdnorm.tables.combat import SiteCodes, SiteMoments, add_moments, site_moments
from mdnorm.tables.design_sample import DesignSample
from mdnorm.tables.files import (
    Block,
    FeatureFile,
    FeatureTable,
    TableFile,
    TableFileError,
    check_columns,
    check_metadata,
    open_features,
    open_table,
    prefetched,
)
from mdnorm.tables.model import (
    DesignColumns,
    MetadataModel,
    Specification,
    as_arrow,
    check_model_path,
    design_columns,
    fitted_model,
    for_design,
    needed_variables,
    row_weights,
)

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ResidualizeSummary", "residualize_file"]

Progress = Callable[[str, int, "int | None"], None]

# Values of a block of features by default: 16 MiB in float32.
_BLOCK_VALUES = 2**22
# Values of the design of a block: 32 MiB in float64, of which a few are alive at once.
_DESIGN_VALUES = 2**22


@dataclass(frozen=True)
class ResidualizeSummary:
    """What `residualize_file` did.

    Attributes
    ----------
    num_rows, num_features : int
    num_rows_fitted : int
        Rows that the coefficients come from; 0 where they were given.
    feature_names, metadata_names, label_names : tuple of str
        Features; columns of the design that are removed, and that are protected.
    sites : tuple of str
    warnings : tuple of str
        Such as a design in which labels and metadata can hardly be told apart.
    """

    num_rows: int
    num_features: int
    num_rows_fitted: int
    feature_names: tuple[str, ...]
    metadata_names: tuple[str, ...]
    label_names: tuple[str, ...]
    sites: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return asdict(self)


class _Rows:
    """Features with the metadata of the same rows, in blocks, however often they are asked for.

    Parameters
    ----------
    features : FeatureFile
    metadata : TableFile, optional
        None: the metadata are columns of the features' table.
    key : str, optional
        Column of both tables that says that their rows are the same.
    """

    def __init__(self, features: FeatureFile, metadata: TableFile | None, key: str | None) -> None:
        self.features, self.key = features, key
        self._own: TableFile | None = features.table if isinstance(features, FeatureTable) else None
        if metadata is None and self._own is None:
            raise TableFileError(
                f"{features.path} has no columns for the metadata: give a table of them, metadata=."
            )
        if key is not None and (metadata is None or self._own is None):
            raise ValueError("key= compares two tables: both, features and metadata, need that column.")
        self._separate = metadata
        table = metadata if metadata is not None else self._own
        assert table is not None
        self.table: TableFile = table
        if key is not None and self._own is not None:
            check_columns(self.table, [key])
            check_columns(self._own, [key])
        if metadata is not None and metadata.num_rows is not None and features.num_rows is not None:
            self._check_lengths(features.num_rows, metadata.num_rows)

    def _check_lengths(self, num_features: int, num_metadata: int) -> None:
        if num_features != num_metadata:
            raise TableFileError(
                f"{self.features.path} has {num_features} rows and {self.table.path} {num_metadata}: one row "
                "of metadata for each row of features is needed, in the same order."
            )

    def metadata(self, columns: Sequence[str], batch_rows: int) -> Iterator[tuple[int, pyarrow.Table]]:
        """Yield metadata alone, with the index of the first row."""
        start = 0
        for batch in prefetched(self.table.typed_batches(columns, batch_rows)):
            yield start, as_arrow(batch, columns)
            start += batch.num_rows
        if self._separate is not None and self.features.num_rows is not None:
            self._check_lengths(self.features.num_rows, start)

    def blocks(
        self, columns: Sequence[str], batch_rows: int, *, whole: bool = False
    ) -> Iterator[tuple[Block, pyarrow.Table]]:
        """Yield features and metadata; `whole`: with all columns of the features' table."""
        if self._separate is None:
            for block in prefetched(self.features.blocks(batch_rows, None if whole else columns)):
                assert block.batch is not None
                yield block, as_arrow(self.table.typed(block.batch, columns), columns)
            return
        key = [] if self.key is None else [self.key]
        wanted = list(dict.fromkeys([*columns, *key]))
        with closing(_Taker(self._separate, wanted, batch_rows)) as metadata:
            for block in prefetched(self.features.blocks(batch_rows, None if whole else key)):
                table = metadata.take(len(block.features), self.features.path)
                if self.key is not None:
                    self._check_key(block, table)
                yield block, table.select(list(columns))
            metadata.check_end(self.features.path)

    def _check_key(self, block: Block, table: pyarrow.Table) -> None:
        import pyarrow
        from pyarrow import compute

        assert block.batch is not None
        here = compute.cast(block.batch.column(self.key), pyarrow.string()).fill_null("")
        there = compute.cast(table.column(self.key), pyarrow.string()).fill_null("")
        differs = compute.not_equal(pyarrow.chunked_array([here]), there)
        if compute.any(differs).as_py():
            row = compute.index(differs, True).as_py()
            raise TableFileError(
                f"row {block.start + row} (counted from 0) has {self.key!r} {here[row].as_py()!r} in "
                f"{self.features.path} and {there[row].as_py()!r} in {self.table.path}: bring the tables "
                "into the same order."
            )


class _Taker:
    """Rows of a table in portions of any size."""

    def __init__(self, table: TableFile, columns: Sequence[str], batch_rows: int) -> None:
        self._path, self._columns = table.path, list(columns)
        self._batches = table.typed_batches(columns, batch_rows)
        self._left: list[pyarrow.RecordBatch] = []
        self._num_taken = 0

    def take(self, rows: int, path: Path) -> pyarrow.Table:
        import pyarrow

        parts = []
        while rows:
            batch = self._left.pop() if self._left else next(self._batches, None)
            if batch is None:
                raise TableFileError(
                    f"{self._path} has {self._num_taken} rows, {path} has more: one row of metadata for each "
                    "row of features is needed, in the same order."
                )
            if batch.num_rows > rows:
                self._left.append(batch.slice(rows))
                batch = batch.slice(0, rows)
            if batch.num_rows:
                parts.append(batch)
            rows -= batch.num_rows
            self._num_taken += batch.num_rows
        return pyarrow.Table.from_batches(parts)

    def check_end(self, path: Path) -> None:
        if self._left or any(batch.num_rows for batch in self._batches):
            raise TableFileError(
                f"{self._path} has more than the {self._num_taken} rows of {path}: one row of metadata for "
                "each row of features is needed, in the same order."
            )

    def close(self) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class _KeptDesign:
    """Design matrices of all rows, kept on disk from one pass to the next.

    The file has no name: it is gone when it is closed or when the process ends, however it ends. A design of
    more columns than features is not kept: the file would be larger than the result.

    Parameters
    ----------
    folder : Path
        Where the file is.
    features : FeatureFile
        Numbers are kept in the precision of its features, as deviations from near their mean: float32 then
        rounds numbers of the size of the effects, as does the subtraction.
    with_labels : bool
        Whether protected columns are kept too.
    """

    def __init__(self, folder: Path, features: FeatureFile, with_labels: bool) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        # Metadata are standardised, labels have whatever size they have.
        self._dtype = np.dtype(np.float64) if with_labels else features.dtype
        self._with_labels = with_labels
        self._max_columns = len(features.feature_names)
        self.is_kept = True
        self._centre: NDArray[np.float64] | None = None
        self._num_metadata = 0
        self._lengths: list[int] = []
        self._levels: dict[Hashable, int] = {}
        self._has_sites = False
        self._next = 0
        self._left: tuple[NDArray[Any], NDArray[np.int32]] | None = None

    def add(self, columns: DesignColumns) -> None:
        """Append rows."""
        metadata, labels, sites = columns
        parts = [metadata.T, labels.T] if self._with_labels and labels is not None else [metadata.T]
        self.is_kept = sum(map(len, parts)) <= self._max_columns
        if not self.is_kept:
            return
        values = np.concatenate(parts)
        if self._centre is None:
            self._centre, self._num_metadata = values.mean(1), len(metadata.T)
            self._has_sites = sites is not None
        self._file.write((values - self._centre[:, None]).astype(self._dtype, order="C").tobytes())
        if sites is not None:
            places = [self._levels.setdefault(level, len(self._levels)) for level in sites.levels]
            codes = np.array(places, dtype=np.int32)[sites.codes]
            self._file.write(codes.tobytes())
        self._lengths.append(len(metadata))

    def rewind(self) -> None:
        """Go back to the first row, to take them."""
        self._file.seek(0)

    def take(self, rows: int) -> DesignColumns:
        """Return the next rows."""
        assert self._centre is not None
        values, codes = self._read() if self._left is None else self._left
        while values.shape[1] < rows:
            more_values, more_codes = self._read()
            values = np.concatenate([values, more_values], axis=1)
            codes = np.concatenate([codes, more_codes])
        self._left = (values[:, rows:], codes[rows:]) if values.shape[1] > rows else None
        restored = values[:, :rows] + self._centre[:, None]
        metadata, labels = restored[: self._num_metadata].T, restored[self._num_metadata :].T
        sites = SiteCodes(codes[:rows].astype(np.intp), list(self._levels)) if self._has_sites else None
        return metadata, labels if self._with_labels else None, sites

    def _read(self) -> tuple[NDArray[Any], NDArray[np.int32]]:
        assert self._centre is not None
        rows = self._lengths[self._next]
        self._next += 1
        size = len(self._centre) * rows * self._dtype.itemsize
        values = np.frombuffer(self._file.read(size), self._dtype).reshape(len(self._centre), rows)
        codes = np.frombuffer(self._file.read(4 * rows if self._has_sites else 0), np.int32)
        return values, codes

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


@contextmanager
def _at_rows(path: Path, start: int, rows: int) -> Iterator[None]:
    """Say in errors which rows of the file the message is about."""
    try:
        yield
    except TableFileError:
        raise
    except (TypeError, ValueError) as error:
        offset = " (below, rows are counted from there)" if start else ""
        raise TableFileError(f"{path}, rows {start} to {start + rows - 1}{offset}: {error}") from error


def residualize_file(
    source: str | Path,
    out: str | Path,
    *,
    formula: str | Sequence[str] | None = None,
    labels: str | Sequence[str] = (),
    site: str | None = None,
    metadata: str | Path | None = None,
    key: str | None = None,
    features: str | Sequence[str] | None = None,
    scale: bool = False,
    empirical_bayes: bool = False,
    ridge: float = 0.0,
    missing: str = "error",
    unseen: str = "error",
    fit_rows: str | float | None = None,
    weights: str | None = None,
    model: MetadataModel | None = None,
    coefficients: str | Path | None = None,
    batch_rows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ResidualizeSummary:
    r"""Write a table like another one, in which metadata explain nothing of the features.

    The table may be larger than memory: it is read in blocks of rows, once to fit and once to transform, the
    metadata once before. The result is that of `mdnorm.sklearn.MetadataResidualizer` on the whole table.

    Parameters
    ----------
    source : path
        ``.parquet``, ``.csv``, ``.tsv``, or ``.npy`` of shape (n, …).
    out : path
        The file to write, of the same format; complete or absent. Features of float32 (float16) become
        float32, other numbers float64; other columns, types, codecs and row groups stay as they are.
    formula : str or sequence of str, optional
        Metadata to remove, as for `mdnorm.Design`.
    labels : str or sequence of str
        Columns (or factors) that are protected: in the regression, never removed.
    site : str, optional
        Column that names the site, batch or scanner of a row; its effect is removed.
    metadata : path, optional
        Table (not ``.npy``) with the metadata, labels and sites of the same rows in the same order. None:
        they are columns of `source`.
    key : str, optional
        Column of both tables that must have the same values in the same order.
    features : str or sequence of str, optional
        Features by name or pattern (``"voxel_*"``). None: the numeric columns that are not used otherwise.
    scale, empirical_bayes, ridge
        As for `mdnorm.tables.fit_location_scale`.
    missing, unseen : str
        As for `mdnorm.Design`; `unseen` holds for sites as well.
    fit_rows : str or float, optional
        Rows that coefficients are estimated from: a column of booleans (or 0 and 1), or a share between 0 and
        1 of all rows, chosen at random. None: all.
    weights : str, optional
        Column with the weights of the rows: one of weight 2 counts as two rows in the coefficients, one of
        weight 0 is not fitted to.
    model : MetadataModel, optional
        Coefficients fitted before; nothing is estimated. Excludes all that says what to fit.
    coefficients : path, optional
        ``.safetensors`` file to save the fitted model to, see `MetadataModel.load`.
    batch_rows : int, optional
        Rows in a block, fewer where the design has many columns. The result depends on it only by rounding.
    seed : int
        Of the rows in `fit_rows`, and of the 262 144 rows that a design is fitted to where there are more:
        its levels and ranges are those of all rows, its knots and the means that stand for missing values
        those of the sample.
    progress : callable, optional
        Called with a stage ("metadata", "fit" or "write"), the rows done and the rows in all or None.

    Returns
    -------
    ResidualizeSummary

    Raises
    ------
    TableFileError
        A file is missing, truncated, of another format or not as said; the numbers of rows differ; metadata
        or features cannot be used, with the rows.
    FormulaError, TypeError, ValueError
        Parameters that do not fit.

    References
    ----------
    Lu et al., Metadata Normalization, CVPR 2021 (arXiv:2104.09052). Chan, Golub & LeVeque, Algorithms for
    computing the sample variance, The American Statistician 37 (1983).

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "table.csv").write_text("age,volume\n20,3.1\n30,3.9\n40,5.1\n50,5.9\n")
    >>> residualize_file(folder / "table.csv", folder / "out.csv", formula="age").feature_names
    ('volume',)
    """
    source, out = Path(source), Path(out)
    # One name, not its letters.
    labels = [labels] if isinstance(labels, str) else labels
    features = [features] if isinstance(features, str) else features
    progress = progress or _no_progress
    fits = {
        "formula": formula is not None,
        "labels": bool(labels),
        "site": site is not None,
        "scale": scale,
        "empirical_bayes": empirical_bayes,
        "ridge": ridge != 0,
        "missing": missing != "error",
        "unseen": unseen != "error",
        "fit_rows": fit_rows is not None,
        "weights": weights is not None,
        "features": features is not None,
        "coefficients": coefficients is not None,
    }
    if model is not None:
        given = [name for name, is_given in fits.items() if is_given]
        if given:
            raise ValueError(f"{', '.join(given)}: not with coefficients that were fitted before.")
        specification = None
        reserved = model.variables
        features = model.feature_names
    else:
        specification = Specification(
            formula, tuple(labels), site, scale, empirical_bayes, ridge, missing, unseen, weights
        )
        reserved = needed_variables(specification.design(), True, site, with_labels=True)
        reserved += [name for name in (fit_rows, weights) if isinstance(name, str)]
    _check_out(source, out, metadata)
    if coefficients is not None:
        check_model_path(Path(coefficients))
    table = None if metadata is None else open_table(Path(metadata))
    taken = reserved if table is None else []
    if key is not None:
        taken = [*taken, key]
    named = None if source.suffix.lower() == ".npy" and model is not None else features
    file: FeatureFile = open_features(source, named, taken)
    if model is not None and (
        len(file.feature_names) != len(model.feature_names)
        if named is None
        else file.feature_names != model.feature_names
    ):
        raise TableFileError(
            f"{source} has the features {list(file.feature_names[:5])}… ({len(file.feature_names)}), the "
            f"coefficients are of {list(model.feature_names[:5])}… ({len(model.feature_names)}) in that "
            "order."
        )
    rows = _Rows(file, table, key)
    check_metadata(rows.table, reserved)
    if batch_rows is None:
        batch_rows = min(max(_BLOCK_VALUES // len(file.feature_names), 256), 2**18)
    elif batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}.")

    with _one_thread(), _cleaned_up_at_termination():
        return _residualize(
            rows, specification, model, fit_rows, out, coefficients, batch_rows, seed, progress
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: others read and write meanwhile, and the products are too thin to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _cleaned_up_at_termination() -> Iterator[None]:
    """Remove temporary files at SIGTERM, as batch systems send it; the process then ends by it as ever."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    class Terminated(BaseException):
        pass

    def stop(number: int, frame: FrameType | None) -> None:
        # A second one would interrupt the removal.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _residualize(
    rows: _Rows,
    specification: Specification | None,
    model: MetadataModel | None,
    fit_rows: str | float | None,
    out: Path,
    coefficients: str | Path | None,
    batch_rows: int,
    seed: int,
    progress: Progress,
) -> ResidualizeSummary:
    num_fitted, notes = 0, []
    with ExitStack() as stack:
        kept: _KeptDesign | None = None
        if specification is not None:
            # Rows that are not fitted to have no design matrix yet.
            if fit_rows is None and specification.weights is None:
                kept = _KeptDesign(out.parent, rows.features, specification.scale)
                stack.callback(kept.close)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConfoundedDesignWarning)
                model, num_fitted = _fit(rows, specification, fit_rows, kept, batch_rows, seed, progress)
            notes = [str(entry.message) for entry in caught if entry.category is ConfoundedDesignWarning]
            if coefficients is not None:
                model.save(Path(coefficients))
        assert model is not None
        num_rows = _write(rows, model, kept, out, batch_rows, progress)
    design = model.design
    removed = () if design is None or not model.removes_design else design.metadata_names
    protected: tuple[str, ...] = ()
    if design is not None:
        protected = design.label_names if model.removes_design else design.metadata_names
    return ResidualizeSummary(
        num_rows=num_rows,
        num_features=len(model.feature_names),
        num_rows_fitted=num_fitted,
        feature_names=model.feature_names,
        metadata_names=removed,
        label_names=protected,
        sites=() if model.site is None else tuple(map(str, model.location_scale.sites)),
        warnings=tuple(notes),
    )


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass


def _check_out(source: Path, out: Path, metadata: str | Path | None) -> None:
    if out.suffix.lower() != source.suffix.lower():
        raise TableFileError(
            f"{out}: the result has the format of the table, name it {out.with_suffix(source.suffix).name}."
        )
    for path in (source, *([] if metadata is None else [Path(metadata)])):
        if out.exists() and path.exists() and out.samefile(path):
            raise TableFileError(f"{out} is an input: choose another file for the result.")
    if not out.parent.is_dir():
        raise TableFileError(f"the folder {out.parent} does not exist.")


def _fit(
    rows: _Rows,
    specification: Specification,
    fit_rows: str | float | None,
    kept: _KeptDesign | None,
    batch_rows: int,
    seed: int,
    progress: Progress,
) -> tuple[MetadataModel, int]:
    design = specification.design()
    weights = specification.weights
    chosen = [name for name in (fit_rows, weights) if isinstance(name, str)]
    variables = [] if design is None else design.variables()
    no_rows = f"{rows.table.path}: fit_rows={fit_rows!r} (weights={weights!r}) chooses no row to fit to."
    if design is not None:
        sample = DesignSample(design, seed)
        fits_all = fit_rows is None and weights is None
        everything = sample if fits_all else DesignSample(design, seed, max_rows=1)
        chooser = _RowChooser(fit_rows, weights, seed)
        columns = list(dict.fromkeys([*variables, *chosen]))
        for start, table in rows.metadata(columns, max(batch_rows, 2**16)):
            with _at_rows(rows.table.path, start, table.num_rows):
                mask = chooser.mask(table)
                table = table.select(variables)
                if specification.missing == "error":
                    _check_complete(table)
                sample.add(table if mask is None else table.filter(mask))
                if everything is not sample:
                    everything.add(table)
            progress("metadata", start + table.num_rows, rows.table.num_rows)
        if sample.num_rows == 0:
            raise TableFileError(no_rows)
        design.fit(for_design(sample.rows()))
        if everything is not sample:
            # Now, not after an hour: a level or a gap that only other rows have.
            try:
                design.transform(for_design(everything.witnesses()), labels=False)
            except (TypeError, ValueError) as error:
                raise TableFileError(
                    f"{rows.table.path} has rows beside those of fit_rows={fit_rows!r} (weights={weights!r}) "
                    f"that cannot be corrected (one row of each kind was looked at): {error}"
                ) from error
    batch_rows = _rows_of_design(design, batch_rows)
    wanted = [*variables, *([] if specification.site is None else [specification.site]), *chosen]
    chooser = _RowChooser(fit_rows, weights, seed)
    moments: SiteMoments = {}
    removes = specification.formula is not None

    def designed() -> Iterator[tuple[Block, NDArray[Any], DesignColumns, NDArray[np.float64] | None]]:
        for block, table in rows.blocks(list(dict.fromkeys(wanted)), batch_rows):
            with _at_rows(rows.table.path, block.start, len(block.features)):
                features, mask = block.features, chooser.mask(table)
                if mask is not None:
                    features, table = features.T[:, mask].T, table.filter(mask)
                columns = design_columns(design, removes, specification.site, table, with_labels=True)
            if kept is not None:
                kept.add(columns)
            yield block, features, columns, row_weights(table, weights)

    # One thread reads, one makes the design, this one sums.
    for block, features, (metadata, labels, sites), weight in prefetched(designed()):
        assert labels is not None
        with _at_rows(rows.features.path, block.start, len(block.features)):
            moments = add_moments(moments, site_moments(features, metadata, labels, sites, weight))
        progress("fit", block.start + len(block.features), rows.features.num_rows)
    num_fitted = sum(part.num_rows for part in moments.values())
    if num_fitted == 0:
        raise TableFileError(no_rows)
    return fitted_model(specification, design, moments, rows.features.feature_names), num_fitted


def _rows_of_design(design: Design | None, batch_rows: int) -> int:
    """Return how many rows a block has at most, so that its design stays small whatever its width."""
    width = 0 if design is None else design.num_metadata + design.num_labels
    return min(batch_rows, max(_DESIGN_VALUES // max(width, 1), 256))


class _RowChooser:
    """Which rows to fit to, block after block; the same ones whatever the blocks."""

    def __init__(self, fit_rows: str | float | None, weights: str | None, seed: int) -> None:
        if isinstance(fit_rows, int | float) and not 0 < fit_rows <= 1:
            raise ValueError(f"fit_rows must be a share above 0 and up to 1, or a column, got {fit_rows!r}.")
        self._fit_rows, self._weights = fit_rows, weights
        # Not the numbers by which rows of the design are sampled.
        self._random = np.random.default_rng([seed, 1])

    def mask(self, table: pyarrow.Table) -> NDArray[np.bool_] | None:
        """Return for each row whether it is chosen; None: all are."""
        weights = row_weights(table, self._weights)
        counts = None if weights is None else weights > 0
        if self._fit_rows is None:
            return counts
        if not isinstance(self._fit_rows, str):
            chosen = self._random.random(table.num_rows) < self._fit_rows
        else:
            values = table.column(self._fit_rows).to_numpy()
            if not np.isin(values, [0, 1]).all():
                raise ValueError(
                    f"column {self._fit_rows!r} chooses rows: it must have only true and false, or 0 and 1."
                )
            chosen = values.astype(bool)
        return np.asarray(chosen if counts is None else chosen & counts)


def _check_complete(table: pyarrow.Table) -> None:
    for name in table.column_names:
        missing = table.column(name).is_null(nan_is_null=True).to_numpy()
        if missing.any():
            raise ValueError(
                f"column {name!r} is missing in row(s) {np.flatnonzero(missing)[:5].tolist()}: drop or fill "
                "these rows, or set missing='mean' (no correction beyond the average) or 'indicator'."
            )


def _write(
    rows: _Rows,
    model: MetadataModel,
    kept: _KeptDesign | None,
    out: Path,
    batch_rows: int,
    progress: Progress,
) -> int:
    num_rows, batch_rows = 0, _rows_of_design(model.design, batch_rows)

    def designed() -> Iterator[tuple[Block, DesignColumns]]:
        if kept is not None and kept.is_kept:
            kept.rewind()
            for block in rows.features.blocks(batch_rows, None):
                yield block, kept.take(len(block.features))
            return
        for block, table in rows.blocks(model.variables, batch_rows, whole=True):
            with _at_rows(rows.table.path, block.start, len(block.features)):
                columns = model.columns(table)
            yield block, columns

    with atomic_path(out) as temporary:
        writer = rows.features.writer(temporary)
        try:
            for block, columns in prefetched(designed()):
                with _at_rows(rows.features.path, block.start, len(block.features)):
                    residuals = model.remove_columns(block.features, columns, overwrite=True)
                    _check_finite(residuals, rows.features.feature_names)
                writer.write(block, residuals)
                num_rows = block.start + len(block.features)
                progress("write", num_rows, rows.features.num_rows)
        except BaseException:
            with suppress(Exception):
                writer.close()
            raise
        writer.close()
    return num_rows


def _check_finite(values: NDArray[Any], names: Sequence[str]) -> None:
    # Also finds what fit did not see: rows it was not given, and coefficients that came from elsewhere.
    if np.isfinite(values.sum()):
        return
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    row, column = (int(index[0]) for index in np.nonzero(bad))
    raise ValueError(
        f"feature {names[column]!r} is missing, infinite or too large in row {row}: drop or impute such rows."
    )
