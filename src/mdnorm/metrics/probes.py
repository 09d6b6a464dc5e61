"""Probes: how well can a metadata column be predicted from features, against permutations of the column.

The maths is in `mdnorm.metrics.probe_ridge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mdnorm.arrays import check_same_order
from mdnorm.design.roles import may_be_codes
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_confidence, check_integer, check_permutations, check_same_rows
from mdnorm.metrics.columns import as_categories, as_column
from mdnorm.metrics.probe_folds import LEAST_VARIATION, Settings, UnusableError
from mdnorm.metrics.probe_scores import MIN_ROWS, Outcome, ProbeScore, pooled, probe_rows
from mdnorm.metrics.samples import as_rows, check_finite
from mdnorm.plain import PlainResult
from mdnorm.text import listed

Floats = NDArray[np.float64]

# Whole numbers with at most this many distinct values are classes unless the caller says otherwise.
_MAX_NUMERIC_CLASSES = 10


@dataclass(frozen=True)
class ProbeResult(PlainResult):
    """What `probe` found: the score, `scored`, and how it was made.

    `classes` and `class_counts` are the classes of the target and their rows, empty for regression. With
    labels, `within_labels` has the probe within each class that could be probed (its `label`, which is None
    for all rows), `pooled` the mean of their scores weighted by rows, with a p-value of its own, and
    `left_out` the other classes, each with the reason. The `notes` are decisions that were made for the
    caller, such as fewer folds.
    """

    model: str
    task: str
    scored: ProbeScore
    num_rows: int
    num_features: int
    num_folds: int
    num_permutations: int
    classes: tuple[Any, ...] = ()
    class_counts: tuple[int, ...] = ()
    label: Any = None
    within_labels: tuple[ProbeResult, ...] = ()
    pooled: ProbeScore | None = None
    left_out: tuple[tuple[Any, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """R² or balanced accuracy."""
        return self.scored.value

    @property
    def chance(self) -> float:
        """The score of predictions that know nothing."""
        return self.scored.chance

    @property
    def p_value(self) -> float | None:
        """Permutation p-value of the score."""
        return self.scored.p_value


def probe(
    features: Tensor | ArrayLike,
    target: Any,
    *,
    model: Literal["linear", "nonlinear"] = "linear",
    task: Literal["auto", "classification", "regression"] = "auto",
    labels: Any = None,
    groups: Any = None,
    num_folds: int = 5,
    num_permutations: int = 200,
    num_landmarks: int = 300,
    confidence: float = 0.95,
    seed: int = 0,
) -> ProbeResult:
    """Predict a metadata column from features, cross-validated, and compare with permutations of the column.

    Parameters
    ----------
    features : tensor or array, (n,) or (n, p)
        One row per sample, of any real dtype; n ≥ 10, finite values. More columns than rows are fine.
    target : tensor, array, list or Series, (n,)
        The column to predict, rows in the order of `features`: numbers, or classes of any kind.
    model : {"linear", "nonlinear"}
        The linear probe is ridge regression or, for classes, the linear discriminant it leads to. The
        non-linear one is the same on non-linear functions of the features (below).
    task : {"auto", "classification", "regression"}
        "auto" takes numbers as numbers unless they have two values, or are whole with at most 10 values.
    labels : array-like, (n,), optional
        Label classes, to ask what the features know *beyond the label*: the target is also probed within each
        class, and permutations stay within classes.
    groups : array-like, (n,), optional
        Subject of each row. Rows of one subject stay in one fold, and permutations exchange whole subjects.
    num_folds : int
        At least 2. Reduced, with a note, where a class has fewer rows (or subjects).
    num_permutations : int
        At least 20, since the smallest p-value is ``1 / (1 + num_permutations)``; or 0 for no p-value.
    num_landmarks : int
        Rows from which each kernel of the non-linear probe is approximated; at most half of those trained on.
    confidence : float
        Confidence level of the intervals of the scores, between 0 and 1.
    seed : int
        Of folds, permutations and landmarks: the same seed gives the same result.

    Returns
    -------
    ProbeResult
        Over the rows of all folds the balanced accuracy, or R² (1 − squared error / squared error of the mean
        of the training rows: 0 for a probe that knows nothing, negative where it is worse than that).
        Features that are constant but for rounding give chance and a p-value of 1.

    Raises
    ------
    TypeError, ValueError
        A wrong type or shape, different numbers of rows, NaN, infinite or missing values, too few rows, a
        constant target, a target that is an identifier, a class with a single row or subject, unknown
        options.
    MissingExtraError
        scikit-learn is not installed.

    Notes
    -----
    Standardisation, landmarks, the strength of the ridge and the thresholds (for equal priors, so that a rare
    class does not leave the probe at chance) are fitted on the training rows of each fold. The strength is
    the strongest that is not clearly worse than the best by generalised cross-validation, with `groups` by
    leaving out one subject at a time; strengths that leave fewer than 20 degrees of freedom are not tried.

    Intervals are for this kind of probe, fitted to as many rows. That of R² comes from the linearised
    variance of a ratio of sums over rows or subjects; its upper limit is at least that of the squared
    correlation of prediction and target. That of balanced accuracy is combined from Wilson's intervals of the
    classes [5]_. Both are widened because folds share training rows [6]_.

    Permutations stay within the folds, which makes the p-value exact also where folds are stratified by the
    target [4]_. With `groups`, each subject gets the values of another subject, repeated or cut to its number
    of rows; this is exact where subjects have equally many rows. With `labels`, the p-value of all rows asks
    whether features know more of the target than the label tells, which `permutation_mean` shows.

    The non-linear probe offers three representations of the standardised features, and takes for each target
    the one with the smallest left-out error: the features themselves; functions of single features (cosines
    of their ranks; of principal components where there are more than 600); and Nyström features (Williams &
    Seeger 2001) of Gaussian kernels of two widths beside the features. All end in the same ridge, so that all
    permutations share one factorisation of each in a fold, where a network or boosted trees would have to
    be trained again for each. The page "Speed and memory" compares balanced accuracies. This probe
    does not find an exclusive or of two features among 84 (0.51), but boosted trees do (0.75): a large
    p-value does not show independence.

    Arithmetic is O(n·q² + n·q·num_permutations) a fold with q the number of (transformed) columns, or n where
    that is smaller; memory is O(n·(p + q)) beside it.

    References
    ----------
    .. [1] Alain, G., & Bengio, Y. (2016). Understanding intermediate layers using linear classifier probes.
       arXiv:1610.01644.
    .. [2] Hastie, T., Buja, A., & Tibshirani, R. (1995). Penalized discriminant analysis. The Annals of
       Statistics, 23(1), 73–102.
    .. [3] Williams, C. K. I., & Seeger, M. (2001). Using the Nyström method to speed up kernel machines.
       Advances in Neural Information Processing Systems 13.
    .. [4] Phipson, B., & Smyth, G. K. (2010). Permutation P-values should never be zero. Statistical
       Applications in Genetics and Molecular Biology, 9(1), 39.
    .. [5] Zou, G. Y., & Donner, A. (2008). Construction of confidence limits about effect measures: a general
       approach. Statistics in Medicine, 27(10), 1693–1702.
    .. [6] Nadeau, C., & Bengio, Y. (2003). Inference for the generalization error. Machine Learning, 52(3),
       239–281.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> age = rng.uniform(20, 80, 200)
    >>> features = np.column_stack([age + rng.normal(0, 5, 200), rng.normal(size=200)])
    >>> result = probe(features, age)
    >>> result.score > 0.9, round(result.p_value, 3)
    (True, 0.005)
    """
    with requires("metrics"):
        import sklearn  # noqa: F401 - fails here rather than in the middle
    if model not in ("linear", "nonlinear"):
        raise ValueError(f"model must be 'linear' or 'nonlinear', got {model!r}.")
    if task not in ("auto", "classification", "regression"):
        raise ValueError(f"task must be 'auto', 'classification' or 'regression', got {task!r}.")
    check_integer("num_folds", num_folds, 2)
    check_integer("num_landmarks", num_landmarks, 1)
    check_integer("seed", seed, 0)
    check_permutations(num_permutations, none_is_allowed=True)
    check_confidence(confidence)
    check_same_order(features=features, target=target, labels=labels, groups=groups)
    rows = _as_features(features)
    column = as_column(target, "target")
    label_classes = None if labels is None else as_categories(labels, "labels")
    codes = None if label_classes is None else label_classes.codes
    subjects = None if groups is None else as_categories(groups, "groups").codes
    for name, values in {"target": column, "labels": codes, "groups": subjects}.items():
        if values is not None:
            check_same_rows(**{"features": len(rows), name: len(values)})
    if rows.shape[0] < MIN_ROWS:
        raise ValueError(
            f"features must have at least {MIN_ROWS} rows, got {rows.shape[0]}: pool more samples."
        )
    notes: list[str] = []
    if task == "auto":
        task = _guessed_task(column, notes)
    classes = as_categories(target, "target") if task == "classification" else None
    numbers = _as_numbers(column) if classes is None else classes.codes
    settings = Settings(model, num_folds, num_permutations, num_landmarks, confidence, seed)

    def result(outcome: Outcome, notes: list[str], **within: Any) -> ProbeResult:
        present = outcome.counts.nonzero()[0].tolist()
        return ProbeResult(
            model=model,
            task=task,
            scored=outcome.score(),
            num_rows=outcome.num_rows,
            num_features=rows.shape[1],
            num_folds=outcome.num_folds,
            num_permutations=int(num_permutations),
            classes=() if classes is None else tuple(classes.names[code] for code in present),
            class_counts=tuple(int(outcome.counts[code]) for code in present),
            notes=tuple(notes),
            **within,
        )

    overall = probe_rows(rows, numbers, classes, codes, subjects, settings, notes)
    within: list[Outcome] = []
    results: list[ProbeResult] = []
    left_out: list[tuple[Any, str]] = []
    for code, label in enumerate(label_classes.names if label_classes is not None else ()):
        chosen = codes == code
        owners = None if subjects is None else subjects[chosen]
        class_notes: list[str] = []
        try:
            outcome = probe_rows(rows[chosen], numbers[chosen], classes, None, owners, settings, class_notes)
        except UnusableError as error:
            left_out.append((label, str(error)))
            continue
        within.append(outcome)
        results.append(result(outcome, class_notes, label=label))
    return result(
        overall, notes, within_labels=tuple(results), pooled=pooled(within), left_out=tuple(left_out)
    )


def _as_features(features: Tensor | ArrayLike) -> Floats:
    tensor = as_rows(features, "features").cpu()
    check_finite(tensor, "features", "every argument")
    rows = tensor.numpy()
    if rows.shape[0] == 0:
        return rows
    # What is left of a column that was subtracted from itself is rounding, which a probe could read.
    rounding = np.ptp(rows, axis=0) <= LEAST_VARIATION * np.abs(rows).max()
    if rounding.any():
        rows = np.where(rounding, 0.0, rows)
    # Columns are standardised anyway; a power of two first, so that no square can overflow.
    _, exponents = np.frexp(np.abs(rows).max(axis=0))
    scaled: Floats = np.ldexp(rows, -exponents)
    return scaled


def _guessed_task(column: NDArray[Any], notes: list[str]) -> Literal["classification", "regression"]:
    if column.dtype.kind not in "iuf":
        return "classification"
    distinct = np.unique(column)
    if distinct.size <= 2:
        return "classification"
    if distinct.size <= _MAX_NUMERIC_CLASSES and (distinct == np.round(distinct)).all():
        notes.append(
            f"target has {distinct.size} distinct whole numbers and was taken as classes: pass "
            "task='regression' if they are a quantity."
        )
        return "classification"
    if may_be_codes(distinct, column.size):
        notes.append(
            f"target has {distinct.size} distinct whole numbers and was taken as a quantity: pass "
            "task='classification' if they are codes."
        )
    return "regression"


def _as_numbers(column: NDArray[Any]) -> Floats:
    if column.dtype.kind not in "biuf":
        raise TypeError(
            f"target must be numeric for task='regression', got {column.dtype} values such as "
            f"{listed(column.tolist(), 1)}: pass task='classification'."
        )
    numbers = column.astype(np.float64)
    largest = np.abs(numbers).max()
    return numbers / largest if largest > 0 else numbers
