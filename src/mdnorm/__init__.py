"""Metadata Normalization: remove what metadata explain from a network's features, and measure what is left.

The layer is `MetadataNorm`; `fit_gram` prepares the paper's estimator; `mdnorm.functional` holds the maths,
`mdnorm.estimators` the strategies, `mdnorm.metrics` the measures of dependence.
"""

from mdnorm import estimators, functional, metrics
from mdnorm.integration import fit_gram
from mdnorm.layer import MetadataNorm

__all__ = ["MetadataNorm", "estimators", "fit_gram", "functional", "metrics"]

__version__ = "0.1.0"
