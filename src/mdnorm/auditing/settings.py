"""How an audit measures, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from mdnorm.auditing.reading import InputError, as_input_error
from mdnorm.metrics.checks import check_confidence, check_integer, check_permutations

# Fewer rows, of all or of a label class, say nothing.
MIN_ROWS = 20


@dataclass(frozen=True)
class Settings:
    """How an audit measures, and the limits above which a finding counts as harm.

    Attributes
    ----------
    num_permutations : int
        Permutations of each probe's test, at least 20.
    num_bootstrap : int
        Resamples for the intervals of calibration errors; 0 for no such intervals.
    confidence : float
        Confidence level of every interval, between 0 and 1.
    num_folds, seed : int
        Folds of the cross-validation of probes, at least 2; seed of everything that is random.
    standardize : bool
        Whether features are divided by their standard deviations, so that units do not matter.
    min_group_rows : int
        Groups with fewer rows are not compared with others.
    alpha : float
        Family-wise error rate: probability of finding any column where features know none (Holm's method).
    max_probe, max_dcor2, max_gap : float
        A probe whose score is further than this from chance (0) to perfect (1) is harm; so is a larger dcor²,
        and a larger difference of a rate between two groups.

    Raises
    ------
    InputError
        A setting is of another type, or out of its range.
    """

    num_permutations: int = 200
    num_bootstrap: int = 300
    confidence: float = 0.95
    num_folds: int = 5
    seed: int = 0
    standardize: bool = True
    min_group_rows: int = 20
    alpha: float = 0.05
    max_probe: float = 0.2
    max_dcor2: float = 0.05
    max_gap: float = 0.1

    def __post_init__(self) -> None:
        with as_input_error():
            check_permutations(self.num_permutations)
            for name, low in {"num_bootstrap": 0, "num_folds": 2, "seed": 0, "min_group_rows": 1}.items():
                check_integer(name, getattr(self, name), low)
            check_confidence(self.confidence)
        for name in ("alpha", "max_probe", "max_dcor2", "max_gap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise InputError(f"{name} must be a number between 0 and 1, got {value!r}.")
