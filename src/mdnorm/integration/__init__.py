"""Whole models: layers put in, fed, recalibrated and saved; what a layer knows about the metadata."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mdnorm.integration.applied import Insertion
from mdnorm.integration.dependence import DependenceRecorder
from mdnorm.integration.design import AttachedDesign, attach_design, design_of
from mdnorm.integration.erasing import erase, insert_eraser
from mdnorm.integration.features import features
from mdnorm.integration.gram import fit_gram
from mdnorm.integration.insert import InsertionReport, insert, insertions, remove
from mdnorm.integration.penalty import parameter_groups, penalty_loss
from mdnorm.integration.recalibrate import recalibrate
from mdnorm.integration.recalibrated import recalibrated
from mdnorm.integration.recalibration import RecalibratedLayer, Recalibration
from mdnorm.integration.saving import load, save
from mdnorm.integration.wrapper import WithMetadata

if TYPE_CHECKING:
    from mdnorm.integration.huggingface import MetadataTrainer
    from mdnorm.integration.lightning import MetadataNormCallback
    from mdnorm.integration.lightning_dependence import DependenceCallback

__all__ = [
    "AttachedDesign",
    "DependenceCallback",
    "DependenceRecorder",
    "Insertion",
    "InsertionReport",
    "MetadataNormCallback",
    "MetadataTrainer",
    "RecalibratedLayer",
    "Recalibration",
    "WithMetadata",
    "attach_design",
    "design_of",
    "erase",
    "features",
    "fit_gram",
    "insert",
    "insert_eraser",
    "insertions",
    "load",
    "parameter_groups",
    "penalty_loss",
    "recalibrate",
    "recalibrated",
    "remove",
    "save",
]

# Classes of packages which are not imported unless they are used.
_LAZY = {
    "DependenceCallback": "lightning_dependence",
    "MetadataNormCallback": "lightning",
    "MetadataTrainer": "huggingface",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mdnorm.integration.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
