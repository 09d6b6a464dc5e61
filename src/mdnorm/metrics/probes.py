"""Probes: how well can a metadata column be predicted from features, against permutations of the column.

How it is computed. In every fold the features are transformed without looking at the target (standardised;
for the non-linear probe followed by functions of them), and one eigendecomposition of their Gram matrix then
serves the target and all of its permutations at once. With the transformed training features Z,
``ZᵀZ = V Λ Vᵀ`` and ``P = Z V``, ridge regression of the strength α fits ``ȳ + P (Λ + α)⁻¹ Pᵀ (Y − ȳ)``, and
what it predicts for rows it has not seen follows from its residuals r in closed form: where the rows b of one
subject are left out, they are wrong by ``(I − H_bb)⁻¹ r_b``. These left-out predictions choose between
representations and strengths for each target, and place the thresholds of classes.

Classes. Ridge regression on class indicators gives the direction of a regularised linear discriminant
(Hastie, Buja & Tibshirani 1995). Its thresholds for uniform priors need the class means of the scores; taken
from the training fit they are worthless where there are more features than rows (the fit is perfect there),
so they are taken from the left-out predictions. With class shares π and the left-out scores `s` of the class
indicators, ``R_kl = Σ_{i in l} s_ik / (n √(π_k π_l))`` estimates the between-class part of the total
covariance; the discriminant of the class k with the *within*-class covariance is

    δ_k(x) = [s(x) Π^-½ (I − R)⁻¹ Π^-½]_k − ½ [Π^-½ R (I − R)⁻¹ Π^-½]_kk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mdnorm.arrays import as_real_tensor
from mdnorm.extras import requires
from mdnorm.metrics.checks import check_confidence, check_integer, check_permutations, listed
from mdnorm.metrics.columns import Categories, as_categories, as_column
from mdnorm.metrics.rates import combined, effective_rows, mean_of_defined, ratio, wilson

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["ProbeResult", "ProbeScore", "probe"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Strengths of the ridge, relative to the mean eigenvalue: from almost a constant prediction to almost none,
# which a class that is coded in a component of a small variance needs.
_STRENGTHS = np.logspace(3, -8, 12)

# Only strengths that leave as many degrees of freedom, or half of the rows if those are fewer, are tried: the
# errors of a fit through nearly every row tell nothing about other rows.
_LEAST_FREEDOM = 20

# A weaker ridge is taken only where its left-out errors are smaller than those of a stronger one by more than
# this number of degrees of freedom explain: the smallest of several noisy errors is too small.
_CLEARLY = 10

# A column that varies less than this share of the largest absolute value is a constant up to rounding.
_LEAST_VARIATION = 1e-12

# Fewer rows say nothing about any target.
_MIN_ROWS = 10

# Whole numbers with at most this many distinct values are classes unless the caller says otherwise.
_MAX_NUMERIC_CLASSES = 10

# Values of all targets that are in memory at once, in one temporary.
_CHUNK_ELEMENTS = 2**23

# Widths of the kernels of the non-linear probe: γ times the number of columns.
_WIDTHS = (0.1, 1.0)

# Columns of the additive features of the non-linear probe, as long as that leaves two waves for each feature.
# Of more features than this the principal components are taken.
_MAX_ADDITIVE = 600
_MAX_WAVES = 6
_MAX_QUANTILES = 1000

# Eigenvalues below this share of the largest are rounding.
_LEAST_EIGENVALUE = 1e-12

# Least share of the variance that is within classes.
_MIN_WITHIN = 1e-6

# Fewer subjects than this are noted: so few can be exchanged in few ways only.
_FEW_GROUPS = 7


class _UnusableError(ValueError):
    """These rows cannot be probed; an error for all rows, a reason to leave out one label class."""


@dataclass(frozen=True)
class ProbeScore:
    """One score of a probe.

    Attributes
    ----------
    name : {"r2", "balanced_accuracy", "auc"}
        What is scored.
    value : float
        The score on rows that were not trained on; larger is better.
    chance : float
        The score of predictions that know nothing: 0, 1 / number of classes, or 0.5.
    fold_values : tuple of float
        The score in each fold, without folds where it is not defined.
    p_value : float or None
        Share of permuted targets that score as well, ``(1 + #) / (1 + num_permutations)``; None without
        permutations.
    permutation_mean, permutation_high : float or None
        Mean and 95 % quantile of the scores of the permuted targets.
    tail_p_value : float or None
        The p-value beyond what the permutations resolve, for many tests at once: where fewer than a tenth of
        them, of at least 100, are as good, from an exponential tail through the best tenth.
    low, high : float or None
        Interval of what this probe scores, fitted on as many rows; None for the AUC. Another probe may find
        more.
    """

    name: str
    value: float
    chance: float
    fold_values: tuple[float, ...] = ()
    p_value: float | None = None
    permutation_mean: float | None = None
    permutation_high: float | None = None
    tail_p_value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def fold_std(self) -> float:
        """Standard deviation over folds; 0 with fewer than two."""
        return float(np.std(self.fold_values, ddof=1)) if len(self.fold_values) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the score as values that JSON can hold."""
        return {
            "name": self.name,
            "value": self.value,
            "chance": self.chance,
            "fold_values": list(self.fold_values),
            "fold_std": self.fold_std,
            "p_value": self.p_value,
            "permutation_mean": self.permutation_mean,
            "permutation_high": self.permutation_high,
            "tail_p_value": self.tail_p_value,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found.

    Attributes
    ----------
    model : {"linear", "nonlinear"}
    task : {"classification", "regression"}
    scores : tuple of ProbeScore
        ``r2`` for regression; ``balanced_accuracy`` and ``auc`` for classes.
    num_rows, num_features, num_folds, num_permutations : int
    classes, class_counts : tuple
        The classes of the target and their rows; empty for regression.
    label : object
        The label class whose rows these are; None for all rows.
    within_labels : tuple of ProbeResult
        The probe within each label class, without those left out.
    pooled : tuple of ProbeScore
        Mean of each score over `within_labels`, weighted by rows, with a p-value of its own.
    left_out : tuple of (label, reason)
        Label classes that could not be probed.
    notes : tuple of str
        What was decided for the caller.
    """

    model: str
    task: str
    scores: tuple[ProbeScore, ...]
    num_rows: int
    num_features: int
    num_folds: int
    num_permutations: int
    classes: tuple[Any, ...] = ()
    class_counts: tuple[int, ...] = ()
    label: Any = None
    within_labels: tuple[ProbeResult, ...] = ()
    pooled: tuple[ProbeScore, ...] = ()
    left_out: tuple[tuple[Any, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def score_name(self) -> str:
        """Name of the first score."""
        return self.scores[0].name

    @property
    def score(self) -> float:
        """Value of the first score: R² or balanced accuracy."""
        return self.scores[0].value

    @property
    def chance(self) -> float:
        """Chance level of the first score."""
        return self.scores[0].chance

    @property
    def p_value(self) -> float | None:
        """Permutation p-value of the first score."""
        return self.scores[0].p_value

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve, the mean over classes against the rest; None for regression."""
        return next((score.value for score in self.scores if score.name == "auc"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold."""
        return {
            "model": self.model,
            "task": self.task,
            "label": self.label,
            "scores": [score.to_dict() for score in self.scores],
            "num_rows": self.num_rows,
            "num_features": self.num_features,
            "num_folds": self.num_folds,
            "num_permutations": self.num_permutations,
            "classes": list(self.classes),
            "class_counts": list(self.class_counts),
            "within_labels": [result.to_dict() for result in self.within_labels],
            "pooled": [score.to_dict() for score in self.pooled],
            "left_out": [{"label": label, "reason": reason} for label, reason in self.left_out],
            "notes": list(self.notes),
        }


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
        Label classes, for the question what the features know *beyond the label*: the target is also probed
        within each class, and permuted within classes only.
    groups : array-like, (n,), optional
        Subjects. Rows of one subject stay in one fold, and the permutations exchange whole subjects.
    num_folds : int
        At least 2. Reduced, with a note, where a class has fewer rows (or subjects).
    num_permutations : int
        At least 20, since the smallest p-value is ``1 / (1 + num_permutations)``; or 0 for no p-value.
    num_landmarks : int
        Rows that each kernel of the non-linear probe is approximated from; half the training rows at most.
    confidence : float
        Of the intervals of the scores, between 0 and 1.
    seed : int
        Of folds, permutations and landmarks: the same seed gives the same result.

    Returns
    -------
    ProbeResult
        R² for regression (1 − squared error / squared error of the mean of the training rows, over the rows
        of all folds: 0 for a probe that knows nothing, negative where it is worse than that). For classes the
        balanced accuracy over the rows of all folds, and the AUC, the mean over folds and over the classes
        against the rest. Constant features, up to rounding of the largest value, give chance and a p-value
        of 1.

    Raises
    ------
    TypeError
        An argument is of the wrong type, or not numeric where it has to be.
    ValueError
        A wrong shape, different numbers of rows, NaN, infinite or missing values, too few rows, a constant
        target, a target that is an identifier, a class with a single row or subject, unknown options.
    MissingExtraError
        scikit-learn is not installed.

    Notes
    -----
    Standardisation, landmarks, the strength of the ridge and the thresholds are fitted on the training rows
    of each fold. The strength is the strongest that is not clearly worse than the best by generalised
    cross-validation, with `groups` by leaving out one subject at a time; strengths that leave fewer than 20
    degrees of freedom are not tried.

    Balanced accuracy weighs classes equally, so thresholds are those for equal priors: a rare class does not
    leave the probe at chance.

    Intervals are of what this probe scores, fitted on as many rows: of R², a ratio of sums over rows or
    subjects, by its linearised variance, the upper limit at least that of the squared correlation of
    prediction and target; of balanced accuracy from Wilson's intervals of the classes (Zou & Donner 2008).
    Both are widened for the training rows that folds share (Nadeau & Bengio 2003).

    Permutations keep the folds, and permute within them, which makes the p-value exact also where folds are
    stratified by the target. With `groups`, each subject gets the values of another subject, repeated or cut
    to its number of rows; this is exact where subjects have equally many rows. With `labels`, the p-value of
    all rows asks whether features know more of the target than the label tells; `permutation_mean` shows what
    the label tells.

    The non-linear probe offers three representations of the standardised features, and takes for each target
    the one with the smallest left-out error: the features themselves; functions of single features (cosines
    of their ranks; of principal components where there are more than 600); and Nyström features (Williams &
    Seeger 2001) of Gaussian kernels of two widths beside the features. All end in the same ridge, so that
    permutations share one factorisation each a fold, where a network or boosted trees would have to be
    trained again for each. On 1000 rows of 10 features its balanced accuracy, beside that of a network with
    100 hidden units and of boosted trees (both of scikit-learn), was 0.90 (0.88, 0.90) for a quadratic
    function of one feature, 0.88 (0.53, 0.91) for a sine, 0.76 (0.86, 0.92) for an exclusive or of two
    features, 0.86 (0.85, 0.87) for a radius, and 0.82 (0.51, 0.52) for a class in a component of a small
    variance. An exclusive or of two features among 84 it does not find (0.51), boosted trees do (0.75): a
    large p-value does not show independence.

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
    _check_options(model, task, num_folds, num_landmarks, seed)
    check_permutations(num_permutations, none_is_allowed=True)
    check_confidence(confidence)
    rows = _as_features(features)
    column = as_column(target, "target")
    label_classes = None if labels is None else as_categories(labels, "labels")
    subjects = None if groups is None else as_categories(groups, "groups")
    for name, length in (
        ("target", column.size),
        ("labels", None if label_classes is None else label_classes.codes.size),
        ("groups", None if subjects is None else subjects.codes.size),
    ):
        if length is not None and length != rows.shape[0]:
            raise ValueError(
                f"features and {name} must have one row per sample each, got {rows.shape[0]} rows in "
                f"features and {length} in {name}: pass the same samples in the same order."
            )
    if rows.shape[0] < _MIN_ROWS:
        raise ValueError(
            f"features must have at least {_MIN_ROWS} rows, got {rows.shape[0]}: pool more samples."
        )
    notes: list[str] = []
    if task == "auto":
        task = _guessed_task(column, notes)
    classes: Categories | None = None
    if task == "classification":
        classes = as_categories(target, "target")
        values: Floats | Integers = classes.codes
    else:
        values = _as_numbers(column)

    settings = _Settings(model, num_folds, num_permutations, num_landmarks, confidence, seed)
    codes = None if label_classes is None else label_classes.codes
    subject_codes = None if subjects is None else subjects.codes
    overall = _probe_rows(rows, values, classes, codes, subject_codes, settings, notes)
    within: list[_Outcome] = []
    results: list[ProbeResult] = []
    left_out: list[tuple[Any, str]] = []
    if label_classes is not None:
        for code, label in enumerate(label_classes.names):
            chosen = label_classes.codes == code
            class_notes: list[str] = []
            try:
                outcome = _probe_rows(
                    rows[chosen],
                    values[chosen],
                    classes,
                    None,
                    None if subject_codes is None else subject_codes[chosen],
                    settings,
                    class_notes,
                )
            except _UnusableError as error:
                left_out.append((label, str(error)))
                continue
            within.append(outcome)
            results.append(outcome.result(settings, classes, rows.shape[1], label, class_notes))
    return overall.result(
        settings,
        classes,
        rows.shape[1],
        None,
        notes,
        within_labels=tuple(results),
        pooled=_pooled(within),
        left_out=tuple(left_out),
    )


# --------------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    model: str
    num_folds: int
    num_permutations: int
    num_landmarks: int
    confidence: float
    seed: int


def _check_options(model: str, task: str, num_folds: int, num_landmarks: int, seed: int) -> None:
    if model not in ("linear", "nonlinear"):
        raise ValueError(f"model must be 'linear' or 'nonlinear', got {model!r}.")
    if task not in ("auto", "classification", "regression"):
        raise ValueError(f"task must be 'auto', 'classification' or 'regression', got {task!r}.")
    for name, value, least in (
        ("num_folds", num_folds, 2),
        ("num_landmarks", num_landmarks, 1),
        ("seed", seed, 0),
    ):
        check_integer(name, value, least)


def _as_features(features: Tensor | ArrayLike) -> Floats:
    rows = as_real_tensor(features, "features").detach().cpu().double().numpy()
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(
            f"features must have shape (n,) or (n, number of columns), got {rows.shape}: give each sample "
            "one row, for example features.reshape(n, -1)."
        )
    bad = (~np.isfinite(rows).all(axis=1)).nonzero()[0].tolist()
    if bad:
        raise ValueError(
            f"features has NaN or infinite values in row(s) {listed(bad)} ({len(bad)} of {rows.shape[0]} "
            "rows): drop these rows from every argument, or impute them."
        )
    if rows.shape[0] == 0:
        return rows
    # What is left of a column that was subtracted from itself is rounding, which a probe could read.
    rounding = np.ptp(rows, axis=0) <= _LEAST_VARIATION * np.abs(rows).max()
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


# --------------------------------------------------------------------------------------------------------
# Folds and permutations
# --------------------------------------------------------------------------------------------------------


def _check_classes(codes: Integers, classes: Categories, subjects: Integers | None) -> int:
    """Return the number of rows, or subjects, of the smallest class; two are the least that can be probed."""
    counts = np.bincount(codes, minlength=len(classes.names))
    present = counts.nonzero()[0]
    if present.size < 2:
        raise _UnusableError(
            f"target is constant: all of its {codes.size} rows are {classes.names[present[0]]!r}, there is "
            "nothing to predict."
        )
    if present.size == codes.size:
        raise _UnusableError(
            f"target has a different value in each of its {codes.size} rows, such as "
            f"{listed([classes.names[code] for code in present], 2)}: an identifier cannot be predicted; if "
            "it is a number, pass task='regression'."
        )
    unit = "row"
    if subjects is not None:
        unit = "subject"
        pairs = np.unique(np.column_stack([codes, subjects]), axis=0)
        counts = np.bincount(pairs[:, 0], minlength=len(classes.names))
    single = [classes.names[code] for code in present if counts[code] < 2]
    if single:
        raise _UnusableError(
            f"target has {len(single)} class(es) with one {unit} only: {listed(single)}. Merge them with "
            "others or drop their rows; a class must be in two folds at least."
        )
    return int(counts[present].min())


def _folds(
    values: Floats | Integers,
    classes: Categories | None,
    labels: Integers | None,
    subjects: Integers | None,
    settings: _Settings,
    notes: list[str],
) -> Integers:
    """Return the fold of each row, (n,): stratified by classes and labels, each subject in one fold."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    num_rows = values.size
    most = num_rows // 2
    strata = np.zeros(num_rows, dtype=np.int64)
    if classes is None:
        if np.ptp(values) == 0:
            raise _UnusableError(
                f"target is constant: all of its {num_rows} rows are equal, there is nothing to predict."
            )
    else:
        strata = values.astype(np.int64)
        most = min(most, _check_classes(strata, classes, subjects))
    if subjects is not None:
        num_subjects = np.unique(subjects).size
        if num_subjects < 2:
            raise _UnusableError("groups has one subject only: rows of one subject cannot be in two folds.")
        most = min(most, num_subjects)
        if num_subjects < _FEW_GROUPS:
            notes.append(
                f"groups has {num_subjects} subjects only, which can be exchanged in few ways: the p-value "
                "cannot become small."
            )
    num_folds = min(settings.num_folds, most)
    if num_folds < settings.num_folds:
        what = "subjects" if subjects is not None else "rows"
        notes.append(f"{num_folds} folds instead of {settings.num_folds}: the smallest class has few {what}.")
    if labels is not None:
        both = np.unique(np.column_stack([strata, labels]), axis=0, return_inverse=True)[1].reshape(-1)
        # Where a combination is too rare to be in every fold, the classes of the target come first.
        if classes is None or np.bincount(both).min() >= num_folds:
            strata = both.astype(np.int64)
    if np.bincount(strata)[np.unique(strata)].min() < num_folds and classes is None:
        strata = np.zeros(num_rows, dtype=np.int64)
    if subjects is None:
        splits = StratifiedKFold(num_folds, shuffle=True, random_state=settings.seed).split(strata, strata)
        return _fold_codes(splits, num_rows)
    for folds in range(num_folds, 1, -1):
        for attempt in range(10):
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=settings.seed + attempt)
            fold = _fold_codes(splitter.split(strata, strata, subjects), num_rows)
            if _is_complete(fold, folds, values if classes is not None else None):
                if folds < num_folds:
                    notes.append(f"{folds} folds instead of {num_folds}: subjects could not be divided so.")
                return fold
    raise _UnusableError(
        "groups cannot be divided into two folds that both have every class of the target: merge rare "
        "classes."
    )


def _fold_codes(splits: Iterator[tuple[Integers, Integers]], num_rows: int) -> Integers:
    fold = np.full(num_rows, -1, dtype=np.int64)
    for index, (_, test) in enumerate(splits):
        fold[test] = index
    return fold


def _is_complete(fold: Integers, num_folds: int, codes: NDArray[Any] | None) -> bool:
    """Tell whether every fold has rows, and its training rows all classes."""
    if np.bincount(fold, minlength=num_folds).min() == 0:
        return False
    if codes is None:
        return True
    num_classes = np.unique(codes).size
    return all(np.unique(codes[fold != index]).size == num_classes for index in range(num_folds))


def _permutations(
    fold: Integers, labels: Integers | None, subjects: Integers | None, settings: _Settings
) -> Integers:
    """Return row numbers (n, 1 + num_permutations) whose first column is the order itself."""
    rng = np.random.default_rng(settings.seed)
    num_rows, num = fold.size, settings.num_permutations
    orders = np.repeat(np.arange(num_rows)[:, None], 1 + num, axis=1)
    strata = np.zeros_like(fold) if labels is None else labels
    if subjects is None:
        strata = strata * (fold.max() + 1) + fold
    for stratum in np.unique(strata):
        rows = (strata == stratum).nonzero()[0]
        if subjects is None:
            orders[rows, 1:] = rng.permuted(np.tile(rows, (num, 1)), axis=1).T
            continue
        _, blocks, sizes = np.unique(subjects[rows], return_inverse=True, return_counts=True)
        order = np.argsort(blocks, kind="stable")
        starts = np.cumsum(sizes) - sizes
        blocks = blocks.reshape(-1)[order]
        position = np.arange(rows.size) - starts[blocks]
        for index in range(1, 1 + num):
            donor = rng.permutation(sizes.size)[blocks]
            orders[rows[order], index] = rows[order[starts[donor] + position % sizes[donor]]]
    return orders


# --------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------


def _representations(train: Floats, test: Floats, settings: _Settings) -> Iterator[tuple[Floats, Floats]]:
    """Yield transformed training and test features: the standardised ones, and those that are not linear."""
    from sklearn.preprocessing import StandardScaler

    # Columns are at most 1 in absolute value: what varies less than this in training is a constant.
    varying = np.ptp(train, axis=0) > _LEAST_VARIATION
    if not varying.any():
        yield np.zeros((train.shape[0], 1)), np.zeros((test.shape[0], 1))
        return
    if not varying.all():
        # Standardised, a constant would be a rounding error that can be fitted.
        train, test = train[:, varying], test[:, varying]
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    yield train, test
    if settings.model == "linear":
        return
    for expand in (_additive, _kernels):
        yield expand(train, test, settings)


def _additive(train: Floats, test: Floats, settings: _Settings) -> tuple[Floats, Floats]:
    """Functions of single columns: cosines of the ranks, monotone, U-shaped and so on."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import QuantileTransformer

    if train.shape[1] > _MAX_ADDITIVE:
        num_axes = min(_MAX_ADDITIVE // 2, train.shape[0] - 1)
        axes = PCA(num_axes, random_state=settings.seed).fit(train)
        train, test = axes.transform(train), axes.transform(test)

    num_quantiles = min(_MAX_QUANTILES, train.shape[0])
    ranks = QuantileTransformer(n_quantiles=num_quantiles, subsample=None).fit(train)
    num_waves = int(np.clip(_MAX_ADDITIVE // train.shape[1], 2, _MAX_WAVES))
    waves = np.pi * np.arange(1, num_waves + 1)

    def expanded(rows: Floats) -> Floats:
        out: Floats = np.cos(ranks.transform(rows)[:, :, None] * waves).reshape(rows.shape[0], -1)
        return out

    return _centred(expanded(train), expanded(test))


def _kernels(train: Floats, test: Floats, settings: _Settings) -> tuple[Floats, Floats]:
    """Nyström features of Gaussian kernels of two widths, beside the columns."""
    from sklearn.kernel_approximation import Nystroem

    num_columns = train.shape[1]
    trains, tests = [train / np.sqrt(num_columns)], [test / np.sqrt(num_columns)]
    num_landmarks = max(1, min(settings.num_landmarks, train.shape[0] // 2))
    for width in _WIDTHS:
        kernel = Nystroem(
            kernel="rbf", gamma=width / num_columns, n_components=num_landmarks, random_state=settings.seed
        ).fit(train)
        block, other = _centred(kernel.transform(train), kernel.transform(test))
        size = np.sqrt(np.square(block).sum() / train.shape[0])
        trains.append(block / size)
        tests.append(other / size)
    return np.hstack(trains), np.hstack(tests)


def _centred(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    mean = train.mean(axis=0)
    return train - mean, test - mean


# --------------------------------------------------------------------------------------------------------
# Ridge regression for many targets
# --------------------------------------------------------------------------------------------------------


class _LeftOut:
    """Residuals of rows that the fit has not seen, one row or one subject at a time, intercept included."""

    def __init__(self, components: Floats, subjects: Integers | None) -> None:
        num_rows = components.shape[0]
        # The intercept is one more component, of the weight 1.
        self.components = np.column_stack([components, np.full(num_rows, 1 / np.sqrt(num_rows))])
        self.blocks: list[Integers] = []
        if subjects is None:
            self.squares = np.square(self.components)
            return
        order = np.argsort(subjects, kind="stable")
        _, sizes = np.unique(subjects, return_counts=True)
        members = np.split(order, np.cumsum(sizes)[:-1])
        for size in np.unique(sizes):
            self.blocks.append(np.stack([rows for rows in members if rows.size == size]))

    def residuals(self, residuals: Floats, weights: Floats) -> Floats:
        """Return the left-out residuals (n, T) of a fit with ``H = P diag(weights) Pᵀ``."""
        weights = np.append(weights, 1.0)
        if not self.blocks:
            single: Floats = residuals / (1 - self.squares @ weights)[:, None]
            return single
        out = np.empty_like(residuals)
        for rows in self.blocks:
            num_blocks, size = rows.shape
            step = max(1, _CHUNK_ELEMENTS // (size * max(weights.size, residuals.shape[1])))
            for start in range(0, num_blocks, step):
                chosen = rows[start : start + step]
                part, right = self.components[chosen], residuals[chosen]
                if size <= weights.size:
                    hat = np.einsum("gik,k,gjk->gij", part, weights, part, optimize=True)
                    out[chosen] = np.linalg.solve(np.eye(size) - hat, right)
                else:
                    # The same by Woodbury's identity, in the size of the components.
                    inner = np.diag(1 / weights) - np.swapaxes(part, 1, 2) @ part
                    out[chosen] = right + part @ np.linalg.solve(inner, np.swapaxes(part, 1, 2) @ right)
        return out

    def means(self, targets: Floats) -> Floats:
        """Return the mean of the targets (n, T) over the rows that are trained on when a row is left out."""
        num_rows = targets.shape[0]
        total = targets.sum(axis=0)
        if not self.blocks:
            single: Floats = (total - targets) / (num_rows - 1)
            return single
        out = np.empty_like(targets)
        for rows in self.blocks:
            sums = targets[rows].sum(axis=1, keepdims=True)
            out[rows] = (total - sums) / (num_rows - rows.shape[1])
        return out


class _Basis:
    """``P = Z V`` of the transformed features of training and test rows, and ridge regressions on it."""

    def __init__(self, train: Floats, test: Floats, subjects: Integers | None) -> None:
        from scipy.linalg import eigh

        narrow = train.shape[1] <= train.shape[0]
        eigenvalues, vectors = eigh(train.T @ train if narrow else train @ train.T)
        kept = eigenvalues > _LEAST_EIGENVALUE * eigenvalues[-1]
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        if narrow:
            self.train, self.test = train @ vectors, test @ vectors
        else:
            roots = np.sqrt(eigenvalues)
            self.train, self.test = vectors * roots, (test @ train.T) @ vectors / roots
        self.eigenvalues: Floats = eigenvalues
        mean_eigenvalue = float(self.eigenvalues.sum() / train.shape[1])
        weights = 1 / (self.eigenvalues + _STRENGTHS[:, None] * (mean_eigenvalue or 1.0))
        freedom = train.shape[0] - 1 - weights @ self.eigenvalues
        usable = freedom >= min(_LEAST_FREEDOM, train.shape[0] / 2)
        usable[0] = True
        # Of each strength, the strongest first.
        self.weights: Floats = weights[usable]
        self.freedom: Floats = freedom[usable]
        # A smaller share of the error than this is clearly less.
        self.clearly = 1 - min(0.5, _CLEARLY / train.shape[0])
        self.grouped = subjects is not None
        self.left_out = _LeftOut(self.train, subjects)

    def fit(self, targets: Floats) -> tuple[Floats, Floats, Floats]:
        """Fit ridge regressions, and choose their strength by left-out residuals.

        Parameters
        ----------
        targets : (n, T, C)
            T targets of C columns each; the columns of one target share their strength.

        Returns
        -------
        errors : (T,)
            Sums of squared left-out residuals.
        predicted : (rows to test, T, C)
            Less the mean of the training rows.
        agreement : (T, C + 1, C + 1)
            ``Σ_i s_ik y_il`` with the left-out score s, of which the left-out mean is taken away. The last
            class is what the others leave of 1.
        """
        num_rows, num_targets, width = targets.shape
        flat = targets.reshape(num_rows, -1)
        centred = flat - flat.mean(axis=0)
        products = self.train.T @ centred
        left_out_targets = flat - self.left_out.means(flat)
        best = np.full(num_targets, np.inf)
        coefficients = np.zeros((self.train.shape[1], num_targets, width))
        agreement = np.zeros((num_targets, width + 1, width + 1))
        # One subject left out at a time has to be tried for every strength; for single rows, generalised
        # cross-validation tells the best one from the products alone.
        chosen = None if self.grouped else self._generalised(centred, products, width)
        for index, weights in enumerate(self.weights):
            tried = np.arange(num_targets) if chosen is None else (chosen == index).nonzero()[0]
            if tried.size == 0:
                continue
            columns = (tried[:, None] * width + np.arange(width)).reshape(-1)
            fitted = weights[:, None] * products[:, columns]
            residuals = self.left_out.residuals(centred[:, columns] - self.train @ fitted, weights)
            shape = (num_rows, tried.size, width)
            errors = _squared_sums(residuals.reshape(shape))
            better = (errors < self.clearly * best[tried]).nonzero()[0]
            best[tried[better]] = errors[better]
            coefficients[:, tried[better]] = fitted.reshape(-1, tried.size, width)[:, better]
            scores = (left_out_targets[:, columns] - residuals).reshape(shape)
            agreement[tried[better]] = _agreement(scores[:, better], targets[:, tried[better]])
        predicted = self.test @ coefficients.reshape(-1, num_targets * width)
        return best, predicted.reshape(-1, num_targets, width), agreement

    def _generalised(self, centred: Floats, products: Floats, width: int) -> Integers:
        """Return the position (T,) of the strongest ridge of nearly the best generalised cross-validation."""
        num_rows, rank = centred.shape[0], self.eigenvalues.size
        # Sums over the columns of one target: of its squares, and of those of its part along each component.
        total = _squared_sums(centred.reshape(num_rows, -1, width), axis=(0, 2))
        lengths = _squared_sums(products.reshape(rank, total.size, width), axis=2)
        lengths /= self.eigenvalues[:, None]
        # Components that span everything leave nothing outside but rounding.
        outside = np.maximum(total - lengths.sum(axis=0), 0) if rank < num_rows - 1 else np.zeros_like(total)
        errors = outside + np.square(1 - self.weights * self.eigenvalues) @ lengths
        errors /= np.square(self.freedom)[:, None]
        best: Integers = (self.clearly * errors <= errors.min(axis=0)).argmax(axis=0)
        return best


class _Choice:
    """For each target the representation with the smallest left-out error."""

    def __init__(self, num_test: int, num_targets: int, width: int) -> None:
        self.errors = np.full(num_targets, np.inf)
        self.predicted = np.zeros((num_test, num_targets, width))
        self.agreement = np.zeros((num_targets, width + 1, width + 1))

    def add(self, columns: slice, errors: Floats, predicted: Floats, agreement: Floats) -> None:
        better = (errors < self.errors[columns]).nonzero()[0]
        chosen = better + columns.start
        self.errors[chosen] = errors[better]
        self.predicted[:, chosen] = predicted[:, better]
        self.agreement[chosen] = agreement[better]


def _agreement(scores: Floats, targets: Floats) -> Floats:
    """Return ``Σ_i s_ik y_il`` (T, C + 1, C + 1) of scores and targets (n, T, C)."""
    inner = np.einsum("itk,itl->tkl", scores, targets, optimize=True)
    rows = np.concatenate([inner, scores.sum(axis=0)[:, :, None] - inner.sum(axis=2, keepdims=True)], axis=2)
    return np.concatenate([rows, -rows.sum(axis=1, keepdims=True)], axis=1)


def _squared_sums(columns: Floats, axis: int | tuple[int, int] = (0, 2)) -> Floats:
    """Return sums of squares of (n, T, C), those of the last class (what the others leave) included."""
    sums: Floats = np.square(columns).sum(axis=axis)
    if columns.shape[2] > 1:
        last = np.square(columns.sum(axis=2))
        sums += last if axis == 2 else last.sum(axis=0)
    return sums


# --------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """Scores of the target (first) and its permutations: name -> (1 + N,) and name -> (folds,)."""

    values: dict[str, Floats]
    fold_values: dict[str, Floats]
    chance: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    counts: Integers
    num_rows: int
    num_folds: int

    def result(
        self,
        settings: _Settings,
        classes: Categories | None,
        num_features: int,
        label: Any,
        notes: list[str],
        **within: Any,
    ) -> ProbeResult:
        scores = tuple(
            _score(name, values, self.chance[name], self.fold_values[name], self.intervals.get(name))
            for name, values in self.values.items()
        )
        present = self.counts.nonzero()[0].tolist()
        return ProbeResult(
            model=settings.model,
            task="regression" if classes is None else "classification",
            scores=scores,
            num_rows=self.num_rows,
            num_features=num_features,
            num_folds=self.num_folds,
            num_permutations=int(settings.num_permutations),
            classes=() if classes is None else tuple(classes.names[code] for code in present),
            class_counts=() if classes is None else tuple(int(self.counts[code]) for code in present),
            label=label,
            notes=tuple(notes),
            **within,
        )


def _score(
    name: str, values: Floats, chance: float, fold_values: Floats, interval: tuple[float, float] | None
) -> ProbeScore:
    low, high = interval or (None, None)
    folds = tuple(float(value) for value in fold_values if np.isfinite(value))
    observed, permuted = float(values[0]), values[1:]
    if permuted.size == 0:
        return ProbeScore(name, observed, chance, folds, low=low, high=high)
    # Up to rounding: a permutation that changes nothing has to count.
    as_good = int((permuted >= observed - 1e-12 * max(1.0, abs(observed))).sum())
    p_value = (1 + as_good) / (1 + permuted.size)
    return ProbeScore(
        name,
        observed,
        chance,
        folds,
        p_value=p_value,
        tail_p_value=_tail_p_value(observed, permuted, p_value),
        permutation_mean=float(permuted.mean()),
        permutation_high=float(np.quantile(permuted, 0.95)),
        low=low,
        high=high,
    )


def _tail_p_value(observed: float, permuted: Floats, p_value: float) -> float:
    """Return the p-value from an exponential tail through the best tenth of the permuted scores.

    References
    ----------
    .. [1] Knijnenburg, T. A., Wessels, L. F. A., Reinders, M. J. T., & Shmulevich, I. (2009). Fewer
       permutations, more accurate P-values. Bioinformatics, 25(12), i161–i168.
    """
    number = permuted.size // 10
    # Few different scores are few ways to permute, and have no tail.
    if number < 10 or np.unique(permuted).size < permuted.size // 2:
        return p_value
    best = np.sort(permuted)[-number - 1 :]
    excess = float((best[1:] - best[0]).mean())
    if observed <= best[0] or excess <= 0:
        return p_value
    return float(number / permuted.size * np.exp(-(observed - best[0]) / excess))


def _pooled(outcomes: list[_Outcome]) -> tuple[ProbeScore, ...]:
    if not outcomes:
        return ()
    weights = np.array([outcome.num_rows for outcome in outcomes], dtype=np.float64)
    weights /= weights.sum()

    def mean(values: list[Any]) -> Any:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    return tuple(
        _score(
            name,
            mean([outcome.values[name] for outcome in outcomes]),
            float(mean([outcome.chance[name] for outcome in outcomes])),
            np.empty(0),
            # Label classes are independent samples.
            combined(
                weights,
                [float(outcome.values[name][0]) for outcome in outcomes],
                [outcome.intervals[name] for outcome in outcomes],
            )
            if name in outcomes[0].intervals
            else None,
        )
        for name in outcomes[0].values
    )


def _probe_rows(
    rows: Floats,
    values: Floats | Integers,
    classes: Categories | None,
    labels: Integers | None,
    subjects: Integers | None,
    settings: _Settings,
    notes: list[str],
) -> _Outcome:
    """Probe these rows: all of them, or those of one label class."""
    num_rows = rows.shape[0]
    if num_rows < _MIN_ROWS:
        raise _UnusableError(f"it has {num_rows} rows, {_MIN_ROWS} are needed.")
    fold = _folds(values, classes, labels, subjects, settings, notes)
    num_folds = int(fold.max()) + 1
    orders = _permutations(fold, labels, subjects, settings)
    counts = np.zeros(0, dtype=np.int64)
    present = np.zeros(0, dtype=np.int64)
    if classes is not None:
        counts = np.bincount(values.astype(np.int64), minlength=len(classes.names))
        present, codes = np.unique(values, return_inverse=True)
        values = codes.reshape(-1)
    scorer: _RegressionScores | _ClassScores = (
        _RegressionScores(num_folds, orders.shape[1])
        if classes is None
        else _ClassScores(num_folds, orders.shape[1], present.size)
    )
    width = max(1, present.size - 1)
    step = max(1, _CHUNK_ELEMENTS // (num_rows * width))
    chunks = [slice(start, start + step) for start in range(0, orders.shape[1], step)]

    def coded(columns: slice) -> Floats:
        targets = values[orders[:, columns]][:, :, None]
        # The indicator of the last class is what the others leave of 1.
        return (targets if classes is None else targets == np.arange(width)).astype(np.float64)

    for index in range(num_folds):
        train, test = (fold != index).nonzero()[0], (fold == index).nonzero()[0]
        choice = _Choice(test.size, orders.shape[1], width)
        for z_train, z_test in _representations(rows[train], rows[test], settings):
            basis = _Basis(z_train, z_test, None if subjects is None else subjects[train])
            for columns in chunks:
                choice.add(columns, *basis.fit(coded(columns)[train]))
        for columns in chunks:
            targets = values[orders[:, columns]]
            scorer.add(index, columns, choice, coded(columns)[train], targets[train], targets[test])
    # Of the target itself, the rows are in the order of their folds.
    owners = (
        np.argsort(fold, kind="stable") if subjects is None else subjects[np.argsort(fold, kind="stable")]
    )
    # The folds share training rows, so that their scores vary together (Nadeau & Bengio 2003).
    interval = scorer.interval(owners, settings.confidence, 1 + num_folds / (num_folds - 1))
    return _Outcome(*scorer.result(), interval, counts, num_rows, num_folds)


class _RegressionScores:
    """Collects R² over folds."""

    def __init__(self, num_folds: int, num_targets: int) -> None:
        self.errors = np.zeros((num_folds, num_targets))
        self.totals = np.zeros((num_folds, num_targets))
        self.observed: list[Floats] = []

    def add(
        self,
        fold: int,
        columns: slice,
        choice: _Choice,
        coded: Floats,
        train: NDArray[Any],
        test: NDArray[Any],
    ) -> None:
        centred = test - train.mean(axis=0)
        self.errors[fold, columns] = np.square(centred - choice.predicted[:, columns, 0]).sum(axis=0)
        self.totals[fold, columns] = np.square(centred).sum(axis=0)
        if columns.start == 0:
            self.observed.append(np.column_stack([centred[:, 0], choice.predicted[:, 0, 0]]))

    def interval(
        self, owners: Integers, confidence: float, inflation: float
    ) -> dict[str, tuple[float, float]]:
        """Return the interval of ``1 − Σ errors / Σ totals``, a ratio of sums over independent owners.

        A probe that finds nothing predicts the mean, and is sure to be no better. So that it does not seem
        sure that there is nothing, the upper limit is at least the square of that of the correlation between
        prediction and target (Fisher's interval), which does not depend on how far a prediction is shrunken.
        """
        from scipy.special import ndtri, stdtrit

        target, predicted = np.concatenate(self.observed).T
        errors, totals = np.square(target - predicted), np.square(target)
        share = errors.sum() / totals.sum()
        codes = np.unique(owners, return_inverse=True)[1].reshape(-1)
        sums = np.bincount(codes, errors - share * totals)
        spread = np.sqrt(inflation * np.square(sums).sum() * sums.size / (sums.size - 1)) / totals.sum()
        high = 1 - share + stdtrit(sums.size - 1, (1 + confidence) / 2) * spread
        low = 2 * (1 - share) - high
        # Folds differ in their means, which is no correlation.
        target, predicted = np.concatenate([part - part.mean(axis=0) for part in self.observed]).T
        length = np.sqrt(np.square(predicted).sum() * np.square(target).sum())
        correlation = np.clip(predicted @ target / length, 0, 1 - 1e-12) if length > 0 else 0.0
        largest = np.arctanh(correlation) + ndtri((1 + confidence) / 2) / np.sqrt(
            max(1, sums.size / inflation - 3)
        )
        return {"r2": (float(low), min(1.0, float(max(high, np.tanh(largest) ** 2))))}

    def result(self) -> tuple[dict[str, Floats], dict[str, Floats], dict[str, float]]:
        values = 1 - self.errors.sum(axis=0) / self.totals.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            folds = 1 - self.errors[:, 0] / self.totals[:, 0]
        return {"r2": values}, {"r2": folds}, {"r2": 0.0}


class _ClassScores:
    """Collects balanced accuracy and AUC over folds."""

    def __init__(self, num_folds: int, num_targets: int, num_classes: int) -> None:
        self.num_classes = num_classes
        self.rows = np.zeros((num_folds, num_targets, num_classes))
        self.hits = np.zeros((num_folds, num_targets, num_classes))
        self.areas = np.full((num_folds, num_targets, num_classes), np.nan)
        self.observed: list[Integers] = []

    def add(
        self,
        fold: int,
        columns: slice,
        choice: _Choice,
        coded: Floats,
        train: NDArray[Any],
        test: NDArray[Any],
    ) -> None:
        from scipy.stats import rankdata

        num_test = test.shape[0]
        predicted = choice.predicted[:, columns]
        scores = np.concatenate([predicted, -predicted.sum(axis=2, keepdims=True)], axis=2)
        decided = _decisions(scores, coded, choice.agreement[columns])
        if columns.start == 0:
            self.observed.append(np.column_stack([test[:, 0], decided[:, 0]]))
        for code in range(self.num_classes):
            inside = test == code
            count = inside.sum(axis=0).astype(np.float64)
            self.rows[fold, columns, code] = count
            self.hits[fold, columns, code] = (inside & (decided == code)).sum(axis=0)
            if code == 1 and self.num_classes == 2:
                self.areas[fold, columns, 1] = self.areas[fold, columns, 0]
                continue
            ranks = rankdata(scores[:, :, code], axis=0)
            pairs = count * (num_test - count)
            above = (ranks * inside).sum(axis=0) - count * (count + 1) / 2
            self.areas[fold, columns, code] = np.divide(
                above, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0
            )

    def interval(
        self, owners: Integers, confidence: float, inflation: float
    ) -> dict[str, tuple[float, float]]:
        """Return the interval of the mean of the recalls, each a share of the rows of a class."""
        true, decided = np.concatenate(self.observed).T
        recalls, limits = [], []
        for code in range(self.num_classes):
            hits = decided[true == code] == code
            recalls.append(float(hits.mean()))
            size = effective_rows(hits, owners[true == code]) / inflation
            limits.append(wilson(recalls[-1], size, confidence))
        mean = np.full(self.num_classes, 1 / self.num_classes)
        return {"balanced_accuracy": combined(mean, recalls, limits)}

    def result(self) -> tuple[dict[str, Floats], dict[str, Floats], dict[str, float]]:
        recall = ratio(self.hits.sum(axis=0), self.rows.sum(axis=0))
        accuracy = mean_of_defined(recall, axis=1)
        fold_accuracy = mean_of_defined(ratio(self.hits[:, 0], self.rows[:, 0]), axis=1)
        # Scores of different folds have different offsets, so ranks are not compared across folds.
        fold_area = mean_of_defined(mean_of_defined(np.moveaxis(self.areas, 0, 2), axis=2), axis=1)
        fold_areas = mean_of_defined(self.areas[:, 0], axis=1)
        return (
            {"balanced_accuracy": accuracy, "auc": np.where(np.isfinite(fold_area), fold_area, 0.5)},
            {"balanced_accuracy": fold_accuracy, "auc": fold_areas},
            {"balanced_accuracy": 1 / self.num_classes, "auc": 0.5},
        )


def _decisions(scores: Floats, coded: Floats, agreement: Floats) -> Integers:
    """Return the class (n, T) of scores (n, T, C) by the discriminant of the module's docstring."""
    num_rows = coded.shape[0]
    first = coded.mean(axis=0)
    shares = np.concatenate([first, 1 - first.sum(axis=1, keepdims=True)], axis=1)
    # A permutation that exchanges subjects may leave a fold without a class.
    absent = shares < 0.5 / num_rows
    roots = 1 / np.sqrt(np.where(absent, np.inf, shares))
    between = agreement / num_rows * roots[:, :, None] * roots[:, None, :]
    eigenvalues, vectors = np.linalg.eigh((between + np.swapaxes(between, 1, 2)) / 2)
    # Left-out estimates of a share of the variance: no signal may give less than 0, a perfect one 1.
    eigenvalues = np.clip(eigenvalues, 0, 1 - _MIN_WITHIN)
    vectors = roots[:, :, None] * vectors
    scaled = vectors / (1 - eigenvalues)[:, None, :]
    offsets = 0.5 * np.einsum("tkm,tkm->tk", scaled * eigenvalues[:, None, :], vectors)
    discriminants = np.einsum("itk,tkl->itl", scores, scaled @ np.swapaxes(vectors, 1, 2), optimize=True)
    discriminants = np.where(absent, -np.inf, discriminants - offsets)
    decided: Integers = discriminants.argmax(axis=2)
    return decided
