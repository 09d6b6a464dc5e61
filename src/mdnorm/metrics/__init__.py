"""Measures of dependence between features and metadata."""

from mdnorm.metrics.distance_correlation import distance_correlation_sqr

__all__ = ["distance_correlation_sqr"]
