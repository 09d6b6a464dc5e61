"""Measures of dependence between features and metadata."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mdnorm.metrics.distance_correlation import (
    ConditionalDistanceCorrelation,
    DistanceCorrelationInterval,
    conditional_distance_correlation_sqr,
    distance_correlation_interval,
    distance_correlation_sqr,
    distance_covariance_sqr,
    partial_distance_correlation,
)
from mdnorm.metrics.gaps import GroupGaps, group_gaps, quantile_groups
from mdnorm.metrics.independence import (
    DistanceCorrelationPermutationTest,
    DistanceCorrelationTTest,
    conditional_independence_test,
    distance_correlation_chi_squared_p_value,
    distance_correlation_permutation_test,
    distance_correlation_t_test,
)
from mdnorm.metrics.kernels import cka, hsic
from mdnorm.metrics.probes import ProbeResult, probe

if TYPE_CHECKING:
    from mdnorm.metrics.streaming import DistanceCorrelation, GroupRates

__all__ = [
    "ConditionalDistanceCorrelation",
    "DistanceCorrelation",
    "DistanceCorrelationInterval",
    "DistanceCorrelationPermutationTest",
    "DistanceCorrelationTTest",
    "GroupGaps",
    "GroupRates",
    "ProbeResult",
    "cka",
    "conditional_distance_correlation_sqr",
    "conditional_independence_test",
    "distance_correlation_chi_squared_p_value",
    "distance_correlation_interval",
    "distance_correlation_permutation_test",
    "distance_correlation_sqr",
    "distance_correlation_t_test",
    "distance_covariance_sqr",
    "group_gaps",
    "hsic",
    "partial_distance_correlation",
    "probe",
    "quantile_groups",
]


def __getattr__(name: str) -> Any:
    # These are classes of torchmetrics, which is not imported unless they are used.
    if name in ("DistanceCorrelation", "GroupRates"):
        return getattr(importlib.import_module("mdnorm.metrics.streaming"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
