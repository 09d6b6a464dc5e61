"""Metadata Normalization: remove what metadata explain from a network's features, and measure what is left.

The layer is `MetadataNorm`; `insert` puts it into an existing model, and `insertions` says where; `fit_gram`
prepares the paper's estimator; `recalibrate` refits the coefficients of a trained network on all data, and
`recalibrated` does so for one evaluation during training; `features` collects the output of a module; `save`
and `load` keep model, layers and design in one file; `Design` turns tables into metadata columns;
`balancing_weights` weights samples so that labels and metadata are independent; `DependenceLoss` penalises
dependence of the outputs on the metadata; `erase` removes metadata that will be unknown at inference; `audit`
reports what features reveal of the metadata.

`mdnorm.regression` holds the maths, `mdnorm.erasure` erasers, `mdnorm.design` metadata columns,
`mdnorm.estimators` the strategies, `mdnorm.metrics` the measures of dependence, `mdnorm.integration` what
works on whole models, `mdnorm.distributed` what several processes need, `mdnorm.auditing` the parts of
`audit`. `mdnorm.tables` and `mdnorm.sklearn`, tables without a network, are imported when they are first
used; the latter needs scikit-learn.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mdnorm import auditing, design, distributed, erasure, estimators, integration, metrics, regression
from mdnorm.auditing import audit
from mdnorm.balance import BalancingWeights, balancing_weights
from mdnorm.context import metadata
from mdnorm.dependence_loss import DependenceLoss
from mdnorm.design import ConfoundedDesignWarning, Design, DesignDiagnosis
from mdnorm.integration import (
    WithMetadata,
    attach_design,
    design_of,
    erase,
    features,
    fit_gram,
    insert,
    insert_eraser,
    insertions,
    load,
    parameter_groups,
    penalty_loss,
    recalibrate,
    recalibrated,
    remove,
    save,
)
from mdnorm.layer import MetadataNorm, metadata_norm
from mdnorm.moments import Moments
from mdnorm.version import __version__ as __version__

if TYPE_CHECKING:
    from mdnorm import sklearn as sklearn
    from mdnorm import tables as tables

__all__ = [
    "BalancingWeights",
    "ConfoundedDesignWarning",
    "DependenceLoss",
    "Design",
    "DesignDiagnosis",
    "MetadataNorm",
    "Moments",
    "WithMetadata",
    "attach_design",
    "audit",
    "auditing",
    "balancing_weights",
    "design",
    "design_of",
    "distributed",
    "erase",
    "erasure",
    "estimators",
    "features",
    "fit_gram",
    "insert",
    "insert_eraser",
    "insertions",
    "integration",
    "load",
    "metadata",
    "metadata_norm",
    "metrics",
    "parameter_groups",
    "penalty_loss",
    "recalibrate",
    "recalibrated",
    "regression",
    "remove",
    "save",
]

# Not in `__all__`: a star would import them.
_LAZY = ("sklearn", "tables")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"mdnorm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
