"""What the entry point says where the packages of a command are missing."""

import importlib.metadata
import subprocess
import sys

import pytest

import mdnorm.cli
from mdnorm.commands import app


def advice(*arguments):
    code = f"import sys; sys.modules['typer'] = None; sys.argv[1:] = {list(arguments)}\n"
    code += "import mdnorm.cli\nmdnorm.cli.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["audit", "features.npy"], "audit"),
        (["residualize", "--help"], "tables"),
        (["experiment", "synthetic"], "experiments"),
        (["experiment", "digits"], "image"),
        (["experiment"], "experiments"),
    ],
)
def test_the_extra_is_that_of_the_command(arguments, extra):
    assert (
        advice(*arguments)
        .strip()
        .endswith(f"package 'typer': install it with  pip install 'mdnorm[{extra}]'")
    )


def test_without_a_command_all_are_named():
    for extra in ("experiments", "audit", "tables"):
        assert f"pip install 'mdnorm[{extra}]'" in advice()


def test_every_command_and_extra_is_there():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert names == {*mdnorm.cli._EXTRAS, "info"}
    assert all(f"mdnorm {name}" in mdnorm.cli.__doc__ for name in names)
    extras = {*mdnorm.cli._EXTRAS.values(), *mdnorm.cli._EXPERIMENT_EXTRAS.values()}
    assert extras <= set(importlib.metadata.metadata("mdnorm").get_all("Provides-Extra"))
