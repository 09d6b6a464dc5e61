"""Residuals of tables that do not fit into memory: fit and transform in blocks of rows.

What is learnt is additive over rows. Three passes: the metadata alone, for levels, knots and means of the
design; features and metadata, for the `Moments` of each site; and both once more, to write the residuals.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdnorm.bars import stage_bars
from mdnorm.design import ConfoundedDesignWarning, Design
from mdnorm.design.files import TABLE_FORMATS, check_metadata, checked_suffix, open_table
from mdnorm.design.roles import TableWarning
from mdnorm.design.table_file import TableFileError
from mdnorm.distributed import one_thread
from mdnorm.files import atomic_path
from mdnorm.plain import PlainResult
from mdnorm.tables.combat import SiteMoments, add_moments, unknown_note
from mdnorm.tables.design_sample import DesignSample
from mdnorm.tables.files import FeatureFile, Rows, open_features, prefetched
from mdnorm.tables.model import (
    MetadataModel,
    Specification,
    all_skipped,
    check_finite,
    check_model_path,
    fitted_model,
    moments_of_rows,
    skips_missing_features,
    used_rows,
    what_to_remove,
)

if TYPE_CHECKING:
    import pyarrow

Progress = Callable[[str, int, "int | None"], None]

# Values of a block of features by default: 16 MiB in float32.
_BLOCK_VALUES = 2**22
# Values of the design of a block: 32 MiB in float64, of which a few are alive at once.
_DESIGN_VALUES = 2**22


@dataclass(frozen=True)
class ResidualizeSummary(PlainResult):
    """What `residualize_file` did.

    Attributes
    ----------
    num_rows, num_features : int
    num_rows_fitted : int
        Rows that the coefficients come from; 0 where they were given.
    feature_names, metadata_names, label_names : tuple of str
        Features; columns of the design that are removed, and that are protected.
    sites : tuple of str
    left_alone : dict
        Columns that are neither features nor metadata and stayed as they are, with the reason; where
        `features` named the features, no reasons are given and it is empty.
    warnings : tuple of str
        Such as a design in which labels and metadata can hardly be told apart, numbers that seem to stand
        for missing values, or how many rows have a site that was not in the fit.
    """

    num_rows: int
    num_features: int
    num_rows_fitted: int
    feature_names: tuple[str, ...]
    metadata_names: tuple[str, ...]
    label_names: tuple[str, ...]
    sites: tuple[str, ...]
    left_alone: dict[str, str]
    warnings: tuple[str, ...]


@contextmanager
def _at_rows(path: Path, start: int, rows: int, used: int | None = None) -> Iterator[None]:
    """Say in errors which rows of the file the message is about, or how many `used` ones of them."""
    try:
        yield
    except TableFileError:
        raise
    except (TypeError, ValueError) as error:
        offset = " (below, rows are counted from there)" if start else ""
        if used not in (None, rows):
            offset = f" (below, rows are counted among the {used} of them that are fitted to)"
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
    missing: str | None = None,
    unseen: str | None = None,
    missing_features: str = "error",
    missing_values: Sequence[str] = (),
    fit_rows: str | float | None = None,
    weights: str | None = None,
    apply: MetadataModel | str | Path | None = None,
    save_model: str | Path | None = None,
    batch_rows: int | None = None,
    seed: int = 0,
    progress: bool | Progress = True,
) -> ResidualizeSummary:
    r"""Write a table like another one, in which metadata explain nothing of the features.

    The table may be larger than memory: it is read in blocks of rows. The result is that of
    `mdnorm.sklearn.MetadataResidualizer` on the whole table.

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
        they are columns of `source`. A column that both tables have must be the same in both.
    key : str, optional
        Column of both tables that must have the same values in the same order; others may then differ.
    features : str or sequence of str, optional
        Features by name or pattern (``"voxel_*"``). None: the numbers that are not used otherwise, but the
        index of a DataFrame, identifiers (whole numbers that nearly all differ) and codes (few different
        whole numbers); the summary has what was left alone, and why.
    scale, empirical_bayes, ridge
        As for `mdnorm.tables.fit_location_scale`.
    missing, unseen : str, optional
        As for `mdnorm.Design`; `unseen` holds for sites as well. None: "error", or the rules of the model in
        `apply`.
    missing_features : {"error", "skip"}
        What a missing value of a feature does. "error" names the columns. "skip": its row is left out of the
        fit, it stays missing, and the other features of the row are corrected.
    missing_values : sequence of str
        Further texts that stand for a missing value, such as ``"?"`` or ``"."``.
    fit_rows : str or float, optional
        Rows that coefficients are estimated from: a column of booleans (or 0 and 1), or a share between 0 and
        1 of all rows, chosen at random. None: all.
    weights : str, optional
        Column with the weights of the rows: one of weight 2 counts as two rows in the coefficients, one of
        weight 0 is not fitted to.
    apply : MetadataModel or path, optional
        Coefficients fitted before, or the file that `MetadataModel.save` wrote; nothing is estimated.
        Excludes all that says what to fit.
    save_model : path, optional
        ``.safetensors`` file to save the fitted model to, see `MetadataModel.load`.
    batch_rows : int, optional
        Rows in a block, fewer where the design has many columns. The result depends on it only by rounding.
    seed : int
        Of the rows in `fit_rows`, and of the 262 144 rows that a design is fitted to where there are more:
        its levels and ranges are those of all rows, its knots and the means that stand for missing values
        those of the sample.
    progress : bool or callable
        Show a progress bar (on a terminal, where tqdm is installed); or a function that is called with a
        stage ("metadata", "fit" or "write"), the rows done and the rows in all or None.

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
    features = [features] if isinstance(features, str) else features
    removal = what_to_remove(
        apply,
        (missing, unseen),
        {"fit_rows": fit_rows, "features": features, "save_model": save_model},
        formula=formula,
        labels=labels,
        site=site,
        scale=scale,
        empirical_bayes=empirical_bayes,
        ridge=ridge,
        weights=weights,
    )
    _check_out(source, out, metadata, save_model)
    skips_missing = skips_missing_features(missing_features)
    is_array = source.suffix.lower() == ".npy"
    if isinstance(removal, MetadataModel):
        design, features = removal.design, None if is_array else removal.feature_names
    else:
        design = removal.design()
    reserved = [*removal.variables, *([fit_rows] if isinstance(fit_rows, str) else [])]
    table = None if metadata is None else open_table(Path(metadata), missing_values)
    taken = [*(reserved if table is None else []), *([] if key is None else [key])]
    file: FeatureFile = open_features(source, features, taken, missing_values)
    if isinstance(removal, MetadataModel):
        names, expected = file.feature_names, removal.feature_names
        if len(names) != len(expected) or (names != expected and not is_array):
            raise TableFileError(
                f"{source} has the features {list(names[:5])}… ({len(names)}), the coefficients are of "
                f"{list(expected[:5])}… ({len(expected)}) in that order."
            )
    rows = Rows(file, table, key)
    check_metadata(rows.table, reserved)
    rows.table.categories |= set() if design is None else design.declared_categories()
    rows.table.categories |= {name for name in (removal.site, key) if name is not None}
    rows.table.categories |= rows.compared - set(reserved)
    if batch_rows is None:
        batch_rows = min(max(_BLOCK_VALUES // len(file.feature_names), 256), 2**18)
    elif batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}.")

    # Others read and write meanwhile, and the products are too thin to share.
    with one_thread(), _cleaned_up_at_termination(), stage_bars(progress) as show:
        return _Passes(rows, out, fit_rows, skips_missing, batch_rows, seed, show).run(removal, save_model)


@contextmanager
def _cleaned_up_at_termination() -> Iterator[None]:
    """Remove temporary files at SIGTERM, as batch systems send it; the process then ends by it as ever."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        # A second one would interrupt the removal.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        came = signal.signal(signal.SIGTERM, signal.SIG_DFL) is signal.SIG_IGN
        if came:
            signal.raise_signal(signal.SIGTERM)


def _check_out(source: Path, out: Path, metadata: str | Path | None, save_model: str | Path | None) -> None:
    checked_suffix(source, (*TABLE_FORMATS, ".npy"))
    if save_model is not None:
        check_model_path(Path(save_model))
    for path in (out, *([] if save_model is None else [Path(save_model)])):
        if path.is_dir():
            raise TableFileError(f"{path} is a folder: give the name of a file to write.")
    if out.suffix.lower() != source.suffix.lower():
        raise TableFileError(
            f"{out}: the result has the format of the table, name it {out.with_suffix(source.suffix).name}."
        )
    for path in (source, *([] if metadata is None else [Path(metadata)])):
        if out.exists() and path.exists() and out.samefile(path):
            raise TableFileError(f"{out} is an input: choose another file for the result.")
    if not out.parent.is_dir():
        raise TableFileError(f"the folder {out.parent} does not exist.")


@dataclass(frozen=True)
class _Passes:
    """The passes over the rows of a file."""

    rows: Rows
    out: Path
    fit_rows: str | float | None
    skips_missing: bool
    batch_rows: int
    seed: int
    progress: Progress

    def run(
        self, removal: Specification | MetadataModel, save_model: str | Path | None
    ) -> ResidualizeSummary:
        """Fit where there is no model yet, and write."""
        num_fitted, notes = 0, list[str]()
        if isinstance(removal, MetadataModel):
            model = removal
        else:
            design, notes = self._fitted_design(removal)
            model, num_fitted = self._fit(removal, design)
            if save_model is not None:
                model.save(Path(save_model))
        num_rows = self._write(model, notes)
        names = () if model.design is None else model.design.metadata_names
        labels = () if model.design is None else model.design.label_names
        return ResidualizeSummary(
            num_rows=num_rows,
            num_features=len(model.feature_names),
            num_rows_fitted=num_fitted,
            feature_names=model.feature_names,
            metadata_names=names if model.removes_design else (),
            label_names=labels if model.removes_design else names,
            sites=() if model.site is None else tuple(map(str, model.location_scale.sites)),
            left_alone=dict(self.rows.features.left_alone),
            warnings=(*self.rows.features.warnings(), *notes),
        )

    def _chosen_columns(self, specification: Specification) -> list[str]:
        return [name for name in (self.fit_rows, specification.weights) if isinstance(name, str)]

    def _no_rows(self, specification: Specification) -> TableFileError:
        if self.skips_missing:
            features = self.rows.features
            empty = [np.isnan(part.features).all(0) for part in features.blocks(self.batch_rows, [])]
            why = all_skipped(np.all(empty, axis=0), features.feature_names)
            return TableFileError(f"{features.path}: {why}")
        return TableFileError(
            f"{self.rows.table.path}: fit_rows={self.fit_rows!r} (weights={specification.weights!r}) chooses "
            "no row to fit to."
        )

    def _metadata(self, columns: Sequence[str]) -> Iterator[tuple[int, NDArray[Any], pyarrow.Table]]:
        """Yield metadata with the index of the first row, and features where their gaps matter."""
        if self.skips_missing:
            for block, table in self.rows.blocks(columns, self.batch_rows):
                yield block.start, block.features, table
        else:
            for start, table in self.rows.metadata(columns, max(self.batch_rows, 2**16)):
                yield start, np.empty((table.num_rows, 0)), table

    def _fitted_design(self, specification: Specification) -> tuple[Design | None, list[str]]:
        """Return the design, fitted in a pass over the metadata alone, and what it warned of."""
        design, weights, path = specification.design(), specification.weights, self.rows.table.path
        if design is None:
            return None, []
        variables = design.variables()
        sample = DesignSample(design, self.seed)
        fits_all = self.fit_rows is None and weights is None and not self.skips_missing
        everything = sample if fits_all else DesignSample(design, self.seed, max_rows=1)
        chosen = _row_chooser(self.fit_rows, self.seed)
        columns = list(dict.fromkeys([*variables, *self._chosen_columns(specification)]))
        kept = [*variables, *([] if weights is None else [weights])]
        for start, features, table in self._metadata(columns):
            with _at_rows(path, start, table.num_rows):
                if everything is not sample:
                    everything.add(table.select(variables))
                used = used_rows(features, table, weights, self.skips_missing, chosen(table))[1]
                sample.add(used.select(kept))
            self.progress("metadata", start + table.num_rows, self.rows.table.num_rows)
        if sample.num_rows == 0:
            raise self._no_rows(specification)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample.fit(design, weights)
        if everything is not sample:
            # Now, not after an hour: a level or a gap that only other rows have.
            try:
                design.transform(everything.witnesses(), labels=False)
            except (TypeError, ValueError) as error:
                raise TableFileError(
                    f"{path} has rows beside those that are fitted to (fit_rows={self.fit_rows!r}, "
                    f"weights={weights!r}, missing_features={'skip' if self.skips_missing else 'error'!r}) "
                    f"that cannot be corrected (one row of each kind was looked at): {error}"
                ) from error
        said = (ConfoundedDesignWarning, TableWarning)
        return design, [str(entry.message) for entry in caught if issubclass(entry.category, said)]

    def _fit(self, specification: Specification, design: Design | None) -> tuple[MetadataModel, int]:
        """Return the model, and how many rows it is fitted to."""
        features_of, weights = self.rows.features, specification.weights
        wanted = dict.fromkeys([*specification.variables, *self._chosen_columns(specification)])
        chosen = _row_chooser(self.fit_rows, self.seed)
        moments: SiteMoments = {}
        for block, table in self.rows.blocks(list(wanted), self._rows_at_once(design)):
            rows = block.start, len(block.features)
            with _at_rows(self.rows.table.path, *rows):
                used = used_rows(block.features, table, weights, self.skips_missing, chosen(table))
            with _at_rows(self.rows.table.path, *rows, len(used[0])):
                columns = specification.columns(design, used[1])
            with _at_rows(features_of.path, *rows, len(used[0])):
                part = moments_of_rows(used[0], columns, used[2], features_of.feature_names)
                moments = add_moments(moments, part)
            self.progress("fit", sum(rows), features_of.num_rows)
        num_fitted = sum(part.num_rows for part in moments.values())
        if num_fitted == 0:
            raise self._no_rows(specification)
        return fitted_model(specification, design, moments, features_of.feature_names), num_fitted

    def _write(self, model: MetadataModel, notes: list[str]) -> int:
        """Write the result, return its number of rows, and note how many are of unknown sites."""
        features, num_rows = self.rows.features, 0
        places, unknown = [np.empty(0, np.intp)], dict[Hashable, None]()

        def changed() -> Iterator[tuple[int, Any]]:
            blocks = self.rows.blocks(model.variables, self._rows_at_once(model.design), whole=True)
            for block, table in blocks:
                rows = block.start, len(block.features)
                with _at_rows(self.rows.table.path, *rows):
                    columns = model.columns(table)
                    if columns[2] is not None:
                        index, new = model.site_index(columns[2])
                        places.append(index[index < 0])
                        unknown.update(dict.fromkeys(new))
                with _at_rows(features.path, *rows):
                    residuals = model.remove_columns(block.features, columns, overwrite=True)
                    check_finite(residuals, features.feature_names, self.skips_missing)
                yield sum(rows), features.changed(block, residuals)

        # One thread reads, one computes, this one writes.
        with atomic_path(self.out) as temporary, closing(features.writer(temporary)) as writer:
            for num_rows, piece in prefetched(changed()):
                writer.write(piece)
                self.progress("write", num_rows, features.num_rows)
        if unknown:
            notes.append(unknown_note("site", np.concatenate(places), list(unknown), num_rows))
        return num_rows

    def _rows_at_once(self, design: Design | None) -> int:
        """Return how many rows a block has at most, so that its design stays small whatever its width."""
        width = 0 if design is None else design.num_metadata + design.num_labels
        return min(self.batch_rows, max(_DESIGN_VALUES // max(width, 1), 256))


def _row_chooser(
    fit_rows: str | float | None, seed: int
) -> Callable[[pyarrow.Table], NDArray[np.bool_] | None]:
    """Return what says of the rows of one block after the other which are fitted to; None: all are."""
    if isinstance(fit_rows, int | float) and not 0 < fit_rows <= 1:
        raise ValueError(f"fit_rows must be a share above 0 and up to 1, or a column, got {fit_rows!r}.")
    # Not the numbers by which rows of the design are sampled.
    random = np.random.default_rng([seed, 1])

    def chosen(table: pyarrow.Table) -> NDArray[np.bool_] | None:
        if fit_rows is None:
            return None
        if not isinstance(fit_rows, str):
            return np.asarray(random.random(table.num_rows) < fit_rows)
        values = table.column(fit_rows).to_numpy()
        if not np.isin(values, [0, 1]).all():
            raise ValueError(
                f"column {fit_rows!r} chooses rows: it must have only true and false, or 0 and 1."
            )
        return np.asarray(values.astype(bool))

    return chosen
