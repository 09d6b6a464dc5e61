"""`audit`: read the arguments, align their rows, measure every column, report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdnorm.arrays import check_same_order
from mdnorm.auditing.columns import Column, intersection, printable
from mdnorm.auditing.findings import find
from mdnorm.auditing.inputs import Inputs, Metadata, aligned, as_treatments, by_treatment
from mdnorm.auditing.measuring import MODELS, measure
from mdnorm.auditing.reading import as_input_error
from mdnorm.auditing.report import Report
from mdnorm.auditing.sets import feature_sets, projections_of
from mdnorm.auditing.settings import Settings
from mdnorm.bars import step_bar
from mdnorm.metrics import cka
from mdnorm.version import __version__

_PROJECTED_ROWS = 1000


def audit(
    features: Any,
    metadata: Any,
    labels: Any = None,
    *,
    after: Any = None,
    predictions: Any = None,
    scores: Any = None,
    positive: Any = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    intersect: Sequence[Sequence[str]] = (),
    held_out: Any = None,
    subjects: Any = None,
    max_rows: int = 2000,
    settings: Settings | None = None,
    project: str | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, int, int], None] = True,
) -> Report:
    """Measure what features know of metadata, and give a verdict on every column.

    For every metadata column: the distance correlation with an interval, cross-validated probes (linear and
    non-linear) with permutation tests, both over all samples and given the label, and, where predictions are
    given, the model's rates by group.

    Parameters
    ----------
    features : (n, p) or (n, …) array or tensor, or mapping
        One row a sample; more dimensions are flattened. Or names of treatments to such features of the same
        samples; the first is what the others are compared with.
    metadata : DataFrame, mapping, array or sequence of Column
        A DataFrame (pandas, polars, pyarrow), names to columns, or what `mdnorm.auditing.columns.as_columns`
        made of these; rows in the order of `features`. Missing values are fine: a column is measured on the
        rows where it is there.
    labels : str or (n,) array, optional
        Name of a metadata column, or the labels themselves: what the features are meant to know.
    after : (n, …) array or tensor, optional
        Features of the same samples after a treatment, or from another model: two treatments.
    predictions, scores : str or (n,) array, or mapping, optional
        Predictions from the first features (the name of a metadata column, or the values): classes where
        the label is categorical, numbers where it is continuous. Scores are probabilities of the positive
        class, for calibration. Or mappings from names of treatments to these; `features` and `after` are
        called "before" and "after".
    positive : optional
        Which label is the positive one. The larger of two by default.
    kinds : mapping, optional
        Names of metadata columns to "continuous" or "categorical", where the inferred kind is wrong.
    ignore : sequence of str
        Metadata columns to leave out: names, and patterns such as "voxel_*".
    keep : sequence of str
        Metadata columns that are meant to stay in the features, like the label: losing them is harm.
    intersect : sequence of sequences of str
        Groups of categorical columns whose combinations are audited too: ``[("gender", "ethnicity")]``.
    held_out : str or (n,) array of bool, optional
        Rows that no treatment was fitted on. They are audited apart from the others, and decide: most
        corrections look perfect on the rows they were fitted on.
    subjects : str or (n,) array, optional
        The subject of each row, where subjects have several rows. These stay together in the cross-validation
        and in the intervals of gaps between groups; distance correlations use one row of each subject.
    max_rows : int
        If there are more rows than this, so many are sampled (with the seed), and the report says so.
    settings : Settings, optional
        How to measure, and the limits above which a finding counts as harm.
    project, facts : str and mapping, optional
        The name of what is audited, for the head of the page, and what it shows under "How it was made".
    progress : bool or callable
        Show a progress bar (on a terminal, where tqdm is installed); or a function that is called before each
        step with what is done next, the number of steps so far, and that of all.

    Returns
    -------
    Report
        The verdict on every column, the findings, and what was measured; ``report.save(folder)`` writes it.

    Raises
    ------
    InputError
        The inputs do not fit together, or too little is left to measure; the message says what.
    mdnorm.extras.MissingExtraError
        A package of the extra ``mdnorm[audit]`` is missing.

    Examples
    --------
    >>> import numpy as np, mdnorm
    >>> rng = np.random.default_rng(0)
    >>> site = rng.integers(0, 3, 200)
    >>> features = rng.standard_normal((200, 4)) + 3 * np.eye(3)[site][:, [0, 1, 2, 0]]
    >>> report = mdnorm.audit(features, {"site": site})
    >>> report.findings[0].level
    'strong'
    """
    settings = settings or Settings()
    treatments = dict(features) if isinstance(features, Mapping) else {"features": features}
    with as_input_error():
        check_same_order(
            **{"after": after, "metadata": metadata, "labels": labels, "subjects": subjects} | treatments
        )
    given, titles = as_treatments(features, after)
    classes = by_treatment("predictions", predictions, list(given))
    probabilities = by_treatment("scores", scores, list(given))
    table = Metadata(metadata, kinds, ignore, given)
    crossed = [intersection([table.named(name, "an intersection") for name in group]) for group in intersect]
    kept = {table.named(name, "what is meant to stay").name for name in keep}
    label = table.label(labels)
    predicted = table.predictions(classes, probabilities, label, positive)
    owners = None if subjects is None else table.values(subjects, "subjects")
    is_held_out = None if held_out is None else table.flags(held_out)
    columns = [column for column in (*table.columns, *crossed) if column.name not in table.used]
    inputs = Inputs(given, titles, columns, label, predicted, owners, is_held_out)

    inputs, notes = aligned(inputs, max_rows, settings)

    sets = feature_sets(inputs.features, titles, inputs.held_out, standardize=settings.standardize)
    audited = [column for column in (*inputs.columns, inputs.label) if column and column.is_auditable]
    with step_bar(len(audited) * len(sets) * (1 + len(MODELS)) + 1, "audit", progress) as step:
        measured, left_out = measure(inputs, sets, kept, settings, step)
        step("projection and similarity")
        projections = projections_of(inputs.features, _PROJECTED_ROWS, settings.seed)

    notes += [f"{column.name} was left out: {column.note}" for column in left_out]
    label_name = None if inputs.label is None else inputs.label.name
    findings = find(measured, sets, label_name, settings)
    order = {name: place for place, name in enumerate(dict.fromkeys(part.column for part in findings))}
    first, *_, last = *given, next(reversed(given))
    names = {column.name for column in measured}
    audited = [column for column in audited if column.name in names]
    return Report(
        findings=tuple(findings),
        # In the order of their verdicts, the label last.
        columns=tuple(sorted(measured, key=lambda column: (column.is_label, order[column.name]))),
        left_out=tuple(left_out),
        notes=tuple(notes),
        label=label_name,
        sets=sets,
        settings=settings,
        similarity=None if first == last else float(cka(inputs.features[first], inputs.features[last])),
        facts=_facts(inputs, audited, settings)
        | {
            "project": None if project is None else printable(project),
            "rows_given": table.num_rows,
            "max_rows": max_rows,
            **(facts or {}),
        },
        projections=projections,
        values=tuple(audited),
    )


def _facts(inputs: Inputs, audited: Sequence[Column], settings: Settings) -> dict[str, Any]:
    """Return when, on what and how an audit was made."""
    import sklearn

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "rows_used": len(next(iter(inputs.features.values()))),
        "features": {key: list(values.shape) for key, values in inputs.features.items()},
        "fingerprint": _fingerprint(inputs.features, audited),
        "settings": asdict(settings),
        "versions": {
            "mdnorm": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def _fingerprint(used: Mapping[str, NDArray[np.float64]], columns: Sequence[Column]) -> str:
    """Return twelve digits that change with any value of the rows in use."""
    digest = hashlib.sha256()
    for values in used.values():
        digest.update(np.ascontiguousarray(values).tobytes())
    for column in columns:
        digest.update(repr((column.name, column.values.tolist())).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:12]
