"""Metadata as people have them, a table with a formula, to the matrices that `MetadataNorm` takes."""

from mdnorm.design.curves import polynomial
from mdnorm.design.diagnosis import ConfoundedDesignWarning, DesignDiagnosis, SparseCell
from mdnorm.design.formula import FormulaError
from mdnorm.design.leakage import LeakageWarning
from mdnorm.design.matrices import Design, DesignMatrices
from mdnorm.design.roles import TableWarning

__all__ = [
    "ConfoundedDesignWarning",
    "Design",
    "DesignDiagnosis",
    "DesignMatrices",
    "FormulaError",
    "LeakageWarning",
    "SparseCell",
    "TableWarning",
    "polynomial",
]
