"""Metadata Normalization: remove what metadata explain from a network's features, and measure what is left.

The layer is `MetadataNorm`; `fit_gram` prepares the paper's estimator, `recalibrate` makes the coefficients
of a trained network exact; `mdnorm.functional` holds the maths, `mdnorm.basis` flexible metadata columns,
`mdnorm.estimators` the strategies, `mdnorm.metrics` the measures of dependence; `audit` reports what features
know of metadata.
"""

from mdnorm import basis, estimators, functional, metrics
from mdnorm.auditing import audit
from mdnorm.context import metadata
from mdnorm.design import ConfoundedDesignWarning, Design, DesignDiagnosis
from mdnorm.integration import (
    WithMetadata,
    attach_design,
    design_of,
    fit_gram,
    insert,
    parameter_groups,
    penalty_loss,
    recalibrate,
    remove,
)
from mdnorm.layer import MetadataNorm

__all__ = [
    "ConfoundedDesignWarning",
    "Design",
    "DesignDiagnosis",
    "MetadataNorm",
    "WithMetadata",
    "attach_design",
    "audit",
    "basis",
    "design_of",
    "estimators",
    "fit_gram",
    "functional",
    "insert",
    "metadata",
    "metrics",
    "parameter_groups",
    "penalty_loss",
    "recalibrate",
    "remove",
]

__version__ = "0.1.0"
