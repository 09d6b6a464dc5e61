"""The version of the package, for all who write it into a result."""

__version__ = "0.1.0"
