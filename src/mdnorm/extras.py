"""Packages that only some parts need: an error that names the extra where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


@contextmanager
def requires(extra: str, distribution: str = "mdnorm") -> Iterator[None]:
    """Turn the failure of an import inside the block into a MissingExtraError that names the extra.

    The `distribution` is what has this extra, if not mdnorm: a package that builds on it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not package or package in ("mdnorm", distribution.replace("-", "_")):
            raise
        raise MissingExtraError(
            f"the package {package!r} is missing: pip install '{distribution}[{extra}]'", name=error.name
        ) from error
