"""Whole models: metadata statistics, recalibration, penalties for every layer; what a layer knows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mdnorm.integration.dependence import DependenceRecorder
from mdnorm.integration.design import AttachedDesign, attach_design, design_of
from mdnorm.integration.gram import fit_gram
from mdnorm.integration.insert import Insertion, InsertionReport, insert, insertions, remove
from mdnorm.integration.penalty import parameter_groups, penalty_loss
from mdnorm.integration.recalibrate import recalibrate
from mdnorm.integration.wrapper import WithMetadata

if TYPE_CHECKING:
    from mdnorm.integration.lightning import DependenceCallback

__all__ = [
    "AttachedDesign",
    "DependenceCallback",
    "DependenceRecorder",
    "Insertion",
    "InsertionReport",
    "WithMetadata",
    "attach_design",
    "design_of",
    "fit_gram",
    "insert",
    "insertions",
    "parameter_groups",
    "penalty_loss",
    "recalibrate",
    "remove",
]

# A class of Lightning, which is not imported unless it is used.
_LAZY = {"DependenceCallback": "lightning"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mdnorm.integration.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
