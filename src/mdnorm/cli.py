"""The command line: ``mdnorm experiment …``, ``mdnorm audit``, ``mdnorm residualize``, ``mdnorm info``.

Only `main` may be imported without the extras of the commands; it says which one is missing.
"""

from __future__ import annotations

import sys

_EXTRAS = {"experiment": "experiments", "audit": "audit", "residualize": "tables"}
# Experiments on images, clips and brains read files of their own kinds.
_EXPERIMENT_EXTRAS = {"image": "image", "digits": "image", "video": "video", "mri": "mri"}


def main() -> None:
    """Run the command line (entry point ``mdnorm``, also ``python -m mdnorm``)."""
    try:
        from mdnorm.commands import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "mdnorm":
            raise
        sys.exit(f"mdnorm: the command line needs the package {error.name!r}: {_advice(sys.argv[1:])}")
    app(prog_name="mdnorm")


def _advice(arguments: list[str]) -> str:
    command, setting = (*arguments, "", "")[:2]
    if command in _EXTRAS:
        extra = _EXTRAS[command]
        if command == "experiment":
            extra = _EXPERIMENT_EXTRAS.get(setting, extra)
        return f"install it with  pip install 'mdnorm[{extra}]'"
    return "install it with  " + ", ".join(
        f"pip install 'mdnorm[{extra}]' (mdnorm {name})" for name, extra in _EXTRAS.items()
    )
