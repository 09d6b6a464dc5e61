"""Audit features: what do they know of the metadata, before and after any treatment?

`audit` is the entry point (also `mdnorm.audit`, and ``mdnorm audit`` on the command line).
"""

from mdnorm.auditing.reading import InputError, read_features, read_table
from mdnorm.auditing.report import Report
from mdnorm.auditing.run import audit
from mdnorm.auditing.settings import Settings

__all__ = ["InputError", "Report", "Settings", "audit", "read_features", "read_table"]
