"""Whole models: metadata statistics, recalibration and penalties for every layer inside."""

from mdnorm.integration.gram import fit_gram
from mdnorm.integration.penalty import parameter_groups, penalty_loss
from mdnorm.integration.recalibrate import recalibrate

__all__ = ["fit_gram", "parameter_groups", "penalty_loss", "recalibrate"]
