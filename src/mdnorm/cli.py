"""The command line: ``mdnorm experiment …``, ``mdnorm info``.

Only `main` may be imported without the extra ``mdnorm[experiments]``; it says so where that is missing.
"""

from __future__ import annotations

import sys

_EXTRA = "experiments"


def main() -> None:
    """Run the command line (entry point ``mdnorm``, also ``python -m mdnorm``)."""
    try:
        from mdnorm.commands import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "mdnorm":
            raise
        sys.exit(
            f"mdnorm: the command line needs the package {error.name!r}: "
            f"install it with  pip install 'mdnorm[{_EXTRA}]'"
        )
    app(prog_name="mdnorm")
