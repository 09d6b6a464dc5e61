"""Where the coefficients come from: one strategy a file, all behind ``MetadataNorm(estimator=…)``."""

from typing import Any

from mdnorm.estimators.base import Estimator
from mdnorm.estimators.batch import BatchEstimator
from mdnorm.estimators.dataset import DatasetEstimator
from mdnorm.estimators.log_variance import LogVarianceEstimator
from mdnorm.estimators.penalty import PenaltyEstimator
from mdnorm.estimators.recursive import RecursiveEstimator
from mdnorm.estimators.running import RunningEstimator

__all__ = [
    "ESTIMATORS",
    "BatchEstimator",
    "DatasetEstimator",
    "Estimator",
    "LogVarianceEstimator",
    "PenaltyEstimator",
    "RecursiveEstimator",
    "RunningEstimator",
    "make_estimator",
]

ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator
    for estimator in (
        BatchEstimator,
        DatasetEstimator,
        RunningEstimator,
        RecursiveEstimator,
        PenaltyEstimator,
    )
}


_DEFAULTS: dict[str, Any] = {"momentum": "auto", "window": None, "ridge": 0.0, "center": False}


def make_estimator(estimator: str | Estimator, **settings: Any) -> Estimator:
    """Return a new estimator by name, or the given one as it is.

    Parameters
    ----------
    estimator : str or Estimator
        A key of `ESTIMATORS`, or an instance (a subclass of your own, say), which brings its own settings.
    **settings
        Arguments of `Estimator`, for an estimator made by name. `device` and `dtype` go for an instance, too:
        it is moved there.

    Raises
    ------
    ValueError
        The name is unknown, the instance already serves another layer, or it comes with settings.
    TypeError
        Neither a name nor an instance.
    """
    if isinstance(estimator, Estimator):
        if estimator.knows_design or estimator.is_claimed:
            raise ValueError(
                f"this {type(estimator).__name__} already serves a layer: "
                "each layer needs an instance of its own."
            )
        given = [name for name, default in _DEFAULTS.items() if settings.get(name, default) != default]
        if given:
            raise ValueError(
                f"an instance of {type(estimator).__name__} brings its own settings: give {', '.join(given)} "
                "to it, not to the layer."
            )
        device, dtype = settings.get("device"), settings.get("dtype")
        if device is not None or dtype is not None:
            estimator.to(device=device, dtype=dtype)
        return estimator
    if not isinstance(estimator, str):
        raise TypeError(
            f"estimator must be a name or an instance of mdnorm.estimators.Estimator, got {estimator!r}."
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)}, got {estimator!r}.")
    return ESTIMATORS[estimator](**settings)
