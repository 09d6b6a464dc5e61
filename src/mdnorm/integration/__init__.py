"""Metadata Normalization in whole models."""

from mdnorm.integration.gram import fit_gram

__all__ = ["fit_gram"]
