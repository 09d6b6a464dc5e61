"""The command line: ``mdnorm audit``, ``mdnorm residualize``, ``mdnorm info``, ``mdnorm --version``.

Only `main` may be imported without the extras of the commands; it says which one is missing.
"""

from __future__ import annotations

import sys

_EXTRAS = {"audit": "audit", "residualize": "tables"}


def main() -> None:
    """Run the command line (entry point ``mdnorm``, also ``python -m mdnorm``)."""
    if sys.argv[1:] == ["--version"]:
        # Needs no extra.
        from mdnorm import __version__

        print(__version__)
        return
    try:
        from mdnorm.commands import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "mdnorm":
            raise
        sys.exit(f"mdnorm: the command line needs the package {error.name!r}: {_advice(sys.argv[1:])}")
    app(prog_name="mdnorm")


def _advice(arguments: list[str]) -> str:
    if arguments and arguments[0] in _EXTRAS:
        return f"install it with  pip install 'mdnorm[{_EXTRAS[arguments[0]]}]'"
    return "install it with  " + ", ".join(
        f"pip install 'mdnorm[{extra}]' (mdnorm {name})" for name, extra in _EXTRAS.items()
    )
