"""The estimator for scikit-learn: `MetadataResidualizer`."""

from mdnorm.extras import requires

with requires("tables"):
    from mdnorm.tables.residualizer import MetadataResidualizer

__all__ = ["MetadataResidualizer"]
