"""Where the coefficients of a layer come from: all behind ``MetadataNorm(estimator=…)``."""

import functools
from collections.abc import Callable

from mdnorm.estimators.base import Batch, Estimator
from mdnorm.estimators.least_squares import LeastSquares
from mdnorm.estimators.penalty import Penalty
from mdnorm.estimators.spread import Spread

__all__ = ["ESTIMATORS", "Batch", "Estimator", "LeastSquares", "Penalty", "Spread"]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "batch": functools.partial(LeastSquares, gram="batch", adjoint="batch", averaging=0),
    "dataset": functools.partial(LeastSquares, gram="dataset", adjoint="batch", averaging=1),
    "running": LeastSquares,
    "recursive": functools.partial(LeastSquares, adjoint="none", averaging=0, prior_on_all=True),
    "penalty": Penalty,
}
"""The estimators of ``MetadataNorm(estimator=…)`` by name."""
