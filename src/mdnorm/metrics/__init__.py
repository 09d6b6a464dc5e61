"""Measures of dependence between features and metadata."""

from mdnorm.metrics.distance_correlation import (
    ConditionalDistanceCorrelation,
    DistanceCorrelationInterval,
    conditional_distance_correlation_sqr,
    distance_correlation_interval,
    distance_correlation_sqr,
    distance_covariance_sqr,
    partial_distance_correlation,
)
from mdnorm.metrics.independence import (
    DistanceCorrelationPermutationTest,
    DistanceCorrelationTTest,
    distance_correlation_permutation_test,
    distance_correlation_t_test,
)
from mdnorm.metrics.kernels import cka, hsic

__all__ = [
    "ConditionalDistanceCorrelation",
    "DistanceCorrelationInterval",
    "DistanceCorrelationPermutationTest",
    "DistanceCorrelationTTest",
    "cka",
    "conditional_distance_correlation_sqr",
    "distance_correlation_interval",
    "distance_correlation_permutation_test",
    "distance_correlation_sqr",
    "distance_correlation_t_test",
    "distance_covariance_sqr",
    "hsic",
    "partial_distance_correlation",
]
