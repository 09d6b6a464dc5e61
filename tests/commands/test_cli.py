"""What the entry point says where the packages of a command are missing."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

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
    ],
)
def test_the_extra_is_that_of_the_command(arguments, extra):
    assert (
        advice(*arguments)
        .strip()
        .endswith(f"package 'typer': install it with  pip install 'mdnorm[{extra}]'")
    )


def test_without_a_command_all_are_named():
    for extra in ("audit", "tables"):
        assert f"pip install 'mdnorm[{extra}]'" in advice()


def test_every_command_and_extra_is_there():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert not app.registered_groups
    assert names == {*mdnorm.cli._EXTRAS, "info"}
    assert all(f"mdnorm {name}" in mdnorm.cli.__doc__ for name in names)
    extras = set(mdnorm.cli._EXTRAS.values())
    assert extras <= set(importlib.metadata.metadata("mdnorm").get_all("Provides-Extra"))


def test_info():
    def call(*arguments):
        return CliRunner().invoke(app, list(arguments))

    facts = json.loads(call("info", "--json").stdout)
    assert facts["mdnorm"] == mdnorm.__version__
    assert facts["estimators"] == ["batch", "dataset", "penalty", "recursive", "running"]
    assert "estimators    batch, dataset, penalty, recursive, running" in call("info").stdout


@pytest.mark.parametrize("block", ["", "sys.modules['typer'] = None; "])
def test_version(block):
    code = f"import sys; {block}import mdnorm.cli; sys.argv[1:] = ['--version']; mdnorm.cli.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{mdnorm.__version__}\n", "")
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{mdnorm.__version__}\n")
    assert "--version" in CliRunner().invoke(app, ["--help"]).stdout


def test_import_is_light():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, mdnorm\n"
            "heavy = {'sklearn', 'scipy', 'matplotlib', 'pandas', 'typer', 'rich', 'jinja2', 'safetensors'}\n"
            "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_module_can_be_run():
    result = subprocess.run(
        [sys.executable, "-m", "mdnorm", "info"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert mdnorm.__version__ in result.stdout
